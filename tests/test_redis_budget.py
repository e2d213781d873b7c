"""One budget for many processes, in a real Redis: never too much, exact, and what if it is away."""

import logging
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import time
from datetime import datetime, timezone
from decimal import Decimal
from pathlib import Path

import pytest

from LLM.client import LLM
from LLM.errors import LLMBudgetError, LLMConfigError, LLMConnectionError
from LLM.policies.budget import Book, Budget
from LLM.policies.redis_budget import RETRY_AFTER, RedisBook
from LLM.policies.redis_script import RedisScript
from LLM.policies.spending import ABANDONED_AFTER, Amount, Spending
from LLM.prices import Price
from tests.fakes import FakeClock
from tests.redises import set_timeout, start, stop

redis = pytest.importorskip("redis")

ROOT = Path(__file__).parents[1]
SECRET = "hunter2"
CENT = Decimal("0.01")


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    process, address = start(tmp_path_factory.mktemp("r"))
    yield address
    stop(process)


@pytest.fixture
def name(request):
    return request.node.name


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    """Redis is there, however long it takes."""
    monkeypatch.setattr("LLM.policies.redis_script.TIMEOUT", 30)


@pytest.fixture
def client(url):
    with redis.Redis.from_url(url, decode_responses=True) as opened:
        yield opened


def keys_of(name, period=""):
    return [f"LLM:budget:{name}:{period}:{part}" for part in ("sums", "parts", "open", "given")]


def pair(url, name, *limits, **more):
    """Two budgets that are one, as in two processes."""
    return [Budget(*limits, store=url, name=name, **more) for _ in range(2)]


def age(client, name, seconds, part=2):
    """Let what is reserved have been made so long ago."""
    key = keys_of(name)[part]
    for entry in client.zrange(key, 0, -1):
        client.zincrby(key, -seconds * 1_000_000, entry)


class TestSharing:
    def test_two_budgets_of_one_name_are_one(self, url, name):
        one, two = pair(url, name, "0.10", tokens=100, requests=3)
        first = one.reserve(Decimal("0.07"), 40)
        assert (two.reserved_usd, two.reserved_tokens, two.reserved_requests) == (
            Decimal("0.07"), 40, 1,
        )  # fmt: skip
        with pytest.raises(
            LLMBudgetError, match=r"cost \$0\.04 at worst.*\$0\.03 left of \$0\.10 \(\$0\.07"
        ):
            two.reserve(Decimal("0.04"), 1)
        first.settle(Decimal("0.02"), 30)
        assert (two.spent_usd, two.reserved_usd, two.spent_tokens) == (Decimal("0.02"), 0, 30)
        with pytest.raises(LLMBudgetError, match=r"take 71 tokens at worst.*70 left of 100"):
            two.reserve(CENT, 71)
        two.reserve(Decimal("0.08"), 70).release()
        two.reserve(CENT, 1)
        one.reserve(CENT, 1)
        with pytest.raises(LLMBudgetError, match="no request left of 3"):
            two.reserve(CENT, 1)
        assert isinstance(one.store, Book)

    def test_other_names_and_periods_are_others(self, url, name):
        clock = FakeClock()
        daily = Budget(1, store=url, name=name, period="day", clock=clock)
        daily.reserve(CENT, 1).settle(CENT, 1)
        assert daily.spent_usd == CENT
        assert Budget(1, store=url, name=name).spent_usd == 0
        assert Budget(1, store=url, name=name + "2", period="day", clock=clock).spent_usd == 0
        clock.sleep(24 * 3600)
        assert daily.spent_usd == 0

    def test_what_is_over_vanishes_after_a_year_and_all_time_never(self, url, name, client):
        for period in ("month", None):
            Budget(1, store=url, name=name, period=period).reserve(CENT, 1).settle(None, None)
            Budget(1, store=url, name=name, period=period).reserve(CENT, 1)
        month = datetime.now(timezone.utc).date().isoformat()[:7]
        year = 365 * 24 * 3600
        assert all(client.ttl(key) > year for key in keys_of(name, month)[:3])
        assert all(client.ttl(key) == -1 for key in keys_of(name)[:3])

    def test_money_is_exact(self, url, name):
        budget = Budget(10**6, store=url, name=name, warn_at=None)
        parts = ["0.1", "0.2", "0.000000000000001", "99999.999999999999999", "3", "1.9e-7", "0"]
        for part in parts:
            budget.reserve(Decimal(part), 1).settle(Decimal(part), 1)
        assert budget.spent_usd == sum(map(Decimal, parts))
        for part in parts:
            budget.reserve(Decimal(part), 1)
        assert budget.reserved_usd == sum(map(Decimal, parts))
        budget.reserve(Decimal("1e-20"), 1)  # finer: rounded up
        assert budget.reserved_usd == sum(map(Decimal, parts)) + Decimal("1e-15")

    def test_it_counts_as_the_book_in_a_file_does(self, url, name, tmp_path):
        books = [RedisBook(url), Spending(f"sqlite:///{tmp_path}/spend.db")]
        chance = random.Random(7)
        held = []
        for _ in range(150):
            if held and chance.random() < 0.5:
                receipts, worst = held.pop(chance.randrange(len(held)))
                share = chance.choice([0, 1, Decimal("0.123")])
                truth = Amount(worst.usd * share, int(worst.tokens * share), 1)
                doubt = chance.choice([Decimal(0), truth.usd])
                for book, receipt in zip(books, receipts, strict=True):
                    book.settle(name, receipt, truth, doubt)
            else:
                usd = Decimal(chance.randrange(10**9)).scaleb(-chance.randrange(10))
                worst = Amount(usd, chance.randrange(10**5), 1)
                receipts = [book.reserve(name, "", worst, lambda _: None) for book in books]
                held.append((receipts, worst))
            assert books[0].standing(name, "") == books[1].standing(name, "")

    def test_far_from_the_limit_a_reservation_is_one_round_trip(self, url, name, client):
        def scripts():
            return client.info("commandstats")["cmdstat_evalsha"]["calls"]

        one, two = pair(url, name, 10, warn_at=None)
        for budget in (one, two):
            budget.reserve(CENT, 1)
            budget.reserve(CENT, 1)
        before = scripts()
        for _ in range(20):
            one.reserve(CENT, 1)
            two.reserve(CENT, 1).settle(CENT, 1)
        assert scripts() - before == 60

    def test_a_refusal_is_never_out_of_date(self, url, name):
        one, two = pair(url, name, "0.02")
        held = [one.reserve(CENT, 1), one.reserve(CENT, 1)]
        with pytest.raises(LLMBudgetError):
            two.reserve(CENT, 1)
        for each in held:
            each.release()
        two.reserve(CENT, 1)

    def test_many_budgets_in_one_book_are_not_all_remembered(self, url, name, monkeypatch):
        monkeypatch.setattr("LLM.policies.redis_budget._REMEMBERED", 3)
        book = RedisBook(url)
        for number in range(10):
            Budget(1, store=book, name=f"{name}{number}").reserve(CENT, 1)
        assert len(book._known) <= 3

    def test_a_client_keeps_to_it(self, url, name, server):
        budget = Budget("0.05", store=url, name=name)
        with LLM(base_url=server.url, budget=budget, price=Price(100, 100), max_retries=0) as llm:
            llm.generate("Hello!", max_tokens=50)
            spent = budget.spent_usd
            assert spent == llm.usage.cost > 0
            assert budget.reserved_usd == 0
            assert not llm.generate("Hello!", max_tokens=5000).success
        assert budget.spent_requests == 1


WORKER = """
import sys, threading
from LLM.errors import LLMBudgetError
from LLM.policies.budget import Budget

url, name = sys.argv[1:]
budget = Budget("1.00", store=url, name=name, warn_at=None)
taken = []

def work():
    try:
        while True:
            reservation = budget.reserve(budget.usd / 50, 1)
            reservation.settle(budget.usd / 100, 1)
            taken.append(1)
    except LLMBudgetError:
        pass

budget.state()
print('ready', flush=True)
sys.stdin.readline()
threads = [threading.Thread(target=work) for _ in range(4)]
[t.start() for t in threads]
[t.join() for t in threads]
print(len(taken))
"""


def test_processes_and_threads_never_exceed_it_and_use_it_up(url, name):
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, f"{url}?socket_timeout=30", name],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for _ in range(2)
    ]  # fmt: skip
    assert [worker.stdout.readline() for worker in workers] == ["ready\n"] * 2
    taken = sum(
        int(text) for text, _ in [worker.communicate("\n", timeout=40) for worker in workers]
    )
    budget = Budget(1, store=url, name=name)
    assert budget.spent_usd == taken * CENT
    assert budget.reserved_usd == 0
    # One cent more would have needed two cents of room; eight threads held as much at most meanwhile.
    assert Decimal("0.84") <= budget.spent_usd <= Decimal("0.99")


class TestAbandoned:
    def test_what_nobody_settles_is_spent_and_uncertain_after_an_hour(self, url, name, client):
        one, two = pair(url, name, 1)
        dead = one.reserve(Decimal("0.3"), 7)
        age(client, name, ABANDONED_AFTER - 60)
        assert two.reserved_usd == Decimal("0.3")
        age(client, name, 61)
        assert two.state().spent == (Decimal("0.3"), 7, 1)
        assert (two.reserved_usd, two.uncertain_usd) == (0, Decimal("0.3"))
        dead.settle(Decimal("0.1"), 5)  # it was not dead
        assert two.state().spent == (Decimal("0.1"), 5, 1)
        assert two.uncertain_usd == 0

    def test_it_is_remembered_for_a_day(self, url, name, client):
        budget = Budget(1, store=url, name=name)
        dead = budget.reserve(Decimal("0.3"), 7)
        age(client, name, ABANDONED_AFTER + 1)
        assert budget.uncertain_usd == Decimal("0.3")
        age(client, name, 24 * 3600 + 1, part=3)
        assert budget.spent_usd == Decimal("0.3")
        assert [client.exists(key) for key in keys_of(name)] == [1, 0, 0, 0]
        dead.settle(CENT, 1)
        assert budget.spent_usd == Decimal("0.3")

    def test_settling_twice_counts_once(self, url, name):
        """An answer that is lost on its way makes it come twice."""
        book = RedisBook(url)
        receipt = book.reserve(name, "", Amount(CENT, 5, 1), lambda _: None)
        for _ in range(2):
            book.settle(name, receipt, Amount(CENT / 2, 3, 1), CENT / 2)
        standing = book.standing(name, "")
        assert standing == ((CENT / 2, 3, 1), (0, 0, 0), CENT / 2)

    def test_a_forked_child_leaves_its_parents_accounts_alone(self, tmp_path):
        book = RedisBook(f"unix://{tmp_path}/none.sock")
        book._unsettled.append("its parent's")
        book.after_fork()
        assert not book._unsettled


class TestAway:
    def test_nothing_is_sent_without_it(self, tmp_path, server):
        budget = Budget(1, store=f"unix://{tmp_path}/none.sock?password={SECRET}")
        with LLM(base_url=server.url, budget=budget, price=Price(1, 1), max_retries=0) as llm:
            with pytest.raises(
                LLMConnectionError, match=r"budget's Redis at unix:.*does not answer"
            ) as e:
                llm.chat_completion([{"role": "user", "content": "x"}], max_tokens=5)
        assert not server.requests
        assert "start it, or correct store" in str(e.value)
        assert SECRET not in str(e.value)
        with pytest.raises(LLMConnectionError):
            budget.state()

    def test_the_truth_is_told_when_it_is_back(self, tmp_path, caplog):
        clock = FakeClock()
        process, address = start(tmp_path, "--appendonly", "yes", "--appendfsync", "always")
        try:
            budget = Budget(1, store=address, clock=clock)
            one, two = budget.reserve(Decimal("0.3"), 1), budget.reserve(Decimal("0.3"), 1)
            stop(process)
            (tmp_path / "redis.sock").unlink()
            one.settle(CENT, 1)
            two.settle(CENT, 1)
            waiting = [r for r in caplog.records if "keeps the worst case" in r.message]
            assert len(waiting) == 1
            process, _ = start(tmp_path, "--appendonly", "yes", "--appendfsync", "always")
            assert budget.reserved_usd == Decimal("0.6")
            clock.sleep(RETRY_AFTER + 1)
            assert (budget.reserved_usd, budget.spent_usd) == (0, 2 * CENT)
        finally:
            stop(process)

    def test_a_reservation_whose_answer_was_lost_is_given_back(self, tmp_path):
        process, address = start(tmp_path)
        try:
            clock = FakeClock()
            budget = Budget(1, store=address, clock=clock)
            budget.reserve(CENT, 1).settle(CENT, 1)
            set_timeout(budget.store._script, 0.1)
            os.kill(process.pid, signal.SIGSTOP)
            with pytest.raises(LLMConnectionError, match="does not answer"):
                budget.reserve(Decimal("0.5"), 1)
            os.kill(process.pid, signal.SIGCONT)  # now it reads what it was asked
            set_timeout(budget.store._script, 30)
            fresh = Budget(1, store=address)
            assert fresh.reserved_usd in {0, Decimal("0.5")}
            clock.sleep(RETRY_AFTER)
            assert budget.spent_usd == CENT  # it looks, and gives back first
            assert fresh.reserved_usd == 0
        finally:
            stop(process)

    def test_one_that_hangs_holds_one_call_once(self, tmp_path, monkeypatch, server):
        waits = []

        def hung(script, error, hung=RedisScript.hung):
            waits.append(hung(script, error))
            return waits[-1]

        monkeypatch.setattr(RedisScript, "hung", hung)
        process, address = start(tmp_path)
        clock = FakeClock()
        try:
            budget = Budget(1, store=address, clock=clock)
            settings = {"budget": budget, "price": Price(1, 1), "clock": clock, "retry_delay": 0.1}
            with LLM(base_url=server.url, **settings) as llm:

                def ask():
                    return llm.chat_completion([{"role": "user", "content": "x"}], max_tokens=5)

                assert ask().text
                taken = budget.reserve(CENT, 1)
                set_timeout(budget.store._script, 0.3)
                os.kill(process.pid, signal.SIGSTOP)
                begun = time.monotonic()
                with pytest.raises(LLMConnectionError, match="does not answer"):
                    ask()  # with all its attempts
                assert time.monotonic() - begun >= 0.3
                assert waits == [True]
                for _ in range(5):
                    with pytest.raises(LLMConnectionError, match="does not answer"):
                        budget.reserve(CENT, 1)
                    with pytest.raises(LLMConnectionError, match="does not answer"):
                        budget.state()
                taken.settle(CENT, 1)
                assert waits == [True]
                os.kill(process.pid, signal.SIGCONT)
                set_timeout(budget.store._script, 30)
                clock.sleep(RETRY_AFTER)
                assert ask().text
                assert budget.reserved_usd == 0
                assert budget.spent_requests == 3
        finally:
            stop(process)

    def test_settling_never_raises(self, url, name, client, caplog):
        budget = Budget(1, store=url, name=name)
        reservation = budget.reserve(CENT, 1)
        client.delete(keys_of(name)[0])
        client.set(keys_of(name)[0], "mine")
        caplog.set_level(logging.WARNING, "LLM")
        reservation.settle(CENT, 1)
        with pytest.raises(
            LLMConfigError, match=f"something else under LLM:budget:{name}.*another name="
        ):
            budget.reserve(CENT, 1)

    def test_a_wrong_password_is_no_outage(self, tmp_path):
        process, address = start(tmp_path, "--requirepass", SECRET)
        try:
            for wrong in (address, f"{address}?password=wrong"):
                with pytest.raises(LLMConfigError, match=r"budget's Redis at .* refuses us"):
                    Budget(1, store=wrong).reserve(CENT, 1)
            budget = Budget(1, store=f"{address}?password={SECRET}")
            budget.reserve(CENT, 1)
            assert SECRET not in repr(budget) + repr(budget.store)
        finally:
            stop(process)


class TestAddresses:
    @pytest.mark.parametrize("wrong", ["redis://", f"redis://:{SECRET}@host:port/0", "unix://"])
    def test_a_bad_one_is_a_clear_error(self, wrong):
        with pytest.raises(LLMConfigError, match=r"^store must be redis://host:port/number") as e:
            Budget(1, store=wrong)
        assert SECRET not in str(e.value)

    def test_a_missing_extra_is_named(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "redis", None)
        with pytest.raises(
            LLMConfigError, match=r"budget with store needs .*requests-llm\[redis\]"
        ):
            Budget(1, store="redis://localhost")

    def test_a_copy_is_the_same_budget(self, url, name):
        budget = Budget(1, store=url, name=name)
        copy = pickle.loads(pickle.dumps(budget))
        copy.reserve(CENT, 1).settle(CENT, 1)
        assert budget.spent_usd == CENT

    def test_a_password_is_not_copied(self, url):
        with pytest.raises(TypeError, match="holds a password, which is never pickled"):
            pickle.dumps(Budget(1, store=f"{url}?password={SECRET}"))


def test_threads_of_one_book_settle_what_was_left_once(url, name, client):
    book = RedisBook(url)
    receipts = [book.reserve(name, "", Amount(CENT, 1, 1), lambda _: None) for _ in range(20)]
    book._unsettled.extend((name, receipt, Amount(CENT, 1, 1), Decimal(0)) for receipt in receipts)
    threads = [threading.Thread(target=book.standing, args=(name, "")) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert book.standing(name, "").spent == (20 * CENT, 20, 20)
