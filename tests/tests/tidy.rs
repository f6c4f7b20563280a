//! Rules for the repository itself that no compiler checks.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use sheave_tests::Run;

const FILE_LINES_MAX: usize = 500;
const LINE_CHARS_MAX: usize = 100;

/// The only crates with `unsafe` code. Every other one forbids it.
const UNSAFE_CRATES: &[&str] = &["datapath/ring/src/lib.rs"];
const UNSAFE_DIR: &str = "datapath/ring/";

/// What is fine while one works, but never in a commit. A test may be ignored only for the reason
/// for which `make test` runs it by itself.
const BANNED: &[&str] = &["todo!(", "unimplemented!(", "dbg!(", "#[ignore", "FIXME", "XXX:"];
const IGNORED_BUT_RUN: &str = "#[ignore = \"needs root and a free loop device\"]";

/// Words that comments and documents do without: a sentence names its subject.
const VAGUE_WORDS: &[&str] = &[
    "who",
    "whoever",
    "whom",
    "nobody",
    "somebody",
    "anybody",
    "everybody",
    "is told",
    "are told",
    "was told",
    "were told",
    "be told",
    "tells of",
    "tell of",
    "told of",
    "it is so",
];

#[test]
fn source_files_and_lines_are_short() {
    let mut wrong = Vec::new();
    for (path, text) in sources() {
        let count = text.lines().count();
        if count >= FILE_LINES_MAX {
            wrong.push(format!("{path}: {count} lines"));
        }
        for (index, line) in text.lines().enumerate() {
            if line.chars().count() > LINE_CHARS_MAX {
                wrong.push(format!("{path}:{}: over {LINE_CHARS_MAX} columns", index + 1));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn no_leftovers() {
    let mut wrong = Vec::new();
    for (path, text) in sources().into_iter().filter(|(path, _)| path != "tests/tests/tidy.rs") {
        for (index, line) in text.lines().enumerate() {
            let found = BANNED
                .iter()
                .filter(|banned| line.contains(**banned) && line.trim() != IGNORED_BUT_RUN);
            wrong.extend(found.map(|banned| format!("{path}:{}: {banned}", index + 1)));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn comments_and_documents_name_their_subjects() {
    let mut count = 0;
    let mut wrong = Vec::new();
    for path in tracked("").into_iter().filter(|path| has_prose(path)) {
        let words = words_of_prose(&path, &read(&path));
        count += words.len();
        for vague in VAGUE_WORDS {
            let vague: Vec<_> = vague.split(' ').collect();
            let is_it = |found: &&[(usize, String)]| found.iter().map(|(_, word)| word).eq(&vague);
            let found = words.windows(vague.len()).filter(is_it);
            wrong.extend(found.map(|found| format!("{path}:{}: {}", found[0].0, vague.join(" "))));
        }
    }
    assert!(count > 10_000, "the comments were found: {count} words");
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Whether a file has comments, or is a document. The changelog is not written anew.
fn has_prose(path: &str) -> bool {
    let extensions = ["rs", "proto", "md", "sh", "toml", "service", "socket"];
    let extension = Path::new(path).extension().and_then(|extension| extension.to_str());
    extension.is_some_and(|found| extensions.contains(&found)) && path != "CHANGELOG.md"
}

/// The words of comments, or of a document outside of code, in lower case, with their lines. What
/// is no prose counts as a word without letters.
fn words_of_prose(path: &str, text: &str) -> Vec<(usize, String)> {
    let mut words = Vec::new();
    let mut is_code = false;
    for (index, line) in text.lines().enumerate() {
        let prose = match path.rsplit('.').next() {
            Some("rs" | "proto") => comment_of(line),
            Some("md") => {
                is_code ^= line.trim_start().starts_with("```");
                if is_code { "" } else { line }
            }
            _ => line.trim_start().strip_prefix('#').unwrap_or_default(),
        };
        // Every second piece between backquotes is code.
        for (number, piece) in prose.split('`').enumerate() {
            let own = if number % 2 == 0 { piece } else { "" };
            let of_piece = own.split(|c: char| !c.is_alphabetic()).filter(|word| !word.is_empty());
            words.extend(of_piece.map(|word| (index + 1, word.to_lowercase())));
            if number % 2 == 1 || prose.is_empty() {
                words.push((index + 1, String::new()));
            }
        }
    }
    words
}

/// What follows the first `//` of a line that is not part of a URL.
fn comment_of(line: &str) -> &str {
    let begins = line.match_indices("//").map(|(at, _)| at).find(|at| !line[..*at].ends_with(':'));
    begins.map(|at| line[at..].trim_start_matches(['/', '!'])).unwrap_or_default()
}

#[test]
fn crates_forbid_unsafe_code() {
    let roots: Vec<_> = sources()
        .into_iter()
        .filter(|(path, _)| path.ends_with("src/lib.rs") || path.ends_with("src/main.rs"))
        .collect();
    assert!(roots.len() >= 9, "the roots of all crates: {roots:?}");
    let unsafe_allowed = |path: &str| UNSAFE_CRATES.contains(&path);
    let wrong: Vec<_> = roots
        .iter()
        .filter(|(path, text)| {
            text.lines().any(|line| line == "#![forbid(unsafe_code)]") == unsafe_allowed(path)
        })
        .map(|(path, _)| path)
        .collect();
    assert!(
        wrong.is_empty(),
        "#![forbid(unsafe_code)] belongs into all but {UNSAFE_CRATES:?}: \
         {wrong:?}"
    );
}

#[test]
fn unsafe_code_says_why_it_is_safe_and_needed() {
    let mut wrong = Vec::new();
    let mut count = 0;
    for (path, text) in sources().into_iter().filter(|(path, _)| path.starts_with(UNSAFE_DIR)) {
        let lines: Vec<_> = text.lines().collect();
        let is_comment = |line: &str| line.trim_start().starts_with("//");
        let code = |at: &usize| !is_comment(lines[*at]) && lines[*at].contains("unsafe ");
        for at in (0..lines.len()).filter(code) {
            count += 1;
            // The comment may stand above a statement that begins some lines earlier.
            let above = lines[..at].iter().rev().skip_while(|line| !is_comment(line));
            let comment: String = above.take_while(|line| is_comment(line)).copied().collect();
            if !comment.contains("SAFETY: ") || !comment.contains("JUSTIFICATION: ") {
                wrong.push(format!("{path}:{}", at + 1));
            }
        }
    }
    assert!(count > 10, "the unsafe code was found: {count}");
    assert!(wrong.is_empty(), "no SAFETY or no JUSTIFICATION above: {wrong:?}");
}

#[test]
fn paths_in_messages_are_printable() {
    let is_shipped = |path: &str| {
        let shipped = ["src/", "datapath/", "backends/", "csi/"];
        shipped.iter().any(|dir| path.starts_with(dir)) && !path.contains("/tests")
    };
    let mut wrong = Vec::new();
    for (path, text) in sources().into_iter().filter(|(path, _)| is_shipped(path)) {
        let code = text.split("#[cfg(test)]\nmod tests {").next().unwrap_or_default();
        let lines = code.lines().enumerate().filter(|(_, line)| line.contains(".display()"));
        wrong.extend(lines.map(|(index, _)| format!("{path}:{}", index + 1)));
    }
    let why = "a file's name may hold what a terminal acts on, and need not be UTF-8";
    assert!(wrong.is_empty(), "sheave_core::printable, not display(), since {why}: {wrong:?}");
}

#[test]
fn the_changelog_keeps_its_form() {
    const SECTIONS: &[&str] =
        &["Added", "Changed", "Deprecated", "Fixed", "Performance", "Removed", "Security"];
    let text = read("CHANGELOG.md");
    let mut lines = text.lines();
    assert_eq!(lines.next(), Some("# Changelog"));
    let mut releases = Vec::new();
    for line in lines {
        if let Some(release) = line.strip_prefix("## ") {
            releases.push(release.to_owned());
        } else if let Some(section) = line.strip_prefix("### ") {
            assert!(SECTIONS.contains(&section), "section {section:?}");
            assert!(!releases.is_empty(), "section {section:?} before any release");
        } else {
            let known = line.is_empty() || line.starts_with("- ") || line.starts_with("  ");
            assert!(known || releases.is_empty(), "neither heading nor entry: {line:?}");
        }
    }
    assert_eq!(releases.first().map(String::as_str), Some("[Unreleased]"));
    for release in &releases[1..] {
        let (version, date) = release.split_once(" - ").expect("version and date");
        assert!(version.starts_with('[') && version.ends_with(']'), "{release}");
        assert!(date.len() == 10 && date.matches('-').count() == 2, "{release}");
    }
}

#[test]
fn decisions_are_numbered_without_gaps() {
    let files = tracked("docs/decisions");
    assert!(!files.is_empty());
    for (index, path) in files.iter().enumerate() {
        let want = format!("docs/decisions/{:04}-", index + 1);
        assert!(path.starts_with(&want) && path.ends_with(".md"), "{path} is not {want}….md");
        let text = read(path);
        let title = format!("# {:04}: ", index + 1);
        assert!(text.starts_with(&title), "{path} does not begin with {title:?}");
    }
}

#[test]
fn every_dependency_has_its_reason() {
    let manifest = read("Cargo.toml");
    let section = manifest
        .split_once("[workspace.dependencies]")
        .and_then(|(_, rest)| rest.split("\n[").next())
        .expect("[workspace.dependencies]");
    let architecture = read("ARCHITECTURE.md");
    let names = section.lines().filter_map(|line| line.split_once(" =")).map(|(name, _)| name);
    let missing: Vec<_> = names
        .filter(|name| !name.starts_with("sheave-"))
        .filter(|name| !architecture.contains(&format!("`{name}`")))
        .collect();
    assert!(missing.is_empty(), "ARCHITECTURE.md gives no reason for {missing:?}");
}

#[test]
fn links_between_documents_lead_somewhere() {
    let mut wrong = Vec::new();
    for path in tracked("").into_iter().filter(|path| path.ends_with(".md")) {
        let dir = Path::new(&path).parent().expect("a file is in a directory").to_owned();
        for target in read(&path).split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            let file = target.split('#').next().unwrap_or_default();
            let outside = target.contains("://") || file.is_empty();
            if !outside && !root().join(&dir).join(file).exists() {
                wrong.push(format!("{path}: {target}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn messages_that_the_documentation_explains_are_those_of_the_code() {
    let text = read("docs/kubernetes.md");
    let section = text.split("\n### Messages\n").nth(1).expect("a section of messages");
    let section = section.split("\n### ").next().unwrap_or_default();
    let crates = ["backends/pools/", "csi/", "daemon/", "datapath/", "durable/", "src/"];
    let is_meant = |path: &str| crates.iter().any(|dir| path.starts_with(dir));
    let code: Vec<_> = sources().into_iter().filter(|(path, _)| is_meant(path)).collect();
    // A literal may be continued on the next line.
    let code = code.iter().flat_map(|(_, text)| text.split("\\\n").map(str::trim_start));
    let code: String = code.collect();
    let messages = section.lines().filter_map(|row| row.strip_prefix("| `")?.split(" | ").next());
    let quoted = messages.flat_map(|cell| cell.split('`').step_by(2)).map(str::trim);
    let parts: Vec<_> = quoted.flat_map(|quote| quote.split('…')).map(str::trim).collect();
    assert!(parts.len() > 80, "the messages were found: {}", parts.len());
    let gone: Vec<_> = parts.into_iter().filter(|part| !code.contains(part)).collect();
    assert!(gone.is_empty(), "docs/kubernetes.md explains messages that there are not: {gone:?}");
}

#[test]
fn every_rule_of_the_csi_driver_has_a_test_that_names_it() {
    let is_test = |path: &str| path.ends_with(".rs") || path.starts_with("tests/");
    let texts = tracked("").into_iter().filter(|path| is_test(path));
    let texts = texts.filter_map(|path| fs::read_to_string(root().join(path)).ok());
    let mut named = BTreeSet::new();
    for text in texts {
        let numbers = text.split("rule_").skip(1).filter_map(|rest| rest.get(..2));
        named.extend(numbers.filter_map(|number| number.parse::<u32>().ok()));
    }
    let text = read("docs/csi-rules.md");
    let rows = text.lines().filter_map(|line| line.strip_prefix("| ")?.strip_suffix('|'));
    let rows = rows.map(|row| row.split(" | ").collect::<Vec<_>>());
    let rules = rows.filter_map(|row| Some((row.first()?.parse::<u32>().ok()?, row)));
    let mut count = 0;
    for (number, row) in rules {
        count += 1;
        assert_eq!((number, row.len()), (count, 3), "{row:?}");
        let has_none = !row[2].trim().is_empty();
        assert_ne!(named.remove(&number), has_none, "rule {number}: {}", row[1]);
    }
    assert!(count == 44 && named.is_empty(), "{count} rules; {named:?} are not among them");
}

#[test]
fn every_case_for_a_guest_is_run() {
    let cases = tracked("tests/vm/cases");
    assert!(cases.len() > 1, "the cases were found");
    let tests = read("tests/tests/vm.rs");
    let names = cases.iter().filter_map(|path| path.strip_prefix("tests/vm/cases/"));
    let missing: Vec<_> = names
        .filter(|name| !["common.sh", "claims.sh", "ways.sh"].contains(name))
        .filter(|name| !tests.contains(&format!("case(\"{name}\"")))
        .collect();
    assert!(missing.is_empty(), "tests/tests/vm.rs does not run {missing:?}");
}

/// All Rust files and their text.
fn sources() -> Vec<(String, String)> {
    let paths = tracked("").into_iter().filter(|path| path.ends_with(".rs"));
    let sources: Vec<_> = paths.map(|path| (path.clone(), read(&path))).collect();
    assert!(sources.len() > 10, "the sources were found");
    sources
}

/// Files of the repository below `dir`, sorted; those that are being deleted are left out.
fn tracked(dir: &str) -> Vec<String> {
    let list = Run::new("git").args("ls-files").arg(format!("./{dir}")).in_dir(&root()).ok();
    list.lines().filter(|path| root().join(path).exists()).map(str::to_owned).collect()
}

fn read(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("workspace").to_owned()
}
