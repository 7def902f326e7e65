// Images enlarged: one or two side by side, zoomed and moved together, with heat maps; videos with the frames that are sent.

import { preview } from "./api.js";
import { renderAttachments } from "./attachments.js";
import { changed } from "./composer.js";
import { $, button, make } from "./dom.js";
import { isVideoFile, titleOf, videoFrames } from "./media.js";
import { model, state } from "./state.js";
import * as store from "./store.js";

const PREVIEW = 2048; // pixels of the longer side of what the server reads
const STEP = 1.25;
const MOVE = 60; // pixels a key press

/** @type {any[]} */ let items = [];
/** @type {number[]} */ let shown = []; // indices of one or two items
/** @type {((index: number) => any[]) | null} */ let overlay = null; // heat maps of an item, one per frame
let zoom = 1, x = 0, y = 0;
/** @type {string[]} */ let urls = [];

/** @param {any[]} media @param {number} index @param {((index: number) => any[]) | null} [heat] */
export function openViewer(media, index, heat = null) {
  items = media;
  overlay = heat;
  show([index]);
  if (!$("viewer").open) $("viewer").showModal();
}

/** @param {any[]} media @param {number[]} indices two */
export function openCompare(media, indices) {
  openViewer(media, indices[0]);
  show(indices);
}

function show(indices) {
  shown = indices;
  urls.splice(0).forEach((url) => URL.revokeObjectURL(url));
  setView(1, 0, 0);
  $("viewer-title").textContent = shown.map((index) => titleOf(items[index], index + 1)).join(" and ");
  $("stage").replaceChildren(...shown.map(pane));
  $("stage").classList.toggle("two", shown.length === 2);
  const others = items.map((item, index) => ({ item, index })).filter(({ item, index }) => index !== shown[0] && item.type === "image");
  const select = $("compare");
  select.replaceChildren(make("option", { value: "", textContent: "nothing" }), ...others.map(({ item, index }) => make("option", { value: index, textContent: `${index + 1}: ${item.label ?? item.name}` })));
  select.value = shown[1] ?? "";
  $("compare-row").hidden = !others.length || items[shown[0]].type !== "image";
  $("previous").disabled = shown[0] === 0;
  $("next").disabled = shown[0] === items.length - 1;
  $("heat-row").hidden = !overlay;
}

function pane(index) {
  const item = items[index];
  const box = make("figure", { className: "pane" });
  const caption = make("figcaption", { textContent: `${index + 1}` });
  box.append(caption);
  store.file(item.key).then(async (blob) => {
    if (!blob || !box.isConnected) {
      box.append(make("p", { textContent: `${item.name} is no longer in this browser` }));
      return;
    }
    const url = URL.createObjectURL(blob);
    urls.push(url);
    if (isVideoFile(item, blob)) showVideo(box, item, index, url);
    else showImage(box, item, index, url, caption);
  });
  return box;
}

function showImage(box, item, index, url, caption) {
  const image = make("img", { src: url, alt: titleOf(item, index + 1), draggable: false });
  image.onload = () => (caption.textContent = `${index + 1} · ${image.naturalWidth} × ${image.naturalHeight}`);
  const fail = () => image.replaceWith(make("p", { textContent: `Neither this browser nor the server can show ${item.name}.` }));
  image.onerror = async () => {
    image.onload = () => (caption.textContent = `${index + 1} · as the server reads it`);
    image.onerror = fail;
    const shown = await preview(item.key, item.name, () => store.file(item.key), PREVIEW).catch(fail);
    if (!shown) return;
    urls.push((image.src = URL.createObjectURL(shown)));
  };
  const layer = make("div", { className: "layer" }, image);
  layer.append(...(overlay?.(index) ?? []).slice(0, 1));
  box.append(layer);
  place();
}

/** A video, and the frames that the model gets of it. */
function showVideo(box, item, index, url) {
  const video = make("video", { src: url, controls: true, muted: true });
  const strip = make("div", { className: "strip", role: "group", ariaLabel: "Frames that are sent" });
  let latest = 0; // of two drawings that run at once only the last one may go on
  const draw = () => {
    const run = (latest += 1);
    strip.replaceChildren();
    const times = item.times ?? [];
    const covers = overlay?.(index) ?? [];
    videoFrames(url, times, () => strip.isConnected && run === latest && times === (item.times ?? times), (canvas, i) => {
      if (run !== latest) return;
      const time = times[i];
      strip.append(make("button", { type: "button", className: "frame", ariaLabel: `Frame ${i + 1}, at ${time.toFixed(2)} seconds`, onclick: () => ((video.currentTime = time + 0.001), video.pause()) }, make("span", { className: "layer" }, canvas, covers[i]), make("span", { textContent: `${time.toFixed(2)} s` })));
    }).catch(() => strip.replaceChildren("This browser cannot show the frames."));
  };
  box.append(video);
  const attached = state.draft.attachments.includes(item);
  if (attached) box.append(sampling(item, video, draw));
  if (attached || item.times) box.append(strip);
  draw();
}

/** Which frames of an attached video are sent: how many, and between which seconds. */
function sampling(item, video, draw) {
  const most = model()?.limits.frames ?? 64;
  const frames = make("input", { type: "range", ariaLabel: "Number of frames", min: 1, max: most, value: item.frames ?? model()?.video_frames ?? 8 });
  const value = make("output", { textContent: frames.value });
  const seconds = (name, label) => {
    const input = make("input", { type: "number", min: 0, step: 0.1, value: item[name] ?? "", ariaLabel: label, placeholder: name });
    input.onchange = () => set(name, input.value === "" ? undefined : +input.value);
    const here = button(`${label}: here`, () => set(name, +(input.value = video.currentTime.toFixed(1))), { className: "quiet", label: `${label} at the video's position` });
    return make("span", { className: "row" }, here, input);
  };
  const set = (name, to) => {
    item[name] = to;
    changed();
    renderAttachments();
  };
  frames.oninput = () => (value.textContent = frames.value);
  frames.onchange = () => set("frames", +frames.value);
  let times = item.times;
  const timer = setInterval(() => {
    if (!video.isConnected) clearInterval(timer);
    else if (item.times !== times) ((times = item.times), draw()); // the server has said which frames
  }, 200);
  return make("div", { className: "sampling" }, make("span", { className: "row" }, "Frames: ", value, frames), seconds("start", "Start"), seconds("end", "End"));
}

function setView(to, left, top) {
  zoom = Math.min(16, Math.max(1, to));
  const limit = (zoom - 1) / 2;
  const clamp = (value, size) => Math.min(limit * size, Math.max(-limit * size, value));
  const { clientWidth = 1, clientHeight = 1 } = $("stage").firstElementChild ?? {};
  [x, y] = [clamp(left, clientWidth), clamp(top, clientHeight)];
  place();
}

function place() {
  for (const layer of $("stage").querySelectorAll("div.layer")) layer.style.transform = `translate(${x}px, ${y}px) scale(${zoom})`;
  $("zoom").textContent = `${Math.round(zoom * 100)} %`;
}

/** Zoom so that the point of the event stays where it is. */
function zoomAt(event, factor) {
  const box = event.target.closest(".pane")?.getBoundingClientRect();
  if (!box) return;
  const [dx, dy] = [event.clientX - box.x - box.width / 2, event.clientY - box.y - box.height / 2];
  const to = Math.min(16, Math.max(1, zoom * factor));
  setView(to, dx - ((dx - x) * to) / zoom, dy - ((dy - y) * to) / zoom);
}

const step = (by) => shown[0] + by >= 0 && shown[0] + by < items.length && show([shown[0] + by, ...shown.slice(1)].filter((one, i, all) => all.indexOf(one) === i));

export function startViewer() {
  const stage = $("stage");
  $("previous").onclick = () => step(-1);
  $("next").onclick = () => step(1);
  $("zoom-in").onclick = () => setView(zoom * STEP, x, y);
  $("zoom-out").onclick = () => setView(zoom / STEP, x, y);
  $("zoom").onclick = () => setView(1, 0, 0);
  $("viewer-close").onclick = () => $("viewer").close();
  $("compare").onchange = (event) => show(event.target.value === "" ? [shown[0]] : [shown[0], +event.target.value]);
  $("heat").oninput = (event) => stage.style.setProperty("--heat", `${event.target.value / 100}`);
  $("viewer").onclose = () => {
    stage.replaceChildren();
    urls.splice(0).forEach((url) => URL.revokeObjectURL(url));
  };
  stage.onwheel = (event) => {
    if (event.target.closest(".strip, .sampling")) return;
    event.preventDefault();
    zoomAt(event, event.deltaY < 0 ? STEP : 1 / STEP);
  };
  stage.ondblclick = (event) => zoomAt(event, zoom > 1 ? 1 / zoom : 3);
  stage.onpointerdown = (event) => {
    if (zoom === 1 || !event.target.closest(".layer")) return;
    const [fromX, fromY] = [event.clientX - x, event.clientY - y];
    stage.setPointerCapture(event.pointerId);
    stage.onpointermove = (moved) => setView(zoom, moved.clientX - fromX, moved.clientY - fromY);
    stage.onpointerup = stage.onpointercancel = () => (stage.onpointermove = null);
  };
  $("viewer").onkeydown = (event) => {
    if (event.target.closest("input, select, video")) return;
    const moves = { ArrowLeft: [MOVE, 0], ArrowRight: [-MOVE, 0], ArrowUp: [0, MOVE], ArrowDown: [0, -MOVE] }[event.key];
    if (zoom > 1 && moves) setView(zoom, x + moves[0], y + moves[1]);
    else if (event.key === "ArrowLeft") step(-1);
    else if (event.key === "ArrowRight") step(1);
    else if (event.key === "+" || event.key === "=") setView(zoom * STEP, x, y);
    else if (event.key === "-") setView(zoom / STEP, x, y);
    else if (event.key === "0") setView(1, 0, 0);
    else return;
    event.preventDefault();
  };
}
