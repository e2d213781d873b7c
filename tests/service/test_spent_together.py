"""What an answer took is written with its messages; and it counts whatever becomes of them."""

import sqlite3
from contextlib import closing

from tests.service.conftest import events, until


def spent(chat):
    return chat.ask("GET", "/usage").json()["total"]


def test_an_answer_is_not_stored_without_what_it_took(serve, server, tmp_path):
    chat = serve()
    name = chat.new()
    with closing(sqlite3.connect(tmp_path / "chat.db", isolation_level=None)) as database:
        database.execute(
            "CREATE TRIGGER no BEFORE UPDATE ON spending BEGIN SELECT RAISE(ABORT, 'no'); END"
        )
        assert chat.say(name, "Hello").status_code >= 500
        assert [m["role"] for m in chat.messages(name)] == ["user"]
        database.execute("DROP TRIGGER no")
    until(lambda: spent(chat)["calls"] == 1)  # it was paid for all the same
    assert chat.say(name, "Hello again").json()["status"] == "ok"
    assert spent(chat)["calls"] == len(server.requests) == 2


def test_what_a_deleted_conversation_took_counts(serve, held):
    chat = serve(base_url=held.url)
    name = chat.new()
    with chat.streaming(name, "Tell me a story") as response:
        said = events(response)
        assert next(event for event, _ in said if event == "text")
        chat.service.store.conversations.delete(name)
        held.let_go.set()
        assert "error" in [event for event, _ in said]
    found = spent(chat)
    assert (found["calls"], found["prompt_tokens"], found["completion_tokens"]) == (1, 7, 4)
