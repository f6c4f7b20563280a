//! Where the key is by which the key of a volume is wrapped.

use std::fs;
use std::io::Read as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use sheave_core::{Error, ErrorKind, Result, printable};

use crate::cipher::{KEY_BYTES, WrappingKey};

/// What a command may take to say the key.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(10);
/// No text of a key is longer; that of a file may be anything.
const TEXT_BYTES_MAX: u64 = 256;

/// Where a key is. Its text is 64 hexadecimal digits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KeySource {
    /// In a file.
    File(PathBuf),
    /// In a variable of the environment.
    Environment(String),
    /// In what a command prints, which a shell runs.
    Command(String),
}

impl KeySource {
    /// Reads it.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] when there is no key, and those of the file.
    pub fn read(&self) -> Result<WrappingKey> {
        let text = match self {
            Self::File(path) => read_file(path)?,
            Self::Environment(name) => std::env::var(name).map_err(|_| {
                self.refused("the variable is not set in this process, or is no text")
            })?,
            Self::Command(command) => self.run(command)?,
        };
        let key = parse(text.trim()).ok_or_else(|| {
            self.refused("it is no key; a key is 64 hexadecimal digits: openssl rand -hex 32")
        })?;
        Ok(WrappingKey::new(key))
    }

    fn refused(&self, why: &str) -> Error {
        let from = match self {
            Self::File(path) => printable(path).to_string(),
            Self::Environment(name) => format!("${}", printable(name)),
            Self::Command(command) => printable(command).to_string(),
        };
        Error::new(ErrorKind::Invalid, "read the key", format!("{from}: {why}"))
    }

    fn run(&self, command: &str) -> Result<String> {
        let failed = |error| Error::from_io("run", printable(command).to_string(), error);
        let mut child = Command::new("/bin/sh")
            .args(["-c", command])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(failed)?;
        let is_done = self.wait(&mut child);
        let mut text = String::new();
        if is_done.is_ok()
            && let Some(output) = child.stdout.take()
        {
            output.take(TEXT_BYTES_MAX).read_to_string(&mut text).map_err(failed)?;
        }
        is_done.map(|()| text)
    }

    /// Waits until a command has ended well.
    fn wait(&self, child: &mut Child) -> Result<()> {
        let until = Instant::now() + COMMAND_TIMEOUT;
        loop {
            let status = child.try_wait().map_err(|error| Error::from_io("run", "", error))?;
            match status {
                Some(status) if status.success() => return Ok(()),
                Some(status) => return Err(self.refused(&format!("it ended with {status}"))),
                None if Instant::now() < until => std::thread::sleep(POLL),
                None => {
                    // It may have ended just now.
                    let _ = child.kill();
                    let _ = child.wait();
                    let seconds = COMMAND_TIMEOUT.as_secs();
                    return Err(self.refused(&format!("it has not ended within {seconds} s")));
                }
            }
        }
    }
}

fn read_file(path: &PathBuf) -> Result<String> {
    let failed = |error| Error::from_io("read", printable(path).to_string(), error);
    let file = fs::File::open(path).map_err(failed)?;
    if file.metadata().map_err(failed)?.mode() & 0o077 != 0 {
        tracing::warn!("{}: others can read this key; chmod 600 it", printable(path));
    }
    let mut text = Vec::new();
    file.take(TEXT_BYTES_MAX).read_to_end(&mut text).map_err(failed)?;
    Ok(String::from_utf8_lossy(&text).into_owned())
}

/// The key of 64 hexadecimal digits.
fn parse(text: &str) -> Option<[u8; KEY_BYTES]> {
    let (pairs, rest) = text.as_bytes().as_chunks::<2>();
    if !rest.is_empty() || pairs.len() != KEY_BYTES {
        return None;
    }
    let mut key = [0; KEY_BYTES];
    for (into, pair) in key.iter_mut().zip(pairs) {
        let [high, low] = pair.map(|digit| char::from(digit).to_digit(16));
        *into = (high? * 16 + low?) as u8;
    }
    Some(key)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn a_key_is_read_from_anywhere_and_nothing_else_is_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        let text = "0123456789abcdefABCDEF".repeat(3)[..64].to_owned();
        fs::write(&path, format!("{text}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        let id = KeySource::File(path.clone()).read().unwrap().id();
        let said = |command: &str| KeySource::Command(command.to_owned()).read();
        assert_eq!(said(&format!("cat {}", path.display())).unwrap().id(), id);
        let upper = said(&format!("echo {}", text.to_uppercase())).unwrap();
        assert_eq!(upper.id(), id);
        for wrong in [&text[1..], &format!("{text}0"), &text.replace('a', "g"), ""] {
            fs::write(&path, wrong).unwrap();
            let error = KeySource::File(path.clone()).read().unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
        }
        assert!(said(&format!("echo {text}; exit 3")).unwrap_err().to_string().contains("3"));
        let unset = KeySource::Environment("SHEAVE_NO_SUCH_KEY".to_owned());
        assert!(unset.read().unwrap_err().to_string().contains("not set"));
    }
}
