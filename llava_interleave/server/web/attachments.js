// Attachments of the message being written: files in, their grid, order and selection, their places in the text.

import { prepareSoon } from "./ahead.js";
import { unreadable } from "./api.js";
import { changed, keepDraft } from "./composer.js";
import { $, announce, button, make, plural, reconcile } from "./dom.js";
import { fileKey, mediaKind, readable, tile, titleOf } from "./media.js";
import { attempt, model, parentOf, showError, state } from "./state.js";
import { branch, mediaOf, randomId } from "./tree.js";
import { openCompare } from "./viewer.js";

export const MARK = /\[(?:image|video) (\d+)\]/g; // the place of an attachment in the text
const BATCH = 16; // files shown at a time while many are added
const MB = 1e6;
const ROOMY = 12; // attachments from which on the grid can be enlarged

/** @type {Set<string>} ids of selected attachments */
const selected = new Set();

/** The number of the first attachment: those of the conversation come before. */
export const firstNumber = () => mediaOf(branch(state.chat, parentOf())).length + 1;
export const markOf = (index) => `[${state.draft.attachments[index].type} ${firstNumber() + index}]`;

/** Images and videos of the conversation, then those attached: image k is the k-th. */
export const allMedia = () => [...mediaOf(branch(state.chat, parentOf())), ...state.draft.attachments];

/** @param {Iterable<File>} files */
export async function attach(files) {
  showError();
  const { draft } = state;
  const all = [...files];
  const known = all.filter(mediaKind);
  const limit = model()?.limits.media_bytes ?? Infinity;
  const large = known.filter((blob) => blob.size > limit);
  const wanted = known.filter((blob) => blob.size <= limit);
  for (let at = 0; at < wanted.length; at += BATCH) {
    const batch = await Promise.all(wanted.slice(at, at + BATCH).map(readable));
    if (wanted.length > BATCH) $("adding").textContent = `Adding ${at + batch.length} of ${wanted.length} files`;
    const keys = await Promise.all(batch.map(fileKey));
    batch.forEach((blob, i) => {
      const type = /** @type {"image" | "video"} */ (mediaKind(blob));
      const name = blob.name || `pasted ${type}`;
      draft.attachments.push({ id: randomId(), type, key: keys[i], name, time: blob.lastModified ?? Date.now(), bytes: blob.size });
    });
    await attempt(() => keepDraft(draft, batch.map((blob, i) => [keys[i], blob])));
    if (draft === state.draft) renderAttachments();
  }
  $("adding").textContent = "";
  if (wanted.length) announce(`${plural(wanted.length, "file")} attached`);
  const others = all.length - known.length;
  const faults = large.map((blob) => `${blob.name} has ${Math.ceil(blob.size / MB)} MB, this server takes ${limit / MB} MB a file`);
  if (others) faults.push(`${others === 1 ? all.find((blob) => !mediaKind(blob))?.name : `${others} files`} ${others === 1 ? "is not an image or a video" : "are not images or videos"}`);
  if (faults.length) showError(faults.slice(0, 3).join("; "));
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
    for (const child of children.sort(byName)) await walk(child);
  };
  for (const entry of entries) await walk(entry);
  return files;
}

export const byName = (a, b) => a.name.localeCompare(b.name, undefined, { numeric: true });

/** Give the attachments a new order, of old indices; marks in the text follow. */
function reorder(order) {
  const { draft } = state;
  const first = firstNumber();
  const numbers = new Map(order.map((old, index) => [first + old, first + index]));
  const last = first + draft.attachments.length;
  $("text").value = draft.text = draft.text.replace(MARK, (whole, number) => {
    if (+number < first || +number >= last) return whole;
    return numbers.has(+number) ? whole.replace(number, String(numbers.get(+number))) : "";
  });
  draft.attachments = order.map((old) => draft.attachments[old]);
  changed();
  renderAttachments();
}

const indices = () => state.draft.attachments.map((_, index) => index);
const isSelected = (index) => selected.has(state.draft.attachments[index].id);

/** Move attachments, in their order, to before the one at `to`. @param {number[]} moved */
function move(moved, to) {
  const rest = indices().filter((index) => !moved.includes(index));
  const place = rest.filter((index) => index < to).length;
  rest.splice(place, 0, ...moved);
  reorder(rest);
}

/** Move the selected ones by one place. @param {-1 | 1} step */
function shift(step, moved = indices().filter(isSelected)) {
  const to = step < 0 ? moved[0] - 1 : moved[moved.length - 1] + 2;
  if (moved.length && to >= 0 && to <= state.draft.attachments.length) move(moved, to);
}

const removeWhere = (gone) => reorder(indices().filter((index) => !gone(index)));

function sort(compare) {
  const { attachments } = state.draft;
  reorder(indices().sort((a, b) => compare(attachments[a], attachments[b])));
}

export function renderAttachments() {
  const { attachments } = state.draft;
  for (const id of selected) if (!attachments.some((item) => item.id === id)) selected.delete(id);
  const first = firstNumber();
  $("attached").hidden = !attachments.length;
  const version = (item, index) => JSON.stringify([first + index, item.label, selected.has(item.id), item.frames, item.times?.length, unreadable.has(item.key)]);
  reconcile($("attachments"), attachments, (item) => item.id, version, (item, index) => chip(item, index, first + index));
  renderTools();
  prepareSoon();
}

function renderTools() {
  const { attachments } = state.draft;
  const count = selected.size;
  const tools = [make("strong", { textContent: count ? `${count} selected` : plural(attachments.length, attachments.every(({ type }) => type === "image") ? "image" : "file") })];
  const all = attachments.length > 1 && count < attachments.length;
  const tool = (text, run, more = {}) => tools.push(button(text, run, more));
  if (all) tool("Select all", () => select(attachments));
  if (count) {
    tool("Select none", () => select([]));
    if (count === 2) tool("Compare", () => openCompare(allMedia(), indices().filter(isSelected).map((index) => firstNumber() - 1 + index)));
    tool("Move left", () => shift(-1));
    tool("Move right", () => shift(1));
    tool("Remove", () => removeWhere(isSelected));
  } else if (attachments.length > 1) {
    const room = (model()?.limits.media ?? Infinity) - firstNumber() + 1;
    const fails = (index) => unreadable.has(attachments[index].key);
    if (indices().some(fails)) tool("Remove unreadable", () => removeWhere(fails));
    if (room > 0 && attachments.length > room) tool(`Keep the first ${room}`, () => removeWhere((index) => index >= room));
    tool("Sort by name", () => sort(byName));
    tool("Sort by time", () => sort((a, b) => a.time - b.time));
    tool("Remove all", () => removeWhere(() => true));
  }
  if (attachments.length > ROOMY) {
    const large = $("composer").classList.contains("large");
    const toggle = button(large ? "Small grid" : "Large grid", () => ($("composer").classList.toggle("large"), renderTools()), { className: "link enlarge" });
    tools.push(toggle);
  }
  $("tools").replaceChildren(...tools);
}

function select(items) {
  selected.clear();
  for (const { id } of items) selected.add(id);
  renderAttachments();
}

/** @param {import("./types").Attachment} item */
function chip(item, index, number) {
  const title = titleOf(item, number);
  const fault = unreadable.get(item.key) ?? "";
  const box = make("li", { className: fault ? "chip unreadable" : "chip", draggable: true, ariaLabel: title, title: fault });
  const check = make("input", { type: "checkbox", checked: selected.has(item.id), ariaLabel: `Select ${title}`, data: { focus: "select" } });
  check.onchange = () => {
    if (check.checked) selected.add(item.id);
    else selected.delete(item.id);
    box.classList.toggle("selected", check.checked);
    renderTools();
  };
  box.classList.toggle("selected", check.checked);
  const label = make("input", { value: item.label ?? "", placeholder: "name", ariaLabel: `Name of the view in ${title}`, maxLength: 40, data: { focus: "label" } });
  label.onchange = () => {
    item.label = label.value.trim() || undefined;
    changed();
    renderAttachments();
  };
  const place = button(`${number}`, () => insert(markOf(index)), { label: `Put ${title} into the text`, className: "number" });
  box.append(
    make("div", { className: "thumb" }, tile(item, number, allMedia), check, button("", () => removeWhere((i) => i === index), { label: `Remove ${title}`, symbol: "close", className: "remove" })),
    make("div", { className: "row" }, place, item.type === "image" ? label : make("span", { className: "frames", textContent: item.times ? plural(item.times.length, "frame") : "video" })),
  );
  box.onkeydown = (event) => {
    const step = /** @type {any} */ ({ ArrowLeft: -1, ArrowRight: 1 })[event.key];
    if (!step || !event.altKey) return;
    event.preventDefault();
    shift(step, [index]);
  };
  dragging(box, item, index);
  return box;
}

/** Drag within the grid to reorder, all selected ones together; into the text to place it there. */
function dragging(box, item, index) {
  box.ondragstart = (event) => {
    event.dataTransfer.setData("application/x-chip", index);
    event.dataTransfer.setData("text/plain", markOf(index));
  };
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
    box.classList.remove("over");
    const moved = isSelected(+from) ? indices().filter(isSelected) : [+from];
    if (!moved.includes(index)) move(moved, index > +from ? index + 1 : index);
  };
}

function insert(text) {
  const area = $("text");
  area.setRangeText(text, area.selectionStart, area.selectionEnd, "end");
  area.focus();
  changed();
}

/** What a message keeps of an attachment. @param {import("./types").Part} item @returns {import("./types").Part} */
const asPart = ({ key, type, name, label, frames, start, end }) => JSON.parse(JSON.stringify({ key, type, name, label, frames, start, end }));

/** Text and attachments as parts of a message: those without a mark first. Throws for a mark without a file. */
export function compose(text, attachments = state.draft.attachments) {
  const first = firstNumber();
  const marked = new Set();
  /** @type {import("./types").Part[]} */ const parts = [];
  let end = 0;
  for (const match of text.matchAll(MARK)) {
    const index = +match[1] - first;
    if (index < 0) continue; // an image of the conversation: the words name it
    if (!attachments[index]) throw new Error(`the text has ${match[0]}, but the last attachment is number ${first + attachments.length - 1}`);
    if (marked.has(index)) throw new Error(`the text has ${match[0]} twice; attach the file again to show it twice`);
    marked.add(index);
    if (match.index > end) parts.push({ type: "text", text: text.slice(end, match.index) });
    parts.push(asPart(attachments[index]));
    end = match.index + match[0].length;
  }
  if (text.length > end) parts.push({ type: "text", text: text.slice(end) });
  return [...attachments.filter((_, index) => !marked.has(index)).map(asPart), ...parts];
}
