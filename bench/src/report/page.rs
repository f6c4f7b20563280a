//! The page.

use std::collections::BTreeMap;
use std::fmt::{Result, Write};

use super::style::CSS;
use super::{Escaped, chart, class};
use crate::compare::{About, Cell, Check, Product, Results, Role, RowResult};
use crate::compare::{floor_distance, percent_spread};
use crate::units::{self, ByteSize};

/// The whole report.
pub(crate) fn html(results: &Results) -> String {
    let mut out = String::new();
    // Writing to a string cannot fail.
    let _ = page(&mut out, results);
    out
}

fn page(out: &mut String, results: &Results) -> Result {
    writeln!(
        out,
        "<!doctype html>\n<html lang=\"en\">\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <title>sheave bench compare, {}</title>\n<style>{CSS}</style>\n<main>",
        Escaped(&results.about.date)
    )?;
    head(out, results)?;
    overview(out, results)?;
    checks(out, results)?;
    fio(out, results)?;
    if !results.rows.is_empty() {
        writeln!(out, "<h2>Rows</h2>")?;
    }
    for row in &results.rows {
        section(out, row)?;
    }
    commands(out, results)?;
    writeln!(out, "</main>\n</html>")
}

fn head(out: &mut String, results: &Results) -> Result {
    let About { date, cpu, memory_bytes, kernel, images_on, command, runs, seconds, .. } =
        &results.about;
    writeln!(out, "<h1>Sheave beside other NBD servers</h1>")?;
    writeln!(
        out,
        "<p class=\"soft\">{runs} × {seconds} s a row and server. Servers take turns within each \
         repetition; figures are medians, ratios are ratios of medians.</p>"
    )?;
    let mut facts = vec![
        ("date", date.clone()),
        ("machine", format!("{cpu}, {}", ByteSize(*memory_bytes))),
        ("kernel", kernel.clone()),
        ("images on", images_on.clone()),
        ("load before", results.about.load_average.clone()),
    ];
    let version = |(name, version): (&String, &String)| match version.contains(name) {
        true => version.clone(),
        false => format!("{name} {version}"),
    };
    let versions: Vec<_> = results.about.versions.iter().map(version).collect();
    facts.push(("servers", versions.join("; ")));
    writeln!(out, "<dl class=\"small\">")?;
    for (name, fact) in &facts {
        writeln!(out, "<dt>{name}</dt><dd>{}</dd>", Escaped(fact))?;
    }
    writeln!(out, "<dt>command</dt><dd><code>{}</code></dd>\n</dl>", Escaped(command))
}

/// Rows by servers, without the floors.
fn overview(out: &mut String, results: &Results) -> Result {
    let cells = results.rows.iter().flat_map(|row| &row.cells);
    let mut products: Vec<Product> =
        cells.filter(|cell| cell.role != Role::Floor).map(|cell| cell.product).collect();
    products.sort_unstable();
    products.dedup();
    if products.is_empty() {
        return Ok(());
    }
    writeln!(
        out,
        "<h2>Overview</h2>\n<div class=\"panel scroll\"><table class=\"overview\"><tr><th></th>"
    )?;
    for product in &products {
        // An option is not to be broken at its hyphens.
        let (class, name) = (class(*product), product.name().replace('-', "\u{2011}"));
        writeln!(out, "<th><i class=\"dot {class}\"></i>{name}</th>")?;
    }
    writeln!(out, "</tr>")?;
    for row in &results.rows {
        let (title, placement) = (row.row.title, row.placement.name());
        write!(out, "<tr><td>{title}<span class=\"x\">{placement}</span></td>")?;
        let best = best_real(row);
        for product in &products {
            match row.cell(*product) {
                None => write!(out, "<td></td>")?,
                Some(cell) => overview_cell(out, cell, best == Some(*product))?,
            }
        }
        writeln!(out, "</tr>")?;
    }
    writeln!(out, "</table></div>")
}

/// The fastest server that is no floor.
fn best_real(row: &RowResult) -> Option<Product> {
    let real = row.cells.iter().filter(|cell| cell.role != Role::Floor);
    let by = |a: &&Cell, b: &&Cell| a.ops_per_s.median.total_cmp(&b.ops_per_s.median);
    real.max_by(by).map(|cell| cell.product)
}

fn overview_cell(out: &mut String, cell: &Cell, is_best: bool) -> Result {
    let best = if is_best { " best" } else { "" };
    write!(
        out,
        "<td class=\"n{best}\">{}<span class=\"x\">p50 {}</span><span class=\"x\">p99 {}</span>\
         <span class=\"x\">{} CPU</span></td>",
        units::rate(cell.ops_per_s.median),
        units::micros(cell.p50_us.median),
        units::micros(cell.p99_us.median),
        units::micros(cell.cpu_us_per_op.median)
    )
}

/// What is no row.
fn checks(out: &mut String, results: &Results) -> Result {
    if results.checks.is_empty() {
        return Ok(());
    }
    writeln!(out, "<h2>Checks</h2>\n<div class=\"panel scroll\"><table>")?;
    for group in results.checks.chunk_by(|a, b| a.id == b.id) {
        write!(out, "<tr><td>{}</td><td>", Escaped(&group[0].title))?;
        for Check { product, value, .. } in group {
            write!(out, "<div>{}: {}</div>", product.name(), Escaped(value))?;
        }
        writeln!(out, "</td></tr>")?;
    }
    writeln!(out, "</table></div>")
}

/// What a client that others wrote makes of the servers.
fn fio(out: &mut String, results: &Results) -> Result {
    if results.fio.is_empty() {
        return Ok(());
    }
    writeln!(
        out,
        "<h2>fio</h2>\n<p class=\"soft\">fio's nbd engine, a foreign client that is the bottleneck \
         itself.</p>\n<div class=\"panel scroll\"><table><tr><th>server</th><th>job</th>\
         <th>rate</th><th>throughput</th><th>p99</th></tr>"
    )?;
    for job in &results.fio {
        writeln!(
            out,
            "<tr><td>{}</td><td class=\"n\">{}, {}</td><td class=\"n\">{}</td>\
             <td class=\"n\">{}</td><td class=\"n\">{}</td></tr>",
            job.product.name(),
            Escaped(&job.job),
            job.way,
            units::rate(job.ops_per_s),
            units::throughput(job.bytes_per_s),
            units::micros(job.p99_us)
        )?;
    }
    writeln!(out, "</table></div>")
}

/// One row: all figures, and the curves.
fn section(out: &mut String, row: &RowResult) -> Result {
    let (title, id, placement) = (row.row.title, row.row.id, row.placement.name());
    writeln!(
        out,
        "<div class=\"panel row\" id=\"{id}-{}\"><div><h3>{title}</h3>\
         <div class=\"soft small\">{placement} · <code>{id}</code></div></div>",
        placement.replace(' ', "-")
    )?;
    writeln!(
        out,
        "<div class=\"scroll\"><table><tr><th></th><th>rate</th><th>throughput</th>\
         <th>spread</th><th>× best peer</th><th>p50</th><th>p90</th><th>p99</th><th>p99.9</th>\
         <th>max</th><th>CPU/request</th><th>client CPU</th><th>memory</th></tr>"
    )?;
    let most = row.cells.iter().map(|cell| cell.ops_per_s.median).fold(0.0, f64::max);
    for cell in &row.cells {
        figures(out, row, cell, most)?;
    }
    writeln!(out, "</table></div>")?;
    let mut notes: Vec<String> = floor_distance(row);
    notes.extend(row.fio_ops_per_s.map(|fio| {
        format!("fio's io_uring engine on the file itself: {}", units::rate(fio.median))
    }));
    if !notes.is_empty() {
        writeln!(out, "<div class=\"soft small\">{}</div>", Escaped(&notes.join(" · ")))?;
    }
    writeln!(out, "{}</div>", chart::curves(&row.cells))
}

fn figures(out: &mut String, row: &RowResult, cell: &Cell, most: f64) -> Result {
    let kind = match cell.role {
        Role::Subject => "ours",
        Role::Floor => "floor",
        Role::Variant | Role::Peer => "",
    };
    let peer = row.best_peer().map(|peer| peer.ops_per_s.median);
    let ratio = peer.map(|peer| format!("{:.2}", cell.ops_per_s.median / peer));
    write!(
        out,
        "<tr class=\"{kind}\"><td><i class=\"dot {}\"></i>{}</td>\
         <td class=\"n bar\" style=\"--w:{:.1}%\">{}</td>",
        class(cell.product),
        cell.product.name(),
        cell.ops_per_s.median / most * 100.0,
        units::rate(cell.ops_per_s.median)
    )?;
    let latency = &cell.latency;
    let texts = [
        units::throughput(cell.bytes_per_s.median),
        percent_spread(cell.ops_per_s),
        ratio.unwrap_or_default(),
        units::micros(cell.p50_us.median),
        units::micros(latency.p90_us),
        units::micros(cell.p99_us.median),
        units::micros(latency.p999_us),
        units::micros(latency.max_us),
        units::micros(cell.cpu_us_per_op.median),
        units::micros(cell.client_cpu_us_per_op.median),
        ByteSize(cell.resident_bytes).to_string(),
    ];
    for text in texts {
        write!(out, "<td class=\"n\">{text}</td>")?;
    }
    writeln!(out, "</tr>")
}

/// How each server was started, and what could not be run.
fn commands(out: &mut String, results: &Results) -> Result {
    let commands: BTreeMap<_, _> = results
        .rows
        .iter()
        .flat_map(|row| {
            row.cells.iter().map(|cell| ((row.row.volume, cell.product), &cell.command))
        })
        .collect();
    if !commands.is_empty() {
        writeln!(out, "<h2>Commands</h2>\n<div class=\"panel small\"><ul>")?;
        for command in commands.values() {
            writeln!(out, "<li><code>{}</code></li>", Escaped(command))?;
        }
        writeln!(out, "</ul></div>")?;
    }
    if !results.skipped.is_empty() {
        writeln!(out, "<h2>Not run</h2>\n<div class=\"panel small\"><ul>")?;
        for skipped in &results.skipped {
            writeln!(out, "<li>{}</li>", Escaped(skipped))?;
        }
        writeln!(out, "</ul></div>")?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compare::examples;

    /// Tags that are opened and closed equally often, except those that HTML never closes.
    fn assert_balanced(html: &str) {
        for tag in ["table", "tr", "td", "th", "div", "ul", "li", "main", "svg", "dl", "dd", "h2"] {
            let opened = html.matches(&format!("<{tag}>")).count()
                + html.matches(&format!("<{tag} ")).count();
            assert_eq!(opened, html.matches(&format!("</{tag}>")).count(), "{tag}");
        }
    }

    #[test]
    fn the_page_shows_every_row_and_needs_nothing_else() {
        let results = examples::results();
        let html = html(&results);
        assert_balanced(&html);
        for row in &results.rows {
            assert!(html.contains(row.row.title));
            assert!(row.cells.iter().all(|cell| html.contains(cell.product.name())));
        }
        for external in ["http://", "https://", "<script", "<link", "url(", "@import"] {
            assert!(!html.contains(external), "{external}");
        }
    }

    #[test]
    fn words_from_outside_are_escaped() {
        let mut results = examples::results();
        results.about.command = "sheave --x='<b>'".to_owned();
        results.skipped = vec!["a <i> & b".to_owned()];
        let html = html(&results);
        assert!(!html.contains("<b>'") && !html.contains("<i> &"));
        assert!(html.contains("a &lt;i&gt; &amp; b"));
    }

    #[test]
    fn a_comparison_without_rows_is_still_a_page() {
        let results = Results { rows: Vec::new(), ..examples::results() };
        assert_balanced(&html(&results));
    }
}
