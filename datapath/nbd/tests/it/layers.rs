//! Volumes that fail, wait and answer out of order.

use std::sync::Arc;
use std::time::{Duration, Instant};

use sheave_core::{NbdErrno, OpKind};
use sheave_layers::{Limits, RateLimits};
use sheave_proto::wire::command;
use sheave_volumes::OpenOptions;

use crate::support::{Client, Setup, both_engines, pattern};

both_engines! {
    fn errors_reach_the_client_by_their_names(engine) {
        for (error, want) in [
            ("EIO", NbdErrno::Io),
            ("ENOSPC", NbdErrno::NoSpc),
            ("EPERM", NbdErrno::Perm),
            ("ENOMEM", NbdErrno::NoMem),
            ("EINVAL", NbdErrno::Inval),
            ("ENOTSUP", NbdErrno::NotSup),
            ("EOVERFLOW", NbdErrno::Overflow),
            ("ESHUTDOWN", NbdErrno::Shutdown),
        ] {
            let volume = format!("memory:?size=1M&fault=any:error={error}:after=1:count=7");
            let server = Setup::new(engine, &volume).start();
            let mut client = Client::new(&server);
            client.put(0, b"before");
            client.read(0, 100);
            client.write(0, 0, b"never");
            client.flush();
            for command in [command::TRIM, command::WRITE_ZEROES, command::CACHE] {
                client.ask(command, 0, 0, 4096);
            }
            client.ask(command::BLOCK_STATUS, 0, 0, 4096);
            for _ in 0..7 {
                let answer = client.answer().unwrap().expect("a reply");
                let (errno, message) = answer.error.expect("an error");
                assert_eq!(errno, want);
                assert!(message.contains("on purpose"), "{message}");
            }
            assert_eq!(client.bytes(0, 6), b"before");
        }
    }

    fn what_is_fast_overtakes_what_is_slow(engine) {
        let volume = "memory:?size=1M&fault=read:delay=2s:range=0-4k";
        let server = Setup::new(engine, volume).start();
        let mut client = Client::new(&server);
        client.put(4096, &pattern(2, 4096));
        let begun = Instant::now();
        let slow: Vec<_> = (0..10).map(|number| client.read(number, 8)).collect();
        let fast: Vec<_> = (0..10).map(|number| client.read(4096 + number, 8)).collect();
        for (number, cookie) in fast.into_iter().enumerate() {
            let answer = client.answer().unwrap().expect("a reply");
            assert_eq!(answer.request.cookie, cookie);
            assert_eq!(answer.data, pattern(2, 4096)[number..number + 8]);
        }
        assert!(begun.elapsed() < Duration::from_millis(1900));
        for cookie in slow {
            let answer = client.answer().unwrap().expect("a reply");
            assert_eq!((answer.request.cookie, answer.data), (cookie, vec![0; 8]));
        }
        assert!(begun.elapsed() >= Duration::from_secs(2));
    }

    /// A reply does not wait for the rest of an arriving payload.
    fn a_reply_goes_out_in_the_middle_of_a_payload(engine) {
        let volume = "memory:?size=1M&fault=read:delay=100ms";
        let server = Setup::new(engine, volume).start();
        let mut client = Client::simple(&server);
        for sent in [0, 13, 28, 28 + 100_000] {
            let read = client.read(0, 8);
            let mut write = client.header(command::WRITE, 0, 4096, 200_000);
            write.resize(write.len() + 200_000, 7);
            client.link.queue(&write[..sent]);
            let answer = client.answer().unwrap().expect("a reply");
            assert_eq!(answer.request.cookie, read);
            client.link.queue(&write[sent..]);
            assert_eq!(client.only_answer().error, None);
        }
    }

    /// More than both the session and the layer have room for.
    fn more_requests_than_fit_anywhere(engine) {
        const EACH: usize = 4000;
        let volume = "memory:?size=1M&fault=any:delay=5ms";
        let server = Setup::new(engine, volume).start();
        let mut clients: Vec<_> = (0..3).map(|_| Client::simple(&server)).collect();
        for client in &mut clients {
            for number in 0..EACH as u64 {
                match number % 3 {
                    0 => client.write(0, number * 8, &number.to_le_bytes()),
                    1 => client.read(number * 8, 8),
                    _ => client.flush(),
                };
            }
            client.link.push(Duration::from_millis(20));
        }
        for client in &mut clients {
            for _ in 0..EACH {
                assert_eq!(client.answer().unwrap().expect("a reply").error, None);
            }
        }
        for number in (0..EACH as u64).step_by(3) {
            assert_eq!(clients[0].bytes(number * 8, 8), number.to_le_bytes());
        }
    }

    /// An hour's worth of ops waits until the limit is raised, and the rest until it is removed.
    fn a_changed_limit_holds_for_what_waits(engine) {
        let limit = |ops_per_second| RateLimits { bytes_per_second: 0, ops_per_second };
        let limits = Arc::new(Limits::new(limit(0)));
        let options = OpenOptions { limits: Some(Arc::clone(&limits)), ..OpenOptions::default() };
        let volume = sheave_volumes::open("memory:?size=1M", &options).unwrap();
        let server = Setup::of(engine, volume).start();
        let mut client = Client::new(&server);
        (0..1000).for_each(|number| assert_eq!(client.bytes(number, 4).len(), 4));

        limits.set(limit(1));
        (0..600).for_each(|number| { client.read(number, 4); });
        client.link.flush().unwrap();
        let begun = Instant::now();
        client.answer().unwrap().expect("the first needs no wait");
        limits.set(limit(200));
        (0..200).for_each(|_| { client.answer().unwrap().expect("a reply"); });
        let took = begun.elapsed();
        assert!(took >= Duration::from_millis(900), "200 reads at 200/s in {took:?}");
        assert!(took < Duration::from_secs(60), "they waited for the old limit: {took:?}");

        limits.set(limit(1));
        // Some pass at the old limit until the new one is noticed.
        std::thread::sleep(Duration::from_millis(100));
        let reads = || server.counted("disk").op(OpKind::Read).expect("reads").count();
        let (lowered, before) = (Instant::now(), reads());
        std::thread::sleep(Duration::from_millis(500));
        let passed = reads() - before;
        assert!(passed <= 1 + lowered.elapsed().as_secs(), "{passed} reads at 1/s");
        limits.set(limit(0));
        while client.in_flight() > 0 {
            client.answer().unwrap().expect("a reply");
        }
        let took = begun.elapsed();
        assert!(took < Duration::from_secs(60), "400 reads without a limit: {took:?}");
    }

    fn a_limit_is_kept_and_binds_nobody_else(engine) {
        let limited = sheave_volumes::open("memory:?size=1M&limit-iops=200", &Default::default());
        let server = Setup::new(engine, "memory:?size=1M").and("slow", limited.unwrap()).start();
        let [mut free, mut slow] = ["disk", "slow"].map(|export| {
            let config =
                sheave_proto::ClientConfig { export: export.to_owned(), ..Default::default() };
            let link = crate::support::Link::unix(&server.socket);
            Client::negotiate(link, config, None).unwrap()
        });
        let begun = Instant::now();
        for number in 0..400 {
 slow.read(number, 4);
 }
        slow.link.flush().unwrap();
        let mut free_max = Duration::ZERO;
        for _ in 0..200 {
            let one = Instant::now();
            free.bytes(0, 4);
            free_max = free_max.max(one.elapsed());
        }
        for _ in 0..400 {
 slow.answer().unwrap().expect("a reply");
 }
        let took = begun.elapsed();
        // A twentieth of a second's worth may go at once.
        assert!(took >= Duration::from_millis(1900), "400 reads in {took:?}");
        assert!(took < Duration::from_secs(8), "400 reads in {took:?}");
        assert!(free_max < Duration::from_secs(1), "another volume waited {free_max:?}");
    }
}
