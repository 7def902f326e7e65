// Attribution of an answer: shares, and heat maps that cover what its words did not attend to.

import { make, videoFrames } from "./dom.js";
import * as store from "./store.js";

const OPACITY = 0.85; // as in the report of `llava ask --attribution`
const GREY = 128;

const percent = (share) => `${Math.round(100 * share)} %`;

/** A heat map as a cover: the more attention, the more transparent. The square root keeps peaks from hiding the rest. */
function heatmap(rows, max) {
  const canvas = make("canvas", { className: "heatmap", width: rows.length, height: rows.length, ariaHidden: "true" });
  const context = canvas.getContext("2d");
  const image = context.createImageData(rows.length, rows.length);
  rows.flat().forEach((heat, i) => image.data.set([GREY, GREY, GREY, 255 * OPACITY * (1 - Math.sqrt(heat / max))], 4 * i));
  context.putImageData(image, 0, 0);
  return canvas;
}

/** The position of the maximum of a map, in words. */
function position(rows) {
  const flat = rows.flat();
  const at = flat.indexOf(Math.max(...flat));
  const third = (index) => Math.floor((3 * index) / rows.length);
  const [up, across] = [third(Math.floor(at / rows.length)), third(at % rows.length)];
  if (up === 1 && across === 1) return "the middle";
  return `the ${["upper", "middle", "lower"][up]} ${["left", "middle", "right"][across]}`;
}

const total = (map) => map.flat().reduce((sum, heat) => sum + heat, 0);
const sum = (maps) => maps[0].map((row, y) => row.map((_, x) => maps.reduce((all, map) => all + map[y][x], 0)));

/** An image or the frames of a video with their maps. A GIF has the sum of its maps. */
function mediaWithMaps(part, { heat, times }, max) {
  const box = make("div", { className: "strip" });
  const put = (element, map) => box.append(make("span", { className: "frame" }, element, heatmap(map, max)));
  store.file(part.key).then(async (blob) => {
    if (!blob) return;
    const url = URL.createObjectURL(blob);
    try {
      if (part.type === "video" && blob.type !== "image/gif") {
        await videoFrames(url, times, () => box.isConnected, (canvas, i) => put(canvas, heat[i]));
      } else {
        const image = make("img", { src: url, alt: part.label || part.name });
        await image.decode();
        put(image, heat.length > 1 ? sum(heat) : heat[0]);
      }
    } catch {
      box.append(`${part.name} (this browser cannot show it)`);
    } finally {
      URL.revokeObjectURL(url);
    }
  });
  return box;
}

function summary({ name, share, change, attention, heat }, part) {
  const hottest = heat.reduce((best, map, i) => (total(map) > total(heat[best]) ? i : best), 0);
  const frame = heat.length > 1 ? `frame ${hottest + 1}, ` : "";
  const without = `without it ${Math.abs(change).toFixed(2)} nats ${change < 0 ? "more likely" : "less likely"}`;
  return make(
    "p",
    {},
    make("strong", { textContent: `${name} ` }),
    make("meter", { min: 0, max: 1, value: share, ariaLabel: `Share of ${name}` }),
    make("strong", { textContent: ` ${percent(share)} ` }),
    `${part.name}: ${without}; ${percent(attention)} of the attention, most in ${frame}${position(heat[hottest])}`,
  );
}

/** The view of an attribution. `parts`: the images and videos of the conversation, in order. */
export function attributionView({ images }, parts) {
  const max = images.flatMap(({ heat }) => heat.flat(2)).reduce((a, b) => Math.max(a, b), 0) || 1;
  const largest = Math.max(...images.map(({ change }) => change));
  const list = make("ol", {});
  images.forEach((image, i) => {
    const item = make("li", {}, summary(image, parts[i]), mediaWithMaps(parts[i], image, max));
    if (largest > 0 && image.change === largest) item.className = "top";
    list.append(item);
  });
  const toggle = make("label", {}, make("input", { type: "checkbox" }), " images without maps");
  const shares = largest > 0 ? "Share: how much less likely the answer is without the image." : "No single image makes the answer more likely: all have the same share.";
  const how = make("p", { textContent: `${shares} Covered: areas without attention.` });
  return make("section", { className: "attribution", ariaLabel: "Which image this answer used" }, how, list, toggle);
}
