// Export and import of chats: as JSON with all files, or one chat as a web page that can be imported, too.

import { make, plural, toast } from "./dom.js";
import { markdown } from "./markdown.js";
import * as store from "./store.js";
import { branch } from "./tree.js";

const FORMAT = "llava-interleave";
const STYLE = `:root{color-scheme:light dark}body{font:16px/1.55 system-ui,sans-serif;max-width:48rem;margin:2rem auto;padding:0 1rem}
img,video{max-width:14rem;max-height:12rem;border-radius:8px}figure{display:inline-block;margin:0 .5rem .5rem 0}figcaption{font-size:.8rem;opacity:.75}
.user{background:light-dark(#eaf0fd,#263149);border-radius:12px;padding:.6rem 1rem;margin:1.5rem 0 1rem}.user p{white-space:pre-wrap}body{overflow-wrap:break-word}pre{overflow:auto;border:1px solid #8886;border-radius:8px;padding:.6rem}
table{border-collapse:collapse}td,th{border:1px solid #8886;padding:.2rem .6rem}.katex-html{display:none}.cut{opacity:.75}footer{opacity:.7;font-size:.8rem;margin-top:2rem}`;

/** @param {Blob} blob @returns {Promise<string>} */
function dataUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(String(reader.result));
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
}

function download(text, type, name) {
  const url = URL.createObjectURL(new Blob([text], { type }));
  make("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

async function filesOf(chats) {
  const files = {};
  for (const key of new Set(chats.flatMap(store.keysOf))) {
    const blob = await store.file(key);
    if (blob) files[key] = await dataUrl(blob);
  }
  return files;
}

/** Every chat as one JSON file. */
export async function exportChats() {
  const chats = await store.chats();
  if (!chats.length) throw new Error("there are no chats to export yet");
  download(JSON.stringify({ format: FORMAT, version: 1, chats, files: await filesOf(chats) }), "application/json", "llava-interleave-chats.json");
}

/** The branch that a chat shows, as one web page without scripts. */
export async function shareChat(id) {
  const chat = await store.chat(id);
  if (!chat) throw new Error("this chat has no messages yet");
  const nodes = branch(chat);
  const only = { ...chat, nodes: Object.fromEntries(nodes.map((node) => [node.id, node])) };
  const files = await filesOf([only]);
  const page = document.implementation.createHTMLDocument(chat.title);
  page.head.append(make("meta", { attributes: { charset: "utf-8" } }), make("meta", { name: "viewport", content: "width=device-width" }));
  page.body.append(make("h1", { textContent: chat.title }));
  let number = 0;
  for (const node of nodes) {
    const box = make("section", { className: node.role });
    for (const part of node.parts) {
      if (!part.key) {
        box.append(node.role === "user" ? make("p", { textContent: part.text }) : markdown(part.text ?? ""));
        continue;
      }
      number += 1;
      const media = part.type === "video" && !files[part.key]?.startsWith("data:image") ? make("video", { controls: true }) : make("img", { alt: part.label ?? part.name });
      media.dataset.key = part.key;
      if (files[part.key]) media.setAttribute("src", files[part.key]);
      box.append(make("figure", {}, media, make("figcaption", { textContent: `${part.type} ${number}${part.label ? `, ${part.label}` : ""}` })));
    }
    if (node.role === "assistant" && node.finish !== "stop") box.append(make("p", { className: "cut", textContent: "This answer is not complete." }));
    page.body.append(box);
  }
  page.body.append(make("footer", { textContent: `Written with LLaVA-Interleave, model ${nodes.findLast((node) => node.model)?.model ?? "unknown"}` }));
  // Data, not a script: `<` is escaped, so nothing in it can end the element.
  const data = JSON.stringify({ format: FORMAT, version: 1, chats: [only] }).replaceAll("<", "\\u003c");
  // Both as text: the policy of this page would refuse the elements.
  const html = page.documentElement.outerHTML
    .replace("</head>", () => `<style>${STYLE}</style></head>`)
    .replace("</body>", () => `<script type="application/json" id="${FORMAT}">${data}</script></body>`);
  download(`<!doctype html>\n${html}`, "text/html", `${chat.title.replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 60) || "chat"}.html`);
}

/** Import an export of either kind; chats that exist are joined with it. Throws before any change if the file is not valid. */
export async function importChats(text) {
  const data = text.trimStart().startsWith("<") ? fromPage(text) : parsed(text);
  if (data?.format !== FORMAT || data.version !== 1 || !Array.isArray(data.chats) || typeof data.files !== "object") {
    throw new Error("this file is not an export of this page");
  }
  const chats = data.chats.map(checked);
  const blobs = Object.entries(data.files).map(([key, url]) => {
    if (!/^data:(image|video)\/[\w.+-]+;base64,/.test(url)) throw new Error("a file in this export is not an image or a video");
    const [head, body] = url.split(",", 2);
    return /** @type {[string, Blob]} */ ([key, new Blob([Uint8Array.from(atob(body), (c) => c.charCodeAt(0))], { type: head.slice(5, -7) })]);
  });
  await store.importAll(chats, blobs);
  toast(`Imported ${plural(chats.length, "chat")}.`);
  return chats;
}

function parsed(text) {
  try {
    return JSON.parse(text);
  } catch {
    throw new Error("this file is not JSON");
  }
}

/** Read a shared web page as text, without a parser that would run or load anything. */
function fromPage(text) {
  const data = parsed(text.match(new RegExp(`<script[^>]* id="${FORMAT}"[^>]*>([^<]*)</script>`))?.[1] ?? "null");
  const files = {};
  for (const [tag] of text.matchAll(/<(?:img|video)\b[^>]*>/g)) {
    const [key, src] = [tag.match(/data-key="(\w+)"/)?.[1], tag.match(/src="(data:[^"]+)"/)?.[1]];
    if (key && src) files[key] = src;
  }
  return data && { ...data, files };
}

const isText = (value) => typeof value === "string";
const isNumber = (value) => Number.isFinite(value);
const areNumbers = (value) => Array.isArray(value) && value.every(isNumber);
const hasNumbers = (value) => value && typeof value === "object" && Object.values(value).every((one) => one === null || isNumber(one) || hasNumbers(one));
const areCitations = (value) => Array.isArray(value) && value.every((one) => isNumber(one?.start_index) && isNumber(one.end_index) && areNumbers(one.images));
const PART = { type: isText, text: isText, key: isText, name: isText, label: isText, frames: isNumber, start: isNumber, end: isNumber, times: areNumbers };
const MESSAGE = { id: isText, parent: isText, role: isText, made: isNumber, finish: isText, error: isText, model: isText, stopped: (value) => value === true, usage: hasNumbers, timings: hasNumbers, citations: areCitations };
const SETTINGS = { system: isText, temperature: isNumber, max_tokens: isNumber, seed: isNumber, cite: (value) => value === true };

/** The fields of a stranger's object that are what this page writes. */
const known = (value, fields) => Object.fromEntries(Object.entries(value ?? {}).filter(([name, one]) => fields[name]?.(one)));

/** A chat of an export with nothing in it that this page does not know. Throws unless its messages form a tree. */
function checked(chat) {
  const fault = new Error("a chat in this file is damaged");
  if (!isText(chat?.id) || !isText(chat.title) || !chat.nodes || typeof chat.nodes !== "object") throw fault;
  const nodes = {};
  for (const [id, node] of Object.entries(chat.nodes)) {
    const parts = Array.isArray(node?.parts) ? node.parts.map((part) => known(part, PART)) : [];
    const complete = parts.every((part) => (part.type === "text" ? isText(part.text) : ["image", "video"].includes(part.type) && isText(part.key)));
    if (node?.id !== id || !["user", "assistant"].includes(node.role) || !parts.length || !complete) throw fault;
    for (const part of parts) if (part.key) part.name ??= part.type;
    nodes[id] = { parent: null, made: 0, ...known(node, MESSAGE), parts, changed: node.changed ?? node.made ?? 0 };
  }
  for (const node of Object.values(nodes)) {
    const seen = new Set();
    for (let at = node; at; at = nodes[at.parent]) {
      if (seen.has(at.id)) throw fault;
      seen.add(at.id);
    }
  }
  if (chat.leaf && !nodes[chat.leaf]) throw fault;
  const { id, title, leaf = null, changed = 0 } = chat;
  return { id, title, leaf, changed, nodes, pinned: chat.pinned === true, settings: known(chat.settings, SETTINGS), ...(isText(chat.model) ? { model: chat.model } : {}) };
}
