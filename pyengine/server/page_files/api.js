// The server: requests with the key of this session, and answers as they stream.

import { byId, bytes, h } from "./dom.js";

const KEY = "pyengine.key";

export class ServerError extends Error {
  constructor(message, status = 0, type = "") {
    super(message);
    this.status = status;
    this.type = type;
  }
}

function key() {
  return sessionStorage.getItem(KEY) || "";
}

let asking = null;

// Ask for the key, once for all requests that wait for it. Resolves to whether one was given.
function askKey(refused) {
  asking ??= new Promise((resolve) => {
    const dialog = byId("key-dialog");
    const input = h("input", { type: "password", id: "key", autocomplete: "off", required: true });
    let given = false;
    const form = h("form", { method: "dialog" },
      h("h2", { id: "key-title" }, "This server asks for a key"),
      h("p", {}, "It was started with --api-key. The key is kept until this tab is closed."),
      refused ? h("p", { class: "wrong", role: "alert" }, "The server does not know that key.") : null,
      h("label", { for: "key" }, "API key"), input,
      h("div", { class: "actions" }, h("button", { type: "submit", class: "main" }, "Continue")));
    form.addEventListener("submit", () => {
      given = true;
      sessionStorage.setItem(KEY, input.value.trim());
    });
    dialog.replaceChildren(form);
    dialog.addEventListener("close", () => { asking = null; resolve(given); }, { once: true });
    dialog.showModal();
    input.focus();
  });
  return asking;
}

async function send(path, options) {
  for (;;) {
    const sent = key();
    const headers = { ...(options.body ? { "Content-Type": "application/json" } : {}), ...(sent ? { Authorization: `Bearer ${sent}` } : {}) };
    let response;
    try {
      response = await fetch(path, { ...options, headers });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ServerError("The server does not answer. Is it still running?");
    }
    if (response.status !== 401) return response;
    if (key() === sent && !(await askKey(Boolean(sent)))) throw new ServerError("This server asks for a key.", 401, "authentication_error");
  }
}

async function failure(response) {
  let said = "";
  try {
    said = (await response.json()).error;
  } catch { /* not in OpenAI's form */ }
  return new ServerError(said?.message || `The server answered ${response.status} ${response.statusText}`, response.status, said?.type || "");
}

export async function getJson(path) {
  const response = await send(path, { method: "GET" });
  if (!response.ok) throw await failure(response);
  return response.json();
}

// Ask for an answer and give each event of its stream. Throws AbortError when it is stopped, ServerError for what the server refuses.
export async function* stream(body, signal, most = Infinity) {
  const text = JSON.stringify(body);
  if (text.length > most) {              // a server that refuses a body hangs up before it has come, and its words are lost
    throw new ServerError(`This conversation with its pictures has ${bytes(text.length)}; the server takes ${bytes(most)} at once. Begin a new chat with fewer of them.`);
  }
  const response = await send("v1/chat/completions", { method: "POST", body: text, signal });
  if (!response.ok) throw await failure(response);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "", whole = false;
  for (;;) {
    const { value, done } = await reader.read();
    if (done) break;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const text = line.slice(5).trim();
      if (text === "[DONE]") {
        whole = true;
        continue;
      }
      const event = JSON.parse(text);
      if (event.error) throw new ServerError(event.error.message, 200, event.error.type);
      yield event;
    }
  }
  if (!whole) throw new ServerError("The connection ended before the answer did.");
}
