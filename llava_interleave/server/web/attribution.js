// Which image an answer used: in words, per sentence, with heat maps over the images.

import * as api from "./api.js";
import { button, make, reconcile } from "./dom.js";
import { tile, titleOf } from "./media.js";
import { withUploads } from "./requests.js";
import { attempt, state } from "./state.js";
import * as store from "./store.js";
import { branch, mediaOf } from "./tree.js";
import { openViewer } from "./viewer.js";

const OPACITY = 0.85; // as in the report of `llava ask --attribution`
const GREY = 128;
const HARDLY = 0.2; // nats: below, the answer is about as likely without the image

/** Answers whose attribution is open, and the requests of those that are being computed.
 * @type {Map<string, AbortController | null>} */
const open = new Map();

const capital = (words) => words[0].toUpperCase() + words.slice(1);
const percent = (share) => `${Math.round(100 * share)} %`;
const total = (map) => map.flat().reduce((sum, heat) => sum + heat, 0);
const sum = (maps) => maps[0].map((row, y) => row.map((_, x) => maps.reduce((all, map) => all + map[y][x], 0)));
const highest = (images) => images.flatMap(({ heat }) => heat.flat(2)).reduce((a, b) => Math.max(a, b), 0) || 1;

/** A heat map as a cover: the more attention, the more transparent. The square root keeps peaks from hiding the rest. */
export function heatmap(rows, max) {
  const canvas = make("canvas", { className: "heatmap", width: rows[0].length, height: rows.length, ariaHidden: "true" });
  const context = canvas.getContext("2d");
  const image = context.createImageData(rows[0].length, rows.length);
  rows.flat().forEach((heat, i) => image.data.set([GREY, GREY, GREY, 255 * OPACITY * (1 - Math.sqrt(heat / max))], 4 * i));
  context.putImageData(image, 0, 0);
  return canvas;
}

/** The position of the maximum of a map, in words. */
function position(rows) {
  const flat = rows.flat();
  const at = flat.indexOf(Math.max(...flat));
  const third = (index, size) => Math.floor((3 * index) / size);
  const [up, across] = [third(Math.floor(at / rows[0].length), rows.length), third(at % rows[0].length, rows[0].length)];
  if (up === 1 && across === 1) return "the middle";
  return `the ${["upper", "middle", "lower"][up]} ${["left", "middle", "right"][across]}`;
}

/** What an image does for an answer whose log-probability changes by so many nats without it. */
export function effect(change, what) {
  const times = Math.exp(Math.abs(change));
  if (Math.abs(change) < HARDLY) return `without it ${what} would be about as likely`;
  const factor = times < 10 ? times.toFixed(1) : times > 1000 ? "more than 1,000" : String(Math.round(times));
  return `without it ${what} would be ${factor} times ${change > 0 ? "less" : "more"} likely`;
}

/** One sentence for the whole: which images decide. */
export function verdict(images, names, what) {
  const ranked = images.map((image, i) => ({ ...image, title: names[i] })).sort((a, b) => b.change - a.change);
  const top = ranked[0];
  if (top.change < HARDLY) return `No single image decides ${what}: it would be about as likely without any one of them.`;
  if (images.length === 1) return `${capital(what)} needs ${top.title}: ${effect(top.change, what)}.`;
  const others = ranked.slice(1).filter(({ share }) => share > 0.2).map(({ title }) => title);
  return `${capital(what)} rests ${top.share > 0.6 ? "mostly" : "partly"} on ${top.title} (${percent(top.share)})${others.length ? `, also on ${others.join(" and ")}` : ""}.`;
}

/** The button of an answer; its view is appended to `item`. */
export function attributionOf(node, item) {
  const toggle = button("Which image?", press, { label: "Which image this answer used", className: "link attribute" });
  toggle.ariaExpanded = String(open.has(node.id));
  if (open.has(node.id)) queueMicrotask(draw);
  return toggle;

  async function press() {
    const request = open.get(node.id);
    if (open.has(node.id)) {
      open.delete(node.id);
      request?.abort();
      draw();
      return;
    }
    if (!node.attribution) {
      const controller = new AbortController();
      open.set(node.id, controller);
      draw();
      const { chat } = state;
      const result = await attempt(() => withUploads(chat, branch(chat, node.id), (body) => api.attribution(body, controller.signal)));
      if (open.get(node.id) !== controller) return;
      if (!result) open.delete(node.id);
      else {
        node.attribution = result;
        node.changed = Date.now();
        await attempt(() => store.save(chat));
      }
    }
    if (node.attribution) open.set(node.id, null);
    draw();
  }

  function draw() {
    const computing = Boolean(open.get(node.id));
    toggle.ariaExpanded = String(open.has(node.id) && !computing);
    toggle.querySelector("span").textContent = computing ? "Computing… (press to cancel)" : "Which image?";
    item.querySelector(".attribution")?.remove();
    if (open.has(node.id) && node.attribution) item.append(view(node));
  }
}

function view(node) {
  const { images, sentences } = node.attribution;
  const media = mediaOf(branch(state.chat, node.id));
  const names = media.map((part, i) => `${part.type} ${i + 1}`);
  const box = make("section", { className: "attribution", ariaLabel: "Which image this answer used" });
  const most = highest(images);
  const covers = (index) => images[index]?.heat.map((map) => heatmap(map, most)) ?? [];
  const line = make("p", { className: "verdict" });
  const list = make("ol", {});
  const show = (of, what) => {
    line.textContent = verdict(of, names, what);
    reconcile(list, of, ({ name }) => name, ({ share, change }) => `${what} ${share} ${change}`, (image, i) => row(image, media[i], i, names[i], what, heatmap(sum(image.heat), most), () => openViewer(media, i, covers)));
  };
  show(images, "this answer");
  box.append(line);
  if (sentences?.length > 1) box.append(sentencePicker(sentences, (of) => show(of ? images.map((image, i) => ({ ...image, change: of.changes[i], share: of.shares[i] })) : images, of ? "this sentence" : "this answer")));
  box.append(list);
  const how = make("details", {}, make("summary", { textContent: "How this is measured" }), make("p", { textContent: "Each image is left out in turn, and the model is asked how likely it would write the same answer. The bar is an image's part of all losses. Heat maps show where the answer's words attend to; what is covered in grey got little attention. A measure of this model on this answer, not a proof." }), make("p", { textContent: images.map(({ change }, i) => `${names[i]}: ${change.toFixed(2)} nats`).join(", ") }));
  box.append(how);
  return box;
}

/** Choose a sentence of the answer to see its own images. */
function sentencePicker(sentences, choose) {
  const box = make("p", { className: "sentences", role: "group", ariaLabel: "Sentences of the answer" });
  sentences.forEach((sentence) => {
    const one = button(sentence.text.trim(), () => {
      const on = one.ariaPressed !== "true";
      for (const other of box.children) other.ariaPressed = "false";
      one.ariaPressed = String(on);
      choose(on ? sentence : null);
    }, { className: "sentence" });
    one.ariaPressed = "false";
    box.append(one);
  });
  return box;
}

function row(image, part, index, name, what, cover, enlarge) {
  const { change, attention, heat } = image;
  const share = change > 0 ? image.share : 0; // equal parts where no image has any
  const hottest = heat.reduce((best, map, i) => (total(map) > total(heat[best]) ? i : best), 0);
  const where = heat.length > 1 ? `frame ${hottest + 1}, ${position(heat[hottest])}` : position(heat[hottest]);
  const thumb = tile(part, index + 1, () => []);
  thumb.onclick = enlarge;
  thumb.ariaLabel = `Enlarge ${titleOf(part, index + 1)} with its heat map`;
  thumb.append(cover);
  return make(
    "li",
    {},
    thumb,
    make(
      "div",
      {},
      make("div", { className: "row" }, make("strong", { textContent: part.label ? `${name}, ${part.label}` : name }), make("meter", { min: 0, max: 1, value: share, ariaLabel: `Part of ${name} in the answer` }), make("strong", { className: "share", textContent: percent(share) })),
      make("p", { textContent: `${capital(effect(change, what))}. It got ${percent(attention)} of the answer's attention, most at ${where}.` }),
    ),
  );
}
