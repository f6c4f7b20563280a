//! A well-behaved client beside the bad ones.

use crate::{Server, Wire, pattern};

/// Where it keeps its data, away from what the bad clients write to.
const AT: u64 = 6 << 20;
const LEN: usize = 256 << 10;

/// A connection that was open before the trouble and must not notice it.
#[derive(Debug)]
pub struct Bystander {
    wire: Wire,
    round: u64,
}

impl Bystander {
    /// Connects and writes its data. The volume must be writable and have 8 MiB or more.
    ///
    /// # Panics
    /// When the server does not serve it.
    #[must_use]
    pub fn new(server: &Server) -> Self {
        let wire = Wire::ready(server).expect("a good client");
        let mut bystander = Self { wire, round: 0 };
        bystander.write();
        bystander
    }

    /// Its data is there, it can write more, and so can a new client; the server runs.
    ///
    /// # Panics
    /// When one of this is not so.
    #[track_caller]
    pub fn check(&mut self, server: &mut Server) {
        assert!(server.is_alive(), "the server ended\n{}", server.log());
        assert!(self.read_by_all(server), "the bystander's data changed");
        self.write();
        assert!(self.read_by_all(server), "the bystander cannot change its data");
    }

    fn write(&mut self) {
        self.round += 1;
        let error = self.wire.write(AT, &pattern(LEN, self.round)).expect("the bystander writes");
        assert_eq!(error, 0, "the bystander's write");
    }

    fn read_by_all(&mut self, server: &Server) -> bool {
        let want = pattern(LEN, self.round);
        let mut new = Wire::ready(server).expect("a new client");
        [&mut self.wire, &mut new].into_iter().all(|wire| {
            let answer = wire.read(AT, LEN as u32).expect("a reply");
            answer.expect("a read without an error") == want
        })
    }
}
