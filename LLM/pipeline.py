"""The journey of a call, on one page: observe → retry → exchange, down and back up the same stairs.

Each layer is a function from handler to handler; a handler takes a job and returns an outcome, or
raises an `LLMError`. What a layer knows lives in its policy's module.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from LLM.clock import Clock
from LLM.errors import Attempt, LLMError, LLMTimeoutError
from LLM.policies.retry import RetryPolicy, RetryQuota
from LLM.providers.base import (
    MALFORMED,
    Call,
    Provider,
    WireRequest,
    WireResponse,
    request_id,
    unexpected,
)
from LLM.stream import Stream
from LLM.transport import Transport
from LLM.types import Answer, TokenUsage

log = logging.getLogger("LLM")


class Job(NamedTuple):
    """A call, ready to be sent; the same request for all its attempts."""

    call: Call
    provider: Provider
    request: WireRequest
    started: float


class Outcome(Protocol):
    """What a handler returns: a response, or a stream that may go on for minutes."""

    def when_done(self, callback: Callable[[TokenUsage | None], None]) -> None:
        """Call back once the outcome is known, with its usage or `None`."""

    def record(self, history: tuple[Attempt, ...]) -> None:
        """Note the attempts that it took."""

    status: int
    """HTTP status."""

    @property
    def request_id(self) -> str | None: ...


class Done:
    """A response: done when it comes."""

    __slots__ = ("__weakref__", "answer", "request_id", "status")

    def __init__(self, answer: Answer, status: int, request_id: str | None) -> None:
        self.answer = answer
        self.status = status
        self.request_id = request_id

    def when_done(self, callback: Callable[[TokenUsage | None], None]) -> None:
        callback(getattr(self.answer, "usage", None))

    def record(self, history: tuple[Attempt, ...]) -> None:
        self.answer.note(history=history)


Handler = Callable[[Job], Any]
Layer = Callable[[Handler], Handler]


def build_pipeline(transport: Transport, clock: Clock, layers: tuple[Layer, ...]) -> Handler:
    """The layers around the exchange, outermost first."""
    handler: Handler = exchange(transport, clock)
    for layer in reversed(layers):
        handler = layer(handler)
    return handler


def observe(clock: Clock, note: Callable[[Any], None]) -> Layer:
    """One log line for each call that ends, and the latency; `note` gets each answer."""

    def layer(handler: Handler) -> Handler:
        def observed(job: Job) -> Any:
            log.debug("request: %s", _Summary(job.call))
            try:
                outcome = handler(job)
            except LLMError as error:
                log.error("call failed after %s: %s", _counted(error.attempts), error)  # noqa: TRY400 - the caller gets the traceback
                raise
            if isinstance(outcome, Done):
                outcome.answer.note(latency_ms=(clock.now() - job.started) * 1000)

            # Weakly: a stream that waits for its callback must not be kept alive by it.
            reference, identity = weakref.ref(outcome), outcome.request_id

            def finished(usage: TokenUsage | None) -> None:
                if log.isEnabledFor(logging.INFO):
                    milliseconds = (clock.now() - job.started) * 1000
                    tokens = usage.total_tokens if usage else None
                    log.info(
                        "call finished: %s, %s tokens, %.0f ms",
                        identity,
                        tokens,
                        milliseconds,
                    )
                note(reference())

            outcome.when_done(finished)
            return outcome

        return observed

    return layer


def retry(policy: RetryPolicy, quota: RetryQuota, clock: Clock) -> Layer:
    """The loop of attempts: until one succeeds, none can help, or deadline or quota leave no room."""

    def layer(handler: Handler) -> Handler:
        def retried(job: Job) -> Any:
            history: tuple[Attempt, ...] = ()
            current, waited, paid = policy, 0.0, 0
            deadline_at = job.call.deadline_at
            while True:
                begun = clock.now()
                try:
                    outcome = handler(job)
                except LLMError as error:
                    failure = error
                else:
                    seconds = clock.now() - begun
                    attempt = Attempt(outcome.status, None, waited, seconds, outcome.request_id)
                    outcome.record((*history, attempt))
                    quota.pay_back(paid)
                    return outcome
                seconds = clock.now() - begun
                status = getattr(failure, "status_code", None)
                name = type(failure).__name__
                history += (Attempt(status, name, waited, seconds, failure.request_id),)
                failure.history = history
                following = current.after(failure)
                waited = following.wait(failure) if following is not None else 0.0
                late = deadline_at is not None and clock.now() + waited >= deadline_at
                cost = quota.take(failure) if following is not None and not late else None
                if following is None or cost is None:
                    # Without the frames below: their variables hold what the server said.
                    failure.__context__ = None
                    raise failure.with_traceback(None)
                current, paid = following, cost
                attempts = len(history) + 1 + int(following.total or 0)
                log.debug(
                    "attempt %d of %d in %.1f s: %s",
                    len(history) + 1,
                    attempts,
                    waited,
                    status or name,
                )
                clock.sleep(waited)

        return retried

    return layer


def exchange(transport: Transport, clock: Clock) -> Handler:
    """One attempt: the request out, the answer as a value, a stream, or an error."""

    def exchanged(job: Job) -> Any:
        call, provider = job.call, job.provider
        try:
            if call.deadline_at is not None and clock.now() >= call.deadline_at:
                raise LLMTimeoutError(
                    "the deadline had passed before anything was sent", clock="deadline"
                )
            if not call.stream:
                response = transport.send(job.request, call)
                return parse_answer(job, response)
            wire = transport.open(job.request, call)
            if isinstance(wire, WireResponse):
                raise provider.error(call, wire)
            return Stream.open(wire, provider, call, started=job.started, clock=clock)
        except LLMError as error:
            error.provider = error.provider or call.target.host.name
            error.model = error.model or call.target.model
            raise

    return exchanged


def parse_answer(job: Job, response: WireResponse) -> Done:
    """The value of a response.

    Raises:
        LLMAPIError: it is an error, or not what was agreed.
    """
    if not 200 <= response.status < 300:
        raise job.provider.error(job.call, response)
    try:
        answer = job.provider.parse(job.call, response)
    except LLMError:
        raise
    except MALFORMED as error:
        problem = f"in a form that is not understood ({type(error).__name__})"
        raise unexpected(job.call, response, problem) from None
    identity = request_id(response.headers)
    answer.note(provider=job.call.target.host.name, request_id=identity)
    return Done(answer, response.status, identity)


def _counted(attempts: int) -> str:
    return "1 attempt" if attempts == 1 else f"{attempts} attempts"


class _Summary:
    """A request in a few words, put together only if the line is logged; never what was said."""

    def __init__(self, call: Call) -> None:
        self._call = call

    def __str__(self) -> str:
        call = self._call
        count = len(call.subject) if isinstance(call.subject, (list, tuple)) else 1
        temperature = call.params.get("temperature")
        return f"{call.endpoint}, model {call.target.model}, {count} messages, temperature {temperature}"
