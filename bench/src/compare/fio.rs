//! fio, for what the file itself can do.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::rows::Row;

/// Requests per second of fio's io_uring engine on a file past the page cache.
///
/// # Errors
/// When fio is missing or fails.
pub(crate) fn direct(image: &Path, row: &Row, time: Duration) -> Result<f64> {
    let (mode, result) = if row.is_read { ("randread", "read") } else { ("randwrite", "write") };
    let output = Command::new("fio")
        .args(["--name=floor", "--ioengine=io_uring", "--direct=1", "--time_based"])
        .args(["--output-format=json", "--group_reporting", "--allow_file_create=0"])
        .arg(format!("--rw={mode}"))
        .arg(format!("--bs={}", row.block_size))
        .arg(format!("--iodepth={}", row.queue_depth))
        .arg(format!("--runtime={}ms", time.as_millis()))
        .arg(format!("--filename={}", image.display()))
        .output()
        .context("start fio")?;
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "fio failed: {}", errors.trim());
    iops(&String::from_utf8_lossy(&output.stdout), result)
}

/// The rate in fio's report. Notes may stand before the JSON.
fn iops(report: &str, result: &str) -> Result<f64> {
    let start = report.find('{').context("fio's report has no JSON")?;
    let report: Value = serde_json::from_str(&report[start..]).context("fio's report")?;
    let iops = report["jobs"][0][result]["iops"].as_f64();
    iops.filter(|iops| *iops > 0.0).context("fio's report has no rate")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_is_found() {
        let report = r#"note: something
            {"fio version": "fio-3.33", "jobs": [{"read": {"iops": 123.5}, "write": {"iops": 0}}]}"#;
        assert_eq!(iops(report, "read").unwrap(), 123.5);
        assert!(iops(report, "write").is_err());
        assert!(iops("fio: no such file", "read").is_err());
    }
}
