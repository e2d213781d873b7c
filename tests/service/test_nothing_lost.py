"""Whatever dies or goes away: no message is lost, none is doubled, and what was cut is marked."""

import contextlib
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
from datetime import timedelta

import pytest
import requests

from agents import Store
from LLM.clock import Clock
from tests.fakes import raw_server, stream_head
from tests.service.conftest import events, until

pytestmark = pytest.mark.timeout(180)  # some begin a process

SERVED = re.compile(r"http://127\.0\.0\.1:\d+")


class Later(Clock):
    """A clock that is ahead: leases of processes that are gone are old for it."""

    ahead = timedelta(seconds=60)

    def utc(self):
        return super().utc() + self.ahead


class Sooner(Later):
    """A clock for which such leases are fresh, however long the test takes."""

    ahead = -timedelta(seconds=60)


@contextlib.contextmanager
def process(database, model, *arguments, **variables):
    """`python -m agents serve` in a process of its own; gives it and its address."""
    command = [sys.executable, "-m", "agents", "serve", "--port", "0", "--database", database]
    started = subprocess.Popen(
        [*command, "--base-url", model, *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1", **variables},
    )  # fmt: skip
    reader = threading.Thread(target=started.stdout.read, daemon=True)
    try:
        found, lines = None, []
        while found is None:
            line = started.stdout.readline()
            assert line, "".join(lines)
            lines.append(line)
            found = SERVED.search(line)
        # What it says from now on must not fill the pipe.
        reader.start()
        url = found.group()
        until(lambda: answers(url))
        yield started, url
    finally:
        started.kill()
        started.wait(60)
        if reader.ident is not None:
            reader.join(60)
        started.stdout.close()


def answers(url):
    with contextlib.suppress(requests.ConnectionError):
        return requests.get(url + "/health", timeout=30).ok
    return False


def begun(url, name, content="Tell", **headers):
    """The response of a streamed answer whose first text has come."""
    response = requests.post(
        f"{url}/conversations/{name}/messages",
        json={"content": content},
        headers={"accept": "text/event-stream", **headers},
        stream=True,
        timeout=60,
    )
    reading = events(response)
    for event, _ in reading:
        if event == "text":
            break
    return response, reading


def ask_and_leave(url, path, body, when):
    """Ask for something, and hang up before the answer, once it is time."""
    caller = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
    caller.request("POST", path, json.dumps(body), {"content-type": "application/json"})
    until(when)
    caller.close()


def contents(stored):
    return [(s.message.role, s.message.content, s.status) for s in stored]


TOLD = ("user", "Tell", "ok")
PARTIAL = ("assistant", "Once upon", "partial")


def test_a_client_that_goes_away_stops_the_model_and_leaves_a_marked_partial_answer(serve, held):
    chat = serve(base_url=held.url)
    name = chat.new()
    response, _ = begun(chat.url, name)
    response.close()
    assert held.gone.wait(30), "the model was asked on"
    until(lambda: len(chat.messages(name)) == 2)
    assert [(m["role"], m["content"], m["status"]) for m in chat.messages(name)] == [TOLD, PARTIAL]
    held.let_go.set()
    assert chat.ask("POST", f"/conversations/{name}/regenerate").status_code == 200
    assert [m["content"] for m in chat.messages(name)] == ["Tell", "Once upon a time"]


def test_so_does_one_that_waits_for_the_whole_answer(serve, held):
    chat = serve(base_url=held.url)
    name = chat.new()
    under_way = chat.service.answers._running
    path, body = f"/conversations/{name}/messages", {"content": "Tell"}
    ask_and_leave(chat.url, path, body, lambda: any(a.text for a in list(under_way.values())))
    assert held.gone.wait(30), "the model was asked on"
    until(lambda: len(chat.messages(name)) == 2)
    assert chat.messages(name)[-1]["status"] == "partial"


@pytest.fixture
def silent():
    """A model that takes a question and says nothing; `gone`: its client hung up."""
    asked, gone, let_go = threading.Event(), threading.Event(), threading.Event()

    def think(connection, _):
        connection.sendall(stream_head("connection: close"))
        asked.set()
        try:
            while not let_go.wait(0.02):
                connection.sendall(b": thinking\n\n")
        except OSError:
            gone.set()

    with raw_server(think) as model:
        model.asked, model.gone = asked, gone
        yield model
        let_go.set()


@pytest.mark.parametrize("path", ["own", "openai", "anthropic"])
def test_a_client_that_goes_away_before_the_first_word_stops_the_model_too(serve, silent, path):
    chat = serve(base_url=silent.url, timeout=None, deadline=None)
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 9, "model": "gpt-4"}
    url = {"openai": "/v1/chat/completions", "anthropic": "/v1/messages"}.get(path)
    if url is None:
        url, body = f"/conversations/{chat.new()}/messages", {"content": "Hi"}
    ask_and_leave(chat.url, url, body, silent.asked.is_set)
    assert silent.gone.wait(30), "the model was asked on"


def test_an_answer_can_be_cancelled_before_its_first_word(serve, silent):
    chat = serve(base_url=silent.url, timeout=None, deadline=None)
    name = chat.new()
    with chat.streaming(name, "Tell") as response:
        assert silent.asked.wait(30)
        assert chat.ask("POST", f"/conversations/{name}/cancel").json() == {"cancelled": True}
        assert list(events(response))[-1][1]["status"] == "partial"
    assert silent.gone.wait(30)
    assert [m["content"] for m in chat.messages(name)] == ["Tell"]


def test_a_message_is_stored_before_the_model_is_asked(serve, held):
    chat = serve(base_url=held.url)
    name = chat.new()
    thread = threading.Thread(target=chat.say, args=(name, "Tell"))
    thread.start()
    assert held.asked.acquire(timeout=30)
    assert [m["content"] for m in chat.messages(name)] == ["Tell"]
    held.let_go.set()
    thread.join(60)
    assert len(chat.messages(name)) == 2


def test_a_model_that_is_down_loses_no_message(serve, server):
    chat = serve(base_url="http://127.0.0.1:9")
    chat.service.llm = chat.service.llm.with_options(max_retries=0)
    name = chat.new()
    failed = chat.say(name, "Hello")
    assert (failed.status_code, failed.json()["status"]) == (502, 502)
    assert [m["content"] for m in failed.json()["messages"]] == ["Hello"]
    chat.service.llm = chat.service.llm.with_options(base_url=server.url)
    assert chat.ask("POST", f"/conversations/{name}/regenerate").status_code == 200
    assert [m["role"] for m in chat.messages(name)] == ["user", "assistant"]


def test_a_cut_answer_is_an_error_and_is_kept_marked(serve):
    from tests.fakes import chunk, hang_up, raw_server, stream_head

    def cut(connection, _):
        connection.sendall(stream_head("connection: close") + chunk("Once upon"))
        hang_up(connection)

    with raw_server(cut) as model:
        chat = serve(base_url=model.url)
        name = chat.new()
        with chat.streaming(name, "Tell") as response:
            got = list(events(response))
    assert [event for event, _ in got] == ["message", "text", "turn", "error", "done"]
    assert got[-1][1]["status"] == "error"
    assert got[-2][1]["status"] == 502
    assert [(m["content"], m["status"]) for m in chat.messages(name)][-1] == PARTIAL[1:]


class TestAsked:
    """The same request twice."""

    def test_again_it_is_answered_from_what_is_stored(self, chat, server):
        name = chat.new()
        first = chat.say(name, "What is 12 x 12?", headers={"idempotency-key": "k1"})
        asked = len(server.requests)
        second = chat.say(name, "What is 12 x 12?", headers={"idempotency-key": "k1"})
        assert second.json() == first.json()
        assert len(server.requests) == asked
        assert len(chat.messages(name)) == 4
        chat.say(name, "And now?")
        third = chat.say(name, "What is 12 x 12?", headers={"idempotency-key": "k1"})
        assert third.json() == first.json()

    def test_while_it_is_answered_both_get_the_same(self, serve, held):
        chat = serve(base_url=held.url)
        name = chat.new()
        first, reading = begun(chat.url, name, **{"idempotency-key": "k"})
        second, other = begun(chat.url, name, **{"idempotency-key": "k"})
        first.close()  # the other one still reads, so the model goes on
        held.let_go.set()
        assert [event for event, _ in other] == ["text", "turn", "done"]
        assert len(held.requests) == 1
        assert len(chat.messages(name)) == 2
        second.close()
        del reading

    def test_at_the_same_moment_by_many_it_is_asked_once(self, chat, server):
        name, got = chat.new(), []

        def ask():
            headers = {"idempotency-key": "k"}
            url = f"{chat.url}/conversations/{name}/messages"
            got.append(requests.post(url, json={"content": "Hi"}, headers=headers, timeout=60))

        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert {answer.status_code for answer in got} <= {200, 409}
        assert len(chat.messages(name)) == 2
        assert len(server.requests) == 1

    def test_after_a_failure_it_is_asked_again(self, serve, server):
        chat = serve()
        chat.service.llm = chat.service.llm.with_options(max_retries=0)
        name, headers = chat.new(), {"idempotency-key": "k"}
        server.reply(status=500)
        assert chat.say(name, "Hi", headers=headers).status_code == 502
        assert chat.say(name, "Hi", headers=headers).status_code == 200
        assert [m["role"] for m in chat.messages(name)] == ["user", "assistant"]

    def test_a_conversation_is_made_once(self, chat):
        made = [
            chat.ask("POST", "/conversations", headers={"idempotency-key": "c"}, json={}).json()
            for _ in range(2)
        ]
        assert made[0]["id"] == made[1]["id"]
        assert len(chat.ask("GET", "/conversations").json()["data"]) == 1


def test_two_tabs_on_one_conversation_take_turns(serve, held):
    chat = serve(base_url=held.url)
    name = chat.new()
    _response, reading = begun(chat.url, name)
    other = chat.say(name, "Me too")
    assert (other.status_code, other.json()["title"]) == (409, "Under way")
    assert int(other.headers["retry-after"]) >= 1
    held.let_go.set()
    assert [event for event, _ in reading][-1] == "done"
    assert chat.say(name, "Me too").status_code == 200
    assert [m["content"] for m in chat.messages(name)] == [
        "Tell", "Once upon a time", "Me too", "Once upon a time",
    ]  # fmt: skip


def test_more_answers_than_the_limit_are_refused_before_anything_is_stored(serve, held):
    chat = serve(base_url=held.url, max_answers=1)
    busy, other = chat.new(), chat.new()
    response, _ = begun(chat.url, busy)
    refused = chat.say(other, "Hello")
    assert (refused.status_code, refused.json()["title"]) == (503, "Too busy")
    assert refused.headers["retry-after"]
    assert chat.messages(other) == []
    response.close()


def test_killed_in_mid_answer_it_goes_on_where_it_was(held, server, serve, tmp_path):
    database = f"sqlite:///{tmp_path}/killed.db"
    with process(database, held.url) as (running, url):
        name = requests.post(url + "/conversations", timeout=60).json()["id"]
        response, _ = begun(url, name, **{"idempotency-key": "k"})
        with Store.open(database) as store:
            sql = "SELECT body FROM answering"
            read = lambda c: c.exec_driver_sql(sql).scalar()  # noqa: E731
            until(lambda: "Once upon" in (store.run(read, write=False) or ""))
        running.send_signal(signal.SIGKILL)
        running.wait(60)
        response.close()
    # Its lease is still fresh: who asks now is told to wait, and nothing is doubled.
    soon = serve(database=database, clock=Sooner())
    again = soon.say(name, "Tell", headers={"idempotency-key": "k"})
    assert (again.status_code, again.json()["title"]) == (409, "Under way")
    assert [m["content"] for m in soon.messages(name)] == ["Tell"]
    later = serve(database=database, clock=Later())
    until(lambda: len(later.messages(name)) == 2)
    got = [(m["role"], m["content"], m["status"]) for m in later.messages(name)]
    assert got == [TOLD, PARTIAL]
    again = later.say(name, "Tell", headers={"idempotency-key": "k"})
    assert again.json()["status"] == "partial"
    assert len(later.messages(name)) == 2
    assert server.requests == []


def test_killed_before_the_first_word_the_same_request_is_answered(held, server, serve, tmp_path):
    database = f"sqlite:///{tmp_path}/killed.db"
    with process(database, held.url) as (running, url):
        name = requests.post(url + "/conversations", timeout=60).json()["id"]
        response, _ = begun(url, name, **{"idempotency-key": "k"})
        running.send_signal(signal.SIGKILL)
        running.wait(60)
        response.close()
    with Store.open(database) as store:  # as if no word had been written down yet
        store.run(lambda c: c.exec_driver_sql("UPDATE answering SET body = ''").rowcount)
    later = serve(database=database, clock=Later())
    again = later.say(name, "Tell", headers={"idempotency-key": "k"})
    assert again.status_code == 200, again.text
    assert [m["role"] for m in later.messages(name)] == ["user", "assistant"]
    assert len(server.requests) == 1


def test_a_graceful_stop_waits_for_what_finishes(held, tmp_path):
    database = f"sqlite:///{tmp_path}/stopped.db"
    with process(database, held.url, AGENTS_GRACE="60") as (running, url):
        name = requests.post(url + "/conversations", timeout=60).json()["id"]
        response, reading = begun(url, name)
        running.send_signal(signal.SIGTERM)
        until(lambda: not answers(url))
        held.let_go.set()
        event, told = list(reading)[-1]
        assert (event, told["status"]) == ("done", "ok")
        response.close()
        assert running.wait(60) == 0
    with Store.open(database) as store:
        assert contents(store.conversations.messages(name))[-1][1:] == ("Once upon a time", "ok")


def test_a_database_that_goes_away_in_mid_answer_and_comes_back_loses_nothing(
    serve, held, postgres
):
    chat = serve(base_url=held.url, database=postgres.new())
    name = chat.new()
    response, reading = begun(chat.url, name)
    postgres.crash()
    down = chat.say(name, "Hello")
    assert (down.status_code, down.headers["retry-after"]) == (503, "2"), down.text
    assert chat.ask("GET", "/ready").status_code == 503
    assert chat.ask("GET", "/health").status_code == 200
    held.let_go.set()
    assert next(reading)[0] == "text"
    postgres.start()
    assert [event for event, _ in reading] == ["turn", "done"]
    response.close()
    got = [(m["content"], m["status"]) for m in chat.messages(name)]
    assert got == [("Tell", "ok"), ("Once upon a time", "ok")]
    assert chat.ask("GET", "/ready").status_code == 200
    until(lambda: chat.ask("GET", "/usage").json()["total"]["calls"] == 1, 60)


class TestTwoWorkers:
    """Two processes' services over one PostgreSQL, here in one process."""

    @pytest.fixture
    def pair(self, serve, held, postgres):
        database = postgres.new()
        return [serve(base_url=held.url, database=database) for _ in range(2)]

    def test_one_sees_what_the_other_writes_and_waits_for_it(self, pair, held):
        one, two = pair
        name = one.new()
        response, reading = begun(one.url, name)
        assert two.ask("GET", f"/conversations/{name}").json()["answering"]
        assert two.say(name, "Me too").status_code == 409
        assert two.ask("POST", f"/conversations/{name}/regenerate").status_code == 409
        held.let_go.set()
        assert [event for event, _ in reading][-1] == "done"
        assert two.messages(name) == one.messages(name)
        assert len(one.messages(name)) == 2
        response.close()

    def test_one_stops_what_the_other_writes(self, pair, held):
        one, two = pair
        name = one.new()
        response, reading = begun(one.url, name)
        assert two.ask("POST", f"/conversations/{name}/cancel").json() == {"cancelled": True}
        assert list(reading)[-1][1]["status"] == "partial"
        assert held.gone.wait(30)
        assert two.messages(name)[-1]["status"] == "partial"
        response.close()

    def test_the_same_request_to_both_is_asked_once(self, pair, held):
        one, two = pair
        name = one.new()
        held.let_go.set()
        first = one.say(name, "Tell", headers={"idempotency-key": "k"})
        second = two.say(name, "Tell", headers={"idempotency-key": "k"})
        assert first.json() == second.json()
        assert len(held.requests) == 1


def test_deleting_a_conversation_stops_its_answer(serve, held):
    chat = serve(base_url=held.url)
    name = chat.new()
    response, reading = begun(chat.url, name)
    assert chat.ask("DELETE", f"/conversations/{name}").status_code == 204
    assert held.gone.wait(30)
    assert [event for event, _ in reading][-1] == "done"
    response.close()
    assert chat.ask("GET", f"/conversations/{name}").status_code == 404


def test_a_late_reader_of_a_long_answer_gets_all_of_it(serve, server):
    chat = serve()
    server.reply("word " * 2_000)
    name = chat.new()
    with chat.streaming(name, "Long") as response:
        text = "".join(data["text"] for event, data in events(response) if event == "text")
    assert text == chat.messages(name)[-1]["content"] == "word " * 2_000
