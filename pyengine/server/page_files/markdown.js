// Markdown as it streams: blocks that are whole are made once, only the last one is made anew. Code grows by its text, lists by their items
// and tables by their rows, so that the work for an answer grows with its length. Every text becomes a text node: there is no HTML.

import { copyButton, h } from "./dom.js";
import { inline } from "./inline.js";

const LONGEST = 6000;                    // characters of a block that is made anew
const DEEPEST = 12;                      // lists and quotes within each other

const FENCE = /^( {0,3})(`{3,}|~{3,})[ \t]*([^`\n]*)$/;
const HEADING = /^ {0,3}(#{1,6})(?:[ \t]+(.*))?$/;
const ITEM = /^( {0,3})([-*+]|\d{1,9}[.)])(?:([ \t]+)|$)/;
const QUOTE = /^ {0,3}>[ \t]?/;

const isBlank = (line) => line.trim() === "";
const isRule = (line) => /^ {0,3}([-*_])(?:[ \t]*\1){2,}[ \t]*$/.test(line.slice(0, 200));
const isBounds = (line) => line.length < 2000 && line.includes("-") && line.trim().replace(/^\||\|$/g, "").split("|").every((c) => /^:?-+:?$/.test(c.trim()));
const indent = (line) => line.length - line.trimStart().length;

function cells(line) {
  const found = line.trim().replace(/^\|/, "").split(/(?<!\\)\|/);
  if (found.length > 1 && isBlank(found.at(-1))) found.pop();
  return found.map((cell) => cell.trim().replaceAll("\\|", "|"));
}

function startsTable(line, next) {
  return line.includes("|") && next !== undefined && isBounds(next) && cells(line).length === cells(next).length;
}

function startsBlock(line, next) {
  return isBlank(line) || HEADING.test(line) || FENCE.test(line) || QUOTE.test(line) || isRule(line)
    || (ITEM.test(line) && !/^ {0,3}\d+[.)]/.test(line)) || /^ {0,3}1[.)][ \t]/.test(line) || startsTable(line, next);
}

// The end of a list that begins at a line, and where its items begin.
function listAt(lines, start) {
  const first = ITEM.exec(lines[start]), ordered = /\d/.test(first[2]), base = first[1].length, starts = [];
  let i = start;
  for (; i < lines.length; i += 1) {
    const line = lines[i];
    if (isBlank(line)) {
      let next = i + 1;
      while (next < lines.length && isBlank(lines[next])) next += 1;
      if (next === lines.length) return { end: lines.length, starts, ordered };
      const item = ITEM.exec(lines[next]);
      if (!(item && /\d/.test(item[2]) === ordered && !isRule(lines[next])) && indent(lines[next]) < base + 2) break;
      i = next - 1;
      continue;
    }
    const item = ITEM.exec(line);
    if (item && indent(line) < base + 2 && !isRule(line)) {
      if (/\d/.test(item[2]) !== ordered) break;
      starts.push(i);
    } else if (indent(line) < base + 2 && startsBlock(line, lines[i + 1])) break;
  }
  return { end: i, starts, ordered };
}

// Blocks as ranges of lines.
function blocks(lines) {
  const found = [];
  let i = 0;
  while (i < lines.length) {
    const line = lines[i], start = i;
    let match;
    if (isBlank(line)) { i += 1; continue; }
    if ((match = FENCE.exec(line))) {
      for (i += 1; i < lines.length && !closes(lines[i], match[2]); i += 1);
      const closed = i < lines.length;
      found.push({ kind: "code", start, end: closed ? i + 1 : i, fence: match[2], indent: match[1].length, language: match[3].trim(), closed });
      i = closed ? i + 1 : i;
    } else if ((match = HEADING.exec(line))) {
      found.push({ kind: "heading", start, end: ++i, level: match[1].length, text: (match[2] || "").replace(/[ \t]+#+[ \t]*$/, "") });
    } else if (isRule(line)) {
      found.push({ kind: "rule", start, end: ++i });
    } else if (QUOTE.test(line)) {
      while (i < lines.length && (QUOTE.test(lines[i]) || !startsBlock(lines[i], lines[i + 1]))) i += 1;
      found.push({ kind: "quote", start, end: i });
    } else if (ITEM.test(line)) {
      const list = listAt(lines, start);
      i = list.end;
      found.push({ kind: "list", start, ...list });
    } else if (startsTable(line, lines[i + 1])) {
      for (i += 2; i < lines.length && lines[i].includes("|"); i += 1);
      found.push({ kind: "table", start, end: i });
    } else {
      for (i += 1; i < lines.length && !startsBlock(lines[i], lines[i + 1]); i += 1);
      found.push({ kind: "paragraph", start, end: i });
    }
  }
  return found;
}

function closes(line, fence) {
  const text = line.trim();
  return text.length >= fence.length && indent(line) < 4 && text === fence[0].repeat(text.length);
}

function codeBox(language) {
  const code = h("code", {});
  const name = /^[\w+#.-]{1,30}/.exec(language)?.[0] || "";
  const box = h("div", { class: "code" },
    h("div", { class: "code-head" }, h("span", {}, name || "text"), copyButton("Copy this code", () => code.textContent)),
    h("pre", { tabindex: "0", role: "region", "aria-label": name ? `Code, ${name}` : "Code" }, code));
  return { box, code };
}

function itemOf(lines, depth) {
  const match = ITEM.exec(lines[0]);
  const width = match[1].length + match[2].length + (match[3] && match[3].length < 5 ? match[3].length : 1);
  const own = lines.map((line, i) => i === 0 ? line.slice(Math.min(width, line.length)) : line.slice(Math.min(indent(line), width)));
  const task = /^\[([ xX])\][ \t]/.exec(own[0]);
  if (task) own[0] = own[0].slice(4);
  const item = h("li", {});
  item.append(...rendered(own, depth + 1));
  const first = item.firstElementChild;
  if (first?.tagName === "P") first.replaceWith(...first.childNodes);          // one paragraph of an item is its text
  if (task) {
    item.className = "task";
    item.prepend(h("input", { type: "checkbox", disabled: true, checked: task[1] !== " ", "aria-label": task[1] === " " ? "open" : "done" }));
  }
  return item;
}

function row(line, bounds, tag) {
  const found = cells(line);
  return h("tr", {}, bounds.map((side, i) => h(tag, { class: side, scope: tag === "th" ? "col" : null }, inline(found[i] ?? ""))));
}

function tableOf(lines) {
  const bounds = cells(lines[1]).map((c) => c.endsWith(":") ? c.startsWith(":") ? "center" : "right" : null);
  const body = h("tbody", {}, lines.slice(2).map((line) => row(line, bounds, "td")));
  const box = h("div", { class: "table", tabindex: "0", role: "region", "aria-label": "Table" }, h("table", {}, h("thead", {}, row(lines[0], bounds, "th")), body));
  return { box, body, bounds };
}

function listOf(ordered, line) {
  const first = parseInt(ITEM.exec(line)[2], 10);
  return ordered ? h("ol", { start: first === 1 ? null : first }) : h("ul", {});
}

function element(block, lines, depth) {
  const own = lines.slice(block.start, block.end);
  if (block.kind === "heading") return h(`h${Math.min(6, block.level + 2)}`, {}, inline(block.text));      // below the page's own
  if (block.kind === "rule") return h("hr");
  if (block.kind === "table") return tableOf(own).box;
  if (block.kind === "code") {
    const { box, code } = codeBox(block.language);
    code.append(own.slice(1, block.closed ? -1 : undefined).map((l) => l.slice(Math.min(indent(l), block.indent))).join("\n"));
    return box;
  }
  if (depth < DEEPEST && block.kind === "quote") return h("blockquote", {}, rendered(own.map((l) => l.replace(QUOTE, "")), depth + 1));
  if (depth < DEEPEST && block.kind === "list") {
    const list = listOf(block.ordered, own[0]);
    block.starts.forEach((at, i) => list.append(itemOf(lines.slice(at, block.starts[i + 1] ?? block.end), depth)));
    return list;
  }
  return h("p", {}, inline(own.map((line) => line.trim()).join("\n").trim()));
}

function rendered(lines, depth) {
  return blocks(lines).map((block) => element(block, lines, depth));
}

export class Markdown {
  constructor(root) {
    this.root = root;
    this.rest = "";                      // what is not made for good
    this.open = null;                    // code, list or table that goes on
    this.passing = [];                   // nodes that the next call makes anew
  }

  // Take more of the text and show it.
  append(text) {
    const list = this.open?.list;
    this.rest += text;
    for (const node of this.passing.splice(0)) node.remove();
    if (this.open?.code) this.feedCode();
    if (this.open?.body) this.feedTable();
    if (!this.open?.code && !this.open?.body) this.feed();
    if (list && !list.firstChild) list.remove();                          // "-" became "---"
    if (this.rest.length > LONGEST && !this.open?.code) {                 // a block without an end: its beginning is left as it is
      this.passing = [];
      this.rest = "";
      if (!this.open?.body) this.open = null;
    }
  }

  feedCode() {
    const { code, fence, indent: width } = this.open;
    code.lastChild.deleteData(this.open.whole, code.lastChild.length);
    const lines = this.rest.split("\n");
    this.rest = lines.pop();
    while (lines.length) {
      const line = lines.shift();
      if (closes(line, fence)) {
        this.open = null;
        this.rest = [...lines, this.rest].join("\n");
        return;
      }
      const kept = (this.open.whole || this.open.begun ? "\n" : "") + line.slice(Math.min(indent(line), width));
      code.lastChild.appendData(kept);
      this.open.whole += kept.length;
      this.open.begun = true;
    }
    const fencing = this.rest && fence.startsWith(this.rest.trim());
    if (this.rest && !fencing && !closes(this.rest, fence)) code.lastChild.appendData((this.open.begun ? "\n" : "") + this.rest);
  }

  feedTable() {
    const lines = this.rest.split("\n"), { body, bounds } = this.open;
    this.rest = lines.pop();
    while (lines.length) {
      if (!lines[0].includes("|")) {
        this.open = null;
        this.rest = [...lines, this.rest].join("\n");
        return;
      }
      body.append(row(lines.shift(), bounds, "td"));
    }
    if (this.rest.includes("|")) this.show(body, row(this.rest, bounds, "td"));
    else for (const node of rendered([this.rest], 0)) this.show(this.root, node);
  }

  show(where, node) {
    where.append(node);
    this.passing.push(node);
  }

  feed() {
    const lines = this.rest.split("\n"), found = blocks(lines), last = found.pop(), whole = lines.length - 1;
    if (!last) {
      this.rest = lines.at(-1);                                           // blank lines before it say nothing
      return;
    }
    const unsure = last.start === whole || (last.kind === "table" && last.start + 1 === whole);
    if (unsure && found.length) {                                         // a line that still grows may yet belong to the block before
      const before = found.pop();
      for (const block of found) this.settle(block, lines);
      this.showPassing(before, lines);
      this.show(this.root, element(last, lines, 0));
      this.rest = lines.slice(before.start).join("\n");
      if (before.kind !== "list") this.open = null;
      return;
    }
    for (const block of found) this.settle(block, lines);
    if (last.kind === "code" && !last.closed && last.start < whole) {
      const { box, code } = codeBox(last.language);
      code.append("");
      this.root.append(box);
      this.open = { code, fence: last.fence, indent: last.indent, whole: 0, begun: false };
      this.rest = lines.slice(last.start + 1).join("\n");
      this.feedCode();
      if (!this.open) this.feed();
    } else if (last.kind === "table" && last.end >= lines.length) {
      const { box, body, bounds } = tableOf(lines.slice(last.start, last.start + 2));
      if (last.start + 1 >= whole) {                                      // its second line may still grow
        this.show(this.root, box);
        this.rest = lines.slice(last.start).join("\n");
        return;
      }
      this.root.append(box);
      this.open = { body, bounds };
      this.rest = lines.slice(last.start + 2).join("\n");
      this.feedTable();
      if (!this.open) this.feed();
    } else this.feedLast(last, lines);
  }

  showPassing(block, lines) {
    if (block.kind !== "list") {
      this.show(this.root, element(block, lines, 0));
      return;
    }
    const list = this.listFor(block, lines);
    block.starts.forEach((at, i) => this.show(list, itemOf(lines.slice(at, block.starts[i + 1] ?? block.end), 0)));
  }

  feedLast(last, lines) {
    let start = last.start;
    if (last.kind === "list") {
      const list = this.listFor(last, lines), whole = lines.length - 1;
      last.starts.forEach((at, i) => {
        const next = last.starts[i + 1], item = itemOf(lines.slice(at, next ?? last.end), 0);
        if (next !== undefined && next < whole) {
          list.append(item);
          start = next;
        } else this.show(list, item);
      });
    } else {
      this.open = null;
      this.show(this.root, element(last, lines, 0));
    }
    this.rest = lines.slice(start).join("\n");
  }

  listFor(block, lines) {
    if (this.open?.list && this.open.ordered === block.ordered) return this.open.list;
    const list = listOf(block.ordered, lines[block.start]);
    this.root.append(list);
    this.open = { list, ordered: block.ordered };
    return list;
  }

  settle(block, lines) {
    if (block.kind === "list") {
      const list = this.listFor(block, lines);
      block.starts.forEach((at, i) => list.append(itemOf(lines.slice(at, block.starts[i + 1] ?? block.end), 0)));
    } else this.root.append(element(block, lines, 0));
    this.open = null;
  }
}

export function renderMarkdown(root, text) {
  new Markdown(root).append(text);
}
