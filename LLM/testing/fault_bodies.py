"""Faults in what an answer says: error statuses with all their bodies, waits, and wrong 200s."""
# ruff: noqa: E501 - a row of the table is a line, to be read as one

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from LLM.testing.dialects import CHAT, MESSAGES, RefusedError, encoded
from LLM.testing.fault_wire import (
    ANSWER,
    CHAT_ONLY,
    CLOSE,
    MESSAGES_ONLY,
    WRONG,
    Asked,
    Fault,
    Outcome,
    Script,
    Step,
    answers,
    both,
    choice,
    edited,
    fails,
    forever,
    head,
    merged,
    message,
    said,
    steps,
    talk,
    whole,
)

__all__ = ["BODY_FAULTS"]


def _named(group: str, *faults: Fault) -> tuple[Fault, ...]:
    return tuple(replace(fault, group=group) for fault in faults)


def _refusing(status: int, text: str = "try something else") -> Callable[[Asked], Any]:
    """The error body that the dialect has for a status."""

    def body(asked: Asked) -> Any:
        dialect = MESSAGES if asked.messages_dialect else CHAT
        return dialect.error(RefusedError(text, status=status), 1)

    return body


_STATUSES: tuple[tuple[int, str, bool], ...] = (
    (400, "LLMInvalidRequestError", False),
    (401, "LLMAuthenticationError", False),
    (402, "LLMQuotaError", False),
    (403, "LLMAuthenticationError", False),
    (404, "LLMNotFoundError", False),
    (405, "LLMAPIError", False),
    (406, "LLMAPIError", False),
    (407, "LLMAPIError", False),
    (408, "LLMServerError", True),
    (409, "LLMAPIError", False),
    (410, "LLMAPIError", False),
    (413, "LLMInvalidRequestError", False),
    (418, "LLMAPIError", False),
    (422, "LLMInvalidRequestError", False),
    (425, "LLMAPIError", False),
    (429, "LLMRateLimitError", True),
    (431, "LLMAPIError", False),
    (451, "LLMAPIError", False),
    (499, "LLMAPIError", False),
    (500, "LLMServerError", True),
    (501, "LLMServerError", False),
    (502, "LLMServerError", True),
    (503, "LLMServerError", True),
    (504, "LLMServerError", True),
    (505, "LLMServerError", False),
    (520, "LLMServerError", False),
    (529, "LLMServerError", True),
    (599, "LLMServerError", False),
    (999, "LLMServerError", False),
)


def _statuses() -> Iterator[Fault]:
    for status, error, retriable in _STATUSES:
        for name, body in (("", b'{"error": {"message": "try something else"}}'), ("-empty", b"")):
            outcome = fails(error, status, retriable=retriable)
            says = f"answers {status}{' with an empty body' if name else ''}"
            script = answers(body, f"{status} Status")
            yield Fault(f"status-{status}{name}", says, script, outcome, outcome)
    for status in (400, 401, 403, 404, 429, 500, 529):
        found = next(row for row in _STATUSES if row[0] == status)
        outcome = fails(found[1], status, retriable=found[2], says="try something else")
        script = answers(_refusing(status), f"{status} Status")
        says = f"answers {status} in the dialect's own form"
        yield Fault(f"status-{status}-in-form", says, script, outcome, outcome)


_BUSY = fails("LLMServerError", 503, retriable=True)
_TOLD = replace(_BUSY, says="busy today")
_HTML = b"<!DOCTYPE html>\n<html><head><title>busy today</title></head><body>...</body></html>"


def _busy(name: str, says: str, body: Any, outcome: Outcome = _TOLD, **more: Any) -> Fault:
    script = body if callable(body) else answers(body, "503 Busy", **more)
    return Fault(f"error-{name}", f"answers 503 with {says}", script, outcome, outcome)


def _endless(status: str) -> Script:
    return steps(head(status, "Content-Type: text/plain"), lambda _: forever(b"busy today " * 1000))


_ERROR_BODIES = _named(
    "Bodies of errors",
    _busy("object", "an error object", {"error": {"message": "busy today", "type": "server_error", "param": None, "code": None}}),
    _busy("string", "an error that is text", {"error": "busy today"}),
    _busy("null", "an error that is null", {"error": None}, _BUSY),
    _busy("without-words", "an empty error object", {"error": {}}, _BUSY),
    _busy("message-null", "an error whose message is null", {"error": {"message": None, "type": "x"}}, _BUSY),
    _busy("message-object", "an error whose message is an object", {"error": {"message": {"de": "busy today"}}}),
    _busy("message-number", "an error whose message is a number", {"error": {"message": 17}}, _BUSY),
    _busy("code-number", "an error whose code is a number", {"error": {"message": "busy today", "code": 503}}),
    _busy("code-list", "an error whose code is a list", {"error": {"message": "busy today", "code": [1, {}]}}),
    _busy("code-huge", "an error whose code has 5,000 digits", b'{"error": {"message": "busy today", "code": %b}}' % (b"9" * 5000)),
    _busy("type-object", "an error whose type and param are objects", {"error": {"message": "busy today", "type": {}, "param": []}}),
    _busy("detail", "FastAPI's detail", {"detail": "busy today"}),
    _busy("detail-list", "FastAPI's list of details", {"detail": [{"loc": ["body"], "msg": "busy today", "type": "x"}]}),
    _busy("detail-empty", "an empty list of details", {"detail": []}, _BUSY),
    _busy("message", "a bare message", {"message": "busy today"}),
    _busy("errors", "a list of errors", {"errors": [{"message": "busy today"}]}),
    _busy("in-list", "an error in a list", [{"error": {"message": "busy today"}}]),
    _busy("list-empty", "an empty list", [], _BUSY),
    _busy("html", "a page", _HTML, media="text/html"),
    _busy("html-untitled", "a page without a title", b"<html><body>busy", _BUSY, media="text/html"),
    _busy("text", "plain text", b"busy today", media="text/plain"),
    _busy("json-null", "null", b"null", _BUSY),
    _busy("json-string", "a JSON string", b'"busy today"'),
    _busy("json-number", "a number", b"17", _BUSY),
    _busy("json-cut", "cut JSON", b'{"error": {"message": "busy today'),
    _busy("json-deep", "JSON of 100,000 brackets", b"[" * 100_000, _BUSY),
    _busy("json-deep-object", "JSON of 30,000 nested objects", b'{"error":' * 7000, _BUSY),
    _busy("binary", "bytes of chance", bytes(range(256)) * 8, _BUSY, media="application/octet-stream"),
    _busy("utf-16", "UTF-16", '{"error": {"message": "busy today"}}'.encode("utf-16")),
    _busy("bom", "a byte order mark", b'\xef\xbb\xbf{"error": {"message": "busy today"}}'),
    _busy("latin-1", "Latin-1", '{"error": {"message": "busy today, très"}}'.encode("latin-1")),
    _busy("surrogate", "half a surrogate pair", b'{"error": {"message": "busy today \\ud83d"}}'),
    _busy("escapes", "escape sequences and NUL", {"error": {"message": "busy today\x1b[31m\x00\r\nred\u202e"}}),
    _busy("long", "a message of 1 MB", {"error": {"message": "busy today " * 100_000}}),
    _busy("large", "a body of 10 MB", b"busy today " * 1_000_000),
    _busy("endless", "a body without end", _endless("503 Busy")),
    _busy("shorter", "a body that is cut short", steps(head("503 Busy", "Content-Length: 500"), b"busy today", CLOSE)),
    _busy("chunks-cut", "chunks that are cut short", steps(head("503 Busy", "Transfer-Encoding: chunked"), b"a\r\nbusy today\r\n", CLOSE)),
    _busy("without-length", "a body that the close ends", steps(head("503 Busy"), b"busy today", CLOSE)),
    Fault("error-endless-429", "answers 429 with a body without end", _endless("429 Slow"), *both(fails("LLMRateLimitError", 429, retriable=True))),
    Fault("error-endless-401", "answers 401 with a body without end", _endless("401 No"), *both(fails("LLMAuthenticationError", 401))),
    Fault("error-cut-401", "answers 401 with a body that is cut short", steps(head("401 No", "Content-Length: 500"), b"no", CLOSE), *both(fails("LLMAuthenticationError", 401))),
    Fault("error-cut-429", "answers 429 with a wait and a body that is cut short", steps(head("429 Slow", "Content-Length: 500", "Retry-After: 0.05"), b"no", CLOSE), *both(fails("LLMRateLimitError", 429, wait=0.05, retriable=True))),
)  # fmt: skip


def _coded(name: str, status: int, error: Any, outcome: str, *, dialects: tuple[str, ...] = ("chat", "messages"), retriable: bool = False) -> Fault:  # fmt: skip
    found = fails(outcome, status, retriable=retriable)
    script = answers({"error": error}, f"{status} Status")
    shown = json.dumps(error, ensure_ascii=False)
    return Fault(f"code-{name}", f"answers {status} with `{shown}`", script, found, found, dialects)


_CODES = _named(
    "Codes in errors",
    _coded("quota", 429, {"message": "You exceeded your current quota", "type": "insufficient_quota", "code": "insufficient_quota"}, "LLMQuotaError"),
    _coded("context", 400, {"message": "too long", "type": "invalid_request_error", "code": "context_length_exceeded"}, "LLMContextLengthError"),
    _coded("context-number", 400, {"message": "the request exceeds the available context size", "type": "exceed_context_size_error", "code": 400}, "LLMContextLengthError"),
    _coded("context-wording", 400, {"message": "prompt is too long: 300000 tokens > 200000", "type": "invalid_request_error"}, "LLMContextLengthError", dialects=MESSAGES_ONLY),
    _coded("credit-wording", 400, {"message": "Your credit balance is too low", "type": "invalid_request_error"}, "LLMQuotaError", dialects=MESSAGES_ONLY),
    _coded("filter", 400, {"message": "filtered", "code": "content_filter"}, "LLMContentFilterError"),
    _coded("model", 404, {"message": "no such model", "type": "invalid_request_error", "code": "model_not_found"}, "LLMNotFoundError"),
    _coded("key", 401, {"message": "wrong key", "type": "invalid_request_error", "code": "invalid_api_key"}, "LLMAuthenticationError"),
    _coded("overloaded", 529, {"type": "overloaded_error", "message": "Overloaded"}, "LLMServerError", retriable=True),
    _coded("rate-as-400", 400, {"type": "rate_limit_error", "message": "slow down"}, "LLMRateLimitError"),
    _coded("unknown", 400, {"type": "brand_new_error", "code": "brand_new", "message": "?"}, "LLMInvalidRequestError"),
)  # fmt: skip


def _wait(
    name: str, says: str, *lines: str, wait: float | None = None, slow: bool = False
) -> Fault:
    outcome = fails("LLMRateLimitError", 429, retriable=True, wait=wait, slow=slow)
    script = answers(_refusing(429), "429 Too Many Requests", *lines)
    return Fault(f"wait-{name}", f"answers 429 and asks to wait {says}", script, outcome, outcome)


_DATED = "Date: Thu, 01 Jan 2026 00:00:00 GMT"
_WAITS = _named(
    "Waits that a server asks for",
    _wait("seconds", "0 seconds", "Retry-After: 0", wait=0),
    _wait("fraction", "0.05 seconds", "Retry-After: 0.05", wait=0.05),
    _wait("milliseconds", "20 milliseconds, and 30 seconds", "Retry-After-Ms: 20", "Retry-After: 30", wait=0.02),
    _wait("milliseconds-garbage", "`soon` milliseconds, and 0.02 seconds", "Retry-After-Ms: soon", "Retry-After: 0.02", wait=0.02),
    _wait("huge", "six hours", "Retry-After: 21600", wait=21600, slow=True),
    _wait("date", "until an hour after its own date", _DATED, "Retry-After: Thu, 01 Jan 2026 01:00:00 GMT", wait=3600, slow=True),
    _wait("date-past", "until a date that has passed", _DATED, "Retry-After: Wed, 31 Dec 2025 23:00:00 GMT", wait=0),
    _wait("date-garbage", "until a date that there is not", "Retry-After: Thu, 99 Foo 2026 77:00:00 GMT"),
    _wait("date-huge", "until the year 99999", "Retry-After: Thu, 01 Jan 99999 00:00:00 GMT"),
    _wait("negative", "-5 seconds", "Retry-After: -5"),
    _wait("empty", "for nothing", "Retry-After:"),
    _wait("words", "`soon`", "Retry-After: soon"),
    _wait("infinite", "for `inf` seconds", "Retry-After: inf"),
    _wait("nan", "for `nan` seconds", "Retry-After: nan"),
    _wait("exponent", "for 1e400 seconds", "Retry-After: 1e400"),
    _wait("digits", "for a number of 5,000 digits", "Retry-After: " + "9" * 5000),
    _wait("twice", "0.02 seconds and 50 seconds", "Retry-After: 0.02", "Retry-After: 50", wait=0.02),
    _wait("binary", "for bytes of chance", "Retry-After: \x01\xff\x1b"),
    Fault("should-retry", "answers 400 with `x-should-retry: true`", answers(_refusing(400), "400 Bad", "x-should-retry: true"), *both(fails("LLMInvalidRequestError", 400, retriable=True))),
    Fault("should-not-retry", "answers 503 with `x-should-retry: false`", answers(_refusing(503), "503 Busy", "x-should-retry: false"), *both(fails("LLMServerError", 503))),
    Fault("should-perhaps-retry", "answers 503 with `x-should-retry: perhaps`", answers(_refusing(503), "503 Busy", "x-should-retry: perhaps"), *both(_BUSY)),
)  # fmt: skip


def _echo(name: str, says: str, script: Script, outcome: Outcome) -> Fault:
    return Fault(f"echo-{name}", f"echoes the key {says}", script, outcome, outcome)


def _said_back(status: str, form: Callable[[str], Any], *lines: str) -> Script:
    def script(asked: Asked) -> Iterator[Step]:
        given = [line.replace("{key}", asked.key) for line in lines]
        yield from answers(form(asked.key), status, *given)(asked)

    return script


def _keyed(text: bytes) -> Callable[[Asked], bytes]:
    return lambda asked: text.replace(b"{key}", asked.key.encode())


_NO_KEY = fails("LLMAuthenticationError", 401)
_BROKEN = fails("LLMConnectionError", retriable=True)
_ECHOES = _named(
    "The key, echoed",
    _echo("in-message", "in the error's message", _said_back("401 No", lambda k: {"error": {"message": f"wrong key {k}!"}}), _NO_KEY),
    _echo("in-text", "in a plain text", _said_back("401 No", lambda k: f"wrong key {k}!".encode()), _NO_KEY),
    _echo("in-html", "in a page's title", _said_back("401 No", lambda k: f"<html><title>{k}</title>".encode()), _NO_KEY),
    _echo("in-code", "in code, type and param", _said_back("401 No", lambda k: {"error": {"message": "no", "code": k, "type": k, "param": k}}), _NO_KEY),
    _echo("at-the-cut", "where the message is cut", _said_back("401 No", lambda k: {"error": {"message": "x" * 482 + k}}), _NO_KEY),
    _echo("at-the-body-cut", "where the body is cut", _said_back("401 No", lambda k: b"x" * (65536 - len(k) + 4) + k.encode()), _NO_KEY),
    _echo("in-escapes", "as JSON escapes", _said_back("401 No", lambda k: b'{"error": {"message": "%b"}}' % "".join(f"\\u{ord(c):04x}" for c in k).encode()), _NO_KEY),
    _echo("in-utf-16", "in UTF-16", _said_back("401 No", lambda k: json.dumps({"error": {"message": k}}).encode("utf-16")), _NO_KEY),
    _echo("in-request-id", "in the request's id", _said_back("401 No", lambda _: {"error": {"message": "no"}}, "Request-Id: {key}", "X-Request-Id: {key}"), _NO_KEY),
    _echo("in-reason", "in the status line's reason", steps(_keyed(head("401 {key}", "Content-Length: 0"))), _NO_KEY),
    _echo("in-location", "in a redirect's location", steps(_keyed(head("302 Found", "Location: http://127.0.0.1:9/?key={key}", "Content-Length: 0"))), fails("LLMAPIError", 302)),
    _echo("in-status-line", "in what is no status line", steps(_keyed(b"wrong key {key}\r\n\r\n"), CLOSE), _BROKEN),
    _echo("in-version", "in the protocol's version", steps(_keyed(b"HTTP/9.{key} 200 OK\r\n\r\n"), CLOSE), _BROKEN),
    _echo("in-coding", "in the transfer coding", steps(_keyed(head("200 OK", "Transfer-Encoding: {key}")), CLOSE), _BROKEN),
    _echo("in-encoding", "in the content encoding", _said_back("200 OK", lambda _: {}, "Content-Encoding: {key}"), fails("LLMResponseError")),
    Fault("echo-in-type", "echoes the key in the content type of a wrong 200", _said_back("200 OK", lambda k: k.encode(), "Content-Type: {key}"), WRONG, None),
    Fault("echo-in-chunk-size", "echoes the key as a chunk's size", steps(_keyed(head("200 OK", "Transfer-Encoding: chunked") + b"{key}\r\n"), CLOSE), _BROKEN, replace(_BROKEN, error="LLMStreamError")),
)  # fmt: skip


def _wrong(name: str, says: str, body: Any, outcome: Outcome = WRONG, dialects: tuple[str, ...] = ("chat", "messages"), **more: Any) -> Fault:  # fmt: skip
    script = answers(body, "200 OK", **more)
    return Fault(f"body-{name}", f"answers 200 with {says}", script, outcome, None, dialects)


def _encoded(asked: Asked, encoding: str) -> bytes:
    return whole(asked).decode().encode(encoding)


def _with_raw(extra: bytes) -> Callable[[Asked], bytes]:
    """The right body with one more field, as it stands."""
    return lambda asked: b"{" + extra + b"," + whole(asked)[1:]


def _unquoted(old: bytes, new: bytes) -> Callable[[Asked], bytes]:
    return lambda asked: whole(asked).replace(old, new)


def _long_date(asked: Asked) -> bytes:
    return encoded(json.loads(whole(asked)) | {"created": "X"}).replace(b'"X"', b"7" * 10_000)


_BODIES = _named(
    "Wrong answers with 200",
    _wrong("empty", "an empty body", b""),
    _wrong("blank", "blanks", b" \r\n\t "),
    _wrong("html", "a login page", b"<!DOCTYPE html><html><head><title>Sign in</title></head></html>", replace(WRONG, says="Sign in"), media="text/html"),
    _wrong("text", "plain text", b"upstream connect error", replace(WRONG, says="upstream connect error"), media="text/plain"),
    _wrong("null", "null", b"null"),
    _wrong("true", "true", b"true"),
    _wrong("array", "an array", b"[]"),
    _wrong("array-of-answers", "the right answer in an array", edited(lambda body: [body])),
    _wrong("number", "a number", b"42"),
    _wrong("string", "a string", b'"Hello"'),
    _wrong("object", "an empty object", b"{}"),
    _wrong("cut", "cut JSON, rightly framed", lambda a: whole(a)[:-20]),
    _wrong("twice", "the right JSON twice", lambda a: whole(a) * 2),
    _wrong("and-garbage", "JSON and garbage", lambda a: whole(a) + b"garbage"),
    _wrong("and-blanks", "blanks around the JSON", lambda a: b" \r\n" + whole(a) + b"\r\n\r\n", ANSWER),
    _wrong("deep", "100,000 brackets", b"[" * 100_000 + b"]" * 100_000),
    _wrong("deep-field", "a field of 100,000 brackets", _with_raw(b'"extra":' + b"[" * 100_000 + b"]" * 100_000)),
    _wrong("deep-objects", "100,000 nested objects", b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    _wrong("long-integer", "an integer of 10,000 digits in an unknown field", _with_raw(b'"extra":' + b"7" * 10_000), ANSWER),
    _wrong("long-integer-created", "an integer of 10,000 digits as its date", _long_date, ANSWER, CHAT_ONLY),
    _wrong("nan", "NaN and Infinity in an unknown field", _with_raw(b'"extra":[NaN,-Infinity]'), ANSWER),
    _wrong("duplicate-keys", "duplicate keys", _with_raw(b'"id":"1","id":"2"'), ANSWER),
    _wrong("bom", "a byte order mark", lambda a: b"\xef\xbb\xbf" + whole(a), ANSWER),
    _wrong("utf-16", "UTF-16 with its mark", lambda a: _encoded(a, "utf-16"), ANSWER),
    _wrong("utf-16-le", "UTF-16 without a mark", lambda a: _encoded(a, "utf-16-le"), ANSWER),
    _wrong("utf-32", "UTF-32", lambda a: _encoded(a, "utf-32"), ANSWER),
    _wrong("utf-8-broken", "broken UTF-8 in its text", _unquoted("🙂".encode(), b"\xf0\x9f\x99"), replace(ANSWER, text="~\N{REPLACEMENT CHARACTER}")),
    _wrong("surrogate", "half a surrogate pair in its text", _unquoted("🙂".encode(), b"\\ud83d"), replace(ANSWER, text="~\N{REPLACEMENT CHARACTER}")),
    _wrong("surrogate-key", "half a surrogate pair as a field's name", _with_raw(b'"\\ud83d":"\\ude42"'), ANSWER),
    _wrong("nul", "NUL in its text", _unquoted("🙂".encode(), b"\\u0000"), replace(ANSWER, text="~\x00")),
    _wrong("charset", "a wrong charset in its content type", whole, ANSWER, media="application/json; charset=latin-1"),
    _wrong("type-missing", "no content type", whole, ANSWER, media=""),
    _wrong("type-html", "the content type of a page, and right JSON", whole, ANSWER, media="text/html"),
    _wrong("events", "a stream of events", lambda a: b"".join(talk(a).events)),
    _wrong("error", "an error inside", {"error": {"message": "no luck", "type": "server_error", "code": None}}, fails("LLMServerError", says="no luck", retriable=True)),
    _wrong("error-string", "an error that is text", {"error": "no luck"}, fails("LLMAPIError", says="no luck")),
    _wrong("error-code", "an error whose code is 429", {"error": {"message": "no luck", "code": 429}}, fails("LLMRateLimitError", says="no luck", retriable=True)),
    _wrong("error-detail", "a detail", {"detail": "no luck"}, fails("LLMAPIError", says="no luck")),
    _wrong("error-quota", "an exhausted quota inside", {"error": {"message": "no luck", "code": "insufficient_quota"}}, fails("LLMQuotaError", says="no luck")),
    _wrong("error-null", "the right answer, and an error that is null", merged(error=None), ANSWER),
    _wrong("unknown-fields", "unknown fields everywhere", merged(x=1, y={"z": [None]}), ANSWER),
    _wrong("usage-null", "no usage", merged(usage=None), ANSWER),
    _wrong("usage-list", "a usage that is a list", merged(usage=[]), ANSWER),
    _wrong("usage-words", "a usage in words", merged(usage={"prompt_tokens": "many", "input_tokens": "many", "completion_tokens": [], "output_tokens": {}}), ANSWER),
    _wrong("id-number", "an id that is a number", merged(id=7), ANSWER),
    _wrong("model-number", "a model that is a number", merged(model=7), ANSWER),
    _wrong("created-text", "a date that is text", merged(created="yesterday"), ANSWER),
    _wrong("choices-missing", "no choices", edited(lambda b: {k: v for k, v in b.items() if k != "choices"}), dialects=CHAT_ONLY),
    _wrong("choices-null", "choices that are null", merged(choices=None), dialects=CHAT_ONLY),
    _wrong("choices-empty", "an empty list of choices", merged(choices=[]), dialects=CHAT_ONLY),
    _wrong("choices-object", "choices that are an object", merged(choices={"0": {}}), dialects=CHAT_ONLY),
    _wrong("choices-of-null", "a choice that is null", merged(choices=[None]), dialects=CHAT_ONLY),
    _wrong("choice-empty", "a choice without a message", merged(choices=[{}]), dialects=CHAT_ONLY),
    _wrong("message-null", "a message that is null", choice(message=None), dialects=CHAT_ONLY),
    _wrong("message-text", "a message that is text", choice(message="Hello"), dialects=CHAT_ONLY),
    _wrong("content-null", "a content that is null", message(content=None), said(""), dialects=CHAT_ONLY),
    _wrong("content-parts", "a content in parts", message(content=[{"type": "text", "text": "in "}, {"type": "text", "text": "parts"}]), said("in parts"), dialects=CHAT_ONLY),
    _wrong("content-odd-parts", "a content with odd parts", message(content=[None, 5, {"type": "text", "text": None}, {"text": "odd"}]), said("odd"), dialects=CHAT_ONLY),
    _wrong("content-number", "a content that is a number", message(content=5), dialects=CHAT_ONLY),
    _wrong("content-object", "a content that is an object", message(content={"text": "x"}), dialects=CHAT_ONLY),
    _wrong("role-missing", "a message without a role", edited(lambda b: {**b, "choices": [{"message": {"content": b["choices"][0]["message"]["content"]}}]}), ANSWER, dialects=CHAT_ONLY),
    _wrong("finish-null", "a finish reason that is null", choice(finish_reason=None), ANSWER, dialects=CHAT_ONLY),
    _wrong("finish-unknown", "an unknown finish reason", choice(finish_reason="tired"), ANSWER, dialects=CHAT_ONLY),
    _wrong("tools-null", "tool calls that are null", message(tool_calls=None), ANSWER, dialects=CHAT_ONLY),
    _wrong("tools-of-null", "a tool call that is null", message(tool_calls=[None]), dialects=CHAT_ONLY),
    _wrong("tools-arguments-object", "arguments that are an object", message(content=None, tool_calls=[{"id": "1", "function": {"name": "f", "arguments": {"a": 1}}}]), said("", tools=1), dialects=CHAT_ONLY),
    _wrong("tools-arguments-null", "arguments that are null", message(content=None, tool_calls=[{"id": "1", "function": {"name": "f", "arguments": None}}]), said("", tools=1), dialects=CHAT_ONLY),
    _wrong("tools-id-number", "a tool call whose id is a number", message(content=None, tool_calls=[{"id": 1, "function": {"name": "f", "arguments": "{}"}}]), said("", tools=1), dialects=CHAT_ONLY),
    _wrong("tools-finish-stop", "tool calls and the finish reason `stop`", choice(finish_reason="stop", message={"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]}), said("", tools=1), dialects=CHAT_ONLY),
    _wrong("blocks-missing", "no content", edited(lambda b: {k: v for k, v in b.items() if k != "content"}), dialects=MESSAGES_ONLY),
    _wrong("blocks-null", "a content that is null", merged(content=None), dialects=MESSAGES_ONLY),
    _wrong("blocks-text", "a content that is text", merged(content="Hello"), dialects=MESSAGES_ONLY),
    _wrong("blocks-empty", "no blocks", merged(content=[]), said(""), dialects=MESSAGES_ONLY),
    _wrong("blocks-of-null", "a block that is null", merged(content=[None]), dialects=MESSAGES_ONLY),
    _wrong("blocks-unknown", "a block of an unknown kind", edited(lambda b: {**b, "content": [{"type": "brand_new", "x": 1}, *b["content"]]}), ANSWER, dialects=MESSAGES_ONLY),
    _wrong("blocks-text-null", "a block whose text is null", merged(content=[{"type": "text", "text": None}]), said(""), dialects=MESSAGES_ONLY),
    _wrong("blocks-text-missing", "a block without its text", merged(content=[{"type": "text"}]), said(""), dialects=MESSAGES_ONLY),
    _wrong("blocks-text-number", "a block whose text is a number", merged(content=[{"type": "text", "text": 5}]), dialects=MESSAGES_ONLY),
    _wrong("blocks-thinking-number", "thinking that is a number", edited(lambda b: {**b, "content": [{"type": "thinking", "thinking": 5}, *b["content"]]}), dialects=MESSAGES_ONLY),
    _wrong("stop-reason-null", "a stop reason that is null", merged(stop_reason=None), ANSWER, dialects=MESSAGES_ONLY),
    _wrong("stop-reason-number", "a stop reason that is a number", merged(stop_reason=5), ANSWER, dialects=MESSAGES_ONLY),
    _wrong("tool-without-input", "a tool call without its input", merged(content=[{"type": "tool_use", "id": "1", "name": "f"}], stop_reason="tool_use"), said("", tools=1), dialects=MESSAGES_ONLY),
    _wrong("tool-of-nothing", "a tool call without id and name", merged(content=[{"type": "tool_use"}], stop_reason="tool_use"), said("", tools=1), dialects=MESSAGES_ONLY),
    _wrong("tool-name-number", "a tool call whose name is a number", merged(content=[{"type": "tool_use", "id": "1", "name": 5}], stop_reason="tool_use"), dialects=MESSAGES_ONLY),
)  # fmt: skip


BODY_FAULTS: tuple[Fault, ...] = (
    *_named("Statuses", *_statuses()),
    *_ERROR_BODIES,
    *_CODES,
    *_WAITS,
    *_ECHOES,
    *_BODIES,
)
