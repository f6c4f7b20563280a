//! What went wrong with a request, and what the caller can do.
//!
//! A request that may succeed later without a change is [`StoreErrorKind::Busy`]. What a person
//! has to mend, such as credentials, is [`StoreErrorKind::Denied`]: an open volume goes on trying,
//! since giving up would lose it, and a command ends at once. So is an answer that this module
//! does not know: something on the way, such as a proxy, may have given it.

use std::error::Error;

use aws_credential_types::provider::error::CredentialsError;
use aws_sdk_s3::config::http::HttpResponse;
use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};
use sheave_core::printable;
use sheave_object::{StoreError, StoreErrorKind};

/// Where a bucket that is elsewhere says that it is.
const REGION_HEADER: &str = "x-amz-bucket-region";
/// Longer words of a store are cut.
const WORDS_MAX: usize = 300;

/// What a store has answered that is no success.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Refusal<'a> {
    pub(crate) status: u16,
    /// The name of the error; not all answers have one.
    pub(crate) code: Option<&'a str>,
    pub(crate) words: Option<&'a str>,
    /// The region of the bucket.
    pub(crate) region: Option<&'a str>,
}

/// The error of a request that has failed, on that bucket.
pub(crate) fn of_request<E>(bucket: &str, error: &SdkError<E, HttpResponse>) -> StoreError
where
    E: ProvideErrorMetadata + Error + 'static,
{
    match error {
        SdkError::ServiceError(answer) => {
            let (raw, known) = (answer.raw(), answer.err());
            let refusal = Refusal {
                status: raw.status().as_u16(),
                code: known.code(),
                words: known.message(),
                region: raw.headers().get(REGION_HEADER),
            };
            of_refusal(bucket, refusal)
        }
        SdkError::ResponseError(answer) => {
            let status = answer.raw().status().as_u16();
            of_refusal(bucket, Refusal { status, ..Refusal::default() })
        }
        other => of_no_answer(other),
    }
}

/// The error of a request that has no answer.
pub(crate) fn of_no_answer(error: &(dyn Error + 'static)) -> StoreError {
    let words = chain(error);
    if let Some(error) = find::<CredentialsError>(error) {
        let (kind, what) = match error {
            CredentialsError::CredentialsNotLoaded(_) => {
                let what = "there are no credentials; set AWS_ACCESS_KEY_ID and \
                            AWS_SECRET_ACCESS_KEY, or AWS_PROFILE and a file ~/.aws/credentials, \
                            for the process that opens the volume";
                return StoreError::new(StoreErrorKind::Denied, what);
            }
            CredentialsError::InvalidConfiguration(_) => {
                (StoreErrorKind::Denied, "the AWS configuration is wrong")
            }
            _ => (StoreErrorKind::Busy, "the source of credentials does not give any"),
        };
        return StoreError::new(kind, format!("{what}: {words}"));
    }
    if words.contains("certificate") {
        let why = format!(
            "{words}; if the store's certificate has an authority of its own, name its file in \
             SSL_CERT_FILE"
        );
        return StoreError::new(StoreErrorKind::Denied, why);
    }
    StoreError::new(StoreErrorKind::Busy, words)
}

/// The error that an answer means.
pub(crate) fn of_refusal(bucket: &str, refusal: Refusal<'_>) -> StoreError {
    use StoreErrorKind::{Broken, Busy, Denied, NotFound};
    let Refusal { status, code, region, .. } = refusal;
    let said = said(refusal);
    let (kind, hint) = match (status, code.unwrap_or_default()) {
        (_, "NoSuchKey") => (NotFound, String::new()),
        (_, "NoSuchBucket") => {
            (Denied, format!("there is no bucket {bucket}; make it, or correct its name"))
        }
        (_, "RequestTimeTooSkewed") => (
            Denied,
            "the clock of this node differs from the store's by too much; set it, as by NTP"
                .to_owned(),
        ),
        (_, "ExpiredToken" | "TokenRefreshRequired" | "InvalidToken") => {
            (Denied, "the session token is not valid any more; renew the credentials".to_owned())
        }
        (_, "InvalidAccessKeyId" | "SignatureDoesNotMatch") => (
            Denied,
            "the credentials are wrong; check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or the \
             profile"
                .to_owned(),
        ),
        (300..400, _)
        | (
            _,
            "PermanentRedirect"
            | "AuthorizationHeaderMalformed"
            | "IllegalLocationConstraintException",
        ) => {
            let is_in = match region {
                Some(region) => format!("it is in {region}: add ?region={region}"),
                None => "add ?region=… with the bucket's region, or correct ?endpoint=".to_owned(),
            };
            (Denied, format!("bucket {bucket} is not in the region that was asked; {is_in}"))
        }
        (_, "InvalidObjectState") => (
            Denied,
            "the object was moved to an archive; restore it, and remove the lifecycle rule that \
             did it"
                .to_owned(),
        ),
        // Damaged or cut off on the way.
        (400, "BadDigest" | "XAmzContentSHA256Mismatch" | "IncompleteBody" | "RequestTimeout") => {
            (Busy, String::new())
        }
        (501, _) | (405, _) => (
            Broken,
            "the store cannot do what an object volume needs, such as If-None-Match".to_owned(),
        ),
        (408 | 409 | 425 | 429 | 500.., _) => (Busy, String::new()),
        (401 | 403, _) => (
            Denied,
            format!(
                "allow s3:GetObject, s3:PutObject, s3:DeleteObject and s3:ListBucket on bucket \
                 {bucket} to these credentials"
            ),
        ),
        (404, _) => {
            (Denied, "there is something else at this endpoint; correct ?endpoint=".to_owned())
        }
        _ => (Denied, String::new()),
    };
    let why = match &*hint {
        "" => said,
        hint => format!("{hint} ({said})"),
    };
    StoreError::new(kind, why)
}

/// The words of a store, on one line.
fn said(Refusal { status, code, words, .. }: Refusal<'_>) -> String {
    let words = words.map(|words| words.trim().chars().take(WORDS_MAX).collect::<String>());
    let parts = [Some(format!("{status}")), code.map(str::to_owned)];
    let head = parts.into_iter().flatten().collect::<Vec<_>>().join(" ");
    let said = match words.filter(|words| !words.is_empty()) {
        Some(words) => format!("the store says {head}: {words}"),
        None => format!("the store says {head}"),
    };
    printable(&said).to_string()
}

/// An error and its causes, without repetitions.
fn chain(error: &(dyn Error + 'static)) -> String {
    let mut words: Vec<String> = Vec::new();
    let mut next = Some(error);
    while let Some(error) = next {
        let text = error.to_string();
        if !text.is_empty() && !words.iter().any(|other| other.contains(&text)) {
            words.push(text);
        }
        next = error.source();
    }
    let text: String = words.join(": ").chars().take(WORDS_MAX).collect();
    printable(&text).to_string()
}

/// The first cause of a type.
fn find<'a, T: Error + 'static>(error: &'a (dyn Error + 'static)) -> Option<&'a T> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(found) = error.downcast_ref() {
            return Some(found);
        }
        next = error.source();
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_says_what_to_do() {
        use StoreErrorKind::{Broken, Busy, Denied, NotFound};
        let cases = [
            (404, Some("NoSuchKey"), NotFound, "404 NoSuchKey"),
            (404, Some("NoSuchBucket"), Denied, "there is no bucket b; make it"),
            (404, None, Denied, "correct ?endpoint="),
            (403, Some("AccessDenied"), Denied, "allow s3:GetObject"),
            (403, None, Denied, "allow s3:GetObject"),
            (401, None, Denied, "allow s3:GetObject"),
            (403, Some("InvalidAccessKeyId"), Denied, "check AWS_ACCESS_KEY_ID"),
            (403, Some("SignatureDoesNotMatch"), Denied, "check AWS_ACCESS_KEY_ID"),
            (403, Some("RequestTimeTooSkewed"), Denied, "the clock of this node"),
            (400, Some("ExpiredToken"), Denied, "renew the credentials"),
            (403, Some("InvalidObjectState"), Denied, "lifecycle rule"),
            (301, Some("PermanentRedirect"), Denied, "it is in eu-west-1: add ?region=eu-west-1"),
            (307, None, Denied, "it is in eu-west-1"),
            (400, Some("AuthorizationHeaderMalformed"), Denied, "it is in eu-west-1"),
            (400, Some("BadDigest"), Busy, "400 BadDigest"),
            (400, Some("RequestTimeout"), Busy, "400"),
            (400, Some("InvalidArgument"), Denied, "400 InvalidArgument"),
            (409, Some("ConditionalRequestConflict"), Busy, "409"),
            (429, None, Busy, "429"),
            (500, Some("InternalError"), Busy, "500"),
            (503, Some("SlowDown"), Busy, "503 SlowDown"),
            (507, None, Busy, "507"),
            (501, Some("NotImplemented"), Broken, "If-None-Match"),
        ];
        for (status, code, kind, want) in cases {
            let region = Some("eu-west-1");
            let refusal = Refusal { status, code, words: Some("x\ny"), region };
            let error = of_refusal("b", refusal);
            assert_eq!(error.kind, kind, "{status} {code:?}");
            assert!(error.why.contains(want), "{status} {code:?}: {error}");
            assert!(!error.why.contains('\n'), "one line: {error}");
        }
    }

    #[test]
    fn a_request_without_an_answer_is_tried_again_unless_a_person_must_act() {
        let error = |source: CredentialsError| -> StoreError {
            of_no_answer(&SdkError::<std::fmt::Error, HttpResponse>::construction_failure(source))
        };
        let none = error(CredentialsError::not_loaded("nothing"));
        assert_eq!(none.kind, StoreErrorKind::Denied);
        assert!(none.why.contains("AWS_ACCESS_KEY_ID"), "{none}");
        let away = error(CredentialsError::provider_error("no route"));
        assert_eq!(away.kind, StoreErrorKind::Busy);
        assert!(away.why.contains("no route"), "{away}");
        let refused = std::io::Error::from(std::io::ErrorKind::ConnectionRefused);
        assert_eq!(of_no_answer(&refused).kind, StoreErrorKind::Busy);
        let unknown = std::io::Error::other("invalid peer certificate: UnknownIssuer");
        let unknown = of_no_answer(&unknown);
        assert_eq!(unknown.kind, StoreErrorKind::Denied);
        assert!(unknown.why.contains("SSL_CERT_FILE"), "{unknown}");
    }
}
