//! Certificates for one comparison, made by openssl.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};

/// Makes a directory with an authority (`ca-cert.pem`) and a server's certificate for `localhost`
/// (`server-cert.pem`, `server-key.pem`); the names are those that nbdkit and qemu look for.
///
/// # Errors
/// When openssl is missing or fails.
pub(crate) fn make(dir: &Path) -> Result<()> {
    fs::create_dir(dir).with_context(|| format!("make {}", dir.display()))?;
    let common = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2";
    openssl(
        dir,
        &format!(
            "{common} -keyout ca-key.pem -out ca-cert.pem -subj /CN=sheave-bench \
             -addext basicConstraints=critical,CA:TRUE -addext keyUsage=keyCertSign"
        ),
    )?;
    openssl(
        dir,
        &format!(
            "{common} -keyout server-key.pem -out server-cert.pem -subj /CN=localhost \
             -CA ca-cert.pem -CAkey ca-key.pem -addext subjectAltName=DNS:localhost \
             -addext basicConstraints=critical,CA:FALSE -addext keyUsage=digitalSignature \
             -addext extendedKeyUsage=serverAuth"
        ),
    )
}

fn openssl(dir: &Path, arguments: &str) -> Result<()> {
    let output = Command::new("openssl")
        .args(arguments.split_whitespace())
        .current_dir(dir)
        .output()
        .context("start openssl, which makes the certificates")?;
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "openssl failed: {}", errors.trim());
    Ok(())
}
