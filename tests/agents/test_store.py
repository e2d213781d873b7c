"""Conversations and runs in SQLite and in a real PostgreSQL: nothing lost, nothing half-written."""

# ruff: noqa: ISC004 - each statement of the old tables begins a line and ends with a comma

import os
import pickle
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from decimal import Decimal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agents.migrations import migrations
from agents.store import ConflictError, RepeatedError, Store, Stored, StoreError
from agents.types import Message, TokenUsage
from LLM import LLMConfigError
from tests.databases import KILL, at_once, child, losing_store
from tests.fakes import FakeClock

posix = pytest.mark.skipif(sys.platform == "win32", reason="POSIX only")


def user(text):
    return Stored(Message(role="user", content=text))


def texts(store, name="c"):
    return [stored.message.text for stored in store.conversations.messages(name)]


@contextmanager
def trouble(reason, *words, retriable=False):
    with pytest.raises(StoreError) as caught:
        yield
    assert caught.value.reason == reason, str(caught.value)
    assert caught.value.retriable is retriable
    text = str(caught.value)
    assert "\n" not in text
    assert all(word in text for word in words), text


def in_fork(work):
    """The exit code of a forked child that does `work`."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


# What is kept


def test_what_was_kept_comes_back_as_it_was(store):
    said = [
        Stored(Message(role="user", content=[{"type": "text", "text": "Hi \0 \ud800 ü 😀"}])),
        Stored(
            Message(
                role="assistant",
                tool_calls=[{"id": "1", "function": {"name": "f", "arguments": '{"a": 1}'}}],
                content_blocks=[{"type": "thinking", "thinking": "…", "signature": None}],
            ),
            TokenUsage(prompt_tokens=3, completion_tokens=4, total_tokens=7),
            Decimal("0.00000000123"),
            "gpt-4",
            "partial",
        ),
    ]
    store.conversations.create("c")
    store.conversations.append("c", said, 0)
    kept = store.conversations.messages("c")
    assert [s.message for s in kept] == [s.message for s in said]
    assert (kept[1].usage, kept[1].cost) == (said[1].usage, said[1].cost)
    assert (kept[1].model, kept[1].status) == ("gpt-4", "partial")
    assert [s.number for s in kept] == [1, 2]
    assert (kept[0].usage, kept[0].cost) == (None, None)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(st.characters(), max_size=50))
def test_every_text_can_be_kept_and_searched(store, text):
    name = store.conversations.create(title=text).id
    store.conversations.append(name, [user(text)], 0)
    assert texts(store, name) == [text]
    store.conversations.search(text)
    store.conversations.list(query=text)


def test_a_conversation_has_its_facts(store):
    made = store.conversations.create("c", title="Trip", owner="alice", data={"a": [1]})
    assert store.conversations.get("c") == made
    assert (made.title, made.owner, made.revision, made.data) == ("Trip", "alice", 0, {"a": [1]})
    assert made.created.utcoffset().total_seconds() == 0
    assert store.conversations.get("d") is None


def test_an_id_is_new_unless_it_is_given(store):
    first, second = store.conversations.create(), store.conversations.create()
    assert first.id != second.id
    with trouble("conflict", first.id):
        store.conversations.create(first.id)


@pytest.mark.parametrize("name", ["", "a\0b", "\ud800", "x" * 501, 5, None])
def test_a_name_that_no_database_takes_is_refused(name):
    with Store.open(":memory:") as store, pytest.raises(LLMConfigError, match="id is"):
        store.conversations.get(name)


def test_what_is_not_json_is_refused():
    with Store.open(":memory:") as store, pytest.raises(LLMConfigError, match="data"):
        store.conversations.create("c", data={"a": object()})


def test_the_title_and_the_data_can_be_changed(store):
    store.conversations.create("c", title="old", data={"a": 1})
    store.conversations.update("c", title="new")
    store.conversations.update("c", data={"b": 2})
    changed = store.conversations.get("c")
    assert (changed.title, changed.data, changed.revision) == ("new", {"b": 2}, 0)


def test_an_append_names_what_has_no_title(store):
    store.conversations.create("c")
    assert store.conversations.append("c", [user("a")], 0, title="first") == 1
    store.conversations.append("c", [], 1, title="second")
    assert store.conversations.get("c").title == "first"


def test_the_last_changed_come_first_page_by_page(url):
    clock = FakeClock()
    with Store.open(url, clock=clock) as store:
        for name in "abcde":
            store.conversations.create(name, owner="x" if name == "c" else "y", title=f"T {name}")
            clock.sleep(0 if name == "b" else 1)  # b and c at the same moment
        pages, last = [], None
        while page := store.conversations.list(limit=2, before=last):
            pages.append([found.id for found in page])
            last = page[-1]
        assert pages == [["e", "d"], ["c", "b"], ["a"]]
        assert [found.id for found in store.conversations.list("x")] == ["c"]
        assert [found.id for found in store.conversations.list(query="t D")] == ["d"]
        assert store.conversations.list(query="%") == []
        store.conversations.append("a", [user("again")], 0)
        assert store.conversations.list(limit=1)[0].id == "a"


def test_a_deleted_conversation_is_gone_with_its_messages(store):
    store.conversations.create("c")
    store.conversations.append("c", [user("needle")], 0)
    assert store.conversations.delete("c")
    assert not store.conversations.delete("c")
    assert store.conversations.search("needle") == []
    for work in (
        lambda: store.conversations.messages("c"),
        lambda: store.conversations.append("c", [], 0),
        lambda: store.conversations.update("c", title="x"),
        lambda: store.conversations.branch("c"),
    ):
        with trouble("missing", "'c'"):
            work()
    store.conversations.create("c")
    assert store.conversations.messages("c") == []


def test_a_branch_begins_with_the_first_messages_and_cost_nothing(store):
    store.conversations.create("c", title="T", owner="o", data={"a": 1})
    answer = Stored(Message(role="assistant", content="b"), TokenUsage(), Decimal(1), "m")
    store.conversations.append("c", [user("a"), answer, user("z")], 0)
    name = store.conversations.branch("c", 2)
    made = store.conversations.get(name)
    assert (made.parent, made.title, made.owner, made.data) == ("c", "T", "o", {"a": 1})
    assert [(s.message.text, s.number) for s in store.conversations.messages(name)] == [
        ("a", 1),
        ("b", 2),
    ]
    kept = store.conversations.messages(name)[1]
    assert (kept.usage, kept.cost, kept.model) == (None, 0, "m")
    store.conversations.append(name, [user("other")], 0)
    assert texts(store) == ["a", "b", "z"]
    store.conversations.delete("c")
    assert texts(store, name) == ["a", "b", "other"]
    assert len(texts(store, store.conversations.branch(name))) == 3


# Search


@pytest.fixture
def library(store):
    for name, owner, said in (
        ("a", "x", "The Quick brown fox"),
        ("b", "y", "a quick répondez, foo@bar.com"),
        ("c", "y", "人工智能 is 50% of it_all"),
    ):
        store.conversations.create(name, owner=owner, title=f"T{name}")
        store.conversations.append(name, [user(said)], 0)
    return store.conversations


@pytest.mark.parametrize(
    "text, found",
    [
        ("quick", "ba"),
        ("QUICK fox", "a"),
        ("fox quick", "a"),
        ("RÉPONDEZ", "b"),
        ("repondez", ""),
        ("bar.com", "b"),
        ("foo@bar.com", "b"),
        ("uic", "ba"),  # inside of words, where no word is found
        ("智能", "c"),
        ("50%", "c"),
        ("it_all", "c"),
        ("i_al", ""),
        ('"', ""),
        ("' OR 1 = 1 --", ""),
        ("fox & | ! ( ) : * NEAR", ""),
        ("  ", ""),
    ],
)
def test_search_finds_words_and_else_parts_of_them(library, text, found):
    assert "".join(hit.conversation for hit in library.search(text)) == found


def test_a_hit_says_where_it_is(library):
    (hit,) = library.search("brown")
    assert (hit.conversation, hit.number, hit.role, hit.title) == ("a", 1, "user", "Ta")
    assert hit.snippet == "The Quick brown fox"


def test_a_snippet_is_the_text_around(store):
    store.conversations.create("c")
    store.conversations.append("c", [user("x " * 500 + "the\nneedle " + "y " * 500)], 0)
    (hit,) = store.conversations.search("needle")
    assert hit.snippet.startswith("…")
    assert hit.snippet.endswith("…")
    assert "the needle y" in hit.snippet
    assert len(hit.snippet) < 150


def test_search_keeps_to_one_owner_or_one_conversation(library):
    assert [hit.conversation for hit in library.search("quick", "x")] == ["a"]
    assert [hit.conversation for hit in library.search("quick", conversation="b")] == ["b"]
    assert len(library.search("quick", limit=1)) == 1


def test_a_very_long_message_can_be_kept_and_found(store):
    store.conversations.create("c")
    words = " ".join(f"w{number}😀" for number in range(300_000))
    store.conversations.append("c", [user(words)], 0)
    assert texts(store) == [words]
    assert len(store.conversations.search("w42")) == 1


# Writers


def test_the_second_writer_of_a_revision_is_told(store):
    store.conversations.create("c")
    assert store.conversations.append("c", [user("first")], 0) == 1
    with trouble("conflict", "revision 1", "here 0"):
        store.conversations.append("c", [user("second")], 0)
    assert texts(store) == ["first"]
    revision, kept = store.conversations.load("c")
    assert (revision, len(kept)) == (1, 1)


# Replacing, and saying once


def numbers(store, name="c"):
    return [stored.number for stored in store.conversations.messages(name)]


def test_what_is_replaced_is_kept_and_shown_no_more(store):
    store.conversations.create("c")
    store.conversations.append("c", [user("one"), user("two needle"), user("three")], 0)
    assert store.conversations.append("c", [user("four")], 1, replacing=2) == 2
    assert texts(store) == ["one", "four"]
    assert numbers(store) == [1, 4]
    assert store.conversations.search("needle") == store.conversations.search("eedl") == []
    branch = store.conversations.branch("c", 3)
    assert texts(store, branch) == ["one"]
    whole = store.conversations.branch("c")
    assert numbers(store, whole) == [1, 4]
    store.conversations.append(whole, [user("five")], 0)
    assert numbers(store, whole) == [1, 4, 5]
    sql = "SELECT count(*) FROM messages WHERE replaced = 1"
    assert store.run(lambda connection: connection.exec_driver_sql(sql).scalar()) == 2


def test_all_can_be_replaced_by_nothing(store):
    store.conversations.create("c")
    store.conversations.append("c", [user("one")], 0)
    assert store.conversations.append("c", [], 1, replacing=1) == 2
    assert texts(store) == []
    store.conversations.append("c", [user("two")], 2)
    assert numbers(store) == [2]


def test_nothing_is_replaced_by_a_writer_that_comes_too_late(store):
    store.conversations.create("c")
    store.conversations.append("c", [user("one")], 0)
    with trouble("conflict", "revision 1"):
        store.conversations.append("c", [user("two")], 0, replacing=1)
    assert texts(store) == ["one"]


def test_what_is_said_twice_with_one_request_key_is_kept_once(store):
    store.conversations.create("c")
    store.conversations.create("d")
    store.conversations.append("c", [user("zero")], 0)
    store.conversations.append("c", [user("one"), user("two")], 1, request="r")
    assert store.conversations.find_request("c", "r") == 2
    assert store.conversations.find_request("c", "s") is None
    for revision in (1, 2):  # also by one that does not know the answer
        with pytest.raises(RepeatedError, match="message 2 of the conversation 'c'") as caught:
            store.conversations.append("c", [user("one")], revision, request="r")
        assert caught.value.number == 2
        assert pickle.loads(pickle.dumps(caught.value)).number == 2
    assert texts(store) == ["zero", "one", "two"]
    assert store.conversations.get("c").revision == 2
    store.conversations.append(
        "d", [user("one")], 0, request="r"
    )  # another conversation's is another


def test_a_replaced_message_keeps_its_request_key_and_a_branch_has_none(store):
    store.conversations.create("c")
    store.conversations.append("c", [user("one")], 0, request="r")
    store.conversations.append("c", [user("two")], 1, replacing=1)
    with pytest.raises(RepeatedError):
        store.conversations.append("c", [user("one")], 2, request="r")
    branch = store.conversations.branch("c")
    assert store.conversations.append(branch, [user("one")], 0, request="r") == 1


@pytest.mark.parametrize("request_key", ["", "a\0b", "x" * 501, "😀" * 151, 5])
def test_a_request_key_that_no_database_takes_is_refused(request_key):
    with Store.open(":memory:") as store, pytest.raises(LLMConfigError, match="request"):
        store.conversations.append("c", [user("a")], 0, request=request_key)


def test_a_request_key_needs_a_message():
    with Store.open(":memory:") as store, pytest.raises(LLMConfigError, match="needs a message"):
        store.conversations.append("c", [], 0, request="r")


def test_the_longest_id_and_request_key_can_be_kept(store):
    name = "".join(chr(0x1F300 + number) for number in range(500))
    key = "".join(chr(0x1F300 + number) for number in range(150))
    store.conversations.create(name)
    store.conversations.append(name, [user("a")], 0, request=key)
    assert store.conversations.find_request(name, key) == 1


def test_an_append_with_a_request_key_to_what_is_not_there_is_told(store):
    with trouble("missing", "'c'"):
        store.conversations.append("c", [user("a")], 0, request="r")


def test_of_threads_with_one_request_key_exactly_one_is_kept(store):
    store.conversations.create("c")

    def write(number):
        while True:
            revision, _ = store.conversations.load("c")
            try:
                store.conversations.append("c", [user(str(number))], revision, request="r")
            except RepeatedError:
                return 0
            except ConflictError:
                continue
            return 1

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(write, range(16))) == 1
    assert len(texts(store)) == 1


REPEATER = """
import sys
from agents.store import ConflictError, Message, RepeatedError, Store, Stored
url, kept = sys.argv[1], 0
with Store.open(url, busy_timeout=30) as store:
    print(flush=True)
    sys.stdin.readline()
    for number in range(20):
        said = [Stored(Message(role="user", content=str(number)))]
        while True:
            revision, _ = store.conversations.load("c")
            try:
                store.conversations.append("c", said, revision, request=str(number))
                kept += 1
            except RepeatedError:
                pass
            except ConflictError:
                continue
            break
print(kept)
"""


def test_of_two_processes_with_the_same_request_keys_each_message_is_kept_once(store, url):
    store.conversations.create("c")
    kept = at_once(REPEATER, [url], [url])
    assert sum(map(int, kept)) == 20
    assert texts(store) == [str(number) for number in range(20)]


WRITER = """
import sys
from agents.store import ConflictError, Message, Store, Stored
url, me, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
with Store.open(url, busy_timeout=30) as store:
    print(flush=True)
    sys.stdin.readline()
    for number in range(count):
        turn = [Stored(Message(role=r, content=f"{me} {number} {r}")) for r in ("user", "assistant")]
        while True:
            revision, _ = store.conversations.load("c")
            try:
                store.conversations.append("c", turn, revision)
                break
            except ConflictError:
                pass
"""


def test_two_processes_that_write_one_conversation_lose_nothing(store, url):
    store.conversations.create("c")
    with child(WRITER, url, "a", 25) as first, child(WRITER, url, "b", 25) as second:
        for process in (first, second):
            process.stdin.write(b"\n")
            process.stdin.flush()
        assert [first.wait(40), second.wait(40)] == [0, 0]
    said = texts(store)
    assert len(said) == 100
    assert store.conversations.get("c").revision == 50
    for one, other in zip(said[::2], said[1::2], strict=True):  # turns stay whole
        assert (one.split()[:2], one.split()[2]) == (other.split()[:2], "user")
    for me in "ab":
        assert [s for s in said if s[0] == me and s.endswith("user")] == [
            f"{me} {number} user" for number in range(25)
        ]


def test_threads_share_a_store(store):
    store.conversations.create("c")

    def write(number):
        while True:
            try:
                revision, _ = store.conversations.load("c")
                return store.conversations.append("c", [user(str(number))], revision)
            except ConflictError:
                time.sleep(0.001)

    with ThreadPoolExecutor(8) as pool:
        assert sorted(pool.map(write, range(40))) == list(range(1, 41))
    assert sorted(map(int, texts(store))) == list(range(40))


def test_two_processes_that_open_a_new_database_at_once_both_can(url):
    open_and_write = """
import sys, uuid
from agents.store import Store
print(flush=True); sys.stdin.readline()
with Store.open(sys.argv[1], busy_timeout=30) as store:
    store.conversations.create()
"""
    with child(open_and_write, url) as first, child(open_and_write, url) as second:
        for process in (first, second):
            process.stdin.write(b"\n")
            process.stdin.flush()
        assert [first.wait(40), second.wait(40)] == [0, 0]
    with Store.open(url) as store:
        assert len(store.conversations.list()) == 2


@posix
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_goes_on_with_a_connection_of_its_own(store):
    store.conversations.create("c")

    def write():
        store.conversations.append("c", [user("child")], 0)
        store.close()

    assert in_fork(write) == 0
    store.conversations.append("c", [user("parent")], 1)
    assert texts(store) == ["child", "parent"]


@posix
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_child_gets_a_copy_of_a_store_in_memory():
    with Store.open(":memory:") as store:
        store.conversations.create("c")

        def write():
            assert store.conversations.append("c", [user("child")], 0) == 1

        assert in_fork(write) == 0
        assert texts(store) == []


@posix
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_fork_in_the_middle_of_sqlites_work_is_refused(tmp_path):
    inside, go = threading.Event(), threading.Event()
    with Store.open(f"sqlite:///{tmp_path}/chat.db") as store:

        def work(_):
            inside.set()
            go.wait(30)

        busy = threading.Thread(target=store.run, args=(work,))
        busy.start()
        inside.wait(30)

        def use():
            with trouble("forked", "fork before"):
                store.conversations.list()

        try:
            assert in_fork(use) == 0
        finally:
            go.set()
            busy.join()
        assert store.conversations.list() == []


# What may go wrong


def test_nothing_is_kept_of_a_transaction_that_fails(store):
    store.conversations.create("c")

    def work(connection):
        connection.exec_driver_sql("UPDATE conversations SET title = 'half'")
        raise KeyError("mine")

    with pytest.raises(KeyError):
        store.run(work)
    assert store.conversations.get("c").title is None


def test_no_error_of_the_database_comes_through(store):
    with trouble("other", store.url):
        store.run(lambda connection: connection.exec_driver_sql("SELECT nonsense"))


SLOW_WRITER = """
import sys
from agents.store import Message, Store, Stored
from tests.fakes import FakeClock
with Store.open(sys.argv[1]) as store:
    revision = 0
    while True:
        turn = [Stored(Message(role=r, content=f"{revision} {r}")) for r in ("user", "assistant")]
        revision = store.conversations.append("c", turn, revision)
        print(revision, flush=True)
"""


@posix
def test_a_killed_writer_leaves_whole_turns(store, url):
    store.conversations.create("c")
    with child(SLOW_WRITER, url) as writer:
        told = 1
        for line in writer.stdout:
            told = int(line)
            if told >= 20:
                break
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        told = int(([told, *writer.stdout.read().split()])[-1])
    said, revision = texts(store), store.conversations.get("c").revision
    assert len(said) == 2 * revision
    assert revision in (told, told + 1)  # what it was told is there, and at most the one under way
    store.conversations.append("c", [user("next")], revision)


def test_a_server_that_dies_in_mid_write_leaves_whole_turns_and_is_found_again(postgres):
    url = postgres.new()
    told, failures = [0], []
    with Store.open(url) as store:
        store.conversations.create("c")

        def write():
            try:
                for revision in range(100_000):
                    turn = [user(f"{revision} user"), user(f"{revision} assistant")]
                    told.append(store.conversations.append("c", turn, revision))
            except StoreError as error:
                failures.append(error)

        writer = threading.Thread(target=write)
        writer.start()
        while len(told) < 20:
            time.sleep(0.005)
        postgres.crash()
        writer.join(30)
        (error,) = failures
        assert (error.reason, error.retriable) == ("unreachable", True)
        with trouble("unreachable", retriable=True):
            store.conversations.get("c")
        postgres.start()
        said, revision = texts(store), store.conversations.get("c").revision
        assert len(said) == 2 * revision
        assert revision in (told[-1], told[-1] + 1)
        assert store.conversations.append("c", [user("next")], revision) == revision + 1


def test_a_lost_connection_is_made_again_without_a_word(postgres):
    url = postgres.new()
    with Store.open(url) as store:
        store.conversations.create("c")
        postgres.crash()
        postgres.start()
        assert store.conversations.append("c", [user("hello")], 0) == 1


@pytest.mark.parametrize("after", [True, False])
def test_a_write_whose_answer_was_lost_is_done_once(postgres, after):
    """The connection dies before, or just after the write; the second time knows which."""
    with losing_store(postgres.new(), after=after) as (store, lost):
        work = store.conversations, store.journal
        assert work[0].create("c").id == "c"
        lost.clear()
        assert work[0].append("c", [user("a"), user("b")], 0, request="r1") == 1
        lost.clear()
        name = work[0].branch("c", 1)
        lost.clear()
        work[1].begin("r", "agent")
        lost.clear()
        work[1].append("r", 1, "answer", {})
        assert texts(store) == ["a", "b"]
        assert texts(store, name) == ["a"]
        assert len(work[1].steps("r")) == 1
        lost.clear()
        _, (kept,) = work[0].keep("c", [user("c")], 1, replacing=2)
        assert kept.number == 3
        assert texts(store) == ["a", "c"]


def test_a_connection_that_is_lost_twice_is_an_error(store, postgres):
    if store.sqlite:
        pytest.skip("SQLite has no connection to lose")
    with trouble("unreachable", retriable=True):
        store.run(lambda connection: connection.exec_driver_sql(KILL))


def test_a_writer_that_holds_the_lock_too_long_is_named(url):
    inside, go = threading.Event(), threading.Event()
    with Store.open(url) as store, Store.open(url, busy_timeout=0.05) as other:
        store.conversations.create("c")

        def hold(connection):
            connection.exec_driver_sql("UPDATE conversations SET title = 'x'")
            inside.set()
            go.wait(30)

        holder = threading.Thread(target=store.run, args=(hold,))
        holder.start()
        inside.wait(30)
        try:
            with trouble("locked", "locked by another", retriable=True):
                other.conversations.append("c", [], 0)
            assert other.conversations.messages("c") == []  # readers do not wait
        finally:
            go.set()
            holder.join()


def test_threads_do_not_wait_for_each_other_for_ever():
    inside, go = threading.Event(), threading.Event()
    with Store.open(":memory:", busy_timeout=0.05) as store:
        holder = threading.Thread(target=store.run, args=(lambda _: (inside.set(), go.wait(30)),))
        holder.start()
        inside.wait(30)
        try:
            with trouble("locked", "other threads", retriable=True):
                store.conversations.list()
        finally:
            go.set()
            holder.join()


def test_a_server_that_is_not_there_is_named_without_the_password():
    with trouble("unreachable", "postgresql://me:***@127.0.0.1:9/db", retriable=True):
        Store.open("postgresql://me:hunter2@127.0.0.1:9/db?password=hunter2")


def test_a_password_is_nowhere_in_an_error(postgres):
    url = postgres.new().replace("postgres@", "nobody_there:hunter2@")
    with pytest.raises(StoreError) as caught:
        Store.open(url)
    assert caught.value.reason == "missing"
    assert "hunter2" not in str(caught.value) + repr(caught.value)
    assert b"hunter2" not in pickle.dumps(caught.value)


def test_a_database_that_is_not_there_is_named(postgres):
    with trouble("missing", "no such database"):
        Store.open(postgres.uri("nowhere"))


def test_a_user_who_may_not_write_is_told(postgres):
    url = postgres.new()
    with Store.open(url) as store:
        store.conversations.create("c")
        database = url.split("/")[3].split("?")[0]
        postgres.execute(f"ALTER DATABASE {database} SET default_transaction_read_only = on")
    try:
        with Store.open(url) as store:
            assert store.conversations.get("c") is not None
            with trouble("read-only", "allow"):
                store.conversations.create("d")
    finally:
        postgres.execute(f"ALTER DATABASE {database} RESET default_transaction_read_only")


def test_a_full_disk_is_named_and_nothing_is_half_written(tmp_path):
    with Store.open(f"sqlite:///{tmp_path}/chat.db") as store:
        store.conversations.create("c")
        store.run(lambda connection: connection.exec_driver_sql("PRAGMA max_page_count = 30"))
        with trouble("full", "make room"):
            store.conversations.append("c", [user("a"), user("b" * 500_000)], 0)
        assert texts(store) == []
        assert store.conversations.get("c").revision == 0


def test_what_is_no_database_is_left_alone(tmp_path):
    path = tmp_path / "letter.txt"
    path.write_text("Dear all, " * 100)
    with trouble("foreign", "letter.txt"):
        Store.open(f"sqlite:///{path}")
    assert path.read_text().startswith("Dear all")


def test_another_programs_database_is_left_alone(url, postgres_or_sqlite):
    postgres_or_sqlite(url, "CREATE TABLE messages (mine INTEGER)")
    with trouble("foreign", "another program"):
        Store.open(url)
    postgres_or_sqlite(url, "DROP TABLE messages")


@pytest.fixture
def postgres_or_sqlite(request):
    """Runs statements in a database, past our own code."""

    def execute(url, *statements):
        if url.startswith("sqlite"):
            with closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as connection:
                for statement in statements:
                    connection.execute(statement)
                connection.commit()
            return
        import psycopg

        with psycopg.connect(url) as connection:
            for statement in statements:
                connection.execute(statement)

    return execute


def test_other_tables_of_a_postgresql_do_not_matter(postgres, postgres_or_sqlite):
    url = postgres.new()
    postgres_or_sqlite(url, "CREATE TABLE invoices (mine INTEGER)")
    with Store.open(url) as store:
        store.conversations.create("c")


@posix
def test_a_file_is_its_owners_alone(tmp_path):
    with Store.open(f"sqlite:///{tmp_path}/chat.db") as store:
        store.conversations.create("c")
        for path in tmp_path.iterdir():
            assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_directory_that_is_not_there_is_named(tmp_path):
    with trouble("missing", "directory"):
        Store.open(f"sqlite:///{tmp_path}/nowhere/chat.db")


def test_a_directory_is_no_file(tmp_path):
    with trouble("read-only", "may be written"):
        Store.open(f"sqlite:///{tmp_path}")


@pytest.mark.parametrize(
    "url",
    ["mysql://u:hunter2@h/d", "chat.db", "", "postgresql+pg8000://u:hunter2@h/d", "://hunter2", 5],
)
def test_a_url_that_cannot_be_used_is_refused_without_its_secrets(url):
    with pytest.raises(LLMConfigError, match=r"sqlite:///chat\.db") as caught:
        Store.open(url)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    "module, url", [("sqlalchemy", ":memory:"), ("psycopg", "postgresql:///x")]
)
def test_without_the_extra_it_says_how_to_get_it(monkeypatch, module, url):
    for name in [name for name in sys.modules if name.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(LLMConfigError, match=r"requests-llm\[store\]"):
        Store.open(url)


def test_importing_the_store_imports_no_database():
    heavy = "{'sqlalchemy', 'psycopg'}"
    code = f"import sys, agents.conversation; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_a_closed_store_opens_again(tmp_path):
    store = Store.open(f"sqlite:///{tmp_path}/chat.db")
    store.conversations.create("c")
    store.close()
    store.close()
    assert store.conversations.get("c") is not None
    assert "chat.db" in repr(store)
    store.close()


# Migrations

VERSION_1 = (
    "CREATE TABLE schema_version (version INTEGER PRIMARY KEY)",
    "INSERT INTO schema_version VALUES (1)",
    "CREATE TABLE conversations (id TEXT PRIMARY KEY, title TEXT, owner TEXT, created TEXT NOT NULL,"
    " updated TEXT NOT NULL, revision BIGINT NOT NULL, parent TEXT, data TEXT NOT NULL, token TEXT NOT NULL)",
    "CREATE INDEX conversations_by_owner ON conversations (owner, updated, id)",
    "CREATE INDEX conversations_by_time ON conversations (updated, id)",
    "CREATE TABLE messages (id {serial}, conversation TEXT NOT NULL REFERENCES conversations (id) ON DELETE"
    " CASCADE, number BIGINT NOT NULL, message TEXT NOT NULL, usage TEXT, cost TEXT, model TEXT, status TEXT"
    " NOT NULL CHECK (status IN ('ok', 'partial')), created TEXT NOT NULL, body TEXT NOT NULL,"
    " UNIQUE (conversation, number))",
    "CREATE TABLE runs (id TEXT PRIMARY KEY, agent TEXT NOT NULL, status TEXT NOT NULL, data TEXT NOT NULL,"
    " created TEXT NOT NULL, updated TEXT NOT NULL, token TEXT NOT NULL)",
    "CREATE INDEX runs_by_status ON runs (status, created, id)",
    "CREATE TABLE steps (run TEXT NOT NULL REFERENCES runs (id) ON DELETE CASCADE, number BIGINT NOT NULL,"
    " kind TEXT NOT NULL, payload TEXT NOT NULL, token TEXT NOT NULL, UNIQUE (run, number))",
    "INSERT INTO conversations VALUES ('c', 'Old', NULL, '2026-01-01T00:00:00.000000+00:00',"
    " '2026-01-01T00:00:00.000000+00:00', 1, NULL, '{}', 't')",
    "INSERT INTO messages (conversation, number, message, cost, status, created, body) VALUES ('c', 1,"
    """ '{"role": "user", "content": "An ancient word"}', NULL, 'ok','2026-01-01T00:00:00.000000+00:00',"""
    " 'An ancient word')",
)
SERIAL = {
    "sqlite": "INTEGER PRIMARY KEY AUTOINCREMENT",
    "postgresql": "BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY",
}


@pytest.fixture
def version_1(url, postgres_or_sqlite):
    """A database as the first version left it."""
    statements = [s.replace("{serial}", SERIAL[url.partition(":")[0]]) for s in VERSION_1]
    if url.startswith("sqlite"):
        statements.insert(0, f"PRAGMA application_id = {0x4C4C4D73}")
    postgres_or_sqlite(url, *statements)
    return url


def test_a_database_of_the_first_version_is_brought_up_to_date(version_1):
    for _ in range(2):
        with Store.open(version_1) as store:
            assert texts(store) == ["An ancient word"]
            assert [hit.conversation for hit in store.conversations.search("ancient")] == ["c"]
    with Store.open(version_1) as store:
        store.conversations.append("c", [user("a new one")], 1)
        assert len(store.conversations.search("new")) == 1


@pytest.fixture
def version_2(url, postgres_or_sqlite):
    """A database as the second version left it, with two messages."""
    dialect = url.partition(":")[0]
    tables = [statement for version in migrations(dialect)[:2] for statement in version]
    mark = [f"PRAGMA application_id = {0x4C4C4D73}"] if dialect == "sqlite" else []
    version = ["CREATE TABLE schema_version (version INTEGER PRIMARY KEY)"]
    version += [f"INSERT INTO schema_version VALUES ({number})" for number in (1, 2)]
    later = VERSION_1[-1].replace("ancient", "later").replace("'c', 1,", "'c', 2,")
    postgres_or_sqlite(url, *mark, *version, *tables, *VERSION_1[-2:], later)
    return url


def test_a_database_of_the_second_version_goes_on(version_2):
    for _ in range(2):
        with Store.open(version_2) as store:
            assert texts(store) == ["An ancient word", "An later word"]
            assert [hit.number for hit in store.conversations.search("word")] == [2, 1]
    with Store.open(version_2) as store:
        store.conversations.append("c", [user("a new word")], 1, replacing=2, request="r")
        assert [hit.number for hit in store.conversations.search("word")] == [3, 1]
        assert store.conversations.find_request("c", "r") == 3
        assert store.conversations.delete("c")


def test_a_migration_that_fails_changes_nothing(version_1, postgres_or_sqlite):
    table = "message_words" if version_1.startswith("sqlite") else "messages_by_words"
    postgres_or_sqlite(version_1, f"CREATE TABLE {table} (mine INTEGER)")
    with trouble("other", "already exists"):
        Store.open(version_1)
    postgres_or_sqlite(version_1, f"DROP TABLE {table}")
    with Store.open(version_1) as store:
        assert texts(store) == ["An ancient word"]


def test_a_database_of_a_newer_version_is_left_alone(url, postgres_or_sqlite):
    with Store.open(url) as store:
        store.conversations.create("c")
    newer = len(migrations("sqlite")) + 1
    postgres_or_sqlite(url, f"INSERT INTO schema_version VALUES ({newer})")
    with trouble("version", "newer version", f"format {newer}"):
        Store.open(url)


# The journal


def test_a_journal_gives_back_what_was_written(store):
    journal = store.journal
    journal.begin("r", "helper", {"prompt": "Hi"})
    journal.append("r", 2, "tool", [1, None, "\0"])
    journal.append("r", 1, "answer", {"text": "ü"})
    assert [(s.number, s.kind, s.payload) for s in journal.steps("r")] == [
        (1, "answer", {"text": "ü"}),
        (2, "tool", [1, None, "\0"]),
    ]
    run = journal.get("r")
    assert (run.agent, run.status, run.data) == ("helper", "running", {"prompt": "Hi"})
    assert run.updated >= run.created
    assert journal.get("s") is None
    assert journal.steps("s") == []


def test_a_step_is_written_once(store):
    store.journal.begin("r", "helper")
    store.journal.append("r", 1, "answer", "first")
    with trouble("conflict", "step 1"):
        store.journal.append("r", 1, "answer", "first")
    with trouble("conflict", "'r'"):
        store.journal.begin("r", "helper")
    assert [step.payload for step in store.journal.steps("r")] == ["first"]


def test_runs_are_listed_by_how_they_stand(store):
    for name in ("a", "b"):
        store.journal.begin(name, "helper")
    store.journal.finish("a", "done")
    assert [run.id for run in store.journal.runs("done")] == ["a"]
    assert [run.id for run in store.journal.runs("running")] == ["b"]
    assert {run.id for run in store.journal.runs()} == {"a", "b"}
    assert len(store.journal.runs(limit=1)) == 1


def test_a_run_that_is_not_there_is_named(store):
    with trouble("missing", "no run 'x'"):
        store.journal.append("x", 1, "answer", {})
    with trouble("missing", "no run 'x'"):
        store.journal.finish("x", "done")


def test_only_one_of_many_threads_writes_a_step(store):
    store.journal.begin("r", "helper")

    def write(number):
        try:
            store.journal.append("r", 1, "answer", number)
        except ConflictError:
            return 0
        return 1

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(write, range(16))) == 1


def test_who_reads_a_file_does_not_wait_for_who_writes(tmp_path):
    with Store.open(f"sqlite:///{tmp_path}/a.db") as store, ThreadPoolExecutor(6) as pool:
        store.conversations.create("a", title="before")

        def work(_):
            store.conversations.update("a", title="after")
            read = [pool.submit(store.conversations.get, "a") for _ in range(6)]
            return [future.result(20).title for future in read]

        assert store.run(work) == ["before"] * 6
        assert store.conversations.get("a").title == "after"
