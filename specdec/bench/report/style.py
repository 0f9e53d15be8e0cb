"""The report's style sheet."""

from __future__ import annotations

from specdec.bench.plots.palette import FONT, variables

STYLE = (
    variables(":root")
    + f"""
*{{box-sizing:border-box}}
body{{margin:0;background:var(--page);color:var(--ink);font:15px/1.5 {FONT}}}
main{{max-width:1000px;margin:0 auto;padding:32px 24px 64px}}
h1{{font-size:26px;line-height:1.25;margin:0 0 4px;overflow-wrap:anywhere}}
p.small+.callout{{margin-top:16px}}
h2{{font-size:18px;margin:40px 0 10px;padding-top:14px;border-top:1px solid var(--grid)}}
p{{margin:8px 0;overflow-wrap:anywhere}}
p.small{{font-size:13px;color:var(--muted)}}
.cards{{display:grid;grid-template-columns:repeat(auto-fit,minmax(200px,1fr));gap:12px;margin:20px 0}}
.card{{background:var(--panel);border:1px solid var(--grid);border-radius:8px;padding:14px 16px}}
.card .value{{font-size:26px;font-weight:650;line-height:1.2;font-variant-numeric:tabular-nums}}
.card .label{{color:var(--muted);font-size:13px;margin-top:3px;overflow-wrap:anywhere}}
.card.good .value,td.good{{color:var(--good)}}
.card.warn .value,td.warn{{color:var(--warn)}}
.card.bad .value,td.bad{{color:var(--bad)}}
.callout{{border-left:4px solid var(--line);background:var(--panel);padding:10px 14px;border-radius:0 6px 6px 0}}
.callout{{max-width:none}}
.callout.good{{border-color:var(--good)}}
.callout.warn{{border-color:var(--warn)}}
.callout.bad{{border-color:var(--bad)}}
.scroll{{overflow-x:auto;margin:12px 0}}
table{{border-collapse:collapse;font-size:13px;font-variant-numeric:tabular-nums;min-width:40%}}
th,td{{padding:5px 12px 5px 0;text-align:right;border-bottom:1px solid var(--grid);vertical-align:top}}
th{{color:var(--muted);font-weight:600;vertical-align:bottom;line-height:1.3}}
td{{white-space:nowrap}}
th.name,td.name{{text-align:left;white-space:normal;overflow-wrap:anywhere;min-width:8.5em;max-width:26em}}
th:last-child,td:last-child{{padding-right:2px}}
figure{{margin:14px 0}}
figure svg{{display:block}}
pre{{background:var(--panel);border:1px solid var(--grid);border-radius:6px;padding:10px 14px;font-size:13px}}
pre{{white-space:pre-wrap;overflow-wrap:anywhere}}
@media print{{h2{{break-after:avoid}}figure,table{{break-inside:avoid}}}}
"""
)
