//! Names from outside in messages, such as those of files and exports.

use std::ffi::OsStr;
use std::fmt::{self, Write as _};
use std::os::unix::ffi::OsStrExt as _;

/// Line and paragraph separators, and characters that change the direction of text (Unicode 16,
/// "Bidi_Control"): a terminal acts on them although they are no control characters.
const DECEPTIVE: [char; 14] = [
    '\u{61c}', '\u{200e}', '\u{200f}', '\u{2028}', '\u{2029}', '\u{202a}', '\u{202b}', '\u{202c}',
    '\u{202d}', '\u{202e}', '\u{2066}', '\u{2067}', '\u{2068}', '\u{2069}',
];

/// A name as a message shows it: on one line, without characters that a terminal acts on.
///
/// Control characters become `\n`, `\r`, `\t` or `\u{1b}`, and bytes that are no UTF-8 become
/// `\xe9`. Everything else stays as it is, backslashes too: the text is for people, and cannot be
/// converted back.
///
/// ```
/// use std::path::Path;
///
/// assert_eq!(sheave_core::printable(Path::new("a\nb.img")).to_string(), r"a\nb.img");
/// ```
pub fn printable<T: AsRef<OsStr> + ?Sized>(name: &T) -> Printable<'_> {
    Printable(name.as_ref().as_bytes())
}

/// See [`printable`].
#[derive(Clone, Copy, Debug)]
pub struct Printable<'a>(&'a [u8]);

impl fmt::Display for Printable<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for chunk in self.0.utf8_chunks() {
            for character in chunk.valid().chars() {
                match is_plain(character) {
                    true => f.write_char(character)?,
                    false => write!(f, "{}", character.escape_default())?,
                }
            }
            for byte in chunk.invalid() {
                write!(f, "\\x{byte:02x}")?;
            }
        }
        Ok(())
    }
}

/// Whether a terminal only displays a character.
#[must_use]
pub fn is_plain(character: char) -> bool {
    !character.is_control() && !DECEPTIVE.contains(&character)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_shown_on_one_line_and_do_nothing_to_a_terminal() {
        let cases: [(&[u8], &str); 7] = [
            (b"/images/a b.img", "/images/a b.img"),
            ("/images/caf\u{e9} e\u{301}.img".as_bytes(), "/images/caf\u{e9} e\u{301}.img"),
            (b"caf\xe9.img", r"caf\xe9.img"),
            (b"\xc3", r"\xc3"),
            (b"a\nb\r\t\x1b[2J\x7f", r"a\nb\r\t\u{1b}[2J\u{7f}"),
            ("\u{9b}2J \u{202e}gmi".as_bytes(), r"\u{9b}2J \u{202e}gmi"),
            (br"a\b", r"a\b"),
        ];
        for (name, want) in cases {
            assert_eq!(printable(OsStr::from_bytes(name)).to_string(), want);
        }
    }
}
