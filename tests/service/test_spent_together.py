"""What an answer took is written with its messages; and it counts whatever becomes of them."""

import sqlite3
from contextlib import closing
from datetime import date
from decimal import Decimal
from functools import partial

from agents.service.leases import Leases
from agents.service.ledger import Ledger
from agents.service.talks import Checkpoint, Talks
from agents.store import Stored
from agents.types import Message, TokenUsage
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


def test_what_was_cut_before_its_first_word_counts_as_interrupted(serve, server):
    server.latency = 60
    chat = serve()
    name = chat.new()
    with chat.streaming(name, "Hello") as response:
        until(lambda: server.requests)
        assert chat.ask("POST", f"/conversations/{name}/cancel").json()["cancelled"]
        assert "done" in [event for event, _ in events(response)]
    found = spent(chat)
    assert (found["calls"], found["interrupted"]) == (1, 1)


def test_an_answer_that_comes_too_late_for_its_conversation_was_paid_for(store):
    """Its process was taken for gone, what it had was stored as partial, and the talk went on."""
    leases, ledger, cost = Leases(store, stale_after=-1), Ledger(store), Decimal("0.5")
    talks = Talks(store, leases)
    store.conversations.create("c")
    talks.begin("c", "one", Message(role="user", content="Hello"), "user:one")
    leases.beat({"one": Checkpoint("Half an an", "answer:one:1", "m", None).dump()})
    talks.begin("c", "two", Message(role="user", content="And?"), "user:two")
    usage = TokenUsage(prompt_tokens=10, completion_tokens=5, total_tokens=15)
    said = Message(role="assistant", content="Half an answer")
    spend = partial(ledger.record_now, "ann", "m", usage, cost)
    whole = [Stored(said, usage, cost, "m")]
    talks.keep("c", "one", whole, name="answer:one:1", last=True, also=spend)
    assert [row.cost for row in ledger.by_day_and_model("ann", date(2000, 1, 1))] == [cost]
