// Numbers behind the sentences of an answer: the images that each rests on.

import { button, make } from "./dom.js";

const [OPEN, CLOSE] = ["\uE000", "\uE001"]; // private use: through Markdown as they are
const MARK = /\uE000([\d,?]+)\uE001/;

/** The text of an answer with a mark behind each cited sentence. Positions of annotations count code points.
 * @param {string} text @param {any[] | undefined} annotations */
export function marked(text, annotations) {
  const clean = text.replace(/[\uE000\uE001]/g, "");
  if (!annotations?.length || clean !== text) return clean;
  const characters = [...text];
  let out = "", at = 0;
  for (const { start_index, end_index, images, uncertain } of annotations) {
    const words = characters.slice(start_index, end_index).join("").trimEnd();
    out += characters.slice(at, start_index).join("") + words;
    if (images.length) out += `${OPEN}${images.join(",")}${uncertain ? "?" : ""}${CLOSE}`;
    at = start_index + [...words].length;
  }
  return out + characters.slice(at).join("");
}

/** Marks in rendered text become buttons that enlarge their image; in code they go. @param {any} content @param {(number: number) => void} enlarge */
export function linkCitations(content, enlarge) {
  const walker = document.createTreeWalker(content, NodeFilter.SHOW_TEXT);
  const texts = [];
  while (walker.nextNode()) if (MARK.test(walker.currentNode.nodeValue ?? "")) texts.push(walker.currentNode);
  for (const text of texts) {
    const inside = text.parentElement?.closest("pre, code, a, .math");
    const pieces = (text.nodeValue ?? "").split(new RegExp(MARK, "g")).map((piece, i) => (i % 2 ? numbers(piece, enlarge) : piece));
    /** @type {ChildNode} */ (text).replaceWith(...pieces.filter((_, i) => i % 2 === 0 || !inside));
  }
}

function numbers(piece, enlarge) {
  const uncertain = piece.endsWith("?");
  const box = make("sup", { className: "citations" });
  for (const number of piece.replace("?", "").split(",")) {
    box.append(button(number, () => enlarge(+number), { className: uncertain ? "citation uncertain" : "citation", label: `Rests on image ${number}${uncertain ? "; less certain, since the sentence seems to count or compare" : ""}` }));
  }
  return box;
}
