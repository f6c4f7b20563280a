//! Programs in Go, built for tests.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::{Run, have, skip};

/// A cold build takes up to two minutes of a CPU, and this machine may be busy.
const BUILD_TIMEOUT: Duration = Duration::from_secs(1800);

/// The program of a package, in the version that the module in this directory pins, built into a
/// cache outside of the repository. None, and the test is skipped, where there is no Go.
///
/// # Panics
/// When it cannot be built.
#[must_use]
pub fn go_tool(test: &str, module: &Path, package: &str) -> Option<PathBuf> {
    let name = Path::new(package).file_name().expect("a package has a name");
    if !have("go") {
        skip(test, &format!("no Go, which builds {}", name.display()));
        return None;
    }
    let dir = cache_dir().join("bin");
    // Go builds what has changed only.
    let build = Run::new("go").arg("install").arg(package).env("GOBIN", &dir).in_dir(module);
    build.timeout(BUILD_TIMEOUT).ok();
    Some(dir.join(name))
}

/// Where programs for tests are kept, outside of the repository: another clone finds them.
pub(crate) fn cache_dir() -> PathBuf {
    let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let home = std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache"));
    let dir = cache.or(home).unwrap_or_else(std::env::temp_dir).join("sheave-tests");
    fs::create_dir_all(&dir).expect("a cache");
    dir
}

/// Where Go keeps the source of a module in this version.
///
/// # Panics
/// When it cannot be had.
#[must_use]
pub fn go_module(module: &str, version: &str) -> PathBuf {
    let download = Run::new("go").args("mod download -json").arg(format!("{module}@{version}"));
    let answer = download.timeout(BUILD_TIMEOUT).ok();
    let answer: serde_json::Value = serde_json::from_str(&answer).expect("JSON");
    answer["Dir"].as_str().expect("a directory").into()
}
