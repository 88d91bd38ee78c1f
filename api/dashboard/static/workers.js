// Who computes, on what, and how well it is locked in.

import { poll } from "./api.js";
import { clock, h, table } from "./ui.js";

const layers = (w) => Object.entries(w.jail).map(([name, on]) => `${on ? "✓" : "✗"} ${name}`).join("  ");

const COLUMNS = [
  { name: "Worker", show: (w) => w.id },
  { name: "Host", show: (w) => w.host },
  { name: "Queue", show: (w) => w.queue },
  { name: "Device", show: (w) => w.device },
  { name: "Jail", show: layers },
  { name: "Last seen", show: (w) => clock(w.seen_at) },
];

export function workersPage(main, signal) {
  return poll("/v1/workers", ({ items }) => {
    main.replaceChildren(h("h1", {}, "Workers"), h("div", { class: "card" }, items.length ? table(COLUMNS, items, "Workers")
      : "No worker was seen in the last minute. Start one: tenfold-server worker"));
    return 5;
  }, signal);
}
