//! The directory of state that survives a process.

use std::env;
use std::ffi::OsString;
use std::path::{self, Path, PathBuf};

use sheave_core::{Error, ErrorKind, Result};

const OVERRIDE: &str = "SHEAVE_STATE_DIR";

/// `$SHEAVE_STATE_DIR`, else `/var/lib/sheave` for root, else `$XDG_STATE_HOME/sheave`, else
/// `~/.local/state/sheave`.
///
/// # Errors
/// When none of them is known.
pub fn state_dir() -> Result<PathBuf> {
    let set = |name| env::var_os(name).filter(|value| !value.is_empty());
    let uid = rustix::process::geteuid().as_raw();
    choose(uid, set(OVERRIDE), set("XDG_STATE_HOME"), set("HOME")).ok_or_else(|| {
        let why = format!("no directory for what must survive this process; set {OVERRIDE}");
        Error::new(ErrorKind::NotFound, "find", why)
    })
}

fn choose(
    uid: u32,
    named: Option<OsString>,
    xdg: Option<OsString>,
    home: Option<OsString>,
) -> Option<PathBuf> {
    match (named, uid, xdg, home) {
        // Absolute, since the daemon changes its working directory.
        (Some(named), ..) => Some(path::absolute(&named).unwrap_or_else(|_| named.into())),
        (None, 0, ..) => Some("/var/lib/sheave".into()),
        (None, _, Some(xdg), _) => Some(Path::new(&xdg).join("sheave")),
        (None, _, None, home) => Some(Path::new(&home?).join(".local/state/sheave")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_most_particular_place_is_taken() {
        let some = |text: &str| Some(OsString::from(text));
        assert_eq!(choose(0, some("/s"), some("/x"), None), Some("/s".into()));
        let here = env::current_dir().unwrap();
        assert_eq!(choose(0, some("s"), None, None), Some(here.join("s")));
        assert_eq!(choose(0, None, some("/x"), some("/root")), Some("/var/lib/sheave".into()));
        assert_eq!(choose(7, None, some("/x"), some("/h")), Some("/x/sheave".into()));
        assert_eq!(choose(7, None, None, some("/h")), Some("/h/.local/state/sheave".into()));
        assert_eq!(choose(7, None, None, None), None);
    }
}
