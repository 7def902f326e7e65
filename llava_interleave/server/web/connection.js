// Whether the server can be reached, and its models.

import * as api from "./api.js";
import { $ } from "./dom.js";
import { UNREACHABLE, attempt, showError, state } from "./state.js";

const RETRY = 2000; // milliseconds
let onModels = () => {};
let timer = 0;

/** @param {() => void} whenKnown called whenever the models have been read */
export async function connect(whenKnown = onModels) {
  onModels = whenKnown;
  const models = await attempt(api.models, () => lostConnection());
  if (!models) return;
  state.models = models;
  setOnline(true);
  onModels();
}

/** Say so, and look for the server until it is there again. */
export function lostConnection() {
  setOnline(false);
  clearTimeout(timer);
  timer = setTimeout(async () => {
    if (!(await api.reachable())) return lostConnection();
    api.forgetUploads(); // it may have been restarted
    return connect();
  }, RETRY);
}

function setOnline(online) {
  state.online = online;
  $("offline").hidden = online;
  if (online && $("error").textContent.startsWith(UNREACHABLE)) showError();
}
