// Starts the page: events of its elements, keyboard shortcuts, the models of the server.

import * as api from "./api.js";
import { attach, byName, droppedFiles } from "./attachments.js";
import { prepareSoon, renderBudget } from "./ahead.js";
import { startCamera } from "./camera.js";
import { cancelEdit, changed, edit, send } from "./composer.js";
import { connect } from "./connection.js";
import { $, icon, make } from "./dom.js";
import { rich } from "./markdown.js";
import { copy } from "./messages.js";
import { follow, newChat, openChat, start } from "./session.js";
import { defaults, renderModel, startSettings } from "./settings.js";
import { exportChats, importChats } from "./share.js";
import { renderChats, search } from "./sidebar.js";
import { attempt, running, showError, state } from "./state.js";
import * as store from "./store.js";
import { addFiles, startTable } from "./table.js";
import { branch, textOf } from "./tree.js";
import { startViewer } from "./viewer.js";
import { renderWelcome } from "./welcome.js";

const stop = () => branch(state.chat).forEach(({ id }) => running.get(id)?.controller.abort());
/** @returns {any} */
const last = (role) => branch(state.chat).findLast((node) => node.role === role);
const toggleMenu = (open) => {
  document.body.classList.toggle("menu", open);
  $(open ? "hide" : "menu").focus();
};

const control = (event) => event.ctrlKey || event.metaKey;

/** Keys with what they do: [keys shown, words, whether an event is it, action].
 * @type {[string, string, (event: any) => boolean, () => any][]} */
const SHORTCUTS = [
  ["Enter", "Send (Shift+Enter: a new line)", () => false, () => {}],
  ["Ctrl+Shift+O", "New chat", (event) => control(event) && event.shiftKey && event.code === "KeyO", newChat],
  ["Ctrl+K", "Search the chats", (event) => control(event) && event.code === "KeyK", () => (toggleMenu(true), $("search").focus())],
  ["Ctrl+U", "Add files", (event) => control(event) && event.code === "KeyU", () => $("pick-files").click()],
  ["Ctrl+,", "Settings of this chat", (event) => control(event) && event.key === ",", () => $("open-settings").click()],
  ["Ctrl+Shift+E", "Edit your last message", (event) => control(event) && event.shiftKey && event.code === "KeyE", () => last("user") && edit(last("user"))],
  ["Ctrl+Shift+C", "Copy the last answer", (event) => control(event) && event.shiftKey && event.code === "KeyC", () => last("assistant") && copy(textOf(last("assistant")))],
  ["Escape", "Stop the answer, leave editing, close a dialog", () => false, () => {}],
  ["/", "Write", (event) => event.key === "/" && !typing(event), () => $("text").focus()],
  ["?", "This sheet", (event) => event.key === "?" && !typing(event), () => $("shortcuts").showModal()],
  ["Alt+← →", "Move the image that has the focus", () => false, () => {}],
  ["← → + − 0", "In the viewer: other image, zoom, fit", () => false, () => {}],
];

const typing = ({ target }) => target.closest("input, textarea, select");

function onKey(event) {
  if (document.querySelector("dialog[open]")) return;
  if (event.key === "Escape") {
    if (document.body.classList.contains("menu")) toggleMenu(false);
    else if (state.draft.editing) cancelEdit();
    else stop();
    return;
  }
  const found = SHORTCUTS.find(([, , is]) => is(event));
  if (!found) return;
  event.preventDefault();
  found[3]();
}

/** Files that are pasted anywhere, and text that is pasted outside of a field. */
function onPaste(event) {
  const files = [...event.clipboardData.files];
  if (files.length) {
    event.preventDefault();
    attach(files);
  } else if (!typing(event)) $("text").focus();
}

const hasFiles = (event) => event.dataTransfer.types.includes("Files");

function startDrop() {
  let inside = 0;
  const leave = () => ((inside = 0), document.body.classList.remove("dropping"));
  addEventListener("dragenter", (event) => {
    if (!hasFiles(event)) return;
    inside += 1;
    document.body.classList.add("dropping");
  });
  addEventListener("dragover", (event) => hasFiles(event) && event.preventDefault());
  addEventListener("dragleave", (event) => hasFiles(event) && (inside -= 1) <= 0 && leave());
  addEventListener("drop", async (event) => {
    leave();
    if (!hasFiles(event)) return;
    event.preventDefault();
    const files = await droppedFiles(event.dataTransfer);
    if ($("table").open) addFiles(files);
    else await attach(files);
  });
}

function startPickers() {
  for (const name of ["files", "folder", "camera"]) {
    $(`pick-${name}`).onchange = async ({ target }) => {
      const byPath = (a, b) => byName({ name: a.webkitRelativePath || "" }, { name: b.webkitRelativePath || "" });
      const files = [...target.files].sort(byPath);
      await attach(name === "folder" ? files.filter(({ type }) => /^(image|video)\//.test(type)) : files);
      target.value = "";
    };
  }
  $("files").onclick = () => $("pick-files").click();
  $("folder").onclick = () => $("pick-folder").click();
}

function startButtons() {
  for (const element of document.querySelectorAll("[data-icon]")) element.prepend(icon(/** @type {any} */ (element).dataset.icon));
  for (const dialog of document.querySelectorAll("dialog")) {
    dialog.querySelectorAll("button[value=cancel]").forEach((one) => one.addEventListener("click", () => dialog.close()));
    if (dialog.id === "key-dialog") continue;
    dialog.addEventListener("click", (event) => event.target === dialog && dialog.close()); // beside it
  }
  document.querySelector(".skip")?.addEventListener("click", (event) => (event.preventDefault(), $("text").focus())); // its URL would name no chat
  $("composer").onsubmit = (event) => (event.preventDefault(), send());
  $("text").onkeydown = (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    send();
  };
  $("text").oninput = changed;
  $("stop").onclick = stop;
  $("new").onclick = newChat;
  $("cancel-edit").onclick = cancelEdit;
  $("menu").onclick = () => toggleMenu(true);
  $("hide").onclick = () => toggleMenu(false);
  $("search").oninput = ({ target }) => search(target.value);
  $("help").onclick = () => $("shortcuts").showModal();
  $("shortcut-list").append(...SHORTCUTS.flatMap(([keys, words]) => [make("dt", {}, make("kbd", { textContent: keys })), make("dd", { textContent: words })]));
  $("export").onclick = () => attempt(exportChats);
  $("import").onclick = () => $("import-file").click();
  $("import-file").onchange = ({ target }) =>
    attempt(async () => {
      showError();
      const [file] = target.files;
      const chats = await importChats(await file.text()).finally(() => (target.value = ""));
      await renderChats();
      if (chats.length === 1) await openChat(chats[0].id);
    });
  $("key-dialog").onclose = () => {
    api.useKey($("key").value);
    $("key").value = "";
    connect();
  };
  if (!rich) $("plain").hidden = false;
  addEventListener("keydown", onKey);
  addEventListener("paste", onPaste);
}

startButtons();
startPickers();
startDrop();
startCamera();
startTable();
startSettings();
startViewer();
follow();
await start();
state.chat.settings ??= defaults();
store.persist();
connect(() => {
  renderModel();
  renderWelcome(!state.chat.leaf);
  renderBudget();
  prepareSoon();
});
store.collect().catch(() => {});
