// The page: which conversation is shown, what is typed, and the answers that are on their way.

import { stream } from "./api.js";
import { brief, medium, mediumOf, partOf } from "./attach.js";
import * as tree from "./conversation.js";
import { byId, count, h, icon, newId, note, say, saveFile, svg } from "./dom.js";
import { isUsable, loadedModel, mostBytes, openPicker, refresh, usual } from "./models.js";
import { openSettings } from "./settings.js";
import { deleteConversation, listConversations, remember, remembered, saveConversation } from "./store.js";
import { listItem } from "./sidebar.js";
import { AnswerTurn, ToolTurn, UserTurn } from "./turn.js";

const NEAR = 80;                         // pixels from the end within which the end is followed
const SAVED_EVERY = 1000;                // milliseconds, while an answer grows
const SPOKEN = 600;                      // characters of an answer that a screen reader is told at once

const prompt = byId("prompt"), log = byId("log"), scroller = byId("scroll");
const touch = matchMedia("(pointer: coarse)");              // a keyboard on the screen: it comes only when the field is touched
const running = new Map();               // answers on their way, by their conversation's id
let conversations = [], current = null, attached = [], followed = true;

// -- what is shown --------------------------------------------------------------------------------------------------------

function showList() {
  byId("conversations").replaceChildren(...conversations.map((c) => listItem(c, c === current, {
    open: () => { open(c); closeSide(); prompt.focus(); }, rename, remove, save: exportOne })));
}

function showLog() {
  const nodes = tree.branch(current), live = running.get(current.id);
  log.replaceChildren();
  nodes.forEach((node, i) => {
    const turn = turnOf(node, live, i === nodes.length - 1);
    if (live?.node === node) live.turn = turn;
    log.append(turn.element);
  });
  showWelcome(!nodes.length);
  showState();
  followed = true;
  follow();
}

function turnOf(node, live, isLast) {
  const actions = { edit, retry, results, choose: (other) => { tree.choose(current, other); keep(current); showLog(); }, siblings: (n) => tree.siblings(current, n) };
  if (node.role === "user") return new UserTurn(node, actions);
  if (node.role === "tool") return new ToolTurn(node);
  return new AnswerTurn(node, actions, { live: live?.node === node, isLast });
}

function showWelcome(shown) {
  const model = loadedModel(current.model), box = byId("welcome");
  box.hidden = !shown;
  if (!shown) return;
  const facts = model ? [model.kind.parameter_size, model.kind.quantization_level, `context ${count(model.context)}`, model.pictures ? "sees pictures" : "text only"] : [];
  box.replaceChildren(h("img", { src: "page/icon.svg", alt: "", width: 52, height: 52 }), h("h2", {}, model ? "What would you like to know?" : "No model is chosen"),
    h("p", {}, model ? h("strong", {}, model.name) : "Choose one above.", model ? ` · ${facts.filter(Boolean).join(" · ")}` : ""),
    model?.pictures ? h("p", { class: "hint" }, "Drop, paste or add pictures and videos. Everything stays between this browser and the server.")
      : h("p", { class: "hint" }, "Everything stays between this browser and the server."));
}

// What stands around the messages: title, model, context, the button that sends or stops.
function showState() {
  const title = tree.titleOf(current), model = loadedModel(current.model), live = running.has(current.id), send = byId("send");
  byId("title").textContent = title;
  document.title = title === "New chat" ? "pyengine" : `${title} – pyengine`;
  byId("model-name").textContent = current.model || "Choose a model";
  byId("model").classList.toggle("gone", Boolean(current.model) && !isUsable(current.model));
  send.classList.toggle("stops", live);
  send.setAttribute("aria-label", live ? "Stop" : "Send");
  send.title = live ? "Stop (Escape)" : "Send (Enter)";
  send.replaceChildren(icon(live ? "stop" : "send"));
  byId("attach").disabled = Boolean(model) && !model.pictures;
  byId("attach").title = model && !model.pictures ? "This model takes text only" : "Add pictures or a video";
  showContext(model);
}

function showContext(model) {
  const used = tree.branch(current).findLast((n) => n.usage)?.usage.total_tokens, box = byId("context");
  box.hidden = !used || !model;
  if (box.hidden) return;
  const share = Math.min(1, used / model.context), around = 2 * Math.PI * 7;
  const ring = (name, length) => svg("circle", { cx: 10, cy: 10, r: 7, class: name, "stroke-dasharray": `${length} ${around}` });
  box.replaceChildren(svg("svg", { viewBox: "0 0 20 20", width: 20, height: 20, "aria-hidden": "true" }, ring("all", around), ring(share > 0.9 ? "used much" : "used", share * around)),
    h("span", { class: "long" }, `${count(used)} / ${count(model.context)}`));
  box.setAttribute("role", "img");
  box.setAttribute("aria-label", `Context: ${count(used)} of ${count(model.context)} tokens used`);
  box.title = box.getAttribute("aria-label");
}

function follow() {
  if (followed) scroller.scrollTop = scroller.scrollHeight;
}

scroller.addEventListener("scroll", () => {
  followed = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < NEAR;
  byId("latest").hidden = followed;
});
new ResizeObserver(follow).observe(log);                     // pictures that come later move the end
byId("latest").addEventListener("click", () => { followed = true; follow(); prompt.focus(); });

// -- conversations --------------------------------------------------------------------------------------------------------

function open(conversation) {
  current = conversation;
  history.replaceState(null, "", `#${conversation.id}`);
  showList();
  showLog();
}

function newChat() {
  const empty = conversations.find((c) => !c.leaf);
  if (!empty) conversations.unshift(tree.newConversation(usual(current?.model || remembered("model", "")), remembered("settings", {})));
  open(empty ?? conversations[0]);
}

async function keep(conversation) {
  if (!conversation.leaf) return;
  try {
    await saveConversation(conversation);
  } catch (error) {
    note(`The browser could not keep this conversation: ${error.message}`, true);
  }
}

function rename(conversation, title) {
  Object.assign(conversation, { title: title.trim(), named: Boolean(title.trim()) });
  keep(conversation);
  showList();
  showState();
}

async function remove(conversation) {
  running.get(conversation.id)?.controller.abort();
  conversations = conversations.filter((c) => c !== conversation);
  await deleteConversation(conversation);
  if (conversation === current) newChat();
  showList();
  byId("new-chat").focus();
  say("Deleted");
}

async function exported(conversation) {
  const media = {};
  for (const { id } of tree.mediaOf(Object.values(conversation.nodes))) if (await medium(id)) media[id] = await partOf(id);
  return { ...conversation, title: tree.titleOf(conversation), media };
}

const exportOne = async (c) => saveFile(`${tree.titleOf(c).replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 40) || "chat"}.json`, JSON.stringify({ format: "pyengine chat 1", conversations: [await exported(c)] }, null, 1));

byId("export-all").addEventListener("click", async () => {
  const all = [];
  for (const c of conversations) if (c.leaf) all.push(await exported(c));
  saveFile("pyengine-chats.json", JSON.stringify({ format: "pyengine chat 1", conversations: all }, null, 1));
});

// -- asking ---------------------------------------------------------------------------------------------------------------

async function ask(text, media) {
  if (!isUsable(current.model)) {
    await choose();
    return false;
  }
  const live = running.get(current.id);
  if (live) return false;
  tree.add(current, current.leaf, { role: "user", text, media: media.map(brief) });
  conversations = [current, ...conversations.filter((c) => c !== current)];
  await keep(current);
  showList();
  answer(current);
  return true;
}

// Let the model answer the branch that is shown. The answer grows in its conversation, which need not be the one that is looked at.
async function answer(conversation) {
  const nodes = tree.branch(conversation), controller = new AbortController();
  const node = tree.add(conversation, conversation.leaf, { role: "assistant", text: "", model: conversation.model, finish: null });
  const live = { node, controller, turn: null, saved: Date.now(), due: false, begun: performance.now() };
  running.set(conversation.id, live);
  if (conversation === current) showLog();
  say("The model is answering");
  try {
    for await (const event of stream(await tree.requestOf(conversation, nodes), controller.signal, mostBytes())) {
      const changed = tree.take(node, event);
      measure(live, changed);
      if (changed.size) paint(conversation, live);
    }
  } catch (error) {
    if (error.name === "AbortError") node.finish = "stopped";
    else Object.assign(node, { finish: "error", error: error.message });
  }
  const seen = tree.mediaOf(nodes);
  for (const box of node.boxes || []) box.medium = seen[box.image]?.id;
  if (node.calls) node.calls = node.calls.filter(Boolean);
  running.delete(conversation.id);
  await keep(conversation);
  if (!loadedModel(conversation.model)) await refresh().catch(() => {});       // it may have been loaded for this answer
  if (conversation === current) {
    live.turn?.finish();
    showState();
    follow();
  }
  tell(conversation, node);
}

function measure(live, changed) {
  const now = (performance.now() - live.begun) / 1000, { node } = live;
  if (changed.size && !node.firstSeconds) node.firstSeconds = now;
  if (changed.has("thinking")) live.thinkingSince ??= now;
  if (changed.has("text") && live.thinkingSince !== undefined) node.thinkSeconds ??= now - live.thinkingSince;
}

// Once a frame, whatever came meanwhile.
function paint(conversation, live) {
  if (live.due) return;
  live.due = true;
  const show = () => {
    if (!live.due) return;
    live.due = false;
    if (conversation === current) {
      live.turn?.grow();
      follow();
    }
    if (Date.now() - live.saved > SAVED_EVERY) {
      live.saved = Date.now();
      keep(conversation);
    }
  };
  requestAnimationFrame(show);
  setTimeout(show, 200);                 // a page in the background has no frames
}

function tell(conversation, node) {
  const where = conversation === current ? "" : `${tree.titleOf(conversation)}: `;
  if (node.error) say(`${where}${node.error}`);
  else if (node.calls?.length) say(`${where}The model calls ${node.calls.map((c) => c.name).join(", ")}`);
  else say(`${where}${node.finish === "stopped" ? "Stopped. " : ""}${node.text.slice(0, SPOKEN)}${node.text.length > SPOKEN ? "… The answer goes on." : ""}`);
}

function stop() {
  running.get(current.id)?.controller.abort();
}

function edit(node, text) {
  if (running.has(current.id)) stop();
  tree.add(current, node.parent, { role: "user", text, media: node.media || [] });
  keep(current);
  afterStop(() => answer(current));
}

function retry(node) {
  if (running.has(current.id)) stop();
  current.leaf = node.parent;
  afterStop(() => answer(current));
}

function results(node, texts) {
  tree.add(current, node.id, { role: "tool", results: node.calls.map((c, i) => ({ id: c.id, name: c.name, text: texts[i] })) });
  answer(current);
}

async function afterStop(action) {
  const conversation = current;
  while (running.has(conversation.id)) await new Promise((resolve) => setTimeout(resolve, 10));
  if (conversation === current) action();
  prompt.focus();
}

// -- the message that is written --------------------------------------------------------------------------------------------

function fitPrompt() {
  prompt.style.height = "auto";
  prompt.style.height = `${Math.min(prompt.scrollHeight, innerHeight * 0.4)}px`;
}

function showAttached() {
  const box = byId("attached");
  box.hidden = !attached.length;
  box.replaceChildren(...attached.map((m) => h("li", {}, h("img", { src: m.address, alt: m.name }), m.kind === "video" ? h("span", { class: "badge" }, icon("film"), String(m.frames.length)) : null,
    h("button", { type: "button", "aria-label": `Remove ${m.name}`, onclick: () => { attached = attached.filter((a) => a !== m); showAttached(); prompt.focus(); } }, icon("close")))));
}

async function attach(files) {
  const model = loadedModel(current.model);
  if (files.length && model && !model.pictures) {
    note(`${model.name} takes text only.`);
    return;
  }
  for (const file of files) {
    try {
      attached.push(await mediumOf(file));
      say(`${file.name || "Picture"} is added`);
    } catch (error) {
      note(error.message, true);
    }
    showAttached();
  }
  prompt.focus();
}

byId("composer").addEventListener("submit", async (event) => {
  event.preventDefault();
  if (!touch.matches) prompt.focus();
  if (running.has(current.id)) {
    stop();
    return;
  }
  const text = prompt.value.trim(), media = attached;
  if (!text && !media.length) return;
  prompt.value = "";
  attached = [];
  showAttached();
  fitPrompt();
  if (!(await ask(text, media))) {
    prompt.value = text;
    attached = media;
    showAttached();
    fitPrompt();
  }
});

prompt.addEventListener("input", fitPrompt);
prompt.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing && !touch.matches) {
    event.preventDefault();
    if (!running.has(current.id)) byId("composer").requestSubmit();
  }
  if (event.key === "ArrowUp" && !prompt.value && !running.has(current.id)) {
    const last = [...log.querySelectorAll(".turn.user [aria-label='Edit the message']")].at(-1);
    if (last) { event.preventDefault(); last.click(); }
  }
});

document.addEventListener("keydown", (event) => {
  if (document.querySelector("dialog[open]")) return;
  if (event.key === "Escape") {
    if (document.body.classList.contains("side")) closeSide();
    else if (running.has(current?.id)) { event.preventDefault(); stop(); prompt.focus(); }
  }
});

document.addEventListener("paste", (event) => {
  const files = [...(event.clipboardData?.files || [])];
  if (!files.length) return;
  event.preventDefault();
  attach(files);
});

let depth = 0;
const carries = (event) => [...(event.dataTransfer?.types || [])].includes("Files");
addEventListener("dragenter", (event) => { if (carries(event)) { depth += 1; byId("drop").hidden = false; } });
addEventListener("dragleave", (event) => { if (carries(event)) { depth = Math.max(0, depth - 1); byId("drop").hidden = depth === 0; } });
addEventListener("dragover", (event) => { if (carries(event)) event.preventDefault(); });
addEventListener("drop", (event) => {
  if (!carries(event)) return;
  event.preventDefault();
  depth = 0;
  byId("drop").hidden = true;
  attach([...event.dataTransfer.files]);
});
byId("attach").addEventListener("click", () => byId("files").click());
byId("files").addEventListener("change", () => { attach([...byId("files").files]); byId("files").value = ""; });

// -- panels ---------------------------------------------------------------------------------------------------------------

async function choose() {
  try {
    await openPicker(current.model, (name) => {
      current.model = name;
      remember("model", name);
      keep(current);
      showWelcome(!current.leaf);
      showState();
      prompt.focus();
    });
  } catch (error) {
    note(error.message, true);
  }
}

const narrow = matchMedia("(max-width: 860px)");

function openSide() {
  document.body.classList.add("side");
  byId("shade").hidden = false;
  fitSide();
  byId("side-close").focus();
}

function closeSide() {
  const was = document.body.classList.contains("side");
  document.body.classList.remove("side");
  byId("shade").hidden = true;
  fitSide();
  if (was) byId("side-open").focus();
}

// On a narrow screen the list lies over the page, and only one of the two can be reached.
function fitSide() {
  const shown = document.body.classList.contains("side");
  byId("side").inert = narrow.matches && !shown;
  byId("main").inert = narrow.matches && shown;
  byId("side-open").setAttribute("aria-expanded", String(shown));
}

const THEMES = { "": ["system", "As the system"], light: ["light", "Light"], dark: ["dark", "Dark"] };

function showTheme() {
  const now = document.documentElement.dataset.theme || "";
  byId("theme").replaceChildren(icon(THEMES[now][0]), h("span", {}, h("span", { class: "unseen" }, "Colours: "), THEMES[now][1]));
}

byId("theme").addEventListener("click", () => {
  const order = Object.keys(THEMES), next = order[(order.indexOf(document.documentElement.dataset.theme || "") + 1) % order.length];
  if (next) document.documentElement.dataset.theme = next;
  else delete document.documentElement.dataset.theme;
  try { localStorage.setItem("pyengine.theme", next); } catch { /* it lasts as long as this page */ }
  showTheme();
});

byId("model").addEventListener("click", choose);
byId("settings-open").addEventListener("click", () => openSettings(current.settings, current.model, (found) => { current.settings = found; keep(current); }));
byId("new-chat").addEventListener("click", () => { newChat(); closeSide(); prompt.focus(); });
byId("side-open").addEventListener("click", openSide);
byId("side-close").addEventListener("click", closeSide);
byId("shade").addEventListener("click", closeSide);
narrow.addEventListener("change", fitSide);

// -- beginning ------------------------------------------------------------------------------------------------------------

async function begin() {
  for (const [id, name] of [["side-open", "menu"], ["side-close", "close"], ["attach", "clip"], ["settings-open", "gear"], ["send", "send"]]) byId(id).append(icon(name));
  byId("new-chat").prepend(icon("plus"));
  byId("export-all").prepend(icon("save"));
  byId("latest").prepend(icon("down"));
  byId("model").append(icon("open"));
  showTheme();
  fitSide();
  try {
    await refresh();
  } catch (error) {
    note(error.message, true);
  }
  try {
    conversations = await listConversations();
  } catch (error) {
    note(`Conversations cannot be kept in this browser: ${error.message}`, true);
  }
  const asked = conversations.find((c) => `#${c.id}` === location.hash);
  if (asked) open(asked);
  else newChat();
  document.body.dataset.ready = newId();
  if (!touch.matches) prompt.focus();
}

begin();
