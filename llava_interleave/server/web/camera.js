// Photos from the camera of this device.

import { attach } from "./attachments.js";
import { $, announce, make } from "./dom.js";
import { attempt } from "./state.js";

/** @type {MediaStream | null} */ let stream = null;
let taken = 0;

async function openCamera() {
  if (!navigator.mediaDevices) {
    $("pick-camera").click(); // a page over plain http: the device's own camera program
    return;
  }
  stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } }).catch((error) => {
    throw new Error(error.name === "NotAllowedError" ? "the browser does not let this page use the camera: allow it in the address bar" : "there is no camera that can be used");
  });
  $("camera-view").srcObject = stream;
  $("camera").showModal();
}

async function take() {
  const view = $("camera-view");
  const canvas = make("canvas", { width: view.videoWidth, height: view.videoHeight });
  canvas.getContext("2d").drawImage(view, 0, 0);
  const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/jpeg", 0.92));
  taken += 1;
  await attach([new File([blob], `photo-${taken}.jpg`, { type: "image/jpeg", lastModified: Date.now() })]);
  announce(`Photo ${taken} taken`);
  $("camera-count").textContent = `${taken} taken`;
}

export function startCamera() {
  $("open-camera").onclick = () => attempt(openCamera);
  $("camera-take").onclick = () => attempt(take);
  $("camera").onclose = () => {
    stream?.getTracks().forEach((track) => track.stop());
    stream = null;
    taken = 0;
    $("camera-count").textContent = "";
  };
}
