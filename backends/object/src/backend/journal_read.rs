//! Reads of the journal, which are checked as those of the bucket are.

use std::sync::Arc;

use sheave_core::{Buf, Error, ErrorKind, Io, IoRequest, Result};

use super::{ObjectBackend, Request};
use crate::BLOCK_BYTES;
use crate::format::page::PAGE_BYTES;
use crate::journal::Segment;

/// A read of blocks in a segment, which is kept until then.
pub(super) struct JournalRead {
    pub(super) job: usize,
    segment: Arc<Segment>,
    /// The page of the first one.
    page: u32,
    into: Buf,
}

impl ObjectBackend {
    /// Reads blocks of a segment for a job.
    pub(super) fn read_journal(
        &mut self,
        job: usize,
        (segment, page): (Arc<Segment>, u32),
        into: Buf,
        io: &mut dyn Io,
    ) {
        let (file, at) = (Arc::clone(&segment.file.file), u64::from(page) * BLOCK_BYTES);
        let request = IoRequest::Read { file, at, into: into.clone() };
        self.request(request, Request::Read(JournalRead { job, segment, page, into }), io);
    }
}

impl JournalRead {
    /// Checks what was read, and decrypts it.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] when it is not what was written.
    pub(super) fn check(&self) -> Result<()> {
        let mut block = [0; PAGE_BYTES];
        for (at, page) in (0..self.into.len()).step_by(PAGE_BYTES).zip(self.page..) {
            self.into.copy_out(at, &mut block);
            let Some(()) = self.segment.open(page, &mut block) else {
                let number = self.segment.header.number;
                let why = format!(
                    "journal segment {number}, page {page}: the data is damaged; look at its disk"
                );
                return Err(Error::new(ErrorKind::Corrupt, "read", why));
            };
            if self.segment.seed.is_sealed() {
                self.into.copy_in(at, &block);
            }
        }
        Ok(())
    }
}
