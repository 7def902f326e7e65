// Chats and their files in the browser. A chat is a tree of messages; its `leaf` selects the branch that is shown.

const NAME = "llava-interleave";

function result(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

let connection;

function database() {
  connection ??= (() => {
    const request = indexedDB.open(NAME, 1);
    request.onupgradeneeded = () => {
      request.result.createObjectStore("chats", { keyPath: "id" });
      request.result.createObjectStore("files");
    };
    return result(request);
  })();
  return connection;
}

async function table(name, mode = "readonly") {
  return (await database()).transaction(name, mode).objectStore(name);
}

export async function chats() {
  const all = await result((await table("chats")).getAll());
  return all.sort((a, b) => b.changed - a.changed);
}

export async function save(chat) {
  chat.changed = Date.now();
  await result((await table("chats", "readwrite")).put(chat));
}

export async function keep(key, blob) {
  await result((await table("files", "readwrite")).put(blob, key));
}

export async function file(key) {
  return result((await table("files")).get(key));
}

/** Drop a chat, and the files that no other chat has. */
export async function remove(chat) {
  await result((await table("chats", "readwrite")).delete(chat.id));
  const used = new Set((await chats()).flatMap(keys));
  for (const key of keys(chat)) if (!used.has(key)) await result((await table("files", "readwrite")).delete(key));
}

function keys(chat) {
  return Object.values(chat.nodes).flatMap((node) => node.parts.filter((part) => part.key).map((part) => part.key));
}

/** Also on a page that came over plain http, where browsers withhold crypto.randomUUID. */
export function randomId() {
  return [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

export function create() {
  return { id: randomId(), title: "", changed: 0, nodes: {}, leaf: null };
}

/** Put a message after `parent` and show it. */
export function add(chat, parent, role, parts) {
  const node = { id: randomId(), parent, role, parts, made: Date.now() };
  chat.nodes[node.id] = node;
  chat.leaf = node.id;
  return node;
}

/** The messages of the branch that ends in `leaf`, first to last. */
export function branch(chat, leaf = chat.leaf) {
  const path = [];
  for (let node = chat.nodes[leaf]; node; node = chat.nodes[node.parent]) path.unshift(node);
  return path;
}

export function siblings(chat, node) {
  return Object.values(chat.nodes).filter((other) => other.parent === node.parent).sort((a, b) => a.made - b.made);
}

/** Show the branch through `node` that was written last. */
export function show(chat, node) {
  for (;;) {
    const next = Object.values(chat.nodes).filter((other) => other.parent === node.id).sort((a, b) => b.made - a.made)[0];
    if (!next) break;
    node = next;
  }
  chat.leaf = node.id;
}

function dataUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
}

/** Everything as one JSON text, files included. */
export async function exportChats() {
  const all = await chats();
  const files = {};
  for (const key of new Set(all.flatMap(keys))) {
    const blob = await file(key);
    if (blob) files[key] = await dataUrl(blob);
  }
  return JSON.stringify({ format: NAME, version: 1, chats: all, files });
}

/** Import an export; existing chats are replaced. Throws before any change if the file is not valid. */
export async function importChats(text) {
  let data;
  try {
    data = JSON.parse(text);
  } catch {
    throw new Error("this file is not JSON");
  }
  if (data?.format !== NAME || data.version !== 1 || !Array.isArray(data.chats) || typeof data.files !== "object") {
    throw new Error("this file is not an export of this page");
  }
  for (const chat of data.chats) {
    const nodes = typeof chat?.id === "string" && chat.nodes && typeof chat.nodes === "object" ? Object.entries(chat.nodes) : null;
    const valid = nodes?.every(([id, node]) => {
      const seen = new Set();
      for (let at = node; at; at = chat.nodes[at.parent]) {
        if (seen.has(at.id)) return false;
        seen.add(at.id);
      }
      return node.id === id && ["user", "assistant"].includes(node.role) && Array.isArray(node.parts);
    });
    if (!valid || (chat.leaf && !chat.nodes[chat.leaf])) throw new Error("a chat in this file is damaged");
  }
  const blobs = [];
  for (const [key, url] of Object.entries(data.files)) {
    if (!/^data:(image|video)\/[\w.+-]+;base64,/.test(url)) throw new Error("a file in this export is not an image or a video");
    const [head, body] = url.split(",", 2);
    blobs.push([key, new Blob([Uint8Array.from(atob(body), (c) => c.charCodeAt(0))], { type: head.slice(5, -7) })]);
  }
  for (const [key, blob] of blobs) await keep(key, blob);
  for (const chat of data.chats) await result((await table("chats", "readwrite")).put(chat));
  return data.chats.length;
}
