// Elements, icons and numbers. Texts become text nodes; nothing here reads HTML.

const SVG = "http://www.w3.org/2000/svg";

// h("button", {class: "quiet", onclick: f, "aria-label": "Stop"}, icon("stop"), "Stop")
export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "value" || name === "checked" || name === "textContent") element[name] = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

export function svg(tag, attributes = {}, ...children) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

// Drawn on a grid of 20, lines of 1.6.
const ICONS = {
  menu: "M3.5 6h13M3.5 10h13M3.5 14h13",
  plus: "M10 4v12M4 10h12",
  close: "M5 5l10 10M15 5L5 15",
  send: "M10 16V4M5 9l5-5 5 5",
  stop: "M6 6h8v8H6z",
  clip: "M3.5 15.5l4-5 3 3.5 2.5-3 3.5 4.5M3.5 4.5h13v11h-13zM12.6 7.6h.01",
  gear: "M3 6h8M15 6h2M3 14h2M9 14h8M13 4v4M7 12v4",
  copy: "M7.5 7.5h9v9h-9zM12.5 4.5v-1h-9v9h1",
  check: "M4 10.5l4 4 8-9",
  retry: "M15.5 10a5.5 5.5 0 1 1-1.7-4M15.8 3v3.6h-3.6",
  edit: "M4 16l.8-3.4L13.6 3.8l2.6 2.6-8.8 8.8zM11.8 5.6l2.6 2.6",
  trash: "M4 6h12M8 6V4h4v2M5.5 6l.8 10.5h7.4L14.5 6",
  save: "M10 3.5v9M6 9l4 4 4-4M4 16.5h12",
  left: "M12 5l-5 5 5 5",
  right: "M8 5l5 5-5 5",
  down: "M10 4v12M5 11l5 5 5-5",
  open: "M5 8l5 5 5-5",
  light: "M10 6.8a3.2 3.2 0 1 1 0 6.4 3.2 3.2 0 0 1 0-6.4M10 2.5v1.4M10 16.1v1.4M2.5 10h1.4M16.1 10h1.4M4.7 4.7l1 1M14.3 14.3l1 1M4.7 15.3l1-1M14.3 5.7l1-1",
  dark: "M15.8 12.4A6.5 6.5 0 0 1 7.6 4.2a6.5 6.5 0 1 0 8.2 8.2",
  system: "M3.5 4.5h13v9h-13zM7.5 16.5h5M10 13.5v3",
  film: "M3.5 4.5h13v11h-13zM8.5 7.5v5l4-2.5z",
  tool: "M12.5 3.8a3.8 3.8 0 0 0-3.6 5L3.8 13.9l2.3 2.3 5.1-5.1a3.8 3.8 0 0 0 5-4.6l-2.4 2.3-2.1-.5-.5-2.1z",
  thought: "M10 3.5a6.5 6.5 0 1 1-3.6 11.9L3.5 16.5l1-3A6.5 6.5 0 0 1 10 3.5M7.4 10h.01M10 10h.01M12.6 10h.01",
};

export function icon(name) {
  const filled = name === "stop";
  return svg("svg", { viewBox: "0 0 20 20", width: "20", height: "20", "aria-hidden": "true", class: "icon" },
    svg("path", { d: ICONS[name], fill: filled ? "currentColor" : "none", stroke: "currentColor", "stroke-width": "1.6", "stroke-linecap": "round",
                  "stroke-linejoin": "round" }));
}

export function byId(id) {
  return document.getElementById(id);
}

// What a screen reader is told once the one before has been said: beginnings and ends, never a token.
export function say(text) {
  const said = byId("said");
  said.textContent = "";
  setTimeout(() => { said.textContent = text; }, 60);
}

// A note at the edge that goes by itself; errors stay until they are closed.
export function note(text, lasting = false) {
  const close = h("button", { type: "button", class: "quiet", "aria-label": "Close this note", onclick: () => box.remove() }, icon("close"));
  const box = h("div", { class: "note" }, h("span", {}, text), close);
  byId("notes").append(box);
  if (!lasting) setTimeout(() => box.remove(), 6000);
}

export async function copy(text) {
  if (navigator.clipboard) {
    await navigator.clipboard.writeText(text);
    return;
  }
  const area = h("textarea", { class: "unseen", value: text });        // pages without TLS have no clipboard of their own
  document.body.append(area);
  area.select();
  document.execCommand("copy");
  area.remove();
}

// A button that copies and says so.
export function copyButton(what, text, words = "") {
  const button = h("button", { type: "button", class: "quiet small", "aria-label": what, title: what }, icon("copy"), words);
  button.addEventListener("click", async () => {
    try {
      await copy(text());
    } catch {
      note("The browser did not let this page copy.");
      return;
    }
    button.firstChild.replaceWith(icon("check"));
    say("Copied");
    setTimeout(() => button.firstChild.replaceWith(icon("copy")), 1500);
  });
  return button;
}

export function saveFile(name, text) {
  const address = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  h("a", { href: address, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(address), 10000);
}

export function newId() {
  return Array.from(crypto.getRandomValues(new Uint8Array(12)), (n) => n.toString(16).padStart(2, "0")).join("");
}

export function bytes(n) {
  for (const [unit, size, digits] of [["GiB", 2 ** 30, 2], ["MiB", 2 ** 20, 1], ["KiB", 2 ** 10, 1]]) if (n >= size) return `${(n / size).toFixed(digits)} ${unit}`;
  return `${n} bytes`;
}

export function count(n) {
  return n.toLocaleString("en");
}

export function seconds(s) {
  return s < 10 ? `${s.toFixed(1)} s` : s < 90 ? `${Math.round(s)} s` : `${Math.floor(s / 60)} min ${Math.round(s % 60)} s`;
}

// A colour for each label, hues a golden angle apart, as `pyengine.chat.boxes.draw` has them.
export function colour(number) {
  return `hsl(${(number * 137.508) % 360} 85% ${number % 3 === 2 ? 38 : 45}%)`;
}
