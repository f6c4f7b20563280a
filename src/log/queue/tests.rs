use std::io::{BufRead as _, BufReader, PipeReader};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread;

use super::*;

const PATIENCE: Duration = Duration::from_secs(60);

/// A queue whose writer, if there is a target, writes to it on a thread of its own.
fn queue(out: Option<impl Write + Send + 'static>) -> &'static Queue {
    let queue = Box::leak(Box::new(Queue::new()));
    if let Some(out) = out {
        start(queue, out);
    }
    queue
}

fn start(queue: &'static Queue, out: impl Write + Send + 'static) {
    queue.start_writer(|writer| {
        thread::spawn(move || writer.run(out));
        true
    });
}

fn read_lines(from: PipeReader, count: usize) -> Vec<String> {
    BufReader::new(from).lines().take(count).map(Result::unwrap).collect()
}

/// Fails while it is full, after half of a line.
struct Disk {
    full: Arc<AtomicBool>,
    is_cut: bool,
    pipe: io::PipeWriter,
}

impl Write for Disk {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if !self.full.load(Relaxed) {
            self.is_cut = false;
            return self.pipe.write(bytes);
        }
        if std::mem::replace(&mut self.is_cut, true) {
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.pipe.write(&bytes[..bytes.len() / 2])
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn lines_wait_for_a_writer_and_keep_their_order() {
    let (reader, writer) = io::pipe().unwrap();
    let queue = queue(None::<io::PipeWriter>);
    assert!(queue.is_written(), "nothing was logged");
    queue.push(b"1\n");
    queue.push(b"2\n");
    assert!(!queue.is_written());
    start(queue, writer);
    queue.push(b"3\n");
    queue.wait(PATIENCE);
    assert!(queue.is_written());
    assert_eq!(read_lines(reader, 3), ["1", "2", "3"]);
}

#[test]
fn a_reader_that_does_not_read_delays_nothing_and_learns_how_many_are_lost() {
    const COUNT: u64 = 30_000;
    let (reader, writer) = io::pipe().unwrap();
    let queue = queue(Some(writer));
    let filling = "x".repeat(90);
    for index in 0..COUNT {
        queue.push(format!("{index} {filling}\n").as_bytes());
    }
    assert!(queue.lock().pending.len() <= PENDING_BYTES_MAX);
    let begun = Instant::now();
    queue.wait(PATIENCE);
    assert!(begun.elapsed() < PATIENCE, "the end does not wait for such a reader");

    let mut lines = BufReader::new(reader).lines().map(Result::unwrap);
    let (mut kept, mut lost) = (0, 0);
    while kept + lost < COUNT {
        let line = lines.next().unwrap();
        if let Some((before, _)) = line.split_once(" lines of this log were lost") {
            lost += before.rsplit(' ').next().unwrap().parse::<u64>().unwrap();
            continue;
        }
        // In order, and a report is in the place of the lines that it counts.
        assert_eq!(line, format!("{} {filling}", kept + lost));
        kept += 1;
    }
    assert!(lost > 0 && kept as usize * filling.len() > PENDING_BYTES_MAX, "{kept} {lost}");
    queue.push(b"next\n");
    assert_eq!(lines.next().unwrap(), "next");
}

#[test]
fn a_full_disk_loses_lines_and_the_next_one_says_so() {
    let (reader, pipe) = io::pipe().unwrap();
    let full = Arc::new(AtomicBool::new(true));
    let queue = queue(Some(Disk { full: Arc::clone(&full), is_cut: false, pipe }));
    queue.push(b"abcdef\n");
    queue.wait(PATIENCE);
    queue.push(b"lost\n");
    queue.wait(PATIENCE);
    full.store(false, Relaxed);
    queue.push(b"room\n");
    let lines = read_lines(reader, 3);
    assert_eq!(lines[0], "abc", "half a line is not continued by another");
    assert!(lines[1].contains("  WARN 2 lines of this log were lost: "), "{lines:?}");
    assert_eq!(lines[2], "room");
}

#[test]
fn a_line_that_never_fits_is_lost_alone() {
    let (reader, writer) = io::pipe().unwrap();
    let queue = queue(Some(writer));
    queue.push(&vec![b'x'; PENDING_BYTES_MAX + 1]);
    queue.wait(PATIENCE);
    queue.push(b"next\n");
    let lines = read_lines(reader, 2);
    assert!(lines[0].contains("  WARN 1 lines of this log were lost"), "{lines:?}");
    assert_eq!(lines[1], "next");
}

#[test]
fn where_no_writer_can_start_the_caller_writes() {
    let (reader, mut writer) = io::pipe().unwrap();
    let queue = queue(None::<io::PipeWriter>);
    queue.push(b"last\n");
    queue.start_writer(|_| false);
    queue.no_writer().unwrap().run_once(&mut writer);
    assert!(queue.is_written());
    assert_eq!(read_lines(reader, 1), ["last"]);
}

#[test]
fn a_writer_that_cannot_start_is_tried_again() {
    let queue = queue(None::<io::PipeWriter>);
    queue.start_writer(|_| false);
    let (reader, writer) = io::pipe().unwrap();
    queue.push(b"late\n");
    start(queue, writer);
    assert!(queue.no_writer().is_none());
    assert_eq!(read_lines(reader, 1), ["late"]);
}

#[test]
fn the_end_waits_for_a_writer_that_begins_late() {
    let (from, to) = io::pipe().unwrap();
    let queue = queue(None::<io::Sink>);
    queue.push(b"late\n");
    thread::spawn(move || {
        thread::sleep(2 * STALL_TIMEOUT);
        start(queue, to);
    });
    queue.wait(PATIENCE);
    assert!(queue.is_written());
    assert_eq!(read_lines(from, 1), ["late"]);
}
