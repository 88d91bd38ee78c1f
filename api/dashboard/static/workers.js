// Who computes, on what, and how well it is locked in.

import { get } from "./api.js";
import { clock, h, table } from "./ui.js";

export async function workersPage(main, signal) {
  while (!signal.aborted) {
    const { items } = await get("/v1/workers");
    if (signal.aborted) return;
    const layers = (w) => Object.entries(w.jail).map(([name, on]) => `${on ? "✓" : "✗"} ${name}`).join("  ");
    const columns = [
      { name: "Worker", show: (w) => w.id },
      { name: "Host", show: (w) => w.host },
      { name: "Queue", show: (w) => w.queue },
      { name: "Device", show: (w) => w.device },
      { name: "Jail", show: layers },
      { name: "Last seen", show: (w) => clock(w.seen_at) },
    ];
    main.replaceChildren(h("h1", {}, "Workers"), h("div", { class: "card" }, items.length ? table(columns, items, "Workers")
      : "No worker has reported. Start one: tenfold-server worker"));
    await new Promise((resolve) => setTimeout(resolve, 5000));
  }
}
