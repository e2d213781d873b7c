"""When to try again, and when: `urllib3.util.Retry`, taught deadlines, jitter and documented delays."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from urllib3.util import Retry
from urllib3.util.retry import RequestHistory

from LLM.clock import Chance, Clock
from LLM.errors import LLMError, LLMRateLimitError, LLMTimeoutError, classify_error
from LLM.forks import renew_after_fork

T = TypeVar("T")

DEFAULT_JITTER = 0.25


class Failure(Protocol):
    """What a policy looks at: an `LLMError`, or what `classify_error` says of another."""

    @property
    def retriable(self) -> bool: ...

    @property
    def suggested_wait(self) -> float | None: ...


class RetryPolicy(Retry):
    """How often, and how long between. Immutable: each step is a new policy, so threads can share one.

    The n-th wait is `min(max_delay, delay * 2 ** (n - 1) * factor)` seconds, with `factor` drawn
    evenly from [1, 1 + jitter]. What the server asks for (`Retry-After`) goes before that.

    Args:
        total: retries after the first attempt; 0 is one attempt.
        delay: seconds before the first retry.
        jitter: largest stretch of a wait, as a fraction; 0 makes the waits exact.
        max_delay: seconds; no wait is longer, and a `Retry-After` above it is not slept at all.
        generator: where the jitter is drawn from.
        kwargs: as `urllib3.util.Retry` takes them; `status_forcelist`, if given, is the list of
            statuses that are retried instead of ours.
    """

    def __init__(
        self,
        total: int | bool | None = 3,
        *,
        delay: float = 1.0,
        jitter: float = DEFAULT_JITTER,
        max_delay: float = 60.0,
        generator: Chance | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(total, **kwargs)
        self.delay = delay
        self.jitter = jitter
        self.max_delay = max_delay
        self.generator = generator or Chance()

    def new(self, **changes: Any) -> RetryPolicy:
        """A policy like this one, with changes; how `urllib3` steps one."""
        ours = {
            "delay": self.delay,
            "jitter": self.jitter,
            "max_delay": self.max_delay,
            "generator": self.generator,
        }
        return super().new(**{**ours, **changes})

    def get_backoff_time(self) -> float:
        """Seconds to wait before the next attempt, after the failures in `history`."""
        if not self.history:
            return 0.0
        # 2 ** 64 seconds is past any cap; higher powers would overflow.
        wait = self.delay * 2.0 ** min(len(self.history) - 1, 64)
        return min(self.max_delay, wait * (1 + self.jitter * self.generator.random()))

    def after(self, failure: Failure) -> RetryPolicy | None:
        """The policy for the next attempt; `None` if there is to be none."""
        retries = int(self.total or 0)
        if retries <= 0 or not self._can_help(failure):
            return None
        if self._asked(failure) > self.max_delay:
            return None
        return self.new(total=retries - 1, history=(*self.history, failure))

    def wait(self, failure: Failure) -> float:
        """Seconds to wait before the attempt that this policy is for: what was asked, or the backoff."""
        return self._asked(failure) or self.get_backoff_time()

    def _asked(self, failure: Failure) -> float:
        return (failure.suggested_wait or 0.0) if self.respect_retry_after_header else 0.0

    def _can_help(self, failure: Failure) -> bool:
        status = getattr(failure, "status_code", None)
        if self.status_forcelist and status is not None:
            return status in self.status_forcelist
        return failure.retriable


class RetryQuota:
    """How many retries a client may still spend: in an outage calls fail after one attempt, not four.

    As in the standard mode of AWS's SDKs (the numbers are theirs, 2026-11): 500 tokens; a retry costs
    14, or 5 after a timeout or a 429; a call that succeeds pays back what its last retry cost, or 1.
    Shared by all threads of a client.
    """

    CAPACITY = 500
    COST = 14
    SLOW_COST = 5

    def __init__(self) -> None:
        self.tokens = self.CAPACITY
        self.after_fork()
        renew_after_fork(self)

    def after_fork(self) -> None:
        self._lock = threading.Lock()

    def take(self, failure: LLMError) -> int | None:
        """What a retry after this failure costs, now paid; `None` if there is not enough left."""
        slow = isinstance(failure, (LLMTimeoutError, LLMRateLimitError))
        cost = self.SLOW_COST if slow else self.COST
        with self._lock:
            if self.tokens < cost:
                return None
            self.tokens -= cost
        return cost

    def pay_back(self, cost: int) -> None:
        """A call succeeded; `cost` is that of its last retry, 0 if it needed none."""
        if cost == 0 and self.tokens >= self.CAPACITY:
            return  # the common case, without a lock
        with self._lock:
            self.tokens = min(self.CAPACITY, self.tokens + (cost or 1))


class _BorrowedPolicy(RetryPolicy):
    """A user's own `urllib3.util.Retry`: its counts, its statuses and its backoff."""

    def __init__(self, *args: Any, lender: Retry, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.lender = lender

    def new(self, **changes: Any) -> _BorrowedPolicy:
        policy = super().new(**{"lender": self.lender, **changes})
        assert isinstance(policy, _BorrowedPolicy)  # noqa: S101 - it makes its own kind
        return policy

    def get_backoff_time(self) -> float:
        failures = (RequestHistory(None, None, None, None, None),) * len(self.history)
        return self.lender.new(history=failures).get_backoff_time()


def as_policy(retries: Retry) -> RetryPolicy:
    """A policy from any `Retry`: ours as it is, another's borrowed."""
    if isinstance(retries, RetryPolicy):
        return retries
    if not isinstance(retries, Retry):
        raise TypeError(f"retries must be a urllib3 Retry, not {type(retries).__name__}")
    kinds = (retries.total, retries.connect, retries.read, retries.status, retries.other)
    counts = [count for count in kinds if count is not None and count is not True]
    return _BorrowedPolicy(
        min((int(c) for c in counts), default=10),
        max_delay=getattr(retries, "backoff_max", 120.0),
        status_forcelist=retries.status_forcelist,
        respect_retry_after_header=retries.respect_retry_after_header,
        lender=retries,
    )


def retry_with_backoff(
    func: Callable[[], T],
    max_retries: int = 3,
    base_delay: float = 1.0,
    max_delay: float = 60.0,
    jitter: bool = True,
    *,
    clock: Clock | None = None,
) -> T:
    """Call `func`, and again while `classify_error` says that a retry can help.

    Args:
        func: anything to call without arguments: `lambda: fetch(url)`.
        max_retries: retries after the first call; 0 is one call.
        base_delay: seconds before the first retry; doubles with each further one.
        max_delay: seconds; no wait is longer. An error that asks for more is raised at once.
        jitter: stretch each wait by up to a quarter, so that many callers do not come back together.

    Returns:
        What `func` returns.

    Raises:
        Exception: the last one of `func`, as it was.
    """
    clock = clock or Clock()
    policy = RetryPolicy(
        max_retries, delay=base_delay, jitter=DEFAULT_JITTER if jitter else 0, max_delay=max_delay
    )
    while True:
        try:
            return func()
        except Exception as error:
            info = classify_error(error)
            following = policy.after(info)
            if following is None:
                raise
            policy = following
        clock.sleep(policy.wait(info))
