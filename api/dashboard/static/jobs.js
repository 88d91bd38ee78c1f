// All jobs of this key's owner.

import { poll } from "./api.js";
import { badge, count, drop, h, table, times, value } from "./ui.js";

export function jobsPage(main, signal) {
  return poll("/v1/jobs?limit=100", ({ items, next }) => {
    draw(main, items, next);
    return items.some((job) => !["done", "failed", "cancelled"].includes(job.state)) ? 2 : 5;
  }, signal);
}

function draw(main, jobs, more) {
  const head = h("div", { class: "row spread" }, h("h1", {}, "Jobs"), h("a", { class: "button", href: "#/new" }, "New job"));
  if (!jobs.length) {
    main.replaceChildren(head, h("p", { class: "card" }, "No jobs yet. Drop a model and its data on the ", h("a", { href: "#/new" }, "new job"), " page, or run ", h("code", {}, "tenfold compress MODEL DATA --max-drop 0.005 --out DIR"), "."));
    return;
  }
  const columns = [
    { name: "Name", show: (j) => h("a", { href: `#/jobs/${j.id}` }, j.name) },
    { name: "State", wrap: true, show: (j) => h("span", {}, badge(j.state), j.reason_code === "unreadable_job" ? h("p", { class: "muted" }, j.reason) : null) },
    { name: "Trials", num: true, show: (j) => `${j.progress?.trials_done ?? 0} / ${j.progress?.trials_asked ?? "–"}` },
    { name: "Original", num: true, show: (j) => value(j.baseline?.value, j.baseline?.metric) },
    { name: "Best so far", num: true, show: (j) => value(j.best?.value, j.baseline?.metric) },
    { name: "Change", num: true, show: (j) => drop(j.best?.drop, j.baseline?.metric) },
    { name: "Parameters", num: true, show: (j) => count(j.best?.costs.parameters) },
    { name: "Smaller", num: true, show: (j) => times(j.baseline?.costs.parameters, j.best?.costs.parameters) },
    { name: "Submitted", show: (j) => new Date(j.created_at * 1000).toLocaleString() },
  ];
  main.replaceChildren(head, h("div", { class: "card" }, table(columns, jobs, "Jobs")), more ? h("p", { class: "muted" }, "Only the newest hundred are shown; the API has them all.") : "");
}
