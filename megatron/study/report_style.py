"""What a study's report adds to the style of reports (metrics/report_style.py). Rules of SVG stand on one line each."""

from __future__ import annotations

OWN_STYLE = """
main{max-width:1080px}
.banner{padding:12px 16px;margin:0 0 18px;background:var(--card);border:1px solid var(--rule);
border-left:5px solid var(--c1);border-radius:8px}
.banner p{margin:0 0 4px;font-weight:600}
.banner ul,.said{margin:0;padding-left:1.2em}
.said li{margin:0 0 6px;max-width:52em}
.results td{vertical-align:top}
.results th:first-child,.results td:first-child{position:sticky;left:0;background:var(--card);z-index:1;text-align:left;
white-space:normal;min-width:11em;max-width:16em;overflow-wrap:anywhere}
.results tr.base td{border-bottom:2px solid var(--rule)}
.results th small{white-space:normal;max-width:12em;min-width:9em;margin-left:auto;overflow-wrap:anywhere}
.results small{display:block;font-size:12px;line-height:1.35;color:var(--soft)}
.results small.told{color:var(--ink);font-weight:600}
.results td.best b{font-weight:700;text-decoration:underline;text-underline-offset:3px}
.results b{font-weight:400}
td details{border:0;background:none;margin:0;border-radius:0}
td summary{padding:0;font-weight:400;list-style:none}
td summary::-webkit-details-marker{display:none}
td summary:hover b,td summary:focus b{color:var(--c0)}
td details[open]{padding-bottom:4px}
td details[open] p{margin:4px 0 0;font-size:12.5px;white-space:normal;text-align:left;min-width:11em}
a{color:var(--c0)}
.swatch.trunk{border-top:4px solid var(--ink)}
.shared{color:var(--c7)}
.swatch.dash{border-top-style:dashed}
.swatch.dots{border-top-style:dotted}
.graph{overflow-x:auto}
.graph svg{width:auto;max-width:none}
svg .node{fill:var(--card);stroke:var(--rule);stroke-width:1.4}
svg .node.shared{stroke:var(--c0);stroke-width:2}
svg .node.average{stroke-dasharray:5 4}
svg .node.undone{fill:var(--even);stroke:var(--c1);stroke-dasharray:2 3}
svg .edge{fill:none;stroke:var(--soft);stroke-width:1.2}
svg .arm{fill:var(--c0);font-weight:600}
svg .size{fill:var(--soft)}
svg .fill{fill:currentColor;opacity:.82;shape-rendering:crispEdges}
svg .fill.planned{opacity:.3}
svg .trunk{fill:var(--ink)}
svg .line.dash{stroke-dasharray:8 4}
svg .line.dots{stroke-dasharray:2 4}
svg .line.joined{stroke-width:1.4;opacity:.6}
svg .shared{color:var(--c7)}
svg .task{paint-order:stroke;stroke:var(--card);stroke-width:3px;stroke-linejoin:round}
svg .number{font-size:11px}
pre{max-height:36em;overflow:auto}
@media (max-width:640px){.results th:first-child,.results td:first-child{min-width:6em;max-width:9em;font-size:13px}}
@media print{td details{display:block}.results th:first-child,.results td:first-child{position:static}}
"""
