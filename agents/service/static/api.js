// The service's HTTP API: the key, problems, server-sent events.

import { kept } from "./dom.js";

// The server says something at least every 15 seconds while it answers, and begins any answer sooner.
const SILENCE = 45_000;

/** Words of the service as a sentence, to stand among others. */
function sentence(words) {
  const text = words.trim();
  return `${text.charAt(0).toUpperCase()}${text.slice(1)}${/[.!?…]$/.test(text) ? "" : "."}`;
}

/** The service refused: an answer that is a problem (RFC 9457). Its message is title and detail, as sentences. */
export class Problem extends Error {
  constructor(status, details = {}, { retryAfter = null, requestId = null } = {}) {
    const said = [details.title, details.detail].filter((words) => typeof words === "string" && words.trim()).map(sentence);
    if (!said.length) said.push(`The service answered with status ${status}.`);
    super([...new Set(said)].join(" "));
    this.status = status;
    this.detail = said.at(-1);
    this.requestId = details.request_id ?? requestId;
    this.retryAfter = details.retry_after ?? retryAfter;
  }
}

/** No answer at all: nobody knows whether the request arrived. */
export class Unreachable extends Error {}

/** The answer ended before its last event. */
export class Cut extends Error {}

let key = null;

export const theKey = {
  load() {
    key = read(() => sessionStorage) ?? read(() => localStorage);
  },
  set(value, remember) {
    key = value;
    kept.set("key", value, sessionStorage);
    kept.set("key", remember ? value : null, localStorage);
  },
  forget() {
    this.set(null, false);
  },
  get known() {
    return key !== null;
  },
};

function read(store) {
  try {
    return kept.get("key", store());
  } catch {
    return null;
  }
}

/** A name for one request, by which the server knows a repetition. */
export function idempotencyKey() {
  // Only secure origins have randomUUID; http:// on a name in the office is none.
  if (crypto.randomUUID) return crypto.randomUUID();
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

async function send(method, path, { body, accept = "application/json", repeatable, signal, using } = {}) {
  const headers = { accept };
  const secret = using ?? key;
  if (secret) headers.authorization = `Bearer ${secret}`;
  if (body !== undefined) headers["content-type"] = "application/json";
  if (repeatable) headers["idempotency-key"] = repeatable;
  const ending = new AbortController();
  if (signal?.aborted) ending.abort();
  signal?.addEventListener("abort", () => ending.abort(), { once: true });
  const silence = setTimeout(() => ending.abort(), SILENCE);
  let response;
  try {
    response = await fetch(path, {
      method,
      headers,
      body: body === undefined ? undefined : JSON.stringify(body),
      signal: ending.signal,
      cache: "no-store",
      credentials: "same-origin",
    });
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new Unreachable(`The service ${ending.signal.aborted ? "does not answer" : "cannot be reached"}.`);
  } finally {
    clearTimeout(silence);
  }
  if (response.ok) return response;
  const details = await response.json().catch(() => ({}));
  const wait = Number(response.headers.get("retry-after"));
  const problem = new Problem(response.status, details, { retryAfter: wait > 0 ? wait : null, requestId: requestOf(response) });
  // A key that is being tried is the dialog's own matter.
  if (problem.status === 401 && using === undefined) dispatchEvent(new CustomEvent("keyneeded", { detail: problem }));
  throw problem;
}

const requestOf = (response) => response.headers.get("x-request-id");

async function json(method, path, options) {
  const response = await send(method, path, options);
  if (response.status === 204) return null;
  try {
    return await response.json();
  } catch {
    throw new Unreachable("The service's answer was cut.");
  }
}

export const get = (path, options) => json("GET", path, options);
export const post = (path, body = {}, options) => json("POST", path, { body, ...options });
export const patch = (path, body) => json("PATCH", path, { body });
export const remove = (path) => json("DELETE", path);

export const conversation = (id, rest = "") => `/conversations/${encodeURIComponent(id)}${rest}`;

/** Keep an answer of the service as a file; a plain link could not send the key. */
export async function download(path, fallback) {
  const response = await send("GET", path, { accept: "*/*" });
  const named = /filename\*?=(?:UTF-8'')?"?([^";]+)"?/i.exec(response.headers.get("content-disposition") ?? "");
  const address = URL.createObjectURL(await response.blob());
  const link = document.createElement("a");
  link.href = address;
  link.download = named ? decode(named[1]) : fallback;
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(address), 10_000);
}

function decode(name) {
  try {
    return decodeURIComponent(name);
  } catch {
    return name;
  }
}

/** Ask for an answer; gives `[type, value]` of each event, and throws `Cut` unless the last was `done`. */
export async function* answer(path, body, { repeatable, signal }) {
  const response = await send("POST", path, { body, accept: "text/event-stream", repeatable, signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let type = "";
  let data = [];
  let rest = "";
  try {
    while (true) {
      const { value, done } = await heard(reader);
      if (done) throw new Cut("The connection ended before the answer did.");
      const lines = (rest + value).split(/\r\n|\n|\r(?!$)/);
      rest = lines.pop();
      for (const line of lines) {
        if (line === "") {
          if (data.length) {
            const value = JSON.parse(data.join("\n"));
            if (type === "error") value.request_id ??= requestOf(response);
            yield [type, value];
          }
          if (type === "done") return;
          type = "";
          data = [];
        } else if (line.startsWith("event:")) type = line.slice(6).trim();
        else if (line.startsWith("data:")) data.push(line.slice(5).replace(/^ /, ""));
      }
    }
  } catch (error) {
    if (signal.aborted || error instanceof Cut) throw error;
    throw new Cut("The connection was lost.", { cause: error });
  } finally {
    reader.cancel().catch(() => {});
  }
}

async function heard(reader) {
  let timer;
  const silence = new Promise((_, reject) => {
    timer = setTimeout(() => reject(new Cut("The service has fallen silent.")), SILENCE);
  });
  try {
    return await Promise.race([reader.read(), silence]);
  } finally {
    clearTimeout(timer);
  }
}
