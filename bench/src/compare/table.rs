//! What a terminal shows.

use clap::ValueEnum;
use comfy_table::{Attribute, Cell as TableCell, CellAlignment, Table, presets};

use super::checks;
use super::product::{Product, Role};
use super::results::{Cell, Results, RowResult, floor_distance};
use super::rows;
use crate::stats::Spread;
use crate::units;

/// Rows and servers that can be chosen.
pub(crate) fn list() -> String {
    let mut out = String::from("rows:\n");
    for row in rows::all() {
        out += &format!("  {:<22} {}\n", row.id, row.title);
    }
    for id in checks::IDS {
        out += &format!("  {id}\n");
    }
    out += "servers:\n";
    for product in Product::value_variants() {
        let value = product.to_possible_value();
        let (name, help) = value.as_ref().map_or(("", String::new()), |value| {
            (value.get_name(), value.get_help().map(ToString::to_string).unwrap_or_default())
        });
        out += &format!("  {name:<22} {help}\n");
    }
    out
}

/// One row, as soon as it is done.
pub(crate) fn row(result: &RowResult) -> String {
    let mut table = new_table();
    table.set_header([
        "",
        "rate",
        "throughput",
        "p50",
        "p99",
        "CPU/req",
        "client",
        "spread",
        "× best",
    ]);
    for cell in &result.cells {
        table.add_row(cells(result, cell));
    }
    align_right(&mut table);
    let fio = result.fio_ops_per_s.map(|fio| format!("; fio {}", units::rate(fio.median)));
    let (title, placement) = (result.row.title, result.placement.name());
    let mut out = format!("\n{title}, {placement}{}\n{table}\n", fio.unwrap_or_default());
    for distance in floor_distance(result) {
        out += &format!("sheave: {distance}\n");
    }
    out
}

fn cells(result: &RowResult, cell: &Cell) -> Vec<TableCell> {
    let peer = result.best_peer();
    let ratio = peer.map(|peer| cell.ops_per_s.median / peer.ops_per_s.median);
    let name = TableCell::new(cell.product.name());
    let name = match cell.role {
        Role::Subject => name.add_attribute(Attribute::Bold),
        Role::Floor => name.add_attribute(Attribute::Dim),
        Role::Variant | Role::Peer => name,
    };
    let figures = [
        units::rate(cell.ops_per_s.median),
        units::throughput(cell.bytes_per_s.median),
        units::micros(cell.p50_us.median),
        units::micros(cell.p99_us.median),
        units::micros(cell.cpu_us_per_op.median),
        units::micros(cell.client_cpu_us_per_op.median),
        percent_spread(cell.ops_per_s),
        ratio.map_or_else(String::new, |ratio| format!("{ratio:.2}")),
    ];
    std::iter::once(name).chain(figures.map(TableCell::new)).collect()
}

/// Lowest and highest run against the median.
pub(crate) fn percent_spread(spread: Spread) -> String {
    let percent = |value: f64| (value / spread.median - 1.0) * 100.0;
    format!("{:+.0}…{:+.0} %", percent(spread.min), percent(spread.max))
}

/// What is no row.
pub(crate) fn summary(results: &Results) -> String {
    let mut table = new_table();
    for check in &results.checks {
        let title = format!("{}: {}", check.product.name(), check.title);
        table.add_row([&title, &check.value]);
    }
    for fio in &results.fio {
        let title = format!("{}: fio {}, {}", fio.product.name(), fio.job, fio.way);
        let (rate, p99) = (units::rate(fio.ops_per_s), units::micros(fio.p99_us));
        let value = format!("{rate}, {}, p99 {p99}", units::throughput(fio.bytes_per_s));
        table.add_row([title, value]);
    }
    let mut out = String::new();
    if !table.is_empty() {
        out += &format!("\n{table}\n");
    }
    for skipped in &results.skipped {
        out += &format!("skipped: {skipped}\n");
    }
    out
}

fn new_table() -> Table {
    let mut table = Table::new();
    table.load_style(presets::UTF8_BORDERS_ONLY);
    table
}

fn align_right(table: &mut Table) {
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
}
