// Messages of a chat as a request body, their files uploaded.

import * as api from "./api.js";
import { $ } from "./state.js";
import * as store from "./store.js";

async function content(parts) {
  const result = [];
  let views = null;
  for (const part of parts) {
    if (part.type === "text") {
      result.push({ type: "text", text: part.text });
      views = null;
      continue;
    }
    const blob = await store.file(part.key);
    if (!blob) throw new Error(`${part.name} is no longer in this browser`);
    const url = await api.upload(part.name, blob, part.key);
    if (part.label) {
      if (!views) result.push({ type: "views", views: (views = {}) });
      if (part.label in views) throw new Error(`two views have the name ${part.label}`);
      views[part.label] = url;
    } else {
      views = null;
      result.push({ type: `${part.type}_url`, [`${part.type}_url`]: { url } });
    }
  }
  return result.length === 1 && result[0].type === "text" ? result[0].text : result;
}

async function requestBody(nodes) {
  const messages = [];
  for (const node of nodes) messages.push({ role: node.role, content: await content(node.parts) });
  const video = nodes.some((node) => node.parts.some((part) => part.type === "video"));
  return { model: $("model").value, messages, ...(video ? { frames: +$("frames").value } : {}) };
}

/** `send(body)`; repeated with fresh uploads if the server has dropped a file. */
export async function withUploads(nodes, send) {
  try {
    return await send(await requestBody(nodes));
  } catch (error) {
    if (error.code !== "file_not_found") throw error;
    api.forgetUploads();
    return send(await requestBody(nodes));
  }
}
