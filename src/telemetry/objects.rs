//! Object volumes in statistics: what their stores lack, and what they wait for.

use std::fmt;

use prometheus_client::encoding::{DescriptorEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Unit;
use sheave_core::printable;
use sheave_volumes::{ObjectStatus, RequestCounts};

/// A line on a volume.
pub(crate) fn line(status: &ObjectStatus) -> String {
    let ObjectStatus { name, lag_bytes, lag_ms, journal_used_bytes, journal_bytes_max, .. } =
        status;
    let seconds = lag_ms / 1000;
    let waits = match &status.waits_for {
        Some(why) => format!("; {}", printable(why)),
        None => String::new(),
    };
    format!(
        "{}: the store lacks {lag_bytes} bytes, the oldest since {seconds} s; \
         {journal_used_bytes} of {journal_bytes_max} bytes of journal in use{waits}\n",
        printable(name)
    )
}

/// The metrics of all volumes.
pub(super) fn encode(encoder: &mut DescriptorEncoder<'_>, volumes: &[ObjectStatus]) -> fmt::Result {
    type Value = fn(&ObjectStatus) -> u64;
    let gauges: [(&str, &str, Option<&Unit>, Value); 8] = [
        ("sheave_object_lag", "Bytes written that the store lacks", Some(&Unit::Bytes), |of| {
            of.lag_bytes
        }),
        ("sheave_object_lag_writes", "Writes that the store lacks", None, |of| of.lag_writes),
        ("sheave_object_journal", "Bytes of the journal's files", Some(&Unit::Bytes), |of| {
            of.journal_bytes
        }),
        ("sheave_object_journal_used", "Of them, those in use", Some(&Unit::Bytes), |of| {
            of.journal_used_bytes
        }),
        ("sheave_object_deleted", "Bytes of objects deleted", Some(&Unit::Bytes), |of| {
            of.deleted_bytes
        }),
        ("sheave_object_moved", "Bytes moved out of garbage", Some(&Unit::Bytes), |of| {
            of.moved_bytes
        }),
        ("sheave_object_journal_max", "The most of them", Some(&Unit::Bytes), |of| {
            of.journal_bytes_max
        }),
        (
            "sheave_object_waits",
            "1 while the volume waits for its store, or has failed",
            None,
            |of| u64::from(of.waits_for.is_some()),
        ),
    ];
    for (name, help, unit, value) in gauges {
        let mut gauge = encoder.encode_descriptor(name, help, unit, MetricType::Gauge)?;
        for volume in volumes {
            let value = i64::try_from(value(volume)).unwrap_or(i64::MAX);
            gauge.encode_family(&labels(volume))?.encode_gauge(&value)?;
        }
    }
    type Time = fn(&ObjectStatus) -> u64;
    let times: [(&str, &str, Time); 2] = [
        ("sheave_object_lag_age", "Age of the oldest write that the store lacks", |of| of.lag_ms),
        ("sheave_object_request_age", "Age of the oldest request without an answer", |of| {
            of.oldest_request_ms.unwrap_or_default()
        }),
    ];
    for (name, help, value) in times {
        let unit = Some(&Unit::Seconds);
        let mut gauge = encoder.encode_descriptor(name, help, unit, MetricType::Gauge)?;
        for volume in volumes {
            let seconds = value(volume) as f64 / 1000.0;
            gauge.encode_family(&labels(volume))?.encode_gauge(&seconds)?;
        }
    }
    encode_requests(encoder, volumes)
}

fn encode_requests(encoder: &mut DescriptorEncoder<'_>, volumes: &[ObjectStatus]) -> fmt::Result {
    type Value = fn(&RequestCounts) -> u64;
    let counters: [(&str, &str, Option<&Unit>, Value); 3] = [
        ("sheave_object_requests", "Requests that the store has answered", None, |of| of.answered),
        ("sheave_object_request_failures", "Requests that have failed", None, |of| of.failed),
        ("sheave_object_request", "Bytes sent and received", Some(&Unit::Bytes), |of| of.bytes),
    ];
    for (name, help, unit, value) in counters {
        let mut counter = encoder.encode_descriptor(name, help, unit, MetricType::Counter)?;
        for volume in volumes {
            let requests = &volume.requests;
            let kinds = [
                ("create", &requests.create),
                ("get", &requests.get),
                ("list", &requests.list),
                ("delete", &requests.delete),
            ];
            for (kind, counts) in kinds {
                let [volume] = labels(volume);
                counter
                    .encode_family(&[volume, ("kind", kind)])?
                    .encode_counter::<NoLabelSet, _, u64>(&value(counts), None)?;
            }
        }
    }
    Ok(())
}

fn labels(volume: &ObjectStatus) -> [(&'static str, &str); 1] {
    [("volume", volume.name.as_str())]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_says_what_a_volume_waits_for() {
        let mut status = ObjectStatus {
            name: "dir:///s/v".to_owned(),
            durability: "local".to_owned(),
            uuid: String::new(),
            epoch: 1,
            lag_bytes: 8192,
            lag_writes: 2,
            lag_ms: 3500,
            journal_bytes: 1 << 20,
            journal_used_bytes: 1 << 19,
            journal_bytes_max: 1 << 21,
            requests: Default::default(),
            deleted_objects: 3,
            deleted_bytes: 96 << 20,
            moved_bytes: 0,
            oldest_request_ms: None,
            waits_for: None,
        };
        let calm = "dir:///s/v: the store lacks 8192 bytes, the oldest since 3 s; 524288 of \
                    2097152 bytes of journal in use\n";
        assert_eq!(line(&status), calm);
        status.waits_for = Some("the store is away: x\ny".to_owned());
        assert!(line(&status).ends_with("in use; the store is away: x\\ny\n"), "{}", line(&status));
    }
}
