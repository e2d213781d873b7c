"""Stream: iterate, accumulate, close. What a server says piece by piece, and one response at the end."""

from __future__ import annotations

import os
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from decimal import Decimal
from typing import Any, Protocol

from LLM.clock import Clock
from LLM.errors import (
    Attempt,
    LLMAPIError,
    LLMCancelledError,
    LLMConnectionError,
    LLMError,
    LLMResponseError,
    LLMStreamError,
)
from LLM.providers import base
from LLM.providers.base import Call, EventDecoder, Provider, WireResponse
from LLM.reaper import REAPER
from LLM.sse import EventTooLargeError, SSEDecoder
from LLM.types import (
    Answer,
    CallInfo,
    ChatCompletionResponse,
    Ending,
    EventType,
    StreamEvent,
    TokenUsage,
)

# Seconds that a stream which has given its finish reason waits for more (usage, the end marker): some
# servers send neither and do not close.
_AFTERWORD = 5.0


class ByteStream(Protocol):
    """What a stream reads from; the transport makes it."""

    status: int
    headers: dict[str, str]

    def expect(self, seconds: float | None = None) -> None: ...
    def rest(self) -> None: ...
    def read(self) -> bytes: ...
    def finish(self) -> None: ...
    def cancel(self) -> None: ...
    def close(self) -> None: ...


class _Source:
    """The wire, the decoders and who wants to know of the end; outlives an abandoned `Stream`."""

    def __init__(self, wire: ByteStream, provider: Provider, call: Call) -> None:
        self.wire = wire
        self.provider = provider
        self.call = call
        self.decoder: EventDecoder = provider.decoder(call)
        self.callbacks: list[Callable[[Ending], None]] = []
        self.complete = False
        self.over = False
        self._process = os.getpid()
        self._answer: Answer | None = None

    def end(self, error: LLMError | None = None) -> None:
        """Close, and tell those who wait for the end; only the first time does anything.

        The error is not kept: its traceback holds the `Stream`, which would then never be let go.
        """
        if self.over:
            return
        self.over = True
        if self._process != os.getpid():
            return  # a forked child forgets it; the parent still reads from the same socket
        self.wire.close()
        callbacks, self.callbacks = self.callbacks, []
        if not callbacks:
            return
        ending = self.ending(error)
        for callback in callbacks:
            callback(ending)

    def ending(self, error: LLMError | None) -> Ending:
        usage = None
        with suppress(*base.MALFORMED):
            usage = self.decoder.usage
        return Ending(usage, self.complete, error, self.answer)

    def answer(self) -> Answer | None:
        """What came so far, folded into a response; `None` if nothing did."""
        if not self.over or self._answer is None:
            self._answer = None
            with suppress(*base.MALFORMED):
                self._answer = self.decoder.response()
        return self._answer


class Stream:
    """A streamed answer: an iterator of `StreamEvent`, and a context manager.

    It ends after `MESSAGE_COMPLETE`. A stream that breaks or is cut raises an `LLMError` whose
    `.partial` holds what came; with `on_error="event"` it ends with an `ERROR` event instead.

    One thread iterates; any thread may `cancel()`. Left half-read, it is closed by `close()`, by the
    end of its `with` block, or when nobody holds it any more.

    Attributes:
        time_to_first_token: seconds from the call to its first event, waits and failed attempts
            included; `None` if none came.
        error: what the stream failed with, raised or handed over as an event; `None` so far.
    """

    def __init__(
        self, source: _Source | None, *, info: CallInfo, started: float, clock: Clock
    ) -> None:
        self._source = source
        self._info = info
        self._started = started
        self._clock = clock
        self._ready: deque[StreamEvent] = deque()
        self._failure: LLMError | None = None
        self._raise = True
        self._begun = False
        self._completed = False
        self._said_all = False
        self._answer: Answer | None = None
        self.time_to_first_token: float | None = None
        self.error: LLMError | None = None
        self.headers: Mapping[str, str] = {}
        self.status = 200
        if source is not None:
            self.headers = source.wire.headers
            self._call = source.call
            self._provider = source.provider
            self._decoder = source.decoder
            self._wire = source.wire
            self.status = source.wire.status
            self._framing = SSEDecoder(source.call.max_response_bytes)
            REAPER.begin()
            self._finalizer = weakref.finalize(self, REAPER.take, source.end)
            self._finalizer.atexit = (
                False  # the process ends it all, and the reaper's thread with it
            )

    @classmethod
    def open(
        cls, wire: ByteStream, provider: Provider, call: Call, *, started: float, clock: Clock
    ) -> Stream:
        """A stream whose first event has come: until then nothing was said, and a retry is possible."""
        target = call.target
        identity = base.request_id(wire.headers)
        info = CallInfo(provider=target.host.name, model=target.model, request_id=identity)
        stream = cls(_Source(wire, provider, call), info=info, started=started, clock=clock)
        try:
            stream._refill()
        except BaseException:
            stream._end_source()
            raise
        if stream._failure is not None and not stream._ready:
            failure, stream._failure = stream._failure, None
            raise failure
        stream.time_to_first_token = clock.now() - started
        return stream

    @classmethod
    def failed(cls, error: LLMError, clock: Clock) -> Stream:
        """A stream that says nothing but its error, as an event."""
        stream = cls(None, info=CallInfo(provider=error.provider), started=clock.now(), clock=clock)
        stream._fail(error)
        stream.raise_errors(False)
        return stream

    @classmethod
    def replay(cls, answer: Answer, *, started: float, clock: Clock) -> Stream:
        """A whole answer said once more, as a stream; its text comes in one piece."""
        stream = cls(None, info=answer.info, started=started, clock=clock)
        stream._answer, stream._completed = answer, True
        stream._ready.extend(_events(answer))
        stream.time_to_first_token = clock.now() - started
        return stream

    def __iter__(self) -> Iterator[StreamEvent]:
        return self

    def __next__(self) -> StreamEvent:
        if not self._ready:
            self._refill()
            if not self._ready:
                return self._end()
        return self._ready.popleft()

    def _end(self) -> StreamEvent:
        failure, self._failure = self._failure, None
        if failure is None:
            raise StopIteration
        if self._source is not None:
            failure.history = self._info.history
        failure.__context__ = None
        if self._raise:
            raise failure.with_traceback(None)  # the frames below hold what the server said
        return StreamEvent(EventType.ERROR, error=failure)

    @property
    def text_stream(self) -> Iterator[str]:
        """The text alone, piece by piece."""
        for event in self:
            if event.text_delta is not None:
                yield event.text_delta
            elif event.error is not None:
                raise event.error

    @property
    def response(self) -> Any:
        """The whole answer as if it had not been streamed; reads the rest of the stream first.

        Of a stream that failed (see `.error`) or was closed, what came of it; `None` if nothing did.
        """
        for _ in self:
            pass
        answer = self._fold()
        if answer is None and self._completed:
            raise self._not_understood(ValueError())
        return answer

    @property
    def usage(self) -> TokenUsage | None:
        """Tokens as far as the server has said; most say it at the end."""
        if self._source is None:
            return getattr(self._answer, "usage", None)
        with suppress(*base.MALFORMED):
            return self._decoder.usage
        return None

    @property
    def info(self) -> CallInfo:
        """All that the client knows of the call, to be read."""
        return self._info

    @property
    def cost(self) -> Decimal | None:
        """US dollars for the usage known so far; 0 from the cache; `None` if unknown."""
        return self._info.cost(self.usage)

    @property
    def cached(self) -> bool:
        """Whether it comes from the cache: nothing was sent and nothing paid."""
        return self._info.cached

    @property
    def fallbacks(self) -> tuple[tuple[str, str], ...]:
        """The models that were tried before this one answered, each with the reason; mostly empty."""
        return self._info.fallbacks

    def as_curl(self) -> str:
        """The request as a command for a shell, the key as a variable."""
        return self._info.as_curl()

    @property
    def provider(self) -> str | None:
        return self._info.provider

    @property
    def request_id(self) -> str | None:
        return self._info.request_id

    @property
    def attempts(self) -> int:
        return len(self._info.history)

    @property
    def history(self) -> tuple[Attempt, ...]:
        return self._info.history

    def close(self) -> None:
        """Stop reading. The connection is kept if the answer was whole, else closed."""
        self._ready.clear()
        self._end_source()

    def cancel(self) -> None:
        """Stop it from another thread: whoever iterates gets `LLMCancelledError`."""
        if self._source is not None:
            self._wire.cancel()

    def when_done(self, callback: Callable[[Ending], None]) -> None:
        """Call back once, when the stream ends, fails or is closed, with what is known by then."""
        if self._source is None:
            callback(Ending(self.usage, self._completed, self.error, lambda: self._answer))
        elif self._source.over:
            callback(self._source.ending(self.error))
        else:
            self._source.callbacks.append(callback)

    def raise_errors(self, yes: bool) -> None:
        """Whether a failure is raised, or handed over as the last event."""
        self._raise = yes

    def __repr__(self) -> str:
        state = "open" if self._source is not None and not self._source.over else "over"
        return f"<Stream from {self._info.provider}, {state}>"

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _refill(self) -> None:
        """Read until there is an event to hand over, or the end."""
        if self._source is None or self._source.over or self._failure is not None:
            return
        try:
            self._wire.expect()
            while not self._ready and self._failure is None and not self._source.over:
                self._read()
            self._wire.rest()
        except LLMError as error:
            self._broken(error)
        except BaseException:
            self._end_source()
            raise

    def _read(self) -> None:
        heard = self._decoder.progress
        data = self._wire.read()
        if not self._begun and data:
            data = self._begin(data)
        try:
            events = self._framing.feed(data) if data else self._framing.finish()
            decoder, ready = self._decoder, self._ready
            for name, payload in events:
                ready += decoder.feed(name, payload)
                if decoder.ended:
                    break
        except EventTooLargeError as error:
            self._fail(LLMResponseError(str(error), **self._origin()))
            return
        except LLMError as error:
            # The last event may be cut itself; that is no fault of what it says.
            cut = not data and type(error) is LLMResponseError
            self._fail(self._cut_short() if cut else error)
            return
        except base.MALFORMED as error:
            self._fail(self._not_understood(error) if data else self._cut_short())
            return
        if self._decoder.ended:
            self._complete()
        elif not data:
            if not self._decoder.complete:
                raise self._cut_short()
            self._complete()
        elif self._decoder.complete and not self._said_all:
            self._said_all = True
            self._wire.expect(_AFTERWORD)
        elif self._decoder.progress != heard:
            self._wire.expect()  # a call's arguments: content, though no event yet

    def _begin(self, data: bytes) -> bytes:
        """The first bytes, if they can be events. A page or an object in their place is an error."""
        start = data.lstrip(b"\xef\xbb\xbf \t\r\n")
        if not start:
            return data
        self._begun = True
        if start[:1] not in (b"<", b"{", b"["):
            return data
        body = data
        while len(body) < base.MAX_ERROR_BODY:
            more = self._wire.read()
            if not more:
                break
            body += more
        response = WireResponse(self._wire.status, self._wire.headers, body[: base.MAX_ERROR_BODY])
        found = base.read_error(body)
        if found.found:
            raise self._provider.error(self._call, response)
        raise base.unexpected(self._call, response, "not a stream of events")

    def _not_understood(self, error: Exception) -> LLMError:
        response = WireResponse(self._wire.status, self._wire.headers, b"")
        what = f"an event in a form that is not understood ({type(error).__name__})"
        return base.unexpected(self._call, response, what)

    def _cut_short(self) -> LLMError:
        stray = self._framing.stray
        if stray and base.read_error(stray).found:  # an error as bare JSON, after the events
            response = WireResponse(self._wire.status, self._wire.headers, stray)
            return self._provider.error(self._call, response)
        what = "was cut before its end" if self._decoder.progress else "ended without a word"
        place = self._call.target.base_url
        return LLMStreamError(f"{place}: the stream {what}", **self._origin())

    def _origin(self) -> dict[str, Any]:
        return base.origin(self._call, self._wire.headers)

    def _broken(self, error: LLMError) -> None:
        """The wire failed. After the finish reason nothing is missing but the end itself."""
        if self._decoder.complete and not isinstance(error, (LLMCancelledError, LLMAPIError)):
            self._complete()
        elif type(error) is LLMConnectionError:
            broken = LLMStreamError(str(error), **self._origin())
            broken.__cause__ = error.__cause__
            self._fail(broken)
        else:
            self._fail(error)

    def _complete(self) -> None:
        assert self._source is not None  # noqa: S101 - for the type checker
        if not self._decoder.begun:  # an end marker and nothing else
            self._fail(self._cut_short())
            return
        try:
            self._ready.extend(self._decoder.finish())
        except base.MALFORMED as error:
            self._fail(self._not_understood(error))
            return
        self._completed = self._source.complete = True
        self._wire.finish()
        self._source.end()

    def _fail(self, error: LLMError) -> None:
        if self._source is not None:
            error.partial = self._fold()
            error.provider = error.provider or self._info.provider
            error.model = error.model or self._call.target.model
            error.request_id = error.request_id or self._info.request_id
            error.history = self._info.history
        self._failure = self.error = error
        if self._source is not None:
            self._source.end(error)

    def _end_source(self) -> None:
        if self._source is not None:
            self._source.end()

    def _fold(self) -> Answer | None:
        if self._source is None:
            return self._answer
        if self._answer is None or not self._source.over:
            self._info.latency_ms = (self._clock.now() - self._started) * 1000
        self._answer = self._source.answer()
        if self._answer is not None:
            self._answer._info = self._info  # noqa: SLF001 - one account of the call for both
        return self._answer


def _events(answer: Answer) -> Iterator[StreamEvent]:
    """The events of an answer that is whole."""
    choice = answer.choices[0] if getattr(answer, "choices", None) else None  # type: ignore[attr-defined]  # if it has them
    if isinstance(answer, ChatCompletionResponse) and choice is not None:
        reasoning = (choice.message.model_extra or {}).get("reasoning_content")
        if isinstance(reasoning, str) and reasoning:
            yield base.reasoning_event(reasoning)
    if text := getattr(answer, "text", ""):
        yield base.text_event(text)
    for call in getattr(answer, "tool_calls", ()):
        yield StreamEvent(EventType.TOOL_CALL, tool_call=call)
    reason = getattr(answer, "finish_reason", None)
    yield base.complete_event(reason, getattr(answer, "usage", None))
