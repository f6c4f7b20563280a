//! The directory of the sockets of one user's processes.

use std::env;
use std::ffi::OsString;
use std::fs::{self, DirBuilder};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt};
use std::path::{self, Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::fs::{Mode, fchmod};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen, socket_with,
};
use sheave_core::printable;

/// The listen backlog.
const BACKLOG: i32 = 128;
const OVERRIDE: &str = "SHEAVE_RUNTIME_DIR";
/// How long a process may take to end whose socket another one takes over.
const HANDOVER_TIMEOUT: Duration = Duration::from_secs(10);
const HANDOVER_POLL: Duration = Duration::from_millis(50);

/// The directory of the sockets of this user's processes.
#[derive(Clone, Debug)]
pub(crate) struct RuntimeDir {
    path: PathBuf,
    /// Its required owner. A directory that the user named is not checked.
    owner: Option<u32>,
}

impl RuntimeDir {
    /// `$SHEAVE_RUNTIME_DIR`, else `/run/sheave` for root, else `$XDG_RUNTIME_DIR/sheave`, else
    /// `/tmp/sheave-UID`.
    pub(crate) fn locate() -> Self {
        let uid = rustix::process::geteuid().as_raw();
        Self::choose(uid, env::var_os(OVERRIDE), env::var_os("XDG_RUNTIME_DIR"))
    }

    fn choose(uid: u32, named: Option<OsString>, xdg: Option<OsString>) -> Self {
        let set = |value: Option<OsString>| value.filter(|value| !value.is_empty());
        if let Some(named) = set(named) {
            // Absolute, since the daemon changes its working directory.
            let path = path::absolute(&named).unwrap_or_else(|_| named.into());
            return Self { path, owner: None };
        }
        let path = match (uid, set(xdg)) {
            (0, _) => PathBuf::from("/run/sheave"),
            (_, Some(xdg)) => Path::new(&xdg).join("sheave"),
            (uid, None) => PathBuf::from(format!("/tmp/sheave-{uid}")),
        };
        Self { path, owner: Some(uid) }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Makes the directory, for this user only, unless it exists.
    ///
    /// # Errors
    /// When it cannot be made, or other users could have written into it.
    pub(crate) fn create(&self) -> Result<()> {
        let made = match DirBuilder::new().mode(0o700).create(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            made => made,
        };
        made.with_context(|| {
            format!("cannot make directory {}; name another by {OVERRIDE}", printable(&self.path))
        })?;
        self.exists().map(|_| ())
    }

    /// Whether the directory exists.
    ///
    /// # Errors
    /// When it cannot be inspected, or other users could have written into it.
    pub(crate) fn exists(&self) -> Result<bool> {
        let found = match self.owner {
            // In /tmp any user could have made a link.
            Some(_) => fs::symlink_metadata(&self.path),
            None => fs::metadata(&self.path),
        };
        let found = match found {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            found => found.with_context(|| format!("cannot look at {}", printable(&self.path)))?,
        };
        let path = printable(&self.path);
        ensure!(found.is_dir(), "{path} is not a directory; remove it or set {OVERRIDE}");
        if let Some(owner) = self.owner {
            let private = found.uid() == owner && found.mode() & 0o022 == 0;
            ensure!(private, "{path} belongs to or can be written by others; set {OVERRIDE}");
        }
        Ok(true)
    }
}

/// Listens at `path`, for this user only, replacing a stale socket.
///
/// # Errors
/// When the socket cannot be made.
pub(crate) fn listen_at(path: &Path, kind: SocketType) -> io::Result<OwnedFd> {
    let socket = socket_with(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None)?;
    // On Linux the file that bind makes gets the socket's mode, so it is never open to other users.
    fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    // It listens before it gets its name: a socket that does not listen counts as stale.
    let unfinished = path.with_extension("new");
    match fs::remove_file(&unfinished) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    bind(&socket, &SocketAddrUnix::new(&unfinished)?)?;
    listen(&socket, BACKLOG)?;
    fs::rename(&unfinished, path)?;
    Ok(socket)
}

/// The same for a stream socket, and never in place of a process that listens there, such as a
/// plugin of the same name: it waits 10 s for that to end.
///
/// # Errors
/// When a process keeps the socket, something else is there, or it cannot be made.
pub(crate) async fn listen_alone(path: &Path) -> io::Result<OwnedFd> {
    let refuse = |kind, why| Err(io::Error::new(kind, why));
    if fs::symlink_metadata(path).is_ok_and(|there| !there.file_type().is_socket()) {
        let why = "what is there is no socket, and is left as it is; choose another path";
        return refuse(io::ErrorKind::AlreadyExists, why);
    }
    let begun = Instant::now();
    while is_live(path)? {
        if begun.elapsed() >= HANDOVER_TIMEOUT {
            let why = "another process listens there; end it first, or choose another path";
            return refuse(io::ErrorKind::AddrInUse, why);
        }
        tokio::time::sleep(HANDOVER_POLL).await;
    }
    listen_at(path, SocketType::STREAM)
}

/// Whether a process listens there. Does not wait for it to accept.
fn is_live(path: &Path) -> io::Result<bool> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    let connected = connect(&socket, &SocketAddrUnix::new(path)?);
    // A full backlog, or a socket of another type.
    Ok(matches!(connected, Ok(()) | Err(Errno::AGAIN | Errno::PROTOTYPE)))
}

#[cfg(test)]
impl RuntimeDir {
    /// A directory that a test made.
    pub(crate) fn at(path: &Path) -> Self {
        Self { path: path.to_owned(), owner: None }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    fn chosen(uid: u32, named: &str, xdg: &str) -> String {
        let dir = RuntimeDir::choose(uid, Some(named.into()), Some(xdg.into()));
        dir.path.to_str().unwrap().to_owned()
    }

    #[test]
    fn the_named_directory_comes_first_and_tmp_last() {
        assert_eq!(chosen(0, "/x", "/run/user/0"), "/x");
        assert_eq!(chosen(1000, "/x", "/run/user/1000"), "/x");
        assert_eq!(chosen(0, "", "/run/user/0"), "/run/sheave");
        assert_eq!(chosen(1000, "", "/run/user/1000"), "/run/user/1000/sheave");
        assert_eq!(chosen(1000, "", ""), "/tmp/sheave-1000");
        let here = env::current_dir().unwrap();
        assert_eq!(chosen(0, "x", ""), here.join("x").to_str().unwrap());
    }

    #[test]
    fn a_socket_is_taken_over_when_its_process_has_ended() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let first = runtime.block_on(listen_alone(&path)).unwrap();
        assert!(is_live(&path).unwrap());
        let listener = runtime.block_on(async {
            let second = tokio::spawn({
                let path = path.clone();
                async move { listen_alone(&path).await }
            });
            tokio::time::sleep(HANDOVER_POLL).await;
            assert!(!second.is_finished(), "it waits");
            drop(first);
            second.await.unwrap().unwrap()
        });
        drop(listener);
        assert!(!is_live(&path).unwrap());
        let file = dir.path().join("file");
        fs::write(&file, "data").unwrap();
        let error = runtime.block_on(listen_alone(&file)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(fs::read_to_string(&file).unwrap(), "data");
    }

    #[test]
    fn a_directory_that_others_could_write_is_refused() {
        let parent = tempfile::tempdir().unwrap();
        let path = parent.path().join("sheave");
        let owner = Some(rustix::process::geteuid().as_raw());
        let dir = RuntimeDir { path: path.clone(), owner };
        assert!(!dir.exists().unwrap());
        dir.create().unwrap();
        dir.create().unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o700);

        fs::set_permissions(&path, fs::Permissions::from_mode(0o720)).unwrap();
        assert!(dir.create().unwrap_err().to_string().contains("written by others"));
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        dir.create().unwrap();
        let other = RuntimeDir { path: path.clone(), owner: owner.map(|uid| uid + 1) };
        assert!(other.exists().is_err());

        let link = parent.path().join("link");
        symlink(&path, &link).unwrap();
        let linked = RuntimeDir { path: link, owner };
        assert!(linked.exists().unwrap_err().to_string().contains("not a directory"));
    }
}
