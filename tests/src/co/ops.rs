//! Which calls the parts of Kubernetes make next for a claim, and what they learn from an answer.

use std::collections::HashMap;
use std::time::Duration;

use tonic::{Code, Status};

use super::calls::{Answer, Call, is_uncertain};
use super::claim::{Claim, Known, Kubelet, Pod, Use};

/// The next call of one part for one claim. Those of a pod have its name.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Op {
    Create,
    Delete,
    Attach,
    Detach,
    Grow,
    Stage,
    Unstage,
    Mount(String),
    Unmount(String),
    GrowHere(String),
    Stats(String),
}

/// What makes calls: each has at most one call for a claim under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Part {
    Provisioner,
    Attacher,
    Resizer,
    Kubelet,
}

/// What calls need beside the claim.
pub(super) struct Context<'a> {
    pub(super) kubelet: &'a Kubelet,
    pub(super) node: &'a str,
    pub(super) parameters: &'a HashMap<String, String>,
    /// Devices may be such that cannot grow while they are in use.
    pub(super) grows_later: bool,
}

impl Op {
    pub(super) fn part(&self) -> Part {
        match self {
            Self::Create | Self::Delete => Part::Provisioner,
            Self::Attach | Self::Detach => Part::Attacher,
            Self::Grow => Part::Resizer,
            _ => Part::Kubelet,
        }
    }

    /// What may be called now.
    pub(super) fn ready(claim: &Claim) -> Vec<Self> {
        let mut ready = Vec::new();
        let Some(volume) = &claim.volume else {
            // What was begun is finished even for a claim that is deleted.
            if !claim.deleted || claim.made == Known::Perhaps {
                ready.push(Self::Create);
            }
            return ready;
        };
        let is_attached = claim.attached == Known::Yes;
        match (claim.has_live_pod(), claim.is_in_use()) {
            (true, _) if !is_attached => ready.push(Self::Attach),
            (false, false) if claim.attached != Known::No => ready.push(Self::Detach),
            _ => {}
        }
        if claim.deleted && claim.attached == Known::No && claim.pods.is_empty() {
            ready.push(Self::Delete);
        }
        if !claim.deleted && claim.wanted > volume.capacity_bytes {
            ready.push(Self::Grow);
        }
        ready.extend(Self::of_kubelet(claim, is_attached));
        ready
    }

    /// As kubelet's reconciler: unmounts first, then mounts, then devices.
    fn of_kubelet(claim: &Claim, is_attached: bool) -> Vec<Self> {
        let mut ready = Vec::new();
        for pod in &claim.pods {
            let uid = || pod.uid.clone();
            match (pod.deleted, pod.mount) {
                (true, Known::No) => {}
                (true, _) => ready.push(Self::Unmount(uid())),
                // The plugin refuses a size that the volume does not have yet.
                (false, Known::Yes) if claim.grows && claim.wanted <= capacity(claim) => {
                    ready.push(Self::GrowHere(uid()));
                }
                (false, Known::Yes) => ready.push(Self::Stats(uid())),
                (false, _) if is_attached && claim.staged == Known::Yes => {
                    ready.push(Self::Mount(uid()));
                }
                (false, _) => {}
            }
        }
        if claim.has_live_pod() && is_attached && claim.staged != Known::Yes {
            ready.push(Self::Stage);
        }
        let is_mounted = claim.pods.iter().any(|pod| pod.mount != Known::No);
        if !claim.has_live_pod() && !is_mounted && claim.staged != Known::No {
            ready.push(Self::Unstage);
        }
        ready
    }

    /// The call, and what has to be there before it.
    pub(super) fn call(&self, claim: &Claim, context: &Context<'_>) -> Call {
        let kubelet = context.kubelet;
        let pod = |uid: &str| claim.pods.iter().find(|pod| pod.uid == uid).expect("a pod");
        match self {
            Self::Create => claim.create(context.parameters),
            Self::Delete => claim.delete(),
            Self::Attach => claim.attach(context.node),
            Self::Detach => claim.detach(context.node),
            Self::Grow => claim.grow(),
            Self::Stage => {
                kubelet.prepare_staging(claim);
                claim.stage(kubelet)
            }
            Self::Unstage => claim.unstage(kubelet),
            Self::Mount(uid) => {
                kubelet.prepare_target(claim, pod(uid));
                claim.mount(kubelet, pod(uid))
            }
            Self::Unmount(uid) => claim.unmount(kubelet, pod(uid)),
            Self::GrowHere(uid) => claim.grow_here(kubelet, pod(uid)),
            Self::Stats(uid) => claim.stats(kubelet, pod(uid)),
        }
    }

    /// Whether a final failure can be right: none of the calls breaks a rule.
    fn may_fail(&self, code: Code, context: &Context<'_>) -> bool {
        matches!(self, Self::GrowHere(_)) && code == Code::FailedPrecondition && context.grows_later
    }

    /// What its part learns.
    ///
    /// # Panics
    /// When the answer cannot be right.
    #[track_caller]
    pub(super) fn learn(
        &self,
        claim: &mut Claim,
        answer: Result<Answer, Status>,
        context: &Context<'_>,
    ) {
        let answer = match answer {
            Ok(answer) => answer,
            Err(status) => {
                let is_right = is_uncertain(status.code()) || self.may_fail(status.code(), context);
                assert!(is_right, "{} {self:?}: a final failure: {status}", claim.name);
                return self.learn_nothing(claim);
            }
        };
        let kubelet = context.kubelet;
        match (self, answer) {
            (Self::Create, Answer::Volume(volume)) => {
                assert!(volume.capacity_bytes >= claim.wanted, "{} is too short", claim.name);
                claim.made = Known::Yes;
                claim.volume = Some(volume);
            }
            (Self::Delete, _) => {
                claim.made = Known::No;
                claim.volume = None;
            }
            (Self::Attach, Answer::Context(context)) => {
                claim.attached = Known::Yes;
                claim.context = context;
            }
            (Self::Detach, _) => {
                claim.attached = Known::No;
                claim.context.clear();
            }
            (Self::Grow, Answer::Size(size)) => {
                assert!(size >= claim.wanted, "{} has not grown: {size}", claim.name);
                claim.volume.as_mut().expect("a volume").capacity_bytes = size;
                claim.grows = true;
            }
            (Self::Stage, _) => claim.staged = Known::Yes,
            (Self::Unstage, _) => {
                claim.staged = Known::No;
                kubelet.remove_staging(claim);
            }
            (Self::Mount(uid), _) => mounted(claim, kubelet, uid),
            (Self::Unmount(uid), _) => {
                let at = claim.pods.iter().position(|pod| pod.uid == *uid).expect("a pod");
                let pod = claim.pods.remove(at);
                kubelet.remove_target(claim, &pod);
            }
            (Self::GrowHere(uid), Answer::Size(size)) => {
                let pod = claim.pods.iter().find(|pod| pod.uid == *uid).expect("a pod");
                check_grown(claim, kubelet, pod, size);
                claim.grows = false;
            }
            (Self::Stats(_), Answer::Size(total)) => {
                // A device grows at once, also when the resizer has not had its answer.
                let most = capacity(claim).max(claim.wanted);
                assert!(total > 0 && total <= most, "{}: {total} bytes", claim.name);
            }
            (op, answer) => panic!("{op:?} is answered by {answer:?}"),
        }
    }

    fn learn_nothing(&self, claim: &mut Claim) {
        let unknown = |known: &mut Known| *known = Known::Perhaps;
        match self {
            Self::Create => unknown(&mut claim.made),
            Self::Attach | Self::Detach => unknown(&mut claim.attached),
            Self::Stage | Self::Unstage => unknown(&mut claim.staged),
            Self::Mount(uid) | Self::Unmount(uid) => {
                let pod = claim.pods.iter_mut().find(|pod| pod.uid == *uid);
                unknown(&mut pod.expect("a pod").mount);
            }
            Self::Delete | Self::Grow | Self::GrowHere(_) | Self::Stats(_) => {}
        }
    }
}

/// A pod has its volume: all that was written is there, and its program starts.
#[track_caller]
fn mounted(claim: &mut Claim, kubelet: &Kubelet, uid: &str) {
    let at = claim.pods.iter().position(|pod| pod.uid == uid).expect("a pod");
    let target = kubelet.target(claim, &claim.pods[at]);
    claim.content.check(claim.used, &target);
    claim.pods[at].mount = Known::Yes;
    if claim.pods[at].writer.is_none() {
        let writer = claim.content.start(claim.used, &target, uid);
        claim.pods[at].writer = Some(writer);
    }
}

#[track_caller]
fn check_grown(claim: &Claim, kubelet: &Kubelet, pod: &Pod, size: i64) {
    assert!(size >= claim.wanted.min(capacity(claim)), "{} has {size} bytes", claim.name);
    if let Use::Filesystem(_) = claim.used {
        let target = kubelet.target(claim, pod);
        let found = rustix::fs::statvfs(&target).expect("its filesystem");
        let total = i64::try_from(found.f_blocks.saturating_mul(found.f_frsize)).expect("bytes");
        // A log, inode tables and the like take less than a third.
        assert!(total > size / 3 * 2, "{}: the filesystem has {total} of {size}", claim.name);
    }
}

fn capacity(claim: &Claim) -> i64 {
    claim.volume.as_ref().map_or(0, |volume| volume.capacity_bytes)
}

impl Claim {
    /// Ends the program of a pod, whose writes had no error; returns how long the longest took.
    #[track_caller]
    pub(super) fn end_pod(&mut self, at: usize) -> Duration {
        self.pods[at].deleted = true;
        match self.pods[at].writer.take() {
            Some(writer) => self.content.end(writer),
            None => Duration::ZERO,
        }
    }

    /// Forgets pods that ended without ever having had their volume.
    pub(super) fn forget_unmounted(&mut self) {
        self.pods.retain(|pod| !(pod.deleted && pod.mount == Known::No));
    }
}

#[cfg(test)]
mod tests {
    use sheave_csi_proto::v1 as csi;

    use super::*;

    #[test]
    fn a_pod_sees_growth_after_the_volume_has_grown() {
        let mut claim = Claim::new("a".to_owned(), Use::Block, false, 2);
        claim.volume = Some(csi::Volume { capacity_bytes: 1, ..csi::Volume::default() });
        (claim.attached, claim.staged, claim.grows) = (Known::Yes, Known::Yes, true);
        let uid = "pod".to_owned();
        let here = Op::GrowHere(uid.clone());
        claim.pods.push(Pod { uid, deleted: false, mount: Known::Yes, writer: None });
        let ready = Op::ready(&claim);
        assert!(ready.contains(&Op::Grow) && !ready.contains(&here), "{ready:?}");
        claim.wanted = 1;
        let ready = Op::ready(&claim);
        assert!(!ready.contains(&Op::Grow) && ready.contains(&here), "{ready:?}");
    }
}
