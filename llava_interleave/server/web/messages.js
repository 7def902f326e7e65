// The conversation: its messages with numbered images, what became of an answer, and what can be done with it.

import { allMedia } from "./attachments.js";
import { attributionOf } from "./attribution.js";
import { linkCitations, marked } from "./citations.js";
import { edit, isBusy, renderDraft } from "./composer.js";
import { $, announce, button, make, plural, reconcile } from "./dom.js";
import { generate, resume } from "./generate.js";
import { markdown } from "./markdown.js";
import { tile } from "./media.js";
import { attempt, running, state } from "./state.js";
import * as store from "./store.js";
import { branch, mediaOf, show, siblings, textOf } from "./tree.js";
import { openViewer } from "./viewer.js";
import { renderWelcome } from "./welcome.js";

const SHOWN = 24; // images of a message before "show all"
const NAMES = /\b(image|picture|photo|video|view)s? (\d+)\b/gi;

/** @type {Set<string>} messages that show all their images */
const expanded = new Set();

export const duration = (seconds) => (seconds < 1 ? `${Math.round(seconds * 1000)} ms` : `${seconds.toFixed(1)} s`);
const note = (textContent, className = "") => make("span", { textContent, className });

/** @param {boolean} [toEnd] scroll to the end */
export function render(toEnd = true) {
  const { chat } = state;
  const nodes = branch(chat);
  renderWelcome(!nodes.length);
  reconcile($("messages"), nodes, (node) => node.id, versionOf, message);
  if (toEnd) $("scroll").scrollTop = nodes.length ? $("scroll").scrollHeight : 0;
  renderBusy();
  $("title").textContent = chat.title || "New chat";
  document.title = chat.title ? `${chat.title} · LLaVA-Interleave` : "LLaVA-Interleave";
}

function renderBusy() {
  const busy = isBusy();
  $("messages").ariaBusy = busy; // a screen reader reads a finished answer
  $("stop").hidden = !busy;
  $("send").hidden = busy;
}

function versionOf(node) {
  const around = siblings(state.chat, node);
  return [node.changed, running.has(node.id), isBusy(), around.indexOf(node), around.length, expanded.has(node.id), state.draft.editing === node.id].join();
}

/** Redraw one message, and stay at the end of the conversation. @param {import("./types").Message} node */
export function renderMessage(node) {
  if (!state.chat.nodes[node.id]) return;
  const box = $("scroll");
  const atEnd = box.scrollHeight - box.scrollTop - box.clientHeight < 80;
  if ($(`m-${node.id}`) && isBusy() === ($("stop").hidden === false)) {
    const item = $(`m-${node.id}`);
    const fresh = message(node);
    Object.assign(fresh.dataset, { key: node.id, version: versionOf(node) });
    item.replaceWith(fresh);
  } else render(false);
  if (atEnd) box.scrollTop = box.scrollHeight;
}

/** Only the words about the progress of an answer. @param {import("./types").Message} node */
export function renderStatus(node) {
  const job = running.get(node.id);
  const line = $(`m-${node.id}`)?.querySelector(".status");
  if (!line || !job) return;
  const seconds = Math.round((performance.now() - job.since) / 1000);
  line.textContent = `${job.phase}${seconds > 0 ? ` · ${seconds} s` : ""}`;
}

setInterval(() => running.forEach(({ chat }, id) => chat === state.chat && renderStatus(chat.nodes[id])), 1000);

function numberBefore(node) {
  return mediaOf(branch(state.chat, node.parent)).length;
}

/** Images that can be enlarged: those of the conversation, then those attached. */
const conversationMedia = () => (state.draft.editing ? mediaOf(branch(state.chat)) : allMedia());

/** @param {import("./types").Message} node */
function message(node) {
  const item = make("li", { className: `message ${node.role}`, id: `m-${node.id}` });
  if (state.draft.editing === node.id) item.classList.add("edited");
  item.append(make("h2", { className: "hidden", textContent: node.role === "user" ? "You" : "Answer" }));
  const content = make("div", { className: "content" });
  contentOf(node, content);
  linkNumbers(content);
  linkCitations(content, (number) => openViewer(mediaOf(branch(state.chat, node.id)), number - 1));
  content.querySelectorAll("pre").forEach(addCopy);
  item.append(content);
  if (running.has(node.id)) {
    item.append(make("p", { className: "status" }));
    queueMicrotask(() => renderStatus(node));
  } else if (node.role === "assistant") outcome(node, item);
  item.append(footer(node, item));
  return item;
}

function contentOf(node, content) {
  let number = numberBefore(node);
  let tiles = null;
  for (const part of node.parts) {
    if (part.key) {
      number += 1;
      if (!tiles) content.append((tiles = make("div", { className: "tiles" })));
      if (tiles.children.length < SHOWN || expanded.has(node.id)) tiles.append(tile(part, number, conversationMedia));
    } else {
      tiles = null;
      content.append(node.role === "user" ? make("p", { textContent: part.text.trim() }) : markdown(marked(part.text, node.citations)));
    }
  }
  const count = mediaOf([node]).length;
  if (count <= SHOWN) return;
  const all = expanded.has(node.id);
  content.querySelector(".tiles").after(
    button(all ? "Show fewer" : `Show all ${count} images`, () => {
      if (all) expanded.delete(node.id);
      else expanded.add(node.id);
      render(false);
    }),
  );
}

/** "image 3" in a text enlarges that image. */
function linkNumbers(content) {
  const count = mediaOf(branch(state.chat)).length;
  const walker = document.createTreeWalker(content, NodeFilter.SHOW_TEXT);
  const texts = [];
  while (walker.nextNode()) if (!walker.currentNode.parentElement?.closest("pre, code, a, button, .math")) texts.push(walker.currentNode);
  for (const text of texts) {
    const value = text.nodeValue ?? "";
    const pieces = [];
    let end = 0;
    for (const match of value.matchAll(NAMES)) {
      const number = +match[2];
      if (number < 1 || number > count) continue;
      pieces.push(value.slice(end, match.index), button(match[0], () => openViewer(conversationMedia(), number - 1), { className: "reference", title: `Enlarge image ${number}` }));
      end = match.index + match[0].length;
    }
    if (pieces.length) /** @type {ChildNode} */ (text).replaceWith(...pieces, value.slice(end));
  }
}

function addCopy(pre) {
  const language = pre.querySelector("code")?.className.match(/language-([\w+#-]+)/)?.[1] ?? "";
  const box = make("div", { className: "code" }, make("div", { className: "row" }, note(language), button("Copy", () => copy(pre.textContent), { label: "Copy this code" })));
  pre.tabIndex = 0; // scrolls by keyboard
  pre.replaceWith(box);
  box.append(pre);
}

export async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const area = make("textarea", { value: text }); // a page over plain http
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  announce("Copied.");
}

/** Why an answer ended before its end, and the way on. */
function outcome(node, item) {
  if (node.finish === "stop") return;
  const box = make("div", { className: "broken", hidden: true });
  const why =
    node.finish === "length" ? "Cut off at the length limit." : node.stopped ? "You stopped this answer." : node.error ? `This answer broke off: ${node.error}.` : "This answer broke off when the page was closed.";
  box.append(note(why.replace("..", ".")));
  linkNumbers(box);
  if (textOf(node)) box.append(button("Continue", () => resume(node), { className: "quiet", label: "Continue this answer", disabled: isBusy() }));
  else box.append(button("Try again", () => resume(node), { className: "quiet", disabled: isBusy() }));
  item.append(box);
  const reveal = () => (box.hidden = false);
  if (node.finish || node.stopped || node.error || !navigator.locks) return reveal();
  // Another tab may be writing it: its lock is free once it has ended, or its tab is closed.
  navigator.locks.request(node.id, { mode: "shared" }, () => {
    const now = state.chat.nodes[node.id];
    if (now && !now.finish && !running.has(node.id)) reveal();
  });
  return undefined;
}

/** Speed, tokens and buttons below a message. */
function footer(node, item) {
  const line = make("div", { className: "meta" });
  const { usage, timings } = node;
  if (running.has(node.id)) return line;
  branchButtons(node, line);
  const act = (text, label, run) => line.append(button(text, run, { label, disabled: isBusy() && text !== "Copy" }));
  act("Copy", node.role === "user" ? "Copy this message" : "Copy this answer", () => copy(textOf(node).trim()));
  if (node.role === "user") act("Edit", "Edit this message as a new branch", () => edit(node));
  else act("Retry", "Answer again as a new branch", () => generate(state.chat.nodes[node.parent]));
  if (node.role === "assistant" && textOf(node) && mediaOf(branch(state.chat, node.id)).length) {
    line.append(attributionOf(node, item));
  }
  const facts = [];
  if (timings?.first_token != null) facts.push(`first token ${duration(timings.first_token)}`);
  if (timings?.tokens_per_second) facts.push(`${Math.round(timings.tokens_per_second)} tokens/s`);
  if (usage) facts.push(`${plural(usage.prompt_tokens, "prompt token")}, ${usage.prompt_tokens_details?.cached_tokens ?? 0} cached`);
  if (facts.length) line.append(note(facts.join(" · "), "facts"));
  return line;
}

function branchButtons(node, line) {
  const around = siblings(state.chat, node);
  if (around.length < 2) return;
  const at = around.indexOf(node);
  const go = (to) => async () => {
    show(state.chat, around[to]);
    render(false);
    renderDraft();
    await attempt(() => store.save(state.chat));
  };
  line.append(
    button("", go(at - 1), { label: "The previous version", symbol: "left", disabled: at === 0 || isBusy() }),
    note(`${at + 1} of ${around.length}`),
    button("", go(at + 1), { label: "The next version", symbol: "right", disabled: at === around.length - 1 || isBusy() }),
  );
}
