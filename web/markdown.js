// Markdown with tables, mathematics and highlighted code: replaces the page's plain markdown.js.
// What a model writes is untrusted: no HTML, no images, no scripts' links; DOMPurify has the last word.

import DOMPurify from "dompurify";
import hljs from "highlight.js/lib/common";
import katex from "katex";
import "katex/dist/katex.css";
import MarkdownIt from "markdown-it";

export const rich = true;

const DELIMITERS = [["$$", "$$"], ["\\[", "\\]"], ["\\(", "\\)"], ["$", "$"]];

const md = new MarkdownIt({ linkify: true, breaks: true, highlight }).disable("image");
md.linkify.set({ fuzzyLink: false, fuzzyEmail: false });
md.inline.ruler.before("escape", "math", math);
md.core.ruler.push("alignment", alignment);

function highlight(code, language) {
  if (!hljs.getLanguage(language)) return "";
  return hljs.highlight(code, { language, ignoreIllegals: true }).value;
}

/** `$x$`, `$$x$$`, `\(x\)` and `\[x\]` as an element that is rendered after sanitizing. */
function math(state, silent) {
  for (const [open, close] of DELIMITERS) {
    if (!state.src.startsWith(open, state.pos)) continue;
    const start = state.pos + open.length;
    const end = state.src.indexOf(close, start);
    const tex = state.src.slice(start, end);
    if (end < 0 || !tex.trim()) continue;
    // "$5 and $10" is money: no space within the delimiters, no digit after them.
    if (open === "$" && (/^\s|\s$|\n\n/.test(tex) || /\d/.test(state.src[end + 1] ?? ""))) continue;
    if (!silent) {
      const token = state.push("math", "span", 0);
      token.content = tex;
      token.attrSet("class", open === "$$" || open === "\\[" ? "math display" : "math");
    }
    state.pos = end + close.length;
    return true;
  }
  return false;
}

md.renderer.rules.math = (tokens, index) =>
  `<span class="${tokens[index].attrGet("class")}">${md.utils.escapeHtml(tokens[index].content)}</span>`;

/** Columns are aligned by a class: the page's policy forbids style attributes. */
function alignment(state) {
  for (const token of state.tokens) {
    const style = token.attrGet("style");
    if (!style) continue;
    token.attrs = token.attrs.filter(([name]) => name !== "style");
    token.attrJoin("class", style.replace("text-align:", "align-"));
  }
}

/** @param {string} text @returns {DocumentFragment} */
export function markdown(text) {
  const fragment = DOMPurify.sanitize(md.render(text), {
    RETURN_DOM_FRAGMENT: true,
    USE_PROFILES: { html: true },
    FORBID_TAGS: ["img", "style", "form", "input", "button", "video", "audio"],
    FORBID_ATTR: ["style", "id", "name"],
  });
  for (const span of fragment.querySelectorAll(".math")) {
    const displayMode = span.classList.contains("display");
    katex.render(span.textContent, span, { displayMode, throwOnError: false, maxSize: 20, maxExpand: 200 });
  }
  for (const link of fragment.querySelectorAll("a")) {
    link.target = "_blank";
    link.rel = "noopener noreferrer";
  }
  for (const table of fragment.querySelectorAll("table")) {
    const box = document.createElement("div");
    box.className = "table";
    box.tabIndex = 0; // scrolls by keyboard
    table.replaceWith(box);
    box.append(table);
  }
  return fragment;
}
