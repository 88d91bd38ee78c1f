// Charts by plotly.js. Every chart has a table beside it on the page, so nothing is only in a picture.

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function draw(element, traces, layout) {
  const ink = css("--ink");
  const axis = { gridcolor: css("--line"), zerolinecolor: css("--line"), automargin: true };
  Plotly.react(element, traces, {
    margin: { l: 55, r: 15, t: 10, b: 45 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: ink, family: "system-ui, sans-serif", size: 12 }, legend: { orientation: "h", y: 1.12 }, hovermode: "closest",
    ...layout, xaxis: { ...axis, ...layout.xaxis }, yaxis: { ...axis, ...layout.yaxis },
  }, { displayModeBar: false, responsive: true });
}

const percent = (metric) => ["accuracy", "top5", "agreement"].includes(metric);
const shown = (v, metric) => (percent(metric) ? 100 * v : v);

const words = (plan) => Object.entries(plan).slice(0, 12).map(([site, p]) => `${site}: ${p.method} ${p.ranks.join("×")}`).join("<br>")
  + (Object.keys(plan).length > 12 ? "<br>…" : "");

/** Value against cost: every trial faint by rung, the front on top, the budget as a line. */
export function frontChart(element, job, trials, front, cost) {
  const metric = job.baseline?.metric;
  const rungs = { cheap: ["untrained", css("--muted")], short: ["short training", css("--accent")], full: ["fully trained", css("--good")] };
  const traces = Object.entries(rungs).map(([rung, [name, color]]) => {
    const some = trials.filter((t) => t.result?.rung === rung && t.result.value != null && t.result.costs[COST[cost]] != null);
    return { type: "scatter", mode: "markers", name, x: some.map((t) => t.result.costs[COST[cost]]), y: some.map((t) => shown(t.result.value, metric)),
      text: some.map((t) => `trial ${t.number}<br>${words(t.plan)}`), hoverinfo: "text+x+y", marker: { color, size: rung === "full" ? 11 : 7, opacity: 0.75 } };
  });
  const line = [...front].filter((p) => p.value != null && p.costs[COST[cost]] != null).sort((a, b) => a.costs[COST[cost]] - b.costs[COST[cost]]);
  traces.push({ type: "scatter", mode: "lines", name: "front", x: line.map((p) => p.costs[COST[cost]]), y: line.map((p) => shown(p.value, metric)), line: { color: css("--warn"), shape: "hv", width: 2 }, hoverinfo: "skip" });
  const shapes = [];
  if (job.baseline) {
    traces.push({ type: "scatter", mode: "markers", name: "original", x: [job.baseline.costs[COST[cost]]], y: [shown(job.baseline.value, metric)], marker: { symbol: "star", size: 14, color: css("--ink") } });
    if (job.max_drop != null && percent(metric)) {
      const y = shown(job.baseline.value - job.max_drop, metric);
      shapes.push({ type: "line", xref: "paper", x0: 0, x1: 1, y0: y, y1: y, line: { dash: "dot", color: css("--bad") } });
    }
  }
  draw(element, traces, { shapes, xaxis: { title: { text: cost }, rangemode: "tozero" }, yaxis: { title: { text: percent(metric) ? `${metric}, %` : metric } } });
}

export const COST = { parameters: "parameters", macs: "macs", bytes: "bytes", latency: "latency_ms" };

/** The smallest cost among trials that keep the budget (as far as measured), over trial numbers. */
export function bestChart(element, job, trials, cost) {
  const x = [];
  const y = [];
  let best = job.baseline?.costs[COST[cost]] ?? null;
  for (const t of trials) {
    const r = t.result;
    if (r?.drop != null && job.max_drop != null && r.drop <= job.max_drop && r.costs[COST[cost]] != null && (best == null || r.costs[COST[cost]] < best)) best = r.costs[COST[cost]];
    x.push(t.number);
    y.push(best);
  }
  draw(element, [{ type: "scatter", mode: "lines+markers", x, y, line: { shape: "hv", color: css("--accent") }, name: cost }],
    { showlegend: false, xaxis: { title: { text: "trial" } }, yaxis: { title: { text: `${cost} within the budget` }, rangemode: "tozero" } });
}

/** Parameters of every layer before and after. */
export function layersChart(element, layers) {
  const names = layers.map((l) => l.name);
  draw(element, [
    { type: "bar", name: "before", x: names, y: layers.map((l) => l.parameters), marker: { color: css("--line") } },
    { type: "bar", name: "after", x: names, y: layers.map((l) => l.parameters_after ?? l.parameters), marker: { color: css("--accent") },
      text: layers.map((l) => (l.method ? `${l.method} ${l.ranks.join("×")}` : "")), hoverinfo: "x+y+text", textposition: "none" },
  ], { barmode: "overlay", yaxis: { title: { text: "parameters" } }, xaxis: { tickangle: -45 } });
}
