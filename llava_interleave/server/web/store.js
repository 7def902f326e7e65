// What the browser keeps: chats, drafts, files and thumbnails, in IndexedDB. Other tabs hear of every change.

import { merge } from "./tree.js";

const NAME = "llava-interleave";
const STORES = ["chats", "files", "drafts", "thumbs"];

/** @param {IDBRequest} request @returns {Promise<any>} */
function result(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

let connection;

function database() {
  connection ??= (() => {
    const request = indexedDB.open(NAME, 2);
    request.onupgradeneeded = () => {
      const db = request.result;
      for (const name of STORES) {
        if (!db.objectStoreNames.contains(name)) db.createObjectStore(name, ["chats", "drafts"].includes(name) ? { keyPath: "id" } : {});
      }
    };
    request.onsuccess = () => (request.result.onversionchange = () => request.result.close());
    return result(request);
  })();
  return connection;
}

/** One transaction; all its writes are kept, or none. @param {IDBTransactionMode} mode @param {(table: (name: string) => IDBObjectStore) => Promise<any>} work */
async function transaction(mode, work) {
  const open = (await database()).transaction(STORES, mode);
  const done = new Promise((resolve, reject) => {
    open.oncomplete = resolve;
    open.onabort = open.onerror = () => reject(open.error ?? new Error("the browser's storage is full"));
  });
  const value = await work((name) => open.objectStore(name));
  if (mode === "readwrite") await done;
  return value;
}

const read = (name, key) => transaction("readonly", (table) => result(table(name).get(key)));
const all = (name) => transaction("readonly", (table) => result(table(name).getAll()));

const channel = new BroadcastChannel(NAME);
const tell = (kind, id) => channel.postMessage({ kind, id });

/** @param {(kind: "chat" | "draft" | "removed", id: string) => void} hear */
export function onChange(hear) {
  channel.onmessage = ({ data }) => hear(data.kind, data.id);
}

/** Ask the browser not to evict what it keeps when the disk is full. */
export const persist = () => navigator.storage?.persist?.();

/** @returns {Promise<import("./types").Chat[]>} pinned ones first, then the newest. */
export async function chats() {
  return (await all("chats")).sort((a, b) => Number(b.pinned ?? 0) - Number(a.pinned ?? 0) || b.changed - a.changed);
}

/** @returns {Promise<import("./types").Chat | undefined>} */
export const chat = (id) => read("chats", id);

/** Save a chat, joined with what other tabs have saved of it. @param {import("./types").Chat} chat */
export async function save(chat) {
  chat.changed = Date.now();
  await transaction("readwrite", async (table) => {
    const { leaf } = chat;
    Object.assign(chat, merge(await result(table("chats").get(chat.id)), chat), { leaf });
    await result(table("chats").put(chat));
  });
  tell("chat", chat.id);
}

/** @returns {Promise<import("./types").Draft[]>} */
export const drafts = () => all("drafts");
/** @returns {Promise<import("./types").Draft | undefined>} */
export async function draft(id) {
  const late = JSON.parse(localStorage.getItem(`draft-${id}`) ?? "null");
  localStorage.removeItem(`draft-${id}`);
  const kept = await read("drafts", id);
  return late && late.changed > (kept?.changed ?? 0) ? late : kept;
}

/** Keep a draft while the page is being closed, when IndexedDB no longer finishes. @param {import("./types").Draft} draft */
export function saveLast(draft) {
  if (draft.text || draft.attachments.length) localStorage.setItem(`draft-${draft.id}`, JSON.stringify({ ...draft, changed: Date.now() }));
}

/** Save the message being written; an empty one is dropped. `files`: new ones, [key, blob].
 * @param {import("./types").Draft} draft @param {[string, Blob][]} files */
export async function saveDraft(draft, files = []) {
  const empty = !draft.text && !draft.attachments.length && !draft.stash && !draft.editing;
  await transaction("readwrite", async (table) => {
    for (const [key, blob] of files) table("files").put(blob, key);
    await result(empty ? table("drafts").delete(draft.id) : table("drafts").put(draft));
  });
  tell("draft", draft.id);
}

/** @returns {Promise<Blob | undefined>} */
export const file = (key) => read("files", key);
/** @returns {Promise<Blob | undefined>} */
export const thumb = (key) => read("thumbs", key);
export const keepThumb = (key, blob) => transaction("readwrite", (table) => result(table("thumbs").put(blob, key)));

/** Drop a chat with its draft; -> a function that puts both back. Its files stay until `collect`. */
export async function remove(id) {
  const [chat, draft] = [await read("chats", id), await read("drafts", id)];
  await transaction("readwrite", async (table) => {
    table("drafts").delete(id);
    await result(table("chats").delete(id));
  });
  tell("removed", id);
  return async () => {
    await transaction("readwrite", async (table) => {
      if (draft) table("drafts").put(draft);
      if (chat) await result(table("chats").put(chat));
    });
    tell("chat", id);
  };
}

export const keysOf = (chat) => Object.values(chat.nodes).flatMap((node) => node.parts.filter((part) => part.key).map((part) => part.key));

/** Drop the files that no chat and no draft has. */
export const collect = () =>
  transaction("readwrite", async (table) => {
    const [chats, drafts] = [await result(table("chats").getAll()), await result(table("drafts").getAll())];
    const used = new Set(chats.flatMap(keysOf));
    for (const draft of drafts) for (const { key } of [...draft.attachments, ...(draft.stash?.attachments ?? [])]) used.add(key);
    for (const name of ["files", "thumbs"]) {
      for (const key of await result(table(name).getAllKeys())) if (!used.has(key)) table(name).delete(key);
    }
  });

/** Add chats and files of an export, all or none. Chats that exist are joined with them. */
export const importAll = (chats, files) =>
  transaction("readwrite", async (table) => {
    for (const [key, blob] of files) {
      if (!(await result(table("files").getKey(key)))) table("files").put(blob, key); // never replaces what a chat has
    }
    for (const chat of chats) await result(table("chats").put(merge(await result(table("chats").get(chat.id)), chat)));
    tell("chat", "");
  });
