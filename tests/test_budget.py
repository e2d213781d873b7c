"""Budgets hold: among threads, among processes, over runs, and when the truth never comes."""

import contextvars
import logging
import multiprocessing
import os
import pickle
import random
import sqlite3
import subprocess
import sys
import threading
from contextlib import contextmanager
from datetime import date, datetime, timedelta, timezone
from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from LLM.errors import LLMBudgetError, LLMConfigError, LLMConnectionError
from LLM.policies.budget import Book, Budget, active_budgets, enter, leave, reserve_all
from LLM.policies.spending import ABANDONED_AFTER, RETRY_AFTER, Amount, Receipt, Spending, Standing
from LLM.policies.sqlite import DatabaseError
from LLM.types import TokenUsage
from tests.fakes import FakeClock, work_of

CENT = Decimal("0.01")


@pytest.fixture
def url(tmp_path):
    return f"sqlite:///{tmp_path}/spend.db"


@pytest.fixture(params=["memory", "store"])
def make(request, url):
    """Makes a budget of either kind."""

    def budget(*limits, **more):
        if request.param == "store":
            more.setdefault("store", url)
        return Budget(*limits, **more)

    return budget


# Limits


@pytest.mark.parametrize("usd", ["0.50", "$0.50", 0.5, Decimal("0.5"), "0.50 USD", " $ 0.5 "])
def test_dollars_may_be_written_in_many_ways(usd):
    assert Budget(usd).usd == Decimal("0.5")


@pytest.mark.parametrize(
    "limits, text",
    [
        ({}, "needs a limit"),
        ({"usd": 0}, "above 0"),
        ({"usd": -1}, "0 or more"),
        ({"usd": float("nan")}, "0 or more"),
        ({"usd": "inf"}, "0 or more"),
        ({"usd": "5 EUR"}, "in US dollars"),
        ({"usd": "€5"}, "in US dollars"),
        ({"usd": True}, "must be US dollars"),
        ({"eur": 5}, "no 'eur': its units are usd, tokens and requests"),
        ({"usd": 1, "dollars": 5}, "no 'dollars'"),
        ({"tokens": 0}, "tokens of a budget must be a whole number above 0"),
        ({"tokens": 1.5}, "whole number"),
        ({"tokens": True}, "whole number"),
        ({"requests": -1}, "requests of a budget"),
        ({"requests": "9"}, "requests of a budget"),
        ({"usd": 1, "warn_at": 0}, "warn_at"),
        ({"usd": 1, "warn_at": 1.1}, "warn_at"),
        ({"usd": 1, "warn_at": "x"}, "warn_at"),
        ({"usd": 1, "on_warn": 1}, "on_warn"),
        ({"usd": 1, "unknown": "ask"}, "unknown must be"),
        ({"usd": 1, "period": "week"}, "period must be"),
        ({"usd": 1, "name": ""}, "name"),
        ({"usd": 1, "store": 1}, "store must be"),
        ({"usd": 1, "store": "postgres://x"}, "not the URL of a SQLite file"),
    ],
)
def test_a_limit_that_is_none_is_refused(limits, text):
    with pytest.raises(LLMConfigError, match=text) as caught:
        Budget(**limits)
    assert "\n" not in str(caught.value)


def test_a_million_may_be_written_as_a_power():
    assert Budget(tokens=1e6).tokens == 1_000_000


# Reserving


def test_the_worst_case_is_set_aside_and_settled_to_the_truth(make):
    budget = make(1, tokens=100, requests=5)
    first = budget.reserve(Decimal("0.6"), 60)
    assert (budget.reserved_usd, budget.reserved_tokens, budget.reserved_requests) == (
        Decimal("0.6"),
        60,
        1,
    )
    assert (budget.remaining_usd, budget.remaining_tokens, budget.remaining_requests) == (
        Decimal("0.4"),
        40,
        4,
    )
    first.settle(Decimal("0.1"), 7)
    assert (budget.spent_usd, budget.spent_tokens, budget.spent_requests) == (Decimal("0.1"), 7, 1)
    assert budget.reserved_usd == budget.uncertain_usd == 0
    assert budget.remaining_usd == Decimal("0.9")


def test_exactly_what_is_left_still_fits_and_a_cent_more_does_not(make):
    budget = make("0.03")
    budget.reserve(2 * CENT, 1).settle(2 * CENT, 1)
    with pytest.raises(LLMBudgetError):
        budget.reserve(2 * CENT, 1)
    budget.reserve(CENT, 1)
    with pytest.raises(LLMBudgetError):
        budget.reserve(Decimal("1E-12"), 1)
    assert budget.remaining_usd == 0


def test_what_was_released_is_free_again(make):
    budget = make(1, tokens=10, requests=1)
    budget.reserve(Decimal(1), 10).release()
    assert budget.state().spent == budget.state().reserved == Amount()
    budget.reserve(Decimal(1), 10)


def test_a_reservation_ends_once(make):
    budget = make(1)
    reservation = budget.reserve(CENT, 1)
    reservation.settle(CENT, 1)
    reservation.settle(CENT, 1)
    reservation.release()
    assert budget.spent_usd == CENT
    assert budget.spent_requests == 1


def test_without_the_truth_the_worst_case_counts_and_is_uncertain(make):
    budget = make(1, tokens=100)
    budget.reserve(Decimal("0.5"), 60).settle(None, None)
    assert budget.spent_usd == budget.uncertain_usd == Decimal("0.5")
    assert budget.spent_tokens == 60
    budget.reserve(Decimal("0.5"), 40).settle(CENT, None)
    assert budget.spent_usd == Decimal("0.51")
    assert budget.uncertain_usd == Decimal("0.5")
    assert budget.spent_tokens == 100


def test_the_truth_counts_even_when_it_is_dearer_than_the_worst_case(make):
    budget = make(1)
    budget.reserve(CENT, 1).settle(Decimal(2), 1)
    assert budget.spent_usd == 2
    assert budget.remaining_usd == 0


@pytest.mark.parametrize(
    "limits, cost, tokens, text",
    [
        (
            {"usd": "0.5"},
            Decimal("0.7"),
            9,
            r"cost \$0.70 at worst, .*'default' has \$0.50 left of",
        ),
        ({"tokens": 1000}, None, 1500, "take 1,500 tokens at worst, .* has 1,000 left of 1,000"),
        ({"usd": 1}, None, 9, r"price=Price\(…\).*\[cost\].*max_tokens.*unknown='allow'"),
        ({"tokens": 10}, CENT, None, "max_tokens.*unknown='allow'"),
    ],
)
def test_a_refusal_says_what_it_may_take_what_is_left_and_what_to_do(limits, cost, tokens, text):
    budget = Budget(**limits)
    with pytest.raises(LLMBudgetError, match=text) as caught:
        budget.reserve(cost, tokens)
    assert "\n" not in str(caught.value)
    assert not caught.value.retriable
    assert budget.reserved_requests == 0


def test_a_refusal_tells_of_calls_under_way():
    budget = Budget(1, tokens=10)
    budget.reserve(Decimal("0.9"), 1)
    with pytest.raises(LLMBudgetError, match=r"\(\$0.90 reserved for calls under way\)"):
        budget.reserve(Decimal("0.9"), 1)
    with pytest.raises(LLMBudgetError, match=r"\(1 reserved for calls under way\)"):
        budget.reserve(CENT, 10)


def test_requests_are_counted_too(make):
    budget = make(requests=2)
    budget.reserve(None, None).settle(None, None)
    budget.reserve(None, None)
    with pytest.raises(LLMBudgetError, match="no request left of 2"):
        budget.reserve(None, None)


def test_unknown_may_be_allowed_and_then_what_becomes_known_counts(make):
    budget = make(1, tokens=10, unknown="allow")
    reservation = budget.reserve(None, None)
    assert budget.reserved_usd == 0
    reservation.settle(CENT, 5)
    assert budget.spent_usd == CENT
    assert budget.spent_tokens == 5
    budget.reserve(None, None).settle(None, None)
    assert budget.uncertain_usd == 0
    with pytest.raises(LLMBudgetError):
        budget.reserve(Decimal(1), 1)


def test_state_and_text_tell_all(make):
    budget = make("0.5", tokens=1000, name="trial")
    budget.reserve(CENT, 10).settle(CENT, 10)
    state = budget.state()
    assert (state.name, state.limit_usd, state.limit_tokens, state.limit_requests) == (
        "trial",
        Decimal("0.5"),
        1000,
        None,
    )
    assert state.remaining_requests is None
    assert str(budget) == "budget 'trial': $0.01 of $0.50, 10 of 1,000 tokens spent"
    assert repr(budget) == "Budget(usd=0.5, tokens=1000, name='trial')"
    assert "3 requests" in str(Budget(requests=3))
    assert Budget(requests=3).remaining_usd is Budget(requests=3).remaining_tokens is None


# Warning


def test_one_warning_when_the_fraction_is_spent(make):
    seen = []
    budget = make(1, on_warn=seen.append)
    budget.reserve(Decimal("0.9"), 1).settle(Decimal("0.79"), 1)
    assert seen == []
    budget.reserve(CENT, 1).settle(CENT, 1)
    budget.reserve(CENT, 1).settle(CENT, 1)
    assert seen == [budget]


@pytest.mark.parametrize("limits", [{"tokens": 10}, {"requests": 1}])
def test_tokens_and_requests_warn_too(limits):
    seen = []
    budget = Budget(**limits, on_warn=seen.append, warn_at=0.8)
    budget.reserve(None, 9).settle(None, 8)
    assert seen == [budget]


def test_without_a_function_a_line_in_the_log(caplog):
    budget = Budget(1)
    budget.reserve(Decimal(1), 1).settle(Decimal("0.8"), 1)
    assert caplog.messages == ["budget 'default': $0.80 of $1.00 spent"]
    silent = Budget(1, warn_at=None)
    silent.reserve(Decimal(1), 1).settle(Decimal(1), 1)
    assert len(caplog.messages) == 1


def test_a_warning_that_fails_is_logged(caplog):
    budget = Budget(1, on_warn=lambda budget: 1 / 0)
    budget.reserve(Decimal(1), 1).settle(Decimal(1), 1)
    assert budget.spent_usd == 1
    assert "warning of budget 'default' failed" in caplog.text


# Periods


@pytest.mark.parametrize("period, days", [("day", 1), ("month", 31)])
def test_a_period_begins_anew(make, period, days):
    clock, seen = FakeClock(), []
    budget = make(1, period=period, clock=clock, on_warn=seen.append)
    budget.reserve(Decimal(1), 1).settle(Decimal(1), 1)
    late = Budget(1, period=period, clock=clock)  # another one, to leave open
    with pytest.raises(LLMBudgetError):
        budget.reserve(CENT, 1)
    clock.sleep(days * 86400)
    assert budget.spent_usd == 0
    assert late.state().period in ("1970-01-02", "1970-02")
    budget.reserve(Decimal(1), 1).settle(Decimal(1), 1)
    assert seen == [budget, budget]
    assert str(budget).endswith(f"spent in {budget.state().period}")


def test_a_call_counts_in_the_period_in_which_it_was_sent(make):
    clock = FakeClock()
    budget = make(1, period="day", clock=clock)
    open_call = budget.reserve(CENT, 1)
    clock.sleep(86400)
    assert budget.reserved_usd == 0
    budget.reserve(CENT, 1).settle(CENT, 1)
    open_call.settle(CENT, 1)
    assert budget.spent_usd == CENT
    assert budget.state().reserved == Amount()


# Scopes


@contextmanager
def inside(budget):
    token = enter(budget)
    yield budget
    leave(token)


def test_a_budget_holds_inside_its_block_and_nests():
    outer, inner = Budget(1), Budget(2)
    assert active_budgets() == ()
    with inside(outer):
        with inside(inner), inside(outer):
            assert active_budgets() == (outer, inner, outer)
        assert active_budgets() == (outer,)
    assert active_budgets() == ()


def test_another_thread_is_not_inside_unless_given_the_context():
    seen = []
    with inside(Budget(1)) as budget:
        context = contextvars.copy_context()
        for target in (active_budgets, lambda: context.run(active_budgets)):
            thread = threading.Thread(target=lambda ask=target: seen.append(ask()))
            thread.start()
            thread.join()
    assert seen == [(), (budget,)]


def test_a_call_must_fit_all_or_nothing_is_set_aside():
    large, small = Budget(1), Budget("0.1", name="small")
    with pytest.raises(LLMBudgetError, match="'small'"):
        reserve_all((large, small), Decimal("0.5"), 1)
    assert large.state().reserved == large.state().spent == Amount()
    both = reserve_all((large, small, large), CENT, 1)
    assert large.reserved_usd == small.reserved_usd == CENT
    both.settle(CENT / 2, 1)
    assert large.spent_usd == small.spent_usd == CENT / 2
    reserve_all((large, small), CENT, 1).release()
    assert large.reserved_usd == 0
    nothing = reserve_all((), None, None)
    nothing.settle(None, None)
    nothing.release()


# Threads


def in_threads(work, count=32):
    failures = []

    def run(number):
        try:
            work(number)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


@pytest.mark.parametrize("kind, rounds", [("memory", 200), ("store", 15)])
def test_32_threads_cannot_overspend_by_a_cent(kind, rounds, url):
    rounds_of_limit = rounds * 32 // 4
    budget = Budget(
        CENT * rounds_of_limit, requests=rounds * 16, store=url if kind == "store" else None
    )
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

    in_threads(work)
    assert budget.spent_usd == sum(settled) <= budget.usd
    assert budget.spent_requests == len(settled) <= budget.requests
    assert budget.state().reserved == Amount()


def test_a_warning_comes_once_whatever_the_number_of_threads():
    seen = []
    budget = Budget(requests=32, on_warn=seen.append)
    in_threads(lambda _: budget.reserve(None, None).settle(None, None))
    assert seen == [budget]


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["reserve", "settle", "unknown", "release"]),
        st.integers(0, 60),
        st.integers(0, 9),
    ),
    max_size=40,
)


@settings(deadline=None)
@given(STEPS)
def test_spent_and_reserved_never_exceed_the_limit(steps):
    budget = Budget(1, tokens=100, warn_at=None)
    under_way, spent, uncertain = [], Decimal(0), Decimal(0)
    for step, size, which in steps:
        if step == "reserve":
            try:
                under_way.append(budget.reserve(CENT * size, size))
            except LLMBudgetError:
                assert budget.remaining_usd < CENT * size or budget.remaining_tokens < size
        elif under_way:
            reservation = under_way.pop(which % len(under_way))
            worst = reservation.amount.usd
            if step == "settle":
                reservation.settle(min(worst, CENT * size), None)
                spent += min(worst, CENT * size)
            elif step == "unknown":
                reservation.settle(None, None)
                spent, uncertain = spent + worst, uncertain + worst
            else:
                reservation.release()
        state = budget.state()
        assert state.spent.usd + state.reserved.usd <= 1
        assert state.spent.tokens + state.reserved.tokens <= 100
        assert state.spent.usd == spent
        assert state.uncertain_usd == uncertain
        assert state.reserved.usd == sum(part.amount.usd for part in under_way)
        assert state.remaining_usd == 1 - spent - state.reserved.usd


# Stores


def test_a_stored_budget_lasts_and_is_known_by_its_name(url):
    Budget(1, store=url).reserve(CENT, 5).settle(CENT, 5)
    spending = Spending(url)
    again = Budget(1, store=spending)
    assert again.spent_usd == CENT
    assert again.spent_tokens == 5
    assert Budget(1, store=url, name="other").spent_usd == 0
    row = spending.budgets()
    assert [(r.name, r.period, r.standing.spent.usd) for r in row] == [("default", "", CENT)]


SPENDER = """
import sys
from decimal import Decimal
from LLM.errors import LLMBudgetError
from LLM.policies.budget import Budget
budget = Budget("0.50", store=sys.argv[1], warn_at=None)
spent = 0
for _ in range(60):
    try:
        reservation = budget.reserve(Decimal("0.03"), 3)
    except LLMBudgetError:
        continue
    reservation.settle(Decimal("0.02"), 2)
    spent += 1
print(spent)
"""


def test_two_processes_cannot_overspend_together(url):
    command = [sys.executable, "-c", SPENDER, url]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(3)]
    counts = [int(process.communicate()[0]) for process in running]
    budget = Budget("0.50", store=url)
    assert budget.spent_usd == sum(counts) * 2 * CENT
    assert budget.spent_usd == Decimal("0.48")  # one more might have cost 3 cents
    assert budget.state().reserved == Amount()


def test_what_a_dead_process_had_reserved_counts_and_then_is_uncertain(url):
    code = """
import os, sys
from LLM.policies.budget import Budget
Budget(1, store=sys.argv[1]).reserve(__import__("decimal").Decimal("0.4"), 4)
os._exit(1)
"""
    subprocess.run([sys.executable, "-c", code, url], check=False)
    budget = Budget(1, store=url)
    assert budget.reserved_usd == Decimal("0.4")
    with pytest.raises(LLMBudgetError, match="under way"):
        budget.reserve(Decimal("0.7"), 1)


def test_a_reservation_of_long_ago_is_uncertain_and_its_late_truth_still_counts(url):
    clock = FakeClock()
    budget = Budget(1, store=url, clock=clock)
    late, dead = budget.reserve(Decimal("0.4"), 4), budget.reserve(Decimal("0.3"), 3)
    clock.sleep(ABANDONED_AFTER + 1)
    assert budget.reserved_usd == 0
    assert budget.spent_usd == budget.uncertain_usd == Decimal("0.7")
    budget.reserve(CENT, 1).settle(CENT, 1)  # which tidies up
    assert budget.spent_usd == Decimal("0.71")
    late.settle(CENT, 1)
    assert budget.spent_usd == Decimal("0.32")
    assert budget.uncertain_usd == Decimal("0.3")
    assert budget.spent_tokens == 5
    assert budget.spent_requests == 3
    dead.release()
    assert budget.spent_usd == 2 * CENT
    assert budget.uncertain_usd == 0


def test_a_store_that_cannot_be_used_refuses_and_says_so(tmp_path):
    path = tmp_path / "foreign.db"
    path.write_text("this is no database, whatever its name may say")
    budget = Budget(1, store=f"sqlite:///{path}")
    for ask in (lambda: budget.reserve(CENT, 1), budget.state):
        with pytest.raises(LLMBudgetError, match=r"nothing was sent: .*foreign.db") as caught:
            ask()
        assert isinstance(caught.value.__cause__, DatabaseError)
        assert "\n" not in str(caught.value)


class Unreachable:
    """A book that is away."""

    def reserve(self, name, period, amount, check):
        raise LLMConnectionError("the book is away")

    def settle(self, name, receipt, truth, uncertain):
        raise AssertionError

    def standing(self, name, period):
        raise LLMConnectionError("the book is away")


class Paper:
    """A book of one's own: all of it in one list."""

    def __init__(self):
        self.lines = []
        self.spent = Amount()

    def reserve(self, name, period, amount, check):
        check(self.standing(name, period))
        self.lines.append((name, amount))
        return Receipt(str(len(self.lines)), period, amount)

    def settle(self, name, receipt, truth, uncertain):
        self.lines.remove((name, receipt.amount))
        self.spent = self.spent.plus(truth)

    def standing(self, name, period):
        reserved = Amount()
        for _, amount in self.lines:
            reserved = reserved.plus(amount)
        return Standing(self.spent, reserved)


def test_a_budget_can_be_kept_in_a_book_of_ones_own():
    book = Paper()
    assert isinstance(book, Book)
    budget = Budget("0.10", store=book, name="mine")
    assert budget.store is book
    reservation = budget.reserve(Decimal("0.07"), 5)
    assert book.lines == [("mine", Amount(Decimal("0.07"), 5, 1))]
    with pytest.raises(LLMBudgetError, match=r"\$0\.03 left"):
        budget.reserve(Decimal("0.07"), 5)
    reservation.settle(Decimal("0.02"), 3)
    assert (budget.spent_usd, budget.reserved_usd) == (Decimal("0.02"), 0)


def test_an_error_of_a_book_goes_out_as_it_is():
    budget = Budget(1, store=Unreachable())
    for ask in (lambda: budget.reserve(CENT, 1), budget.state):
        with pytest.raises(LLMConnectionError, match="the book is away"):
            ask()


@pytest.mark.parametrize("store", [object(), 5, ["reserve", "settle", "standing"]])
def test_what_is_no_book_is_refused(store):
    with pytest.raises(LLMConfigError, match="reserve, settle and standing"):
        Budget(1, store=store)


def test_trouble_at_settling_keeps_the_truth_for_later(url, tmp_path, caplog, monkeypatch):
    budget = Budget(1, store=url, warn_at=None)
    first, second = budget.reserve(Decimal("0.4"), 1), budget.reserve(Decimal("0.4"), 1)
    run = budget.store._database.run

    def broken(*_, **__):
        raise DatabaseError("the usage store is full", "full")

    monkeypatch.setattr(budget.store._database, "run", broken)
    first.settle(CENT, 1)
    second.settle(CENT, 1)
    assert [r.levelno for r in caplog.records] == [logging.WARNING]
    assert "keeps the worst case" in caplog.text
    monkeypatch.setattr(budget.store._database, "run", run)
    assert budget.spent_usd == 2 * CENT
    assert budget.reserved_usd == 0


def test_a_stored_budget_can_be_sent_to_another_process_and_one_in_memory_cannot(url):
    budget = Budget(1, store=url, name="shared", tokens=5)
    copy = pickle.loads(pickle.dumps(budget))
    copy.reserve(CENT, 1).settle(CENT, 1)
    assert budget.spent_usd == CENT
    assert repr(copy) == repr(budget)
    with pytest.raises(TypeError, match="store='sqlite:///…'"):
        pickle.dumps(Budget(1))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_forked_children_share_a_stored_budget(url):
    budget = Budget(1, store=url, warn_at=None)
    budget.reserve(CENT, 1).settle(CENT, 1)
    context = multiprocessing.get_context("fork")

    def work():
        for _ in range(10):
            budget.reserve(CENT, 1).settle(CENT, 1)

    children = [context.Process(target=work) for _ in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0]
    assert budget.spent_usd == 21 * CENT


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_does_not_wait_for_its_parents_locks():
    budget = Budget(1)
    with budget._lock, budget._book._lock:
        child = os.fork()
        if child == 0:
            budget.reserve(CENT, 1).settle(Decimal(1), 1)
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert budget.spent_usd == 0


# The ledger


def usage(prompt=10, completion=5, **parts):
    return TokenUsage(prompt_tokens=prompt, completion_tokens=completion, **parts)


def test_the_ledger_adds_up_by_day_and_model(url):
    clock = FakeClock()
    spending = Spending(url, clock=clock)
    spending.record("openai", "a", usage(cached_tokens=4), Decimal("0.1"))
    spending.record("openai", "a", usage(), Decimal("1E-10"))
    spending.record("openai", "a", usage(), cached=True)
    spending.record("openai", "a", TokenUsage(prompt_tokens=1), complete=False)
    spending.record(None, None, None, budget="trial")
    clock.sleep(86400)
    spending.record("openai", "a", usage(), CENT)
    spending.close()
    rows = Spending(url).by_day_and_model()
    assert [row.day for row in rows] == ["1970-01-02", "1970-01-01", "1970-01-01"]
    assert rows[0].cost == CENT
    first = rows[1]
    assert (first.budget, first.provider, first.model) == ("", "openai", "a")
    assert (first.calls, first.cache_hits, first.unpriced, first.interrupted) == (4, 1, 1, 1)
    assert (first.prompt_tokens, first.completion_tokens, first.cached_tokens) == (21, 10, 4)
    assert (first.cost, first.known_cost) == (None, Decimal("0.1000000001"))
    assert rows[2][:5] == ("1970-01-01", "trial", "", "", 1)
    assert Spending(url).by_day_and_model("1970-01-02") == rows[:1]
    assert Spending(url).by_day_and_model(since=date(1970, 1, 2)) == rows[:1]


@pytest.mark.parametrize("facts", [{"cost": None}, {"complete": False}])
def test_a_cost_that_is_unknown_of_any_call_is_none_and_not_0(url, facts):
    spending = Spending(url)
    spending.record("p", "m", usage(), CENT)
    spending.record("p", "m", usage(), **{"cost": CENT, **facts})
    spending.record("p", "free", usage(), cached=True, complete=False)
    free, row = spending.by_day_and_model()
    assert row.cost is None
    assert row.known_cost == (CENT if "cost" in facts else 2 * CENT)
    assert (free.cost, free.known_cost, free.interrupted) == (0, 0, 0)


def test_the_first_day_is_said_as_on_the_command_line(url):
    clock = FakeClock()
    spending = Spending(url, clock=clock)
    for _ in range(3):
        spending.record("p", "m", usage(), CENT)
        clock.sleep(86400)
    spending.record("p", "m", usage(), CENT)  # on 1970-01-04

    def days(since):
        return [int(row.day[-2:]) for row in spending.by_day_and_model(since=since)]

    assert days("1d") == [4]
    assert days("3d") == days("1970-01-02") == days(date(1970, 1, 2)) == [4, 3, 2]
    assert days(datetime(1970, 1, 3, 23, tzinfo=timezone(timedelta(hours=-2)))) == [4]
    assert days(datetime(1970, 1, 3, 23)) == [4, 3]
    assert days(None) == [4, 3, 2, 1]
    for wrong in ("2026-1-1", "yesterday", "2026-02-30", "", "0d", "-1d", "7", "999999d", 7, "٣d"):
        with pytest.raises(
            LLMConfigError, match=r"^.+ is neither a day like 2026-11-01 nor days l"
        ):
            spending.by_day_and_model(since=wrong)


@pytest.mark.parametrize("name", ["spend.db", "spend.sqlite", "./spend.sqlite3", "~/spend.db"])
def test_a_store_may_be_named_by_its_path(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    Spending(name).record("p", "m", usage(), CENT)
    (file,) = tmp_path.glob("spend.*[be3]")
    assert Spending(f"sqlite:///{file}").by_day_and_model()[0].cost == CENT
    for wrong in ("spend", "postgres://host/spend.db"):
        with pytest.raises(LLMConfigError, match="not the URL of a SQLite file"):
            Spending(wrong)


def test_threads_and_objects_write_to_one_ledger(url):
    books = [Spending(url), Spending(url)]

    def work(number):
        for _ in range(20):
            books[number % 2].record("p", "m", usage(), CENT)

    in_threads(work, 16)
    for book in books:
        assert book.flush()
    (row,) = Spending(url).by_day_and_model()
    assert (row.calls, row.cost) == (320, 320 * CENT)


def test_a_record_never_raises_complains_once_and_is_written_later(tmp_path, caplog):
    clock = FakeClock()
    spending = Spending(f"sqlite:///{tmp_path}/later/spend.db", clock=clock)
    for _ in range(3):
        spending.record("p", "m", usage(), CENT)
        clock.sleep(RETRY_AFTER)
    assert len(caplog.messages) == 1
    assert "not written down yet" in caplog.text
    assert not spending.flush()
    (tmp_path / "later").mkdir()
    spending.record("p", "m", usage(), CENT)  # too early, after the failure above
    spending.record("p", "other", usage(), CENT)
    clock.sleep(RETRY_AFTER)
    spending.record("p", "m", usage(), CENT)
    with sqlite3.connect(tmp_path / "later" / "spend.db") as connection:
        rows = connection.execute("SELECT model, calls, usd FROM ledger ORDER BY model").fetchall()
    connection.close()
    assert rows == [("m", 5, "0.05"), ("other", 1, "0.01")]
    assert spending.flush()


def test_what_came_while_a_write_failed_is_kept_with_the_rest(url, monkeypatch):
    spending = Spending(url, clock=FakeClock())

    def broken(_work, **__):
        spending.record("p", "m", usage(), CENT)
        spending.record("p", "n", usage(), CENT)
        raise DatabaseError("the usage store is locked", "locked")

    with monkeypatch.context() as patch:
        patch.setattr(spending._database, "run", broken)
        spending.record("p", "m", usage(), CENT)
    assert {row.model: row.calls for row in spending.by_day_and_model()} == {"m": 2, "n": 1}


def test_a_ledger_that_cannot_be_read_says_so(tmp_path):
    path = tmp_path / "x.db"
    path.write_text("no database at all, but some text")
    with pytest.raises(DatabaseError, match=r"x\.db"):
        Spending(f"sqlite:///{path}").by_day_and_model()


def test_a_spending_can_be_sent_to_another_process(url):
    spending = Spending(url)
    spending.record("p", "m", usage(), CENT)
    copy = pickle.loads(pickle.dumps(spending))
    assert copy.by_day_and_model() == spending.by_day_and_model()
    assert repr(copy) == f"Spending({url!r})"


def test_to_write_down_a_call_takes_less_than_a_millisecond(url):
    """What the disk takes apart."""
    spending, tokens = Spending(url), usage()
    spending.record("p", "m", tokens, CENT)
    assert work_of(lambda: spending.record("p", "m", tokens, CENT), 20) < 50


def test_importing_loads_no_database():
    code = """
import sys
sys.modules.pop("sqlite3", None)  # a tool that measures coverage has loaded it
import LLM.policies.budget
assert "sqlite3" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_requests_of_a_batch_are_reserved_and_settled_together():
    budget = Budget(requests=5)
    reservation = budget.reserve(None, None, 4)
    assert budget.reserved_requests == 4
    with pytest.raises(
        LLMBudgetError, match=r"take 2 requests, and budget 'default' has 1 left of 5"
    ):
        budget.reserve(None, None, 2)
    reservation.settle(None, None)
    assert (budget.spent_requests, budget.remaining_requests) == (4, 1)
