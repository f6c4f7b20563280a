//! Volumes that are images on loop devices: what a daemon and its pools are for the node engine.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use rustix::fs::OFlags;
use sheave_node::{Attach, Device, Error, Format, Kind, Record, Result, Volumes};

use crate::{Run, eventually};

/// The volumes of a directory. All that is known of them is in files, so that processes share them.
pub struct LoopVolumes {
    dir: PathBuf,
    /// What happens at a call, once: the call's name, whether it is done then.
    strikes: Mutex<BTreeMap<&'static str, Strike>>,
    calls: Mutex<Vec<&'static str>>,
}

/// What happens at a call.
pub type Strike = Box<dyn FnMut() -> Result<()> + Send>;

impl LoopVolumes {
    /// Volumes in a directory that is there.
    #[must_use]
    pub fn new(dir: &Path) -> Self {
        Self { dir: dir.to_owned(), strikes: Mutex::default(), calls: Mutex::default() }
    }

    /// Makes a volume that was never used.
    ///
    /// # Panics
    /// When it cannot be made.
    pub fn create(&self, volume: &str, size: u64) -> PathBuf {
        let image = self.image(volume);
        File::create(&image).and_then(|file| file.set_len(size)).expect("a sparse file");
        self.set_record(volume, "never");
        image
    }

    /// Its image.
    #[must_use]
    pub fn image(&self, volume: &str) -> PathBuf {
        self.dir.join(format!("{volume}.img"))
    }

    /// What is recorded of it: `never`, `static`, `begun TYPE` or `done TYPE`.
    ///
    /// # Panics
    /// When it cannot be read.
    #[must_use]
    pub fn recorded(&self, volume: &str) -> String {
        fs::read_to_string(self.record_path(volume)).expect("a record")
    }

    /// Sets that.
    ///
    /// # Panics
    /// When it cannot be written.
    pub fn set_record(&self, volume: &str, record: &str) {
        fs::write(self.record_path(volume), record).expect("written");
    }

    /// Has something happen at each call of this name, before it is done.
    ///
    /// # Panics
    /// When another thread has panicked with it.
    pub fn strike(&self, call: &'static str, strike: Strike) {
        self.strikes.lock().expect("no panic").insert(call, strike);
    }

    /// Has nothing happen any more.
    ///
    /// # Panics
    /// When another thread has panicked with it.
    pub fn strike_no_more(&self) {
        self.strikes.lock().expect("no panic").clear();
    }

    /// The calls so far.
    ///
    /// # Panics
    /// When another thread has panicked with it.
    #[must_use]
    pub fn calls(&self) -> Vec<&'static str> {
        self.calls.lock().expect("no panic").clone()
    }

    /// Its loop device, if it has one.
    #[must_use]
    pub fn loop_device(&self, volume: &str) -> Option<PathBuf> {
        let listed = Run::new("losetup").args("--noheadings --output NAME --associated");
        let listed = listed.arg(self.image(volume)).ok();
        listed.lines().next().map(|line| PathBuf::from(line.trim()))
    }

    /// Ends all devices.
    pub fn end(&self) {
        let entries = fs::read_dir(&self.dir).into_iter().flatten().flatten();
        let images = entries.map(|entry| entry.path());
        for image in images.filter(|path| path.extension().is_some_and(|end| end == "img")) {
            let volume = image.file_stem().unwrap_or_default().to_string_lossy().into_owned();
            if let Some(device) = self.loop_device(&volume) {
                let _ = Run::new("losetup").arg("--detach").arg(device).output();
            }
        }
    }

    fn record_path(&self, volume: &str) -> PathBuf {
        self.dir.join(format!("{volume}.record"))
    }

    fn called(&self, call: &'static str) -> Result<()> {
        self.calls.lock().expect("no panic").push(call);
        match self.strikes.lock().expect("no panic").get_mut(call) {
            Some(strike) => strike(),
            None => Ok(()),
        }
    }

    fn check_there(&self, volume: &str) -> Result<()> {
        match self.image(volume).exists() {
            true => Ok(()),
            false => Err(Error::new(Kind::NotFound, format!("there is no volume {volume}"))),
        }
    }

    fn look(&self, volume: &str) -> Option<Device> {
        let path = self.loop_device(volume)?;
        let size = Run::new("blockdev").arg("--getsize64").arg(&path).ok();
        let read_only = Run::new("blockdev").arg("--getro").arg(&path).ok();
        Some(Device {
            path,
            read_only: read_only.trim() == "1",
            size: size.trim().parse().expect("bytes"),
            waiting: None,
        })
    }
}

impl Volumes for LoopVolumes {
    fn attach(&self, volume: &str, how: &Attach) -> Result<Device> {
        self.called("attach")?;
        self.check_there(volume)?;
        if self.loop_device(volume).is_none() {
            let mut attach = Run::new("losetup").args("--find");
            if how.read_only {
                attach = attach.arg("--read-only");
            }
            attach.arg(self.image(volume)).ok();
        }
        self.called("attached")?;
        Ok(self.look(volume).expect("a device"))
    }

    fn device(&self, volume: &str) -> Result<Option<Device>> {
        self.called("device")?;
        Ok(self.look(volume))
    }

    fn detach(&self, volume: &str) -> Result<()> {
        self.called("detach")?;
        if let Some(device) = self.loop_device(volume) {
            let alone = OpenOptions::new()
                .read(true)
                .custom_flags(OFlags::EXCL.bits().cast_signed())
                .open(&device);
            alone.map_err(|error| Error::new(Kind::Unavailable, format!("in use: {error}")))?;
            Run::new("losetup").arg("--detach").arg(device).ok();
            // A program that lists devices may keep it for a moment.
            assert!(eventually(|| self.loop_device(volume).is_none()), "{volume} is left");
        }
        self.called("detached")
    }

    /// A loop device cannot be ended while it is mounted.
    fn detach_by_force(&self, volume: &str) -> Result<()> {
        self.called("force")?;
        self.detach(volume)
    }

    fn grow(&self, volume: &str) -> Result<Device> {
        self.called("grow")?;
        let gone = || Error::new(Kind::NotFound, "it has no device");
        let device = self.loop_device(volume).ok_or_else(gone)?;
        Run::new("losetup").arg("--set-capacity").arg(device).ok();
        self.called("grown")?;
        self.look(volume).ok_or_else(gone)
    }

    fn record(&self, volume: &str) -> Result<Record> {
        self.called("record")?;
        self.check_there(volume)?;
        let recorded = self.recorded(volume);
        let format = match recorded.split_once(' ') {
            Some(("begun", fs)) => Format::Begun(fs.to_owned()),
            Some(("done", fs)) => Format::Done(fs.to_owned()),
            _ => Format::Never,
        };
        Ok(Record { format, never_format: recorded == "static" })
    }

    fn mark(&self, volume: &str, format: &Format, _: Option<u64>) -> Result<()> {
        let before = self.recorded(volume);
        assert_ne!(before, "static", "it is never formatted");
        let (call, after, record) = match format {
            Format::Begun(fs) => ("begin", "begun", format!("begun {fs}")),
            Format::Done(fs) => ("finish", "finished", format!("done {fs}")),
            Format::Never => panic!("a volume cannot become new"),
        };
        self.called(call)?;
        assert!(!before.starts_with("done") || before == record, "{before} becomes {record}");
        self.set_record(volume, &record);
        self.called(after)
    }
}
