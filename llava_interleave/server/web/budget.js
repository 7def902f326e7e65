// The token budget of the message being written, as the server counts it.

import * as api from "./api.js";
import { compose, updateFrameTimes } from "./attachments.js";
import { withUploads } from "./requests.js";
import { $, attempt, showError, state } from "./state.js";
import * as store from "./store.js";

const DELAY = 250; // milliseconds after the last change

let counting = null; // AbortController
let timer = 0;
let lastError = ""; // of counting: only that one is cleared when counting succeeds

export function refreshBudget() {
  clearTimeout(timer);
  counting?.abort();
  timer = setTimeout(async () => {
    if (!state.attachments.length && !$("text").value.trim()) {
      $("budget").hidden = true;
      $("send").disabled = false;
      settle(true);
      return;
    }
    counting = new AbortController();
    const { signal } = counting;
    const success = await attempt(() => count(signal));
    if (!signal.aborted) settle(success);
  }, DELAY);
}

async function count(signal) {
  const pending = { role: "user", parts: compose($("text").value) };
  const estimate = await withUploads([...store.branch(state.chat, state.parent), pending], (body) => api.count(body, signal));
  if (signal.aborted) return false;
  updateFrameTimes(estimate.parts);
  const { left, total, context } = estimate;
  const megabytes = (estimate.kv_bytes + estimate.feature_bytes) / 1e6;
  const number = (value) => value.toLocaleString();
  $("budget").hidden = false;
  $("budget").classList.toggle("over", left < 1);
  $("budget-bar").value = Math.min(1, total / context);
  $("budget-text").textContent =
    left < 1
      ? `${number(total)} tokens exceed the context of ${number(context)}: use fewer images or frames`
      : `${number(total)} of ${number(context)} tokens, ${megabytes < 10 ? megabytes.toFixed(1) : Math.round(megabytes)} MB`;
  $("send").disabled = left < 1;
  return true;
}

function settle(success) {
  if (!success) lastError = $("error").textContent;
  else if (lastError && $("error").textContent === lastError) showError();
}
