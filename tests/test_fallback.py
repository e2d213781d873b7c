"""What is asked next when a model is down, and what is left alone for how long."""

import copy
import logging
import os
import pickle
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from LLM.errors import (
    ErrorType,
    LLMAPIError,
    LLMAuthenticationError,
    LLMBudgetError,
    LLMCancelledError,
    LLMConfigError,
    LLMConnectionError,
    LLMContentFilterError,
    LLMContextLengthError,
    LLMInvalidRequestError,
    LLMNotFoundError,
    LLMQuotaError,
    LLMRateLimitError,
    LLMResponseError,
    LLMServerError,
    LLMStreamError,
    LLMTimeoutError,
)
from LLM.policies.fallback import ON, FallbackPolicy, Place, reason_of
from tests.fakes import FakeClock

A, B, C = (Place(f"https://{name}.example/v1", "m", f"{name}/m") for name in "abc")
B2 = Place(B.host, "other", "b/other")
DOWN = LLMConnectionError("refused")
BUSY = LLMServerError("overloaded", status_code=529)


def policy_of(clock=None, **settings):
    return FallbackPolicy(["b/m", "c/m"], clock=clock or FakeClock(), **settings)


def call(policy, answers, places=(A, B, C)):
    """A call as the pipeline makes it: who was asked, who answered, and what was noted."""
    search, asked = policy.search(places), []
    while True:
        asked.append(search.place)
        error = answers.get(search.place)
        if error is None:
            search.succeeded()
            return asked, search.place, search.tried
        if not search.failed(error):
            return asked, error, search.tried


def test_the_first_that_answers_is_asked_alone():
    assert call(policy_of(), {}) == ([A], A, ())


def test_the_next_are_asked_in_their_order_and_the_answer_says_why():
    asked, answered, tried = call(policy_of(), {A: DOWN, B: BUSY})
    assert (asked, answered) == ([A, B, C], C)
    assert tried == (("a/m", "connection_error: refused"), ("b/m", "server_error: overloaded"))


def test_the_last_error_is_raised_and_says_what_was_tried_before():
    last = LLMRateLimitError("slow down")
    asked, error, tried = call(policy_of(), {A: DOWN, B: BUSY, C: last})
    assert asked == [A, B, C]
    assert error is last
    assert [name for name, _ in tried] == ["a/m", "b/m"]


@pytest.mark.parametrize(
    "error",
    [
        LLMConnectionError("m"),
        LLMTimeoutError("m", clock="connect"),
        LLMTimeoutError("m", clock="timeout"),
        LLMTimeoutError("m", clock="idle"),
        LLMStreamError("m"),
        LLMServerError("m"),
        LLMRateLimitError("m"),
        LLMQuotaError("m"),
        LLMAuthenticationError("m"),
        LLMNotFoundError("m"),
        LLMResponseError("m"),
        LLMContextLengthError("m"),
    ],
    ids=lambda error: f"{error.error_type}-{getattr(error, 'clock', '')}",
)
def test_another_model_is_asked_where_it_may_help(error):
    assert call(policy_of(), {A: error})[0] == [A, B]


@pytest.mark.parametrize(
    "error",
    [
        LLMInvalidRequestError("m"),
        LLMContentFilterError("m"),
        LLMBudgetError("m"),
        LLMConfigError("m"),
        LLMCancelledError("m"),
        LLMTimeoutError("m", clock="deadline"),
        LLMAPIError("m"),
    ],
    ids=lambda error: str(error.error_type),
)
def test_no_other_is_asked_where_it_cannot_help_or_should_not(error):
    policy = policy_of()
    assert call(policy, {A: error}) == ([A], error, ())
    assert policy.resting() == ()


def test_every_error_type_is_decided():
    never = "invalid_request content_filter cancelled config_error budget output unknown".split()
    assert {*ON, *map(ErrorType, never)} == set(ErrorType)


def test_a_model_that_failed_is_left_alone_until_its_rest_is_over():
    clock = FakeClock()
    policy = policy_of(clock)
    call(policy, {A: BUSY})
    clock.time += 12
    asked, answered, tried = call(policy, {})
    assert (asked, answered) == ([B], B)
    assert tried == (("a/m", "left alone for 18 s more: server_error: overloaded"),)
    clock.time += 18
    assert call(policy, {})[0] == [A]
    assert policy.resting() == ()


def test_rests_double_to_their_cap_and_begin_anew_after_a_success():
    clock = FakeClock()
    policy = policy_of(clock, cooldown=30, max_cooldown=200)

    def rests(count):
        found = []
        for _ in range(count):
            assert call(policy, {A: BUSY})[0][0] == A
            (rest,) = policy.resting()
            found.append(rest.seconds)
            clock.time += rest.seconds
        return found

    assert rests(5) == [30, 60, 120, 200, 200]
    assert call(policy, {})[0] == [A]
    assert rests(2) == [30, 60]


def test_what_failed_long_ago_is_another_outage():
    clock = FakeClock()
    policy = policy_of(clock, max_cooldown=100)
    call(policy, {A: BUSY})
    clock.time += 131
    call(policy, {A: BUSY})
    assert policy.resting()[0].seconds == 30


def test_one_call_at_a_time_tries_what_has_rested():
    clock = FakeClock()
    policy = policy_of(clock)
    call(policy, {A: BUSY})
    clock.time += 30
    first, others = policy.search([A, B]), [policy.search([A, B]) for _ in range(5)]
    assert first.place == A
    assert {other.place for other in others} == {B}
    first.succeeded()
    assert policy.search([A, B]).place == A


def test_a_call_that_tries_and_vanishes_lets_another_try_later():
    clock = FakeClock()
    policy = policy_of(clock)
    call(policy, {A: BUSY})
    clock.time += 30
    assert policy.search([A, B]).place == A  # interrupted: nothing more is heard of it
    assert policy.search([A, B]).place == B
    clock.time += 30
    assert policy.search([A, B]).place == A


def test_many_calls_that_fail_together_are_one_outage():
    policy = policy_of()
    searches = [policy.search([A, B]) for _ in range(32)]
    for search in searches:
        search.failed(BUSY)
    assert policy.resting()[0].seconds == 30


def test_if_all_rest_the_one_whose_rest_ends_first_is_asked():
    clock = FakeClock()
    policy = policy_of(clock)
    call(policy, {A: BUSY, B: LLMRateLimitError("m", suggested_wait=50), C: BUSY})
    clock.time += 5
    policy.failed(C, LLMRateLimitError("m", suggested_wait=90))
    asked, answered, tried = call(policy, {})
    assert (asked, answered) == ([A], A)
    assert [name for name, _ in tried] == ["b/m", "c/m"]


def test_of_those_all_at_rest_one_that_was_woken_meanwhile_is_taken():
    policy = policy_of()
    call(policy, {A: BUSY, B: BUSY, C: BUSY})
    policy.succeeded(C)
    assert policy.soonest([A, B, C]) == C


def test_a_host_that_is_out_of_reach_is_left_alone_with_all_its_models():
    for error in (DOWN, LLMTimeoutError("m", clock="connect")):
        policy = policy_of()
        asked, _, tried = call(policy, {B: error}, [B, B2, C])
        assert asked == [B, C]
        assert [name for name, _ in tried] == ["b/m", "b/other"]
        assert [(rest.host, rest.model) for rest in policy.resting()] == [(B.host, None)]


@pytest.mark.parametrize(
    "error",
    [BUSY, LLMRateLimitError("m"), LLMQuotaError("m"), LLMNotFoundError("m"),
     LLMTimeoutError("m"), LLMAuthenticationError("m")],
    ids=lambda error: str(error.error_type),
)  # fmt: skip
def test_another_model_of_the_same_host_is_asked(error):
    policy = policy_of()
    assert call(policy, {B: error}, [B, B2, C])[0] == [B, B2]
    assert [(rest.host, rest.model) for rest in policy.resting()] == [(B.host, "m")]


def test_a_host_that_answers_is_no_longer_out_of_reach():
    clock = FakeClock()
    for answer in (LLMInvalidRequestError("m"), LLMRateLimitError("m"), BUSY):
        policy = policy_of(clock)
        call(policy, {B: DOWN}, [B, C])
        clock.time += 30
        assert call(policy, {B: answer}, [B, C])[0][0] == B
        assert call(policy, {}, [B2, C])[0] == [B2]


def test_a_retry_after_longer_than_the_rest_counts_and_nonsense_is_capped():
    for asked, rest in [(None, 30), (5, 30), (95, 95), (1e9, 3600)]:
        policy = policy_of()
        call(policy, {A: LLMRateLimitError("m", suggested_wait=asked)})
        assert policy.resting()[0].seconds == rest


def test_a_retry_after_that_is_heard_during_the_rest_makes_it_longer_never_shorter():
    policy = policy_of()
    for asked, rest in [(100, 100), (50, 100), (None, 100), (200, 200)]:
        policy.failed(A, LLMRateLimitError("m", suggested_wait=asked))
        assert policy.resting()[0].seconds == rest


def test_without_a_cooldown_nothing_is_left_alone():
    policy = policy_of(cooldown=0)
    for _ in range(3):
        assert call(policy, {A: LLMRateLimitError("m", suggested_wait=99)})[0] == [A, B]


def test_a_refused_key_is_warned_of(caplog):
    with caplog.at_level(logging.WARNING, "LLM"):
        call(policy_of(), {A: LLMAuthenticationError("no"), B: LLMAuthenticationError("no")})
        call(policy_of(), {A: LLMAuthenticationError("no")}, [A])
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        "a/m refused the key, and b/m is asked instead",
        "b/m refused the key, and c/m is asked instead",
    ]


LONG = LLMContextLengthError("too long")


@pytest.mark.parametrize(
    "windows, asked, passed_over",
    [
        ({}, [A, B, C], []),
        ({A: 8, B: 4, C: 16}, [A, C], ["b/m"]),
        ({A: 8, B: 8, C: 8}, [A], ["b/m", "c/m"]),
        ({A: 8, C: 16}, [A, C, B], []),
        ({A: 8, B: 16, C: 16}, [A, B], ["c/m"]),
        ({A: 8, B: 16, C: 32}, [A, B, C], []),
        ({B: 16, C: 8}, [A, B], ["c/m"]),
    ],
)
def test_a_context_that_is_too_long_goes_to_larger_windows_then_to_unknown_ones(
    windows, asked, passed_over
):
    sizes = {place.name: tokens for place, tokens in windows.items()}
    policy = policy_of(window=sizes.get)
    found, _, tried = call(policy, dict.fromkeys((A, B, C), LONG))
    assert found == asked
    assert [name for name, why in tried if "no larger" in why] == passed_over
    assert policy.resting() == ()


def test_the_model_that_was_wished_for_is_not_asked_again_as_a_fallback():
    assert call(policy_of(), {A: DOWN, B: DOWN}, [A, B, A])[0] == [A, B]


def test_what_goes_on_can_be_chosen():
    policy = policy_of(on={"rate_limit", ErrorType.CONTENT_FILTER})
    assert call(policy, {A: LLMContentFilterError("m")})[0] == [A, B]
    assert policy.resting() == ()
    assert call(policy, {A: BUSY})[0] == [A]
    assert call(policy, {A: LLMRateLimitError("m")})[0] == [A, B]


@pytest.mark.parametrize(
    "models, settings, said",
    [
        ([], {}, "at least one"),
        (["a/m", ""], {}, "empty"),
        ("a/m", {}, "a list of models is due"),
        ([1], {}, "a list of models is due"),
        (["a/m"], {"cooldown": -1}, "cooldown -1"),
        (["a/m"], {"cooldown": float("nan")}, "cooldown nan"),
        (["a/m"], {"cooldown": 10, "max_cooldown": 5}, "no longer than the second"),
        (["a/m"], {"max_cooldown": float("inf")}, "max_cooldown inf"),
        (["a/m"], {"on": ["slow"]}, "'slow' is no error type; known are rate_limit"),
        (["a/m"], {"on": ["cancelled"]}, "after 'cancelled' no other model is ever asked"),
        (["a/m"], {"on": ["budget"]}, "'budget'"),
    ],
)
def test_settings_that_mean_nothing_are_refused(models, settings, said):
    with pytest.raises(LLMConfigError, match=said):
        FallbackPolicy(models, **settings)


def test_a_reason_is_one_short_line():
    assert reason_of(LLMServerError("a\n  b")) == "server_error: a b"
    assert len(reason_of(LLMServerError("x" * 999))) == 200


def test_a_real_clock_is_the_default():
    policy = FallbackPolicy(["b/m"])
    call(policy, {A: DOWN})
    assert 10 < policy.resting()[0].seconds <= 30


@pytest.mark.parametrize("again", [lambda p: pickle.loads(pickle.dumps(p)), copy.deepcopy])
def test_a_policy_can_go_to_another_process_which_learns_for_itself(again):
    policy = policy_of(cooldown=5)
    call(policy, {A: BUSY})
    twin = again(policy)
    assert (twin.models, twin.cooldown, twin.resting()) == (policy.models, 5, ())
    assert call(twin, {A: BUSY})[0] == [A, B]


kinds = st.sampled_from([None, DOWN, BUSY, LLMRateLimitError("m", suggested_wait=77), LONG])


@given(st.lists(st.tuples(st.tuples(kinds, kinds, kinds), st.floats(0, 300)), max_size=20))
def test_whatever_happens_each_is_asked_once_at_most_and_one_at_least(story):
    clock = FakeClock()
    policy = policy_of(clock)
    for answers, seconds in story:
        before = {rest.host for rest in policy.resting()}
        asked, end, tried = call(policy, dict(zip((A, B, C), answers, strict=True)))
        assert len(set(asked)) == len(asked) >= 1
        assert end is asked[-1] or end is answers[(A, B, C).index(asked[-1])]
        if len(before) < 3:
            assert not before & {place.host for place in asked}
        else:
            assert len(asked) == 1
        assert len(dict(tried)) == len(tried)
        assert all(rest.seconds <= 600 for rest in policy.resting())
        clock.time += seconds


def test_threads_share_a_policy():
    clock = FakeClock()
    policy = policy_of(clock)
    call(policy, {A: BUSY})
    clock.time += 30
    start, first = threading.Barrier(8), []

    def run():
        start.wait()
        first.append(policy.search([A, B]).place)

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(first) == [A] + [B] * 7


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_child_forked_while_another_thread_holds_the_lock_goes_on():
    policy = policy_of()
    call(policy, {A: BUSY})
    with policy._lock:
        child = os.fork()
        if child == 0:
            os._exit(0 if call(policy, {})[0] == [B] else 1)
        assert os.waitpid(child, 0)[1] == 0
