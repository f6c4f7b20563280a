//! Which targets of docs/performance.md a comparison has reached. Fails if one is missed.
//!
//! It reads what `sheave bench compare --json bench.json` has written:
//! `cargo run -p sheave-tests --example targets -- bench.json`
#![allow(clippy::print_stdout, reason = "a tool for a terminal")]

use std::process::ExitCode;

fn main() -> ExitCode {
    let path = std::env::args().nth(1).expect("usage: targets FILE");
    let text = std::fs::read_to_string(&path).expect("a file that can be read");
    let results = serde_json::from_str(&text).expect("what sheave bench compare --json writes");
    let verdicts = sheave_tests::judge(&results);
    for verdict in &verdicts {
        println!("{:<8} {}", if verdict.reached { "reached" } else { "missed" }, verdict.what);
    }
    let missed = verdicts.iter().filter(|verdict| !verdict.reached).count();
    println!("{} reached, {missed} missed", verdicts.len() - missed);
    ExitCode::from(u8::from(missed > 0 || verdicts.is_empty()))
}
