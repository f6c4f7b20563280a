//! A part of a bucket as a store.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use aws_sdk_s3::Client;
use aws_sdk_s3::operation::get_object::GetObjectOutput;
use aws_sdk_s3::operation::list_objects_v2::ListObjectsV2Output;
use aws_sdk_s3::primitives::ByteStream;
use bytes::{Bytes, BytesMut};
use sheave_object::store::{Answer, Listed};
use sheave_object::{Created, Fencing, Store, StoreError, StoreErrorKind, VolumeStore};

use crate::connection::{Connection, Endpoint, Lane};
use crate::failure::{of_no_answer, of_request};

/// Keys of one request for a listing.
const LISTED_MAX: usize = 1000;

/// The objects of a bucket below a prefix.
#[derive(Clone)]
pub struct S3Store {
    connection: Arc<Connection>,
    bucket: Arc<str>,
    /// Ends with a slash.
    prefix: Arc<str>,
    is_fenced: bool,
}

impl S3Store {
    /// The objects whose keys begin with `place` and a slash. Nothing is sent yet.
    #[must_use]
    pub fn new(endpoint: &Endpoint, bucket: &str, place: &str) -> Self {
        let prefix = format!("{place}/").into();
        let connection = Connection::to(endpoint);
        Self { connection, bucket: bucket.into(), prefix, is_fenced: true }
    }

    /// For a store that does not know conditions, or does not keep to them: it is asked whether an
    /// object exists before that is made. Of two processes that do so at the same time both may
    /// succeed.
    #[must_use]
    pub fn without_fencing(self) -> Self {
        Self { is_fenced: false, ..self }
    }

    /// What volumes beside this one share, up to a slash, and its name behind that.
    fn split_prefix(&self) -> (&str, &str) {
        let place = &self.prefix[..self.prefix.len() - 1];
        place.split_at(place.rfind('/').map_or(0, |slash| slash + 1))
    }

    fn key(&self, key: &str) -> String {
        format!("{}{key}", self.prefix)
    }
}

impl fmt::Debug for S3Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { connection, bucket, prefix, .. } = self;
        let endpoint = connection.endpoint();
        f.debug_struct("S3Store")
            .field("at", endpoint)
            .field("in", bucket)
            .field("below", prefix)
            .finish()
    }
}

impl Store for S3Store {
    fn create<'a>(&'a self, key: &'a str, body: Bytes) -> Answer<'a, Created> {
        let (bucket, key) = (Arc::clone(&self.bucket), self.key(key));
        let bytes = body.len() as u64;
        let condition = self.is_fenced.then(|| "*".to_owned());
        Box::pin(self.connection.request(Lane::Change, bytes, async move |client: Client| {
            if condition.is_none() && is_there(&client, &bucket, &key).await? {
                return Ok(Created::Exists);
            }
            let request =
                client.put_object().bucket(&*bucket).key(key).set_if_none_match(condition);
            match request.body(ByteStream::from(body)).send().await {
                Ok(_) => Ok(Created::Made),
                Err(error) if status(&error) == Some(412) => Ok(Created::Exists),
                Err(error) => Err(of_request(&bucket, &error)),
            }
        }))
    }

    fn get<'a>(&'a self, key: &'a str, range: Range<u64>) -> Answer<'a, Bytes> {
        if range.is_empty() {
            return Box::pin(async { Ok(Bytes::new()) });
        }
        let (bucket, key) = (Arc::clone(&self.bucket), self.key(key));
        let bytes = range.end - range.start;
        Box::pin(self.connection.request(Lane::Read, bytes, async move |client: Client| {
            let wanted = format!("bytes={}-{}", range.start, range.end - 1);
            let request = client.get_object().bucket(&*bucket).key(key).range(wanted);
            match request.send().await {
                Ok(found) => body(found, range).await,
                // It ends before the range begins.
                Err(error) if status(&error) == Some(416) => Ok(Bytes::new()),
                Err(error) => Err(of_request(&bucket, &error)),
            }
        }))
    }

    fn list<'a>(&'a self, prefix: &'a str, after: &'a str, max: usize) -> Answer<'a, Vec<Listed>> {
        let store = self.clone();
        let prefix = self.key(prefix);
        // Keys that begin with the prefix are not below it.
        let after = match after {
            "" => String::new(),
            after => self.key(after),
        };
        Box::pin(self.connection.request(Lane::Read, 0, async move |client: Client| {
            store.list_all(client, &prefix, after, max).await
        }))
    }

    fn delete<'a>(&'a self, key: &'a str) -> Answer<'a, ()> {
        let (bucket, key) = (Arc::clone(&self.bucket), self.key(key));
        Box::pin(self.connection.request(Lane::Change, 0, async move |client: Client| {
            let deleted = client.delete_object().bucket(&*bucket).key(key).send().await;
            match deleted.map_err(|error| of_request(&bucket, &error)) {
                Err(error) if error.kind == StoreErrorKind::NotFound => Ok(()),
                other => other.map(drop),
            }
        }))
    }

    fn sibling(&self, name: &str) -> Option<Arc<dyn Store>> {
        let prefix = format!("{}{name}/", self.split_prefix().0).into();
        Some(Arc::new(Self { prefix, ..self.clone() }))
    }
}

impl S3Store {
    /// Asks for pages until there are enough keys, or no more.
    async fn list_all(
        &self,
        client: Client,
        prefix: &str,
        mut after: String,
        max: usize,
    ) -> Result<Vec<Listed>, StoreError> {
        let mut listed = Vec::new();
        while listed.len() < max {
            let wanted = (max - listed.len()).min(LISTED_MAX);
            let request = client
                .list_objects_v2()
                .bucket(&*self.bucket)
                .prefix(prefix)
                .set_start_after((!after.is_empty()).then(|| after.clone()))
                .max_keys(i32::try_from(wanted).unwrap_or(i32::MAX));
            let page = request.send().await.map_err(|error| of_request(&self.bucket, &error))?;
            let has_more = page.is_truncated() == Some(true);
            let before = listed.len();
            self.take_page(page, prefix, &mut after, &mut listed)?;
            match has_more {
                false => break,
                true if listed.len() > before => {}
                true => {
                    let why = "a listing says that there are more objects, and has none";
                    return Err(StoreError::new(StoreErrorKind::Busy, why));
                }
            }
        }
        listed.truncate(max);
        Ok(listed)
    }

    /// What follows the place of those beside this one, up to the next slash.
    async fn list_siblings(&self, client: Client, max: usize) -> Result<Vec<String>, StoreError> {
        let own = self.prefix.trim_end_matches('/');
        let above = own.rfind('/').map_or("", |at| &own[..=at]);
        let mut names = Vec::new();
        let mut next = None;
        while names.len() < max {
            let request = client
                .list_objects_v2()
                .bucket(&*self.bucket)
                .prefix(above)
                .delimiter("/")
                .set_continuation_token(next.take());
            let page = request.send().await.map_err(|error| of_request(&self.bucket, &error))?;
            let prefixes = page.common_prefixes.unwrap_or_default();
            names.extend(prefixes.into_iter().filter_map(|found| {
                let name = found.prefix?.strip_prefix(above)?.trim_end_matches('/').to_owned();
                (!name.is_empty()).then_some(name)
            }));
            next = page.next_continuation_token;
            if page.is_truncated != Some(true) || next.is_none() {
                break;
            }
        }
        names.truncate(max);
        Ok(names)
    }

    /// Takes a page, which goes on behind `after`. A store that lists in another order would hide
    /// the newest root.
    fn take_page(
        &self,
        page: ListObjectsV2Output,
        prefix: &str,
        after: &mut String,
        listed: &mut Vec<Listed>,
    ) -> Result<(), StoreError> {
        for object in page.contents.unwrap_or_default() {
            let key = object.key.unwrap_or_default();
            if !key.starts_with(prefix) || key <= *after {
                let why = format!(
                    "bucket {} lists objects in another order than that of their keys, or others \
                     than it was asked for; an object volume cannot be there",
                    self.bucket
                );
                return Err(StoreError::new(StoreErrorKind::Broken, why));
            }
            let bytes = object.size.and_then(|size| u64::try_from(size).ok()).unwrap_or_default();
            after.clone_from(&key);
            listed.push(Listed { key: key[self.prefix.len()..].to_owned(), bytes });
        }
        Ok(())
    }
}

impl VolumeStore for S3Store {
    fn fencing(&self) -> Fencing {
        let url = self.connection.endpoint().url.as_deref().unwrap_or("AWS");
        match self.is_fenced {
            true => Fencing::Probed(format!("bucket {} at {url}", self.bucket)),
            false => Fencing::None,
        }
    }

    fn siblings(&self, max: usize) -> Answer<'_, Vec<String>> {
        let store = self.clone();
        Box::pin(self.connection.request(Lane::Read, 0, async move |client: Client| {
            store.list_siblings(client, max).await
        }))
    }

    fn place(&self) -> Option<String> {
        let url = self.connection.endpoint().url.as_deref().unwrap_or("AWS");
        Some(format!("objects in s3://{}/{} at {url}", self.bucket, self.prefix))
    }

    fn home(&self) -> Option<(String, String)> {
        let url = self.connection.endpoint().url.as_deref().unwrap_or("AWS");
        let (parent, name) = self.split_prefix();
        Some((format!("s3://{}/{parent} at {url}", self.bucket), name.to_owned()))
    }
}

/// Whether there is an object of that name.
async fn is_there(client: &Client, bucket: &str, key: &str) -> Result<bool, StoreError> {
    // An answer to HEAD has no body, so it does not tell a missing bucket from a missing object.
    let request = client.get_object().bucket(bucket).key(key).range("bytes=0-0");
    match request.send().await {
        Ok(_) => Ok(true),
        Err(error) if status(&error) == Some(416) => Ok(true),
        Err(error) => match of_request(bucket, &error) {
            StoreError { kind: StoreErrorKind::NotFound, .. } => Ok(false),
            other => Err(other),
        },
    }
}

/// The HTTP status of an answer, if there is one.
fn status<E>(error: &aws_sdk_s3::error::SdkError<E>) -> Option<u16> {
    error.raw_response().map(|answer| answer.status().as_u16())
}

/// The bytes of a range, from an answer that may have the whole object.
async fn body(found: GetObjectOutput, range: Range<u64>) -> Result<Bytes, StoreError> {
    let busy = |why: &str| Err(StoreError::new(StoreErrorKind::Busy, why));
    let begin = match found.content_range() {
        None => 0,
        Some(text) => match range_begin(text) {
            Some(begin) if begin == range.start => begin,
            _ => return busy("the answer has another range than was asked for"),
        },
    };
    let length = found.content_length().and_then(|length| u64::try_from(length).ok());
    let Some(length) = length else { return busy("the answer does not say its length") };
    // Of a whole object, what is before the range goes by.
    let end = (begin + length).min(range.end);
    let wanted = end.saturating_sub(begin) as usize;
    let mut stream = found.body;
    let mut data = BytesMut::with_capacity(wanted);
    // To its end, where the SDK compares checksums, unless it goes on behind the range.
    while data.len() <= wanted
        && let Some(part) = stream.next().await
    {
        data.extend_from_slice(&part.map_err(|error| of_no_answer(&error))?);
    }
    if data.len() < wanted {
        return busy("the answer is cut off");
    }
    data.truncate(wanted);
    let skipped = (range.start - begin).min(wanted as u64) as usize;
    Ok(data.freeze().slice(skipped..))
}

/// Where the bytes of an answer begin: `bytes 0-99/1000`.
fn range_begin(text: &str) -> Option<u64> {
    text.strip_prefix("bytes ")?.split_once('-')?.0.parse().ok()
}

#[cfg(test)]
mod tests {
    use aws_sdk_s3::types::Object;

    use super::*;

    fn take(keys: &[&str], after: &str) -> Result<Vec<String>, StoreError> {
        let store = S3Store::new(&Endpoint::default(), "bucket", "a/v");
        let objects = keys.iter().map(|key| Object::builder().key(*key).size(7).build());
        let page = ListObjectsV2Output::builder().set_contents(Some(objects.collect())).build();
        let (mut after, mut listed) = (after.to_owned(), Vec::new());
        store.take_page(page, "a/v/root/", &mut after, &mut listed)?;
        assert!(listed.iter().all(|listed| listed.bytes == 7));
        assert!(keys.last().is_none_or(|last| *last == after));
        Ok(listed.into_iter().map(|listed| listed.key).collect())
    }

    #[test]
    fn a_listing_is_in_order_and_of_what_was_asked_for() {
        assert_eq!(take(&["a/v/root/1", "a/v/root/2"], "").unwrap(), ["root/1", "root/2"]);
        assert_eq!(take(&["a/v/root/2"], "a/v/root/1").unwrap(), ["root/2"]);
        assert_eq!(take(&[], "").unwrap(), [""; 0]);
        let wrong: [(&[&str], &str); 4] = [
            (&["a/v/root/2", "a/v/root/1"], ""),
            (&["a/v/root/1", "a/v/root/1"], ""),
            (&["a/v/root/1"], "a/v/root/1"),
            (&["a/v/log/1"], ""),
        ];
        for (keys, after) in wrong {
            let error = take(keys, after).unwrap_err();
            assert_eq!(error.kind, StoreErrorKind::Broken, "{keys:?}");
            assert!(error.why.contains("another order"), "{error}");
        }
    }

    async fn read(
        text: &'static str,
        range: Option<&str>,
        length: i64,
        wanted: Range<u64>,
    ) -> Result<Bytes, StoreError> {
        let found = GetObjectOutput::builder()
            .set_content_range(range.map(str::to_owned))
            .content_length(length)
            .body(ByteStream::from_static(text.as_bytes()));
        body(found.build(), wanted).await
    }

    #[tokio::test]
    async fn a_range_is_what_was_asked_for_also_of_a_store_that_has_none() {
        let bytes = |answer: Result<Bytes, StoreError>| answer.unwrap().to_vec();
        assert_eq!(bytes(read("cde", Some("bytes 2-4/9"), 3, 2..5).await), b"cde");
        assert_eq!(bytes(read("cde", Some("bytes 2-4/5"), 3, 2..9).await), b"cde", "its end");
        assert_eq!(bytes(read("abcdefghi", None, 9, 2..5).await), b"cde", "the whole object");
        assert_eq!(bytes(read("abc", None, 3, 2..5).await), b"c");
        assert_eq!(bytes(read("abc", None, 3, 4..5).await), b"");
        for (text, range, length) in [
            ("cd", Some("bytes 2-4/9"), 3),
            ("bcd", Some("bytes 1-3/9"), 3),
            ("cde", Some("octets 2-4/9"), 3),
            ("abc", None, 9),
        ] {
            let error = read(text, range, length, 2..5).await.unwrap_err();
            assert_eq!(error.kind, StoreErrorKind::Busy, "{text} {range:?}: {error}");
        }
    }
}
