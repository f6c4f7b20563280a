//! How long calls take, and how they end: a histogram for each call and code.

use std::fmt;
use std::sync::Arc;
use std::time::Instant;

use prometheus_client::encoding::{EncodeLabelSet, text};
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};
use tonic::Code;

/// Upper bounds of the buckets in seconds. Calls are answered within 10 s.
const BOUNDS_S: [f64; 12] = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0];

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Labels {
    rpc: String,
    code: String,
}

/// The metrics of a plugin.
#[derive(Clone)]
pub struct Metrics {
    calls: Family<Labels, Histogram>,
    registry: Arc<Registry>,
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Metrics").finish_non_exhaustive()
    }
}

impl Default for Metrics {
    fn default() -> Self {
        let calls = Family::<Labels, Histogram>::new_with_constructor(|| Histogram::new(BOUNDS_S));
        let mut registry = Registry::default();
        let help = "Time from the receipt of a call to its answer";
        registry.register_with_unit("sheave_csi_call", help, Unit::Seconds, calls.clone());
        Self { calls, registry: Arc::new(registry) }
    }
}

impl Metrics {
    /// In the text format of OpenMetrics.
    #[must_use]
    pub fn text(&self) -> String {
        let mut out = String::new();
        // Writing to a string does not fail.
        let _ = text::encode(&mut out, &self.registry);
        out
    }

    /// Counts a call that has ended with this code. The path is that of its request.
    pub fn note(&self, path: &str, code: Code, begun: Instant) {
        // The path is the client's own text, and the service knows of no such call.
        let rpc = match code {
            Code::Unimplemented => "unimplemented",
            _ => path.rsplit('/').next().unwrap_or_default(),
        };
        let labels = Labels { rpc: rpc.to_owned(), code: format!("{code:?}") };
        self.calls.get_or_create(&labels).observe(begun.elapsed().as_secs_f64());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_are_counted_by_name_and_code() {
        let metrics = Metrics::default();
        for code in [Code::Ok, Code::Ok, Code::NotFound] {
            metrics.note("/csi.v1.Controller/DeleteVolume", code, Instant::now());
        }
        metrics.note("/csi.v1.Controller/x\"y", Code::Unimplemented, Instant::now());
        let text = metrics.text();
        for line in [
            "sheave_csi_call_seconds_count{rpc=\"DeleteVolume\",code=\"Ok\"} 2",
            "sheave_csi_call_seconds_count{rpc=\"DeleteVolume\",code=\"NotFound\"} 1",
            "sheave_csi_call_seconds_count{rpc=\"unimplemented\",code=\"Unimplemented\"} 1",
        ] {
            assert!(text.lines().any(|found| found == line), "{line}: {text}");
        }
        assert!(!text.contains("x\"y"), "{text}");
    }
}
