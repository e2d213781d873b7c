"""Answers remembered: what is the same question, what is dropped, and what no trouble may spoil."""

import gc
import json
import logging
import os
import pickle
import sqlite3
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from contextlib import closing, contextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from LLM import LLM, CancelScope
from LLM.errors import LLMCancelledError, LLMConfigError
from LLM.policies import cache as cache_module
from LLM.policies.cache import CACHE_MODES, CacheStats, ResponseCache, cache_key
from LLM.testing import LocalServer
from tests.fakes import AT_ONCE, FakeClock, work_of

posix = pytest.mark.skipif(sys.platform == "win32", reason="POSIX only")


@pytest.fixture
def clock():
    return FakeClock()


@pytest.fixture(params=["memory", "disk"])
def url(request, tmp_path):
    return ":memory:" if request.param == "memory" else f"sqlite:///{tmp_path}/cache.db"


@pytest.fixture
def file_url(tmp_path):
    return f"sqlite:///{tmp_path}/cache.db"


def random_bytes(number):
    """What does not compress, the same each time."""
    import random

    return random.Random(number).randbytes(1000)


# --- the key ---

CHAT = {
    "model": "gpt-4",
    "messages": [{"role": "user", "content": "Hello!"}],
    "temperature": 0.5,
    "max_tokens": 10,
}


def key(body=CHAT, dialect="openai", base_url="http://127.0.0.1:8000", headers=None):
    return cache_key(
        dialect=dialect, base_url=base_url, headers=headers or {}, body=json.dumps(body).encode()
    )


def test_a_key_is_64_hexadecimal_digits():
    assert len(key()) == 64
    assert set(key()) <= set("0123456789abcdef")


def test_the_order_of_parameters_does_not_matter():
    assert key(dict(reversed(CHAT.items()))) == key()


@pytest.mark.parametrize(
    "extra",
    [
        {"stream": True, "stream_options": {"include_usage": True}},
        {"user": "me"},
        {"metadata": {"user_id": "me"}},
        {"store": True},
        {"service_tier": "flex"},
        {"safety_identifier": "me"},
        {"prompt_cache_key": "k", "prompt_cache_retention": "24h"},
    ],
)
def test_what_does_not_change_the_answer_does_not_matter(extra):
    assert key({**CHAT, **extra}) == key()


@pytest.mark.parametrize(
    "other",
    [
        {**CHAT, "model": "gpt-4o"},
        {**CHAT, "messages": [{"role": "user", "content": "Hello"}]},
        {**CHAT, "messages": [{"role": "system", "content": "Hello!"}]},
        {**CHAT, "temperature": 0.6},
        {**CHAT, "seed": 1},
        {**CHAT, "tools": []},
        {**CHAT, "stop": None},
        {**CHAT, "unheard_of": "x"},
        {**CHAT, "messages": [{"role": "user", "content": "Hello!", "user": "me"}]},
    ],
)
def test_what_can_change_the_answer_does(other):
    assert key(other) != key()


def test_dialect_and_address_matter_but_not_the_last_slash_or_a_login():
    assert key(dialect="anthropic") != key()
    assert key(base_url="http://127.0.0.1:8001") != key()
    assert key(base_url="http://127.0.0.1:8000/v1") != key()
    assert key(base_url="http://127.0.0.1:8000/") == key()
    assert key(base_url="http://me:secret@127.0.0.1:8000") == key()


def test_equal_numbers_are_equal_and_true_is_no_number():
    one, same, true = ({**CHAT, "n": n} for n in (1, 1.0, True))
    assert key(one) == key(same) != key(true)
    assert key({**CHAT, "n": float("inf")}) != key(one)


def test_of_the_headers_only_those_that_choose_a_version_matter():
    credentials = {
        "Authorization": "Bearer a",
        "x-api-key": "b",
        "Idempotency-Key": "c",
        "user-agent": "d",
    }
    assert key(headers=credentials) == key()
    version = {"anthropic-version": "2023-06-01"}
    assert key(headers=version) != key()
    assert key(headers={"Anthropic-Version": "2023-06-01", **credentials}) == key(headers=version)
    assert key(headers={"anthropic-beta": "x"}) != key(headers={"anthropic-beta": "y"})


def test_a_request_without_a_body_has_a_key():
    empty = cache_key(dialect="openai", base_url="http://a", headers={}, body=b"")
    assert empty == key({}, base_url="http://a") != key()


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@given(st.dictionaries(st.text(min_size=1), values, max_size=5), st.randoms())
def test_any_json_in_any_order_has_one_key(body, random):
    items = list(body.items())
    random.shuffle(items)
    assert key(dict(items)) == key(body)
    other = {**body, "one more": 1}
    assert (key(other) == key(body)) == ("one more" in body and other == body)


def test_a_key_is_quick():
    """Some 8 µs; the bound only notices a blunder."""
    assert work_of(key, 100) < 20


# --- what is kept ---


def test_what_was_put_is_found_and_counted(url):
    with ResponseCache(url) as cache:
        assert cache.get("a") is None
        cache.put("a", b"1" * 100)
        cache.put("b", b"")
        assert (cache.get("a"), cache.get("b")) == (b"1" * 100, b"")
        hits, misses, entries, size = cache.stats()
        assert (hits, misses, entries) == (2, 1, 2)
        assert 0 < size <= 100
        cache.put("a", b"2")
        assert cache.get("a") == b"2"
        assert cache.stats().entries == 2
        cache.delete("a")
        cache.delete("a")
        assert cache.get("a") is None
        assert cache.stats().entries == 1
        cache.clear()
        assert cache.stats() == CacheStats(3, 2, 0, 0)
        assert cache.error is None
        cache.check()


def test_a_closed_cache_opens_again(url):
    cache = ResponseCache(url)
    cache.put("a", b"1")
    cache.close()
    cache.close()
    assert cache.get("a") == (None if url == ":memory:" else b"1")
    cache.put("a", b"2")
    assert cache.get("a") == b"2"
    cache.close()


def test_a_repr_says_what_it_is():
    assert repr(ResponseCache(ttl=60)) == "ResponseCache(':memory:', ttl=60, max_bytes=268435456)"


def test_the_modes_of_a_call():
    assert CACHE_MODES == ("on", "read", "refresh", "off")


@pytest.mark.parametrize(
    "settings",
    [
        {"ttl": 0}, {"ttl": -1}, {"ttl": float("nan")}, {"ttl": "60"}, {"ttl": True},
        {"max_bytes": 0}, {"max_bytes": -1}, {"max_bytes": 1.5}, {"max_bytes": "1MB"},
    ],
)  # fmt: skip
def test_a_setting_that_makes_no_sense_is_refused_with_its_name_and_unit(settings):
    (name,) = settings
    with pytest.raises(LLMConfigError, match=f"{name} of the cache .*(seconds|bytes)"):
        ResponseCache(**settings)


def test_an_address_that_is_none_is_refused():
    with pytest.raises(LLMConfigError, match=r"sqlite:///relative\.db"):
        ResponseCache("cache.db")
    with pytest.raises(LLMConfigError, match=r"^'sqlite:///' names no file: use 'sqlite:"):
        ResponseCache("sqlite:///")


def test_too_old_is_as_if_it_were_not_there(url, clock):
    with ResponseCache(url, ttl=60, clock=clock) as cache:
        cache.put("a", b"1")
        clock.sleep(59)
        assert cache.get("a") == b"1"
        assert cache.flight("a", until=None).waited
        clock.sleep(1)
        assert not cache.flight("a", until=None).waited
        assert cache.get("a") is None
        cache.put("a", b"2")
        assert cache.get("a") == b"2"


def test_without_a_ttl_nothing_is_too_old(url, clock):
    with ResponseCache(url, ttl=None, clock=clock) as cache:
        cache.put("a", b"1")
        clock.sleep(1e9)
        assert cache.get("a") == b"1"


def test_a_ttl_on_disk_holds_over_processes_and_refuses_what_comes_from_the_future(file_url, clock):
    with ResponseCache(file_url, clock=clock) as cache:
        cache.put("a", b"1")
    for then, found in ((59, b"1"), (61, None), (-61, None)):
        later = FakeClock()
        later.time = clock.time + then
        with ResponseCache(file_url, ttl=60, clock=later) as cache:
            assert cache.get("a") == found


def test_what_is_too_old_on_disk_makes_room(file_url, clock):
    with ResponseCache(file_url, ttl=60, max_bytes=None, clock=clock) as cache:
        cache.put("a", b"1")
        clock.sleep(61)
        cache.put("b", b"1")
        assert cache.stats().entries == 1


def test_the_least_recently_used_goes_first(url, clock):
    with ResponseCache(url, max_bytes=3500, clock=clock) as cache:
        for number in range(3):
            cache.put(f"k{number}", random_bytes(number))
            clock.sleep(100)
        assert cache.get("k0") is not None
        clock.sleep(100)
        cache.put("k3", random_bytes(3))
        assert [cache.get(f"k{number}") is not None for number in range(4)] == [
            True,
            False,
            True,
            True,
        ]
        assert cache.stats().bytes <= 3500


def test_several_go_for_one_that_is_large(url, clock):
    with ResponseCache(url, max_bytes=3500, clock=clock) as cache:
        for number in range(3):
            cache.put(f"k{number}", random_bytes(number))
        cache.put("large", random_bytes(8) + random_bytes(9))
        assert cache.stats().entries == 2
        assert cache.get("k2") is not None


def test_what_is_larger_than_the_cache_is_not_stored_and_replaces_what_it_supersedes(url):
    with ResponseCache(url, max_bytes=1500) as cache:
        cache.put("b", b"1")
        cache.put("a", b"1")
        cache.put("a", random_bytes(1) + random_bytes(2))
        assert cache.get("a") is None
        assert cache.get("b") == b"1"


@given(
    st.lists(
        st.tuples(st.sampled_from("abcdef"), st.integers(-1, 40)),
        max_size=60,
    ),
    st.integers(1, 100),
)
def test_memory_is_exact_to_the_byte(steps, limit):
    """Beside the plainest model of it: -1 looks, anything else puts so many bytes."""
    cache = ResponseCache(max_bytes=limit)
    model = OrderedDict()
    for name, size in steps:
        if size < 0:
            value = cache.get(name)
            assert (None if value is None else len(value)) == model.get(name)
            if name in model:
                model.move_to_end(name)
            continue
        cache.put(name, b"x" * size)
        model.pop(name, None)
        if size <= limit:
            model[name] = size
            while sum(model.values()) > limit:
                model.popitem(last=False)
        assert cache.stats()[2:] == (len(model), sum(model.values()))


@settings(max_examples=25)
@given(
    st.lists(st.tuples(st.sampled_from(["put", "delete", "sleep"]), st.integers(0, 5)), max_size=30)
)
def test_the_totals_on_disk_are_those_of_the_entries(steps):
    import tempfile

    clock = FakeClock()
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/cache.db"
        with ResponseCache(f"sqlite:///{path}", ttl=300, max_bytes=2500, clock=clock) as cache:
            for step, number in steps:
                if step == "put":
                    cache.put(str(number), random_bytes(number)[: 200 * (number + 1)])
                elif step == "delete":
                    cache.delete(str(number))
                else:
                    clock.sleep(50 * number)
                    cache.get(str(number))
            _, _, entries, size = cache.stats()
        with closing(sqlite3.connect(path)) as file:
            query = "SELECT count(*), total(size), total(length(value)) FROM entries"
            assert file.execute(query).fetchone() == (entries, size, size)
        assert size <= 2500


def test_hits_write_at_most_once_a_minute_and_are_noted_at_the_end(file_url, clock, tmp_path):
    def used():
        with closing(sqlite3.connect(tmp_path / "cache.db")) as file:
            return dict(file.execute("SELECT key, used - 1000 FROM entries"))

    with ResponseCache(file_url, clock=clock) as cache:
        cache.put("a", b"1")
        cache.put("b", b"1")
        clock.sleep(59)
        cache.get("a")
        assert used() == {"a": 0, "b": 0}
        clock.sleep(11)
        cache.get("a")
        assert used() == {"a": 70, "b": 0}
        cache.get("b")
        assert used() == {"a": 70, "b": 0}
        cache.put("c", b"1")
        assert used() == {"a": 70, "b": 70, "c": 70}
        clock.sleep(61)
        cache.get("a")
        cache.get("b")
    assert used() == {"a": 131, "b": 131, "c": 70}


def test_counts_are_exact_under_threads(url):
    with ResponseCache(url) as cache:
        cache.put("a", b"1")

        def look():
            for _ in range(50):
                cache.get("a")
                cache.get("b")

        in_threads(8, look)
        assert cache.stats()[:2] == (400, 400)
        assert cache.error is None


def test_no_pickle_is_anywhere(file_url, tmp_path):
    """What another could have written into the file is only ever bytes."""
    assert "pickle" not in vars(cache_module)
    with ResponseCache(file_url) as cache:
        cache.put("a", b'{"a": 1}')
    with closing(sqlite3.connect(tmp_path / "cache.db")) as file:
        file.execute("UPDATE entries SET value = ?", (pickle.dumps(os.getcwd),))
        file.commit()
    with ResponseCache(file_url) as cache:
        assert cache.get("a") is None


# --- copies, forks, processes ---


def test_a_pickled_cache_uses_the_same_file_and_one_in_memory_begins_empty(
    url, monkeypatch, tmp_path
):
    with ResponseCache(url, ttl=60, max_bytes=9999) as cache:
        cache.put("a", b"1")
        with pickle.loads(pickle.dumps(cache)) as copy:
            assert repr(copy) == repr(cache)
            assert copy.get("a") == (None if url == ":memory:" else b"1")
            assert copy.stats()[:2] == ((0, 1) if url == ":memory:" else (1, 0))
            assert copy.flight("a", until=None).leader


def test_a_pickled_cache_finds_a_relative_file_from_elsewhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with ResponseCache("sqlite:///cache.db") as cache:
        cache.put("a", b"1")
    text = pickle.dumps(cache)
    monkeypatch.chdir("/")
    with pickle.loads(text) as copy:
        assert copy.get("a") == b"1"


def in_fork(work):
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@posix
def test_a_forked_child_goes_on_with_its_own(url):
    with ResponseCache(url) as cache:
        cache.put("a", b"1")
        flight = cache.flight("b", until=None)

        def work():
            assert cache.get("a") == b"1"
            flight.done()  # the parent's, not ours
            with cache.flight("b", until=None) as own:
                assert own.leader
                cache.put("b", b"2")

        assert in_fork(work) == 0
        assert cache.get("b") == (None if url == ":memory:" else b"2")
        assert under_way(cache) == {"b"}
        flight.done()


@posix
def test_a_fork_while_another_thread_changes_it_leaves_no_lock_behind(url):
    cache = ResponseCache(url)
    cache.put("a", b"1")
    locks = [cache._lock, cache._tower._lock]
    locks.append(cache._store._lock if url == ":memory:" else cache._store.database._lock)
    for lock in locks:
        lock.acquire()

    def work():
        assert cache.get("a") is None  # unknown what it holds: nothing
        cache.put("a", b"2")
        assert cache.get("a") == (b"2" if url == ":memory:" else None)
        assert cache.flight("a", until=None).leader
        assert cache.stats().misses

    assert in_fork(work) == 0
    for lock in locks:
        lock.release()
    cache.close()


WORKER = """
import sys
from LLM.policies.cache import ResponseCache
url, who, other, count = sys.argv[1:]
with ResponseCache(url) as cache:
    print("ready", flush=True)
    sys.stdin.readline()
    for number in range(int(count)):
        cache.put(f"{who}-{number}", f"{who} {number} ".encode() * 50)
        found = cache.get(f"{other}-{number}")
        assert found in (None, f"{other} {number} ".encode() * 50), found
        print(number, flush=True)
    assert cache.error is None, cache.error
"""


@contextmanager
def worker(*args):
    command = [sys.executable, "-c", WORKER, *map(str, args)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe) as process:
        try:
            assert process.stdout.readline() == b"ready\n"
            yield process
        finally:
            process.kill()


def test_two_processes_share_a_file(file_url):
    with worker(file_url, "a", "b", 150) as one, worker(file_url, "b", "a", 150) as two:
        for process in (one, two):
            process.stdin.write(b"\n")
            process.stdin.flush()
        for process in (one, two):
            assert process.stderr.read() == b""
            assert process.wait(30) == 0
    with ResponseCache(file_url) as cache:
        assert cache.stats().entries == 300
        assert cache.get("b-149") == b"b 149 " * 50


def test_a_killed_writer_leaves_a_usable_file(file_url):
    with worker(file_url, "a", "b", 10**6) as process:
        process.stdin.write(b"\n")
        process.stdin.flush()
        for _ in range(30):
            last = process.stdout.readline()
        process.kill()
        process.wait()
    with ResponseCache(file_url) as cache:
        cache.check()
        assert cache.get(f"a-{int(last)}") == f"a {int(last)} ".encode() * 50
        cache.put("after", b"1")
        assert cache.get("after") == b"1"


# --- trouble ---


@contextmanager
def broken(caplog, *words):
    """Nothing is raised, one line is logged, and the trouble can be asked for."""
    caplog.clear()
    with caplog.at_level(logging.INFO, "LLM"):
        yield
    (record,) = caplog.records
    assert (record.levelname, record.name) == ("ERROR", "LLM")
    text = record.getMessage()
    assert "\n" not in text
    assert all(word in text for word in ("the cache '", "calls go on without it", *words)), text


def use_in_vain(cache):
    for _ in range(3):
        assert cache.get("a") is None
        cache.put("a", b"1")
        cache.delete("a")
    with cache.flight("a", until=None) as flight:
        assert flight.leader
    assert cache.stats()[2:] == (0, 0)
    cache.clear()
    assert isinstance(cache.error, LLMConfigError)
    with pytest.raises(LLMConfigError, match="the cache '"):
        cache.check()
    cache.close()


def foreign(path):
    with closing(sqlite3.connect(path)) as theirs:
        theirs.execute("CREATE TABLE theirs (x)")


def no_database(path):
    path.write_text("dear diary\n" * 1000)


def directory(path):
    path.mkdir()


@pytest.mark.parametrize(
    "spoil, words",
    [(foreign, "another program"), (no_database, "not a SQLite"), (directory, "a file")],
)
def test_a_file_that_is_not_ours_is_left_alone_and_the_call_goes_on(
    file_url, tmp_path, caplog, spoil, words
):
    path = tmp_path / "cache.db"
    spoil(path)
    before = path.read_bytes() if path.is_file() else None
    with broken(caplog, words):
        use_in_vain(ResponseCache(file_url))
    assert before == (path.read_bytes() if path.is_file() else None)


def test_a_missing_directory_is_logged_once(tmp_path, caplog):
    with broken(caplog, "create"):
        use_in_vain(ResponseCache(f"sqlite:///{tmp_path}/no/cache.db"))


def test_a_corrupt_file_is_logged_once(file_url, tmp_path, caplog):
    with ResponseCache(file_url) as cache:
        for number in range(100):
            cache.put(f"k{number}", random_bytes(number))
    with (tmp_path / "cache.db").open("r+b") as file:
        file.seek(4096)
        file.write(b"\xa5" * 50_000)
    with broken(caplog, "corrupt", "delete it"):
        use_in_vain(ResponseCache(file_url))


def test_damaged_bytes_of_a_value_are_never_handed_over(file_url, tmp_path):
    value = random_bytes(1)
    with ResponseCache(file_url) as cache:
        cache.put("a", value)
    path = tmp_path / "cache.db"
    text = path.read_bytes()
    assert value[400:420] in text
    path.write_bytes(text.replace(value[400:420], bytes(20)))
    with ResponseCache(file_url) as cache:
        assert cache.get("a") is None
        cache.put("a", value)
        assert cache.get("a") == value


READ_ONLY = """
import os, sqlite3, sys
from LLM.policies.cache import ResponseCache
if os.getuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)  # to root, nothing is read-only
cache = ResponseCache(f"sqlite:///{sys.argv[1]}")
cache.put("a", b"1")
assert cache.get("a") is None
print(cache.error)
"""


@posix
def test_a_read_only_directory_spoils_no_call(tmp_path_factory):
    folder = tmp_path_factory.mktemp("open")
    for parent in (folder, *folder.parents[:-1]):
        if parent.stat().st_uid == os.getuid():
            parent.chmod(parent.stat().st_mode | 0o055)
    folder.chmod(0o555)
    path = folder / "cache.db"
    command = [sys.executable, "-c", READ_ONLY, path]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    folder.chmod(0o755)
    assert done.stdout.startswith(f"the cache '{path}'")
    assert "allow writing" in done.stdout


def limit_pages(cache, count):
    cache._store.database.run(lambda c: c.execute(f"PRAGMA max_page_count = {count}"), write=False)


def test_a_full_disk_can_still_be_read(file_url, clock, caplog):
    with ResponseCache(file_url, clock=clock) as cache:
        cache.put("a", b"1")
        limit_pages(cache, 7)
        with broken(caplog, "full", "make room"):
            for number in range(20):
                cache.put(f"k{number}", random_bytes(number) * 50)
        assert cache.get("a") == b"1"
        assert cache.error is not None
        clock.sleep(11)
        cache.put("b", b"2")  # there is room again
        assert cache.get("b") == b"2"
        assert cache.error is None


def test_a_locked_file_delays_one_call_and_is_tried_again_later(file_url, clock, caplog, tmp_path):
    with ResponseCache(file_url, clock=clock) as cache:
        cache.put("a", b"1")
        with closing(sqlite3.connect(tmp_path / "cache.db", isolation_level=None)) as other:
            other.execute("BEGIN EXCLUSIVE")
            start = time.monotonic()
            with broken(caplog, "locked"):
                for _ in range(60):
                    cache.put("b", b"2")
                    assert cache.get("a") == b"1"
            assert time.monotonic() - start < AT_ONCE  # sixty delays take 30 s
        cache.put("b", b"2")
        assert cache.get("b") is None  # left alone for ten seconds
        clock.sleep(11)
        cache.put("b", b"2")
        assert cache.get("b") == b"2"
        assert cache.error is None
        cache.check()


def test_trouble_that_comes_back_is_known_but_not_logged_again(file_url, clock, caplog, tmp_path):
    (tmp_path / "cache.db").mkdir()
    cache = ResponseCache(file_url, clock=clock)
    with broken(caplog, "a file"):
        for _ in range(3):
            cache.get("a")
            clock.sleep(11)
    (tmp_path / "cache.db").rmdir()
    assert cache.get("a") is None
    assert cache.error is None
    cache.close()
    for path in tmp_path.iterdir():
        path.unlink()
    (tmp_path / "cache.db").mkdir()
    caplog.clear()
    assert cache.get("a") is None
    assert cache.error is not None
    assert caplog.records == []


def test_a_deleted_file_is_made_anew(file_url, tmp_path):
    with ResponseCache(file_url) as cache:
        cache.put("a", b"1")
        (tmp_path / "cache.db").unlink()
        assert cache.get("a") is None
        cache.put("a", b"2")
        with ResponseCache(file_url) as other:
            assert other.get("a") == b"2"


# --- flights ---


def under_way(cache):
    return set(cache._tower.seats)


def in_threads(count, work):
    """Run `work` in so many threads; their failures are ours."""
    failures = []

    def guarded():
        try:
            work()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert failures == []
    assert not any(thread.is_alive() for thread in threads)


def wait_for(condition):
    give_up = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.001)


def waiting(cache, key="a"):
    seat = cache._tower.seats.get(key)
    return 0 if seat is None else len(seat.waiters)


class Follower:
    """A thread that asks for a flight, and leads it, if it gets to, until told."""

    def __init__(self, cache, key="a", until=None, lead=True):
        self.flight = None
        self.land = threading.Event()

        def work():
            with cache.flight(key, until=until) as self.flight:
                self.found = cache.get(key)
                if self.flight.leader and lead:
                    self.land.wait(30)

        self.thread = threading.Thread(target=work, daemon=True)
        self.thread.start()

    def join(self):
        self.land.set()
        self.thread.join(30)
        assert not self.thread.is_alive()


def test_when_the_leader_is_cancelled_the_one_that_waited_longest_leads(url):
    with ResponseCache(url) as cache:
        with CancelScope() as scope:
            leader = cache.flight("a", until=None)
        followers = []
        for number in range(3):
            followers.append(Follower(cache))
            wait_for(lambda number=number: waiting(cache) == number + 1)
        scope.cancel()
        leader.done()
        wait_for(lambda: followers[0].flight is not None)
        assert (followers[0].flight.leader, followers[0].flight.waited) == (True, True)
        time.sleep(0.01)
        assert waiting(cache) == 2
        cache.put("a", b"1")
        for follower in followers:
            follower.join()
        assert [follower.found for follower in followers] == [None, b"1", b"1"]
        assert under_way(cache) == set()


def test_a_cancelled_leader_costs_one_more_call_and_not_one_for_each():
    replies = [{"text": "late", "delay": 60}, "x"]
    with LocalServer(replies) as server, LLM(base_url=server.url, cache=":memory:") as llm:
        scope = CancelScope()
        cancelled = []
        texts = []

        def lead():
            with scope:
                try:
                    llm.chat_completion([{"role": "user", "content": "x"}])
                except LLMCancelledError as error:
                    cancelled.append(error)

        def follow():
            texts.append(llm.chat_completion([{"role": "user", "content": "x"}]).text)

        cache = llm._policies["cache"]
        threads = [threading.Thread(target=lead)]
        threads[0].start()
        wait_for(lambda: server.requests)
        threads += [threading.Thread(target=follow) for _ in range(5)]
        for thread in threads[1:]:
            thread.start()
        wait_for(lambda: [len(seat.waiters) for seat in list(cache._tower.seats.values())] == [5])
        scope.cancel()
        for thread in threads:
            thread.join(30)
        assert len(cancelled) == 1
        assert len(texts) == 5
        assert len(server.requests) == 2


def test_the_first_leads_at_once_and_nothing_is_left(url):
    with ResponseCache(url) as cache:
        with cache.flight("a", until=None) as flight:
            assert (flight.leader, flight.alone, flight.waited) == (True, False, False)
            assert under_way(cache) == {"a"}
        assert under_way(cache) == set()
        flight.done()


def test_32_threads_make_one_call(url):
    with ResponseCache(url) as cache:
        calls = []
        gate = threading.Barrier(32)

        def ask():
            gate.wait(30)
            if cache.get("a") is not None:
                return
            with cache.flight("a", until=None) as flight:
                if flight.waited and cache.get("a") is not None:
                    return
                calls.append(flight.leader)
                time.sleep(0.005)
                cache.put("a", b"1")

        in_threads(32, ask)
        assert calls == [True]
        assert under_way(cache) == set()


def test_who_waited_for_an_answer_and_got_it_did_not_miss(url):
    """200 calls for 20 answers, ten at once for each: 20 misses and 180 hits, however they meet."""
    with ResponseCache(url) as cache:
        gate = threading.Barrier(10)

        def ask():
            for number in range(20):
                key = str(number)
                gate.wait(30)
                if cache.get(key) is not None:
                    continue
                with cache.flight(key, until=None) as flight:
                    if flight.waited and cache.get(key) is not None:
                        continue
                    time.sleep(0.002)
                    cache.put(key, b"1")

        in_threads(10, ask)
        assert cache.stats()[:2] == (180, 20)


def test_who_waited_in_vain_missed_once():
    cache = ResponseCache()
    leader = cache.flight("a", until=None)

    def ask():
        assert cache.get("a") is None
        with cache.flight("a", until=None) as flight:
            assert flight.waited
            assert cache.get("a") is None

    thread = threading.Thread(target=ask)
    thread.start()
    wait_for(lambda: waiting(cache) == 1)
    leader.done()
    thread.join(30)
    assert cache.stats()[:2] == (0, 1)


def test_a_wait_takes_back_no_miss_but_its_own():
    cache = ResponseCache()
    assert cache.get("b") is None
    cache.put("a", b"1")
    for _ in range(2):
        with cache.flight("a", until=None) as flight:
            assert flight.waited
    assert cache.stats()[:2] == (0, 1)


def test_an_answer_that_came_between_look_and_flight_is_noticed(url):
    with ResponseCache(url) as cache:
        assert cache.get("a") is None
        cache.put("a", b"1")  # by another thread
        with cache.flight("a", until=None) as flight:
            assert flight.waited


def test_when_the_leader_brings_nothing_all_who_waited_go_on_at_once():
    """One after the other they would wait for a failing host as often as they are."""
    cache = ResponseCache()
    leader = cache.flight("a", until=None)
    first, second = Follower(cache), Follower(cache)
    wait_for(lambda: waiting(cache) == 2)
    leader.done()
    for follower in (first, second):
        wait_for(lambda follower=follower: follower.flight is not None)
        assert (follower.flight.alone, follower.flight.waited) == (True, True)
        follower.join()
    assert under_way(cache) == set()


@pytest.mark.parametrize(
    "damage",
    ["UPDATE entries SET used = 'x'", "UPDATE entries SET written = 'x'", "DELETE FROM totals"],
)
def test_a_damaged_row_spoils_no_call(tmp_path, damage):
    with ResponseCache(f"sqlite:///{tmp_path}/cache.db", ttl=60) as cache:
        cache.put("a", b"1")
        cache._store.database.run(lambda connection: connection.execute(damage))
        assert cache.get("a") in (None, b"1")
        cache.put("b", b"2")
        cache.flight("a", until=None).done()
        assert cache.stats()


def test_the_same_thread_never_waits_for_itself():
    cache = ResponseCache()
    with cache.flight("a", until=None) as outer:
        with cache.flight("a", until=None) as inner:
            assert (inner.leader, inner.alone, inner.waited) == (False, True, False)
        assert under_way(cache) == {"a"}
        assert outer.leader


def test_threads_that_lead_do_not_wait_for_each_other():
    """One leads a and asks for b, the other leads b and asks for a: neither may hang."""
    cache = ResponseCache()
    follower = Follower(cache, "b")
    wait_for(lambda: under_way(cache) == {"b"})
    with cache.flight("a", until=None), cache.flight("b", until=None) as flight:
        assert flight.alone
    follower.join()
    assert under_way(cache) == set()


def test_waiting_ends_at_its_time_and_not_at_all_if_it_has_passed(clock):
    cache = ResponseCache(clock=clock)
    leader = cache.flight("a", until=None)
    for until, waited in ((clock.now() + 0.02, True), (clock.now(), False), (0, False)):
        follower = Follower(cache, until=until)
        follower.join()
        assert (follower.flight.alone, follower.flight.waited) == (True, waited)
    assert waiting(cache) == 0
    leader.done()
    assert under_way(cache) == set()


def test_without_a_deadline_a_forgotten_leader_is_waited_for_only_so_long(monkeypatch):
    monkeypatch.setattr(cache_module, "PATIENCE", 0.01)
    cache = ResponseCache()
    leader = cache.flight("a", until=None)
    follower = Follower(cache)
    follower.join()
    assert follower.flight.alone
    leader.done()


def test_a_leader_that_is_forgotten_is_done():
    cache = ResponseCache()
    flight = cache.flight("a", until=None)
    follower = Follower(cache)
    wait_for(lambda: waiting(cache) == 1)
    cycle = [flight]
    cycle.append(cycle)
    del flight, cycle
    gc.collect()
    wait_for(lambda: follower.flight is not None)
    follower.join()
    assert under_way(cache) == set()


def test_a_leader_collected_while_another_is_about_to_wait_wakes_it():
    """A collection can run `done` at any step of another thread's, or of one's own."""
    cache = ResponseCache()
    tower = cache._tower
    held = {}

    def lead():
        held["flight"] = cache.flight("a", until=None)

    in_threads(1, lead)
    seat = tower.seats["a"]

    class Collecting(type(seat.waiters)):
        def append(self, waiter):
            held.pop("flight").done()
            super().append(waiter)

    seat.waiters = Collecting()
    with cache.flight("a", until=None) as flight:
        assert flight.leader
    assert under_way(cache) == set()


def test_a_kept_flight_goes_on_after_the_block_unless_it_failed():
    cache = ResponseCache()
    with cache.flight("a", until=None) as flight:
        flight.keep()
    assert under_way(cache) == {"a"}
    flight.done()
    assert under_way(cache) == set()
    with pytest.raises(KeyError), cache.flight("a", until=None) as flight:
        flight.keep()
        raise KeyError
    assert under_way(cache) == set()


def test_different_keys_do_not_wait():
    cache = ResponseCache()
    with cache.flight("a", until=None):
        follower = Follower(cache, "b")
        wait_for(lambda: follower.flight is not None)
        assert follower.flight.leader
        follower.join()


@posix
def test_an_interrupted_waiter_leaves_the_line():
    code = """
import os, signal, threading, time
from LLM.policies.cache import ResponseCache
cache = ResponseCache()
held = []
thread = threading.Thread(target=lambda: held.append(cache.flight("a", until=None)))
thread.start(); thread.join()
def interrupt():
    while not cache._tower.seats["a"].waiters:
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGINT)
threading.Thread(target=interrupt).start()
try:
    cache.flight("a", until=None)
except KeyboardInterrupt:
    print(len(cache._tower.seats["a"].waiters))
held[0].done()
print(cache._tower.seats)
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.stdout.split() == ["0", "{}"], done


def test_a_storm_of_failures_timeouts_and_collections_ends_with_nothing_left():
    cache = ResponseCache()
    leaders = []

    def storm():
        import random

        chance = random.Random(threading.get_ident())
        for _ in range(40):
            name = chance.choice("abc")
            until = cache._clock.now() + chance.choice([0.0005, 0.002, 20])
            flight = cache.flight(name, until=until)
            if flight.leader:
                leaders.append(name)
                assert leaders.count(name) == 1
                if chance.random() < 0.5:
                    time.sleep(0.0005)
                leaders.remove(name)
            if chance.random() < 0.5:
                flight.done()
            del flight

    in_threads(16, storm)
    assert under_way(cache) == set()
