//! One request, from its head to its answer.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use hyper::body::{Body as _, Incoming};
use hyper::http::request::Parts;
use hyper::{Method, Request, Response, StatusCode};
use tokio::task::spawn_blocking;
use tokio::time::{Instant, sleep};

use crate::answer::{self, Answer, Refusal};
use crate::body::{ReadError, Sent, read};
use crate::date::Date;
use crate::emulator::Shared;
use crate::fault::Effect;
use crate::log::{Kind, Record};
use crate::objects::{Condition, ListQuery, PutError};
use crate::request::{Asked, range};
use crate::settings::{Conditions, Outage, Settings};
use crate::signature::{self, CONTENT_DIGEST, digest_of};

/// Larger objects are refused.
const BODY_BYTES_MAX: u64 = 1 << 30;
/// Files have the encoded keys as names.
const KEY_BYTES_MAX: usize = 1024;
const LISTED_MAX: usize = 1000;
/// Between the check of a condition and its creation, in a store that races.
const RACE_WINDOW: Duration = Duration::from_millis(20);

/// The connection is reset.
#[derive(Debug)]
pub(crate) struct Cut;

/// Answers a request.
pub(crate) async fn serve(
    shared: Arc<Shared>,
    connection: u64,
    request: Request<Incoming>,
) -> Result<Response<Sent>, Cut> {
    let (parts, body) = request.into_parts();
    let Some(asked) = Asked::of(&parts) else { return Err(Cut) };
    let mut logged = Logged::new(&shared, &asked, connection);
    let settings = shared.settings.borrow().clone();
    let effect = shared.strike(&asked);
    match effect {
        Some(Effect::ResetBefore) => return Err(Cut),
        Some(Effect::HangBefore) => hang().await,
        _ => {}
    }
    if settings.outage == Some(Outage::Hang) {
        shared.until_no_hang().await;
    }
    // As a racing store does: before the body has come.
    let early = match settings.conditions {
        Conditions::Raced => condition_of(&parts)
            .and_then(|on| shared.objects.check(&asked.bucket, &asked.key, &on).or_refusal()),
        Conditions::Atomic | Conditions::Ignored => Ok(()),
    };
    let length = body.size_hint().exact();
    let body = match read(body, BODY_BYTES_MAX, settings.bandwidth).await {
        Ok(body) => Ok(body),
        Err(ReadError::TooLong) => Err(Refusal::TooLarge),
        Err(ReadError::Gone) => return Err(Cut),
    };
    logged.0.bytes_in = body.as_ref().map_or(0, |body| body.len() as u64);
    let job = Job { shared: shared.clone(), asked, parts, settings };
    let refusal = body.as_ref().err().cloned().or_else(|| refusal_of(&job.settings, effect));
    let refusal = refusal.or_else(|| early.err().filter(|_| job.asked.kind == Kind::Put));
    let refusal = refusal.or_else(|| length.is_none().then_some(Refusal::NoLength));
    let body = body.unwrap_or_default();
    if let Some(Effect::Late(by)) = effect {
        tokio::spawn(async move {
            sleep(by).await;
            let _ = job.done(&body).await;
        });
        return Err(Cut);
    }
    if job.settings.conditions == Conditions::Raced {
        sleep(RACE_WINDOW).await;
    }
    let done = match refusal {
        Some(refusal) => Err(refusal),
        None => job.done(&body).await,
    };
    sleep(shared.latency(&job.settings) + delay_of(effect)).await;
    if job.settings.outage == Some(Outage::Hang) || shared.is_hanging() {
        shared.until_no_hang().await;
    }
    match effect {
        Some(Effect::ResetAfter) => return Err(Cut),
        Some(Effect::HangAfter) => hang().await,
        _ => {}
    }
    let id = shared.request_id();
    let answer = done.unwrap_or_else(|refusal| refusal.answer(&job.asked, &id));
    logged.0.status = answer.status.as_u16();
    logged.0.bytes_out = answer.body.len() as u64;
    Ok(job.response(answer, &id, effect))
}

async fn hang() {
    std::future::pending::<Infallible>().await;
}

/// What an outage or a rule refuses.
fn refusal_of(settings: &Settings, effect: Option<Effect>) -> Option<Refusal> {
    if settings.outage == Some(Outage::Unavailable) {
        return Some(Refusal::Unavailable);
    }
    match effect? {
        Effect::InternalError => Some(Refusal::InternalError),
        Effect::SlowDown => Some(Refusal::SlowDown),
        Effect::Conflict => Some(Refusal::Conflict),
        Effect::AccessDenied => Some(Refusal::AccessDenied),
        _ => None,
    }
}

fn delay_of(effect: Option<Effect>) -> Duration {
    match effect {
        Some(Effect::Delay(by)) => by,
        _ => Duration::ZERO,
    }
}

/// The condition of a PutObject.
fn condition_of(parts: &Parts) -> Result<Condition, Refusal> {
    let header = |name: &str| parts.headers.get(name).and_then(|value| value.to_str().ok());
    match (header("if-none-match"), header("if-match")) {
        (None, None) => Ok(Condition::None),
        (Some("*"), None) => Ok(Condition::Absent),
        (None, Some(tag)) => Ok(Condition::Tag(tag.trim_matches('"').to_owned())),
        _ => Err(Refusal::NotImplemented(
            "A header you provided implies functionality that is not implemented",
        )),
    }
}

/// A request that is to be done.
struct Job {
    shared: Arc<Shared>,
    asked: Asked,
    parts: Parts,
    settings: Settings,
}

impl Job {
    async fn done(&self, body: &Bytes) -> Result<Answer, Refusal> {
        let Self { shared, asked, parts, settings } = self;
        signature::check(parts, asked, settings)?;
        self.check_digest(body)?;
        if asked.kind != Kind::Bucket && !shared.objects.has_bucket(&asked.bucket) {
            return Err(Refusal::NoBucket);
        }
        if asked.key.len() > KEY_BYTES_MAX {
            return Err(Refusal::KeyTooLong);
        }
        match asked.kind {
            Kind::Put => self.put(body.clone()).await,
            Kind::Get | Kind::Head => self.get().await,
            Kind::List => self.list(),
            Kind::Delete => {
                shared.objects.delete(&asked.bucket, &asked.key).or_refusal()?;
                Ok(Answer::new(StatusCode::NO_CONTENT))
            }
            Kind::Bucket => self.bucket(),
            Kind::Other => Err(Refusal::NotImplemented("This store does not have that request.")),
        }
    }

    fn check_digest(&self, body: &Bytes) -> Result<(), Refusal> {
        let given = self.parts.headers.get(CONTENT_DIGEST).and_then(|value| value.to_str().ok());
        match given {
            None if self.settings.access.is_some() => {
                Err(Refusal::BadRequest("Missing required header: x-amz-content-sha256"))
            }
            None | Some("UNSIGNED-PAYLOAD") => Ok(()),
            Some(name) if name.starts_with("STREAMING-") => {
                Err(Refusal::NotImplemented("This store does not take bodies in signed chunks."))
            }
            Some(given) if self.settings.checks_bodies && given != digest_of(body) => {
                Err(Refusal::BadDigest)
            }
            Some(_) => Ok(()),
        }
    }

    async fn put(&self, body: Bytes) -> Result<Answer, Refusal> {
        let on = match self.settings.conditions {
            Conditions::Atomic => condition_of(&self.parts)?,
            Conditions::Raced | Conditions::Ignored => Condition::None,
        };
        let tag = self.shared.new_tag();
        let new = (tag.clone(), Date::now(self.settings.clock_ahead_s));
        let (shared, asked) = (self.shared.clone(), self.asked.clone());
        let put = move || shared.objects.put(&asked.bucket, &asked.key, body, new, &on);
        self.at_the_disk(put).await.or_refusal()?;
        Ok(Answer::new(StatusCode::OK).with("etag", format!("\"{tag}\"")))
    }

    /// Runs what may wait for a disk.
    async fn at_the_disk<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        if self.shared.in_memory {
            return work();
        }
        spawn_blocking(work).await.expect("what waits for the disk does not panic")
    }

    async fn get(&self) -> Result<Answer, Refusal> {
        let Self { shared, asked, parts, .. } = self;
        let found = shared.objects.find(&asked.bucket, &asked.key).or_refusal()?;
        let found = found.ok_or(Refusal::NoKey)?;
        let header = parts.headers.get("range").and_then(|value| value.to_str().ok());
        let part = header.map_or(Ok(None), |header| range(header, found.len));
        let part = part.map_err(|()| Refusal::NotSatisfiable)?;
        let status = if part.is_some() { StatusCode::PARTIAL_CONTENT } else { StatusCode::OK };
        let mut answer = Answer::new(status)
            .with("etag", format!("\"{}\"", found.tag))
            .with("last-modified", found.modified.http())
            .with("content-type", "binary/octet-stream")
            .with("accept-ranges", "bytes");
        if let Some(part) = &part {
            let (first, last, len) = (part.start, part.end - 1, found.len);
            answer = answer.with("content-range", format!("bytes {first}-{last}/{len}"));
        }
        let part = part.unwrap_or(0..found.len);
        let len = part.end - part.start;
        if parts.method == Method::HEAD {
            answer.head_len = Some(len);
            return Ok(answer);
        }
        let read = move || found.read(part.start, len as usize);
        answer.body = self.at_the_disk(read).await.or_refusal()?;
        Ok(answer)
    }

    fn list(&self) -> Result<Answer, Refusal> {
        let asked = &self.asked;
        let text = |name: &str| asked.param(name).unwrap_or_default().to_owned();
        let max = asked.param("max-keys").map_or(Ok(LISTED_MAX), str::parse);
        let max = max.map_err(|_| Refusal::BadRequest("max-keys is not an integer"))?;
        let token = asked.param("continuation-token").and_then(crate::request::decode);
        let is_new = asked.param("list-type") == Some("2");
        let after = token.unwrap_or_else(|| text(if is_new { "start-after" } else { "marker" }));
        let query = ListQuery {
            prefix: text("prefix"),
            delimiter: text("delimiter"),
            after,
            max: max.min(LISTED_MAX),
            age_min: self.settings.list_delay,
        };
        let listing = self.shared.objects.list(&asked.bucket, &query);
        Ok(answer::listing(asked, &query, &listing))
    }

    fn bucket(&self) -> Result<Answer, Refusal> {
        let Self { shared, asked, parts, settings } = self;
        let bucket = &asked.bucket;
        if parts.method == Method::PUT {
            let is_new = shared.objects.make_bucket(bucket).or_refusal()?;
            let made = Answer::new(StatusCode::OK).with("location", format!("/{bucket}"));
            return if is_new { Ok(made) } else { Err(Refusal::BucketExists) };
        }
        if !shared.objects.has_bucket(bucket) {
            return Err(Refusal::NoBucket);
        }
        match parts.method {
            Method::GET => Ok(answer::location(&settings.region)),
            Method::DELETE if shared.objects.delete_bucket(bucket).or_refusal()? => {
                Ok(Answer::new(StatusCode::NO_CONTENT))
            }
            Method::DELETE => Err(Refusal::BucketNotEmpty),
            _ => {
                let region = settings.region.clone();
                Ok(Answer::new(StatusCode::OK).with("x-amz-bucket-region", region))
            }
        }
    }

    fn response(&self, mut answer: Answer, id: &str, effect: Option<Effect>) -> Response<Sent> {
        if effect == Some(Effect::Corrupt) && !answer.body.is_empty() {
            let mut body = answer.body.to_vec();
            let middle = body.len() / 2;
            body[middle] ^= 1;
            answer.body = body.into();
        }
        let is_head = self.parts.method == Method::HEAD;
        let len = answer.head_len.unwrap_or(answer.body.len() as u64);
        let body = if is_head { Bytes::new() } else { answer.body };
        let sent = Sent::new(body, self.settings.bandwidth);
        let sent = if effect == Some(Effect::Truncate) { sent.truncated() } else { sent };
        let mut response = Response::builder()
            .status(answer.status)
            .header("date", Date::now(self.settings.clock_ahead_s).http())
            .header("server", "sheave-emulator")
            .header("x-amz-request-id", id);
        if answer.status != StatusCode::NO_CONTENT {
            response = response.header("content-length", len);
        }
        for (name, value) in answer.headers {
            response = response.header(name, value);
        }
        response.body(sent).expect("headers that are made here are valid")
    }
}

/// A request's record, which is added to the log when the request ends in any way.
struct Logged<'a>(Record, &'a Shared, Instant);

impl<'a> Logged<'a> {
    fn new(shared: &'a Shared, asked: &Asked, connection: u64) -> Self {
        let record = Record {
            at: shared.began.elapsed(),
            took: Duration::ZERO,
            kind: asked.kind,
            key: asked.name().to_owned(),
            bytes_in: 0,
            bytes_out: 0,
            status: 0,
            connection,
        };
        Self(record, shared, Instant::now())
    }
}

impl Drop for Logged<'_> {
    fn drop(&mut self) {
        self.0.took = self.2.elapsed();
        self.1.log(self.0.clone());
    }
}

/// Makes refusals of errors.
trait OrRefusal<T> {
    fn or_refusal(self) -> Result<T, Refusal>;
}

impl<T> OrRefusal<T> for Result<T, PutError> {
    fn or_refusal(self) -> Result<T, Refusal> {
        self.map_err(|error| match error {
            PutError::NoBucket => Refusal::NoBucket,
            PutError::NoObject => Refusal::NoKey,
            PutError::ConditionFailed => Refusal::PreconditionFailed,
            PutError::Io(error) => Refusal::Io(error.to_string()),
        })
    }
}

impl<T> OrRefusal<T> for std::io::Result<T> {
    fn or_refusal(self) -> Result<T, Refusal> {
        self.map_err(|error| Refusal::Io(error.to_string()))
    }
}
