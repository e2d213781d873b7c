"""Faults of streams: ends, errors among the events, framing, events of the wrong shape."""
# ruff: noqa: E501 - a row of the table is a line, to be read as one

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from LLM.testing.fault_wire import (
    ANSWER,
    BOTH,
    CHAT_ONLY,
    CLOSE,
    CUT,
    CUT_EMPTY,
    HOLD,
    IDLE,
    IDLE_LATER,
    LAST,
    MESSAGES_ONLY,
    PART,
    RESET,
    WRONG,
    WRONG_LATER,
    Asked,
    Fault,
    Outcome,
    Piece,
    Step,
    answers,
    chat_chunk,
    chunk,
    data,
    delta,
    event,
    fails,
    forever,
    right_head,
    said,
    steps,
    streamed,
    talk,
    whole,
)

__all__ = ["STREAM_FAULTS"]

SHORT = {"timeout": 0.25}
SMALL = {"max_response_bytes": 200_000}


def _some(asked: Asked) -> list[bytes]:
    """The beginning of the right stream, with some text."""
    said_ = talk(asked)
    return [*said_.start, *said_.text[:4]]


def _all_but_end(asked: Asked) -> list[bytes]:
    said_ = talk(asked)
    return [*said_.start, *said_.text, *said_.finish]


def _text_only(asked: Asked) -> list[bytes]:
    said_ = talk(asked)
    return [*said_.start, *said_.text]


def _start(asked: Asked) -> list[bytes]:
    return talk(asked).start


def _text(asked: Asked) -> list[bytes]:
    return talk(asked).text


def _finish(asked: Asked) -> list[bytes]:
    return talk(asked).finish


def _end(asked: Asked) -> list[bytes]:
    return talk(asked).end


def _rest(asked: Asked) -> list[bytes]:
    """What `_some` left out."""
    return talk(asked).events[len(_some(asked)) :]


def _events(asked: Asked) -> list[bytes]:
    return talk(asked).events


def _speaking(asked: Asked) -> bytes:
    """One event with a piece of text, in the dialect of the request."""
    if asked.messages_dialect:
        piece = {"type": "text_delta", "text": "word "}
        return event("content_block_delta", index=0, delta=piece)
    return delta(content="word ")


def _silent(asked: Asked) -> bytes:
    """One event that says nothing: a ping, or an empty delta."""
    return event("ping") if asked.messages_dialect else delta(content="")


def _row(name: str, says: str, outcome: Outcome, *pieces: Piece, dialects: tuple[str, ...] = BOTH, ends: bool = True, media: str = "text/event-stream", **more: Any) -> Fault:  # fmt: skip
    """A row of a chunked stream."""
    script = streamed(*pieces, ends=ends, media=media)
    return Fault(f"stream-{name}", says, script, None, outcome, dialects, **more)


def _raw(name: str, says: str, outcome: Outcome, *pieces: Piece, **more: Any) -> Fault:
    """A row whose script sends its own head."""
    return Fault(f"stream-{name}", says, steps(*pieces), None, outcome, **more)


def _named(group: str, *faults: Fault) -> tuple[Fault, ...]:
    return tuple(replace(fault, group=group) for fault in faults)


def _empty_delta(asked: Asked) -> Iterator[Step]:
    return forever(_silent(asked), 0.02)


def _half_event(asked: Asked) -> bytes:
    return _speaking(asked)[:25]


_DEADLINE = fails("LLMTimeoutError", clock="deadline", retriable=True, text=PART)
_TOO_LARGE = fails("LLMResponseError", says="larger than")
_TOO_LARGE_LATER = fails("LLMResponseError", says="larger than", text=PART)

_ENDS = _named(
    "Ends of streams",
    _row("end-held", "holds the line after the end marker", ANSWER, _events, HOLD),
    _row("end-held-with-pings", "goes on with comments after the end marker", ANSWER, _events, lambda _: forever(b": ping\n\n", 0.02)),
    _row("more-after-end", "sends more events after the end marker", ANSWER, _events, _speaking, _events),
    _row("no-end-marker", "leaves out the end marker", ANSWER, _all_but_end),
    _row("no-end-marker-held", "leaves out the end marker and holds the line", ANSWER, _all_but_end, HOLD, settings=SHORT),
    _row("no-end-marker-cut", "closes in place of the end marker", ANSWER, _all_but_end, CLOSE),
    _row("no-end-marker-reset", "resets in place of the end marker", ANSWER, _all_but_end, 0.05, RESET),
    _row("no-finish", "leaves out the finish reason, not the end marker", ANSWER, _text_only, _end),
    _row("bare-end", "ends after some text, as if that were all", CUT, _some),
    _row("bare-end-late", "ends after the whole text, without a finish reason", CUT, _text_only),
    _row("bare-end-early", "ends before any text", CUT_EMPTY, _start),
    _row("empty", "ends before any event", CUT_EMPTY),
    _row("blank", "sends blank lines only", CUT_EMPTY, b"\n\n\r\n\r\n"),
    _row("comments-only", "sends comments only", CUT_EMPTY, b": hello\n\n: goodbye\n\n"),
    _row("end-marker-only", "sends the end marker and nothing before it", CUT_EMPTY, _end),
    _raw("cut-in-event", "closes within an event of a stream without a length", CUT, right_head, lambda a: b"".join(_some(a)), _half_event, CLOSE),
    _row("ends-in-event", "ends the chunks within an event", CUT, _some, _half_event),
    _row("cut-in-first-event", "ends the chunks within the first event", CUT_EMPTY, _half_event),
    _row("reset", "resets after some text", CUT, _some, 0.05, RESET),
    _row("closed", "closes after some text, before the last chunk", CUT, _some, CLOSE),
    _row("no-blank-line-at-end", "ends after the end marker's line, without the blank one", ANSWER, lambda a: b"".join(_events(a)).rstrip(b"\n")),
    _raw("without-length", "ends the stream by closing", ANSWER, right_head, _events, CLOSE),
    _raw("without-length-slowly", "sends events apart, in a stream that the close ends", ANSWER, right_head, lambda a: (s for e in _events(a) for s in (e, 0.01)), CLOSE),
    _raw("http-1.0", "streams in HTTP/1.0", ANSWER, lambda a: right_head(a).replace(b"HTTP/1.1", b"HTTP/1.0"), _events, CLOSE),
    _raw("length-huge", "gives a length that it never reaches, and closes after the end marker", ANSWER, lambda a: right_head(a, "Content-Length: 1000000"), _events, CLOSE),
    _row("tool-cut", "ends within a tool call", fails("LLMStreamError", retriable=True, tools=1), lambda a: _events(a)[: 4], tools=True),
)  # fmt: skip

_PACE = _named(
    "Time in streams",
    _row("steady", "sends a piece of text each 100 ms, for longer than the timeout", ANSWER, _start, lambda a: (s for e in _text(a)[:8] for s in (e, 0.1)), lambda a: [*_text(a)[8:], *_finish(a), *_end(a)], settings=SHORT),
    _row("silent-after-text", "says nothing after some text", IDLE_LATER, _some, HOLD, settings=SHORT),
    _row("silent-after-start", "says nothing after the first event, which has no text", IDLE, _start, HOLD, settings=SHORT),
    _row("drip-comments", "sends comments without end", IDLE, lambda _: forever(b": keep-alive\n\n", 0.02), settings=SHORT),
    _row("drip-comments-later", "sends comments without end after some text", IDLE_LATER, _some, lambda _: forever(b": keep-alive\n\n", 0.02), settings=SHORT),
    _row("drip-comment", "drips one comment without end", IDLE_LATER, _some, b":", lambda _: forever(b"x", 0.02), settings=SHORT),
    _row("drip-blank-lines", "sends blank lines without end", IDLE_LATER, _some, lambda _: forever(b"\n", 0.02), settings=SHORT),
    _row("drip-empty-data", "sends empty data without end", IDLE_LATER, _some, lambda _: forever(b"data:\n\n", 0.02), settings=SHORT),
    _row("drip-nothing", "sends events without content without end", IDLE_LATER, _some, _empty_delta, settings=SHORT),
    _row("drip-unknown-events", "sends unknown events without end", IDLE_LATER, _some, lambda _: forever(b'event: brand_new\ndata: {"type": "brand_new"}\n\n', 0.02), settings=SHORT),
    _row("drip-event", "drips an event that never ends", IDLE_LATER, _some, b"data: ", lambda _: forever(b"x", 0.02), settings=SHORT),
    _row("drip-after-finish", "sends comments without end after the finish reason", ANSWER, _all_but_end, lambda _: forever(b": keep-alive\n\n", 0.02), settings=SHORT),
    _row("flood-comments", "sends comments without end or pause", IDLE, lambda _: forever(b": keep-alive\n\n" * 500), settings=SHORT),
    _row("flood-nothing", "sends events without content without end or pause", IDLE_LATER, _some, lambda a: forever(_silent(a) * 50), settings=SHORT),
    _row("drip-text", "goes on talking without end", _DEADLINE, _start, lambda a: forever(_speaking(a), 0.02), settings={"timeout": 0.3, "deadline": 0.5}),
    _row("flood-text", "goes on talking without end or pause", _DEADLINE, _start, lambda a: forever(_speaking(a) * 20), settings={"timeout": 0.3, "deadline": 0.5}),
    _row("drip-comments-until-deadline", "sends comments without end; no timeout but the deadline", _DEADLINE, _some, lambda _: forever(b": keep-alive\n\n", 0.02), settings={"timeout": None, "deadline": 0.3}),
    _row("slow-tool-call", "sends a tool call's pieces each 60 ms, for longer than the timeout", said("", tools=1), lambda a: (s for e in _events(a) for s in (e, 0.06)), tools=True, settings=SHORT),
)  # fmt: skip

_NO_LUCK = {"message": "no luck", "type": "server_error", "code": None}


def _errors() -> Iterator[Fault]:
    """An error in many shapes: as the first event, and after some text."""
    server = fails("LLMServerError", says="no luck", retriable=True)
    plain = fails("LLMAPIError", says="no luck")
    limit = fails("LLMRateLimitError", says="no luck", retriable=True)
    context = fails("LLMContextLengthError", says="no luck")
    anthropic = {"type": "error", "error": {"type": "overloaded_error", "message": "no luck"}}
    shapes: tuple[tuple[str, str, bytes, Outcome], ...] = (
        ("object", "an error object", data({"error": _NO_LUCK}), server),
        ("event", "an event `error` with an object", data({"error": _NO_LUCK}, "error"), server),
        ("event-bare", "an event `error` with the error's fields", data(_NO_LUCK, "error"), server),
        ("event-text", "an event `error` with plain text", data(b"no luck", "error"), plain),
        ("event-empty", "an event `error` with an empty object", data({}, "error"), fails("LLMAPIError")),
        ("overloaded", "an event `error` that says overloaded", data(anthropic, "error"), server),
        ("unnamed", "an error of the messages dialect without the event's name", data(anthropic), server),
        ("text", "an error that is text", data({"error": "no luck"}), plain),
        ("string", "a JSON string", data("no luck"), plain),
        ("bare", "bare JSON in place of an event", b'{"error": {"message": "no luck", "type": "server_error"}}\n\n', server),
        ("code", "an error with the code 429", data({"error": {"message": "no luck", "code": 429}}), limit),
        ("code-text", "an error with the code `429`", data({"error": {"message": "no luck", "code": "429"}}), limit),
        ("rate", "an error of the type rate_limit_error", data({"error": {"message": "no luck", "type": "rate_limit_error"}}), limit),
        ("context", "an error with the code context_length_exceeded", data({"error": {"message": "no luck", "code": "context_length_exceeded"}}), context),
        ("detail", "a detail", data({"detail": "no luck"}), plain),
        ("object-error", "vLLM's object `error`", data({"object": "error", "message": "no luck", "type": "BadRequestError", "code": 400}), fails("LLMInvalidRequestError", says="no luck")),
    )  # fmt: skip
    for name, says, sent, outcome in shapes:
        yield _row(f"error-{name}", f"sends {says} first", outcome, sent)
        later = replace(outcome, text=PART)
        yield _row(f"error-{name}-later", f"sends {says} after some text", later, _some, sent)
    yield _row("error-held", "sends an error and holds the line", server, data({"error": _NO_LUCK}, "error"), HOLD)  # fmt: skip
    yield _row("error-null", "has an error that is null in each event", ANSWER, lambda a: [e.replace(b"data: {", b'data: {"error":null,') for e in _events(a)])  # fmt: skip


_ERRORS = _named(
    "Errors in streams",
    *_errors(),
    _row("error-in-chunk", "sends an error in a chunk that has choices", fails("LLMServerError", text=PART, retriable=True, says="no luck"), _some, chat_chunk({"index": 0, "delta": {"content": ""}, "finish_reason": "error"}, error={"code": 502, "message": "no luck"}), dialects=CHAT_ONLY),
)  # fmt: skip

_INSTEAD = _named(
    "Something else than a stream",
    Fault("instead-page", "answers a page", answers(b"<!DOCTYPE html><title>Sign in</title>", media="text/html"), None, replace(WRONG, says="Sign in")),
    Fault("instead-answer", "answers whole, not streamed", answers(whole), None, WRONG),
    Fault("instead-error", "answers an error as JSON", answers({"error": _NO_LUCK}), None, fails("LLMServerError", says="no luck", retriable=True)),
    Fault("instead-detail", "answers FastAPI's detail as JSON", answers({"detail": "no luck"}), None, fails("LLMAPIError", says="no luck")),
    Fault("instead-error-pretty", "answers an error as JSON over several lines", answers(b'{\n  "error": {\n    "message": "no luck",\n    "type": "server_error"\n  }\n}\n'), None, fails("LLMServerError", says="no luck", retriable=True)),
    Fault("instead-array", "answers an array", answers([]), None, WRONG),
    Fault("instead-error-array", "answers an error in an array", answers([{"error": _NO_LUCK}]), None, fails("LLMServerError", says="no luck", retriable=True)),
    Fault("instead-text", "answers plain text", answers(b"Internal Server Error", media="text/plain"), None, CUT_EMPTY),
    Fault("instead-null", "answers null", answers(b"null"), None, CUT_EMPTY),
    Fault("instead-binary", "answers bytes of chance", answers(bytes(range(256))), None, CUT_EMPTY),
    Fault("instead-endless-page", "answers a page without end", steps(right_head, b"<html>", lambda _: forever(b"x" * 1000)), None, WRONG),
    Fault("instead-endless-json", "answers JSON without end", steps(right_head, b"[", lambda _: forever(b"[1]," * 1000)), None, WRONG),
    Fault("instead-page-held", "answers a page and holds the line", steps(right_head, b"<html>", HOLD), None, IDLE, settings=SHORT),
)  # fmt: skip


def _joined(change: Callable[[bytes], bytes]) -> Callable[[Asked], bytes]:
    return lambda asked: change(b"".join(_events(asked)))


def _split_lines(body: bytes) -> bytes:
    """Each event's JSON over two data lines, which join by a line feed."""
    return body.replace(b'","', b'",\ndata: "')


def _one_by_one(asked: Asked) -> Iterator[Step]:
    """Each byte in a packet of its own, as far as the network keeps them apart."""
    body = b"".join(_events(asked))
    for index in range(len(body)):
        yield body[index : index + 1]


def _interspersed(extra: bytes) -> Callable[[Asked], list[bytes]]:
    return lambda asked: [extra + e + extra for e in _events(asked)]


def _worded(text: str) -> Callable[[Asked], list[bytes]]:
    """The right stream with this text in place of its own, unescaped."""

    def pieces(asked: Asked) -> list[bytes]:
        if asked.messages_dialect:
            piece = {"type": "text_delta", "text": text}
            words = event("content_block_delta", index=0, delta=piece)
        else:
            words = delta(content=text)
        return [*_start(asked), words, *_finish(asked), *_end(asked)]

    return pieces


def _broken_words(old: bytes, new: bytes) -> Callable[[Asked], list[bytes]]:
    return lambda asked: [e.replace(old, new) for e in _worded("Grüße 🙂")(asked)]


_LINES = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg\x1dh\x1ei"


def _mixed_ends(body: bytes) -> bytes:
    ends = (b"\r\n", b"\n", b"\r")
    lines = body.split(b"\n")
    return b"".join(line + ends[index % 3] for index, line in enumerate(lines[:-1])) + b"\n"


def _twenty_megabytes(asked: Asked) -> list[bytes]:
    return _worded("word " * 4_000_000)(asked)


_FRAMING = _named(
    "Framing of events",
    _row("crlf", "ends lines with CRLF", ANSWER, _joined(lambda b: b.replace(b"\n", b"\r\n"))),
    _row("cr", "ends lines with CR", ANSWER, _joined(lambda b: b.replace(b"\n", b"\r"))),
    _row("mixed-ends", "ends lines with CRLF, LF and CR in turn", ANSWER, _joined(_mixed_ends)),
    _row("crlf-apart", "cuts each CRLF by a chunk's border", ANSWER, lambda a: [p for e in _events(a) for line in e.split(b"\n")[:-1] for p in (line + b"\r", b"\n")]),
    _row("bom", "begins with a byte order mark", ANSWER, b"\xef\xbb\xbf", _events),
    _row("bom-apart", "begins with a byte order mark, byte by byte", ANSWER, b"\xef", b"\xbb", b"\xbf", _events),
    _row("blank-lines", "has many blank lines between events", ANSWER, _interspersed(b"\n\n\n")),
    _row("comments", "has comments between events", ANSWER, _interspersed(b": keep-alive\n\n")),
    _row("comments-inside", "has comments inside events", ANSWER, _joined(lambda b: b.replace(b"data: {", b":x\ndata: {"))),
    _row("fields-unknown", "has id, retry and unknown fields", ANSWER, _joined(lambda b: b.replace(b"data: {", b"id: 7\nretry: 10\nfoo: bar\nbaz\ndata: {"))),
    _row("no-blank-after-colon", "has no blank after `data:`", ANSWER, _joined(lambda b: b.replace(b"data: ", b"data:"))),
    _row("data-empty", "sends empty data between events", ANSWER, _interspersed(b"data:\n\n")),
    _row("data-blank", "sends data of blanks between events", ANSWER, _interspersed(b"data:   \n\n")),
    _row("data-without-colon", "sends `data` without a colon between events", ANSWER, _interspersed(b"data\n\n")),
    _row("data-lines", "cuts an event's data in several lines", ANSWER, _joined(_split_lines)),
    _row("one-packet", "sends all events in one chunk", ANSWER, _joined(lambda b: b)),
    _row("bytes", "sends each byte in a chunk of its own", ANSWER, _one_by_one),
    _raw("bytes-without-length", "sends each byte in a packet of its own", ANSWER, right_head, _one_by_one, CLOSE),
    _row("end-marker-padded", "has blanks after the end marker", ANSWER, _joined(lambda b: b.replace(b"[DONE]", b"[DONE] ")), dialects=CHAT_ONLY),
    _row("end-marker-twice", "sends the end marker twice", ANSWER, _events, _end),
    _row("events-named", "names each event `message`", ANSWER, _joined(lambda b: b.replace(b"data: ", b"event: message\ndata: ")), dialects=CHAT_ONLY),
    _row("events-unnamed", "leaves out the events' names", ANSWER, lambda a: [e[e.index(b"data:") :] for e in _events(a)], dialects=MESSAGES_ONLY),
    _row("events-unknown", "sends unknown events between", ANSWER, _interspersed(b'event: brand_new\ndata: {"type": "brand_new", "x": [1]}\n\n')),
    _row("charset", "names a wrong charset", ANSWER, _events, media="text/event-stream; charset=latin-1"),
    _row("type-json", "has the content type of JSON", ANSWER, _events, media="application/json"),
    _row("type-text", "has the content type of text", ANSWER, _events, media="text/plain"),
    _row("type-html", "has the content type of a page", ANSWER, _events, media="text/html"),
    _row("line-separators", "has U+2028, U+2029, U+0085 and their kin in the text", said(_LINES), _worded(_LINES)),
    _row("utf-8-broken", "has broken UTF-8 in the text", said("Grüße \N{REPLACEMENT CHARACTER}"), _broken_words("🙂".encode(), b"\xf0\x9f\x99")),
    _row("surrogate", "has half a surrogate pair in the text", said("Grüße \N{REPLACEMENT CHARACTER}"), _broken_words("🙂".encode(), b"\\ud83d")),
    _row("nul", "has NUL and an escape sequence in the text", said("Grüße \x00\x1b[31m"), _broken_words("🙂".encode(), b"\\u0000\\u001b[31m")),
    _row("line-of-20-MB", "sends a line of 20 MB", said("word " * 4_000_000), _twenty_megabytes, settings={"timeout": 10}),
    _row("line-endless", "sends a line without end", _TOO_LARGE_LATER, _some, b"data: ", lambda _: forever(b"x" * 10_000), settings=SMALL),
    _row("line-endless-first", "sends nothing but a line without end", _TOO_LARGE, b"data: ", lambda _: forever(b"x" * 10_000), settings=SMALL),
    _row("comment-endless", "sends a comment without end", _TOO_LARGE_LATER, _some, b": ", lambda _: forever(b"x" * 10_000), settings=SMALL),
    _row("event-endless", "sends an event of data lines without end", _TOO_LARGE_LATER, _some, lambda _: forever(b"data: x\n" * 1000), settings=SMALL),
    _row("event-of-empty-lines", "sends an event of empty data lines without end", _TOO_LARGE_LATER, _some, lambda _: forever(b"data\n" * 1000), settings=SMALL),
)  # fmt: skip


def _odd(name: str, says: str, outcome: Outcome, *odd: Piece, dialects: tuple[str, ...] = CHAT_ONLY) -> Fault:  # fmt: skip
    """An odd event after some text, and then the rest of the right stream."""
    return _row(f"odd-{name}", f"sends {says}", outcome, _some, *odd, _rest, dialects=dialects)


def _block(**fields: Any) -> bytes:
    return event("content_block_delta", index=0, delta=fields)


_CHAT_SHAPES = _named(
    "Events of the wrong shape: chat completions",
    _odd("not-json", "an event that is not JSON", WRONG_LATER, b"data: {no json}\n\n"),
    _odd("cut-json", "an event of cut JSON", WRONG_LATER, b'data: {"choices": [\n\n'),
    _odd("deep", "an event of 100,000 brackets", WRONG_LATER, b'data: {"choices": ' + b"[" * 100_000 + b"\n\n"),
    _odd("null", "an event that is null", WRONG_LATER, data(None)),
    _odd("number", "an event that is a number", WRONG_LATER, data(5)),
    _odd("array", "an event that is an array", WRONG_LATER, data([])),
    _odd("empty-object", "an empty object", ANSWER, data({})),
    _odd("choices-null", "choices that are null", ANSWER, data({"choices": None})),
    _odd("choices-empty", "an empty list of choices", ANSWER, data({"choices": []})),
    _odd("choices-object", "choices that are an object", WRONG_LATER, data({"choices": {"a": 1}})),
    _odd("choices-text", "choices that are text", WRONG_LATER, data({"choices": "abc"})),
    _odd("choices-number", "choices that are a number", WRONG_LATER, data({"choices": 5})),
    _odd("choices-of-null", "a choice that is null", ANSWER, data({"choices": [None]})),
    _odd("choice-text", "a choice that is text", ANSWER, data({"choices": ["abc"]})),
    _odd("delta-missing", "a choice without a delta", ANSWER, chat_chunk({"index": 0})),
    _odd("delta-null", "a delta that is null", ANSWER, chat_chunk({"index": 0, "delta": None})),
    _odd("delta-text", "a delta that is text", WRONG_LATER, chat_chunk({"index": 0, "delta": "abc"})),
    _odd("delta-list", "a delta that is a list", WRONG_LATER, chat_chunk({"index": 0, "delta": ["abc"]})),
    _odd("content-null", "a content that is null", ANSWER, delta(content=None)),
    _odd("content-number", "a content that is a number", ANSWER, delta(content=5)),
    _odd("content-object", "a content that is an object", ANSWER, delta(content={"a": 1})),
    _odd("index-text", "a choice whose index is text", WRONG_LATER, chat_chunk({"index": "a", "delta": {"content": "x"}})),
    _odd("index-list", "a choice whose index is a list", WRONG_LATER, chat_chunk({"index": [1], "delta": {"content": "x"}})),
    _odd("index-other", "text of another choice", ANSWER, chat_chunk({"index": 1, "delta": {"content": "x"}})),
    _odd("fields-unknown", "unknown fields in the delta", ANSWER, delta(brand_new={"a": [1]}, other="x", third=None)),
    _odd("fields-unknown-twice", "unknown fields that change their type", ANSWER, delta(brand_new={"a": [1]}), delta(brand_new="text"), delta(brand_new=[1]), delta(brand_new=2)),
    _odd("role-number", "a role that is a number", ANSWER, delta(role=5)),
    _odd("reasoning-number", "reasoning that is a number", ANSWER, delta(reasoning_content=5)),
    _odd("logprobs-nan", "NaN among the logprobs", ANSWER, b'data: {"choices": [{"index": 0, "delta": {}, "logprobs": {"x": [NaN]}}]}\n\n'),
    _odd("long-integer", "an integer of 10,000 digits", ANSWER, b'data: {"choices": [], "x": %b}\n\n' % (b"7" * 10_000)),
    _odd("tools-object", "tool calls that are an object", ANSWER, delta(tool_calls={"a": 1})),
    _odd("tools-of-null", "a tool call that is null", ANSWER, delta(tool_calls=[None])),
    _odd("tools-function-text", "a tool call whose function is text", WRONG_LATER, delta(tool_calls=[{"index": 0, "id": "1", "function": "abc"}])),
    _odd("tools-name-number", "a tool call whose name is a number", WRONG_LATER, delta(tool_calls=[{"index": 0, "id": "1", "function": {"name": 5}}])),
    _odd("tools-index-list", "a tool call whose index is a list", WRONG_LATER, delta(tool_calls=[{"index": [], "id": "1", "function": {"name": "f"}}])),
    _odd("tools-id-number", "a tool call whose id is a number", replace(ANSWER, tools=1), delta(tool_calls=[{"index": 0, "id": 7, "function": {"name": "f", "arguments": "{}"}}])),
    _odd("usage-text", "usage that is text", ANSWER, data({"choices": [], "usage": "many"})),
    _odd("usage-words", "usage in words", ANSWER, data({"choices": [], "usage": {"prompt_tokens": "many"}})),
    _row("usage-words-last", "sends usage in words, last", ANSWER, _all_but_end, data({"choices": [], "usage": {"prompt_tokens": "many"}}), _end, dialects=CHAT_ONLY),
    _row("id-number", "sends an id that is a number, and a date in words", ANSWER, lambda a: [e.replace(b'"id":"', b'"id":7,"x":"').replace(b'"created":', b'"created":"now","y":') for e in _events(a)], dialects=CHAT_ONLY),
    _row("usage-with-choices", "sends usage in the last chunk, which has choices", ANSWER, _text_only, chat_chunk({"index": 0, "delta": {}, "finish_reason": "stop"}, usage={"prompt_tokens": 1, "completion_tokens": 2}), _end, dialects=CHAT_ONLY),
    _row("no-role", "sends text in the first chunk, and no role", ANSWER, _text, _finish, _end, dialects=CHAT_ONLY),
    _row("finish-unknown", "gives an unknown finish reason", ANSWER, _text_only, chat_chunk({"index": 0, "delta": {}, "finish_reason": "tired"}), _end, dialects=CHAT_ONLY),
    _row("finish-number", "gives a finish reason that is a number", ANSWER, _text_only, chat_chunk({"index": 0, "delta": {}, "finish_reason": 5}), _end, dialects=CHAT_ONLY),
    _row("finish-null", "gives a finish reason that is null, and the end marker", ANSWER, _text_only, chat_chunk({"index": 0, "delta": {}, "finish_reason": None}), _end, dialects=CHAT_ONLY),
    _row("finish-with-text", "gives the finish reason beside the last text", said("all"), chat_chunk({"index": 0, "delta": {"role": "assistant", "content": "all"}, "finish_reason": "stop"}), _end, dialects=CHAT_ONLY),
    _row("messages-whole", "gives messages in place of deltas", said("all"), chat_chunk({"index": 0, "message": {"role": "assistant", "content": "all"}, "finish_reason": "stop"}), _end, dialects=CHAT_ONLY),
    _row("tools-finish-stop", "gives a tool call and the finish reason `stop`", said("", tools=1), lambda a: [e.replace(b'"finish_reason":"tool_calls"', b'"finish_reason":"stop"') for e in _events(a)], dialects=CHAT_ONLY, tools=True),
    _row("tools-whole", "gives a whole tool call in one event, without an index", said("", tools=1), delta(tool_calls=[{"id": "1", "function": {"name": "f", "arguments": "{}"}}]), _finish, _end, dialects=CHAT_ONLY),
    _row("tools-one-index", "gives two tool calls one index", said("", tools=2), delta(tool_calls=[{"index": 0, "id": "1", "function": {"name": "f", "arguments": "{}"}}]), delta(tool_calls=[{"index": 0, "id": "2", "function": {"name": "g", "arguments": "{}"}}]), _finish, _end, dialects=CHAT_ONLY),
    _row("tools-interwoven", "gives the pieces of two tool calls in turn", said("", tools=2), delta(tool_calls=[{"index": 0, "id": "1", "function": {"name": "f", "arguments": "{"}}, {"index": 1, "id": "2", "function": {"name": "g", "arguments": "["}}]), delta(tool_calls=[{"index": 0, "function": {"arguments": "}"}}]), delta(tool_calls=[{"index": 1, "function": {"arguments": "]"}}]), _finish, _end, dialects=CHAT_ONLY),
    _row("tools-object-arguments", "gives a tool call's arguments as an object", said("", tools=1), delta(tool_calls=[{"index": 0, "id": "1", "function": {"name": "f", "arguments": {"a": 1}}}]), _finish, _end, dialects=CHAT_ONLY),
    _row("tools-nameless", "gives a tool call without id and name", said("", tools=1), delta(tool_calls=[{"index": 0, "function": {"arguments": "{}"}}]), _finish, _end, dialects=CHAT_ONLY),
)  # fmt: skip

_MESSAGE_SHAPES = _named(
    "Events of the wrong shape: messages",
    *[
        _odd(f"{name}-in-messages", says, outcome, *odd, dialects=MESSAGES_ONLY)
        for name, says, outcome, *odd in (
            ("not-json", "an event that is not JSON", WRONG_LATER, b"data: {no json}\n\n"),
            ("deep", "an event of 100,000 brackets", WRONG_LATER, b"data: " + b"[" * 100_000 + b"\n\n"),
            ("null", "an event that is null", WRONG_LATER, data(None)),
            ("array", "an event that is an array", WRONG_LATER, data([])),
            ("empty-object", "an empty object", ANSWER, data({})),
            ("type-number", "an event whose type is a number", ANSWER, data({"type": 5})),
            ("type-list", "an event whose type is a list", ANSWER, data({"type": []})),
            ("delta-missing", "a block's delta that is missing", ANSWER, event("content_block_delta", index=0)),
            ("delta-text", "a block's delta that is text", WRONG_LATER, event("content_block_delta", index=0, delta="abc")),
            ("delta-unknown", "a block's delta of an unknown kind", ANSWER, _block(type="brand_new", x=1)),
            ("text-null", "a text that is null", ANSWER, _block(type="text_delta", text=None)),
            ("text-number", "a text that is a number", WRONG_LATER, _block(type="text_delta", text=5)),
            ("thinking-number", "thinking that is a number", WRONG_LATER, event("content_block_delta", index=3, delta={"type": "thinking_delta", "thinking": 5})),
            ("input-number", "a tool's input that is a number", WRONG_LATER, event("content_block_delta", index=3, delta={"type": "input_json_delta", "partial_json": 5})),
            ("signature-number", "a signature that is a number", WRONG_LATER, event("content_block_delta", index=3, delta={"type": "signature_delta", "signature": 5})),
            ("index-text", "a block whose index is text", WRONG_LATER, event("content_block_delta", index="a", delta={"type": "text_delta", "text": "x"})),
            ("index-list", "a block whose index is a list", WRONG_LATER, event("content_block_delta", index=[0], delta={"type": "text_delta", "text": "x"})),
            ("block-text", "the start of a block that is text", WRONG_LATER, event("content_block_start", index=3, content_block="abc")),
            ("block-null", "the start of a block that is null", ANSWER, event("content_block_start", index=3, content_block=None)),
            ("block-unknown", "the start of an unknown block", ANSWER, event("content_block_start", index=3, content_block={"type": "brand_new", "x": 1}), event("content_block_stop", index=3)),
            ("stop-of-nothing", "the stop of a block that never started", ANSWER, event("content_block_stop", index=9)),
            ("usage-words", "usage in words", ANSWER, event("message_delta", delta={}, usage={"input_tokens": "many", "output_tokens": []})),
            ("usage-text", "usage that is text", ANSWER, event("message_delta", delta={}, usage="many")),
            ("message-delta-text", "a message's delta that is text", WRONG_LATER, event("message_delta", delta="abc")),
            ("stop-reason-number", "a stop reason that is a number", ANSWER, event("message_delta", delta={"stop_reason": 5})),
        )
    ],
    _row("message-start-text", "begins with a message that is text", WRONG, event("message_start", message="abc"), _events, dialects=MESSAGES_ONLY),
    _row("message-start-odd", "begins with a message of odd fields", ANSWER, event("message_start", message={"id": 5, "model": [], "usage": []}), lambda a: _events(a)[1:], dialects=MESSAGES_ONLY),
    _row("no-message-start", "leaves out the message's start", ANSWER, lambda a: _events(a)[1:], dialects=MESSAGES_ONLY),
    _row("no-block-start", "leaves out the block's start", ANSWER, lambda a: [e for e in _events(a) if b"content_block_start" not in e], dialects=MESSAGES_ONLY),
    _row("no-block-stop", "leaves out the block's stop", ANSWER, lambda a: [e for e in _events(a) if b"content_block_stop" not in e], dialects=MESSAGES_ONLY),
    _row("no-message-delta", "leaves out the stop reason, not the end", ANSWER, lambda a: [e for e in _events(a) if b"message_delta" not in e], dialects=MESSAGES_ONLY),
    _row("done-after-messages", "ends with the other dialect's end marker", ANSWER, _all_but_end, b"data: [DONE]\n\n", dialects=MESSAGES_ONLY),
    _row("stop-reason-unknown", "gives an unknown stop reason", ANSWER, lambda a: [e.replace(b"end_turn", b"tired") for e in _events(a)], dialects=MESSAGES_ONLY),
    _row("tool-without-input", "starts a tool call without its input", said("", tools=1), lambda a: [e.replace(b',"input":{}', b"") for e in _events(a)], dialects=MESSAGES_ONLY, tools=True),
    _row("tool-whole", "gives a tool's whole input at its start", said("", tools=1), lambda a: [_events(a)[0], event("content_block_start", index=0, content_block={"type": "tool_use", "id": "1", "name": "f", "input": {"a": 1}}), event("content_block_stop", index=0), *_finish(a), *_end(a)], dialects=MESSAGES_ONLY, tools=True),
    _row("tool-name-number", "gives a tool's name as a number", WRONG_LATER, _some, event("content_block_start", index=3, content_block={"type": "tool_use", "id": "1", "name": 5, "input": {}}), event("content_block_stop", index=3), _rest, dialects=MESSAGES_ONLY),
    _row("tool-bad-json", "gives a tool input that is not JSON", said("", tools=1), lambda a: [e.replace(b"Krak", b'\\"Krak') for e in _events(a)], dialects=MESSAGES_ONLY, tools=True),
)  # fmt: skip


def _flushed(asked: Asked, events: list[bytes]) -> Iterator[Step]:
    packer = zlib.compressobj(wbits=31)
    yield right_head(asked, "Content-Encoding: gzip", "Transfer-Encoding: chunked")
    for sent in events:
        yield chunk(packer.compress(sent) + packer.flush(zlib.Z_SYNC_FLUSH))


_PACKED = _named(
    "Compressed streams",
    _raw("gzip-cut", "ends a compressed stream after some text, without its end", CUT, lambda a: _flushed(a, _some(a)), LAST),
    _raw("gzip-reset", "resets a compressed stream after some text", CUT, lambda a: _flushed(a, _some(a)), 0.05, RESET),
    _raw("gzip-end-held", "holds the line after a compressed end marker", ANSWER, lambda a: _flushed(a, _events(a)), HOLD),
    _raw("gzip-garbage", "sends what is not compressed after some compressed text", CUT, lambda a: _flushed(a, _some(a)), 0.05, chunk(b"\xff" * 50) + LAST),
    _raw("gzip-bomb", "unfolds into 50 MB after some text", _TOO_LARGE_LATER, lambda a: _flushed(a, [*_some(a), b"data: ", *[b" " * 1_000_000] * 50]), LAST, settings=SMALL),
)  # fmt: skip

STREAM_FAULTS: tuple[Fault, ...] = (
    *_ENDS,
    *_PACE,
    *_ERRORS,
    *_INSTEAD,
    *_FRAMING,
    *_CHAT_SHAPES,
    *_MESSAGE_SHAPES,
    *_PACKED,
)
