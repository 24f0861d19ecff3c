// Which models there are, and what memory each takes: drawn before it is loaded.

import { getJson } from "./api.js";
import { byId, bytes, copyButton, count, h, icon, svg } from "./dom.js";

const PARTS = [                          // what the plan's purposes are called here
  ["weights", "Weights", ["weights"]], ["caches", "Caches of conversations", ["kv"]], ["arena", "Working memory", ["arena", "sampler"]],
  ["pictures", "Pictures", ["encoder", "images"]], ["process", "The process itself", ["overhead"]]];

let catalogue = { models: [], others: [], loads: false, body_bytes: Infinity };

export async function refresh() {
  catalogue = await getJson("pyengine/models");
  return catalogue;
}

// The most bytes that a request may have.
export function mostBytes() {
  return catalogue.body_bytes;
}

const same = (a, b) => a.toLowerCase() === b.toLowerCase();

export function loadedModel(name) {
  return catalogue.models.find((m) => same(m.name, name || "")) ?? null;
}

// The model that a new chat has: the one chosen last, if it is still there.
export function usual(name) {
  const there = [...catalogue.models, ...(catalogue.loads ? catalogue.others : [])];
  return (there.find((m) => same(m.name, name || "")) ?? there[0])?.name ?? "";
}

export function isUsable(name) {
  return Boolean(loadedModel(name)) || (catalogue.loads && catalogue.others.some((m) => same(m.name, name || "")));
}

function partsOf(device) {
  return PARTS.map(([kind, title, purposes]) => ({ kind, title, n: purposes.reduce((sum, p) => sum + (device.purposes[p] || 0), 0) })).filter((p) => p.n);
}

// Above, the memory: what is taken of what there is. Below, what is taken, part by part.
function bar(device) {
  const all = Math.max(device.available, device.total, 1), width = 600, taken = Math.max(3, width * device.total / all);
  const over = device.total > device.available;
  const drawing = svg("svg", { viewBox: `0 0 ${width} 64`, preserveAspectRatio: "none", class: "plan", role: "img" });
  drawing.append(svg("title", {}, document.createTextNode(`${bytes(device.total)} of ${bytes(device.available)} that are free`)),
    svg("rect", { class: "part free", x: 0, y: 0, width, height: 12 }), svg("rect", { class: `part ${over ? "over" : "taken"}`, x: 0, y: 0, width: taken, height: 12 }),
    svg("path", { class: "zoom", d: `M0 12 L${taken} 12 L${width} 32 L0 32 Z` }));
  if (over) drawing.append(svg("rect", { class: "part limit", x: width * device.available / all, y: 0, width: 2, height: 16 }));
  let x = 0;
  for (const part of partsOf(device)) {
    const wide = width * part.n / device.total;
    drawing.append(svg("rect", { class: `part ${part.kind}`, x, y: 32, width: Math.max(wide, 1), height: 32 }));
    x += wide;
  }
  return drawing;
}

function legend(device) {
  const row = (kind, title, n) => h("div", {}, h("dt", {}, h("i", { class: `dot ${kind}` }), title), h("dd", {}, bytes(n)));
  return h("dl", { class: "legend" }, partsOf(device).map((p) => row(p.kind, p.title, p.n)), row("free", "Left free", device.free),
    device.purposes.mapped ? row("mapped", "Read where the file lies, not counted", device.purposes.mapped) : null);
}

export function planView(plan) {
  const many = plan.devices.length > 1;
  const facts = [`context ${count(plan.context)}${plan.n_seq > 1 ? ` × ${plan.n_seq} conversations` : ""}`,
                 ...(plan.picture_tokens ? [`pictures of up to ${count(plan.picture_tokens)} tokens`] : []),
                 ...(plan.max_context ? [`largest context that fits: ${count(plan.max_context)}`] : [])];
  return h("div", { class: "plan-box" },
    h("p", { class: plan.fits ? "fits" : "wrong" }, h("strong", {}, plan.fits ? "Fits" : "Does not fit"), `: ${bytes(plan.total)} of ${bytes(plan.devices.reduce((n, d) => n + d.available, 0))}`),
    plan.devices.map((d) => [many ? h("h4", {}, d.device) : null, bar(d), legend(d)]),
    h("p", { class: "hint" }, facts.join(" · ")),
    plan.fits || !plan.alternatives.length ? null : [h("p", {}, "These would fit:"), h("ul", {}, plan.alternatives.map((a) => h("li", {}, a)))]);
}

function about(model) {
  const kind = model.kind || {};
  return [kind.parameter_size, kind.quantization_level, bytes(model.nbytes), model.pictures ? "pictures" : "text", model.source].filter(Boolean).join(" · ");
}

class Picker {
  constructor(current, choose) {
    this.dialog = byId("models-dialog");
    this.choose = choose;
    this.detail = h("section", { class: "detail", "aria-live": "polite", "aria-label": "Memory" });
    const every = [...catalogue.models, ...catalogue.others];
    this.dialog.replaceChildren(
      h("div", { class: "dialog-head" }, h("h2", { id: "models-title" }, "Models"),
        h("button", { type: "button", class: "quiet", "aria-label": "Close", onclick: () => this.dialog.close() }, icon("close"))),
      h("div", { class: "columns" },
        h("div", { class: "choices", role: "radiogroup", "aria-labelledby": "models-title" },
          this.group("Loaded", catalogue.models), this.group("On the server's machine", catalogue.others)), this.detail));
    const first = every.find((m) => same(m.name, current)) ?? every[0];
    if (first) this.show(first);
    else this.detail.append(h("p", {}, "This server has no model."));
    this.dialog.showModal();
    this.dialog.querySelector("input:checked")?.focus();
  }

  group(title, models) {
    return models.length ? h("div", {}, h("h3", {}, title), models.map((m) => h("label", { class: "choice" },
      h("input", { type: "radio", name: "model", value: m.name, onchange: () => this.show(m) }),
      h("span", {}, h("strong", {}, m.name), h("small", {}, about(m)))))) : null;
  }

  async show(model, ctx = null) {
    this.shown = model;
    for (const input of this.dialog.querySelectorAll("input[name=model]")) input.checked = input.value === model.name;
    if (model.loaded) {
      this.fill(model, model.plan);
      return;
    }
    this.detail.replaceChildren(h("p", { class: "hint" }, "Reading the file’s header…"));
    try {
      const plan = await getJson(`pyengine/plan?model=${encodeURIComponent(model.name)}${ctx ? `&ctx=${ctx}` : ""}`);
      if (this.shown === model) this.fill(model, plan);
    } catch (error) {
      if (this.shown === model) this.detail.replaceChildren(h("h3", {}, model.name), h("p", { class: "wrong" }, error.message));
    }
  }

  fill(model, plan) {
    const use = h("button", { type: "button", class: "main", disabled: !isUsable(model.name), onclick: () => { this.dialog.close(); this.choose(model.name); } }, "Use this model");
    this.detail.replaceChildren(h("h3", {}, model.name), planView(plan), model.loaded ? "" : this.context(model, plan),
      h("div", { class: "actions" }, use), isUsable(model.name) ? "" : this.how(model, plan));
  }

  context(model, plan) {
    const input = h("input", { type: "number", id: "plan-ctx", min: 1, max: 16777216, step: 1, value: plan.context });
    return h("form", { class: "inline", onsubmit: (event) => { event.preventDefault(); this.show(model, input.value); } },
      h("label", { for: "plan-ctx" }, "Context"), input, h("button", { type: "submit" }, "Plan"));
  }

  how(model, plan) {
    const command = `pyengine-run serve ${/\s/.test(model.name) ? `"${model.name}"` : model.name} --ctx ${plan.context}`;
    return h("div", { class: "how" }, h("p", {}, "This server answers with the models that it was started with. To use this one:"),
      h("div", { class: "command" }, h("code", {}, command.split(" ").flatMap((word) => [h("span", {}, word), " "])), copyButton("Copy the command", () => command)));
  }
}

export async function openPicker(current, choose) {
  await refresh();
  return new Picker(current || "", choose);
}
