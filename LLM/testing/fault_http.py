"""Faults below the body: time, connections, TLS, heads, framing, encodings, redirects."""
# ruff: noqa: E501 - a row of the table is a line, to be read as one

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace

from LLM.testing.fault_wire import (
    ANSWER,
    BROKEN,
    CHAT_ONLY,
    CLOSE,
    CONNECT,
    CUT,
    CUT_EMPTY,
    DRAIN,
    HOLD,
    IDLE,
    IDLE_LATER,
    LAST,
    NEXT,
    RAGGED,
    RESET,
    TIMEOUT,
    UNTRUSTED,
    WRONG,
    Asked,
    Fault,
    Script,
    Step,
    answers,
    bomb,
    both,
    chunk,
    dripped,
    fails,
    forever,
    gzipped,
    half,
    head,
    media_type,
    payload,
    right,
    right_head,
    sized,
    steps,
    talk,
    whole,
)

__all__ = ["HTTP_FAULTS"]

SHORT = {"timeout": 0.25}
SMALL = {"max_response_bytes": 200_000}

_BUSY = fails("LLMServerError", 503, retriable=True)


def _chunked_head(asked: Asked) -> bytes:
    return right_head(asked, "Transfer-Encoding: chunked")


def _head_and_half(asked: Asked) -> bytes:
    return right_head(asked, f"Content-Length: {len(payload(asked))}") + half(asked)


def _half_chunked(asked: Asked) -> bytes:
    """Half the body, in whole chunks; of a stream some text has come."""
    data = half(asked)
    return _chunked_head(asked) + b"".join(chunk(data[i : i + 50]) for i in range(0, len(data), 50))


def _chunked(asked: Asked) -> bytes:
    return _chunked_head(asked) + chunk(payload(asked))


def _some_chunks(asked: Asked) -> bytes:
    """Some whole events, each in its chunk; not streamed, the first half of the body."""
    if not asked.stream:
        return _chunked_head(asked) + chunk(half(asked))
    said = talk(asked)
    return _chunked_head(asked) + b"".join(map(chunk, [*said.start, *said.text[:3]]))


def _drip(build: Callable[[Asked], bytes]) -> Callable[[Asked], Iterator[Step]]:
    return lambda asked: dripped(build(asked))


def _named(group: str, *faults: Fault) -> tuple[Fault, ...]:
    return tuple(replace(fault, group=group) for fault in faults)


def _after_some(*what: bytes) -> Callable[[Asked], Iterator[Step]]:
    """Some of the answer, then these bytes again and again, slowly."""
    return steps(_some_chunks, lambda _: forever(b"".join(what), 0.02))


_TIME = _named(
    "Time",
    Fault("silence", "accepts the request and says nothing", steps(HOLD), TIMEOUT, IDLE, settings=SHORT),
    Fault("silence-at-once", "accepts the connection and reads nothing", steps(HOLD), TIMEOUT, IDLE, stage="connection", requests=0, settings=SHORT),
    Fault("request-unread", "never reads a request of 16 MB", steps(HOLD), TIMEOUT, IDLE, stage="connection", requests=0, question_bytes=16_000_000, dialects=CHAT_ONLY, settings=SHORT),
    Fault("silence-in-status-line", "stops within the status line", steps(b"HTTP/1.1 20", HOLD), TIMEOUT, IDLE, settings=SHORT),
    Fault("silence-after-status-line", "stops after the status line", steps(b"HTTP/1.1 200 OK\r\n", HOLD), TIMEOUT, IDLE, settings=SHORT),
    Fault("silence-in-headers", "stops within a header", steps(b"HTTP/1.1 200 OK\r\nContent-Ty", HOLD), TIMEOUT, IDLE, settings=SHORT),
    Fault("silence-after-hints", "stops after 103 Early Hints", steps(head("103 Early Hints"), HOLD), TIMEOUT, IDLE, settings=SHORT),
    Fault("silence-after-headers", "stops before the body", steps(lambda a: right_head(a, "Content-Length: 500"), HOLD), TIMEOUT, IDLE, settings=SHORT),
    Fault("silence-after-chunked-headers", "stops before the first chunk", steps(_chunked_head, HOLD), TIMEOUT, IDLE, settings=SHORT),
    Fault("silence-in-body", "stops in the middle of a body with a length", steps(_head_and_half, HOLD), TIMEOUT, IDLE_LATER, settings=SHORT),
    Fault("silence-in-chunks", "stops between two chunks", steps(_some_chunks, HOLD), TIMEOUT, IDLE_LATER, settings=SHORT),
    Fault("silence-in-chunk", "stops within a chunk", steps(_half_chunked, b"500\r\nx", HOLD), TIMEOUT, IDLE_LATER, settings=SHORT),
    Fault("silence-in-chunk-size", "stops within a chunk's size", steps(_some_chunks, b"5", HOLD), TIMEOUT, IDLE_LATER, settings=SHORT),
    Fault("silence-before-last-chunk", "sends the whole body but not the end of it", steps(_chunked, HOLD), TIMEOUT, ANSWER, settings=SHORT),
    Fault("silence-in-trailer", "stops within the trailer", steps(_chunked, b"0\r\nX-Trailer: 1", HOLD), TIMEOUT, ANSWER, settings=SHORT),
    Fault("silence-without-length", "sends the whole body without a length, and does not close", steps(lambda a: right_head(a) + payload(a), HOLD), TIMEOUT, ANSWER, settings=SHORT),
    Fault("silence-in-error-body", "stops within the body of a 503", steps(head("503 Busy", "Content-Length: 500"), b'{"error"', HOLD), _BUSY, _BUSY, settings=SHORT),
    Fault("drip-status-line", "drips the status line, one byte each 20 ms", steps(_drip(right)), TIMEOUT, IDLE, settings=SHORT),
    Fault("drip-headers", "sends a header each 20 ms, without end", steps(b"HTTP/1.1 200 OK\r\n", lambda _: forever(b"X-Drip: 1\r\n", 0.02)), TIMEOUT, IDLE, settings=SHORT),
    Fault("drip-header", "drips one header without end", steps(b"HTTP/1.1 200 OK\r\nX-Drip: ", lambda _: forever(b"x", 0.02)), TIMEOUT, IDLE, settings=SHORT),
    Fault("drip-hints", "sends 103 Early Hints each 20 ms, without end", steps(lambda _: forever(head("103 Early Hints", "Link: </>"), 0.02)), TIMEOUT, IDLE, settings=SHORT),
    Fault("drip-body", "drips the body, one byte each 20 ms", steps(lambda a: right_head(a, "Content-Length: 9999"), _drip(payload)), TIMEOUT, IDLE, settings=SHORT),
    Fault("drip-chunks", "drips the body in chunks of one byte", steps(_chunked_head, lambda _: forever(chunk(b" "), 0.02)), TIMEOUT, IDLE, settings=SHORT),
    Fault("drip-chunk-size", "drips the digits of a chunk's size", steps(_some_chunks, lambda _: forever(b"0", 0.02)), TIMEOUT, IDLE_LATER, settings=SHORT),
    Fault("drip-chunk-extension", "drips a chunk's extension", steps(_some_chunks, b"5;", lambda _: forever(b"x", 0.02)), TIMEOUT, IDLE_LATER, settings=SHORT),
    Fault("drip-trailers", "sends a trailer each 20 ms, without end", steps(_chunked, b"0\r\n", lambda _: forever(b"X: 1\r\n", 0.02)), TIMEOUT, ANSWER, settings=SHORT),
    Fault("drip-without-length", "drips a body that only the close would end", steps(right_head, lambda _: forever(b" ", 0.02)), TIMEOUT, IDLE, settings=SHORT),
    Fault("drip-gzip", "drips gzip blocks that hold nothing", steps(lambda a: right_head(a, "Content-Encoding: gzip", "Transfer-Encoding: chunked"), chunk(gzipped(b"")[:10]), lambda _: forever(chunk(b"\x00\x00\x00\xff\xff"), 0.02)), TIMEOUT, IDLE, settings=SHORT),
    Fault("drip-error-body", "drips the body of a 503", steps(head("503 Busy", "Content-Length: 9999"), lambda _: forever(b"x", 0.02)), _BUSY, _BUSY, settings=SHORT),
    Fault("drip-redirect-body", "drips the body of a redirect", steps(head("302 Found", "Location: /v1/other", "Content-Length: 9999"), lambda _: forever(b"x", 0.02)), *both(fails("LLMAPIError", 302)), settings=SHORT),
    Fault("drip-until-deadline", "drips the body; no timeout but the deadline", steps(_chunked_head, lambda _: forever(chunk(b" "), 0.02)), *both(fails("LLMTimeoutError", clock="deadline", retriable=True, slow=True)), settings={"timeout": None, "deadline": 0.3}),
    Fault("errors-until-deadline", "answers 503 each time, after 100 ms", steps(0.1, answers({"error": {"message": "busy"}}, "503 Busy")), *both(fails("LLMServerError", 503, retriable=True)), settings={"deadline": 5}),
    Fault("slow-but-in-time", "takes 200 ms before it answers, of a timeout of 600 ms", steps(0.2, right), settings={"timeout": 0.6}),
)  # fmt: skip

_CONNECTIONS = _named(
    "Connections",
    Fault("refused", "nobody listens on the port", steps(), *both(replace(BROKEN, says="is the server running?")), stage="refused", requests=0),
    Fault("backlog-full", "the port never accepts", steps(), CONNECT, CONNECT, stage="backlog", requests=0, settings={"connect_timeout": 0.3}),
    Fault("close-at-once", "accepts the connection and closes it", steps(CLOSE), BROKEN, BROKEN, stage="connection", requests=0),
    Fault("reset-at-once", "accepts the connection and resets it", steps(RESET), BROKEN, BROKEN, stage="connection", requests=0),
    Fault("close-after-request", "reads the request and closes", steps(CLOSE), BROKEN, BROKEN),
    Fault("reset-after-request", "reads the request and resets", steps(RESET), BROKEN, BROKEN),
    Fault("reset-after-headers", "resets after the headers", steps(lambda a: right_head(a, "Content-Length: 500"), 0.05, RESET), BROKEN, CUT_EMPTY),
    Fault("reset-in-body", "resets in the middle of the body", steps(_head_and_half, 0.05, RESET), BROKEN, CUT),
    Fault("reset-in-chunks", "resets between two chunks", steps(_some_chunks, 0.05, RESET), BROKEN, CUT),
    Fault("reset-in-error-body", "resets in the middle of the body of a 503", steps(head("503 Busy", "Content-Length: 500"), b'{"error"', 0.05, RESET), *both(fails("LLMServerError", 503, retriable=True))),
    Fault("speaks-first", "answers before it was asked", steps(head("408 Request Timeout", "Content-Length: 0", "Connection: close"), 0.05, DRAIN), *both(fails("LLMServerError", 408, retriable=True)), stage="connection", requests=0),
    Fault("early-answer", "answers 413 after the headers of a request of 5 MB, and reads the rest", steps(head("413 Too Large", "Content-Length: 0", "Connection: close"), DRAIN), *both(fails("LLMInvalidRequestError", 413)), stage="connection", requests=0, question_bytes=5_000_000),
    Fault("close-after-response", "closes the connection that it promised to keep", steps(right, CLOSE), pause=0.05),
    Fault("reset-after-response", "resets the connection that it promised to keep", steps(right, 0.02, RESET), pause=0.05),
    Fault("close-at-next-request", "closes the kept connection when the next request comes", steps(right, NEXT, CLOSE)),
    Fault("reset-at-next-request", "resets the kept connection when the next request comes", steps(right, NEXT, RESET)),
    Fault("connection-close", "says `Connection: close`, and does", steps(lambda a: sized(a, payload(a), "Connection: close"), CLOSE)),
    Fault("connection-close-held", "says `Connection: close`, and stays", steps(lambda a: sized(a, payload(a), "Connection: close"), HOLD)),
)  # fmt: skip

_TLS_CUT = fails("LLMConnectionError", retriable=True)
_TLS = _named(
    "TLS",
    Fault("tls-right", "answers as it should, over TLS", steps(right), certificate="good", trusted=True),
    Fault("tls-silence", "says nothing in the handshake", steps(HOLD), CONNECT, CONNECT, stage="connection", certificate="good", trusted=True, requests=0, settings={"connect_timeout": 0.3}),
    Fault("tls-drip", "drips a record of the handshake", steps(b"\x16\x03\x03\x3f\xff", lambda _: forever(b"\x02", 0.02)), CONNECT, CONNECT, stage="connection", certificate="good", trusted=True, requests=0, settings={"connect_timeout": 0.3}),
    Fault("tls-close", "closes in the handshake", steps(NEXT, CLOSE), BROKEN, BROKEN, stage="connection", certificate="good", trusted=True, requests=0),
    Fault("tls-reset", "resets in the handshake", steps(NEXT, RESET), BROKEN, BROKEN, stage="connection", certificate="good", trusted=True, requests=0),
    Fault("tls-alert", "refuses the handshake with an alert", steps(NEXT, b"\x15\x03\x03\x00\x02\x02\x28", CLOSE), BROKEN, BROKEN, stage="connection", certificate="good", trusted=True, requests=0),
    Fault("tls-plain-http", "speaks plain HTTP on a TLS port", steps(NEXT, head("400 Bad Request", "Content-Length: 0"), CLOSE), replace(UNTRUSTED, says="does not speak TLS"), replace(UNTRUSTED, says="does not speak TLS"), stage="connection", certificate="good", trusted=True, requests=0),
    Fault("tls-untrusted", "shows a certificate of an unknown authority", steps(right), UNTRUSTED, UNTRUSTED, certificate="good", requests=0),
    Fault("tls-expired", "shows a certificate that has expired", steps(right), UNTRUSTED, UNTRUSTED, certificate="expired", trusted=True, requests=0),
    Fault("tls-other-host", "shows the certificate of another host", steps(right), UNTRUSTED, UNTRUSTED, certificate="other-host", trusted=True, requests=0),
    Fault("tls-silence-in-body", "stops in the middle of the body", steps(_head_and_half, HOLD), TIMEOUT, IDLE_LATER, certificate="good", trusted=True, settings=SHORT),
    Fault("tls-drip-body", "drips the body", steps(_chunked_head, lambda _: forever(chunk(b" "), 0.02)), TIMEOUT, IDLE, certificate="good", trusted=True, settings=SHORT),
    Fault("tls-reset-in-body", "resets in the middle of the body", steps(_head_and_half, 0.05, RESET), _TLS_CUT, CUT, certificate="good", trusted=True),
    Fault("tls-ragged-end", "ends without `close_notify` in the middle of the body", steps(_head_and_half, RAGGED), _TLS_CUT, CUT, certificate="good", trusted=True),
    Fault("tls-ragged-end-without-length", "ends without `close_notify` in a body without a length", steps(lambda a: right_head(a) + half(a), RAGGED), WRONG, CUT, certificate="good", trusted=True),
    Fault("tls-on-plain-port", "speaks TLS on a plain port", steps(b"\x15\x03\x01\x00\x02\x02\x16", CLOSE), BROKEN, BROKEN),
)  # fmt: skip
_TLS = tuple(replace(f, tls=f.name != "tls-on-plain-port") for f in _TLS)


def _headed(*lines: str) -> Script:
    """The right answer with more header lines."""
    return steps(lambda asked: sized(asked, payload(asked), *lines))


def _started(status_line: bytes) -> Script:
    """The right answer after this status line."""

    def script(asked: Asked) -> Iterator[Step]:
        yield right_bytes(asked).replace(b"HTTP/1.1 200 OK", status_line, 1)

    return script


def right_bytes(asked: Asked) -> bytes:
    """The right response with a length, also of a stream."""
    return sized(asked, payload(asked))


_SWITCHED = fails("LLMAPIError", 101)
_HEADS = _named(
    "Heads of responses",
    Fault("continue-100", "sends 100 Continue first, unasked", steps(head("100 Continue"), right)),
    Fault("processing-102", "sends 102 Processing first", steps(head("102 Processing"), 0.02, right)),
    Fault("hints-103", "sends 103 Early Hints first", steps(head("103 Early Hints", "Link: </style.css>; rel=preload"), right)),
    Fault("hints-103-apart", "sends 103 Early Hints in a packet of its own", steps(head("103 Early Hints", "Link: </style.css>"), 0.05, right)),
    Fault("hints-103-many", "sends 103 Early Hints fifty times", steps(head("103 Early Hints", "Link: </>") * 50, right)),
    Fault("hints-103-endless", "sends 103 Early Hints without end or pause", steps(lambda _: forever(head("103 Early Hints", "Link: </>") * 20)), TIMEOUT, IDLE, settings=SHORT),
    Fault("switching-101", "answers 101 Switching Protocols", steps(head("101 Switching Protocols", "Upgrade: h2c"), CLOSE), _SWITCHED, _SWITCHED),
    Fault("status-line-cut", "closes within the status line", steps(b"HTTP/1.1 20", CLOSE), BROKEN, BROKEN),
    Fault("headers-cut", "closes within the headers", steps(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n", CLOSE), BROKEN, BROKEN),
    Fault("header-cut", "closes within a header", steps(b"HTTP/1.1 200 OK\r\nContent-Len", CLOSE), BROKEN, BROKEN),
    Fault("hints-cut", "closes after 103 Early Hints", steps(head("103 Early Hints"), CLOSE), BROKEN, BROKEN),
    Fault("status-line-garbage", "begins with what is no status line", steps(b"Internal error, sorry\r\n\r\n", CLOSE), BROKEN, BROKEN),
    Fault("status-line-binary", "begins with bytes of chance", steps(bytes(range(256)), CLOSE), BROKEN, BROKEN),
    Fault("status-line-empty", "begins with a blank line", steps(b"\r\n\r\n", CLOSE), BROKEN, BROKEN),
    Fault("status-line-endless", "sends a status line without end", steps(b"HTTP/1.1 200 ", lambda _: forever(b"x" * 1000)), BROKEN, BROKEN),
    Fault("http-0.9", "sends the body and nothing before it", steps(whole, CLOSE), BROKEN, BROKEN),
    Fault("http-2", "answers in HTTP/2", steps(b"\x00\x00\x06\x04\x00\x00\x00\x00\x00\x00\x03\x00\x00\x00\x64", CLOSE), BROKEN, BROKEN),
    Fault("http-2-status-line", "names HTTP/2 in the status line", _started(b"HTTP/2 200"), BROKEN, BROKEN),
    Fault("other-protocol", "is no HTTP server but one of SSH", steps(b"SSH-2.0-OpenSSH_9.2\r\n", HOLD), BROKEN, BROKEN),
    Fault("http-1.0", "speaks HTTP/1.0 and closes", steps(lambda a: head("200 OK", f"Content-Type: {media_type(a)}", version="HTTP/1.0") + payload(a), CLOSE)),
    Fault("http-1.0-keep-alive", "speaks HTTP/1.0 and keeps the connection", steps(lambda a: head("200 OK", f"Content-Type: {media_type(a)}", "Connection: keep-alive", f"Content-Length: {len(payload(a))}", version="HTTP/1.0") + payload(a))),
    Fault("status-without-reason", "leaves out the reason", _started(b"HTTP/1.1 200")),
    Fault("status-with-odd-reason", "gives the reason in Latin-1 and with an escape sequence", _started(b"HTTP/1.1 200 Tr\xe8s bien \x1b[31m")),
    Fault("status-of-two-digits", "answers with status 99", _started(b"HTTP/1.1 99 What"), BROKEN, BROKEN),
    Fault("status-of-words", "answers with a status that is no number", _started(b"HTTP/1.1 OK 200"), BROKEN, BROKEN),
    Fault("header-huge", "sends a header of 100 kB", _headed("X-Huge: " + "x" * 100_000), BROKEN, BROKEN),
    Fault("header-endless", "sends a header without end", steps(b"HTTP/1.1 200 OK\r\nX-Huge: ", lambda _: forever(b"x" * 1000)), BROKEN, BROKEN),
    Fault("headers-endless", "sends headers without end", steps(b"HTTP/1.1 200 OK\r\n", lambda _: forever(b"X-Many: 1\r\n" * 100)), BROKEN, BROKEN),
    Fault("headers-many", "sends 150 headers", _headed(*[f"X-Many-{i}: {i}" for i in range(150)])),
    Fault("headers-bare-lf", "ends lines with LF alone", steps(lambda a: right_head(a, f"Content-Length: {len(payload(a))}").replace(b"\r\n", b"\n") + payload(a))),
    Fault("header-folded", "folds a header over two lines", _headed("X-Folded: one", "  two")),
    Fault("header-without-colon", "sends a header line without a colon", _headed("X-Bare")),
    Fault("header-without-name", "sends a header without a name", _headed(": nameless")),
    Fault("header-with-blank", "has a blank before a header's colon", _headed("X-Blank : 1")),
    Fault("header-binary", "sends control characters and Latin-1 in a header", _headed("X-Binary: \x01\x1b[31m\xe9\xff")),
    Fault("header-names-in-capitals", "writes the names of headers in capitals", steps(lambda a: head("200 OK", f"CONTENT-TYPE: {media_type(a)}", f"CONTENT-LENGTH: {len(payload(a))}") + payload(a))),
    Fault("set-cookie", "sets a cookie, which is not sent back", _headed("Set-Cookie: session=1; Path=/")),
    Fault("status-201", "answers rightly, but with status 201", _started(b"HTTP/1.1 201 Created")),
    Fault("status-204", "answers 204 No Content", steps(head("204 No Content")), fails("LLMResponseError", 204), fails("LLMStreamError", retriable=True)),
)  # fmt: skip


def _lengthed(length: str, *more: str, after: Step = CLOSE) -> Script:
    """The right body under this length."""
    return steps(lambda a: right_head(a, f"Content-Length: {length}", *more) + payload(a), after)


def _shortened(asked: Asked) -> bytes:
    body = payload(asked)
    return right_head(asked, f"Content-Length: {len(body) // 2}") + body


def _chunks_of(size: int) -> Script:
    def script(asked: Asked) -> Iterator[Step]:
        body = payload(asked)
        pieces = [chunk(body[i : i + size]) for i in range(0, len(body), size)]
        yield _chunked_head(asked) + b"".join(pieces) + LAST

    return script


def _sized_as(size: bytes, end: Step = CLOSE) -> Script:
    """Some right chunks, and after a while one with this size line."""
    return steps(_some_chunks, 0.05, size + b"\r\n: some comment\n\n\r\n" + LAST, end)


def _one_chunk(size: Callable[[int], bytes], end: bytes = b"\r\n0\r\n\r\n") -> Script:
    return steps(lambda a: _chunked_head(a) + size(len(payload(a))) + payload(a) + end)


def _other_answer(asked: Asked) -> bytes:
    """A whole response that answers nobody."""
    body = json.loads(whole(asked))
    if asked.messages_dialect:
        body["content"] = [{"type": "text", "text": "WRONG: to nobody"}]
    elif asked.endpoint == "chat/completions":
        body["choices"][0]["message"]["content"] = "WRONG: to nobody"
    return head("200 OK", "Content-Type: application/json", "Content-Length: 5") + b"WRONG"


_TOO_LARGE = fails("LLMResponseError", says="larger than")
_FRAMING = _named(
    "Framing of bodies",
    Fault("length-too-long", "sends less than its Content-Length and closes", steps(_head_and_half, CLOSE), BROKEN, CUT),
    Fault("length-too-long-by-one", "sends one byte less than its Content-Length and closes", steps(lambda a: right_head(a, f"Content-Length: {len(payload(a)) + 1}") + payload(a), CLOSE), BROKEN, ANSWER),
    Fault("length-too-short", "sends more than its Content-Length", steps(_shortened), WRONG, CUT),
    Fault("length-zero", "gives a Content-Length of 0", steps(lambda a: right_head(a, "Content-Length: 0")), WRONG, CUT_EMPTY),
    Fault("length-twice", "gives the right Content-Length twice", steps(lambda a: sized(a, payload(a), f"Content-Length: {len(payload(a))}"))),
    Fault("lengths-conflicting", "gives two lengths that differ, the first too short", steps(lambda a: right_head(a, "Content-Length: 20", f"Content-Length: {len(payload(a))}") + payload(a)), BROKEN, BROKEN),
    Fault("lengths-conflicting-late", "gives two lengths that differ, the second too short", steps(lambda a: right_head(a, f"Content-Length: {len(payload(a))}", "Content-Length: 20") + payload(a)), BROKEN, BROKEN),
    Fault("length-negative", "gives a negative length and closes", _lengthed("-5")),
    Fault("length-of-words", "gives a length that is no number and closes", _lengthed("long")),
    Fault("length-of-digits", "gives a length of 5,000 digits and closes", _lengthed("9" * 5000)),
    Fault("length-huge", "gives a length of a petabyte", _lengthed("1" + "0" * 15, after=HOLD), _TOO_LARGE, ANSWER),
    Fault("length-and-chunked", "gives a length, and chunks", steps(lambda a: right_head(a, "Content-Length: 3", "Transfer-Encoding: chunked") + chunk(payload(a)) + LAST)),
    Fault("coding-unknown", "gives a transfer coding that is not chunked", steps(lambda a: right_head(a, "Transfer-Encoding: gzip, chunked") + chunk(payload(a)) + LAST), BROKEN, BROKEN),
    Fault("coding-in-capitals", "writes the coding `Chunked`", steps(lambda a: right_head(a, "Transfer-Encoding: Chunked") + chunk(payload(a)) + LAST)),
    Fault("no-length", "ends the body by closing", steps(lambda a: right_head(a) + payload(a), CLOSE)),
    Fault("no-length-cut", "ends half a body by closing", steps(lambda a: right_head(a) + half(a), CLOSE), WRONG, CUT),
    Fault("no-length-reset", "resets a body that the close would end", steps(lambda a: right_head(a) + half(a), 0.05, RESET), BROKEN, CUT),
    Fault("chunks-cut-at-border", "closes between two chunks", steps(_some_chunks, CLOSE), BROKEN, CUT),
    Fault("chunks-cut-in-chunk", "closes within a chunk", steps(_half_chunked, b"50\r\nxx", CLOSE), BROKEN, CUT),
    Fault("chunks-cut-in-size", "closes within a chunk's size", steps(_some_chunks, b"5", CLOSE), BROKEN, CUT),
    Fault("chunks-cut-at-end", "sends the whole body and closes before the last chunk", steps(_chunked, CLOSE), BROKEN, ANSWER),
    Fault("chunks-end-early", "ends the chunks in the middle of the body", steps(_half_chunked, LAST), WRONG, CUT),
    Fault("chunks-end-at-once", "sends no chunk but the last", steps(_chunked_head, LAST), WRONG, CUT_EMPTY),
    Fault("chunks-end-ragged", "closes before the blank line that ends the chunks", steps(_chunked, b"0\r\n", CLOSE)),
    Fault("chunks-of-one-byte", "sends chunks of one byte", _chunks_of(1)),
    Fault("chunks-of-three-bytes", "cuts characters and lines by chunks of three bytes", _chunks_of(3)),
    Fault("chunk-size-words", "gives a chunk's size in words", _sized_as(b"zz"), BROKEN, CUT),
    Fault("chunk-size-words-at-once", "gives a chunk's size in words, in the packet of right chunks", steps(lambda a: _some_chunks(a) + b"zz\r\n"), BROKEN, CUT),
    Fault("chunk-size-negative", "gives a negative chunk size", _sized_as(b"-5"), BROKEN, CUT),
    Fault("chunk-size-empty", "gives no chunk size", _sized_as(b""), BROKEN, CUT),
    Fault("chunk-size-prefixed", "writes the chunk's size with 0x", _sized_as(b"0x10"), BROKEN, CUT),
    Fault("chunk-size-huge", "gives a chunk size of 8 exabytes and closes", _sized_as(b"7" + b"f" * 15), BROKEN, CUT),
    Fault("chunk-size-silly", "gives a chunk size of 400 digits", _sized_as(b"f" * 400), BROKEN, CUT),
    Fault("chunk-size-short", "sends more than the chunk's size", _sized_as(b"5"), BROKEN, CUT),
    Fault("chunk-size-padded", "pads the chunk's size with zeros and blanks", _one_chunk(lambda n: b"0000%X  \r\n" % n)),
    Fault("chunk-extension", "has extensions after a chunk's size", _one_chunk(lambda n: b'%x;name="value";x\r\n' % n)),
    Fault("chunk-extension-endless", "has an extension without end", steps(_some_chunks, b"5;", lambda _: forever(b"x" * 1000)), BROKEN, CUT),
    Fault("chunk-lines-bare-lf", "ends the chunks' lines with LF alone", steps(lambda a: _chunked_head(a) + b"%x\n" % len(payload(a)) + payload(a) + b"\n0\n\n")),
    Fault("trailers", "sends trailers after the last chunk", _one_chunk(lambda n: b"%x\r\n" % n, b"\r\n0\r\nX-Checksum: 1\r\nX-Other: 2\r\n\r\n")),
    Fault("trailers-endless", "sends trailers without end", steps(_chunked, b"0\r\n", lambda _: forever(b"X: 1\r\n" * 100)), BROKEN, ANSWER),
    Fault("trailer-endless", "sends one trailer without end", steps(_chunked, b"0\r\nX: ", lambda _: forever(b"x" * 1000))),
    Fault("body-endless", "sends a body without end or length", steps(right_head, lambda _: forever(b" " * 10_000)), _TOO_LARGE, _TOO_LARGE, settings=SMALL),
    Fault("chunks-endless", "sends chunks without end", steps(_chunked_head, lambda _: forever(chunk(b"x" * 10_000))), _TOO_LARGE, _TOO_LARGE, settings=SMALL),
    Fault("body-too-large", "sends 1 MB where 200 kB are allowed", steps(lambda a: sized(a, b" " * 1_000_000)), _TOO_LARGE, _TOO_LARGE, settings=SMALL),
    Fault("bytes-after-response", "sends garbage in the packet of the response", steps(lambda a: right(a) + b"garbage")),
    Fault("line-after-response", "sends a blank line after the response", steps(lambda a: right(a) + b"\r\n")),
    Fault("bytes-after-response-late", "sends garbage 50 ms after the response", steps(right, 0.05, b"garbage"), pause=0.15),
    Fault("second-response", "sends a second response in the same packet", steps(lambda a: right(a) + _other_answer(a))),
    Fault("second-response-late", "sends a second response 50 ms later", steps(right, 0.05, _other_answer), pause=0.15),
)  # fmt: skip


def _coded(encoding: str, pack: Callable[[bytes], bytes]) -> Script:
    return steps(lambda a: sized(a, pack(payload(a)), f"Content-Encoding: {encoding}"))


def _raw_deflate(body: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(body) + packer.flush()


def _flushed(asked: Asked) -> Iterator[Step]:
    """Each event in a gzip block of its own, as a server that streams compresses."""
    packer = zlib.compressobj(wbits=31)
    yield right_head(asked, "Content-Encoding: gzip", "Transfer-Encoding: chunked")
    for event in talk(asked).events if asked.stream else [whole(asked)]:
        yield chunk(packer.compress(event) + packer.flush(zlib.Z_SYNC_FLUSH))
    yield chunk(packer.flush()) + LAST


def _cut_gzip(asked: Asked) -> bytes:
    """Half a gzip body in right framing; each event was flushed, so that text has come."""
    packer = zlib.compressobj(wbits=31)
    pieces = [half(asked)]
    if asked.stream:
        said = talk(asked)
        pieces = [*said.start, *said.text[:4]]
    data = b"".join(packer.compress(p) + packer.flush(zlib.Z_SYNC_FLUSH) for p in pieces)
    return sized(asked, data, "Content-Encoding: gzip")


def _bombed(megabytes: int, status: str = "200 OK") -> Script:
    def script(asked: Asked) -> Iterator[Step]:
        body = bomb(megabytes)
        lines = ["Content-Encoding: gzip", f"Content-Length: {len(body)}"]
        yield head(status, f"Content-Type: {media_type(asked)}", *lines) + body

    return script


_UNASKED = fails("LLMResponseError", says="encoding")
_ENCODINGS = _named(
    "Content encodings",
    Fault("gzip", "compresses, unasked", _coded("gzip", gzipped)),
    Fault("gzip-flushed", "compresses piece by piece", steps(_flushed)),
    Fault("gzip-old-name", "compresses and calls it x-gzip", _coded("X-GZip", gzipped)),
    Fault("gzip-two-members", "compresses in two members", _coded("gzip", lambda b: gzipped(b[:40]) + gzip.compress(b[40:]))),
    Fault("gzip-and-zeros", "has zeros after the compressed body", _coded("gzip", lambda b: gzipped(b) + bytes(8))),
    Fault("gzip-cut", "sends half a compressed body, rightly framed", steps(_cut_gzip), BROKEN, CUT),
    Fault("gzip-checksum", "sends a compressed body with a wrong checksum", _coded("gzip", lambda b: gzipped(b)[:-8] + bytes(8)), BROKEN, CUT_EMPTY),
    Fault("gzip-not", "calls a plain body gzip", _coded("gzip", lambda b: b), BROKEN, CUT_EMPTY),
    Fault("gzip-empty", "calls an empty body gzip", _coded("gzip", lambda _: b""), BROKEN, CUT_EMPTY),
    Fault("gzip-bomb", "sends 100 kB that unfold into 100 MB", _bombed(100), _TOO_LARGE, _TOO_LARGE, settings=SMALL),
    Fault("gzip-bomb-in-error", "sends such a bomb as the body of a 503", _bombed(100, "503 Busy"), _BUSY, _BUSY, settings=SMALL),
    Fault("deflate", "compresses with deflate (zlib)", _coded("deflate", zlib.compress)),
    Fault("deflate-raw", "compresses with deflate, without zlib's frame", _coded("deflate", _raw_deflate)),
    Fault("brotli", "compresses with brotli, unasked", _coded("br", lambda b: b), _UNASKED, _UNASKED),
    Fault("encoding-unknown", "names an encoding that nobody knows", _coded("x-\x1b[31mred", lambda b: b), _UNASKED, _UNASKED),
    Fault("encoding-twice", "compresses twice", _coded("gzip, gzip", lambda b: gzipped(gzipped(b))), _UNASKED, _UNASKED),
    Fault("encoding-identity", "names the encoding that is none", _coded("identity", lambda b: b)),
    Fault("encoding-empty", "names no encoding in the header for it", _coded("", lambda b: b)),
    Fault("error-gzip", "answers 503, compressed", answers(gzipped(b'{"error": {"message": "compressed words"}}'), "503 Busy", "Content-Encoding: gzip"), *both(replace(_BUSY, says="compressed words"))),
    Fault("error-gzip-cut", "answers 503, cut within the compressed body", answers(gzipped(b'{"error": {"message": "x"}}')[:-12], "503 Busy", "Content-Encoding: gzip"), _BUSY, _BUSY),
    Fault("error-gzip-not", "answers 503 and calls a plain body gzip", answers({"error": {"message": "x"}}, "503 Busy", "Content-Encoding: gzip"), _BUSY, _BUSY),
    Fault("error-brotli", "answers 503 in an encoding that was not asked for", answers(b"\x0b\x02\x80abc\x03", "503 Busy", "Content-Encoding: br"), _BUSY, _BUSY),
)  # fmt: skip


def _moved(status: int, location: str = "{elsewhere}/v1/chat/completions", body: bytes = b"moved", *, endless: bool = False) -> Script:  # fmt: skip
    def script(asked: Asked) -> Iterator[Step]:
        lines = [f"Location: {location.format(elsewhere=asked.elsewhere)}"] if location else []
        if endless:
            yield head(f"{status} Moved", *lines)
            yield from forever(b"x" * 10_000)
        yield head(f"{status} Moved", *lines, f"Content-Length: {len(body)}") + body

    return script


def _redirects() -> Iterator[Fault]:
    for status in (301, 302, 303, 307, 308):
        outcome = fails("LLMAPIError", status, says="127.0.0.1")
        says = f"redirects to another host with {status}"
        yield Fault(f"redirect-{status}", says, _moved(status), outcome, outcome)
    plain = fails("LLMAPIError", 302)
    for name, says, script in (
        ("redirect-own-host", "redirects to another path of its own", _moved(302, "/v1/other")),
        ("redirect-to-itself", "redirects to the same path", _moved(302, "/v1/chat/completions")),
        ("redirect-nowhere", "redirects without saying where", _moved(302, "")),
        ("redirect-garbage", "redirects to what is no address", _moved(302, "http://[::1:x/\x1b[31m")),
        ("redirect-long-body", "redirects with a body of 10 MB", _moved(302, body=b"x" * 10_000_000)),
        ("redirect-endless-body", "redirects with a body without end", _moved(302, endless=True)),
    ):  # fmt: skip
        yield Fault(name, says, script, plain, plain)
    for status in (300, 304, 305):
        outcome = fails("LLMAPIError", status)
        yield Fault(
            f"status-{status}", f"answers {status}", _moved(status, "", b""), outcome, outcome
        )


HTTP_FAULTS: tuple[Fault, ...] = (
    *_TIME,
    *_CONNECTIONS,
    *_TLS,
    *_HEADS,
    *_FRAMING,
    *_ENCODINGS,
    *_named("Redirects", *_redirects()),
)
