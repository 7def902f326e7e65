// Messages of a chat as a request body, their files uploaded.

import * as api from "./api.js";
import { titleOf } from "./media.js";
import { state } from "./state.js";
import * as store from "./store.js";
import { mediaOf } from "./tree.js";

const idOf = (part) => api.upload(part.key, part.name, () => store.file(part.key));

/** The content of a message. Named views that follow each other are one part. */
async function content(parts) {
  /** @type {any[]} */ const result = [];
  /** @type {any} */ let views = null;
  for (const part of parts) {
    if (part.type === "text") {
      result.push({ type: "text", text: part.text });
      views = null;
      continue;
    }
    const url = await idOf(part);
    if (part.label && part.type === "image") {
      if (!views) result.push({ type: "views", views: (views = {}) });
      if (part.label in views) throw new Error(`two views have the name ${part.label}: give each its own`);
      views[part.label] = url;
    } else {
      views = null;
      const { frames, start, end } = part;
      result.push({ type: `${part.type}_url`, [`${part.type}_url`]: { url }, ...(part.type === "video" ? { frames, start, end } : {}) });
    }
  }
  return result.length === 1 && result[0].type === "text" ? result[0].text : result;
}

/** Messages and model of a chat, as every route takes them; `progress` hears how many of all files are sent. */
export async function requestBody(chat, nodes, progress = (sent, all) => {}) {
  const media = mediaOf(nodes);
  let sent = 0;
  progress(sent, media.length);
  const uploads = await Promise.allSettled(media.map((part) => idOf(part).then(() => progress((sent += 1), media.length))));
  uploads.forEach((upload, i) => {
    if (upload.status === "fulfilled") return;
    const { status, message, code } = upload.reason;
    throw status === 400 ? new api.ApiError(status, `${titleOf(media[i], i + 1)}: ${message}`, code) : upload.reason;
  });
  const messages = [];
  const system = chat.settings?.system?.trim();
  if (system) messages.push({ role: "system", content: system });
  for (const { role, parts } of nodes) messages.push({ role, content: await content(parts) });
  return { model: chat.model ?? state.models[0]?.id, messages };
}

/** `send(body)`; repeated with fresh uploads if the server has lost a file, and with room for them if it is full. */
export async function withUploads(chat, nodes, send, progress) {
  const once = async () => send(await requestBody(chat, nodes, progress));
  try {
    return await once();
  } catch (error) {
    if (error.code === "file_not_found") api.forgetUploads();
    else if (error.code !== "files_full" || !(await api.makeRoom(new Set(mediaOf(nodes).map((part) => part.key))))) throw error;
    return once();
  }
}
