//! Latency curves as inline SVG: latency over percentile, both logarithmic, so that the slow end,
//! which users feel, takes as much room as the fast one.

use std::fmt::Write;

use super::class;
use crate::compare::{Cell, Product};
use crate::units;

const WIDTH: f64 = 620.0;
const HEIGHT: f64 = 300.0;
const LEFT: f64 = 64.0;
const RIGHT: f64 = 14.0;
const TOP: f64 = 12.0;
const BOTTOM: f64 = 34.0;
/// The last percentile shown: five nines.
const NINES_MAX: f64 = 5.0;

/// The scale of a chart.
struct Scale {
    low_us: f64,
    high_us: f64,
}

/// The curves of one row; empty if nothing was measured.
pub(super) fn curves(cells: &[Cell]) -> String {
    let Some(scale) = Scale::around(cells) else { return String::new() };
    let mut out = format!(
        "<svg class=\"chart\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" \
         aria-label=\"latency by percentile\">\n"
    );
    // Writing to a string cannot fail.
    let _ = grid(&mut out, &scale);
    let (ours, others): (Vec<_>, Vec<_>) =
        cells.iter().partition(|cell| cell.product == Product::Sheave);
    // Ours last, so that it lies on top.
    for cell in others.iter().chain(&ours) {
        let _ = writeln!(
            out,
            "<path class=\"curve {}\" d=\"{}\"><title>{}</title></path>",
            class(cell.product),
            path(cell, &scale),
            cell.product.name()
        );
    }
    out + "</svg>\n"
}

impl Scale {
    /// Whole decades around all curves.
    fn around(cells: &[Cell]) -> Option<Self> {
        let values = || cells.iter().flat_map(|cell| &cell.curve).map(|point| point.us.max(0.1));
        let (low, high) = (values().reduce(f64::min)?, values().reduce(f64::max)?);
        let low_us = 10_f64.powf(low.log10().floor());
        let high_us = 10_f64.powf(high.log10().ceil()).max(low_us * 10.0);
        Some(Self { low_us, high_us })
    }

    fn y(&self, us: f64) -> f64 {
        let part =
            (us.max(self.low_us) / self.low_us).log10() / (self.high_us / self.low_us).log10();
        HEIGHT - BOTTOM - part * (HEIGHT - TOP - BOTTOM)
    }
}

/// Percentiles by their number of nines.
fn x(quantile: f64) -> f64 {
    let nines = -(1.0 - quantile).max(10_f64.powf(-NINES_MAX)).log10();
    LEFT + nines / NINES_MAX * (WIDTH - LEFT - RIGHT)
}

fn grid(out: &mut String, scale: &Scale) -> std::fmt::Result {
    let (bottom, right) = (HEIGHT - BOTTOM, WIDTH - RIGHT);
    let mut us = scale.low_us;
    while us <= scale.high_us * 1.001 {
        let y = scale.y(us);
        writeln!(out, "<path class=\"grid\" d=\"M{LEFT} {y:.1}H{right}\"/>")?;
        let (at, label) = (LEFT - 8.0, tick(us));
        writeln!(
            out,
            "<text class=\"tick\" x=\"{at}\" y=\"{:.1}\" text-anchor=\"end\">{label}</text>",
            y + 4.0
        )?;
        us *= 10.0;
    }
    for (quantile, label) in [
        (0.0, "0"),
        (0.5, "50"),
        (0.9, "90"),
        (0.99, "99"),
        (0.999, "99.9"),
        (0.9999, "99.99"),
        (0.999_99, "99.999 %"),
    ] {
        let x = x(quantile);
        writeln!(out, "<path class=\"grid\" d=\"M{x:.1} {TOP}V{bottom}\"/>")?;
        let anchor = if quantile > 0.9999 { "end" } else { "middle" };
        let y = bottom + 18.0;
        writeln!(
            out,
            "<text class=\"tick\" x=\"{x:.1}\" y=\"{y}\" text-anchor=\"{anchor}\">{label}</text>"
        )?;
    }
    Ok(())
}

/// A power of ten with its unit.
fn tick(us: f64) -> String {
    match us {
        0.0..0.99 => format!("{:.0} ns", us * 1e3),
        0.99..999.0 => format!("{us:.0} µs"),
        999.0..999e3 => format!("{:.0} ms", us / 1e3),
        _ => units::micros(us),
    }
}

fn path(cell: &Cell, scale: &Scale) -> String {
    let mut out = String::new();
    for (index, point) in cell.curve.iter().enumerate() {
        let command = if index == 0 { 'M' } else { 'L' };
        let _ = write!(out, "{command}{:.1} {:.1}", x(point.quantile), scale.y(point.us));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compare::examples::cell;
    use crate::stats::CurvePoint;

    #[test]
    fn points_stay_inside_the_chart() {
        let scale = Scale { low_us: 1.0, high_us: 1000.0 };
        for quantile in [0.0, 0.5, 0.999, 1.0] {
            assert!((LEFT..=WIDTH - RIGHT).contains(&x(quantile)));
        }
        assert!((scale.y(1.0) - (HEIGHT - BOTTOM)).abs() < 1e-9);
        assert!((scale.y(1000.0) - TOP).abs() < 1e-9);
    }

    #[test]
    fn ours_is_drawn_last() {
        let curve =
            vec![CurvePoint { quantile: 0.0, us: 5.0 }, CurvePoint { quantile: 0.9, us: 50.0 }];
        let cells = [Product::Sheave, Product::Nbdkit]
            .map(|product| Cell { curve: curve.clone(), ..cell(product, 1.0, 1.0) });
        let svg = curves(&cells);
        assert!(svg.find("s-nbdkit") < svg.find("s-sheave"));
        assert_eq!(svg.matches("<svg").count(), svg.matches("</svg>").count());
        assert!(curves(&[]).is_empty());
    }
}
