"""The journey of a call, on one page: down the layers and back up the same stairs.

    observe → fall_back → remember → retry → afford → pace → exchange

Each layer is a function from handler to handler; a handler takes a job and returns an outcome, or
raises an `LLMError`. What a layer knows lives in its policy's module.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from decimal import Decimal
from typing import Any, NamedTuple, Protocol

from pydantic import ValidationError

from LLM.cancel import cancelled
from LLM.clock import Clock
from LLM.errors import (
    Attempt,
    LLMBudgetError,
    LLMCancelledError,
    LLMConnectionError,
    LLMError,
    LLMQuotaError,
    LLMRateLimitError,
    LLMTimeoutError,
)
from LLM.policies.budget import Budget, reserve_all
from LLM.policies.cache import ResponseCache, cache_key
from LLM.policies.fallback import FallbackPolicy, Place
from LLM.policies.ratelimit import RateLimiter
from LLM.policies.retry import RetryPolicy, RetryQuota
from LLM.prices import Pricing, context_window
from LLM.providers.base import (
    MALFORMED,
    Call,
    Provider,
    Target,
    WireRequest,
    WireResponse,
    request_id,
    unexpected,
)
from LLM.providers.limits import read_limits
from LLM.stream import Stream
from LLM.telemetry import (
    AttemptFailed,
    CallFinished,
    CallStarted,
    Hook,
    Waited,
    emit,
)
from LLM.tokens import TokenCount
from LLM.transport import Transport
from LLM.types import (
    Answer,
    CallInfo,
    ChatCompletionResponse,
    CompletionResponse,
    Ending,
    SentRequest,
)


class Job(NamedTuple):
    """A call, ready to be sent; the same request for all its attempts.

    Attributes:
        fold: the caller wants a whole response, though it is streamed underneath.
        cache: what this call does with the cache: `on`, `read`, `refresh` or `off`.
        prompt: the tokens of the prompt, counted if a limiter or a budget asks for them.
        most: the most tokens that it may answer with, likewise; `None` if nothing limits it.
    """

    call: Call
    provider: Provider
    request: WireRequest
    started: float
    fold: bool = False
    cache: str = "on"
    prompt: TokenCount | None = None
    most: int | None = None


class Outcome(Protocol):
    """What a handler returns: a response, or a stream that may go on for minutes."""

    def when_done(self, callback: Callable[[Ending], None]) -> None:
        """Call back once the outcome is known: for a response at once."""

    status: int
    """HTTP status."""
    headers: Mapping[str, str]

    @property
    def info(self) -> CallInfo:
        """Where layers note what they know of the call."""

    @property
    def request_id(self) -> str | None: ...


class Done:
    """A response: done when it comes."""

    __slots__ = ("__weakref__", "answer", "ending", "headers", "info", "status")

    def __init__(self, answer: Answer, status: int, headers: Mapping[str, str]) -> None:
        self.answer = answer
        self.status = status
        self.headers = headers
        self.info = answer.info
        self.ending = Ending(getattr(answer, "usage", None), True, None, lambda: answer)

    @property
    def request_id(self) -> str | None:
        return self.info.request_id

    def when_done(self, callback: Callable[[Ending], None]) -> None:
        callback(self.ending)


Handler = Callable[[Job], Any]
Layer = Callable[[Handler], Handler]


def build_pipeline(exchange: Handler, layers: Sequence[Layer]) -> Handler:
    """The layers around the exchange, outermost first."""
    handler = exchange
    for layer in reversed(layers):
        handler = layer(handler)
    return handler


def observe(
    clock: Clock,
    hooks: tuple[Hook, ...],
    prices: Pricing,
    note: Callable[[Job, CallInfo, Any, Ending], None],
) -> Layer:
    """An event when a call starts and one when it ends; `note` gets each outcome."""

    def layer(handler: Handler) -> Handler:
        def observed(job: Job) -> Any:
            emit(hooks, _started(job))
            try:
                outcome = handler(job)
            except LLMError as error:
                emit(hooks, _failed(job, error, clock.now() - job.started))
                raise
            except BaseException:  # Ctrl-C: also that is an end
                stopped = LLMCancelledError("interrupted")
                emit(hooks, _failed(job, stopped, clock.now() - job.started))
                raise
            info = outcome.info
            info.prices = prices
            if isinstance(outcome, Done):
                info.latency_ms = (clock.now() - job.started) * 1000

            # Weakly: a stream that waits for its callback must not be kept alive by it.
            reference = weakref.ref(outcome)
            first = getattr(outcome, "time_to_first_token", None)

            def finished(ending: Ending) -> None:
                note(job, info, reference(), ending)
                emit(hooks, _finished(job, info, ending, clock.now() - job.started, first))

            outcome.when_done(finished)
            return outcome

        return observed

    return layer


def fall_back(
    policy: FallbackPolicy,
    targets: Mapping[Place, Target],
    prepare: Callable[[Job, Target], Job],
) -> Layer:
    """Another model, when one cannot answer; `prepare` makes the job for it."""

    def layer(handler: Handler) -> Handler:
        def fallen_back(job: Job) -> Any:
            if job.call.endpoint == "models":
                return handler(job)
            wanted = place_of(job.call.target)
            search = policy.search([wanted, *targets])
            history: tuple[Attempt, ...] = ()
            while True:
                place = search.place
                try:
                    outcome = handler(job if place == wanted else prepare(job, targets[place]))
                except LLMError as error:
                    history = error.history = (*history, *error.history)
                    if search.failed(error):
                        continue
                    error.fallbacks = search.tried
                    raise
                search.succeeded()
                info = outcome.info
                info.fallbacks, info.history = search.tried, (*history, *info.history)
                return outcome

        return fallen_back

    return layer


def place_of(target: Target) -> Place:
    return Place(target.base_url, target.model, f"{target.host.name}/{target.model}")


def remember(cache: ResponseCache, clock: Clock, hooks: tuple[Hook, ...]) -> Layer:
    """A hit returns here: no money, no permit, no network. One flight for each key."""

    def layer(handler: Handler) -> Handler:
        def remembered(job: Job) -> Any:
            call, mode = job.call, job.cache
            kind = _REMEMBERED.get(call.endpoint)
            if mode == "off" or kind is None:
                return handler(job)
            key = cache_key(
                dialect=call.target.host.dialect,
                base_url=call.target.base_url,
                headers=job.request.headers,
                body=job.request.body or b"",
            )
            if mode == "refresh":
                return stored(handler(job), key)
            hit = found(job, kind, key)
            if hit is not None:
                return hit
            if mode == "read":
                return handler(job)
            asked = clock.now()
            ends = (call.deadline_at, None if call.timeout is None else asked + call.timeout)
            until = min((end for end in ends if end is not None), default=None)
            with cache.flight(key, until=until) as flight:
                if flight.waited:
                    _waited(hooks, job, "cache", clock.now() - asked)
                    hit = found(job, kind, key)
                    if hit is not None:
                        return hit
                outcome = stored(handler(job), key)
                if flight.leader:
                    flight.keep()
                    outcome.when_done(lambda _: flight.done())
                return outcome

        def found(job: Job, kind: type[Answer], key: str) -> Any:
            value = cache.get(key)
            if value is None:
                return None
            with suppress(ValidationError):
                answer = kind.model_validate_json(value)
                info = answer.info
                info.provider, info.model = job.call.target.host.name, job.call.target.model
                info.cached = True
                if job.call.stream and not job.fold:
                    return Stream.replay(answer, started=job.started, clock=clock)
                return Done(answer, 200, {})
            return None

        def stored(outcome: Any, key: str) -> Any:
            def store(ending: Ending) -> None:
                answer = ending.answer() if ending.complete else None
                if answer is not None:
                    cache.put(key, answer.model_dump_json().encode())

            outcome.when_done(store)
            return outcome

        return remembered

    return layer


_REMEMBERED: Mapping[str, type[Answer]] = {
    "chat": ChatCompletionResponse,
    "completion": CompletionResponse,
}


def retry(policy: RetryPolicy, quota: RetryQuota, clock: Clock, hooks: tuple[Hook, ...]) -> Layer:
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
                    if error.unsent:
                        error.history = history
                        raise
                else:
                    seconds = clock.now() - begun
                    attempt = Attempt(outcome.status, None, waited, seconds, outcome.request_id)
                    outcome.info.history = (*history, attempt)
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
                going_on = following is not None and cost is not None
                allowed = len(history) + (1 + int(following.total or 0) if following else 0)
                emit(
                    hooks,
                    AttemptFailed(
                        *_identity(job),
                        attempt=len(history),
                        status=status,
                        error=failure,
                        duration_seconds=seconds,
                        retry_in_seconds=waited if going_on else None,
                        attempts_allowed=allowed,
                    ),
                )
                if following is None or cost is None:
                    # Without the frames below: their variables hold what the server said.
                    failure.__context__ = None
                    raise failure.with_traceback(None)
                current, paid = following, cost
                clock.sleep(waited)

        return retried

    return layer


def afford(
    budgets: Callable[[], Sequence[Budget]], prices: Pricing, count: Callable[..., TokenCount]
) -> Layer:
    """The worst case of an attempt is reserved before it is sent, and settled to the truth."""

    def layer(handler: Handler) -> Handler:
        def afforded(job: Job) -> Any:
            limits = budgets()
            if not limits or job.call.endpoint == "models":
                return handler(job)
            target = job.call.target
            names = target.host.name, target.model
            try:
                reservation = reserve_all(limits, *worst_case(job, limits, prices))
            except LLMBudgetError:
                # The estimate is on the safe side; perhaps the true count fits.
                job = job._replace(prompt=count(job.call, exact=True))
                reservation = reserve_all(limits, *worst_case(job, limits, prices))
            try:
                outcome = handler(job)
            except LLMError as error:
                if error.unsent:
                    reservation.release()
                elif error.maybe_billed:
                    reservation.settle(None, None)
                else:
                    reservation.settle(Decimal(0), 0)
                raise
            except BaseException as error:
                if getattr(error, "unsent", False):
                    reservation.release()
                else:
                    reservation.settle(None, None)
                raise

            def settle(ending: Ending) -> None:
                usage = ending.usage if ending.complete else None
                total = usage.total_tokens if usage else None
                reservation.settle(prices.cost(*names, usage), total)

            outcome.when_done(settle)
            return outcome

        return afforded

    return layer


def pace(
    limiter_of: Callable[[Target], RateLimiter | None], clock: Clock, hooks: tuple[Hook, ...]
) -> Layer:
    """One permit for each attempt: tokens estimated now, corrected when it is done."""

    def layer(handler: Handler) -> Handler:
        def paced(job: Job) -> Any:
            target = job.call.target
            limiter = limiter_of(target)
            if limiter is None or job.call.endpoint == "models":
                return handler(job)
            try:
                permit = limiter.acquire(
                    expected_tokens(job),
                    scope=f"{target.base_url} {target.model}",
                    deadline_at=job.call.deadline_at,
                    on_wait=lambda seconds: _waited(hooks, job, "rate_limit", seconds),
                )
            except BaseException as error:  # also Ctrl-C, in a wait
                error.unsent = True  # type: ignore[attr-defined]  # any exception takes a note
                raise
            try:
                outcome = handler(job)
            except LLMRateLimitError as error:
                if isinstance(error, LLMQuotaError):
                    permit.correct(0)
                else:
                    permit.refused(error.suggested_wait)
                raise
            except LLMConnectionError as error:
                if not error.maybe_billed:
                    permit.release()
                raise
            except LLMError as error:
                if not error.maybe_billed:
                    permit.correct(0)
                raise
            permit.learn(read_limits(outcome.headers, clock.utc()))

            def correct(ending: Ending) -> None:
                usage = ending.usage if ending.complete else None
                permit.correct(usage.total_tokens if usage is not None else None)

            outcome.when_done(correct)
            return outcome

        return paced

    return layer


def exchange(transport: Transport, clock: Clock) -> Handler:
    """One attempt: the request out, the answer as a value, a stream, or an error."""

    def exchanged(job: Job) -> Any:
        call, provider = job.call, job.provider
        try:
            if cancelled():
                stopped = LLMCancelledError("cancelled before anything was sent")
                stopped.unsent = True
                raise stopped
            if call.deadline_at is not None and clock.now() >= call.deadline_at:
                late = LLMTimeoutError(
                    "the deadline had passed before anything was sent", clock="deadline"
                )
                late.unsent = True
                raise late
            if not call.stream:
                outcome: Any = parse_answer(job, transport.send(job.request, call))
            else:
                wire = transport.open(job.request, call)
                if isinstance(wire, WireResponse):
                    raise provider.error(call, wire)
                outcome = Stream.open(wire, provider, call, started=job.started, clock=clock)
                if job.fold:
                    outcome = _folded(outcome)
            outcome.info.request = _sent(job)
            return outcome
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
    done, target = Done(answer, response.status, response.headers), job.call.target
    done.info.provider, done.info.model = target.host.name, target.model
    done.info.request_id = request_id(response.headers)
    return done


def _folded(stream: Stream) -> Done:
    """A stream read to its end: nobody waits for its pieces."""
    with stream:
        answer = stream.response
    return Done(answer, stream.status, stream.headers)


def _sent(job: Job) -> SentRequest:
    request, variables = job.request, job.call.target.host.key_variables
    variable = variables[0] if variables else "LLM_API_KEY"
    credential = request.credential if request.key is not None else None
    return SentRequest(
        request.method, request.url, request.headers, request.body, credential, variable
    )


def worst_case(
    job: Job, limits: Sequence[Budget], prices: Pricing, *, batch: bool = False
) -> tuple[Decimal | None, int | None]:
    """The most that an attempt can cost, in US dollars and in tokens; `None` where that is unknown.

    Args:
        batch: it goes through the provider's batch interface.

    Raises:
        LLMBudgetError: nothing says how long the answer may become.
    """
    target = job.call.target
    names = target.host.name, target.model
    counted = job.prompt
    prompt = counted.upper if counted is not None else 0
    completion = job.most
    if completion is None:
        window = context_window(target.model, target.host.name)
        completion = None if window is None else max(window - prompt, 0)
    # An image of unknown size has a known maximum; audio and files have none.
    unbounded = next(
        (u for u in (counted.unknown if counted else ()) if not u.endswith("image")), ""
    )
    if completion is None or unbounded:
        bounded = (
            b.usd is not None or b.tokens is not None for b in limits if b.unknown == "refuse"
        )
        if any(bounded):
            raise LLMBudgetError(
                f"{unbounded} cannot be counted, and a budget is set: allow it with unknown='allow'"
                if unbounded
                else f"how long an answer of {target.model} may become is unknown, and a budget is set: "
                "give max_tokens",
                provider=target.host.name,
                model=target.model,
            )
        return None, None
    cost = prices.worst_case(*names, prompt, completion, batch=batch)
    return cost, prompt + completion


def _identity(job: Job) -> tuple[str, str, str]:
    target = job.call.target
    return job.call.idempotency_key, target.host.name, target.model


def _started(job: Job) -> CallStarted:
    call, target = job.call, job.call.target
    return CallStarted(
        call.idempotency_key,
        call.endpoint,
        target.host.name,
        target.model,
        target.base_url,
        call.stream and not job.fold,
        call.params,
        call.subject,
    )


def _finished(
    job: Job, info: CallInfo, ending: Ending, seconds: float, first: float | None
) -> CallFinished:
    call, usage = job.call, ending.usage
    return CallFinished(
        call.idempotency_key,
        call.endpoint,
        info.provider or call.target.host.name,
        info.model or call.target.model,
        stream=call.stream and not job.fold,
        duration_seconds=seconds,
        time_to_first_token_seconds=first,
        attempts=len(info.history),
        usage=usage,
        cached=info.cached,
        complete=ending.complete,
        request_id=info.request_id,
        error=ending.error,
        cost_from=lambda: info.cost(usage),
        answer_from=ending.answer,
        base_url=info.request.url if info.request else "",
        fallbacks=info.fallbacks,
    )


def _failed(job: Job, error: LLMError, seconds: float) -> CallFinished:
    call, partial = job.call, error.partial
    return CallFinished(
        call.idempotency_key,
        call.endpoint,
        error.provider or call.target.host.name,
        error.model or call.target.model,
        stream=call.stream and not job.fold,
        duration_seconds=seconds,
        time_to_first_token_seconds=None,
        attempts=error.attempts,
        usage=getattr(partial, "usage", None),
        complete=False,
        request_id=error.request_id,
        error=error,
        answer_from=lambda: partial,
        fallbacks=error.fallbacks,
    )


def _waited(hooks: tuple[Hook, ...], job: Job, reason: str, seconds: float) -> None:
    emit(hooks, Waited(*_identity(job), reason, seconds))


def expected_tokens(job: Job) -> int:
    """Tokens that an attempt will take off a limit: its prompt, and as much as it may answer."""
    return int(job.prompt or 0) + (job.most or 0)
