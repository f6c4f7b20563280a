//! Answers of the engine, as the interface has them.

use sheave_csi_proto::v1::volume_health::VolumeHealthEntry;
use sheave_csi_proto::v1::{
    VolumeCondition, VolumeHealthErrorType, VolumeUsage, volume_usage::Unit,
};
use sheave_node::{Error, Kind, Problem, Severity, Stats};
use tonic::{Code, Status};

use crate::checks::message;
use crate::sizes::signed;

/// Whether kubelet takes a code as final, and ends nothing of the call. Others leave the outcome
/// open (Kubernetes, `pkg/volume/csi/csi_client.go`, `isFinalError`).
pub(super) fn is_final(code: Code) -> bool {
    use Code::{Aborted, DeadlineExceeded, ResourceExhausted, Unavailable};
    !matches!(code, Aborted | DeadlineExceeded | ResourceExhausted | Unavailable)
}

/// The code of an error, final if the error is.
pub(super) fn status(error: Error) -> Status {
    let code = match error.kind() {
        Kind::Invalid => Code::InvalidArgument,
        Kind::NotFound => Code::NotFound,
        Kind::Exists => Code::AlreadyExists,
        Kind::Refused => Code::FailedPrecondition,
        Kind::Pending => Code::Aborted,
        Kind::Unavailable => Code::Unavailable,
        Kind::TimedOut => Code::DeadlineExceeded,
        Kind::OutOfRange => Code::OutOfRange,
        Kind::Exhausted => Code::ResourceExhausted,
        Kind::Internal => Code::Internal,
    };
    Status::new(code, error.to_string())
}

/// How full a volume is.
pub(super) fn usage(stats: &Stats) -> Vec<VolumeUsage> {
    let total = signed(stats.total_bytes);
    let Some(filesystem) = &stats.filesystem else {
        return vec![VolumeUsage { total, unit: Unit::Bytes.into(), ..VolumeUsage::default() }];
    };
    let bytes = VolumeUsage {
        available: signed(filesystem.available_bytes),
        total,
        used: signed(filesystem.used_bytes),
        unit: Unit::Bytes.into(),
    };
    let used_inodes = filesystem.total_inodes.saturating_sub(filesystem.free_inodes);
    let inodes = VolumeUsage {
        available: signed(filesystem.free_inodes),
        total: signed(filesystem.total_inodes),
        used: signed(used_inodes),
        unit: Unit::Inodes.into(),
    };
    vec![bytes, inodes]
}

/// Problems, as up to version 1.12.
pub(super) fn condition(problems: &[Problem]) -> VolumeCondition {
    let messages: Vec<_> = problems.iter().map(|problem| problem.message.as_str()).collect();
    let text = if messages.is_empty() { "well".to_owned() } else { messages.join("; ") };
    VolumeCondition { abnormal: !problems.is_empty(), message: message(&text) }
}

/// A problem, as since version 1.13.
pub(super) fn health_entry(problem: Problem) -> VolumeHealthEntry {
    let status = match problem.severity {
        Severity::Degraded => VolumeHealthErrorType::Degraded,
        Severity::Inaccessible => VolumeHealthErrorType::Inaccessible,
        Severity::DataLoss => VolumeHealthErrorType::DataLoss,
    };
    let reason = problem.reason.to_owned();
    VolumeHealthEntry { status: status.into(), reason, message: message(&problem.message) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rule_12_what_is_open_has_a_code_that_kubelet_takes_as_open() {
        let kinds = [
            Kind::Invalid,
            Kind::NotFound,
            Kind::Exists,
            Kind::Refused,
            Kind::Pending,
            Kind::Unavailable,
            Kind::TimedOut,
            Kind::OutOfRange,
            Kind::Exhausted,
            Kind::Internal,
        ];
        for kind in kinds {
            let code = status(Error::new(kind, "x")).code();
            assert_eq!(kind.is_final(), is_final(code), "{kind:?} {code}");
        }
    }
}
