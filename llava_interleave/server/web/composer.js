// Sending a message, generating its answer, and editing a message as a new branch.

import * as api from "./api.js";
import { MARK, compose, mark, renderAttachments } from "./attachments.js";
import { renderChats } from "./chats.js";
import { render, renderMessage } from "./messages.js";
import { withUploads } from "./requests.js";
import { $, attempt, requestKey, showError, state } from "./state.js";
import * as store from "./store.js";

export async function send() {
  const text = $("text").value.trim();
  if (state.running || (!text && !state.attachments.length)) return;
  const parts = await attempt(() => compose(text));
  if (!parts) return;
  if (!parts.some((part) => part.type === "text" && part.text.trim())) {
    showError("write a question about the attachments");
    return;
  }
  showError();
  const question = store.add(state.chat, state.parent, "user", parts);
  state.chat.title ||= text.replace(MARK, "").trim().slice(0, 60);
  clear();
  await generate(question);
}

/** Generate an answer to a question, as a new branch. */
export async function generate(question) {
  const { chat } = state;
  const node = store.add(chat, question.id, "assistant", [{ type: "text", text: "" }]);
  const path = store.branch(chat, question.id);
  state.parent = node.id;
  state.running = new AbortController();
  render();
  await attempt(() => store.save(chat)); // the question survives if the page is closed now
  try {
    await withUploads(path, async (body) => {
      node.frames = body.frames;
      for await (const chunk of api.stream(body, state.running.signal)) {
        const choice = chunk.choices?.[0];
        if (choice?.delta?.content) node.parts[0].text += choice.delta.content;
        if (choice?.finish_reason) node.finish = choice.finish_reason;
        if (chunk.usage) node.usage = chunk.usage;
        if (chunk.timings) node.timings = chunk.timings;
        if (choice?.delta?.content) renderMessage(node);
      }
    });
  } catch (error) {
    node.error = error.name === "AbortError" ? "stopped" : error.message;
    if (error.status === 401) requestKey();
  } finally {
    state.running = null;
    await attempt(() => store.save(chat));
    render();
    renderChats();
  }
}

export function clear() {
  for (const item of state.attachments) URL.revokeObjectURL(item.url);
  state.attachments = [];
  $("text").value = "";
  state.parent = state.chat.leaf;
  renderAttachments();
}

export async function edit(node) {
  clear();
  showError();
  state.parent = node.parent;
  let text = "";
  for (const part of node.parts) {
    if (part.type === "text") {
      text += part.text;
      continue;
    }
    const blob = await store.file(part.key);
    if (!blob) {
      showError(`${part.name} is no longer in this browser and is left out; attach it again`);
      continue;
    }
    const url = URL.createObjectURL(blob);
    state.attachments.push({ key: part.key, kind: part.type, name: part.name, label: part.label ?? "", blob, url });
    text += mark(state.attachments.length - 1);
  }
  $("text").value = text;
  renderAttachments();
  $("text").focus();
}
