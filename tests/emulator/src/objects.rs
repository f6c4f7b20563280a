//! Buckets and their objects, in memory or in a directory.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::ops::Bound;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, UNIX_EPOCH};

use bytes::Bytes;

use crate::date::Date;
use crate::request::{decode, encode};

/// Begins the names of files that are being written. A key's name does not begin with it.
const TEMPORARY: &str = "~";

/// All buckets.
#[derive(Debug)]
pub(crate) struct Objects {
    dir: Option<PathBuf>,
    buckets: Mutex<BTreeMap<String, Bucket>>,
    /// Numbers of files that are being written.
    written: AtomicU64,
}

type Bucket = BTreeMap<String, Object>;

#[derive(Debug)]
struct Object {
    tag: String,
    len: u64,
    modified: Date,
    /// `None`: before this process began.
    made: Option<Instant>,
    /// `None`: in a file.
    content: Option<Bytes>,
}

/// What an object's creation asks of the object that is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Condition {
    None,
    /// There is none.
    Absent,
    /// It has this tag.
    Tag(String),
}

/// Why nothing was put.
#[derive(Debug)]
pub(crate) enum PutError {
    NoBucket,
    /// A tag was asked for, and there is no object.
    NoObject,
    ConditionFailed,
    Io(io::Error),
}

/// An object that was found. It stays readable when the object is deleted.
#[derive(Debug)]
pub(crate) struct Found {
    pub(crate) tag: String,
    pub(crate) len: u64,
    pub(crate) modified: Date,
    content: Content,
}

#[derive(Debug)]
enum Content {
    Memory(Bytes),
    File(File),
}

/// Which objects are listed.
#[derive(Debug)]
pub(crate) struct ListQuery {
    pub(crate) prefix: String,
    pub(crate) delimiter: String,
    pub(crate) after: String,
    pub(crate) max: usize,
    /// Younger objects are missing.
    pub(crate) age_min: Duration,
}

/// A part of a list.
#[derive(Debug, Default)]
pub(crate) struct Listing {
    pub(crate) objects: Vec<Entry>,
    pub(crate) prefixes: Vec<String>,
    /// Where the next part begins, if there is more.
    pub(crate) next_after: Option<String>,
}

/// An object of a list.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) key: String,
    pub(crate) tag: String,
    pub(crate) len: u64,
    pub(crate) modified: Date,
}

impl Objects {
    pub(crate) fn open(dir: Option<PathBuf>) -> io::Result<Self> {
        let mut buckets = BTreeMap::new();
        for entry in dir.iter().map(fs::read_dir).collect::<io::Result<Vec<_>>>()? {
            for bucket in entry {
                let bucket = bucket?;
                buckets.insert(name_of(&bucket), found_in(&bucket.path())?);
            }
        }
        Ok(Self { dir, buckets: Mutex::new(buckets), written: AtomicU64::new(0) })
    }

    fn buckets(&self) -> MutexGuard<'_, BTreeMap<String, Bucket>> {
        self.buckets.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn file(&self, bucket: &str, key: &str) -> Option<PathBuf> {
        self.dir.as_ref().map(|dir| dir.join(bucket).join(encode(key, "")))
    }

    /// Answers whether it is new.
    pub(crate) fn make_bucket(&self, bucket: &str) -> io::Result<bool> {
        if let Some(dir) = &self.dir {
            fs::create_dir_all(dir.join(bucket))?;
        }
        let mut buckets = self.buckets();
        let is_new = !buckets.contains_key(bucket);
        buckets.entry(bucket.to_owned()).or_default();
        Ok(is_new)
    }

    /// Answers whether it was empty, and is gone.
    pub(crate) fn delete_bucket(&self, bucket: &str) -> io::Result<bool> {
        let mut buckets = self.buckets();
        if buckets.get(bucket).is_some_and(|objects| !objects.is_empty()) {
            return Ok(false);
        }
        if let Some(dir) = &self.dir {
            fs::remove_dir(dir.join(bucket))?;
        }
        buckets.remove(bucket);
        Ok(true)
    }

    pub(crate) fn has_bucket(&self, bucket: &str) -> bool {
        self.buckets().contains_key(bucket)
    }

    /// Whether a condition holds right now.
    pub(crate) fn check(&self, bucket: &str, key: &str, on: &Condition) -> Result<(), PutError> {
        let buckets = self.buckets();
        let objects = buckets.get(bucket).ok_or(PutError::NoBucket)?;
        on.check(objects.get(key))
    }

    /// Makes or replaces an object. Condition and creation are one step. Waits for the disk.
    pub(crate) fn put(
        &self,
        bucket: &str,
        key: &str,
        body: Bytes,
        new: (String, Date),
        on: &Condition,
    ) -> Result<(), PutError> {
        let written = match &self.dir {
            Some(dir) => Some(self.write(&dir.join(bucket), &body)?),
            None => None,
        };
        let mut buckets = self.buckets();
        let objects = buckets.get_mut(bucket).ok_or(PutError::NoBucket)?;
        let done = on.check(objects.get(key)).and_then(|()| {
            let file = written.as_ref().zip(self.file(bucket, key));
            file.map_or(Ok(()), |(from, to)| fs::rename(from, to).map_err(PutError::Io))
        });
        if let (Err(_), Some(written)) = (&done, &written) {
            let _ = fs::remove_file(written);
        }
        done?;
        let (tag, modified) = new;
        let len = body.len() as u64;
        let content = self.dir.is_none().then_some(body);
        let object = Object { tag, len, modified, made: Some(Instant::now()), content };
        objects.insert(key.to_owned(), object);
        Ok(())
    }

    fn write(&self, bucket: &Path, body: &Bytes) -> Result<PathBuf, PutError> {
        let number = self.written.fetch_add(1, Ordering::Relaxed);
        let path = bucket.join(format!("{TEMPORARY}{number}"));
        match fs::write(&path, body) {
            Ok(()) => Ok(path),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Err(PutError::NoBucket),
            Err(error) => Err(PutError::Io(error)),
        }
    }

    pub(crate) fn find(&self, bucket: &str, key: &str) -> io::Result<Option<Found>> {
        let buckets = self.buckets();
        let Some(object) = buckets.get(bucket).and_then(|objects| objects.get(key)) else {
            return Ok(None);
        };
        let content = match (&object.content, self.file(bucket, key)) {
            (Some(bytes), _) => Content::Memory(bytes.clone()),
            (None, Some(path)) => Content::File(File::open(path)?),
            (None, None) => return Err(io::Error::other("an object without content")),
        };
        let Object { tag, len, modified, .. } = object;
        Ok(Some(Found { tag: tag.clone(), len: *len, modified: *modified, content }))
    }

    /// Answers whether there was one.
    pub(crate) fn delete(&self, bucket: &str, key: &str) -> io::Result<bool> {
        let mut buckets = self.buckets();
        let Some(object) = buckets.get_mut(bucket).and_then(|objects| objects.remove(key)) else {
            return Ok(false);
        };
        if let (None, Some(path)) = (object.content, self.file(bucket, key)) {
            fs::remove_file(path)?;
        }
        Ok(true)
    }

    pub(crate) fn list(&self, bucket: &str, query: &ListQuery) -> Listing {
        let buckets = self.buckets();
        let mut listing = Listing::default();
        let Some(objects) = buckets.get(bucket) else { return listing };
        let is_old = |object: &Object| {
            query.age_min.is_zero()
                || object.made.is_none_or(|made| made.elapsed() >= query.age_min)
        };
        let mut last = String::new();
        let from = Bound::Included(query.prefix.clone());
        let matching = objects
            .range((from, Bound::Unbounded))
            .take_while(|(key, _)| key.starts_with(&query.prefix))
            .filter(|(key, object)| **key > query.after && is_old(object));
        for (key, object) in matching {
            let group = group_of(key, query);
            if group.is_some_and(|group| {
                // A part that ended with this group has listed all of it.
                listing.prefixes.last().is_some_and(|last| last == group) || query.after == group
            }) {
                continue;
            }
            if listing.objects.len() + listing.prefixes.len() == query.max {
                listing.next_after = (query.max > 0).then_some(last);
                break;
            }
            last = group.unwrap_or(key).to_owned();
            if group.is_some() {
                listing.prefixes.push(last.clone());
            } else {
                let Object { tag, len, modified, .. } = object;
                let (key, tag) = (key.clone(), tag.clone());
                listing.objects.push(Entry { key, tag, len: *len, modified: *modified });
            }
        }
        listing
    }
}

impl Condition {
    fn check(&self, object: Option<&Object>) -> Result<(), PutError> {
        match (self, object) {
            (Self::None, _) | (Self::Absent, None) => Ok(()),
            (Self::Absent, Some(_)) => Err(PutError::ConditionFailed),
            (Self::Tag(_), None) => Err(PutError::NoObject),
            (Self::Tag(tag), Some(object)) if object.tag == *tag => Ok(()),
            (Self::Tag(_), Some(_)) => Err(PutError::ConditionFailed),
        }
    }
}

impl Found {
    /// Reads a range that is within the object. Waits for the disk.
    pub(crate) fn read(&self, from: u64, len: usize) -> io::Result<Bytes> {
        match &self.content {
            Content::Memory(bytes) => Ok(bytes.slice(from as usize..from as usize + len)),
            Content::File(file) => {
                let mut bytes = vec![0; len];
                file.read_exact_at(&mut bytes, from)?;
                Ok(bytes.into())
            }
        }
    }
}

/// The common prefix under which a key is listed, if it is.
fn group_of<'a>(key: &'a str, query: &ListQuery) -> Option<&'a str> {
    let rest = key.strip_prefix(&query.prefix)?;
    let at = rest.find(&query.delimiter).filter(|_| !query.delimiter.is_empty())?;
    Some(&key[..query.prefix.len() + at + query.delimiter.len()])
}

/// The objects of a bucket's directory. What was being written is removed.
fn found_in(dir: &Path) -> io::Result<Bucket> {
    let mut objects = Bucket::new();
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let name = name_of(&entry);
        if name.starts_with(TEMPORARY) {
            fs::remove_file(entry.path())?;
            continue;
        }
        let meta = entry.metadata()?;
        let modified = Date::of(meta.modified()?);
        let tag = format!("{:x}-{:x}", meta.len(), modified.seconds_to(Date::of(UNIX_EPOCH)));
        let object = Object { tag, len: meta.len(), modified, made: None, content: None };
        objects.insert(decode(&name).unwrap_or(name), object);
    }
    Ok(objects)
}

fn name_of(entry: &fs::DirEntry) -> String {
    entry.file_name().to_string_lossy().into_owned()
}
