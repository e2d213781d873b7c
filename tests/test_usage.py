"""Totals of a client: exact, honest about what is unknown, and cheap to keep."""

import os
import subprocess
import sys
import threading
from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from LLM.policies.usage import PENDING, ModelUsage, UsageTotals
from LLM.prices import Price, Pricing
from LLM.types import TokenUsage
from tests.fakes import FakeClock, needs_price_data, work_of


def totals(**prices):
    """One dollar for a prompt token, ten for one of the completion."""
    return UsageTotals(Pricing(prices or Price(1_000_000, 10_000_000)), clock=FakeClock())


def usage(prompt=3, completion=2, **parts):
    return TokenUsage(prompt_tokens=prompt, completion_tokens=completion, **parts)


def test_nothing_was_used_at_first():
    used = totals()
    assert (used.calls, used.cached, used.interrupted, used.unpriced) == (0, 0, 0, 0)
    assert used.cost == used.known_cost == 0
    assert used.total.prompt_tokens == used.known.total_tokens == 0
    assert used.by_model == {}
    assert str(used) == "no calls"


def test_calls_add_up_by_model():
    used = totals()
    used.record("openai", "a", usage())
    used.record("openai", "a", usage(5, 1, cached_tokens=4))
    used.record("anthropic", "b", usage(1, 1))
    used.record(None, None, usage(1, 0))
    assert set(used.by_model) == {"anthropic/b", "unknown/unknown", "openai/a"}
    a = used.by_model["openai/a"]
    assert (a.calls, a.total.prompt_tokens, a.total.completion_tokens, a.total.total_tokens) == (
        2,
        8,
        3,
        11,
    )
    assert a.cost == 38
    assert used.calls == 4
    assert used.cost == used.known_cost == 38 + 11 + 1
    assert used.total.total_tokens == 14


def test_what_one_call_does_not_know_is_unknown_of_the_sum_and_the_rest_is_kept():
    used = totals()
    used.record("p", "m", usage(cached_tokens=1))
    used.record("p", "m", usage())
    used.record("p", "m", None)
    assert used.total.prompt_tokens is used.total.cached_tokens is used.cost is None
    assert used.known.prompt_tokens == 6
    assert used.known.cached_tokens == 1
    assert used.known_cost == 46
    assert used.unpriced == 1


def test_an_interrupted_call_counts_what_is_known_and_makes_the_sum_unknown():
    used = totals()
    used.record("p", "m", TokenUsage(prompt_tokens=3), complete=False)
    used.record("p", "m", usage(1, 1), complete=False)
    used.record("p", "m", None, complete=False)
    assert used.interrupted == 3
    assert used.known_cost == 3 + 11
    assert used.cost is None
    assert used.unpriced == 1
    assert used.known.prompt_tokens == 4
    assert used.known.total_tokens == 3 + 2
    assert used.total.prompt_tokens is None


def test_a_call_from_the_cache_is_free_and_has_no_tokens():
    used = totals()
    used.record("p", "m", usage(), cached=True)
    assert (used.calls, used.cached, used.unpriced) == (1, 1, 0)
    assert used.cost == 0
    assert used.total.total_tokens == 0


def test_a_model_without_a_price_is_unpriced():
    used = totals(known=Price(1_000_000, 0))
    used.record("ollama", "known", usage())
    used.record("ollama", "other", usage())
    assert used.unpriced == 1
    assert used.known_cost == 3
    assert used.cost is None
    assert used.by_model["ollama/known"].cost == 3


def test_the_cost_may_be_handed_over_or_asked_for_later():
    used, asked = totals(), []

    def later(tokens):
        asked.append(tokens)
        return Decimal(7)

    used.record("p", "m", usage(), cost=Decimal("0.5"))
    used.record("p", "m", usage(), cost=later)
    used.record("p", "m", None, cost=later)
    used.record("p", "m", usage(), cost=None)
    assert asked == []
    assert used.known_cost == Decimal("7.5")
    assert used.unpriced == 2
    assert len(asked) == 1


@needs_price_data
def test_prices_are_those_of_the_day_of_the_call():
    clock = FakeClock()
    clock.time = 1786924799.0  # the second before 2026-08-17, when a price began
    used = UsageTotals(clock=clock)
    used.record("deepseek", "deepseek-v4-pro", usage(1_000_000, 0))
    clock.sleep(86400 - 3600 * 2)
    used.record("deepseek", "deepseek-v4-pro", usage(1_000_000, 0))
    assert used.cost == Decimal("0.435") + Decimal("0.66")


def test_reset_begins_anew():
    used = totals()
    used.record("p", "m", usage())
    assert used.calls == 1
    used.record("p", "m", usage())
    used.reset()
    assert used.calls == 0
    assert used.cost == 0


def test_the_text_is_a_table_that_says_what_is_missing():
    used = totals(a=Price(100_000, 0))
    used.record("openai", "a", usage(1234, 5))
    assert str(used).splitlines() == [
        "model     calls  prompt  completion     cost",
        "openai/a      1   1,234           5  $123.40",
    ]
    used.record("openai", "a", None, complete=False)
    used.record("ollama", "b", None)
    used.record("ollama", "b", None, cached=True)
    lines = str(used).splitlines()
    assert lines[2].split() == ["openai/a", "2", "1,234+", "5+", "$123.40+"]
    assert lines[1].split() == ["ollama/b", "2", "unknown", "unknown", "unknown"]
    assert lines[3].split() == ["all", "4", "1,234+", "5+", "$123.40+"]
    assert lines[4:] == [
        "1 call from the cache",
        "1 call interrupted",
        "2 calls without a known cost",
    ]
    assert len({len(line) for line in lines[:4]}) == 1
    assert repr(used) == "<UsageTotals: 4 calls, $123.40+>"


def test_threads_lose_nothing():
    used = totals()

    def work():
        for _ in range(1000):
            used.record("p", "m", usage())
            if used._pending and len(used._pending) % 97 == 0:
                assert used.calls > 0

    threads = [threading.Thread(target=work) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert used.calls == 16_000
    assert used.total.prompt_tokens == 48_000
    assert used.cost == 16_000 * 23


def test_what_waits_to_be_priced_is_bounded():
    used = totals()
    for _ in range(PENDING * 2 + 5):
        used.record("p", "m", usage())
    assert len(used._pending) <= PENDING
    assert used.calls == PENDING * 2 + 5


@settings(deadline=None)  # whichever comes first loads the prices
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["a", "b"]),
            st.none() | st.builds(usage, st.integers(0, 99), st.integers(0, 99)),
            st.booleans(),
            st.booleans(),
        ),
        max_size=30,
    )
)
def test_the_whole_is_the_sum_of_the_models(calls):
    used = totals(a=Price(1, 2))
    for model, tokens, complete, cached in calls:
        used.record("p", model, tokens, complete=complete, cached=cached)
    parts = used.by_model.values()
    assert used.calls == len(calls) == sum(part.calls for part in parts)
    assert used.known_cost == sum(part.known_cost for part in parts)
    assert used.snapshot() == sum(parts, ModelUsage())
    priced = [tokens for model, tokens, complete, cached in calls if not cached]
    assert used.known.prompt_tokens == sum(t.prompt_tokens for t in priced if t)
    assert (used.total.prompt_tokens is None) == any(
        tokens is None or not complete for _, tokens, complete, cached in calls if not cached
    )


@needs_price_data
def test_the_first_call_loads_no_prices():
    code = """
import sys
sys.modules.pop("sqlite3", None)  # a tool that measures coverage has loaded it
from LLM.policies.usage import UsageTotals
from LLM.types import TokenUsage
used = UsageTotals()
used.record("openai", "gpt-4o", TokenUsage(prompt_tokens=1, completion_tokens=1))
assert "genai_prices" not in sys.modules and "sqlite3" not in sys.modules
assert used.cost > 0
assert "genai_prices" in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_can_count_although_a_thread_held_the_lock():
    used = totals()
    with used._lock:
        child = os.fork()
        if child == 0:
            used.record("p", "m", usage())
            os._exit(0 if used.calls == 1 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_to_count_a_call_costs_microseconds():
    """Below 3 µs on a quiet machine; with room for a busy one."""
    used, tokens = totals(), usage()
    assert work_of(lambda: used.record("p", "m", tokens), 500) < 3
