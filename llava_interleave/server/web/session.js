// Which chat is open: named by the URL, kept in step with other tabs.

import { keepDraft, renderDraft } from "./composer.js";
import { $, toast } from "./dom.js";
import { render } from "./messages.js";
import { renderChats } from "./sidebar.js";
import { attempt, emptyDraft, running, showError, state } from "./state.js";
import * as store from "./store.js";
import { branch, create, merge } from "./tree.js";

const idInUrl = () => location.hash.match(/^#([0-9a-f]{32})$/)?.[1];

/** Open a chat by its id; one that is not in this browser is a new one. */
export async function openChat(id, push = true) {
  const before = state.draft;
  await attempt(() => keepDraft());
  const job = [...running.values()].find(({ chat }) => chat.id === id); // the very object that is being written to
  state.chat = job?.chat ?? (await attempt(() => store.chat(id))) ?? { ...create(), id };
  state.draft = (await attempt(() => store.draft(id))) ?? emptyDraft(id);
  attempt(() => keepDraft(before)); // with what was typed meanwhile
  if (state.draft.editing && !state.chat.nodes[state.draft.editing]) state.draft.editing = null;
  if (idInUrl() !== id) history[push ? "pushState" : "replaceState"](null, "", `#${id}`);
  showError();
  document.body.classList.remove("menu");
  render();
  renderDraft();
  renderChats();
}

/** A new chat with the settings of this one. */
export async function newChat() {
  const { model, settings } = state.chat;
  const chat = create();
  await openChat(chat.id);
  Object.assign(state.chat, { model, settings });
  $("text").focus();
}

/** Follow the URL and the other tabs. */
export function follow() {
  addEventListener("popstate", () => idInUrl() && idInUrl() !== state.chat.id && openChat(idInUrl(), false));
  store.onChange(async (kind, id) => {
    renderChats();
    if (id !== state.chat.id) return;
    if (kind === "removed") {
      toast("This chat was deleted in another tab.");
      await newChat();
    } else if (kind === "draft") {
      const draft = await store.draft(id);
      if (document.hasFocus() || id !== state.chat.id) return; // here it is being written
      state.draft = draft ?? emptyDraft(id);
      renderDraft();
    } else await take(id);
  });
  addEventListener("pagehide", () => store.saveLast(state.draft));
}

/** What another tab has written in this chat. */
async function take(id) {
  const stored = await store.chat(id);
  const { chat } = state;
  if (!stored || chat.id !== id) return;
  const follows = branch(stored).some((node) => node.id === chat.leaf) || !chat.leaf;
  const leaf = follows ? stored.leaf : chat.leaf;
  Object.assign(chat, merge(stored, chat), { leaf }); // of equal ones this tab's, which an answer is being written to
  render(false);
  renderDraft();
}

/** The chat that the URL names, else a new one. */
export const start = () => openChat(idInUrl() || create().id, false);
