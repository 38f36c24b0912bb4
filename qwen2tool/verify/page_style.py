"""The style sheet of the report's page: one column, light and dark, printable, usable on a phone.

Colours are of the Okabe-Ito palette, which people with colour-blindness tell apart; lines also differ in dash.
"""

from __future__ import annotations

STYLE = """
:root { color-scheme: light dark; --ground: #fff; --ink: #1b1f24; --soft: #57606a; --rule: #d0d7de; --panel: #f6f8fa;
  --own: #0072b2; --accumulated: #c2500a; --noise: #6e7781; --good: #116329; --bad: #a40e26; --open: #7d4e00; }
@media (prefers-color-scheme: dark) { :root { --ground: #0d1117; --ink: #e6edf3; --soft: #9da7b3; --rule: #30363d;
  --panel: #161b22; --own: #56b4e9; --accumulated: #f0954a; --noise: #9da7b3; --good: #56d364; --bad: #ff7b72;
  --open: #e3b341; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1160px; margin: 0 auto; padding: 16px; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 8px; }
h2 { font-size: 1.15rem; margin: 32px 0 8px; }
p, ol, dl { max-width: 75ch; overflow-wrap: anywhere; }
.verdict { border-left: 8px solid var(--open); background: var(--panel); padding: 16px; border-radius: 4px; }
.verdict.equivalent { border-color: var(--good); } .verdict.different { border-color: var(--bad); }
.verdict p { margin: 0; }
.word { text-transform: uppercase; letter-spacing: .06em; font-weight: 700; font-size: .85rem; color: var(--open); }
.equivalent .word { color: var(--good); } .different .word { color: var(--bad); }
.sides { display: grid; grid-template-columns: max-content 1fr; gap: 4px 16px; } dd { margin: 0; }
dt, figcaption { color: var(--soft); } li { margin: 4px 0; }
code { background: var(--panel); padding: 1px 5px; border-radius: 3px; font-size: .85em; }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(320px, 100%), 1fr)); gap: 16px; }
figure { margin: 0; border: 1px solid var(--rule); border-radius: 4px; padding: 8px; min-width: 0; }
figure svg { width: 100%; height: auto; display: block; } figcaption { font-weight: 600; }
.grid { stroke: var(--rule); stroke-width: 1; } .tick { fill: var(--soft); font-size: 11px; }
.series path { fill: none; stroke-width: 2; } .series.own path { stroke: var(--own); }
.series.own circle { fill: var(--own); }
.series.accumulated path { stroke: var(--accumulated); stroke-dasharray: 7 3; }
.series.accumulated circle { fill: var(--accumulated); }
.series.noise path { stroke: var(--noise); stroke-dasharray: 2 3; } .series.noise circle { fill: var(--noise); }
.series.own-noise path { stroke: var(--noise); stroke-width: 1.2; }
.series.own-noise circle { fill: var(--ground); stroke: var(--noise); }
.series.reference path { stroke: var(--noise); stroke-width: 6; stroke-opacity: .45; }
.series.reference circle { fill: none; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 4px 20px; padding: 0; }
.legend svg { width: 30px; height: 10px; margin-right: 6px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .85rem; }
caption { text-align: left; color: var(--soft); padding: 4px 0; } th, td { padding: 4px 7px; text-align: right;
  border-bottom: 1px solid var(--rule); white-space: nowrap; } th:first-child { text-align: left; padding-left: 0;
  white-space: normal; }
tbody th { font-weight: 400; } .hidden { position: absolute; clip-path: inset(50%); width: 1px; height: 1px;
  overflow: hidden; }
summary { cursor: pointer; color: var(--soft); } footer { border-top: 1px solid var(--rule); margin-top: 32px; }
@media print { details { display: none; } body { font-size: 12px; } }
"""
