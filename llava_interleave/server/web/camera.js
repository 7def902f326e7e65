// The camera of this device: photos, and live questions about what it sees.

import * as api from "./api.js";
import { attach } from "./attachments.js";
import { $, announce, make, plural } from "./dom.js";
import { attempt, model } from "./state.js";

const EVERY = 1000; // milliseconds between two frames of a live session, at least
const LIVE_SIDE = 768; // pixels of a frame's longer side

/** @type {MediaStream | null} */ let stream = null;
let taken = 0;
/** The live session, while the camera is watched. @type {{ id: string, answering: AbortController | null } | null} */
let live = null;

async function openCamera() {
  if (!navigator.mediaDevices) {
    $("pick-camera").click(); // a page over plain http: the device's own camera program
    return;
  }
  stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } }).catch((error) => {
    throw new Error(error.name === "NotAllowedError" ? "the browser does not let this page use the camera: allow it in the address bar" : "there is no camera that can be used");
  });
  $("camera-view").srcObject = stream;
  $("camera").showModal();
}

async function photo(side = Infinity) {
  const view = $("camera-view");
  const scale = Math.min(1, side / Math.max(view.videoWidth, view.videoHeight));
  const canvas = make("canvas", { width: Math.round(scale * view.videoWidth), height: Math.round(scale * view.videoHeight) });
  canvas.getContext("2d").drawImage(view, 0, 0, canvas.width, canvas.height);
  return new Promise((resolve) => canvas.toBlob(resolve, "image/jpeg", 0.92));
}

async function take() {
  const blob = await photo();
  taken += 1;
  await attach([new File([blob], `photo-${taken}.jpg`, { type: "image/jpeg", lastModified: Date.now() })]);
  announce(`Photo ${taken} taken`);
  $("camera-count").textContent = `${taken} taken`;
}

/** Send frames until the session ends. */
async function watch() {
  const session = (live = { id: (await api.startLive(model()?.id)).id, answering: null });
  showLive();
  const began = performance.now();
  try {
    while (live === session) {
      const at = performance.now();
      const { frames } = await api.seeFrame(session.id, await photo(LIVE_SIDE), ((at - began) / 1000).toFixed(2));
      if (live === session) $("live-frames").textContent = `Watching: the last ${plural(frames, "frame")}, sent to this server and not kept.`;
      await new Promise((resolve) => setTimeout(resolve, Math.max(0, EVERY - (performance.now() - at))));
    }
  } finally {
    api.endLive(session.id).catch(() => {}); // it ends by itself, too
    if (live === session) stopLive();
  }
}

function stopLive() {
  live?.answering?.abort();
  live = null;
  showLive();
}

function showLive() {
  $("live").hidden = !live;
  $("camera-live").textContent = live ? "Stop" : "Watch live";
  for (const name of ["live-answer", "live-frames"]) $(name).textContent = "";
  if (live) $("live-question").focus();
}

async function askLive() {
  const session = live, question = $("live-question").value.trim();
  if (!session || !question) return;
  session.answering?.abort();
  const controller = (session.answering = new AbortController());
  let text = "";
  $("live-answer").textContent = "…";
  for await (const chunk of api.askLive(session.id, { model: model()?.id, messages: [{ role: "user", content: question }] }, controller.signal)) {
    if (controller.signal.aborted) return;
    text += chunk.choices?.[0]?.delta?.content ?? "";
    if (text) $("live-answer").textContent = text;
  }
}

export function startCamera() {
  $("open-camera").onclick = () => attempt(openCamera);
  $("camera-take").onclick = () => attempt(take);
  $("camera-live").onclick = () => (live ? stopLive() : attempt(watch, (message) => ($("camera-count").textContent = message)));
  $("live").onsubmit = (event) => {
    event.preventDefault();
    attempt(askLive, (message) => ($("live-answer").textContent = message));
  };
  $("camera").onclose = () => {
    if (live) stopLive();
    stream?.getTracks().forEach((track) => track.stop());
    stream = null;
    taken = 0;
    $("camera-count").textContent = "";
  };
}
