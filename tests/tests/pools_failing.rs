//! Pools whose storage fails in the middle of a call.

use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use rustix::fs::{FlockOperation, OFlags, flock};
use sheave_control::v1::{DeleteVolumeRequest, PublishVolumeRequest, UnpublishVolumeRequest, Uses};
use sheave_control::{VolumesClient, channel};
use sheave_tests::{Daemon, PoolNode, Run, Trace, have, skip};
use tokio::runtime::{Builder, Runtime};
use tonic::Status;

const EIO: &str = "Input/output error";

/// A client that sends what the command line does not.
struct Client {
    runtime: Runtime,
    volumes: VolumesClient,
}

impl Client {
    fn of(daemon: &Daemon) -> Self {
        let runtime = Builder::new_current_thread().enable_all().build().expect("a runtime");
        let volumes = {
            let _inside = runtime.enter();
            VolumesClient::new(channel(&daemon.socket()))
        };
        Self { runtime, volumes }
    }

    fn delete(&self, id: &str) -> Result<(), Status> {
        self.delete_as_of(id, None)
    }

    fn delete_as_of(&self, id: &str, uses: Option<Uses>) -> Result<(), Status> {
        let request = DeleteVolumeRequest { id: id.to_owned(), uses };
        self.runtime.block_on(self.volumes.clone().delete_volume(request)).map(drop)
    }

    fn publish(&self, id: &str) -> Result<(), Status> {
        let request = PublishVolumeRequest {
            id: id.to_owned(),
            node: "n1".to_owned(),
            mode: sheave_control::v1::AccessMode::SingleNodeWriter.into(),
            ..PublishVolumeRequest::default()
        };
        self.runtime.block_on(self.volumes.clone().publish_volume(request)).map(drop)
    }

    fn unpublish(&self, id: &str) -> Result<(), Status> {
        let (id, node) = (id.to_owned(), "n1".to_owned());
        let request = UnpublishVolumeRequest { id, node, ..UnpublishVolumeRequest::default() };
        self.runtime.block_on(self.volumes.clone().unpublish_volume(request)).map(drop)
    }
}

#[test]
fn a_volume_that_was_used_since_it_was_looked_at_is_not_deleted() {
    let node = PoolNode::new();
    let daemon = node.daemon();
    daemon.sheave("volume create fast/a").ok();
    let id = daemon.volume("fast/a")["id"].as_str().expect("an id").to_owned();
    let client = Client::of(&daemon);
    let refused = |uses: Uses| {
        let error = client.delete_as_of(&id, Some(uses)).expect_err("it was used since");
        assert!(error.message().contains("look again"), "{error}");
    };
    client.publish(&id).expect("published");
    client.unpublish(&id).expect("unpublished");
    refused(Uses::default());
    // Without a publication.
    daemon.sheave("attach fast/a").ok();
    daemon.sheave("detach fast/a").ok();
    refused(Uses { epoch: 1, users: vec![String::new()] });
    let users = vec![String::new(), "sheave attach".to_owned()];
    client.delete_as_of(&id, Some(Uses { epoch: 1, users })).expect("deleted");
    daemon.sheave("volume info fast/a").fails();
}

/// A call that is repeated finds its own work done, and not on stable storage.
#[test]
fn what_could_not_be_flushed_is_not_answered_as_done() {
    let test = "what_could_not_be_flushed_is_not_answered_as_done";
    if !have("strace") {
        return skip(test, "strace (strace) is not installed");
    }
    let node = PoolNode::new();
    let daemon = node.daemon();
    daemon.sheave("volume create fast/a").ok();
    let id = daemon.volume_id("fast/a");
    let client = Client::of(&daemon);
    let scratch = node.node.kernel.scratch().path();
    let failing = |nth| Trace::fail_flushes(daemon.pid(), &node.node.file("fast"), nth, scratch);
    let fails = |call: &dyn Fn() -> Result<(), Status>| {
        let trace = failing(1);
        for round in 0..4 {
            let error = call().expect_err("its flushes fail");
            assert!(error.message().contains(EIO), "{round}: {error}");
        }
        trace.end();
        call().expect("done");
    };
    fails(&|| client.publish(&id));
    fails(&|| client.unpublish(&id));
    let trace = failing(1);
    for command in ["set fast/a --limit-iops 500", "create fast/b"] {
        for _ in 0..2 {
            daemon.sheave(&format!("volume {command}")).output().check_refused(EIO);
        }
    }
    trace.end();
    daemon.sheave("volume create fast/b").ok();
    // The image of this one is there, and its record is not known to be.
    let trace = failing(2);
    daemon.sheave("volume create fast/c").output().check_refused(EIO);
    trace.end();
    daemon.sheave("volume create fast/c").ok();
    assert_eq!(node.files("fast").len(), 9, "{:?}", node.files("fast"));
    fails(&|| client.delete(&id));
    assert_eq!(node.files("fast").len(), 6, "{:?}", node.files("fast"));
}

/// Answers some reads of a record, and damages it for the next one.
struct Record {
    path: PathBuf,
    text: Vec<u8>,
}

impl Record {
    /// Puts a pipe in its place, or what is no record.
    fn replace(&self, with_pipe: bool) {
        let next = self.path.with_extension("next");
        match with_pipe {
            true => drop(Run::new("mkfifo").arg(&next).ok()),
            false => fs::write(&next, "damaged").expect("written"),
        }
        fs::rename(&next, &self.path).expect("renamed");
    }

    /// Answers so many reads, or as many as there are.
    fn answer(&self, reads: usize, is_over: &dyn Fn() -> bool) {
        for left in (0..reads).rev() {
            // It can be opened once a reader has opened it.
            let mut options = File::options();
            options.write(true).custom_flags(OFlags::NONBLOCK.bits() as i32);
            let mut pipe = loop {
                match options.open(&self.path) {
                    Ok(pipe) => break pipe,
                    Err(_) if is_over() => return,
                    Err(_) => thread::sleep(Duration::from_millis(1)),
                }
            };
            self.replace(left > 0);
            pipe.write_all(&self.text).expect("a reader");
        }
    }
}

/// Attaches a volume while the first reads of its record succeed, and the next one does not.
fn attach(daemon: &Daemon, id: &str, record: &Record, reads: usize) -> bool {
    record.replace(reads > 0);
    let done = thread::scope(|scope| {
        let attach = || daemon.sheave("attach --read-only").arg(id).output();
        let attached = scope.spawn(attach);
        record.answer(reads, &|| attached.is_finished());
        attached.join().expect("no panic").status.success()
    });
    fs::remove_file(&record.path).expect("removed");
    fs::write(&record.path, &record.text).expect("written");
    done
}

/// A program that has closed a raw device for now uses it again.
#[test]
fn a_device_outlives_a_call_that_fails_wherever_its_pool_does() {
    let node = PoolNode::new();
    let mut daemon = node.daemon();
    daemon.sheave("volume create fast/a").ok();
    let id = daemon.volume_id("fast/a");
    // The next one does not change the pool, so it does not look for what others have left there.
    daemon.kill();
    let daemon = node.daemon();
    let name = id.strip_prefix("fast/").expect("an id of the pool");
    let path = node.node.file("fast").join(format!("{name}.json"));
    let record = Record { text: fs::read(&path).expect("the record"), path };
    // What a call has made, it ends.
    let reads = (0..).find(|reads| {
        let done = attach(&daemon, &id, &record, *reads);
        assert!(done || daemon.sheave("ls --json").ok().trim() == "[]", "{reads} reads");
        done
    });
    let device = daemon.device();
    for reads in 0..reads.expect("they have an end") {
        assert!(!attach(&daemon, &id, &record, reads), "{reads} reads");
        assert_eq!(daemon.device(), device, "{reads} reads");
    }
    assert!(reads > Some(2), "{reads:?}");
}

#[test]
fn rule_16_a_volume_that_could_not_be_attached_may_still_be_formatted() {
    let node = PoolNode::new();
    let daemon = node.daemon();
    daemon.sheave("volume create fast/a").ok();
    let image = node.files("fast").into_iter().find(|name| name.ends_with(".img"));
    let image = File::open(node.node.file("fast").join(image.expect("an image")));
    let image = image.expect("the image");
    flock(&image, FlockOperation::NonBlockingLockExclusive).expect("a lock");
    daemon.sheave("attach fast/a").output().check_refused("locked");
    assert!(daemon.volume("fast/a")["formatted"].is_null());
    drop(image);
    daemon.attach("fast/a");
    assert_eq!(daemon.volume("fast/a")["formatted"], "block");
}
