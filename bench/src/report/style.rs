//! How the report looks.

/// Light and dark, by the reader's setting.
pub(super) const CSS: &str = r#"
:root {
  color-scheme: light dark;
  --bg: #fbfbfa; --panel: #ffffff; --ink: #1c1d21; --soft: #63666f; --line: #e4e4e1;
  --bar: #dde8fb;
  --sheave: #1f5fe0; --poll0: #57a3f0; --threads: #12a4a8; --nbdkit: #d9760a;
  --qemu: #2f9e44; --nbdserver: #b03a9b; --floor: #9a9ca3; --ring: #55585f;
}
@media (prefers-color-scheme: dark) {
  :root {
    --bg: #131417; --panel: #1b1d21; --ink: #e9e9ec; --soft: #9b9ea7; --line: #2c2f35;
    --bar: #22345a;
    --sheave: #7aa7ff; --poll0: #4f8fd6; --threads: #3fc4c7; --nbdkit: #f2a65a;
    --qemu: #6bcf7f; --nbdserver: #df83cf; --floor: #74777f; --ring: #b9bcc4;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--bg); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", "Noto Sans", sans-serif;
}
main { max-width: 1240px; margin: 0 auto; padding: 40px 24px 80px; }
h1 { font-size: 30px; font-weight: 650; letter-spacing: -.02em; margin: 0 0 4px; }
h2 { font-size: 20px; font-weight: 620; letter-spacing: -.01em; margin: 48px 0 12px; }
h3 { font-size: 16px; font-weight: 620; margin: 0 0 2px; }
p { margin: 0 0 12px; max-width: 75ch; }
a { color: var(--sheave); }
.soft, caption, dt { color: var(--soft); }
.small { font-size: 13px; }
code { font: 12.5px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace;
  overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 20px; margin: 16px 0 0; }
dd { margin: 0; }
.panel {
  background: var(--panel); border: 1px solid var(--line); border-radius: 10px;
  padding: 18px 20px; margin: 0 0 18px;
}
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px;
  font-variant-numeric: tabular-nums; }
th { font-weight: 560; color: var(--soft); text-align: right; white-space: nowrap; }
th, td { padding: 5px 10px; border-bottom: 1px solid var(--line); vertical-align: top; }
tr:last-child > td { border-bottom: 0; }
td.n { text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
td:first-child { white-space: nowrap; }
tr.ours td { font-weight: 620; }
tr.floor td { color: var(--soft); }
td.bar {
  background: linear-gradient(to right, var(--bar) var(--w, 0%), transparent var(--w, 0%));
}
.overview th { white-space: normal; max-width: 120px; }
.overview td { min-width: 104px; }
.overview .x { display: block; font-weight: 400; color: var(--soft); font-size: 12px; }
.overview td.best { font-weight: 650; }
.dot { display: inline-block; width: 10px; height: 10px; border-radius: 50%; margin-right: 8px;
  background: currentColor; }
.row { display: grid; grid-template-columns: minmax(0, 1fr); gap: 14px; }
.chart { width: 100%; max-width: 760px; height: auto; }
.grid { stroke: var(--line); stroke-width: 1; fill: none; }
.tick { fill: var(--soft); font-size: 11.5px; }
.curve { fill: none; stroke: currentColor; stroke-width: 1.6; stroke-linejoin: round; }
.curve.s-sheave { stroke-width: 2.8; }
.curve.s-echo, .curve.s-echopoll, .curve.s-ring { stroke-dasharray: 4 4; }
.curve.s-poll0, .curve.s-threads { stroke-dasharray: 8 3; }
.s-sheave { color: var(--sheave); } .s-poll0 { color: var(--poll0); }
.s-threads { color: var(--threads); } .s-nbdkit { color: var(--nbdkit); }
.s-qemu { color: var(--qemu); } .s-nbdserver { color: var(--nbdserver); }
.s-echo, .s-echopoll { color: var(--floor); } .s-ring { color: var(--ring); }
ul { margin: 0; padding-left: 20px; }
@media print { body { background: none; } .panel { break-inside: avoid; } }
"#;
