// Markdown to nodes. What a model says becomes elements and text nodes made here, one by one: it is
// never parsed as HTML, no address but http, https and mailto becomes a link, and nothing is loaded.

import { copyButton, h } from "./dom.js";

// Deeper than anybody nests; a wall against an answer that nests for ever.
const DEPTH = 16;

const FENCE = /^( {0,3})(`{3,}|~{3,})[ \t]*(.*)$/;
const HEADING = /^ {0,3}(#{1,6})(?:[ \t]+(.*))?$/;
const RULE = /^ {0,3}(?:(?:-[ \t]*){3,}|(?:\*[ \t]*){3,}|(?:_[ \t]*){3,})$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])(?:([ \t]+)(.*)|)$/;
const TASK = /^\[([ xX])\][ \t]+/;
const UNDERLINE = /^ {0,3}(=+|-{2,})[ \t]*$/;
const DELIMITERS = /^ {0,3}\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*$/;

const blank = (line) => line.trim() === "";
const indent = (line) => line.length - line.trimStart().length;

/** Show markdown that may still be growing: only the last block is made anew. */
export class Markdown {
  constructor(root) {
    this.root = root;
    this.text = "";
    this.settled = 0; // characters whose nodes stand and stay
    this.open = []; // the nodes that may still change
    this.timer = 0;
    this.cost = 0; // milliseconds of the last drawing
    this.drawn = null;
  }

  append(text) {
    this.text += text;
    // A slow drawing is followed by a longer rest, so that typing and scrolling stay quick.
    this.timer ||= setTimeout(() => this.draw(), Math.max(16, this.cost * 4));
  }

  set(text) {
    if (text === this.text) return this.draw();
    const grown = text.startsWith(this.text);
    this.text = text;
    if (!grown) {
      this.root.replaceChildren();
      this.settled = 0;
      this.open = [];
    }
    this.draw();
  }

  draw() {
    clearTimeout(this.timer);
    this.timer = 0;
    const began = performance.now();
    const lines = this.text.slice(this.settled).split("\n");
    const blocks = [...scanAll(lines, 0)];
    const last = lines.length - 1;
    // A block is over once another has begun, in a line that can no longer turn into something else.
    const over = blocks.filter((_, index) => index + 1 < blocks.length && blocks[index + 1].begin < last).length;
    const nodes = blocks.map((block, index) => {
      const [known] = index === 0 && block.code ? this.open : [];
      if (known?.grow && known.head === block.head) {
        known.grow(block.code());
        return known;
      }
      const node = block.build();
      node.head = block.head;
      return node;
    });
    for (const node of this.open) if (!nodes.includes(node)) node.remove();
    this.root.append(...nodes.filter((node) => node.parentNode !== this.root));
    this.open = nodes.slice(over);
    if (over) this.settled += lines.slice(0, blocks[over].begin).join("\n").length + 1;
    this.cost = performance.now() - began;
    this.drawn?.();
  }
}

/** All of a text at once. */
export function markdown(text, root = h("div", { class: "markdown" })) {
  new Markdown(root).set(text);
  return root;
}

function* scanAll(lines, depth) {
  for (let at = 0; at < lines.length; ) {
    if (blank(lines[at])) at += 1;
    else {
      const block = scan(lines, at, depth);
      yield { ...block, begin: at };
      at = block.end;
    }
  }
}

function build(lines, depth) {
  return [...scanAll(lines, depth)].map((block) => block.build());
}

/** The block that begins at a line: where it ends, and how it is made. */
function scan(lines, at, depth) {
  const line = lines[at];
  const fence = FENCE.exec(line);
  if (fence && isFence(fence)) return scanFence(lines, at, fence);
  const heading = HEADING.exec(line);
  if (heading) {
    const text = withoutEnd((heading[2] ?? "").trimEnd(), "#");
    // The page's own title is the only h1.
    return { end: at + 1, build: () => inline(text, h(`h${Math.min(6, heading[1].length + 1)}`)) };
  }
  if (RULE.test(line)) return { end: at + 1, build: () => h("hr") };
  if (depth < DEPTH) {
    if (QUOTE.test(line)) return scanQuote(lines, at, depth);
    if (ITEM.test(line)) return scanList(lines, at, depth);
  }
  if (line.includes("|") && at + 1 < lines.length) {
    const table = scanTable(lines, at);
    if (table) return table;
  }
  if (/^(?: {4}|\t)/.test(line)) return scanIndented(lines, at);
  return scanParagraph(lines, at, depth);
}

/** The text without what stands at its end; a loop, for a pattern could be made to take for ever. */
function withoutEnd(text, signs) {
  let end = text.length;
  while (end && signs.includes(text[end - 1])) end -= 1;
  return text.slice(0, end);
}

const isFence = (match) => match[2][0] === "~" || !match[3].includes("`");

function scanFence(lines, at, [, space, mark, info]) {
  const closing = new RegExp(`^ {0,3}${mark[0]}{${mark.length},}[ \\t]*$`);
  let to = at + 1;
  while (to < lines.length && !closing.test(lines[to])) to += 1;
  const code = () =>
    lines
      .slice(at + 1, to)
      .map((line) => line.slice(Math.min(space.length, indent(line))))
      .join("\n");
  const language = /^[\w+#.-]{1,24}/.exec(info.trim())?.[0] ?? "";
  return { end: Math.min(to + 1, lines.length), head: lines[at], code, build: () => codeBlock(code(), language) };
}

function scanIndented(lines, at) {
  let end = at;
  for (let next = at; next < lines.length && (blank(lines[next]) || /^(?: {4}|\t)/.test(lines[next])); next += 1) {
    if (!blank(lines[next])) end = next + 1;
  }
  const code = () => lines.slice(at, end).map((line) => line.replace(/^(?: {1,4}|\t)/, "")).join("\n");
  return { end, code, build: () => codeBlock(code(), "") };
}

/** Code with its language and a button to copy it; `grow` shows more of the same code. */
export function codeBlock(text, language) {
  const shown = document.createTextNode(text);
  const node = h(
    "figure",
    { class: "code" },
    h("figcaption", {}, h("span", {}, language || "code"), copyButton("Copy code", () => shown.data)),
    h("pre", { tabindex: "0" }, h("code", {}, shown)),
  );
  node.grow = (all) => {
    if (all.startsWith(shown.data)) shown.appendData(all.slice(shown.length));
    else shown.data = all;
  };
  return node;
}

function scanQuote(lines, at, depth) {
  const inner = [];
  let end = at;
  let paragraph = false;
  while (end < lines.length) {
    const line = lines[end];
    if (QUOTE.test(line)) inner.push(line.replace(QUOTE, ""));
    else if (paragraph && !blank(line) && !interrupts(line)) inner.push(line);
    else break;
    paragraph = isText(inner.at(-1));
    end += 1;
  }
  return { end, build: () => h("blockquote", {}, build(inner, depth + 1)) };
}

/** Whether a line can be the middle of a paragraph, so that the next may go on with it. */
const isText = (line) => !blank(line) && !FENCE.test(line) && !HEADING.test(line) && !RULE.test(line);

function scanList(lines, at, depth) {
  const [, , firstMark] = ITEM.exec(lines[at]);
  const kind = firstMark.at(-1);
  const ordered = /\d/.test(firstMark);
  const items = [];
  let end = at;
  let loose = false;
  while (end < lines.length) {
    const match = RULE.test(lines[end]) ? null : ITEM.exec(lines[end]);
    if (!match || match[2].at(-1) !== kind) break;
    const [, space, mark, gap = " ", text = ""] = match;
    const inside = space.length + mark.length + (gap.length > 4 ? 1 : gap.length);
    // Models often indent what is nested by two, also below "1.".
    const nested = Math.min(inside, space.length + 2);
    const inner = [(gap.length > 4 ? gap.slice(1) : "") + text];
    let fence = fenceOf(text);
    let content = end + 1; // behind the last line that is not blank
    let next = end + 1;
    for (; next < lines.length; next += 1) {
      const line = lines[next];
      if (blank(line)) {
        inner.push("");
        continue;
      }
      const own = indent(line) >= nested;
      const lazy = !fence && content === next && isText(line) && !ITEM.test(line) && isText(inner.at(-1)) && !QUOTE.test(line);
      if (!own && !lazy) break;
      const stripped = line.slice(Math.min(indent(line), inside));
      if (fence) fence = fence.test(stripped) ? null : fence;
      else fence = fenceOf(stripped);
      inner.push(stripped);
      content = next + 1;
    }
    loose ||= looseWithin(inner);
    items.push(inner);
    const more = next < lines.length && ITEM.exec(lines[next]);
    if (more && more[2].at(-1) === kind && content < next) loose = true;
    end = next;
  }
  return {
    end,
    build: () => {
      const start = ordered ? Number.parseInt(firstMark, 10) : 1;
      const list = h(ordered ? "ol" : "ul", { class: loose ? null : "tight", start: start === 1 ? null : start });
      for (const inner of items) list.append(listItem(inner, depth));
      return list;
    },
  };
}

/** Whether a blank line stands between two blocks of an item, which sets the whole list wider. */
function looseWithin(inner) {
  const gap = inner.findIndex((line, index) => index > 0 && blank(line));
  return gap > 0 && inner.slice(gap).some((line) => !blank(line) && !ITEM.test(line));
}

/** What closes the fence that a line opens. */
function fenceOf(line) {
  const match = FENCE.exec(line);
  return match && isFence(match) ? new RegExp(`^ {0,3}${match[2][0]}{${match[2].length},}[ \\t]*$`) : null;
}

function listItem(inner, depth) {
  const task = TASK.exec(inner[0]);
  if (!task) return h("li", {}, build(inner, depth + 1));
  const box = h("input", { type: "checkbox", disabled: true, checked: task[1] !== " ", "aria-label": task[1] === " " ? "to do" : "done" });
  const nodes = build([inner[0].slice(task[0].length), ...inner.slice(1)], depth + 1);
  if (nodes[0]?.tagName === "P") nodes[0].prepend(box, " ");
  else nodes.unshift(box);
  return h("li", { class: "task" }, nodes);
}

function cells(line) {
  const inner = line.trim().replace(/^\|/, "").replace(/(^|[^\\])\|$/, "$1");
  return inner.split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
}

function scanTable(lines, at) {
  if (!DELIMITERS.test(lines[at + 1]) || !lines[at + 1].includes("-")) return null;
  const head = cells(lines[at]);
  const align = cells(lines[at + 1]).map((cell) => (cell.endsWith(":") ? (cell.startsWith(":") ? "center" : "right") : null));
  if (align.length !== head.length) return null;
  let end = at + 2;
  while (end < lines.length && !blank(lines[end]) && !interrupts(lines[end])) end += 1;
  const row = (tag, texts) =>
    h("tr", {}, head.map((_, column) => inline(texts[column] ?? "", h(tag, { class: align[column], scope: tag === "th" ? "col" : null }))));
  return {
    end,
    build: () =>
      h(
        "div",
        { class: "table", tabindex: "0", role: "region", "aria-label": "Table" },
        h(
          "table",
          {},
          h("thead", {}, row("th", head)),
          h("tbody", {}, lines.slice(at + 2, end).map((line) => row("td", cells(line)))),
        ),
      ),
  };
}

/** Whether a line ends the paragraph before it. */
function interrupts(line) {
  const fence = FENCE.exec(line);
  if ((fence && isFence(fence)) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line)) return true;
  const item = ITEM.exec(line);
  return Boolean(item && item[4] && (/^[-*+]$/.test(item[2]) || Number.parseInt(item[2], 10) === 1));
}

function scanParagraph(lines, at, depth) {
  let end = at + 1;
  let level = 0;
  while (end < lines.length && !blank(lines[end])) {
    const underline = UNDERLINE.exec(lines[end]);
    if (underline) {
      level = underline[1][0] === "=" ? 2 : 3;
      end += 1;
      break;
    }
    if (depth < DEPTH ? interrupts(lines[end]) : FENCE.test(lines[end])) break;
    if (lines[end].includes("|") && end + 1 < lines.length && scanTable(lines, end)) break;
    end += 1;
  }
  const text = lines
    .slice(at, level ? end - 1 : end)
    .map((line) => line.trimStart())
    .join("\n")
    .trimEnd();
  return { end, build: () => inline(text, h(level ? `h${level}` : "p")) };
}

const PUNCTUATION = /[!-/:-@[-`{-~]/;
const SPACE = /\s/;
const WORD = /[\p{L}\p{N}]/u;
const SIGN = /[\p{P}\p{S}]/u;
const PLAIN = /[^\\`*_~[\]!<&\nhH]+/y;
const ADDRESS = /https?:\/\/[^\s<>"]+/iy;
const ANGLED = /<((?:https?:\/\/|mailto:)[^\s<>]+|[\w.+-]+@[\w-]+(?:\.[\w-]+)+)>/iy;
const AFTER_ADDRESS = "?!.,:;*_~'\"]";
const ENTITY = /&(?:#(\d{1,7})|#[xX]([\da-fA-F]{1,6})|(amp|lt|gt|quot|apos|nbsp|copy|hellip|mdash|ndash|times|rarr|larr));/y;
const ENTITIES = { amp: "&", lt: "<", gt: ">", quot: '"', apos: "'", nbsp: "\u00a0", copy: "©", hellip: "…", mdash: "—", ndash: "–", times: "×", rarr: "→", larr: "←" };

/** The address of a link, or null: only what leads to the web or to a mail, and says so itself. */
export function safeAddress(text) {
  try {
    const address = new URL(text.trim());
    return ["http:", "https:", "mailto:"].includes(address.protocol) ? address.href : null;
  } catch {
    return null;
  }
}

/** Fill `parent` with the text of a paragraph, its emphasis, code and links. */
export function inline(text, parent) {
  const pieces = []; // { text } | { node } | a run of marks | { open, close }: link borders
  const runs = [];
  const brackets = [];
  const missing = new Set(); // lengths of backtick runs that nothing closes
  let at = 0;
  const say = (words) => {
    if (pieces.at(-1)?.text !== undefined) pieces.at(-1).text += words;
    else pieces.push({ text: words });
  };
  const sticky = (pattern) => {
    pattern.lastIndex = at;
    return pattern.exec(text);
  };
  while (at < text.length) {
    const plain = sticky(PLAIN);
    if (plain) {
      say(plain[0]);
      at += plain[0].length;
      continue;
    }
    const character = text[at];
    if (character === "\\") {
      const next = text[at + 1];
      if (next === "\n") pieces.push({ node: () => h("br") });
      else say(next !== undefined && PUNCTUATION.test(next) ? next : "\\" + (next ?? ""));
      at += 2;
    } else if (character === "`") {
      const run = /`+/y;
      run.lastIndex = at;
      const marks = run.exec(text)[0];
      const inner = missing.has(marks.length) ? null : codeUntil(text, at + marks.length, marks);
      if (inner === null) {
        missing.add(marks.length);
        say(marks);
        at += marks.length;
      } else {
        at += marks.length * 2 + inner.length;
        let code = inner.replaceAll("\n", " ");
        if (/^ .* $/.test(code) && !blank(code)) code = code.slice(1, -1);
        pieces.push({ node: () => h("code", {}, code) });
      }
    } else if (character === "*" || character === "_" || character === "~") {
      let length = 1;
      while (text[at + length] === character) length += 1;
      const run = markRun(text, at, character, length);
      at += length;
      pieces.push(run);
      if (run.opens || run.closes) runs.push(run);
    } else if (character === "[" || (character === "!" && text[at + 1] === "[")) {
      const image = character === "!";
      const bracket = { text: image ? "![" : "[", image, runs: runs.length, from: at + (image ? 2 : 1), open: null };
      pieces.push(bracket, { text: "" });
      brackets.push(bracket);
      at += image ? 2 : 1;
    } else if (character === "]") {
      const bracket = brackets.pop();
      const target = bracket && !bracket.dead ? destination(text, at + 1) : null;
      const address = target && safeAddress(target.address);
      if (!address) {
        say("]");
        at += 1;
      } else {
        match(runs.splice(bracket.runs));
        bracket.open = { address, title: target.title, image: bracket.image };
        bracket.text = "";
        pieces.push({ close: true, text: undefined });
        // No link within a link; an image within one is only its words.
        if (!bracket.image) for (const outer of brackets) outer.dead ||= !outer.image;
        at = target.end;
      }
    } else if (character === "<") {
      const angled = sticky(ANGLED);
      const address = angled && safeAddress(angled[1].includes(":") ? angled[1] : `mailto:${angled[1]}`);
      if (address) pieces.push({ node: () => link(address, angled[1]) });
      else say("<");
      at += address ? angled[0].length : 1;
    } else if (character === "h" || character === "H") {
      const found = at > 0 && WORD.test(text[at - 1]) ? null : sticky(ADDRESS);
      const shown = found && trimmed(found[0]);
      const address = shown && safeAddress(shown);
      if (address && !brackets.some((bracket) => !bracket.dead && closesAsLink(text, at))) {
        pieces.push({ node: () => link(address, shown) });
        at += shown.length;
      } else {
        say(character);
        at += 1;
      }
    } else if (character === "&") {
      const entity = sticky(ENTITY);
      say(entity ? entityText(entity) : "&");
      at += entity ? entity[0].length : 1;
    } else if (character === "\n") {
      const last = pieces.at(-1);
      if (last?.text?.endsWith("  ")) pieces.push({ node: () => h("br") });
      say("\n");
      at += 1;
    } else {
      say(character);
      at += 1;
    }
  }
  match(runs);
  return assemble(pieces, parent);
}

function codeUntil(text, from, marks) {
  for (let at = text.indexOf(marks, from); at >= 0; at = text.indexOf(marks, at)) {
    let end = at + marks.length;
    if (text[end] !== "`") return text.slice(from, at);
    while (text[end] === "`") end += 1;
    at = end;
  }
  return null;
}

/** Whether an address that stands within brackets is the words of a link that follows. */
function closesAsLink(text, at) {
  const rest = text.slice(at, at + 2000);
  const end = rest.indexOf("](");
  return end > 0 && !rest.slice(0, end).includes("[");
}

function trimmed(address) {
  let shown = withoutEnd(address.slice(0, 4000), AFTER_ADDRESS);
  while (shown.endsWith(")") && shown.split(")").length > shown.split("(").length) shown = withoutEnd(shown.slice(0, -1), AFTER_ADDRESS);
  return shown;
}

function entityText([, decimal, hexadecimal, name]) {
  if (name) return ENTITIES[name];
  const code = decimal ? Number.parseInt(decimal, 10) : Number.parseInt(hexadecimal, 16);
  return code > 0 && code <= 0x10ffff && !(code >= 0xd800 && code < 0xe000) ? String.fromCodePoint(code) : "\ufffd";
}

/** `(address "title")` behind a bracket. */
function destination(text, at) {
  if (text[at] !== "(") return null;
  const angled = /\(\s*<([^<>\n]*)>(?:\s+(?:"([^"]*)"|'([^']*)'))?\s*\)/y;
  angled.lastIndex = at;
  let found = angled.exec(text);
  if (!found) {
    const bare = /\(\s*((?:[^\s()\\]|\\.|\((?:[^\s()\\]|\\.)*\))*)(?:\s+(?:"([^"]*)"|'([^']*)'))?\s*\)/y;
    bare.lastIndex = at;
    found = bare.exec(text);
  }
  if (!found) return null;
  return { address: found[1].replace(/\\([!-/:-@[-`{-~])/g, "$1"), title: found[2] ?? found[3], end: at + found[0].length };
}

function markRun(text, at, mark, length) {
  const before = at === 0 ? " " : text[at - 1];
  const after = text[at + length] ?? " ";
  const left = !SPACE.test(after) && (!SIGN.test(after) || SPACE.test(before) || SIGN.test(before));
  const right = !SPACE.test(before) && (!SIGN.test(before) || SPACE.test(after) || SIGN.test(after));
  const run = { mark, length, left: length, ends: [], begins: [], opens: left, closes: right };
  if (mark === "_") {
    run.opens = left && (!right || SIGN.test(before));
    run.closes = right && (!left || SIGN.test(after));
  } else if (mark === "~" && length > 2) run.opens = run.closes = false;
  return run;
}

/** Pair the runs of marks: each run then knows which elements it ends and which it begins. */
function match(runs) {
  const stack = [];
  const bottoms = new Map(); // below which no opener for such a closer can be
  for (const run of runs) {
    const kind = `${run.mark}${run.opens}${run.length % 3}`;
    while (run.closes && run.left) {
      let at = stack.length - 1;
      const bottom = bottoms.get(kind) ?? 0;
      while (at >= bottom && !pairs(stack[at], run)) at -= 1;
      if (at < bottom) {
        bottoms.set(kind, stack.length);
        break;
      }
      const opener = stack[at];
      const strong = opener.left >= 2 && run.left >= 2;
      const tag = run.mark === "~" ? "del" : strong ? "strong" : "em";
      const used = run.mark === "~" ? run.length : strong ? 2 : 1;
      opener.left -= used;
      run.left -= used;
      opener.begins.unshift(tag);
      run.ends.push(tag);
      stack.length = opener.left ? at + 1 : at;
      for (const [name, value] of bottoms) if (value > stack.length) bottoms.set(name, stack.length);
    }
    if (run.opens && run.left) stack.push(run);
  }
}

function pairs(opener, closer) {
  if (opener.mark !== closer.mark) return false;
  if (closer.mark === "~") return opener.length === closer.length;
  const both = opener.closes || closer.opens;
  return !both || (opener.length + closer.length) % 3 !== 0 || (opener.length % 3 === 0 && closer.length % 3 === 0);
}

function assemble(pieces, parent) {
  const parents = [parent];
  // Beyond the bound an element is its parent again, so that every end still has its beginning.
  const enter = (make) => {
    const here = parents.at(-1);
    if (parents.length > DEPTH * 2) return parents.push(here);
    const node = make();
    here.append(node);
    return parents.push(node);
  };
  for (const piece of pieces) {
    if (piece.ends) {
      for (const _ of piece.ends) parents.pop();
      if (piece.left) parents.at(-1).append(piece.mark.repeat(piece.left));
      for (const tag of piece.begins) enter(() => h(tag));
    } else if (piece.open) {
      const { address, title, image } = piece.open;
      const within = parents.some((node) => node.tagName === "A");
      enter(() => (within ? h("span") : link(address, image ? "Image: " : "", title)));
    } else if (piece.close) parents.pop();
    else if (piece.node) parents.at(-1).append(piece.node());
    else if (piece.text) parents.at(-1).append(piece.text);
  }
  return parent;
}

function link(address, text, title) {
  return h("a", { href: address, title: title || address, target: "_blank", rel: "noopener noreferrer" }, text);
}
