//! A remote volume under a load that verifies what it reads, while its server is killed and started
//! again and again.

use std::fs;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use sheave_tests::{Certificates, Run, Scratch, Serve, Server, both_engines, have, sheave, skip};

const KILLS: u32 = 5;
const BETWEEN: Duration = Duration::from_millis(1500);

/// Starts the server on its old socket, with its old file.
fn upstream(scratch: &Scratch, certificates: Option<&Certificates>, image: &str) -> Server {
    let socket = scratch.file("upstream");
    let _ = fs::remove_file(&socket);
    let serve = Serve::new(image);
    match certificates {
        Some(certificates) => serve.tls(certificates, true).unix_named(socket),
        None => serve.unix_named(socket),
    }
}

/// Runs fio on `uri` for so long, and fails with what it says.
fn verify(uri: &str, seconds: u64) {
    Run::new("fio")
        .args("--name=job --ioengine=nbd --verify_fatal=1 --verify_dump=0 --verify=crc32c")
        .args("--verify_state_save=0 --do_verify=1 --randrepeat=1 --size=64M --time_based")
        .args("--rw=randwrite --bsrange=512-64k --bs_unaligned=0 --iodepth=32 --fsync=64")
        .args("--verify_backlog=128")
        .arg(format!("--runtime={seconds}"))
        .arg(format!("--uri={uri}"))
        .ok();
}

/// The same by many connections, which several threads serve.
fn verify_by_many(uri: &str, seconds: u64) {
    Run::new(sheave())
        .args("bench run --rw mixed --verify --span 48M --bs 8k --qd 8 -c 6 --flush-every 64")
        .arg("--seconds")
        .arg(seconds.to_string())
        .arg(uri)
        .ok();
}

/// Kills the upstream server while a load verifies what it reads through a server of its export.
fn survives(
    engine: &str,
    certificates: Option<&Certificates>,
    parameters: &str,
    load: fn(&str, u64),
) {
    let scratch = Scratch::on_disk();
    let image = scratch.sparse("image", 64 << 20);
    let mut server = upstream(&scratch, certificates, &image);
    let (scheme, tls) = match certificates {
        Some(certificates) => {
            let dir = certificates.dir().display();
            ("nbds", format!("&tls-certificates={dir}&tls-hostname=localhost"))
        }
        None => ("nbd", String::new()),
    };
    let volume = format!("{scheme}+unix:///?socket={}{tls}{parameters}", scratch.file("upstream"));
    let mut middle = Serve::new(volume).engine(engine).unix();
    let seconds = u64::from(KILLS) * BETWEEN.as_millis() as u64 / 1000 + 3;
    let is_over = AtomicBool::new(false);
    thread::scope(|scope| {
        let (uri, is_over) = (middle.uri(), &is_over);
        let loading = scope.spawn(move || {
            let begun = Instant::now();
            load(&uri, seconds);
            is_over.store(true, Relaxed);
            begun.elapsed()
        });
        for _ in 0..KILLS {
            thread::sleep(BETWEEN);
            assert!(!is_over.load(Relaxed), "the load goes on");
            server.kill();
            server = upstream(&scratch, certificates, &image);
        }
        assert!(loading.join().expect("the load").as_secs() >= seconds);
    });
    middle.wait_for_log("connected again", KILLS as usize);
    assert!(middle.is_alive());
    let shown = middle.sheave("stats").ok();
    assert!(shown.contains(&format!("server up, {KILLS} reconnects, 0 bytes waiting")), "{shown}");
    let json = middle.sheave("stats --json").ok();
    assert!(json.contains("remote/wait") && json.contains("remote/wire"), "{json}");
}

fn has_fio(test: &str) -> bool {
    let has = have("fio");
    if !has {
        skip(test, "fio is not installed");
    }
    has
}

both_engines! {
    fn a_server_that_is_killed_again_and_again(engine) {
        if has_fio("a_server_that_is_killed_again_and_again") {
            survives(engine, None, "", verify);
        }
    }

    fn over_tls(engine) {
        if has_fio("over_tls") {
            survives(engine, Some(&Certificates::new()), "", verify);
        }
    }

    fn over_several_connections(engine) {
        if has_fio("over_several_connections") {
            survives(engine, None, "&connections=4", verify);
        }
    }

    fn by_many_threads_over_one_connection(engine) {
        survives(engine, None, "", verify_by_many);
    }
}
