// Charts by plotly.js. Every chart has a table beside it on the page, so nothing is only in a picture.

import { isShare } from "./ui.js";

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function draw(element, traces, layout) {
  const ink = css("--ink");
  const axis = { gridcolor: css("--line"), zerolinecolor: css("--line"), automargin: true };
  Plotly.react(element, traces, {
    margin: { l: 55, r: 15, t: 10, b: 45 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: ink, family: "system-ui, sans-serif", size: 12 }, legend: { orientation: "h", y: 1.02, yanchor: "bottom" }, hovermode: "closest",
    ...layout, xaxis: { ...axis, ...layout.xaxis }, yaxis: { ...axis, ...layout.yaxis },
  }, { displayModeBar: false, responsive: true });
}

const shown = (v, metric) => (isShare(metric) ? 100 * v : v);

const words = (plan) => Object.entries(plan).slice(0, 12).map(([site, p]) => `${site}: ${p.method} ${p.ranks.join("×")}`).join("<br>")
  + (Object.keys(plan).length > 12 ? "<br>…" : "");

/** The metric's value at the budget: a drop is a difference for shares, relative for a loss. */
function kept({ metric, value, max_drop: lost }) {
  if (isShare(metric)) return value - lost;
  return metric === "mse" ? value * (1 + lost) : value + lost;
}

const RUNGS = { cheap: ["untrained", "--muted", "circle-open"], short: ["short training", "--accent", "circle"], full: ["fully trained", "--good", "diamond"] };

/** Value against cost: every trial by rung, the front through them, the budget as a line. */
export function frontChart(element, job, trials, front, cost) {
  const { baseline } = job;
  const metric = baseline?.metric;
  const field = COST[cost];
  const usable = (p) => p?.value != null && p.costs[field] != null;
  const at = (points) => ({ x: points.map((p) => p.costs[field]), y: points.map((p) => shown(p.value, metric)) });
  const traces = Object.entries(RUNGS).map(([rung, [name, color, symbol]]) => {
    const some = trials.filter((t) => t.result?.rung === rung && usable(t.result));
    return { type: "scatter", mode: "markers", name, ...at(some.map((t) => t.result)),
      text: some.map((t) => `trial ${t.number}<br>${words(t.plan)}`), hoverinfo: "text+x+y", marker: { color: css(color), symbol, size: rung === "full" ? 11 : 7 } };
  });
  const line = front.filter(usable).sort((a, b) => a.costs[field] - b.costs[field]);
  traces.push({ type: "scatter", mode: "lines", name: "front", ...at(line), line: { color: css("--warn"), shape: "hv", width: 2 }, hoverinfo: "skip" });
  const shapes = [];
  if (baseline) {
    if (usable(baseline)) traces.push({ type: "scatter", mode: "markers", name: "original", ...at([baseline]), marker: { symbol: "star", size: 14, color: css("--ink") } });
    const y = shown(kept(baseline), metric);
    shapes.push({ type: "line", xref: "paper", x0: 0, x1: 1, y0: y, y1: y, line: { dash: "dot", color: css("--bad") } });
  }
  draw(element, traces, { shapes, xaxis: { title: { text: cost === "latency" ? "latency, ms" : cost }, rangemode: "tozero" }, yaxis: { title: { text: isShare(metric) ? `${metric}, %` : metric } } });
}

export const COST = { parameters: "parameters", macs: "macs", bytes: "bytes", latency: "latency_ms" };

/** The smallest cost among trials that keep the budget (as far as measured), over trial numbers. */
export function bestChart(element, job, trials, cost) {
  const x = [];
  const y = [];
  let best = job.baseline?.costs[COST[cost]] ?? null;
  for (const t of trials) {
    const r = t.result;
    if (r?.drop != null && job.baseline != null && (r.keeps_budget ?? r.drop <= job.baseline.max_drop) && r.costs[COST[cost]] != null && (best == null || r.costs[COST[cost]] < best)) best = r.costs[COST[cost]];
    x.push(t.number);
    y.push(best);
  }
  draw(element, [{ type: "scatter", mode: "lines+markers", x, y, line: { shape: "hv", color: css("--accent") }, name: cost }],
    { showlegend: false, xaxis: { title: { text: "trial" } }, yaxis: { title: { text: `${cost} within the budget` }, rangemode: "tozero" } });
}

/** Parameters of every layer that can change, before and after. */
export function layersChart(element, all) {
  const layers = all.filter((l) => l.compressible);
  const names = layers.map((l) => l.name);
  draw(element, [
    { type: "bar", name: "before", x: names, y: layers.map((l) => l.parameters), marker: { color: css("--line") } },
    { type: "bar", name: "after", x: names, y: layers.map((l) => l.parameters_after ?? l.parameters), marker: { color: css("--accent") },
      text: layers.map((l) => (l.method ? `${l.method} ${l.ranks.join("×")}` : "")), hoverinfo: "x+y+text", textposition: "none" },
  ], { barmode: "overlay", yaxis: { title: { text: "parameters" } }, xaxis: { tickangle: -45 } });
}

/** Fine-tuning of one trial: the metric after each epoch, a line for each rung. */
export function curvesChart(element, job, detail) {
  const metric = job.baseline?.metric;
  const traces = Object.entries(detail.results).filter(([, r]) => r.curve.length).map(([rung, r]) => {
    const some = r.curve.filter((e) => e.value != null);
    return { type: "scatter", mode: "lines+markers", name: RUNGS[rung][0], x: some.map((e) => e.epoch), y: some.map((e) => shown(e.value, metric)), line: { color: css(RUNGS[rung][1]) } };
  });
  draw(element, traces, { showlegend: true, xaxis: { title: { text: "epoch" }, rangemode: "tozero" }, yaxis: { title: { text: isShare(metric) ? `${metric}, %` : metric } } });
}

const product = (numbers) => numbers.reduce((a, b) => a * b, 1);

/** How many layers share a replacement's factors; 0: it is one layer's own. */
const together = (plan) => Object.keys(plan.members ?? {}).length;

/** What replaces a layer in a plan, alone or with others. */
const entryOf = (plan, name) => plan[name] ?? Object.values(plan).find((p) => name in (p.members ?? {}));

/** How much of a layer's full rank a replacement keeps, in (0, 1]: two ranks are one for each channel side. */
function rankShare(layer, plan) {
  const [out, into, ...rest] = layer.weight;
  const sides = together(plan) ? plan.ranks.slice(-2) : plan.ranks;
  if (sides.length === 2) return Math.sqrt((sides[0] * sides[1]) / (out * into));
  return Math.min(1, Math.max(...plan.ranks) / Math.min(out, into * product(rest)));
}

/** Rank of every layer in every trial; the table of trials and each trial's plan have the figures. */
export function ranksChart(element, layers, trials) {
  const rows = layers.filter((l) => l.compressible).reverse();
  const cell = (make) => rows.map((l) => trials.map((t) => make(l, entryOf(t.plan, l.name))));
  draw(element, [{ type: "heatmap", x: trials.map((t) => t.number), y: rows.map((l) => l.name), zmin: 0, zmax: 1,
    z: cell((l, p) => (p ? rankShare(l, p) : 1)), text: cell((l, p) => (p ? `${p.method} ${p.ranks.join("×")}` : "unchanged")),
    hovertemplate: "trial %{x}, %{y}<br>%{text}<extra></extra>", colorscale: [[0, css("--accent")], [1, css("--soft")]],
    colorbar: { title: { text: "rank kept" }, thickness: 12 } }],
  { xaxis: { title: { text: "trial" }, showgrid: false }, yaxis: { showgrid: false } });
}
