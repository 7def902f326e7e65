// The server's HTTP API: keys, uploads, counting, streamed answers.

let key = sessionStorage.getItem("key") ?? "";
const uploads = new Map(); // file key -> promise of the server's id

export class ApiError extends Error {
  constructor(status, message, code) {
    super(message);
    this.status = status;
    this.code = code;
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
    throw new ApiError(response.status, body?.error?.message ?? `the server answered ${response.status}`, body?.error?.code);
  }
  return response;
}

const post = (path, body, signal) =>
  call(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal });

export async function models() {
  return (await (await call("v1/models")).json()).data;
}

/** The server's id of a file; it is sent once. */
export function upload(name, blob, fileKey) {
  if (!uploads.has(fileKey)) {
    const form = new FormData();
    form.append("purpose", "vision");
    form.append("file", blob, name);
    const sent = call("v1/files", { method: "POST", body: form }).then((response) => response.json()).then((file) => file.id);
    sent.catch(() => uploads.delete(fileKey));
    uploads.set(fileKey, sent);
  }
  return uploads.get(fileKey);
}

/** The server may have dropped files to make room: send them again when they are needed next. */
export function forgetUploads() {
  uploads.clear();
}

export async function count(body, signal) {
  return (await post("v1/messages/count", body, signal)).json();
}

/** Which image the answer that ends the messages used. */
export async function attribution(body, signal) {
  return (await post("v1/messages/attribution", body, signal)).json();
}

/** The chunks of a streamed answer. */
export async function* stream(body, signal) {
  const response = await post("v1/chat/completions", { ...body, stream: true, stream_options: { include_usage: true } }, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new ApiError(0, "the connection was lost before the answer was complete");
    const events = (rest + value).split(/\r?\n\r?\n/);
    rest = events.pop();
    for (const event of events) {
      const data = event.split(/\r?\n/).filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trim()).join("\n");
      if (data === "[DONE]") return;
      if (!data) continue;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ApiError(500, chunk.error.message, chunk.error.code);
      yield chunk;
    }
  }
}
