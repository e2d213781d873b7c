"""A file of ours and every way in which it can be spoiled: a clear error, and nothing lost."""

import gc
import os
import pickle
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from LLM.errors import LLMConfigError
from LLM.policies.sqlite import Database, DatabaseError, sqlite_path
from tests.fakes import work_of

ROOT = Path(__file__).parents[1]

SCHEMA = (
    "CREATE TABLE notes (name TEXT PRIMARY KEY, text BLOB); CREATE INDEX by_text ON notes (text);"
)

posix = pytest.mark.skipif(sys.platform == "win32", reason="POSIX only")


def database(path, **settings):
    settings = {"kind": "cache", "application_id": 0x1234, "schema": SCHEMA, **settings}
    return Database(f"sqlite:///{path}", **{"busy_timeout": 0.05, **settings})


def note(name, text="x"):
    return lambda connection: connection.execute("INSERT INTO notes VALUES (?, ?)", (name, text))


def names(connection):
    return {name for (name,) in connection.execute("SELECT name FROM notes")}


@contextmanager
def trouble(reason, *words):
    with pytest.raises(DatabaseError) as caught:
        yield
    assert caught.value.reason == reason
    text = str(caught.value)
    assert "\n" not in text
    assert all(word in text for word in ("the cache '", *words)), text


@contextmanager
def child(source, *args):
    """Another Python process; it is ours once it has printed a line."""
    command = [sys.executable, "-c", source, *map(str, args)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.PIPE) as process:
        try:
            assert process.stdout.readline()
            yield process
        finally:
            process.kill()


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


@pytest.mark.parametrize("url", [":memory:", "sqlite://", "sqlite:///:memory:"])
def test_memory_has_no_path(url):
    assert sqlite_path(url) == ":memory:"


def test_a_path_is_relative_with_three_slashes_and_absolute_with_four(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert sqlite_path("sqlite:///some.db") == os.path.realpath(tmp_path / "some.db")
    assert sqlite_path(f"sqlite:///{tmp_path}/some.db") == os.path.realpath(tmp_path / "some.db")


@pytest.mark.parametrize(
    "url", ["", "cache.db", "sqlite:/x.db", "sqlite:cache.db", "redis:///x", "sqlite:///a\0b"]
)
def test_any_other_url_is_refused_with_what_is_accepted(url):
    with pytest.raises(LLMConfigError, match=r"sqlite:///relative\.db"):
        Database(url, kind="cache", application_id=1, schema=SCHEMA)


def test_nothing_is_opened_before_it_is_used(tmp_path):
    with closing(database(tmp_path / "some.db")):
        assert list(tmp_path.iterdir()) == []


def test_what_is_written_is_there_for_the_next(tmp_path):
    with closing(database(tmp_path / "some.db")) as first:
        first.run(note("a"))
        with closing(database(tmp_path / "some.db")) as second:
            assert second.run(names, write=False) == {"a"}


def test_memory_is_private_and_shared_by_threads():
    one, other = (
        Database(":memory:", kind="cache", application_id=1, schema=SCHEMA) for _ in range(2)
    )
    thread = threading.Thread(target=one.run, args=(note("a"),))
    thread.start()
    thread.join()
    assert one.run(names) == {"a"}
    assert other.run(names) == set()
    with pytest.raises(DatabaseError):  # an error does not lose what is there
        one.run(note("a"))
    assert one.run(names) == {"a"}
    one.close()
    assert one.run(names) == set()


def test_work_that_raises_leaves_nothing_behind(tmp_path):
    def half(connection):
        note("a")(connection)
        raise KeyError("enough")

    with closing(database(tmp_path / "some.db")) as db:
        with pytest.raises(KeyError, match="enough"):
            db.run(half)
        assert db.run(names) == set()


def test_a_python_without_sqlite_is_a_clear_error(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sqlite3", None)
    with trouble("other", "sqlite3"):
        database(tmp_path / "some.db").run(names)


def test_errors_of_sqlite_never_come_through(tmp_path):
    with closing(database(tmp_path / "some.db")) as db:
        db.run(note("a"))
        with trouble("other", "UNIQUE"):
            db.run(note("a"))
        with trouble("other", "no such table"):
            db.run(lambda connection: connection.execute("SELECT * FROM other"))
        assert db.run(names) == {"a"}


def test_an_error_survives_a_pickle():
    error = pickle.loads(pickle.dumps(DatabaseError("the cache 'x' is full", "full")))
    assert (str(error), error.reason) == ("the cache 'x' is full", "full")


def test_a_pickled_database_opens_the_same_file_anew(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with closing(database("some.db")) as db:
        db.run(note("a"))
        text = pickle.dumps(db)
        monkeypatch.chdir("/")
        with closing(pickle.loads(text)) as copy:
            assert copy.run(names) == {"a"}


def test_an_empty_file_is_a_new_one(tmp_path):
    (tmp_path / "some.db").touch()
    with closing(database(tmp_path / "some.db")) as db:
        db.run(note("a"))
        assert db.run(names) == {"a"}


@pytest.mark.parametrize("text", [b"hello", b"hello\n" * 2000])
def test_a_file_that_is_no_database_is_refused_and_left_alone(tmp_path, text):
    path = tmp_path / "notes.txt"
    path.write_bytes(text)
    with closing(database(path)) as db, trouble("foreign", "notes.txt", "another path"):
        db.run(names)
    assert path.read_bytes() == text


@pytest.mark.parametrize(
    "sql", ["CREATE TABLE theirs (x)", "PRAGMA application_id = 7", "PRAGMA user_version = 3"]
)
def test_another_programs_database_is_refused_and_left_alone(tmp_path, sql):
    path = tmp_path / "theirs.db"
    with closing(sqlite3.connect(path)) as theirs:
        theirs.execute(sql)
    before = path.read_bytes()
    with closing(database(path)) as db, trouble("foreign", "theirs.db", "another program"):
        db.run(names)
    assert path.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["theirs.db"]


@pytest.mark.parametrize("wanted, age", [(1, "a newer version"), (3, "an older version")])
def test_another_version_is_refused(tmp_path, wanted, age):
    with closing(database(tmp_path / "some.db", version=2)) as db:
        db.run(note("a"))
    with closing(database(tmp_path / "some.db", version=wanted)) as db:
        with trouble("version", age, "format 2", f"wanted {wanted}"):
            db.run(names)


def test_a_missing_directory_is_named(tmp_path):
    with closing(database(tmp_path / "no" / "some.db")) as db:
        with trouble("missing", repr(str(tmp_path / "no"))):
            db.run(names)
        (tmp_path / "no").mkdir()
        assert db.run(names) == set()


def test_a_file_is_no_directory(tmp_path):
    (tmp_path / "file").touch()
    with closing(database(tmp_path / "file" / "some.db")) as db, trouble("missing"):
        db.run(names)


def test_a_directory_is_no_file(tmp_path):
    with closing(database(tmp_path)) as db, trouble("read-only", "must be a file"):
        db.run(names)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc is Linux's")
def test_a_place_that_takes_no_files_is_an_error():
    with closing(database("/proc/some.db")) as db, trouble("other", "/proc/some.db"):
        db.run(names)


READ_ONLY = """
import os, sqlite3, sys
from LLM.policies.sqlite import Database, DatabaseError
if os.getuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)  # to root, nothing is read-only
url = f"sqlite:///{sys.argv[1]}"
database = Database(url, kind="cache", application_id=0x1234, schema="CREATE TABLE a (b)")
try:
    database.run(lambda connection: connection.execute("UPDATE notes SET text = 'y'"))
except DatabaseError as error:
    print(error.reason, error)
"""


@posix
@pytest.mark.parametrize("exists", [True, False])
def test_a_read_only_directory_is_a_clear_error(open_path, exists):
    path = open_path / "some.db"
    if exists:
        with closing(database(path)) as db:
            db.run(note("a"))
        path.chmod(0o444)
    open_path.chmod(0o555)
    try:
        done = subprocess.run(
            [sys.executable, "-c", READ_ONLY, path], capture_output=True, text=True, check=False
        )
    finally:
        open_path.chmod(0o755)
    assert done.stdout.startswith(f"read-only the cache '{path}'"), done
    assert "allow writing" in done.stdout or "may be written" in done.stdout


@pytest.fixture
def open_path(tmp_path_factory):
    """A directory that also another user can reach."""
    path = tmp_path_factory.mktemp("open")
    for parent in (path, *path.parents[:-1]):
        if parent.stat().st_uid == os.getuid() and not parent.stat().st_mode & stat.S_IXOTH:
            parent.chmod(parent.stat().st_mode | stat.S_IXOTH | stat.S_IROTH)
    return path


def test_a_full_disk_loses_nothing_that_was_written(tmp_path):
    with closing(database(tmp_path / "some.db")) as db:
        db.run(note("a"))
        db.run(lambda connection: connection.execute("PRAGMA max_page_count = 5"), write=False)
        with trouble("full", "make room"):
            db.run(note("b", "x" * 50_000))
        assert db.run(names) == {"a"}
        db.run(note("b", "x" * 50_000))  # there is room again


FULL = """
import resource, sys
from LLM.policies.sqlite import Database, DatabaseError
database = Database(f"sqlite:///{sys.argv[1]}", kind="cache", application_id=0x1234, schema="")
database.run(lambda connection: None)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    for number in range(1000):
        database.run(lambda connection: connection.execute(
            "INSERT INTO notes VALUES (?, ?)", (f"n{number}", "x" * 1000)))
except DatabaseError as error:
    print(number, error)
"""


@posix
def test_a_limit_on_the_size_of_files_loses_nothing_either(tmp_path):
    with closing(database(tmp_path / "some.db")) as db:
        db.run(note("a"))
    done = subprocess.run(
        [sys.executable, "-c", FULL, tmp_path / "some.db"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    number, text = done.stdout.split(" ", 1)
    assert "the cache '" in text
    with closing(database(tmp_path / "some.db")) as db:
        assert db.run(names) == {"a", *(f"n{i}" for i in range(int(number)))}


LOCK = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("BEGIN EXCLUSIVE")
print("locked", flush=True)
sys.stdin.readline()
connection.execute("COMMIT")
print("free", flush=True)
sys.stdin.readline()
"""


def test_a_locked_file_can_be_read_and_an_error_says_who_to_wait_for(tmp_path):
    path = tmp_path / "some.db"
    with closing(database(path)) as db:
        db.run(note("a"))
        with child(LOCK, path) as other:
            with trouble("locked", "another process"):
                db.run(note("b"))
            assert db.run(names, write=False) == {"a"}
            other.stdin.write(b"\n")
            other.stdin.flush()
            assert other.stdout.readline() == b"free\n"
            db.run(note("b"))
            assert db.run(names) == {"a", "b"}


def test_a_transaction_waits_for_another_thread_no_longer_than_it_was_told(tmp_path):
    inside, leave = threading.Event(), threading.Event()

    def slow(connection):
        inside.set()
        leave.wait(30)

    with closing(database(tmp_path / "some.db")) as db:
        thread = threading.Thread(target=db.run, args=(slow,))
        thread.start()
        inside.wait(30)
        with trouble("locked", "another thread"):
            db.run(names)
        leave.set()
        thread.join()
        assert db.run(names) == set()


def test_a_file_damaged_in_the_middle_is_reported(tmp_path):
    path = tmp_path / "some.db"
    with closing(database(path)) as db:
        db.run(lambda connection: [note(f"n{i}", "x" * 900)(connection) for i in range(300)])
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xa5" * 150_000)
    with closing(database(path)) as db, trouble("corrupt", "some.db", "delete it"):
        db.run(
            lambda connection: connection.execute("SELECT sum(length(text)) FROM notes").fetchone()
        )


def test_a_file_deleted_or_replaced_while_open_is_opened_anew(tmp_path):
    path = tmp_path / "some.db"
    with closing(database(path)) as db:
        db.run(note("a"))
        path.unlink()
        db.run(note("b"))
        assert path.exists()
        with closing(database(tmp_path / "other.db")) as other:
            other.run(note("c"))
        for end in ("-wal", "-shm"):
            (tmp_path / f"some.db{end}").unlink(missing_ok=True)
        (tmp_path / "other.db").replace(path)
        assert db.run(names) == {"c"}


@posix
@pytest.mark.parametrize("umask", [0o000, 0o022, 0o277])
def test_only_the_owner_can_read_it_whatever_the_umask(tmp_path, umask):
    # Under a lock of its own process: the umask belongs to all threads.
    code = (
        "import os, sys; os.umask(int(sys.argv[2])); "
        "from LLM.policies.sqlite import Database; "
        "database = Database(f'sqlite:///{sys.argv[1]}', kind='cache', application_id=1, "
        "schema='CREATE TABLE a (b)'); "
        "database.run(lambda connection: connection.execute('INSERT INTO a VALUES (1)')); "
        "os._exit(0)"  # which leaves -wal and -shm behind
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "some.db", str(umask)], check=True)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes == dict.fromkeys(("some.db", "some.db-wal", "some.db-shm"), 0o600)


@posix
def test_a_dangling_link_leads_to_a_private_file(tmp_path):
    (tmp_path / "link.db").symlink_to(tmp_path / "some.db")
    with closing(database(tmp_path / "link.db")) as db:
        db.run(note("a"))
    assert stat.S_IMODE((tmp_path / "some.db").stat().st_mode) == 0o600


def test_a_file_made_by_two_at_once_is_made_once(tmp_path):
    """The second finds tables that were not there when it looked."""
    with (
        closing(database(tmp_path / "some.db")) as db,
        closing(database(tmp_path / "some.db")) as other,
    ):
        looked = db._is_ours

        def late(connection):
            answer = looked(connection)
            connection.execute("COMMIT")  # of the look
            other.run(note("a"))
            connection.execute("BEGIN")
            db._is_ours = looked
            return answer

        db._is_ours = late
        assert db.run(names) == {"a"}


WRITER = """
import sys
from LLM.policies.sqlite import Database
database = Database(f"sqlite:///{sys.argv[1]}", kind="cache", application_id=0x1234, schema=sys.argv[3])
print("ready", flush=True)
sys.stdin.readline()
for number in range(int(sys.argv[4])):
    name = f"{sys.argv[2]}-{number}"
    database.run(lambda connection: connection.execute("INSERT INTO notes VALUES (?, 'x')", (name,)))
    print(name, flush=True)
"""


def test_two_processes_write_at_once_and_nothing_is_lost(tmp_path):
    path = tmp_path / "some.db"
    with child(WRITER, path, "a", SCHEMA, 200) as one, child(WRITER, path, "b", SCHEMA, 200) as two:
        for process in (one, two):
            process.stdin.write(b"\n")
            process.stdin.flush()
        assert [len(process.stdout.readlines()) for process in (one, two)] == [200, 200]
    with closing(database(path)) as db:
        assert db.run(names) == {f"{who}-{number}" for who in "ab" for number in range(200)}
        assert db.run(lambda c: c.execute("PRAGMA journal_mode").fetchone()) == ("wal",)


def test_a_killed_writer_leaves_a_usable_file_with_all_it_finished(tmp_path):
    path = tmp_path / "some.db"
    with child(WRITER, path, "a", SCHEMA, 1_000_000) as process:
        process.stdin.write(b"\n")
        process.stdin.flush()
        told = [process.stdout.readline() for _ in range(50)]
        process.send_signal(getattr(signal, "SIGKILL", signal.SIGTERM))
        told += process.stdout.readlines()
    finished = {line.decode().strip() for line in told if line.endswith(b"\n")}
    with closing(database(path)) as db:
        assert finished <= db.run(names)
        db.run(note("after"))
        assert db.run(lambda c: c.execute("PRAGMA integrity_check").fetchone()) == ("ok",)


@posix
def test_a_forked_child_opens_its_own_and_what_both_write_stays(tmp_path):
    with closing(database(tmp_path / "some.db", busy_timeout=5)) as db:
        db.run(note("a"))
        read, write = os.pipe()

        def work():
            os.close(write)
            db.run(note("b"))
            os.read(read, 1)  # until the parent has closed its own
            db.run(note("c"))

        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                work()
                code = 0
            finally:
                os._exit(code)
        os.close(read)
        db.run(note("d"))
        db.close()
        os.close(write)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert db.run(names) == {"a", "b", "c", "d"}


@posix
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_fork_in_the_middle_of_a_transaction_is_an_error_in_the_child_only(tmp_path):
    inside, leave = threading.Event(), threading.Event()

    def slow(connection):
        note("a")(connection)
        inside.set()
        leave.wait(30)

    with closing(database(tmp_path / "some.db", busy_timeout=5)) as db:
        thread = threading.Thread(target=db.run, args=(slow,))
        thread.start()
        inside.wait(30)

        def work():
            with trouble("forked", "spawn"):
                db.run(note("b"))

        assert in_fork(work) == 0
        leave.set()
        thread.join()
        assert db.run(names) == {"a"}


@posix
def test_what_is_in_memory_is_copied_by_a_fork():
    db = Database(":memory:", kind="cache", application_id=1, schema=SCHEMA)
    db.run(note("a"))

    def work():
        assert db.run(names) == {"a"}
        db.run(note("b"))

    assert in_fork(work) == 0
    assert db.run(names) == {"a"}


def test_threads_take_turns_and_none_is_lost(tmp_path):
    with closing(database(tmp_path / "some.db", busy_timeout=30)) as db:

        def work(who):
            for number in range(25):
                db.run(note(f"{who}-{number}"))

        threads = [threading.Thread(target=work, args=(who,)) for who in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(db.run(names)) == 200


def test_one_that_nobody_holds_is_closed(tmp_path):
    db = database(tmp_path / "some.db")
    db.run(note("a"))
    del db
    gc.collect()
    assert [path.name for path in tmp_path.iterdir()] == [
        "some.db"
    ]  # the last to close a file tidies up


def test_a_transaction_costs_little(tmp_path):
    """Some 10 µs; the bound only notices a connection opened each time."""
    with closing(database(tmp_path / "some.db", busy_timeout=5)) as db:
        db.run(note("a"))
        assert work_of(lambda: db.run(names, write=False), 40) < 10


def test_a_file_that_cannot_be_switched_to_wal_now_is_used_as_it_is(tmp_path):
    path = tmp_path / "some.db"
    with closing(database(path)) as db:
        db.run(note("a"))
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("PRAGMA journal_mode = DELETE")
        other.execute("BEGIN")
        other.execute("SELECT * FROM notes").fetchall()
        with closing(database(path)) as db:
            assert db.run(names, write=False) == {"a"}


def test_processes_that_make_a_file_at_once_all_know_it_as_theirs(tmp_path):
    """The tables of another process may appear between two looks at a new file."""
    code = """
import sys
from LLM.policies.sqlite import Database
database = Database(sys.argv[1], kind="test", application_id=7, schema="CREATE TABLE t (x)")
print("ready", flush=True)
for line in sys.stdin:
    Database(line.strip(), kind="test", application_id=7, schema="CREATE TABLE t (x)").run(
        lambda c: c.execute("INSERT INTO t VALUES (1)")
    )
"""
    pipe = subprocess.PIPE
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", code, "sqlite:///unused.db"],
            stdin=pipe,
            stdout=pipe,
            stderr=pipe,
            text=True,
            cwd=ROOT,
        )
        for _ in range(4)
    ]
    for process in workers:
        assert process.stdout.readline() == "ready\n"
    files = "".join(f"sqlite:///{tmp_path}/{number}.db\n" for number in range(60))
    with ThreadPoolExecutor(4) as pool:
        said = list(pool.map(lambda process: process.communicate(files)[1], workers))
    assert said == [""] * 4
