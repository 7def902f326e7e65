// Which image an answer leaned on: shares, and maps that veil what its words did not attend to.

import { frames, make } from "./dom.js";
import * as store from "./store.js";

const VEIL = 0.85; // as on the page that `llava ask --explain` writes
const GREY = 128;

const percent = (share) => `${Math.round(100 * share)} %`;

/** A map as a veil that is the thinner, the more is attended to; its root, or peaks hide the rest. */
function veil(rows, most) {
  const canvas = make("canvas", { className: "veil", width: rows.length, height: rows.length, ariaHidden: "true" });
  const context = canvas.getContext("2d");
  const image = context.createImageData(rows.length, rows.length);
  rows.flat().forEach((heat, i) => image.data.set([GREY, GREY, GREY, 255 * VEIL * (1 - Math.sqrt(heat / most))], 4 * i));
  context.putImageData(image, 0, 0);
  return canvas;
}

/** Where a map is hottest, in words. */
function place(rows) {
  const flat = rows.flat();
  const at = flat.indexOf(Math.max(...flat));
  const third = (index) => Math.floor((3 * index) / rows.length);
  const [up, across] = [third(Math.floor(at / rows.length)), third(at % rows.length)];
  if (up === 1 && across === 1) return "the middle";
  return `the ${["upper", "middle", "lower"][up]} ${["left", "middle", "right"][across]}`;
}

const total = (map) => map.flat().reduce((sum, heat) => sum + heat, 0);
const sum = (maps) => maps[0].map((row, y) => row.map((_, x) => maps.reduce((all, map) => all + map[y][x], 0)));

/** The pictures of an image or a video with their maps. One that moves and cannot be stopped has the sum of its maps. */
function pictures(part, { heat, times }, most) {
  const box = make("div", { className: "strip" });
  const put = (picture, map) => box.append(make("span", { className: "frame" }, picture, veil(map, most)));
  store.file(part.key).then(async (blob) => {
    if (!blob) return;
    const url = URL.createObjectURL(blob);
    try {
      if (part.type === "video" && blob.type !== "image/gif") {
        await frames(url, times, () => box.isConnected, (canvas, i) => put(canvas, heat[i]));
      } else {
        const picture = make("img", { src: url, alt: part.label || part.name });
        await picture.decode();
        put(picture, heat.length > 1 ? sum(heat) : heat[0]);
      }
    } catch {
      box.append(`${part.name} (this browser cannot show it)`);
    } finally {
      URL.revokeObjectURL(url);
    }
  });
  return box;
}

function told({ name, share, change, attention, heat }, part) {
  const hottest = heat.reduce((best, map, i) => (total(map) > total(heat[best]) ? i : best), 0);
  const frame = heat.length > 1 ? `frame ${hottest + 1}, ` : "";
  const without = `without it ${Math.abs(change).toFixed(2)} nats ${change < 0 ? "likelier" : "less likely"}`;
  return make(
    "p",
    {},
    make("strong", { textContent: `${name} ` }),
    make("meter", { min: 0, max: 1, value: share, ariaLabel: `Share of ${name}` }),
    make("strong", { textContent: ` ${percent(share)} ` }),
    `${part.name}: ${without}; ${percent(attention)} of the attention, most in ${frame}${place(heat[hottest])}`,
  );
}

/** What the server told of an answer whose conversation has these images and videos, in order. */
export function leanedOn({ images }, parts) {
  const most = images.flatMap(({ heat }) => heat.flat(2)).reduce((a, b) => Math.max(a, b), 0) || 1;
  const needed = Math.max(...images.map(({ change }) => change));
  const list = make("ol", {});
  images.forEach((image, i) => {
    const item = make("li", {}, told(image, parts[i]), pictures(parts[i], image, most));
    if (needed > 0 && image.change === needed) item.className = "most";
    list.append(item);
  });
  const bare = make("label", {}, make("input", { type: "checkbox" }), " pictures without maps");
  const shares = needed > 0 ? "Shares: how much less likely the answer is without each." : "No single one makes the answer likelier: all have the same share.";
  const how = make("p", { textContent: `${shares} What its words did not attend to is veiled.` });
  return make("section", { className: "leaned", ariaLabel: "Which image this answer leaned on" }, how, list, bare);
}
