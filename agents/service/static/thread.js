// One conversation: its messages, the answer that is coming, and the box to write in.

import * as api from "./api.js";
import { announce, copyButton, fullMoment, h, icon, iconButton, kept, number, requestNote, seconds, spent, when } from "./dom.js";
import { Markdown, codeBlock } from "./markdown.js";

const POLL = 1500;
// The second click of a double click on Send falls on Stop, and does not mean it.
const DOUBLE_CLICK = 500;
const TITLE = 60;
const draftName = (id) => `draft:${id ?? "new"}`;

/** The words of a message; parts that are no text are named. */
export function plain(content) {
  if (content === null || content === undefined) return "";
  if (typeof content === "string") return content;
  return content.map((part) => part.text ?? `[${(part.type ?? "part").replace("_url", "")}]`).join("\n");
}

/** Whether there is anything to send: white space and marks that nobody sees are nothing. */
const hasWords = (text) => /[^\s\p{Cc}\p{Cf}\u2800\u3164]/u.test(text);

/** What the service calls a conversation that begins with these words. */
const titleFrom = (text) => [...text.trim().replace(/\s+/g, " ")].slice(0, TITLE).join("");

/** Tokens and dollars of answers together; null as soon as one is unknown. */
export function sumOf(messages) {
  // Without usage and at no cost: nothing was paid for it here.
  const paid = messages.filter(({ role, usage, cost }) => role === "assistant" && !(!usage && Number(cost) === 0 && cost !== null));
  const total = (name) => paid.reduce((sum, { usage }) => sum + (usage[name] ?? 0), 0);
  const names = ["prompt_tokens", "completion_tokens", "total_tokens"];
  const told = paid.length > 0 && paid.every(({ usage }) => usage && usage.total_tokens !== null);
  return {
    paid: paid.length > 0,
    usage: told ? Object.fromEntries(names.map((name) => [name, total(name)])) : null,
    cost: paid.length && paid.every(({ cost }) => cost !== null) ? paid.reduce((sum, { cost }) => sum + Number(cost), 0) : null,
  };
}

/** JSON as people read it; anything else as it is. */
function pretty(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text;
  }
}

const isJson = (text) => /^\s*[[{]/.test(text) && pretty(text) !== text;

/** Whether the service will not take a message as it is, whoever asks and when. */
const isRefusal = ({ status }) => [400, 403, 404, 413, 415, 422].includes(status);

/** An answer: what the model said, thought and called between two messages of a person. */
class Answer {
  constructor(thread) {
    this.thread = thread;
    this.parts = h("div", { class: "parts" });
    this.badges = h("span", { class: "badges" });
    this.facts = h("span", { class: "facts" });
    this.buttons = h("span", { class: "buttons" });
    this.foot = h("footer", {}, this.badges, this.facts, this.buttons);
    this.root = h("article", { class: "answer", "aria-label": "Answer" }, this.parts, this.foot);
    this.messages = [];
    this.calls = new Map();
    this.reset();
  }

  reset() {
    this.text = null;
    this.thought = null;
  }

  waiting(words = "Thinking") {
    this.stopWaiting();
    this.wait = h("p", { class: "waiting" }, h("span", { class: "dots", "aria-hidden": "true" }, h("i"), h("i"), h("i")), h("span", {}, words));
    this.parts.append(this.wait);
  }

  stopWaiting() {
    this.wait?.remove();
    this.wait = null;
  }

  say(text) {
    this.stopWaiting();
    if (!this.text) {
      const root = h("div", { class: "markdown", dir: "auto" });
      this.parts.append(root);
      this.text = new Markdown(root);
      this.text.drawn = () => this.thread.follow();
    }
    this.text.append(text);
    if (this.thought) this.thought.summary.textContent = "Thoughts";
  }

  think(text) {
    this.stopWaiting();
    if (!this.thought) {
      const root = h("div", { class: "markdown", dir: "auto" });
      const summary = h("span", {}, "Thinking…");
      this.parts.append(h("details", { class: "fold thoughts" }, h("summary", {}, icon("thought"), summary), root));
      this.thought = { markdown: new Markdown(root), summary };
    }
    this.thought.markdown.append(text);
  }

  call({ id, name, arguments: given }) {
    this.stopWaiting();
    const known = this.calls.get(id);
    if (known) return known;
    const state = h("span", { class: "state" }, "running…");
    const body = h("div", { class: "fold-body" }, h("h4", {}, "Arguments"), codeBlock(pretty(given || "{}"), "json"));
    const hint = (given ?? "").replace(/\s+/g, " ");
    const root = h(
      "details",
      { class: "fold call" },
      h("summary", {}, icon("tool"), h("b", {}, name), h("code", { class: "hint" }, hint.length > 90 ? `${hint.slice(0, 90)}…` : hint), state),
      body,
    );
    this.parts.append(root);
    const call = { root, state, body, answered: false };
    this.calls.set(id, call);
    return call;
  }

  result({ id, name, content, outcome, seconds: taken }) {
    const call = this.calls.get(id) ?? this.call({ id, name: name ?? "tool", arguments: "" });
    if (call.answered) return;
    call.answered = true;
    const good = outcome === undefined || outcome === "ok";
    call.root.classList.toggle("bad", !good);
    call.state.textContent = [good ? "done" : outcome, taken == null || taken < 0.05 ? null : seconds(taken)].filter(Boolean).join(" · ");
    const text = plain(content);
    call.body.append(h("h4", {}, "Result"), codeBlock(pretty(text), isJson(text) ? "json" : "text"));
    this.reset();
  }

  /** The messages as they are stored: what was shown becomes what is kept. */
  keep(messages) {
    for (const message of messages) {
      if (message.role === "tool") {
        this.result({ id: message.tool_call_id, name: message.name, content: message.content });
      } else {
        const text = plain(message.content);
        if (message.reasoning && !this.thought) this.think(message.reasoning);
        if (this.thought) {
          this.thought.markdown.draw();
          this.thought.summary.textContent = "Thoughts";
        }
        if (text && !this.text) this.say("");
        this.text?.set(text);
        for (const call of message.tool_calls ?? []) this.call(call);
        if (!message.tool_calls?.length) this.reset();
      }
    }
    this.messages.push(...messages);
    if (messages.some((message) => message.role === "tool")) this.reset();
    this.tell();
  }

  /** No more will come: everything is drawn, and what never came is said. */
  end() {
    this.stopWaiting();
    this.text?.draw();
    this.thought?.markdown.draw();
    if (this.thought) this.thought.summary.textContent = "Thoughts";
    for (const call of this.calls.values()) if (!call.answered) call.state.textContent = "no result";
  }

  badge(text, kind = "") {
    if ([...this.badges.children].some((other) => other.textContent === text)) return;
    this.badges.append(h("span", { class: `badge ${kind}` }, text));
  }

  get words() {
    return this.messages
      .filter((message) => message.role === "assistant")
      .map((message) => plain(message.content))
      .filter(Boolean)
      .join("\n\n");
  }

  tell() {
    const answers = this.messages.filter((message) => message.role === "assistant");
    if (answers.some((message) => message.status === "partial")) this.badge("Partial answer", "warn");
    const last = answers.at(-1);
    if (!last) return;
    const { usage, cost } = sumOf(answers);
    const details = usage
      ? `${number(usage.prompt_tokens)} prompt tokens, ${number(usage.completion_tokens)} completion tokens, in ${number(answers.length)} ${answers.length === 1 ? "call" : "calls"}`
      : "The tokens are not known";
    this.facts.replaceChildren(
      ...[
        last.model ? h("span", { class: "model" }, last.model) : null,
        spent(usage, cost) ? h("span", { title: details }, spent(usage, cost)) : null,
        last.created ? h("time", { datetime: last.created, title: fullMoment(last.created) }, when(last.created)) : null,
      ].filter(Boolean),
    );
    this.buttons.replaceChildren(copyButton("Copy answer", () => this.words));
  }

  offer(...buttons) {
    this.buttons.append(...buttons);
  }
}

export class Thread {
  /** A conversation by its id, or, with null, one that begins with its first message. */
  constructor(app, id) {
    this.app = app;
    this.id = id;
    this.conversation = null;
    this.live = null; // the answer that is coming over this connection
    this.loading = null; // what is awaited before something is asked: what is shown is to be made anew
    this.latest = 0; // number of the last message that is known to be stored
    this.unused = false; // made for a first message that has not got into it
    this.guess = null; // a title that stands until the service's own is known
    this.asked = -Infinity; // when something was last asked
    this.stuck = true; // to the end, which is followed as it grows
    this.build();
  }

  build() {
    this.list = h("div", { class: "messages" });
    this.scroller = h("div", { class: "scroller", tabindex: "-1" }, this.list);
    this.down = iconButton("down", "Go to the newest message", () => this.toEnd(true), { class: "icon-button down", hidden: true });
    this.scroller.addEventListener("scroll", () => this.watch(), { passive: true });
    this.status = h("div", { class: "notice", role: "status", hidden: true });
    this.box = h("textarea", {
      id: "box",
      rows: "1",
      dir: "auto",
      "aria-label": "Message",
      placeholder: "Write a message",
      enterkeyhint: matchMedia("(pointer: coarse)").matches ? "enter" : "send",
      oninput: () => {
        this.fit();
        this.keepDraft();
        this.refresh();
      },
      onkeydown: (event) => this.key(event),
    });
    this.button = h("button", { type: "button", class: "send", onclick: () => this.press() });
    this.modelSlot = h("span", { class: "model-slot" });
    this.root = h(
      "section",
      { class: "thread" },
      h("div", { class: "scroll-frame" }, this.scroller, this.down),
      h(
        "div",
        { class: "composer" },
        this.status,
        h("div", { class: "box" }, this.box, h("div", { class: "box-row" }, this.modelSlot, this.button)),
      ),
    );
    this.restoreDraft();
    this.refresh();
  }

  // What the reader sees

  show(conversation) {
    // Where somebody reads who scrolled up.
    const place = this.stuck ? null : this.scroller.scrollTop;
    this.conversation = conversation;
    if (conversation.messages.length) this.unused = false;
    else if (this.guess) conversation.title ??= this.guess;
    this.latest = conversation.messages.at(-1)?.number ?? 0;
    const nodes = [];
    let answer = null;
    for (const message of conversation.messages) {
      if (message.role === "user") {
        answer = null;
        nodes.push(this.person(message));
      } else if (message.role === "assistant" || message.role === "tool") {
        if (!answer) {
          answer = new Answer(this);
          nodes.push(answer.root);
        }
        answer.keep([message]);
      }
    }
    this.last = answer;
    this.list.replaceChildren(...(nodes.length ? nodes : [this.welcome()]));
    for (const node of this.list.querySelectorAll(".call .state")) if (node.textContent === "running…") node.textContent = "no result";
    this.offerAgain();
    this.dropDraftIfSent();
    this.elsewhere = conversation.answering && !this.live;
    if (this.elsewhere) this.waitForOther();
    this.refresh();
    this.app.describe(this);
    if (place === null) this.toEnd();
    else this.scroller.scrollTop = place;
  }

  welcome() {
    const asks = ["What is 12 x 12?", "Explain in three sentences how a hash table works.", "Write a haiku about the sea."];
    return h(
      "div",
      { class: "welcome" },
      h("h2", {}, "What shall we talk about?"),
      h("p", {}, this.app.session?.tools?.length ? `The model can use: ${this.app.session.tools.join(", ")}.` : "Ask anything."),
      h("div", { class: "asks" }, asks.map((ask) => h("button", { type: "button", onclick: () => this.put(ask) }, ask))),
    );
  }

  put(text) {
    this.box.value = text;
    this.fit();
    this.keepDraft();
    this.refresh();
    this.box.focus();
  }

  person(message) {
    const words = plain(message.content);
    const text = h("div", { class: "bubble", dir: "auto" }, words);
    const facts = h("span", { class: "facts" });
    const buttons = h("span", { class: "buttons" });
    const root = h("article", { class: "person", "aria-label": "Your message" }, text, h("footer", {}, facts, buttons));
    if (message.number) {
      root.dataset.number = message.number;
      facts.append(h("time", { datetime: message.created, title: fullMoment(message.created) }, when(message.created)));
      buttons.append(
        copyButton("Copy message", () => words),
        iconButton("edit", "Edit message", () => this.edit(root, text, message.number, words)),
      );
    } else root.classList.add("unsent");
    return root;
  }

  /** Regenerate is offered for the last answer, and for a message that got none. */
  offerAgain() {
    for (const old of this.list.querySelectorAll(".again")) old.remove();
    if (this.live || this.conversation?.answering || !this.conversation?.messages.length) return;
    const again = (label) => iconButton("again", label, () => this.regenerate(), { class: "icon-button again" });
    if (this.last?.messages.length) this.last.offer(again("Regenerate answer"));
    else this.list.querySelector("article:last-child .buttons")?.append(again("Answer again"));
  }

  refresh() {
    const busy = Boolean(this.live || this.elsewhere);
    this.button.replaceChildren(icon(busy ? "stop" : "send"));
    const label = busy ? "Stop answering" : "Send message";
    this.button.setAttribute("aria-label", label);
    this.button.title = busy ? "Stop (Escape)" : "Send (Enter)";
    this.button.disabled = busy ? Boolean(this.stopping) : this.held || !hasWords(this.box.value);
    // Not `disabled`: it would lose the focus.
    this.button.setAttribute("aria-disabled", String(busy && this.justAsked));
    this.button.classList.toggle("busy", busy);
  }

  get justAsked() {
    return performance.now() - this.asked < DOUBLE_CLICK;
  }

  press() {
    if (!this.live && !this.elsewhere) this.send();
    else if (!this.justAsked) this.stop();
  }

  fit() {
    this.box.style.height = "auto";
    this.box.style.height = `${Math.min(this.box.scrollHeight, innerHeight * 0.4)}px`;
  }

  watch() {
    const { scrollTop, scrollHeight, clientHeight } = this.scroller;
    this.stuck = scrollHeight - scrollTop - clientHeight < 48;
    this.down.hidden = this.stuck;
  }

  follow() {
    if (this.stuck) this.scroller.scrollTop = this.scroller.scrollHeight;
    else this.down.hidden = false;
  }

  toEnd(focus = false) {
    this.stuck = true;
    this.down.hidden = true;
    requestAnimationFrame(() => this.follow());
    if (focus) this.box.focus();
  }

  notice(text, { kind = "", action, onaction, error } = {}) {
    clearInterval(this.countdown);
    this.held = false;
    this.status.className = `notice ${kind}`;
    this.status.setAttribute("role", "status");
    this.status.hidden = !text;
    this.status.replaceChildren();
    if (text) {
      this.status.append(
        ...[
          icon(kind === "error" || kind === "warn" ? "warning" : "info"),
          h("span", { dir: "auto" }, h("span", {}, text), error ? requestNote(error) : null),
          action ? h("button", { type: "button", class: "text-button", onclick: onaction }, action) : null,
          iconButton("close", "Dismiss", () => this.notice("")),
        ].filter(Boolean),
      );
    }
    this.refresh();
  }

  // The draft

  keepDraft() {
    const text = this.box.value;
    if (this.draft && this.draft.text !== text) this.draft = null;
    kept.set(draftName(this.id), text ? { text, ...this.draft } : null);
  }

  restoreDraft() {
    const draft = kept.get(draftName(this.id));
    if (!draft?.text) return;
    this.box.value = draft.text;
    // With the name under which it was once sent, so that a message that did arrive is not doubled.
    if (draft.key) this.draft = draft;
    requestAnimationFrame(() => this.fit());
  }

  /** A draft that turns out to have been stored: the page was left before it heard so. */
  dropDraftIfSent() {
    if (!this.draft || this.live) return;
    const { text, after } = this.draft;
    if (!this.conversation.messages.some((message) => message.role === "user" && message.number > after && plain(message.content) === text)) return;
    if (this.box.value === text) this.box.value = "";
    this.draft = null;
    kept.set(draftName(this.id), null);
    this.fit();
    this.refresh();
  }

  /** What was not sent is in the box again, before what was written there meanwhile. */
  giveBack(draft) {
    const written = this.box.value;
    this.box.value = written && written !== draft.text ? `${draft.text}\n${written}` : draft.text;
    this.draft = draft.key && this.box.value === draft.text ? draft : null;
    this.keepDraft();
    this.fit();
    this.refresh();
  }

  // Asking

  key(event) {
    if (event.key !== "Enter" || event.isComposing || event.shiftKey || event.altKey) return;
    // A phone's Enter is a new line: its keyboard has no Shift+Enter.
    if (matchMedia("(pointer: coarse)").matches && !event.ctrlKey && !event.metaKey) return;
    event.preventDefault();
    this.send();
  }

  async send({ notice = [""] } = {}) {
    if (!(await this.ready())) return;
    const text = this.box.value;
    if (!hasWords(text) || this.held) return;
    if (this.live || this.elsewhere) {
      this.notice("The answer before is still being written. Stop it, or wait for its end.");
      return;
    }
    const draft = this.draft?.text === text ? this.draft : { text, key: api.idempotencyKey(), after: this.latest };
    this.draft = draft;
    kept.set(draftName(this.id), draft);
    this.box.value = "";
    this.fit();
    this.notice(...notice);
    if (!this.conversation) this.list.replaceChildren();
    else if (!this.conversation.messages.length) this.list.querySelector(".welcome")?.remove();
    const bubble = this.person({ content: text });
    this.list.append(bubble);
    this.begin();
    if (this.id === null && !(await this.create(draft))) {
      bubble.remove();
      this.list.append(this.welcome());
      return;
    }
    await this.run({
      path: "/messages",
      body: { content: text, model: this.app.model },
      repeatable: draft.key,
      draft,
      bubble,
    });
  }

  /** Whether the conversation is there to go on with; not for a second one who asks meanwhile. */
  async ready() {
    if (!this.loading && (this.conversation || this.id === null)) return true;
    if (this.waiting) return false;
    this.waiting = true;
    await (this.loading ?? this.load());
    this.waiting = false;
    return this.conversation !== null || this.id === null;
  }

  async create(draft) {
    const { live } = this;
    draft.creation ??= api.idempotencyKey();
    kept.set(draftName(null), draft);
    try {
      const made = await api.post("/conversations", {}, { repeatable: draft.creation, signal: live.controller.signal });
      kept.set(draftName(null), null);
      this.id = made.id;
      this.unused = true;
      this.guess = titleFrom(draft.text);
      this.conversation = { ...made, title: made.title ?? this.guess, messages: made.messages ?? [] };
      kept.set(draftName(this.id), draft);
      this.app.created(this);
    } catch (error) {
      this.finish();
      this.giveBack(draft);
      if (live.stopped) this.notSent();
      else this.explain(error, () => this.send());
      return false;
    }
    if (!live.stopped) return true;
    this.finish();
    await this.unsend(draft);
    this.notSent();
    return false;
  }

  /** Give a message back that is not stored; a conversation that was made for it goes again. */
  async unsend(draft) {
    // One that somebody has left keeps its draft, and so its place in the list.
    const gone = this.unused && this.app.current === this && (await this.meanwhile(this.unmake()));
    this.giveBack(gone ? { text: draft.text } : draft);
  }

  async unmake() {
    const { id } = this;
    try {
      await api.remove(api.conversation(id));
    } catch (error) {
      if (error.status !== 404) return false;
    }
    kept.set(draftName(id), null);
    this.id = null;
    this.conversation = null;
    this.guess = null;
    this.unused = false;
    this.latest = 0;
    this.draft = null;
    this.app.unmade(this);
    return true;
  }

  notSent() {
    this.notice("Not sent.");
    announce("Not sent. Your message is in the box again.");
  }

  async regenerate() {
    if (!(await this.ready())) return;
    if (this.live || this.elsewhere || this.held) return;
    this.notice("");
    const old = this.last;
    this.replaced = this.last?.root ?? null;
    if (this.replaced) this.replaced.hidden = true;
    this.last = null;
    this.begin();
    await this.run({ path: "/regenerate", body: { model: this.app.model }, repeatable: api.idempotencyKey(), old });
  }

  begin() {
    const answer = new Answer(this);
    answer.root.setAttribute("aria-busy", "true");
    answer.waiting();
    this.list.append(answer.root);
    this.live = { answer, controller: new AbortController(), stopped: false };
    this.asked = performance.now();
    setTimeout(() => this.refresh(), DOUBLE_CLICK);
    for (const old of this.list.querySelectorAll(".again")) old.remove();
    this.refresh();
    this.app.mark(this);
    this.toEnd();
  }

  async run(asked) {
    const { live } = this;
    const { answer, controller } = live;
    let heard = false; // whether the service began to answer
    let problem = null;
    let done = null;
    let failure = null;
    try {
      const events = api.answer(api.conversation(this.id, asked.path), asked.body, {
        repeatable: asked.repeatable,
        signal: controller.signal,
      });
      for await (const [type, value] of events) {
        heard = true;
        if (type === "message") this.stored(asked, value);
        else if (type === "text") answer.say(value.text);
        else if (type === "reasoning") answer.think(value.text);
        else if (type === "tool_call") answer.call(value);
        else if (type === "tool_result") {
          answer.result(value);
          answer.waiting();
        } else if (type === "turn") this.turn(answer, value);
        else if (type === "error") problem = new api.Problem(value.status ?? 500, value);
        else if (type === "done") done = value;
        this.follow();
      }
    } catch (error) {
      failure = error;
    }
    answer.end();
    this.finish();
    await this.outcome({ asked, answer, heard, problem, done, failure, stopped: live.stopped });
    this.app.answered(this);
  }

  /** The message is in the database: the draft has done its work. */
  stored(asked, message) {
    kept.set(draftName(this.id), null);
    if (this.draft === asked.draft) this.draft = null;
    if (this.box.value) this.keepDraft();
    asked.stored = true;
    this.unused = false;
    // It is shown already, or something was said in another window that is not.
    asked.again = message.number !== this.latest + 1;
    this.latest = Math.max(this.latest, message.number);
    this.conversation.messages.push(message);
    const bubble = this.person(message);
    asked.bubble?.replaceWith(bubble);
    asked.bubble = bubble;
  }

  turn(answer, { messages }) {
    answer.keep(messages);
    this.latest = messages.at(-1)?.number ?? this.latest;
    const { conversation } = this;
    conversation.messages.push(...messages);
    const { cost, paid } = sumOf(messages);
    if (paid) conversation.cost = cost === null || conversation.cost === null ? null : Number(conversation.cost) + cost;
    this.app.describe(this);
    if (messages.at(-1)?.role === "tool") answer.waiting();
  }

  finish() {
    this.live?.answer.root.removeAttribute("aria-busy");
    this.live?.answer.stopWaiting();
    if (this.live && !this.live.answer.parts.childNodes.length) this.live.answer.root.remove();
    this.live = null;
    this.stopping = false;
    this.refresh();
    this.app.mark(this);
  }

  /** How it ended, and what the reader is told. */
  async outcome({ asked, answer, heard, problem, done, failure, stopped }) {
    const again = { action: "Try again", onaction: () => this.regenerate() };
    if (done) {
      this.replaced?.remove();
      this.replaced = null;
      const came = answer.messages.length > 0;
      this.last = came ? answer : null;
      this.conversation.revision = Math.max(this.conversation.revision, done.revision ?? 0);
      if (done.status === "error") {
        await this.reload();
        this.explain(problem ?? new Error("The model gave no answer."), () => this.regenerate());
      } else if (done.status === "partial") {
        answer.badge("Partial answer", "warn");
        if (asked.again || stopped) await this.reload();
        else this.offerAgain();
        const rest = came ? "What had come is kept." : "Nothing had come.";
        if (stopped) this.notice(`Stopped. ${rest}`);
        else this.notice(problem ? problem.message : `The answer was cut. ${rest}`, { kind: "warn", error: problem, ...again });
        announce("The answer was stopped.");
      } else {
        if (asked.again || asked.old) await this.reload();
        else this.offerAgain();
        announce(`Answer: ${answer.words.slice(0, 600)}`);
      }
      return;
    }
    if (stopped) {
      this.notice("Stopped. Asking the service what it kept…");
      const known = await this.reload({ settle: true, quiet: true });
      if (known && !this.isStored(asked)) {
        await this.unsend(asked.draft);
        return this.notSent();
      }
      if (known && this.elsewhere) this.notice("The service is still stopping the answer.");
      else if (known) this.notice(`Stopped. ${this.last ? "What had come is kept." : "Nothing had come."}`);
      else if (asked.stored || !asked.draft) this.notice("Stopped. The service cannot be reached, so the page shows what had come.", this.reloading("warn"));
      else {
        asked.bubble.remove();
        this.giveBack(asked.draft);
        this.notice("Stopped. The service cannot be reached: perhaps your message had arrived. Sent again, it is not doubled.", this.reloading("warn"));
      }
      announce("The answer was stopped.");
      return;
    }
    if (heard || failure instanceof api.Cut) {
      answer.badge("Cut", "error");
      announce("The connection was lost and the answer was cut.");
      const text = "The connection was lost and the answer was cut.";
      this.notice(`${text} Asking the service what it kept…`, { kind: "warn" });
      if (!(await this.reload({ settle: true }))) this.notice(`${text} The service cannot be reached: what had come is shown.`, this.reloading("error"));
      else {
        this.notice(`${text} Below is what the service kept.`, { kind: "warn", ...again });
        this.returnUnlessStored(asked);
      }
      return;
    }
    // No answer at all: the message may have arrived all the same, so the service is asked.
    if (failure instanceof api.Unreachable && (await this.reload({ settle: true, quiet: true }))) {
      if (!asked.draft) return this.explain(failure, () => this.regenerate());
      if (!this.returnUnlessStored(asked)) return this.notice("The connection was lost, but your message had arrived.", { kind: "warn", ...again });
    } else {
      this.restoreReplaced(asked, answer);
      asked.bubble?.remove();
      if (asked.draft && isRefusal(failure)) await this.unsend(asked.draft);
      else if (asked.draft) this.giveBack(asked.draft);
      if (!this.list.childNodes.length) this.list.append(this.welcome());
      if (failure.status === 409) return this.busyElsewhere(failure);
      this.offerAgain();
    }
    this.explain(failure, () => (asked.draft ? this.send() : this.regenerate()));
  }

  restoreReplaced(asked, answer) {
    answer.root.remove();
    if (this.replaced) this.replaced.hidden = false;
    this.replaced = null;
    if (asked.old) this.last = asked.old;
  }

  /** Whether the conversation, just loaded, has what was said; its draft has done its work then. */
  isStored({ draft, stored }) {
    if (!draft) return true;
    const arrived = this.conversation.messages.some(
      (message) => message.role === "user" && message.number > draft.after && plain(message.content) === draft.text,
    );
    if (!stored && !arrived) return false;
    kept.set(draftName(this.id), null);
    this.draft = null;
    return true;
  }

  /** Put the text back into the box if the conversation, just loaded, does not have it. */
  returnUnlessStored(asked) {
    if (this.isStored(asked)) return false;
    this.giveBack(asked.draft);
    return true;
  }

  reloading(kind) {
    return {
      kind,
      action: "Load again",
      onaction: async () => {
        if (await this.reload({ settle: true })) this.notice("This is what the service kept.");
      },
    };
  }

  /** Say what went wrong, and offer what can be done about it. */
  explain(error, retry) {
    const { status } = error;
    const bad = { kind: "error", error };
    if (error instanceof api.Unreachable) {
      const text = navigator.onLine ? error.message : "You are offline.";
      this.notice(`${text} Your message is kept here; nothing is sent twice.`, { kind: "error", action: "Try again", onaction: retry });
    } else if (status === 401) this.notice("The service asks for a key. Your message is kept here.", { kind: "warn" });
    else if (status === 402) this.notice(`The budget does not allow this. ${error.message}`, bad);
    else if (status === 403 || status === 413) this.notice(error.message, bad);
    else if (status === 404) this.notice("This conversation does not exist any more.", bad);
    else if (status === 429 && error.retryAfter) this.hold(error, retry);
    else this.notice(error.message, { ...bad, action: "Try again", onaction: retry });
    announce(this.status.querySelector("span").firstChild.textContent);
  }

  /** Too many requests: count down, then let them go on. */
  hold(error, retry) {
    let left = Math.ceil(error.retryAfter);
    // The service's own "wait 7 s" would stand beside the count.
    const text = error.message.replace(/[:,;]? wait [\d.]+ s\.$/, ".");
    const tell = () => {
      if (left > 0) {
        this.status.querySelector("span").textContent = `${text} Wait ${seconds(left)}.`;
        left -= 1;
        return;
      }
      this.notice("You can go on now.", { action: "Try again", onaction: retry });
    };
    this.notice(" ", { kind: "warn" });
    // Read out once, not each second.
    this.status.setAttribute("role", left > 0 ? "none" : "status");
    this.held = left > 0;
    tell();
    if (this.held) this.countdown = setInterval(tell, 1000);
    this.refresh();
  }

  async stop() {
    if (this.stopping) return;
    this.stopping = true;
    this.refresh();
    const { live } = this;
    if (live) live.stopped = true;
    // The stream then ends by itself, with what is stored; a connection that hangs is cut. What is not
    // sent yet, because its conversation is being made, is not sent.
    const cut = setTimeout(() => live?.controller.abort(), 1500);
    try {
      if (this.id !== null) await api.post(api.conversation(this.id, "/cancel"));
    } catch {
      live?.controller.abort();
    }
    if (!live) {
      clearTimeout(cut);
      this.stopping = false;
    }
  }

  busyElsewhere(problem) {
    this.notice(`${problem.message} Your message waits here.`, { kind: "warn" });
    this.elsewhere = true;
    this.refresh();
    this.waitForOther(true);
  }

  /** An answer that another tab asked for: look until it is over, then show it. */
  async waitForOther(told = false) {
    if (this.polling) return;
    this.polling = true;
    if (!told) this.notice("An answer is being written in another window. It is shown here when it is done.");
    this.app.mark(this);
    try {
      while (this.elsewhere && this.app.current === this) {
        await new Promise((resolve) => setTimeout(resolve, POLL));
        const conversation = await api.get(api.conversation(this.id)).catch((error) => {
          if (error instanceof api.Problem && error.status < 500) throw error;
          return null;
        });
        if (!conversation || this.live) continue;
        if (conversation.answering && conversation.revision === this.conversation?.revision) continue;
        this.show(conversation);
        if (!conversation.answering) {
          this.notice(told || this.box.value ? "The other answer is there. You can send now." : "");
          announce("The answer is there.");
          this.app.answered(this);
        }
      }
    } catch (error) {
      this.elsewhere = false;
      this.explain(error, () => this.reload());
    } finally {
      this.polling = false;
      this.stopping = false;
      this.refresh();
    }
  }

  /** Show what was said in another window, if that can be done without taking anything away. */
  async look() {
    const busy = () => !this.conversation || this.live || this.loading || this.polling || this.list.querySelector(".editor");
    if (this.id === null || busy()) return;
    const found = await api.get(api.conversation(this.id)).catch(() => null);
    if (!found || busy() || this.app.current !== this) return;
    const { revision, title } = this.conversation;
    if (found.revision !== revision || found.title !== title || found.answering) this.show(found);
  }

  /** Show what the service has; with `settle`, once it has finished with an answer that was left. */
  reload(how) {
    return this.meanwhile(this.fetchAgain(how));
  }

  async fetchAgain({ settle = false, quiet = false } = {}) {
    try {
      let conversation = await api.get(api.conversation(this.id));
      for (let tries = 0; settle && conversation.answering && tries < 10; tries += 1) {
        await new Promise((resolve) => setTimeout(resolve, tries < 4 ? 150 : POLL));
        conversation = await api.get(api.conversation(this.id));
      }
      this.show(conversation);
      return true;
    } catch (error) {
      if (error instanceof api.Problem && !quiet) this.explain(error, () => this.reload());
      return false;
    }
  }

  async load() {
    if (this.id === null) {
      this.list.replaceChildren(this.welcome());
      this.app.describe(this);
      return;
    }
    this.list.replaceChildren(h("p", { class: "waiting loading" }, "Loading…"));
    await this.meanwhile(this.fetchFirst());
  }

  async fetchFirst() {
    try {
      this.show(await api.get(api.conversation(this.id)));
    } catch (error) {
      this.list.replaceChildren();
      this.app.describe(this);
      if (error.status === 404) {
        this.list.append(h("div", { class: "welcome" }, h("h2", {}, "There is no such conversation"), h("p", {}, "It was deleted, or it belongs to somebody else.")));
      } else this.notice(error.message, { kind: "error", error, action: "Try again", onaction: () => this.load().then(() => this.notice("")) });
    }
  }

  /** What is asked meanwhile waits for it. */
  async meanwhile(work) {
    this.loading = work;
    try {
      return await work;
    } finally {
      if (this.loading === work) this.loading = null;
    }
  }

  // Editing

  edit(root, text, at, words) {
    if (this.live || root.querySelector(".editor")) return;
    const box = h("textarea", { dir: "auto", "aria-label": "Edited message", value: words, rows: Math.min(10, words.split("\n").length + 1) });
    const restore = () => {
      editor.replaceWith(text);
      root.querySelector("footer").hidden = false;
      root.querySelector('[aria-label="Edit message"]')?.focus();
    };
    const repeatable = api.idempotencyKey();
    const submit = async () => {
      if (!hasWords(box.value)) return;
      for (const button of editor.querySelectorAll("button")) button.disabled = true;
      try {
        await this.branch(at, box.value, repeatable);
        restore();
      } catch (error) {
        for (const button of editor.querySelectorAll("button")) button.disabled = false;
        this.explain(error, submit);
      }
    };
    const editor = h(
      "div",
      { class: "editor" },
      box,
      h(
        "div",
        { class: "editor-row" },
        h("span", {}, "It goes on in a branch; this conversation stays as it is."),
        h("button", { type: "button", class: "plain", onclick: restore }, "Cancel"),
        h("button", { type: "button", class: "primary", onclick: submit }, "Send in a branch"),
      ),
    );
    box.addEventListener("keydown", (event) => {
      if (event.key === "Escape") {
        event.stopPropagation();
        restore();
      } else if (event.key === "Enter" && !event.shiftKey && !event.isComposing && !matchMedia("(pointer: coarse)").matches) {
        event.preventDefault();
        submit();
      }
    });
    text.replaceWith(editor);
    root.querySelector("footer").hidden = true;
    box.focus();
  }

  async branch(at, text, repeatable) {
    const before = this.conversation.messages.filter((message) => message.number < at).at(-1)?.number ?? 0;
    const made = await api.post(api.conversation(this.id, "/branch"), { at: before }, { repeatable });
    // Should the page be left now, the text is in the branch's box.
    kept.set(draftName(made.id), { text });
    const thread = await this.app.open(made.id);
    thread.put(text);
    const open = { action: "Open it", onaction: () => this.app.go(`#/c/${encodeURIComponent(this.id)}`) };
    // The editor is done: what becomes of the answer is the branch's matter.
    thread.send({ notice: ["This is a branch. The conversation before is as it was.", open] });
  }
}
