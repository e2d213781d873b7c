"""A small SQLite file of ours: opened when first used, safe among threads, processes and forks."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

from LLM.errors import LLMConfigError
from LLM.forks import renew_after_fork

T = TypeVar("T")

MEMORY = ":memory:"


class Connection(Protocol):
    """What is used of `sqlite3.Connection`; importing that costs 5 ms, which only its users pay."""

    @property
    def in_transaction(self) -> bool: ...

    def execute(self, sql: str, parameters: Sequence[Any] = (), /) -> Any: ...

    def executemany(self, sql: str, parameters: Any, /) -> Any: ...

    def close(self) -> None: ...


class DatabaseError(Exception):
    """The file cannot be used; the text says which file, what is wrong, and what to do.

    Attributes:
        reason: `corrupt`, `foreign` (another program's), `version`, `read-only`, `full`, `locked`,
            `missing` (the directory), `forked` or `other`.
    """

    def __init__(self, message: str, reason: str = "other") -> None:
        super().__init__(message, reason)
        self.reason = reason

    def __str__(self) -> str:
        return str(self.args[0])


class _Trouble(NamedTuple):
    sign: str  # in SQLite's own text, which is the same in all its versions (sqlite3_errstr)
    reason: str
    advice: str


# Python 3.10 does not hand over SQLite's error codes, so that the texts must do.
_TROUBLES = (
    _Trouble("not a database", "foreign", "is not a SQLite database: choose another path"),
    _Trouble("malformed", "corrupt", "is corrupt: delete it, or restore it from a copy"),
    _Trouble("is full", "full", "cannot grow, the disk is full: make room"),
    _Trouble("locked", "locked", "is locked by another process: end that process, or wait"),
    _Trouble("readonly", "read-only", "is read-only: allow writing to it and to its directory"),
    _Trouble(
        "unable to open",
        "read-only",
        "cannot be opened: it must be a file that may be written, in a directory that may be",
    ),
    _Trouble("disk I/O", "other", "cannot be read or written: look at the disk and its limits"),
)


class Database:
    """One file, one connection, one transaction at a time.

    The threads of a process take turns: a transaction of ours is some 20 µs long, in which a second
    connection would only wait at SQLite's own lock. A forked child opens its own connection.

    Args:
        url: `sqlite:///relative.db`, `sqlite:////absolute/path.db`, or `:memory:` (also `sqlite://`),
            which is private to this object and shared by its threads.
        kind: what the file is, in words for errors: `cache`.
        application_id: the number by which SQLite files of this kind are known (32 bits).
        schema: SQL that makes a new file's tables.
        version: of the schema; a file of another one is refused.
        busy_timeout: seconds to wait for other threads and processes.

    Raises:
        LLMConfigError: the URL is none of these.
    """

    def __init__(
        self,
        url: str,
        *,
        kind: str,
        application_id: int,
        schema: str,
        version: int = 1,
        busy_timeout: float = 5.0,
    ) -> None:
        self.path = sqlite_path(url)
        self.kind = kind
        self.application_id = application_id
        self.schema = schema
        self.version = version
        self.busy_timeout = busy_timeout
        self._connection: Connection | None = None
        self._identity: tuple[int, int] | None = None
        self._forked = False
        self._lock = threading.Lock()
        renew_after_fork(self)

    def run(self, work: Callable[[Connection], T], *, write: bool = True) -> T:
        """What `work` returns, done in one transaction: all of it, or nothing if it raises.

        Args:
            work: gets the connection; must not call `run` again.
            write: take the right to write at once, so that what was read is still true then.

        Raises:
            DatabaseError: the file cannot be used; never an error of `sqlite3`.
        """
        if not self._lock.acquire(timeout=self.busy_timeout):
            raise self._error("is in use by another thread: try again", "locked")
        try:
            return self._transaction(work, write)
        finally:
            self._lock.release()

    def close(self) -> None:
        """Close the file; the next `run` opens it again. What was in `:memory:` is gone."""
        with self._lock:
            self._drop()

    def after_fork(self) -> None:
        busy = self._lock.locked()
        self._lock = threading.Lock()
        if busy:
            # Another thread was inside SQLite, whose own state is now broken beyond repair.
            self._forked = True
        elif self.path != MEMORY and self._connection is not None:
            # Kept open it would let this process believe that it holds the parent's file locks; an
            # idle connection can be closed, without the tidying that is the parent's to do.
            if sys.version_info >= (3, 12):
                import sqlite3

                self._connection.setconfig(sqlite3.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, True)
            self._drop()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_connection": None, "_lock": None, "_forked": False}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()
        renew_after_fork(self)

    def __del__(self) -> None:
        # Not if `__init__` failed, nor a connection that a fork broke.
        if getattr(self, "_connection", None) is not None and not self._forked:
            self._drop()

    def _transaction(self, work: Callable[[Connection], T], write: bool) -> T:
        try:
            import sqlite3
        except ImportError as error:
            raise self._error("needs Python's own sqlite3, which this one lacks") from error
        connection = self._open()
        try:
            connection.execute("BEGIN IMMEDIATE" if write else "BEGIN")
            try:
                result = work(connection)
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:  # a full disk has ended it already
                    connection.execute("ROLLBACK")
                raise
            return result
        except sqlite3.Error as error:
            if self.path != MEMORY:
                self._drop()  # the next one starts afresh, maybe with a mended file
            raise self._explain(error) from error

    def _open(self) -> Connection:
        if self._forked:
            raise self._error(
                "was in use while this process was forked: fork before using it, or spawn", "forked"
            )
        if self._connection is not None:
            if self.path == MEMORY or _identity(self.path) == self._identity:
                return self._connection
            self._drop()  # somebody deleted or replaced the file: what we wrote would be lost
        import sqlite3

        connection: Connection | None = None
        try:
            if self.path != MEMORY:
                _create(self.path)
            connection = sqlite3.connect(
                self.path, timeout=self.busy_timeout, isolation_level=None, check_same_thread=False
            )
            self._prepare(connection)
            if self.path != MEMORY:
                self._identity = _identity(self.path)
        except BaseException as error:
            if connection is not None:
                connection.close()
            if isinstance(error, (sqlite3.Error, OSError)):
                raise self._explain(error) from error
            raise
        self._connection = connection
        return connection

    def _prepare(self, connection: Connection) -> None:
        """Make the tables of a new file, or know the file as ours, before anything is changed."""
        import sqlite3

        # In one transaction: another process may make the tables between two looks.
        connection.execute("BEGIN")
        ours = self._is_ours(connection)
        connection.execute("COMMIT")
        if not ours:
            connection.execute("BEGIN IMMEDIATE")
            if not self._is_ours(connection):  # another process may have been quicker
                for statement in _statements(self.schema):
                    connection.execute(statement)
                connection.execute(f"PRAGMA application_id = {self.application_id:d}")
                connection.execute(f"PRAGMA user_version = {self.version:d}")
            connection.execute("COMMIT")
        try:
            connection.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError as error:
            # Two processes that open a new file at once hinder each other; both modes are safe.
            if "locked" not in str(error):
                raise
        # With WAL a power failure may cost the last transactions, but never the file.
        connection.execute("PRAGMA synchronous = NORMAL")

    def _is_ours(self, connection: Connection) -> bool:
        """`False` for a new, empty file.

        Raises:
            DatabaseError: it is another program's, or of another version.
        """
        (owner,) = connection.execute("PRAGMA application_id").fetchone()
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if owner == version == tables == 0:
            return False
        if owner != self.application_id:
            raise self._error(
                "is the database of another program or of another use: choose another path",
                "foreign",
            )
        if version != self.version:
            age = "a newer" if version > self.version else "an older"
            raise self._error(
                f"was written by {age} version of this library (format {version}, wanted "
                f"{self.version}): choose another path, or use that version",
                "version",
            )
        return True

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def _error(self, text: str, reason: str = "other") -> DatabaseError:
        return DatabaseError(f"the {self.kind} {self.path!r} {text}", reason)

    def _explain(self, error: Exception) -> DatabaseError:
        folder = os.path.dirname(self.path)  # noqa: PTH120 - pathlib is slow to import
        if self.path != MEMORY and not os.path.isdir(folder):  # noqa: PTH112 - pathlib is slow to import
            return self._error(f"has no directory: create {folder!r}", "missing")
        text = str(error)
        for sign, reason, advice in _TROUBLES:
            if sign in text:
                return self._error(advice, reason)
        if isinstance(error, PermissionError):
            return self._error("may not be created: allow writing to its directory", "read-only")
        return self._error(f"cannot be used: {text}")


def sqlite_path(url: str) -> str:
    """The absolute path of a `sqlite:///` URL; `:memory:` for none.

    Raises:
        LLMConfigError: it is no such URL.
    """
    if url in (MEMORY, "sqlite://", f"sqlite:///{MEMORY}"):
        return MEMORY
    if url == "sqlite:///":  # a name that was left empty: in memory, nothing of it would last
        raise LLMConfigError(f"{url!r} names no file: use 'sqlite:///file.db', or ':memory:'")
    scheme, mark, path = url.partition(":///")
    if scheme != "sqlite" or not mark or "\0" in path:
        raise LLMConfigError(
            f"not the URL of a SQLite file: {url!r}; use 'sqlite:///relative.db', "
            "'sqlite:////absolute/path.db' or ':memory:'"
        )
    return os.path.realpath(path)  # pathlib is slow to import


def _create(path: str) -> None:
    """Make the file, readable by its owner only; SQLite gives `-wal` and `-shm` the same mode.

    An existing file is not opened here: closing it again would drop the locks that other
    connections of this process hold on it (POSIX, `fcntl`).
    """
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
    except FileExistsError:
        return
    try:
        if hasattr(os, "fchmod"):  # whatever the umask took away
            os.fchmod(descriptor, 0o600)
    finally:
        os.close(descriptor)


def _identity(path: str) -> tuple[int, int] | None:
    try:
        stat = os.stat(path)  # noqa: PTH116 - the same
    except FileNotFoundError:
        return None
    return stat.st_dev, stat.st_ino


def _statements(schema: str) -> list[str]:
    """One by one: `executescript` would end the transaction that they belong to."""
    return [statement for statement in schema.split(";") if statement.strip()]
