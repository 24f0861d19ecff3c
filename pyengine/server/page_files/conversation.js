// A conversation: messages as a tree, since editing one or asking again keeps what was there; and the request that a branch of it makes.

import { partOf } from "./attach.js";
import { newId } from "./dom.js";

const TITLE = 60;

export function newConversation(model, settings) {
  const now = Date.now();
  return { id: newId(), title: "", named: false, created: now, updated: now, model, settings: { ...settings }, leaf: null, nodes: {} };
}

// Add a message behind another and make it the end of what is shown.
export function add(conversation, parent, message) {
  const node = { id: newId(), parent, at: Date.now(), ...message };
  conversation.nodes[node.id] = node;
  conversation.leaf = node.id;
  conversation.updated = Date.now();
  return node;
}

// The messages from the first one to the end that is shown.
export function branch(conversation, end = conversation.leaf) {
  const found = [];
  for (let node = conversation.nodes[end]; node; node = conversation.nodes[node.parent]) found.unshift(node);
  return found;
}

export function siblings(conversation, node) {
  return Object.values(conversation.nodes).filter((n) => n.parent === node.parent).sort((a, b) => a.at - b.at);
}

// Show another version of a message, with what was last said behind it.
export function choose(conversation, node) {
  let end = node;
  for (;;) {
    const after = Object.values(conversation.nodes).filter((n) => n.parent === end.id).sort((a, b) => a.at - b.at);
    if (!after.length) break;
    end = after.at(-1);
  }
  conversation.leaf = end.id;
}

export function titleOf(conversation) {
  if (conversation.title) return conversation.title;
  const first = Object.values(conversation.nodes).find((n) => n.role === "user");
  const text = (first?.text || first?.media?.[0]?.name || "").trim().replace(/\s+/g, " ");
  return text.length > TITLE ? `${text.slice(0, TITLE - 1)}…` : text || "New chat";
}

async function messageOf(node) {
  if (node.role === "user") {
    if (!node.media?.length) return { role: "user", content: node.text };
    const parts = await Promise.all(node.media.map((m) => partOf(m.id)));
    return { role: "user", content: [...parts, ...(node.text ? [{ type: "text", text: node.text }] : [])] };
  }
  const message = { role: "assistant", content: node.text };
  if (node.calls?.length) {
    message.tool_calls = node.calls.map((c) => ({ id: c.id, type: "function", function: { name: c.name, arguments: c.arguments } }));
    if (!node.text) message.content = null;
  }
  return message;
}

// The media that the model sees, in its order: boxes of an answer name them by number.
export function mediaOf(nodes) {
  return nodes.flatMap((node) => node.role === "user" ? node.media || [] : []);
}

// What is asked: only what was set is sent, so that everything else is the model's own.
export async function requestOf(conversation, nodes) {
  const { settings } = conversation, messages = [];
  if (settings.system) messages.push({ role: "system", content: settings.system });
  for (const node of nodes) {
    if (node.role === "tool") messages.push(...node.results.map((r) => ({ role: "tool", tool_call_id: r.id, name: r.name, content: r.text })));
    else messages.push(await messageOf(node));
  }
  const body = { model: conversation.model, messages, stream: true, stream_options: { include_usage: true } };
  for (const name of ["temperature", "top_k", "top_p", "min_p", "repeat_penalty", "top_n_sigma", "xtc_probability", "dynatemp_range", "dry_multiplier", "max_tokens", "seed"]) {
    if (settings[name] !== undefined) body[name] = settings[name];
  }
  if (settings.think !== undefined) body.think = settings.think;
  if (settings.schema) body.response_format = { type: "json_schema", json_schema: { name: "answer", schema: JSON.parse(settings.schema) } };
  if (settings.tools) body.tools = JSON.parse(settings.tools);
  return body;
}

// Take one event of the stream into the message of the answer. Returns what changed: "text", "thinking", "calls", "end".
export function take(node, event) {
  const changed = new Set();
  const choice = event.choices?.[0];
  if (event.usage) node.usage = event.usage;
  if (event.timings) node.timings = event.timings;
  if (!choice) return changed;
  const delta = choice.delta || {};
  if (delta.reasoning_content) {
    node.thinking = (node.thinking || "") + delta.reasoning_content;
    changed.add("thinking");
  }
  if (delta.content) {
    node.text += delta.content;
    changed.add("text");
  }
  for (const part of delta.tool_calls || []) {
    node.calls ??= [];
    const call = (node.calls[part.index ?? 0] ??= { id: "", name: "", arguments: "" });
    if (part.id) call.id = part.id;
    if (part.function?.name) call.name = part.function.name;
    if (part.function?.arguments) call.arguments += part.function.arguments;
    changed.add("calls");
  }
  if (delta.boxes || delta.polygons) node.boxes = [...(delta.boxes || []), ...(delta.polygons || [])];
  if (choice.finish_reason) {
    node.finish = choice.finish_reason;
    changed.add("end");
  }
  return changed;
}
