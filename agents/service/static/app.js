// The page: what it shows, the list of conversations, dialogs and keys.

import * as api from "./api.js";
import { announce, fullMoment, h, icon, iconButton, kept, money, number, requestNote, spent, when } from "./dom.js";
import { Thread, sumOf } from "./thread.js";
import { usageView } from "./usage.js";

const $ = (id) => document.getElementById(id);
const PAGE = 50;
const address = (id) => `#/c/${encodeURIComponent(id)}`;
const narrow = matchMedia("(max-width: 48rem)");

const app = {
  session: null,
  models: [],
  model: undefined,
  current: null, // the thread that is shown, or null: the usage
  running: new Set(), // threads with an answer under way, shown or not

  go(hash) {
    if (location.hash === hash) this.route();
    else location.hash = hash;
  },

  /** Show a conversation; one that is being answered goes on in the background when it is left. */
  async open(id) {
    const running = id !== null && [...this.running].find((thread) => thread.id === id);
    const thread = running || new Thread(this, id);
    this.current = thread;
    if (id !== null && location.hash !== address(id)) history.pushState(null, "", address(id));
    $("view").replaceChildren(thread.root);
    thread.modelSlot.replaceChildren(modelChooser());
    thread.fit();
    list.select();
    closeDrawer();
    if (running) {
      thread.toEnd();
      this.describe(thread);
    } else await thread.load();
    // Who has begun to write elsewhere meanwhile, goes on there.
    const writing = document.activeElement?.matches("#search, .rename");
    if (this.current === thread && !narrow.matches && !dialogOpen() && !writing) thread.box.focus();
    return thread;
  },

  /** A conversation was made by its first message. */
  created(thread) {
    if (this.current !== thread) return;
    history.replaceState(null, "", address(thread.id));
    this.describe(thread);
    list.load();
  },

  /** A conversation whose first message did not get into it is deleted again. */
  unmade(thread) {
    if (this.current !== thread) return;
    history.replaceState(null, "", "#/");
    this.describe(thread);
    list.load();
  },

  /** Something about a thread's answer changed: it began, or it is over. */
  mark(thread) {
    if (thread.live) this.running.add(thread);
    else this.running.delete(thread);
    list.marks();
  },

  /** An answer is over: the order of the list, and a first title, are the service's. */
  async answered(thread) {
    await list.load();
    const summary = list.items.get(thread.id);
    if (!summary || !thread.conversation) return;
    const { conversation } = thread;
    // The service makes a title of the first question; another that is there may be newer than this list.
    if (!conversation.title || conversation.title === thread.guess) conversation.title = summary.title ?? conversation.title;
    this.describe(thread);
    if (summary.revision > conversation.revision) thread.look();
  },

  describe(thread) {
    if (this.current !== thread) return;
    const { conversation } = thread;
    const title = conversation ? titleOf(conversation) : "New conversation";
    document.title = conversation ? `${title} · Chat` : "Chat";
    const parts = [h("h1", {}, conversation ? h("button", { type: "button", class: "title", dir: "auto", title: "Rename", onclick: () => rename(conversation) }, title) : title)];
    if (conversation?.parent) {
      const parent = list.items.get(conversation.parent);
      parts.push(h("p", { class: "parent" }, icon("branch"), "Branch of ", h("a", { href: address(conversation.parent) }, parent ? titleOf(parent) : "another conversation")));
    }
    // A title that is being written there is not taken away.
    const writing = $("heading").querySelector(".rename")?.dataset.id;
    if (!writing || writing !== conversation?.id) $("heading").replaceChildren(...parts);
    const { usage, paid } = sumOf(conversation?.messages ?? []);
    // What was replaced was paid for, too.
    $("totals").textContent = spent(usage, paid ? conversation.cost : null);
    $("totals").title = usage ? `${number(usage.prompt_tokens)} prompt tokens, ${number(usage.completion_tokens)} completion tokens` : "";
    $("actions").hidden = !conversation;
  },

  async route() {
    const [, kind, id] = /^#\/(\w*)\/?(.*)$/.exec(location.hash) ?? [];
    if (kind === "usage") {
      this.current = null;
      closeDrawer();
      $("heading").replaceChildren(h("h1", {}, "Usage"));
      document.title = "Usage · Chat";
      $("totals").textContent = "";
      $("actions").hidden = true;
      list.select();
      $("view").replaceChildren(usageView());
      return;
    }
    await this.open(kind === "c" && id ? decodeURIComponent(id) : null);
  },
};

/** A conversation's title; one that is being made has the beginning of its first message. */
const titleOf = ({ id, title }) => title || [...app.running].find((thread) => thread.id === id)?.conversation?.title || "Untitled";

// The list of conversations

const list = {
  items: new Map(),
  next: null,
  query: "",
  asked: 0,
  late: false, // a newer list than what is shown

  /** The list from its beginning; what was unfolded by "more" is folded again only by a search. */
  async load({ fresh = false } = {}) {
    const asked = (this.asked += 1);
    const limit = fresh ? PAGE : Math.min(200, Math.max(PAGE, this.items.size));
    try {
      const page = await api.get(this.path(limit));
      if (asked !== this.asked) return;
      this.items = new Map();
      this.show(page);
      $("list-note").textContent = page.data.length ? "" : this.query ? "Nothing found." : "No conversations yet.";
      if (this.query) announce(page.data.length ? `${page.data.length}${page.next ? " or more" : ""} found` : "Nothing found");
    } catch (error) {
      if (asked === this.asked && error.status !== 401) $("list-note").replaceChildren(error.message, requestNote(error) ?? "");
    }
  },

  path(limit, cursor) {
    const query = new URLSearchParams({ limit });
    if (cursor) query.set("cursor", cursor);
    if (this.query) query.set("q", this.query);
    return `/conversations?${query}`;
  },

  async more() {
    $("more").disabled = true;
    const known = this.items.size;
    try {
      this.show(await api.get(this.path(PAGE, this.next)));
      [...$("list").querySelectorAll("a")][known]?.focus();
    } catch (error) {
      $("list-note").replaceChildren(error.message, requestNote(error) ?? "");
    } finally {
      $("more").disabled = false;
    }
  },

  show({ data, next }) {
    for (const item of data) this.items.set(item.id, item);
    this.next = next;
    $("more").hidden = !next;
    // A title that is being written in the list is not taken away.
    this.late = $("list").querySelector(".rename") !== null;
    if (this.late) return;
    const focused = document.activeElement?.closest("#list li")?.dataset.id;
    $("list").replaceChildren(...[...this.items.values()].map((item) => this.row(item)));
    if (focused) $("list").querySelector(`li[data-id="${CSS.escape(focused)}"] a`)?.focus();
    this.select();
    this.marks();
  },

  row(item) {
    const cost = Number(item.cost) > 0 ? money(item.cost) : "";
    return h(
      "li",
      { "data-id": item.id },
      h(
        "a",
        { href: address(item.id), title: titleOf(item) },
        h("span", { class: "name", dir: "auto" }, titleOf(item)),
        item.snippet ? h("span", { class: "snippet", dir: "auto" }, marked(item.snippet, this.query)) : null,
        h(
          "span",
          { class: "row-facts" },
          h("span", { class: "answering", hidden: true }, h("i", { class: "pulse", "aria-hidden": "true" }), "answering"),
          h("time", { datetime: item.updated, title: fullMoment(item.updated) }, when(item.updated)),
          cost ? h("span", {}, cost) : null,
        ),
      ),
      iconButton("more", `Actions for ${titleOf(item)}`, (event) => openMenu(event.currentTarget, item), { class: "icon-button row-menu", "aria-haspopup": "menu" }),
    );
  },

  select() {
    const id = app.current?.id ?? null;
    for (const row of $("list").children) {
      const link = row.querySelector("a");
      if (row.dataset.id === id) link?.setAttribute("aria-current", "page");
      else link?.removeAttribute("aria-current");
    }
    for (const [name, there] of [["new", app.current && id === null], ["usage", !app.current]]) {
      if (there) $(name).setAttribute("aria-current", "page");
      else $(name).removeAttribute("aria-current");
    }
  },

  marks() {
    const here = new Set([...app.running].map((thread) => thread.id));
    for (const row of $("list").children) {
      const item = this.items.get(row.dataset.id);
      if (!item) continue;
      const shown = here.has(item.id) || (app.current?.id === item.id ? Boolean(app.current.elsewhere) : item.answering);
      row.querySelector(".answering")?.toggleAttribute("hidden", !shown); // none where a title is written
    }
  },
};

/** The snippet's words, with what was looked for marked. */
function marked(text, query) {
  const at = query ? text.toLowerCase().indexOf(query.toLowerCase()) : -1;
  if (at < 0) return [text];
  return [text.slice(0, at), h("mark", {}, text.slice(at, at + query.length)), text.slice(at + query.length)];
}

// What can be done with a conversation

function openMenu(button, conversation) {
  const menu = $("menu");
  const act = (label, symbol, run, kind = "") =>
    h(
      "button",
      {
        type: "button",
        role: "menuitem",
        tabindex: "-1",
        class: kind,
        onclick: () => {
          menu.hidePopover();
          run();
        },
      },
      icon(symbol),
      label,
    );
  menu.replaceChildren(
    act("Rename", "edit", () => rename(conversation)),
    act("Instructions…", "instructions", () => instructions(conversation)),
    h("hr", { role: "separator" }),
    act("Export as Markdown", "export", () => save(conversation, "markdown")),
    act("Export for OpenAI", "export", () => save(conversation, "openai")),
    act("Export for Anthropic", "export", () => save(conversation, "anthropic")),
    h("hr", { role: "separator" }),
    act("Delete…", "trash", () => remove(conversation), "danger"),
  );
  menu.showPopover();
  const place = button.getBoundingClientRect();
  const size = menu.getBoundingClientRect();
  menu.style.left = `${Math.max(8, Math.min(place.right - size.width, innerWidth - size.width - 8))}px`;
  menu.style.top = `${place.bottom + size.height + 8 > innerHeight ? Math.max(8, place.top - size.height - 4) : place.bottom + 4}px`;
  menu.querySelector("button").focus();
  menu.opener = button;
}

function menuKeys(event) {
  const items = [...$("menu").querySelectorAll("button")];
  const at = items.indexOf(document.activeElement);
  const to = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: items.length - 1 }[event.key];
  if (to !== undefined) {
    event.preventDefault();
    items.at(to % items.length).focus();
  } else if (event.key === "Tab") $("menu").hidePopover();
}

/** The title becomes a field where it stands: above the messages, or in the list. */
function rename(conversation) {
  const shown = app.current?.id === conversation.id ? $("heading").querySelector(".title") : $("list").querySelector(`li[data-id="${CSS.escape(conversation.id)}"] a`);
  if (!shown) return;
  const before = conversation.title ?? "";
  const field = h("input", { class: "rename", dir: "auto", "data-id": conversation.id, "aria-label": "Title", maxlength: "200", value: before });
  let over = false;
  const end = async (keep) => {
    if (over) return;
    over = true;
    const title = field.value.trim();
    const focused = document.activeElement === field;
    field.replaceWith(shown);
    if (focused) shown.focus();
    if (list.late) list.load();
    if (!keep || !title || title === before) return;
    try {
      changed(await api.patch(api.conversation(conversation.id), { title }));
      announce("Renamed");
    } catch (error) {
      tell("The title was not changed", error);
    }
  };
  field.addEventListener("blur", () => end(true));
  field.addEventListener("keydown", (event) => {
    event.stopPropagation();
    const keeping = event.key === "Enter" && !event.isComposing;
    if (!keeping && event.key !== "Escape") return;
    // The title has the focus then: this key is not also meant for it.
    event.preventDefault();
    end(keeping);
  });
  shown.replaceWith(field);
  field.focus();
  field.select();
}

function tell(title, error) {
  if (error.status !== 401) ask({ title, text: error.message, note: requestNote(error), confirm: "Close", alone: true, run: async () => {} });
}

function instructions(conversation) {
  ask({
    title: "Instructions",
    text: "What the model is told before the conversation, in each call.",
    field: h("textarea", { id: "answer-field", dir: "auto", "aria-label": "Instructions", rows: "8", value: conversation.system ?? "" }),
    confirm: "Save",
    run: async (system) => changed(await api.patch(api.conversation(conversation.id), { system: system.trim() })),
  });
}

function changed(conversation) {
  const thread = app.current;
  if (thread?.id === conversation.id && thread.conversation) {
    for (const name of ["title", "system", "revision"]) thread.conversation[name] = conversation[name];
    app.describe(thread);
  }
  list.load();
}

function remove(conversation) {
  ask({
    title: "Delete this conversation?",
    text: `“${titleOf(conversation)}” and all of its messages are deleted. This cannot be undone.`,
    confirm: "Delete",
    danger: true,
    run: async () => {
      try {
        await api.remove(api.conversation(conversation.id));
      } catch (error) {
        // Gone is what was wanted.
        if (error.status !== 404) throw error;
      }
      kept.set(`draft:${conversation.id}`, null);
      announce("Deleted");
      if (app.current?.id === conversation.id) app.go("#/");
      await list.load();
    },
  });
}

async function save(conversation, form) {
  try {
    await api.download(api.conversation(conversation.id, `/export?form=${form}`), `conversation.${form === "markdown" ? "md" : "json"}`);
    announce("Exported");
  } catch (error) {
    tell("The export did not work", error);
  }
}

/** A dialog with a question, and perhaps a field; `run` gets the field's value and may fail. */
function ask({ title, text, note, field, confirm, danger, alone, run }) {
  const dialog = $("question");
  const error = h("p", { class: "error", role: "alert" });
  const yes = h("button", { type: "submit", class: danger ? "primary danger" : "primary" }, confirm);
  const form = h(
    "form",
    {
      onsubmit: async (event) => {
        event.preventDefault();
        yes.disabled = true;
        try {
          await run(field?.value);
          dialog.close();
        } catch (problem) {
          error.replaceChildren(problem.message, requestNote(problem) ?? "");
        }
        yes.disabled = false;
      },
    },
    h("h2", { id: "question-title" }, title),
    text ? h("p", { dir: "auto" }, text, note) : null,
    field ?? null,
    error,
    h("div", { class: "dialog-row" }, alone ? null : h("button", { type: "button", class: "plain", onclick: () => dialog.close() }, "Cancel"), yes),
  );
  dialog.replaceChildren(form);
  dialog.showModal();
  (field ?? (danger ? form.querySelector(".plain") : yes)).focus();
  field?.select?.();
}

const dialogOpen = () => Boolean(document.querySelector("dialog[open]"));

// The key

function askForKey(reason = "") {
  const dialog = $("key");
  if (dialog.open) return;
  $("key-error").textContent = reason;
  $("key-field").value = "";
  dialog.showModal();
  $("key-field").focus();
}

async function useKey(event) {
  event.preventDefault();
  const value = $("key-field").value.trim();
  if (!value) return;
  $("key-use").disabled = true;
  try {
    await api.get("/session", { using: value });
    api.theKey.set(value, $("key-remember").checked);
    $("key").close();
    await start();
  } catch (error) {
    $("key-error").textContent = error.status === 401 ? "The service does not know this key." : error.message;
    $("key-field").select();
  } finally {
    $("key-use").disabled = false;
  }
}

function forgetKey() {
  for (const thread of app.running) thread.stop();
  api.theKey.forget();
  try {
    for (const name of Object.keys(localStorage)) if (name.startsWith("draft:")) localStorage.removeItem(name);
  } catch {
    // Nothing was kept, then.
  }
  // Nothing of what the key showed stays in this window's memory.
  location.hash = "";
  location.reload();
}

// Model, theme, drawer

function modelChooser() {
  if (!app.models.length) return "";
  const select = h(
    "select",
    {
      class: "model-chooser",
      "aria-label": "Model",
      onchange: (event) => {
        app.model = event.target.value;
        kept.set("model", app.model);
      },
    },
    app.models.map(({ id }) => h("option", { value: id }, id)),
  );
  select.value = app.model;
  return select;
}

const THEMES = ["auto", "light", "dark"];

function theme(step = 0) {
  const now = THEMES.indexOf(kept.get("theme") ?? "auto");
  const chosen = THEMES[(Math.max(0, now) + step) % THEMES.length];
  if (step) kept.set("theme", chosen === "auto" ? null : chosen);
  if (chosen === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = chosen;
  const label = `Theme: ${chosen === "auto" ? "as the system" : chosen}`;
  $("theme").replaceChildren(icon({ auto: "auto", light: "sun", dark: "moon" }[chosen]));
  $("theme").setAttribute("aria-label", label);
  $("theme").title = label;
  if (step) announce(label);
}

function openDrawer() {
  document.body.classList.add("drawer");
  settleDrawer();
  $("sidebar").querySelector("button, a").focus();
}

function closeDrawer() {
  const was = document.body.classList.contains("drawer");
  document.body.classList.remove("drawer");
  settleDrawer();
  if (was && narrow.matches) $("drawer").focus();
}

/** A drawer that is closed cannot be reached by Tab, and an open one is all that can be. */
function settleDrawer() {
  const open = document.body.classList.contains("drawer");
  $("sidebar").inert = narrow.matches && !open;
  $("main").inert = narrow.matches && open;
  $("drawer").setAttribute("aria-expanded", String(open));
}

// Keys

function keys(event) {
  const command = event.ctrlKey || event.metaKey;
  if (dialogOpen()) return;
  if (command && !event.shiftKey && !event.altKey && event.key.toLowerCase() === "k") {
    event.preventDefault();
    if (narrow.matches) openDrawer();
    $("search").focus();
    $("search").select();
  } else if (event.altKey && !command && event.code === "KeyN") {
    event.preventDefault();
    app.go("#/");
    app.current?.box.focus();
  } else if (event.altKey && !command && event.code === "KeyU") {
    event.preventDefault();
    app.go("#/usage");
  } else if (command && event.key === "/") {
    event.preventDefault();
    $("keyboard").showModal();
  } else if (event.key === "Escape") {
    if ($("menu").matches(":popover-open")) return;
    if (document.body.classList.contains("drawer")) closeDrawer();
    else if (app.current?.live || app.current?.elsewhere) app.current.stop();
    else app.current?.box.focus();
  }
}

/** Arrows in the list of conversations, and from the search into it. */
function listKeys(event) {
  const links = [...$("list").querySelectorAll("a")];
  const row = event.target.closest("li");
  const at = links.indexOf(row?.querySelector("a"));
  const to = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: links.length - 1 }[event.key];
  if (to !== undefined) {
    event.preventDefault();
    if (to < 0) $("search").focus();
    else links[Math.min(to, links.length - 1)]?.focus();
    return;
  }
  const item = row && list.items.get(row.dataset.id);
  if (item && event.key === "F2") rename(item);
  else if (item && event.key === "Delete") remove(item);
}

let searching = 0;

function search() {
  clearTimeout(searching);
  searching = setTimeout(() => {
    list.query = $("search").value.trim();
    list.load({ fresh: true });
  }, 200);
}

// The beginning

async function start() {
  const before = app.session?.owner;
  try {
    app.session = await api.get("/session");
  } catch (error) {
    if (error.status !== 401) {
      $("list-note").replaceChildren(error.message, requestNote(error) ?? "");
      const wait = error.retryAfter ?? (error instanceof api.Unreachable ? 3 : null);
      if (wait !== null) setTimeout(start, wait * 1000);
    }
    return;
  }
  $("owner").textContent = app.session.owner ?? "";
  $("owner").title = `Version ${app.session.version}`;
  $("forget").hidden = !api.theKey.known;
  await Promise.all([list.load(), models()]);
  // What is shown stays, with what is written there, unless it is somebody else's now.
  const { current } = app;
  if (current && before === app.session.owner && (current.conversation || current.id === null)) {
    current.notice("");
    current.modelSlot.replaceChildren(modelChooser());
    current.box.focus();
  } else await app.route();
}

async function models() {
  try {
    const { data, default: first } = await api.get("/models");
    app.models = data;
    const last = kept.get("model");
    app.model = data.some(({ id }) => id === last) ? last : (first ?? undefined);
    if (app.model && !data.some(({ id }) => id === app.model)) app.models = [{ id: app.model }, ...data];
  } catch {
    app.models = []; // the service then takes its own
  }
}

function wire() {
  theme();
  settleDrawer();
  narrow.addEventListener("change", settleDrawer);
  $("theme").addEventListener("click", () => theme(1));
  $("drawer").addEventListener("click", openDrawer);
  $("scrim").addEventListener("click", closeDrawer);
  $("skip").addEventListener("click", () => (app.current ? app.current.box : $("main")).focus());
  $("search").addEventListener("input", search);
  $("search").addEventListener("keydown", (event) => {
    if (event.key === "ArrowDown") {
      event.preventDefault();
      $("list").querySelector("a")?.focus();
    } else if (event.key === "Escape" && $("search").value) {
      event.stopPropagation();
      $("search").value = "";
      search();
    }
  });
  $("list").addEventListener("keydown", listKeys);
  $("more").addEventListener("click", () => list.more());
  $("new").addEventListener("click", (event) => {
    event.preventDefault();
    app.go("#/");
  });
  $("actions").addEventListener("click", (event) => openMenu(event.currentTarget, app.current.conversation));
  $("menu").addEventListener("keydown", menuKeys);
  $("menu").addEventListener("toggle", (event) => {
    if (event.newState === "closed" && !dialogOpen() && document.activeElement === document.body) $("menu").opener?.focus();
  });
  $("forget").addEventListener("click", forgetKey);
  $("key-form").addEventListener("submit", useKey);
  // Without a key there is nothing behind the dialog.
  $("key").addEventListener("cancel", (event) => event.preventDefault());
  $("shortcuts").addEventListener("click", () => $("keyboard").showModal());
  $("keyboard-close").addEventListener("click", () => $("keyboard").close());
  addEventListener("keyneeded", () => askForKey(api.theKey.known ? "The service does not know the key that this page has: perhaps it was revoked." : ""));
  addEventListener("keydown", keys);
  addEventListener("hashchange", () => app.route());
  addEventListener("offline", () => app.current?.notice("You are offline. What you write is kept here.", { kind: "warn" }));
  addEventListener("online", () => {
    app.current?.notice("You are online again.");
    list.load();
  });
  document.addEventListener("visibilitychange", () => {
    if (document.hidden || !app.session) return;
    list.load();
    app.current?.look();
  });
  setInterval(() => {
    const waiting = [...list.items.values()].some((item) => item.answering && ![...app.running].some((thread) => thread.id === item.id));
    if (waiting && !document.hidden) list.load();
  }, 5000);
}

api.theKey.load();
wire();
start();
