// Files of images and videos: their hash, their thumbnail, the frames of a video.

import { preview } from "./api.js";
import { make } from "./dom.js";
import { openViewer } from "./viewer.js";
import * as store from "./store.js";
import { randomId } from "./tree.js";

const THUMB = 288; // pixels of the longer side
const DECODES_AT_A_TIME = 3;
const DRAWN = 4096; // most pixels of the longer side of a drawing
const READ_BY_SERVER = /^image\/(jpeg|png|webp|gif|bmp|tiff|avif|hei[cf])$/;
/** @type {Map<string, Promise<string | null>>} */
const urls = new Map(); // hash of a file -> URL of its thumbnail

export async function fileKey(blob) {
  if (!crypto.subtle) return randomId(); // a page over plain http
  const digest = await crypto.subtle.digest("SHA-256", await blob.arrayBuffer());
  return [...new Uint8Array(digest)].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** @returns {"image" | "video" | null} */
export function mediaKind(blob) {
  if (blob.type === "image/gif" || blob.type.startsWith("video/")) return "video";
  if (blob.type.startsWith("image/") || /\.(heic|heif|avif)$/i.test(blob.name ?? "")) return "image";
  return null;
}

/** A drawing or an icon (SVG, ICO) as PNG, which the server reads; any other file as it is. */
export async function readable(file) {
  if (!file.type.startsWith("image/") || READ_BY_SERVER.test(file.type)) return file;
  const url = URL.createObjectURL(file);
  try {
    const image = make("img", { src: url });
    await image.decode();
    const png = await toBlob(draw(image, image.naturalWidth, image.naturalHeight, DRAWN), "image/png");
    return new File([png], file.name ?? "", { type: "image/png", lastModified: file.lastModified });
  } catch {
    return file; // the server will say what it is
  } finally {
    URL.revokeObjectURL(url);
  }
}

export const isVideoFile = (part, blob) => part.type === "video" && blob.type !== "image/gif";

/** URL of a thumbnail of a file; null if it is gone or this browser cannot decode it. */
export function thumbUrl(part) {
  if (!urls.has(part.key)) urls.set(part.key, thumbnail(part).then((blob) => blob && URL.createObjectURL(blob), () => null));
  return /** @type {Promise<string | null>} */ (urls.get(part.key));
}

let turn = 0;
const lanes = Array.from({ length: DECODES_AT_A_TIME }, () => Promise.resolve());

async function thumbnail(part) {
  const kept = await store.thumb(part.key);
  if (kept) return kept;
  const blob = await store.file(part.key);
  if (!blob) return null;
  const lane = turn++ % DECODES_AT_A_TIME; // photos of 12 megapixels: a few at a time
  const made = lanes[lane].then(() => shrink(part, blob));
  lanes[lane] = made.then(() => {}, () => {});
  const small = await made;
  await store.keepThumb(part.key, small);
  return small;
}

async function shrink(part, blob) {
  if (!isVideoFile(part, blob)) {
    const fromServer = async () => createImageBitmap(await preview(part.key, part.name, async () => blob, THUMB));
    const bitmap = await createImageBitmap(blob).catch(fromServer); // HEIC and TIFF, in most browsers
    const canvas = draw(bitmap, bitmap.width, bitmap.height);
    bitmap.close();
    return toBlob(canvas);
  }
  const url = URL.createObjectURL(blob);
  try {
    /** @type {any} */ let first = null;
    await videoFrames(url, [0], () => true, (canvas) => (first = canvas), THUMB);
    return await toBlob(first);
  } finally {
    URL.revokeObjectURL(url);
  }
}

function draw(source, width, height, side = THUMB) {
  const scale = Math.min(1, side / Math.max(width, height));
  const canvas = make("canvas", { width: Math.max(1, Math.round(width * scale)), height: Math.max(1, Math.round(height * scale)) });
  canvas.getContext("2d").drawImage(source, 0, 0, canvas.width, canvas.height);
  return canvas;
}

const toBlob = (canvas, type = "image/webp") => new Promise((resolve) => canvas.toBlob(resolve, type, 0.8));

/** Calls `put` with a canvas for each time in seconds while `wanted()`. Rejects if the browser cannot decode the video. */
export function videoFrames(url, times, wanted, put, side = 160) {
  const video = make("video", { src: url, muted: true, preload: "auto" });
  const seek = (time) =>
    new Promise((resolve) => {
      video.requestVideoFrameCallback?.(resolve);
      video.onseeked = () => setTimeout(resolve, 300); // a repeated frame is not presented again
      video.currentTime = time + 0.001; // the exact time of a frame may round to the previous one
    });
  return new Promise((resolve, reject) => {
    video.onerror = reject;
    video.onloadeddata = async () => {
      for (const [index, time] of times.entries()) {
        if (!wanted()) break;
        await seek(time);
        const canvas = draw(video, video.videoWidth, video.videoHeight, side);
        canvas.title = `${time.toFixed(2)} s`;
        put(canvas, index);
      }
      resolve(undefined);
    };
  });
}

/** The number by which people and the model call an image, and its name. */
export const titleOf = (part, number) => `${part.type} ${number}, ${part.label ? `${part.label}, ` : ""}${part.name}`;

/** A thumbnail with its number; pressed, it is enlarged among `items`. @param {() => any[]} items */
export function tile(part, number, items) {
  const box = make("button", {
    type: "button",
    className: "tile",
    ariaLabel: `Enlarge ${titleOf(part, number)}`,
    title: part.name,
    data: { number, focus: `open-${part.key}` },
    onclick: () => openViewer(items(), number - 1),
  });
  const image = make("img", { alt: "", draggable: false });
  box.append(image, make("span", { className: "badge", textContent: number }));
  if (part.type === "video") box.append(make("span", { className: "play", textContent: "▶" }));
  if (part.label) box.append(make("span", { className: "caption", textContent: part.label }));
  thumbUrl(part).then((url) => {
    if (url) image.src = url;
    else image.replaceWith(make("span", { className: "nothumb", textContent: part.name }));
  });
  return box;
}
