"""`llm.map`: each item is a call of the client, with all that this means."""

import threading
import time
from collections import Counter

import pytest

from LLM import (
    LLM,
    Budget,
    JournalError,
    LLMAuthenticationError,
    LLMBudgetError,
    LLMConfigError,
    LLMNotFoundError,
    LLMServerError,
    LLMTimeoutError,
    MapProgress,
    MapResult,
    MapRun,
    Message,
    Price,
    RateLimiter,
)
from LLM.testing import LocalServer


def questions(number):
    return [f"What is {place} x 3?" for place in range(number)]


def answers(number):
    return [f"{place} * 3 = {place * 3}." for place in range(number)]


def asked(server):
    return [request.json["messages"][-1]["content"] for request in server.requests]


@pytest.fixture
def llm(server):
    with LLM(base_url=server.url, model="m", max_retries=0) as client:
        yield client


def test_each_item_is_answered_in_its_place(llm, server):
    with llm.map(questions(50)) as results:
        found = list(results)

    assert [result.text for result in found] == answers(50)
    assert all(isinstance(result, MapResult) and result.success for result in found)
    assert Counter(asked(server)) == Counter(questions(50))
    assert llm.get_request_count() == 50
    assert found[3].usage.total_tokens > 0
    assert found[3].seconds > 0
    assert (found[3].cost, found[3].cached, found[3].resumed) == (None, False, False)


def test_it_works_without_the_block_and_as_completed(llm):
    results = llm.map((question for question in questions(20)), ordered=False, concurrency=4)

    assert isinstance(results, MapRun)
    assert {result.index: result.text for result in results} == dict(enumerate(answers(20)))
    assert results.progress.total is None


def test_items_of_all_kinds_and_arguments_of_their_own(llm, server):
    items = [
        "a",
        [Message(role="user", content="b")],
        {"messages": [{"role": "user", "content": "c"}], "temperature": 0.1, "key": "k"},
        {"custom_id": "l", "body": {"messages": [{"role": "user", "content": "d"}], "user": "u"}},
    ]

    found = list(llm.map(items, concurrency=1, temperature=0.9, top_p=0.5, extra_body={"x": 1}))

    assert [result.key for result in found] == ["0", "1", "k", "l"]
    bodies = [request.json for request in server.requests]
    assert [body["messages"][-1]["content"] for body in bodies] == ["a", "b", "c", "d"]
    assert [body["temperature"] for body in bodies] == [0.9, 0.9, 0.1, 0.9]
    assert all((body["top_p"], body["x"]) == (0.5, 1) for body in bodies)
    assert bodies[3]["user"] == "u"


def test_a_line_of_a_batch_file_is_sent_as_it_stands(llm, server):
    body = {"model": "gpt-x", "messages": [{"role": "user", "content": "hi"}], "logprobs": True}

    list(
        llm.map([{"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}])
    )

    assert server.requests[0].json == body


def test_prompt_makes_what_is_asked_of_anything(llm):
    rows = [{"id": 7, "n": 2}, {"id": 8, "n": 3}]

    found = list(llm.map(rows, prompt=lambda row: f"What is {row['n']} x 3?", key="id"))

    assert [(result.key, result.item, result.text) for result in found] == [
        ("7", rows[0], "2 * 3 = 6."),
        ("8", rows[1], "3 * 3 = 9."),
    ]


def test_a_failed_call_is_a_result_with_its_error(server):
    def reply(received):
        place = int(received.json["messages"][0]["content"].split()[2])
        return {"status": 500, "text": "broken"} if place % 10 == 3 else None

    server.reply(reply)
    with LLM(base_url=server.url, model="m", max_retries=0) as llm:
        found = list(llm.map(questions(30)))

    assert [result.index for result in found if not result.success] == [3, 13, 23]
    assert isinstance(found[3].error, LLMServerError)


def test_failed_attempts_are_tried_again_as_those_of_any_call(server):
    seen = Counter()

    def reply(received):
        question = received.json["messages"][0]["content"]
        seen[question] += 1
        return {"status": 503, "headers": {"retry-after": "0"}} if seen[question] == 1 else None

    server.reply(reply)
    with LLM(base_url=server.url, model="m", retry_delay=0.001) as llm:
        found = list(llm.map(questions(5)))

    assert [result.text for result in found] == answers(5)
    assert all(result.response.attempts == 2 for result in found)


def test_a_wrong_key_ends_it_at_once():
    with LocalServer(api_key="right") as server, LLM(base_url=server.url, api_key="wrong") as llm:
        with pytest.raises(LLMAuthenticationError):
            list(llm.map(questions(1000), concurrency=2))
        assert len(server.requests) <= 4


def test_a_wrong_key_ends_it_also_where_each_item_names_a_model_of_the_same_place():
    items = [{"prompt": "x", "model": f"m{place}"} for place in range(1000)]
    with LocalServer(api_key="right") as server, LLM(base_url=server.url, api_key="wrong") as llm:
        with pytest.raises(LLMAuthenticationError):
            list(llm.map(items, concurrency=2))
        assert len(server.requests) <= 4


@pytest.mark.parametrize(
    "item, is_elsewhere",
    [
        ({}, False),
        ({"model": "another"}, False),
        ({"provider": "openai", "model": "another"}, False),
        ({"provider": "mistral", "model": "m"}, True),
        ({"provider": "mistral"}, True),
    ],
)
def test_an_item_is_elsewhere_that_goes_to_another_host(item, is_elsewhere):
    """What a wrong key says of it, it says of no other."""
    with LLM(provider="openai", api_key="x", api_keys={"mistral": "y", "anthropic": "z"}) as llm:
        assert llm._is_elsewhere({}, item) is is_elsewhere


def test_a_model_that_is_not_there_ends_it_at_once(llm, server):
    server.reply(lambda _: {"status": 404, "text": "no such model"})

    with pytest.raises(LLMNotFoundError):
        list(llm.map(questions(1000), concurrency=2))
    assert len(server.requests) <= 4


def test_a_budget_around_it_holds_and_what_it_still_affords_is_answered(server):
    price = Price("1000", "1000")  # for a million tokens: a dollar is a thousand of them
    with LLM(base_url=server.url, model="m", price=price, max_tokens=50) as llm:
        cost = llm.chat_completion([{"role": "user", "content": "What is 1 x 3?"}]).cost
        found = []
        with llm.budget(cost * 20 + 1) as budget, pytest.raises(LLMBudgetError):
            found.extend(result for result in llm.map(questions(10_000)) if result.success)
        spent = budget.state().spent.usd

    assert sum(result.cost for result in found) == spent <= cost * 20 + 1
    # Calls that were refused only because others were under way were asked later: little is left.
    assert spent > 1 / 2


def test_a_budget_of_the_client_holds_too(server):
    budget = Budget(requests=10)
    with LLM(base_url=server.url, model="m", budget=budget) as llm:
        found = []
        with pytest.raises(LLMBudgetError):
            found.extend(llm.map(questions(100)))

    assert sum(result.success for result in found) == 10 == len(server.requests)


def test_the_limiter_paces_it(server):
    class Hurried(RateLimiter):
        MINUTE = 0.2

    limiter = Hurried(requests_per_minute=5)
    with LLM(base_url=server.url, model="m", rate_limiter=limiter) as llm:
        started = time.monotonic()
        assert len(list(llm.map(questions(12)))) == 12

    assert time.monotonic() - started >= 0.4


def test_the_cache_answers_what_was_asked_before(server):
    with LLM(base_url=server.url, model="m", cache=":memory:") as llm:
        list(llm.map(questions(5)))
        found = list(llm.map(questions(7), cache="on"))

    assert [result.cached for result in found] == [True] * 5 + [False] * 2
    assert found[0].cost == 0
    assert len(server.requests) == 7


def test_a_deadline_is_for_the_whole_map():
    with LocalServer(latency=0.05) as server, LLM(base_url=server.url, model="m") as llm:
        started, found = time.monotonic(), []
        with pytest.raises(LLMTimeoutError) as caught:
            found.extend(llm.map(questions(1000), concurrency=2, deadline=0.3))

        assert caught.value.clock == "deadline"
        assert time.monotonic() - started < 2
        assert 2 <= sum(result.success for result in found) <= 20
        assert all(result.error is None or result.error.clock == "deadline" for result in found)


def test_leaving_the_block_closes_what_is_under_way():
    with LocalServer(latency=5) as server, LLM(base_url=server.url, model="m") as llm:
        started = time.monotonic()
        with llm.map(questions(100), concurrency=4) as results:
            waiting = threading.Thread(target=lambda: list(results), daemon=True)
            waiting.start()
            while len(server.requests) < 4:
                time.sleep(0.005)
        waiting.join(5)

        assert time.monotonic() - started < 3
        assert not waiting.is_alive()
        assert len(server.requests) == 4


def test_the_journal_saves_what_was_answered(llm, server, tmp_path):
    price = Price("1", "2")
    with llm.with_options(price=price) as paying:
        first = list(paying.map(questions(20), journal=tmp_path / "run.jsonl"))
    found = list(llm.map(questions(25), journal=str(tmp_path / "run.jsonl")))

    assert [result.text for result in found] == answers(25)
    assert [result.resumed for result in found] == [True] * 20 + [False] * 5
    assert found[3].cost == first[3].cost > 0  # what it cost then, whatever the price is now
    assert found[3].response.provider == first[3].response.provider
    assert found[3].response.request_id == first[3].response.request_id
    assert len(server.requests) == 25


@pytest.mark.parametrize(
    "other",
    [{"model": "other"}, {"temperature": 0.1}, {"extra_body": {"top_k": 4}}, {"stop": ["x"]}],
)
def test_the_journal_of_another_job_is_refused(llm, server, tmp_path, other):
    list(llm.map(questions(2), journal=tmp_path / "j"))

    with pytest.raises(JournalError, match="another job"):
        llm.map(questions(2), journal=tmp_path / "j", **other)
    # The address and the key are not what was asked.
    with LLM(base_url=server.url + "/v1", model="m", api_key="sk-secret") as same:
        assert all(result.resumed for result in same.map(questions(2), journal=tmp_path / "j"))
    assert "sk-secret" not in (tmp_path / "j").read_text()


def test_a_map_of_a_map_of_the_same_client_works(llm):
    inner = llm.map(questions(10), concurrency=2)
    outer = llm.map((result.text for result in inner), prompt=lambda text: f"Repeat: {text}")

    assert all(result.success for result in outer)


@pytest.mark.parametrize(
    "wrong, why",
    [
        ({"items": "text"}, "items is str"),
        ({"items": {"a": 1}}, "items is dict"),
        ({"items": 7}, "items is int"),
        ({"concurrency": 0}, "concurrency is 0"),
        ({"concurrency": 1.5}, "concurrency is 1.5"),
        ({"concurrency": True}, "concurrency is True"),
        ({"on_error": "ignore"}, "on_error is 'ignore'"),
        ({"via": "pigeon"}, "via is 'pigeon'"),
        ({"engine": "steam"}, "engine is 'steam'"),
        ({"stream": True}, "a map takes no stream="),
        ({"deadline": -1}, "deadline"),
        ({"temperature": 7}, "temperature"),
        ({"api_key": "x"}, "api_key is a setting of the client"),
        ({"model": ""}, "model must be a name"),
        ({"extra_body": 5}, "extra_body is int"),
        ({"via": "batch", "engine": "ray"}, "choose one"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_sent(llm, server, tmp_path, wrong, why):
    given = {"items": ["a"], "journal": tmp_path / "j", **wrong}
    with pytest.raises(LLMConfigError, match=why):
        llm.map(**given)
    assert not server.requests
    assert not (tmp_path / "j").exists()


def test_progress_counts_tokens_and_cost(server):
    told = []
    with LLM(base_url=server.url, model="m", price=Price("1", "1")) as llm:
        with llm.map(questions(5), progress=told.append) as results:
            found = list(results)

    last = told[-1]
    assert isinstance(last, MapProgress)
    assert (last.done, last.total, last.seconds_left) == (5, 5, 0)
    assert last.tokens == sum(result.usage.total_tokens for result in found)
    assert last.cost == sum(result.cost for result in found) > 0


def test_its_names_are_public():
    assert {"MapResult", "MapRun", "MapProgress", "JournalError"} <= set(__import__("LLM").__all__)
