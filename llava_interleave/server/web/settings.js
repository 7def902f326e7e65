// Settings of a chat (system prompt, sampling, model) and of the page (theme), in dialogs.

import { prepareSoon } from "./ahead.js";
import { $, make } from "./dom.js";
import { attempt, model, state } from "./state.js";
import * as store from "./store.js";
import { abilities, renderWelcome } from "./welcome.js";

/** Temperatures by what they are good for. */
const PRESETS = { Exact: 0, Balanced: 0.7, Creative: 1.2 };
const FIELDS = ["system", "temperature", "max_tokens", "seed"];

export function applyTheme(theme = localStorage.getItem("theme") ?? "system") {
  localStorage.setItem("theme", theme);
  document.documentElement.dataset.theme = theme;
}

const saveChat = () => (state.chat.leaf ? attempt(() => store.save(state.chat)) : undefined);

function openSettings() {
  const form = $("settings-form").elements;
  const settings = state.chat.settings ?? {};
  for (const name of FIELDS) form[name].value = settings[name] ?? "";
  form.cite.checked = settings.cite ?? false;
  form.max_tokens.max = model()?.limits.max_tokens ?? "";
  form.max_tokens.placeholder = model() ? `at most ${model().limits.max_tokens}` : "";
  const usual = model()?.generation_config.temperature ?? 0;
  form.temperature.placeholder = usual ? `the model's own: ${usual}` : "0: the most probable tokens";
  form.theme.value = localStorage.getItem("theme") ?? "system";
  showPreset();
  $("settings").showModal();
}

/** The preset that the temperature is. */
function showPreset() {
  const form = $("settings-form").elements;
  const temperature = form.temperature.value === "" ? 0 : +form.temperature.value;
  form.preset.value = Object.keys(PRESETS).find((name) => PRESETS[name] === temperature) ?? "Custom";
}

function keep() {
  const form = $("settings-form").elements;
  const settings = {};
  for (const name of FIELDS) {
    const { value, type } = form[name];
    if (value.trim() !== "") settings[name] = type === "number" ? +value : value;
  }
  if (form.cite.checked) settings.cite = true;
  state.chat.settings = settings;
  if (form.default.checked) localStorage.setItem("settings", JSON.stringify(settings));
  applyTheme(form.theme.value);
  saveChat();
  prepareSoon();
}

/** Settings of new chats. */
export const defaults = () => JSON.parse(localStorage.getItem("settings") ?? "{}");

export function renderModel() {
  $("model").textContent = model()?.id ?? "no model yet";
}

function openModels() {
  $("models").replaceChildren(
    ...state.models.map((one) => {
      const input = make("input", { type: "radio", name: "model", value: one.id, checked: one.id === model()?.id });
      input.onchange = () => {
        state.chat.model = one.id;
        renderModel();
        renderWelcome(!state.chat.leaf);
        saveChat();
        prepareSoon();
      };
      const facts = abilities(one).map((textContent) => make("li", { textContent }));
      return make("li", {}, make("label", {}, input, make("strong", { textContent: one.id })), make("ul", {}, ...facts));
    }),
  );
  $("model-dialog").showModal();
}

export function startSettings() {
  applyTheme();
  $("open-settings").onclick = openSettings;
  $("model").onclick = openModels;
  const form = $("settings-form");
  form.elements.preset.append(...[...Object.keys(PRESETS), "Custom"].map((name) => make("option", { value: name, textContent: name in PRESETS ? `${name} (${PRESETS[name]})` : name })));
  form.elements.preset.onchange = ({ target }) => {
    if (target.value in PRESETS) form.elements.temperature.value = PRESETS[target.value] || "";
  };
  form.elements.temperature.oninput = showPreset;
  form.elements.theme.onchange = ({ target }) => applyTheme(target.value);
  form.onsubmit = keep;
}
