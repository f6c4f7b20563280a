//! Numbers out of runs: percentiles of one, medians and ratios of several.

use hdrhistogram::Histogram;
use serde::Serialize;

/// Latency percentiles in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub(crate) struct Percentiles {
    /// Median.
    pub(crate) p50_us: f64,
    /// 90 %
    pub(crate) p90_us: f64,
    /// 99 %
    pub(crate) p99_us: f64,
    /// 99.9 %
    pub(crate) p999_us: f64,
    /// The slowest of all.
    pub(crate) max_us: f64,
}

impl Percentiles {
    /// Of a histogram of nanoseconds.
    pub(crate) fn of(histogram: &Histogram<u64>) -> Self {
        let at = |quantile| us(histogram.value_at_quantile(quantile));
        Self {
            p50_us: at(0.5),
            p90_us: at(0.9),
            p99_us: at(0.99),
            p999_us: at(0.999),
            max_us: us(histogram.max()),
        }
    }
}

/// What several runs of one thing gave.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(crate) struct Spread {
    /// The middle one; the mean of the two in the middle if their number is even.
    pub(crate) median: f64,
    /// The least.
    pub(crate) min: f64,
    /// The greatest.
    pub(crate) max: f64,
}

impl Spread {
    /// Of some values; `None` of none. What is not a number is left out.
    pub(crate) fn of(values: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut sorted: Vec<f64> = values.into_iter().filter(|value| !value.is_nan()).collect();
        sorted.sort_by(f64::total_cmp);
        let (min, max) = (*sorted.first()?, *sorted.last()?);
        let middle = sorted.len() / 2;
        let median = match sorted.len() % 2 {
            0 => f64::midpoint(sorted[middle - 1], sorted[middle]),
            _ => sorted[middle],
        };
        Some(Self { median, min, max })
    }
}

/// A point of a latency curve.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(crate) struct CurvePoint {
    /// Share of the requests that took no longer.
    pub(crate) quantile: f64,
    /// Latency in microseconds.
    pub(crate) us: f64,
}

/// The latency curve of a histogram of nanoseconds, finer towards the slow end.
pub(crate) fn curve(histogram: &Histogram<u64>) -> Vec<CurvePoint> {
    const STEPS_PER_DECADE: i32 = 12;
    const DECADES: i32 = 5;
    if histogram.is_empty() {
        return Vec::new();
    }
    // Beyond one request in all there is nothing to see.
    let rest_min = 1.0 / histogram.len() as f64;
    (0..=STEPS_PER_DECADE * DECADES)
        .map(|step| 10_f64.powf(-f64::from(step) / f64::from(STEPS_PER_DECADE)))
        .take_while(|rest| *rest >= rest_min)
        .map(|rest| {
            let quantile = 1.0 - rest;
            CurvePoint { quantile, us: us(histogram.value_at_quantile(quantile)) }
        })
        .collect()
}

fn us(ns: u64) -> f64 {
    ns as f64 / 1e3
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load::histogram;

    #[test]
    fn percentiles_of_a_known_distribution() {
        let mut known = histogram();
        for us in 1..=1000 {
            known.record(us * 1000).unwrap();
        }
        let Percentiles { p50_us, p90_us, p99_us, p999_us, max_us } = Percentiles::of(&known);
        for (found, right) in
            [(p50_us, 500.0), (p90_us, 900.0), (p99_us, 990.0), (p999_us, 999.0), (max_us, 1000.0)]
        {
            // Three digits.
            assert!((found - right).abs() <= right / 500.0, "{found} instead of {right}");
        }
    }

    #[test]
    fn the_median_is_not_moved_by_an_outlier() {
        let spread = Spread::of([3.0, 1.0, 1000.0]).unwrap();
        assert_eq!(spread, Spread { median: 3.0, min: 1.0, max: 1000.0 });
        let even = Spread::of([4.0, 1.0, 2.0, 3.0]).unwrap();
        assert_eq!(even.median, 2.5);
    }

    #[test]
    fn nothing_has_no_spread() {
        assert_eq!(Spread::of([]), None);
        assert_eq!(Spread::of([f64::NAN]), None);
    }

    #[test]
    fn a_curve_rises_and_ends_where_the_data_end() {
        let mut known = histogram();
        for us in 1..=100 {
            known.record(us * 1000).unwrap();
        }
        let points = curve(&known);
        assert!(points.windows(2).all(|pair| pair[0].us <= pair[1].us));
        assert!(points.last().unwrap().quantile <= 0.991, "{points:?}");
        assert!(curve(&histogram()).is_empty());
    }
}
