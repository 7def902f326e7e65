// Answers: a request for each, its progress, and what is left of one that was broken off.

import * as api from "./api.js";
import { announce, plural } from "./dom.js";
import { renderMessage, renderStatus } from "./messages.js";
import { lostConnection } from "./connection.js";
import { withUploads } from "./requests.js";
import { renderChats } from "./sidebar.js";
import { requestKey, running, state } from "./state.js";
import * as store from "./store.js";
import { add, branch } from "./tree.js";

const SAVE_EVERY = 400; // milliseconds: what a crash may lose of an answer

/** Generate an answer to a question, as a new branch. @param {import("./types").Message} question */
export function generate(question) {
  return run(add(state.chat, question.id, "assistant", [{ type: "text", text: "" }]), false);
}

/** Go on with an answer that was stopped, cut off or broken off. @param {import("./types").Message} node */
export const resume = (node) => run(node, Boolean(node.parts[0].text));

/** Whether another tab generates this answer now. */
export async function elsewhere(node) {
  const locks = await navigator.locks?.query();
  return Boolean(locks?.held?.some(({ name }) => name === node.id));
}

async function run({ id }, continued) {
  const { chat } = state;
  const job = { controller: new AbortController(), chat, phase: "Preparing", since: performance.now() };
  const release = await lock(id);
  const node = chat.nodes[id]; // what another tab saved meanwhile has taken the place of the one before
  const text = node.parts[0];
  running.set(node.id, job);
  for (const field of ["error", "stopped", "finish", "attribution", "citations"]) delete node[field];
  node.model = chat.model ?? state.models[0]?.id;
  const save = () => {
    node.changed = Date.now();
    return store.save(chat).catch(() => {}); // the answer goes on; the last save reports
  };
  let saved = 0;
  const phase = (words) => ((job.phase = words), renderStatus(node));
  renderMessage(node);
  await save();
  renderChats();
  const settings = Object.fromEntries(Object.entries(chat.settings ?? {}).filter(([name, value]) => name !== "system" && value != null));
  try {
    const path = branch(chat, continued ? node.id : node.parent);
    await withUploads(
      chat,
      path,
      async (body) => {
        phase("Preparing");
        let chunks = 0, began = 0;
        for await (const chunk of api.stream({ ...body, ...settings, cite: Boolean(settings.cite) && !continued, continue_final_message: continued }, job.controller.signal)) {
          if (chunk.prompt_progress) phase(progressWords(chunk.prompt_progress));
          const choice = chunk.choices?.[0];
          if (choice?.finish_reason) {
            node.finish = choice.finish_reason;
            if (settings.cite) phase("Citing images");
          }
          if (choice?.delta?.annotations) node.citations = choice.delta.annotations;
          if (chunk.usage) node.usage = chunk.usage;
          if (chunk.timings) node.timings = chunk.timings;
          if (!choice?.delta?.content) continue;
          text.text += choice.delta.content;
          began ||= performance.now();
          chunks += 1;
          const speed = chunks > 4 ? `, ${Math.round((1000 * chunks) / (performance.now() - began))} tokens/s` : "";
          job.phase = `Writing${speed}`;
          node.changed = Date.now();
          renderMessage(node);
          if (performance.now() - saved > SAVE_EVERY) {
            saved = performance.now();
            save();
          }
        }
      },
      (sent, all) => sent < all && phase(`Sending image ${sent + 1} of ${all}`),
    );
    announce("The answer is complete.");
  } catch (error) {
    if (error.name === "AbortError") node.stopped = true;
    else node.error = error.message;
    if (error.status === 401) requestKey();
    if (error.status === 0) lostConnection();
  } finally {
    running.delete(node.id);
    release();
    await save();
    renderMessage(node);
    renderChats();
  }
}

function progressWords({ waiting, images, images_processed, total, processed }) {
  if (waiting > 0) return waiting > 1 ? `Waiting: ${plural(waiting - 1, "request")} before this one` : "Waiting for the model";
  if (images_processed < images) return `Reading image ${images_processed + 1} of ${images}`;
  return `Reading the question, ${Math.round((100 * processed) / total)} %`;
}

/** Hold a lock of this name until the returned function is called; it ends with the tab, too. */
function lock(name) {
  if (!navigator.locks) return Promise.resolve(() => {}); // a page over plain http
  return new Promise((resolve) => navigator.locks.request(name, () => new Promise((release) => resolve(() => release(undefined)))));
}
