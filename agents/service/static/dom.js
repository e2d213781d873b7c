// Nodes, words and numbers: what every part of the page needs.

const SVG = "http://www.w3.org/2000/svg";

function fill(node, properties, children) {
  for (const [name, value] of Object.entries(properties ?? {})) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "value" || name === "checked" || name === "disabled") node[name] = value;
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

/** An element; text children become text nodes, never markup. */
export function h(tag, properties, ...children) {
  return fill(document.createElement(tag), properties, children);
}

export function svg(tag, properties, ...children) {
  return fill(document.createElementNS(SVG, tag), properties, children);
}

/** One of the symbols that stand in index.html. */
export function icon(name) {
  return svg("svg", { class: "icon", "aria-hidden": "true" }, svg("use", { href: `#icon-${name}` }));
}

/** A button that shows only a symbol; its label is for those who hear it, and the tooltip. */
export function iconButton(name, label, onclick, properties) {
  return h("button", { type: "button", class: "icon-button", "aria-label": label, title: label, onclick, ...properties }, icon(name));
}

const count = new Intl.NumberFormat();
const shortCount = new Intl.NumberFormat(undefined, { notation: "compact", maximumFractionDigits: 1 });
const time = new Intl.DateTimeFormat(undefined, { hour: "numeric", minute: "2-digit" });
const dayOfYear = new Intl.DateTimeFormat(undefined, { day: "numeric", month: "short" });
const fullDay = new Intl.DateTimeFormat(undefined, { day: "numeric", month: "short", year: "numeric" });
const moment = new Intl.DateTimeFormat(undefined, { dateStyle: "full", timeStyle: "medium" });
// A date without a time of day is a day, wherever the reader is.
const day = new Intl.DateTimeFormat(undefined, { day: "numeric", month: "short", timeZone: "UTC" });

export const number = (value) => count.format(value);
export const compact = (value) => shortCount.format(value);
export const dayName = (iso) => day.format(new Date(iso.slice(0, 10)));
export const fullMoment = (iso) => moment.format(new Date(iso));

/** The time of day for today, else the date. */
export function when(iso) {
  const then = new Date(iso);
  const now = new Date();
  if (then.toDateString() === now.toDateString()) return time.format(then);
  return (then.getFullYear() === now.getFullYear() ? dayOfYear : fullDay).format(then);
}

/** US dollars: two digits that count below a cent. Only for the eye: sums are the server's. */
export function money(amount) {
  const value = Number(amount);
  const digits =
    value !== 0 && Math.abs(value) < 0.01
      ? { maximumSignificantDigits: 2 }
      : { minimumFractionDigits: value === 0 ? 0 : 2, maximumFractionDigits: value < 1 ? 4 : 2 };
  return new Intl.NumberFormat(undefined, { style: "currency", currency: "USD", ...digits }).format(value);
}

export function seconds(value) {
  return `${new Intl.NumberFormat(undefined, { maximumFractionDigits: value < 10 ? 1 : 0 }).format(value)} s`;
}

/** Tokens and cost in words; what is unknown is left out, never shown as 0. */
export function spent(usage, cost) {
  const words = [];
  if (usage?.total_tokens != null) words.push(`${number(usage.total_tokens)} ${usage.total_tokens === 1 ? "token" : "tokens"}`);
  if (cost != null) words.push(money(cost));
  return words.join(" · ");
}

/** What a call cost, of which some may have no known price: `unpriced`, of `calls`. */
export function costOf({ cost, unpriced }) {
  if (cost === null || cost === undefined || (unpriced && !Number(cost))) return "unknown";
  return `${unpriced ? "≥ " : ""}${money(cost)}`;
}

/** By what the operator finds a request in the log; nothing, where there was no answer. */
export function requestNote({ requestId }) {
  return requestId ? h("small", { class: "request" }, "Request ", h("code", {}, requestId)) : null;
}

/** Put text on the clipboard; the old way where the page is not in a secure context. */
export async function copy(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const box = h("textarea", { class: "offscreen", value: text });
  const focused = document.activeElement;
  document.body.append(box);
  box.select();
  const done = document.execCommand("copy");
  box.remove();
  focused?.focus();
  if (!done) throw new Error("the browser does not let the page copy");
}

/** A button that copies what `text()` gives and says that it did. */
export function copyButton(label, text) {
  const button = iconButton("copy", label, async () => {
    let said = "Copied";
    try {
      await copy(text());
      button.replaceChildren(icon("check"));
    } catch {
      said = "Could not copy";
    }
    button.title = said;
    announce(said);
    setTimeout(() => {
      button.replaceChildren(icon("copy"));
      button.title = label;
    }, 1500);
  });
  return button;
}

/** Say something to a screen reader, and to nobody else. */
export function announce(text) {
  document.getElementById("announcer").textContent = text;
}

/** What the browser keeps for this page; a browser that refuses is one that forgets. */
export const kept = {
  get(name, store = localStorage) {
    try {
      return JSON.parse(store.getItem(name));
    } catch {
      return null;
    }
  },
  set(name, value, store = localStorage) {
    try {
      if (value === null) store.removeItem(name);
      else store.setItem(name, JSON.stringify(value));
    } catch {
      // Full, or forbidden: the page works without.
    }
  },
};
