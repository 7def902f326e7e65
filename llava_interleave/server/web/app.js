import * as api from "./api.js";
import { frames, make } from "./dom.js";
import { leanedOn } from "./leaned.js";
import { markdown } from "./markdown.js";
import * as store from "./store.js";

const $ = (id) => document.getElementById(id);
const MARK = /\[(?:image|video) (\d+)\]/g; // where an attachment stands in the text

let chat = store.create();
let attached = []; // {key, kind, name, label, blob, url, duration}
let parent = null; // the message that the next one follows; another than the leaf while one is edited
let running = null; // AbortController of the answer being written
const leaned = new WeakMap(); // message -> what its answer leaned on, or the AbortController of the question

function problem(text) {
  $("problem").textContent = text ?? "";
  $("problem").hidden = !text;
}

/** Do something that may fail, and say so where it does. */
async function attempt(action) {
  try {
    return await action();
  } catch (error) {
    if (error.name === "AbortError") return undefined;
    if (error.status === 401) askForKey();
    problem(error.message);
    return undefined;
  }
}

function askForKey() {
  if (!$("key-dialog").open) $("key-dialog").showModal();
}

// --- what is attached ---

async function fileKey(blob) {
  if (!crypto.subtle) return store.identity(); // a page that came over plain http
  const digest = await crypto.subtle.digest("SHA-256", await blob.arrayBuffer());
  return [...new Uint8Array(digest)].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

async function attach(files) {
  problem();
  for (const blob of files) {
    const kind = blob.type === "image/gif" || blob.type.startsWith("video/") ? "video" : blob.type.startsWith("image/") ? "image" : null;
    if (!kind) {
      problem(`${blob.name} is no image or video`);
      continue;
    }
    const key = await fileKey(blob);
    await attempt(() => store.keep(key, blob));
    attached.push({ key, kind, name: blob.name || `pasted ${kind}`, label: "", blob, url: URL.createObjectURL(blob) });
  }
  drawAttached();
}

/** All files of what was dropped, folders read through, in the order of their names. */
async function dropped(transfer) {
  const entries = [...transfer.items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean);
  if (!entries.length) return [...transfer.files];
  const found = [];
  const walk = async (entry) => {
    if (entry.isFile) {
      found.push(await new Promise((resolve, reject) => entry.file(resolve, reject)));
      return;
    }
    const reader = entry.createReader();
    const inside = [];
    for (;;) {
      const some = await new Promise((resolve, reject) => reader.readEntries(resolve, reject));
      if (!some.length) break;
      inside.push(...some);
    }
    for (const one of inside.sort((a, b) => a.name.localeCompare(b.name, undefined, { numeric: true }))) await walk(one);
  };
  for (const entry of entries) await walk(entry);
  return found;
}

const mark = (index) => `[${attached[index].kind} ${index + 1}]`;

/** Give the attachments a new order; marks in the text go with theirs. */
function reorder(order) {
  const now = order.map((old) => attached[old]);
  const numbers = new Map(order.map((old, index) => [old + 1, index + 1]));
  attached = now;
  $("text").value = $("text").value.replace(MARK, (whole, number) =>
    numbers.has(+number) ? whole.replace(number, numbers.get(+number)) : "",
  );
  drawAttached();
}

function move(from, to) {
  if (to < 0 || to >= attached.length || from === to) return;
  const order = attached.map((_, index) => index);
  order.splice(to, 0, ...order.splice(from, 1));
  reorder(order);
}

function drawAttached() {
  $("attached").replaceChildren(...attached.map(chip));
  $("frames-row").hidden = !attached.some((item) => item.kind === "video");
  refreshBudget();
}

function chip(item, index) {
  const box = make("li", { className: "chip", draggable: true });
  const said = `${item.kind} ${index + 1}, ${item.name}`;
  const preview = item.kind === "video" && item.blob.type !== "image/gif" ? strip(item) : make("img", { src: item.url, alt: item.name });
  const label = make("input", { value: item.label, placeholder: "view name", ariaLabel: `Name of the view in ${said}`, maxLength: 40 });
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
        ariaLabel: `Put ${said} into the text`, onclick: () => insert(mark(index)),
      }),
      label,
      button("←", `Move ${said} to the left`, () => moved(index, index - 1), index === 0),
      button("→", `Move ${said} to the right`, () => moved(index, index + 1), index === attached.length - 1),
      button("✕", `Remove ${said}`, () => reorder(attached.map((_, i) => i).filter((i) => i !== index))),
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

function moved(from, to) {
  move(from, to);
  $("attached").children[to]?.querySelector(".number").focus();
}

function insert(text) {
  const area = $("text");
  area.setRangeText(text, area.selectionStart, area.selectionEnd, "end");
  area.focus();
  refreshBudget();
}

/** The frames of a video that will be looked at, once the server has told when they are. */
function strip(item) {
  const box = make("div", { className: "strip", role: "img", ariaLabel: `Frames of ${item.name}` });
  frames(item.url, item.times ?? [], () => box.isConnected, (canvas) => box.append(canvas)).catch(() =>
    box.replaceChildren(make("span", { textContent: `${item.name} (this browser cannot show it)` })),
  );
  return box;
}

/** The attachments as they will be sent: those without a mark in the text first, then as the marks stand. */
function inOrder(text) {
  const marked = [...text.matchAll(MARK)].map((match) => attached[+match[1] - 1]);
  return [...attached.filter((item) => !marked.includes(item)), ...marked];
}

/** Draw the strips of videos of which the server tells other frames than are shown. */
function tellTimes(items, parts) {
  items.forEach((item, index) => {
    const { times } = parts.at(index - items.length);
    if (item.kind !== "video" || String(times) === String(item.times)) return;
    item.times = times;
    $("attached").children[attached.indexOf(item)]?.querySelector(".strip")?.replaceWith(strip(item));
  });
}

/** Text and attachments as the parts of a message: where a mark stands, or before the text. Throws if a mark has no file. */
function compose(text) {
  const media = ({ key, kind, name, label }) => ({ type: kind, key, name, ...(label ? { label } : {}) });
  const seen = new Set();
  const parts = [];
  let end = 0;
  for (const match of text.matchAll(MARK)) {
    const index = +match[1] - 1;
    if (!attached[index]) throw new Error(`the text has ${match[0]}, but ${attached.length} files are attached`);
    if (seen.has(index)) throw new Error(`the text has ${match[0]} twice; attach the file again to show it twice`);
    seen.add(index);
    if (match.index > end) parts.push({ type: "text", text: text.slice(end, match.index) });
    parts.push(media(attached[index]));
    end = match.index + match[0].length;
  }
  if (text.length > end) parts.push({ type: "text", text: text.slice(end) });
  return [...attached.filter((_, index) => !seen.has(index)).map(media), ...parts];
}

// --- what the server is asked ---

async function content(parts) {
  const made = [];
  let views = null;
  for (const part of parts) {
    if (part.type === "text") {
      made.push({ type: "text", text: part.text });
      views = null;
      continue;
    }
    const blob = await store.file(part.key);
    if (!blob) throw new Error(`${part.name} is no longer in this browser`);
    const url = await api.upload(part.name, blob, part.key);
    if (part.label) {
      if (!views) made.push({ type: "views", views: (views = {}) });
      if (part.label in views) throw new Error(`two views have the name ${part.label}`);
      views[part.label] = url;
    } else {
      views = null;
      made.push({ type: `${part.type}_url`, [`${part.type}_url`]: { url } });
    }
  }
  return made.length === 1 && made[0].type === "text" ? made[0].text : made;
}

async function body(nodes) {
  const messages = [];
  for (const node of nodes) messages.push({ role: node.role, content: await content(node.parts) });
  const film = nodes.some((node) => node.parts.some((part) => part.type === "video"));
  return { model: $("model").value, messages, ...(film ? { frames: +$("frames").value } : {}) };
}

/** As `use(body)`; once more with fresh uploads if the server has dropped a file. */
async function withFiles(nodes, use) {
  try {
    return await use(await body(nodes));
  } catch (error) {
    if (error.code !== "file_not_found") throw error;
    api.forgetUploads();
    return use(await body(nodes));
  }
}

let counting = null;
let soon = 0;
let refused = ""; // what counting had to say last: only that is taken back when counting succeeds

function refreshBudget() {
  clearTimeout(soon);
  counting?.abort();
  soon = setTimeout(async () => {
    if (!attached.length && !$("text").value.trim()) {
      $("budget").hidden = true;
      $("send").disabled = false;
      settle(true);
      return;
    }
    counting = new AbortController();
    const { signal } = counting;
    const counted = await attempt(async () => {
      const pending = { role: "user", parts: compose($("text").value) };
      const found = await withFiles([...store.branch(chat, parent), pending], (asked) => api.count(asked, signal));
      if (signal.aborted) return false;
      tellTimes(inOrder($("text").value), found.parts);
      const memory = (found.kv_bytes + found.feature_bytes) / 1e6;
      $("budget").hidden = false;
      $("budget").classList.toggle("over", found.left < 1);
      $("budget-bar").value = Math.min(1, found.total / found.context);
      const number = (value) => value.toLocaleString();
      $("budget-text").textContent =
        found.left < 1
          ? `${number(found.total)} tokens are more than the context of ${number(found.context)}: use fewer images or frames`
          : `${number(found.total)} of ${number(found.context)} tokens, ${memory < 10 ? memory.toFixed(1) : Math.round(memory)} MB`;
      $("send").disabled = found.left < 1;
      return true;
    });
    if (!signal.aborted) settle(counted);
  }, 250);
}

function settle(counted) {
  if (!counted) refused = $("problem").textContent;
  else if (refused && $("problem").textContent === refused) problem();
}

async function answer(question) {
  const node = store.add(chat, question.id, "assistant", [{ type: "text", text: "" }]);
  const path = store.branch(chat, question.id);
  parent = node.id;
  running = new AbortController();
  draw();
  await attempt(() => store.save(chat)); // the question is not lost if the page is closed now
  try {
    await withFiles(path, async (asked) => {
      node.frames = asked.frames;
      for await (const chunk of api.stream(asked, running.signal)) {
        const choice = chunk.choices?.[0];
        if (choice?.delta?.content) node.parts[0].text += choice.delta.content;
        if (choice?.finish_reason) node.finish = choice.finish_reason;
        if (chunk.usage) node.usage = chunk.usage;
        if (chunk.timings) node.timings = chunk.timings;
        if (choice?.delta?.content) drawOne(node);
      }
    });
  } catch (error) {
    node.error = error.name === "AbortError" ? "stopped" : error.message;
    if (error.status === 401) askForKey();
  } finally {
    running = null;
    await attempt(() => store.save(chat));
    draw();
    drawChats();
  }
}

async function send() {
  const text = $("text").value.trim();
  if (running || (!text && !attached.length)) return;
  const parts = await attempt(() => compose(text));
  if (!parts) return;
  if (!parts.some((part) => part.type === "text" && part.text.trim())) {
    problem("write a question about what is attached");
    return;
  }
  problem();
  const question = store.add(chat, parent, "user", parts);
  chat.title ||= text.replace(MARK, "").trim().slice(0, 60);
  clear();
  await answer(question);
}

const media = (node) => store.branch(chat, node.id).flatMap((one) => one.parts.filter((part) => part.key));

/** Ask which image an answer leaned on, and show it; or hide it, or ask no more. */
async function explain(node) {
  problem();
  const known = leaned.get(node);
  leaned.delete(node);
  known?.abort?.();
  if (!known) {
    const asking = new AbortController();
    leaned.set(node, asking);
    drawLeaned(node);
    const found = await attempt(() =>
      withFiles(store.branch(chat, node.id), async (said) => {
        const asked = { ...said, frames: node.frames ?? said.frames };
        const question = { ...asked, messages: asked.messages.slice(0, -1) };
        const [told, { parts }] = await Promise.all([api.explain(asked, asking.signal), api.count(question, asking.signal)]);
        return { images: told.images.map((image, index) => ({ ...image, times: parts[index + 1].times })) };
      }),
    );
    if (leaned.get(node) !== asking) return;
    if (found) leaned.set(node, found);
    else leaned.delete(node);
  }
  drawLeaned(node);
}

function drawLeaned(node, item = $(`m-${node.id}`)) {
  const button = item?.querySelector(".look");
  if (!button) return;
  const known = leaned.get(node);
  button.ariaExpanded = Boolean(known?.images);
  button.textContent = known && !known.images ? "Looking…" : "Which image?";
  item.querySelector(".leaned")?.remove();
  if (known?.images) item.append(leanedOn(known, media(node)));
}

function clear() {
  for (const item of attached) URL.revokeObjectURL(item.url);
  attached = [];
  $("text").value = "";
  parent = chat.leaf;
  drawAttached();
}

async function edit(node) {
  clear();
  problem();
  parent = node.parent;
  let text = "";
  for (const part of node.parts) {
    if (part.type === "text") {
      text += part.text;
      continue;
    }
    const blob = await store.file(part.key);
    if (!blob) {
      problem(`${part.name} is no longer in this browser and is left out; attach it again`);
      continue;
    }
    attached.push({ key: part.key, kind: part.type, name: part.name, label: part.label ?? "", blob, url: URL.createObjectURL(blob) });
    text += mark(attached.length - 1);
  }
  $("text").value = text;
  drawAttached();
  $("text").focus();
}

// --- the conversation ---

const seconds = (value) => (value < 1 ? `${Math.round(value * 1000)} ms` : `${value.toFixed(1)} s`);

function meta(node) {
  const line = make("div", { className: "meta" });
  const { usage, timings } = node;
  if (timings?.first_token != null) line.append(make("span", { textContent: `first token ${seconds(timings.first_token)}` }));
  if (timings?.tokens_per_second) line.append(make("span", { textContent: `${Math.round(timings.tokens_per_second)} tokens/s` }));
  if (usage) {
    const cached = usage.prompt_tokens_details?.cached_tokens ?? 0;
    line.append(make("span", { textContent: `${usage.prompt_tokens} tokens read, ${cached} of them reused` }));
  }
  if (node.finish === "length") line.append(make("span", { textContent: "cut at the longest answer" }));
  if (node.error) line.append(make("span", { className: "error", textContent: node.error }));
  const link = (text, label, onclick) => make("button", { type: "button", className: "link", textContent: text, ariaLabel: label, onclick });
  const others = store.siblings(chat, node);
  if (others.length > 1 && !running) {
    const at = others.indexOf(node);
    const go = (to) => async () => {
      store.show(chat, others[to]);
      parent = chat.leaf;
      draw();
      await attempt(() => store.save(chat));
    };
    if (at > 0) line.append(link("‹", "The version before", go(at - 1)));
    line.append(make("span", { textContent: `${at + 1} of ${others.length}` }));
    if (at < others.length - 1) line.append(link("›", "The version after", go(at + 1)));
  }
  if (!running) {
    if (node.role === "user") line.append(link("Edit", "Edit this message as a new branch", () => edit(node)));
    else line.append(link("Retry", "Answer again as a new branch", () => answer(chat.nodes[node.parent])));
    if (node.role === "assistant" && node.parts[0].text && media(node).length) {
      const look = link("Which image?", "Which image this answer leaned on", () => explain(node));
      look.classList.add("look");
      line.append(look);
    }
  }
  return line;
}

function shown(part) {
  const box = make("span", { className: "shown" });
  store.file(part.key).then((blob) => {
    if (!blob) {
      box.textContent = `${part.name} (no longer here)`;
      return;
    }
    const url = URL.createObjectURL(blob);
    const film = part.type === "video" && blob.type !== "image/gif";
    const element = film ? make("video", { src: url, controls: true, muted: true }) : make("img", { src: url, alt: part.label || part.name });
    element[film ? "onloadeddata" : "onload"] = () => film || URL.revokeObjectURL(url);
    box.prepend(element);
  });
  if (part.label) box.append(make("span", { textContent: part.label }));
  return box;
}

function message(node) {
  const item = make("li", { className: node.role, id: `m-${node.id}` });
  item.append(make("span", { className: "hidden", textContent: node.role === "user" ? "You:" : "Answer:" }));
  const said = make("div", { className: "said" });
  for (const part of node.parts) {
    said.append(part.type === "text" ? (node.role === "user" ? part.text : markdown(part.text)) : shown(part));
  }
  if (!said.textContent && !said.children.length && running) said.append("…");
  item.append(said, meta(node));
  drawLeaned(node, item);
  return item;
}

function drawOne(node) {
  const old = $(`m-${node.id}`);
  const list = $("messages");
  const bottom = list.scrollHeight - list.scrollTop - list.clientHeight < 80;
  if (old) old.replaceWith(message(node));
  if (bottom) list.scrollTop = list.scrollHeight;
}

function draw() {
  $("messages").replaceChildren(...store.branch(chat).map(message));
  $("messages").scrollTop = $("messages").scrollHeight;
  $("messages").ariaBusy = Boolean(running); // a screen reader reads an answer when it is whole
  $("title").textContent = chat.title || "New chat";
  $("stop").hidden = !running;
  $("send").hidden = Boolean(running);
}

async function drawChats() {
  const all = (await attempt(() => store.chats())) ?? [];
  $("chats").replaceChildren(
    ...all.map((one) => {
      const item = make(
        "li",
        {},
        make("button", { type: "button", className: "open", textContent: one.title || "Untitled", onclick: () => open(one) }),
        make("button", {
          type: "button", className: "link", textContent: "✕", ariaLabel: `Delete the chat ${one.title}`, onclick: () => discard(one),
        }),
      );
      if (one.id === chat.id) item.setAttribute("aria-current", "true");
      return item;
    }),
  );
}

function open(one) {
  running?.abort();
  chat = one;
  problem();
  clear();
  draw();
  drawChats();
  document.body.classList.remove("menu");
}

async function discard(one) {
  if (!confirm(`Delete “${one.title || "Untitled"}”?`)) return;
  await attempt(() => store.remove(one));
  if (one.id === chat.id) open(store.create());
  else drawChats();
}

// --- the page ---

async function start() {
  const found = await attempt(() => api.models());
  if (found) {
    problem();
    $("model").replaceChildren(...found.map((model) => make("option", { value: model.id, textContent: model.id })));
    $("frames").value = $("frames-shown").textContent = found[0].video_frames;
  }
  refreshBudget();
}

$("composer").onsubmit = (event) => {
  event.preventDefault();
  send();
};
$("text").onkeydown = (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
};
$("text").oninput = refreshBudget;
$("text").onpaste = (event) => {
  const files = [...event.clipboardData.files];
  if (!files.length) return;
  event.preventDefault();
  attach(files);
};
$("stop").onclick = () => running?.abort();
$("new").onclick = () => open(store.create());
$("menu").onclick = () => document.body.classList.add("menu");
$("hide").onclick = () => document.body.classList.remove("menu");
$("model").onchange = refreshBudget;
$("frames").oninput = () => ($("frames-shown").textContent = $("frames").value);
$("frames").onchange = drawAttached;
for (const name of ["files", "folder"]) {
  $(name).onclick = () => $(`pick-${name}`).click();
  $(`pick-${name}`).onchange = async (event) => {
    const byPath = (a, b) => (a.webkitRelativePath || "").localeCompare(b.webkitRelativePath || "", undefined, { numeric: true });
    await attach([...event.target.files].sort(byPath).filter((file) => name === "files" || /^(image|video)\//.test(file.type)));
    event.target.value = "";
  };
}
$("export").onclick = () =>
  attempt(async () => {
    const url = URL.createObjectURL(new Blob([await store.exported()], { type: "application/json" }));
    make("a", { href: url, download: "llava-interleave-chats.json" }).click();
    URL.revokeObjectURL(url);
  });
$("import").onclick = () => $("import-file").click();
$("import-file").onchange = (event) =>
  attempt(async () => {
    problem();
    await store.imported(await event.target.files[0].text());
    event.target.value = "";
    await drawChats();
  });
$("key-dialog").onclose = () => {
  api.useKey($("key").value);
  $("key").value = "";
  start();
};
addEventListener("dragover", (event) => {
  if (!event.dataTransfer.types.includes("Files")) return;
  event.preventDefault();
  document.body.classList.add("dropping");
});
addEventListener("dragleave", (event) => event.relatedTarget || document.body.classList.remove("dropping"));
addEventListener("drop", async (event) => {
  document.body.classList.remove("dropping");
  if (!event.dataTransfer.types.includes("Files")) return;
  event.preventDefault();
  await attach(await dropped(event.dataTransfer));
});

draw();
drawChats();
start();
