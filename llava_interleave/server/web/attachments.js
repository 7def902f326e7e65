// Attachments of the message being written: files in, their order, and where they are in the text.

import { refreshBudget } from "./budget.js";
import { make, videoFrames } from "./dom.js";
import { $, attempt, showError, state } from "./state.js";
import * as store from "./store.js";

export const MARK = /\[(?:image|video) (\d+)\]/g; // the place of an attachment in the text

async function fileKey(blob) {
  if (!crypto.subtle) return store.randomId(); // a page over plain http
  const digest = await crypto.subtle.digest("SHA-256", await blob.arrayBuffer());
  return [...new Uint8Array(digest)].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

function mediaKind(blob) {
  if (blob.type === "image/gif" || blob.type.startsWith("video/")) return "video";
  return blob.type.startsWith("image/") ? "image" : null;
}

export async function attach(files) {
  showError();
  for (const blob of files) {
    const kind = mediaKind(blob);
    if (!kind) {
      showError(`${blob.name} is not an image or a video`);
      continue;
    }
    const key = await fileKey(blob);
    await attempt(() => store.keep(key, blob));
    const url = URL.createObjectURL(blob);
    state.attachments.push({ key, kind, name: blob.name || `pasted ${kind}`, label: "", blob, url });
  }
  renderAttachments();
}

/** All files of a drop, folders included, in the order of their names. */
export async function droppedFiles(transfer) {
  const entries = [...transfer.items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean);
  if (!entries.length) return [...transfer.files];
  const files = [];
  const walk = async (entry) => {
    if (entry.isFile) {
      files.push(await new Promise((resolve, reject) => entry.file(resolve, reject)));
      return;
    }
    const reader = entry.createReader();
    const children = [];
    for (;;) {
      const batch = await new Promise((resolve, reject) => reader.readEntries(resolve, reject));
      if (!batch.length) break;
      children.push(...batch);
    }
    for (const child of children.sort((a, b) => a.name.localeCompare(b.name, undefined, { numeric: true }))) await walk(child);
  };
  for (const entry of entries) await walk(entry);
  return files;
}

export const mark = (index) => `[${state.attachments[index].kind} ${index + 1}]`;

/** Give the attachments a new order; marks in the text follow. */
function reorder(order) {
  const numbers = new Map(order.map((old, index) => [old + 1, index + 1]));
  state.attachments = order.map((old) => state.attachments[old]);
  $("text").value = $("text").value.replace(MARK, (whole, number) =>
    numbers.has(+number) ? whole.replace(number, numbers.get(+number)) : "",
  );
  renderAttachments();
}

function move(from, to) {
  if (to < 0 || to >= state.attachments.length || from === to) return;
  const order = state.attachments.map((_, index) => index);
  order.splice(to, 0, ...order.splice(from, 1));
  reorder(order);
}

function moveAndFocus(from, to) {
  move(from, to);
  $("attachments").children[to]?.querySelector(".number").focus();
}

export function renderAttachments() {
  $("attachments").replaceChildren(...state.attachments.map(chip));
  $("frames-row").hidden = !state.attachments.some((item) => item.kind === "video");
  refreshBudget();
}

function chip(item, index) {
  const box = make("li", { className: "chip", draggable: true });
  const title = `${item.kind} ${index + 1}, ${item.name}`;
  const preview = item.kind === "video" && item.blob.type !== "image/gif" ? filmstrip(item) : make("img", { src: item.url, alt: item.name });
  const label = make("input", { value: item.label, placeholder: "view name", ariaLabel: `Name of the view in ${title}`, maxLength: 40 });
  label.hidden = item.kind !== "image";
  label.oninput = () => {
    item.label = label.value.trim();
    refreshBudget();
  };
  const button = (text, ariaLabel, onclick, disabled = false) =>
    make("button", { type: "button", className: "link", textContent: text, title: ariaLabel, ariaLabel, onclick, disabled });
  box.append(
    preview,
    make(
      "div",
      { className: "row" },
      make("button", {
        type: "button", className: "link number", textContent: index + 1, title: `Put ${mark(index)} into the text`,
        ariaLabel: `Put ${title} into the text`, onclick: () => insert(mark(index)),
      }),
      label,
      button("←", `Move ${title} to the left`, () => moveAndFocus(index, index - 1), index === 0),
      button("→", `Move ${title} to the right`, () => moveAndFocus(index, index + 1), index === state.attachments.length - 1),
      button("✕", `Remove ${title}`, () => reorder(state.attachments.map((_, i) => i).filter((i) => i !== index))),
    ),
  );
  box.ondragstart = (event) => event.dataTransfer.setData("application/x-chip", index);
  box.ondragover = (event) => {
    if (!event.dataTransfer.types.includes("application/x-chip")) return;
    event.preventDefault();
    box.classList.add("over");
  };
  box.ondragleave = () => box.classList.remove("over");
  box.ondrop = (event) => {
    const from = event.dataTransfer.getData("application/x-chip");
    if (from === "") return;
    event.preventDefault();
    event.stopPropagation();
    move(+from, index);
  };
  return box;
}

function insert(text) {
  const area = $("text");
  area.setRangeText(text, area.selectionStart, area.selectionEnd, "end");
  area.focus();
  refreshBudget();
}

/** The frames that the model will get, once the server has sent their times. */
function filmstrip(item) {
  const box = make("div", { className: "strip", role: "img", ariaLabel: `Frames of ${item.name}` });
  videoFrames(item.url, item.times ?? [], () => box.isConnected, (canvas) => box.append(canvas)).catch(() =>
    box.replaceChildren(make("span", { textContent: `${item.name} (this browser cannot show it)` })),
  );
  return box;
}

/** Redraw the filmstrips whose frame times differ; `parts` are of `/v1/messages/count`. */
export function updateFrameTimes(parts) {
  const items = inOrder($("text").value);
  items.forEach((item, index) => {
    const { times } = parts.at(index - items.length);
    if (item.kind !== "video" || String(times) === String(item.times)) return;
    item.times = times;
    $("attachments").children[state.attachments.indexOf(item)]?.querySelector(".strip")?.replaceWith(filmstrip(item));
  });
}

/** The attachments in the order of the prompt: those without a mark first, then as the marks are in the text. */
function inOrder(text) {
  const marked = [...text.matchAll(MARK)].map((match) => state.attachments[+match[1] - 1]);
  return [...state.attachments.filter((item) => !marked.includes(item)), ...marked];
}

/** Text and attachments as parts of a message. Throws for a mark without a file. */
export function compose(text) {
  const media = ({ key, kind, name, label }) => ({ type: kind, key, name, ...(label ? { label } : {}) });
  const marked = new Set();
  const parts = [];
  let end = 0;
  for (const match of text.matchAll(MARK)) {
    const index = +match[1] - 1;
    if (!state.attachments[index]) throw new Error(`the text has ${match[0]}, but ${state.attachments.length} files are attached`);
    if (marked.has(index)) throw new Error(`the text has ${match[0]} twice; attach the file again to show it twice`);
    marked.add(index);
    if (match.index > end) parts.push({ type: "text", text: text.slice(end, match.index) });
    parts.push(media(state.attachments[index]));
    end = match.index + match[0].length;
  }
  if (text.length > end) parts.push({ type: "text", text: text.slice(end) });
  return [...state.attachments.filter((_, index) => !marked.has(index)).map(media), ...parts];
}
