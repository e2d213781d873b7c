"""The providers' batch APIs, through real sockets: submit, look, read, cancel; and maps through them."""

import json
import logging
import pickle
import re
import signal
import subprocess
import sys
import threading
from decimal import Decimal
from pathlib import Path

import pytest

from LLM import (
    LLM,
    JournalError,
    LLMAPIError,
    LLMAuthenticationError,
    LLMBudgetError,
    LLMConfigError,
    LLMConnectionError,
    LLMInvalidRequestError,
    LLMNotFoundError,
    LLMResponseError,
    LLMTimeoutError,
    Price,
)
from LLM.providers import batches as wire_module
from LLM.testing import LocalServer
from tests.fakes import FakeClock, RawServer, needs_price_data

ROOT = Path(__file__).parents[1]
KEY = "sk-0123456789"
PRICE = Price(input=1, output=10, batch=0.5)
QUESTIONS = ["What is 1 + 1?", "What is 2 + 2?", "What is 3 + 3?"]


def client(url, dialect, **more):
    fields = {"api_key": KEY, "max_tokens": 50, "price": PRICE, "clock": FakeClock(), **more}
    if dialect == "anthropic":
        return LLM(provider="anthropic", base_url=url, model="claude-sonnet-4-5", **fields)
    return LLM(base_url=url, model="gpt-4o-mini", **fields)


@pytest.fixture(params=["openai", "anthropic"])
def dialect(request):
    return request.param


@pytest.fixture
def llm(server, dialect):
    with client(server.url, dialect) as made:
        yield made


def asked(server, method="POST"):
    return [request.path for request in server.requests if request.method == method]


def texts(results):
    return {result.key: result.text for result in results}


def test_a_batch_is_submitted_looked_at_and_read(server, llm):
    server.batches.polls = 1
    batch = llm.batches.submit(QUESTIONS)
    assert (batch.status, batch.done, batch.counts.total) == ("in_progress", False, 3)
    assert batch.counts.processing == 3
    assert not llm.batches.poll(batch).done
    over = llm.batches.poll(batch.id)
    assert (over.status, over.done, over.counts.succeeded) == ("completed", True, 3)
    assert over.created is not None
    assert over.ended > over.created
    assert texts(llm.batches.results(over)) == {
        "0": "1 + 1 = 2.",
        "1": "2 + 2 = 4.",
        "2": "3 + 3 = 6.",
    }


def test_waiting_sleeps_by_the_clock_longer_each_time(server, llm):
    server.batches.polls = 7
    seen = []
    over = llm.batches.wait(llm.batches.submit(QUESTIONS), progress=seen.append)
    assert over.done
    assert len(seen) == 8
    assert llm._clock.slept == [1, 2, 4, 8, 16, 32, 60]


def test_a_wait_ends_at_its_deadline_and_the_batch_goes_on(server, llm):
    server.batches.polls = 100
    batch = llm.batches.submit(QUESTIONS)
    with pytest.raises(LLMTimeoutError, match=batch.id) as caught:
        llm.batches.wait(batch, interval=3, deadline=7)
    assert caught.value.clock == "deadline"
    assert sum(llm._clock.slept) == 7
    server.batches.polls = 0
    with llm.deadline(5), pytest.raises(LLMTimeoutError):
        llm.batches.wait(batch, interval=3)


def test_a_look_that_fails_is_made_again(server, llm, caplog):
    batch = llm.batches.submit(QUESTIONS)
    for _ in range(6):  # more than the retries of one look
        server.reply(status=503)
    with caplog.at_level(logging.WARNING, logger="LLM"):
        assert llm.batches.wait(batch, interval=0).done
    assert "look at a batch failed" in caplog.text


def test_a_wait_is_given_up_when_no_look_succeeds(server, llm):
    batch = llm.batches.submit(QUESTIONS)
    llm = llm.with_options(max_retries=0)
    for _ in range(10):
        server.reply(status=503)
    with pytest.raises(LLMAPIError, match="503"):
        llm.batches.wait(batch, interval=0)


def test_results_of_a_batch_that_is_not_over_are_refused(server, llm):
    server.batches.polls = 5
    batch = llm.batches.submit(QUESTIONS)
    with pytest.raises(LLMConfigError, match="in_progress"):
        llm.batches.results(batch)


def test_another_process_goes_on_with_the_id(server, dialect):
    with client(server.url, dialect) as llm:
        batch = llm.batches.submit([{"key": "a/ü", "prompt": "What is 1 + 1?"}])
    how = (
        "provider='anthropic', model='claude-sonnet-4-5'"
        if dialect == "anthropic"
        else "model='gpt-4o-mini'"
    )
    code = (
        "import sys; from LLM import LLM\n"
        f"with LLM(base_url={server.url!r}, api_key={KEY!r}, {how}) as llm:\n"
        f"    batch = llm.batches.wait({batch.id!r})\n"
        "    print([(r.key, r.text) for r in llm.batches.results(batch)])"
    )
    said = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert said.stdout.strip() == "[('a/ü', '1 + 1 = 2.')]"


ODD = [
    "0",
    "a b",
    "ü",
    "key64_abc",
    "key256_x",
    "../..",
    "x" * 64,
    "x" * 65,
    "é" * 100,
    '"\\\n',
    "\ud800",
]


def test_odd_keys_come_back_as_they_were(server, llm):
    # Half a surrogate pair is no text; where keys are encoded, it comes through.
    odd = [key for key in ODD if llm.config.provider or key != "\ud800"]
    batch = llm.batches.submit([{"key": key, "prompt": "Hi"} for key in odd])
    assert sorted(r.key for r in llm.batches.results(batch)) == sorted(odd)


def test_a_key_too_long_for_the_wire_is_known_again_by_the_keys(server):
    with client(server.url, "anthropic") as llm:
        batch = llm.batches.submit([{"key": "é" * 100, "prompt": "Hi"}])
    with client(server.url, "anthropic") as other:
        (nameless,) = other.batches.results(batch.id)
        assert re.fullmatch(r"key256_[A-Za-z0-9_-]{43}", nameless.key)
        (named,) = other.batches.results(batch.id, keys=["é" * 100])
        assert named.key == "é" * 100


def test_equal_keys_are_refused_naming_both_items(server, llm):
    items = [{"key": "a", "prompt": "1"}, {"key": "b", "prompt": "2"}, {"key": "a", "prompt": "3"}]
    with pytest.raises(LLMConfigError, match="items 0 and 2 have the same key 'a'"):
        llm.batches.submit(items)
    assert server.requests == []


@pytest.mark.parametrize(
    "items, says",
    [
        ([], "at least one"),
        (["ok", 5], "item 1"),
        ([{"prompt": "x", "timeout": 3}], "item 0 has a timeout"),
        ([{"prompt": "x", "key": "k", "temperature": 9}], "item 0 .'k'.: temperature"),
    ],
)
def test_what_cannot_be_in_a_batch_is_refused_before_anything_is_sent(server, llm, items, says):
    with pytest.raises(LLMConfigError, match=says):
        llm.batches.submit(items)
    assert server.requests == []


def test_the_provider_s_limits_hold_before_anything_is_sent(server, llm, monkeypatch):
    found = wire_module.batch_wire(llm._target(None, None))
    monkeypatch.setattr(type(found), "most_requests", 2)
    with pytest.raises(LLMConfigError, match=r"holds 2 requests, and item 2 is over it"):
        llm.batches.submit(QUESTIONS)
    monkeypatch.setattr(type(found), "most_requests", 5)
    monkeypatch.setattr(type(found), "most_bytes", 1000)
    with pytest.raises(LLMConfigError, match=r"0 MB"):
        llm.batches.submit(["x" * 1000])
    assert server.requests == []


def test_the_limits_are_those_of_the_vendors():
    openai, anthropic = wire_module._OPENAI, wire_module._ANTHROPIC
    assert (openai.most_requests, openai.most_bytes) == (50_000, 200_000_000)
    assert (anthropic.most_requests, anthropic.most_bytes) == (100_000, 256_000_000)


def test_anthropic_takes_several_models_in_a_batch_and_openai_one(server):
    with client(server.url, "anthropic") as llm:
        mixed = ["1", {"prompt": "2", "model": "claude-haiku-4-5"}]
        models = {r.key: r.response.model for r in llm.batches.results(llm.batches.submit(mixed))}
        assert models == {"0": "claude-sonnet-4-5", "1": "claude-haiku-4-5"}
    with client(server.url, "openai") as llm:
        with pytest.raises(LLMConfigError, match="submit them apart"):
            llm.batches.submit(["1", {"prompt": "2", "model": "gpt-4"}])


def test_the_wire_is_that_of_openai(server):
    with client(server.url, "openai") as llm:
        batch = llm.batches.submit(["Hi"], metadata={"job": "night"}, extra_body={"seed": 7})
        list(llm.batches.results(batch))
    upload, create, _, content = server.requests
    assert upload.path == "/v1/files"
    assert upload.headers["content-type"].startswith("multipart/form-data; boundary=")
    assert b'name="purpose"\r\n\r\nbatch\r\n' in upload.body
    line = json.loads(next(part for part in upload.body.splitlines() if part[:1] == b"{"))
    assert line == {
        "custom_id": "0",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {
            "model": "gpt-4o-mini",
            "messages": [{"role": "user", "content": "Hi"}],
            "temperature": 0.7,
            "max_tokens": 50,
            "seed": 7,
        },
    }
    assert create.json == {
        "input_file_id": "file-000000000000000000000001",
        "endpoint": "/v1/chat/completions",
        "completion_window": "24h",
        "metadata": {"job": "night"},
    }
    assert content.path.endswith("/content")
    assert all(r.headers["authorization"] == f"Bearer {KEY}" for r in server.requests)


def test_the_wire_is_that_of_anthropic_and_the_key_goes_only_there(server):
    with client(server.url, "anthropic") as llm:
        list(llm.batches.results(llm.batches.submit(["Hi"])))
    create, _, results = server.requests
    assert create.path == "/v1/messages/batches"
    (request,) = create.json["requests"]
    assert request["custom_id"] == "0"
    assert request["params"]["max_tokens"] == 50
    # The server's `results_url` names another host.
    assert results.path.startswith("/v1/messages/batches/msgbatch_")
    assert all(r.headers["x-api-key"] == KEY for r in server.requests)
    assert all("anthropic-version" in r.headers for r in server.requests)


def test_an_item_that_the_server_refuses_is_a_result_with_its_error(server, llm):
    server.reply(
        lambda r: (
            {"text": "no such thing", "status": 400}
            if b"bad" in r.body and r.json and "messages" in r.json
            else None
        )
    )
    batch = llm.batches.wait(llm.batches.submit(["What is 1 + 1?", "bad"]))
    assert (batch.status, batch.counts.failed) == ("completed", 1)
    good, bad = sorted(llm.batches.results(batch), key=lambda r: r.key)
    assert good.text == "1 + 1 = 2."
    assert isinstance(bad.error, LLMInvalidRequestError)
    assert "no such thing" in str(bad.error)
    assert bad.response is None
    assert isinstance(pickle.loads(pickle.dumps(bad.error)), LLMInvalidRequestError)


@pytest.mark.parametrize("ending", ["expired", "cancelled"])
def test_what_was_not_run_in_time_is_a_result_with_an_error(server, llm, ending):
    server.batches.answered = 1
    if ending == "expired":
        server.batches.ending = "expired"
        batch = llm.batches.wait(llm.batches.submit(QUESTIONS))
    else:
        server.batches.polls = 9
        batch = llm.batches.cancel(llm.batches.submit(QUESTIONS).id)
        assert batch.status == "cancelling"
        batch = llm.batches.wait(batch)
    assert batch.status == ending
    results = {result.key: result for result in llm.batches.results(batch)}
    assert results["0"].text == "1 + 1 = 2."
    assert [results[key].error.code for key in "12"] == [f"batch_{ending}"] * 2
    assert results["1"].error.retriable == (ending == "expired")
    assert llm.usage.calls == 1


def test_a_batch_that_fails_as_a_whole_says_why(server):
    server.batches.ending = "failed"
    with client(server.url, "openai") as llm:
        batch = llm.batches.wait(llm.batches.submit(QUESTIONS))
        assert batch.status == "failed"
        with pytest.raises(LLMInvalidRequestError, match="line 1: This line is not parseable"):
            llm.batches.results(batch)


def test_answers_count_once_at_half_the_price(server, llm):
    batch = llm.batches.submit(QUESTIONS)
    results = list(llm.batches.results(batch))
    whole = sum(PRICE.cost(result.usage) for result in results)
    assert sum(result.cost for result in results) == whole / 2
    assert llm.usage.calls == 3
    assert llm.usage.cost == whole / 2
    list(llm.batches.results(batch))
    assert llm.usage.calls == 3


@needs_price_data
def test_the_known_prices_of_a_batch_are_half(server):
    with LLM(base_url=server.url, provider="openai", model="gpt-4o-mini", api_key=KEY) as llm:
        (result,) = llm.batches.results(llm.batches.submit(["Hi"]))
        assert result.cost * 2 == llm._policies["price"].cost("openai", "gpt-4o-mini", result.usage)
        assert result.cost > 0


def test_a_price_that_nobody_knows_stays_unknown(server):
    with LLM(base_url=server.url, model="mine") as llm:
        (result,) = llm.batches.results(llm.batches.submit(["Hi"]))
        assert result.cost is None
        assert llm.usage.unpriced == 1


def test_a_budget_sets_the_worst_case_of_a_batch_aside_and_is_settled_to_the_truth(server, llm):
    with llm.budget("1.00", tokens=10_000, requests=3) as budget:
        batch = llm.batches.submit(QUESTIONS)
        held = budget.state().reserved
        assert held.requests == 3
        assert held.tokens > 150
        assert (
            held.usd == budget.reserved_usd > Decimal("0.00075")
        )  # 150 tokens at 10 / 2 a million
        results = list(llm.batches.results(batch))
        assert budget.reserved_usd == 0
        assert budget.spent_usd == sum(result.cost for result in results)
        assert budget.spent_tokens == sum(result.usage.total_tokens for result in results)
        assert budget.spent_requests == 3


def test_a_batch_that_does_not_fit_a_budget_is_not_sent(server, llm):
    with llm.budget("0.0001"), pytest.raises(LLMBudgetError, match="worst"):
        llm.batches.submit(QUESTIONS)
    with llm.budget(requests=2), pytest.raises(LLMBudgetError, match="take 3 requests"):
        llm.batches.submit(QUESTIONS)
    with llm.budget("1.00"), pytest.raises(LLMBudgetError, match="nobody knows what"):
        llm.with_options(price={}).batches.submit(QUESTIONS, model="unheard-of")
    assert server.requests == []


def test_a_refused_submission_gives_the_budget_back(server, llm):
    server.reply(status=400, text="no batches today")
    with llm.budget("1.00") as budget:
        with pytest.raises(LLMInvalidRequestError):
            llm.batches.submit(QUESTIONS)
        assert (budget.spent_usd, budget.reserved_usd) == (0, 0)


def test_an_expired_batch_costs_what_was_answered(server, llm):
    server.batches.ending, server.batches.answered = "expired", 1
    with llm.budget("1.00") as budget:
        batch = llm.batches.wait(llm.batches.submit(QUESTIONS))
        results = list(llm.batches.results(batch))
        assert budget.reserved_usd == 0
        assert budget.spent_usd == sum(r.cost for r in results if r.success) > 0


def test_a_wrong_key_is_an_authentication_error_and_never_shown(dialect):
    with LocalServer(api_key="right") as server, client(server.url, dialect) as llm:
        for call in (
            lambda: llm.batches.submit(QUESTIONS),
            lambda: llm.batches.poll("batch_1"),
            lambda: llm.batches.cancel("batch_1"),
            lambda: list(llm.batches.list()),
            lambda: llm.batches.results("batch_1"),
        ):
            with pytest.raises(LLMAuthenticationError) as caught:
                call()
            assert KEY not in str(caught.value)
            assert KEY not in caught.value.body


def test_an_unknown_batch_is_not_found(server, llm):
    with pytest.raises(LLMNotFoundError):
        llm.batches.poll("batch_unknown")


@pytest.mark.parametrize("id_", ["", "..", None, 5])
def test_what_is_no_id_is_refused(server, llm, id_):
    with pytest.raises(LLMConfigError, match="no id"):
        llm.batches.poll(id_)
    assert server.requests == []


def test_an_id_is_one_part_of_the_path_whatever_is_in_it(server, llm):
    with pytest.raises(LLMAPIError):
        llm.batches.poll("../files?x#y")
    assert server.requests[-1].path.endswith("/batches/..%2Ffiles%3Fx%23y")


def test_looks_are_retried(server, llm):
    batch = llm.batches.submit(QUESTIONS)
    server.reply(status=503)
    server.reply(status=429, headers={"retry-after": "2"})
    assert llm.batches.poll(batch).done
    assert llm._clock.slept[-1] == 2


def test_the_list_has_the_newest_first_over_all_pages(server, llm):
    ids = [llm.batches.submit([text]).id for text in QUESTIONS]
    assert [batch.id for batch in llm.batches.list()] == ids[::-1]
    assert [batch.id for batch in llm.batches.list(limit=2)] == ids[:0:-1]
    wire = wire_module.batch_wire(llm._target(None, None))
    call = llm._describe_named("batches", None, {})
    after = wire.page(call, ids[2]).url.rpartition("after")[2]
    assert ids[2] in after


def broken_create(server, dialect, monkeypatch):
    """The batch is made, and the answer that says so never comes."""
    respond = server.batches.respond
    state = {"left": 1}

    def broken(method, path, *rest):
        answer = respond(method, path, *rest)
        if method == "POST" and path.endswith("batches") and state["left"]:
            state["left"] -= 1
            raise ConnectionResetError
        return answer

    monkeypatch.setattr(server.batches, "respond", broken)


def test_a_batch_whose_making_was_not_answered_is_found_again_by_its_file(server, monkeypatch):
    broken_create(server, "openai", monkeypatch)
    with client(server.url, "openai") as llm:
        batch = llm.batches.submit(QUESTIONS)
        assert [known.id for known in llm.batches.list()] == [batch.id]


def test_where_it_cannot_be_found_again_it_is_not_made_twice(server, monkeypatch):
    broken_create(server, "anthropic", monkeypatch)
    with client(server.url, "anthropic") as llm:
        with llm.budget("1.00") as budget:
            with pytest.raises(LLMConnectionError, match=r"look at batches.list\(\)") as caught:
                llm.batches.submit(QUESTIONS)
            assert caught.value.maybe_billed
            assert budget.uncertain_usd > 0
        assert len(list(llm.batches.list())) == 1


def lines_of(count, size=0):
    for number in range(count):
        message = {"role": "assistant", "content": f"{number}" + "x" * size}
        body = {"choices": [{"index": 0, "message": message}], "model": "m"}
        response = {"status_code": 200, "request_id": "r", "body": body}
        yield json.dumps({"custom_id": str(number), "response": response, "error": None}).encode()


def raw_batch(status="completed", total=3, **more):
    counts = {"total": total, "completed": total, "failed": 0}
    about = {"id": "b1", "object": "batch", "output_file_id": "f1", "request_counts": counts}
    return json.dumps({**about, "status": status, **more}).encode()


def plain(body, length=None, kind=b"application/json"):
    size = len(body) if length is None else length
    return b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\nContent-Length: %d\r\n\r\n%b" % (
        kind,
        size,
        body,
    )


@pytest.fixture
def raw():
    servers = []

    def make(answer):
        servers.append(RawServer(answer))
        return servers[-1]

    yield make
    for server in servers:
        server.close()


def test_a_download_that_breaks_off_is_an_error_and_says_what_came(raw):
    whole = b"\n".join(lines_of(3))

    def answer(connection, number):
        if number == 1:
            connection.sendall(plain(raw_batch()))
        elif number == 2:
            connection.sendall(plain(whole[:-30], len(whole)))
            connection.shutdown(2)
        else:
            connection.sendall(plain(whole))

    with LLM(base_url=raw(answer).url, model="m") as llm:
        batch = llm.batches.poll("b1")
        results = llm.batches.results(batch)
        assert [next(results).key, next(results).key] == ["0", "1"]
        with pytest.raises(LLMConnectionError, match="broke off"):
            next(results)
        assert results.keys == ["0", "1"]
        again = llm.batches.results(batch)
        assert [result.key for result in again] == ["0", "1", "2"]
        assert llm.usage.calls == 3


def test_a_file_that_ends_early_at_a_line_is_no_success(raw):
    """A server that says no length: only the batch's own count tells."""
    two = b"\n".join([*lines_of(2), b""])

    def answer(connection, number):
        if number == 1:
            connection.sendall(plain(raw_batch()))
        else:
            connection.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + two)
            connection.shutdown(2)

    with LLM(base_url=raw(answer).url, model="m") as llm:
        results = llm.batches.results("b1")
        with pytest.raises(LLMConnectionError, match="has 3 results, and only 2 came"):
            list(results)
        assert results.keys == ["0", "1"]


@pytest.mark.parametrize("bad", [b"<html>", b"{}", b"[1]", b'{"custom_id":5,"response":null}'])
def test_a_line_that_is_no_result_is_a_response_error(raw, bad):
    def answer(connection, number):
        first, _, last = lines_of(3)
        body = raw_batch() if number == 1 else b"\n".join([first, bad, last])
        connection.sendall(plain(body))

    with LLM(base_url=raw(answer).url, model="m") as llm:
        results = llm.batches.results("b1")
        assert [next(results).text for _ in range(2)] == ["0", "2"]
        with pytest.raises(LLMResponseError, match="no result of a batch"):
            next(results)


def test_blank_lines_and_a_missing_last_line_end_are_borne_with(raw):
    def answer(connection, number):
        body = raw_batch() if number == 1 else b"\r\n\n" + b"\n\n".join(lines_of(3))
        connection.sendall(plain(body))

    with LLM(base_url=raw(answer).url, model="m") as llm:
        assert [result.text for result in llm.batches.results("b1")] == ["0", "1", "2"]


def test_a_line_without_end_is_refused(raw):
    def answer(connection, number):
        connection.sendall(plain(raw_batch() if number == 1 else b"x" * 200_000))

    with LLM(base_url=raw(answer).url, model="m", max_response_bytes=100_000) as llm:
        with pytest.raises(LLMResponseError, match="max_response_bytes"):
            list(llm.batches.results("b1"))


def test_what_is_no_batch_is_a_response_error(raw):
    answers = [b"[]", b"{}", b"<html>", b'{"id":5,"status":"completed"}']

    def answer(connection, number):
        connection.sendall(plain(answers[number - 1]))

    with LLM(base_url=raw(answer).url, model="m", max_retries=0) as llm:
        for _ in answers:
            with pytest.raises(LLMResponseError):
                llm.batches.poll("b1")


def test_a_large_results_file_is_read_in_flat_memory(raw):
    """15,000 lines, 62 MB: as much as is read at a time, and the keys."""
    block = b"\n".join([*lines_of(15_000, 4000), b""])

    def answer(connection, number):
        body = raw_batch(total=15_000) if number == 1 else block
        connection.sendall(plain(body))

    code = (
        "import resource, sys; from LLM import LLM\n"
        "with LLM(base_url=sys.argv[1], model='m') as llm:\n"
        "    results = llm.batches.results('b1'); next(results)\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "    count = 1 + sum(1 for _ in results)\n"
        "    print(count, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    said = subprocess.run(
        [sys.executable, "-c", code, raw(answer).url],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    count, grown = map(int, said.stdout.split())
    assert count == 15_000
    assert grown * (1 if sys.platform == "darwin" else 1024) < 40_000_000


# Maps through batches.


def mapped(llm, items=QUESTIONS, **how):
    with llm.map(items, via="batch", **how) as results:
        return list(results)


def test_a_map_goes_through_batches_in_order(server, llm):
    server.batches.polls = 2
    results = mapped(llm)
    assert [(r.index, r.text, r.item) for r in results] == [
        (0, "1 + 1 = 2.", QUESTIONS[0]),
        (1, "2 + 2 = 4.", QUESTIONS[1]),
        (2, "3 + 3 = 6.", QUESTIONS[2]),
    ]
    assert llm.usage.calls == 3


def test_a_map_is_divided_under_the_limits_and_by_model(server, llm, monkeypatch):
    found = wire_module.batch_wire(llm._target(None, None))
    monkeypatch.setattr(type(found), "most_requests", 2)
    items = [{"prompt": f"What is {n} + 0?", "model": "other" if n % 2 else None} for n in range(9)]
    items = [{k: v for k, v in item.items() if v} for item in items]
    assert [r.text for r in mapped(llm, items)] == [f"{n} + 0 = {n}." for n in range(9)]
    sizes = [batch.counts.total for batch in llm.batches.list()]
    assert sum(sizes) == 9
    assert max(sizes) == 2


def test_an_item_that_cannot_be_asked_is_a_result_and_the_others_are_asked(server, llm):
    results = mapped(llm, ["What is 1 + 1?", 5, {"prompt": "x", "deadline": 3}])
    assert results[0].success
    assert [isinstance(r.error, LLMConfigError) for r in results[1:]] == [True, True]


def test_equal_keys_end_a_map(server, llm):
    with pytest.raises(LLMConfigError, match="items 0 and 1 have the same key"):
        mapped(llm, [{"key": "a", "prompt": "1"}, {"key": "a", "prompt": "2"}])


def test_a_batch_that_fails_makes_results_with_errors(server):
    server.batches.ending = "failed"
    with client(server.url, "openai") as llm:
        results = mapped(llm)
    assert [r.error.code for r in results] == ["batch_failed"] * 3


@pytest.mark.parametrize(
    "spoiled", [b"<html>\nOne moment\nplease", b"\n".join(lines_of(2))[:-9], b"<html>"]
)
def test_a_page_or_a_cut_file_in_the_place_of_results_loses_no_batch(raw, tmp_path, spoiled):
    asked = []

    def answer(connection, number):
        asked.append(number)
        said = [b'{"id":"f0"}', raw_batch(), raw_batch(), spoiled, raw_batch()]
        whole = b"\n".join(lines_of(3))
        connection.sendall(plain(said[number - 1] if number <= len(said) else whole))

    with LLM(base_url=raw(answer).url, model="m") as llm:
        with pytest.raises(LLMResponseError):
            mapped(llm, ["a", "b", "c"], journal=tmp_path / "j")
        results = mapped(llm, ["a", "b", "c"], journal=tmp_path / "j")
    assert [r.text for r in results] == ["0", "1", "2"]
    assert len(asked) == 6  # nothing was sent anew


def test_a_line_too_many_does_not_keep_a_budget_reserved(raw):
    said = [b'{"id":"f0"}', raw_batch(), raw_batch(), b"\n".join([b"<html>", *lines_of(3)])]

    def answer(connection, number):
        connection.sendall(plain(said[min(number, 4) - 1]))

    with LLM(base_url=raw(answer).url, model="m", price=Price(1, 1)) as llm:
        with llm.budget(usd=1) as budget:
            results = mapped(llm, ["a", "b", "c"], max_tokens=5)
        assert all(r.success for r in results)
        assert budget.reserved_usd == 0


def test_a_line_that_is_no_result_costs_its_own_item_only(raw):
    first, _, last = lines_of(3)
    said = [b'{"id":"f0"}', raw_batch(), raw_batch(), b"\n".join([first, b"<html>", last])]

    def answer(connection, number):
        connection.sendall(plain(said[min(number, 4) - 1]))

    with LLM(base_url=raw(answer).url, model="m") as llm:
        results = mapped(llm, ["a", "b", "c"])
    assert [r.text for r in results] == ["0", "", "2"]
    assert isinstance(results[1].error, LLMResponseError)


def test_a_journal_hands_out_what_is_there_and_asks_only_the_others(server, llm, tmp_path):
    journal = tmp_path / "j"
    first = mapped(llm, journal=journal)
    again = mapped(llm, [*QUESTIONS, "What is 4 + 4?"], journal=journal)
    assert [r.resumed for r in again] == [True, True, True, False]
    assert [r.text for r in again] == [*(r.text for r in first), "4 + 4 = 8."]
    assert [batch.counts.total for batch in llm.batches.list()] == [1, 3]


def test_what_expired_is_asked_again_by_the_next_run(server, llm, tmp_path):
    server.batches.ending, server.batches.answered = "expired", 1
    journal = tmp_path / "j"
    assert [r.success for r in mapped(llm, journal=journal)] == [True, False, False]
    server.batches.ending = "completed"
    assert [r.resumed for r in mapped(llm, journal=journal)] == [True, False, False]


KILLED = """
import os, signal, sys
from LLM import LLM
from LLM.batches import Batches
url, journal, dialect, where = sys.argv[1:]
how = dict(model="gpt-4o-mini")
if dialect == "anthropic":
    how = dict(provider="anthropic", model="claude-sonnet-4-5")

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

if where == "made":
    create = Batches._create
    def killed(*rest):
        create(*rest)
        die()
    Batches._create = killed
elif where == "looked":
    Batches.poll = die
with LLM(base_url=url, api_key="sk-0123456789", max_tokens=50, **how) as llm:
    with llm.map([f"What is {n} + {n}?" for n in (1, 2, 3)], via="batch", journal=journal) as results:
        for result in results:
            die()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
@pytest.mark.parametrize("where", ["made", "looked", "read"])
def test_a_killed_run_finds_its_batch_again_and_pays_nothing_twice(
    server, dialect, tmp_path, where
):
    journal = tmp_path / "j"
    died = subprocess.run(
        [sys.executable, "-c", KILLED, server.url, journal, dialect, where], cwd=ROOT, check=False
    )
    assert died.returncode == -signal.SIGKILL
    with client(server.url, dialect) as llm:
        results = mapped(
            llm, ["What is 1 + 1?", "What is 2 + 2?", "What is 3 + 3?"], journal=journal
        )
        assert [r.text for r in results] == ["1 + 1 = 2.", "2 + 2 = 4.", "3 + 3 = 6."]
        assert len(list(llm.batches.list())) == 1
        assert llm.usage.calls == sum(not r.resumed for r in results)
        # And it is over: a third run asks nothing.
        before = len(server.requests)
        assert all(r.resumed for r in mapped(llm, journal=journal, items=QUESTIONS))
        assert len(server.requests) == before


def test_the_batch_of_another_is_not_taken_for_one_s_own(server, tmp_path, monkeypatch):
    """Anthropic: the batch died with its answer; meanwhile another of the same size was made."""
    journal = tmp_path / "j"
    died = subprocess.run(
        [sys.executable, "-c", KILLED, server.url, journal, "anthropic", "made"],
        cwd=ROOT,
        check=False,
    )
    assert died.returncode != 0
    with client(server.url, "anthropic") as llm:
        other = llm.batches.submit([{"key": f"other-{n}", "prompt": "Hi"} for n in range(3)])
        results = mapped(llm, journal=journal)
        assert [r.text for r in results] == ["1 + 1 = 2.", "2 + 2 = 4.", "3 + 3 = 6."]
        assert len(list(llm.batches.list())) == 2
        assert other.id not in journal.read_text()


def test_leaving_a_map_without_a_journal_cancels_its_batches(server, llm):
    server.batches.polls = 1000
    clock = llm._clock

    def stop(seconds):
        raise KeyboardInterrupt

    clock.sleep = stop
    with pytest.raises(KeyboardInterrupt):
        mapped(llm)
    assert [batch.status for batch in llm.batches.list()] == ["cancelling"]


def test_leaving_a_map_with_a_journal_leaves_its_batches(server, llm, tmp_path):
    server.batches.polls = 1000
    with pytest.raises(LLMTimeoutError):
        mapped(llm, journal=tmp_path / "j", deadline=100)
    assert [batch.status for batch in llm.batches.list()] == ["in_progress"]


def test_a_map_waits_for_a_budget_that_its_own_batches_hold(server, dialect, monkeypatch):
    monkeypatch.setattr(wire_module._OpenAIBatches, "most_requests", 1)
    monkeypatch.setattr(wire_module._AnthropicBatches, "most_requests", 1)
    with client(server.url, dialect) as llm, llm.budget("0.0004") as budget:
        assert [r.success for r in mapped(llm)] == [True, True, True]
        assert budget.reserved_usd == 0


def test_a_budget_too_small_ends_a_map(server, llm):
    with llm.budget("0.00001"), pytest.raises(LLMBudgetError):
        mapped(llm)


def test_a_file_that_breaks_off_in_a_map_is_read_again(server, llm, monkeypatch):
    from LLM.batches import _Download

    lines = _Download.lines
    broken = []

    def once(download):
        for number, line in enumerate(lines(download)):
            if number == 1 and not broken:
                broken.append(True)
                raise LLMConnectionError("cut")
            yield line

    monkeypatch.setattr(_Download, "lines", once)
    assert [r.text for r in mapped(llm)] == ["1 + 1 = 2.", "2 + 2 = 4.", "3 + 3 = 6."]
    assert llm.usage.calls == 3


@pytest.mark.parametrize(
    "changed",
    [
        ["What is 5 + 5?", *QUESTIONS[1:]],
        [QUESTIONS[1], QUESTIONS[0], QUESTIONS[2]],
    ],
)
def test_items_that_change_while_their_batch_is_under_way_are_refused(
    server, llm, tmp_path, changed
):
    server.batches.polls = 3
    journal = tmp_path / "j"
    with pytest.raises(LLMTimeoutError):
        mapped(llm, journal=journal, deadline=1)

    with pytest.raises(JournalError, match=r"item 0 is not what it was when batch .*j was sent"):
        mapped(llm, changed, journal=journal)
    # As they were, nothing is paid twice.
    assert [r.text for r in mapped(llm, journal=journal)] == [
        "1 + 1 = 2.",
        "2 + 2 = 4.",
        "3 + 3 = 6.",
    ]
    assert len(list(llm.batches.list())) == 1


def test_a_place_is_not_taken_for_a_key_of_the_same_name(server, tmp_path):
    server.batches.polls = 3
    items = [
        {"prompt": "What is 1 + 1?", "model": "a"},
        {"key": "0", "prompt": "What is 2 + 2?", "model": "b"},
    ]
    with client(server.url, "openai") as llm:
        with pytest.raises(LLMTimeoutError):
            mapped(llm, items, journal=tmp_path / "j", deadline=1)
        results = mapped(llm, items, journal=tmp_path / "j")

    assert [r.text for r in results] == ["1 + 1 = 2.", "2 + 2 = 4."]


def test_a_result_that_never_comes_is_an_error_after_some_reads(server, llm, monkeypatch):
    from LLM.batches import _Download

    lines = _Download.lines
    reads = []

    def without_the_last(download):
        reads.append(True)
        yield from list(lines(download))[:-1]

    monkeypatch.setattr(_Download, "lines", without_the_last)
    results = mapped(llm)

    (error,) = [r.error for r in results if not r.success]
    assert "has no result for this item" in str(error)
    assert len(results) == 3
    assert len(reads) < 10


def test_what_the_items_raise_comes_after_the_batch_of_those_before(server, llm):
    def items():
        yield from QUESTIONS
        raise ValueError("boom")

    found = []
    with pytest.raises(ValueError, match="boom"), llm.map(items(), via="batch") as results:
        found.extend(result.text for result in results)
    assert found == ["1 + 1 = 2.", "2 + 2 = 4.", "3 + 3 = 6."]


def test_results_of_items_that_were_not_met_are_there_for_the_next_run(server, llm, tmp_path):
    server.batches.polls = 3
    journal = tmp_path / "j"
    with pytest.raises(LLMTimeoutError):
        mapped(llm, journal=journal, deadline=1)

    assert len(mapped(llm, QUESTIONS[:1], journal=journal)) == 1
    assert [r.resumed for r in mapped(llm, journal=journal)] == [True, False, False]
    assert len(list(llm.batches.list())) == 1


@pytest.mark.parametrize(
    "note",
    [
        {"items": [[0, "00"]]},
        {"items": [[0, "00"]], "sending": "t", "file": "f", "at": "zzz", "where": {}},
        {"items": 5, "sending": "t", "file": None, "at": "2026-01-01", "where": {}},
        {"items": [[0, "xx"]], "sending": "t", "file": None, "at": "2026-01-01", "where": {}},
        {"items": [[[], "0"]], "sending": "t", "file": None, "at": "2026-01-01", "where": {}},
        {"items": [], "sending": "t", "file": None, "at": "2026-01-01", "where": [1]},
        {"items": [], "sending": "t", "file": None, "at": "0001-01-01", "where": {}},
        {"batch": "x"},
        {"else": "x"},
        [1],
    ],
)
def test_a_note_that_was_edited_is_a_journal_error(server, llm, tmp_path, note):
    journal = tmp_path / "j"
    mapped(llm, [], journal=journal)
    with journal.open("a") as file:
        file.write(json.dumps({"note": {"batches": note}}, separators=(",", ":")) + "\n")

    with pytest.raises(JournalError, match="j has a damaged line about its batches"):
        mapped(llm, journal=journal)
    assert not list(llm.batches.list())


def test_ctrl_c_twice_leaves_no_journal_locked(server, llm, tmp_path):
    server.batches.polls = 1000
    journal = tmp_path / "j"
    results = llm.map(QUESTIONS, via="batch", ordered=False, journal=journal)
    clock, sleep = llm._clock, llm._clock.sleep

    def stop(seconds):
        raise KeyboardInterrupt

    class Stubborn:
        """The generator of the results, which a second Ctrl-C meets while it is closed."""

        def __init__(self, real):
            self.real = real

        def __next__(self):
            return next(self.real)

        def close(self):
            self.real.close()
            raise KeyboardInterrupt

    results._results._results = Stubborn(results._results._results)
    clock.sleep = stop
    with pytest.raises(KeyboardInterrupt):
        next(results)
    clock.sleep = sleep
    llm.map(QUESTIONS, via="batch", journal=journal).close()


def test_several_threads_share_one_client(server, llm):
    found = []

    def run(number):
        batch = llm.batches.submit([f"What is {number} + {k}?" for k in range(5)])
        found.append(sorted(r.text for r in llm.batches.results(llm.batches.wait(batch))))

    threads = [threading.Thread(target=run, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert llm.usage.calls == 40
