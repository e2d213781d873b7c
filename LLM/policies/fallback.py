"""What to ask next when a model or its host is down, and which to leave alone for a while."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from LLM.clock import Clock
from LLM.errors import ErrorType, LLMAPIError, LLMConfigError, LLMError, LLMTimeoutError
from LLM.forks import renew_after_fork

log = logging.getLogger("LLM")

Window = Callable[[str], int | None]

HOST, MODEL, NOTHING = "host", "model", "nothing"

# What goes on to the next model, and what is then left alone: the host where it could not be reached,
# the one model there in all else, since another model of the same host (a gateway, above all) may well
# answer. What is not here, the next model could not help with either (an invalid request), or should
# not (a refusal).
ON: Mapping[ErrorType, str] = {
    ErrorType.CONNECTION_ERROR: HOST,
    ErrorType.TIMEOUT: MODEL,  # to connect: the host
    ErrorType.STREAM_ERROR: MODEL,
    ErrorType.SERVER_ERROR: MODEL,
    ErrorType.RATE_LIMIT: MODEL,
    ErrorType.QUOTA: MODEL,
    ErrorType.AUTH_ERROR: MODEL,
    ErrorType.NOT_FOUND: MODEL,
    ErrorType.INVALID_RESPONSE: MODEL,
    ErrorType.CONTEXT_TOO_LONG: NOTHING,
}
# What the caller decided is final.
_NEVER = frozenset({ErrorType.CANCELLED, ErrorType.BUDGET, ErrorType.CONFIG_ERROR})

COOLDOWN = 30.0
MAX_COOLDOWN = 600.0
# A host may ask for more than `MAX_COOLDOWN`; a day's quota, or nonsense, is looked at once an hour.
MAX_ASKED = 3600.0

_MAX_REASON = 200


class Place(NamedTuple):
    """A model where it is served.

    Attributes:
        host: what tells hosts apart: the base URL.
        model: the model's own name there.
        name: what people call it: `provider/model`.
    """

    host: str
    model: str
    name: str


class Resting(NamedTuple):
    """What is left alone at present.

    Attributes:
        host: as in `Place`.
        model: the model there; `None`: all of the host's.
        seconds: how much longer.
        reason: what failed, in a line.
    """

    host: str
    model: str | None
    seconds: float
    reason: str


class _Rest(NamedTuple):
    until: float
    length: float
    reason: str


class FallbackPolicy:
    """Which models to ask, in which order, and which hosts to leave alone. Threads can share one.

    After the n-th failure in a row a host, or a model of it, is left alone for
    `min(max_cooldown, cooldown * 2 ** (n - 1))` seconds, or longer if its `Retry-After` says so (up to
    an hour). Then one call tries it; the others go on leaving it alone until that one has succeeded.

    Args:
        models: what to ask, in this order, when the first model cannot answer: `provider/model`.
        on: the error types that go on to the next model; left out: those of the table `ON`.
        cooldown: seconds; 0: nothing is ever left alone.
        max_cooldown: seconds; no rest of ours is longer.
        window: the context window of a model by its name, in tokens, or `None` if it is unknown. After
            a context that was too long only larger ones are asked, and then unknown ones.

    Raises:
        LLMConfigError: no model, a number of seconds that is none, an error type that is unknown or
            never goes on (`cancelled`, `budget`, `config_error`).
    """

    def __init__(
        self,
        models: Sequence[str],
        *,
        on: Iterable[ErrorType | str] | None = None,
        cooldown: float = COOLDOWN,
        max_cooldown: float = MAX_COOLDOWN,
        window: Window | None = None,
        clock: Clock | None = None,
    ) -> None:
        if isinstance(models, str) or not all(isinstance(model, str) for model in models):
            raise LLMConfigError('fallbacks: a list of models is due, like ["openai/gpt-4o"]')
        if not all(models) or not models:
            raise LLMConfigError("fallbacks: name at least one model, and leave no name empty")
        if not (0 <= cooldown < float("inf") and cooldown <= max_cooldown < float("inf")):
            raise LLMConfigError(
                f"fallbacks: cooldown {cooldown} and max_cooldown {max_cooldown} must be seconds,"
                " from 0, and the first no longer than the second"
            )
        self.models = tuple(models)
        self.on = ON if on is None else {kind: ON.get(kind, NOTHING) for kind in map(_kind, on)}
        self.cooldown = cooldown
        self.max_cooldown = max_cooldown
        self.window: Window = window or _unknown
        self._clock = clock or Clock()
        self._rests: dict[tuple[str, str | None], _Rest] = {}
        self.after_fork()
        renew_after_fork(self)

    def after_fork(self) -> None:
        """For a forked child: a lock of its own."""
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        # Another process learns for itself what is down: its clock began elsewhere.
        return {**self.__dict__, "_rests": {}, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.after_fork()
        renew_after_fork(self)

    def search(self, places: Sequence[Place]) -> Search:
        """For one call: `places` in the order in which they are to be asked, the first one wished for."""
        return Search(self, places)

    def goes_on(self, error: LLMError) -> bool:
        """Whether another model may help after this error, and there is time for it."""
        return error.error_type in self.on and _clock(error) != "deadline"

    def take(self, place: Place) -> tuple[str | None, bool]:
        """Before `place` is asked: why not to, or `None`; and whether the call is the one that tries it.

        Whoever is told to try it need not report back: after another rest, the next one is told.
        """
        if not self._rests:
            return None, False  # the common case, without a lock
        with self._lock:
            now = self._forget()
            keys = [key for key in _keys(place) if key in self._rests]
            for key in keys:
                rest = self._rests[key]
                if now < rest.until:
                    return f"left alone for {rest.until - now:.0f} s more: {rest.reason}", False
            for key in keys:
                rest = self._rests[key]
                self._rests[key] = rest._replace(until=now + max(rest.length, self.cooldown))
            return None, bool(keys)

    def soonest(self, places: Sequence[Place]) -> Place:
        """Of places that all are left alone, the one for the shortest time from now."""

        def end(place: Place) -> float:
            return max(self._rests[key].until for key in _keys(place) if key in self._rests)

        with self._lock:
            resting = [place for place in places if any(key in self._rests for key in _keys(place))]
            # One whose rest another call has ended in this moment is the best there is.
            awake = [place for place in places if place not in resting]
            return awake[0] if awake else min(resting, key=end)

    def failed(self, place: Place, error: LLMError, *, tried: bool = False) -> None:
        """Note a failure; `tried`: of the call that `take` told to try the place after its rest."""
        scope = self.on[error.error_type] if self.goes_on(error) else NOTHING
        if scope == MODEL and _clock(error) == "connect":
            scope = HOST
        if scope != HOST and isinstance(error, LLMAPIError):
            self._wake((place.host, None))  # it answers, though not what was wished for
        if scope == NOTHING or not self.cooldown:
            return
        key = (place.host, None if scope == HOST else place.model)
        asked = min(error.suggested_wait or 0.0, MAX_ASKED)
        with self._lock:
            now = self._forget()
            before = self._rests.get(key)
            if before is None:
                rest = _Rest(now + max(self.cooldown, asked), self.cooldown, reason_of(error))
            elif tried or now >= before.until:
                length = min(2 * before.length, self.max_cooldown)
                rest = _Rest(now + max(length, asked), length, reason_of(error))
            else:  # of a call that had begun before the rest did: the same outage
                rest = before._replace(until=max(before.until, now + asked))
            self._rests[key] = rest

    def succeeded(self, place: Place) -> None:
        """Note that it answers: its rest, and its host's, are over."""
        for key in _keys(place):
            self._wake(key)

    def resting(self) -> tuple[Resting, ...]:
        """What is left alone now, for display."""
        with self._lock:
            now = self._clock.now()
            return tuple(
                Resting(*key, rest.until - now, rest.reason)
                for key, rest in self._rests.items()
                if now < rest.until
            )

    def _forget(self) -> float:
        """Drop what failed long ago, which was another outage. Returns the time."""
        now, rests = self._clock.now(), self._rests
        self._rests = {k: r for k, r in rests.items() if now < r.until + self.max_cooldown}
        return now

    def _wake(self, key: tuple[str, str | None]) -> None:
        if key in self._rests:
            with self._lock:
                self._rests.pop(key, None)


class Search:
    """The way of one call from model to model. `place` is the one to ask now.

    Attributes:
        place: the model to ask.
        tried: what was asked before it or passed over, as (name, reason).
    """

    def __init__(self, policy: FallbackPolicy, places: Sequence[Place]) -> None:
        self._policy = policy
        # A fallback may be the very model that was wished for.
        self._left = list(dict.fromkeys(places))
        self._too_small: int | None = None
        self._tries = False
        self._said: list[tuple[str, str]] = []
        first = self._next()
        if first is None:
            first = policy.soonest(places)
            self._said = [entry for entry in self._said if entry[0] != first.name]
        self.place = first

    @property
    def tried(self) -> tuple[tuple[str, str], ...]:
        return tuple(self._said)

    def failed(self, error: LLMError) -> bool:
        """`place` failed. Returns whether another is to be asked, which `place` is then.

        If not, the error is the call's, and `tried` is what was asked before or passed over.
        """
        policy, place = self._policy, self.place
        policy.failed(place, error, tried=self._tries)
        if not policy.goes_on(error):
            return False
        before = len(self._said)
        self._said.append((place.name, reason_of(error)))
        if error.error_type is ErrorType.CONTEXT_TOO_LONG:
            self._only_larger_than(place)
        following = self._next()
        if following is None:
            del self._said[before]
            return False
        if error.error_type is ErrorType.AUTH_ERROR:
            log.warning("%s refused the key, and %s is asked instead", place.name, following.name)
        self.place = following
        return True

    def succeeded(self) -> None:
        """`place` answered, or began to."""
        self._policy.succeeded(self.place)

    def _next(self) -> Place | None:
        while self._left:
            place = self._left.pop(0)
            why, self._tries = self._policy.take(place)
            if why is None:
                return place
            self._said.append((place.name, why))
        return None

    def _only_larger_than(self, place: Place) -> None:
        size = self._policy.window(place.name)
        if size is not None:
            self._too_small = max(size, self._too_small or 0)
        if self._too_small is None:
            return  # any other may be larger
        larger, unknown = [], []
        for other in self._left:
            tokens = self._policy.window(other.name)
            if tokens is None:
                unknown.append(other)
            elif tokens > self._too_small:
                larger.append(other)
            else:
                self._said.append((other.name, f"its window of {tokens} tokens is no larger"))
        self._left = larger + unknown


def reason_of(error: LLMError) -> str:
    """An error in a line of at most 200 characters."""
    line = " ".join(f"{error.error_type}: {error}".split())
    return line if len(line) <= _MAX_REASON else line[: _MAX_REASON - 1] + "…"


def _unknown(_: str) -> int | None:
    return None


def _clock(error: LLMError) -> str | None:
    return error.clock if isinstance(error, LLMTimeoutError) else None


def _keys(place: Place) -> tuple[tuple[str, str | None], tuple[str, str | None]]:
    return (place.host, None), (place.host, place.model)


def _kind(name: ErrorType | str) -> ErrorType:
    try:
        kind = ErrorType(name)
    except ValueError:
        known = ", ".join(kind for kind in ErrorType if kind not in _NEVER)
        raise LLMConfigError(
            f"fallbacks: on: {name!r} is no error type; known are {known}"
        ) from None
    if kind in _NEVER:
        raise LLMConfigError(f"fallbacks: on: after {str(kind)!r} no other model is ever asked")
    return kind
