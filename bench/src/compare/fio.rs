//! fio: what a file can do without a server, and what its nbd engine makes of the servers. That
//! engine is slow by itself, but it is a client that others wrote.

use std::io::Write;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::results::FioResult;
use super::rows::Row;
use super::server::Server;

/// The job files, and their names.
const JOBS: [(&str, &str); 4] = [
    ("randread", include_str!("../../fio/randread.fio")),
    ("randwrite", include_str!("../../fio/randwrite.fio")),
    ("sequential", include_str!("../../fio/sequential.fio")),
    ("verify", include_str!("../../fio/verify.fio")),
];
/// How long a timed job takes, as the files say it.
const RUNTIME: &str = "runtime=5s";

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

/// Runs all job files on a server.
///
/// # Errors
/// When fio is missing or fails, or the server returned wrong data.
pub(crate) fn jobs(server: &Server, time: Duration) -> Result<Vec<FioResult>> {
    let mut results = Vec::new();
    for (name, text) in JOBS {
        let text = text.replace(RUNTIME, &format!("runtime={}ms", time.as_millis()));
        let mut file = tempfile::Builder::new().suffix(".fio").tempfile()?;
        file.write_all(text.as_bytes())?;
        let output = Command::new("fio")
            .arg("--output-format=json")
            .arg(file.path())
            .env("URI", server.target.to_string())
            // Where the files that it leaves behind do no harm.
            .current_dir(std::env::temp_dir())
            .output()
            .context("start fio")?;
        let errors = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "fio {name} failed: {}", errors.trim());
        let report = parse(&String::from_utf8_lossy(&output.stdout))?;
        for job in report["jobs"].as_array().context("fio's report has no jobs")? {
            let job_name = job["jobname"].as_str().unwrap_or(name);
            ensure!(job["error"] == 0, "fio {job_name} ended with error {}", job["error"]);
            for way in ["read", "write"] {
                results.extend(job_result(server, job_name, way, &job[way]));
            }
        }
    }
    Ok(results)
}

/// One direction of a job, if it did anything.
fn job_result(server: &Server, job: &str, way: &'static str, told: &Value) -> Option<FioResult> {
    Some(FioResult {
        product: server.product,
        job: job.to_owned(),
        way,
        ops_per_s: told["iops"].as_f64().filter(|iops| *iops > 0.0)?,
        bytes_per_s: told["bw_bytes"].as_f64()?,
        p99_us: told["clat_ns"]["percentile"]["99.000000"].as_f64()? / 1e3,
    })
}

/// The rate in fio's report.
fn iops(report: &str, result: &str) -> Result<f64> {
    let iops = parse(report)?["jobs"][0][result]["iops"].as_f64();
    iops.filter(|iops| *iops > 0.0).context("fio's report has no rate")
}

/// fio's report. Notes may stand before the JSON.
fn parse(report: &str) -> Result<Value> {
    let start = report.find('{').context("fio's report has no JSON")?;
    serde_json::from_str(&report[start..]).context("fio's report")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timed_jobs_can_be_shortened() {
        for (name, text) in JOBS {
            assert!(text.contains(RUNTIME) != (name == "verify"), "{name}");
            assert!(text.contains("uri=${URI}"), "{name}");
        }
    }

    #[test]
    fn the_rate_is_found() {
        let report = r#"note: something
            {"fio version": "fio-3.33",
             "jobs": [{"read": {"iops": 123.5}, "write": {"iops": 0}}]}"#;
        assert_eq!(iops(report, "read").unwrap(), 123.5);
        assert!(iops(report, "write").is_err());
        assert!(iops("fio: no such file", "read").is_err());
    }
}
