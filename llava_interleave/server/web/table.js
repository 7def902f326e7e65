// The same questions about each image of a folder: a table that grows while it is computed.

import * as api from "./api.js";
import { byName } from "./attachments.js";
import { $, announce, button, make, plural } from "./dom.js";
import { mediaKind } from "./media.js";
import { attempt, model, showError } from "./state.js";

const AT_A_TIME = 8; // images of a request
const SHOWN = 500; // rows in the document; filters and exports see all
const TYPES = { text: "text", int: "whole number", float: "number", bool: "yes or no", choices: "one of" };
const DOUBTFUL = 0.5; // below it, the model wanted to write something that the type does not allow

/** @typedef {{ value: any, probability: number, allowed: number, error?: string, corrected?: boolean }} Cell */
/** @typedef {{ file: File, key: string, url: string, cells: Map<string, Cell> }} Row */
/** @typedef {{ name: string, question: string, type: string, choices: string[] }} Column */

/** @type {Row[]} */ let rows = [];
/** @type {Column[]} */ let columns = [];
/** @type {{ column: string, down: boolean } | null} */ let order = null;
/** @type {AbortController | null} */ let computing = null;
/** @type {Map<string, string>} */ const filters = new Map();

/** Cells are kept by what was asked: a renamed column keeps them, another question has its own. */
const cellKey = ({ question, type, choices }) => JSON.stringify([model()?.id, question, type, choices]);
const cellOf = (row, column) => row.cells.get(cellKey(column));
const FILE = "file";
const valueOf = (row, name) => (name === FILE ? row.file.name : cellOf(row, columns.find((one) => one.name === name))?.value);
const shown = (value) => (value === true ? "yes" : value === false ? "no" : value ?? "");

function columnFields({ name = "", question = "", type = "text" } = {}) {
  const field = (label, properties) => make("input", { ariaLabel: label, placeholder: label, ...properties });
  const choices = field("Choices, with commas", { hidden: true, className: "choices" });
  const kind = make("select", { ariaLabel: "Type of the answer", className: "type", onchange: () => (choices.hidden = kind.value !== "choices") });
  kind.append(...Object.entries(TYPES).map(([value, textContent]) => make("option", { value, textContent, selected: value === type })));
  const line = make("li", { className: "row" }, field("Name", { value: name, className: "name" }), field("Question about each image", { value: question, className: "question grow" }), kind, choices);
  line.append(button("", () => line.remove(), { label: "Remove this column", symbol: "close" }));
  return line;
}

/** The columns of the form. Throws an Error that says what is missing. */
function readColumns() {
  const found = [...$("table-columns").children].map((/** @type {any} */ line) => {
    const [name, question, type, choices] = ["name", "question", "type", "choices"].map((one) => line.querySelector(`.${one}`).value.trim());
    return { name: name || question, question, type, choices: type === "choices" ? choices.split(",").map((one) => one.trim()).filter(Boolean) : [] };
  }).filter(({ question }) => question);
  if (!found.length) throw new Error("write a question about each image");
  const names = found.map(({ name }) => name);
  if (new Set([FILE, ...names]).size <= names.length) throw new Error(`two columns have the same name, or one is called ${FILE}`);
  const empty = found.find(({ type, choices }) => type === "choices" && choices.length < 2);
  if (empty) throw new Error(`${empty.name}: write two or more choices, with commas`);
  return found;
}

/** @param {Iterable<File>} list */
export function addFiles(list) {
  const known = new Set(rows.map(({ key }) => key));
  const found = [...list].filter((file) => mediaKind(file)).sort((a, b) => byName({ name: a.webkitRelativePath || a.name }, { name: b.webkitRelativePath || b.name }));
  for (const file of found) {
    const key = `${file.webkitRelativePath || file.name} ${file.size} ${file.lastModified}`;
    if (!known.has(key)) rows.push({ file, key, url: mediaKind(file) === "image" ? URL.createObjectURL(file) : "", cells: new Map() });
  }
  if (!found.length) say("no images or videos among these files");
  render();
}

const say = (text) => ($("table-status").textContent = text);

async function compute() {
  columns = readColumns();
  if (!rows.length) throw new Error("choose files or a folder");
  const controller = (computing = new AbortController());
  const began = Date.now();
  const lacking = () => rows.filter((row) => columns.some((column) => !cellOf(row, column) || cellOf(row, column)?.error));
  const waiting = lacking(), all = waiting.length;
  let done = 0;
  render();
  try {
    let next = send(waiting.slice(0, AT_A_TIME));
    while (waiting.length && !controller.signal.aborted) {
      const batch = waiting.splice(0, AT_A_TIME), ids = await next;
      if (controller.signal.aborted) break;
      if (waiting.length) (next = send(waiting.slice(0, AT_A_TIME))).catch(() => {});
      await ask(batch, ids, controller.signal, () => {
        done += 1;
        const left = ((Date.now() - began) / done) * (all - done) / 60_000;
        say(`${done.toLocaleString("en")} of ${plural(all, "image")}${left > 0.5 ? `, about ${plural(Math.ceil(left), "minute")} left` : ""}`);
      });
      await api.release(new Set(batch.map(({ key }) => key)));
    }
  } finally {
    if (computing === controller) computing = null;
    const failed = rows.filter((row) => columns.some((column) => cellOf(row, column)?.error)).length;
    say(`${plural(rows.length - lacking().length, "image")} of ${rows.length.toLocaleString("en")} done${failed ? `, ${failed} with an error: compute again to retry` : ""}`);
    announce($("table-status").textContent);
    render();
  }
}

const NOT_A_FILES_OWN = [0, 401, 403, 404, 429];

/** The server's id of each file, or the error of one that it does not take. @returns {Promise<(string | Error)[]>} */
async function send(batch) {
  const one = ({ file, key }) => api.upload(key, file.name, async () => file);
  return Promise.all(
    batch.map((row) =>
      one(row)
        .catch(async (error) => {
          if (error.code !== "files_full") throw error;
          await api.makeRoom(new Set(batch.map(({ key }) => key)));
          return one(row);
        })
        .catch((error) => {
          if (NOT_A_FILES_OWN.includes(error.status) || error.status >= 500) throw error;
          return error;
        }),
    ),
  );
}

/** Ask the columns that a batch lacks; a row is shown as soon as it is there. */
async function ask(all, sent, signal, progress) {
  const missing = columns.filter((column) => all.some((row) => !cellOf(row, column) || cellOf(row, column)?.error));
  all.forEach((row, index) => {
    if (!(sent[index] instanceof Error)) return;
    for (const column of missing) row.cells.set(cellKey(column), { value: null, probability: 0, allowed: 0, error: sent[index].message });
    progress();
  });
  const ids = sent.filter((id) => typeof id === "string"), batch = all.filter((_, index) => typeof sent[index] === "string");
  if (!ids.length) return;
  const asked = missing.map(({ type, ...column }) => ({ ...column, type: type === "choices" ? "text" : type }));
  for await (const { index, cells } of api.events("v1/images/table", { model: model()?.id, images: ids, columns: asked, stream: true }, signal)) {
    for (const column of missing) {
      const row = batch[index];
      if (!cellOf(row, column)?.corrected) row.cells.set(cellKey(column), cells[column.name]);
    }
    progress();
    render();
  }
}

/** The rows that all filters let through, sorted. A filter is a text, or a comparison such as > 2. */
function visible() {
  const tests = [...filters].filter(([, text]) => text.trim()).map(([name, text]) => [name, matcher(text.trim())]);
  const found = rows.filter((row) => tests.every(([name, test]) => /** @type {any} */ (test)(valueOf(row, name))));
  if (!order) return found;
  const { column, down } = order;
  const known = (value) => value !== undefined && value !== null;
  return found.sort((a, b) => {
    const [x, y] = [valueOf(a, column), valueOf(b, column)];
    if (!known(x) || !known(y)) return Number(known(y)) - Number(known(x)); // without a value: last
    const sign = typeof x === "string" ? x.localeCompare(String(y), undefined, { numeric: true }) : Number(x) - Number(y);
    return down ? -sign : sign;
  });
}

function matcher(text) {
  const [, sign, number] = /^([<>]=?|=)\s*(-?\d+(?:\.\d+)?)$/.exec(text) ?? [];
  const compare = { "<": (a, b) => a < b, ">": (a, b) => a > b, "<=": (a, b) => a <= b, ">=": (a, b) => a >= b, "=": (a, b) => a === b }[sign];
  if (compare) return (value) => typeof value === "number" && compare(value, Number(number));
  return (value) => String(shown(value)).toLowerCase().includes(text.toLowerCase());
}

let drawn = false;
/** Draw at most once a frame. */
function render() {
  if (drawn) return;
  drawn = true;
  requestAnimationFrame(() => {
    drawn = false;
    draw();
  });
}

function draw() {
  const names = [FILE, ...columns.map(({ name }) => name)];
  if ($("table-head").dataset.names !== JSON.stringify(names)) drawHead(names);
  const sorted = order?.down ? "descending" : "ascending";
  for (const head of $("table-head").querySelectorAll("th")) head.ariaSort = order?.column === head.dataset.name ? sorted : "none";
  $("table-run").textContent = computing ? "Stop" : "Compute";
  const found = visible();
  const editing = $("table-body").querySelector("input, select"); // a cell that is being corrected stays
  if (!editing) $("table-body").replaceChildren(...found.slice(0, SHOWN).map(drawRow));
  $("table-count").textContent = rows.length ? `${plural(found.length, "row")} of ${rows.length.toLocaleString("en")}${found.length > SHOWN ? `, the first ${SHOWN} are shown` : ""}.` : "Choose images, or drop them here.";
  for (const one of document.querySelectorAll(".table-export")) /** @type {any} */ (one).disabled = !rows.length || !columns.length;
}

function drawHead(names) {
  $("table-head").dataset.names = JSON.stringify(names);
  for (const name of filters.keys()) if (!names.includes(name)) filters.delete(name);
  const sort = (name) => () => {
    const again = order?.column === name;
    order = again && order?.down ? null : { column: name, down: again };
    render();
  };
  const filter = (name) => make("input", { type: "search", ariaLabel: `Filter ${name}`, placeholder: "filter", value: filters.get(name) ?? "", oninput: ({ target }) => (filters.set(name, target.value), render()) });
  $("table-head").replaceChildren(make("tr", {}, ...names.map((name) => make("th", { scope: "col", data: { name } }, button(name, sort(name), { title: "Sort" }), filter(name)))));
}

/** What the browser cannot decode, as the server reads it. */
async function showAsRead(row, image) {
  image.onerror = null;
  const shown = await api.preview(row.key, row.file.name, async () => row.file, 96).catch(() => null);
  if (!shown) return;
  URL.revokeObjectURL(row.url);
  row.url = image.src = URL.createObjectURL(shown);
}

function drawRow(row) {
  const image = row.url ? make("img", { src: row.url, alt: "", loading: "lazy", width: 48, height: 36, onerror: () => showAsRead(row, image) }) : null;
  return make("tr", {}, make("th", { scope: "row" }, image, make("span", { textContent: row.file.name })), ...columns.map((column) => drawCell(row, column)));
}

function drawCell(row, column) {
  const cell = cellOf(row, column);
  if (!cell) return make("td", { textContent: "" });
  if (cell.error) return make("td", { className: "failed", textContent: cell.error });
  const doubtful = !cell.corrected && cell.allowed < DOUBTFUL;
  const title = cell.corrected ? "Corrected by hand" : `Probability ${(100 * cell.probability).toFixed(0)} %${doubtful ? "; the model wanted to write something that the type does not allow" : ""}`;
  const place = make("td", { className: cell.corrected ? "corrected" : doubtful ? "doubtful" : "" });
  place.append(button(String(shown(cell.value)) || "–", () => correct(place, row, column, cell), { className: "cell", title: `${title}. Press to correct` }));
  return place;
}

function correct(place, row, column, cell) {
  const options = column.type === "bool" ? ["yes", "no"] : column.choices;
  const field = options.length
    ? make("select", {}, ...options.map((one) => make("option", { textContent: one, selected: one === shown(cell.value) })))
    : make("input", { value: shown(cell.value), ...(["int", "float"].includes(column.type) ? { type: "number", step: column.type === "int" ? "1" : "any" } : {}) });
  field.ariaLabel = `Correct ${column.name} of ${row.file.name}`;
  let open = true;
  const close = (keep) => {
    if (!open) return;
    open = false;
    const number = ["int", "float"].includes(column.type);
    if (keep && field.value !== String(shown(cell.value)) && (!number || (field.value && field.checkValidity()))) {
      const value = column.type === "bool" ? field.value === "yes" : number ? Number(field.value) : field.value;
      row.cells.set(cellKey(column), { ...cell, value, corrected: true });
    }
    place.replaceWith(drawCell(row, column));
    render();
  };
  field.onblur = () => close(true);
  field.onkeydown = (event) => {
    if (event.key === "Enter") close(true);
    if (event.key === "Escape") (event.preventDefault(), event.stopPropagation(), close(false));
  };
  place.replaceChildren(field);
  field.focus();
}

/** All rows that the filters let through, as `llava table` writes them; corrected cells are marked. */
function flat() {
  return visible().map((row) => {
    /** @type {Record<string, any>} */ const line = { file: row.file.webkitRelativePath || row.file.name };
    for (const column of columns) {
      const cell = cellOf(row, column), known = cell && !cell.error;
      line[column.name] = known ? cell.value : null;
      line[`${column.name}_probability`] = known && !cell.corrected ? cell.probability : null;
      line[`${column.name}_allowed`] = known && !cell.corrected ? cell.allowed : null;
      line[`${column.name}_corrected`] = Boolean(cell?.corrected);
    }
    line.error = [...new Set(columns.map((column) => cellOf(row, column)?.error).filter(Boolean))].join("; ") || null;
    return line;
  });
}

function save(kind) {
  const lines = flat();
  const quoted = (value) => (/[",\r\n]/.test(value) ? `"${value.replaceAll('"', '""')}"` : value);
  const text = kind === "csv"
    ? [Object.keys(lines[0] ?? {}), ...lines.map((line) => Object.values(line))].map((line) => line.map((value) => quoted(String(value ?? ""))).join(",")).join("\r\n") + "\r\n"
    : lines.map((line) => `${JSON.stringify(line)}\n`).join("");
  const url = URL.createObjectURL(new Blob([text], { type: kind === "csv" ? "text/csv" : "application/jsonl" }));
  make("a", { href: url, download: `table.${kind}` }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

export function startTable() {
  $("open-table").onclick = () => {
    showError();
    if (!$("table-columns").children.length) $("table-columns").append(columnFields({ name: "what", question: "What is in the image?" }));
    $("table").showModal();
    render();
  };
  $("table-add").onclick = () => {
    $("table-columns").append(columnFields());
    $("table-columns").lastElementChild.querySelector("input").focus();
  };
  for (const name of ["files", "folder"]) {
    $(`table-${name}`).onclick = () => $(`table-pick-${name}`).click();
    $(`table-pick-${name}`).onchange = ({ target }) => (addFiles(target.files), (target.value = ""));
  }
  $("table-clear").onclick = () => {
    computing?.abort();
    for (const { url } of rows) if (url) URL.revokeObjectURL(url);
    rows = [];
    say("");
    render();
  };
  $("table-form").onsubmit = (event) => {
    event.preventDefault();
    if (computing) computing.abort();
    else attempt(compute, say);
  };
  for (const kind of ["csv", "jsonl"]) $(`table-${kind}`).onclick = () => save(kind);
}
