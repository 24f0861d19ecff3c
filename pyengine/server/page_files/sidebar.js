// One conversation in the list: opened, renamed, saved to a file, deleted after a second word.

import { titleOf } from "./conversation.js";
import { h, icon } from "./dom.js";

export function listItem(conversation, isOpen, actions) {
  const item = h("li", { class: isOpen ? "open" : null });
  show();
  return item;

  function button(name, words, action) {
    return h("button", { type: "button", class: "quiet small", "aria-label": `${words}: ${titleOf(conversation)}`, title: words, onclick: action }, icon(name));
  }

  function show(focused = "") {
    const said = conversation.leaf ? [button("edit", "Rename", rename), button("save", "Export as JSON", () => actions.save(conversation)), button("trash", "Delete", sure)] : [];
    item.replaceChildren(h("button", { type: "button", class: "title", "aria-current": isOpen ? "page" : null, onclick: actions.open }, titleOf(conversation)),
      h("span", { class: "more" }, said));
    if (focused) item.querySelector(`[title="${focused}"]`)?.focus();
  }

  function rename() {
    const input = h("input", { type: "text", value: titleOf(conversation), maxlength: 120, "aria-label": "Title" });
    let done = false;
    const leave = (kept) => {
      if (done) return;
      done = true;
      if (kept) actions.rename(conversation, input.value);
      else show("Rename");
    };
    input.addEventListener("keydown", (event) => {
      if (event.key === "Enter") leave(true);
      if (event.key === "Escape") { event.stopPropagation(); leave(false); }
    });
    input.addEventListener("blur", () => leave(true));
    item.replaceChildren(input);
    input.focus();
    input.select();
  }

  function sure() {
    const yes = h("button", { type: "button", class: "danger", onclick: () => actions.remove(conversation) }, "Delete");
    const no = h("button", { type: "button", onclick: () => show("Delete") }, "Keep");
    item.replaceChildren(h("span", { class: "sure", role: "group", "aria-label": `Delete ${titleOf(conversation)}?` }, h("span", {}, "Delete it?"), yes, no));
    no.focus();
  }
}
