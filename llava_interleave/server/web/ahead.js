// What is known of the message before it is sent: its tokens against the limits, and its images, prefilled by the server.

import * as api from "./api.js";
import { allMedia, compose, firstNumber, renderAttachments } from "./attachments.js";
import { isBusy } from "./composer.js";
import { $, debounce, plural } from "./dom.js";
import { titleOf } from "./media.js";
import { withUploads } from "./requests.js";
import { model, parentOf, state } from "./state.js";
import { branch, mediaOf, textOf } from "./tree.js";

const DELAY = 600; // milliseconds after the last change of the images
const CHARACTERS_PER_TOKEN = 3.5;
const TEMPLATE_TOKENS = 8; // of a message

let counted = { key: "", tokens: 0 }; // the last prefix that the server has counted
let request = new AbortController();
const prepareLater = debounce(prepare, DELAY);
let pending = "";

/** Recount in the page now; let the server count and prefill the images if they have changed. */
export function prepareSoon() {
  const prefix = imagePrefix();
  if (prefix && prefix.key !== pending) {
    pending = prefix.key;
    request.abort();
    if (prefix.parts.length) prepareLater();
  }
  renderBudget();
}

/** The message up to its last image, which typing does not change. */
function imagePrefix() {
  try {
    const parts = compose(state.draft.text);
    const last = parts.findLastIndex((part) => part.key);
    const kept = parts.slice(0, last + 1);
    return { parts: kept, key: JSON.stringify([state.chat.id, parentOf(), model()?.id, state.chat.settings?.system, kept]) };
  } catch {
    return null; // a mark without a file; send() says so
  }
}

async function prepare() {
  const prefix = imagePrefix();
  if (!prefix?.parts.length || !model() || isBusy()) return;
  if (excess().length) {
    renderAttachments(); // the upload for a thumbnail may have found a file that cannot be read
    return;
  }
  request = new AbortController();
  const { signal } = request;
  const { chat } = state;
  const nodes = [...branch(chat, parentOf()), /** @type {any} */ ({ role: "user", parts: prefix.parts })];
  try {
    await withUploads(chat, nodes, async (body) => {
      const { parts, total } = await api.count(body, signal);
      if (signal.aborted) return;
      counted = { key: prefix.key, tokens: total };
      rememberTimes(parts);
      renderBudget();
      if (total < model().context_length) await api.prefill(body, signal);
    });
  } catch (error) {
    // Only reading ahead: sending the message reports everything else.
    if (error.code === api.INVALID) noteUnreadable(error.message, mediaOf(nodes));
  }
}

/** Keep which file the server cannot read: a message names one of several by its number or its view. */
function noteUnreadable(message, media) {
  const [whole, number, label] = message.match(/^(?:(?:image|video) (\d+)|view (.+?)): /) ?? [""];
  const part = media.length === 1 ? media[0] : media.find(({ label: own }, i) => i + 1 === +number || (own && own === label));
  if (part && !api.unreadable.has(part.key)) api.unreadable.set(part.key, message.slice(whole.length).replace(/^[\d,]+ bytes: /, ""));
  renderAttachments();
}

/** Keep the times of the frames that the model gets of attached videos. */
function rememberTimes(parts) {
  const composed = compose(state.draft.text).filter((part) => part.key);
  let news = false;
  composed.forEach((part, index) => {
    const { times } = parts.at(index - composed.length);
    const item = state.draft.attachments.find((one) => one.key === part.key && one.start === part.start && one.frames === part.frames);
    if (!item || part.type !== "video" || String(times) === String(item.times)) return;
    item.times = times;
    news = true;
  });
  if (news) renderAttachments();
}

/** Tokens of messages, by their text's length and the images; -> [tokens, whether the server has counted them]. */
function tokens() {
  const { tokens_per_image, max_tokens_per_image, tokens_per_frame, video_frames } = model();
  const textTokens = (text) => Math.ceil(text.length / CHARACTERS_PER_TOKEN) + TEMPLATE_TOKENS;
  const alone = allMedia().length === 1; // OneVision tiles the only image of a conversation
  const imageTokens = alone ? max_tokens_per_image : tokens_per_image;
  const mediaTokens = (part) => (part.type === "video" ? (part.frames ?? part.times?.length ?? video_frames) * tokens_per_frame : imageTokens);
  const sum = (numbers) => numbers.reduce((all, one) => all + one, 0);
  if (counted.key === pending && counted.tokens) {
    const before = sum(compose(state.draft.text).slice(0, imagePrefix()?.parts.length).map((part) => part.text?.length ?? 0));
    return [counted.tokens + Math.ceil((state.draft.text.length - before) / CHARACTERS_PER_TOKEN), true];
  }
  const nodes = branch(state.chat, parentOf());
  const system = textTokens(state.chat.settings?.system ?? "You are a helpful assistant.");
  const last = nodes.findLast((node) => node.usage);
  const after = last ? nodes.slice(nodes.indexOf(last) + 1) : nodes;
  const known = last ? last.usage.total_tokens : system;
  return [known + sum([...after.map(textOf), state.draft.text].map(textTokens)) + sum([...mediaOf(after), ...state.draft.attachments].map(mediaTokens)), false];
}

/** What is too much for this server, in words: known before anything is sent. */
function excess() {
  if (!model()) return [];
  const { limits, context_length } = model();
  const found = [];
  const media = mediaOf(branch(state.chat, parentOf())).length + state.draft.attachments.length;
  const unreadable = state.draft.attachments.flatMap((item, i) => (api.unreadable.has(item.key) ? [`${titleOf(item, firstNumber() + i)}: ${api.unreadable.get(item.key)}`] : []));
  if (unreadable.length) found.push(unreadable.length === 1 ? unreadable[0] : `${unreadable.length} files cannot be read, the first: ${unreadable[0]}`);
  if (media > limits.media) found.push(`${plural(media, "image")} and videos in this chat; this server takes ${limits.media}. Remove ${media - limits.media}.`);
  const bytes = state.draft.attachments.reduce((all, item) => all + item.bytes, 0);
  if (bytes > limits.files_bytes) found.push(`${Math.ceil(bytes / 1e6)} MB of files; this server holds ${limits.files_bytes / 1e6} MB.`);
  try {
    const [total] = tokens();
    if (total >= context_length) found.push(`${total.toLocaleString("en")} tokens exceed the context of ${context_length.toLocaleString("en")}: use fewer images or frames.`);
  } catch {
    // a mark without a file
  }
  return found;
}

/** Whether the message can be sent as far as the page knows. */
export const ready = () => Boolean(model()) && !excess().length;

export function renderBudget() {
  const idle = !model() || (!state.draft.attachments.length && !state.draft.text.trim());
  $("budget").hidden = idle;
  const faults = excess();
  $("send").disabled = Boolean(faults.length);
  if (idle) return;
  const { context_length } = model();
  $("budget").classList.toggle("over", faults.length > 0);
  let total = 0, exact = false;
  try {
    [total, exact] = tokens();
  } catch {
    return; // a mark without a file
  }
  $("budget-bar").value = Math.min(1, total / context_length);
  $("budget-text").textContent = faults[0] ?? `${exact ? "" : "about "}${total.toLocaleString("en")} of ${context_length.toLocaleString("en")} tokens`;
}
