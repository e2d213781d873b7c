"""LLM: the client."""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from decimal import Decimal
from functools import partial
from importlib import import_module
from operator import length_hint
from typing import Any, Literal, NamedTuple, TypeVar, cast, overload

from LLM.batch import Key, MapRun, Progress, Prompt, Results, ThreadedMap, job_of, tasks
from LLM.batch_run import BatchRun
from LLM.batches import Batches, BatchMemory, Lent
from LLM.cancel import calling_thread
from LLM.clock import Clock
from LLM.config import (
    LLMConfig,
    check_headers,
    checked_positive,
    checked_seconds,
    checked_temperature,
)
from LLM.errors import LLMBudgetError, LLMConfigError, LLMError, LLMTimeoutError
from LLM.forks import renew_after_fork
from LLM.journal import Journal
from LLM.output import Asking, Output, OutputMode, Parsed, ParsedStream
from LLM.pipeline import (
    Done,
    Job,
    Layer,
    afford,
    build_pipeline,
    exchange,
    fall_back,
    observe,
    pace,
    place_of,
    remember,
    retry,
)
from LLM.policies.budget import Budget, active_budgets, enter, leave
from LLM.policies.cache import CACHE_MODES, CacheMode, ResponseCache
from LLM.policies.fallback import FallbackPolicy
from LLM.policies.ratelimit import RateLimiter
from LLM.policies.retry import RetryPolicy, RetryQuota, as_policy
from LLM.policies.spending import Spending
from LLM.policies.usage import UsageTotals
from LLM.prices import Price, Pricing
from LLM.providers.base import Call, Target, encode
from LLM.providers.hosts import COMPATIBLE, known_host
from LLM.providers.targets import address, fallback_target, find_target, provider_of
from LLM.stream import Stream
from LLM.telemetry import Hook, Hooks, logging_hook
from LLM.tokens import TokenCount, TokenEstimator, context_window
from LLM.transport import Transport
from LLM.types import (
    UNSET,
    Answer,
    CallInfo,
    ChatCompletionResponse,
    Comparison,
    CompletionResponse,
    Ending,
    Message,
    ModelsResponse,
    Reply,
    TokenUsage,
    Unset,
)

log = logging.getLogger("LLM")

T = TypeVar("T")

Messages = Iterable[Message | Mapping[str, Any]]
OnError = Literal["raise", "event"]


class _Options(NamedTuple):
    """The arguments of a call that are not fields of its body."""

    model: str | None
    provider: str | None
    stream: bool
    timeout: float | Unset | None
    deadline: float | Unset | None
    headers: Mapping[str, str] | None
    body: Mapping[str, Any] | None
    cache: str = "on"


# What a call does not take, though a client does: it would be sent to the server, a key even.
_OF_THE_CLIENT = frozenset(
    "api_key api_keys base_url budget cert config connect_timeout default_headers fallbacks headers hooks "
    "max_response_bytes max_retries max_retry_delay on_error pool_size price proxies rate_limiter "
    "requests_per_minute retries retry_delay retry_jitter session tokens_per_minute usage_store "
    "verify".split()
)


# Fields of a body that are counted by themselves, or that the model never reads.
_COUNTED = frozenset("messages prompt tools tool_choice stop model user metadata".split())


def _check(name: str, check: Callable[[Any], object], value: Any) -> None:
    problem = ""
    try:
        check(value)
    except ValueError as error:
        problem = str(error)
    if problem:
        raise LLMConfigError(f"{name} {problem}")


# The end of the innermost `with llm.deadline(…)` that this thread (or task) is in. The variable itself
# never changes; its values belong to the context.
_deadline: ContextVar[float | None] = ContextVar("LLM deadline", default=None)


def nearest_deadline(deadline_at: float | None) -> float | None:
    """When a call that ends at `deadline_at` (`None`: whenever) has to end, here and now."""
    outer = _deadline.get()
    if outer is None or deadline_at is None:
        return outer if deadline_at is None else deadline_at
    return min(outer, deadline_at)


def _unpickled(config: LLMConfig, retries: Any, fallbacks: Any = None) -> LLM:
    return LLM(config, retries=retries, fallbacks=fallbacks)


# Those that hold a state or a function of this process: a pickle would lose it silently.
_NOT_PICKLED = ("rate_limiter", "budget", "cache", "hooks", "price", "usage_store")


class _Block(NamedTuple):
    """An open `with llm.budget(…)`, and the threads that were there before it."""

    budget: Budget
    before: weakref.WeakSet[threading.Thread]


class _Ledger:
    """What a client counts and remembers; shared by the clients made `with_options` of it."""

    def __init__(self, clock: Clock) -> None:
        self.quota = RetryQuota()
        self.totals = UsageTotals(clock=clock)
        self.estimator = TokenEstimator()
        self.output_modes: dict[tuple[str, str], str] = {}  # of `parse`; by address and model
        self.batches = BatchMemory()
        self._blocks: tuple[_Block, ...] = ()
        self.after_fork()
        self.reset()
        renew_after_fork(self)

    def after_fork(self) -> None:
        self._lock = threading.Lock()

    def reset(self) -> None:
        with self._lock:
            self.calls = 0
        self._last = threading.local()

    def count(self) -> None:
        with self._lock:
            self.calls += 1

    def open(self, budget: Budget) -> _Block:
        """Note that a `with llm.budget(…)` block begins."""
        block = _Block(budget, weakref.WeakSet(threading.enumerate()))
        with self._lock:
            self._blocks = (*self._blocks, block)
        return block

    def close(self, block: _Block) -> None:
        with self._lock:
            self._blocks = tuple(other for other in self._blocks if other is not block)

    @property
    def budgets(self) -> tuple[Budget, ...]:
        """Those of the open blocks inside which this thread may have been started."""
        if not self._blocks:
            return ()
        thread = calling_thread()
        return tuple(block.budget for block in self._blocks if thread not in block.before)

    def note(self, outcome: Done | Stream | None) -> None:
        if outcome is not None:
            self._last.answer = outcome.answer if isinstance(outcome, Done) else outcome

    @property
    def last(self) -> Answer | None:
        found = getattr(self._last, "answer", None)
        return found.response if isinstance(found, Stream) else found


def _as_messages(messages_or_text: Any) -> Any:
    if isinstance(messages_or_text, str):
        return [{"role": "user", "content": messages_or_text}]
    return messages_or_text


def _merged(call: Mapping[str, Any], request: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of one call of a map: the item's own beat those of all."""
    merged = {**call, **request}
    if "extra_body" in call and "extra_body" in request:
        merged["extra_body"] = {**call["extra_body"], **request["extra_body"]}
    return merged


def _check_items(items: Any) -> None:
    if isinstance(items, (str, bytes, Mapping)) or not isinstance(items, Iterable):
        raise LLMConfigError(f"items is {type(items).__name__}; it must be an iterable of items")


def _checked_concurrency(value: Any) -> None:
    if type(value) is not int or not 1 <= value <= 10_000:
        raise ValueError(f"is {value!r:.80}; it must be a whole number from 1 to 10,000")


def _retry_policy(given: Any, config: LLMConfig, _: Clock) -> RetryPolicy:
    if given is not None:
        return as_policy(given)
    return RetryPolicy(
        config.max_retries,
        delay=config.retry_delay,
        jitter=config.retry_jitter,
        max_delay=config.max_retry_delay,
    )


def _limiter(given: Any, config: LLMConfig, clock: Clock) -> Any:
    """From a target to its limiter; `None` without any."""
    if isinstance(given, RateLimiter):
        return lambda _: given
    if isinstance(given, Mapping):
        for name, limiter in given.items():
            if known_host(name) and not isinstance(limiter, RateLimiter):
                raise LLMConfigError(f"rate_limiter[{name!r}] is not a RateLimiter")
        return lambda target: given.get(target.host.name)
    if given is not None:
        raise LLMConfigError(f"rate_limiter is {given!r}; give a RateLimiter, or one by provider")
    requests, tokens = config.requests_per_minute, config.tokens_per_minute
    if requests is None and tokens is None:
        return None
    limiters: dict[str, RateLimiter] = {}

    def of_address(target: Target) -> RateLimiter:
        found = limiters.get(target.base_url)
        if found is None:  # of two threads that come here at once, one's is kept
            new = RateLimiter(requests, tokens, clock=clock)
            found = limiters.setdefault(target.base_url, new)
        return found

    return of_address


def _fallbacks(given: Any, config: LLMConfig, clock: Clock) -> Any:
    """The policy, and the target of each fallback; `None` without any."""
    if given is None:
        return None
    policy = given if isinstance(given, FallbackPolicy) else None
    choices = given.models if policy else given
    if isinstance(choices, (str, LLMConfig)) or not isinstance(choices, Iterable):
        raise LLMConfigError(f"fallbacks is one {type(choices).__name__}; give a list of models")
    found = [fallback_target(config, choice) for choice in choices]
    targets = {place_of(target): target for target in found}
    names = [place.name for place in targets]
    return policy or FallbackPolicy(names, window=context_window, clock=clock), targets


def _made(kind: type[Any], name: str, *values: type[Any]) -> Callable[[Any, LLMConfig, Clock], Any]:
    """What makes a policy of the value that stands for it; an object is taken as it is."""

    def make(given: Any, _: LLMConfig, clock: Clock) -> Any:
        if given is None or isinstance(given, kind):
            return given
        if isinstance(given, (str, *values)):
            return kind(given, clock=clock)
        raise LLMConfigError(f"{name} is {type(given).__name__}; give a {kind.__name__}")

    return make


def _hooks(given: Any, *_: Any) -> tuple[Hook, ...]:
    hooks = () if given is None else (given,) if callable(given) else tuple(given)
    for hook in hooks:
        if not callable(hook):
            raise LLMConfigError(f"hooks holds {hook!r}, which is not a function")
        if getattr(hook, "__name__", "") in ("audit", "otel"):
            raise LLMConfigError(f"hooks holds {hook.__name__} itself; call it: {hook.__name__}(…)")
    return Hooks((logging_hook, *hooks))


# What makes each policy, from what was given as an object and from the config.
_MAKERS: Mapping[str, Callable[[Any, LLMConfig, Clock], Any]] = {
    "retries": _retry_policy,
    "rate_limiter": _limiter,
    "budget": _made(Budget, "budget", int, float, Decimal),
    "cache": _made(ResponseCache, "cache"),
    "fallbacks": _fallbacks,
    "hooks": _hooks,
    "price": lambda given, *_: Pricing(given),
    "usage_store": _made(Spending, "usage_store"),
}
# The settings that a policy is made of, beside the one of its own name.
_POLICY_OF = {
    **dict.fromkeys(("max_retries", "retry_delay", "retry_jitter", "max_retry_delay"), "retries"),
    **dict.fromkeys(("requests_per_minute", "tokens_per_minute"), "rate_limiter"),
}


class LLM:
    """A client for language models; create one, share it between all threads.

    Nothing is opened before the first call. After `close()` a later call opens a new pool.

    Args:
        config: the settings; left out: the defaults.
        session: a `requests.Session` of your own: its adapters, hooks and proxies are used. Its
            authentication, cookies and redirects are not, and `close()` does not close it.
        retries: a `RetryPolicy`, or any `urllib3.util.Retry`, in place of the config's retry settings.
        clock: for tests: what tells the time and sleeps between attempts.
        rate_limiter: a `RateLimiter`, which other clients may share, or one for each provider, by name.
        budget: a `Budget`, or US dollars: what the client may spend in all.
        cache: a `ResponseCache`, or the address of one.
        fallbacks: models (`"provider/model"`, or an `LLMConfig` for a server of your own) to ask, in
            this order, when the first one cannot answer; or a `FallbackPolicy`.
        hooks: functions that get an event when a call starts, waits, fails or ends.
        price: a `Price` for all models, or one for each, by name; beats the data of the extra `cost`.
        usage_store: a `Spending`, or the address of one: where what was spent is written down.
        settings: settings by name, as shortcuts: `LLM(model="openai/gpt-4o")`; they beat the config's.

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
        **settings: Any,
    ) -> None:
        if config is None:
            config = LLMConfig(**settings)
        elif not isinstance(config, LLMConfig):
            raise TypeError(f"config must be an LLMConfig, not {type(config).__name__}")
        elif settings:
            config = config.replace(**settings)
        self.config = config
        if session is not None and not hasattr(session, "get_adapter"):
            raise TypeError(f"session must be a requests.Session, not {type(session).__name__}")
        self._owner = True
        self._clock = clock or Clock()
        self._ledger = _Ledger(self._clock)
        self._transport = Transport(config, self._clock, session)
        self._given: dict[str, Any] = {
            "retries": retries,
            "rate_limiter": rate_limiter,
            "budget": budget,
            "cache": cache,
            "fallbacks": fallbacks,
            "hooks": hooks or None,
            "price": price,
            "usage_store": usage_store,
        }
        self._policies: dict[str, Any] = {}
        self._equip(self._given)
        where = find_target(config)
        log.info("client created: %s at %s", where.host.name, address(where))

    def _equip(self, names: Iterable[str]) -> None:
        """Make these policies, from what was given and from the config, and build the pipeline of all."""
        for name in names:
            given = self._given[name]
            if given is None and name in LLMConfig.model_fields:
                given = getattr(self.config, name) or None
            self._policies[name] = _MAKERS[name](given, self.config, self._clock)
        clock, policies = self._clock, self._policies
        hooks, prices = policies["hooks"], policies["price"]
        limiter, fallbacks = policies["rate_limiter"], policies["fallbacks"]
        # The order of the journey, outermost first.
        layers: list[Layer | None] = [
            observe(clock, hooks, prices, self._note),
            fallbacks and fall_back(fallbacks[0], fallbacks[1], self._prepare),
            policies["cache"] and remember(policies["cache"], clock, hooks),
            retry(policies["retries"], self._ledger.quota, clock, hooks),
            afford(self._budgets, prices, self._count),
            limiter and pace(limiter, clock, hooks),
        ]
        self._handle = build_pipeline(
            exchange(self._transport, clock), [layer for layer in layers if layer is not None]
        )
        self._targets: dict[tuple[str | None, str | None], Target] = {}

    @overload
    def chat_completion(
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
    def chat_completion(
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
    ) -> Stream: ...
    @overload
    def chat_completion(
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
    ) -> ChatCompletionResponse | Stream: ...

    def chat_completion(
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
    ) -> ChatCompletionResponse | Stream:
        """Ask for the next message of a conversation.

        Args:
            messages: each a `Message` or a plain dict in OpenAI's form, whatever the provider; they
                are never changed.
            temperature: 0.0 to 2.0; left out: the config's; `None`: the model's own default.
            max_tokens: largest answer in tokens; left out: the config's; `None`: no limit is sent.
            model: another model for this call, perhaps on another host: `"anthropic/claude-…"`.
            provider: another host for this call, by name.
            tools: tools in OpenAI's form that the model may call.
            stream: give a `Stream` instead of waiting for the whole answer.
            timeout: seconds for one attempt, or between two events; left out: the config's; `None`:
                no limit.
            deadline: seconds for the whole call; left out: the config's; `None`: no limit.
            cache: of a client with a cache: `"on"`; `"read"`: use a kept answer, keep none;
                `"refresh"`: ask anew and keep the answer; `"off"`.
            extra_headers: added to the request; may not carry a credential.
            extra_body: fields put into the body as they are, over everything else.
            kwargs: further fields of the body (`top_p=…`, `stop=…`, `seed=…`); `None` leaves one out.

        Returns:
            A `ChatCompletionResponse`, or with `stream=True` a `Stream` whose first event has come.

        Raises:
            LLMConfigError: the call cannot be made as it is; nothing was sent.
            LLMError: it failed, after the retries that could help; `.history` tells of each attempt.
        """
        params = {"temperature": temperature, "max_tokens": max_tokens, "tools": tools, **kwargs}
        options = _Options(
            model, provider, stream, timeout, deadline, extra_headers, extra_body, cache
        )
        return cast(
            "ChatCompletionResponse | Stream", self._call("chat", messages, params, options)
        )

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
    ) -> Stream:
        """Ask like `chat_completion`, and get the answer as it comes.

        Args:
            on_error: `"event"`: a failure, even of the very first attempt, is the stream's last event
                (`ERROR`) and is not raised.
            kwargs: further fields of the body; the other arguments are those of `chat_completion`.

        Returns:
            A `Stream` whose first event has come.
        """
        if on_error not in ("raise", "event"):
            raise LLMConfigError(f"on_error is {on_error!r}; it must be 'raise' or 'event'")
        kwargs.pop("stream", None)  # it is one anyway
        try:
            stream = self.chat_completion(
                messages,
                temperature,
                max_tokens,
                model=model,
                provider=provider,
                tools=tools,
                stream=True,
                timeout=timeout,
                deadline=deadline,
                cache=cache,
                extra_headers=extra_headers,
                extra_body=extra_body,
                **kwargs,
            )
        except LLMError as error:
            if on_error == "raise":
                raise
            return Stream.failed(error, self._clock)
        stream.raise_errors(on_error == "raise")
        return stream

    @overload
    def completion(
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
    def completion(
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
    ) -> Stream: ...
    @overload
    def completion(
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
    ) -> CompletionResponse | Stream: ...

    def completion(
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
    ) -> CompletionResponse | Stream:
        """Continue a text. Anthropic has no such endpoint; there the prompt is sent as one message.

        Args:
            prompt: a text, or a list of texts (or of token numbers) where the server takes one.
            kwargs: further fields of the body; the other arguments are those of `chat_completion`.

        Returns:
            A `CompletionResponse` with one choice for each prompt, or with `stream=True` a `Stream`.

        Raises:
            LLMError: as `chat_completion`.
        """
        params = {"temperature": temperature, "max_tokens": max_tokens, **kwargs}
        options = _Options(
            model, provider, stream, timeout, deadline, extra_headers, extra_body, cache
        )
        return cast(
            "CompletionResponse | Stream", self._call("completion", prompt, params, options)
        )

    def list_models(
        self,
        *,
        provider: str | None = None,
        timeout: float | Unset | None = UNSET,
        deadline: float | Unset | None = UNSET,
        extra_headers: Mapping[str, str] | None = None,
    ) -> ModelsResponse:
        """The models that a host serves.

        Args:
            provider: another host than the config's, by name.

        Returns:
            A `ModelsResponse`; iterate it, or look at `.data[i].id`.

        Raises:
            LLMError: as `chat_completion`.
        """
        model = "any" if provider is not None else None  # no model is asked
        options = _Options(model, provider, False, timeout, deadline, extra_headers, None)
        return cast("ModelsResponse", self._call("models", None, {}, options))

    def generate(
        self, messages_or_text: str | Messages, *, system: str | None = None, **kwargs: Any
    ) -> Reply:
        """Ask, and get a plain value whatever happens: an `LLMError` is never raised.

        Args:
            messages_or_text: messages, or just what the user says.
            system: a system message put before them.
            kwargs: everything else that `chat_completion` takes but `stream`.

        Returns:
            A `Reply`; `.success` says which kind, `.error_message` what went wrong.
        """
        started = self._clock.now()
        given = _as_messages(messages_or_text)
        if system is not None and isinstance(given, Iterable):
            given = [{"role": "system", "content": system}, *given]
        kwargs.pop("stream", None)
        try:
            response = self.chat_completion(given, **kwargs)
        except LLMError as error:
            return Reply(
                success=False,
                error=error,
                error_message=str(error),
                provider=error.provider,
                model=error.model,
                latency_ms=(self._clock.now() - started) * 1000,
            )
        usage = response.usage
        return Reply(
            content=response.text,
            provider=response.provider,
            model=response.model,
            input_tokens=usage.prompt_tokens if usage else None,
            output_tokens=usage.completion_tokens if usage else None,
            total_tokens=usage.total_tokens if usage else None,
            finish_reason=response.finish_reason,
            latency_ms=response.latency_ms,
            tool_calls=response.tool_calls,
            cost=response.cost,
            cached=response.cached,
        )

    def compare(
        self, models: Sequence[str], messages_or_text: str | Messages, **kwargs: Any
    ) -> list[Comparison]:
        """The same question to several models at once, their answers side by side.

        Args:
            models: as `model=` of a call: `["openai/gpt-4o", "anthropic/claude-…"]`.
            messages_or_text: messages, or just what the user says.
            kwargs: everything else that `stream` takes.

        Returns:
            A `Comparison` for each model, in their order; one that failed says why.

        Raises:
            LLMConfigError: no models are given.
        """
        if not models or isinstance(models, str) or not all(isinstance(m, str) for m in models):
            raise LLMConfigError(f"models is {models!r:.80}; give a list of names")
        messages = _as_messages(messages_or_text)
        messages = list(messages) if isinstance(messages, Iterable) else messages

        def ask(model: str) -> Comparison:
            started = self._clock.now()
            error = stream = answer = None
            try:
                stream = self.stream(messages, model=model, **kwargs)
                answer = stream.response
            except LLMError as failure:
                error, answer = failure, failure.partial
            first = stream.time_to_first_token if stream else None
            return Comparison(
                model=model,
                text=answer.text if answer is not None else "",
                latency_ms=(self._clock.now() - started) * 1000,
                time_to_first_token_ms=None if first is None else first * 1000,
                usage=answer.usage if answer is not None else None,
                cost=answer.cost if answer is not None else None,
                finish_reason=answer.finish_reason if answer is not None else None,
                error=error,
            )

        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(len(models)) as pool:
            running = [pool.submit(copy_context().run, ask, model) for model in models]
            return [future.result() for future in running]

    def map(
        self,
        items: Iterable[Any],
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
    ) -> MapRun:
        """Ask for each of many items, several at a time, and iterate what became of them.

            with llm.map(questions, journal="run.jsonl") as results:
                for result in results:
                    print(result.text if result.success else result.error)

        Items are taken as results are asked for, in the thread that iterates, four for each thread ahead,
        and up to 1,000 while the next one in order is slow: there may be endlessly many. Limits, budgets,
        the cache and the deadline of the block around it apply to each call. Leaving the `with` block ends
        what is under way.

        A failed item is a result with its error. What would make all others fail as well ends the map: 401,
        a used-up quota, a budget that has no room even when nothing else is under way, the deadline, a
        journal that cannot be written or does not fit; and, as long as no item was answered, 403 and 404
        (but not of an item that names a model of its own). Then no further item is begun, what is under way
        is handed out, and the error is raised; so is, after the items before it, what `items` itself raises.

        With a journal, each finished item is in that file before it is handed out. The same call again,
        after Ctrl-C or a crash, reads those from it (`resumed`) and asks only the others, also those that
        failed. A full disk ends the map; what was under way is handed out, though the file has it not.

        Args:
            items: each a text, a list of messages, or a mapping with `messages` or `prompt`, perhaps `key`
                (or `custom_id`), and further arguments of the call; or a line of OpenAI's batch file. An
                item's own arguments beat `call`.
            prompt: makes one of these of each item, so that items can be anything.
            concurrency: calls at a time, at most; each has a thread.
            ordered: results in the order of the items; `False`: as they are completed.
            journal: the path of a file. It keeps answers and a hash of each item, readable by its
                owner only, and belongs to the model and the arguments that it was begun with.
            key: what an item is known by in the journal: a function, or a field's name; left out: the
                item's `key` or `custom_id`, else its place. Keys may not repeat in a journal.
            progress: a bar on stderr: `None`: if that is a terminal and `tqdm` is installed; or a function
                that gets a `MapProgress` after each result.
            on_error: `"raise"`: the first failed item ends the map and its error is raised.
            deadline: seconds for the whole map; `None`: no limit.
            via: `"batch"`: through the provider's batch API, at its lower price, within a day.
            engine: `"ray"`: on a Ray cluster; see `LLM.ray`.
            call: everything else that `chat_completion` takes but `stream`, for all items.

        Returns:
            A `MapRun`, which gives a `MapResult` for each item.

        Raises:
            LLMConfigError: an argument cannot be used.
            JournalError: the journal cannot be opened, is in use, or is that of another job.
        """
        _check_items(items)
        _check("concurrency", _checked_concurrency, concurrency)
        for name, value, choices in (
            ("on_error", on_error, ("keep", "raise")),
            ("via", via, ("calls", "batch")),
            ("engine", engine, ("threads", "ray")),
        ):
            if value not in choices:
                raise LLMConfigError(f"{name} is {value!r:.80}; it must be one of {choices}")
        if "stream" in call:
            raise LLMConfigError("a map takes no stream=: its answers come whole")
        job = self._map_job(call)
        results: Results
        with self.deadline(deadline):
            if via == "batch":
                if engine == "ray":
                    raise LLMConfigError("a batch runs at the provider, not on Ray: choose one")
                results = BatchRun(
                    self.batches,
                    tasks(items, prompt, key, call),
                    call,
                    ordered=ordered,
                    journal=None if journal is None else Journal(journal, job),
                    ends_at=_deadline.get(),
                )
            else:
                source, arguments = tasks(items, prompt, key, call), partial(_merged, call)
                bounds: dict[str, Any] = {
                    "concurrency": concurrency,
                    "ordered": ordered,
                    "journal": None if journal is None else Journal(journal, job),
                    "clock": self._clock,
                    "ends_at": _deadline.get(),
                }
                if engine == "ray":
                    # By its name, for it stands above this module.
                    results = import_module("LLM.ray").map_calls(self, arguments, source, **bounds)
                else:
                    results = ThreadedMap(
                        lambda request: self.chat_completion(**arguments(request)),
                        source,
                        elsewhere=partial(self._is_elsewhere, call),
                        **bounds,
                    )
        total = length_hint(items, -1)
        return MapRun(
            results,
            total=None if total < 0 else total,
            progress=progress,
            on_error=on_error,
            clock=self._clock,
        )

    def _is_elsewhere(self, call: Mapping[str, Any], request: Mapping[str, Any]) -> bool:
        """Whether an item of a map goes to another host, or with another key, than the others do."""
        if not (request.get("model") or request.get("provider")):
            return False
        try:
            own, others = (
                self._target(how.get("model"), how.get("provider"))
                for how in ({**call, **request}, call)
            )
        except LLMConfigError:  # all the others need one of their own, too
            return True
        return (own.base_url, own.key) != (others.base_url, others.key)

    def _map_job(self, call: Mapping[str, Any]) -> dict[str, Any]:
        """What is asked of all items of a map; what is wrong with that is said before the first is asked."""
        params = dict(call)
        names = {"extra_headers": "headers", "extra_body": "body"}
        given = {
            field: params.pop(name)
            for name in ("model", "provider", "timeout", "cache", *names)
            if name in params
            for field in (names.get(name, name),)
        }
        options = _Options(None, None, False, UNSET, UNSET, None, None)._replace(**given)
        params = {"temperature": UNSET, "max_tokens": UNSET, **params}
        example = self._describe(
            "chat", _as_messages("?"), params, options, started=self._clock.now()
        )
        provider_of(example.target).build(example)
        if self._budgets():
            self._count(example, exact=True)  # a vocabulary is loaded once here, not by each thread
        target = example.target
        return job_of(target.host.name, target.model, {**example.params, **example.extra_body})

    def parse(
        self,
        messages_or_text: str | Messages,
        output_type: type[T],
        *,
        mode: OutputMode = "auto",
        max_attempts: int = 3,
        **kwargs: Any,
    ) -> T:
        """Ask, and get the answer as an instance of a type.

        An invalid answer is asked for again, with what is wrong with it.

        Args:
            messages_or_text: messages, or just what the user says.
            output_type: a pydantic model, a dataclass, a `TypedDict`, `list[…]`, `Literal[…]`, `int` …
            mode: `"schema"`: the server holds the model to the schema; `"tool"`: the model must call a
                tool with the answer; `"prompt"`: it is told the schema. `"auto"`: the first of them
                that the server takes.
            max_attempts: answers of the model in all, at least 1.
            kwargs: everything else that `chat_completion` takes but `stream`. A `deadline` bounds all
                attempts together.

        Raises:
            LLMOutputError: `.reason` says why: the answer was `cut` or `refused`, or still `invalid`.
            LLMConfigError: it cannot be asked like that; nothing was sent.
            LLMError: a call failed. After an invalid answer, its cause is the `LLMOutputError`
                with what was spent till then, unless it has a cause of its own.
        """
        asked = {"mode": mode, "max_attempts": max_attempts, **kwargs}
        return self.parsed(messages_or_text, output_type, **asked).output

    def parsed(
        self,
        messages_or_text: str | Messages,
        output_type: type[T],
        *,
        mode: OutputMode = "auto",
        max_attempts: int = 3,
        **kwargs: Any,
    ) -> Parsed[T]:
        """As `parse`; the instance stands in `.output`, beside the response and what it took."""
        asking, ask = self._asking(messages_or_text, output_type, mode, max_attempts, kwargs)
        found = None
        while found is None:
            found = asking.answered(ask(self.chat_completion))
        return found

    def stream_parsed(
        self,
        messages_or_text: str | Messages,
        output_type: type[T],
        *,
        mode: OutputMode = "auto",
        max_attempts: int = 3,
        **kwargs: Any,
    ) -> ParsedStream[T]:
        """As `parse`, and what is complete of the answer as it grows; the instance stands in `.output`.

        Returns:
            A `ParsedStream` whose first event has come.
        """
        asking, ask = self._asking(messages_or_text, output_type, mode, max_attempts, kwargs)
        return ParsedStream(asking, lambda: ask(self.stream))

    def _asking(
        self, question: Any, output_type: type[T], mode: str, most: int, kwargs: dict[str, Any]
    ) -> tuple[Asking[T], Callable[[Callable[..., Any]], Any]]:
        """The question, and what makes its next call."""
        kwargs = dict(kwargs)
        deadline = kwargs.pop("deadline", UNSET)
        deadline = self.config.deadline if deadline is UNSET else deadline
        _check("deadline", checked_seconds, deadline)
        end = None if deadline is None else self._clock.now() + deadline
        target = self._target(kwargs.get("model"), kwargs.get("provider"))
        others = self._policies["fallbacks"][1].values() if self._policies["fallbacks"] else ()
        dialects = {target.host.dialect, *(other.host.dialect for other in others)}
        # No schema is said in both dialects, but a tool is. And of the servers that borrow the rarer
        # one, some ignore a schema silently (llama.cpp, 2026-11).
        sure = len(dialects) == 1 and (
            dialects == {COMPATIBLE.dialect} or target.base_url == target.host.base_url
        )
        modes, place = self._ledger.output_modes, (target.base_url, target.model)

        def native(output: Output[Any]) -> dict[str, Any]:
            if target.host.dialect != COMPATIBLE.dialect:
                form = {"type": "json_schema", "schema": output.narrow_schema()}
                return {"output_config": {"format": form}}
            schema = {"name": output.name, "strict": output.strict, "schema": output.schema}
            return {"response_format": {"type": "json_schema", "json_schema": schema}}

        asking = Asking(
            output_type,
            _as_messages(question),
            mode=mode,
            max_attempts=most,
            known=modes.get(place, "schema" if sure else "tool"),
            remember=lambda found: modes.__setitem__(place, found),
            native=native,
            more=kwargs,
        )

        def ask(call: Callable[..., Any]) -> Any:
            while True:
                left = None if end is None else end - self._clock.now()
                try:
                    if left is not None and left <= 0:
                        raise LLMTimeoutError("no valid answer by the deadline", clock="deadline")
                    return call(**asking.request(), deadline=left)
                except LLMError as error:
                    asking.failed(error)

        return asking, ask

    @property
    def usage(self) -> UsageTotals:
        """What all calls of this client took, by model; shared with the clients made of it."""
        return self._ledger.totals

    @property
    def batches(self) -> Batches:
        """The provider's batch API: many calls as one job, within a day, at half the price."""
        ledger, policies = self._ledger, self._policies
        return Batches(
            Lent(
                transport=self._transport,
                clock=self._clock,
                hooks=policies["hooks"],
                retries=policies["retries"],
                quota=ledger.quota,
                prices=policies["price"],
                memory=ledger.batches,
                budgets=self._budgets,
                describe=self._describe_named,
                count=self._count,
                record=self._record,
            )
        )

    @contextmanager
    def budget(
        self,
        usd: Budget | Decimal | float | str | None = None,
        *,
        tokens: int | None = None,
        requests: int | None = None,
        threads: bool = True,
        **more: Any,
    ) -> Iterator[Budget]:
        """Bound what is spent inside the `with` block, by this and by any other client or agent.

        Before an attempt is sent the worst case is reserved: the counted prompt and `max_tokens`; it is
        settled to the truth afterwards. What would not fit is refused. Nested, all must fit.

        The block holds for this thread or task, whichever client makes the call. For this client it
        holds also for threads that are started while it is open: a thread cannot tell who started it,
        so of several blocks that are open then, all count. A pool that was there before knows nothing
        of the block; give its tasks the context (`contextvars.copy_context().run`).

        Args:
            usd: US dollars; `None`: no such limit. Or a `Budget` that is there already.
            tokens: tokens, of prompts and answers.
            requests: attempts.
            threads: whether it holds also for threads that are started while it is open. `False`: for this
                thread or task alone, so that of many that share the client each is held to its own.
            more: what else `Budget` takes: `warn_at=`, `on_warn=`, `unknown=`, `store=`, `name=` …

        Raises:
            LLMBudgetError: raised by the calls inside that would not fit.
            LLMConfigError: a limit cannot be used.
        """
        if isinstance(usd, Budget):
            if tokens is not None or requests is not None or more:
                raise LLMConfigError("a Budget that is there already takes no further limits")
            budget = usd
        else:
            budget = Budget(usd, tokens=tokens, requests=requests, clock=self._clock, **more)
        entry = enter(budget)
        opened = self._ledger.open(budget) if threads else None
        try:
            yield budget
        finally:
            if opened is not None:
                self._ledger.close(opened)
            leave(entry)

    @contextmanager
    def deadline(self, seconds: float | None) -> Iterator[None]:
        """Bound everything inside the `with` block, of this and of any other client.

        Calls, streams, waits and retries inside end with `LLMTimeoutError` (`clock="deadline"`) when
        the time is over. Nested, the nearest end counts. It holds for this thread; one started
        inside has to be given the context (`contextvars.copy_context`).

        Args:
            seconds: wall-clock time for the whole block, above 0; `None`: no limit of its own.
        """
        _check("deadline", checked_seconds, seconds)
        end = None if seconds is None else self._clock.now() + seconds
        token = _deadline.set(nearest_deadline(end))
        try:
            yield
        finally:
            _deadline.reset(token)

    def get_last_response(self) -> Any:
        """The last response of this thread, a stream's once it is over; `None` if there is none."""
        return self._ledger.last

    def get_request_count(self) -> int:
        """Calls made since the start or the last reset; retries are attempts of one call."""
        return self._ledger.calls

    def reset_session(self) -> None:
        """A fresh connection pool, counter 0, no last response. Running calls finish on the old pool."""
        self._transport.renew()
        self._ledger.reset()
        log.info("session reset")

    def with_options(self, **changes: Any) -> LLM:
        """A client with changed settings over the same pool, counter and last response.

        Closing it closes nothing: the pool belongs to the client that it was made of.

        Args:
            changes: settings and policies by name, as `LLM` takes them (`None`: as the config says); those
                of the pool itself (`pool_size`, `verify`, `cert`, `proxies`) cannot change.

        Raises:
            LLMConfigError: a setting is unknown, cannot be used, or belongs to the pool.
        """
        fixed = sorted({"pool_size", "verify", "cert", "proxies"} & changes.keys())
        if fixed:
            raise LLMConfigError(
                f"the pool is shared: {', '.join(fixed)} cannot change; make a new LLM"
            )
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other._owner = False
        given = {name: changes.pop(name) for name in _MAKERS.keys() & changes.keys()}
        # What was changed in the config is not shadowed by an object of before.
        renewed = {_POLICY_OF[name] for name in _POLICY_OF.keys() & changes.keys()}
        other._given = {**self._given, **dict.fromkeys(renewed), **given}
        other._policies = dict(self._policies)
        other.config = self.config.replace(**changes)
        other._equip(renewed | given.keys())
        return other

    @property
    def closed(self) -> bool:
        """Whether it was closed and not used since."""
        return self._transport.closed

    def close(self) -> None:
        """Close all connections, those of abandoned streams too. A later call opens new ones."""
        if not self._owner:
            return
        if not self._transport.closed:
            log.info("closed")
        self._transport.close()
        for name in (
            "cache",
            "usage_store",
        ):  # a file that was opened here; used again, it is opened again
            policy = self._policies[name]
            if policy is not None and policy is not self._given[name]:
                policy.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __copy__(self) -> LLM:
        return self.with_options()

    def __deepcopy__(self, memo: dict[int, Any]) -> LLM:
        return self.with_options()

    def __reduce__(self) -> tuple[Any, ...]:
        # The copy opens a pool of its own, and takes its key from where it came, not from the pickle.
        if self._transport.given is not None:
            raise TypeError(
                "a client with a session of its own cannot be pickled; make it anew there"
            )
        lost = [name for name in _NOT_PICKLED if self._given[name] is not None]
        if lost:
            raise TypeError(
                f"a client with {' and '.join(lost)} of its own cannot be pickled; give them there"
            )
        return _unpickled, (self.config, self._given["retries"], self._given["fallbacks"])

    def __repr__(self) -> str:
        target = find_target(self.config)
        return f"LLM(model={target.model!r}, base_url={target.base_url!r})"

    def _call(self, endpoint: str, subject: Any, params: dict[str, Any], options: _Options) -> Any:
        """The one way for a call through the house."""
        started = self._clock.now()
        call = self._describe(endpoint, subject, params, options, started)
        job = self._job(call, started, options.cache)
        self._ledger.count()
        outcome = self._handle(job)
        return outcome.answer if isinstance(outcome, Done) else outcome

    def _job(self, call: Call, started: float, cache: str) -> Job:
        """The call with its request. A long answer is streamed underneath where its host asks for that."""
        provider, above = provider_of(call.target), call.target.host.streams_above
        fold, prompt, most = False, None, None
        if call.endpoint != "models":
            if above is not None and not call.stream:
                fold = (provider.output_limit(call) or 0) > above
                call = call._replace(stream=fold)
            budgets = self._budgets()
            if budgets and "model" in call.extra_body:
                raise LLMBudgetError(
                    "extra_body names another model, whose price is not looked at: give model="
                )
            if budgets or self._policies["rate_limiter"] is not None:
                prompt, most = self._count(call), provider.output_limit(call)
        return Job(call, provider, provider.build(call), started, fold, cache, prompt, most)

    def _prepare(self, job: Job, target: Target) -> Job:
        """The same call for another model."""
        call = job.call._replace(target=target, stream=job.call.stream and not job.fold)
        return self._job(call, job.started, job.cache)

    def _count(self, call: Call, *, exact: bool = False) -> TokenCount:
        """The tokens of a prompt: an estimate, unless it must be exact."""
        count, model = self._ledger.estimator.count, call.target.model
        extra = call.extra_body
        subject = (
            extra.get("messages", extra.get("prompt", call.subject)) if extra else call.subject
        )
        tools = extra.get("tools", call.params.get("tools")) if extra else call.params.get("tools")
        counted = count(subject, model, tools=tools, exact=exact)
        # What else is read by the model: a schema, a system prompt of the dialect's own.
        more = [
            value
            for name, value in (*call.params.items(), *extra.items())
            if type(value) in (str, dict, list) and name not in _COUNTED
        ]
        return counted if not more else counted.plus(count(encode({"": more}).decode(), model))

    def _budgets(self) -> tuple[Budget, ...]:
        """The budgets that a call made here and now must fit.

        A thread that was started inside a `with llm.budget(…)` block has no context that says so, and
        must not spend past it.
        """
        found = active_budgets() or self._ledger.budgets
        own = self._policies["budget"]
        return found if own is None else (*found, own)

    def _note(self, job: Job, info: CallInfo, outcome: Any, ending: Ending) -> None:
        """What a call that ended leaves behind."""
        ledger, usage = self._ledger, ending.usage
        ledger.note(outcome)
        if job.call.endpoint == "models":
            return
        self._record(info, usage, complete=ending.complete)
        asked = job.call.target.model
        if job.prompt is not None and usage is not None and info.model == asked and not info.cached:
            ledger.estimator.learn(asked, job.prompt, usage.prompt_tokens)

    def _record(self, info: CallInfo, usage: TokenUsage | None, *, complete: bool = True) -> None:
        """Count an answer, here and where what was spent is written down."""
        facts = {"complete": complete, "cached": info.cached}
        self._ledger.totals.record(info.provider, info.model, usage, cost=info.cost, **facts)
        store = self._policies["usage_store"]
        if store is not None:
            store.record(info.provider, info.model, usage, info.cost(usage), **facts)

    def _describe_named(self, endpoint: str, subject: Any, given: Mapping[str, Any]) -> Call:
        """A call from all its arguments by name, as `chat_completion` takes them."""
        params = {"temperature": UNSET, "max_tokens": UNSET, **given} if subject else dict(given)
        take = params.pop
        options = _Options(
            model=take("model", None),
            provider=take("provider", None),
            stream=False,
            timeout=take("timeout", UNSET),
            deadline=take("deadline", UNSET),
            headers=take("extra_headers", None),
            body=take("extra_body", None),
            cache=take("cache", "on"),
        )
        return self._describe(endpoint, subject, params, options, self._clock.now())

    def _describe(
        self,
        endpoint: str,
        subject: Any,
        params: dict[str, Any],
        options: _Options,
        started: float,
    ) -> Call:
        """What was asked for, checked: left-out arguments take the config's values."""
        config = self.config
        misplaced = _OF_THE_CLIENT & params.keys()
        if misplaced:
            name = min(misplaced)
            raise LLMConfigError(
                f"{name} is a setting of the client, not of a call: with_options({name}=…); "
                "a field of the body by that name goes into extra_body"
            )
        sampled_by_default = False
        if params.get("temperature") is UNSET:
            params["temperature"] = config.temperature
            sampled_by_default = not config.is_set("temperature")
        if params.get("max_tokens") is UNSET:
            params["max_tokens"] = config.max_tokens
        timeout = config.timeout if options.timeout is UNSET else options.timeout
        deadline = config.deadline if options.deadline is UNSET else options.deadline
        _check("temperature", checked_temperature, params.get("temperature"))
        _check("max_tokens", checked_positive, params.get("max_tokens"))
        if options.cache not in CACHE_MODES:
            modes = ", ".join(map(repr, CACHE_MODES))
            raise LLMConfigError(f"cache is {options.cache!r}; it must be one of {modes}")
        _check("timeout", checked_seconds, timeout)
        _check("deadline", checked_seconds, deadline)
        headers = config.default_headers
        for name, mapping in (("extra_headers", options.headers), ("extra_body", options.body)):
            if mapping is not None and not isinstance(mapping, Mapping):
                raise LLMConfigError(f"{name} is {type(mapping).__name__}; it must be a dict")
        if options.headers:
            _check("extra_headers", check_headers, options.headers)
            theirs = {name.lower() for name in options.headers}
            ours = {n: value for n, value in headers.items() if n.lower() not in theirs}
            headers = {**ours, **options.headers}
        return Call(
            endpoint=endpoint,
            target=self._target(options.model, options.provider),
            # What can be read only once is read once.
            subject=list(subject) if isinstance(subject, Iterator) else subject,
            params=params,
            sampled_by_default=sampled_by_default,
            stream=options.stream,
            headers=headers,
            extra_body=options.body or {},
            timeout=timeout,
            connect_timeout=config.connect_timeout
            if timeout is None
            else min(config.connect_timeout, timeout),
            deadline_at=nearest_deadline(None if deadline is None else started + deadline),
            max_response_bytes=config.max_response_bytes,
            idempotency_key=self._clock.new_id(),
        )

    def _target(self, model: str | None, provider: str | None) -> Target:
        target = self._targets.get((model, provider))
        if target is None:
            target = self._targets[model, provider] = find_target(self.config, model, provider)
        return target
