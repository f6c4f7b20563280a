//! Answers: what was found, and refusals with S3's codes, in XML.

use std::fmt::Write as _;

use bytes::Bytes;
use hyper::StatusCode;

use crate::date::Date;
use crate::objects::{ListQuery, Listing};
use crate::request::{Asked, encode};

const XML: &str = "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n";
const NAMESPACE: &str = "http://s3.amazonaws.com/doc/2006-03-01/";

/// An answer before it is sent.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) headers: Vec<(&'static str, String)>,
    pub(crate) body: Bytes,
    /// The body's length in the answer to a HEAD, which has no body.
    pub(crate) head_len: Option<u64>,
}

impl Answer {
    pub(crate) fn new(status: StatusCode) -> Self {
        Self { status, headers: Vec::new(), body: Bytes::new(), head_len: None }
    }

    pub(crate) fn with(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.headers.push((name, value.into()));
        self
    }

    pub(crate) fn xml(status: StatusCode, text: String) -> Self {
        let answer = Self::new(status).with("content-type", "application/xml");
        Self { body: text.into(), ..answer }
    }
}

/// Why a request is not done.
#[derive(Clone, Debug)]
pub(crate) enum Refusal {
    AccessDenied,
    Anonymous,
    BadDigest,
    BadRequest(&'static str),
    BucketExists,
    BucketNotEmpty,
    Conflict,
    InternalError,
    /// The store's own disk.
    Io(String),
    KeyTooLong,
    Malformed,
    NoBucket,
    NoDate,
    NoKey,
    NoLength,
    NotImplemented(&'static str),
    NotSatisfiable,
    PreconditionFailed,
    Skewed {
        request: Date,
        now: Date,
    },
    SlowDown,
    TooLarge,
    Unavailable,
    UnknownKey,
    WrongRegion {
        given: String,
        own: String,
    },
    WrongSignature,
}

impl Refusal {
    /// Status, code and message, as S3 has them.
    fn words(&self) -> (u16, &'static str, &'static str) {
        match self {
            Self::AccessDenied => (403, "AccessDenied", "Access Denied"),
            Self::Anonymous => (403, "AccessDenied", "Anonymous access is not allowed"),
            Self::BadDigest => (
                400,
                "XAmzContentSHA256Mismatch",
                "The provided 'x-amz-content-sha256' header does not match what was computed.",
            ),
            Self::BadRequest(why) => (400, "InvalidRequest", why),
            Self::BucketExists => (409, "BucketAlreadyOwnedByYou", "You already own this bucket"),
            Self::BucketNotEmpty => {
                (409, "BucketNotEmpty", "The bucket you tried to delete is not empty")
            }
            Self::Conflict => {
                (409, "ConditionalRequestConflict", "Another operation on this key goes on")
            }
            Self::InternalError => {
                (500, "InternalError", "We encountered an internal error. Please try again.")
            }
            Self::Io(_) => (500, "InternalError", ""),
            Self::KeyTooLong => (400, "KeyTooLongError", "Your key is too long"),
            Self::Malformed => (
                400,
                "AuthorizationHeaderMalformed",
                "The authorization header that you provided is not valid.",
            ),
            Self::NoBucket => (404, "NoSuchBucket", "The specified bucket does not exist"),
            Self::NoDate => (
                403,
                "AccessDenied",
                "AWS authentication requires a valid Date or x-amz-date header",
            ),
            Self::NoKey => (404, "NoSuchKey", "The specified key does not exist."),
            Self::NoLength => {
                (411, "MissingContentLength", "You must provide the Content-Length HTTP header.")
            }
            Self::NotImplemented(why) => (501, "NotImplemented", why),
            Self::NotSatisfiable => (416, "InvalidRange", "The requested range is not satisfiable"),
            Self::PreconditionFailed => (
                412,
                "PreconditionFailed",
                "At least one of the pre-conditions you specified did not hold",
            ),
            Self::Skewed { .. } => (
                403,
                "RequestTimeTooSkewed",
                "The difference between the request time and the current time is too large.",
            ),
            Self::SlowDown => (503, "SlowDown", "Please reduce your request rate."),
            Self::TooLarge => {
                (400, "EntityTooLarge", "Your proposed upload exceeds the maximum allowed size")
            }
            Self::Unavailable => {
                (503, "ServiceUnavailable", "Service is unable to handle request.")
            }
            Self::UnknownKey => (
                403,
                "InvalidAccessKeyId",
                "The AWS Access Key Id you provided does not exist in our records.",
            ),
            Self::WrongRegion { .. } => (400, "AuthorizationHeaderMalformed", ""),
            Self::WrongSignature => (
                403,
                "SignatureDoesNotMatch",
                "The request signature we calculated does not match the signature you provided. \
                 Check your key and signing method.",
            ),
        }
    }

    pub(crate) fn answer(&self, asked: &Asked, id: &str) -> Answer {
        let (status, code, message) = self.words();
        let mut more = String::new();
        let mut message = message.to_owned();
        let mut region = None;
        match self {
            Self::WrongRegion { given, own } => {
                message = format!(
                    "The authorization header is malformed; the region '{given}' is wrong; \
                     expecting '{own}'"
                );
                more = format!("<Region>{}</Region>", escaped(own));
                region = Some(own.clone());
            }
            Self::Skewed { request, now } => {
                more = format!(
                    "<RequestTime>{}</RequestTime><ServerTime>{}</ServerTime>\
                     <MaxAllowedSkewMilliseconds>900000</MaxAllowedSkewMilliseconds>",
                    request.basic(),
                    now.iso()
                );
            }
            Self::Io(why) => message.clone_from(why),
            _ => {}
        }
        let resource = format!("/{}/{}", asked.bucket, asked.key);
        let text = format!(
            "{XML}<Error><Code>{code}</Code><Message>{}</Message>{more}<Resource>{}</Resource>\
             <RequestId>{id}</RequestId></Error>",
            escaped(&message),
            escaped(&resource)
        );
        let status = StatusCode::from_u16(status).expect("a status of the table above");
        let answer = Answer::xml(status, text);
        match region {
            Some(region) => answer.with("x-amz-bucket-region", region),
            None => answer,
        }
    }
}

/// A list, of either version.
pub(crate) fn listing(asked: &Asked, query: &ListQuery, listing: &Listing) -> Answer {
    let is_encoded = asked.param("encoding-type") == Some("url");
    let key = |key: &str| if is_encoded { encode(key, "/") } else { escaped(key) };
    let mut text = format!("{XML}<ListBucketResult xmlns=\"{NAMESPACE}\">");
    let mut tag = |name: &str, value: &str| {
        write!(text, "<{name}>{value}</{name}>").expect("a string has room");
    };
    tag("Name", &escaped(&asked.bucket));
    tag("Prefix", &key(&query.prefix));
    tag("MaxKeys", &query.max.to_string());
    tag("IsTruncated", if listing.next_after.is_some() { "true" } else { "false" });
    if !query.delimiter.is_empty() {
        tag("Delimiter", &key(&query.delimiter));
    }
    if is_encoded {
        tag("EncodingType", "url");
    }
    if asked.param("list-type") == Some("2") {
        tag("KeyCount", &(listing.objects.len() + listing.prefixes.len()).to_string());
        for name in ["start-after", "continuation-token"] {
            let shown = if name == "start-after" { "StartAfter" } else { "ContinuationToken" };
            if let Some(value) = asked.param(name) {
                tag(shown, &key(value));
            }
        }
        if let Some(next) = &listing.next_after {
            tag("NextContinuationToken", &encode(next, ""));
        }
    } else {
        tag("Marker", &key(asked.param("marker").unwrap_or_default()));
        if let Some(next) = &listing.next_after {
            tag("NextMarker", &key(next));
        }
    }
    for entry in &listing.objects {
        let object = format!(
            "<Key>{}</Key><LastModified>{}</LastModified><ETag>&quot;{}&quot;</ETag>\
             <Size>{}</Size><StorageClass>STANDARD</StorageClass>",
            key(&entry.key),
            entry.modified.iso(),
            entry.tag,
            entry.len
        );
        tag("Contents", &object);
    }
    for prefix in &listing.prefixes {
        tag("CommonPrefixes", &format!("<Prefix>{}</Prefix>", key(prefix)));
    }
    text.push_str("</ListBucketResult>");
    Answer::xml(StatusCode::OK, text)
}

/// Where a bucket is.
pub(crate) fn location(region: &str) -> Answer {
    // The oldest region has no name here.
    let name = if region == "us-east-1" { "" } else { region };
    let text = format!(
        "{XML}<LocationConstraint xmlns=\"{NAMESPACE}\">{}</LocationConstraint>",
        escaped(name)
    );
    Answer::xml(StatusCode::OK, text)
}

fn escaped(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for each in text.chars() {
        match each {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\r' => escaped.push_str("&#13;"),
            _ => escaped.push(each),
        }
    }
    escaped
}
