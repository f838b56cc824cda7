"""How a report looks: one stylesheet for screens of any width, for light and dark, and for paper."""

STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --ink: #1d2024; --pale: #5f666e; --rule: #e1e4e8; --wash: #f6f7f9;
  --good: #1c7a4a; --bad: #b3261e; --neutral: #44607e; --warn: #8a5a00; --warn-wash: #fdf6e3; --blend: multiply; --plate: #ffffff; }
@media screen and (prefers-color-scheme: dark) { :root { --page: #15181c; --ink: #e4e6e9; --pale: #9ba3ac; --rule: #2d3238; --wash: #1d2126;
  --good: #6fcf97; --bad: #ff8a80; --neutral: #9dbde0; --warn: #e8bf6a; --warn-wash: #262117; --blend: screen; --plate: #ffffff; }
  img.chart { filter: invert(1) hue-rotate(180deg); } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-behavior: smooth; }
body { margin: 0 auto; max-width: 72rem; padding: 2.5rem 1.5rem 3rem; background: var(--page); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Noto Sans", "Liberation Sans", Arial, sans-serif; }
h1, h2, p, dl, dd, figure, ul { margin: 0; }
h1 { font-size: 1.75rem; line-height: 1.25; font-weight: 650; letter-spacing: -0.01em; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; line-height: 1.3; font-weight: 620; margin-bottom: 0.5rem; overflow-wrap: anywhere; }
p, li, figcaption { overflow-wrap: anywhere; }
a { color: inherit; text-decoration-color: var(--pale); text-underline-offset: 0.2em; }
.subtitle, .note, .empty { color: var(--pale); }
.subtitle { margin-top: 0.25rem; }
.note { display: block; font-size: 0.85rem; font-weight: 400; }
.lead { max-width: 46rem; color: var(--pale); margin-bottom: 1rem; }
section, footer { border-top: 1px solid var(--rule); margin-top: 2.25rem; padding-top: 1.5rem; }
nav { margin-top: 1.25rem; font-size: 0.9rem; }
nav ul { list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: 0.3rem 1.1rem; }
.verdict { border-left: 4px solid var(--tone); padding: 0.15rem 0 0.15rem 0.9rem; color: var(--tone); font-weight: 560; max-width: 56rem; }
header .verdict { font-size: 1.15rem; margin-top: 1.25rem; }
section .verdict { margin-bottom: 1rem; }
.good { --tone: var(--good); } .bad { --tone: var(--bad); } .neutral { --tone: var(--neutral); }
.warnings { margin-top: 1.5rem; padding: 0.8rem 1.1rem; border-radius: 8px; background: var(--warn-wash); border: 1px solid var(--warn); max-width: 56rem; }
.warnings h2 { font-size: 1rem; color: var(--warn); margin-bottom: 0.25rem; }
.warnings ul { padding-left: 1.15rem; }
.scroll { overflow-x: auto; }
.scroll:focus-visible { outline: 2px solid var(--neutral); outline-offset: 3px; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; min-width: 34rem; }
th, td { text-align: left; vertical-align: baseline; padding: 0.55rem 1.5rem 0.55rem 0; border-bottom: 1px solid var(--rule); }
th:last-child, td:last-child { padding-right: 0; }
thead th { color: var(--pale); font-size: 0.85rem; font-weight: 500; white-space: nowrap; }
tbody th { font-weight: 500; overflow-wrap: anywhere; min-width: 9rem; max-width: 20rem; }
.value { white-space: nowrap; }
.spread { color: var(--pale); font-weight: 400; }
tr.decides .value { font-size: 1.35rem; font-weight: 650; letter-spacing: -0.01em; }
tr.decides .spread { font-size: 1rem; letter-spacing: 0; }
td.conclusion { color: var(--tone); font-weight: 560; min-width: 12rem; }
.facts { display: flex; flex-wrap: wrap; gap: 0.7rem 2.25rem; margin-top: 1rem; font-size: 0.9rem; }
.facts dt { color: var(--pale); font-size: 0.8rem; }
.facts dd { overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
.pictures { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 1.75rem 2rem; }
figure { min-width: 0; } figure.wide { grid-column: 1 / -1; }
figure img { display: block; max-width: 100%; height: auto; background: var(--plate); border: 1px solid var(--rule); border-radius: 6px; }
figure.wide img { min-width: min(var(--natural), 40rem); }
figure img.chart { mix-blend-mode: var(--blend); border: 0; border-radius: 0; }
figure img.still { display: none; }
@media print, (prefers-reduced-motion: reduce) { figure img.moving { display: none; } figure img.still { display: block; } html { scroll-behavior: auto; } }
figcaption { margin-top: 0.6rem; font-size: 0.9rem; color: var(--pale); max-width: 46rem; }
figcaption strong { color: var(--ink); font-weight: 560; }
.provenance dd { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono", monospace; font-size: 0.82rem; }
@media (max-width: 44rem) { body { padding: 1.5rem 1rem 2rem; } h1 { font-size: 1.4rem; } header .verdict { font-size: 1.05rem; }
  .pictures { grid-template-columns: minmax(0, 1fr); } th, td { padding-right: 1rem; } }
@media print { :root { color-scheme: light; } body { max-width: none; padding: 0; font-size: 10pt; } nav { display: none; }
  .scroll { overflow: visible; } table { min-width: 0; } figure.wide img { min-width: 0; }
  figure, tr, .warnings { break-inside: avoid; } h2, .lead, section .verdict { break-after: avoid; } img { print-color-adjust: exact; } }
"""
