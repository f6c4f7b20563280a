//! The report: one HTML file that needs nothing but itself.

mod chart;
mod page;
mod style;

pub(crate) use page::html;

use std::fmt;

use crate::compare::Product;

/// Text that may stand between tags and in attributes.
struct Escaped<'a>(&'a str);

impl fmt::Display for Escaped<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for c in self.0.chars() {
            match c {
                '&' => f.write_str("&amp;")?,
                '<' => f.write_str("&lt;")?,
                '>' => f.write_str("&gt;")?,
                '"' => f.write_str("&quot;")?,
                '\'' => f.write_str("&#39;")?,
                c => write!(f, "{c}")?,
            }
        }
        Ok(())
    }
}

/// The CSS class that gives a server its colour.
fn class(product: Product) -> &'static str {
    match product {
        Product::Sheave => "s-sheave",
        Product::SheavePoll0 => "s-poll0",
        Product::SheaveThreads => "s-threads",
        Product::Nbdkit => "s-nbdkit",
        Product::QemuNbd => "s-qemu",
        Product::NbdServer => "s-nbdserver",
        Product::Echo => "s-echo",
        Product::EchoPoll => "s-echopoll",
        Product::Ring => "s-ring",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn markup_in_text_stays_text() {
        let escaped = Escaped("<a href=\"x\">&'</a>").to_string();
        assert_eq!(escaped, "&lt;a href=&quot;x&quot;&gt;&amp;&#39;&lt;/a&gt;");
    }
}
