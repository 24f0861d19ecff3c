// Pictures and videos of a message: files made into what the server takes, and what the browser shows of them.

import { newId } from "./dom.js";
import { getMedium, saveMedium } from "./store.js";

const AS_THEY_ARE = new Set(["image/png", "image/jpeg", "image/webp", "image/gif"]);
const FRAMES_A_SECOND = 2;               // as Qwen2.5-VL samples them (arXiv:2502.13923, section 2.1.2)
const MOST_FRAMES = 32;
const FRAME_SIDE = 672;                  // pixels of a frame's longer side
const FRAME_MS = 2000;                   // for a frame to be shown after it was sought
const NO_FRAME_MS = 100;                 // for the same, where the browser does not tell
const known = new Map();                 // media by their ids, with an address to show each by

// Make a medium of a file and keep it. Throws Error with words for the reader.
export async function mediumOf(file) {
  const moving = file.type.startsWith("video/");
  if (!moving && !file.type.startsWith("image/")) throw new Error(`${file.name || "This"} is neither a picture nor a video.`);
  const made = moving ? await videoOf(file) : await pictureOf(file);
  const medium = { id: newId(), name: (file.name || (moving ? "video" : "picture")).slice(0, 200), ...made };
  await saveMedium(medium);
  return hold(medium);
}

async function pictureOf(file) {
  const image = new Image(), address = URL.createObjectURL(file);
  try {
    image.src = address;
    await image.decode();
    const size = { width: image.naturalWidth || 512, height: image.naturalHeight || 512 };
    if (AS_THEY_ARE.has(file.type)) return { kind: "image", ...size, frames: [new Blob([file], { type: file.type })] };
    return { kind: "image", ...size, frames: [await drawn(image, size.width, size.height, "image/png")] };
  } catch {
    throw new Error(`${file.name || "The picture"} cannot be read by this browser.`);
  } finally {
    URL.revokeObjectURL(address);
  }
}

function drawn(source, width, height, type) {
  const canvas = document.createElement("canvas");
  canvas.width = width;
  canvas.height = height;
  canvas.getContext("2d").drawImage(source, 0, 0, width, height);
  return new Promise((resolve, reject) => canvas.toBlob((blob) => blob ? resolve(blob) : reject(new Error("no picture")), type, 0.92));
}

function once(target, name, seconds) {
  return new Promise((resolve, reject) => {
    const late = setTimeout(() => reject(new Error(`no ${name}`)), seconds * 1000);
    target.addEventListener(name, () => { clearTimeout(late); resolve(); }, { once: true });
    target.addEventListener("error", () => { clearTimeout(late); reject(new Error("no video")); }, { once: true });
  });
}

// A promise of the next frame that a video shows (WICG's video.requestVideoFrameCallback). It is kept without one where none may come: browsers
// that do not tell of frames, pages that nobody sees, and times at which the same frame is shown.
function nextFrame(video) {
  const tells = "requestVideoFrameCallback" in video && !document.hidden;
  return new Promise((resolve) => {
    if (tells) video.requestVideoFrameCallback(resolve);
    setTimeout(resolve, tells ? FRAME_MS : NO_FRAME_MS);
  });
}

// Go to a time of a video, and wait until its frame can be drawn: `seeked` says that it was decoded, and it is shown a little later.
async function seek(video, time) {
  const shown = nextFrame(video);
  video.currentTime = time;
  await once(video, "seeked", 20);
  await shown;
}

// Two frames of each second, at most MOST_FRAMES of the whole, an even number since encoders take them in pairs.
async function videoOf(file) {
  const video = document.createElement("video"), address = URL.createObjectURL(file);
  try {
    video.muted = true;
    video.preload = "auto";
    const first = nextFrame(video);
    video.src = address;
    await once(video, "loadeddata", 20);
    await first;                                               // or else it might be taken for the one that is sought
    if (!Number.isFinite(video.duration)) {                    // recordings of a browser say no length until their end was looked for
      await seek(video, 1e9);
    }
    const length = Number.isFinite(video.duration) ? video.duration : video.currentTime;
    const n = Math.max(2, Math.min(MOST_FRAMES, Math.round(length * FRAMES_A_SECOND / 2) * 2));
    const scale = Math.min(1, FRAME_SIDE / Math.max(video.videoWidth, video.videoHeight));
    const width = Math.max(1, Math.round(video.videoWidth * scale)), height = Math.max(1, Math.round(video.videoHeight * scale)), frames = [];
    for (let i = 0; i < n; i += 1) {
      await seek(video, length * (i + 0.5) / n);
      frames.push(await drawn(video, width, height, "image/jpeg"));
    }
    return { kind: "video", width, height, frames, fps: n / length, seconds: length };
  } catch {
    throw new Error(`${file.name || "The video"} cannot be played by this browser, so no frames can be taken of it.`);
  } finally {
    video.removeAttribute("src");
    URL.revokeObjectURL(address);
  }
}

function hold(medium) {
  known.set(medium.id, { ...medium, address: URL.createObjectURL(medium.frames[0]) });
  return known.get(medium.id);
}

// A medium of a conversation, with the address of its picture or first frame; null if the browser has dropped it.
export async function medium(id) {
  if (!known.has(id)) {
    const found = await getMedium(id);
    if (!found) return null;
    hold(found);
  }
  return known.get(id);
}

// What a conversation keeps of a medium beside its messages.
export function brief({ id, kind, name, width, height, fps, seconds, frames }) {
  return { id, kind, name, width, height, ...(kind === "video" ? { fps, seconds, n: frames.length } : {}) };
}

function dataUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
}

// A part of a message's content, as /v1/chat/completions takes it.
export async function partOf(id) {
  const found = await medium(id);
  if (!found) throw new Error("A picture of this conversation is no longer in the browser's storage.");
  const urls = await Promise.all((found.urls ??= found.frames.map(dataUrl)));
  return found.kind === "video" ? { type: "video", video: urls, fps: found.fps } : { type: "image_url", image_url: { url: urls[0] } };
}
