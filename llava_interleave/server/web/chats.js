// The list of chats: open, delete.

import { clear } from "./composer.js";
import { make } from "./dom.js";
import { render } from "./messages.js";
import { $, attempt, showError, state } from "./state.js";
import * as store from "./store.js";

export async function renderChats() {
  const chats = (await attempt(() => store.chats())) ?? [];
  $("chats").replaceChildren(
    ...chats.map((chat) => {
      const title = chat.title || "Untitled";
      const item = make(
        "li",
        {},
        make("button", { type: "button", className: "open", textContent: title, onclick: () => openChat(chat) }),
        make("button", { type: "button", className: "link", textContent: "✕", ariaLabel: `Delete the chat ${title}`, onclick: () => discard(chat) }),
      );
      if (chat.id === state.chat.id) item.setAttribute("aria-current", "true");
      return item;
    }),
  );
}

export function openChat(chat) {
  state.running?.abort();
  state.chat = chat;
  showError();
  clear();
  render();
  renderChats();
  document.body.classList.remove("menu");
}

async function discard(chat) {
  if (!confirm(`Delete “${chat.title || "Untitled"}”?`)) return;
  await attempt(() => store.remove(chat));
  if (chat.id === state.chat.id) openChat(store.create());
  else renderChats();
}
