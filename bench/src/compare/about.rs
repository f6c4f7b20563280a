//! Where and when it was measured: no number without these beside it.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::product::Product;
use super::results::About;

/// What can be said about this machine and the servers. What is not known stays empty.
pub(crate) fn about(
    products: &[Product],
    dir: &Path,
    runs: usize,
    measure: Duration,
    cpus: usize,
) -> About {
    let cpu_info = read("/proc/cpuinfo");
    let model =
        cpu_info.lines().find_map(|line| line.strip_prefix("model name")?.split(": ").nth(1));
    let load = read("/proc/loadavg");
    About {
        date: now(),
        cpu: format!("{} CPUs, {}", cpus, model.unwrap_or("unknown model").trim()),
        memory_bytes: memory_bytes(&read("/proc/meminfo")),
        kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
        images_on: format!("{} ({})", dir.display(), file_system(&read("/proc/mounts"), dir)),
        command: std::env::args().collect::<Vec<_>>().join(" "),
        runs,
        seconds: measure.as_secs_f64(),
        versions: products.iter().filter_map(|product| version(*product)).collect(),
        load_average: load.split_whitespace().take(3).collect::<Vec<_>>().join(" "),
    }
}

impl About {
    /// Whether others were at work before it began.
    pub(crate) fn is_busy(&self, cpus: usize) -> bool {
        let last_minute = self.load_average.split(' ').next().and_then(|load| load.parse().ok());
        last_minute.is_some_and(|load: f64| load > cpus as f64 / 2.0)
    }
}

fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

fn memory_bytes(text: &str) -> u64 {
    let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}

/// The type of the file system that `dir` is on: that of the longest mount point above it.
fn file_system(mounts: &str, dir: &Path) -> String {
    let dir = fs::canonicalize(dir).unwrap_or_else(|_| dir.to_owned());
    let mut mounts: Vec<_> = mounts
        .lines()
        .filter_map(|line| {
            let mut fields = line.split_whitespace().skip(1);
            Some((fields.next()?, fields.next()?))
        })
        .filter(|(point, _)| dir.starts_with(point))
        .collect();
    mounts.sort_by_key(|(point, _)| point.len());
    mounts.last().map_or("unknown", |(_, kind)| kind).to_owned()
}

/// Name and version of a server.
fn version(product: Product) -> Option<(String, String)> {
    if product == Product::Sheave {
        return Some((product.name().to_owned(), env!("CARGO_PKG_VERSION").to_owned()));
    }
    let program = product.foreign_program()?;
    let output = Command::new(program).arg(version_option(product)).output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned()
        + &String::from_utf8_lossy(&output.stderr);
    let line = text.lines().next()?.trim();
    Some((program.to_owned(), line.strip_prefix("This is ").unwrap_or(line).to_owned()))
}

fn version_option(product: Product) -> &'static str {
    if product == Product::NbdServer { "-V" } else { "--version" }
}

/// Whether a program is on the path.
pub(crate) fn is_installed(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|dir| dir.join(program).is_file())
}

/// Day and time in UTC.
fn now() -> String {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let (days, seconds) = (since / 86_400, since % 86_400);
    let (year, month, day) = civil(days);
    format!("{year}-{month:02}-{day:02} {:02}:{:02} UTC", seconds / 3600, seconds / 60 % 60)
}

/// The date that is `days` after 1970-01-01, in the Gregorian calendar.
fn civil(days: u64) -> (u64, u64, u64) {
    // Years begin in March, so that the leap day is the last one; 146 097 days are 400 years.
    let shifted = days + 719_468;
    let (era, of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    (year, month, day)
}

/// Programs that were asked for and are not there.
pub(crate) fn missing(products: &[Product]) -> BTreeMap<Product, &'static str> {
    let program = |product: &Product| Some((*product, product.foreign_program()?));
    products.iter().filter_map(program).filter(|(_, program)| !is_installed(program)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn days_become_dates() {
        assert_eq!(civil(0), (1970, 1, 1));
        assert_eq!(civil(11_016), (2000, 2, 29));
        assert_eq!(civil(11_017), (2000, 3, 1));
        assert_eq!(civil(20_818), (2026, 12, 31));
    }

    #[test]
    fn the_longest_mount_point_wins() {
        let mounts = "/dev/a / ext4 rw 0 0\ntmpfs /proc tmpfs rw 0 0\n";
        assert_eq!(file_system(mounts, Path::new("/proc/self")), "tmpfs");
        assert_eq!(file_system(mounts, Path::new("/")), "ext4");
    }
}
