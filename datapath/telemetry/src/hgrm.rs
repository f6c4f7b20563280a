//! HdrHistogram's text format, which its plotters read.

use std::fmt;

use hdrhistogram::Histogram;

use crate::layout::SUB_BUCKETS;

/// Lines per halving of the distance to 100 %, as HdrHistogram's own tools have it.
const TICKS_PER_HALF_DISTANCE: u32 = 5;
const NS_PER_US: f64 = 1_000.0;

/// Writes the percentile distribution of latencies in microseconds, in the format of
/// HdrHistogram's `outputPercentileDistribution` (file extension `.hgrm`).
///
/// # Errors
/// Those of `out`.
pub fn write_hgrm(histogram_ns: &Histogram<u64>, out: &mut impl fmt::Write) -> fmt::Result {
    writeln!(
        out,
        "{:>12} {:>14} {:>10} {:>14}\n",
        "Value", "Percentile", "TotalCount", "1/(1-Percentile)"
    )?;
    let mut total = 0;
    for step in histogram_ns.iter_quantiles(TICKS_PER_HALF_DISTANCE) {
        total += step.count_since_last_iteration();
        let value_us = step.value_iterated_to() as f64 / NS_PER_US;
        let quantile = step.quantile_iterated_to();
        write!(out, "{value_us:12.3} {quantile:2.12} {total:10}")?;
        if quantile < 1.0 {
            write!(out, " {:14.2}", 1.0 / (1.0 - quantile))?;
        }
        writeln!(out)?;
    }
    let mean_us = histogram_ns.mean() / NS_PER_US;
    let deviation_us = histogram_ns.stdev() / NS_PER_US;
    let max_us = histogram_ns.max() as f64 / NS_PER_US;
    let (count, buckets) = (histogram_ns.len(), histogram_ns.buckets());
    writeln!(out, "#[Mean    = {mean_us:12.3}, StdDeviation   = {deviation_us:12.3}]")?;
    writeln!(out, "#[Max     = {max_us:12.3}, Total count    = {count:12}]")?;
    writeln!(out, "#[Buckets = {buckets:12}, SubBuckets     = {SUB_BUCKETS:12}]")
}
