"""LLM: the client."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal, NamedTuple, cast, overload

from LLM.clock import Clock
from LLM.config import (
    LLMConfig,
    check_headers,
    checked_positive,
    checked_seconds,
    checked_temperature,
)
from LLM.errors import LLMConfigError, LLMError
from LLM.forks import renew_after_fork
from LLM.pipeline import Done, Job, build_pipeline, observe, retry
from LLM.policies.retry import RetryPolicy, RetryQuota, as_policy
from LLM.providers.base import Call, Target
from LLM.providers.targets import address, find_target, provider_of
from LLM.stream import Stream
from LLM.transport import Transport
from LLM.types import (
    UNSET,
    Answer,
    ChatCompletionResponse,
    CompletionResponse,
    Message,
    ModelsResponse,
    Reply,
    Unset,
)

log = logging.getLogger("LLM")

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


# What a call does not take, though a client does: it would be sent to the server, a key even.
_OF_THE_CLIENT = frozenset(
    "api_key api_keys base_url cert config connect_timeout default_headers headers max_response_bytes "
    "max_retries max_retry_delay on_error pool_size proxies retries retry_delay retry_jitter session "
    "verify".split()
)


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


def _nearest(deadline_at: float | None) -> float | None:
    outer = _deadline.get()
    if outer is None or deadline_at is None:
        return outer if deadline_at is None else deadline_at
    return min(outer, deadline_at)


def _unpickled(config: LLMConfig, retries: Any) -> LLM:
    return LLM(config, retries=retries)


class _Ledger:
    """What a client counts and remembers; shared by the clients made `with_options` of it."""

    def __init__(self) -> None:
        self.quota = RetryQuota()
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

    def note(self, outcome: Done | Stream | None) -> None:
        if outcome is not None:
            self._last.answer = outcome.answer if isinstance(outcome, Done) else outcome

    @property
    def last(self) -> Answer | None:
        found = getattr(self._last, "answer", None)
        return found.response if isinstance(found, Stream) else found


class LLM:
    """A client for language models; create one, share it between all threads.

    Nothing is opened before the first call. After `close()` a later call opens a new pool.

    Args:
        config: the settings; left out: the defaults.
        session: a `requests.Session` of your own: its adapters, hooks and proxies are used. Its
            authentication, cookies and redirects are not, and `close()` does not close it.
        retries: a `RetryPolicy`, or any `urllib3.util.Retry`, in place of the config's retry settings.
        clock: for tests: what tells the time and sleeps between attempts.
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
        self._retries = retries
        self._clock = clock or Clock()
        self._ledger = _Ledger()
        self._transport = Transport(config, self._clock, session)
        self._assemble()
        where = find_target(config)
        log.info("client created: %s at %s", where.host.name, address(where))

    def _assemble(self) -> None:
        config, clock = self.config, self._clock
        policy = (
            as_policy(self._retries)
            if self._retries is not None
            else RetryPolicy(
                config.max_retries,
                delay=config.retry_delay,
                jitter=config.retry_jitter,
                max_delay=config.max_retry_delay,
            )
        )
        # The order of the journey, outermost first.
        layers = (
            observe(clock, self._ledger.note),
            retry(policy, self._ledger.quota, clock),
        )
        self._handle = build_pipeline(self._transport, clock, layers)
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
        options = _Options(model, provider, stream, timeout, deadline, extra_headers, extra_body)
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
        options = _Options(model, provider, stream, timeout, deadline, extra_headers, extra_body)
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
        given: Any = messages_or_text
        if isinstance(given, str):
            given = [{"role": "user", "content": given}]
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
        )

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
        token = _deadline.set(_nearest(end))
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
            changes: settings by name, and `retries`; those of the pool itself (`pool_size`, `verify`,
                `cert`, `proxies`) cannot change.

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
        if "retries" in changes:
            other._retries = changes.pop("retries")
        elif changes.keys() & {"max_retries", "retry_delay", "retry_jitter", "max_retry_delay"}:
            other._retries = None
        other.config = self.config.replace(**changes)
        other._assemble()
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
        return _unpickled, (self.config, self._retries)

    def __repr__(self) -> str:
        target = find_target(self.config)
        return f"LLM(model={target.model!r}, base_url={target.base_url!r})"

    def _call(self, endpoint: str, subject: Any, params: dict[str, Any], options: _Options) -> Any:
        """The one way for a call through the house."""
        started = self._clock.now()
        call = self._describe(endpoint, subject, params, options, started)
        provider = provider_of(call.target)
        job = Job(call, provider, provider.build(call), started)
        self._ledger.count()
        outcome = self._handle(job)
        return outcome.answer if isinstance(outcome, Done) else outcome

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
            deadline_at=_nearest(None if deadline is None else started + deadline),
            max_response_bytes=config.max_response_bytes,
            idempotency_key=self._clock.new_id(),
        )

    def _target(self, model: str | None, provider: str | None) -> Target:
        target = self._targets.get((model, provider))
        if target is None:
            target = self._targets[model, provider] = find_target(self.config, model, provider)
        return target
