// A new job: two files, a budget, a few choices.

import { follow, post, upload } from "./api.js";
import { h } from "./ui.js";

function picker(title, hint, id) {
  const input = h("input", { type: "file", id, hidden: true });
  const label = h("span", {}, hint);
  const box = h("div", { class: "drop", tabindex: "0", role: "button", "aria-label": title }, h("b", {}, title), h("br"), label, input);
  const chosen = () => { label.textContent = input.files[0] ? `${input.files[0].name}, ${(input.files[0].size / 1e6).toFixed(1)} MB` : hint; };
  box.addEventListener("click", () => input.click());
  box.addEventListener("keydown", (e) => { if (["Enter", " "].includes(e.key)) { e.preventDefault(); input.click(); } });
  box.addEventListener("dragover", (e) => { e.preventDefault(); box.classList.add("over"); });
  box.addEventListener("dragleave", () => box.classList.remove("over"));
  box.addEventListener("drop", (e) => { e.preventDefault(); box.classList.remove("over"); input.files = e.dataTransfer.files; chosen(); });
  input.addEventListener("click", (e) => e.stopPropagation());
  input.addEventListener("change", chosen);
  return { box, file: () => input.files[0] };
}

const field = (id, label, input) => h("div", {}, h("label", { for: id }, label), input);
const number = (id, attributes) => h("input", { type: "number", id, ...attributes });
const select = (id, options) => h("select", { id }, options.map(([v, text]) => h("option", { value: v }, text)));
const numbers = (text) => text.split(/[\s,]+/).filter(Boolean).map(Number);

export async function newPage(main, signal) {
  const model = picker("Model", "Drop a .pt2 here, or click (tenfold.export writes it)", "model-file");
  const data = picker("Data", "Drop .npz, .safetensors, .parquet, .zip or .tar here, or click", "data-file");
  const message = h("div", { role: "alert" });
  const bar = h("i");
  const button = h("button", { type: "submit" }, "Start the search");
  const joints = h("div", { hidden: true }, h("div", { class: "fields" },
    field("pck", "A joint is found within (share of the row's length, or of the side)", number("pck", { min: "0", step: "any", placeholder: "0.5, or 0.05 of the side" })),
    field("mirror", "Joints that swap when mirrored, in pairs", h("input", { id: "mirror", placeholder: "2-5, 3-6, or none" })),
    field("sigma", "Sigma of the heatmaps, in their pixels", number("sigma", { value: "1", min: "0", step: "any" }))));
  const form = h("form", { onsubmit: (event) => { event.preventDefault(); start(); } },
    h("h1", {}, "New job"),
    h("div", { class: "grid card" }, model.box, data.box),
    h("div", { class: "card" }, h("h2", {}, "Budget and effort"), h("div", { class: "fields" },
      field("max-drop", "May lose: points, or % of a loss", number("max-drop", { value: "0.5", min: "0", step: "any", required: true })),
      field("minimize", "Make small", select("minimize", [["parameters", "parameters"], ["macs", "multiply-accumulates"], ["bytes", "bytes"], ["latency", "measured latency"]])),
      field("trials", "Trials", number("trials", { value: "30", min: "1", step: "1" })),
      field("hours", "Hours that it may take", number("hours", { min: "0", step: "any", placeholder: "no limit" })),
      field("epochs", "Epochs of fine-tuning", number("epochs", { min: "0", step: "any", placeholder: "by the hours, or 10" })),
      field("storage", "Also store weights as", select("storage", [["", "float32 only"], ["float16", "float16"], ["int8", "int8"], ["float16,int8", "float16 and int8"]])))),
    h("div", { class: "card" }, h("h2", {}, "How the data is read"),
      h("p", { class: "muted" }, "The network sees (x · scale − mean) / std. A wrong normalisation is the commonest first mistake: the job stops early if the original does badly."),
      h("div", { class: "fields" },
        field("task", "Task", select("task", [["classification", "classification"], ["regression", "regression"], ["segmentation", "segmentation"], ["keypoints", "keypoints"], ["fidelity", "no labels: stay close to the original"]])),
        field("scale", "Scale", number("scale", { value: "1", step: "any" })),
        field("mean", "Mean, per channel", h("input", { id: "mean", placeholder: "0.485, 0.456, 0.406" })),
        field("std", "Std, per channel", h("input", { id: "std", placeholder: "0.229, 0.224, 0.225" })),
        field("layout", "Layout", select("layout", [["as_is", "channels first"], ["nhwc", "channels last (nhwc)"]])),
        field("augment", "Augmentation", select("augment", [["none", "none"], ["crop", "crop"], ["crop_flip", "crop and flip"]]))),
      joints),
    h("p", { class: "row" }, button), h("div", { class: "bar", hidden: true }, bar), message);
  main.replaceChildren(form);

  const at = (id) => form.querySelector(`#${id}`).value;
  form.querySelector("#task").addEventListener("change", () => { joints.hidden = at("task") !== "keypoints"; });

  /** A number that may be left to the service. */
  const given = (id) => at(id) === "" ? {} : { [id]: Number(at(id)) };

  /** What only keypoints ask for. An empty field is left to the service. */
  function ofJoints() {
    if (joints.hidden) return {};
    const given = {};
    if (at("pck")) given.pck_threshold = Number(at("pck"));
    if (at("mirror").trim() === "none") given.mirror = [];
    else if (at("mirror").trim()) given.mirror = at("mirror").split(",").map((pair) => pair.split("-").map(Number));
    return given;
  }

  function say(text, bad = false) {
    message.className = bad ? "notice bad" : "notice";
    message.textContent = text;
  }

  async function ready(path, what) {
    const stop = new AbortController();
    let last;
    await follow(path, (now) => { last = now; if (now.state !== "inspecting") stop.abort(); }, AbortSignal.any([signal, stop.signal]));
    if (last?.state === "rejected") throw new Error(`The ${what} was refused: ${last.reason}`);
    return last;
  }

  async function start() {
    if (!model.file() || !data.file()) return say("Choose a model file and a data file first.", true);
    button.disabled = true;
    bar.parentElement.hidden = false;
    const sent = (from) => (part) => { bar.style.width = `${100 * (from + part / 2)}%`; };
    try {
      say(`Uploading ${model.file().name}…`);
      const first = await upload(model.file(), sent(0));
      say(`Uploading ${data.file().name}…`);
      const second = await upload(data.file(), sent(0.5));
      const m = await post("/v1/models", { upload: first.id, name: model.file().name });
      const d = await post("/v1/datasets", { upload: second.id, name: data.file().name, task: at("task"), ...ofJoints(), transform: {
        scale: Number(at("scale")), mean: numbers(at("mean")), std: numbers(at("std")), layout: at("layout"), augment: at("augment") } });
      say("Reading the model and the data…");
      await Promise.all([ready(`/v1/models/${m.id}`, "model"), ready(`/v1/datasets/${d.id}`, "data")]);
      const job = await post("/v1/jobs", { model: m.id, dataset: d.id, name: model.file().name.replace(/\.\w+$/, ""),
        budget: { max_drop: Number(at("max-drop")) / 100 }, minimize: [at("minimize")],
        storage: at("storage").split(",").filter(Boolean),
        search: { trials: Number(at("trials")), ...given("hours") },
        fine_tune: { ...given("epochs"), ...(joints.hidden ? {} : { heatmap_sigma: Number(at("sigma")) }) } });
      if (!signal.aborted) location.hash = `#/jobs/${job.id}`;
    } catch (error) {
      say(error.message, true);
      button.disabled = false;
      bar.parentElement.hidden = true;
    }
  }
}
