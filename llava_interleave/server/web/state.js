// State that the modules of the page share, and how an error is shown.

import * as store from "./store.js";

export const $ = (id) => document.getElementById(id);

export const state = {
  chat: store.create(),
  attachments: [], // {key, kind, name, label, blob, url, times}
  parent: null, // the message that the next one follows; not the leaf while a message is edited
  running: null, // AbortController of the answer being generated
};

export function showError(text) {
  $("error").textContent = text ?? "";
  $("error").hidden = !text;
}

/** Run an action and show its error; undefined if it failed. */
export async function attempt(action) {
  try {
    return await action();
  } catch (error) {
    if (error.name === "AbortError") return undefined;
    if (error.status === 401) requestKey();
    showError(error.message);
    return undefined;
  }
}

export function requestKey() {
  if (!$("key-dialog").open) $("key-dialog").showModal();
}
