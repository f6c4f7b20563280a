//! What the node engine needs of the daemon, by the control API.

use sheave_control::v1::{
    self as control, AttachRequest, DetachRequest, ListDevicesRequest, MarkFormattedRequest,
    ResizeRequest,
};
use sheave_node::{
    Access, Attach, Device, Error, Format, Front, Kind, Record, Result, Volumes, Wanted,
};

use crate::Daemon;
use crate::daemon::{CALL_TIMEOUT, DEVICE_TIMEOUT};

/// The volumes that the daemon of this node has, for the node engine. Calls block, as those of
/// [`Daemon`].
pub struct DaemonVolumes {
    /// The daemon.
    pub daemon: Daemon,
    /// This node, as volumes are published to it.
    pub node_id: String,
}

impl DaemonVolumes {
    /// What lets this node use a volume: a writer that was not let in would write beside another.
    fn publication(&self, id: &str, options: &Attach) -> Result<control::Publication> {
        let volume = self.daemon.volume(id)?;
        if let (true, Some(epoch)) = (volume.unrecorded, options.epoch) {
            // Its pool records nothing; what the controller has answered is all there is.
            let read_only = options.read_only;
            return Ok(control::Publication { epoch, read_only, ..Default::default() });
        }
        let mut all = volume.publications.into_iter();
        all.find(|publication| publication.node == self.node_id).ok_or_else(|| {
            let node = &self.node_id;
            let why =
                format!("volume {id} is not published to this node, {node}; publish it first");
            Error::new(Kind::Refused, why)
        })
    }
}

impl Volumes for DaemonVolumes {
    fn attach(&self, volume: &str, options: &Attach) -> Result<Device> {
        let front = match options.front {
            Front::Auto => control::Front::Unspecified,
            Front::Ublk => control::Front::Ublk,
            Front::Nbd => control::Front::Nbd,
        };
        let publication = self.publication(volume, options)?;
        let request = AttachRequest {
            volume: volume.to_owned(),
            front: front.into(),
            read_only: options.read_only || publication.read_only,
            // Parties that are not the operator of this node have chosen the volume.
            from_operator: false,
            epoch: Some(options.epoch.unwrap_or(publication.epoch)),
            node: self.node_id.clone(),
            // The driver announces that volumes grow while they are used.
            can_grow: true,
            take_over: false,
        };
        let mut devices = self.daemon.devices();
        let answer = self.daemon.wait(DEVICE_TIMEOUT, devices.attach(request))?;
        answer.device.map(device).ok_or_else(no_device)
    }

    fn device(&self, volume: &str) -> Result<Option<Device>> {
        let mut devices = self.daemon.devices();
        let answer = self.daemon.wait(CALL_TIMEOUT, devices.list_devices(ListDevicesRequest {}))?;
        let mut all = answer.devices.into_iter();
        Ok(all.find(|device| device.volume_id == volume).map(device))
    }

    fn detach(&self, volume: &str) -> Result<()> {
        let mut devices = self.daemon.devices();
        let request = DetachRequest { target: volume.to_owned(), force: false };
        match self.daemon.wait(DEVICE_TIMEOUT, devices.detach(request)) {
            Err(error) if error.kind() == Kind::NotFound => Ok(()),
            // It is in use for a moment, such as by udev, or by a program that has it open.
            Err(error) if error.kind() == Kind::Refused => Err(error.with_kind(Kind::Unavailable)),
            ended => ended.map(drop),
        }
    }

    fn detach_by_force(&self, volume: &str) -> Result<()> {
        let mut devices = self.daemon.devices();
        let request = DetachRequest { target: volume.to_owned(), force: true };
        match self.daemon.wait(DEVICE_TIMEOUT, devices.detach(request)) {
            Err(error) if error.kind() == Kind::NotFound => Ok(()),
            ended => ended.map(drop),
        }
    }

    fn grow(&self, volume: &str) -> Result<Device> {
        let size = self.daemon.volume(volume)?.size_bytes;
        if let Some(device) = self.device(volume)?.filter(|device| device.size == size) {
            return Ok(device);
        }
        let mut devices = self.daemon.devices();
        let request = ResizeRequest { target: volume.to_owned(), size_bytes: None };
        let answer =
            self.daemon.wait(DEVICE_TIMEOUT, devices.resize(request)).map_err(|error| {
                // Such as a ublk device before Linux 6.16.
                let is_final = error.kind() == Kind::Refused;
                let advice = "the device has the new size when it is made anew: restart the pods";
                if is_final { error.and(advice) } else { error }
            })?;
        answer.device.map(device).ok_or_else(no_device)
    }

    fn record(&self, volume: &str) -> Result<Record> {
        Ok(record(&self.daemon.volume(volume)?))
    }

    fn mark(&self, volume: &str, format: &Format, epoch: Option<u64>) -> Result<()> {
        let (fs_type, begun) = match format {
            Format::Never => return Err(Error::new(Kind::Internal, "a format is not unmade")),
            Format::Begun(fs) => (fs.clone(), true),
            Format::Done(fs) => (fs.clone(), false),
        };
        let epoch = match epoch {
            Some(epoch) => epoch,
            None => self.daemon.volume(volume)?.epoch,
        };
        let request = MarkFormattedRequest { id: volume.to_owned(), fs_type, epoch, begun };
        let mut volumes = self.daemon.volumes();
        self.daemon.wait(CALL_TIMEOUT, volumes.mark_formatted(request)).map(drop)
    }
}

/// Refuses a volume that can never be mounted so, before anything is done with it.
///
/// # Errors
/// As for [`Wanted::check`].
pub fn check_mountable(
    volume: &control::Volume,
    access: &Access,
    may_format: bool,
    read_only: bool,
) -> Result<()> {
    if !volume.trouble.is_empty() {
        // Neither its size nor what is on it is known, and opening it says why.
        return Ok(());
    }
    let (record, size) = (record(volume), volume.size_bytes);
    let wanted = Wanted { access, may_format, read_only, record: &record, size, is_new: false };
    wanted.check().map_err(|error| error.of(&volume.id))
}

fn record(volume: &control::Volume) -> Record {
    let format = match volume.formatted.clone() {
        fs if fs.is_empty() => Format::Never,
        fs if volume.formatting => Format::Begun(fs),
        fs => Format::Done(fs),
    };
    Record { format, never_format: volume.never_format }
}

fn device(device: control::Device) -> Device {
    Device {
        path: device.path.into(),
        read_only: device.read_only,
        size: device.size_bytes,
        waiting: Some(device.waiting).filter(|why| !why.is_empty()),
    }
}

fn no_device() -> Error {
    Error::new(Kind::Internal, "the daemon has named no device")
}
