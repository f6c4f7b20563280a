//! Snapshots for other processes.
//!
//! ```json
//! {"name": "disk", "connections": 1, "bytes_in_flight": 0, "ops": [
//!   {"op": "read", "bytes": 8192, "errors": 0, "stages": [
//!     {"stage": "total", "count": 2, "mean_ns": 21000.0, "p50_ns": 20479, "p90_ns": 22015,
//!      "p99_ns": 22015, "p999_ns": 22015, "max_ns": 22015, "counts": [[20479, 1], [22015, 1]]}]}]}
//! ```
//! `counts` holds each latency that occurred, as the highest value that its counter counts, and how
//! often. It is the whole histogram, and two of them can be merged without HdrHistogram. The
//! figures before it are for display only, and are ignored on reading.

use hdrhistogram::Histogram;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use sheave_core::{ErrorKind, LinkGauges, LinkState, OpKind};

use crate::layout::{LEN, new_histogram};
use crate::{FailureCount, LastFailure, OpSnapshot, Stage, VolumeGauges, VolumeSnapshot};

#[derive(Serialize, Deserialize)]
struct VolumeWire {
    name: String,
    connections: i64,
    bytes_in_flight: i64,
    /// Omitted when empty, like those below; older programs do not know them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    held_bytes: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    link: Option<LinkWire>,
    ops: Vec<OpWire>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    failures: Vec<FailureWire>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    last_failure: Option<LastFailureWire>,
}

#[derive(Serialize, Deserialize)]
struct LinkWire {
    state: String,
    reconnects: u64,
    waiting_bytes: u64,
    kept_bytes: u64,
}

#[derive(Serialize, Deserialize)]
struct FailureWire {
    op: String,
    kind: String,
    count: u64,
}

#[derive(Serialize, Deserialize)]
struct LastFailureWire {
    op: String,
    kind: String,
    text: String,
    unix_s: u64,
}

#[derive(Serialize, Deserialize)]
struct OpWire {
    op: String,
    bytes: u64,
    errors: u64,
    stages: Vec<StageWire>,
}

#[derive(Serialize, Deserialize)]
struct StageWire {
    stage: String,
    #[serde(flatten, skip_deserializing)]
    summary: Summary,
    counts: Vec<(u64, u64)>,
}

#[derive(Default, Serialize)]
struct Summary {
    count: u64,
    mean_ns: f64,
    p50_ns: u64,
    p90_ns: u64,
    p99_ns: u64,
    p999_ns: u64,
    max_ns: u64,
}

impl Serialize for VolumeSnapshot {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        VolumeWire::from(self).serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for VolumeSnapshot {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        VolumeWire::deserialize(deserializer)?.try_into().map_err(de::Error::custom)
    }
}

impl From<&VolumeSnapshot> for VolumeWire {
    fn from(volume: &VolumeSnapshot) -> Self {
        let VolumeGauges { connections, bytes_in_flight, held_bytes, link } = volume.gauges;
        let link = link.map(|link| LinkWire {
            state: link.state.name().to_owned(),
            reconnects: link.reconnects,
            waiting_bytes: link.waiting_bytes,
            kept_bytes: link.kept_bytes,
        });
        let ops = volume.ops.iter().map(OpWire::from).collect();
        let failures = volume.failures.iter().map(|&FailureCount { op, kind, count }| {
            let (op, kind) = (op.name().to_owned(), kind.name().to_owned());
            FailureWire { op, kind, count }
        });
        let last_failure = volume.last_failure.as_ref().map(|last| LastFailureWire {
            op: last.op.name().to_owned(),
            kind: last.kind.name().to_owned(),
            text: last.text.clone(),
            unix_s: last.unix_s,
        });
        let (name, failures) = (volume.name.clone(), failures.collect());
        Self { name, connections, bytes_in_flight, held_bytes, link, ops, failures, last_failure }
    }
}

impl From<&OpSnapshot> for OpWire {
    fn from(op: &OpSnapshot) -> Self {
        let stages = op.stages().map(|(stage, histogram)| StageWire {
            stage: stage.name().to_owned(),
            summary: summary(histogram),
            counts: counts(histogram),
        });
        let name = op.kind.name().to_owned();
        Self { op: name, bytes: op.bytes, errors: op.errors, stages: stages.collect() }
    }
}

impl TryFrom<VolumeWire> for VolumeSnapshot {
    type Error = String;

    fn try_from(wire: VolumeWire) -> Result<Self, String> {
        let gauges = VolumeGauges {
            connections: wire.connections,
            bytes_in_flight: wire.bytes_in_flight,
            held_bytes: wire.held_bytes,
            link: wire.link.map(link_gauges).transpose()?,
        };
        let failures = wire.failures.into_iter().map(|FailureWire { op, kind, count }| {
            Ok(FailureCount { op: op_kind(&op)?, kind: error_kind(&kind)?, count })
        });
        let last_failure = wire.last_failure.map(|LastFailureWire { op, kind, text, unix_s }| {
            Ok::<_, String>(LastFailure {
                op: op_kind(&op)?,
                kind: error_kind(&kind)?,
                text,
                unix_s,
            })
        });
        Ok(Self {
            name: wire.name,
            gauges,
            ops: wire.ops.into_iter().map(OpSnapshot::try_from).collect::<Result<_, _>>()?,
            failures: failures.collect::<Result<_, String>>()?,
            last_failure: last_failure.transpose()?,
        })
    }
}

impl TryFrom<OpWire> for OpSnapshot {
    type Error = String;

    fn try_from(wire: OpWire) -> Result<Self, String> {
        let mut op = Self::empty(op_kind(&wire.op)?);
        (op.bytes, op.errors) = (wire.bytes, wire.errors);
        for StageWire { stage: name, counts, .. } in wire.stages {
            let stage = Stage::ALL.into_iter().find(|stage| stage.name() == name);
            let stage = stage.ok_or_else(|| format!("unknown stage {name:?}"))?;
            op.stages[stage as usize] = Some(histogram(&counts)?);
        }
        Ok(op)
    }
}

fn link_gauges(wire: LinkWire) -> Result<LinkGauges, String> {
    let LinkWire { state: name, reconnects, waiting_bytes, kept_bytes } = wire;
    let state = LinkState::ALL.into_iter().find(|state| state.name() == name);
    let state = state.ok_or_else(|| format!("unknown state {name:?}"))?;
    Ok(LinkGauges { state, reconnects, waiting_bytes, kept_bytes })
}

fn op_kind(name: &str) -> Result<OpKind, String> {
    let kind = OpKind::ALL.into_iter().find(|kind| kind.name() == name);
    kind.ok_or_else(|| format!("unknown op {name:?}"))
}

fn error_kind(name: &str) -> Result<ErrorKind, String> {
    let kind = ErrorKind::ALL.into_iter().find(|kind| kind.name() == name);
    kind.ok_or_else(|| format!("unknown kind of error {name:?}"))
}

fn summary(histogram: &Histogram<u64>) -> Summary {
    let at = |quantile| histogram.value_at_quantile(quantile);
    Summary {
        count: histogram.len(),
        mean_ns: histogram.mean(),
        p50_ns: at(0.5),
        p90_ns: at(0.9),
        p99_ns: at(0.99),
        p999_ns: at(0.999),
        max_ns: histogram.max(),
    }
}

fn counts(histogram: &Histogram<u64>) -> Vec<(u64, u64)> {
    histogram.iter_recorded().map(|v| (v.value_iterated_to(), v.count_at_value())).collect()
}

fn histogram(counts: &[(u64, u64)]) -> Result<Histogram<u64>, String> {
    if counts.len() > LEN {
        return Err(format!("{} latencies, at most {LEN} can differ", counts.len()));
    }
    let mut histogram = new_histogram();
    for &(value_ns, count) in counts {
        // As recorders' counters are merged, so that equal histograms compare equal.
        let lowest_ns = histogram.lowest_equivalent(value_ns);
        histogram.record_n(lowest_ns, count).map_err(|error| format!("{value_ns} ns: {error}"))?;
    }
    Ok(histogram)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use serde_json::{Value, json};
    use sheave_core::Error;

    use super::*;
    use crate::Registry;

    fn sample() -> VolumeSnapshot {
        let volume = Registry::new().volume("disk");
        let recorder = volume.recorder();
        recorder.record(OpKind::Read, Stage::Total, 20_000);
        recorder.record_n(OpKind::Read, Stage::Total, 300_000_000_000, 2);
        recorder.record(OpKind::Read, Stage::Backend, 0);
        recorder.add_bytes(OpKind::Read, 8192);
        recorder.add_error(OpKind::WriteZeroes);
        recorder.add_connections(1);
        let error = Error::new(ErrorKind::NoSpace, "write", "a.img: no space");
        recorder.note_failure(OpKind::Write, &error, 1, 1_700_000_000);
        volume.show_held_bytes(Some(Arc::new(4096.into())));
        let link = Arc::<sheave_core::Link>::default();
        let state = LinkState::Replaying;
        link.set(LinkGauges { state, reconnects: 2, waiting_bytes: 1, kept_bytes: 0 });
        volume.show_link(Some(link));
        volume.snapshot()
    }

    #[test]
    fn comes_back_as_it_went() {
        let snapshot = sample();
        let text = serde_json::to_string(&snapshot).unwrap();
        assert_eq!(serde_json::from_str::<VolumeSnapshot>(&text).unwrap(), snapshot);
    }

    #[test]
    fn other_programs_find_their_figures() {
        let value = serde_json::to_value(sample()).unwrap();
        assert_eq!(value["name"], "disk");
        assert_eq!(value["connections"], 1);
        let read = &value["ops"][0];
        assert_eq!((&read["op"], &read["bytes"]), (&json!("read"), &json!(8192)));
        let total = &read["stages"][0];
        assert_eq!((&total["stage"], &total["count"]), (&json!("total"), &json!(3)));
        assert_eq!(total["counts"][0], json!([20_479, 1]));
        assert_eq!(total["p50_ns"], total["max_ns"]);
        assert_eq!(value["held_bytes"], 4096);
        assert_eq!(
            (&value["link"]["state"], &value["link"]["reconnects"]),
            (&json!("replaying"), &json!(2))
        );
        assert_eq!(value["failures"], json!([{"op": "write", "kind": "no_space", "count": 1}]));
        assert_eq!(value["last_failure"]["text"], "write: a.img: no space");
        assert_eq!(
            (&value["ops"][1]["op"], &value["ops"][1]["errors"]),
            (&json!("write_zeroes"), &json!(1))
        );
    }

    #[test]
    fn a_snapshot_of_an_older_program_is_read() {
        let mut old = serde_json::to_value(sample()).unwrap();
        for new in ["held_bytes", "link", "failures", "last_failure"] {
            assert!(old.as_object_mut().unwrap().remove(new).is_some(), "{new}");
        }
        let read: VolumeSnapshot = serde_json::from_value(old).unwrap();
        assert!(read.failures.is_empty() && read.last_failure.is_none());
        assert_eq!((read.ops, read.gauges.held_bytes), (sample().ops, None));
    }

    #[test]
    fn strange_input_is_refused() {
        let good = serde_json::to_value(sample()).unwrap();
        let refused = |path: &str, value: Value| {
            let mut bad = good.clone();
            *bad.pointer_mut(path).unwrap() = value;
            serde_json::from_value::<VolumeSnapshot>(bad).unwrap_err().to_string()
        };
        assert_eq!(refused("/ops/0/op", json!("chew")), "unknown op \"chew\"");
        assert_eq!(refused("/ops/0/stages/0/stage", json!("x")), "unknown stage \"x\"");
        assert!(
            refused("/ops/0/stages/0/counts/0/0", json!(u64::MAX))
                .contains("18446744073709551615 ns")
        );
        let many: Vec<_> = (0..=LEN).map(|_| (1, 1)).collect();
        assert!(refused("/ops/0/stages/0/counts", json!(many)).contains("at most"));
    }
}
