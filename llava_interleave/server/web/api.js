// The server's HTTP API: keys, models, uploads, counting, prefill, attribution, streamed answers.

let key = sessionStorage.getItem("key") ?? "";
/** @type {Map<string, Promise<string>>} */
const uploads = new Map(); // hash of a file -> the server's id
/** Files that the server cannot read: hash -> why. @type {Map<string, string>} */
export const unreadable = new Map();
const UPLOADS_AT_A_TIME = 3;
const TRIES = 30; // of an upload that a rate limit refuses

export const INVALID = "invalid_image"; // code of an error about a file

export class ApiError extends Error {
  constructor(status, message, code = "") {
    super(message);
    this.status = status; // 0: no connection
    this.code = code;
    this.retry = 0; // seconds after which the server would have it again
  }
}

export function useKey(value) {
  key = value.trim();
  sessionStorage.setItem("key", key);
}

async function call(path, options = {}) {
  const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "the server cannot be reached");
  }
  if (!response.ok) {
    const body = await response.json().catch(() => null);
    const error = new ApiError(response.status, body?.error?.message ?? `the server answered ${response.status}`, body?.error?.code);
    error.retry = +(response.headers.get("Retry-After") ?? 0);
    throw error;
  }
  return response;
}

const post = (path, body, signal) =>
  call(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal });
const posted = async (path, body, signal) => (await post(path, body, signal)).json();

export const models = async () => (await (await call("v1/models")).json()).data;
export const reachable = () => call("health").then(() => true, () => false);
/** Tokens of each part, and the times of the frames of videos. */
export const count = (body, signal) => posted("v1/messages/count", body, signal);
/** Compute the images of a coming question while the user still writes. */
export const prefill = (body, signal) => posted("v1/messages/prefill", body, signal);
/** Which image the answer that ends the messages used. */
export const attribution = (body, signal) => posted("v1/messages/attribution", body, signal);

/** Live sessions: frames are appended, and questions see the last ones. */
export const startLive = (model) => posted("v1/live", { model });
export async function seeFrame(id, blob, at) {
  const form = new FormData();
  form.append("file", blob, "frame.jpg");
  form.append("at", String(at));
  return (await call(`v1/live/${id}/frames`, { method: "POST", body: form })).json();
}
export const askLive = (id, body, signal) => stream(body, signal, `v1/live/${id}/chat/completions`);
export const endLive = (id) => call(`v1/live/${id}`, { method: "DELETE" });

const queue = [];
let sending = 0;

async function inTurn(work) {
  if (sending >= UPLOADS_AT_A_TIME) await new Promise((resolve) => queue.push(resolve));
  sending += 1;
  try {
    return await work();
  } finally {
    sending -= 1;
    queue.shift()?.();
  }
}

/** The server's id of a file; it is sent once. @param {() => Promise<Blob | undefined>} read */
export async function upload(hash, name, read) {
  if (unreadable.has(hash)) throw new ApiError(400, unreadable.get(hash), INVALID);
  if (!uploads.has(hash)) {
    const sent = inTurn(async () => {
      const blob = await read();
      if (!blob) throw new ApiError(0, `${name} is no longer in this browser`);
      return send(name, blob);
    });
    sent.catch((error) => {
      uploads.delete(hash);
      if (error.code === INVALID) unreadable.set(hash, error.message);
    });
    uploads.set(hash, sent);
  }
  return /** @type {Promise<string>} */ (uploads.get(hash));
}

async function send(name, blob) {
  const form = new FormData();
  form.append("purpose", "vision");
  form.append("file", blob, name);
  for (let tries = 1; ; tries += 1) {
    try {
      return (await (await call("v1/files", { method: "POST", body: form })).json()).id;
    } catch (error) {
      if (!error.retry || tries === TRIES) throw error;
      await new Promise((resolve) => setTimeout(resolve, 1000 * error.retry));
    }
  }
}

/** An image as the server reads it, for a browser that cannot decode the file. @param {() => Promise<Blob | undefined>} read */
export async function preview(hash, name, read, size) {
  const id = await upload(hash, name, read);
  return (await call(`v1/files/${id}/preview?size=${size}`)).blob();
}

/** Delete uploads of this page; -> how many. @param {Set<string>} hashes */
export async function release(hashes) {
  const found = [...uploads].filter(([hash]) => hashes.has(hash));
  for (const [hash, sent] of found) {
    uploads.delete(hash);
    await sent.then((id) => call(`v1/files/${id}`, { method: "DELETE" })).catch(() => {});
  }
  return found.length;
}

/** Delete uploads of this page that are not among `hashes`, to make room; -> how many. */
export const makeRoom = (hashes) => release(new Set([...uploads.keys()].filter((hash) => !hashes.has(hash))));

/** The server has lost uploads (it was restarted, say): send them again when they are needed next. */
export const forgetUploads = () => (uploads.clear(), unreadable.clear());

/** The chunks of a streamed answer. */
export const stream = (body, signal, path = "v1/chat/completions") =>
  events(path, { ...body, stream: true, return_progress: true, stream_options: { include_usage: true } }, signal);

/** The events of a streamed response. */
export async function* events(path, body, signal) {
  const response = await post(path, body, signal);
  const reader = /** @type {ReadableStream} */ (response.body).pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read().catch((error) => {
      throw error.name === "AbortError" ? error : new ApiError(0, "the connection was lost");
    });
    if (done) throw new ApiError(0, "the connection was lost");
    const events = (rest + value).split(/\r?\n\r?\n/);
    rest = events.pop() ?? "";
    for (const event of events) {
      const data = event.split(/\r?\n/).filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trim()).join("\n");
      if (data === "[DONE]") return;
      if (!data) continue;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ApiError(chunk.error.code === "stopping" ? 0 : 500, chunk.error.message, chunk.error.code);
      yield chunk;
    }
  }
}
