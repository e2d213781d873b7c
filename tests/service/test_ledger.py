"""Money in SQL: no budget is overspent by a cent, among threads and processes; nothing counts twice."""

import logging
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from decimal import Decimal

import pytest

from agents.service.ledger import Ledger, SpentRow
from agents.store import Store, StoreError
from agents.types import TokenUsage
from LLM import LLM, Amount, Book, Budget, LLMBudgetError, Price
from tests.databases import at_once, losing_store
from tests.fakes import FakeClock

CENT = Decimal("0.01")
BEGINNING = date(1970, 1, 1)


@pytest.fixture
def clock():
    return FakeClock()


@pytest.fixture
def ledger(store, clock):
    return Ledger(store, clock)


def usage(prompt, completion):
    return TokenUsage(prompt_tokens=prompt, completion_tokens=completion)


class Away:
    """Makes the store fail, as one that is away."""

    def __init__(self, store, monkeypatch):
        self.tries = 0
        self.run = store.run
        self.patch = lambda run: monkeypatch.setattr(store, "run", run)

    def __enter__(self):
        self.patch(self.fail)
        return self

    def __exit__(self, *_):
        self.patch(self.run)

    def fail(self, *_, **__):
        self.tries += 1
        raise StoreError("the store is away", reason="unreachable")


@pytest.fixture
def away(store, monkeypatch):
    return Away(store, monkeypatch)


# Budgets


def test_a_budget_is_kept_in_the_store(store, ledger, clock):
    assert isinstance(ledger, Book)
    budget = Budget("0.10", tokens=100, store=ledger, name="ann")
    reservation = budget.reserve(Decimal("0.07"), 50)
    other = Budget("0.10", tokens=100, store=Ledger(store, clock), name="ann")
    assert (other.reserved_usd, other.reserved_tokens, other.reserved_requests) == (7 * CENT, 50, 1)
    with pytest.raises(LLMBudgetError, match=r"\$0\.03 left of \$0\.10"):
        other.reserve(Decimal("0.04"), 1)
    with pytest.raises(LLMBudgetError, match="50 left of 100"):
        other.reserve(CENT, 51)
    reservation.settle(Decimal("0.02"), 20)
    assert (other.spent_usd, other.spent_tokens, other.spent_requests) == (2 * CENT, 20, 1)
    assert (other.reserved_usd, other.uncertain_usd) == (0, 0)
    other.reserve(Decimal("0.08"), 80).release()
    assert (other.spent_usd, other.spent_requests, other.reserved_requests) == (2 * CENT, 1, 0)
    assert Budget(1, store=ledger, name="bob").spent_usd == 0


def test_a_call_is_held_to_a_budget_in_the_store(server, ledger):
    with LLM(base_url=server.url, price=Price(1, 1)) as llm:
        with llm.budget(Budget("0.001", store=ledger), threads=False) as budget:
            said = [{"role": "user", "content": "Hello!"}]
            llm.chat_completion(said, max_tokens=50)
            with pytest.raises(LLMBudgetError):
                llm.chat_completion(said, max_tokens=1000)
        assert budget.spent_usd == llm.usage.cost
        assert budget.reserved_requests == 0


def test_a_budget_begins_anew_each_day(ledger, clock):
    budget = Budget("0.10", store=ledger, period="day", clock=clock)
    late = budget.reserve(10 * CENT, 1)
    clock.sleep(86_400)
    budget.reserve(CENT, 1).settle(CENT, 1)
    late.settle(10 * CENT, 1)  # counts where it was set aside
    assert budget.spent_usd == CENT
    assert ledger.standing("default", "1970-01-01").spent.usd == 10 * CENT


def test_where_the_truth_never_came_the_worst_case_is_uncertain(ledger):
    budget = Budget(1, store=ledger)
    budget.reserve(CENT, 10).settle(None, None)
    assert (budget.spent_usd, budget.spent_tokens, budget.uncertain_usd) == (CENT, 10, CENT)


def test_a_reservation_of_a_process_that_is_gone_is_spent_and_uncertain_after_an_hour(
    ledger, clock
):
    budget = Budget("0.10", store=ledger)
    late = budget.reserve(6 * CENT, 10)
    clock.sleep(3599)
    assert (budget.reserved_usd, budget.spent_usd) == (6 * CENT, 0)
    clock.sleep(1)
    assert (budget.reserved_usd, budget.spent_usd, budget.uncertain_usd) == (0, 6 * CENT, 6 * CENT)
    with pytest.raises(LLMBudgetError):
        budget.reserve(5 * CENT, 1)
    late.settle(CENT, 1)  # it was only slow: the truth still counts
    assert (budget.reserved_usd, budget.spent_usd, budget.uncertain_usd) == (0, CENT, 0)
    budget.reserve(5 * CENT, 1)


def test_money_is_exact(ledger):
    tiny = Decimal("0.000000000000000000000000000000001")
    budget = Budget(1000, store=ledger, name="exact")
    budget.reserve(Decimal(999), 1).settle(Decimal(999), 1)
    budget.reserve(tiny, 1).settle(tiny, 1)
    assert budget.spent_usd == Decimal("999.000000000000000000000000000000001")


def test_threads_cannot_overspend_by_a_cent(ledger):
    rounds = 12
    budget = Budget(CENT * rounds * 8, store=ledger, warn_at=None)
    settled, lock = [], threading.Lock()

    def work(seed):
        chance = random.Random(seed)
        for _ in range(rounds):
            worst = CENT * chance.randint(1, 5)
            try:
                reservation = budget.reserve(worst, 1)
            except LLMBudgetError:
                continue
            state = budget.state()
            assert state.spent.usd + state.reserved.usd <= budget.usd
            if chance.random() < 0.2:
                reservation.release()
                continue
            truth = CENT * chance.randint(0, int(worst / CENT))
            reservation.settle(truth, 1)
            with lock:
                settled.append(truth)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert budget.spent_usd == sum(settled) <= budget.usd
    assert budget.spent_requests == len(settled)
    assert budget.state().reserved == Amount()


SPENDER = """
import sys
from decimal import Decimal
from agents.service.ledger import Ledger
from agents.store import Store
from LLM import Budget, LLMBudgetError
url, held, done = sys.argv[1], 0, 0
with Store.open(url, busy_timeout=30) as store:
    ledger = Ledger(store)
    # Two budgets, so that two that settle could wait for each other.
    budgets = [Budget("0.30", store=ledger, name=name, warn_at=None) for name in ("a", "b")]
    print(flush=True); sys.stdin.readline()
    for number in range(40):
        budget = budgets[number % 2]
        try:
            reservation = budget.reserve(Decimal("0.01"), 1)
        except LLMBudgetError:
            continue
        held += 1
        if number % 4 < 2:
            reservation.settle(Decimal("0.01"), 1)
    assert ledger.flush()
print(held)
"""


def test_of_two_processes_that_reserve_at_once_neither_passes_the_limit(ledger, url):
    held = sum(map(int, at_once(SPENDER, [url], [url])))
    assert held == 60  # of 80 asked for: exactly what the two limits allow
    for name in ("a", "b"):
        standing = ledger.standing(name, "")
        assert standing.spent.usd + standing.reserved.usd == Decimal("0.30")
        assert standing.spent.requests + standing.reserved.requests == 30


def test_trouble_at_settling_keeps_the_truth_for_later(ledger, clock, away, caplog):
    budget = Budget(1, store=ledger, warn_at=None)
    first, second = (budget.reserve(Decimal("0.4"), 1) for _ in range(2))
    with away:
        first.settle(CENT, 1)
        second.settle(CENT, 1)
        assert away.tries == 1  # the second does not wait in vain
        clock.sleep(5)
        with pytest.raises(StoreError, match="away"):
            budget.reserve(CENT, 1)
        assert not ledger.flush()
    assert "keeps the worst case" in caplog.text
    assert budget.reserved_usd == Decimal("0.8")  # not tried yet
    assert ledger.flush()
    assert (budget.spent_usd, budget.reserved_usd) == (2 * CENT, 0)


def test_what_was_left_to_settle_is_settled_with_the_next_call(ledger, clock, away):
    budget = Budget(1, store=ledger, warn_at=None)
    reservation = budget.reserve(Decimal("0.4"), 1)
    with away:
        reservation.settle(CENT, 1)
    clock.sleep(5)
    budget.reserve(Decimal("0.9"), 1)
    assert budget.spent_usd == CENT


@pytest.mark.parametrize("after", [True, False])
def test_money_whose_writing_lost_its_answer_is_counted_once(postgres, after):
    with losing_store(postgres.new(), after=after) as (store, lost):
        ledger = Ledger(store)
        budget = Budget("0.10", store=ledger, warn_at=None)
        reservation = budget.reserve(6 * CENT, 1)
        assert budget.reserved_usd == 6 * CENT
        lost.clear()
        reservation.settle(4 * CENT, 1)
        assert (budget.spent_usd, budget.reserved_usd, budget.uncertain_usd) == (4 * CENT, 0, 0)
        lost.clear()
        ledger.record("ann", "m", usage(1, 2), CENT)
        assert [(row.calls, row.cost) for row in ledger.by_day_and_model(None, BEGINNING)] == [
            (1, CENT)
        ]


# Usage


def test_what_was_spent_is_added_up_by_day_and_model(ledger, clock):
    ledger.record("ann", "m", usage(10, 5), CENT)
    ledger.record("ann", "m", usage(1, 1), CENT, complete=False)
    ledger.record("bob", "m", usage(100, 50), None)
    ledger.record("ann", None, None, Decimal(0))
    clock.sleep(86_400)
    ledger.record("bob", "m", usage(7, 7), CENT)
    today = ("1970-01-02", "m", 1, 7, 7, CENT, 0, 0)
    assert ledger.by_day_and_model("ann", BEGINNING) == [
        ("1970-01-01", "", 1, 0, 0, Decimal(0), 0, 0),
        ("1970-01-01", "m", 2, 11, 6, 2 * CENT, 0, 1),
    ]
    assert ledger.by_day_and_model(None, BEGINNING) == [
        today,
        ("1970-01-01", "", 1, 0, 0, Decimal(0), 0, 0),
        ("1970-01-01", "m", 3, 111, 56, 2 * CENT, 1, 1),
    ]
    assert ledger.by_day_and_model("bob", date(1970, 1, 2)) == [SpentRow(*today)]
    assert ledger.by_day_and_model("eve", BEGINNING) == []


@pytest.mark.parametrize("owner", ["a\0b", "\ud800", "x" * 10_000, "'; DROP TABLE spending; --"])
def test_every_owner_and_model_can_be_written_down(ledger, owner):
    ledger.record(owner, owner, usage(1, 1), CENT)
    assert ledger.by_day_and_model(owner, BEGINNING)[0].calls == 1


@pytest.mark.parametrize(
    "cost", [Decimal("NaN"), Decimal("sNaN"), Decimal("Infinity"), Decimal(-1), Decimal(10**12)]
)
def test_nonsense_is_no_cost_and_no_token(ledger, cost):
    ledger.record("ann", "m", usage(10**30, -5), cost)
    (row,) = ledger.by_day_and_model("ann", BEGINNING)
    assert row[2:] == (1, 0, 0, Decimal(0), 1, 0)


def test_trouble_at_writing_spoils_no_answer_and_loses_nothing(ledger, clock, away, caplog):
    caplog.set_level(logging.WARNING)
    with away:
        ledger.record("ann", "m", usage(1, 1), CENT)
        ledger.record("ann", "m", usage(1, 1), CENT)
        assert away.tries == 1  # the second does not wait in vain
        clock.sleep(5)
        ledger.record("ann", "m", usage(1, 1), CENT)
        assert away.tries == 2
        with pytest.raises(StoreError, match="away"):
            ledger.by_day_and_model(None, BEGINNING)
        assert not ledger.flush()
    assert "not written down yet: the store is away" in caplog.text
    assert ledger.flush()
    ledger.record("ann", "m", usage(1, 1), CENT)
    (row,) = ledger.by_day_and_model(None, BEGINNING)
    assert (row.calls, row.cost) == (4, 4 * CENT)


def test_threads_write_to_one_ledger(ledger):
    def work(number):
        for _ in range(25):
            ledger.record(f"owner {number % 2}", "m", usage(1, 1), CENT)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert sum(row.calls for row in ledger.by_day_and_model("owner 0", BEGINNING)) == 100
    (row,) = ledger.by_day_and_model(None, BEGINNING)
    assert (row.calls, row.cost) == (200, 2)


RECORDER = """
import sys
from decimal import Decimal
from agents.service.ledger import Ledger
from agents.store import Store
with Store.open(sys.argv[1], busy_timeout=30) as store:
    ledger = Ledger(store)
    print(flush=True); sys.stdin.readline()
    for number in range(40):
        ledger.record(f"owner {number % 3}", "m", None, Decimal("0.01"))
    assert ledger.flush()
print()
"""


def test_processes_write_to_one_ledger(ledger, url):
    at_once(RECORDER, [url], [url])
    rows = ledger.by_day_and_model(None, BEGINNING)
    assert (sum(row.calls for row in rows), sum(row.cost for row in rows)) == (80, Decimal("0.80"))


def test_a_ledger_in_memory_is_its_stores_own():
    with Store.open(":memory:") as store:
        ledger = Ledger(store)
        ledger.record("ann", "m", None, CENT)
        assert len(ledger.by_day_and_model(None, BEGINNING)) == 1
