//! `sheave top`: the present activity of this user's servers.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, IsTerminal, Write};
use std::mem::ManuallyDrop;
use std::process;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use ratatui::DefaultTerminal;
use ratatui::Frame;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};
use ratatui::layout::{Alignment, Constraint, Layout};
use ratatui::style::Stylize;
use ratatui::text::{Line, Text};
use ratatui::widgets::{Cell, Table};
use sheave_bench::output;
use sheave_bench::signals::Interrupt;
use sheave_core::{LinkState, printable};

use crate::telemetry::{COLUMNS, Row, ServerSnapshot, Servers, op_rows};

/// The widths of [`COLUMNS`]; the first, the volume's name, also takes the remaining width.
const WIDTHS: [u16; COLUMNS.len()] = [8, 12, 9, 6, 7, 8, 9, 9, 9, 9, 9];
/// Columns that are left out on a narrow screen, least important first.
const EXPENDABLE: [&str; 6] = ["p99.9 µs", "p90 µs", "ERRORS", "COUNT", "max µs", "MB/s"];
/// How soon a signal that ends the program is noticed.
const SIGNAL_CHECK: Duration = Duration::from_millis(100);
/// How long the screen may take to notice it, too.
const END_TIMEOUT: Duration = Duration::from_secs(2);

/// Watch the volumes that are served.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
On a terminal, q quits. Elsewhere, each interval prints a block of lines.

Examples:
  sheave top
  sheave top --count 10 | grep read")]
pub(crate) struct Args {
    /// Seconds between two looks
    #[arg(long, value_name = "SECONDS", default_value = "1", value_parser = interval)]
    interval: Duration,
    /// End after this many intervals
    #[arg(long, value_name = "N")]
    count: Option<u64>,
}

/// Shows the activity until the user quits.
///
/// # Errors
/// When no server answers at the start, or the terminal fails.
pub(crate) fn run(args: Args) -> Result<()> {
    let interrupt = Interrupt::default();
    interrupt.catch().context("top")?;
    let mut watch = Watch::default();
    watch.advance(Servers::read().context("top")?.snapshots);
    if io::stdout().is_terminal() && io::stdin().is_terminal() {
        on_screen(&args, &mut watch, &interrupt).context("top: the terminal failed")
    } else {
        let printed = as_lines(&args, &mut watch, &interrupt);
        output::until_closed(printed).context("top: cannot write to standard output")
    }
}

fn interval(text: &str) -> Result<Duration, String> {
    let seconds = text.parse().map_err(|_| "not a number of seconds".to_owned())?;
    if !(0.1..=3600.0).contains(&seconds) {
        return Err("must be from 0.1 to 3600 seconds".to_owned());
    }
    Ok(Duration::from_secs_f64(seconds))
}

/// The last snapshots of servers, by process.
#[derive(Default)]
struct Watch {
    seen: BTreeMap<u32, ServerSnapshot>,
}

impl Watch {
    /// The activity since the last call; for a new server since its start.
    fn advance(&mut self, servers: Vec<ServerSnapshot>) -> Vec<Row> {
        let mut rows = Vec::new();
        let shared = shared_names(&servers);
        let seen = std::mem::take(&mut self.seen);
        for server in servers {
            // A process that counts for a shorter time is another one with the same id.
            let before = seen.get(&server.pid).filter(|seen| seen.uptime() <= server.uptime());
            let elapsed = server.uptime() - before.map_or(Duration::ZERO, ServerSnapshot::uptime);
            for volume in &server.volumes {
                let first = rows.len();
                let mut old = before.iter().flat_map(|server| &server.volumes);
                match old.find(|old| old.name == volume.name) {
                    Some(old) => rows.extend(op_rows(&volume.since(old), elapsed)),
                    None => rows.extend(op_rows(volume, elapsed)),
                }
                if let Some(link) = volume.gauges.link.filter(|link| link.state != LinkState::Up) {
                    // Also when it is idle, to explain why.
                    if rows.len() == first {
                        let mut row: Row = Default::default();
                        row[0].clone_from(&volume.name);
                        rows.push(row);
                    }
                    for row in &mut rows[first..] {
                        row[0] = format!("{} (server {})", row[0], link.state.name());
                    }
                }
                if shared.contains(&volume.name) {
                    for row in &mut rows[first..] {
                        row[0] = format!("{} [{}]", row[0], server.pid);
                    }
                }
            }
            for object in &server.objects {
                let Some(why) = &object.waits_for else { continue };
                let mut row: Row = Default::default();
                row[0] = format!("{}: {}", printable(&object.name), printable(why));
                rows.push(row);
            }
            self.seen.insert(server.pid, server);
        }
        rows
    }

    /// Takes new snapshots. Goes on without any server: one may be started.
    fn look(&mut self) -> Vec<Row> {
        self.advance(Servers::read().unwrap_or_default().snapshots)
    }
}

/// The names that volumes of several servers have; their rows also name the process.
fn shared_names(servers: &[ServerSnapshot]) -> BTreeSet<String> {
    let mut seen = BTreeSet::new();
    let names = servers.iter().flat_map(|server| &server.volumes).map(|volume| &volume.name);
    names.filter(|name| !seen.insert(*name)).cloned().collect()
}

fn as_lines(args: &Args, watch: &mut Watch, interrupt: &Interrupt) -> io::Result<()> {
    let mut out = io::stdout().lock();
    let mut next = Instant::now();
    for _ in 0..args.count.unwrap_or(u64::MAX) {
        next += args.interval;
        while Instant::now() < next {
            thread::sleep(next.saturating_duration_since(Instant::now()).min(SIGNAL_CHECK));
            if interrupt.is_set() {
                return Ok(());
            }
        }
        out.write_all(block(&watch.look()).as_bytes())?;
        out.flush()?;
    }
    Ok(())
}

/// A headed block of lines, with an empty one behind it.
fn block(rows: &[Row]) -> String {
    let heads = COLUMNS.map(str::to_owned);
    let name = rows.iter().map(|row| row[0].chars().count()).max().unwrap_or(0);
    let name = name.max(WIDTHS[0].into());
    let line = |row: &Row| {
        let mut line = format!("{:name$} {:12}", row[0], row[1]);
        for (cell, width) in row[2..].iter().zip(&WIDTHS[2..]) {
            line += &format!(" {:>1$}", cell, usize::from(*width));
        }
        line.truncate(line.trim_end().len());
        line + "\n"
    };
    if rows.is_empty() {
        return "no server of this user runs\n\n".to_owned();
    }
    [&heads].into_iter().chain(rows).map(line).collect::<String>() + "\n"
}

fn on_screen(args: &Args, watch: &mut Watch, interrupt: &Interrupt) -> io::Result<()> {
    let mut screen = Screen::open()?;
    end_if_stuck(interrupt.clone());
    let mut rows = Vec::new();
    let mut next = Instant::now();
    for turn in 0.. {
        if turn > 0 {
            rows = watch.look();
        }
        if args.count.is_some_and(|count| turn > count) {
            break;
        }
        next = (next + args.interval).max(Instant::now());
        loop {
            screen.0.draw(|frame| draw(frame, &rows, turn == 0, watch.seen.len()))?;
            match wait(next, interrupt)? {
                Wake::Quit => return Ok(()),
                Wake::Redraw => {}
                Wake::Time => break,
            }
        }
    }
    Ok(())
}

/// Ends the process some time after a signal: on a terminal that is gone, crossterm reads for ever.
fn end_if_stuck(interrupt: Interrupt) {
    thread::spawn(move || {
        while !interrupt.is_set() {
            thread::sleep(SIGNAL_CHECK);
        }
        thread::sleep(END_TIMEOUT);
        let _ = ratatui::crossterm::terminal::disable_raw_mode();
        process::exit(0)
    });
}

/// The terminal, which is restored on drop. Its own drop would print an error, and so panic, when
/// the terminal is gone.
struct Screen(ManuallyDrop<DefaultTerminal>);

impl Screen {
    /// Also restores the terminal on a panic.
    fn open() -> io::Result<Self> {
        let opened = ratatui::try_init().inspect_err(|_| drop(ratatui::try_restore()));
        Ok(Self(ManuallyDrop::new(opened?)))
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        let _ = self.0.show_cursor();
        let _ = ratatui::try_restore();
    }
}

enum Wake {
    Quit,
    Redraw,
    Time,
}

/// Waits for a key, a change of the terminal's size, a signal, or the time.
fn wait(until: Instant, interrupt: &Interrupt) -> io::Result<Wake> {
    loop {
        let left = until.saturating_duration_since(Instant::now());
        if interrupt.is_set() {
            return Ok(Wake::Quit);
        }
        if left.is_zero() {
            return Ok(Wake::Time);
        }
        if !event::poll(left.min(SIGNAL_CHECK))? {
            continue;
        }
        match event::read()? {
            Event::Key(key) if is_quit(key) => return Ok(Wake::Quit),
            Event::Resize(..) => return Ok(Wake::Redraw),
            _ => {}
        }
    }
}

fn is_quit(key: KeyEvent) -> bool {
    let control = key.modifiers.contains(KeyModifiers::CONTROL);
    let quits = match key.code {
        KeyCode::Char('c' | 'd') => control,
        KeyCode::Char('q' | 'Q') | KeyCode::Esc => true,
        _ => false,
    };
    quits && key.kind != KeyEventKind::Release
}

fn draw(frame: &mut Frame<'_>, rows: &[Row], first: bool, servers: usize) {
    let [title, body] =
        Layout::vertical([Constraint::Length(2), Constraint::Min(0)]).areas(frame.area());
    let state = match (first, servers) {
        (true, _) => "measuring …".to_owned(),
        (false, 0) => "no server of this user runs".to_owned(),
        (false, 1) => "1 server".to_owned(),
        (false, servers) => format!("{servers} servers"),
    };
    let title_line = Line::from(vec!["sheave top".bold(), format!("   {state}   q quits").into()]);
    frame.render_widget(title_line, title);
    let columns = fitting(body.width);
    let widths = columns.iter().map(|&column| match column {
        0 => Constraint::Min(WIDTHS[0]),
        _ => Constraint::Length(WIDTHS[column]),
    });
    let heads = cells(&COLUMNS.map(str::to_owned), &columns).reversed();
    let table = Table::new(rows.iter().map(|row| cells(row, &columns)), widths).header(heads);
    frame.render_widget(table, body);
}

/// The columns for a screen of this width. Numbers are never truncated.
fn fitting(width: u16) -> Vec<usize> {
    let mut columns: Vec<_> = (0..COLUMNS.len()).collect();
    for expendable in EXPENDABLE {
        let taken: u16 = columns.iter().map(|&column| WIDTHS[column] + 1).sum();
        if taken <= width + 1 {
            break;
        }
        columns.retain(|&column| COLUMNS[column] != expendable);
    }
    columns
}

fn cells(row: &Row, columns: &[usize]) -> ratatui::widgets::Row<'static> {
    let cell = |&column: &usize| {
        let alignment = if column < 2 { Alignment::Left } else { Alignment::Right };
        Cell::from(Text::from(row[column].clone()).alignment(alignment))
    };
    columns.iter().map(cell).collect()
}

#[cfg(test)]
mod tests {
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;
    use sheave_core::OpKind;
    use sheave_telemetry::{Registry, Stage};

    use super::*;

    fn at(registry: &Registry, pid: u32, uptime_s: u64) -> ServerSnapshot {
        let mut server = ServerSnapshot::of(registry, Duration::from_secs(uptime_s));
        server.pid = pid;
        server
    }

    #[test]
    fn shows_what_came_since_the_last_look() {
        let registry = Registry::new();
        let recorder = registry.volume("disk").recorder();
        recorder.record_n(OpKind::Read, Stage::Total, 20_000, 1000);
        let mut watch = Watch::default();
        let first = watch.advance(vec![at(&registry, 1, 10)]);
        assert_eq!(first[0][..6], ["disk", "read", "1000", "0", "0", "100"]);

        recorder.record_n(OpKind::Read, Stage::Total, 90_000, 50);
        let second = watch.advance(vec![at(&registry, 1, 12)]);
        assert_eq!(second[0][..7], ["disk", "read", "50", "0", "0", "25.0", "90.1"]);
        let third = watch.advance(vec![at(&registry, 1, 13)]);
        assert_eq!(third[0][..3], ["disk", "idle", ""]);
    }

    #[test]
    fn servers_come_and_go() {
        let registry = Registry::new();
        registry.volume("disk").recorder().record_n(OpKind::Read, Stage::Total, 20_000, 90);
        let mut watch = Watch::default();
        watch.advance(vec![at(&registry, 1, 10)]);
        assert_eq!(watch.advance(Vec::new()), Vec::<Row>::new());
        let again = watch.advance(vec![at(&registry, 1, 11), at(&registry, 2, 1)]);
        assert_eq!([&again[0][2], &again[1][2]], ["90", "90"], "both are new");
        assert_eq!([&again[0][0], &again[1][0]], ["disk [1]", "disk [2]"]);
        let reborn = watch.advance(vec![at(&registry, 1, 3)]);
        assert_eq!(reborn[0][0], "disk", "it is the only one again");
        assert_eq!(reborn[0][5], "30.0", "another process with the same id");
    }

    #[test]
    fn lines_are_aligned_and_headed() {
        let registry = Registry::new();
        registry.volume("a-long-volume-name").recorder().record(OpKind::Read, Stage::Total, 20_000);
        let text = block(&Watch::default().advance(vec![at(&registry, 1, 10)]));
        let lines: Vec<_> = text.split('\n').collect();
        assert_eq!(lines.len(), 4, "{text}");
        assert!(lines[0].starts_with("VOLUME             OP "), "{text}");
        assert!(lines[1].starts_with("a-long-volume-name read "), "{text}");
        assert_eq!(lines[0].chars().count(), lines[1].chars().count());
        assert_eq!(lines[2..], ["", ""]);
        assert!(block(&[]).starts_with("no server"));
    }

    #[test]
    fn the_screen_shows_each_row() {
        let registry = Registry::new();
        registry.volume("disk").recorder().record(OpKind::Read, Stage::Total, 20_000);
        let rows = Watch::default().advance(vec![at(&registry, 1, 10)]);
        let mut terminal = Terminal::new(TestBackend::new(120, 6)).unwrap();
        terminal.draw(|frame| draw(frame, &rows, false, 1)).unwrap();
        let text = terminal.backend().to_string();
        let lines: Vec<_> = text.lines().collect();
        assert!(lines[0].contains("sheave top   1 server   q quits"), "{text}");
        assert!(lines[2].contains("p99.9 µs"), "{text}");
        assert!(lines[3].starts_with("\"disk") && lines[3].contains("20.5"), "{text}");
        // A tiny terminal must not cause a panic.
        let mut tiny = Terminal::new(TestBackend::new(3, 1)).unwrap();
        tiny.draw(|frame| draw(frame, &rows, false, 1)).unwrap();
    }

    #[test]
    fn a_narrow_screen_shows_fewer_columns_not_half_of_them() {
        assert_eq!(fitting(200), (0..COLUMNS.len()).collect::<Vec<_>>());
        let shown = |width| fitting(width).into_iter().map(|column| COLUMNS[column]);
        let eighty: Vec<_> = shown(80).collect();
        let expected = ["VOLUME", "OP", "COUNT", "MB/s", "IOPS", "p50 µs", "p99 µs", "max µs"];
        assert_eq!(eighty, expected);
        assert!(EXPENDABLE.iter().all(|name| COLUMNS.contains(name)));
        assert_eq!(shown(1).collect::<Vec<_>>(), ["VOLUME", "OP", "IOPS", "p50 µs", "p99 µs"]);
    }

    #[test]
    fn keys_that_quit() {
        let key = |code, modifiers| is_quit(KeyEvent::new(code, modifiers));
        assert!(key(KeyCode::Char('q'), KeyModifiers::NONE));
        assert!(key(KeyCode::Char('c'), KeyModifiers::CONTROL));
        assert!(key(KeyCode::Esc, KeyModifiers::NONE));
        assert!(!key(KeyCode::Char('c'), KeyModifiers::NONE));
    }

    #[test]
    fn intervals_are_bounded() {
        assert_eq!(interval("0.5"), Ok(Duration::from_millis(500)));
        for bad in ["", "x", "0", "-1", "NaN", "inf", "1e9"] {
            assert!(interval(bad).is_err(), "{bad}");
        }
    }
}
