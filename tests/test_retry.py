"""When to try again, and when: exact waits, a user's own policy, one's own functions."""

import copy
import os
import pickle
from datetime import datetime, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st
from urllib3.util import Retry

from LLM.clock import Chance, Clock
from LLM.errors import (
    LLMAuthenticationError,
    LLMCancelledError,
    LLMConnectionError,
    LLMInvalidRequestError,
    LLMQuotaError,
    LLMRateLimitError,
    LLMServerError,
    LLMStreamError,
    LLMTimeoutError,
)
from LLM.policies.retry import RetryPolicy, as_policy, retry_with_backoff


class FakeClock(Clock):
    """Time that passes only by sleeping."""

    def __init__(self):
        self.slept = []

    def now(self):
        return sum(self.slept)

    def utc(self):
        return datetime.fromtimestamp(self.now(), timezone.utc)

    def sleep(self, seconds):
        self.slept.append(seconds)


def seeded(seed):
    chance = Chance()
    chance.seed(seed)
    return chance


def waits(policy, failures):
    """The waits of a call that meets these failures, until the policy gives up."""
    found = []
    for failure in failures:
        policy = policy.after(failure)
        if policy is None:
            break
        found.append(policy.wait(failure))
    return found


def down(count, **details):
    return [LLMServerError("m", status_code=503, **details) for _ in range(count)]


def test_the_documented_waits_are_exact_without_jitter():
    policy = RetryPolicy(5, delay=2.0, jitter=0)
    assert waits(policy, down(9)) == [2, 4, 8, 16, 32]


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({}, [1, 2, 4]),
        ({"total": 0}, []),
        ({"total": 1}, [1]),
        ({"total": 5, "max_delay": 5.0}, [1, 2, 4, 5, 5]),
        ({"delay": 0}, [0, 0, 0]),
        ({"max_delay": 0}, [0, 0, 0]),
        ({"delay": 0.1, "total": 2}, [0.1, 0.2]),
        ({"total": False}, []),
    ],
)
def test_waits_double_up_to_the_cap_and_end_with_the_retries(settings, expected):
    assert waits(RetryPolicy(jitter=0, **settings), down(9)) == expected


@given(
    st.integers(0, 12),
    st.floats(0, 100),
    st.floats(0, 2),
    st.floats(0, 200),
    st.integers(0, 2**32),
)
def test_jitter_only_stretches_and_never_beyond_the_cap(total, delay, jitter, max_delay, seed):
    policy = RetryPolicy(
        total, delay=delay, jitter=jitter, max_delay=max_delay, generator=seeded(seed)
    )
    found = waits(policy, down(total + 1))
    assert len(found) == total
    for number, wait in enumerate(found):
        plain = delay * 2**number
        assert min(plain, max_delay) <= wait <= min(plain * (1 + jitter) * 1.000001, max_delay)


def test_jitter_differs_and_repeats_with_its_seed():
    first, second, third = (
        waits(RetryPolicy(5, generator=seeded(seed)), down(5)) for seed in (1, 1, 2)
    )
    assert first == second != third


def test_a_thousand_retries_overflow_nothing():
    assert waits(RetryPolicy(2000, jitter=0, max_delay=7), down(2000))[-1] == 7


@pytest.mark.parametrize(
    "failure, again",
    [
        (LLMServerError("m"), True),
        (LLMRateLimitError("m"), True),
        (LLMConnectionError("m"), True),
        (LLMTimeoutError("m"), True),
        (LLMStreamError("m"), True),
        (LLMQuotaError("m"), False),
        (LLMCancelledError("m"), False),
        (LLMAuthenticationError("m"), False),
        (LLMInvalidRequestError("m"), False),
        (LLMServerError("m", retriable=False), False),
        (LLMInvalidRequestError("m", retriable=True), True),
    ],
)
def test_only_what_a_retry_can_help_is_retried(failure, again):
    assert (RetryPolicy().after(failure) is not None) == again


@pytest.mark.parametrize(
    "asked, wait",
    [(7, 7), (0.25, 0.25), (60, 60), (None, 1), (0, 1)],
)
def test_what_the_server_asks_goes_before_the_backoff(asked, wait):
    assert waits(RetryPolicy(1, jitter=0), down(1, suggested_wait=asked)) == [wait]


def test_a_wait_above_the_cap_is_not_slept():
    assert waits(RetryPolicy(jitter=0), down(1, suggested_wait=60.1)) == []


def test_a_policy_is_never_changed():
    policy = RetryPolicy(3, jitter=0)
    for _ in range(3):
        assert waits(policy, down(9)) == [1, 2, 4]
    assert (policy.total, policy.history) == (3, ())


def test_the_history_of_a_policy_are_its_failures():
    first, second = down(2)
    policy = RetryPolicy().after(first)
    assert policy is not None
    following = policy.after(second)
    assert following is not None
    assert following.history == (first, second)


@pytest.mark.parametrize("again", [lambda p: pickle.loads(pickle.dumps(p)), copy.deepcopy])
def test_a_policy_can_go_to_another_process(again):
    twin = again(RetryPolicy(4, delay=3, jitter=0, max_delay=20))
    assert waits(twin, down(9)) == [3, 6, 12, 20]


def test_a_policys_own_statuses_replace_ours():
    policy = RetryPolicy(status_forcelist=[418])
    assert policy.after(LLMInvalidRequestError("m", status_code=418)) is not None
    assert policy.after(LLMServerError("m", status_code=503)) is None
    assert policy.after(LLMConnectionError("m")) is not None  # no status came at all


def test_a_policy_may_ignore_what_servers_ask():
    policy = RetryPolicy(1, jitter=0, respect_retry_after_header=False)
    assert waits(policy, down(1, suggested_wait=30)) == [1]
    assert waits(policy, down(1, suggested_wait=3000)) == [1]


def test_ours_is_taken_as_it_is():
    policy = RetryPolicy(9)
    assert as_policy(policy) is policy


@pytest.mark.parametrize(
    "retry, expected",
    [
        (Retry(3, backoff_factor=1), [0, 2, 4]),  # urllib3's own formula: its first wait is 0
        (Retry(3, backoff_factor=0.5), [0, 1, 2]),
        (Retry(5, backoff_factor=1, backoff_max=3), [0, 2, 3, 3, 3]),
        (Retry(2), [0, 0]),
        (Retry(0), []),
        (Retry(False), []),
        (Retry(5, status=1, backoff_factor=1), [0]),
        (Retry(5, other=2, backoff_factor=1), [0, 2]),
    ],
)
def test_a_users_own_retry_brings_its_counts_and_its_backoff(retry, expected):
    policy = as_policy(retry)
    assert waits(policy, down(9)) == expected
    assert waits(policy, down(9)) == expected  # and is not used up by a call


@pytest.mark.parametrize(
    "retry, failure, again",
    [
        (Retry(1), LLMServerError("m", status_code=503), True),
        (Retry(1), LLMInvalidRequestError("m", status_code=400), False),
        (Retry(1, status_forcelist=[503]), LLMServerError("m", status_code=503), True),
        (Retry(1, status_forcelist=[503]), LLMRateLimitError("m", status_code=429), False),
        (Retry(1, status_forcelist=[503]), LLMConnectionError("m"), True),
    ],
)
def test_a_users_own_retry_brings_its_statuses(retry, failure, again):
    assert (as_policy(retry).after(failure) is not None) == again


def test_a_users_own_retry_obeys_retry_after_as_it_was_told():
    asked = down(1, suggested_wait=5)
    assert waits(as_policy(Retry(1)), asked) == [5]
    assert waits(as_policy(Retry(1, respect_retry_after_header=False)), asked) == [0]


def test_a_users_own_retry_limits_connections_that_fail():
    assert len(waits(as_policy(Retry(None, connect=2)), [LLMConnectionError("m")] * 9)) == 2


class Sulky:
    """Fails as often as it is told, then answers."""

    def __init__(self, *failures):
        self.failures = list(failures)
        self.calls = 0

    def __call__(self):
        self.calls += 1
        if self.failures:
            raise self.failures.pop(0)
        return "answer"


def test_a_users_function_is_called_again_until_it_answers():
    clock, function = FakeClock(), Sulky(TimeoutError(), ConnectionResetError())
    assert retry_with_backoff(function, jitter=False, clock=clock) == "answer"
    assert (function.calls, clock.slept) == (3, [1, 2])


@pytest.mark.parametrize(
    "settings, slept",
    [
        ({}, [1, 2, 4]),
        ({"max_retries": 0}, []),
        ({"max_retries": 5, "base_delay": 2.0}, [2, 4, 8, 16, 32]),
        ({"max_retries": 4, "max_delay": 3.0}, [1, 2, 3, 3]),
    ],
)
def test_the_last_failure_of_a_users_function_is_raised_as_it_was(settings, slept):
    clock = FakeClock()
    failures = [TimeoutError(number) for number in range(9)]
    with pytest.raises(TimeoutError) as caught:
        retry_with_backoff(Sulky(*failures), jitter=False, clock=clock, **settings)
    assert clock.slept == slept
    assert caught.value is failures[len(slept)]


@pytest.mark.parametrize(
    "failure", [ValueError("m"), LLMQuotaError("m"), LLMRateLimitError("m", suggested_wait=61)]
)
def test_what_no_retry_can_help_is_raised_at_once(failure):
    clock, function = FakeClock(), Sulky(failure)
    with pytest.raises(type(failure)) as caught:
        retry_with_backoff(function, clock=clock)
    assert caught.value is failure
    assert (function.calls, clock.slept) == (1, [])


def test_a_users_function_waits_as_its_server_asks():
    clock = FakeClock()
    retry_with_backoff(Sulky(LLMRateLimitError("m", suggested_wait=7)), clock=clock)
    assert clock.slept == [7]


def test_jitter_stretches_the_waits_of_a_users_function():
    clock = FakeClock()
    retry_with_backoff(Sulky(*[TimeoutError()] * 3), clock=clock)
    for plain, slept in zip([1, 2, 4], clock.slept, strict=True):
        assert plain <= slept <= plain * 1.25


@pytest.mark.parametrize("failure", [KeyboardInterrupt, SystemExit])
def test_an_interrupted_function_stays_interrupted(failure):
    clock, function = FakeClock(), Sulky(failure())
    with pytest.raises(failure):
        retry_with_backoff(function, clock=clock)
    assert function.calls == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has no fork")
def test_a_forked_child_makes_ids_of_its_own():
    clock = Clock()
    clock.new_id()  # some were drawn ahead
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.write(writing, " ".join(clock.new_id() for _ in range(100)).encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        theirs = pipe.read().split()
    ours = [clock.new_id() for _ in range(100)]
    assert len({*theirs, *ours}) == 200
    assert {len(name) for name in theirs + ours} == {32}
