//! Signatures of requests, version 4: made by clients, checked by the store.

use std::fmt::Write as _;

use aws_lc_rs::{digest, hmac};
use hyper::HeaderMap;
use hyper::http::request::Parts;

use crate::answer::Refusal;
use crate::date::Date;
use crate::request::{Asked, encode};
use crate::settings::Settings;

const ALGORITHM: &str = "AWS4-HMAC-SHA256";
const SKEW_S_MAX: u64 = 15 * 60;
pub(crate) const CONTENT_DIGEST: &str = "x-amz-content-sha256";
pub(crate) const DATE: &str = "x-amz-date";

/// What a signature is made of beside the request.
pub(crate) struct Scope<'a> {
    pub(crate) secret: &'a str,
    pub(crate) date: Date,
    pub(crate) region: &'a str,
}

/// The signature in lower-case hexadecimal of a request with these signed headers.
pub(crate) fn signature(scope: &Scope<'_>, asked: &Signed<'_>) -> String {
    let time = scope.date.basic();
    let day = &time[..8];
    let request = hex(digest::digest(&digest::SHA256, asked.canonical().as_bytes()).as_ref());
    let text = format!("{ALGORITHM}\n{time}\n{day}/{}/s3/aws4_request\n{request}", scope.region);
    let secret = format!("AWS4{}", scope.secret);
    let key = [day, scope.region, "s3", "aws4_request"]
        .iter()
        .fold(secret.into_bytes(), |key, part| mac(&key, part.as_bytes()));
    hex(&mac(&key, text.as_bytes()))
}

/// The parts of a request that a signature covers.
pub(crate) struct Signed<'a> {
    pub(crate) method: &'a str,
    /// Decoded.
    pub(crate) path: String,
    pub(crate) query: &'a [(String, String)],
    pub(crate) headers: &'a HeaderMap,
    /// Names in lower case, sorted, with `;` between.
    pub(crate) names: &'a str,
}

impl Signed<'_> {
    fn canonical(&self) -> String {
        let mut query: Vec<_> = self
            .query
            .iter()
            .map(|(name, value)| format!("{}={}", encode(name, ""), encode(value, "")))
            .collect();
        query.sort();
        let path = encode(&self.path, "/");
        let mut text = format!("{}\n{path}\n{}\n", self.method, query.join("&"));
        for name in self.names.split(';') {
            let values: Vec<_> = self.headers.get_all(name).iter().map(words_of).collect();
            writeln!(text, "{name}:{}", values.join(",")).expect("a string has room");
        }
        let digest = self.headers.get(CONTENT_DIGEST).and_then(|value| value.to_str().ok());
        write!(text, "\n{}\n{}", self.names, digest.unwrap_or_default())
            .expect("a string has room");
        text
    }
}

/// A header's value, with single spaces.
fn words_of(value: &hyper::header::HeaderValue) -> String {
    let text = String::from_utf8_lossy(value.as_bytes());
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Checks that the client may use the store.
pub(crate) fn check(parts: &Parts, asked: &Asked, settings: &Settings) -> Result<(), Refusal> {
    let Some(access) = &settings.access else { return Ok(()) };
    let header = |name: &str| parts.headers.get(name).and_then(|value| value.to_str().ok());
    let authorization = header("authorization").ok_or(Refusal::Anonymous)?;
    let given = Given::parse(authorization).ok_or(Refusal::Malformed)?;
    if given.region != settings.region {
        return Err(Refusal::WrongRegion {
            given: given.region.to_owned(),
            own: settings.region.clone(),
        });
    }
    if given.key != access.key {
        return Err(Refusal::UnknownKey);
    }
    let date = header(DATE).and_then(Date::parse_basic).ok_or(Refusal::NoDate)?;
    let now = Date::now(settings.clock_ahead_s);
    if date.seconds_to(now) > SKEW_S_MAX {
        return Err(Refusal::Skewed { request: date, now });
    }
    let names: Vec<_> = given.names.split(';').collect();
    let covers_all = ["host", DATE].iter().all(|name| names.contains(name))
        && parts
            .headers
            .keys()
            .all(|name| !name.as_str().starts_with("x-amz-") || names.contains(&name.as_str()));
    let path = format!("/{}", path_of(asked, parts));
    let signed = Signed {
        method: parts.method.as_str(),
        path,
        query: &asked.query,
        headers: &parts.headers,
        names: given.names,
    };
    let scope = Scope { secret: &access.secret, date, region: &settings.region };
    let is_right = covers_all
        && given.day == &date.basic()[..8]
        && signature(&scope, &signed) == given.signature;
    if is_right { Ok(()) } else { Err(Refusal::WrongSignature) }
}

/// The path without its first slash; a bucket's may end with one or not.
fn path_of(asked: &Asked, parts: &Parts) -> String {
    let has_slash = parts.uri.path().strip_prefix('/').is_some_and(|path| path.contains('/'));
    format!("{}{}{}", asked.bucket, if has_slash { "/" } else { "" }, asked.key)
}

/// The header of a request.
struct Given<'a> {
    key: &'a str,
    day: &'a str,
    region: &'a str,
    names: &'a str,
    signature: &'a str,
}

impl<'a> Given<'a> {
    fn parse(header: &'a str) -> Option<Self> {
        let fields = header.strip_prefix(ALGORITHM)?;
        let field = |name: &str| {
            let mut all = fields.split(',').filter_map(|field| field.trim().split_once('='));
            all.find(|(found, _)| *found == name).map(|(_, value)| value)
        };
        let mut credential = field("Credential")?.rsplitn(5, '/');
        let (end, service) = (credential.next()?, credential.next()?);
        let (region, day, key) = (credential.next()?, credential.next()?, credential.next()?);
        let (names, signature) = (field("SignedHeaders")?, field("Signature")?);
        let is_ours = end == "aws4_request" && service == "s3";
        is_ours.then_some(Self { key, day, region, names, signature })
    }
}

/// The header that signs a request.
pub(crate) fn authorization(key: &str, scope: &Scope<'_>, signed: &Signed<'_>) -> String {
    let day = &scope.date.basic()[..8];
    let credential = format!("{key}/{day}/{}/s3/aws4_request", scope.region);
    let signature = signature(scope, signed);
    let names = signed.names;
    format!("{ALGORITHM} Credential={credential}, SignedHeaders={names}, Signature={signature}")
}

/// The SHA-256 of a body, in lower-case hexadecimal.
pub(crate) fn digest_of(body: &[u8]) -> String {
    hex(digest::digest(&digest::SHA256, body).as_ref())
}

fn mac(key: &[u8], text: &[u8]) -> Vec<u8> {
    hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, key), text).as_ref().to_vec()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        write!(text, "{byte:02x}").expect("a string has room");
        text
    })
}

#[cfg(test)]
mod tests {
    use hyper::header::HeaderValue;

    use super::*;

    /// The example of a GetObject in the documentation of S3.
    #[test]
    fn a_published_request_has_its_published_signature() {
        let mut headers = HeaderMap::new();
        let empty = digest_of(b"");
        let lines = [
            ("host", "examplebucket.s3.amazonaws.com"),
            ("range", "bytes=0-9"),
            (CONTENT_DIGEST, &empty),
            (DATE, "20130524T000000Z"),
        ];
        for (name, value) in lines {
            let name = hyper::header::HeaderName::from_bytes(name.as_bytes()).expect("a name");
            headers.insert(name, HeaderValue::from_str(value).expect("a value"));
        }
        let signed = Signed {
            method: "GET",
            path: "/test.txt".to_owned(),
            query: &[],
            headers: &headers,
            names: "host;range;x-amz-content-sha256;x-amz-date",
        };
        let scope = Scope {
            secret: "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
            date: Date::parse_basic("20130524T000000Z").expect("a date"),
            region: "us-east-1",
        };
        assert_eq!(
            signature(&scope, &signed),
            "f0e8bdb87c964420e857bd35b5d6ed310bd44f0170aba48dd91039c6036bdb41"
        );
    }
}
