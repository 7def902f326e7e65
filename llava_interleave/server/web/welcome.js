// The first look: what this is, which model is loaded and what it can do, examples to try.

import { attach } from "./attachments.js";
import { changed, send } from "./composer.js";
import { $, make, plural } from "./dom.js";
import { newChat } from "./session.js";
import { model, state } from "./state.js";

/** @type {{title: string, question: string, files: string[], views?: boolean}[]} */
const EXAMPLES = [
  { title: "Find it", question: "In which image is there a yellow star?", files: ["album-1.png", "album-2.png", "album-3.png"] },
  { title: "Compare", question: "Compare the pictures: what changed?", files: ["before.png", "after.png"] },
  { title: "Watch a video", question: "Tell me what happens to the yellow triangle.", files: ["clip.mp4"] },
  { title: "See all sides", question: "From the front, which object is hidden?", files: ["front.png", "right.png", "back.png", "left.png"], views: true },
];

const ROOMY = 600; // pixels of a window from which on the banner is unfolded

/** What a model can do, in words. */
export function abilities({ context_length, tokens_per_image, video_frames, limits, parent, loaded }) {
  const fit = Math.min(limits.media, Math.floor((context_length - 200) / tokens_per_image));
  return [
    ...(parent ? [`an adapter of ${parent}`] : []),
    ...(loaded ? [] : ["not in memory: its first answer waits until it is loaded"]),
    `up to ${plural(fit, "image")} or videos in a chat`,
    `${context_length.toLocaleString("en")} tokens of context, ${tokens_per_image} an image`,
    `${video_frames} frames of a video unless you choose others, at most ${limits.frames}`,
    `answers of up to ${limits.max_tokens.toLocaleString("en")} tokens`,
  ];
}

/** @param {boolean} shown */
export function renderWelcome(shown) {
  $("welcome").hidden = !shown;
  const current = model();
  $("toy").hidden = !current?.builtin;
  $("toy").open = shown && innerHeight > ROOMY;
  if (!shown) return;
  $("model-facts").replaceChildren(...(current ? abilities(current).map((textContent) => make("li", { textContent })) : []));
  $("model-name").textContent = current ? current.id : "…";
  if (!$("examples").children.length) $("examples").append(...EXAMPLES.map(example));
}

/** @param {{title: string, question: string, files: string[], views?: boolean}} example */
function example({ title, question, files, views }) {
  const run = async () => {
    if (state.draft.text || state.draft.attachments.length) await newChat(); // what was written stays in its own
    const blobs = await Promise.all(files.map(async (name) => new File([await (await fetch(`examples/${name}`)).blob()], name, { type: name.endsWith("mp4") ? "video/mp4" : "image/png" })));
    await attach(blobs);
    if (views) state.draft.attachments.forEach((item) => (item.label = item.name.replace(/\..*/, "")));
    $("text").value = question;
    changed();
    await send();
  };
  const previews = files.map((name) => (name.endsWith("mp4") ? make("video", { src: `examples/${name}`, muted: true, preload: "metadata", tabIndex: -1 }) : make("img", { src: `examples/${name}`, alt: "" })));
  const box = make("button", { type: "button", className: "example" }, make("span", { className: "strip", ariaHidden: "true" }, ...previews), make("strong", { textContent: title }), make("span", { textContent: question }));
  box.onclick = async () => {
    box.disabled = true;
    await run().finally(() => (box.disabled = false));
  };
  return make("li", {}, box);
}
