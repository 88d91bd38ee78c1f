// One job, live.

import { all, download, follow, get, pages, post, sleep } from "./api.js";
import { bestChart, COST, curvesChart, frontChart, layersChart, ranksChart } from "./charts.js";
import { badge, clock, count, drop, duration, h, table, times, toast, value } from "./ui.js";

const ENDED = ["done", "failed", "cancelled"];
const EVENTS_SHOWN = 200;

export async function jobPage(main, signal, id) {
  const base = `/v1/jobs/${id}`;
  const part = (title, ...content) => h("section", { class: "card" }, h("h2", {}, title), ...content);
  const { head, drawHead } = headOf(base);
  const charts = { front: h("div", { class: "chart", role: "img", "aria-label": "Accuracy against cost; the table of trials has the same figures" }),
    best: h("div", { class: "chart", role: "img", "aria-label": "Smallest cost within the budget over trials" }),
    layers: h("div", { class: "chart", role: "img", "aria-label": "Parameters of each layer before and after; the table below has the same figures" }),
    ranks: h("div", { class: "chart", role: "img", "aria-label": "Rank of each layer in each trial" }),
    curves: h("div", { class: "chart", role: "img", "aria-label": "The metric of the best trial after each epoch of fine-tuning" }) };
  const tables = { trials: h("div"), layers: h("div"), events: h("ul", { class: "events" }), files: h("div") };
  const cost = h("select", { "aria-label": "Cost shown", style: "width:auto" }, Object.keys(COST).map((c) => h("option", { value: c }, c)));
  main.replaceChildren(head,
    h("div", { class: "grid" },
      h("section", { class: "card" }, h("div", { class: "row spread" }, h("h2", {}, "Trade-off"), cost), charts.front),
      part("Best so far", charts.best)),
    part("Files", tables.files),
    part("Layers, before and after", charts.layers, tables.layers),
    h("div", { class: "grid" }, part("Ranks over trials", charts.ranks), part("Fine-tuning of the best", charts.curves)),
    part("Trials", tables.trials),
    part("Events", tables.events));

  let job = null;
  let behind = "";
  const { found, refresh } = listsOf(base);
  const drawCharts = () => {
    frontChart(charts.front, job, found.trials, found.front.points, cost.value);
    bestChart(charts.best, job, found.trials, cost.value);
  };
  cost.addEventListener("change", () => job && drawCharts());

  const draw = () => {
    const { trials, detail, layers: { layers } } = found;
    drawHead(job, behind);
    drawCharts();
    if (layers.length) layersChart(charts.layers, layers);
    const trained = detail && Object.values(detail.results).some((r) => r.curve.length);
    charts.ranks.parentElement.hidden = !(layers.length && trials.length);
    charts.curves.parentElement.hidden = !trained;
    if (layers.length && trials.length) ranksChart(charts.ranks, layers, trials);
    if (trained) curvesChart(charts.curves, job, detail);
    drawTables(tables, job, found, base);
  };

  // What the lists depend on: `version` counts every change of them but the claim of a trial.
  const stamp = () => JSON.stringify([job.version, job.progress.running.map((r) => r.trial)]);
  let seen = null;
  const catchUp = async () => {
    while (!signal.aborted && stamp() !== seen) {
      const asked = stamp();
      behind = await refresh(job);
      if (signal.aborted) return;
      if (!behind) seen = asked;
      draw();
      await sleep((document.hidden ? 10 : 2) + found.trials.length / 250);
    }
  };
  let catching = null;
  await follow(base, (fresh) => {
    if (!job) cost.value = fresh.spec?.minimize[0] ?? "parameters";
    job = fresh;
    drawHead(job, behind);
    if (job.reason_code === "unreadable_job") main.replaceChildren(head);
    else catching ??= catchUp().finally(() => { catching = null; });
  }, signal);
}

/** What a job `found`, as of the last refresh(job), which returns why some of it keeps its old value ("": nothing does). */
function listsOf(base) {
  const found = { trials: [], front: { points: [] }, layers: { layers: [] }, events: [], files: [], detail: null };
  let last = null; // the cursor after the last event seen
  const events = async () => {
    for await (const page of pages(`${base}/events`, last)) {
      found.events = [...found.events, ...page.items].slice(-EVENTS_SHOWN);
      last = page.last;
    }
    return found.events;
  };
  const refresh = async (job) => {
    const asked = { trials: all(`${base}/trials`), front: get(`${base}/front`), layers: get(`${base}/layers`), events: events(),
      files: all(`${base}/artifacts`), detail: job.best ? get(`${base}/trials/${job.best.trial}`) : null };
    const replies = await Promise.allSettled(Object.entries(asked).map(async ([name, reply]) => { found[name] = await reply; }));
    return replies.find((r) => r.status === "rejected")?.reason.message ?? "";
  };
  return { found, refresh };
}

/**
 * A job's name, what can be asked of it, how far it is and what it found: drawHead(job, why some of the page is old).
 * What is pressed or typed into is made once: a redraw would take it from under the hands.
 */
function headOf(base) {
  const ask = (action, label, look, body = () => undefined) => {
    const button = h("button", { class: look }, label);
    button.addEventListener("click", async () => {
      button.disabled = true;
      try { await post(`${base}/${action}`, body()); toast(`Asked: ${action}.`); } catch (error) { toast(error.message); button.disabled = false; }
    });
    return button;
  };
  const resume = ask("resume", "Resume");
  const pause = ask("pause", "Pause", "quiet");
  const cancel = ask("cancel", "Cancel", "danger");
  const hours = h("input", { type: "number", min: "0", step: "any", style: "width:5rem" });
  const moreHours = h("label", { class: "row muted" }, "More hours", hours);
  const extend = ask("extend", "Ten more trials", "quiet", () => ({ trials: 10, ...(hours.value && { hours: Number(hours.value) }) }));
  const name = h("div", { class: "row" });
  const facts = h("div");
  let drawn = null; // the state drawn last: what was asked in it has been answered once there is another

  const drawHead = (job, behind) => {
    const { state } = job;
    const ended = ENDED.includes(state);
    name.replaceChildren(h("h1", {}, job.name), badge(state));
    if (state !== drawn) for (const button of [resume, pause, cancel, extend]) button.disabled = state === "cancelling";
    drawn = state;
    resume.hidden = state !== "paused";
    pause.hidden = ended || ["paused", "cancelling"].includes(state);
    cancel.hidden = ended;
    extend.hidden = !["done", "failed"].includes(state);
    moreHours.hidden = extend.hidden || job.spec?.search.hours == null;
    drawFacts(facts, job, behind);
  };
  const buttons = h("div", { class: "row" }, resume, pause, cancel, moreHours, extend);
  return { head: h("div", {}, h("div", { class: "row spread" }, name, buttons), facts), drawHead };
}

function drawFacts(facts, job, behind) {
  const p = job.progress ?? {};
  const done = job.state === "done" ? 1 : (p.trials_done ?? 0) / Math.max(1, p.trials_asked ?? 1);
  const running = (p.running ?? []).map((r) => r.message).filter(Boolean).slice(0, 3).join(" · ");
  const metric = job.baseline?.metric;
  const figure = (label, big, small) => h("div", { class: "figure" }, h("span", {}, label), h("b", {}, big), h("span", {}, small));
  const { baseline, best } = job;
  const kept = best?.keeps_budget;
  facts.replaceChildren(
    h("div", { class: "bar", role: "progressbar", "aria-valuenow": Math.round(100 * done), "aria-valuemin": "0", "aria-valuemax": "100" }, h("i", { style: `width:${100 * done}%` })),
    h("p", { class: "muted" }, [`${p.trials_done ?? 0} of ${p.trials_asked ?? "–"} trials`, running, !ENDED.includes(job.state) && job.eta_seconds != null ? `about ${duration(job.eta_seconds)} left` : "",
      behind && `what follows may be old: ${behind}`].filter(Boolean).join(" · ")),
    job.reason ? h("div", { class: `notice ${job.state === "failed" || job.reason_code === "unreadable_job" ? "bad" : ""}`, role: "status" }, job.reason) : "",
    h("div", { class: "figures" },
      figure("Original", value(baseline?.value, metric), `${count(baseline?.costs.parameters)} parameters`),
      figure("Best", value(best?.value, metric), best ? drop(best.drop, metric) : "nothing yet"),
      figure("Checked on unseen data", best?.verify_drop != null ? drop(best.verify_drop, metric) : "–", kept == null ? "not yet" : kept ? "keeps the budget" : "does not keep the budget"),
      figure("Parameters", times(baseline?.costs.parameters, best?.costs.parameters), count(best?.costs.parameters)),
      figure("MACs", times(baseline?.costs.macs, best?.costs.macs), count(best?.costs.macs)),
      figure("Latency, measured", times(best?.costs.dense_latency_ms, best?.costs.latency_ms), best?.costs.latency_ms != null ? `${best.costs.latency_ms.toFixed(2)} ms` : "–")));
}

function drawTables(tables, job, { trials, front, layers: { layers }, events, files }, base) {
  const metric = job.baseline?.metric;
  const again = async (t) => { try { await post(`${base}/trials/${t.number}/export`); toast(`Trial ${t.number} will be exported.`); } catch (error) { toast(error.message); } };
  const onFront = new Set(front.points.map((p) => p.trial));
  tables.trials.replaceChildren(trials.length ? table([
    { name: "#", num: true, show: (t) => String(t.number) },
    { name: "Stage", num: true, show: (t) => String(t.stage) },
    { name: "Rung", show: (t) => t.rung },
    { name: "State", show: (t) => badge(t.state) },
    { name: "Value", num: true, show: (t) => value(t.result?.value, metric) },
    { name: "Change", num: true, show: (t) => drop(t.result?.drop, metric) },
    { name: "Parameters", num: true, show: (t) => count(t.result?.costs.parameters) },
    { name: "MACs", num: true, show: (t) => count(t.result?.costs.macs) },
    { name: "Time", num: true, show: (t) => duration(t.result?.seconds) },
    { name: "Front", show: (t) => (onFront.has(t.number) ? "●" : "") },
    { name: "", show: (t) => (ENDED.includes(job.state) && t.state === "done" ? h("button", { class: "quiet", onclick: () => again(t) }, "Export") : "") },
  ], [...trials].reverse(), "Trials") : h("p", { class: "muted" }, "No trial yet."));
  tables.layers.replaceChildren(layers.length ? table([
    { name: "Layer", show: (l) => l.name },
    { name: "Kind", show: (l) => l.kind },
    { name: "Weight", show: (l) => l.weight.join("×") },
    { name: "Becomes", wrap: true, show: (l) => (l.method ? `${l.method}, rank ${l.ranks.join("×")}${l.together.length ? `, shared by ${l.together.length} layers` : ""}` : l.compressible ? "unchanged" : `unchanged: ${l.reason}`) },
    { name: "Sensitivity", num: true, show: (l) => l.sensitivity?.toFixed(3) },
    { name: "Parameters", num: true, show: (l) => count(l.parameters) },
    { name: "after", num: true, show: (l) => count(l.parameters_after ?? l.parameters) },
    { name: "MACs", num: true, show: (l) => count(l.macs) },
    { name: "after", num: true, show: (l) => count(l.macs_after ?? l.macs) },
  ], layers, "Layers") : h("p", { class: "muted" }, "Known once the model is inspected."));
  tables.events.replaceChildren(...[...events].reverse().map((e) => h("li", {}, h("time", {}, clock(e.at)), e.message)));
  tables.files.replaceChildren(files.length ? table([
    { name: "File", show: (f) => h("button", { class: "quiet", onclick: () => download(f).catch((e) => toast(e.message)) }, f.filename) },
    { name: "Trial", num: true, show: (f) => String(f.trial) },
    { name: "Bytes", num: true, show: (f) => count(f.size) },
    { name: "SHA-256", show: (f) => f.sha256.slice(0, 16) + "…" },
  ], files, "Files") : h("p", { class: "muted" }, "Files are offered once they were loaded again in a clean process."));
}
