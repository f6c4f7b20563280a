//! Encryption: AES-256-GCM under keys that are derived from the key of a volume.

use std::fmt;
use std::sync::Arc;

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use aws_lc_rs::hkdf::{HKDF_SHA256, Salt};
use aws_lc_rs::{constant_time, rand};

/// Bytes of a key.
pub const KEY_BYTES: usize = 32;
/// Bytes by which the opener of sealed bytes sees that they are what was sealed.
pub const TAG_BYTES: usize = 16;
/// Random bytes that make a derived key another one.
pub const SALT_BYTES: usize = 16;

/// The key of a volume. It encrypts nothing itself.
#[derive(Clone)]
pub struct VolumeKey(Arc<[u8; KEY_BYTES]>);

impl VolumeKey {
    /// One with these bytes.
    #[must_use]
    pub fn new(bytes: [u8; KEY_BYTES]) -> Self {
        Self(Arc::new(bytes))
    }

    /// One that no other volume has.
    #[must_use]
    pub fn random() -> Self {
        Self::new(random())
    }

    /// The key for what these bytes name.
    pub(crate) fn derive(&self, salt: &[u8; SALT_BYTES], name: &[&[u8]]) -> Key {
        derive(&*self.0, salt, name)
    }
}

impl fmt::Debug for VolumeKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("VolumeKey")
    }
}

impl PartialEq for VolumeKey {
    fn eq(&self, other: &Self) -> bool {
        constant_time::verify_slices_are_equal(&*self.0, &*other.0).is_ok()
    }
}

impl Eq for VolumeKey {}

/// A key from outside, by which the key of a volume is wrapped.
#[derive(Clone)]
pub struct WrappingKey(Arc<[u8; KEY_BYTES]>);

/// What tells a wrapping key from others.
type KeyId = [u8; 8];

impl WrappingKey {
    /// One with these bytes, which are random.
    #[must_use]
    pub fn new(bytes: [u8; KEY_BYTES]) -> Self {
        Self(Arc::new(bytes))
    }

    /// What tells it from others, in hexadecimal digits. It says nothing else of the key.
    #[must_use]
    pub fn id(&self) -> String {
        hex(&self.id_bytes())
    }

    fn derive(&self, salt: &[u8; SALT_BYTES]) -> Key {
        derive(&*self.0, salt, &[b"sheave wrapped key"])
    }

    fn id_bytes(&self) -> KeyId {
        // The begin of a stream that nothing else uses.
        let of_id = derive(&*self.0, &[0; SALT_BYTES], &[b"sheave key id"]);
        let mut id = [0; size_of::<KeyId>()];
        of_id.seal(0, &[], &mut id);
        id
    }
}

impl fmt::Debug for WrappingKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "WrappingKey({})", self.id())
    }
}

/// Bytes of a wrapped key: the id of the key by which it is wrapped, a salt, the key, a tag.
pub const WRAPPED_BYTES: usize = size_of::<KeyId>() + SALT_BYTES + KEY_BYTES + TAG_BYTES;

/// The key of a volume, encrypted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WrappedKey([u8; WRAPPED_BYTES]);

/// Why a key cannot be unwrapped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NoKey {
    /// It is wrapped by the key of the first id, and not by that of the second.
    Wrong(String, String),
    /// It is not what was wrapped.
    Damaged,
}

impl fmt::Display for NoKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Wrong(right, given) => {
                write!(f, "the key is wrong: the volume's is {right}, and this one is {given}")
            }
            Self::Damaged => f.write_str("the wrapped key of the volume is damaged"),
        }
    }
}

impl std::error::Error for NoKey {}

impl WrappedKey {
    /// One with these bytes.
    #[must_use]
    pub fn new(bytes: [u8; WRAPPED_BYTES]) -> Self {
        Self(bytes)
    }

    /// Its bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// Wraps the key of a volume. Each time it has other bytes.
    #[must_use]
    pub fn wrap(key: &VolumeKey, by: &WrappingKey) -> Self {
        let (id, salt, mut sealed) = (by.id_bytes(), random(), *key.0);
        let tag = by.derive(&salt).seal(0, &id, &mut sealed);
        let mut out = [0; WRAPPED_BYTES];
        let mut rest = &mut out[..];
        for part in [&id[..], &salt, &sealed, &tag] {
            let (into, behind) = rest.split_at_mut(part.len());
            into.copy_from_slice(part);
            rest = behind;
        }
        Self(out)
    }

    /// The id of the key by which it is wrapped.
    #[must_use]
    pub fn key_id(&self) -> String {
        hex(&self.0[..size_of::<KeyId>()])
    }

    /// The key of a volume.
    ///
    /// # Errors
    /// When it is wrapped by another key, or damaged.
    pub fn open(&self, by: &WrappingKey) -> Result<VolumeKey, NoKey> {
        let (id, rest) = self.0.split_at(size_of::<KeyId>());
        if by.id_bytes() != *id {
            return Err(NoKey::Wrong(self.key_id(), by.id()));
        }
        let (salt, rest) = rest.split_first_chunk().ok_or(NoKey::Damaged)?;
        let sealed = rest.split_at(KEY_BYTES);
        let mut key = [0; KEY_BYTES];
        by.derive(salt).open(0, id, sealed, &mut key).ok_or(NoKey::Damaged)?;
        Ok(VolumeKey::new(key))
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The key of an object, a segment, or a wrapped key.
pub(crate) struct Key(LessSafeKey);

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Key")
    }
}

/// A key by HKDF-SHA256 from a secret, for what these bytes name.
pub(crate) fn derive(secret: &[u8], salt: &[u8; SALT_BYTES], name: &[&[u8]]) -> Key {
    let extracted = Salt::new(HKDF_SHA256, salt).extract(secret);
    let expanded = extracted.expand(name, &AES_256_GCM).expect("a key is shorter than the most");
    Key(LessSafeKey::new(UnboundKey::from(expanded)))
}

impl Key {
    /// Encrypts bytes in place, and returns the tag. No two calls for one key have one number.
    pub(crate) fn seal(&self, number: u32, with: &[u8], bytes: &mut [u8]) -> [u8; TAG_BYTES] {
        let tag = self.0.seal_in_place_separate_tag(nonce(number), Aad::from(with), bytes);
        let tag = tag.expect("the bytes are fewer than AES-GCM can take");
        let mut out = [0; TAG_BYTES];
        out.copy_from_slice(tag.as_ref());
        out
    }

    /// Decrypts bytes to others of the same length. `None` if they were not sealed by this key,
    /// with that number and those bytes.
    #[must_use]
    pub(crate) fn open(
        &self,
        number: u32,
        with: &[u8],
        (sealed, tag): (&[u8], &[u8]),
        out: &mut [u8],
    ) -> Option<()> {
        self.0.open_separate_gather(nonce(number), Aad::from(with), sealed, tag, out).ok()
    }
}

fn nonce(number: u32) -> Nonce {
    let mut nonce = [0; 12];
    nonce[..4].copy_from_slice(&number.to_le_bytes());
    Nonce::assume_unique_for_key(nonce)
}

/// Random bytes.
pub(crate) fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    // It waits until the system has some, and then always has them (random(4)).
    rand::fill(&mut bytes).expect("random bytes");
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_unwrapped_by_the_key_that_wrapped_it() {
        let (key, by) = (VolumeKey::random(), WrappingKey::new([5; 32]));
        let wrapped = WrappedKey::wrap(&key, &by);
        assert_eq!(wrapped.open(&by), Ok(key.clone()));
        assert_eq!(wrapped.key_id(), by.id());
        assert_ne!(wrapped, WrappedKey::wrap(&key, &by), "each time by another salt");
        let other = WrappingKey::new([6; 32]);
        assert_eq!(wrapped.open(&other), Err(NoKey::Wrong(by.id(), other.id())));
        for at in 0..WRAPPED_BYTES {
            let mut changed = wrapped;
            changed.0[at] ^= 1;
            assert!(changed.open(&by).is_err(), "byte {at}");
        }
        assert_eq!(format!("{key:?}"), "VolumeKey");
    }

    #[test]
    fn a_derived_key_is_that_of_its_salt_and_name() {
        let key = VolumeKey::new([5; 32]);
        let sealed = |salt, name: &[u8], number, with: &[u8]| {
            let mut bytes = *b"sixteen of bytes";
            let tag = key.derive(&[salt; 16], &[name]).seal(number, with, &mut bytes);
            (bytes, tag)
        };
        let right = sealed(1, b"name", 7, b"with");
        let opened = |salt, name: &[u8], number, with: &[u8]| {
            let mut out = [0; 16];
            let of = key.derive(&[salt; 16], &[name]);
            of.open(number, with, (&right.0, &right.1), &mut out).map(|()| out)
        };
        assert_eq!(opened(1, b"name", 7, b"with"), Some(*b"sixteen of bytes"));
        assert_eq!(opened(2, b"name", 7, b"with"), None);
        assert_eq!(opened(1, b"game", 7, b"with"), None);
        assert_eq!(opened(1, b"name", 8, b"with"), None);
        assert_eq!(opened(1, b"name", 7, b"wish"), None);
    }
}
