//! Ops and file I/O of stacked layers, identified by their tags and tokens.
//!
//! A tag or token has 64 bits. The low [`OWN_BITS`] belong to its maker: a front, a layer that
//! issues an op, a backend that starts file I/O. The bits above record the layers that it has
//! passed, the last one lowest, so that each layer can remove its own part.

use std::sync::Arc;

use crate::{
    Backend, Buf, ByteRange, Completion, Destination, Error, ErrorKind, Io, IoDone, IoRequest,
    IoToken, Nanos, Op, Payload, Result, Submitted, Tag, Volume,
};

/// Bits of a tag or token that belong to its maker.
pub const OWN_BITS: u32 = 56;
const OWN_MASK: u64 = (1 << OWN_BITS) - 1;
/// The part above holds less than this.
const PATH_MAX: u64 = 1 << (u64::BITS - OWN_BITS);

/// Whose op has completed, for a layer that issues ops of its own beside those from above.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Issuer {
    /// The layer's own op, with the key that the layer gave it.
    Own(usize),
    /// An op from above that the layer passed on.
    Above(Tag),
}

impl Tag {
    /// The tag of an op that a layer issues itself and calls `key`, which has at most [`OWN_BITS`].
    #[must_use]
    pub fn own(key: usize) -> Self {
        let key = key as u64;
        debug_assert!(key <= OWN_MASK, "a key is the number of an op in memory");
        Self(1 << OWN_BITS | key)
    }

    /// The tag under which a layer that also issues ops of its own passes on an op from above.
    /// `None` when another layer has issued it and seven layers have passed it on: this layer then
    /// has to issue an op of its own.
    #[must_use]
    pub fn passed_on(self) -> Option<Self> {
        let path = (self.0 >> OWN_BITS) << 1;
        (path < PATH_MAX).then_some(Self(path << OWN_BITS | self.0 & OWN_MASK))
    }

    /// Removes the layer's part.
    #[must_use]
    pub fn issuer(self) -> Issuer {
        let (path, own) = (self.0 >> OWN_BITS, self.0 & OWN_MASK);
        match path & 1 {
            0 => Issuer::Above(Self((path >> 1) << OWN_BITS | own)),
            _ => Issuer::Own(own as usize),
        }
    }
}

impl IoToken {
    /// The token above a layer with `legs` backends below, of the backend at `leg`.
    fn with_leg(self, leg: usize, legs: usize) -> Self {
        let path = (self.0 >> OWN_BITS) * legs as u64 + leg as u64;
        debug_assert!(path < PATH_MAX, "Legs has counted the backends below");
        Self(path << OWN_BITS | self.0 & OWN_MASK)
    }

    /// The reverse of [`Self::with_leg`].
    fn split_leg(self, legs: usize) -> (usize, Self) {
        let (path, legs) = (self.0 >> OWN_BITS, legs as u64);
        ((path % legs) as usize, Self((path / legs) << OWN_BITS | self.0 & OWN_MASK))
    }
}

/// The backends below a layer, each of which starts file I/O as if it were alone. A leg is a place
/// in the layer's [`Volume::below`].
pub struct Legs {
    backends: Vec<Box<dyn Backend>>,
}

impl Legs {
    /// A backend of each volume, for one thread.
    ///
    /// # Errors
    /// When one of them can no longer be used, and [`ErrorKind::TooLarge`] for more backends than
    /// tokens can identify: 256, all layers below included.
    pub fn of(volumes: &[Arc<dyn Volume>]) -> Result<Self> {
        if width(volumes) > PATH_MAX {
            let why = format!("more than {PATH_MAX} volumes below one; use fewer");
            return Err(Error::new(ErrorKind::TooLarge, "open", why));
        }
        let backends = volumes.iter().map(|volume| volume.backend()).collect::<Result<_>>()?;
        Ok(Self { backends })
    }

    /// The backend of a leg. Ops and buffers go to it through [`Self::submit`] and
    /// [`Self::write_buffer`], which mark the file I/O that it starts.
    #[must_use]
    pub fn get(&self, leg: usize) -> &dyn Backend {
        &*self.backends[leg]
    }

    /// See [`Backend::write_buffer`].
    ///
    /// # Errors
    /// When there is no memory for it.
    pub fn write_buffer(
        &mut self,
        leg: usize,
        range: ByteRange,
        io: &mut dyn Io,
    ) -> Result<Payload> {
        self.with(leg, io, |backend, io| backend.write_buffer(range, io))
    }

    /// See [`Backend::submit`].
    pub fn submit(&mut self, leg: usize, op: Op, tag: Tag, io: &mut dyn Io) -> Submitted {
        self.with(leg, io, |backend, io| backend.submit(op, tag, io))
    }

    /// Hands the completion to the backend that started the request.
    pub fn io_done(&mut self, done: IoDone, io: &mut dyn Io) {
        let (leg, token) = done.token.split_leg(self.backends.len());
        self.with(leg, io, |backend, io| backend.io_done(IoDone { token, ..done }, io));
    }

    /// The next completion, with its leg.
    pub fn reap(&mut self, io: &mut dyn Io) -> Option<(usize, Completion)> {
        (0..self.backends.len()).find_map(|leg| {
            let completion = self.with(leg, io, |backend, io| backend.reap(io));
            completion.map(|completion| (leg, completion))
        })
    }

    /// See [`Backend::deadline`].
    #[must_use]
    pub fn deadline(&self) -> Option<Nanos> {
        self.backends.iter().filter_map(|backend| backend.deadline()).min()
    }

    fn with<T>(
        &mut self,
        leg: usize,
        io: &mut dyn Io,
        call: impl FnOnce(&mut dyn Backend, &mut dyn Io) -> T,
    ) -> T {
        let legs = self.backends.len();
        let backend = &mut *self.backends[leg];
        match legs {
            // Tokens of a single backend need no part of the layer.
            1 => call(backend, io),
            _ => call(backend, &mut LegIo { io, leg, legs }),
        }
    }
}

/// The number of paths through these volumes' layers.
fn width(volumes: &[Arc<dyn Volume>]) -> u64 {
    let widest = volumes.iter().map(|volume| width(volume.below())).max().unwrap_or(1);
    widest.saturating_mul(volumes.len().max(1) as u64)
}

/// The engine as seen by one of several backends below a layer.
struct LegIo<'a> {
    io: &'a mut dyn Io,
    leg: usize,
    legs: usize,
}

impl Io for LegIo<'_> {
    fn now(&self) -> Nanos {
        self.io.now()
    }

    fn buffer(&mut self, len: usize) -> Result<Buf> {
        self.io.buffer(len)
    }

    fn recycle(&mut self, payload: Payload) {
        self.io.recycle(payload);
    }

    fn waker(&self) -> std::task::Waker {
        self.io.waker()
    }

    fn start(
        &mut self,
        request: IoRequest,
        token: IoToken,
        to: Destination,
    ) -> std::result::Result<(), IoRequest> {
        self.io.start(request, token.with_leg(self.leg, self.legs), to)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_op_of_a_front_passes_any_number_of_layers() {
        let mut tag = Tag(OWN_MASK);
        for _ in 0..100 {
            tag = tag.passed_on().unwrap();
        }
        for _ in 0..100 {
            let Issuer::Above(above) = tag.issuer() else { panic!("{tag:?} came from above") };
            tag = above;
        }
        assert_eq!(tag, Tag(OWN_MASK));
    }

    #[test]
    fn a_layers_own_tag_passes_seven_more_layers() {
        let mut tag = Tag::own(42);
        let mut passed = 0;
        while let Some(below) = tag.passed_on() {
            (tag, passed) = (below, passed + 1);
        }
        assert_eq!(passed, 7);
        for _ in 0..passed {
            let Issuer::Above(above) = tag.issuer() else { panic!("{tag:?} came from above") };
            tag = above;
        }
        assert_eq!(tag.issuer(), Issuer::Own(42));
    }

    #[test]
    fn a_token_leads_back_to_the_backend_that_made_it() {
        for (inner, outer) in (0..5).flat_map(|inner| (0..51).map(move |outer| (inner, outer))) {
            let token = IoToken(OWN_MASK).with_leg(inner, 5).with_leg(outer, 51);
            let (leg, token) = token.split_leg(51);
            assert_eq!((leg, token.split_leg(5)), (outer, (inner, IoToken(OWN_MASK))));
        }
    }
}
