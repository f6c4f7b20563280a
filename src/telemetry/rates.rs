//! Figures for people, as rows of a table.

use std::time::Duration;

use sheave_core::printable;
use sheave_telemetry::{Histogram, OpSnapshot, Stage, VolumeSnapshot};

/// The heads of a [`Row`]; latencies are in microseconds.
pub(crate) const COLUMNS: Row<&str> = [
    "VOLUME",
    "OP",
    "COUNT",
    "ERRORS",
    "MB/s",
    "IOPS",
    "p50 µs",
    "p90 µs",
    "p99 µs",
    "p99.9 µs",
    "max µs",
];

/// One cell for each of [`COLUMNS`]; the first two are names, the others numbers.
pub(crate) type Row<T = String> = [T; 11];

const NS_PER_US: f64 = 1e3;
const BYTES_PER_MB: f64 = 1e6;
const QUANTILES: [f64; 4] = [0.5, 0.9, 0.99, 0.999];

/// A row for each kind of op that occurred in `elapsed`, or one row that says idle.
pub(crate) fn op_rows(volume: &VolumeSnapshot, elapsed: Duration) -> Vec<Row> {
    if volume.ops.is_empty() {
        let mut row: Row = Row::default();
        (row[0], row[1]) = (shown_name(volume), "idle".to_owned());
        return vec![row];
    }
    volume.ops.iter().map(|op| op_row(shown_name(volume), op, elapsed)).collect()
}

/// Like [`op_rows`], with a row for each stage of each kind behind it.
pub(crate) fn stage_rows(volume: &VolumeSnapshot, elapsed: Duration) -> Vec<Row> {
    let mut rows = Vec::new();
    for (op, row) in volume.ops.iter().zip(op_rows(volume, elapsed)) {
        rows.push(row);
        let stages = op.stages().filter(|(stage, _)| *stage != Stage::Total);
        rows.extend(stages.map(|(stage, histogram)| {
            let mut row: Row = Row::default();
            row[0] = shown_name(volume);
            row[1] = format!("{}/{}", op.kind.name(), stage.name());
            row[2] = histogram.len().to_string();
            fill_latencies(&mut row, histogram);
            row
        }));
    }
    if rows.is_empty() { op_rows(volume, elapsed) } else { rows }
}

/// A volume's name for display.
fn shown_name(volume: &VolumeSnapshot) -> String {
    printable(&volume.name).to_string()
}

fn op_row(volume: String, op: &OpSnapshot, elapsed: Duration) -> Row {
    let per_second = |amount: f64| match elapsed.as_secs_f64() {
        0.0 => String::new(),
        seconds => number(amount / seconds),
    };
    let mut row: Row = Row::default();
    row[0] = volume;
    row[1] = op.kind.name().to_owned();
    row[2] = op.count().to_string();
    row[3] = op.errors.to_string();
    row[4] = per_second(op.bytes as f64 / BYTES_PER_MB);
    row[5] = per_second(op.count() as f64);
    if let Some(histogram) = op.stage(Stage::Total) {
        fill_latencies(&mut row, histogram);
    }
    row
}

fn fill_latencies(row: &mut Row, histogram: &Histogram<u64>) {
    let at_quantiles = QUANTILES.map(|quantile| histogram.value_at_quantile(quantile));
    // Each is the upper edge of a counter; zero is shown as zero, even as a maximum.
    let max = at_quantiles.into_iter().fold(histogram.max(), u64::max);
    for (cell, ns) in row[6..].iter_mut().zip(at_quantiles.into_iter().chain([max])) {
        *cell = number(ns as f64 / NS_PER_US);
    }
}

/// Three digits or more, as many as histograms keep.
fn number(value: f64) -> String {
    match value {
        0.0 => "0".to_owned(),
        value if value < 10.0 => format!("{value:.2}"),
        value if value < 100.0 => format!("{value:.1}"),
        value => format!("{value:.0}"),
    }
}

#[cfg(test)]
mod tests {
    use sheave_core::OpKind;
    use sheave_telemetry::Registry;

    use super::*;

    #[test]
    fn rows_tell_rates_and_percentiles() {
        let volume = Registry::new().volume("disk");
        let recorder = volume.recorder();
        recorder.record_n(OpKind::Read, Stage::Total, 20_000, 999);
        recorder.record(OpKind::Read, Stage::Total, 3_000_000);
        recorder.record(OpKind::Read, Stage::Backend, 1_000);
        recorder.add_bytes(OpKind::Read, 4_000_000);
        recorder.add_error(OpKind::Flush);
        let snapshot = volume.snapshot();

        let read =
            ["disk", "read", "1000", "0", "2.00", "500", "20.5", "20.5", "20.5", "20.5", "3000"];
        let backend =
            ["disk", "read/backend", "1", "", "", "", "1.02", "1.02", "1.02", "1.02", "1.02"];
        let flush = ["disk", "flush", "0", "1", "0", "0", "", "", "", "", ""];
        let elapsed = Duration::from_secs(2);
        assert_eq!(op_rows(&snapshot, elapsed), [read, flush].map(|row| row.map(str::to_owned)));
        let all = [read, backend, flush].map(|row| row.map(str::to_owned));
        assert_eq!(stage_rows(&snapshot, elapsed), all);
        assert_eq!(op_rows(&snapshot, Duration::ZERO)[0][5], "");
    }

    #[test]
    fn no_percentile_is_above_the_maximum() {
        for ns in [0, 1, 511, 20_000] {
            let volume = Registry::new().volume("disk");
            volume.recorder().record(OpKind::Read, Stage::Total, ns);
            let row = &op_rows(&volume.snapshot(), Duration::ZERO)[0];
            let cells = row[6..].iter().map(|cell| cell.parse::<f64>().unwrap());
            assert!(cells.is_sorted(), "{ns} ns: {row:?}");
        }
    }

    #[test]
    fn an_idle_volume_has_a_row() {
        let snapshot = Registry::new().volume("disk").snapshot();
        for rows in [op_rows(&snapshot, Duration::ZERO), stage_rows(&snapshot, Duration::ZERO)] {
            assert_eq!(rows.len(), 1);
            assert_eq!(rows[0][..2], ["disk", "idle"]);
        }
    }

    #[test]
    fn numbers_keep_three_digits() {
        let values = [0.0, 0.256, 9.87, 20.479, 999.4, 12_345.6];
        assert_eq!(values.map(number), ["0", "0.26", "9.87", "20.5", "999", "12346"]);
    }
}
