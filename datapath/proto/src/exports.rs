//! The exports of a server.

use std::hint::black_box;

use sheave_core::VolumeInfo;

/// One export, as it is described to clients.
#[derive(Clone, Copy, Debug)]
pub struct ExportInfo<'a> {
    /// Its name: at most 4096 bytes, no NUL.
    pub name: &'a str,
    /// What it is, for people; may be empty.
    pub description: &'a str,
    /// Bytes that a client which connects now can use.
    pub size: u64,
    /// The volume.
    pub info: &'a VolumeInfo,
    /// Only for encrypted connections; hidden from others.
    pub tls_only: bool,
}

/// The exports of a server.
pub trait Exports {
    /// The number of exports.
    fn len(&self) -> usize;

    /// The export of that index, if there is one.
    fn export(&self, index: usize) -> Option<ExportInfo<'_>>;

    /// Whether there is none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether clients may list the names.
    fn may_list(&self) -> bool {
        true
    }

    /// Whether one more client may enter the transmission phase with the export of that index.
    ///
    /// # Errors
    /// The reason, for the client.
    fn admit(&self, index: usize) -> Result<(), &'static str> {
        let _ = index;
        Ok(())
    }

    /// The export of that name. The empty name stands for a single export; among several there is
    /// no default, so that no client writes to one by mistake. Names may be secrets, so the
    /// comparison takes constant time.
    fn find(&self, name: &str) -> Option<usize> {
        let mut found = None;
        for index in 0..self.len() {
            if self.export(index).is_some_and(|export| is_same_secret(export.name, name)) {
                found = found.or(Some(index));
            }
        }
        found.or_else(|| (name.is_empty() && self.len() == 1).then_some(0))
    }
}

/// One export with its own strings; a vector of them is the simplest [`Exports`].
#[derive(Clone, Debug)]
pub struct Export {
    /// As in [`ExportInfo`].
    pub name: String,
    /// As in [`ExportInfo`].
    pub description: String,
    /// As in [`ExportInfo`].
    pub size: u64,
    /// As in [`ExportInfo`].
    pub info: VolumeInfo,
    /// As in [`ExportInfo`].
    pub tls_only: bool,
}

impl Exports for Vec<Export> {
    fn len(&self) -> usize {
        self.as_slice().len()
    }

    fn export(&self, index: usize) -> Option<ExportInfo<'_>> {
        self.get(index).map(|export| ExportInfo {
            name: &export.name,
            description: &export.description,
            size: export.size,
            info: &export.info,
            tls_only: export.tls_only,
        })
    }
}

fn is_same_secret(a: &str, b: &str) -> bool {
    let differences = a.bytes().zip(b.bytes()).fold(0, |all, (a, b)| black_box(all | (a ^ b)));
    a.len() == b.len() && differences == 0
}
