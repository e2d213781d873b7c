"""What happens in a call, as frozen events; hooks are functions that take them, and logging is one."""

from __future__ import annotations

import logging
import os
import re
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from decimal import Decimal
from typing import Any, NamedTuple, TypeAlias, TypeVar

from LLM.clock import Clock
from LLM.errors import LLMError
from LLM.forks import renew_after_fork
from LLM.types import TokenUsage

log = logging.getLogger("LLM")

T = TypeVar("T")

# Calls that a hook remembers between start and finish. Each start has its finish, so this bounds only
# what a process that loses threads in the middle of calls would collect.
MAX_OPEN = 10_000


# Tuples, not dataclasses: a frozen dataclass of this size costs 2 µs to make, these cost 0.5 µs.
class CallStarted(NamedTuple):
    """A call begins; `CallFinished` with the same `call_id` always follows.

    Attributes:
        call_id: the same in all events of a call, and of no other call.
        endpoint: `chat`, `completion` or `models`.
        provider: name of the host's provider.
        model: the model asked for, as the host names it.
        base_url: where the host is.
        stream: whether the answer is streamed to the caller.
        params: what goes into the body beside the messages: `temperature`, `max_tokens`, `tools` …
        messages: contents, for hooks that were asked for them: the messages or the prompt.
    """

    call_id: str
    endpoint: str
    provider: str
    model: str
    base_url: str
    stream: bool
    params: Mapping[str, Any]
    messages: Any = None

    def __repr__(self) -> str:
        return _without(self, "messages", "params")


class AttemptFailed(NamedTuple):
    """One HTTP request of a call failed.

    Attributes:
        attempt: its number, from 1.
        status: HTTP status, or `None` if no answer came.
        duration_seconds: of this attempt.
        retry_in_seconds: how long is waited before the next attempt; `None`: there is none.
        attempts_allowed: how many there can be in all.
    """

    call_id: str
    provider: str
    model: str
    attempt: int
    status: int | None
    error: LLMError
    duration_seconds: float
    retry_in_seconds: float | None
    attempts_allowed: int


class Waited(NamedTuple):
    """A call was held back.

    Attributes:
        reason: `rate_limit`, or `cache`: for the same call of another thread.
        seconds: how long it was.
    """

    call_id: str
    provider: str
    model: str
    reason: str
    seconds: float


class CallFinished(NamedTuple):
    """A call is over: answered, failed, or its stream closed.

    Attributes:
        provider: who answered, or failed last.
        model: the model that was asked last, as its host names it.
        duration_seconds: from the call to the last byte, waits and failed attempts included.
        time_to_first_token_seconds: of a stream; else `None`.
        attempts: HTTP requests that it took; 0 if nothing was sent.
        usage: tokens, as far as they are known; `None`: not at all.
        cached: whether the answer came out of the cache, free of cost.
        complete: `False` for a failure, and for a stream that was closed or cut before its end.
        request_id: the server's id of the request.
        error: the failure, `None` for a success.
        cost_from: what `cost_usd` asks; a price may have to be looked up first.
        answer_from: what `answer` asks.
        base_url: where the host that answered is; `""` if none did.
        fallbacks: what was tried before, and why it failed, as (model, reason).
    """

    call_id: str
    endpoint: str
    provider: str
    model: str
    stream: bool
    duration_seconds: float
    time_to_first_token_seconds: float | None
    attempts: int
    usage: TokenUsage | None
    cached: bool = False
    complete: bool = True
    request_id: str | None = None
    error: LLMError | None = None
    cost_from: Callable[[], Decimal | None] | None = None
    answer_from: Callable[[], Any] | None = None
    base_url: str = ""
    fallbacks: tuple[tuple[str, str], ...] = ()

    @property
    def cost_usd(self) -> Decimal | None:
        """US dollars, looked up when asked; `None` if unknown."""
        return self.cost_from() if self.cost_from is not None else None

    @property
    def answer(self) -> Any:
        """Contents, for hooks that were asked for them: the response, or as much of it as came."""
        return self.answer_from() if self.answer_from is not None else None

    @property
    def response_model(self) -> str | None:
        """The model that answered, in the server's words; `None` if it did not say."""
        return getattr(self.answer, "model", None)

    @property
    def response_id(self) -> str | None:
        """The server's id of the answer; `None` if it gave none."""
        return getattr(self.answer, "id", None)

    @property
    def finish_reason(self) -> str | None:
        """Why the model stopped; `None` if it did not say, or failed."""
        return getattr(self.answer, "finish_reason", None)

    def __repr__(self) -> str:
        return _without(self, "cost_from", "answer_from")


Event: TypeAlias = CallStarted | AttemptFailed | Waited | CallFinished
Hook: TypeAlias = Callable[[Event], None]


def _without(event: Any, *hidden: str) -> str:
    shown = (f"{name}={value!r}" for name, value in event._asdict().items() if name not in hidden)
    return f"{type(event).__name__}({', '.join(shown)})"


class Hooks(tuple[Hook, ...]):  # noqa: SLOT001 - a tuple has no slots for more
    """The hooks of a client; they remember which of them have failed, so that each is reported once."""

    failed: set[int]

    def __new__(cls, hooks: Iterable[Hook] = ()) -> Hooks:
        made = super().__new__(cls, hooks)
        made.failed = set()
        for hook in made:
            if not callable(hook):
                raise TypeError(f"hooks: {hook!r} is no function that takes an event")
        return made


def emit(hooks: tuple[Hook, ...], event: Event) -> None:
    """Hand an event to each hook. One that fails is logged (of `Hooks`: once) and breaks nothing."""
    for place, hook in enumerate(hooks):
        try:
            hook(event)
        except Exception as error:
            failed = getattr(hooks, "failed", None)
            if failed is not None:
                if place in failed:
                    continue
                failed.add(place)
            log.warning(
                "the hook %s failed, and the call goes on: %s: %s",
                getattr(hook, "__qualname__", None) or repr(hook),
                type(error).__name__,
                error,
                exc_info=log.isEnabledFor(logging.DEBUG),
            )


def logging_hook(event: Event) -> None:
    """Lines for the logger `LLM`: what was asked, what failed, what came; never what was said."""
    if isinstance(event, CallStarted):
        if log.isEnabledFor(logging.DEBUG):
            said = event.messages
            log.debug(
                "request: %s, model %s, %s messages, temperature %s",
                event.endpoint,
                event.model,
                len(said) if isinstance(said, (list, tuple)) else 1,
                event.params.get("temperature"),
            )
    elif isinstance(event, CallFinished):
        if event.error is not None:
            log.error("call failed after %s: %s", _counted(event.attempts), event.error)
        elif log.isEnabledFor(logging.INFO):
            tokens = event.usage.total_tokens if event.usage else None
            marks = (", cached" if event.cached else "") + (
                "" if event.complete else ", interrupted"
            )
            milliseconds = event.duration_seconds * 1000
            log.info(
                "call finished: %s, %s tokens, %.0f ms%s",
                event.request_id,
                tokens,
                milliseconds,
                marks,
            )
    elif isinstance(event, AttemptFailed):
        if event.retry_in_seconds is not None:
            log.debug(
                "attempt %d of %d in %.1f s: %s",
                event.attempt + 1,
                event.attempts_allowed,
                event.retry_in_seconds,
                event.status or type(event.error).__name__,
            )
    elif event.reason == "rate_limit":
        log.info("waited %.1f s for the rate limit", event.seconds)
    else:
        log.debug("waited %.1f s for the same call of another thread", event.seconds)


def _counted(attempts: int) -> str:
    return "1 attempt" if attempts == 1 else f"{attempts} attempts"


class Open(OrderedDict[str, T]):
    """What a hook remembers of the calls under way, by their ids; the oldest go when there are too many.

    Each method is one step of the interpreter: threads need no lock.
    """

    def remember(self, call_id: str, value: T) -> T | None:
        """Returns what had to go for it, if anything."""
        self[call_id] = value
        return self.popitem(last=False)[1] if len(self) > MAX_OPEN else None


# What keys look like, or are preceded by, should a server echo one.
_KEY = re.compile(
    r"\b(?:(?:sk|pk|rk)-[\w-]{12,}|(?:gsk_|hf_|xai-|AIza)[\w-]{16,})"
    r"|(?i:(?<=\bbearer )|(?<=\bapi[-_ ]key[:=]))\s*[^\s\"',;]+"
)


def audit(
    path: str | os.PathLike[str], *, contents: bool = False, clock: Clock | None = None
) -> Audit:
    """A hook that appends one line of JSON for each call that ends: who was asked, what it took and cost.

    Threads and processes may write to the same file. It is made, readable by its owner only, when the
    first call ends; if it cannot be written to, that is logged once and calls go on.

    Args:
        path: the file; its folder must exist.
        contents: also write the messages, the answer and the error's message.

    Returns:
        The hook; its `close()` closes the file, and the next call opens it again.
    """
    return Audit(path, contents=contents, clock=clock)


class Audit:
    """The hook that `audit` makes."""

    def __init__(
        self, path: str | os.PathLike[str], *, contents: bool = False, clock: Clock | None = None
    ) -> None:
        self.path = os.fspath(path)
        self.contents = contents
        self._clock = clock or Clock()
        self._started: Open[CallStarted] = Open()
        self._file: int | None = None
        self._finalizer: weakref.finalize[Any, Any] | None = None
        self._torn = False
        self.after_fork()
        renew_after_fork(self)

    def after_fork(self) -> None:
        """For a forked child: a lock of its own."""
        # The file may stay open: what both processes append are whole lines.
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"audit({self.path!r}{', contents=True' if self.contents else ''})"

    def __call__(self, event: Event) -> None:
        if isinstance(event, CallStarted):
            if self.contents:
                self._started.remember(event.call_id, event)
        elif isinstance(event, CallFinished):
            self._append(self._line(event, self._started.pop(event.call_id, None)))

    def close(self) -> None:
        """Close the file; the next call opens it again."""
        with self._lock:
            if self._finalizer is not None:
                self._finalizer()
            self._file = self._finalizer = None

    def _line(self, event: CallFinished, started: CallStarted | None) -> bytes:
        import json  # not needed to import `LLM`

        usage, cost, error = event.usage, event.cost_usd, event.error
        fields: dict[str, Any] = {
            "time": self._clock.utc().isoformat(timespec="milliseconds"),
            "call_id": event.call_id,
            "endpoint": event.endpoint,
            "provider": event.provider,
            "model": event.model,
            "response_model": event.response_model,
            "stream": event.stream,
            "duration_seconds": round(event.duration_seconds, 6),
            "time_to_first_token_seconds": event.time_to_first_token_seconds,
            "attempts": event.attempts,
            # Without the reasons: they may quote what was said.
            "tried_before": [model for model, _ in event.fallbacks],
            "prompt_tokens": usage and usage.prompt_tokens,
            "completion_tokens": usage and usage.completion_tokens,
            "total_tokens": usage and usage.total_tokens,
            "cached_tokens": usage and usage.cached_tokens,
            "reasoning_tokens": usage and usage.reasoning_tokens,
            "cost_usd": None if cost is None else format(cost, "f"),
            "cached": event.cached,
            "complete": event.complete,
            "finish_reason": event.finish_reason,
            "request_id": event.request_id,
            "response_id": event.response_id,
            "error": None if error is None else str(error.error_type),
            "status": getattr(error, "status_code", None),
        }
        if self.contents and error is not None:
            fields["error_message"] = str(error)
        fields = {
            name: _KEY.sub("***", value) if isinstance(value, str) else value
            for name, value in fields.items()
        }
        if self.contents:
            fields["messages"] = started.messages if started else None
            fields["answer"] = event.answer
        # ASCII: half of a surrogate pair, which a model may say, has no other form in a file.
        return json.dumps(fields, default=plain, separators=(",", ":")).encode("ascii") + b"\n"

    def _append(self, line: bytes) -> None:
        with self._lock:
            if self._file is None:
                flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", 0)
                self._file = os.open(self.path, flags, 0o600)
                self._finalizer = weakref.finalize(self, os.close, self._file)
            # After half a line, for which the disk was full, a whole one must begin anew.
            line = b"\n" + line if self._torn else line
            # One write for a line: then lines of different processes do not mix.
            written = os.write(self._file, line)
            self._torn = written < len(line)
        if self._torn:
            raise OSError(f"the disk took {written} of {len(line)} bytes of a line of {self.path}")


def plain(value: Any) -> Any:
    """What JSON cannot hold, in a form that it can: models as objects, the rest by their text."""
    dump = getattr(value, "model_dump", None)
    if callable(dump):
        return dump(exclude_none=True)
    return dict(value) if isinstance(value, Mapping) else str(value)
