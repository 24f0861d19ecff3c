// Boxes, points and polygons of an answer over the picture, in its own pixels: the drawing's coordinates are the picture's.

import { byId, colour, h, icon, svg } from "./dom.js";
import { medium } from "./attach.js";

function spoken(box) {
  const at = box.parts ? box.parts.flat(2) : "x" in box ? [box.x, box.y] : [box.x1, box.y1, box.x2, box.y2];
  return at.map((n) => Math.round(n)).join(", ");
}

function shapes(boxes, size) {
  const labels = [...new Set(boxes.map((b) => b.label))], dot = Math.max(size.width, size.height) / 90;
  return boxes.map((box) => {
    const stroke = colour(labels.indexOf(box.label)), common = { stroke, "vector-effect": "non-scaling-stroke", class: "box" };
    if (box.parts) {
      const outlines = box.parts.filter((part) => part.length).map((part) => `M${part.map((corner) => corner.join(" ")).join("L")}Z`);
      return svg("path", { d: outlines.join(""), fill: stroke, "fill-opacity": "0.15", ...common });
    }
    return "x" in box ? svg("circle", { cx: box.x, cy: box.y, r: dot, fill: stroke, ...common, stroke: "#fff" })
      : svg("rect", { x: Math.min(box.x1, box.x2), y: Math.min(box.y1, box.y2), width: Math.abs(box.x2 - box.x1), height: Math.abs(box.y2 - box.y1), fill: stroke, "fill-opacity": "0.08", ...common });
  });
}

function overlay(found, boxes) {
  return svg("svg", { viewBox: `0 0 ${found.width} ${found.height}`, preserveAspectRatio: "none", class: "overlay", "aria-hidden": "true" },
    ...shapes(boxes, found));
}

// The picture with its boxes, and their list: pointing at one of either marks the other.
export async function boxesFigure(boxes, id) {
  const found = await medium(id);
  const labels = [...new Set(boxes.map((b) => b.label))];
  const list = h("ol", { class: "labels" }, boxes.map((box, i) => h("li", {},
    h("button", { type: "button", "data-box": i, onfocus: () => mark(i), onblur: () => mark(-1), onmouseenter: () => mark(i), onmouseleave: () => mark(-1) },
      svg("svg", { viewBox: "0 0 10 10", width: "10", height: "10", "aria-hidden": "true" }, svg("rect", { width: 10, height: 10, rx: 2, fill: colour(labels.indexOf(box.label)) })),
      h("span", {}, box.label || (box.parts ? "region" : "x" in box ? "point" : "box")), h("span", { class: "numbers" }, spoken(box))))));
  const figure = h("figure", { class: "boxes" });
  function mark(i) {
    figure.classList.toggle("marking", i >= 0);
    figure.querySelectorAll(".box").forEach((shape, j) => shape.classList.toggle("marked", i === j));
    figure.querySelectorAll(".labels button").forEach((button, j) => button.classList.toggle("marked", i === j));
  }
  if (found) {
    const drawn = overlay(found, boxes);
    drawn.querySelectorAll(".box").forEach((shape, i) => {
      shape.addEventListener("mouseenter", () => mark(i));
      shape.addEventListener("mouseleave", () => mark(-1));
    });
    const button = h("button", { type: "button", class: "picture framed", "aria-label": `${found.name} with ${boxes.length} marked places, larger`, onclick: () => enlarge(found, boxes) },
      h("img", { src: found.address, alt: "", width: found.width, height: found.height }), drawn);
    sized(button, found, 420, 320);
    figure.append(button);
  }
  figure.append(h("figcaption", {}, list));
  return figure;
}

// As large as it is, or as there is room for; small ones are enlarged in whole steps, so that pixels stay sharp.
function sized(element, { width, height }, most, tall) {
  const fit = Math.min(most / width, tall / height), scale = fit >= 2 ? Math.min(3, Math.floor(fit)) : Math.min(1, fit);
  element.style.width = `${Math.round(width * scale)}px`;
  element.style.aspectRatio = `${width} / ${height}`;
  element.classList.toggle("pixels", scale > 1);
}

export function thumbnail(found) {
  const moving = found.kind === "video";
  const label = moving ? `${found.name}, a video, ${found.frames.length} frames of it` : `${found.name}, ${found.width} by ${found.height} pixels`;
  const button = h("button", { type: "button", class: "picture", "aria-label": `${label}, larger`, onclick: () => enlarge(found) },
    h("img", { src: found.address, alt: "", width: found.width, height: found.height }), moving ? h("span", { class: "badge" }, icon("film"), `${found.frames.length}`) : null);
  sized(button, found, 360, 220);
  return button;
}

// Show a picture as large as the window lets it; of a video all frames that the model sees.
export function enlarge(found, boxes = []) {
  const dialog = byId("view-dialog"), addresses = found.frames.map((f, i) => i === 0 ? found.address : URL.createObjectURL(f));
  const frames = addresses.map((src, i) => {
    const frame = h("div", { class: "frame" }, h("img", { src, alt: found.kind === "video" ? `Frame ${i + 1}` : found.name }), i === 0 && boxes.length ? overlay(found, boxes) : null);
    const room = found.frames.length > 1 ? 260 : Math.min(innerWidth - 48, 1400);
    sized(frame, found, room, innerHeight - 140);
    return frame;
  });
  dialog.replaceChildren(
    h("div", { class: "dialog-head" }, h("p", {}, `${found.name} · ${found.width} × ${found.height}`),
      h("button", { type: "button", class: "quiet", "aria-label": "Close", onclick: () => dialog.close() }, icon("close"))),
    h("div", { class: "frames" }, frames));
  dialog.addEventListener("close", () => addresses.slice(1).forEach((a) => URL.revokeObjectURL(a)), { once: true });
  dialog.showModal();
}
