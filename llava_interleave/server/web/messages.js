// The conversation: its messages, their figures and buttons, and the attribution of an answer.

import * as api from "./api.js";
import { attributionView } from "./attribution.js";
import { edit, generate } from "./composer.js";
import { make } from "./dom.js";
import { markdown } from "./markdown.js";
import { withUploads } from "./requests.js";
import { $, attempt, showError, state } from "./state.js";
import * as store from "./store.js";

const attributions = new WeakMap(); // message -> attribution of its answer, or AbortController of the request

const media = (node) => store.branch(state.chat, node.id).flatMap((one) => one.parts.filter((part) => part.key));
const duration = (seconds) => (seconds < 1 ? `${Math.round(seconds * 1000)} ms` : `${seconds.toFixed(1)} s`);
const button = (text, ariaLabel, onclick) => make("button", { type: "button", className: "link", textContent: text, ariaLabel, onclick });
const note = (textContent, className = "") => make("span", { textContent, className });

export function render() {
  $("messages").replaceChildren(...store.branch(state.chat).map(message));
  $("messages").scrollTop = $("messages").scrollHeight;
  $("messages").ariaBusy = Boolean(state.running); // a screen reader reads a finished answer
  $("title").textContent = state.chat.title || "New chat";
  $("stop").hidden = !state.running;
  $("send").hidden = Boolean(state.running);
}

/** Redraw one message, and stay at the end of the conversation. */
export function renderMessage(node) {
  const list = $("messages");
  const atEnd = list.scrollHeight - list.scrollTop - list.clientHeight < 80;
  $(`m-${node.id}`)?.replaceWith(message(node));
  if (atEnd) list.scrollTop = list.scrollHeight;
}

function message(node) {
  const item = make("li", { className: node.role, id: `m-${node.id}` });
  item.append(make("span", { className: "hidden", textContent: node.role === "user" ? "You:" : "Answer:" }));
  const content = make("div", { className: "content" });
  for (const part of node.parts) {
    content.append(part.type !== "text" ? mediaView(part) : node.role === "user" ? part.text : markdown(part.text));
  }
  if (!content.textContent && !content.children.length && state.running) content.append("…");
  item.append(content, footer(node));
  renderAttribution(node, item);
  return item;
}

function mediaView(part) {
  const box = make("span", { className: "media" });
  store.file(part.key).then((blob) => {
    if (!blob) {
      box.textContent = `${part.name} (no longer in this browser)`;
      return;
    }
    const src = URL.createObjectURL(blob);
    if (part.type === "video" && blob.type !== "image/gif") box.prepend(make("video", { src, controls: true, muted: true }));
    else box.prepend(make("img", { src, alt: part.label || part.name, onload: () => URL.revokeObjectURL(src) }));
  });
  if (part.label) box.append(note(part.label));
  return box;
}

/** Speed, tokens and buttons below a message. */
function footer(node) {
  const line = make("div", { className: "meta" });
  const { usage, timings } = node;
  if (timings?.first_token != null) line.append(note(`first token ${duration(timings.first_token)}`));
  if (timings?.tokens_per_second) line.append(note(`${Math.round(timings.tokens_per_second)} tokens/s`));
  if (usage) line.append(note(`${usage.prompt_tokens} prompt tokens, ${usage.prompt_tokens_details?.cached_tokens ?? 0} cached`));
  if (node.finish === "length") line.append(note("cut off at the token limit"));
  if (node.error) line.append(note(node.error, "error"));
  if (state.running) return line;
  branchButtons(node, line);
  if (node.role === "user") line.append(button("Edit", "Edit this message as a new branch", () => edit(node)));
  else line.append(button("Retry", "Answer again as a new branch", () => generate(state.chat.nodes[node.parent])));
  if (node.role === "assistant" && node.parts[0].text && media(node).length) {
    const attribute = button("Which image?", "Which image this answer used", () => toggleAttribution(node));
    attribute.classList.add("attribute");
    line.append(attribute);
  }
  return line;
}

function branchButtons(node, line) {
  const siblings = store.siblings(state.chat, node);
  if (siblings.length < 2) return;
  const at = siblings.indexOf(node);
  const go = (to) => async () => {
    store.show(state.chat, siblings[to]);
    state.parent = state.chat.leaf;
    render();
    await attempt(() => store.save(state.chat));
  };
  if (at > 0) line.append(button("‹", "The previous version", go(at - 1)));
  line.append(note(`${at + 1} of ${siblings.length}`));
  if (at < siblings.length - 1) line.append(button("›", "The next version", go(at + 1)));
}

/** Request and show which image an answer used; or hide it, or cancel the request. */
async function toggleAttribution(node) {
  showError();
  const current = attributions.get(node);
  attributions.delete(node);
  current?.abort?.();
  if (!current) {
    const request = new AbortController();
    attributions.set(node, request);
    renderAttribution(node);
    const result = await attempt(() => withUploads(store.branch(state.chat, node.id), (body) => fetchAttribution(node, body, request.signal)));
    if (attributions.get(node) !== request) return;
    if (result) attributions.set(node, result);
    else attributions.delete(node);
  }
  renderAttribution(node);
}

async function fetchAttribution(node, requestBody, signal) {
  const body = { ...requestBody, frames: node.frames ?? requestBody.frames };
  const question = { ...body, messages: body.messages.slice(0, -1) };
  const [{ images }, { parts }] = await Promise.all([api.attribution(body, signal), api.count(question, signal)]);
  return { images: images.map((image, index) => ({ ...image, times: parts[index + 1].times })) };
}

function renderAttribution(node, item = $(`m-${node.id}`)) {
  const toggle = item?.querySelector(".attribute");
  if (!toggle) return;
  const current = attributions.get(node);
  toggle.ariaExpanded = Boolean(current?.images);
  toggle.textContent = current && !current.images ? "Computing…" : "Which image?";
  item.querySelector(".attribution")?.remove();
  if (current?.images) item.append(attributionView(current, media(node)));
}
