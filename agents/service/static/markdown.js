// Markdown to nodes. What a model says becomes elements and text nodes made here, one by one: it is
// never parsed as HTML, no address but http, https and mailto becomes a link, and nothing is loaded.

import { copyButton, h } from "./dom.js";

// Deeper than anybody nests; a wall against an answer that nests for ever.
const DEPTH = 16;
// Larger than anybody reads; a browser lays out each place of a table, also one that no cell fills.
const TABLE_COLUMNS = 500;
const TABLE_PLACES = 50_000;
const ADDRESS_LENGTH = 4000;
const LINK_LENGTH = 2000;

// A text may be made to take for ever, so each pattern passes over a line once: no two repetitions that
// take the same signs stand side by side, and what ends in `.*` takes all of the line (`s`).
const FENCE = /^( {0,3})(`{3,}|~{3,})(.*)$/s;
const CLOSING = /^ {0,3}(`+|~+)[ \t]*$/;
const HEADING = /^ {0,3}(#{1,6})(?:[ \t](.*))?$/s;
const RULE = /^ {0,3}(?:(?:-[ \t]*){3,}|(?:\*[ \t]*){3,}|(?:_[ \t]*){3,})$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])(?:([ \t]+)(.*)|)$/s;
const TASK = /^\[([ xX])\][ \t]+/;
const UNDERLINE = /^ {0,3}(=+|-{2,})[ \t]*$/;
const DELIMITERS = /^ {0,3}[|:-][|: \t-]*$/;
const DELIMITER = /^:?-+:?$/;

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
    for (const node of nodes) if (node.parentNode !== this.root) this.root.append(node);
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

/** Fill `parent` with the blocks of lines; one by one, as a call takes only so many arguments. */
function build(lines, depth, parent) {
  for (const block of scanAll(lines, depth)) parent.append(block.build());
  return parent;
}

/** The block that begins at a line: where it ends, and how it is made. */
function scan(lines, at, depth) {
  const line = lines[at];
  const fence = FENCE.exec(line);
  if (fence && isFence(fence)) return scanFence(lines, at, fence);
  const heading = HEADING.exec(line);
  if (heading) {
    const whole = (heading[2] ?? "").trim();
    const open = withoutEnd(whole, "#");
    const text = open === "" || " \t".includes(open.at(-1)) ? open : whole; // of C# the sign stays
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

/** The text without what stands at its end; a loop, for a pattern would begin anew at each sign. */
function withoutEnd(text, signs) {
  let end = text.length;
  while (end && signs.includes(text[end - 1])) end -= 1;
  return text.slice(0, end);
}

const isFence = (match) => match[2][0] === "~" || !match[3].includes("`");

/** Whether a line closes the fence that such a mark opened. */
const closesFence = (line, mark) => CLOSING.exec(line)?.[1].startsWith(mark) ?? false;

function scanFence(lines, at, [, space, mark, info]) {
  let to = at + 1;
  while (to < lines.length && !closesFence(lines[to], mark)) to += 1;
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
  return { end, build: () => build(inner, depth + 1, h("blockquote")) };
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
      if (fence) fence = closesFence(stripped, fence) ? null : fence;
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

/** The mark of the fence that a line opens. */
function fenceOf(line) {
  const match = FENCE.exec(line);
  return match && isFence(match) ? match[2] : null;
}

function listItem(inner, depth) {
  const task = TASK.exec(inner[0]);
  if (!task) return build(inner, depth + 1, h("li"));
  const box = h("input", { type: "checkbox", disabled: true, checked: task[1] !== " ", "aria-label": task[1] === " " ? "to do" : "done" });
  const item = build([inner[0].slice(task[0].length), ...inner.slice(1)], depth + 1, h("li", { class: "task" }));
  if (item.firstChild?.tagName === "P") item.firstChild.prepend(box, " ");
  else item.prepend(box);
  return item;
}

function cells(line) {
  const inner = line.trim().replace(/^\|/, "").replace(/(^|[^\\])\|$/, "$1");
  return inner.split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
}

function scanTable(lines, at) {
  if (!DELIMITERS.test(lines[at + 1]) || !lines[at + 1].includes("-")) return null;
  const delimiters = cells(lines[at + 1]);
  const head = cells(lines[at]);
  if (delimiters.length !== head.length || !delimiters.every((cell) => DELIMITER.test(cell))) return null;
  const align = delimiters.map((cell) => (cell.endsWith(":") ? (cell.startsWith(":") ? "center" : "right") : null));
  let end = at + 2;
  while (end < lines.length && !blank(lines[end]) && !interrupts(lines[end])) end += 1;
  if (head.length > TABLE_COLUMNS || head.length * (end - at - 1) > TABLE_PLACES) {
    const code = () => lines.slice(at, end).join("\n");
    return { end, head: lines[at], code, build: () => codeBlock(code(), "table") };
  }
  const row = (tag, texts) => {
    const properties = (column) => ({ class: align[column], scope: tag === "th" ? "col" : null });
    const made = texts.slice(0, head.length).map((text, column) => inline(text, h(tag, properties(column))));
    // One empty cell for all that are missing: a short line must not become a row of a thousand elements.
    const missing = head.length - made.length;
    if (missing > 0) made.push(h(tag, { colspan: missing === 1 ? null : missing }));
    return h("tr", {}, made);
  };
  return {
    end,
    build: () => {
      const body = h("tbody");
      for (const line of lines.slice(at + 2, end)) body.append(row("td", cells(line)));
      const table = h("table", {}, h("thead", {}, row("th", head)), body);
      return h("div", { class: "table", tabindex: "0", role: "region", "aria-label": "Table" }, table);
    },
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
const ADDRESS = /^https?:\/\/[^\s<>"]+/i;
const HOST = /^https?:\/\/[^\s<>"/#\\]+[/#\\]?/i;
const ANGLED = /<((?:https?:\/\/|mailto:)[^\s<>]+|[\w.+-]+@[\w-]+(?:\.[\w-]+)+)>/iy;
const TARGET = /^(?:[^\s()\\]|\\.|\((?:[^\s()\\]|\\.)*\))*/;
const ANGLED_TARGET = /^<([^<>\n]*)>/;
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
  let dead = 0; // so many brackets, from the first, stand around a link and can only be images
  let images = 0; // so many of the brackets
  const nextOpen = finder(text, "[");
  const nextClose = finder(text, "](");
  const nextTicks = tickFinder(text);
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
      const closing = nextTicks(at, marks.length);
      if (closing === undefined) {
        say(marks);
        at += marks.length;
      } else {
        let code = text.slice(at + marks.length, closing).replaceAll("\n", " ");
        at = closing + marks.length;
        if (code.startsWith(" ") && code.endsWith(" ") && !blank(code)) code = code.slice(1, -1);
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
      if (image) images += 1;
      at += image ? 2 : 1;
    } else if (character === "]") {
      const bracket = brackets.pop();
      const alive = bracket && (bracket.image || brackets.length >= dead);
      dead = Math.min(dead, brackets.length);
      if (bracket?.image) images -= 1;
      const target = alive ? destination(text, at + 1) : null;
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
        if (!bracket.image) dead = brackets.length;
        at = target.end;
      }
    } else if (character === "<") {
      const angled = sticky(ANGLED);
      const address = angled && safeAddress(angled[1].includes(":") ? angled[1] : `mailto:${angled[1]}`);
      if (address) pieces.push({ node: () => link(address, angled[1]) });
      else say("<");
      at += address ? angled[0].length : 1;
    } else if (character === "h" || character === "H") {
      // An address within brackets may be the words of a link that ends soon.
      const close = nextClose(at);
      const worded = (images > 0 || brackets.length > dead) && close - at < LINK_LENGTH && nextOpen(at) > close;
      const shown = worded || (at > 0 && WORD.test(text[at - 1])) ? null : bareAddress(text.slice(at, at + ADDRESS_LENGTH));
      const address = shown && safeAddress(shown);
      if (address) {
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
      if (text.endsWith("  ", at)) pieces.push({ node: () => h("br") });
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

/** Where a sign stands next, asked for places that only grow: each stretch is searched once. */
function finder(text, sign) {
  let found = -1;
  return (at) => {
    if (found < at) found = text.indexOf(sign, at);
    if (found < 0) found = Number.POSITIVE_INFINITY;
    return found;
  };
}

/** Where the run of backticks is that closes one, likewise for places that only grow. */
function tickFinder(text) {
  const found = new Map(); // places by the length of the run; the next in the text is the last of its list
  for (const { 0: run, index } of text.matchAll(/`+/g)) {
    if (!found.has(run.length)) found.set(run.length, []);
    found.get(run.length).push(index);
  }
  for (const places of found.values()) places.reverse();
  return (at, length) => {
    const places = found.get(length) ?? [];
    while (places.at(-1) <= at) places.pop();
    return places.at(-1);
  };
}

/** The address that a text begins with; the host first, for one that is none must not cost the reading of all. */
function bareAddress(text) {
  const host = HOST.exec(text);
  return host && safeAddress(trimmed(host[0])) ? trimmed(ADDRESS.exec(text)[0]) : null;
}

function trimmed(address) {
  let shown = withoutEnd(address, AFTER_ADDRESS);
  let surplus = shown.split(")").length - shown.split("(").length;
  for (; surplus > 0 && shown.endsWith(")"); surplus -= 1) shown = withoutEnd(shown.slice(0, -1), AFTER_ADDRESS);
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
  const from = pastSpace(text, at + 1);
  const angled = text[from] === "<";
  const found = (angled ? ANGLED_TARGET : TARGET).exec(text.slice(from, from + ADDRESS_LENGTH));
  if (!found) return null;
  const behind = from + found[0].length;
  let end = pastSpace(text, behind);
  let title;
  if (end > behind && (text[end] === '"' || text[end] === "'")) {
    const close = text.indexOf(text[end], end + 1);
    if (close < 0) return null;
    title = text.slice(end + 1, close);
    end = pastSpace(text, close + 1);
  }
  if (text[end] !== ")") return null;
  const address = (angled ? found[1] : found[0]).replace(/\\([!-/:-@[-`{-~])/g, "$1");
  return { address, title, end: end + 1 };
}

function pastSpace(text, from) {
  let at = from;
  while (at < text.length && SPACE.test(text[at])) at += 1;
  return at;
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
      opener.begins.push(tag); // the innermost first
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
      for (const tag of piece.begins.reverse()) enter(() => h(tag));
    } else if (piece.open) {
      const { address, title, image } = piece.open;
      const within = parents.at(-1).closest("a");
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
