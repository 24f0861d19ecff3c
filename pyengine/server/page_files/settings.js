// What a chat asks for beside its messages. An empty field is the model's own value, which it shows.

import { byId, h, icon } from "./dom.js";
import { loadedModel } from "./models.js";
import { remember } from "./store.js";

const NUMBERS = [
  ["temperature", "Temperature", { min: 0, max: 100, step: "any" }, "0 always takes the most probable token"],
  ["top_k", "Top k", { min: 0, max: 1000000, step: 1 }, "0 leaves it out"],
  ["top_p", "Top p", { min: 0, max: 1, step: "any" }, "1 leaves it out"],
  ["min_p", "Min p", { min: 0, max: 1, step: "any" }, "0 leaves it out"],
  ["repeat_penalty", "Repeat penalty", { min: 0.01, max: 10, step: "any" }, "1 leaves it out"],
  ["top_n_sigma", "Top n sigma", { min: 0, max: 100, step: "any" }, "0 leaves it out"],
  ["xtc_probability", "XTC probability", { min: 0, max: 1, step: "any" }, "leaves out top choices; 0 never"],
  ["dynatemp_range", "Temperature range", { min: 0, max: 100, step: "any" }, "0 keeps it fixed"],
  ["dry_multiplier", "DRY multiplier", { min: 0, max: 1000, step: "any" }, "against repetitions; 0 leaves it out"],
  ["max_tokens", "Most tokens", { min: 1, max: 10000000, step: 1 }, "of one answer, thinking too"],
  ["seed", "Seed", { min: 0, max: Number.MAX_SAFE_INTEGER, step: 1 }, "the same seed gives the same answer"]];
const OTHERWISE = { max_tokens: "until it ends", seed: "drawn anew" };
const THINKING = [["", "The model’s own"], ["off", "Off"], ["on", "On"], ["low", "Little"], ["medium", "Medium"], ["high", "Much"], ["budget", "At most so many tokens"]];
const JSONS = [
  ["schema", "Answer by a JSON schema", '{"type": "object", "properties": {…}}', (v) => v !== null && typeof v === "object" && !Array.isArray(v), "must be a JSON object"],
  ["tools", "Tools", '[{"type": "function", "function": {"name": …, "parameters": {…}}}]', (v) => Array.isArray(v) && v.length > 0, "must be a JSON list of tools"]];

class Panel {
  constructor(settings, model, changed) {
    Object.assign(this, { settings: { ...settings }, model: loadedModel(model), changed });
    this.dialog = byId("settings-dialog");
    this.form = h("form", { method: "dialog", class: "settings", novalidate: true, onsubmit: (event) => this.close(event) });
    this.fill();
    const keep = h("input", { type: "checkbox", id: "keep-settings" });
    this.dialog.replaceChildren(
      h("div", { class: "dialog-head" }, h("h2", { id: "settings-title" }, "Settings of this chat"),
        h("button", { type: "button", class: "quiet", "aria-label": "Close", onclick: () => this.close() }, icon("close"))),
      this.form,
      h("div", { class: "dialog-end" }, h("label", { class: "check" }, keep, "For new chats too"), h("span", { class: "gap" }),
        h("button", { type: "button", onclick: () => { this.settings = {}; this.fill(); } }, "The model’s own"),
        h("button", { type: "button", class: "main", onclick: () => this.close() }, "Done")));
    this.dialog.oncancel = (event) => { event.preventDefault(); this.close(); };          // one: of the panel that is open
    this.keep = keep;
    this.dialog.showModal();
    this.form.querySelector("textarea").focus();
  }

  fill() {
    const defaults = this.model?.sampling || {};
    this.form.replaceChildren(
      this.area("system", "System text", this.model?.system || "none", 3), this.thinking(),
      h("fieldset", {}, h("legend", {}, "How tokens are chosen"), h("div", { class: "grid" },
        NUMBERS.map(([name, title, bounds, hint]) => this.number(name, title, bounds, hint, defaults[name] ?? OTHERWISE[name] ?? "")))),
      this.model?.stop?.length ? h("p", { class: "hint" }, "Answers end at ", this.model.stop.map((s) => h("code", {}, s))) : "",
      ...JSONS.map(([name, title, example]) => this.area(name, title, example, 4, true)));
  }

  field(name, title, input, hint = "") {
    input.id = `set-${name}`;
    input.setAttribute("aria-describedby", `about-${name}`);
    return h("div", { class: "field" }, h("label", { for: input.id }, title), input, h("small", { id: `about-${name}` }, hint));
  }

  area(name, title, placeholder, rows, code = false) {
    return this.field(name, title, h("textarea", { name, rows, placeholder, spellcheck: code ? "false" : null, class: code ? "mono" : null, value: this.settings[name] || "" }));
  }

  number(name, title, bounds, hint, placeholder) {
    return this.field(name, title, h("input", { type: "number", name, inputmode: "decimal", ...bounds, placeholder: String(placeholder), value: this.settings[name] ?? "" }), hint);
  }

  thinking() {
    const now = this.settings.think, kind = now === undefined ? "" : now === true ? "on" : now === false ? "off" : typeof now === "string" ? now : "budget";
    const budget = h("input", { type: "number", name: "budget", min: 1, max: 10000000, step: 1, "aria-label": "Most tokens of thinking", placeholder: "tokens", value: kind === "budget" ? now : "" });
    const select = h("select", { name: "think", onchange: () => { budget.hidden = select.value !== "budget"; } },
      THINKING.map(([value, title]) => h("option", { value, selected: value === kind }, title)));
    budget.hidden = kind !== "budget";
    return h("div", { class: "pair" }, this.field("think", "Thinking", select), budget);
  }

  // Read the form; what is wrong is marked and told. Returns the settings, or null.
  read() {
    const found = {}, wrong = [];
    const told = (input, words) => {
      const about = byId(`about-${input.name}`);
      input.setAttribute("aria-invalid", String(Boolean(words)));
      if (words && about) { about.textContent = words; about.className = "wrong"; }
      if (words) wrong.push(input);
    };
    const { elements } = this.form;
    if (elements.system.value.trim()) found.system = elements.system.value;
    for (const [name, , bounds] of NUMBERS) {
      const input = elements[name], valid = input.validity.valid;
      told(input, valid ? "" : `must be ${bounds.step === 1 ? "a whole number" : "a number"} from ${bounds.min} to ${bounds.max}`);
      if (valid && input.value !== "") found[name] = Number(input.value);
    }
    const think = elements.think.value;
    if (think === "on" || think === "off") found.think = think === "on";
    else if (think && think !== "budget") found.think = think;
    if (think === "budget") {
      const valid = elements.budget.value !== "" && elements.budget.validity.valid;
      told(elements.think, valid ? "" : "how many tokens at most?");
      if (valid) found.think = Number(elements.budget.value);
    }
    for (const [name, , , fits, words] of JSONS) {
      const input = elements[name];
      let value;
      try { value = input.value.trim() && JSON.parse(input.value); } catch (error) { told(input, error.message); continue; }
      told(input, value === "" || fits(value) ? "" : words);
      if (value !== "") found[name] = input.value;
    }
    wrong[0]?.focus();
    return wrong.length ? null : found;
  }

  close(event) {
    event?.preventDefault();
    const found = this.read();
    if (!found) return;
    if (this.keep.checked) remember("settings", found);
    this.dialog.close();
    this.changed(found);
  }
}

export function openSettings(settings, model, changed) {
  return new Panel(settings, model, changed);
}
