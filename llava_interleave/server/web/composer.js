// The message being written: kept at every change, sent, and put aside while an earlier one is edited.

import { prepareSoon, ready } from "./ahead.js";
import { MARK, compose, firstNumber, renderAttachments } from "./attachments.js";
import { $, debounce } from "./dom.js";
import { elsewhere, generate } from "./generate.js";
import { render } from "./messages.js";
import { renderChats } from "./sidebar.js";
import { UNREACHABLE, attempt, emptyDraft, parentOf, running, showError, state } from "./state.js";
import * as store from "./store.js";
import { add, branch, randomId } from "./tree.js";

const saveSoon = debounce(async () => {
  await keepDraft();
  if (!state.chat.leaf) renderChats(); // it lists drafts
}, 200);

/** Save the draft now; `files`: new ones, [key, blob]. */
export async function keepDraft(draft = state.draft, files = []) {
  draft.changed = Date.now();
  await store.saveDraft(draft, files);
}

/** The draft has changed on the page. */
export function changed() {
  state.draft.text = $("text").value;
  saveSoon();
  fit();
  prepareSoon();
  renderMistake();
}

/** The text area grows with its text. */
function fit() {
  const area = $("text");
  area.style.height = "auto";
  area.style.height = `${area.scrollHeight + 2}px`;
}

let mistake = "";

/** Show what is wrong with the text's marks; take it back once it is mended. */
function renderMistake() {
  let found = "";
  try {
    compose(state.draft.text);
  } catch (error) {
    found = error.message;
  }
  if (found || mistake === $("error").textContent) showError(found);
  mistake = found;
}

/** Show the draft. */
export function renderDraft() {
  const { draft } = state;
  if ($("text").value !== draft.text) $("text").value = draft.text;
  $("editing").hidden = !draft.editing;
  renderAttachments();
  fit();
}

export const isBusy = () => branch(state.chat).some(({ id }) => running.has(id));

export async function send() {
  const { chat, draft } = state;
  const text = draft.text.trim();
  if (isBusy() || !ready() || (!text && !draft.attachments.length)) return;
  if (!state.online) return showError(`${UNREACHABLE}; the message is kept`);
  const parts = await attempt(() => compose(text));
  if (!parts) return;
  if (!parts.some((part) => part.text?.trim())) {
    showError("write a question about the attachments");
    $("text").focus();
    return;
  }
  const before = chat.nodes[parentOf() ?? ""];
  if (before && (await elsewhere(before))) return showError("another tab is still writing the last answer");
  showError();
  for (const part of parts) part.times = draft.attachments.find(({ key, start, end, frames }) => [key, start, end, frames].join() === [part.key, part.start, part.end, part.frames].join())?.times;
  const question = add(chat, parentOf(), "user", parts);
  chat.title ||= text.replace(MARK, "").replace(/\s+/g, " ").trim().slice(0, 60);
  setDraft(draft.stash ?? {});
  await generate(question);
}

/** Replace the message being written. @param {{text?: string, attachments?: import("./types").Attachment[]}} draft */
function setDraft({ text = "", attachments = [] }, more = {}) {
  state.draft = { ...emptyDraft(state.chat.id), text, attachments, ...more };
  renderDraft();
  render();
  attempt(() => keepDraft());
}

/** Edit a message as a new branch; what was being written is put aside until then. @param {import("./types").Message} node */
export async function edit(node) {
  const { text, attachments, stash } = state.draft;
  showError();
  const items = [];
  let written = "";
  const first = firstNumberOf(node);
  for (const part of node.parts) {
    if (part.type === "text") {
      written += part.text;
      continue;
    }
    const blob = await store.file(part.key);
    if (!blob) {
      showError(`${part.name} is no longer in this browser and is left out; attach it again`);
      continue;
    }
    items.push({ ...part, id: randomId(), time: node.made, bytes: blob.size });
    if (written) written += `[${part.type} ${first + items.length - 1}]`;
  }
  const editing = state.draft.editing ? stash : { text, attachments };
  setDraft({ text: written, attachments: /** @type {any} */ (items) }, { editing: node.id, stash: editing });
  $("text").focus();
}

function firstNumberOf(node) {
  const before = state.draft.editing;
  state.draft.editing = node.id;
  const first = firstNumber();
  state.draft.editing = before;
  return first;
}

export function cancelEdit() {
  if (!state.draft.editing) return;
  setDraft(state.draft.stash ?? {});
  renderChats();
  $("text").focus();
}
