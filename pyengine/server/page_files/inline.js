// What stands in a line of Markdown: code, links, emphasis. Each character is looked at a bounded number of times, whatever the text is.

import { h } from "./dom.js";

const DEEPEST = 16;                      // emphasis within emphasis
const PUNCTUATION = /[!-/:-@[-`{-~]/;
const TARGET = /\(\s{0,9}(?:<([^<>\n]{0,2000})>|([^\s()<>]{0,2000}(?:\([^\s()<>]{0,500}\)[^\s()<>]{0,500}){0,9}))(?:\s{1,9}(?:"[^"]{0,300}"|'[^']{0,300}'))?\s{0,9}\)/y;
const ADDRESS = /https?:\/\/[^\s<>"`]{1,2000}/y;
const ENTITY = /&(amp|lt|gt|quot|nbsp|#39);/y;
const ENTITIES = { amp: "&", lt: "<", gt: ">", quot: '"', nbsp: "\u00a0", "#39": "'" };
const PLAIN = /[^\\`*_~[\]!<&h\n]+/y;

// A link to another place, or null for what is none: only these schemes are followed.
function link(address) {
  return /^(https?:\/\/|mailto:)/i.test(address)
    ? h("a", { href: address, target: "_blank", rel: "noopener noreferrer nofollow" }) : null;
}

function runsOfBackticks(text) {
  const runs = new Map();
  for (const match of text.matchAll(/`+/g)) {
    const n = match[0].length;
    if (!runs.has(n)) runs.set(n, { at: 0, starts: [] });
    runs.get(n).starts.push(match.index);
  }
  return runs;
}

class Inline {
  constructor(text) {
    this.text = text;
    this.at = 0;
    this.parts = [];                     // texts, elements, {mark, n, opens, closes}, {bracket}
    this.brackets = [];                  // where in `parts` they are
    this.runs = runsOfBackticks(text);
  }

  match(pattern) {
    pattern.lastIndex = this.at;
    return pattern.exec(this.text);
  }

  plain(text) {
    this.parts.push(text);
    this.at += text.length;
  }

  parse() {
    const { text } = this;
    while (this.at < text.length) {
      const c = text[this.at];
      if (c === "\\") this.escape();
      else if (c === "`") this.code();
      else if (c === "*" || c === "_" || c === "~") this.mark(c);
      else if (c === "[" || c === "!" && text[this.at + 1] === "[") this.bracket(c);
      else if (c === "]") this.close();
      else if (c === "\n") { this.parts.push(h("br")); this.at += 1; }
      else if (c === "<" || c === "h") this.address(c);
      else if (c === "&") this.entity();
      else this.plain(this.match(PLAIN)?.[0] ?? c);
    }
    return flat(emphasize(this.parts));
  }

  escape() {
    const next = this.text[this.at + 1];
    const escaped = next !== undefined && PUNCTUATION.test(next);
    this.parts.push(escaped ? next : "\\");
    this.at += escaped ? 2 : 1;
  }

  code() {
    const n = this.match(/`+/y)[0].length, run = this.runs.get(n), start = this.at + n;
    while (run && run.at < run.starts.length && run.starts[run.at] < start) run.at += 1;          // none: one was escaped
    const end = run?.starts[run.at];
    if (end === undefined) {
      this.plain("`".repeat(n));
      return;
    }
    let inner = this.text.slice(start, end).replaceAll("\n", " ");
    if (inner.length > 2 && inner.startsWith(" ") && inner.endsWith(" ")) inner = inner.slice(1, -1);
    this.parts.push(h("code", {}, inner));
    this.at = end + n;
  }

  // Emphasis opens before a word and closes behind one; within a word only * does (CommonMark 0.31, 6.2).
  mark(c) {
    let n = 1;
    while (this.text[this.at + n] === c) n += 1;
    const before = this.text[this.at - 1] ?? " ", after = this.text[this.at + n] ?? " ";
    const blank = (x) => /\s/.test(x), point = (x) => PUNCTUATION.test(x);
    const left = !blank(after) && (!point(after) || blank(before) || point(before));
    const right = !blank(before) && (!point(before) || blank(after) || point(after));
    const word = c === "_";
    if (c === "~" && n !== 2) this.parts.push(c.repeat(n));
    else this.parts.push({ mark: c, n, opens: left && (!word || !right || point(before)), closes: right && (!word || !left || point(after)) });
    this.at += n;
  }

  bracket(c) {
    const text = c === "!" ? "![" : "[";
    this.brackets.push(this.parts.length);
    this.parts.push({ bracket: text });
    this.at += text.length;
  }

  close() {
    this.at += 1;
    const start = this.brackets.pop();
    const found = start !== undefined && this.text[this.at] === "(" ? this.match(TARGET) : null;
    const element = found && link(found[1] ?? found[2] ?? "");
    if (!element) {
      this.parts.push("]");
      return;
    }
    this.at += found[0].length;
    const inner = flat(emphasize(this.parts.splice(start).slice(1)));
    element.append(...inner);
    for (const nested of element.querySelectorAll("a")) nested.replaceWith(...nested.childNodes);
    if (!element.textContent) element.append(element.href);          // a picture elsewhere is not fetched: its address is shown
    this.parts.push(element);
  }

  address(c) {
    const angle = c === "<";
    if (angle) this.at += 1;
    const found = /\w/.test(this.text[this.at - 1] ?? " ") ? null : this.match(ADDRESS);
    if (!found) {
      if (angle) this.parts.push("<");
      else this.plain("h");
      return;
    }
    let address = found[0];
    if (!angle) {
      address = address.replace(/[.,;:!?'*_~]+$/, "");
      if (address.endsWith(")") && !address.includes("(")) address = address.slice(0, -1);
      if (address.endsWith("]")) address = address.slice(0, -1);
    }
    const element = link(address);
    element.append(address);
    this.parts.push(element);
    this.at += address.length;
    if (angle && this.text[this.at] === ">") this.at += 1;
    else if (angle) this.parts.splice(-1, 0, "<");
  }

  entity() {
    const found = this.match(ENTITY);
    this.parts.push(found ? ENTITIES[found[1]] : "&");
    this.at += found ? found[0].length : 1;
  }
}

// Join marks to pairs: each closes the nearest opener of its kind, and what stands between becomes one element.
function emphasize(parts) {
  const depths = new Map(), out = [], openers = { "*": [], _: [], "~": [] };
  for (const part of parts) {
    if (part.mark === undefined) {
      out.push(part);
      continue;
    }
    let left = part.n;
    const own = openers[part.mark];
    while (part.closes && left > 0 && own.length) {
      const at = own.at(-1), opener = out[at];
      const inner = 1 + Math.max(0, ...out.slice(at + 1).map((p) => depths.get(p) || 0));
      if (inner > DEEPEST) break;
      const n = Math.min(2, left, opener.n);
      const element = h(part.mark === "~" ? "del" : n === 2 ? "strong" : "em", {}, flat(out.splice(at + 1)));
      depths.set(element, inner);
      for (const stack of Object.values(openers)) while (stack.length && stack.at(-1) > at) stack.pop();
      opener.n -= n;
      left -= n;
      if (opener.n === 0) {
        own.pop();
        out.pop();
      }
      out.push(element);
    }
    if (left === 0) continue;
    if (part.opens) own.push(out.length);
    out.push({ ...part, n: left });
  }
  return out;
}

function flat(parts) {
  return parts.map((p) => p.mark !== undefined ? p.mark.repeat(p.n) : p.bracket ?? p);
}

// The nodes of a text with its marks.
export function inline(text) {
  return new Inline(text).parse();
}
