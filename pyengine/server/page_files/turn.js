// One message as it is shown: what was asked, an answer that grows, results of tools.

import { medium } from "./attach.js";
import { boxesFigure, thumbnail } from "./boxes.js";
import { copyButton, count, h, icon, seconds } from "./dom.js";
import { Markdown } from "./markdown.js";

const RATED = 16;                        // tokens from which on their number a second says something
const ENDS = { length: "cut off: the most tokens, or the context, are reached", stopped: "stopped", cancelled: "stopped" };

function button(name, words, action) {
  return h("button", { type: "button", class: "quiet small", "aria-label": words, title: words, onclick: action }, icon(name));
}

// Which of several versions is shown.
function versions(all, node, choose) {
  if (all.length < 2) return null;
  const at = all.indexOf(node);
  return h("span", { class: "versions", role: "group", "aria-label": "Versions" },
    h("button", { type: "button", class: "quiet small", "aria-label": "Version before", disabled: at === 0, onclick: () => choose(all[at - 1]) }, icon("left")),
    h("span", {}, `${at + 1} / ${all.length}`),
    h("button", { type: "button", class: "quiet small", "aria-label": "Version after", disabled: at === all.length - 1, onclick: () => choose(all[at + 1]) }, icon("right")));
}

// actions: edit(node, text), retry(node), choose(node), siblings(node)
export class UserTurn {
  constructor(node, actions) {
    Object.assign(this, { node, actions });
    this.body = h("div", { class: "said" });
    this.element = h("article", { class: "turn user", "aria-label": "You", tabindex: "-1" }, this.body);
    this.show();
  }

  show() {
    const { node, actions } = this;
    this.media = h("div", { class: "media" });
    for (const { id, name } of node.media || []) {
      const place = h("span", { class: "picture missing" }, name);
      this.media.append(place);
      medium(id).then((found) => { if (found) place.replaceWith(thumbnail(found)); });
    }
    this.body.replaceChildren(this.media, ...(node.text ? [h("p", { class: "text" }, node.text)] : []),
      h("div", { class: "foot" }, versions(actions.siblings(node), node, actions.choose), copyButton("Copy the message", () => node.text),
        button("edit", "Edit the message", () => this.edit())));
  }

  edit() {
    const area = h("textarea", { rows: Math.min(12, this.node.text.split("\n").length + 1), "aria-label": "The message", value: this.node.text });
    const leave = () => { this.show(); this.body.querySelector("[aria-label='Edit the message']").focus(); };
    const form = h("form", { class: "editing", onsubmit: (event) => { event.preventDefault(); this.actions.edit(this.node, area.value); } }, area,
      h("div", { class: "actions" }, h("button", { type: "button", onclick: leave }, "Leave as it was"), h("button", { type: "submit", class: "main" }, "Send")));
    area.addEventListener("keydown", (event) => {
      if (event.key === "Escape") { event.stopPropagation(); leave(); }
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); form.requestSubmit(); }
    });
    this.body.replaceChildren(this.media, form);
    area.focus();
  }
}

export class AnswerTurn {
  // actions as of UserTurn, and results(node, texts): texts by calls; isLast: nothing follows
  constructor(node, actions, { live, isLast }) {
    Object.assign(this, { node, actions, isLast, shown: { text: 0, thinking: 0 }, due: false });
    this.body = h("div", { class: "prose" });
    this.after = h("div", { class: "after" });
    this.foot = h("div", { class: "foot" });
    this.element = h("article", { class: "turn answer", "aria-label": `Answer of ${node.model}`, tabindex: "-1" }, this.body, this.after, this.foot);
    this.text = new Markdown(this.body);
    if (live) this.wait();
    this.grow();
    if (!live) this.finish();
  }

  wait() {
    this.element.setAttribute("aria-busy", "true");
    this.waiting = h("div", { class: "waiting", "aria-hidden": "true" }, h("i"), h("i"), h("i"));
    this.foot.before(this.waiting);
  }

  // Show what has come since the last time; called once a frame, however many tokens have come.
  grow() {
    const { node, shown } = this;
    if ((node.thinking || "").length > shown.thinking) this.think(node.thinking.slice(shown.thinking));
    if (node.text.length > shown.text) {
      this.text.append(node.text.slice(shown.text));
      shown.text = node.text.length;
      this.thought();
    }
    if (node.calls?.length) this.calls();
  }

  think(text) {
    if (!this.thoughts) {
      const inner = h("div", { class: "prose" });
      this.summary = h("span", {}, "Thinking…");
      this.fold = h("details", { class: "thinking" }, h("summary", {}, icon("thought"), this.summary, icon("open")), inner);
      this.body.before(this.fold);
      this.thoughts = new Markdown(inner);
    }
    this.thoughts.append(text);
    this.shown.thinking += text.length;
  }

  thought() {
    if (this.summary) this.summary.textContent = this.node.thinkSeconds ? `Thought for ${seconds(this.node.thinkSeconds)}` : "Thought";
  }

  calls() {
    this.cards ??= [];
    this.node.calls.forEach((call, i) => {
      if (!call) return;
      if (!this.cards[i]) {
        const name = h("strong", {}), code = h("code", {});
        this.cards[i] = { name, code, box: h("section", { class: "call", "aria-label": "Tool call" }, h("div", { class: "call-head" }, icon("tool"), name), h("pre", { tabindex: "0", role: "region", "aria-label": "Arguments" }, code)) };
        this.after.append(this.cards[i].box);
      }
      this.cards[i].name.textContent = call.name;
      this.cards[i].code.textContent = this.element.hasAttribute("aria-busy") ? call.arguments : pretty(call.arguments);
    });
  }

  // The answer is whole, or was ended.
  finish() {
    const { node, actions } = this;
    this.element.removeAttribute("aria-busy");
    this.waiting?.remove();
    this.grow();
    this.thought();
    if (node.boxes?.length) this.showBoxes();
    if (this.isLast && node.calls?.length) this.after.append(this.resultsForm());
    const ended = node.finish ? ENDS[node.finish] : "interrupted";
    if (node.error) this.after.append(h("p", { class: "wrong error", role: "alert" }, node.error));
    else if (ended) this.after.append(h("p", { class: "hint" }, ended));
    this.foot.replaceChildren(...[versions(actions.siblings(node), node, actions.choose), node.text ? copyButton("Copy the answer", () => node.text) : null,
      button("retry", "Ask again", () => actions.retry(node)), h("span", { class: "stats" }, statsOf(node))].filter(Boolean));
  }

  showBoxes() {
    const groups = Map.groupBy ? Map.groupBy(this.node.boxes, (b) => b.medium) : new Map([[this.node.boxes[0].medium, this.node.boxes]]);
    for (const [id, boxes] of groups) boxesFigure(boxes, id).then((figure) => this.after.prepend(figure));
  }

  resultsForm() {
    const areas = this.node.calls.map((call) => h("textarea", { rows: 2, "aria-label": `Result of ${call.name}`, placeholder: `What ${call.name} returned` }));
    const give = (skipped) => this.actions.results(this.node, areas.map((area) => skipped || !area.value.trim() ? "The user skipped this call: there is no result." : area.value));
    return h("form", { class: "results", onsubmit: (event) => { event.preventDefault(); give(false); } }, areas,
      h("div", { class: "actions" }, h("button", { type: "button", onclick: () => give(true) }, "Skip"), h("button", { type: "submit", class: "main" }, "Send the results")));
  }
}

function pretty(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text;
  }
}

export class ToolTurn {
  constructor(node) {
    this.element = h("article", { class: "turn tool", "aria-label": "Results of tools" }, node.results.map((result) =>
      h("details", { class: "call" }, h("summary", { class: "call-head" }, icon("tool"), h("span", {}, "Result of ", h("strong", {}, result.name)), icon("open")), h("pre", { tabindex: "0" }, result.text))));
  }
}

function rate(n) {
  return n < 100 ? n.toFixed(1) : count(Math.round(n));
}

// "42 tokens · 31.2 a second · first after 0.4 s · 1,200 of 1,250 tokens of the prompt were there already"
export function statsOf(node) {
  const { usage, timings } = node;
  if (!usage) return "";
  const n = usage.completion_tokens, time = timings?.generation_seconds, cached = usage.prompt_tokens_details?.cached_tokens;
  const thought = usage.completion_tokens_details?.reasoning_tokens;
  return [`${count(n)} token${n === 1 ? "" : "s"}`, thought ? `${count(thought)} of thinking` : "", n >= RATED && time > 0 ? `${rate((n - 1) / time)} tokens/s` : "",
    node.firstSeconds ? `first after ${seconds(node.firstSeconds)}` : "", cached ? `${count(cached)} of ${count(usage.prompt_tokens)} reused` : ""].filter(Boolean).join(" · ");
}
