"""Requests and tokens per minute: reserve before sending, correct afterwards, learn from the server."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, NamedTuple

from LLM.cancel import cancelled, woken
from LLM.clock import Clock
from LLM.errors import (
    LLMCancelledError,
    LLMConfigError,
    LLMConnectionError,
    LLMError,
    LLMTimeoutError,
)
from LLM.forks import renew_after_fork

log = logging.getLogger("LLM")

REQUESTS_PER_MINUTE = 60
TOKENS_PER_MINUTE = 100_000

# What was taken within a hundredth of a second is kept as one entry, dated by its last part: 6,000
# entries hold any minute, and nothing is forgotten too early.
GRAIN = 0.01

# A sleep is no longer than this, so that room which is freed early is used; seconds.
SLICE = 0.1
# Who is not at the head of its queue is woken by the one before; a look at the deadline meanwhile.
BEHIND = 0.5

# After a 429 without a hint: 1 s, doubling with each further one in a row up to a minute.
FIRST_HOLD = 1.0
LONGEST_HOLD = 60.0
LONGEST_ASKED = 86_400.0  # a hint of more than a day is not meant for a minute's limit

# Servers round the reset of a limit, Anthropic to whole seconds.
ROUNDED = 1.0

# Permits of a thread that `record_tokens` may still come for; older ones keep their estimate.
OPEN_PERMITS = 1000

MANY_SCOPES = 100  # above this, those that hold nothing are forgotten
REDIS_RETRY = 5.0  # seconds between looks whether a Redis that was away is back


class ServerLimits(NamedTuple):
    """What a server says about its own limits; `None` where it says nothing.

    Attributes:
        requests_limit: requests per minute, or in a shorter time if remaining and reset say so.
        requests_remaining: requests left until the reset.
        requests_reset: seconds until the remaining requests are renewed.
        tokens_limit: tokens, likewise.
        tokens_remaining: tokens left until the reset.
        tokens_reset: seconds until the remaining tokens are renewed.
    """

    requests_limit: int | None = None
    requests_remaining: int | None = None
    requests_reset: float | None = None
    tokens_limit: int | None = None
    tokens_remaining: int | None = None
    tokens_reset: float | None = None


class RateUsage(NamedTuple):
    """What was used in the last minute."""

    requests: int
    tokens: int


class RateLimitState(NamedTuple):
    """A limiter at one moment, for display.

    Attributes:
        requests: requests of the last minute.
        tokens: tokens of the last minute; estimates where the truth is not known yet.
        requests_per_minute: the limit; `None` is no limit.
        tokens_per_minute: the limit; `None` is no limit.
        waiting: threads of this process that wait.
        held: seconds that each held-back scope still waits.
        learned: what the servers said last, by scope: their limits and what remains of them.
    """

    requests: int
    tokens: int
    requests_per_minute: int | None
    tokens_per_minute: int | None
    waiting: int
    held: Mapping[str, float]
    learned: Mapping[str, ServerLimits]


@dataclass(frozen=True, init=False)
class RateLimitConfig:
    """The settings of a `RateLimiter`, as one value; see there.

    Raises:
        LLMConfigError: a setting makes no sense, or is not known.
    """

    requests_per_minute: int | None
    tokens_per_minute: int | None
    redis_url: str | None = field(repr=False)  # it may hold a password
    name: str
    if_unavailable: Literal["error", "local"]

    def __init__(
        self,
        requests_per_minute: int | None = REQUESTS_PER_MINUTE,
        tokens_per_minute: int | None = TOKENS_PER_MINUTE,
        redis_url: str | None = None,
        name: str = "default",
        if_unavailable: Literal["error", "local"] = "error",
        **unknown: object,
    ) -> None:
        _refuse_unknown("RateLimitConfig", unknown, [field.name for field in fields(self)])
        _check_sharing(name, if_unavailable)
        for setting, value in (
            ("requests_per_minute", _limit("requests_per_minute", requests_per_minute)),
            ("tokens_per_minute", _limit("tokens_per_minute", tokens_per_minute)),
            ("redis_url", redis_url),
            ("name", name),
            ("if_unavailable", if_unavailable),
        ):
            object.__setattr__(self, setting, value)


class _Entry:
    """What was taken within a grain of time."""

    __slots__ = ("first", "gone", "last", "requests", "tokens")

    def __init__(self, now: float) -> None:
        self.first = self.last = now
        self.requests = self.tokens = 0
        self.gone = False


class _Window:
    """A sliding minute: what was taken in the last `seconds`, and when there is room for more."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.requests = self.tokens = 0
        self._entries: deque[_Entry] = deque()

    def forget(self, now: float) -> None:
        entries = self._entries
        while entries and entries[0].last + self.seconds <= now:
            entry = entries.popleft()
            entry.gone = True
            self.requests -= entry.requests
            self.tokens -= entry.tokens

    def add(self, now: float, requests: int, tokens: int) -> _Entry:
        entries = self._entries
        if entries and now - entries[-1].first < GRAIN:
            entry = entries[-1]
            entry.last = now
        else:
            entry = _Entry(now)
            entries.append(entry)
        self.change(entry, requests, tokens)
        return entry

    def change(self, entry: _Entry, requests: int, tokens: int) -> None:
        if not entry.gone:
            entry.requests += requests
            entry.tokens += tokens
            self.requests += requests
            self.tokens += tokens

    def room_at(
        self,
        now: float,
        demands: Iterable[int],
        max_requests: float,
        max_tokens: float,
    ) -> float:
        """When the last of `demands` (the tokens of a request each) is served, in their order."""
        self.forget(now)
        requests, tokens = self.requests, self.tokens
        planned: list[tuple[float, int, int]] = []
        leaving = self._leaving(planned)
        for demand in demands:
            while requests + 1 > max_requests or tokens + demand > max_tokens:
                left = next(leaving, None)
                if left is None:
                    break  # more than the whole limit
                now = max(now, left[0])
                requests -= left[1]
                tokens -= left[2]
            requests += 1
            tokens += demand
            planned.append((now + self.seconds, 1, demand))
        return now

    def _leaving(self, planned: list[tuple[float, int, int]]) -> Iterator[tuple[float, int, int]]:
        for entry in self._entries:
            yield entry.last + self.seconds, entry.requests, entry.tokens
        yield from planned


class _Waiter:
    """A thread that waits for its turn."""

    __slots__ = ("deadline_at", "estimate", "number", "scope", "ticket", "woken")

    def __init__(self, scope: _Scope, estimate: int, deadline_at: float | None) -> None:
        self.scope = scope
        self.estimate = estimate
        self.deadline_at = deadline_at
        self.number = 0
        self.ticket: str | None = None
        self.woken = threading.Event()


class _Quota:
    """What a server says of its requests, or of its tokens.

    A limit is one per minute, unless what is used of it would be renewed sooner: then only what remains
    counts, and after the reset the limit again, for as long as the longest reset was.
    """

    __slots__ = ("left", "limit", "span", "until")

    def __init__(self) -> None:
        self.limit = float("inf")
        self.left = float("inf")  # what remains, and until when that holds
        self.until = float("-inf")
        self.span = 0.0  # seconds, if it is known to be less than a minute

    @property
    def by_minute(self) -> float:
        """The limit of any minute."""
        return float("inf") if self.span else self.limit

    def learn(
        self,
        limit: int | None,
        left: int | None,
        reset: float | None,
        now: float,
        minute: float,
        *,
        newest: bool,
    ) -> None:
        if limit and limit != self.limit:
            self.limit, self.span = limit, 0.0
        if left is None or reset is None:
            return
        if limit and reset > 0 and (self.span or _is_short(limit, left, reset, minute)):
            self.span = max(self.span, min(reset, minute))
        # An answer that was overtaken by a newer one may only make us more careful.
        if newest or left < self.left:
            self.left, self.until = left, now + reset

    def use(self, amount: int, now: float) -> None:
        """Count against what remains; after the reset of a minute nobody knows how much that is."""
        if now >= self.until:
            self.left = float("inf")
            if self.span:
                self.left, self.until = self.limit, now + self.span
        self.left -= amount

    def remaining(self, now: float) -> tuple[int | None, float | None]:
        if now >= self.until:
            return None, None
        return max(0, int(self.left)), self.until - now


def _is_short(limit: int, left: int, reset: float, minute: float) -> bool:
    """Whether a limit is renewed within less than a minute.

    Either all at once at the reset, or bit by bit, and then the reset is when what was used is back.
    """
    return (reset + ROUNDED) * limit < minute * (limit - left)


class _Scope:
    """What is known about one server's own limit, and who waits for it."""

    def __init__(self, name: str, seconds: float) -> None:
        self.name = name
        self.window = _Window(seconds)
        self.queue: deque[_Waiter] = deque()
        self.held_until = float("-inf")
        self.refusals = 0
        self.refused_at = 0  # the number of the last permit when a refusal was counted
        self.learned_by = 0  # the number of the permit whose answer was the newest
        self.requests, self.tokens = _Quota(), _Quota()
        self.said: ServerLimits | None = None

    def ready_at(self, now: float, estimate: int) -> float:
        """When the server will take a request of this size; `now` if at once."""
        at = max(now, self.held_until)
        if self.said is None:
            return at
        at = max(at, self.nothing_left_until())
        if self.tokens.left < estimate:
            at = max(at, self.tokens.until)
        # An estimate above the server's whole limit is sent alone: the server may say no itself.
        most = self.requests.by_minute, self.tokens.by_minute
        return max(at, self.window.room_at(now, (estimate,), *most))

    def learn(self, limits: ServerLimits, now: float, number: int) -> None:
        newest = number >= self.learned_by
        self.learned_by = max(number, self.learned_by)
        minute = self.window.seconds
        self.requests.learn(*limits[:3], now, minute, newest=newest)
        self.tokens.learn(*limits[3:], now, minute, newest=newest)
        self.said = limits

    def use(self, now: float, tokens: int) -> None:
        """Count a request against what the server said remains."""
        self.requests.use(1, now)
        self.tokens.use(tokens, now)

    def hold(self, until: float) -> None:
        self.held_until = max(self.held_until, until)

    def nothing_left_until(self) -> float:
        """When the server's own count is renewed, if it is used up."""
        until = float("-inf")
        for quota in (self.requests, self.tokens):
            if quota.left < 1:
                until = max(until, quota.until)
        return until

    def is_idle(self, now: float) -> bool:
        self.window.forget(now)
        return not self.queue and not self.window.requests and self.held_until <= now

    def state(self, now: float) -> ServerLimits:
        """What was said, as it is by now."""
        said = self.said or ServerLimits()
        requests, requests_reset = self.requests.remaining(now)
        tokens, tokens_reset = self.tokens.remaining(now)
        return said._replace(
            requests_remaining=requests,
            requests_reset=requests_reset,
            tokens_remaining=tokens,
            tokens_reset=tokens_reset,
        )


class Permit:
    """Leave to send one request. `waited` is how long it took to get, in seconds."""

    __slots__ = (
        "_entry", "_limiter", "_number", "_open", "_released", "_reset", "_scope", "_shared",
        "_share", "_tokens", "waited",
    )  # fmt: skip

    def __init__(
        self,
        limiter: RateLimiter,
        scope: _Scope,
        tokens: int,
        number: int,
        entries: tuple[_Entry, _Entry],
    ) -> None:
        self.waited = 0.0
        self._limiter = limiter
        self._scope = scope
        self._tokens = tokens
        self._number = number
        self._entry, self._share = entries
        self._shared: str | None = None  # the entry's name in Redis
        self._open = True  # nobody has said yet what became of it
        self._released = False
        self._reset = 0  # the row of refusals that this permit's answer ended

    def correct(self, tokens: int | None) -> None:
        """Count what was really used instead of the estimate; `None`: unknown, the estimate stays.

        More than the limit is counted as it is; less makes room at once. Saying it again does no harm.

        Raises:
            LLMConfigError: not a whole number from 0 up.
        """
        if tokens is not None:
            _whole("used tokens", tokens)
        self._open = False
        if not self._released:
            self._limiter._correct(self, tokens)

    def learn(self, limits: ServerLimits | None) -> None:
        """Take note of what an answer's headers say about the server's own limits."""
        self._limiter._learn(self, limits)

    def refused(self, suggested_wait: float | None) -> None:
        """A 429: all that share the scope wait, for `suggested_wait` seconds.

        Without a hint (`None`) for 1 s, doubling with each further refusal in a row up to 60 s; an
        answer that is none ends the row. The request counts, its tokens do not.
        """
        self._open = False
        self._limiter._refused(self, suggested_wait)

    def release(self) -> None:
        """Nothing was sent: give everything back."""
        self._open = False
        if not self._released:
            self._released = True
            self._limiter._release(self)


class _Own(threading.local):
    """The permits of one thread, the oldest first."""

    def __init__(self) -> None:
        self.permits: deque[Permit] = deque(maxlen=OPEN_PERMITS)


class RateLimiter:
    """Requests and tokens per minute, for all threads that share it.

    In any 60 seconds no more is let through than the limits say: a sliding minute, not one by the
    clock on the wall. A permit reserves its estimate of tokens and is corrected to the real usage
    afterwards. Whoever comes first is served first, whatever the size; a server that holds back its
    callers (a 429, nothing remaining) does not keep those of another server waiting.

    Args:
        requests_per_minute: `None` is no limit.
        tokens_per_minute: prompt and answer together; `None` is no limit.
        clock: where the time comes from.
        redis_url: keep the count in this Redis (`redis://`, `rediss://`, `unix://`), for all
            processes and machines that name it; `None`: for this process alone.
        name: limiters of one name share a limit in Redis.
        if_unavailable: what to do while Redis does not answer: `error` raises, `local` keeps the
            limit for this process alone, with a warning in the log, until Redis is back.

    Raises:
        LLMConfigError: a setting that makes no sense, or is not known.
    """

    #: Seconds over which the limits hold.
    MINUTE = 60.0

    def __init__(
        self,
        requests_per_minute: int | None = REQUESTS_PER_MINUTE,
        tokens_per_minute: int | None = TOKENS_PER_MINUTE,
        *,
        clock: Clock | None = None,
        redis_url: str | None = None,
        name: str = "default",
        if_unavailable: Literal["error", "local"] = "error",
        **unknown: object,
    ) -> None:
        settings = "requests_per_minute tokens_per_minute clock redis_url name if_unavailable"
        _refuse_unknown("RateLimiter", unknown, settings.split())
        self.requests_per_minute = _limit("requests_per_minute", requests_per_minute)
        self.tokens_per_minute = _limit("tokens_per_minute", tokens_per_minute)
        _check_sharing(name, if_unavailable)
        self.name = name
        self._max_requests = self.requests_per_minute or float("inf")
        self._max_tokens = self.tokens_per_minute or float("inf")
        self._clock = clock or Clock()
        self._window = _Window(self.MINUTE)
        self._scopes: dict[str, _Scope] = {}
        self._waiting = 0
        self._number = 0
        self._own = _Own()
        self._shared: Any = None
        self._local_if_away = if_unavailable == "local"
        self._away_until: float | None = None
        if redis_url is not None:
            from LLM.policies.redis_limit import RedisWindow

            self._shared = RedisWindow(redis_url, name, self.MINUTE)
        self.after_fork()
        renew_after_fork(self)

    def after_fork(self) -> None:
        self._lock = threading.Lock()
        # The threads that waited are not in the child; what was used stays counted.
        self._waiting = 0
        for scope in self._scopes.values():
            scope.queue.clear()

    def __reduce__(self) -> tuple[Any, ...]:
        if self._shared is None:
            raise TypeError(
                f"{self!r} is in memory, a copy of it would let through as much again: give it a redis_url"
            )
        limits = (self.requests_per_minute, self.tokens_per_minute)
        how = {"name": self.name, "if_unavailable": "local" if self._local_if_away else "error"}
        return _shared_limiter, (type(self), limits, {**how, "clock": self._clock}, self._shared)

    def __repr__(self) -> str:
        shared = f", {self._shared.address}, name={self.name!r}" if self._shared else ""
        return (
            f"{type(self).__name__}({self.requests_per_minute}, {self.tokens_per_minute}{shared})"
        )

    def acquire(
        self,
        estimated_tokens: int = 0,
        *,
        scope: str = "",
        deadline_at: float | None = None,
        on_wait: Callable[[float], None] | None = None,
    ) -> Permit:
        """Wait until a request may be sent, and count it.

        Args:
            estimated_tokens: what it will use, prompt and answer; 0 if the tokens come later.
            scope: whose own limit it falls under (address and model): what a server says holds for its
                scope only, the configured limits hold for all together.
            deadline_at: when the caller must be done, on the clock's `now()`; `None`: whenever.
            on_wait: called with the seconds that were waited, if any were.

        Returns:
            A permit: correct it when the real usage is known, release it if nothing is sent.

        Raises:
            LLMConfigError: the estimate is more than the limit of a whole minute.
            LLMTimeoutError: the wait would end after the deadline; said at once, and nothing is counted.
            LLMConnectionError: the Redis that keeps the count does not answer.
            LLMCancelledError: it was cancelled (`CancelScope`) while it waited; nothing is counted.
        """
        estimate = self._checked(estimated_tokens)
        permit = None
        if self._shared is None and not self._waiting:
            with self._lock:
                now = self._clock.now()
                there = self._scope(scope, now)
                if not self._waiting and there.ready_at(now, estimate) <= now:
                    permit = self._take_if_room(there, estimate, now)
        if permit is None:
            permit = self._wait(scope, estimate, deadline_at)
        permits = self._own.permits
        while permits and not (permits[0]._open and not permits[0]._entry.gone):
            permits.popleft()
        permits.append(permit)
        if permit.waited > 0 and on_wait is not None:
            on_wait(permit.waited)
        return permit

    def record_tokens(self, tokens: int) -> None:
        """Count `tokens` as used, in place of the estimate of this thread's oldest open permit.

        For use without the permits themselves: `acquire()`, the request, `record_tokens(used)`. A permit is
        open until something was recorded for it, or it was corrected, refused or released itself. If
        the thread has none, as one that did not call `acquire`, the tokens are added to what was used.

        Raises:
            LLMConfigError: not a whole number from 0 up.
        """
        _whole("used tokens", tokens)
        permits = self._own.permits
        while permits:
            permit = permits.popleft()
            if permit._open:
                permit.correct(tokens)
                return
        with self._lock:
            now = self._clock.now()
            self._window.forget(now)
            self._window.add(now, 0, tokens)
        self._tell(lambda shared: shared.add(tokens))

    def get_current_usage(self) -> RateUsage:
        """Requests and tokens of the last minute, of all that share the limit."""
        if self._reachable():
            try:
                return RateUsage(*self._shared.usage())
            except LLMConnectionError as error:
                self._away(error)
        with self._lock:
            self._window.forget(self._clock.now())
            return RateUsage(self._window.requests, self._window.tokens)

    def wait_time_needed(self, estimated_tokens: int = 0, *, scope: str = "") -> float:
        """Seconds that `acquire` would wait now; 0 if not at all. Estimates may turn out to be too high."""
        estimate = self._checked(estimated_tokens)
        with self._lock:
            now = self._clock.now()
            wait = self._forecast(self._scope(scope, now), estimate, now) - now
        if self._reachable():
            try:
                wait = max(wait, self._shared.look(*self._limits(), estimate, scope))
            except LLMConnectionError as error:
                self._away(error)
        return wait

    def state(self) -> RateLimitState:
        """The limiter as it is now, for display."""
        try:
            usage = self.get_current_usage()
        except LLMConnectionError:
            usage = RateUsage(self._window.requests, self._window.tokens)
        with self._lock:
            now = self._clock.now()
            scopes = list(self._scopes.values())
            return RateLimitState(
                *usage,
                self.requests_per_minute,
                self.tokens_per_minute,
                self._waiting,
                {s.name: s.ready_at(now, 0) - now for s in scopes if s.ready_at(now, 0) > now},
                {s.name: s.state(now) for s in scopes if s.said is not None},
            )

    def _checked(self, estimate: int) -> int:
        _whole("estimated tokens", estimate)
        if estimate > self._max_tokens:
            raise LLMConfigError(
                f"a request of {estimate} tokens never fits a limit of {self.tokens_per_minute} tokens "
                "per minute: shorten it, lower max_tokens, or raise tokens_per_minute"
            )
        return estimate

    def _limits(self) -> tuple[int, int]:
        """For Redis: -1 is no limit."""
        return self.requests_per_minute or -1, self.tokens_per_minute or -1

    def _scope(self, name: str, now: float) -> _Scope:
        scope = self._scopes.get(name)
        if scope is None:
            if len(self._scopes) >= MANY_SCOPES:
                for old in [s for s in self._scopes.values() if s.is_idle(now)]:
                    del self._scopes[old.name]
            scope = self._scopes[name] = _Scope(name, self.MINUTE)
        return scope

    def _take_if_room(self, scope: _Scope, estimate: int, now: float) -> Permit | None:
        window = self._window
        window.forget(now)
        if window.requests + 1 > self._max_requests or window.tokens + estimate > self._max_tokens:
            return None
        return self._take(scope, estimate, now)

    def _take(self, scope: _Scope, estimate: int, now: float) -> Permit:
        self._number += 1
        scope.window.forget(now)
        if scope.said is not None:
            scope.use(now, estimate)
        entries = self._window.add(now, 1, estimate), scope.window.add(now, 1, estimate)
        return Permit(self, scope, estimate, self._number, entries)

    # Waiting. Each scope has a queue; its head sleeps in slices and tries, those behind it are woken
    # when it leaves. Of the heads whose scope is ready, the one that came first goes first.

    def _wait(self, name: str, estimate: int, deadline_at: float | None) -> Permit:
        with self._lock:
            begun = self._clock.now()
            scope = self._scope(name, begun)
            if deadline_at is not None:
                _refuse_late(self._forecast(scope, estimate, begun), begun, deadline_at)
            waiter = _Waiter(scope, estimate, deadline_at)
            self._number += 1
            waiter.number = self._number
            scope.queue.append(waiter)
            self._waiting += 1
        slept = False
        try:
            while True:
                found = self._step(waiter)
                if isinstance(found, Permit):
                    found.waited = self._clock.now() - begun if slept else 0.0
                    return found
                slept = slept or found != 0
                if found is None:
                    with woken(waiter.woken.set):
                        waiter.woken.wait(BEHIND)
                    waiter.woken.clear()
                else:
                    self._clock.sleep(min(found, SLICE))
                if cancelled():
                    raise LLMCancelledError("cancelled in the queue of the rate limit")
        finally:  # also when the wait is interrupted: the place in the queue is given up
            self._leave(waiter)

    def _step(self, waiter: _Waiter) -> Permit | float | None:
        """The permit; or seconds after which to try again; or `None`: when woken."""
        scope = waiter.scope
        with self._lock:
            now = self._clock.now()
            at = scope.ready_at(now, waiter.estimate)
            behind = scope.queue[0] is not waiter or (at <= now and not self._is_first(waiter, now))
            if not behind and at <= now and not self._reachable():
                at = self._room_at(now, waiter.estimate)
                if at <= now:
                    return self._take(scope, waiter.estimate, now)
            if waiter.deadline_at is not None:
                _refuse_late(now if behind else at, now, waiter.deadline_at)
            if behind:
                return None
            if at > now:
                return at - now
        return self._step_shared(waiter)

    def _step_shared(self, waiter: _Waiter) -> Permit | float:
        scope = waiter.scope
        waiter.ticket = waiter.ticket or self._clock.new_id()
        try:
            taken = self._shared.take(*self._limits(), waiter.estimate, scope.name, waiter.ticket)
        except LLMConnectionError as error:
            self._away(error)
            return 0.0
        self._is_back()
        with self._lock:
            now = self._clock.now()
            if taken.entry is not None:
                waiter.ticket = None
                permit = self._take(scope, waiter.estimate, now)
                permit._shared = taken.entry
                return permit
            scope.hold(now + taken.held)
            if waiter.deadline_at is not None:
                _refuse_late(now + taken.wait, now, waiter.deadline_at)
        return float(taken.wait)

    def _leave(self, waiter: _Waiter) -> None:
        with self._lock:
            waiter.scope.queue.remove(waiter)
            self._waiting -= 1
            for scope in self._scopes.values():
                if scope.queue:
                    scope.queue[0].woken.set()
        ticket = waiter.ticket
        if ticket is not None:
            self._tell(lambda shared: shared.leave(ticket))

    def _is_first(self, waiter: _Waiter, now: float) -> bool:
        heads = (scope.queue[0] for scope in self._scopes.values() if scope.queue)
        return not any(
            head.number < waiter.number and head.scope.ready_at(now, head.estimate) <= now
            for head in heads
        )

    def _room_at(self, now: float, *demands: int) -> float:
        return self._window.room_at(now, demands, self._max_requests, self._max_tokens)

    def _forecast(self, scope: _Scope, estimate: int, now: float) -> float:
        """When one who comes now would be served, if the estimates are right."""
        ahead = sorted(
            (waiter.number, waiter.estimate)
            for other in self._scopes.values()
            for waiter in other.queue
            if other is scope or other.ready_at(now, waiter.estimate) <= now
        )
        room = self._room_at(now, *(demand for _, demand in ahead), estimate)
        return max(room, scope.ready_at(now, estimate))

    # What becomes of a permit.

    def _correct(self, permit: Permit, tokens: int | None) -> None:
        with self._lock:
            self._succeeded(permit)
            change = 0 if tokens is None else tokens - permit._tokens
            self._change(permit, 0, change)
        self._share(permit, 0, change)

    def _release(self, permit: Permit) -> None:
        with self._lock:
            change = -permit._tokens
            self._change(permit, -1, change)
        self._share(permit, -1, change)

    def _learn(self, permit: Permit, limits: ServerLimits | None) -> None:
        scope = permit._scope
        with self._lock:
            self._succeeded(permit)
            if limits is None:
                return
            now = self._clock.now()
            scope.learn(limits, now, permit._number)
            hold = scope.nothing_left_until() - now
        if hold > 0:
            self._tell(lambda shared: shared.hold(scope.name, hold))

    def _refused(self, permit: Permit, suggested_wait: float | None) -> None:
        scope = permit._scope
        with self._lock:
            # Reading this very answer's headers was no success.
            scope.refusals = max(scope.refusals, permit._reset)
            # What was sent before the last refusal was known belongs to the same one.
            if permit._number > scope.refused_at:
                scope.refusals += 1
                scope.refused_at = self._number
            if suggested_wait is not None and 0 <= suggested_wait < float("inf"):
                wait = min(suggested_wait, LONGEST_ASKED)
            else:
                wait = min(LONGEST_HOLD, FIRST_HOLD * 2.0 ** min(scope.refusals - 1, 16))
            scope.hold(self._clock.now() + wait)
            change = -permit._tokens
            self._change(permit, 0, change)
        self._share(permit, 0, change)
        self._tell(lambda shared: shared.hold(scope.name, wait))

    def _succeeded(self, permit: Permit) -> None:
        scope = permit._scope
        if scope.refusals and permit._number > scope.refused_at:
            permit._reset, scope.refusals = scope.refusals, 0

    def _change(self, permit: Permit, requests: int, tokens: int) -> None:
        if requests or tokens:
            scope = permit._scope
            self._window.change(permit._entry, requests, tokens)
            scope.window.change(permit._share, requests, tokens)
            permit._tokens += tokens
            if scope.learned_by < permit._number:
                scope.requests.left -= requests
                scope.tokens.left -= tokens

    # The count that is shared in Redis.

    def _share(self, permit: Permit, requests: int, tokens: int) -> None:
        entry = permit._shared
        if entry is not None and (requests or tokens):
            self._tell(lambda shared: shared.change(entry, requests, tokens))

    def _tell(self, say: Callable[[Any], None]) -> None:
        """Say something that no answer is spoiled for if it cannot be said."""
        if self._reachable():
            try:
                say(self._shared)
            except LLMError as error:
                if self._local_if_away and isinstance(error, LLMConnectionError):
                    self._away(error)

    def _reachable(self) -> bool:
        if self._shared is None:
            return False
        return self._away_until is None or self._clock.now() >= self._away_until

    def _away(self, error: LLMConnectionError) -> None:
        if not self._local_if_away:
            raise error
        if self._away_until is None:
            log.warning("%s; until it is back each process keeps the limit by itself", error)
        self._away_until = self._clock.now() + REDIS_RETRY

    def _is_back(self) -> None:
        if self._away_until is not None:
            self._away_until = None
            log.info("the rate limit is shared again: %s answers", self._shared.address)


def _shared_limiter(
    kind: type[RateLimiter], limits: tuple[Any, Any], how: dict[str, Any], shared: Any
) -> RateLimiter:
    """A limiter out of a pickle, on the same count in Redis."""
    limiter = object.__new__(kind)
    RateLimiter.__init__(limiter, *limits, **how)
    limiter._shared = shared
    return limiter


class TokenAwareRateLimiter(RateLimiter):
    """A `RateLimiter` from a `RateLimitConfig`; `None` is the default one."""

    def __init__(
        self, config: RateLimitConfig | None = None, *, clock: Clock | None = None
    ) -> None:
        config = config or RateLimitConfig()
        if not isinstance(config, RateLimitConfig):
            raise LLMConfigError(
                f"a TokenAwareRateLimiter takes a RateLimitConfig, not {type(config).__name__}"
            )
        super().__init__(
            config.requests_per_minute,
            config.tokens_per_minute,
            clock=clock,
            redis_url=config.redis_url,
            name=config.name,
            if_unavailable=config.if_unavailable,
        )


def _refuse_unknown(what: str, unknown: Mapping[str, object], known: Sequence[str]) -> None:
    if unknown:
        raise LLMConfigError(
            f"a {what} knows no {', '.join(sorted(unknown))}: it takes {', '.join(known[:-1])} "
            f"and {known[-1]}"
        )


def _check_sharing(name: object, if_unavailable: object) -> None:
    if if_unavailable not in ("error", "local"):
        raise LLMConfigError(f"if_unavailable must be 'error' or 'local', not {if_unavailable!r}")
    if not isinstance(name, str) or not name:
        raise LLMConfigError(f"the name of a rate limit must be a text, not {name!r}")


def _whole(what: str, tokens: object) -> None:
    if type(tokens) is not int or tokens < 0:
        raise LLMConfigError(f"{what} must be a whole number from 0 up, not {tokens!r}")


def _limit(name: str, value: object) -> int | None:
    if value is None:
        return None
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 1 <= value < float("inf") or value != int(value):  # type: ignore[operator,call-overload]  # as `number` says
        raise LLMConfigError(
            f"{name} must be a whole number from 1 up, or None for no limit, not {value!r}"
        )
    return int(value)  # type: ignore[call-overload,no-any-return]  # the same


def _refuse_late(at: float, now: float, deadline_at: float) -> None:
    if at > deadline_at:
        wait = f"{at - now:.1f} s for the rate limit" if at > now else "longer for the rate limit"
        left = f"ends in {deadline_at - now:.1f} s" if deadline_at > now else "has passed"
        raise LLMTimeoutError(
            f"nothing was sent: the request would have to wait {wait}, and the deadline {left}",
            clock="deadline",
        )
