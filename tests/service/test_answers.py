"""Moments in which an answer could be lost, doubled or left hanging; each was once a defect."""

import asyncio
import json
import sqlite3
import subprocess
import sys
import threading
from datetime import timedelta

import pytest
import requests

from agents.service import answers, feed
from agents.service.answers import Threads
from agents.service.problems import Problem
from agents.store import StoreError
from LLM.clock import Clock
from tests.databases import KILL
from tests.service.conftest import events, until
from tests.service.test_nothing_lost import PARTIAL, TOLD, begun


class Jumping(Clock):
    """A clock that a test sets ahead, as if the machine had slept."""

    ahead = 0.0

    def now(self):
        return super().now() + self.ahead

    def utc(self):
        return super().utc() + timedelta(seconds=self.ahead)


def roles(messages):
    return [(m["role"], m["content"], m["status"]) for m in messages]


def test_a_machine_that_slept_goes_on_with_its_answer(serve, held):
    clock = Jumping()
    chat = serve(base_url=held.url, clock=clock, deadline=None, timeout=None)
    name = chat.new()
    response, reading = begun(chat.url, name)
    clock.ahead = 60.0
    watched = chat.service.answers._flush
    seen = threading.Event()
    chat.service.answers._flush = lambda: (watched(), seen.set())
    assert seen.wait(30)  # a whole beat came after the jump
    held.let_go.set()
    assert list(reading)[-1][1]["status"] == "ok"
    response.close()
    assert roles(chat.messages(name)) == [TOLD, ("assistant", "Once upon a time", "ok")]


def test_an_answer_that_was_taken_for_gone_replaces_what_another_stored_of_it(serve, held):
    chat = serve(base_url=held.url)
    name = chat.new()
    response, reading = begun(chat.url, name)
    (answer,) = chat.service.answers._running.values()
    lease = chat.service.leases.stale
    chat.service.leases.beat({answer.token: answer.checkpoint().dump()})
    sql = "UPDATE answering SET beat = 0"
    chat.service.store.run(lambda c: c.exec_driver_sql(sql))
    assert len(lease()) == 1
    chat.service.answers._talks.mend_all()  # as another process does it
    assert roles(chat.messages(name)) == [TOLD, PARTIAL]
    held.let_go.set()
    assert list(reading)[-1][1]["status"] in ("ok", "partial")  # a beat may tell it to stop
    response.close()
    got = roles(chat.messages(name))
    assert got in ([TOLD, ("assistant", "Once upon a time", "ok")], [TOLD, PARTIAL])


@pytest.fixture
def losing(serve, postgres, held):
    """A service whose connection dies with its next write of a message, before or after the commit."""

    def make(*, after, skip=0):
        chat = serve(base_url=held.url, database=postgres.new())
        store, left = chat.service.store, [skip]
        real = store.run

        def run(work, *, write=True):
            inside = store._current().inside.get(threading.get_ident()) is not None

            def lost(connection):
                done = work(connection)
                sql = (
                    "SELECT count(*) FROM pg_locks WHERE pid = pg_backend_pid()"
                    " AND relation = 'messages'::regclass AND mode = 'RowExclusiveLock'"
                )
                if connection.exec_driver_sql(sql).scalar():
                    left[0] -= 1
                    if left[0] == -1:
                        if after:
                            connection.connection.driver_connection.commit()
                        connection.exec_driver_sql(KILL)
                return done

            return real(work if inside or not write else lost, write=write)

        store.run = run
        return chat

    return make


@pytest.mark.parametrize("after", [True, False])
@pytest.mark.parametrize("skip", [0, 1])
@pytest.mark.parametrize("key", [None, "k"])
def test_a_connection_that_is_lost_around_a_write_loses_and_doubles_nothing(
    losing, held, after, skip, key
):
    chat = losing(after=after, skip=skip)
    held.let_go.set()
    name = chat.new()
    said = chat.say(name, "Tell", headers={"idempotency-key": key} if key else {})
    assert said.status_code == 200, said.text
    assert roles(chat.messages(name)) == [TOLD, ("assistant", "Once upon a time", "ok")]
    assert len(held.requests) == 1


def test_who_joins_a_request_that_fails_is_told(chat):
    held, let_go = threading.Event(), threading.Event()

    def failing(*_):
        held.set()
        let_go.wait(60)
        raise StoreError("the store is away", reason="unreachable")

    chat.service.answers._talks.begin = failing
    name, got = chat.new(), []
    url, headers = f"{chat.url}/conversations/{name}/messages", {"idempotency-key": "k"}

    def ask():
        answer = requests.post(url, json={"content": "Hi"}, headers=headers, timeout=60)
        got.append(answer.status_code)

    first, second = threading.Thread(target=ask), threading.Thread(target=ask)
    first.start()
    assert held.wait(30)
    second.start()
    until(lambda: any(a.feed._readers for a in chat.service.answers._running.values()))
    let_go.set()
    first.join(60)
    second.join(60)
    assert got == [503, 503]


class TestBroken:
    """An answer that broke off between a tool and what the model makes of it."""

    @pytest.fixture
    def broken(self, serve, server):
        chat = serve()
        chat.service.llm = chat.service.llm.with_options(max_retries=0)
        server.reply(tool_calls=[{"name": "calculator", "arguments": {"expression": "12 * 12"}}])
        server.reply(status=400)
        chat.name = chat.new()
        headers = {"idempotency-key": "k"}
        assert chat.say(chat.name, "Sum", headers=headers).status_code == 422
        return chat

    def test_the_same_request_goes_on_where_it_broke_off(self, broken, server):
        server.reply("It is 144.")
        again = broken.say(broken.name, "Sum", headers={"idempotency-key": "k"})
        assert again.status_code == 200
        got = [m["role"] for m in again.json()["messages"]]
        assert got == ["user", "assistant", "tool", "assistant"]
        assert broken.messages(broken.name) == again.json()["messages"]
        sent = [m["role"] for m in server.requests[-1].json["messages"]]
        assert sent == ["system", "user", "assistant", "tool"]

    def test_once_the_talk_went_on_it_is_no_whole_answer(self, broken):
        assert broken.ask("POST", f"/conversations/{broken.name}/messages", json={"content": "So?"})
        again = broken.say(broken.name, "Sum", headers={"idempotency-key": "k"})
        assert again.json()["status"] == "partial"


class TestAgain:
    """What is regenerated with an Idempotency-Key."""

    def test_is_done_once(self, chat, server):
        name, headers = chat.new(), {"idempotency-key": "r"}
        chat.say(name, "Hi")
        path = f"/conversations/{name}/regenerate"
        first = chat.ask("POST", path, headers=headers).json()
        asked = len(server.requests)
        second = chat.ask("POST", path, headers=headers).json()
        assert first == second
        assert len(server.requests) == asked

    def test_is_said_to_be_replaced_when_it_is(self, chat):
        name, headers = chat.new(), {"idempotency-key": "r"}
        chat.say(name, "Hi")
        path = f"/conversations/{name}/regenerate"
        chat.ask("POST", path, headers=headers)
        chat.ask("POST", path)
        again = chat.ask("POST", path, headers=headers)
        assert (again.status_code, again.json()["title"]) == (409, "Replaced")

    def test_while_it_is_written_both_get_the_same(self, serve, held):
        chat = serve(base_url=held.url)
        name = chat.new()
        held.let_go.set()
        chat.say(name, "Tell")
        held.let_go.clear()
        headers = {"idempotency-key": "r"}
        with chat.streaming(name, "", path="regenerate", headers=headers) as first:
            reading = events(first)
            next(reading)
            with chat.streaming(name, "", path="regenerate", headers=headers) as second:
                held.let_go.set()
                assert [e for e, _ in events(second)][-1] == "done"
            assert [e for e, _ in reading][-1] == "done"
        assert len(held.requests) == 2

    def test_costs_what_both_answers_cost(self, chat):
        name = chat.new()
        first = chat.say(name, "Hi").json()["cost"]
        second = chat.ask("POST", f"/conversations/{name}/regenerate").json()["cost"]
        shown = chat.ask("GET", f"/conversations/{name}").json()["cost"]
        assert float(shown) == pytest.approx(float(first) + float(second))


def test_an_idempotency_key_of_another_message_is_refused(chat):
    name, headers = chat.new(), {"idempotency-key": "k"}
    assert chat.say(name, "One", headers=headers).status_code == 200
    other = chat.say(name, "Two", headers=headers)
    assert (other.status_code, other.json()["title"]) == (422, "Used before")
    assert len(chat.messages(name)) == 2


KILLED = """
import os, sys, threading
from agents.service import core
from agents.service.settings import Settings
from tests.service.conftest import Running
from agents.service.app import create_app
chat = Running(create_app(Settings(database=sys.argv[1], base_url=sys.argv[2])))
answers = chat.service.answers
name = chat.new()
print(name, flush=True)
keep = answers._talks.keep
def kept(*args, **how):
    done = keep(*args, **how)
    for answer in answers._running.values():  # a beat comes between the commit and its note
        chat.service.leases.beat({answer.token: answer.checkpoint().dump()})
    os._exit(9)
answers._talks.keep = kept
chat.say(name, "What is 12 x 12?")
"""


def test_killed_between_a_write_and_its_note_nothing_is_said_twice(serve, server, tmp_path):
    database = f"sqlite:///{tmp_path}/killed.db"
    server.reply(
        "Let me see.", tool_calls=[{"name": "calculator", "arguments": {"expression": "1"}}]
    )
    ran = subprocess.run(
        [sys.executable, "-c", KILLED, database, server.url],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert ran.returncode == 9, ran.stderr
    with sqlite3.connect(tmp_path / "killed.db") as connection:
        connection.execute("UPDATE answering SET beat = 0")
    connection.close()
    chat = serve(database=database)
    until(lambda: not chat.service.leases.stale())
    got = [(m["role"], m["status"]) for m in chat.messages(ran.stdout.strip())]
    assert got == [("user", "ok"), ("assistant", "ok"), ("tool", "ok")]


def test_what_a_dead_process_left_waits_until_it_can_be_stored(serve, held):
    chat = serve(base_url=held.url)
    name, other = chat.new(), chat.new()
    for number, conversation in enumerate((name, other)):
        chat.service.leases.take(conversation, f"t{number}")
    text = {"text": "Once upon", "name": "answer:t:1", "model": "m", "replacing": None}
    chat.service.leases.beat({"t0": json.dumps(text), "t1": json.dumps(text)})
    chat.service.store.run(lambda c: c.exec_driver_sql("UPDATE answering SET beat = 0"))
    talks = chat.service.answers._talks
    real, failed = talks._mend, []

    def mend(left):
        if not failed:
            failed.append(left)
            raise StoreError("the store is locked", reason="locked")
        real(left)

    talks._mend = mend
    talks.mend_all()
    assert len(chat.service.leases.stale()) == 1  # the one that failed is there still
    talks.mend_all()
    assert roles(chat.messages(name)) == roles(chat.messages(other)) == [PARTIAL]


def test_a_full_disk_is_waited_for(serve, server):
    chat = serve()
    talks, tries = chat.service.answers._talks, []
    real = talks.keep

    def keep(*args, **how):
        tries.append(args)
        if len(tries) < 3:
            raise StoreError("the disk is full", reason="full")
        return real(*args, **how)

    talks.keep = keep
    name = chat.new()
    assert chat.say(name, "Hi").status_code == 200
    assert len(tries) == 3
    assert len(chat.messages(name)) == 2


def test_a_stop_does_not_wait_for_a_database_that_is_away(serve, held, monkeypatch):
    chat = serve(base_url=held.url)
    names = [chat.new() for _ in range(3)]
    responses = [begun(chat.url, name)[0] for name in names]

    def away(*_, **__):
        raise StoreError("the store is away", reason="unreachable")

    chat.service.answers._talks.keep = away
    monkeypatch.setattr(answers, "_STOP_SECONDS", 50.0)
    started = Clock().now()
    chat.service.answers.stop()
    assert Clock().now() - started < 30
    for response in responses:
        response.close()


class TestContent:
    @pytest.mark.parametrize(
        "content",
        [
            '[{"type": "text", "text": "x", "n": 1e999}]',
            '[{"type": "text", "text": "x", "n": NaN}]',
            '[{"a": ' + "[" * 60 + "]" * 60 + "}]",
            '"  \\n "',
        ],
    )
    def test_what_could_never_be_shown_again_is_refused(self, chat, content):
        name = chat.new()
        body = f'{{"content": {content}}}'
        headers = {"content-type": "application/json"}
        got = chat.ask("POST", f"/conversations/{name}/messages", data=body, headers=headers)
        assert got.status_code == 422, got.text
        assert chat.messages(name) == []
        for form in ("openai", "anthropic", "markdown"):
            assert chat.ask("GET", f"/conversations/{name}/export?form={form}").ok

    def test_a_strangers_body_is_not_parsed(self, chat):
        chat.service.keys.create("ada")
        headers = {"content-type": "application/json"}
        for body in ("{bad", "[" * 100_000):
            got = chat.ask("POST", "/conversations", data=body, headers=headers)
            assert got.status_code == 401


def test_an_error_carries_the_id_of_its_request(serve):
    chat = serve(base_url="http://127.0.0.1:9")
    chat.service.llm = chat.service.llm.with_options(max_retries=0)
    said = chat.say(chat.new(), "Hi", headers={"x-request-id": "mine"})
    assert said.json()["request_id"] == "mine"
    assert said.json()["title"] == "The model could not be reached, or broke off"


def test_strangers_do_not_make_the_service_forget_what_a_key_has_used(serve, monkeypatch):
    chat = serve(requests_per_minute=1)
    _, key = chat.service.keys.create("ada")
    assert chat.ask("GET", "/models", key=key).status_code == 200
    for number in range(1100):
        chat.service._remembered(chat.service._strangers, f"failures:{number}", object)
    assert len(chat.service._strangers) == 1000
    assert chat.ask("GET", "/models", key=key).status_code == 429


def test_unknown_cost_is_never_zero(serve):
    chat = serve(input_price=None, output_price=None, model="nobody-knows")
    name = chat.new()
    assert chat.say(name, "Hi").json()["cost"] is None
    usage = chat.ask("GET", "/usage").json()
    assert usage["total"]["cost"] is None
    assert usage["days"][0]["cost"] is None
    assert chat.ask("GET", "/conversations").json()["data"][0]["cost"] is None


def test_a_thread_that_cannot_start_leaves_no_place_taken(monkeypatch):
    threads = Threads(1, Clock())

    def fail(_):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", fail)
        with pytest.raises(RuntimeError):
            threads.start(lambda: None)
    done = threading.Event()
    threads.start(done.set)
    assert done.wait(30)
    threads.join(30)
    threads.check()


def test_not_more_threads_than_allowed():
    threads, let_go = Threads(1, Clock()), threading.Event()
    threads.start(let_go.wait)
    with pytest.raises(Problem, match="under way"):
        threads.start(let_go.wait)
    let_go.set()
    threads.join(30)


class TestFeed:
    def test_a_client_that_does_not_read_is_cut(self, monkeypatch):
        monkeypatch.setattr(feed, "SEND_SECONDS", 0.05)
        abandoned = []

        async def run():
            source = feed.Feed(asyncio.get_running_loop(), lambda: abandoned.append(True))
            response = feed.FeedResponse(source, str.encode)
            source.put("text")

            async def send(message):
                if message["type"] == "http.response.body":
                    await asyncio.sleep(60)

            await asyncio.wait_for(response({}, asyncio.Event().wait, send), 30)

        asyncio.run(run())
        assert abandoned == [True]

    def test_a_long_pause_is_bridged_with_a_comment(self, monkeypatch):
        monkeypatch.setattr(feed, "KEEP_ALIVE", 0.02)
        sent = []

        async def run():
            loop = asyncio.get_running_loop()
            source = feed.Feed(loop, lambda: None)
            response = feed.FeedResponse(source, str.encode)

            async def send(message):
                sent.append(message.get("body"))
                if sent.count(b": keep-alive\n\n") == 1 and b"text" not in sent:
                    source.put("text")
                    source.finish()

            await asyncio.wait_for(response({}, asyncio.Event().wait, send), 30)

        asyncio.run(run())
        assert b": keep-alive\n\n" in sent
        assert sent.index(b": keep-alive\n\n") < sent.index(b"text")
        assert sent[-1] == b""

    def test_nothing_that_was_said_is_missed(self):
        async def collected(reader):
            return [item async for item in reader]

        async def all_of_them():
            loop = asyncio.get_running_loop()
            source = feed.Feed(loop, lambda: None)
            readers = [source.read() for _ in range(3)]

            def say():
                for number in range(20_000):
                    source.put(number)
                source.finish()

            thread = threading.Thread(target=say)
            thread.start()
            got = await asyncio.gather(*map(collected, readers))
            thread.join()
            return got

        assert asyncio.run(all_of_them()) == [list(range(20_000))] * 3


def test_the_body_has_one_deadline_however_it_drips(chat, monkeypatch):
    import socket
    import time

    from agents.service import middleware

    monkeypatch.setattr(middleware, "BODY_SECONDS", 0.4)
    host, port = chat.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), 30) as connection:
        head = f"POST /conversations HTTP/1.1\r\nhost: {host}\r\ncontent-length: 999\r\n\r\n"
        connection.sendall(head.encode())
        connection.settimeout(0.15)
        got, end = b"", time.monotonic() + 30
        while not got and time.monotonic() < end:
            connection.sendall(b" ")
            try:
                got = connection.recv(1000)
            except TimeoutError:
                continue
    assert b" 408 " in got


def test_all_that_is_under_way_can_be_told_to_end(serve, held):
    chat = serve(base_url=held.url)
    response, reading = begun(chat.url, chat.new())
    body = {"model": "gpt-4", "messages": [{"role": "user", "content": "Hi"}], "stream": True}
    other = chat.ask("POST", "/v1/chat/completions", json=body, stream=True)
    lines = other.iter_lines()
    assert b"Once upon" in next(line for line in lines if b"Once" in line)
    chat.service.cancel_all()
    assert list(reading)[-1][1]["status"] == "partial"
    assert b"[DONE]" not in b"".join(lines)
    response.close()
    other.close()
