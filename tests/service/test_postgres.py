"""The service over a real PostgreSQL: the whole API, as over SQLite."""

import threading

import pytest

from tests.service.conftest import events


@pytest.fixture
def chat(serve, postgres):
    return serve(database=postgres.new(), budget_usd="10", conversation_budget_usd="5")


def test_a_talk_from_its_first_word_to_its_end(chat):
    assert chat.service.store.sqlite is False
    _, key = chat.service.keys.create("ada")
    name = chat.new(key=key, title="Sums")
    with chat.streaming(name, "What is 12 x 12?", key=key) as response:
        got = list(events(response))
    assert got[-1][0] == "done"
    assert got[-1][1]["status"] == "ok"
    again = chat.ask("POST", f"/conversations/{name}/regenerate", key=key)
    assert again.json()["status"] == "ok"
    said = chat.say(name, "the ostrich cannot fly", key=key)
    assert said.status_code == 200
    messages = chat.messages(name, key=key)
    assert [m["role"] for m in messages[:4]] == ["user", "assistant", "tool", "assistant"]
    found = chat.ask("GET", "/conversations", key=key, params={"q": "ostrich"}).json()["data"]
    assert [c["id"] for c in found] == [name]
    last = messages[-2]["number"] - 1
    made = chat.ask("POST", f"/conversations/{name}/branch", key=key, json={"at": last}).json()
    assert len(made["messages"]) == 4
    listed = chat.ask("GET", "/conversations", key=key).json()["data"]
    assert {c["id"] for c in listed} == {name, made["id"]}
    usage = chat.ask("GET", "/usage", key=key).json()
    assert usage["total"]["calls"] == 5
    assert usage["budget"]["spent_usd"] == usage["total"]["cost"]
    assert chat.ask("DELETE", f"/conversations/{name}", key=key).status_code == 204
    assert chat.ask("GET", f"/conversations/{made['id']}", key=key).status_code == 200
    assert chat.ask("GET", "/conversations").status_code == 401


def test_many_at_once(chat):
    names, got = [chat.new() for _ in range(12)], []

    def talk(name):
        got.extend(chat.say(name, "Hello").status_code for _ in range(3))

    threads = [threading.Thread(target=talk, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == [200] * 36
    assert all(len(chat.messages(name)) == 6 for name in names)
    assert chat.ask("GET", "/usage").json()["total"]["calls"] == 36
