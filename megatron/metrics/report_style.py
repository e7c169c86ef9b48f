"""The report's style sheet: one column, readable on a phone and in print, light or dark as the reader's system is."""

from __future__ import annotations

STYLE = """
:root{color-scheme:light dark;--paper:#fbfaf7;--card:#fff;--ink:#1d2026;--soft:#5d6470;--rule:#dedbd3;--grid:#e9e6df;
--band:#f4f1ea;--even:#ebe7dd;--c0:#2a6fbb;--c1:#d9622b;--c2:#2f8f6b;--c3:#a4478f;--c4:#b58900;--c5:#3aa6c4;--c6:#7a6ad0;
--c7:#8a8f98}
@media (prefers-color-scheme:dark){:root{--paper:#14161a;--card:#1b1e24;--ink:#e9e7e2;--soft:#a3a9b4;--rule:#343943;
--grid:#2a2e36;--band:#1d2127;--even:#252a32;--c0:#6aa9ee;--c1:#f08c58;--c2:#57c09a;--c3:#d583c4;--c4:#d9b44a;
--c5:#6fcde6;--c6:#a99cf0;--c7:#a7adb7}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue",Arial,sans-serif;-webkit-text-size-adjust:100%}
main{max-width:900px;margin:0 auto;padding:40px 24px 72px}
header p.kind{margin:0;font-size:13px;letter-spacing:.09em;text-transform:uppercase;color:var(--soft)}
h1{font:600 34px/1.15 Georgia,"Iowan Old Style","Times New Roman",serif;margin:4px 0 10px;overflow-wrap:anywhere}
h2{font:600 23px/1.25 Georgia,"Iowan Old Style","Times New Roman",serif;margin:52px 0 14px;padding-top:18px;
border-top:1px solid var(--rule)}
h3{font-size:16px;margin:0 0 6px}
header p.lead{font-size:18px;max-width:44em;margin:0 0 26px;color:var(--soft)}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));background:var(--card);
border:1px solid var(--rule);border-radius:10px;overflow:hidden}
.figures div{padding:14px 16px;box-shadow:0 0 0 .5px var(--rule)}
.figures b{display:block;font:600 24px/1.2 Georgia,serif;font-variant-numeric:tabular-nums}
.figures span{display:block;font-size:13px;line-height:1.35;color:var(--soft)}
figure{margin:22px 0 30px;padding:18px 18px 14px;background:var(--card);border:1px solid var(--rule);border-radius:10px}
figcaption{font-size:13.5px;color:var(--soft);margin-top:6px}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:2px 18px;margin:0 0 6px;padding:0;font-size:13.5px}
.legend li{display:flex;align-items:center;gap:7px}
.swatch{display:inline-block;width:20px;height:0;border-top:3px solid}
.swatch.block{height:12px;border:0;background:currentColor;border-radius:2px;opacity:.78}
.swatch.point{width:9px;height:9px;margin:0 5px;border:0;border-radius:50%;background:currentColor}
.swatch.plan{border-top:2px dashed var(--ink)}
.swatch.chance{border-top:2px dashed var(--soft)}
.swatch.faint{opacity:.35}
svg{display:block;width:100%;height:auto}
svg.narrow{display:none}
svg text{fill:var(--ink);font:12.5px system-ui,-apple-system,"Segoe UI",Roboto,Arial,sans-serif}
svg .tick,svg .stage{fill:var(--soft);font-variant-numeric:tabular-nums}
svg .label{fill:var(--soft)}
svg .stage{font-size:12px;font-weight:600}
svg .task{font-weight:600}
svg .mid{text-anchor:middle}
svg .end{text-anchor:end}
svg .grid{stroke:var(--grid)}
svg .axis{stroke:var(--soft)}
svg .bound{stroke:var(--soft);stroke-dasharray:2 3}
svg .band{fill:var(--band)}
svg .even{fill:var(--even)}
svg .line{fill:none;stroke:currentColor;stroke-width:2;stroke-linejoin:round}
svg .faint{stroke-width:1;opacity:.3}
svg .plan{stroke:var(--ink);stroke-width:1.6;stroke-dasharray:6 4}
svg .area{fill:currentColor;opacity:.78}
svg .dot{fill:currentColor;stroke:var(--card);stroke-width:1.2}
svg .bar{stroke:currentColor;stroke-width:2.4;stroke-linecap:round}
svg .chance{stroke:var(--soft);stroke-width:1.6;stroke-dasharray:4 4}
#mixture .band,#mixture .even{fill:none}
.c0{color:var(--c0)}.c1{color:var(--c1)}.c2{color:var(--c2)}.c3{color:var(--c3)}
.c4{color:var(--c4)}.c5{color:var(--c5)}.c6{color:var(--c6)}.c7{color:var(--c7)}
.scroll{overflow-x:auto;margin:0 0 14px;border:1px solid var(--rule);border-radius:10px;background:var(--card)}
table{border-collapse:collapse;width:100%;font-size:14px;font-variant-numeric:tabular-nums}
th,td{padding:8px 12px;text-align:right;white-space:nowrap;border-bottom:1px solid var(--grid)}
th{font-weight:600;color:var(--soft);font-size:13px}
tr:last-child td{border-bottom:0}
.left{text-align:left}
.facts td{white-space:normal;text-align:left;vertical-align:top;overflow-wrap:anywhere}
.facts td:first-child{width:30%;min-width:8em;color:var(--soft)}
.better{font-weight:600}
.absent,.note{color:var(--soft)}
.note{font-size:13.5px}
details{border:1px solid var(--rule);border-radius:10px;background:var(--card);margin-top:14px}
summary{cursor:pointer;padding:12px 16px;font-weight:600}
pre{margin:0;padding:4px 16px 16px;overflow-x:auto;font:13px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
footer{margin-top:48px;font-size:13px;color:var(--soft)}
@media (max-width:640px){main{padding:24px 14px 48px}h1{font-size:27px}header p.lead{font-size:16px}
svg.wide{display:none}svg.narrow{display:block}figure{padding:14px 10px 12px}h2{margin-top:38px}
.figures{grid-template-columns:1fr 1fr}.figures b{font-size:21px}.figures div{padding:12px}th,td{padding:7px 9px}}
@media print{:root{color-scheme:light;--paper:#fff;--card:#fff;--ink:#000;--soft:#444;--rule:#bbb;--grid:#ddd;
--band:#f6f6f4;--even:#ecebe7;--c0:#2a6fbb;--c1:#d9622b;--c2:#2f8f6b;--c3:#a4478f;--c4:#b58900;--c5:#3aa6c4;--c6:#7a6ad0;
--c7:#777}body{font-size:11pt;-webkit-print-color-adjust:exact;print-color-adjust:exact}main{max-width:none;padding:0}
figure,tr,.figures{break-inside:avoid}h2,h3{break-after:avoid}.scroll{overflow:visible}
svg.wide{display:block}svg.narrow{display:none}details{display:none}table{font-size:9pt}th,td{padding:4px 6px}}
"""
