// A chat as a tree of messages. Knows neither the browser's storage nor the page.

/** Also on a page that came over plain http, where browsers withhold crypto.randomUUID. */
export function randomId() {
  return [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** @returns {import("./types").Chat} */
export function create() {
  return { id: randomId(), title: "", changed: 0, nodes: {}, leaf: null };
}

/** Put a message after `parent` and show it.
 * @param {import("./types").Chat} chat @param {string | null} parent @param {"user" | "assistant"} role @param {import("./types").Part[]} parts
 * @returns {import("./types").Message} */
export function add(chat, parent, role, parts) {
  const now = Date.now();
  const node = { id: randomId(), parent, role, parts, made: now, changed: now };
  chat.nodes[node.id] = node;
  chat.leaf = node.id;
  return node;
}

/** The messages of the branch that ends in `leaf`, first to last. @param {import("./types").Chat} chat */
export function branch(chat, leaf = chat.leaf) {
  const path = [];
  for (let node = chat.nodes[leaf ?? ""]; node; node = chat.nodes[node.parent ?? ""]) path.unshift(node);
  return path;
}

/** @param {import("./types").Chat} chat @param {import("./types").Message} node */
export function siblings(chat, node) {
  return Object.values(chat.nodes).filter((other) => other.parent === node.parent).sort((a, b) => a.made - b.made);
}

/** Show the branch through `node` that was written last. @param {import("./types").Chat} chat @param {import("./types").Message} node */
export function show(chat, node) {
  for (;;) {
    const next = Object.values(chat.nodes).filter((other) => other.parent === node.id).sort((a, b) => b.made - a.made)[0];
    if (!next) break;
    node = next;
  }
  chat.leaf = node.id;
}

/** Images and videos of messages, in order: image k of the conversation is the k-th. @param {import("./types").Message[]} nodes */
export const mediaOf = (nodes) => nodes.flatMap((node) => node.parts.filter((part) => part.key));

/** @param {import("./types").Message} node */
export const textOf = (node) => node.parts.map((part) => part.text ?? "").join("");

/** Both tabs' messages; of two versions of a message the newer one. The rest is of the newer chat.
 * @param {import("./types").Chat | undefined} stored @param {import("./types").Chat} chat @returns {import("./types").Chat} */
export function merge(stored, chat) {
  if (!stored) return chat;
  const nodes = { ...stored.nodes };
  for (const [id, node] of Object.entries(chat.nodes)) {
    if (!nodes[id] || node.changed >= nodes[id].changed) nodes[id] = node;
  }
  return { ...(stored.changed > chat.changed ? stored : chat), nodes };
}
