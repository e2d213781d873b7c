"""What a client does with its policies: paced, budgeted, remembered, priced, and another model asked."""

import contextvars
import gc
import itertools
import json
import logging
import os
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal

import pytest

from LLM import (
    LLM,
    Budget,
    LLMBudgetError,
    LLMConfig,
    LLMConfigError,
    LLMConnectionError,
    LLMInvalidRequestError,
    LLMRateLimitError,
    LLMServerError,
    LLMStreamError,
    LLMTimeoutError,
    Price,
    RateLimiter,
    ResponseCache,
)
from LLM.policies.spending import Amount
from LLM.telemetry import AttemptFailed, CallFinished, CallStarted, Waited
from LLM.testing import LocalServer
from tests.fakes import (
    AT_ONCE,
    FakeClock,
    chunk,
    hang_up,
    http,
    patiently,
    raw_server,
    stream_head,
    until,
)

MESSAGES = [{"role": "user", "content": "Hello there!"}]
PRICE = Price(input=1, output=2)  # dollars per million tokens
USAGE = {"prompt_tokens": 1000, "completion_tokens": 500}
COST = Decimal("0.002")  # of USAGE at PRICE


@pytest.fixture
def llm(server):
    with LLM(base_url=server.url, max_retries=0, price=PRICE) as client:
        yield client


def ask(llm, text="Hello there!", **options):
    return llm.chat_completion([{"role": "user", "content": text}], **options)


def cut_after(events):
    """What a server says that dies in the middle of a stream."""

    def answer(connection, _):
        connection.sendall(stream_head("connection: close") + events)
        hang_up(connection)

    return answer


# Usage and cost


def test_an_answer_says_what_it_cost(server, llm):
    server.reply("Hi!", usage=USAGE)
    assert ask(llm).cost == COST


def test_a_cost_that_nobody_knows_is_none_and_not_zero(server):
    with LLM(base_url=server.url) as llm:
        assert ask(llm).cost is None


def test_a_stream_says_what_it_cost(server, llm):
    server.reply("Hi!", usage=USAGE)
    stream = llm.stream(MESSAGES)
    assert stream.response.cost == COST
    assert stream.cost == COST


def test_the_plain_value_of_generate_has_the_cost(server, llm):
    server.reply("Hi!", usage=USAGE)
    assert llm.generate("Hello!").cost == COST


def test_a_cost_survives_a_pickle(server, llm):
    server.reply("Hi!", usage=USAGE)
    assert pickle.loads(pickle.dumps(ask(llm))).cost == COST


def test_a_client_adds_up_what_its_calls_took(server, llm):
    for _ in range(3):
        server.reply("Hi!", usage=USAGE)
        ask(llm)
    llm.list_models()
    assert llm.usage.calls == 3
    assert llm.usage.total.total_tokens == 4500
    assert llm.usage.cost == 3 * COST


def test_totals_are_exact_under_threads(server, llm):
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda _: ask(llm), range(100)))
    assert llm.usage.calls == 100
    assert llm.usage.total.total_tokens == sum(answer.usage.total_tokens for answer in answers)


def test_an_interrupted_stream_is_counted_and_named(server, llm):
    server.token_delay = 0.2
    with llm.stream(MESSAGES) as stream:
        next(stream)
    assert llm.usage.calls == 1
    assert llm.usage.interrupted == 1


def test_clients_made_of_one_share_its_totals(server, llm):
    ask(llm.with_options(temperature=0))
    assert llm.usage.calls == 1


# Budgets


def test_a_call_that_might_not_fit_is_refused_before_it_is_sent(server, llm):
    with llm.budget(usd="0.001"), pytest.raises(LLMBudgetError, match=r"0\.001") as caught:
        ask(llm, max_tokens=100_000)
    assert server.requests == []
    assert caught.value.attempts == 0


def test_what_was_spent_is_the_truth_and_not_the_worst_case(server, llm):
    with llm.budget(usd=1) as budget:
        server.reply("Hi!", usage=USAGE)
        ask(llm, max_tokens=10_000)
        assert budget.spent_usd == COST
        assert budget.spent_tokens == 1500
        assert budget.spent_requests == 1


def test_without_max_tokens_the_worst_case_is_unknown_and_refused(server, llm):
    with llm.budget(usd=1), pytest.raises(LLMBudgetError, match="give max_tokens"):
        ask(llm)
    assert server.requests == []


def test_a_budget_of_requests_alone_needs_no_price_and_no_max_tokens(server):
    with LLM(base_url=server.url) as llm, llm.budget(requests=2):
        ask(llm)
        ask(llm)
        with pytest.raises(LLMBudgetError):
            ask(llm)
    assert len(server.requests) == 2


def test_an_unknown_price_is_refused_unless_told_otherwise(server):
    with LLM(base_url=server.url) as llm:
        with llm.budget(usd=1), pytest.raises(LLMBudgetError, match="price"):
            ask(llm, max_tokens=10)
        with llm.budget(usd=1, unknown="allow"):
            ask(llm, max_tokens=10)


def test_32_threads_cannot_overspend_by_a_cent(server, llm):
    def spend(_):
        try:
            ask(llm, max_tokens=500)
        except LLMBudgetError:
            return 0
        return 1

    server.reply(lambda _: {"text": "Hi!", "usage": {"prompt_tokens": 5, "completion_tokens": 500}})
    with llm.budget(usd="0.01") as budget, ThreadPoolExecutor(32) as pool:
        answered = sum(pool.map(spend, range(64)))
    assert 0 < answered < 64
    assert budget.spent_usd <= Decimal("0.01")
    assert budget.spent_usd == llm.usage.cost


def test_nested_budgets_must_all_have_room(server, llm):
    with llm.budget(requests=5) as outer:
        with llm.budget(requests=1):
            ask(llm)
            with pytest.raises(LLMBudgetError):
                ask(llm)
        ask(llm)
    assert outer.spent_requests == 2
    ask(llm)  # outside of both


def test_a_budget_holds_for_every_client_inside(server, llm):
    with LLM(base_url=server.url) as other, llm.budget(requests=1):
        ask(other)
        with pytest.raises(LLMBudgetError):
            ask(llm)


def test_two_threads_with_budgets_of_their_own_do_not_pay_for_each_other(server, llm):
    both = threading.Barrier(2, timeout=30)

    def alone(_):
        with llm.budget(requests=2) as budget:
            both.wait()
            ask(llm)
            both.wait()
            return budget.spent_requests

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(alone, range(2))) == [1, 1]


def test_a_thread_that_was_there_before_pays_for_nobody(server, llm):
    with ThreadPoolExecutor(1) as pool:
        pool.submit(int).result()  # the thread of a service
        with llm.budget(requests=1) as budget:
            pool.submit(ask, llm).result()
            assert budget.spent_requests == 0
            with ThreadPoolExecutor(1) as inside:
                inside.submit(ask, llm).result()
                with pytest.raises(LLMBudgetError):
                    inside.submit(ask, llm).result()


def test_a_block_for_this_thread_alone_holds_no_thread_that_is_started_meanwhile(server, llm):
    with llm.budget(requests=1, threads=False) as budget, ThreadPoolExecutor(1) as other:
        for _ in range(3):
            other.submit(ask, llm).result()
        assert budget.spent_requests == 0
        ask(llm)
        with pytest.raises(LLMBudgetError):
            ask(llm)
        inside = contextvars.copy_context()
        with pytest.raises(LLMBudgetError):
            other.submit(inside.run, ask, llm).result()


def test_answers_in_threads_of_their_own_pay_each_for_itself(server, llm):
    """As a service has them: one client, a thread for each answer, begun while others are under way."""

    def answer(left):
        with llm.budget(requests=1, threads=False) as budget:
            below = ThreadPoolExecutor(1).submit(answer, left - 1) if left else None
            ask(llm)
            spent = budget.spent_requests
            return [spent] if below is None else [spent, *below.result()]

    assert answer(5) == [1] * 6


def test_the_context_takes_a_budget_into_any_thread(server, llm):
    with ThreadPoolExecutor(1) as pool:
        pool.submit(int).result()
        with llm.budget(requests=1) as budget:
            pool.submit(contextvars.copy_context().run, ask, llm).result()
            assert budget.spent_requests == 1


def test_a_budget_that_is_there_already_can_be_opened_again(server, llm):
    budget = Budget(requests=2)
    for _ in range(2):
        with llm.budget(budget) as opened:
            assert opened is budget
            ask(llm)
    with llm.budget(budget), pytest.raises(LLMBudgetError):
        ask(llm)
    with pytest.raises(LLMConfigError, match="no further limits"), llm.budget(budget, tokens=5):
        pass


def test_a_clients_own_budget_holds_for_all_its_calls(server):
    with LLM(base_url=server.url, budget=Budget(requests=1)) as llm:
        ask(llm)
        with pytest.raises(LLMBudgetError):
            ask(llm)


def test_a_budget_in_the_config_is_in_dollars(server):
    with LLM(LLMConfig(base_url=server.url, budget=0.001), price=PRICE) as llm:
        with pytest.raises(LLMBudgetError):
            ask(llm, max_tokens=100_000)
        ask(llm, max_tokens=10)


def test_each_attempt_counts_as_a_request(server):
    with LLM(base_url=server.url, clock=FakeClock()) as llm, llm.budget(requests=3) as budget:
        server.reply(status=503)
        ask(llm)
        assert budget.spent_requests == 2


def test_a_refusal_between_attempts_keeps_the_history(server):
    with LLM(base_url=server.url, clock=FakeClock()) as llm, llm.budget(requests=1):
        server.reply(status=503)
        with pytest.raises(LLMBudgetError) as caught:
            ask(llm)
    assert [attempt.status for attempt in caught.value.history] == [503]


def test_an_error_that_the_server_answered_is_free(server, llm):
    with llm.budget(usd=1) as budget:
        server.reply(status=400)
        with pytest.raises(LLMInvalidRequestError):
            ask(llm, max_tokens=100)
        assert (budget.spent_usd, budget.reserved_usd) == (0, 0)


def test_a_server_that_is_not_there_is_free():
    with LLM(base_url="http://127.0.0.1:9", max_retries=0, price=PRICE) as llm:
        with llm.budget(usd=1) as budget, pytest.raises(LLMConnectionError):
            ask(llm, max_tokens=100)
        assert budget.spent_usd == 0


def test_an_answer_that_never_came_counts_at_its_worst(server, llm):
    def show(seconds):
        server.reply("too late", delay=60)
        with llm.budget(usd=1) as budget:
            with pytest.raises(LLMTimeoutError):
                ask(llm, max_tokens=100, timeout=seconds)
            assert budget.spent_usd > 0
            assert budget.uncertain_usd == budget.spent_usd

    patiently(show, 0.2, 5)


def test_a_stream_settles_when_it_ends(server, llm):
    server.reply("Hi there, you", usage=USAGE)
    server.token_delay = 0.1
    with llm.budget(usd=1) as budget:
        stream = llm.stream(MESSAGES, max_tokens=10_000)
        assert budget.reserved_usd > COST
        for _ in stream:
            pass
        assert (budget.spent_usd, budget.reserved_usd) == (COST, 0)


def test_an_abandoned_stream_is_settled_when_nobody_holds_it(server, llm):
    server.token_delay = 0.2
    with llm.budget(usd=1) as budget:
        stream = llm.stream(MESSAGES, max_tokens=100)
        next(stream)
        del stream
        gc.collect()
        until(lambda: budget.reserved_usd == 0)
        assert budget.uncertain_usd > 0


def test_what_cannot_be_counted_is_refused_under_a_budget(server, llm):
    audio = {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}
    messages = [{"role": "user", "content": [audio]}]
    with llm.budget(usd=1), pytest.raises(LLMBudgetError, match=r"messages\[0\]: input_audio"):
        llm.chat_completion(messages, max_tokens=10)
    with llm.budget(usd=1, unknown="allow"):
        llm.chat_completion(messages, max_tokens=10)


def test_a_close_call_is_counted_exactly(server, monkeypatch):
    """The estimate is on the safe side; where it would not fit, the vocabulary is asked."""
    from LLM import count_tokens

    text = "The quick brown fox jumps over the lazy dog. " * 50
    exact = count_tokens([{"role": "user", "content": text}], "gpt-4")
    assert exact.exact
    with LLM(base_url=server.url, model="gpt-4") as llm:
        with llm.budget(tokens=exact + 10):
            ask(llm, text, max_tokens=10)
        with llm.budget(tokens=exact + 9), pytest.raises(LLMBudgetError):
            ask(llm, text, max_tokens=10)


def test_several_answers_are_reserved_for(server, llm):
    with llm.budget(usd="0.001"), pytest.raises(LLMBudgetError):
        ask(llm, max_tokens=100, n=8)


@pytest.mark.parametrize("limit", [{"eur": 5}, {"usd": "5 EUR"}, {"usd": 0}, {"tokens": -1}, {}])
def test_a_budget_that_cannot_be_kept_is_refused(llm, limit):
    with pytest.raises(LLMConfigError), llm.budget(**limit):
        pass


# Rate limits


def test_calls_are_paced(server):
    clock = FakeClock()
    limiter = RateLimiter(2, None, clock=clock)
    with LLM(base_url=server.url, rate_limiter=limiter, clock=clock) as llm:
        for _ in range(3):
            ask(llm)
    assert sum(clock.slept) == pytest.approx(60, abs=1)


def test_a_limit_in_the_config_paces_each_address(server):
    clock = FakeClock()
    with LocalServer() as elsewhere:
        config = LLMConfig(base_url=server.url, requests_per_minute=1)
        with LLM(config, clock=clock, fallbacks=[LLMConfig(base_url=elsewhere.url)]) as llm:
            ask(llm)
            server.reply(status=400)  # no reason to fall back, and no wait for the other
            other = llm.with_options(base_url=elsewhere.url)
            ask(other)
            assert clock.slept == []
            ask(other)
            assert sum(clock.slept) == pytest.approx(60, abs=1)


def test_every_attempt_takes_a_permit(server):
    clock = FakeClock()
    limiter = RateLimiter(10, None, clock=clock)
    with LLM(base_url=server.url, rate_limiter=limiter, clock=clock) as llm:
        server.reply(status=503)
        ask(llm)
    assert limiter.state().requests == 2


def test_a_permit_is_corrected_to_the_real_usage(server):
    limiter = RateLimiter(None, 10_000)
    with LLM(base_url=server.url, rate_limiter=limiter) as llm:
        server.reply("Hi!", usage=USAGE)
        ask(llm, max_tokens=5000)
    assert limiter.state().tokens == 1500


def test_an_estimate_above_the_whole_limit_is_an_error(server):
    with LLM(base_url=server.url, rate_limiter=RateLimiter(None, 100)) as llm:
        with pytest.raises(LLMConfigError, match="100"):
            ask(llm, max_tokens=1000)
    assert server.requests == []


def test_a_wait_past_the_deadline_is_not_slept(server):
    clock = FakeClock()
    with LLM(
        base_url=server.url, rate_limiter=RateLimiter(1, None, clock=clock), clock=clock
    ) as llm:
        ask(llm)
        with pytest.raises(LLMTimeoutError) as caught:
            ask(llm, deadline=5)
    assert caught.value.clock == "deadline"
    assert clock.slept == []
    assert len(server.requests) == 1


def test_a_429_holds_back_all_that_share_the_limit(server):
    clock = FakeClock()
    limiter = RateLimiter(None, None, clock=clock)
    with LLM(base_url=server.url, rate_limiter=limiter, clock=clock, max_retries=0) as llm:
        server.reply(status=429, headers={"retry-after": "7"})
        with pytest.raises(LLMRateLimitError):
            ask(llm)
        ask(llm)
    assert sum(clock.slept) == pytest.approx(7, abs=0.2)


def test_what_the_server_says_of_its_limits_is_kept(server):
    clock = FakeClock()
    limiter = RateLimiter(None, None, clock=clock)
    headers = {"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "6m0s"}
    with LLM(base_url=server.url, rate_limiter=limiter, clock=clock) as llm:
        server.reply("Hi!", headers=headers)
        ask(llm)
        ask(llm)
    assert sum(clock.slept) == pytest.approx(360, abs=1)


def test_a_wait_is_logged_and_told(server, caplog):
    clock, events = FakeClock(), []
    limiter = RateLimiter(1, None, clock=clock)
    caplog.set_level(logging.INFO, "LLM")
    with LLM(base_url=server.url, rate_limiter=limiter, clock=clock, hooks=events.append) as llm:
        ask(llm)
        ask(llm)
    assert [e.reason for e in events if isinstance(e, Waited)] == ["rate_limit"]
    assert "waited 60.0 s for the rate limit" in caplog.text


def test_a_limiter_for_each_provider(server):
    limiters = {"openai-compatible": RateLimiter(None, 50), "openai": RateLimiter(1)}
    with LLM(base_url=server.url, rate_limiter=limiters) as llm:
        with pytest.raises(LLMConfigError):
            ask(llm, max_tokens=100)
        ask(llm.with_options(rate_limiter={"openai": RateLimiter(1)}), max_tokens=100)


# The cache


def test_a_hit_is_marked_free_and_sends_nothing(server):
    with LLM(base_url=server.url, cache=":memory:", price=PRICE) as llm:
        first, second = ask(llm), ask(llm)
    assert len(server.requests) == 1
    assert second.text == first.text
    assert second.usage == first.usage
    assert (first.cached, second.cached) == (False, True)
    assert second.cost == 0
    assert second.attempts == 0
    assert second.model_dump() == first.model_dump()
    assert llm.usage.cached == 1


def test_a_stream_is_replayed_as_a_stream(server):
    server.reply("Hi there", reasoning="They greet.", usage=USAGE)
    with LLM(base_url=server.url, cache=":memory:") as llm:
        first = list(llm.stream(MESSAGES))
        again = llm.stream(MESSAGES)
        events = list(again)
    assert again.cached
    assert "".join(e.text_delta for e in events if e.text_delta) == "Hi there"
    assert [e.reasoning_delta for e in events if e.reasoning_delta] == ["They greet."]
    assert events[-1] == first[-1]
    assert len(server.requests) == 1


def test_tool_calls_are_replayed(server):
    server.reply(tool_calls=[{"name": "add", "arguments": {"a": 1}}])
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
    with LLM(base_url=server.url, cache=":memory:") as llm:
        whole = ask(llm, tools=tools)
        events = list(llm.stream([{"role": "user", "content": "Hello there!"}], tools=tools))
    assert [e.tool_call for e in events if e.tool_call] == whole.tool_calls


def test_a_stream_and_a_whole_answer_serve_each_other(server):
    with LLM(base_url=server.url, cache=":memory:") as llm:
        text = llm.stream(MESSAGES).response.text
        assert llm.chat_completion(MESSAGES).cached
        assert llm.chat_completion(MESSAGES).text == text
        llm.completion("Once upon")
        assert llm.completion("Once upon", stream=True).cached


def test_a_cut_stream_and_an_error_are_not_kept(server):
    with raw_server(cut_after(chunk("Hal"))) as raw:
        with LLM(base_url=raw.url, cache=":memory:", max_retries=0) as llm:
            for _ in range(2):
                with pytest.raises(LLMStreamError):
                    _ = llm.stream(MESSAGES).response
        assert len(raw.requests) == 2
    with LLM(base_url=server.url, cache=":memory:", max_retries=0) as llm:
        server.reply(status=500)
        with pytest.raises(LLMServerError):
            ask(llm)
        assert not ask(llm).cached


@pytest.mark.parametrize(
    "modes, sent",
    [
        (["on", "off"], 2),
        (["read", "on"], 2),
        (["on", "refresh", "on"], 2),
        (["refresh", "read"], 1),
    ],
)
def test_what_a_call_does_with_the_cache(server, modes, sent):
    with LLM(base_url=server.url, cache=":memory:") as llm:
        for mode in modes:
            ask(llm, cache=mode)
    assert len(server.requests) == sent


def test_an_unknown_mode_is_refused(llm):
    with pytest.raises(LLMConfigError, match="refresh"):
        ask(llm, cache="yes")


def test_another_parameter_is_another_answer(server):
    with LLM(base_url=server.url, cache=":memory:") as llm:
        ask(llm, seed=1)
        ask(llm, seed=2)
        ask(llm, temperature=0)
        ask(llm, extra_headers={"X-Trace": "1"}, seed=1)
    assert len(server.requests) == 3


def test_one_flight_for_each_key(server):
    server.latency = 0.2
    with LLM(base_url=server.url, cache=":memory:") as llm, ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: ask(llm), range(8)))
    assert len(server.requests) == 1
    assert sum(answer.cached for answer in answers) == 7


def test_who_waits_goes_on_when_the_first_one_fails(server):
    server.reply(status=400, delay=0.3)
    with LLM(base_url=server.url, cache=":memory:", max_retries=0) as llm:
        with ThreadPoolExecutor(2) as pool:
            replies = list(pool.map(lambda _: llm.generate("Hello there!"), range(2)))
    assert sorted(reply.success for reply in replies) == [False, True]


def test_the_same_thread_never_waits_for_its_own_stream(server):
    with LLM(base_url=server.url, cache=":memory:") as llm:
        held = llm.stream(MESSAGES)
        started = time.monotonic()
        assert llm.stream(MESSAGES).response.text
        assert time.monotonic() - started < AT_ONCE
        held.close()


def test_the_cache_lasts_over_runs(server, tmp_path):
    url = f"sqlite:///{tmp_path}/cache.db"
    for _ in range(2):
        with LLM(LLMConfig(base_url=server.url, cache=url)) as llm:
            answer = ask(llm)
    assert answer.cached
    assert len(server.requests) == 1


def test_a_foreign_file_spoils_no_call(server, tmp_path, caplog):
    path = tmp_path / "notes.txt"
    path.write_text("not a database, but dear to somebody\n" * 100)
    with LLM(base_url=server.url, cache=f"sqlite:///{path}") as llm:
        assert ask(llm).text
        assert ask(llm).text
    assert path.read_text().startswith("not a database, but dear")
    assert caplog.text.count("notes.txt") == 1


def test_a_hit_costs_no_budget_and_no_permit(server):
    limiter = RateLimiter(10)
    with LLM(base_url=server.url, cache=":memory:", rate_limiter=limiter) as llm:
        ask(llm)
        with llm.budget(requests=1) as budget:
            ask(llm)
    assert (budget.spent_requests, limiter.state().requests) == (0, 1)


# Fallbacks


@pytest.fixture
def elsewhere():
    with LocalServer() as running:
        yield running


def test_another_server_answers_and_says_why(server, elsewhere):
    server.reply(status=503)
    spare = LLMConfig(base_url=elsewhere.url, model="spare")
    with LLM(base_url=server.url, model="main", fallbacks=[spare], max_retries=0) as llm:
        answer = ask(llm)
    ((model, reason),) = answer.fallbacks
    assert "main" in model
    assert "503" in reason or "Unavailable" in reason
    assert elsewhere.requests[0].json["model"] == "spare"


def test_another_model_of_the_same_server(server):
    server.reply(status=404)
    with LLM(base_url=server.url, model="big", fallbacks=["small"], max_retries=0) as llm:
        assert ask(llm).info.model == "small"
    assert [r.json["model"] for r in server.requests] == ["big", "small"]


def test_a_prefix_chooses_the_host(server, elsewhere, monkeypatch):
    monkeypatch.setenv("ANTHROPIC_BASE_URL", elsewhere.url)
    monkeypatch.setenv("ANTHROPIC_API_KEY", "sk-ant-test")
    server.reply(status=500)
    config = LLMConfig(
        base_url=server.url, max_retries=0, fallbacks=["anthropic/claude-sonnet-4-5"]
    )
    with LLM(config) as llm:
        answer = ask(llm)
    assert answer.provider == "anthropic"
    assert elsewhere.requests[0].path == "/v1/messages"


def test_a_request_that_is_wrong_is_wrong_everywhere(server):
    server.reply(status=400)
    with (
        LLM(base_url=server.url, fallbacks=["small"]) as llm,
        pytest.raises(LLMInvalidRequestError),
    ):
        ask(llm)
    assert len(server.requests) == 1


def test_the_attempts_of_all_models_are_counted(server, elsewhere):
    events = []
    spare = LLMConfig(base_url=elsewhere.url, model="spare")
    options = {"fallbacks": [spare], "max_retries": 1, "clock": FakeClock(), "hooks": events.append}
    with LLM(base_url=server.url, **options) as llm:
        server.reply(status=503)
        server.reply(status=503)
        answer = ask(llm)
    assert [attempt.status for attempt in answer.history] == [503, 503, 200]
    assert events[-1].base_url.startswith(elsewhere.url)
    assert [model for model, _ in events[-1].fallbacks] == ["openai-compatible/gpt-4"]


def test_when_all_fail_the_error_says_what_was_tried(server):
    with LLM(base_url=server.url, model="a", fallbacks=["b"], max_retries=0) as llm:
        server.reply(status=503)
        server.reply(status=500)
        with pytest.raises(LLMServerError) as caught:
            ask(llm)
    assert len(caught.value.fallbacks) >= 1
    assert len(server.requests) == 2


def test_a_host_that_failed_is_left_alone_for_a_while(server, elsewhere):
    clock = FakeClock()
    spare = LLMConfig(base_url=elsewhere.url)
    with LLM(base_url=server.url, fallbacks=[spare], max_retries=0, clock=clock) as llm:
        server.reply(status=503)
        ask(llm)
        ask(llm)
        assert (len(server.requests), len(elsewhere.requests)) == (1, 2)
        clock.time += 3600
        ask(llm)
        assert len(server.requests) == 2


def test_never_after_text_was_handed_over(server, elsewhere):
    spare = LLMConfig(base_url=elsewhere.url)
    with (
        raw_server(cut_after(chunk("Hal"))) as raw,
        LLM(base_url=raw.url, fallbacks=[spare]) as llm,
    ):
        with pytest.raises(LLMStreamError):
            list(llm.stream(MESSAGES))
    assert elsewhere.requests == []


# Telemetry


def test_hooks_see_each_step_of_a_call(server):
    events = []
    with LLM(base_url=server.url, hooks=[events.append], clock=FakeClock(), price=PRICE) as llm:
        server.reply(status=503)
        server.reply("Hi!", usage=USAGE)
        ask(llm)
    assert [type(event) for event in events] == [CallStarted, AttemptFailed, CallFinished]
    assert len({event.call_id for event in events}) == 1
    assert events[-1].attempts == 2
    assert events[-1].cost_usd == COST
    assert events[-1].usage.total_tokens == 1500


def test_a_failing_hook_breaks_no_call(server, caplog):
    def broken(event):
        raise RuntimeError("out of order")

    with LLM(base_url=server.url, hooks=broken) as llm:
        assert ask(llm).text
    assert "out of order" in caplog.text


def test_a_failed_call_is_told_too(server):
    events = []
    with LLM(base_url=server.url, hooks=events.append, max_retries=0) as llm:
        server.reply(status=400)
        with pytest.raises(LLMInvalidRequestError):
            ask(llm)
    assert isinstance(events[-1].error, LLMInvalidRequestError)


def test_a_request_can_be_shown_as_a_command(server):
    with LLM(base_url=server.url, api_key="sk-very-secret-key") as llm:
        command = ask(llm).as_curl()
        stream = llm.stream(MESSAGES)
        shown = [command, stream.as_curl(), stream.response.as_curl()]
    for line in shown:
        assert line.startswith("curl")
        assert "Hello there!" in line
        assert "$LLM_API_KEY" in line
        assert "sk-very-secret-key" not in line


def test_an_answer_from_the_cache_has_no_request_to_show(server):
    with LLM(base_url=server.url, cache=":memory:") as llm:
        ask(llm)
        with pytest.raises(LLMConfigError, match="no request"):
            ask(llm).as_curl()


# Long answers


def long_answers(server, **options):
    return LLM(base_url=server.url, provider="anthropic", model="claude-sonnet-4-5", **options)


def test_a_long_answer_is_streamed_underneath_and_comes_whole(server):
    server.reply("Hi!", usage=USAGE)
    with long_answers(server, price=PRICE) as llm:
        answer = ask(llm, max_tokens=64_000)
    assert server.requests[0].json["stream"] is True
    assert answer.text == "Hi!"
    assert answer.cost == COST
    assert answer.attempts == 1
    assert "stream" in json.loads(answer.info.request.body)


def test_a_short_answer_is_not(server):
    with long_answers(server) as llm:
        ask(llm, max_tokens=1000)
    assert "stream" not in server.requests[0].json


def test_a_long_answer_that_is_cut_is_tried_again(server):
    message = {"id": "1", "model": "m", "content": [], "usage": {"input_tokens": 1}}
    start = json.dumps({"type": "message_start", "message": message}).encode()
    delta = {
        "type": "content_block_delta",
        "index": 0,
        "delta": {"type": "text_delta", "text": "Hal"},
    }
    block = {
        "type": "content_block_start",
        "index": 0,
        "content_block": {"type": "text", "text": ""},
    }
    events = [start, json.dumps(block).encode(), json.dumps(delta).encode()]
    answer = cut_after(b"".join(b"data: " + event + b"\n\n" for event in events))
    options = {"provider": "anthropic", "clock": FakeClock(), "max_retries": 2}
    with raw_server(answer) as raw, LLM(base_url=raw.url, **options) as llm:
        with pytest.raises(LLMStreamError) as caught:
            ask(llm, max_tokens=64_000)
    assert caught.value.attempts == 3
    assert caught.value.partial.text == "Hal"


# Compare


def test_models_are_compared_side_by_side(server):
    server.reply(lambda request: f"I am {request.json['model']}.")
    with LLM(base_url=server.url, price=PRICE) as llm:
        first, second = llm.compare(["a", "b"], "Who are you?")
    assert (first.text, second.text) == ("I am a.", "I am b.")
    assert first.cost > 0
    assert first.time_to_first_token_ms <= first.latency_ms
    assert first.usage.total_tokens > 0


def test_a_model_that_fails_is_compared_too(server):
    server.reply(lambda request: {"status": 404} if request.json["model"] == "b" else "Yes.")
    with LLM(base_url=server.url) as llm:
        first, second = llm.compare(["a", "b"], MESSAGES)
    assert first.error is None
    assert second.error.status_code == 404


@pytest.mark.parametrize("models", ["a", [], None, [{"role": "user"}]])
def test_without_models_nothing_can_be_compared(llm, models):
    with pytest.raises(LLMConfigError, match="models"):
        llm.compare(models, "Hello!")


# Settings


@pytest.mark.parametrize(
    "wrong",
    [
        {"requests_per_minute": 0},
        {"tokens_per_minute": -5},
        {"budget": "5 EUR"},
        {"budget": -1},
        {"fallbacks": "gpt-4o"},
        {"cache": "redis://localhost"},
        {"hooks": [42]},
        {"rate_limiter": 60},
        {"rate_limiter": {"openai": 60}},
        {"rate_limiter": {"opnai": RateLimiter()}},
        {"usage_store": 42.5},
        {"price": "cheap"},
    ],
)
def test_what_cannot_be_used_is_refused_at_once(wrong):
    with pytest.raises((LLMConfigError, TypeError)):
        LLM(**wrong)


def test_a_policy_is_no_argument_of_a_call(llm):
    for name in ("budget", "rate_limiter", "fallbacks", "hooks", "price"):
        with pytest.raises(LLMConfigError, match=name):
            ask(llm, **{name: 1})


def test_a_client_with_policies_of_its_own_says_that_it_cannot_be_pickled(server):
    llm = LLM(base_url=server.url, budget=Budget(requests=1))
    with pytest.raises(TypeError, match="budget"):
        pickle.dumps(llm)
    copied = pickle.loads(pickle.dumps(LLM(base_url=server.url, max_retries=7, fallbacks=["b"])))
    assert copied.config.max_retries == 7


def test_options_replace_one_policy_and_keep_the_others(server):
    cache = ResponseCache()
    with LLM(base_url=server.url, cache=cache, requests_per_minute=5) as llm:
        other = llm.with_options(budget=Budget(requests=0 + 1))
        ask(other)
        assert ask(llm).cached


def test_what_was_spent_is_written_down(server, tmp_path):
    from LLM.policies.spending import Spending

    url = f"sqlite:///{tmp_path}/usage.db"
    with LLM(base_url=server.url, usage_store=url, price=PRICE) as llm:
        server.reply("Hi!", usage=USAGE)
        ask(llm)
    (row,) = Spending(url).by_day_and_model()
    assert row.cost == COST


# What was found by trying to break it


def test_a_forgotten_stream_never_waits_for_a_lock_of_its_own_thread(server, llm):
    """Garbage is collected anywhere, also inside a budget's lock; the end of a stream must not run there."""
    budget = Budget(requests=10**6)
    with llm.budget(budget):
        stream = llm.stream(MESSAGES)
        next(stream)
        with budget._book._lock:
            del stream
            gc.collect()
        until(lambda: budget.reserved_requests == 0)


def test_a_forked_child_leaves_the_parents_stream_alone(server, llm):
    server.token_delay = 0.05
    stream = llm.stream(MESSAGES)
    first = next(stream)
    child = os.fork()
    if child == 0:
        del stream
        gc.collect()
        time.sleep(0.1)
        os._exit(0)
    os.waitpid(child, 0)
    assert first.text_delta + "".join(e.text_delta or "" for e in stream)
    assert stream.error is None


def test_blocks_of_generators_end_in_any_order(server, llm):
    def conversation():
        with llm.budget(requests=2):
            yield ask(llm)

    first, second = conversation(), conversation()
    next(first), next(second)
    first.close()
    second.close()
    ask(llm)
    abandoned = conversation()
    next(abandoned)
    thread = threading.Thread(target=abandoned.close)
    thread.start()
    thread.join()
    ask(llm)


@pytest.mark.parametrize(
    "more",
    [
        {
            "extra_body": {
                "tools": [
                    {"type": "function", "function": {"name": "f", "description": "word " * 3000}}
                ]
            }
        },
        {"extra_body": {"messages": [{"role": "user", "content": "word " * 3000}]}},
        {"extra_body": {"system": "word " * 3000}},
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"description": "word " * 3000},
            }
        },
        {"extra_body": {"max_tokens": 3000}},
    ],
)
def test_all_that_the_model_reads_is_reserved_for(server, llm, more):
    with llm.budget(tokens=2000), pytest.raises(LLMBudgetError):
        ask(llm, max_tokens=10, **more)


def test_under_a_budget_the_model_cannot_be_swapped_in_the_body(server, llm):
    with llm.budget(usd=1), pytest.raises(LLMBudgetError, match="model="):
        ask(llm, max_tokens=10, extra_body={"model": "dear"})


@pytest.mark.parametrize("absurd", [-100_005, 10**19])
def test_nonsense_in_a_usage_is_unknown_and_gives_nothing_back(llm, absurd):
    usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": absurd}
    message = {"role": "assistant", "content": "Hi"}
    body = json.dumps({"id": "1", "choices": [{"message": message}], "usage": usage}).encode()
    with raw_server(lambda connection, _: connection.sendall(http(body))) as raw:
        with LLM(base_url=raw.url) as client, client.budget(tokens=1000) as budget:
            answer = ask(client, max_tokens=10)
            assert answer.usage.total_tokens == 2
            assert budget.spent_tokens == 2
    reservation = budget.reserve(None, 10)
    reservation.settle(None, absurd)
    assert budget.spent_tokens == 12


def test_ctrl_c_while_waiting_for_a_permit_costs_nothing(server):
    class Impatient(FakeClock):
        def sleep(self, seconds):
            raise KeyboardInterrupt

    clock = Impatient()
    limiter = RateLimiter(1, None, clock=clock)
    with LLM(base_url=server.url, rate_limiter=limiter, clock=clock) as llm:
        with llm.budget(requests=5) as budget:
            ask(llm)
            with pytest.raises(KeyboardInterrupt):
                ask(llm)
        assert (budget.spent_requests, budget.reserved_requests) == (1, 0)


def test_a_deadline_that_is_over_costs_nothing(server):
    clock = FakeClock()
    with LLM(base_url=server.url, clock=clock) as llm, llm.budget(requests=5) as budget:
        with llm.deadline(1):
            clock.time += 2
            with pytest.raises(LLMTimeoutError) as caught:
                ask(llm)
        assert budget.spent_requests == 0
        assert caught.value.attempts == 0


def test_a_warning_that_ends_the_program_leaves_no_reservation_behind(server, llm):
    def stop(_):
        raise SystemExit

    second = Budget(requests=10)
    with llm.budget(second), llm.budget(requests=3, warn_at=0.1, on_warn=stop):
        with pytest.raises(SystemExit):
            ask(llm)
    assert (second.reserved_requests, second.spent_requests) == (0, 1)


def test_a_truth_that_cannot_be_written_holds_up_no_other(tmp_path):
    budget = Budget(usd=10, store=f"sqlite:///{tmp_path}/spend.db")
    wrong = budget.reserve(Decimal(1), 10)
    budget.store.settle(budget.name, wrong._receipt, Amount(Decimal(1), 2**70, 1), Decimal(0))
    for _ in range(3):
        budget.reserve(Decimal("0.1"), 10).settle(Decimal("0.1"), 5)
    assert budget.spent_usd == Decimal("0.3")


def test_who_waits_for_a_failing_host_does_not_wait_in_a_row(server):
    asked, others = itertools.count(), threading.Barrier(7, timeout=20)

    def fail(_):
        if next(asked) == 0:
            until(lambda: waiting() == 7)
        else:
            others.wait()  # not answered before all have asked
        return {"status": 500}

    server.reply(fail)
    with LLM(base_url=server.url, cache=":memory:", max_retries=0) as llm:
        seats = llm._policies["cache"]._tower.seats

        def waiting():
            return sum(len(seat.waiters) for seat in list(seats.values()))

        with ThreadPoolExecutor(8) as pool:
            replies = list(pool.map(lambda _: llm.generate("Hello there!"), range(8)))
    assert not any(reply.success for reply in replies)
    assert not others.broken


def test_a_store_whose_name_was_left_empty_is_not_kept_in_memory():
    """What was meant to last would be forgotten, and a budget could be spent again."""
    with pytest.raises(LLMConfigError, match="names no file"):
        Budget(usd=1, store="sqlite:///")


def test_a_budget_in_another_currency_is_refused_in_a_sentence():
    with pytest.raises(LLMConfigError, match=r"^budget must be US dollars like 0\.50, not '5 EUR'"):
        LLMConfig(budget="5 EUR")
