//! What goes to standard output.

use std::io::{self, Write};

/// Prints text. A reader that has seen enough and closed the pipe is no error.
///
/// # Errors
/// When the output cannot be written.
pub fn print(out: &mut dyn Write, text: impl AsRef<[u8]>) -> io::Result<()> {
    until_closed(out.write_all(text.as_ref()).and_then(|()| out.flush()))
}

/// Takes it for a good end that the reader, `head` for instance, has closed the pipe.
///
/// # Errors
/// When printing ended for another reason.
pub fn until_closed(printed: io::Result<()>) -> io::Result<()> {
    match printed {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        printed => printed,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_closed_pipe_is_a_good_end() {
        let (reader, mut writer) = io::pipe().unwrap();
        drop(reader);
        assert!(print(&mut writer, "text").is_ok());
        let mut full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
        assert_eq!(print(&mut full, "text").unwrap_err().kind(), io::ErrorKind::StorageFull);
        let mut kept = Vec::new();
        print(&mut kept, "text").unwrap();
        assert_eq!(kept, b"text");
    }
}
