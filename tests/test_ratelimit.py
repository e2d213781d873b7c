"""Requests and tokens per minute: never too much, never longer than needed, in order, for all threads."""

import dataclasses
import os
import pickle
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from LLM.clock import Clock
from LLM.errors import LLMConfigError, LLMTimeoutError
from LLM.policies import ratelimit
from LLM.policies.ratelimit import (
    Permit,
    RateLimitConfig,
    RateLimiter,
    ServerLimits,
    TokenAwareRateLimiter,
)
from tests.fakes import FakeClock, until, work_of

START = FakeClock().now()


@pytest.fixture
def clock():
    return FakeClock()


def waited(limiter, tokens=0, **options):
    return round(limiter.acquire(tokens, **options).waited, 6)


class TestTheMinute:
    def test_requests_wait_until_the_oldest_is_a_minute_old(self, clock):
        limiter = RateLimiter(2, None, clock=clock)
        assert waited(limiter) == 0
        clock.sleep(10)
        assert [waited(limiter) for _ in range(3)] == [0, 50, 10]

    def test_tokens_wait_until_enough_of_them_are_a_minute_old(self, clock):
        """The oldest alone may not be enough."""
        limiter = RateLimiter(None, 100, clock=clock)
        for _ in range(4):
            limiter.acquire(25)
            clock.sleep(5)
        assert limiter.wait_time_needed(60) == 50
        assert waited(limiter, 60) == 50
        assert limiter.get_current_usage() == (2, 85)

    def test_both_limits_hold(self, clock):
        limiter = RateLimiter(2, 100, clock=clock)
        limiter.acquire(90)
        assert waited(limiter, 20) == 60
        assert waited(limiter, 20) == 0
        assert waited(limiter, 20) == 60

    def test_none_is_no_limit(self, clock):
        limiter = RateLimiter(None, None, clock=clock)
        assert {waited(limiter, 10**9) for _ in range(200)} == {0}

    def test_the_defaults(self, clock):
        limiter = RateLimiter(clock=clock)
        assert (limiter.requests_per_minute, limiter.tokens_per_minute) == (60, 100_000)
        assert [waited(limiter) for _ in range(61)][-1] == 60

    def test_memory_is_bounded(self, clock):
        """A hundred thousand permits within a minute are kept as some thousand entries."""
        limiter = RateLimiter(10**6, None, clock=clock)
        for _ in range(100_000):
            limiter.acquire(1)
            clock.time += 0.0006
        assert limiter.get_current_usage() == (100_000, 100_000)
        assert len(limiter._window._entries) <= 6001

    @given(
        st.integers(1, 5),
        st.integers(1, 100),
        st.lists(
            st.tuples(
                st.floats(0, 40) | st.sampled_from([0.0, 0.001, 20.0, 30.0, 59.995, 60.0]),
                st.floats(0, 1),
                st.none() | st.floats(0, 1),
            ),
            max_size=40,
        ),
    )
    def test_no_sixty_seconds_hold_more_than_the_limit(self, requests, tokens, schedule):
        """Whatever the sizes, pauses and corrections downwards."""
        clock = FakeClock()
        limiter = RateLimiter(requests, tokens, clock=clock)
        taken = []
        for pause, share, used in schedule:
            clock.sleep(pause)
            estimate = int(share * tokens)
            permit = limiter.acquire(estimate)
            if used is not None:
                estimate = int(used * estimate)
                permit.correct(estimate)
            taken.append((clock.now(), estimate))
        for begin, _ in taken:
            inside = [size for at, size in taken if begin <= at < begin + 60]
            assert len(inside) <= requests
            assert sum(inside) <= tokens

    @given(
        st.integers(1, 4), st.lists(st.floats(0, 30), min_size=1, max_size=30), st.integers(0, 50)
    )
    def test_no_wait_is_longer_than_needed(self, requests, pauses, size):
        """Each permit comes at once, or as soon as the one `requests` before it is a minute old."""
        clock = FakeClock()
        limiter = RateLimiter(requests, None, clock=clock)
        taken = []
        for pause in pauses:
            clock.sleep(pause)
            asked = clock.now()
            limiter.acquire(size)
            due = taken[-requests] + 60 if len(taken) >= requests else asked
            assert clock.now() == pytest.approx(max(asked, due), abs=2 * ratelimit.GRAIN)
            taken.append(clock.now())

    def test_the_wait_is_told_before_and_after(self, clock):
        limiter = RateLimiter(1, None, clock=clock)
        told = []
        limiter.acquire(on_wait=told.append)
        assert told == []
        clock.sleep(20)
        assert limiter.wait_time_needed() == 40
        permit = limiter.acquire(on_wait=told.append)
        assert told == [permit.waited] == [pytest.approx(40)]
        assert max(clock.slept[1:]) <= ratelimit.SLICE

    def test_it_is_quick(self):
        limiter = RateLimiter(10**9, 10**12)
        # 3 µs on a quiet machine
        assert work_of(lambda: limiter.acquire(100, scope="a").correct(50), 400) < 10


class TestPermits:
    @pytest.mark.parametrize("used, wait", [(10, 0), (0, 0), (100, 60), (None, 60), (500, 60)])
    def test_the_estimate_is_corrected_to_what_was_used(self, clock, used, wait):
        limiter = RateLimiter(None, 100, clock=clock)
        permit = limiter.acquire(100)
        permit.correct(used)
        assert waited(limiter, 50) == wait

    @pytest.mark.parametrize("used", [-1000, -1, "5", 1.5, True, []])
    def test_what_was_used_is_a_whole_number(self, clock, used):
        limiter = RateLimiter(60, 1000, clock=clock)
        permit = limiter.acquire(100)
        for say in (permit.correct, limiter.record_tokens):
            with pytest.raises(LLMConfigError, match="used tokens must be a whole number from 0"):
                say(used)
        with pytest.raises(LLMConfigError):
            limiter.record_tokens(None)
        assert limiter.get_current_usage() == (1, 100)
        limiter.record_tokens(7)  # the permit is still open
        assert limiter.get_current_usage() == (1, 7)

    def test_more_than_the_limit_is_counted_as_it_is(self, clock):
        limiter = RateLimiter(None, 100, clock=clock)
        limiter.acquire(10).correct(450)
        assert limiter.get_current_usage() == (1, 450)
        assert waited(limiter, 1) == 60

    def test_a_correction_may_be_repeated(self, clock):
        limiter = RateLimiter(None, 100, clock=clock)
        permit = limiter.acquire(50)
        for tokens in (20, 20, None, 20):
            permit.correct(tokens)
        assert limiter.get_current_usage() == (1, 20)

    def test_what_was_not_sent_is_given_back_once(self, clock):
        limiter = RateLimiter(1, 100, clock=clock)
        permit = limiter.acquire(100)
        for _ in range(2):
            permit.release()
        permit.correct(70)
        assert limiter.get_current_usage() == (0, 0)
        assert waited(limiter, 100) == 0

    def test_a_permit_older_than_the_minute_changes_nothing(self, clock):
        limiter = RateLimiter(2, 100, clock=clock)
        late, later = limiter.acquire(50), limiter.acquire(50)
        clock.sleep(61)
        limiter.acquire(30)
        late.correct(5000)
        later.release()
        assert limiter.get_current_usage() == (1, 30)

    def test_a_permit_bears_no_dictionary(self, clock):
        assert not hasattr(RateLimiter(clock=clock).acquire(), "__dict__")

    def test_plain_use_without_the_permit(self, clock):
        limiter = TokenAwareRateLimiter(RateLimitConfig(60, 1000), clock=clock)
        assert limiter.wait_time_needed(800) == 0
        limiter.acquire(800)
        limiter.record_tokens(300)
        assert limiter.get_current_usage() == (1, 300)
        assert limiter.get_current_usage().tokens == 300
        limiter.record_tokens(600)  # nothing is open any more: so much more was used
        assert limiter.get_current_usage() == (1, 900)
        assert limiter.wait_time_needed(200) == 60

    def test_tokens_are_recorded_for_the_oldest_open_permit(self, clock):
        limiter = RateLimiter(60, 1000, clock=clock)
        for _ in range(3):
            limiter.acquire(100)
        for left in (210, 120, 30):
            limiter.record_tokens(10)
            assert limiter.get_current_usage() == (3, left)
        limiter.record_tokens(10)  # nothing is open any more
        assert limiter.get_current_usage() == (3, 40)

    @pytest.mark.parametrize(
        "close, left",
        [
            (lambda p: p.correct(5), 5),
            (lambda p: p.correct(None), 100),
            (lambda p: p.refused(0), 0),
            (lambda p: p.release(), 0),
        ],
    )
    def test_a_permit_of_which_all_is_said_is_not_open(self, clock, close, left):
        """A client in the same thread corrects its permits itself."""
        limiter = RateLimiter(60, 1000, clock=clock)
        mine = limiter.acquire(200)
        close(limiter.acquire(100))
        limiter.record_tokens(20)
        assert limiter.get_current_usage().tokens == 20 + left
        close(mine)  # said twice: also that is the permit's own
        limiter.record_tokens(1)
        assert len(limiter._own.permits) == 0

    def test_open_permits_are_bounded_and_those_of_another_minute_forgotten(self, clock):
        limiter = RateLimiter(None, None, clock=clock)
        for _ in range(2 * ratelimit.OPEN_PERMITS):
            limiter.acquire(1)
        assert len(limiter._own.permits) == ratelimit.OPEN_PERMITS
        for _ in range(3):
            limiter.acquire(1).correct(1)
        clock.sleep(61)
        limiter.acquire(50)
        limiter.record_tokens(5)
        assert limiter.get_current_usage() == (1, 5)

    def test_tokens_are_recorded_for_the_threads_own_permit(self, clock):
        limiter = RateLimiter(60, 1000, clock=clock)
        limiter.acquire(500)
        other = threading.Thread(target=limiter.record_tokens, args=(100,))
        other.start()
        other.join()
        assert limiter.get_current_usage() == (1, 600)


class TestSettings:
    @pytest.mark.parametrize("value", [0, -1, True, "60", 1.5, float("nan"), float("inf"), [], 0.0])
    @pytest.mark.parametrize("name", ["requests_per_minute", "tokens_per_minute"])
    def test_a_limit_that_makes_no_sense_is_refused(self, name, value):
        with pytest.raises(LLMConfigError, match=f"^{name} must be a whole number from 1 up, or N"):
            RateLimiter(**{name: value})
        with pytest.raises(LLMConfigError, match=f"^{name} must be a whole number from 1 up, or N"):
            RateLimitConfig(**{name: value})

    def test_a_whole_number_may_be_written_with_a_point(self):
        assert RateLimiter(60.0, 1e5).tokens_per_minute == 100_000

    def test_other_units_are_refused(self):
        with pytest.raises(
            LLMConfigError, match=r"no requests_per_hour: it takes requests_per_min"
        ):
            RateLimiter(requests_per_hour=100)

    @pytest.mark.parametrize(
        "settings", [{"if_unavailable": "maybe"}, {"name": ""}, {"name": 3}, {"redis_url": 7}]
    )
    def test_other_settings_are_checked(self, settings):
        with pytest.raises(LLMConfigError):
            RateLimiter(**settings)

    def test_a_config_is_checked_at_once(self):
        with pytest.raises(LLMConfigError, match=r"RateLimitConfig knows no rpm: it takes request"):
            RateLimitConfig(rpm=1)
        for wrong in ({"name": ""}, {"if_unavailable": "maybe"}):
            with pytest.raises(LLMConfigError):
                RateLimitConfig(**wrong)
        config = RateLimitConfig(60.0, None, name="mine")
        assert (config.requests_per_minute, config.tokens_per_minute) == (60, None)
        assert config == pickle.loads(pickle.dumps(config)) == dataclasses.replace(config)
        with pytest.raises(dataclasses.FrozenInstanceError):
            config.name = "yours"

    def test_only_a_config_is_one(self):
        with pytest.raises(LLMConfigError, match="takes a RateLimitConfig, not int"):
            TokenAwareRateLimiter(60)
        assert TokenAwareRateLimiter().requests_per_minute == 60

    def test_a_config_does_not_show_the_password(self):
        assert "hunter2" not in repr(RateLimitConfig(redis_url="redis://:hunter2@h/0"))

    @pytest.mark.parametrize("estimate", [-1, True, 1.5, "10", None])
    def test_an_estimate_is_a_whole_number(self, clock, estimate):
        with pytest.raises(LLMConfigError, match="whole number from 0 up"):
            RateLimiter(clock=clock).acquire(estimate)

    def test_an_estimate_above_the_whole_limit_is_an_error_and_no_endless_wait(self, clock):
        limiter = RateLimiter(60, 1000, clock=clock)
        with pytest.raises(LLMConfigError, match="1001 tokens never fits a limit of 1000"):
            limiter.acquire(1001)
        with pytest.raises(LLMConfigError):
            limiter.wait_time_needed(1001)
        assert limiter.get_current_usage() == (0, 0)
        assert waited(limiter, 1000) == 0

    def test_it_says_what_it_is(self):
        assert repr(RateLimiter(5, None)) == "RateLimiter(5, None)"


class TestDeadlines:
    def test_a_wait_past_the_deadline_is_refused_at_once(self, clock):
        limiter = RateLimiter(1, None, clock=clock)
        limiter.acquire()
        before = clock.now()
        with pytest.raises(LLMTimeoutError, match=r"wait 60\.0 s .* ends in 20\.0 s") as caught:
            limiter.acquire(deadline_at=clock.now() + 20)
        assert caught.value.clock == "deadline"
        assert clock.now() == before
        assert limiter.state().waiting == 0
        assert limiter.get_current_usage() == (1, 0)

    def test_a_wait_that_ends_with_the_deadline_is_waited(self, clock):
        limiter = RateLimiter(1, None, clock=clock)
        limiter.acquire()
        assert waited(limiter, deadline_at=clock.now() + 60) == 60

    def test_without_a_wait_the_deadline_does_not_matter(self, clock):
        assert waited(RateLimiter(clock=clock), deadline_at=clock.now() - 1) == 0

    def test_a_hold_that_is_longer_than_the_deadline_is_refused_at_once(self, clock):
        limiter = RateLimiter(clock=clock)
        limiter.acquire().refused(30)
        with pytest.raises(LLMTimeoutError, match=r"30\.0 s"):
            limiter.acquire(deadline_at=clock.now() + 29)

    def test_a_hold_that_comes_while_waiting_is_seen(self, clock):
        limiter = RateLimiter(1, None, clock=clock)
        permit = limiter.acquire()
        sleeps = iter(range(10**6))
        slept = clock.sleep

        def sleep(seconds):
            slept(seconds)
            if next(sleeps) == 100:
                permit.refused(100)

        clock.sleep = sleep
        with pytest.raises(LLMTimeoutError, match="deadline"):
            limiter.acquire(deadline_at=START + 90)
        assert clock.now() < START + 12
        assert limiter.state().waiting == 0

    def test_those_ahead_are_part_of_the_wait(self):
        """Nobody joins a queue that will not reach him in time; who stands in it is not disturbed."""
        limiter = RateLimiter(1, None, clock=(clock := StandingClock()))
        limiter.acquire()
        with waiting(limiter, 2, clock):
            assert limiter.wait_time_needed() == 180
            with pytest.raises(LLMTimeoutError, match=r"180\.0 s"):
                limiter.acquire(deadline_at=clock.now() + 150)

    def test_the_deadline_is_kept_behind_others_too(self, monkeypatch):
        """The one ahead takes longer than was foreseen."""
        monkeypatch.setattr(ratelimit, "BEHIND", 0.01)
        limiter = RateLimiter(2, None, clock=(clock := StandingClock()))
        limiter.acquire()
        permit = limiter.acquire()
        found = []

        def late():
            try:
                limiter.acquire(deadline_at=clock.now() + 61)
            except LLMTimeoutError as error:
                found.append(str(error))

        with waiting(limiter, 1, clock):
            thread = threading.Thread(target=late)
            thread.start()
            until(lambda: limiter.state().waiting == 2)
            permit.refused(200)
            clock.time += 62
            thread.join(30)
        assert found
        assert "has passed" in found[0]


class StandingClock(FakeClock):
    """Time that the test moves: a sleep only lets other threads run."""

    def sleep(self, seconds):
        self.slept.append(seconds)
        time.sleep(0.001)


class waiting:  # noqa: N801 - it is used like a function
    """`count` threads that wait for a permit in turn; they are let go at the end."""

    def __init__(self, limiter, count, clock, tokens=0, scope=""):
        self.limiter, self.clock = limiter, clock
        self.permits = []
        self.threads = [
            threading.Thread(target=self.wait, args=(tokens, scope)) for _ in range(count)
        ]

    def wait(self, tokens, scope):
        self.permits.append(self.limiter.acquire(tokens, scope=scope))

    def __enter__(self):
        for thread in self.threads:
            standing = self.limiter.state().waiting
            thread.start()
            until(lambda standing=standing: self.limiter.state().waiting > standing)
        return self

    def __exit__(self, *exc):
        def all_gone():
            self.clock.time += 1
            return not any(thread.is_alive() for thread in self.threads)

        until(all_gone)


class TestThreads:
    def test_first_come_first_served_whatever_the_size(self):
        """A large request is not starved by the small ones behind it."""
        clock = StandingClock()
        limiter = RateLimiter(None, 100, clock=clock)
        limiter.acquire(60)
        order = []

        def ask(name, tokens):
            limiter.acquire(tokens)
            order.append(name)

        threads = [
            threading.Thread(target=ask, args=job) for job in (("large", 90), ("a", 5), ("b", 5))
        ]
        for count, thread in enumerate(threads, 1):
            thread.start()
            until(lambda count=count: limiter.state().waiting == count)
        time.sleep(0.02)
        assert order == []  # 5 would fit, but 90 came first
        clock.time += 60
        for thread in threads:
            thread.join(30)
        assert order[0] == "large"
        assert sorted(order[1:]) == ["a", "b"]

    def test_many_threads_are_served_in_the_order_in_which_they_came(self):
        clock = StandingClock()
        limiter = RateLimiter(1, None, clock=clock)
        limiter.acquire()
        order = []

        def ask(number):
            limiter.acquire()
            order.append(number)

        threads = [threading.Thread(target=ask, args=(n,)) for n in range(8)]
        for count, thread in enumerate(threads, 1):
            thread.start()
            until(lambda count=count: limiter.state().waiting == count)
        for count in range(1, 9):
            clock.time += 60
            until(lambda count=count: len(order) == count)
            time.sleep(0.005)
            assert len(order) == count
        for thread in threads:
            thread.join(30)
        assert order == list(range(8))

    def test_room_that_is_freed_early_is_used_soon(self):
        clock = StandingClock()
        limiter = RateLimiter(None, 100, clock=clock)
        permit = limiter.acquire(100)
        with waiting(limiter, 3, clock, tokens=20) as queue:
            permit.correct(40)
            until(lambda: len(queue.permits) == 3)
            assert clock.now() == START

    def test_interrupted_waits_give_up_their_place(self, clock):
        limiter = RateLimiter(1, 100, clock=clock)
        limiter.acquire(10)

        def interrupt(seconds):
            raise KeyboardInterrupt

        clock.sleep = interrupt
        with pytest.raises(KeyboardInterrupt):
            limiter.acquire(10)
        assert limiter.state().waiting == 0
        assert limiter.get_current_usage() == (1, 10)

    def test_the_next_is_woken_when_the_first_gives_up(self):
        clock = StandingClock()
        limiter = RateLimiter(None, 100, clock=clock)
        limiter.acquire(50)
        refused = []

        def impatient():
            try:
                limiter.acquire(90, deadline_at=START + 60)
            except LLMTimeoutError as error:
                refused.append(error)

        thread = threading.Thread(target=impatient)
        thread.start()
        until(lambda: limiter.state().waiting == 1)
        with waiting(limiter, 1, clock, tokens=5) as queue:
            limiter.record_tokens(0)  # this thread's 50 were none after all
            limiter.record_tokens(99)
            clock.time += 59
            limiter.record_tokens(99)  # another one uses what was hoped for
            until(lambda: refused)
            clock.time += 60
            until(lambda: queue.permits)
        thread.join(30)

    def test_a_hundred_threads_never_exceed_the_limit(self):
        """On the real clock, with a short minute."""

        class Short(RateLimiter):
            MINUTE = 0.2

        limiter = Short(20, 300)
        clock = Clock()
        taken, lock = [], threading.Lock()

        def work(number):
            for size in range(3):
                before = clock.now()
                limiter.acquire(5 + number % 7 + size)
                with lock:
                    taken.append((before, clock.now(), 5 + number % 7 + size))

        threads = [threading.Thread(target=work, args=(n,)) for n in range(40)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert len(taken) == 120
        # A permit was given between `before` and `after`: what is surely inside a window counts.
        for begin, _, _ in taken:
            inside = [size for b, a, size in taken if b >= begin and a < begin + 0.2]
            assert len(inside) <= 20
            assert sum(inside) <= 300


class TestScopes:
    def test_the_configured_limit_holds_over_all_scopes(self, clock):
        limiter = RateLimiter(2, None, clock=clock)
        assert [waited(limiter, scope=s) for s in "abc"] == [0, 0, 60]

    def test_a_refusal_holds_back_its_scope_only(self, clock):
        limiter = RateLimiter(clock=clock)
        limiter.acquire(scope="a").refused(7)
        assert limiter.state().held == {"a": 7}
        assert waited(limiter, scope="b") == 0
        assert waited(limiter, scope="a") == 7
        assert limiter.state().held == {}

    def test_a_held_scope_does_not_keep_others_waiting(self):
        clock = StandingClock()
        limiter = RateLimiter(clock=clock)
        limiter.acquire(scope="a").refused(1000)
        with waiting(limiter, 2, clock, scope="a") as held:
            assert waited(limiter, scope="b") == 0
            assert held.permits == []
            assert limiter.state().waiting == 2
            assert limiter.wait_time_needed(scope="b") == 0

    def test_among_scopes_too_the_first_goes_first(self, monkeypatch):
        monkeypatch.setattr(ratelimit, "BEHIND", 0.01)
        clock = StandingClock()
        limiter = RateLimiter(1, None, clock=clock)
        limiter.acquire()
        with (
            waiting(limiter, 1, clock, scope="a") as first,
            waiting(limiter, 1, clock, scope="b") as second,
        ):
            clock.time += 60
            until(lambda: first.permits)
            time.sleep(0.02)
            assert second.permits == []

    def test_hints_are_obeyed_and_the_longest_counts(self, clock):
        limiter = RateLimiter(clock=clock)
        first, second = limiter.acquire(), limiter.acquire()
        first.refused(20)
        second.refused(5)
        assert waited(limiter) == 20

    @pytest.mark.parametrize("hint, wait", [(0, 0), (1e9, 86_400), (float("nan"), 1), (-5, 1)])
    def test_strange_hints(self, clock, hint, wait):
        limiter = RateLimiter(clock=clock)
        limiter.acquire().refused(hint)
        assert limiter.wait_time_needed() == wait

    def test_without_a_hint_the_waits_double_up_to_a_minute(self, clock):
        limiter = RateLimiter(1000, clock=clock)
        waits = []
        for _ in range(9):
            permit = limiter.acquire()
            waits.append(round(permit.waited, 6))
            permit.refused(None)
        assert waits == [0, 1, 2, 4, 8, 16, 32, 60, 60]

    @pytest.mark.parametrize(
        "succeed", [lambda p: p.learn(None), lambda p: p.correct(5), lambda p: p.correct(None)]
    )
    def test_a_success_ends_the_row(self, clock, succeed):
        limiter = RateLimiter(1000, clock=clock)
        for _ in range(4):
            limiter.acquire().refused(None)
        succeed(limiter.acquire())
        limiter.acquire().refused(None)
        assert waited(limiter) == 1

    def test_a_refusals_own_headers_are_no_success(self, clock):
        limiter = RateLimiter(1000, clock=clock)
        for _ in range(3):
            permit = limiter.acquire()
            permit.learn(None)
            permit.refused(None)
            permit.learn(None)
            permit.correct(None)
        assert waited(limiter) == 4

    def test_refusals_of_one_burst_are_one(self, clock):
        """Eight threads that are refused together wait as long as one."""
        limiter = RateLimiter(clock=clock)
        for permit in [limiter.acquire() for _ in range(8)]:
            permit.refused(None)
        assert waited(limiter) == 1

    def test_a_refused_request_counts_its_tokens_do_not(self, clock):
        limiter = RateLimiter(60, 1000, clock=clock)
        permit = limiter.acquire(900)
        permit.refused(0)
        permit.correct(None)
        assert limiter.get_current_usage() == (1, 0)

    def test_scopes_that_hold_nothing_are_forgotten(self, clock):
        limiter = RateLimiter(None, None, clock=clock)
        limiter.acquire(scope="held").refused(10_000)
        for number in range(500):
            limiter.acquire(scope=f"model-{number}")
            clock.sleep(1)
        assert len(limiter._scopes) <= ratelimit.MANY_SCOPES + 1
        assert list(limiter.state().held) == ["held"]


class TestLearning:
    def test_nothing_left_waits_until_the_reset(self, clock):
        limiter = RateLimiter(clock=clock)
        limiter.acquire(scope="a").learn(ServerLimits(requests_remaining=0, requests_reset=12.5))
        assert limiter.wait_time_needed(scope="b") == 0
        assert limiter.state().held == {"a": 12.5}
        assert waited(limiter, scope="a") == 12.5
        assert waited(limiter, scope="a") == 0

    def test_no_tokens_left_hold_back_even_what_asks_for_none(self, clock):
        limiter = RateLimiter(clock=clock)
        limiter.acquire().learn(ServerLimits(tokens_remaining=0, tokens_reset=8))
        assert waited(limiter) == 8

    def test_too_few_tokens_left_hold_back_what_is_larger(self, clock):
        limiter = RateLimiter(clock=clock)
        limiter.acquire().learn(ServerLimits(tokens_remaining=500, tokens_reset=30))
        assert waited(limiter, 300) == 0
        assert waited(limiter, 300) == 30  # 200 are left
        assert waited(limiter, 5000) == 0  # and after the reset nobody knows

    def test_what_is_taken_counts_against_what_was_left(self, clock):
        limiter = RateLimiter(clock=clock)
        limiter.acquire().learn(ServerLimits(requests_remaining=3, requests_reset=30))
        assert [waited(limiter) for _ in range(4)] == [0, 0, 0, 30]

    def test_what_is_given_back_is_left_again(self, clock):
        limiter = RateLimiter(clock=clock)
        limiter.acquire().learn(
            ServerLimits(
                requests_remaining=1, requests_reset=30, tokens_remaining=50, tokens_reset=30
            )
        )
        limiter.acquire(50).release()
        assert waited(limiter, 50) == 0
        assert waited(limiter) == 30

    def test_an_overtaken_answer_only_makes_more_careful(self, clock):
        limiter = RateLimiter(clock=clock)
        first, second = limiter.acquire(), limiter.acquire()
        second.learn(ServerLimits(requests_remaining=5, requests_reset=30))
        first.learn(ServerLimits(requests_remaining=6, requests_reset=30))
        assert limiter.state().learned[""].requests_remaining == 5
        first.learn(ServerLimits(requests_remaining=0, requests_reset=30))
        assert limiter.wait_time_needed() == 30

    def test_without_a_reset_what_remains_says_nothing(self, clock):
        limiter = RateLimiter(clock=clock)
        limiter.acquire().learn(ServerLimits(requests_remaining=0, tokens_remaining=0))
        assert waited(limiter, 10) == 0

    def test_a_servers_smaller_limit_is_respected(self, clock):
        limiter = RateLimiter(60, 1000, clock=clock)
        limiter.acquire(10, scope="a").learn(ServerLimits(requests_limit=3, tokens_limit=100))
        assert [waited(limiter, 10, scope="a") for _ in range(3)] == [0, 0, 60]
        assert waited(limiter, 95, scope="a") == 60
        assert [waited(limiter, 10, scope="b") for _ in range(5)] == [0] * 5

    def test_a_servers_larger_limit_changes_nothing(self, clock):
        limiter = RateLimiter(2, 100, clock=clock)
        limiter.acquire().learn(ServerLimits(requests_limit=10_000, tokens_limit=10**6))
        assert [waited(limiter) for _ in range(2)] == [0, 60]

    def test_a_servers_limit_for_less_than_a_minute_is_none_for_a_minute(self, clock):
        """Two requests in two seconds: every third waits for the reset, and no minute."""
        limiter = RateLimiter(1000, None, clock=clock)
        waits = []
        for number in range(8):
            permit = limiter.acquire()
            waits.append(round(permit.waited, 6))
            permit.learn(ServerLimits(2, 1 - number % 2, 2))
        assert waits == [0, 0, 2, 0, 2, 0, 2, 0]
        clock.sleep(30)
        assert waited(limiter) == 0

    def test_a_short_limit_holds_while_no_new_answer_came(self, clock):
        """After the reset there is as much as the limit again, for as long as the reset was."""
        limiter = RateLimiter(1000, None, clock=clock)
        limiter.acquire(10).learn(ServerLimits(3, 0, 4, 100, 0, 4))
        assert [waited(limiter, 10) for _ in range(7)] == [4, 0, 0, 4, 0, 0, 4]
        limiter.acquire(90)
        assert waited(limiter, 20) == 4  # of tokens too

    def test_a_limit_that_comes_back_bit_by_bit_is_one_for_a_minute(self, clock):
        """OpenAI's reset is when all is there again: 2 of 50 are back after 2.4 s."""
        limiter = RateLimiter(1000, None, clock=clock)
        for left in (49, 48):
            limiter.acquire().learn(ServerLimits(50, left, (50 - left) * 1.2))
        clock.sleep(3)
        assert [waited(limiter) for _ in range(49)] == [0] * 48 + [57]

    def test_a_limit_that_is_changed_is_judged_anew(self, clock):
        limiter = RateLimiter(1000, None, clock=clock)
        limiter.acquire().learn(ServerLimits(2, 0, 2))
        clock.sleep(2)
        limiter.acquire().learn(ServerLimits(3))
        assert [waited(limiter) for _ in range(2)] == [0, 58]

    def test_more_than_the_servers_whole_limit_is_sent_alone(self, clock):
        """An estimate is an estimate: the server may say no itself."""
        limiter = RateLimiter(60, 1000, clock=clock)
        limiter.acquire(50).learn(ServerLimits(tokens_limit=100))
        assert waited(limiter, 500) == 60

    def test_the_state_shows_it_all(self, clock):
        limiter = RateLimiter(10, 1000, clock=clock)
        assert limiter.state().learned == {}
        limiter.acquire(100, scope="a").learn(
            ServerLimits(5, 3, 20, tokens_limit=400, tokens_remaining=300, tokens_reset=10)
        )
        limiter.acquire(50, scope="a")
        clock.sleep(1)
        state = limiter.state()
        assert state[:5] == (2, 150, 10, 1000, 0)
        assert state.held == {}
        assert state.learned == {"a": ServerLimits(5, 2, 19, 400, 250, 9)}
        clock.sleep(30)
        assert limiter.state().learned == {"a": ServerLimits(5, None, None, 400, None, None)}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_counts_on_by_itself():
    """The parent's lock and waiting threads are not there; what was used is still counted."""
    clock = StandingClock()
    limiter = RateLimiter(1, None, clock=clock)
    limiter.acquire()
    with waiting(limiter, 2, clock):
        child = os.fork()
        if child == 0:
            good = limiter.state().waiting == 0 and limiter.get_current_usage() == (1, 0)
            os._exit(0 if good else 1)
        assert os.waitpid(child, 0)[1] == 0


def test_permits_come_from_the_limiter():
    assert isinstance(RateLimiter().acquire(), Permit)
