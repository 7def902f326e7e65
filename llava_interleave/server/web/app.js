// Starts the page: events of its elements, and the models of the server.

import * as api from "./api.js";
import { attach, droppedFiles, renderAttachments } from "./attachments.js";
import { refreshBudget } from "./budget.js";
import { openChat, renderChats } from "./chats.js";
import { send } from "./composer.js";
import { make } from "./dom.js";
import { render } from "./messages.js";
import { $, attempt, showError, state } from "./state.js";
import * as store from "./store.js";

async function start() {
  const models = await attempt(() => api.models());
  if (models) {
    showError();
    $("model").replaceChildren(...models.map(({ id }) => make("option", { value: id, textContent: id })));
    $("frames").value = $("frames-value").textContent = models[0].video_frames;
  }
  refreshBudget();
}

const hasFiles = (event) => event.dataTransfer.types.includes("Files");

$("composer").onsubmit = (event) => {
  event.preventDefault();
  send();
};
$("text").onkeydown = (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
};
$("text").oninput = refreshBudget;
$("text").onpaste = (event) => {
  const files = [...event.clipboardData.files];
  if (!files.length) return;
  event.preventDefault();
  attach(files);
};
$("stop").onclick = () => state.running?.abort();
$("new").onclick = () => openChat(store.create());
$("menu").onclick = () => document.body.classList.add("menu");
$("hide").onclick = () => document.body.classList.remove("menu");
$("model").onchange = refreshBudget;
$("frames").oninput = () => ($("frames-value").textContent = $("frames").value);
$("frames").onchange = renderAttachments;
for (const name of ["files", "folder"]) {
  $(name).onclick = () => $(`pick-${name}`).click();
  $(`pick-${name}`).onchange = async (event) => {
    const byPath = (a, b) => (a.webkitRelativePath || "").localeCompare(b.webkitRelativePath || "", undefined, { numeric: true });
    await attach([...event.target.files].sort(byPath).filter((file) => name === "files" || /^(image|video)\//.test(file.type)));
    event.target.value = "";
  };
}
$("export").onclick = () =>
  attempt(async () => {
    const url = URL.createObjectURL(new Blob([await store.exportChats()], { type: "application/json" }));
    make("a", { href: url, download: "llava-interleave-chats.json" }).click();
    URL.revokeObjectURL(url);
  });
$("import").onclick = () => $("import-file").click();
$("import-file").onchange = (event) =>
  attempt(async () => {
    showError();
    await store.importChats(await event.target.files[0].text());
    event.target.value = "";
    await renderChats();
  });
$("key-dialog").onclose = () => {
  api.useKey($("key").value);
  $("key").value = "";
  start();
};
addEventListener("dragover", (event) => {
  if (!hasFiles(event)) return;
  event.preventDefault();
  document.body.classList.add("dropping");
});
addEventListener("dragleave", (event) => event.relatedTarget || document.body.classList.remove("dropping"));
addEventListener("drop", async (event) => {
  document.body.classList.remove("dropping");
  if (!hasFiles(event)) return;
  event.preventDefault();
  await attach(await droppedFiles(event.dataTransfer));
});

render();
renderChats();
start();
