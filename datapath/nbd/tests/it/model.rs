//! Thousands of requests in flight, in any order, against a vector of bytes.

use std::collections::HashMap;

use sheave_proto::ReplyStyle;
use sheave_proto::wire::{command, command_flag, transmission_flag};

use crate::support::{
    Answer, Client, Link, Random, Running, Setup, both_engines, pattern, wait_until,
};

const SIZE: u64 = 4 << 20;

/// One client's requests on its own part of the volume, and their expected results.
struct Player {
    client: Client,
    random: Random,
    /// Where its part begins.
    base: u64,
    model: Vec<u8>,
    /// Ranges of requests in flight, and whether they write.
    busy: HashMap<u64, (u64, u64, bool)>,
    longest: u64,
    depth: usize,
}

impl Player {
    fn new(client: Client, base: u64, len: u64, seed: u64) -> Self {
        let (model, busy) = (vec![0; len as usize], HashMap::new());
        let random = Random(seed);
        Self { client, random, base, model, busy, longest: 70_000, depth: 3000 }
    }

    /// Makes `count` random requests, many at a time, and checks all answers.
    fn play(&mut self, count: usize) {
        for _ in 0..count {
            self.ask();
            while self.client.in_flight() >= self.depth {
                let answer = self.client.answer().unwrap().expect("a reply");
                self.check(answer);
            }
        }
        self.drain();
    }

    fn drain(&mut self) {
        while self.client.in_flight() > 0 {
            let answer = self.client.answer().unwrap().expect("a reply");
            self.check(answer);
        }
    }

    fn ask(&mut self) {
        let kind = self.random.below(100);
        if kind < 4 {
            self.client.flush();
            return;
        }
        let writes = kind < 50;
        let (start, end) = self.range(writes);
        let (at, len) = (self.base + start, end - start);
        let fua = if self.random.below(10) == 0 { command_flag::FUA } else { 0 };
        let bytes = start as usize..end as usize;
        let client = &mut self.client;
        let cookie = match kind {
            4..36 => {
                let data = pattern(self.random.next(), len as usize);
                self.model[bytes].copy_from_slice(&data);
                client.write(fua, at, &data)
            }
            36..44 => {
                self.model[bytes].fill(0);
                let no_hole = self.random.pick(&[0, command_flag::NO_HOLE]);
                client.ask(command::WRITE_ZEROES, fua | no_hole, at, len)
            }
            44..50 => client.ask(command::TRIM, fua, at, len),
            50..53 if client.negotiated.has(transmission_flag::SEND_CACHE) => {
                client.ask(command::CACHE, 0, at, len)
            }
            53..56 => match client.negotiated.style {
                ReplyStyle::Simple => client.read(at, len),
                _ => client.ask(command::BLOCK_STATUS, 0, at, len),
            },
            _ => client.read(at, len),
        };
        self.busy.insert(cookie, (start, end, writes));
        if kind >= 44 && writes {
            self.after_trim(cookie, start, end);
        }
    }

    /// Trimmed bytes are undefined, so they are written again once the trim has completed.
    fn after_trim(&mut self, cookie: u64, start: u64, end: u64) {
        while self.busy.contains_key(&cookie) {
            let answer = self.client.answer().unwrap().expect("a reply");
            self.check(answer);
        }
        let data = pattern(self.random.next(), (end - start) as usize);
        self.model[start as usize..end as usize].copy_from_slice(&data);
        let cookie = self.client.write(0, self.base + start, &data);
        self.busy.insert(cookie, (start, end, true));
    }

    /// A random range on which no request in flight depends.
    fn range(&mut self, writes: bool) -> (u64, u64) {
        loop {
            let size = self.model.len() as u64;
            let len_max = self.random.pick(&[1, 512, 4096, 4096, 16_384, self.longest]);
            let len = (1 + self.random.below(len_max)).min(size);
            let len = if self.random.below(2) == 0 { len_max.min(size) } else { len };
            let start = self.random.below(size - len + 1);
            let free = self.busy.values().all(|(from, to, other_writes)| {
                start + len <= *from || *to <= start || (!writes && !other_writes)
            });
            if free {
                return (start, start + len);
            }
            let answer = self.client.answer().unwrap().expect("a reply");
            self.check(answer);
        }
    }

    fn check(&mut self, answer: Answer) {
        self.busy.remove(&answer.request.cookie);
        let Answer { request, error, data, extents } = answer;
        assert_eq!(error, None, "{request:?}");
        match request.command {
            command::READ => {
                let start = (request.offset - self.base) as usize;
                assert!(data == self.model[start..start + data.len()], "{request:?}");
            }
            command::BLOCK_STATUS => assert!(!extents.is_empty()),
            _ => {}
        }
    }

    /// Checks the contents of its whole part.
    fn survey(&mut self) {
        let mut at = 0;
        for part in self.model.chunks(1 << 20) {
            let bytes = self.client.bytes(self.base + at, part.len() as u64);
            assert!(bytes == part, "at {at}");
            at += part.len() as u64;
        }
    }
}

fn play(server: &Running, style: ReplyStyle, seed: u64, count: usize) {
    let client = Client::with(Link::unix(&server.socket), style);
    let mut player = Player::new(client, 0, SIZE, seed);
    player.play(count);
    player.survey();
}

both_engines! {
    fn one_connection_in_every_style(engine) {
        for (style, seed) in
            [(ReplyStyle::Simple, 11), (ReplyStyle::Structured, 12), (ReplyStyle::Extended, 13)]
        {
            let server = Setup::new(engine, &format!("memory:?size={SIZE}")).start();
            play(&server, style, seed, 6000);
        }
    }

    fn a_file(engine) {
        let image = tempfile::NamedTempFile::new_in("/var/tmp").unwrap();
        image.as_file().set_len(SIZE).unwrap();
        let server = Setup::new(engine, image.path().to_str().unwrap()).start();
        play(&server, ReplyStyle::Extended, 21, 4000);
    }

    fn a_file_without_the_page_cache(engine) {
        let image = tempfile::NamedTempFile::new_in("/var/tmp").unwrap();
        image.as_file().set_len(SIZE).unwrap();
        let volume = format!("{}?direct=true", image.path().display());
        let server = Setup::new(engine, &volume).start();
        let config = sheave_proto::ClientConfig { block_sizes: false, ..Default::default() };
        let link = Link::unix(&server.socket);
        let mut player = Player::new(Client::negotiate(link, config, None).unwrap(), 0, SIZE, 31);
        player.play(800);
        player.survey();
    }

    fn long_requests(engine) {
        let server = Setup::new(engine, "memory:?size=64M").start();
        let mut player = Player::new(Client::new(&server), 0, 64 << 20, 41);
        player.longest = 32 << 20;
        player.play(120);
        player.survey();
    }

    fn many_connections_over_tcp_and_unix_sockets(engine) {
        const PLAYERS: u64 = 8;
        let server = Setup::new(engine, "memory:?size=8M").start();
        std::thread::scope(|scope| {
            for number in 0..PLAYERS {
                let server = &server;
                scope.spawn(move || {
                    let link = match number % 2 {
                        0 => Link::unix(&server.socket),
                        _ => Link::tcp(server.address),
                    };
                    let client = Client::with(link, ReplyStyle::Structured);
                    let mut player = Player::new(client, number << 20, 1 << 20, 100 + number);
                    player.depth = 200;
                    player.play(1500);
                    player.survey();
                });
            }
        });
        wait_until("all connections gone", || server.connections() == 0);
        // Each client can read the writes of all others.
        let mut client = Client::new(&server);
        for number in 0..PLAYERS {
            assert_eq!(client.bytes(number << 20, 1 << 20).len(), 1 << 20);
        }
    }
}
