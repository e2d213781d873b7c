"""`record` and `replay`: what was said to a model's host and what it answered, in a file of JSON lines.

It stands where the transport hands a request to the network, before the credential is put in: so the
clocks, the decoders, the retries and the errors of a replayed call are those of a real one.

A line is one exchange: one attempt of a call. It holds the request's method, URL and body, and of the
answer the status, the headers that mean something to a client, and the body; of a stream its pieces,
each with the seconds since the one before.
"""

from __future__ import annotations

import base64
import binascii
import codecs
import difflib
import json
import os
import re
import threading
import zlib
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from http.client import IncompleteRead
from itertools import accumulate
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit, urlunsplit

from pydantic import SecretStr

from LLM.clock import Clock
from LLM.errors import (
    LLMCancelledError,
    LLMConfigError,
    LLMConnectionError,
    LLMError,
    LLMResponseError,
    LLMTimeoutError,
)
from LLM.forks import renew_after_fork
from LLM.providers.base import Call, WireRequest, clean
from LLM.providers.base import redact as without_key
from LLM.transport import Exchange, Transport, _Body, _decoder, is_loopback, translate

__all__ = [
    "CassetteError",
    "CassetteMiss",
    "Player",
    "Recorded",
    "Recorder",
    "record",
    "replay",
    "use_cassette",
]

# What a client acts on or shows (`date` is what the date in a `retry-after` is compared with). The rest
# is cookies and the names of proxies.
_HEADERS = re.compile(
    r"content-type|date|(x-)?request-id|retry-after(-ms)?|x-should-retry|location"
    r"|(x-ratelimit|anthropic-ratelimit)-.*"
)

# How long a replayed wait goes on before it looks whether it was cancelled, in seconds.
_LOOK = 0.1

_DIFF_LINES = 60

Redact = Callable[[str], str]
Fetch = Callable[[WireRequest, Exchange, Call], Any]


class CassetteError(ValueError):
    """The file is missing, torn, or no recording; says which line."""


class CassetteMiss(AssertionError):
    """A request that is not in the recording.

    Not an `LLMError`, which programs retry and forgive: the test is wrong, not the model's host. As an
    `AssertionError` it is shown by every test runner as a failure of the test.
    """


@dataclass(frozen=True)
class Recorded:
    """An exchange in the file.

    Attributes:
        line: its line in the file, from 1.
        method: of the request.
        url: of the request.
        body: of the request: parsed JSON, a text if it is none, or `None`.
    """

    line: int
    method: str
    url: str
    body: Any
    response: Mapping[str, Any] | None = field(repr=False)
    error: Mapping[str, Any] | None = field(repr=False)
    order: int = field(repr=False)

    @classmethod
    def parse(cls, line: int, data: bytes) -> Recorded:
        """Raises `ValueError`, `TypeError` or `KeyError` if it is no exchange."""
        value = json.loads(data)
        request, response, error = value["request"], value.get("response"), value.get("error")
        if response is not None:
            _pieces(response)
            if not isinstance(response["status"], int) or not isinstance(response["headers"], dict):
                raise TypeError
            float(response.get("seconds", 0))
        elif not isinstance(error["message"], str):
            raise TypeError
        method, url = request["method"], request["url"]
        if not isinstance(method, str) or not isinstance(url, str):
            raise TypeError
        order = int(value.get("number", line))
        return cls(line, method, url, request.get("body"), response, error, order)


class _Cassette:
    """In the place of the network from `__enter__` to `__exit__`, for every client of the process."""

    def __init__(self, path: str | os.PathLike[str], redact: Redact | None) -> None:
        self.path = Path(path).absolute()  # the program may change its folder
        self.misses: list[str] = []
        self._redact = redact
        self.after_fork()
        renew_after_fork(self)

    def after_fork(self) -> None:
        self._lock = threading.Lock()

    def _insert(self) -> None:
        Transport.tapes = (*Transport.tapes, self)

    def _eject(self) -> None:
        Transport.tapes = tuple(tape for tape in Transport.tapes if tape is not self)

    def _describe(self, request: WireRequest, key: SecretStr | None) -> dict[str, Any]:
        """A request as it is written: without its headers and whatever is secret."""
        redactor = _Redactor(key, self._redact)
        body: Any = None
        if request.body is not None:
            text = "".join(redactor.body([request.body.decode("utf-8", "replace")]))
            body = _parsed(text, otherwise=text)
        return {"method": request.method, "url": redactor.url(request.url), "body": body}


class Recorder(_Cassette):
    """What `record` gives; `with` it, every exchange of every client is written to the file.

    Attributes:
        path: the file.
        count: exchanges written so far.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, redact: Callable[[str], str] | None = None
    ) -> None:
        super().__init__(path, redact)
        self.count = 0
        self._started = 0
        self._open: dict[_Tap, None] = {}

    def __enter__(self) -> Recorder:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_bytes(b"")
        self.count = self._started = 0
        self._insert()
        return self

    def __exit__(self, *_: object) -> None:
        self._eject()
        for tap in list(self._open):  # of streams that go on: what came so far
            tap.end()

    def answer(
        self, request: WireRequest, exchange: Exchange, call: Call, clock: Clock, fetch: Fetch
    ) -> Any:
        """The network's answer; written when it is over."""
        with self._lock:
            self._started += 1
            number = self._started
        begun = clock.now()
        entry = {"number": number, "request": self._describe(request, request.key)}
        try:
            raw = fetch(request, exchange, call)
        except (
            LLMConfigError,
            LLMCancelledError,
        ):  # nothing was sent, or it is the caller's own doing
            raise
        except LLMError as error:
            redactor = _Redactor(request.key, self._redact)
            failure = {
                "type": type(error).__name__,
                "message": redactor.text(str(error)),
                "retriable": error.retriable,
                "seconds": round(clock.now() - begun, 4),
            }
            if isinstance(error, LLMTimeoutError):
                failure["clock"] = error.clock
            self.write({**entry, "error": failure})
            raise
        tap = _Tap(self, raw, entry, request, exchange, call, clock, begun)
        self._open[tap] = None
        return tap

    def write(self, entry: Mapping[str, Any], tap: _Tap | None = None) -> None:
        """One more line, at once: what is written survives whatever comes next."""
        line = _dumps(entry) + b"\n"
        with self._lock, self.path.open("ab") as file:
            file.write(line)
            self.count += 1
        if tap is not None:
            self._open.pop(tap, None)

    def redactor(self, key: SecretStr | None) -> _Redactor:
        return _Redactor(key, self._redact)


class _Tap:
    """A response on its way to the client: what is read of it is kept until it is over."""

    closed = True  # what there is to close is closed by `release_conn`

    def __init__(
        self,
        recorder: Recorder,
        raw: Any,
        entry: Mapping[str, Any],
        request: WireRequest,
        exchange: Exchange,
        call: Call,
        clock: Clock,
        begun: float,
    ) -> None:
        self.status: int = raw.status
        # The first of each, as the transport takes them.
        self.headers: dict[str, str] = {}
        for name, value in raw.headers.items():
            self.headers.setdefault(name.lower(), value)
        self._body = _Body(raw)
        self._recorder, self._entry = recorder, entry
        self._request, self._exchange, self._call = request, exchange, call
        self._clock, self._last = clock, begun
        self._pieces: list[tuple[float, bytes]] = []
        self._whole = False
        self._broken: dict[str, Any] | None = None
        self._refused = ""  # a header for which the client would not read the body
        self._over = False

    def read(self, size: int = -1, *, decode_content: bool | None = None) -> bytes:  # noqa: ARG002 - urllib3's form
        """What has come, or, if asked as for a body of known length, all of it."""
        try:
            data = self._body.read_whole() if decode_content is False else self._body.read()
        except Exception as error:
            self._broke(error)
            raise
        now = self._clock.now()
        if self._exchange.stopped:
            self._broke(OSError("stopped"))
        elif data:
            self._pieces.append((now - self._last, data))
        self._last = now
        self._whole = self._whole or not data or decode_content is False
        return data

    def _broke(self, error: Exception) -> None:
        failure = translate(error, self._exchange, self._request, None)
        if isinstance(failure, LLMCancelledError):
            return  # the reader left
        cause = failure.__cause__
        said = "cut short" if isinstance(error, IncompleteRead) or cause is None else str(cause)
        self._broken = {"message": said, "seconds": round(self._clock.now() - self._last, 4)}
        if isinstance(failure, LLMTimeoutError):
            self._broken["clock"] = failure.clock

    def close(self) -> None:
        """Nothing yet: see `release_conn`."""

    def release_conn(self) -> None:
        """The client is done with it."""
        self._body.close()
        self.end()

    def end(self) -> None:
        """Write it, the first time."""
        if self._over:
            return
        self._over = True
        self._recorder.write({**self._entry, "response": self._response()}, self)

    def _response(self) -> dict[str, Any]:
        redactor = self._recorder.redactor(self._request.key)
        times = [seconds for seconds, _ in self._pieces]
        texts = redactor.body(_texts(self._decoded()))
        headers = {
            name: redactor.text(value)
            for name, value in self.headers.items()
            if _HEADERS.fullmatch(name) or name == self._refused
        }
        response: dict[str, Any] = {"status": self.status, "headers": headers}
        if self._call.stream and self.status < 300:
            response["pieces"] = [
                [round(seconds, 4), _written(text)]
                for seconds, text in zip(times, texts, strict=True)
            ]
        else:
            response["seconds"] = round(sum(times), 4)
            response["body"] = _written("".join(texts))
        if self._broken is not None:
            response["broken"] = {**self._broken, "message": redactor.text(self._broken["message"])}
        elif not self._whole and self.status < 300:  # of an error, only so much is read
            response["left"] = True
        return response

    def _decoded(self) -> list[bytes]:
        """The pieces, unpacked: a key in what is packed could not be seen."""
        try:
            decode = _decoder(self.headers, self._call.max_response_bytes, self._request)
        except LLMError:
            # An encoding that nobody knows: the client refuses it unread.
            self._refused = "content-encoding"
            return [b"" for _ in self._pieces]
        if not self._pieces and not self._whole:
            self._refused = "content-length"  # it may have been too long, and so be refused again
        if decode is None:
            return [data for _, data in self._pieces]
        unpacked: list[bytes] = []
        try:
            unpacked.extend(decode.feed(data) for _, data in self._pieces)
            if self._whole:
                decode.finish()
        except (LLMError, IncompleteRead, zlib.error) as error:
            self._broken = {"message": clean(str(error))[:200] or "cut short", "seconds": 0}
            if isinstance(error, LLMResponseError):
                self._broken["too_large"] = True
        return unpacked + [b""] * (len(self._pieces) - len(unpacked))


class Player(_Cassette):
    """What `replay` gives; `with` it, every client is answered from the file, and from nothing else.

    Attributes:
        path: the file.
        misses: what was asked for in vain, as told by `CassetteMiss`.
        unused: the recordings that nobody has asked for; `assert not cassette.unused`.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        speed: float | None = None,
        ignore_host: bool = False,
        redact: Callable[[str], str] | None = None,
    ) -> None:
        if speed is not None and not 0 < speed < float("inf"):
            raise ValueError("speed must be a number above 0 (1: as recorded), or None: no waits")
        super().__init__(path, redact)
        self.speed = speed
        self._ignore_host = ignore_host
        self._recordings = _load(self.path)
        self._rewind()

    def _rewind(self) -> None:
        self._unused = {recorded.line: recorded for recorded in self._recordings}
        self._left: dict[str, list[Recorded]] = {}
        for recorded in reversed(self._recordings):  # so that the first is popped first
            key = self._key(recorded.method, recorded.url, recorded.body)
            self._left.setdefault(key, []).append(recorded)

    @property
    def unused(self) -> list[Recorded]:
        with self._lock:
            return list(self._unused.values())

    def __enter__(self) -> Player:
        self._rewind()
        self.misses.clear()
        self._insert()
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        self._eject()
        # A thread, or an `except Exception` of the program's, may have swallowed it.
        if self.misses and error is None:
            raise CassetteMiss(self.misses[0])

    def answer(
        self, request: WireRequest, exchange: Exchange, call: Call, clock: Clock, _fetch: Fetch
    ) -> Any:
        """The recorded answer to this request."""
        recorded = self._take(request)
        played = _Played(recorded, self, exchange, clock)
        exchange.answered = recorded.response is not None
        if recorded.error is None:
            return played
        try:
            played.fail(recorded.error)
        except LLMError:  # which is an OSError, too
            raise
        except OSError as error:
            raise translate(error, exchange, request, call.connect_timeout) from None

    def miss(self, what: str) -> None:
        """Remember that the recording does not hold what was asked for."""
        with self._lock:
            self.misses.append(what)

    def _take(self, request: WireRequest) -> Recorded:
        asked = self._describe(request, request.key)
        # Where the key is another than the one recorded with, it may be an innocent word of the prompt.
        for described in (asked, self._describe(request, None)):
            key = self._key(**described)
            with self._lock:
                left = self._left.get(key)
                if left:
                    recorded = left.pop()
                    del self._unused[recorded.line]
                    return recorded
        told = self._told(asked)
        self.miss(told)
        raise CassetteMiss(told)

    def _key(self, method: str, url: str, body: Any) -> str:
        return f"{method} {self._place(url)}\n{_canonical(body)}"

    def _place(self, url: str) -> str:
        """What of a URL counts."""
        parts = urlsplit(url)
        path = urlunsplit(("", "", parts.path, parts.query, ""))
        if self._ignore_host:
            return path
        # Which port of this machine a server got is chance.
        host = "localhost" if is_loopback(parts.hostname or "") else parts.netloc
        return f"{host}{path}"

    def _told(self, asked: Mapping[str, Any]) -> str:
        place = f"{asked['method']} {asked['url']}"
        if not self._recordings:
            return f"{self.path} is empty: nothing matches {place}"
        key = self._key(**asked)
        same = [r for r in self._recordings if self._key(r.method, r.url, r.body) == key]
        if same:
            lines = ", ".join(str(recorded.line) for recorded in same)
            return (
                f"{self.path}: {place} was asked once more than it is recorded (line {lines}); "
                "each recording answers once"
            )
        wanted = self._pretty(**asked)
        unused = {recorded.line for recorded in self.unused}
        nearest, its = max(
            ((r, self._pretty(r.method, r.url, r.body)) for r in self._recordings),
            key=lambda pair: (_likeness(wanted, pair[1]), pair[0].line in unused),
        )
        used = "" if nearest.line in unused else ", used already"
        diff = list(
            difflib.unified_diff(
                its, wanted, f"line {nearest.line}{used}", "asked", lineterm="", n=2
            )
        )
        if len(diff) > _DIFF_LINES:
            diff[_DIFF_LINES:] = [f"… and {len(diff) - _DIFF_LINES} lines more"]
        told = "\n".join(diff)
        return (
            f"no recording in {self.path} matches {place}\n"
            f"The nearest is line {nearest.line}{used}:\n{told}\n"
            "If the request is as it should be, record anew."
        )

    def _pretty(self, method: str, url: str, body: Any) -> list[str]:
        text = body
        if not isinstance(body, str):
            text = json.dumps(body, indent=2, sort_keys=True, ensure_ascii=False)
        return [clean(f"{method} {self._place(url)}"), *text.split("\n")]


class _Played:
    """A response out of the file."""

    closed = True  # there is no connection

    def __init__(
        self, recorded: Recorded, player: Player, exchange: Exchange, clock: Clock
    ) -> None:
        self._response: Mapping[str, Any] = recorded.response or {}
        self._pieces: Iterator[tuple[float, bytes]] = iter(())
        if recorded.response is not None:
            self.status: int = recorded.response["status"]
            self.headers: dict[str, str] = dict(recorded.response["headers"])
            self._pieces = iter(_pieces(recorded.response))
        self._place = f"{player.path}, line {recorded.line}"
        self._player, self._exchange, self._clock = player, exchange, clock
        # Time may pass only in the `sleep` of the client's clock; the exchange's limits are real time.
        self._real = Clock()
        self._ahead = clock.now() - self._real.now()

    def read(self, size: int = -1, *, decode_content: bool | None = None) -> bytes:  # noqa: ARG002 - urllib3's form
        """The next piece, after its time; b"" at the end."""
        seconds, data = next(self._pieces, (0.0, b""))
        self._wait(seconds)
        if data:
            return data
        broken = self._response.get("broken")
        if broken is not None:
            self._wait(float(broken.get("seconds", 0)))
            self._stop(broken)
            if broken.get("too_large"):
                raise LLMResponseError(broken["message"])
            raise ConnectionError(broken["message"])
        if self._response.get("left"):
            told = f"{self._place}: the recording ends here, because its reader left; record anew"
            self._player.miss(told)
            raise ConnectionError(told)
        return b""

    def close(self) -> None:
        """Nothing to close."""

    def release_conn(self) -> None:
        """Nothing to give back."""

    def fail(self, failure: Mapping[str, Any]) -> NoReturn:
        """There was no answer."""
        self._wait(float(failure.get("seconds", 0)))
        retriable = bool(failure.get("retriable", True))
        if failure.get("type") == "LLMTimeoutError":
            clock = str(failure.get("clock", "timeout"))
            raise LLMTimeoutError(failure["message"], clock=clock, retriable=retriable)
        raise LLMConnectionError(failure["message"], retriable=retriable)

    def _stop(self, broken: Mapping[str, Any]) -> None:
        clock = broken.get("clock")
        if clock in ("timeout", "idle", "deadline"):
            self._exchange.stop(clock)
            raise OSError("stopped")

    def _wait(self, seconds: float) -> None:
        """Let recorded time pass, at the player's speed, under the exchange's clocks."""
        clock, exchange = self._clock, self._exchange
        whole = left = seconds / (self._player.speed or float("inf"))
        begun, real = clock.now(), self._real.now()
        while left > 0 and not exchange.stopped:
            passed = whole - left
            due = exchange.due - real - passed
            deadline = exchange.deadline_at - (begun - self._ahead) - passed
            if min(due, deadline) <= 0:
                exchange.stop(exchange.clock if due <= 0 else "deadline")
                break
            step = min(left, due, deadline, _LOOK)
            clock.sleep(step)
            # Of a clock that stands still, what was slept counts.
            left = min(left - step, begun + whole - clock.now())
        if exchange.stopped:
            raise OSError("stopped")


class _Redactor:
    """Takes secrets out of what is written: the key of the request, and what the user's function does."""

    def __init__(self, key: SecretStr | None, function: Redact | None) -> None:
        self._key, self._function = key, function

    def text(self, text: str) -> str:
        text = without_key(text, self._key)
        return text if self._function is None else self._function(text)

    def url(self, url: str) -> str:
        """Without a password, too."""
        parts = urlsplit(self.text(url))
        return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))

    def body(self, pieces: Sequence[str]) -> list[str]:
        """The pieces of a body, also where a secret goes across them, or across the events in them."""
        # At last what stands in no string of JSON. Not first: it would tear what is escaped.
        return _rewritten(self._told(pieces), lambda text: without_key(text, self._key))

    def _told(self, pieces: Sequence[str]) -> Sequence[str]:
        text = "".join(pieces)
        value = _parsed(text)
        if isinstance(value, (dict, list)):
            if self._strings([value])[0]:
                return [*("" for _ in pieces[1:]), _dumps(value).decode()]
            return pieces
        if not re.search(r"^data:", text, re.MULTILINE):
            return _rewritten(pieces, self.text)
        lines = re.split(r"(?<=\n)|(?<=\r)(?!\n)", text)
        bare = [line.rstrip("\r\n") for line in lines]
        values = [_parsed(line[5:]) if line.startswith("data:") else None for line in bare]
        known = {n: value for n, value in enumerate(values) if isinstance(value, (dict, list))}
        changed = self._strings(list(known.values()))
        told = [line if index in known else self.text(line) for index, line in enumerate(bare)]
        for index, different in zip(known, changed, strict=True):
            if different:
                told[index] = f"data: {_dumps(known[index]).decode()}"
        if told == bare:
            return pieces
        # Each line comes with the piece that its end came with.
        ends = list(accumulate(map(len, pieces)))
        gathered: list[list[str]] = [[] for _ in pieces]
        for end, line, old, new in zip(accumulate(map(len, lines)), lines, bare, told, strict=True):
            gathered[bisect_left(ends, end)].append(new + line[len(old) :])
        return ["".join(lines) for lines in gathered]

    def _strings(self, values: Sequence[Any]) -> list[bool]:
        """Redact, in place, the strings in some JSON values; which values were changed.

        Strings that stand at the same place of successive values are one text: the pieces of an answer.
        """
        places: dict[tuple[Any, ...], list[tuple[int, Any, Any]]] = {}
        for number, value in enumerate(values):
            for place, holder, key in _string_places(value):
                places.setdefault(place, []).append((number, holder, key))
        changed = [False] * len(values)
        for found in places.values():
            old = [holder[key] for _, holder, key in found]
            for (number, holder, key), before, after in zip(
                found, old, _rewritten(old, self.text), strict=True
            ):
                if before != after:
                    holder[key] = after
                    changed[number] = True
        return changed


def _string_places(value: Any) -> Iterator[tuple[tuple[Any, ...], Any, Any]]:
    """Each string in a JSON value: its place, and what holds it under which key."""
    rest: list[tuple[tuple[Any, ...], Any]] = [((), value)]
    while rest:
        place, holder = rest.pop()
        if isinstance(holder, dict):
            # Choices, tool calls and content blocks are told apart by it, not by their position.
            place = (*place, holder.get("index") if isinstance(holder.get("index"), int) else None)
            items: Any = holder.items()
        else:
            items = enumerate(holder)
        for key, inner in items:
            if isinstance(inner, str):
                yield (*place, key), holder, key
            elif isinstance(inner, (dict, list)):
                rest.append(((*place, key), inner))


def _rewritten(parts: Sequence[str], rewrite: Redact) -> list[str]:
    """Parts of one text, with the text rewritten; what goes across parts is put where it begins."""
    parts = [rewrite(part) for part in parts]
    whole = "".join(parts)
    told = rewrite(whole)
    if told == whole:
        return parts
    start = _common(whole, told)
    tail = _common(whole[start:][::-1], told[start:][::-1])
    stop, middle = len(whole) - tail, told[start : len(told) - tail]
    result: list[str] = []
    begin = 0
    for part in parts:
        end = begin + len(part)
        here, middle = (middle, "") if end > start else ("", middle)
        result.append(part[: max(0, start - begin)] + here + part[max(0, stop - begin) :])
        begin = end
    result[-1] += middle
    return result


def _common(one: str, other: str) -> int:
    """How many letters they begin with alike."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))


def _texts(pieces: Sequence[bytes]) -> list[str]:
    """Bytes as text. A character that is cut comes with its end; what is no UTF-8 becomes surrogates."""
    decode = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode
    last = len(pieces) - 1
    return [decode(data, index == last) for index, data in enumerate(pieces)]


def _written(text: str) -> Any:
    """A piece of a body as it stands in the file."""
    try:
        text.encode()
    except UnicodeEncodeError:
        data = text.encode("utf-8", "surrogateescape")
        return {"base64": base64.b64encode(data).decode()}
    return text


def _read_back(written: Any) -> bytes:
    if isinstance(written, str):
        return written.encode()
    return base64.b64decode(written["base64"], validate=True)


def _pieces(response: Mapping[str, Any]) -> list[tuple[float, bytes]]:
    """The body that came, with the seconds before each piece; raises what is raised by a wrong form."""
    if "pieces" not in response:
        return [(float(response.get("seconds", 0)), _read_back(response["body"]))]
    pieces = [(float(seconds), _read_back(written)) for seconds, written in response["pieces"]]
    # An empty one would be the end; its time belongs to the next.
    kept, waited = [], 0.0
    for seconds, data in pieces:
        waited += seconds
        if data:
            kept.append((waited, data))
            waited = 0.0
    return kept


def _load(path: Path) -> list[Recorded]:
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        raise CassetteError(f"there is no recording {path}; make it with record()") from None
    recordings = []
    for line, data in enumerate(lines, 1):
        if not data.strip():
            continue
        try:
            recordings.append(Recorded.parse(line, data))
        except (
            ValueError,
            TypeError,
            KeyError,
            AttributeError,
            RecursionError,
            binascii.Error,
        ) as error:
            torn = isinstance(error, json.JSONDecodeError)
            what = "not JSON; it may have been cut" if torn else "not a recorded exchange"
            raise CassetteError(f"{path}, line {line}: {what}") from None
    return sorted(recordings, key=lambda recorded: recorded.order)


def _number(digits: str) -> int | float:
    """`1.0` is `1`: which of them a number becomes is the serializer's affair."""
    number = float(digits)
    return int(number) if number.is_integer() and abs(number) < 2**53 else number


def _parsed(text: str, otherwise: Any = None) -> Any:
    with suppress(ValueError, RecursionError):
        return json.loads(text)
    return otherwise


def _dumps(value: Any) -> bytes:
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    try:
        return text.encode()
    except UnicodeEncodeError:  # half a surrogate pair
        return json.dumps(value, separators=(",", ":")).encode()


def _canonical(body: Any) -> str:
    plain = json.loads(json.dumps(body), parse_float=_number)
    return json.dumps(plain, sort_keys=True)


def _likeness(one: list[str], other: list[str]) -> tuple[float, float]:
    """By lines, then by letters: a prompt is one line."""
    lines = difflib.SequenceMatcher(None, one, other, autojunk=False).ratio()
    letters = difflib.SequenceMatcher(None, "\n".join(one)[:5000], "\n".join(other)[:5000])
    return lines, letters.quick_ratio()


def record(path: str | os.PathLike[str], *, redact: Callable[[str], str] | None = None) -> Recorder:
    """Write down what every client says inside the `with` block, and what it is answered.

    The file is begun anew. Credentials are never in it: they are put in after this, request headers
    are not written, and where a body repeats the key it becomes `***`.

    Args:
        path: the file; its folder is made.
        redact: what else must not be written: a function from text to text, called with every string
            in the bodies. Give `replay` the same one. It must leave its own result as it is.

    Returns:
        A `Recorder`, to be used with `with`. It is for the whole process, all its threads.
    """
    return Recorder(path, redact=redact)


def replay(
    path: str | os.PathLike[str],
    *,
    speed: float | None = None,
    ignore_host: bool = False,
    redact: Callable[[str], str] | None = None,
) -> Player:
    """Answer every client inside the `with` block from a recording, and from nothing else.

    A request gets the answer to a recorded one with the same method, host, path and body, whatever
    the order of the keys in it; the same request again gets the next such answer. All ports of this
    machine count as one host.

    Args:
        path: the file that `record` wrote.
        speed: 1: answers and pieces of streams take as long as they took, 2: half as long; the
            client's own clock sleeps. `None`: no time.
        ignore_host: whether another host will do.
        redact: the function that was given to `record`.

    Returns:
        A `Player`, to be used with `with`. It is for the whole process, all its threads.

    Raises:
        CassetteError: there is no such file, or it is torn or foreign.
        CassetteMiss: in the call: its request is not recorded; shows the nearest one that is. At the
            end of the block once more, if it was swallowed on its way.
    """
    return Player(path, speed=speed, ignore_host=ignore_host, redact=redact)


def use_cassette(
    path: str | os.PathLike[str],
    *,
    mode: str = "once",
    speed: float | None = None,
    ignore_host: bool = False,
    redact: Callable[[str], str] | None = None,
) -> Recorder | Player:
    """`replay` if there is a recording, else `record`.

    Args:
        mode: `"once"`, as said; `"record"` or `"replay"`: the one or the other in any case.

    Returns:
        What the one or the other does; the other arguments are theirs.
    """
    if mode not in ("once", "record", "replay"):
        raise ValueError(f"mode is {mode!r}; it must be 'once', 'record' or 'replay'")
    if mode == "record" or (mode == "once" and not Path(path).exists()):
        return record(path, redact=redact)
    return replay(path, speed=speed, ignore_host=ignore_host, redact=redact)
