// The list of chats: search, pin, rename, share, delete.

import { $, button, icon, make, reconcile, toast } from "./dom.js";
import { newChat, openChat } from "./session.js";
import { shareChat } from "./share.js";
import { attempt, running, state } from "./state.js";
import * as store from "./store.js";
import { textOf } from "./tree.js";

let query = "";
let opened = ""; // the chat whose actions are shown
let renaming = "";

export function search(text) {
  query = text.trim().toLowerCase();
  renderChats();
}

const found = ({ title, nodes }) => !query || `${title} ${Object.values(nodes).map(textOf).join(" ")}`.toLowerCase().includes(query);

/** Chats, and drafts whose chat has no message yet. */
async function listed() {
  const chats = await store.chats();
  const known = new Set(chats.map(({ id }) => id));
  const drafts = (await store.drafts()).filter(({ id }) => !known.has(id));
  const unsent = drafts.map(({ id, text, attachments }) => ({ id, title: `Draft: ${text.trim().slice(0, 40) || `${attachments.length} files`}`, nodes: {}, draft: true }));
  return [...unsent, ...chats].filter(/** @type {any} */ (found));
}

export async function renderChats() {
  const chats = (await attempt(listed)) ?? [];
  const busy = new Set([...running.values()].map(({ chat }) => chat.id));
  const version = (chat) => JSON.stringify([chat.title, chat.pinned, chat.id === state.chat.id, chat.id === opened, chat.id === renaming, busy.has(chat.id)]);
  reconcile($("chats"), chats, ({ id }) => id, version, (chat) => entry(chat, busy.has(chat.id)));
  $("nothing").hidden = Boolean(chats.length);
  $("nothing").textContent = query ? "No chat has these words." : "Your chats will be listed here. They stay in this browser.";
}

function entry(chat, busy) {
  const title = chat.title || "Untitled";
  const item = make("li", {});
  if (chat.id === state.chat.id) item.setAttribute("aria-current", "true");
  if (chat.id === renaming) {
    item.append(renameForm(chat));
    return item;
  }
  const open = button(title, () => openChat(chat.id), { className: "open", title });
  if (chat.pinned) open.prepend(icon("pin"));
  if (busy) open.append(make("span", { className: "dot", title: "An answer is being written" }));
  const more = button("", () => ((opened = opened === chat.id ? "" : chat.id), renderChats()), { label: `Actions for ${title}`, symbol: "more" });
  more.ariaExpanded = String(opened === chat.id);
  item.append(make("div", { className: "row" }, open, more));
  if (opened === chat.id) item.append(actions(chat, title));
  return item;
}

function actions(chat, title) {
  const act = (text, label, run) =>
    button(text, () => {
      opened = "";
      run();
      renderChats();
    }, { label });
  const remove = act("Delete", `Delete the chat ${title}`, () => discard(chat));
  if (chat.draft) return make("div", { className: "actions" }, remove);
  return make(
    "div",
    { className: "actions" },
    act("Rename", `Rename the chat ${title}`, () => (renaming = chat.id)),
    act(chat.pinned ? "Unpin" : "Pin", `${chat.pinned ? "Unpin" : "Pin"} the chat ${title}`, () => change(chat.id, { pinned: !chat.pinned })),
    act("Share", `Share the chat ${title} as a web page`, () => attempt(() => shareChat(chat.id))),
    remove,
  );
}

function renameForm(chat) {
  const input = make("input", { value: chat.title, ariaLabel: "Title of the chat", maxLength: 120 });
  const end = (keep) => {
    if (renaming !== chat.id) return;
    renaming = "";
    if (keep && input.value.trim()) change(chat.id, { title: input.value.trim() });
    else renderChats();
  };
  input.onblur = () => end(true);
  input.onkeydown = (event) => {
    if (event.key !== "Enter" && event.key !== "Escape") return;
    event.preventDefault();
    event.stopPropagation();
    end(event.key === "Enter");
  };
  queueMicrotask(() => setTimeout(() => (input.focus(), input.select())));
  return input;
}

async function change(id, fields) {
  const chat = id === state.chat.id ? state.chat : await store.chat(id);
  if (!chat) return;
  Object.assign(chat, fields);
  await attempt(() => store.save(chat));
  $("title").textContent = state.chat.title || "New chat";
  renderChats();
}

async function discard(chat) {
  running.forEach((job) => job.chat.id === chat.id && job.controller.abort());
  const undo = await attempt(() => store.remove(chat.id));
  if (!undo) return;
  if (chat.id === state.chat.id) await newChat();
  renderChats();
  toast(`Deleted “${chat.title || "Untitled"}”.`, "Undo", async () => {
    await attempt(undo);
    await openChat(chat.id);
  });
}
