"""What a fault is made of: the steps of a server's misbehaviour, the right answer, and the row.

A script is a pure function from a request to steps. Bytes are sent as they stand, a number is a pause
in seconds, and `End` says what becomes of the connection; after the last step it is kept for the next
request. The right answers are those of `dialects`, so that a row changes one thing only.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from functools import lru_cache
from typing import Any

from LLM.testing.dialects import CHAT, COMPLETIONS, MESSAGES, Ask, Dialect, encoded
from LLM.testing.model import Answer, ToolCall, Usage, completion_tokens
from LLM.testing.server import Received

__all__ = [
    "ANSWER",
    "Asked",
    "End",
    "Fault",
    "Outcome",
    "Script",
    "Step",
    "Talk",
    "fails",
    "right_text",
]


class End(Enum):
    """What becomes of the connection.

    Attributes:
        CLOSE: an orderly end (FIN).
        RESET: an abrupt one (RST).
        HOLD: nothing more is said, and the connection stays open until the client leaves.
        NEXT: wait until the next request begins to come, and read that much of it.
        DRAIN: read and forget what the client sends until it leaves.
        RAGGED: of TLS: an end of the connection without `close_notify`.
    """

    CLOSE = "close"
    RESET = "reset"
    HOLD = "hold"
    NEXT = "next"
    DRAIN = "drain"
    RAGGED = "ragged"


CLOSE, RESET, HOLD = End.CLOSE, End.RESET, End.HOLD
NEXT, DRAIN, RAGGED = End.NEXT, End.DRAIN, End.RAGGED

Step = bytes | float | End

_DIALECTS: Mapping[str, Dialect] = {
    "chat/completions": CHAT,
    "completions": COMPLETIONS,
    "messages": MESSAGES,
}


@dataclass(frozen=True)
class Asked:
    """A request, and where it came.

    Attributes:
        received: the request itself; of a fault before any request, an empty one.
        endpoint: `chat/completions`, `completions`, `messages` or `models`.
        elsewhere: base URL of another server, which nobody should follow a redirect to.
        key: the credential that came with it, to be echoed by a careless server; "" if none did.
        tools: whether the right answer is a tool call.
    """

    received: Received
    endpoint: str
    elsewhere: str = ""
    tools: bool = False

    @property
    def messages_dialect(self) -> bool:
        """Whether the dialect is that of `/v1/messages`."""
        return self.endpoint == "messages" or "anthropic-version" in self.received.headers

    @property
    def stream(self) -> bool:
        return self._json.get("stream") is True

    @property
    def key(self) -> str:
        headers = self.received.headers
        return headers.get("authorization", "").removeprefix("Bearer ") or headers.get(
            "x-api-key", ""
        )

    @property
    def question(self) -> str:
        """What was asked: the last message, or the prompt; at most 40 characters of it."""
        messages = self._json.get("messages")
        said = messages[-1]["content"] if messages else self._json.get("prompt", "")
        return str(said)[:40]

    @property
    def _json(self) -> Mapping[str, Any]:
        return self.received.json if isinstance(self.received.json, dict) else {}


def right_text(question: str) -> str:
    """What a right server says to a question: an answer to this one, and to no other."""
    return f"You asked: {question[:40]} Grüße und Küsse 🙂 from a server that is right."


TOOL = ToolCall("look_up", '{"city": "Kraków", "days": 3}', "call_1")


@dataclass(frozen=True)
class Talk:
    """The events of a right stream: what comes before the text, the text, the finish, the end marker."""

    start: list[bytes]
    text: list[bytes]
    finish: list[bytes]
    end: list[bytes]

    @property
    def events(self) -> list[bytes]:
        return [*self.start, *self.text, *self.finish, *self.end]


def _said(asked: Asked) -> tuple[Ask, Answer]:
    options = asked._json.get("stream_options") or {}  # noqa: SLF001 - this module's own
    usage = options.get("include_usage") is True
    ask = Ask("stand-in", [[]], stream=asked.stream, include_usage=usage)
    called = Answer(None, (TOOL,), "tool_calls")
    answer = called if asked.tools else Answer(right_text(asked.question))
    counted = Usage(prompt_tokens=7, completion_tokens=completion_tokens(answer))
    return ask, Answer(answer.text, answer.tool_calls, answer.finish_reason, counted)


def whole(asked: Asked) -> bytes:
    """The body of the right answer, not streamed."""
    if asked.endpoint == "models":
        return encoded((MESSAGES if asked.messages_dialect else CHAT).models(["stand-in"]))
    ask, answer = _said(asked)
    return encoded(_DIALECTS[asked.endpoint].whole(ask, [answer], 1))


def talk(asked: Asked) -> Talk:
    """The right answer, streamed."""
    ask, answer = _said(asked)
    events = list(_DIALECTS[asked.endpoint].events(ask, [answer], 1))
    if asked.messages_dialect:
        first, last = 3, 3
    else:
        first = 1 if asked.endpoint == "chat/completions" else 0
        last = 3 if ask.include_usage else 2
    return Talk(events[:first], events[first:-last], events[-last:-1], events[-1:])


def payload(asked: Asked) -> bytes:
    """The right body: events if a stream was asked for."""
    return b"".join(talk(asked).events) if asked.stream else whole(asked)


def half(asked: Asked) -> bytes:
    """The first half of the right body; of a stream, it ends within an event and after some text."""
    body = payload(asked)
    return body[: len(body) // 2]


def media_type(asked: Asked) -> str:
    return "text/event-stream" if asked.stream else "application/json"


def head(status: str = "200 OK", *headers: str, version: str = "HTTP/1.1") -> bytes:
    """A status line and headers, as they stand."""
    return "\r\n".join([f"{version} {status}", *headers, "", ""]).encode("latin-1")


def right_head(asked: Asked, *headers: str) -> bytes:
    return head("200 OK", f"Content-Type: {media_type(asked)}", "X-Request-Id: req_1", *headers)


def sized(asked: Asked, body: bytes, *headers: str) -> bytes:
    """A 200 with the right length."""
    return right_head(asked, *headers, f"Content-Length: {len(body)}") + body


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


LAST = b"0\r\n\r\n"


def right(asked: Asked) -> bytes:
    """The right response: chunked if it streams, else with its length."""
    if not asked.stream:
        return sized(asked, whole(asked))
    chunks = b"".join(map(chunk, talk(asked).events))
    return right_head(asked, "Transfer-Encoding: chunked") + chunks + LAST


def gzipped(data: bytes) -> bytes:
    return gzip.compress(data, mtime=0)


@lru_cache
def bomb(megabytes: int) -> bytes:
    """A gzip body of that many megabytes of blanks."""
    packer = zlib.compressobj(9, wbits=31)
    block = b" " * 1_000_000
    return b"".join([*(packer.compress(block) for _ in range(megabytes)), packer.flush()])


Script = Callable[[Asked], Iterator[Step]]
Piece = Step | Callable[[Asked], Step | Iterable[Step]]


def steps(*pieces: Piece) -> Script:
    """A script of these steps, or of what these functions of the request give."""

    def script(asked: Asked) -> Iterator[Step]:
        for piece in pieces:
            value = piece(asked) if callable(piece) else piece
            if isinstance(value, (bytes, float, int, End)):
                yield value
            else:
                yield from value

    return script


def streamed(*pieces: Piece, ends: bool = True, media: str = "text/event-stream") -> Script:
    """A script that sends each piece as a chunk of a 200, and the end of the body if it `ends`."""
    inner = steps(*pieces)

    def script(asked: Asked) -> Iterator[Step]:
        yield head(
            "200 OK", f"Content-Type: {media}", "X-Request-Id: req_1", "Transfer-Encoding: chunked"
        )
        for step in inner(asked):
            yield chunk(step) if isinstance(step, bytes) and step else step
        if ends:
            yield LAST

    return script


def answers(
    body: Any, status: str = "200 OK", *headers: str, media: str = "application/json"
) -> Script:
    """A script that sends a whole body: bytes, a value as JSON, or a function of the request."""

    def script(asked: Asked) -> Iterator[Step]:
        value = body(asked) if callable(body) else body
        data = value if isinstance(value, bytes) else encoded(value)
        framing = f"Content-Length: {len(data)}"
        given = [f"Content-Type: {media}"] if media else []
        yield head(status, *given, "X-Request-Id: req_1", *headers, framing) + data

    return script


def forever(data: bytes, pause: float = 0.0) -> Iterator[Step]:
    """The same bytes without end."""
    while True:
        yield data
        if pause:
            yield pause


def dripped(data: bytes, pause: float = 0.02) -> Iterator[Step]:
    """One byte at a time, then silence."""
    for index in range(len(data)):
        yield data[index : index + 1]
        yield pause
    yield HOLD


def edited(change: Callable[[Any], Any]) -> Callable[[Asked], Any]:
    """The right body with one change: `change` gets it parsed and returns what is sent."""
    return lambda asked: change(json.loads(whole(asked)))


def merged(**fields: Any) -> Callable[[Asked], Any]:
    """The right body with these fields set."""
    return edited(lambda body: {**body, **fields})


def choice(**fields: Any) -> Callable[[Asked], Any]:
    """The right body with these fields of its first choice set."""
    return edited(lambda body: {**body, "choices": [{**body["choices"][0], **fields}]})


def message(**fields: Any) -> Callable[[Asked], Any]:
    """The right body with these fields of its first message set."""

    def change(body: Any) -> Any:
        first = body["choices"][0]
        return {**body, "choices": [{**first, "message": {**first["message"], **fields}}]}

    return edited(change)


def data(value: Any, name: str = "") -> bytes:
    """A server-sent event."""
    text = value if isinstance(value, bytes) else encoded(value)
    return (b"event: %b\n" % name.encode() if name else b"") + b"data: %b\n\n" % text


def delta(**fields: Any) -> bytes:
    """A chunk of a chat completion with this delta."""
    return chat_chunk({"index": 0, "delta": fields, "finish_reason": None})


def chat_chunk(first_choice: Any, **fields: Any) -> bytes:
    envelope = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "model": "stand-in"}
    return data({**envelope, "choices": [first_choice], **fields})


def event(kind: str, **fields: Any) -> bytes:
    """An event of a messages stream."""
    return data({"type": kind, **fields}, kind)


# The outcome's text is the right answer to the question, or some of its beginning.
RIGHT = "the right text"
PART = "part of the text"


@dataclass(frozen=True)
class Outcome:
    """What a call comes to.

    Attributes:
        error: class name of the error, `None` for an answer.
        text: of an answer its text; of a stream's error the text in `.partial`, `""` if none came.
        clock: of an `LLMTimeoutError`, which clock.
        status: of an `LLMAPIError`, its `status_code`.
        retriable: of an error, whether a retry is made and succeeds (of a stream: before its first event).
        wait: of an error, its `suggested_wait` in seconds.
        says: words in the error's message.
        tools: tool calls in the answer, or in `.partial`.
        slow: a retry would have to wait too long, so that none is made.
    """

    error: str | None = None
    text: str = RIGHT
    clock: str | None = None
    status: int | None = None
    retriable: bool = False
    wait: float | None = None
    says: str = ""
    tools: int = 0
    slow: bool = False

    @property
    def retried(self) -> bool:
        """Whether the client tries again by itself."""
        return self.retriable and not self.text and not self.slow


ANSWER = Outcome()


def fails(error: str, status: int | None = None, *, text: str = "", **facts: Any) -> Outcome:
    """The outcome is an error."""
    return Outcome(error, text=text, status=status, **facts)


def both(outcome: Outcome) -> tuple[Outcome, Outcome]:
    """The same for a call and for a stream."""
    return outcome, outcome


def said(text: str, **facts: Any) -> Outcome:
    """The outcome is an answer with this text."""
    return Outcome(text=text, **facts)


TIMEOUT = fails("LLMTimeoutError", clock="timeout", retriable=True)
IDLE = fails("LLMTimeoutError", clock="idle", retriable=True)
IDLE_LATER = fails("LLMTimeoutError", clock="idle", retriable=True, text=PART)
CONNECT = fails("LLMTimeoutError", clock="connect", retriable=True)
BROKEN = fails("LLMConnectionError", retriable=True)
UNTRUSTED = fails("LLMConnectionError", says="verify")
CUT_EMPTY = fails("LLMStreamError", retriable=True)
CUT = fails("LLMStreamError", retriable=True, text=PART)
WRONG = fails("LLMResponseError", 200)
WRONG_LATER = fails("LLMResponseError", 200, text=PART)

BOTH = ("chat", "messages")
CHAT_ONLY = ("chat",)
MESSAGES_ONLY = ("messages",)


@dataclass(frozen=True)
class Fault:
    """A row: a way in which a server misbehaves, and what a call comes to.

    Attributes:
        name: what `FaultServer.url` takes.
        says: the fault in a line.
        script: what the server does.
        outcome: of a call that is not streamed; `None`: the fault is one of streams only.
        streamed: of a stream; `None`: the fault is not one of streams.
        dialects: `chat` and `messages`, or one of them.
        group: under which heading it stands.
        stage: where it happens: at a `request`; at a `connection` before one; at a `port` that has
            no server behind it (`refused`) or one that is too busy to accept (`backlog`).
        tls: whether the address is https; `certificate` says whether the server has one then, and
            which: `good`, `expired` or `other-host`.
        trusted: the client trusts the certificate's authority.
        settings: settings of the client that bring the fault to light.
        requests: requests that reach the server in one attempt.
        question_bytes: size of the question that is needed for it, in bytes.
        tools: the right answer is a tool call.
        pause: seconds to wait before the next call on the same client, so that what the server
            sends late has come.
    """

    name: str
    says: str
    script: Script
    outcome: Outcome | None = ANSWER
    streamed: Outcome | None = ANSWER
    dialects: tuple[str, ...] = BOTH
    group: str = ""
    stage: str = "request"
    tls: bool = False
    certificate: str | None = None
    trusted: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)
    requests: int = 1
    question_bytes: int = 0
    tools: bool = False
    pause: float = 0.0
