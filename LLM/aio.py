"""AsyncLLM: the same client, awaited.

There is one implementation: an `LLM`, whose calls run in threads of their own. What is added here is the
way there and back, and that cancelling an await ends what the thread does.
"""

from __future__ import annotations

import asyncio
import math
import os
import weakref
from collections.abc import (
    AsyncIterable,
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Generator,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from concurrent.futures import CancelledError
from contextlib import AbstractContextManager
from decimal import Decimal
from functools import partial
from typing import (
    Any,
    Generic,
    Literal,
    NoReturn,
    TypeVar,
    cast,
    overload,
)

from LLM.batch import Key, MapProgress, MapResult, MapRun, Progress, Prompt
from LLM.batches import Batches, BatchResults
from LLM.cancel import woken
from LLM.client import LLM, Messages, OnError, nearest_deadline
from LLM.clock import Clock
from LLM.config import LLMConfig
from LLM.crew import Crew, Loop, Reading, running_loop
from LLM.errors import Attempt, LLMCancelledError, LLMConfigError, LLMError
from LLM.output import OutputMode, Parsed, ParsedStream
from LLM.policies.budget import Budget, active_budgets, enter
from LLM.policies.cache import CacheMode, ResponseCache
from LLM.policies.fallback import FallbackPolicy
from LLM.policies.ratelimit import RateLimiter
from LLM.policies.spending import Spending
from LLM.policies.usage import UsageTotals
from LLM.prices import Price
from LLM.providers.batches import Batch
from LLM.reaper import REAPER
from LLM.stream import Stream
from LLM.telemetry import Hook
from LLM.types import (
    UNSET,
    CallInfo,
    ChatCompletionResponse,
    Comparison,
    CompletionResponse,
    ModelsResponse,
    Reply,
    StreamEvent,
    TokenUsage,
    Unset,
)

T = TypeVar("T")

MAX_CONCURRENCY = 1000


class _Later(Generic[T]):
    """What can be awaited, and need not be."""

    def __init__(self, get: Callable[[], Coroutine[Any, Any, T]]) -> None:
        self._get = get

    def __await__(self) -> Generator[Any, Any, T]:
        return self._get().__await__()


class _AsyncIterator(Generic[T]):
    """What all iterators of an `AsyncLLM` have in common.

    It begins when it is first awaited, entered or iterated, and belongs to that event loop.
    """

    def __init__(self, reading: Reading[Any, T], note: Callable[[Any], None]) -> None:
        self._reading = reading
        self._note = note
        # Only a thread can end it, and a finalizer cannot call one: it may run inside any lock.
        REAPER.begin()
        finalizer = weakref.finalize(self, REAPER.take, reading.stop)
        finalizer.atexit = False

    def __aiter__(self) -> AsyncIterator[T]:
        return self

    async def __anext__(self) -> T:
        try:
            return await self._reading.next()
        except StopAsyncIteration:
            self._note(self._reading.source)
            raise

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def __enter__(self) -> NoReturn:
        raise TypeError(f"an {type(self).__name__} is for `async with`")

    def __exit__(self, *_: object) -> None:
        """Nothing: `with` does not get that far, and says why."""

    async def close(self) -> None:
        """Stop reading. The connection is kept if all was read, else closed."""
        await self._reading.close()

    async def aclose(self) -> None:
        """`close`, by the name that `contextlib.aclosing` knows."""
        await self.close()

    def cancel(self) -> None:
        """Stop it from another task or thread: whoever iterates gets `LLMCancelledError`."""
        self._reading.scope.cancel()

    async def _rest(self) -> Any:
        """Read to the end, and hand out what was read from."""
        async for _ in self:
            pass
        return self._reading.source


class AsyncStream(_AsyncIterator[StreamEvent]):
    """A streamed answer: an asynchronous iterator of `StreamEvent`, and a context manager.

    As `Stream`. A few events are read ahead; a reader who is slower than that holds the server back.
    Closed by `close()`, by the end of its `async with` block, by cancelling the task that reads, or when
    nobody holds it any more.
    """

    def __init__(
        self, reading: Reading[Stream, StreamEvent], note: Callable[[Any], None], clock: Clock
    ) -> None:
        super().__init__(reading, note)
        self._blank = Stream(None, info=CallInfo(), started=clock.now(), clock=clock)

    def __await__(self) -> Generator[Any, Any, AsyncStream]:
        return self.__aenter__().__await__()

    async def __aenter__(self) -> AsyncStream:
        await self._reading.open()
        return self

    @property
    def _stream(self) -> Stream:
        found: Stream | None = self._reading.source
        return self._blank if found is None else found

    @property
    def text_stream(self) -> AsyncIterator[str]:
        """The text alone, piece by piece."""
        return _Texts(self)

    @property
    def response(self) -> Awaitable[Any]:
        """`await stream.response`: the whole answer; reads the rest of the stream first.

        Of a stream that failed (see `.error`) or was closed, what came of it; `None` if nothing did.
        """
        return _Later(self._whole)

    async def _whole(self) -> Any:
        stream = await self._rest()
        return None if stream is None else stream.response

    @property
    def time_to_first_token(self) -> float | None:
        """Seconds from the call to its first event, waits and failed attempts included."""
        return self._stream.time_to_first_token

    @property
    def error(self) -> LLMError | None:
        """What the stream failed with, raised or handed over as an event; `None` so far."""
        return self._stream.error

    @property
    def headers(self) -> Mapping[str, str]:
        return self._stream.headers

    @property
    def status(self) -> int:
        return self._stream.status

    @property
    def usage(self) -> TokenUsage | None:
        """Tokens as far as the server has said; most say it at the end."""
        return self._stream.usage

    @property
    def info(self) -> CallInfo:
        """All that the client knows of the call, to be read."""
        return self._stream.info

    @property
    def cost(self) -> Decimal | None:
        """US dollars for the usage known so far; 0 from the cache; `None` if unknown."""
        return self._stream.cost

    @property
    def cached(self) -> bool:
        """Whether it comes from the cache: nothing was sent and nothing paid."""
        return self._stream.cached

    @property
    def fallbacks(self) -> tuple[tuple[str, str], ...]:
        """The models that were tried before this one answered, each with the reason; mostly empty."""
        return self._stream.fallbacks

    @property
    def provider(self) -> str | None:
        return self._stream.provider

    @property
    def request_id(self) -> str | None:
        return self._stream.request_id

    @property
    def attempts(self) -> int:
        return self._stream.attempts

    @property
    def history(self) -> tuple[Attempt, ...]:
        return self._stream.history

    def as_curl(self) -> str:
        """The request as a command for a shell, the key as a variable."""
        return self._stream.as_curl()

    def __repr__(self) -> str:
        state = (
            "not begun" if self._stream is self._blank else "over" if self._reading.over else "open"
        )
        return f"<AsyncStream from {self._stream.provider}, {state}>"


class _Texts:
    """The text of a stream's events. Not a generator: those end later than they are dropped."""

    def __init__(self, stream: AsyncStream) -> None:
        self._stream = stream

    def __aiter__(self) -> _Texts:
        return self

    async def __anext__(self) -> str:
        async for event in self._stream:
            if event.text_delta is not None:
                return event.text_delta
            if event.error is not None:
                raise event.error
        raise StopAsyncIteration


class AsyncParsedStream(_AsyncIterator[Any], Generic[T]):
    """An answer of a type, as it grows: an asynchronous iterator of what is complete so far.

    As `ParsedStream`; a context manager, and closed as an `AsyncStream` is.
    """

    def __init__(self, reading: Reading[ParsedStream[T], Any], note: Callable[[Any], None]) -> None:
        super().__init__(reading, note)

    def __await__(self) -> Generator[Any, Any, AsyncParsedStream[T]]:
        return self.__aenter__().__await__()

    async def __aenter__(self) -> AsyncParsedStream[T]:
        await self._reading.open()
        return self

    @property
    def parsed(self) -> Awaitable[Parsed[T]]:
        """`await stream.parsed`: the instance with what it took; reads the rest of the stream first.

        Raises:
            LLMOutputError: as `AsyncLLM.parse`; or the stream was closed before its end.
        """
        return _Later(self._whole)

    @property
    def output(self) -> Awaitable[T]:
        """`await stream.output`: the instance; reads the rest of the stream first."""

        async def output() -> T:
            return (await self._whole()).output

        return _Later(output)

    @property
    def response(self) -> Awaitable[ChatCompletionResponse]:
        """`await stream.response`: the last answer; reads the rest of the stream first."""

        async def response() -> ChatCompletionResponse:
            return (await self._whole()).response

        return _Later(response)

    @property
    def usage(self) -> TokenUsage | None:
        """Tokens of the answers that are over; `None` before the first."""
        stream = self._reading.source
        return None if stream is None else cast("TokenUsage | None", stream.usage)

    @property
    def cost(self) -> Decimal | None:
        """US dollars of the answers that are over; `None` if unknown."""
        stream = self._reading.source
        return None if stream is None else cast("Decimal | None", stream.cost)

    @property
    def attempts(self) -> int:
        """Answers that are over."""
        stream = self._reading.source
        return 0 if stream is None else cast("int", stream.attempts)

    async def _whole(self) -> Parsed[T]:
        stream = await self._rest()
        if stream is None:
            raise LLMConfigError("the stream was closed before it began")
        return cast("Parsed[T]", stream.parsed)


class AsyncMapRun(_AsyncIterator[MapResult]):
    """A map under way: `async for`, once; leaving its `async with` block ends what is under way."""

    def __await__(self) -> Generator[Any, Any, AsyncMapRun]:
        return self.__aenter__().__await__()

    async def __aenter__(self) -> AsyncMapRun:
        await self._reading.open()
        return self

    @property
    def progress(self) -> MapProgress | None:
        """How far it is; `None` before it has begun."""
        run: MapRun | None = self._reading.source
        return None if run is None else run.progress


class _Pulled(Iterator[Any]):
    """What a coroutine brings forth, for the thread that wants it."""

    def __init__(self, items: AsyncIterable[Any], loop: Loop) -> None:
        self._items = items.__aiter__()
        self._loop = loop

    def __next__(self) -> Any:
        async def following() -> tuple[Any, ...]:
            try:
                return (await self._items.__anext__(),)
            except StopAsyncIteration:
                return ()

        asked = asyncio.run_coroutine_threadsafe(following(), self._loop)
        with woken(asked.cancel):
            try:
                found = asked.result()
            except CancelledError:
                found = None
        if found is None:
            raise LLMCancelledError("cancelled while it waited for an item")
        if not found:
            raise StopIteration
        return found[0]


class AsyncBatchResults(_AsyncIterator[MapResult]):
    """What came of a batch, `async for`; closed as an `AsyncStream` is."""

    def __await__(self) -> Generator[Any, Any, AsyncBatchResults]:
        return self.__aenter__().__await__()

    async def __aenter__(self) -> AsyncBatchResults:
        await self._reading.open()
        return self

    @property
    def batch(self) -> Batch | None:
        """The batch; `None` before it has begun."""
        found: BatchResults | None = self._reading.source
        return None if found is None else found.batch

    @property
    def keys(self) -> list[str]:
        """Those of the results that came."""
        found: BatchResults | None = self._reading.source
        return [] if found is None else found.keys


class AsyncBatchList(_AsyncIterator[Batch]):
    """The batches of an account, `async for`."""

    def __await__(self) -> Generator[Any, Any, AsyncBatchList]:
        return self.__aenter__().__await__()

    async def __aenter__(self) -> AsyncBatchList:
        await self._reading.open()
        return self


class AsyncBatches:
    """The batch API of the client's provider, awaited; `llm.batches`. Everything is as in `Batches`."""

    def __init__(self, batches: Batches, crew: Crew) -> None:
        self._batches = batches
        self._crew = crew

    async def submit(
        self,
        items: Iterable[Any],
        *,
        completion_window: str = "24h",
        metadata: Mapping[str, str] | None = None,
        **call: Any,
    ) -> Batch:
        """Send calls as one batch. Cancelled, it may be there all the same: look at `list()`."""
        how: dict[str, Any] = {"completion_window": completion_window, "metadata": metadata}
        return await self._crew.run(partial(self._batches.submit, items, **how, **call))

    async def poll(self, batch: Batch | str, **where: Any) -> Batch:
        """How far a batch is."""
        return await self._crew.run(partial(self._batches.poll, batch, **where))

    async def wait(
        self,
        batch: Batch | str,
        *,
        interval: float | None = None,
        deadline: float | None = None,
        progress: Callable[[Batch], object] | None = None,
        **where: Any,
    ) -> Batch:
        """Look at a batch until it is over. `progress` is called in another thread."""
        how: dict[str, Any] = {"interval": interval, "deadline": deadline, "progress": progress}
        return await self._crew.run(partial(self._batches.wait, batch, **how, **where))

    async def cancel(self, batch: Batch | str, **where: Any) -> Batch:
        """End a batch; what was answered by then has results, and costs."""
        return await self._crew.run(partial(self._batches.cancel, batch, **where))

    def list(self, *, limit: int | None = None, **where: Any) -> AsyncBatchList:
        """The account's batches, the newest first."""
        work = partial(self._batches.list, limit=limit, **where)
        return AsyncBatchList(Reading(self._crew, work), _forget)

    def results(
        self, batch: Batch | str, *, keys: Iterable[str] = (), **where: Any
    ) -> AsyncBatchResults:
        """What came of a batch: a result for each request, in any order."""
        work = partial(self._batches.results, batch, keys=keys, **where)
        return AsyncBatchResults(Reading(self._crew, work), _forget)


def _forget(_: object) -> None:
    """No answer of this task."""


class AsyncLLM:
    """A client for language models, awaited; create one, share it between all tasks.

    In short::

        async with AsyncLLM(model="openai/gpt-4o-mini") as llm:
            reply = await llm.chat_completion([{"role": "user", "content": "Hello!"}])
            async for text in llm.stream([{"role": "user", "content": "And?"}]).text_stream:
                print(text, end="")

    It is for asyncio, in one event loop or in several. Cancelling what waits for a call, or a timeout
    around it, closes the call's connection and settles its budget, then returns. Hooks, and functions
    given to the client, are called in threads.

    Args:
        config: the settings; left out: the defaults. Without a `pool_size` in them, as many connections
            are kept as calls can be under way.
        session: as `LLM` takes it, and so are all further arguments but the last.
        retries: see `LLM`.
        clock: see `LLM`.
        rate_limiter: see `LLM`.
        budget: see `LLM`.
        cache: see `LLM`.
        fallbacks: see `LLM`.
        hooks: see `LLM`.
        price: see `LLM`.
        usage_store: see `LLM`.
        max_concurrency: calls under way at a time, each in a thread; more wait, first come, first served.
        settings: settings by name, as shortcuts; they beat the config's.

    Raises:
        LLMConfigError: a setting is unknown or cannot be used.
    """

    def __init__(
        self,
        config: LLMConfig | None = None,
        *,
        session: Any = None,
        retries: Any = None,
        clock: Clock | None = None,
        rate_limiter: RateLimiter | Mapping[str, RateLimiter] | None = None,
        budget: Budget | Decimal | float | str | None = None,
        cache: ResponseCache | str | None = None,
        fallbacks: FallbackPolicy | Sequence[str | LLMConfig] | None = None,
        hooks: Sequence[Hook] | Hook = (),
        price: Price | Mapping[str, Price] | None = None,
        usage_store: Spending | str | None = None,
        max_concurrency: int = MAX_CONCURRENCY,
        **settings: Any,
    ) -> None:
        crew = _crew(max_concurrency)
        if config is None:
            config, settings = LLMConfig(**settings), {}
        if isinstance(config, LLMConfig) and not config.is_set("pool_size"):
            settings.setdefault("pool_size", max(config.pool_size, max_concurrency))
        client = LLM(
            config,
            session=session,
            retries=retries,
            clock=clock,
            rate_limiter=rate_limiter,
            budget=budget,
            cache=cache,
            fallbacks=fallbacks,
            hooks=hooks,
            price=price,
            usage_store=usage_store,
            **settings,
        )
        self._set_up(client, crew, owner=True)

    def _set_up(self, client: LLM, crew: Crew, *, owner: bool) -> None:
        self._llm = client
        self._crew = crew
        self._owner = owner  # of the client
        self._last: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()

    @classmethod
    def of(cls, llm: LLM, *, max_concurrency: int = MAX_CONCURRENCY) -> AsyncLLM:
        """The calls of a client that is there already, awaited. Closing it does not close that one.

        Args:
            llm: the client; its `pool_size` says how many connections are kept.
            max_concurrency: as `AsyncLLM` takes it.
        """
        if not isinstance(llm, LLM):
            raise LLMConfigError(f"llm is {type(llm).__name__}; give an LLM")
        made = object.__new__(cls)
        made._set_up(llm, _crew(max_concurrency), owner=False)
        return made

    @property
    def llm(self) -> LLM:
        """The client that makes the calls; it can be used from threads beside this one."""
        return self._llm

    @property
    def config(self) -> LLMConfig:
        """The settings."""
        return self._llm.config

    @overload
    async def chat_completion(
        self,
        messages: Messages,
        temperature: float | Unset | None = ...,
        max_tokens: int | Unset | None = ...,
        *,
        model: str | None = ...,
        provider: str | None = ...,
        tools: Sequence[Any] | None = ...,
        stream: Literal[False] = ...,
        timeout: float | Unset | None = ...,
        deadline: float | Unset | None = ...,
        cache: CacheMode = ...,
        extra_headers: Mapping[str, str] | None = ...,
        extra_body: Mapping[str, Any] | None = ...,
        **kwargs: Any,
    ) -> ChatCompletionResponse: ...
    @overload
    async def chat_completion(
        self,
        messages: Messages,
        temperature: float | Unset | None = ...,
        max_tokens: int | Unset | None = ...,
        *,
        model: str | None = ...,
        provider: str | None = ...,
        tools: Sequence[Any] | None = ...,
        stream: Literal[True],
        timeout: float | Unset | None = ...,
        deadline: float | Unset | None = ...,
        cache: CacheMode = ...,
        extra_headers: Mapping[str, str] | None = ...,
        extra_body: Mapping[str, Any] | None = ...,
        **kwargs: Any,
    ) -> AsyncStream: ...
    @overload
    async def chat_completion(
        self,
        messages: Messages,
        temperature: float | Unset | None = ...,
        max_tokens: int | Unset | None = ...,
        *,
        model: str | None = ...,
        provider: str | None = ...,
        tools: Sequence[Any] | None = ...,
        stream: bool,
        timeout: float | Unset | None = ...,
        deadline: float | Unset | None = ...,
        cache: CacheMode = ...,
        extra_headers: Mapping[str, str] | None = ...,
        extra_body: Mapping[str, Any] | None = ...,
        **kwargs: Any,
    ) -> ChatCompletionResponse | AsyncStream: ...

    async def chat_completion(
        self,
        messages: Messages,
        temperature: float | Unset | None = UNSET,
        max_tokens: int | Unset | None = UNSET,
        *,
        model: str | None = None,
        provider: str | None = None,
        tools: Sequence[Any] | None = None,
        stream: bool = False,
        timeout: float | Unset | None = UNSET,
        deadline: float | Unset | None = UNSET,
        cache: CacheMode = "on",
        extra_headers: Mapping[str, str] | None = None,
        extra_body: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> ChatCompletionResponse | AsyncStream:
        """Ask for the next message of a conversation.

        Arguments and errors are those of `LLM.chat_completion`. The deadline counts from here, also while the
        call waits for others (`max_concurrency`).

        Returns:
            A `ChatCompletionResponse`, or with `stream=True` an `AsyncStream` whose first event has come.
        """
        options: dict[str, Any] = {
            "model": model,
            "provider": provider,
            "tools": tools,
            "stream": stream,
            "timeout": timeout,
            "deadline": deadline,
            "cache": cache,
            "extra_headers": extra_headers,
            "extra_body": extra_body,
            **kwargs,
        }
        if stream:
            return await self._stream(
                LLM.chat_completion, (messages, temperature, max_tokens), options
            )
        return await self._run(LLM.chat_completion, (messages, temperature, max_tokens), options)

    def stream(
        self,
        messages: Messages,
        temperature: float | Unset | None = UNSET,
        max_tokens: int | Unset | None = UNSET,
        *,
        on_error: OnError = "raise",
        model: str | None = None,
        provider: str | None = None,
        tools: Sequence[Any] | None = None,
        timeout: float | Unset | None = UNSET,
        deadline: float | Unset | None = UNSET,
        cache: CacheMode = "on",
        extra_headers: Mapping[str, str] | None = None,
        extra_body: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> AsyncStream:
        """Ask like `chat_completion`, and get the answer as it comes.

        Arguments and errors are those of `LLM.stream`.

        Returns:
            An `AsyncStream`. Nothing is sent before it is awaited (then its first event has come), entered
            with `async with`, or iterated.
        """
        options: dict[str, Any] = {
            "on_error": on_error,
            "model": model,
            "provider": provider,
            "tools": tools,
            "timeout": timeout,
            "deadline": deadline,
            "cache": cache,
            "extra_headers": extra_headers,
            "extra_body": extra_body,
            **kwargs,
        }
        return self._stream(LLM.stream, (messages, temperature, max_tokens), options)

    @overload
    async def completion(
        self,
        prompt: str | Sequence[Any],
        temperature: float | Unset | None = ...,
        max_tokens: int | Unset | None = ...,
        *,
        model: str | None = ...,
        provider: str | None = ...,
        stream: Literal[False] = ...,
        timeout: float | Unset | None = ...,
        deadline: float | Unset | None = ...,
        cache: CacheMode = ...,
        extra_headers: Mapping[str, str] | None = ...,
        extra_body: Mapping[str, Any] | None = ...,
        **kwargs: Any,
    ) -> CompletionResponse: ...
    @overload
    async def completion(
        self,
        prompt: str | Sequence[Any],
        temperature: float | Unset | None = ...,
        max_tokens: int | Unset | None = ...,
        *,
        model: str | None = ...,
        provider: str | None = ...,
        stream: Literal[True],
        timeout: float | Unset | None = ...,
        deadline: float | Unset | None = ...,
        cache: CacheMode = ...,
        extra_headers: Mapping[str, str] | None = ...,
        extra_body: Mapping[str, Any] | None = ...,
        **kwargs: Any,
    ) -> AsyncStream: ...
    @overload
    async def completion(
        self,
        prompt: str | Sequence[Any],
        temperature: float | Unset | None = ...,
        max_tokens: int | Unset | None = ...,
        *,
        model: str | None = ...,
        provider: str | None = ...,
        stream: bool,
        timeout: float | Unset | None = ...,
        deadline: float | Unset | None = ...,
        cache: CacheMode = ...,
        extra_headers: Mapping[str, str] | None = ...,
        extra_body: Mapping[str, Any] | None = ...,
        **kwargs: Any,
    ) -> CompletionResponse | AsyncStream: ...

    async def completion(
        self,
        prompt: str | Sequence[Any],
        temperature: float | Unset | None = UNSET,
        max_tokens: int | Unset | None = UNSET,
        *,
        model: str | None = None,
        provider: str | None = None,
        stream: bool = False,
        timeout: float | Unset | None = UNSET,
        deadline: float | Unset | None = UNSET,
        cache: CacheMode = "on",
        extra_headers: Mapping[str, str] | None = None,
        extra_body: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> CompletionResponse | AsyncStream:
        """Continue a text. Arguments and errors are those of `LLM.completion`.

        Returns:
            A `CompletionResponse` with one choice for each prompt, or with `stream=True` an `AsyncStream`.
        """
        options: dict[str, Any] = {
            "model": model,
            "provider": provider,
            "stream": stream,
            "timeout": timeout,
            "deadline": deadline,
            "cache": cache,
            "extra_headers": extra_headers,
            "extra_body": extra_body,
            **kwargs,
        }
        if stream:
            return await self._stream(LLM.completion, (prompt, temperature, max_tokens), options)
        return await self._run(LLM.completion, (prompt, temperature, max_tokens), options)

    async def list_models(
        self,
        *,
        provider: str | None = None,
        timeout: float | Unset | None = UNSET,
        deadline: float | Unset | None = UNSET,
        extra_headers: Mapping[str, str] | None = None,
    ) -> ModelsResponse:
        """The models that a host serves. Arguments and errors are those of `LLM.list_models`."""
        options: dict[str, Any] = {
            "provider": provider,
            "timeout": timeout,
            "deadline": deadline,
            "extra_headers": extra_headers,
        }
        return await self._run(LLM.list_models, (), options)

    async def generate(
        self, messages_or_text: str | Messages, *, system: str | None = None, **kwargs: Any
    ) -> Reply:
        """Ask, and get a plain value whatever happens: an `LLMError` is never raised.

        Arguments are those of `LLM.generate`. Cancelled, it raises `CancelledError` like any other await.

        Returns:
            A `Reply`; `.success` says which kind, `.error_message` what went wrong.
        """
        options: dict[str, Any] = {"system": system, **kwargs}
        return await self._run(LLM.generate, (messages_or_text,), options)

    async def compare(
        self, models: Sequence[str], messages_or_text: str | Messages, **kwargs: Any
    ) -> list[Comparison]:
        """The same question to several models at once. Arguments and errors are those of `LLM.compare`.

        Returns:
            A `Comparison` for each model, in their order; one that failed says why.
        """
        return await self._run(LLM.compare, (models, messages_or_text), kwargs)

    def map(
        self,
        items: Iterable[Any] | AsyncIterable[Any],
        *,
        prompt: Prompt | None = None,
        concurrency: int = 16,
        ordered: bool = True,
        journal: str | os.PathLike[str] | None = None,
        key: Key | str | None = None,
        progress: bool | Progress | None = None,
        on_error: Literal["keep", "raise"] = "keep",
        deadline: float | None = None,
        via: Literal["calls", "batch"] = "calls",
        engine: Literal["threads", "ray"] = "threads",
        **call: Any,
    ) -> AsyncMapRun:
        """Ask for each of many items, several at a time, and iterate what became of them.

            async with llm.map(questions, journal="run.jsonl") as results:
                async for result in results:
                    print(result.text if result.success else result.error)

        Arguments and errors are those of `LLM.map`; the calls run in `concurrency` threads of its own. A
        plain iterable, and `prompt`, `key` and `progress`, are used in another thread than the loop's.

        Args:
            items: as `LLM.map` takes them, or an asynchronous iterable of the same.
        """
        how: dict[str, Any] = {
            "prompt": prompt,
            "concurrency": concurrency,
            "ordered": ordered,
            "journal": journal,
            "key": key,
            "progress": progress,
            "on_error": on_error,
            "deadline": deadline,
            "via": via,
            "engine": engine,
            **call,
        }
        taken = _Pulled(items, running_loop()) if isinstance(items, AsyncIterable) else items
        return AsyncMapRun(self._reading(LLM.map, (taken,), how, alone=False), _forget)

    @property
    def batches(self) -> AsyncBatches:
        """The provider's batch API: many calls as one job, within a day, at half the price."""
        return AsyncBatches(self._llm.batches, self._crew)

    async def parse(
        self,
        messages_or_text: str | Messages,
        output_type: type[T],
        *,
        mode: OutputMode = "auto",
        max_attempts: int = 3,
        **kwargs: Any,
    ) -> T:
        """Ask, and get the answer as an instance of a type. Arguments and errors are those of `LLM.parse`."""
        asked: dict[str, Any] = {"mode": mode, "max_attempts": max_attempts, **kwargs}
        found: T = await self._run(LLM.parse, (messages_or_text, output_type), asked)
        return found

    async def parsed(
        self,
        messages_or_text: str | Messages,
        output_type: type[T],
        *,
        mode: OutputMode = "auto",
        max_attempts: int = 3,
        **kwargs: Any,
    ) -> Parsed[T]:
        """As `parse`; the instance stands in `.output`, beside the response and what it took."""
        asked: dict[str, Any] = {"mode": mode, "max_attempts": max_attempts, **kwargs}
        found: Parsed[T] = await self._run(LLM.parsed, (messages_or_text, output_type), asked)
        return found

    def stream_parsed(
        self,
        messages_or_text: str | Messages,
        output_type: type[T],
        *,
        mode: OutputMode = "auto",
        max_attempts: int = 3,
        **kwargs: Any,
    ) -> AsyncParsedStream[T]:
        """As `parse`, and what is complete of the answer as it grows; the instance is `await ….output`.

        Returns:
            An `AsyncParsedStream`, which begins as an `AsyncStream` does.
        """
        asked: dict[str, Any] = {"mode": mode, "max_attempts": max_attempts, **kwargs}
        reading = self._reading(LLM.stream_parsed, (messages_or_text, output_type), asked)
        return AsyncParsedStream(reading, self._note)

    @property
    def usage(self) -> UsageTotals:
        """What all calls of this client took, by model; shared with the clients made of it."""
        return self._llm.usage

    def budget(
        self,
        usd: Budget | Decimal | float | str | None = None,
        *,
        tokens: int | None = None,
        requests: int | None = None,
        threads: bool = True,
        **more: Any,
    ) -> AbstractContextManager[Budget]:
        """Bound what is spent inside the `with` block, by this task and the tasks that it starts in it.

        A plain `with`, as of `LLM.budget`, which tells of the arguments and errors.
        """
        return self._llm.budget(usd, tokens=tokens, requests=requests, threads=threads, **more)

    def deadline(self, seconds: float | None) -> AbstractContextManager[None]:
        """Bound the time of everything inside the `with` block, in this task and those it starts in it.

        A plain `with`, as of `LLM.deadline`.
        """
        return self._llm.deadline(seconds)

    def get_last_response(self) -> Any:
        """The last response of this task, a stream's once it is over; `None` if there is none."""
        found = self._last.get(asyncio.current_task())
        return found.response if isinstance(found, Stream) else found

    def get_request_count(self) -> int:
        """Calls made since the start or the last reset; retries are attempts of one call."""
        return self._llm.get_request_count()

    def reset_session(self) -> None:
        """A fresh connection pool, counter 0, no last response. Running calls finish on the old pool."""
        self._last.clear()
        self._llm.reset_session()

    def with_options(self, **changes: Any) -> AsyncLLM:
        """A client with changed settings over the same pool, threads, counter and last response.

        Closing it closes nothing. Arguments and errors are those of `LLM.with_options`.
        """
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other._llm = self._llm.with_options(**changes)
        other._borrowed = True
        return other

    # Whether the threads are another's, too.
    _borrowed = False

    @property
    def closed(self) -> bool:
        """Whether it was closed. It cannot be used again."""
        return self._crew.closed

    async def close(self) -> None:
        """Cancel what is under way, close all connections, end the threads.

        Whoever still waits for a call gets `LLMCancelledError`.
        """
        if self._borrowed or self._crew.closed:
            return
        self._crew.close()
        if self._owner:
            await self._crew.run_apart(self._llm.close)
        await self._crew.gone()

    async def aclose(self) -> None:
        """`close`, by the name that `contextlib.aclosing` knows."""
        await self.close()

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def __enter__(self) -> NoReturn:
        raise TypeError("an AsyncLLM is for `async with`; for `with` there is LLM")

    def __exit__(self, *_: object) -> None:
        """Nothing: `with` does not get that far, and says why."""

    def __copy__(self) -> AsyncLLM:
        return self.with_options()

    def __deepcopy__(self, memo: dict[int, Any]) -> AsyncLLM:
        return self.with_options()

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickled, (self._llm, self._crew.most)

    def __repr__(self) -> str:
        return f"Async{self._llm!r}"

    def _stream(
        self, method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> AsyncStream:
        reading = self._reading(method, args, kwargs)
        return AsyncStream(reading, self._note, self._llm._clock)  # noqa: SLF001 - one client in two forms

    def _reading(
        self,
        method: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        *,
        alone: bool = True,
    ) -> Reading[Any, Any]:
        """What is begun later; the blocks that it is made in hold for it, also when they are over by then.

        Its own deadline counts from when somebody waits for it first.
        """
        client = self._llm
        clock = client._clock  # noqa: SLF001 - one client in two forms
        budgets = active_budgets() or client._ledger.budgets  # noqa: SLF001 - the same
        outer = nearest_deadline(None)
        own: list[float | None] = []

        def left() -> float | None:
            if not own:
                own.append(self._own_end(kwargs))
            ends = [end for end in (outer, own[0]) if end is not None]
            return max(min(ends) - clock.now(), 0.0) if ends else None

        def begin() -> Any:
            for budget in budgets:
                enter(budget)
            end = own[0]
            how = kwargs if end is None else {**kwargs, "deadline": max(end - clock.now(), 1e-9)}
            return self._work(method, args, how)()

        return Reading(self._crew, begin, alone=alone, left=left)

    def _own_end(self, kwargs: Mapping[str, Any]) -> float | None:
        """When a call that begins now has to end by its arguments and the config."""
        deadline = kwargs.get("deadline", UNSET)
        if deadline is UNSET:
            deadline = self._llm.config.deadline
        # Anything else is refused where the call is made.
        if type(deadline) in (int, float) and 0 < deadline < math.inf:
            return self._llm._clock.now() + cast("float", deadline)  # noqa: SLF001 - one client in two forms
        return None

    def _work(
        self, method: Callable[..., T], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Callable[[], T]:
        # By its name: the client may be of a class that does it its own way.
        return partial(getattr(self._llm, method.__name__), *args, **kwargs)

    async def _run(
        self, method: Callable[..., T], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> T:
        """A call, in a thread."""
        client = self._llm
        work = self._work(method, args, kwargs)
        noted: list[Any] = []

        def call() -> T:
            before = client.get_last_response()
            try:
                return work()
            finally:
                last = client.get_last_response()
                if last is not before:
                    noted.append(last)

        clock = client._clock  # noqa: SLF001 - one client in two forms
        end = nearest_deadline(self._own_end(kwargs))
        seconds = None
        work_in_time: Callable[[], T] = call
        if end is not None:
            seconds = max(end - clock.now(), 0.0)

            def work_in_time() -> T:
                with client.deadline(max(end - clock.now(), 1e-9)):
                    return call()

        try:
            return await self._crew.run(work_in_time, seconds=seconds)
        finally:
            if noted:
                self._note(noted[0])

    def _note(self, answer: Any) -> None:
        """The last response of this task."""
        try:
            task = asyncio.current_task()
        except RuntimeError:  # no loop runs: the coroutine is being dropped
            return
        if task is not None and answer is not None:
            self._last[task] = answer


def _crew(most: int) -> Crew:
    if type(most) is not int or most < 1:
        raise LLMConfigError(f"max_concurrency is {most!r}; it must be a whole number from 1")
    return Crew(most)


def _unpickled(client: LLM, most: int) -> AsyncLLM:
    made = object.__new__(AsyncLLM)
    made._set_up(client, _crew(most), owner=True)
    return made
