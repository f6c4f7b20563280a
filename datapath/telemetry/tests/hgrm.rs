//! The text format is that of HdrHistogram's own tools.

use sheave_core::OpKind;
use sheave_telemetry::{Registry, Stage, write_hgrm};

/// `data/latency.hgrm` was written by HdrHistogram 2.1.11 for Java,
/// `outputPercentileDistribution(out, 5, 1000.0)`, from the same values and bounds.
#[test]
fn output_equals_that_of_the_java_original() {
    let volume = Registry::new().volume("disk");
    let recorder = volume.recorder();
    let mut state = 1_u64;
    for n in 0..20_000 {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let ns = (state >> 33) % 200_000 + 8_000;
        recorder.record(OpKind::Read, Stage::Total, if n % 1000 == 0 { ns * 50 } else { ns });
    }
    recorder.record(OpKind::Read, Stage::Total, 3_000_000_000);

    let snapshot = volume.snapshot();
    let read = snapshot.op(OpKind::Read).and_then(|op| op.stage(Stage::Total)).unwrap();
    let mut text = String::new();
    write_hgrm(read, &mut text).unwrap();
    assert_eq!(text, include_str!("data/latency.hgrm"));
}

#[test]
fn an_empty_histogram_has_no_rows() {
    let mut text = String::new();
    write_hgrm(&sheave_telemetry::new_histogram(), &mut text).unwrap();
    assert_eq!(text.lines().filter(|line| !line.starts_with('#')).count(), 2, "{text}");
    assert!(text.contains("Total count    =            0]"));
}
