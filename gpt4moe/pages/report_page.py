"""Style sheet of report.html, and its script, which shows values under the pointer. The page makes no request."""

# The browser blocks every external resource, in case a sample or a config value contains a link to one.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"

STYLE = """
:root { color-scheme: light dark;
  --page: #f5f6f8; --card: #ffffff; --ink: #18212c; --soft: #5b6775; --line: #e3e7ec; --floor: #eef0f3;
  --c0: #2563eb; --c1: #2563eb; --c2: #ea580c; --c3: #0d9488; --c4: #9333ea; --c5: #ca8a04;
  --c6: #db2777; --c7: #4d7c0f; --c8: #64748b; --c9: #b91c1c;
  --l0: #7c3aed; --l1: #0f766e; --over: #e07a10; --under: #5b3fa8;
  --dead: #dc2626; --good: #15803d; --bad: #b45309; }
@media (prefers-color-scheme: dark) { :root {
  --page: #0f141a; --card: #18202a; --ink: #e6ebf1; --soft: #94a1b0; --line: #2a3542; --floor: #222c38;
  --c0: #6ea8fe; --c1: #6ea8fe; --c2: #ff9352; --c3: #2dd4bf; --c4: #c084fc; --c5: #facc15;
  --c6: #f472b6; --c7: #a3e635; --c8: #94a3b8; --c9: #f87171;
  --l0: #b79bff; --l1: #4fd1b8; --over: #f59e3a; --under: #9d83f0;
  --dead: #f04b4b; --good: #5ad08a; --bad: #f2b134; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 36px 24px 64px; }
h1 { margin: 0; font-size: 28px; letter-spacing: -0.01em; overflow-wrap: anywhere; }
h2 { margin: 40px 0 14px; font-size: 18px; }
h3 { margin: 0 0 6px; font-size: 14px; font-weight: 650; }
.unit { color: var(--soft); font-weight: 400; margin-left: 4px; }
.under-title { margin: 4px 0 0; color: var(--soft); }
.verdict { margin: 18px 0 0; font-size: 17px; }
.verdict b { font-weight: 650; }
.good { color: var(--good); } .bad { color: var(--bad); }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(235px, 1fr)); gap: 12px; margin-top: 22px; }
.card, .chart, .sample, .table, details { background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; }
.card { padding: 14px 16px; }
.card dt { color: var(--soft); font-size: 13px; }
.card dd { margin: 2px 0 0; font-size: 23px; font-weight: 650; font-variant-numeric: tabular-nums; line-height: 1.25;
  overflow-wrap: anywhere; }
.card dd.text { font-size: 16px; }
.card small { display: block; margin-top: 3px; color: var(--soft);
  font-size: 12.5px; font-weight: 400; line-height: 1.4; }
.charts { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 14px; }
.chart { position: relative; margin: 0; padding: 14px 16px 8px; }
.chart.wide { grid-column: 1 / -1; }
.none { color: var(--soft); margin: 24px 0; }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg text { font: 12px system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif;
  font-variant-numeric: tabular-nums; fill: var(--soft); }
.grid { stroke: var(--line); } .axis { stroke: var(--soft); stroke-opacity: .5; }
polyline { fill: none; stroke-linejoin: round; stroke-linecap: round; vector-effect: non-scaling-stroke; }
.c0 { --stroke: var(--c0); } .c1 { --stroke: var(--c1); } .c2 { --stroke: var(--c2); }
.c3 { --stroke: var(--c3); } .c4 { --stroke: var(--c4); } .c5 { --stroke: var(--c5); } .c6 { --stroke: var(--c6); }
.c7 { --stroke: var(--c7); } .c8 { --stroke: var(--c8); } .c9 { --stroke: var(--c9); }
polyline.raw { stroke: var(--stroke); stroke-width: 1; stroke-opacity: .38; }
polyline.line { stroke: var(--stroke); stroke-width: 2; }
.bar { stroke: var(--stroke); stroke-width: 5; stroke-opacity: .35; stroke-linecap: round; }
polyline.dots { stroke: var(--stroke); stroke-width: 1.4; }
.dot { fill: var(--stroke); stroke: var(--card); stroke-width: 1.5; }
.level { stroke-dasharray: 6 4; stroke-width: 1.4; }
.level.l0 { stroke: var(--l0); } .level.l1 { stroke: var(--l1); }
svg .level-name.l0 { fill: var(--l0); } svg .level-name.l1 { fill: var(--l1); }
.mark { stroke: var(--soft); stroke-dasharray: 2 4; }
.cursor { stroke: var(--ink); stroke-opacity: .45; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 16px; margin-bottom: 6px; font-size: 12.5px; color: var(--soft); }
.key::before { content: ""; display: inline-block; width: 18px; border-top: 2.5px solid var(--stroke);
  margin-right: 6px; vertical-align: middle; }
.key.raw::before { border-top-width: 1px; opacity: .6; }
.key.dots::before { width: 9px; height: 9px; border: 0; border-radius: 50%; background: var(--stroke); }
.swatch { display: inline-flex; align-items: center; }
.swatch i { width: 14px; height: 14px; border-radius: 3px; margin-right: 6px; overflow: hidden;
  border: 1px solid var(--line); background: var(--floor); }
.swatch b { display: block; height: 100%; }
b.over { background: var(--over); } b.under { background: var(--under); } b.dead { background: var(--dead); }
rect.floor { fill: var(--floor); } rect.over { fill: var(--over); } rect.under { fill: var(--under); }
rect.dead { fill: var(--dead); }
svg .cell { text-anchor: middle; fill: var(--ink); } svg .cell.strong { fill: #fff; }
svg .worst { fill: var(--ink); }
.maps { display: grid; grid-template-columns: repeat(auto-fit, minmax(118px, 1fr)); gap: 14px; margin: 8px 0 6px; }
.map svg { width: 100%; height: 130px; border-radius: 4px; overflow: hidden; }
.map span { display: block; margin-top: 3px; font-size: 12px; color: var(--soft); }
path.over { stroke: var(--over); } path.under { stroke: var(--under); } path.dead { stroke: var(--dead); }
figcaption { margin: 8px 0 6px; font-size: 13.5px; }
.tip { position: absolute; pointer-events: none; padding: 6px 9px; border-radius: 6px; font-size: 12.5px;
  line-height: 1.45; background: var(--ink); color: var(--card); white-space: pre;
  font-variant-numeric: tabular-nums; z-index: 2; }
.table { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th, td { text-align: left; padding: 8px 16px; border-bottom: 1px solid var(--line); vertical-align: top; }
tr:last-child td { border-bottom: 0; }
th { color: var(--soft); font-weight: 500; font-size: 13px; }
pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere;
  font: 13px/1.55 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.sample { padding: 12px 16px; margin-bottom: 12px; }
.sample .prompt { color: var(--soft); }
.texts { margin-bottom: 12px; } .texts th:first-child { width: 1%; }
.texts .prompt { display: inline; font-weight: 650; color: var(--ink); }
details { padding: 12px 16px; } summary { cursor: pointer; font-weight: 600; } details pre { margin-top: 12px; }
code { font: 13.5px ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  overflow-wrap: anywhere; }
[hidden] { display: none !important; }
@media (max-width: 820px) { .charts { grid-template-columns: minmax(0, 1fr); }
  .wide { overflow-x: auto; } .wide svg { width: 820px; }
  .cards { grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); } }
@media print { body { background: #fff; } .chart, .card { break-inside: avoid; } }
"""

SCRIPT = """
for (const figure of document.querySelectorAll("[data-chart]")) {
  const data = JSON.parse(figure.dataset.chart);
  const svg = figure.querySelector("svg"), cursor = figure.querySelector(".cursor"), tip = figure.querySelector(".tip");
  const nearest = (steps, step) => {
    let low = 0, high = steps.length - 1;
    while (low < high) { const mid = (low + high) >> 1; if (steps[mid] < step) low = mid + 1; else high = mid; }
    return low > 0 && step - steps[low - 1] < steps[low] - step ? low - 1 : low;
  };
  const hide = () => { cursor.setAttribute("hidden", ""); tip.hidden = true; };
  figure.addEventListener("pointerleave", hide);
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect(), unit = svg.viewBox.baseVal.width / box.width;
    const share = ((event.clientX - box.left) * unit - data.left) / (data.right - data.left);
    if (share < -0.02 || share > 1.02) return hide();
    const wanted = data.low + share * (data.high - data.low);
    const step = data.curves[0].x[nearest(data.curves[0].x, wanted)];
    const x = data.left + (step - data.low) / (data.high - data.low) * (data.right - data.left);
    const lines = ["step " + step.toLocaleString("en-US")];
    for (const curve of data.curves) {
      const i = nearest(curve.x, step);
      lines.push(curve.name + "  " + curve.text[i] + (curve.x[i] === step ? "" : "  (step " + curve.x[i] + ")"));
    }
    cursor.setAttribute("x1", x); cursor.setAttribute("x2", x); cursor.removeAttribute("hidden");
    tip.textContent = lines.join("\\n"); tip.hidden = false;
    const place = box.left - figure.getBoundingClientRect().left + x / unit;
    const isRight = place > figure.clientWidth / 2;
    tip.style.left = (isRight ? place - tip.offsetWidth - 12 : place + 12) + "px";
    tip.style.top = (svg.offsetTop || 40) + 12 + "px";
  });
}
"""
