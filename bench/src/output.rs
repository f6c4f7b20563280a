//! What goes to the terminal.

use std::io::{self, Write};

use anyhow::Result;

/// Prints text. A reader that has seen enough and closed the pipe is no error.
///
/// # Errors
/// When the output cannot be written.
pub(crate) fn print(out: &mut dyn Write, text: &str) -> Result<()> {
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(error.into()),
        _ => Ok(()),
    }
}
