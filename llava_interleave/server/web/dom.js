// Elements, made without HTML.

/** @param {string} id @returns {any} */
export const $ = (id) => document.getElementById(id);

/** An element with properties; `data` and `attributes` are set as such.
 * @param {string} tag @param {Record<string, any>} properties @param {...(Node | string | null | undefined | false)} children
 * @returns {any} */
export function make(tag, { data, attributes, ...properties } = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  Object.assign(element.dataset, data);
  for (const [name, value] of Object.entries(attributes ?? {})) element.setAttribute(name, value);
  element.append(.../** @type {(Node | string)[]} */ (children.filter((child) => child != null && child !== false)));
  return element;
}

/** A button with a text or an icon. A label that only assistive technology needs is also its tooltip.
 * @param {string} text @param {() => any} onclick @param {Record<string, any>} more */
export function button(text, onclick, { label = "", symbol = "", className = "link", ...more } = {}) {
  const element = make("button", { type: "button", className, onclick, ...more });
  if (symbol) element.append(icon(symbol));
  if (text) element.append(make("span", { textContent: text }));
  if (label) Object.assign(element, { ariaLabel: label, title: label });
  return element;
}

const PATHS = {
  files: "M12 5v14M5 12h14",
  folder: "M3 7h6l2 2h10v10H3z",
  table: "M4 5h16v14H4zM4 10h16M10 5v14",
  camera: "M4 8h3l2-3h6l2 3h3v11H4zM12 17a4 4 0 1 0 0-8 4 4 0 0 0 0 8z",
  menu: "M4 6h16M4 12h16M4 18h16",
  close: "M6 6l12 12M18 6L6 18",
  more: "M5 12h.01M12 12h.01M19 12h.01",
  settings: "M4 7h9M17 7h3M4 17h3M11 17h9M15 4.5v5M9 14.5v5",
  help: "M9 9a3 3 0 1 1 4.5 2.6c-1 .6-1.5 1.2-1.5 2.4M12 17.5h.01",
  left: "M15 5l-7 7 7 7",
  right: "M9 5l7 7-7 7",
  pin: "M9 4h6l-1 6 3 3H7l3-3zM12 13v7",
  plus: "M12 5v14M5 12h14",
  minus: "M5 12h14",
  send: "M12 19V5M6 11l6-6 6 6",
  stop: "M7 7h10v10H7z",
};

/** @param {string} name */
export function icon(name) {
  const space = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(space, "svg");
  for (const [key, value] of Object.entries({ viewBox: "0 0 24 24", class: "icon", "aria-hidden": "true" })) svg.setAttribute(key, value);
  const path = svg.appendChild(document.createElementNS(space, "path"));
  path.setAttribute("d", PATHS[name]);
  return svg;
}

/** Make the children of `parent` those of `items`. Elements whose version is unchanged stay, and so do focus and scroll.
 * @template T @param {any} parent @param {T[]} items @param {(item: T) => string} keyOf
 * @param {(item: T, index: number) => string} versionOf @param {(item: T, index: number) => any} build */
export function reconcile(parent, items, keyOf, versionOf, build) {
  const old = new Map([...parent.children].map((child) => [child.dataset.key, child]));
  const focused = parent.contains(document.activeElement) ? focusPath(parent) : null;
  items.forEach((item, index) => {
    const key = keyOf(item);
    const version = versionOf(item, index);
    let element = old.get(key);
    if (element?.dataset.version !== version) {
      const fresh = build(item, index);
      Object.assign(fresh.dataset, { key, version });
      element?.replaceWith(fresh);
      element = fresh;
    }
    old.delete(key);
    if (parent.children[index] !== element) parent.insertBefore(element, parent.children[index] ?? null);
  });
  for (const element of old.values()) element.remove();
  if (focused && !parent.contains(document.activeElement)) restoreFocus(parent, focused);
}

/** Where the focus is: the key of the item, and the label of the control in it. */
function focusPath(parent) {
  const active = /** @type {any} */ (document.activeElement);
  const item = active.closest("[data-key]");
  return { key: item?.dataset.key, name: active.dataset.focus ?? active.ariaLabel ?? active.textContent, index: [...parent.children].indexOf(item) };
}

function restoreFocus(parent, { key, name, index }) {
  const children = /** @type {any[]} */ ([...parent.children]);
  const item = children.find((child) => child.dataset.key === key) ?? children[Math.min(index, children.length - 1)];
  const controls = [...(item?.querySelectorAll("button, input, a[href], [tabindex]") ?? [])];
  (controls.find((one) => (one.dataset.focus ?? one.ariaLabel ?? one.textContent) === name) ?? controls[0])?.focus();
}

/** Say something to screen readers. @param {string} text */
export function announce(text) {
  $("announce").textContent = text;
}

/** A message that goes away, with an action (Undo). */
export function toast(text, action = "", run = () => {}) {
  const box = make("div", { className: "toast" }, make("span", { textContent: text }));
  if (action) box.append(button(action, () => (run(), box.remove()), { className: "quiet" }));
  box.append(button("", () => box.remove(), { label: "Close this message", symbol: "close" }));
  $("toasts").append(box);
  setTimeout(() => box.remove(), 12_000);
}

export function debounce(run, delay) {
  let timer = 0;
  return () => {
    clearTimeout(timer);
    timer = setTimeout(run, delay);
  };
}

export const plural = (count, one, many = `${one}s`) => `${count.toLocaleString("en")} ${count === 1 ? one : many}`;
