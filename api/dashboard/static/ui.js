// Small helpers: elements, numbers, messages.

/** h("p", {class: "muted"}, "text", child): text is always text, never markup. */
export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  element.append(...children.flat().filter((c) => c != null));
  return element;
}

export const badge = (state) => h("span", { class: `badge ${state}` }, state);

export const count = (n) => (n == null ? "–" : Math.round(n).toLocaleString("en"));

export const times = (before, after) => (before && after ? `÷${(before / after).toFixed(2)}` : "–");

/** Whether a metric is a share of 1, shown as percent. */
export const isShare = (metric) => ["accuracy", "top5", "agreement", "miou", "pixel_accuracy", "pck"].includes(metric);

/** A metric's value: fractions of one as percent. */
export function value(v, metric) {
  if (v == null) return "–";
  return isShare(metric) ? `${(100 * v).toFixed(2)} %` : v.toPrecision(4);
}

export function drop(v, metric) {
  if (v == null) return "–";
  const signed = v > 0 ? "−" : "+";
  return isShare(metric)
    ? `${signed}${Math.abs(100 * v).toFixed(2)} pt` : `${signed}${(100 * Math.abs(v)).toFixed(1)} %`;
}

export function duration(seconds) {
  if (seconds == null) return "–";
  if (seconds < 90) return `${Math.round(seconds)} s`;
  return seconds < 5400 ? `${Math.round(seconds / 60)} min` : `${(seconds / 3600).toFixed(1)} h`;
}

export const clock = (at) => new Date(at * 1000).toLocaleTimeString();

export function table(columns, rows, label) {
  return h("div", { class: "table-scroll", tabindex: "0", role: "region", "aria-label": label },
    h("table", {},
      h("thead", {}, h("tr", {}, columns.map((c) => h("th", { class: c.num ? "num" : "", scope: "col" }, c.name)))),
      h("tbody", {}, rows.map((row) => h("tr", {}, columns.map((c) => h("td", { class: c.num ? "num" : c.wrap ? "wrap" : "" }, c.show(row) ?? "–")))))));
}

let toastTimer;
export function toast(message) {
  const box = document.getElementById("toast");
  box.textContent = message;
  box.classList.add("show");
  clearTimeout(toastTimer);
  toastTimer = setTimeout(() => box.classList.remove("show"), 6000);
}
