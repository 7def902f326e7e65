// A small, safe Markdown: text becomes elements and text nodes, never HTML. `make web` replaces it by markdown-it.

export const rich = false;

function inline(parent, text) {
  const pattern = /`([^`]+)`|\*\*([^*]+)\*\*|\*([^*\s][^*]*)\*|\[([^\]]+)\]\((https?:\/\/[^\s)]+)\)/g;
  let end = 0;
  for (const match of text.matchAll(pattern)) {
    parent.append(text.slice(end, match.index));
    end = match.index + match[0].length;
    const [whole, code, strong, em, label, address] = match;
    const tag = code !== undefined ? "code" : strong !== undefined ? "strong" : em !== undefined ? "em" : "a";
    const element = /** @type {any} */ (document.createElement(tag));
    element.textContent = code ?? strong ?? em ?? label;
    if (tag === "a") {
      element.href = address;
      element.rel = "noopener noreferrer nofollow";
      element.target = "_blank";
    }
    parent.append(element);
    if (!whole) break;
  }
  parent.append(text.slice(end));
}

/** The blocks of a text: paragraphs, headings, lists, fenced code. */
export function markdown(text) {
  const out = document.createDocumentFragment();
  const lines = text.split("\n");
  for (let i = 0; i < lines.length; ) {
    const line = lines[i];
    const make = (tag) => out.appendChild(document.createElement(tag));
    if (line.startsWith("```")) {
      const code = [];
      for (i += 1; i < lines.length && !lines[i].startsWith("```"); i += 1) code.push(lines[i]);
      i += 1;
      make("pre").appendChild(document.createElement("code")).textContent = code.join("\n");
    } else if (/^#{1,6} /.test(line)) {
      inline(make(`h${Math.min(6, line.indexOf(" ") + 1)}`), line.replace(/^#+ /, ""));
      i += 1;
    } else if (/^\s*([-*]|\d+[.)]) /.test(line)) {
      const list = make(/^\s*\d/.test(line) ? "ol" : "ul");
      for (; i < lines.length && /^\s*([-*]|\d+[.)]) /.test(lines[i]); i += 1) {
        inline(list.appendChild(document.createElement("li")), lines[i].replace(/^\s*([-*]|\d+[.)]) /, ""));
      }
    } else if (!line.trim()) {
      i += 1;
    } else {
      const paragraph = [];
      for (; i < lines.length && lines[i].trim() && !/^(```|#{1,6} |\s*([-*]|\d+[.)]) )/.test(lines[i]); i += 1) paragraph.push(lines[i]);
      inline(make("p"), paragraph.join("\n"));
    }
  }
  return out;
}
