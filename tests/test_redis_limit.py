"""One limit for many processes, in a real Redis: never too much, in order, and what if it is away."""

import itertools
import json
import logging
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from LLM.errors import LLMConfigError, LLMConnectionError, LLMTimeoutError
from LLM.policies.ratelimit import RateLimitConfig, RateLimiter, ServerLimits, TokenAwareRateLimiter
from LLM.policies.redis_limit import RedisWindow
from tests.fakes import AT_ONCE, FakeClock, within
from tests.redises import set_timeout, start, stop, until

redis = pytest.importorskip("redis")

ROOT = Path(__file__).parents[1]
SECRET = "hunter2"


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    process, address = start(tmp_path_factory.mktemp("r"))
    yield address
    stop(process)


# A limit as no other test has it, nor this one when it is done again.
@pytest.fixture
def names(request):
    return (f"{request.node.name}-{number}" for number in itertools.count())


@pytest.fixture
def name(names):
    return next(names)


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    """Redis is there, however long it takes."""
    monkeypatch.setattr("LLM.policies.redis_script.TIMEOUT", 30)


class Short(RateLimiter):
    """A minute of half a second."""

    MINUTE = 0.5


def pair(url, name, *limits, kind=RateLimiter, **options):
    """Two limiters that share a limit, as two processes would."""
    return [kind(*limits, redis_url=url, name=name, **options) for _ in range(2)]


def timed(limiter, *args, **options):
    begun = time.monotonic()
    permit = limiter.acquire(*args, **options)
    return permit, time.monotonic() - begun


class TestSharing:
    def test_two_limiters_share_one_count(self, url, name):
        one, two = pair(url, name, 3, 100)
        one.acquire(10)
        two.acquire(20)
        assert one.get_current_usage() == two.get_current_usage() == (2, 30)
        assert one.state()[:5] == (2, 30, 3, 100, 0)
        assert one.wait_time_needed(70) == 0
        assert 30 < two.wait_time_needed(80) <= 60

    def test_other_names_are_other_limits(self, url, name):
        one = RateLimiter(1, redis_url=url, name=name)
        other = RateLimiter(1, redis_url=url, name=name + "2")
        one.acquire()
        assert other.wait_time_needed() == 0

    def test_corrections_are_shared(self, url, name):
        one, two = pair(url, name, 10, 100)
        permit, unused = one.acquire(50), one.acquire(40)
        permit.correct(5)
        permit.correct(5)
        unused.release()
        assert two.get_current_usage() == (1, 5)
        two.record_tokens(7)
        two.acquire(30)
        two.record_tokens(3)
        assert one.get_current_usage() == (2, 15)

    def test_no_limit_and_more_than_the_limit(self, url, name):
        one, two = pair(url, name, None, None)
        one.acquire(10**9)
        two.acquire(10**9).correct(10**12)
        assert one.get_current_usage() == (2, 10**9 + 10**12)

    def test_the_minute_slides(self, url, name):
        one, two = pair(url, name, 2, None, kind=Short)
        first = time.monotonic()
        one.acquire()
        time.sleep(0.3)
        second = time.monotonic()
        two.acquire()
        one.acquire()
        assert 0.5 <= time.monotonic() - first < 30
        two.acquire()
        assert 0.5 <= time.monotonic() - second < 30

    def test_entries_older_than_the_minute_are_forgotten(self, url, name):
        one, two = pair(url, name, 2, 10, kind=Short)
        permit = one.acquire(10)
        one.acquire(0)
        time.sleep(0.55)
        assert two.get_current_usage() == (0, 0)
        permit.correct(1000)
        assert two.get_current_usage() == (0, 0)

    def test_a_refusal_is_shared_within_its_scope(self, url, name):
        one, two = pair(url, name, 100)
        one.acquire(scope="a").refused(50)
        assert 30 < two.wait_time_needed(scope="a") <= 50
        assert two.wait_time_needed(scope="b") == 0
        assert timed(two, scope="b")[1] < AT_ONCE
        with pytest.raises(LLMTimeoutError, match="for the rate limit"):
            two.acquire(scope="a", deadline_at=time.monotonic() + 5)
        assert 30 < two.state().held["a"] <= 50
        one.acquire(scope="b").refused(1)  # a shorter one ends no longer one
        assert one.wait_time_needed(scope="a") > 20

    def test_nothing_left_is_shared_too(self, url, name):
        one, two = pair(url, name, 100)
        one.acquire(scope="a").learn(ServerLimits(requests_remaining=0, requests_reset=50))
        one.acquire(scope="b").learn(ServerLimits(requests_remaining=1, requests_reset=50))
        assert 30 < two.wait_time_needed(scope="a") <= 50
        assert two.wait_time_needed(scope="b") == 0

    def test_a_deadline_is_answered_at_once_and_leaves_no_place_in_the_queue(self, url, name):
        one, two = pair(url, name, 1)
        one.acquire()
        begun = time.monotonic()
        with pytest.raises(LLMTimeoutError, match=r"wait (60|[45]\d)\.\d s"):
            two.acquire(deadline_at=time.monotonic() + 30)
        assert time.monotonic() - begun < AT_ONCE
        assert redis.Redis.from_url(url).zcard(f"LLM:ratelimit:{name}:queue") == 0

    def test_all_keys_bear_the_name_and_expire(self, url, name):
        one, two = pair(url, name, 1, kind=Short)
        one.acquire()
        two.acquire().refused(0.01)
        client = redis.Redis.from_url(url, decode_responses=True)
        keys = list(client.scan_iter(f"*{name}*"))
        assert keys
        assert all(key.startswith(f"LLM:ratelimit:{name}:") for key in keys)
        assert all(0 < client.ttl(key) < 120 for key in keys)

    def test_a_config_can_name_it(self, url, name):
        limiter = TokenAwareRateLimiter(RateLimitConfig(5, 50, redis_url=url, name=name))
        limiter.acquire(20)
        assert RateLimiter(5, 50, redis_url=url, name=name).get_current_usage() == (1, 20)
        assert name in repr(limiter)

    def test_many_entries_are_kept_as_few(self, url, name):
        limiter = RateLimiter(10_000, redis_url=url, name=name)
        begun = time.monotonic()
        for _ in range(300):
            limiter.acquire(1)
        most = (time.monotonic() - begun) / 0.01 + 1
        assert redis.Redis.from_url(url).zcard(f"LLM:ratelimit:{name}:entries") <= most

    def test_a_server_whose_clock_goes_back_a_little_loses_nothing(self, url, name):
        limiter = RateLimiter(1, redis_url=url, name=name)
        limiter.acquire()
        entries, client = f"LLM:ratelimit:{name}:entries", redis.Redis.from_url(url)
        (entry,) = client.zrange(entries, 0, -1)
        client.zincrby(entries, 10_000_000, entry)
        assert limiter.get_current_usage() == (1, 0)
        assert 30 < limiter.wait_time_needed() <= 60
        client.zincrby(entries, 10**12, entry)  # days: nothing can be dated any more
        assert limiter.get_current_usage() == (0, 0)


# Seconds, less than after which one that waits and says nothing has lost its place.
ALIVE = within(1.5)


class TestOrder:
    def take(self, window, ticket, size=0, scope="", limits=(-1, 100)):
        return window.take(*limits, size, scope, ticket)

    @ALIVE
    def test_a_large_request_is_not_starved_by_another_process(self, url, names):
        name = next(names)
        window = RedisWindow(url, name, 60)
        assert self.take(window, "t1", 60).entry
        assert 30 < self.take(window, "large", 90).wait <= 60
        small = self.take(window, "small", 5)
        assert small.entry is None
        assert 0 < small.wait <= 0.06  # it looks again soon: the large one may give up
        window.leave("large")
        assert self.take(window, "small", 5).entry

    @ALIVE
    def test_even_an_empty_minute_is_for_who_came_first(self, url, names):
        name = next(names)
        window = RedisWindow(url, name, 0.3)
        self.take(window, "t1", 60)
        self.take(window, "large", 100)
        time.sleep(0.35)
        assert self.take(window, "small", 5).entry is None
        assert self.take(window, "large", 100).entry

    @ALIVE
    def test_who_disturbs_nobody_may_pass(self, url, names):
        name = next(names)
        """A limit is not left unused because the first in the queue has not looked yet."""
        window = RedisWindow(url, name, 60)
        entry = self.take(window, "t1", 60).entry
        self.take(window, "large", 90)
        window.change(entry, 0, -60)
        assert self.take(window, "small", 10).entry
        assert self.take(window, "other", 5).entry is None

    @ALIVE
    def test_who_is_silent_loses_the_place(self, url, names):
        name = next(names)
        window = RedisWindow(url, name, 60)
        self.take(window, "t1", 60)
        self.take(window, "dead", 90)
        assert self.take(window, "small", 5).entry is None
        tickets = f"LLM:ratelimit:{name}:tickets"
        redis.Redis.from_url(url).hset(tickets, "dead", "1 90 ")  # alive until 1970
        assert self.take(window, "small", 5).entry

    def test_a_held_scope_keeps_no_other_waiting(self, url, name):
        window = RedisWindow(url, name, 60)
        window.hold("a b", 50)
        held = self.take(window, "first", 90, scope="a b")
        assert (held.entry, held.wait) == (None, pytest.approx(held.held))
        assert 30 < held.held <= 50
        assert self.take(window, "second", 90, scope="c").entry

    @within(Short.MINUTE)  # by then all have to wait
    def test_threads_of_one_process_are_served_in_order(self, url, names):
        limiter = Short(1, redis_url=url, name=next(names))
        limiter.acquire()
        order = []

        def ask(number):
            limiter.acquire()
            order.append(number)

        threads = [threading.Thread(target=ask, args=(n,)) for n in range(3)]
        for count, thread in enumerate(threads, 1):
            thread.start()
            until(lambda count=count: limiter.state().waiting == count, seconds=2)
        for thread in threads:
            thread.join(30)
        assert order == [0, 1, 2]


WORKER = """
import json, sys, threading, time
from LLM.policies.ratelimit import RateLimiter

class Short(RateLimiter):
    MINUTE = 0.5

url, name = sys.argv[1:]
limiter = Short(20, 300, redis_url=url, name=name)
taken = []

def work(number):
    size = 0
    while time.time() < begin + 2:
        size = (size + 7 + number) % 40
        before = time.time()
        permit = limiter.acquire(size)
        after = time.time()
        if size % 3 == 0:
            permit.correct(size // 2)
        taken.append((before, after, size if size % 3 else size // 2))

limiter.get_current_usage()
print('ready', flush=True)
begin = float(sys.stdin.readline())
threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
[t.start() for t in threads]
[t.join() for t in threads]
print(json.dumps(taken))
"""


def test_two_processes_never_exceed_the_limit_together(url, names):
    """Each permit was given between two looks at the clock: what is surely in one window counts."""
    for _ in range(4):
        each = taken_by_two_processes(f"{url}?socket_timeout=30", next(names))
        taken = sorted(each[0] + each[1])
        for begin, _, _ in taken:
            inside = [
                size for before, after, size in taken if before >= begin and after < begin + 0.5
            ]
            assert len(inside) <= 20
            assert sum(inside) <= 300
        # Both get their share, and what is allowed is used; on a machine that holds one up, not each time.
        if min(map(len, each)) > len(taken) / 4 and len(taken) > 30:
            return
    pytest.fail(f"{[len(one) for one in each]} permits")


def taken_by_two_processes(url, name):
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, url, name],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for _ in range(2)
    ]  # fmt: skip
    assert [worker.stdout.readline() for worker in workers] == ["ready\n"] * 2
    start = f"{time.time()}\n"
    for worker in workers:
        worker.stdin.write(start)
        worker.stdin.flush()
    each = [json.loads(worker.communicate(timeout=40)[0]) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0]
    return each


class TestAway:
    @pytest.fixture
    def gone(self, tmp_path):
        return f"unix://{tmp_path}/none.sock?password={SECRET}"

    def test_by_default_it_is_an_error_that_says_what_to_do(self, gone):
        limiter = RateLimiter(redis_url=gone)
        for ask in (limiter.acquire, limiter.get_current_usage, limiter.wait_time_needed):
            with pytest.raises(LLMConnectionError, match=r"none\.sock does not answer") as caught:
                ask()
            assert caught.value.retriable
            assert SECRET not in str(caught.value)
        assert limiter.state()[:5] == (0, 0, 60, 100_000, 0)

    def test_what_was_answered_is_not_spoiled(self, tmp_path):
        process, address = start(tmp_path)
        try:
            limiter = RateLimiter(redis_url=address)
            permit, other = limiter.acquire(10), limiter.acquire(10)
        finally:
            stop(process)
        permit.learn(ServerLimits(requests_remaining=0, requests_reset=9))
        permit.correct(5)
        other.refused(10)
        limiter.record_tokens(9)
        assert limiter.state().requests == 2

    def test_if_so_chosen_the_limit_is_local_until_it_is_back(self, tmp_path, caplog):
        clock = FakeClock()
        caplog.set_level(logging.INFO, "LLM")
        process, address = start(tmp_path)
        try:
            limiter = RateLimiter(3, redis_url=address, clock=clock, if_unavailable="local")
            limiter.acquire()
            stop(process)
            (tmp_path / "redis.sock").unlink()
            limiter.acquire()
            limiter.acquire().refused(0)
            assert limiter.get_current_usage() == (3, 0)
            assert limiter.wait_time_needed() == 60
            clock.sleep(6)  # it looks again, in vain
            assert limiter.get_current_usage() == (3, 0)
            assert limiter.wait_time_needed() == 54
            assert limiter.acquire().waited == pytest.approx(54)
            (warning,) = [r for r in caplog.records if r.levelno == logging.WARNING]
            assert "does not answer" in warning.message
            process, address = start(tmp_path)
            clock.sleep(6)
            limiter.acquire(5)
            assert RateLimiter(redis_url=address).get_current_usage() == (1, 5)
            assert "shared again" in caplog.messages[-1]
        finally:
            stop(process)

    def test_corrections_notice_it_too(self, tmp_path, caplog):
        process, address = start(tmp_path)
        limiter = RateLimiter(redis_url=address, if_unavailable="local")
        permit = limiter.acquire(50)
        stop(process)
        permit.correct(20)
        assert limiter.get_current_usage() == (1, 20)
        assert len(caplog.records) == 1

    def test_a_server_that_hangs_counts_as_away(self, tmp_path):
        process, address = start(tmp_path)
        try:
            limiter = RateLimiter(redis_url=address)
            limiter.acquire()
            set_timeout(limiter._shared._script, 0.1)
            os.kill(process.pid, signal.SIGSTOP)
            with pytest.raises(LLMConnectionError, match="does not answer"):
                limiter.acquire()
        finally:
            stop(process)

    def test_a_wrong_password_is_no_outage(self, tmp_path):
        process, address = start(tmp_path, "--requirepass", SECRET)
        try:
            for wrong in (address, f"{address}?password=wrong"):
                limiter = RateLimiter(redis_url=wrong, if_unavailable="local")
                with pytest.raises(LLMConfigError, match="refuses us: check user and password"):
                    limiter.acquire()
            limiter = RateLimiter(redis_url=f"{address}?password={SECRET}")
            limiter.acquire()
            assert SECRET not in repr(limiter)
        finally:
            stop(process)


class TestCopies:
    def test_a_copy_shares_the_count(self, url, name):
        limiter = TokenAwareRateLimiter(RateLimitConfig(5, 50, redis_url=url, name=name))
        limiter.acquire(20)
        copy = pickle.loads(pickle.dumps(limiter))
        assert repr(copy) == repr(limiter)
        copy.acquire(10)
        assert limiter.get_current_usage() == (2, 30)

    def test_one_in_memory_is_not_copied(self):
        with pytest.raises(TypeError, match="as much again: give it a redis_url"):
            pickle.dumps(RateLimiter(5))

    def test_a_password_is_not_copied(self, url):
        with pytest.raises(TypeError, match="holds a password, which is never pickled") as caught:
            pickle.dumps(RateLimiter(5, redis_url=f"{url}?password={SECRET}"))
        assert SECRET not in str(caught.value)


class TestAddresses:
    @pytest.mark.parametrize(
        "wrong",
        [
            "",
            "localhost:6379",
            "http://localhost",
            "redis://",
            "unix://",
            f"redis://:{SECRET}@host:port/0",
            f"redis://:{SECRET}@[::1/0",
            f"redis://:{SECRET}@host:99999/0",
            f"redis://:{SECRET}@host/0?socket_timeout={SECRET}",
            f"redis://:{SECRET}@host/0?nonsense=1",
        ],
    )
    def test_a_bad_one_is_a_clear_error(self, wrong):
        with pytest.raises(
            LLMConfigError, match=r"^redis_url must be redis://host:port/number"
        ) as e:
            RateLimiter(redis_url=wrong)
        assert SECRET not in str(e.value)
        assert e.value.__cause__ is None

    def test_what_is_shown_bears_no_secret(self):
        window = RedisWindow(f"rediss://user:{SECRET}@host:6380/2?password={SECRET}", "n", 60)
        assert window.address == "rediss://host:6380/2"

    def test_a_missing_extra_is_named(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "redis", None)
        with pytest.raises(LLMConfigError, match=r"pip install 'requests-llm\[redis\]'"):
            RateLimiter(redis_url="redis://localhost")

    def test_the_limiter_itself_imports_nothing_heavy(self):
        code = (
            "import sys, LLM.policies.ratelimit as r; r.RateLimiter().acquire(); "
            "print({'redis', 'asyncio', 'ssl', 'requests'} & set(sys.modules))"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == "set()"


def test_something_else_under_its_name_is_said_so(url):
    client = redis.Redis.from_url(url)
    for part in ("entries", "counts", "queue", "tickets", "holds"):
        client.set(f"LLM:ratelimit:taken:{part}", "mine")
    client.close()
    with pytest.raises(LLMConfigError, match="another name"):
        RateLimiter(5, redis_url=url, name="taken").acquire()
