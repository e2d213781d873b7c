"""One function over many items: bounded, in order or as completed, and journalled. It knows no client.

The items are taken in the thread that iterates, a few ahead of what was handed out; threads do the asking,
and write down each answer in the journal before it can be handed out.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextvars import Context, copy_context
from dataclasses import dataclass
from decimal import Decimal
from hashlib import blake2b
from queue import SimpleQueue
from typing import Any, Final, Literal, NamedTuple, Protocol

import pydantic_core
from pydantic import BaseModel

from LLM.cancel import CancelScope
from LLM.clock import Clock
from LLM.errors import (
    LLMAuthenticationError,
    LLMBudgetError,
    LLMConfigError,
    LLMError,
    LLMNotFoundError,
    LLMQuotaError,
    LLMTimeoutError,
)
from LLM.journal import Journal, JournalError, Mark
from LLM.types import CallInfo, ChatCompletionResponse, TokenUsage

# Items taken ahead of what was handed out, for each thread; so many in all, while threads would be idle
# because the next item in order is slow (it may wait for its second attempt).
_AHEAD: Final = 4
_MOST_AHEAD: Final = 1000

_SLOW: Final = 0.0005  # seconds for one item: more than it takes to make one of what is there

Ask = Callable[[Mapping[str, Any]], ChatCompletionResponse]
Elsewhere = Callable[[Mapping[str, Any]], bool]
Prompt = Callable[[Any], Any]
Key = Callable[[Any], Any]
Progress = Callable[["MapProgress"], object]


@dataclass(frozen=True)
class MapResult:
    """What became of one item of a map.

    Attributes:
        index: the item's place, from 0.
        key: its own key; without one, its place as text.
        item: as it was given.
        response: the answer; `None` if there is none.
        error: why there is none; `None` on success.
        seconds: that the call took, waits and retries included; of a resumed one, when it was made.
        resumed: it was read from the journal; nothing was sent for it in this run.
    """

    index: int
    key: str
    item: Any
    response: ChatCompletionResponse | None
    error: LLMError | None = None
    seconds: float = 0.0
    resumed: bool = False

    @property
    def success(self) -> bool:
        """Whether there is an answer."""
        return self.error is None

    @property
    def text(self) -> str:
        """The answer's text; `""` if there is none."""
        return "" if self.response is None else self.response.text

    @property
    def usage(self) -> TokenUsage | None:
        """Tokens of the call; `None` if unknown."""
        return None if self.response is None else self.response.usage

    @property
    def cost(self) -> Decimal | None:
        """US dollars; `None` if unknown, as that of a failed call is."""
        return None if self.response is None else self.response.cost

    @property
    def cached(self) -> bool:
        """Whether the answer came from the cache."""
        return self.response is not None and self.response.cached


@dataclass(frozen=True)
class MapProgress:
    """How far a map is.

    Attributes:
        done: items handed out, the failed and the resumed ones among them.
        failed: of these, those without an answer.
        resumed: of these, those that the journal had.
        total: how many items there are; `None`: unknown.
        tokens: of the calls of this run, as far as they are known.
        cost: US dollars of the calls of this run; `None`: that of one of them is unknown.
        seconds: since the start of this run.
        rate: items per second that were asked in this run.
        seconds_left: at this rate; `None`: unknown.
    """

    done: int
    failed: int
    resumed: int
    total: int | None
    tokens: int
    cost: Decimal | None
    seconds: float
    rate: float
    seconds_left: float | None


# Items, and what is asked of the model for each.


class Task(NamedTuple):
    """An item, and what is to be asked for it.

    Attributes:
        request: arguments of `chat_completion`.
        error: why it cannot be asked; then there is no request.
    """

    place: int
    key: str | None
    item: Any
    request: Mapping[str, Any]
    error: LLMError | None = None

    @property
    def name(self) -> str:
        """The key that a result bears."""
        return str(self.place) if self.key is None else self.key

    @property
    def mark(self) -> Mark:
        """By what a journal knows it."""
        return Mark(self.place, self.key, _hash(self.request))

    def result(
        self,
        response: ChatCompletionResponse | None,
        error: LLMError | None = None,
        seconds: float = 0.0,
        *,
        resumed: bool = False,
    ) -> MapResult:
        """What became of it."""
        return MapResult(self.place, self.name, self.item, response, error, seconds, resumed)


def tasks(
    items: Iterable[Any],
    prompt: Prompt | None = None,
    key: Key | str | None = None,
    given: Collection[str] = (),
) -> Iterator[Task]:
    """What is to be asked, item by item, as they are taken. One that cannot be asked has an error.

    Args:
        prompt: makes a text, a list of messages or a mapping of an item.
        key: makes a key of an item, or names the field of a mapping where it stands.
        given: arguments that all calls have, by name.
    """
    for index, item in enumerate(items):
        name: str | None = None
        try:
            asked = item if prompt is None else _called("prompt", prompt, item)
            name = _key(item, asked, key)
            yield Task(index, name, item, _request(asked, given))
        except LLMConfigError as error:
            told = f"item {index}" + ("" if name is None else f" ({name!r:.80})")
            problem = LLMConfigError(f"{told} {error}")
            problem.__cause__ = error.__cause__
            yield Task(index, name, item, {}, problem)


def _called(name: str, function: Callable[[Any], Any], item: Any) -> Any:
    try:
        return function(item)
    except Exception as error:
        raise LLMConfigError(
            f"cannot be asked: {name}= raised {type(error).__name__}: {error}"
        ) from error


def _key(item: Any, asked: Any, key: Key | str | None) -> str | None:
    if callable(key):
        found = _called("key", key, item)
    elif key is not None:
        found = item.get(key) if isinstance(item, Mapping) else None
        if found is None:
            raise LLMConfigError(f"has no field {key!r} for its key")
    elif isinstance(asked, Mapping):
        found = asked.get("custom_id", asked.get("key"))
        if found is None:
            return None
    else:
        return None
    if isinstance(found, bool) or not isinstance(found, (str, int)) or found == "":
        raise LLMConfigError(f"has the key {found!r:.80}; it must be a text or a number")
    return str(found)


# Fields of a body that are arguments of a call by the same name; another may be called like an argument
# that is something else (OpenRouter's `provider`), and goes into the body as it is.
_ARGUMENTS: Final = frozenset({"messages", "model", "temperature", "max_tokens", "tools"})


def _request(asked: Any, given: Collection[str]) -> Mapping[str, Any]:
    """The arguments of `chat_completion`."""
    if isinstance(asked, str):
        return {"messages": [{"role": "user", "content": asked}]}
    if isinstance(asked, Mapping):
        return _of_line(asked, given) if "body" in asked else _of_fields(asked)
    if isinstance(asked, Sequence) and not isinstance(asked, (bytes, bytearray)):
        return {"messages": _messages(asked)}
    raise LLMConfigError(
        f"is {type(asked).__name__}: it must be a text, a list of messages or a mapping with "
        "messages or prompt; prompt= can make one of it"
    )


def _of_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    request = {
        name: value
        for name, value in fields.items()
        if name not in ("custom_id", "key", "prompt", "stream")
    }
    for name in request:
        if not isinstance(name, str) or name == "self":
            raise LLMConfigError(f"has the field {name!r:.80}, which no call takes")
    if "messages" in fields and "prompt" in fields:
        raise LLMConfigError("has both messages and prompt")
    if "prompt" in fields:
        if not isinstance(fields["prompt"], str):
            raise LLMConfigError(
                f"has a prompt that is {type(fields['prompt']).__name__}, not text"
            )
        request["messages"] = [{"role": "user", "content": fields["prompt"]}]
    elif "messages" not in fields:
        raise LLMConfigError("has neither messages nor prompt")
    request["messages"] = _messages(request["messages"])
    return request


def _of_line(line: Mapping[str, Any], given: Collection[str]) -> dict[str, Any]:
    """A line of OpenAI's batch file: its body is sent as it stands."""
    method, url, body = line.get("method", "POST"), line.get("url", ""), line["body"]
    if method != "POST":
        raise LLMConfigError(f"has the method {method!r:.40}; only POST is known")
    if url and (not isinstance(url, str) or not url.rstrip("/").endswith("/chat/completions")):
        raise LLMConfigError(f"has the url {url!r:.80}; only /v1/chat/completions is known")
    if not isinstance(body, Mapping):
        raise LLMConfigError(f"has a body that is {type(body).__name__}, not an object")
    if "messages" not in body:
        raise LLMConfigError("has no messages in its body")
    # Left out there, it is the model's own default, not that of the client.
    request: dict[str, Any] = {
        name: None for name in ("temperature", "max_tokens") if name not in given
    }
    rest = {}
    for name, value in body.items():
        if name in _ARGUMENTS:
            request[name] = value
        elif name not in ("stream", "stream_options"):
            rest[name] = value
    request["messages"] = _messages(body["messages"])
    return {**request, "extra_body": rest} if rest else request


def _messages(messages: Any) -> list[Any]:
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Iterable):
        raise LLMConfigError(f"has messages that are {type(messages).__name__}, not a list")
    found = list(messages)
    for message in found:
        if not isinstance(message, (Mapping, BaseModel)):
            raise LLMConfigError(f"has a message that is {type(message).__name__}, not an object")
    if not found:
        raise LLMConfigError("has an empty list of messages")
    return found


def _hash(request: Mapping[str, Any]) -> int:
    """64 bits of what is asked: enough to see that it was changed."""
    try:
        content = pydantic_core.to_json(request)
    except ValueError:  # half of a surrogate pair, or what is no JSON: the call itself will say so
        content = repr(request).encode(errors="backslashreplace")
    return int.from_bytes(blake2b(content, digest_size=8).digest(), "big")


def job_of(provider: str, model: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """What is asked of all items, for the head of a journal: short values as they are, others by a hash."""
    job: dict[str, Any] = {"provider": provider, "model": model}
    for name, value in sorted(fields.items()):
        if value is None:
            continue
        plain = isinstance(value, (bool, int, float)) or (
            isinstance(value, str) and len(value) < 40
        )
        job[f"{name}="] = value if plain else f"{_hash({'': value}):016x}"
    return job


# What the journal keeps of a result.


_SECONDS: Final = b',"seconds":'


class _Paid:
    """A price that was found out before."""

    def __init__(self, cost: Decimal | None) -> None:
        self._cost = cost

    def cost(self, *_: object) -> Decimal | None:
        return self._cost


def _kept(result: MapResult) -> bytes:
    """The rest of a journal's line, from what became of an item."""
    response, error = result.response, result.error
    if response is None:
        status = getattr(error, "status_code", None)
        told = {
            "class": type(error).__name__,
            "type": str(error.error_type) if error else None,
            "status": status,
            "message": str(error),
        }
        return b'"seconds":%.6f,"error":%s' % (result.seconds, json.dumps(told).encode("ascii"))
    cost = response.cost
    info = {
        "provider": response.provider,
        "model": response.info.model,
        "request_id": response.request_id,
        "latency_ms": response.latency_ms,
        "cached": response.cached,
        "cost": None if cost is None else format(cost, "f"),
        "fallbacks": response.fallbacks,
    }
    try:
        answer = response.model_dump_json().encode()
    except ValueError:  # half of a surrogate pair, which only ASCII can carry
        answer = json.dumps(response.model_dump()).encode("ascii")
    return b'"seconds":%.6f,"info":%s,"response":%s' % (
        result.seconds,
        json.dumps(info).encode("ascii"),
        answer,
    )


class _Resumed(MapResult):
    """A result out of the journal, read when it is looked at: so a million of them pass in seconds."""

    def __init__(self, task: Task, line: bytes, path: str) -> None:
        # As the frozen dataclass does it; `response` is left to `__getattr__`.
        self.__dict__.update(
            index=task.place,
            key=task.name,
            item=task.item,
            error=None,
            seconds=_seconds(line),
            resumed=True,
            _kept=(line, path),
        )

    def __getattr__(self, name: str) -> Any:
        if name != "response" or "_kept" not in self.__dict__:
            raise AttributeError(name)
        line, path = self.__dict__["_kept"]
        self.__dict__["response"] = response = _restored(line, path, self.key)
        del self.__dict__["_kept"]
        return response

    def __reduce__(self) -> tuple[Any, ...]:
        fields = (self.index, self.key, self.item, self.response, None, self.seconds, True)
        return MapResult, fields


# It is one, to whoever looks at it.
_Resumed.__qualname__ = MapResult.__qualname__


def _seconds(line: bytes) -> float:
    begin = line.find(_SECONDS) + len(_SECONDS)
    try:
        return float(line[begin : line.find(b",", begin)])
    except ValueError:
        return 0.0


def _restored(line: bytes, path: str, key: str) -> ChatCompletionResponse:
    try:
        kept = json.loads(line)
        info = dict(kept["info"])
        cost = info.pop("cost")
        response = ChatCompletionResponse.model_validate(kept["response"])
        response._info = CallInfo(  # noqa: SLF001 - it is what the client would have set
            provider=info["provider"],
            model=info["model"],
            request_id=info["request_id"],
            latency_ms=info["latency_ms"],
            cached=bool(info["cached"]),
            fallbacks=tuple((str(model), str(reason)) for model, reason in info["fallbacks"]),
            prices=_Paid(None if cost is None else Decimal(cost)),
        )
        return response
    except (ValueError, KeyError, TypeError, ArithmeticError, RecursionError) as error:
        raise JournalError(
            f"the line of {key!r:.80} in {path} is damaged: delete that line, and the item is asked anew",
            path=path,
        ) from error


# The threads.


class Results(Protocol):
    """What does the work of a map: an iterator of results that can be ended."""

    def __iter__(self) -> Iterator[MapResult]: ...
    def __next__(self) -> MapResult: ...
    def close(self) -> None: ...


class _Outcome(NamedTuple):
    """What comes back from a thread.

    Attributes:
        result: `None`: the task was not begun.
        failure: why no further item is asked, or `None`.
    """

    task: Task
    result: MapResult | None
    failure: BaseException | None = None


class _Shared:
    """What the threads share; they do not know the map itself, so that one that is dropped ends them."""

    def __init__(
        self, ask: Ask, journal: Journal | None, clock: Clock, elsewhere: Elsewhere
    ) -> None:
        self.ask = ask
        self.elsewhere = elsewhere
        self.journal = journal
        self.clock = clock
        self.waiting: SimpleQueue[Task | None] = SimpleQueue()
        self.finished: SimpleQueue[_Outcome] = SimpleQueue()
        self.stopping = False
        self._working = 0  # threads
        self._dropped = False
        self._answered = False
        # Of the calls that a budget has refused while others were under way: see `_affordable`.
        self._turn = threading.Condition()
        self._asking = 0
        self._settled = 0

    def begin(self) -> None:
        """A thread was started."""
        with self._turn:
            self._working += 1

    def work(self) -> None:
        """One thread, till the end of the map."""
        try:
            self._work()
        finally:
            with self._turn:
                self._working -= 1
            self._free()

    def drop(self) -> None:
        """The map is no more: whoever is the last lets go of the journal."""
        self._dropped = True
        self._free()

    def _free(self) -> None:
        with self._turn:
            last = self._dropped and not self._working
        if last and self.journal is not None:
            self.journal.close()

    def _work(self) -> None:
        while (task := self.waiting.get()) is not None:
            if self.stopping:
                self.finished.put(_Outcome(task, None))
                continue
            try:
                outcome = self._outcome(task)
            except BaseException as failure:  # noqa: BLE001 - raised in the thread of the caller
                outcome = _Outcome(task, None, failure)
            if outcome.failure is not None:
                self.stop()
            self.finished.put(outcome)

    def stop(self) -> None:
        """Begin no further task."""
        self.stopping = True
        with self._turn:
            self._turn.notify_all()

    def _outcome(self, task: Task) -> _Outcome:
        started, failure = self.clock.now(), None
        response = error = None
        try:
            response = self._affordable(task)
            self._answered = True
        except LLMError as problem:
            error = problem
            if self._ends_all(task, problem):
                failure = problem
        result = task.result(response, error, self.clock.now() - started)
        if self.journal is not None and not self._is_to_be_asked_anew(error):
            try:
                self.journal.add(task.mark, ok=error is None, fields=_kept(result))
            except JournalError as problem:  # what was paid for is handed out all the same
                return _Outcome(task, result, failure or problem)
        return _Outcome(task, result, failure)

    def _affordable(self, task: Task) -> ChatCompletionResponse:
        """Ask; what a budget refuses while others are under way has another try when one of them is over.

        They hold the worst case of what they may cost, and give most of it back.
        """
        while True:
            with self._turn:
                self._asking += 1
                settled = self._settled
            refused = None
            try:
                return self.ask(task.request)
            except LLMBudgetError as error:
                refused = error
            finally:
                with self._turn:
                    self._asking -= 1
                    self._settled += refused is None
                    self._turn.notify_all()
            with self._turn:
                while self._settled == settled and self._asking and not self.stopping:
                    self._turn.wait()
                if self._settled == settled or self.stopping:
                    raise refused

    def _ends_all(self, task: Task, error: LLMError) -> bool:
        """Whether all others would fail as well."""
        if isinstance(error, (LLMBudgetError, LLMQuotaError)):
            return True
        if isinstance(error, LLMTimeoutError):
            return False
        if isinstance(error, LLMAuthenticationError) and error.status_code == 401:
            return not self.elsewhere(task.request)
        if task.request.get("model") or task.request.get("provider"):
            return False
        if isinstance(error, LLMAuthenticationError):  # 403 may also mean what this one item says
            return not self._answered
        return isinstance(error, LLMNotFoundError) and not self._answered

    @staticmethod
    def _is_to_be_asked_anew(error: LLMError | None) -> bool:
        """What was never sent leaves nothing to write down."""
        return error is not None and error.unsent


def _is_apart(request: Mapping[str, Any]) -> bool:
    return bool(request.get("model") or request.get("provider"))


class ThreadedMap:
    """Results of asking for each task, by threads of its own; they end with it.

    Args:
        ask: what is called for each request, by several threads at once.
        source: the tasks; taken as results are asked for, in the thread that asks.
        concurrency: threads at most.
        ordered: in the order of the tasks; else as they are completed.
        journal: where finished tasks are written down, and found again. It is closed with the map.
        context: in which the calls are made; left out: a copy of this one.
        ends_at: the clock's time after which no call can succeed; `None`: there is none.
        elsewhere: whether a request goes to another host, or with another key, than the others; left
            out: one with a model or a provider of its own may.
    """

    def __init__(
        self,
        ask: Ask,
        source: Iterable[Task],
        *,
        concurrency: int,
        ordered: bool = True,
        journal: Journal | None = None,
        context: Context | None = None,
        clock: Clock | None = None,
        ends_at: float | None = None,
        elsewhere: Elsewhere | None = None,
    ) -> None:
        self._source = iter(source)
        self._concurrency = concurrency
        self._ordered = ordered
        self._journal = journal
        self._context = copy_context() if context is None else context
        self._clock = clock or Clock()
        self._ends_at = ends_at
        self._scope = CancelScope()
        self._context.run(self._scope.enter)
        self._shared = _Shared(ask, journal, self._clock, elsewhere or _is_apart)
        self._threads: list[threading.Thread] = []
        self._ready: dict[int, MapResult | None] = {}  # by place; `None`: nothing to hand out there
        self._taken = 0  # tasks
        self._last_take = 0.0  # seconds
        self._passed = 0  # of these, those that are handed out or never will be
        self._under_way = 0
        self._exhausted = False
        self._failure: BaseException | None = None
        self._closed = False

    def __iter__(self) -> Iterator[MapResult]:
        return self

    def __next__(self) -> MapResult:
        if self._closed:
            raise StopIteration
        try:
            while True:
                self._take()
                result = self._next_ready()
                if result is not None:
                    return result
                if self._under_way:
                    self._receive(self._shared.finished.get())
                elif self._ended and not self._ready:
                    break
        except BaseException:
            self.close()
            raise
        self.close()
        if self._failure is not None:
            raise self._failure
        raise StopIteration

    def close(self) -> None:
        """End what is under way, and the threads. What is finished stays in the journal."""
        if self._closed:
            return
        self._closed = True
        try:
            self._end_threads()
            for thread in self._threads:
                thread.join()
        finally:  # also after a second Ctrl-C
            if self._journal is not None:
                self._journal.close()

    def __del__(self) -> None:
        # It was dropped: the threads end when their calls do, and nobody waits for that.
        if not getattr(self, "_closed", True):
            self._end_threads()
            self._shared.drop()

    @property
    def _ended(self) -> bool:
        return self._exhausted or self._failure is not None

    def _end_threads(self) -> None:
        self._shared.stop()
        for _ in self._threads:
            self._shared.waiting.put(None)
        self._scope.cancel()
        self._scope.leave()

    def _take(self) -> None:
        """Take further tasks: two for a result, so that the lead grows; if there is none, all that may be.

        Of items that are slow to come none is waited for while there is a result to hand out.
        """
        finished = self._shared.finished
        taken = 0
        while not self._ended:
            while not finished.empty():
                self._receive(finished.get())
            if not self._may_take():
                return
            if (taken >= 2 or self._last_take > _SLOW) and self._has_ready():
                return
            started = self._clock.now()
            if self._ends_at is not None and started >= self._ends_at:
                self._fail(LLMTimeoutError("the deadline of the map has passed", clock="deadline"))
                return
            try:
                task = next(self._source, None)
                if task is None:
                    self._exhausted = True
                    return
                self._last_take = self._clock.now() - started
                self._taken += 1
                taken += 1
                self._begin(task)
            except Exception as error:  # noqa: BLE001 - raised when what was taken before is handed out
                self._failure = error

    def _may_take(self) -> bool:
        """Whether few are ahead; or the caller waits for a slow one, and threads wait for work."""
        ahead = self._taken - self._passed
        if ahead < self._concurrency * _AHEAD:
            return True
        idle = self._under_way < self._concurrency and not self._has_ready()
        return idle and ahead < _MOST_AHEAD

    def _begin(self, task: Task) -> None:
        if task.error is not None:
            self._ready[task.place] = task.result(None, task.error)
            return
        if self._journal is not None:
            line = self._journal.find(task.mark)
            if line is not None:
                self._ready[task.place] = _Resumed(task, line, self._journal.path)
                return
        self._under_way += 1
        if len(self._threads) < min(self._concurrency, self._under_way):
            # Each enters a context of its own: one cannot be entered twice at a time.
            thread = threading.Thread(
                target=self._context.copy().run,
                args=(self._shared.work,),
                name="LLM map",
                daemon=True,
            )
            self._threads.append(thread)
            thread.start()
            self._shared.begin()
        self._shared.waiting.put(task)

    def _receive(self, outcome: _Outcome) -> None:
        self._under_way -= 1
        self._ready[outcome.task.place] = outcome.result
        if outcome.failure is not None:
            self._fail(outcome.failure)

    def _fail(self, failure: BaseException) -> None:
        if self._failure is None:
            self._failure = failure
        self._shared.stop()

    def _has_ready(self) -> bool:
        return self._passed in self._ready if self._ordered else bool(self._ready)

    def _next_ready(self) -> MapResult | None:
        """What can be handed out now, or `None`."""
        while self._has_ready():
            place = self._passed if self._ordered else next(iter(self._ready))
            result = self._ready.pop(place)
            self._passed += 1
            if result is not None:
                return result
        return None


# What the caller iterates.


class MapRun:
    """A map under way: iterate it, once; leaving its `with` block ends what is under way.

    Also without the block: its threads end with the last result, or when it is dropped.
    """

    def __init__(
        self,
        results: Results,
        *,
        total: int | None,
        progress: bool | Progress | None = None,
        on_error: Literal["keep", "raise"] = "keep",
        clock: Clock | None = None,
    ) -> None:
        self._results = results
        self._clock = clock or Clock()
        self._started = self._clock.now()
        self._raises = on_error == "raise"
        self._done = self._failed = self._resumed = self._tokens = 0
        self._total = total
        self._cost: Decimal | None = Decimal(0)
        try:
            self._report = _reporter(progress, total, self._clock)
        except BaseException:
            results.close()
            raise

    def __iter__(self) -> Iterator[MapResult]:
        return self

    def __enter__(self) -> MapRun:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __next__(self) -> MapResult:
        try:
            result = next(self._results)
        except BaseException:
            self._end_report()
            raise
        self._count(result)
        if self._report is not None:
            self._report(self.progress)
        if self._raises and result.error is not None:
            self.close()
            raise result.error
        return result

    def close(self) -> None:
        """End what is under way. What is finished stays in the journal."""
        self._results.close()
        self._end_report()

    @property
    def progress(self) -> MapProgress:
        """How far it is."""
        seconds = self._clock.now() - self._started
        asked = self._done - self._resumed
        rate = asked / seconds if seconds > 0 else 0.0
        left = None if self._total is None or not rate else max(0, self._total - self._done) / rate
        return MapProgress(
            done=self._done,
            failed=self._failed,
            resumed=self._resumed,
            total=self._total,
            tokens=self._tokens,
            cost=self._cost,
            seconds=seconds,
            rate=rate,
            seconds_left=left,
        )

    def _count(self, result: MapResult) -> None:
        self._done += 1
        if result.resumed:
            self._resumed += 1
            return
        if result.response is None:
            self._failed += 1
            return
        usage, cost = result.usage, result.cost
        self._tokens += (usage.total_tokens if usage else None) or 0
        self._cost = None if self._cost is None or cost is None else self._cost + cost

    def _end_report(self) -> None:
        if isinstance(self._report, _Bar):
            self._report.close()


def _reporter(progress: bool | Progress | None, total: int | None, clock: Clock) -> Progress | None:
    if callable(progress):
        return progress
    if progress is False or (progress is None and not _is_terminal()):
        return None
    try:
        from tqdm import tqdm  # type: ignore[import-untyped]  # it ships no types
    except ImportError:
        if progress:
            raise LLMConfigError(
                "a progress bar needs tqdm: pip install 'requests-llm[progress]'"
            ) from None
        return None
    return _Bar(tqdm(total=total, unit="item", file=sys.stderr, dynamic_ncols=True), clock)


def _is_terminal() -> bool:
    try:
        return sys.stderr.isatty()
    except (AttributeError, ValueError):  # there is none, or it is closed
        return False


class _Bar:
    """A bar on the terminal, with what it took beside it."""

    def __init__(self, bar: Any, clock: Clock) -> None:
        self._bar = bar
        self._clock = clock
        self._told = 0.0
        self._last: MapProgress | None = None

    def __call__(self, progress: MapProgress) -> None:
        self._last = progress
        now = self._clock.now()
        if now - self._told > 0.2:  # seconds; tqdm itself draws no oftener than each 0.1
            self._told = now
            self._tell(progress)
        # They took no time: the rate is that of the others.
        self._bar.initial = max(self._bar.initial, progress.resumed)
        self._bar.update()

    def close(self) -> None:
        if self._last is not None and not self._bar.disable:
            self._tell(self._last)
        self._bar.close()

    def _tell(self, progress: MapProgress) -> None:
        parts = [f"{progress.tokens:,} tokens"]
        if progress.cost:
            parts.append(f"${progress.cost:.4f}")
        if progress.failed:
            parts.append(f"{progress.failed} failed")
        self._bar.set_postfix_str(", ".join(parts), refresh=False)
