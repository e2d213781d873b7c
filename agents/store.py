"""Conversations and runs in SQL: a SQLite file or a PostgreSQL database, with one schema for both.

Every write is one transaction. Needs the extra `store` (SQLAlchemy and psycopg), which is imported when
a store is opened.
"""

# ruff: noqa: S608 - only names of columns and conditions of this module are put into SQL

from __future__ import annotations

import builtins
import json
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from decimal import Decimal
from functools import lru_cache
from typing import Any, Final, Literal, NamedTuple, TypeVar

from agents.migrations import APPLICATION_ID, MIGRATION_LOCK, TABLES, migrations
from agents.types import Message, TokenUsage
from LLM import Clock, LLMConfigError, LLMError

T = TypeVar("T")

MEMORY: Final = ":memory:"

# Characters of a message that can be found. PostgreSQL's index takes 1 MiB for one message ("Text Search
# Limitations", PostgreSQL 18), which 100,000 characters of four bytes cannot fill.
_SEARCHED: Final = 100_000

_ID_LENGTH: Final = 500  # characters; PostgreSQL's index takes 2,704 bytes

_REQUEST_BYTES: Final = 600  # in one index with an id, which may take 2,000

_SNIPPET: Final = 60  # characters on each side of what was found

Reason = Literal[
    "unreachable", "read-only", "full", "locked", "version", "foreign", "corrupt", "missing",
    "refused", "forked", "conflict", "other",
]  # fmt: skip


# Messages in which a text is looked for inside words, which no index helps with: some 50 ms.
_INSIDE: Final = 20_000

# Connections to a SQLite file that only read: so many are kept, and so many more are opened when many threads
# read at once, for the pool serves whoever comes first, and not who waits longest.
_READERS: Final = 4
_MORE_READERS: Final = 60

# Characters of a search that are looked at; SQLite takes a pattern of 50,000 bytes.
_MAX_QUERY = 1000


class StoreError(LLMError):
    """The store cannot do it; nothing of it was written.

    Attributes:
        reason: `unreachable`, `read-only`, `full`, `locked`, `version` (written by a newer version of this
            library), `foreign` (another program's), `corrupt`, `missing` (the database, the conversation
            or the run), `refused` (the login), `forked`, `conflict` or `other`.
        retriable: whether the same can succeed later.
        partial: of a conversation, the answer that was paid for and could not be kept.
    """

    def __init__(self, message: str = "", *, reason: Reason = "other", **details: Any) -> None:
        details.setdefault("retriable", reason in ("unreachable", "locked"))
        super().__init__(message, **details)
        self.reason = reason


class ConflictError(StoreError):
    """Another writer was quicker; nothing of this write was kept. Read anew, then decide."""

    def __init__(self, message: str = "", **details: Any) -> None:
        super().__init__(message, **{"reason": "conflict", **details})


class RepeatedError(ConflictError):
    """The conversation has a message with this request key already; nothing of this write was kept.

    Attributes:
        number: of that message.
    """

    def __init__(self, message: str = "", *, number: int = 0, **details: Any) -> None:
        super().__init__(message, **details)
        self.number = number


@dataclass(frozen=True)
class Stored:
    """A message as it is kept.

    Attributes:
        usage: tokens that an answer took; `None` if unknown, and of what is no answer.
        cost: US dollars; `None` if unknown, and of what is no answer; 0 without usage: nothing was paid
            here (the cache's, a branch's, an import's).
        model: which model answered.
        status: `partial`: an answer that was cut.
        created: when, in UTC; set by the store.
        number: its place in the conversation, from 1, with gaps where messages were replaced; set by
            the store.
    """

    message: Message
    usage: TokenUsage | None = None
    cost: Decimal | None = None
    model: str | None = None
    status: Literal["ok", "partial"] = "ok"
    created: datetime | None = None
    number: int = 0


@dataclass(frozen=True)
class Summary:
    """A conversation without its messages.

    Attributes:
        created, updated: in UTC.
        revision: grows by one with each append.
        parent: the conversation that it is a branch of.
        data: what a program keeps with it.
    """

    id: str
    title: str | None
    owner: str | None
    created: datetime
    updated: datetime
    revision: int
    parent: str | None = None
    data: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Hit:
    """A message that was found.

    Attributes:
        number: of the message, as in `Stored`.
        snippet: the text around what was found.
    """

    conversation: str
    number: int
    role: str
    snippet: str
    title: str | None = None


@dataclass(frozen=True)
class Run:
    """A run of an agent; `created` and `updated` are in UTC."""

    id: str
    agent: str
    status: str
    data: Any
    created: datetime
    updated: datetime


@dataclass(frozen=True)
class Step:
    """One entry of a run's journal."""

    number: int
    kind: str
    payload: Any


class Store:
    """Conversations and runs in one database.

    Threads share it; a forked child goes on with connections of its own.

    Attributes:
        conversations: see `Conversations`.
        journal: see `Journal`.
        url: where it is, without a password.
        sqlite: whether it is SQLite; else it is PostgreSQL.
    """

    def __init__(self, url: str, *, clock: Clock | None = None, busy_timeout: float = 5.0) -> None:
        self._clock = clock or Clock()
        self._busy_timeout = busy_timeout
        self._address = _parse(url)
        self._path = _path_of(self._address)
        self.sqlite = self._path is not None
        self.url = _shown(self._address)
        self._processes = {os.getpid(): _Process()}
        self.conversations = Conversations(self, self._clock)
        self.journal = Journal(self, self._clock)

    @classmethod
    def open(cls, url: str, *, clock: Clock | None = None, busy_timeout: float = 5.0) -> Store:
        """Open a database, make or migrate its tables.

        Args:
            url: `sqlite:///relative.db`, `sqlite:////absolute/path.db`, `:memory:` (this object's own, gone
                with it), or `postgresql://user@host/database`.
            clock: for tests: tells the time and makes the ids.
            busy_timeout: seconds to wait for other writers, and for a connection.

        Raises:
            LLMConfigError: the URL is none of these, or the extra `store` is missing.
            StoreError: the database cannot be used; `.reason` says why.
        """
        store = cls(url, clock=clock, busy_timeout=busy_timeout)
        try:
            store.run(lambda _: None, write=False)
        except BaseException:
            store.close()
            raise
        return store

    def run(self, work: Callable[[Any], T], *, write: bool = True) -> T:
        """What `work` returns, done in one transaction: all of it, or nothing if it raises.

        What `work` itself does with this store, in its thread, is a part of the transaction.

        Args:
            work: gets an SQLAlchemy connection. It is called once more if the connection was lost, so
                it must find out whether the first time came through.
            write: take the right to write at once, so that what was read is still true then.

        Raises:
            StoreError: never an error of SQLAlchemy or of the database's driver.
        """
        import sqlalchemy.exc

        thread = threading.get_ident()
        joined = self._current().inside.get(thread)
        if joined is not None:
            return work(joined)
        for again in (True, False):
            process = self._current()
            process.inside[thread] = None
            try:
                with self._engine(process, write=write).connect() as connection:
                    options = connection.execution_options(store_write=write)
                    with options.begin():
                        process.inside[thread] = options
                        return work(options)
            except sqlalchemy.exc.DBAPIError as error:
                if not (again and error.connection_invalidated):
                    raise self._explain(error) from error
            except (sqlalchemy.exc.SQLAlchemyError, OSError) as error:
                raise self._explain(error) from error
            finally:
                process.inside.pop(thread, None)
        raise AssertionError  # pragma: no cover - the second time either returns or raises

    def close(self) -> None:
        """Close all connections; used again, it opens new ones. What was in `:memory:` is gone."""
        process = self._current()
        with process.lock:
            engines, process.engines = process.engines, None
            if engines is not None:
                engines.dispose()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Store {self.url}>"

    def _current(self) -> _Process:
        """What belongs to this process; in a forked child, anew."""
        pid = os.getpid()
        found = self._processes.get(pid)
        if found is not None:
            return found
        parent, child = next(reversed(self._processes.values())), _Process()
        if parent.inside and self.sqlite:
            # Another thread was inside SQLite, whose own state is now broken beyond repair.
            child.broken = True
        elif self._path == MEMORY:
            child.engines = parent.engines  # a copy of the parent's data
        elif parent.engines is not None and not parent.inside:
            # SQLite's file must be closed: kept open, this process would believe that it holds the
            # parent's locks. A socket to PostgreSQL is the parent's: closing would say good-bye for it.
            parent.engines.dispose(close=self.sqlite)
        return self._processes.setdefault(
            pid, child
        )  # of two threads that come here, one's is kept

    def _engine(self, process: _Process, *, write: bool) -> Any:
        if process.broken:
            raise self.error(
                "was in use while this process was forked: fork before using it, or spawn", "forked"
            )
        if process.engines is None:
            with process.lock:
                if process.engines is None:
                    process.engines = self._connected()
        return process.engines.write if write else process.engines.read

    def _connected(self) -> _Engines:
        """Engines whose database has the tables."""
        in_file = self._path is not None and self._path != MEMORY
        if self._path is not None and in_file:
            _create(self._path)
        # One connection that writes, for which the threads line up: SQLite has one writer at a time, and
        # whoever waits at its own lock is served by chance. Those who read a file wait for no writer.
        engine = self._make_sqlite(1) if self.sqlite else self._make_postgres()
        try:
            with engine.connect() as connection:
                with connection.execution_options(store_write=True).begin():
                    self._migrate(connection)
                if self.sqlite:  # not before the file is known as ours
                    self._write_ahead(connection)
        except BaseException:
            engine.dispose()
            raise
        return _Engines(engine, self._make_sqlite(_READERS) if in_file else engine)

    def _make_postgres(self) -> Any:
        import sqlalchemy

        # Prepared statements would break behind a pooler like PgBouncer, and save nothing here.
        seconds = self._busy_timeout
        arguments = {"connect_timeout": max(2, round(seconds)), "prepare_threshold": None}
        engine = sqlalchemy.create_engine(
            self._address,
            pool_pre_ping=True,
            pool_timeout=seconds,
            connect_args=arguments,
            hide_parameters=True,
        )
        timeout = f"SET LOCAL lock_timeout = {round(seconds * 1000):d}"
        sqlalchemy.event.listen(engine, "begin", lambda c: c.exec_driver_sql(timeout))
        return engine

    def _make_sqlite(self, connections: int) -> Any:
        import sqlalchemy
        from sqlalchemy.pool import QueuePool

        seconds = self._busy_timeout
        engine = sqlalchemy.create_engine(
            self._address,
            poolclass=QueuePool,
            pool_size=connections,
            max_overflow=0 if connections == 1 else _MORE_READERS,
            pool_timeout=seconds,
            connect_args={"check_same_thread": False, "timeout": seconds},
            hide_parameters=True,
        )
        sqlalchemy.event.listen(engine, "connect", _prepare)
        sqlalchemy.event.listen(engine, "begin", _begin)
        return engine

    def _migrate(self, connection: Any) -> None:
        """Bring the tables to the newest version; two processes take turns."""
        import sqlalchemy

        if not self.sqlite:
            connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({MIGRATION_LOCK})")
        there = set(sqlalchemy.inspect(connection).get_table_names())
        steps = migrations(connection.dialect.name)
        version = 0
        if self._is_ours(connection, there):
            found = connection.exec_driver_sql("SELECT max(version) FROM schema_version").scalar()
            version = int(found or 0)
        else:
            connection.exec_driver_sql("CREATE TABLE schema_version (version INTEGER PRIMARY KEY)")
            if self.sqlite:
                connection.exec_driver_sql(f"PRAGMA application_id = {APPLICATION_ID}")
        if version > len(steps):
            raise self.error(
                f"was written by a newer version of this library (format {version}, known here: "
                f"{len(steps)}): update it, or choose another database",
                "version",
            )
        for number, statements in enumerate(steps[version:], version + 1):
            for statement in statements:
                connection.exec_driver_sql(statement)
            connection.exec_driver_sql(f"INSERT INTO schema_version VALUES ({number:d})")

    def _is_ours(self, connection: Any, there: set[str]) -> bool:
        """`False` if it has none of our tables yet.

        Raises:
            StoreError: it is another program's.
        """
        ours = {"schema_version", *TABLES}
        if self.sqlite:
            mark = connection.exec_driver_sql("PRAGMA application_id").scalar()
            foreign = mark != APPLICATION_ID and bool(mark or there)
        else:
            foreign = bool(there & ours) and not there >= ours
        if foreign:
            raise self.error(
                "is the database of another program or of another use: choose another one",
                "foreign",
            )
        return there >= ours

    def _write_ahead(self, connection: Any) -> None:
        """Readers do not wait for a writer. In a file it stays so, and is only tried again."""
        import sqlite3

        try:
            connection.connection.driver_connection.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError as error:
            # Two processes that open a new file at once hinder each other; both modes are safe.
            if "locked" not in str(error):
                raise self._explain(error) from error

    def error(self, text: str, reason: Reason = "other") -> StoreError:
        """An error that names this store."""
        return StoreError(f"the store {self.url} {text}", reason=reason)

    def _explain(self, error: Exception) -> StoreError:
        original = getattr(error, "orig", None) or error
        if self._path not in (None, MEMORY) and not os.path.isdir(os.path.dirname(self._path)):  # noqa: PTH112, PTH120 - of the same kind as the rest
            return self.error("has no directory: create it, or choose another path", "missing")
        text = str(original)
        state = getattr(original, "sqlstate", None) or ""
        for trouble in _SQLITE_TROUBLES if self.sqlite else _POSTGRES_TROUBLES:
            known = any(state.startswith(code) for code in trouble.states)
            if known or (not state and trouble.sign in text):
                return self.error(trouble.advice, trouble.reason)
        if getattr(error, "connection_invalidated", False) or (
            not self.sqlite and type(original).__name__ == "OperationalError" and not state
        ):
            return self.error("cannot be reached: is the server running?", "unreachable")
        if type(original).__name__ == "TimeoutError":
            return self.error("is in use by other threads: try again", "locked")
        line = (text.strip().splitlines() or [type(original).__name__])[0]
        return self.error(f"cannot be used: {line}")


class Conversations:
    """The conversations of a store; to name one that is not there is a `StoreError` (`missing`)."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock

    def create(
        self,
        id: str | None = None,
        *,
        title: str | None = None,
        owner: str | None = None,
        data: Mapping[str, Any] | None = None,
    ) -> Summary:
        """Begin a conversation.

        Args:
            id: left out: a new one.
            data: what a program wants to keep with it, as JSON.

        Raises:
            ConflictError: there is one of that id.
        """
        token, now = self._clock.new_id(), _now(self._clock)
        row = {
            "id": token if id is None else _name("id", id),
            "title": clean(title),
            "owner": None if owner is None else _name("owner", owner),
            "created": now,
            "updated": now,
            "revision": 0,
            "parent": None,
            "data": _dump("data", dict(data or {})),
            "token": token,
        }
        return self._store.run(lambda connection: self._created(connection, row))

    def _created(self, connection: Any, row: dict[str, Any]) -> Summary:
        sql = (
            f"INSERT INTO conversations ({_CONVERSATION}, token) VALUES (:id, :title, :owner, :created,"
            " :updated, :revision, :parent, :data, :token) ON CONFLICT (id) DO NOTHING"
        )
        if not execute(connection, sql, **row).rowcount and row["token"] != _token(
            connection, row["id"]
        ):
            raise ConflictError(f"there is a conversation {row['id']!r} already: choose another id")
        return _summary(row)

    def get(self, id: str) -> Summary | None:
        """The conversation without its messages; `None` if there is none."""
        sql = f"SELECT {_CONVERSATION} FROM conversations WHERE id = :id"
        rows = self._read(sql, id=_name("id", id))
        return _summary(rows[0]) if rows else None

    def list(
        self,
        owner: str | None = None,
        *,
        limit: int = 50,
        before: Summary | None = None,
        query: str | None = None,
    ) -> list[Summary]:
        """Conversations, the last changed first.

        Args:
            owner: `None`: of all owners.
            limit: how many at most.
            before: the last one of the page before; left out: the first page.
            query: a part of the title, in any case.
        """
        where = ["1 = 1"]
        values: dict[str, Any] = {"limit": limit}
        if owner is not None:
            where.append("owner = :owner")
            values["owner"] = _name("owner", owner)
        if before is not None:
            where.append("(updated < :updated OR (updated = :updated AND id < :id))")
            values.update(updated=_text_of(before.updated), id=before.id)
        if query:
            where.append("lower(title) LIKE :query ESCAPE '!'")
            values["query"] = _pattern(query)
        sql = (
            f"SELECT {_CONVERSATION} FROM conversations WHERE {' AND '.join(where)}"
            " ORDER BY updated DESC, id DESC LIMIT :limit"
        )
        return [_summary(row) for row in self._read(sql, **values)]

    def append(
        self,
        id: str,
        messages: Sequence[Stored],
        revision: int,
        *,
        title: str | None = None,
        replacing: int | None = None,
        request: str | None = None,
    ) -> int:
        """Add messages, all or none.

        Args:
            revision: of the conversation as the writer knows it.
            title: what a conversation without a title is called from now on.
            replacing: the number of the first message whose place these take: it and all after it stay in
                the database and are shown no more. `None`: none.
            request: a key of the writer's, at most 600 bytes, that the first of the messages gets: what
                is sent twice is kept once. `None`: none.

        Returns:
            The new revision.

        Raises:
            RepeatedError: a message of the conversation, replaced or not, has this request key.
            ConflictError: it has changed since; nothing was added.
        """
        return self.keep(id, messages, revision, title=title, replacing=replacing, request=request)[
            0
        ]

    def keep(
        self,
        id: str,
        messages: Sequence[Stored],
        revision: int,
        *,
        title: str | None = None,
        replacing: int | None = None,
        request: str | None = None,
    ) -> tuple[int, tuple[Stored, ...]]:
        """What `append` does; returns also the messages, with their numbers and times."""
        name, token, moment = _name("id", id), self._clock.new_id(), self._clock.utc()
        now = _text_of(moment)
        key = check_request(request, messages)
        rows = [_message_row(stored, now) for stored in messages]

        def work(connection: Any) -> int:
            sql = (
                "UPDATE conversations SET revision = revision + 1, updated = :now, token = :token,"
                " title = COALESCE(title, :title) WHERE id = :id AND revision = :revision"
            )
            values = {"id": name, "revision": revision, "now": now, "token": token}
            changed = execute(connection, sql, **values, title=clean(title)).rowcount
            if not changed and _token(connection, name) == token:
                # The first time had come through: these messages are the last ones.
                return _last_number(connection, name) - len(rows)
            # Looked for with the conversation locked, by the update or by who came first.
            if key is not None:
                self._check_unused(connection, name, key)
            if not changed:
                raise self._changed(connection, name, revision)
            if replacing is not None:
                sql = (
                    "UPDATE messages SET replaced = 1 WHERE conversation = :id AND number >= :first"
                    " AND replaced = 0"
                )
                execute(connection, sql, id=name, first=replacing)
            last = _last_number(connection, name)
            numbered = [
                {**row, "conversation": name, "number": number, "request": None}
                for number, row in enumerate(rows, last + 1)
            ]
            if numbered:
                numbered[0]["request"] = key
                execute_many(connection, _INSERT_MESSAGE, numbered)
            return last

        last = self._store.run(work)
        return revision + 1, numbered_from(last + 1, messages, moment)

    def find_request(self, id: str, request: str) -> int | None:
        """The number of the message with this request key, replaced or not; `None` if there is none."""
        name, key = _name("id", id), _name("request", request)
        return self._store.run(lambda connection: _find_request(connection, name, key), write=False)

    def _check_unused(self, connection: Any, name: str, request: str) -> None:
        number = _find_request(connection, name, request)
        if number is not None:
            raise repeated(name, number)

    def _changed(self, connection: Any, name: str, revision: int) -> StoreError:
        sql = "SELECT revision FROM conversations WHERE id = :id"
        found = execute(connection, sql, id=name).scalar()
        if found is None:
            return self._missing(name)
        return ConflictError(
            f"the conversation {name!r} was changed by another writer (revision {found}, "
            f"here {revision}): reload it"
        )

    def messages(self, id: str) -> builtins.list[Stored]:
        """All messages, in their order."""
        return self.load(id)[1]

    def load(self, id: str) -> tuple[int, builtins.list[Stored]]:
        """The revision and the messages of one moment."""
        sql = (  # one statement, so that both are of the same moment in every isolation level
            f"SELECT c.revision, {_MESSAGE} FROM conversations c LEFT JOIN messages m"
            " ON m.conversation = c.id AND m.replaced = 0 WHERE c.id = :id ORDER BY m.number"
        )
        rows = self._read(sql, id=_name("id", id))
        if not rows:
            raise self._missing(id)
        return rows[0]["revision"], [_stored(row) for row in rows if row["number"] is not None]

    def costs(self, ids: Iterable[str]) -> dict[str, Decimal | None]:
        """US dollars of all answers of each of these conversations; `None` if one is unknown.

        Also of those that were replaced: they were paid for.
        """
        import sqlalchemy

        sql = (
            "SELECT conversation, cost FROM messages WHERE conversation IN :ids"
            " AND (cost IS NOT NULL OR model IS NOT NULL)"  # an answer, whatever it took
        )
        names = list(ids)
        statement = sqlalchemy.text(sql).bindparams(sqlalchemy.bindparam("ids", expanding=True))

        def work(connection: Any) -> Any:
            return connection.execute(statement, {"ids": names}).all() if names else []

        total: dict[str, Decimal | None] = dict.fromkeys(names, Decimal(0))
        for name, cost in self._store.run(work, write=False):
            before = total[name]
            total[name] = None if before is None or cost is None else before + Decimal(cost)
        return total

    def update(
        self,
        id: str,
        *,
        title: str | None = None,
        data: Mapping[str, Any] | None = None,
    ) -> None:
        """Change the title or the data; what is `None` stays. The revision, too: no message changed."""
        values = {
            "id": _name("id", id),
            "now": _now(self._clock),
            "title": clean(title),
            "data": None if data is None else _dump("data", dict(data)),
        }
        sql = (
            "UPDATE conversations SET title = COALESCE(:title, title), data = COALESCE(:data, data),"
            " updated = :now WHERE id = :id"
        )
        if not self._store.run(lambda connection: execute(connection, sql, **values).rowcount):
            raise self._missing(id)

    def delete(self, id: str) -> bool:
        """Forget it and its messages; its branches stay. Returns whether it was there."""
        sql = "DELETE FROM conversations WHERE id = :id"
        name = _name("id", id)
        return bool(self._store.run(lambda connection: execute(connection, sql, id=name).rowcount))

    def branch(self, id: str, at: int | None = None, *, new: str | None = None) -> str:
        """A new conversation with the messages of this one up to the number `at`; `None`: with all.

        They cost the branch nothing. Returns its id.

        Args:
            new: its id; if it is a branch of this one already, that is returned. Left out: a new one.

        Raises:
            ConflictError: `new` is another conversation.
        """
        name, token, now = _name("id", id), self._clock.new_id(), _now(self._clock)
        branch = token if new is None else _name("new", new)

        def work(connection: Any) -> str:
            sql = f"SELECT {_CONVERSATION} FROM conversations WHERE id = :id"
            parent = execute(connection, sql, id=name).mappings().first()
            if parent is None:
                raise self._missing(name)
            row = {**parent, "id": branch, "created": now, "updated": now, "token": token}
            row.update(revision=0, parent=name)
            there = execute(connection, sql, id=branch).mappings().first()
            if there is not None and there["parent"] == name:  # the first time had come through
                return branch
            self._created(connection, row)
            sql = (
                "INSERT INTO messages (conversation, number, message, cost, model, status, created,"
                " body) SELECT :new, number, message, '0', model, status, created, body FROM messages"
                " WHERE conversation = :id AND number <= :at AND replaced = 0 ORDER BY number"
            )
            execute(connection, sql, new=branch, id=name, at=_ALL if at is None else at)
            return branch

        return self._store.run(work)

    def search(
        self,
        text: str,
        owner: str | None = None,
        *,
        limit: int = 20,
        conversation: str | None = None,
    ) -> builtins.list[Hit]:
        """Messages with all these words, the newest first; if there are none, with this text inside words.

        Inside words looks no further back than 20,000 messages: each has to be read.

        Args:
            owner: `None`: of all owners.
            limit: how many at most.
            conversation: in this one only.
        """
        wanted = clean(text) or ""
        wanted = wanted[:_MAX_QUERY]
        if not wanted.strip():
            return []
        where = ""
        values: dict[str, Any] = {"limit": limit}
        if owner is not None:
            where += " AND c.owner = :owner"
            values["owner"] = _name("owner", owner)
        if conversation is not None:
            where += " AND c.id = :conversation"
            values["conversation"] = _name("id", conversation)
        if self._store.sqlite:
            words = "m.id IN (SELECT rowid FROM message_words WHERE message_words MATCH :query)"
            query = " ".join('"' + word.replace('"', '""') + '"' for word in wanted.split())
        else:
            words, query = "m.words @@ plainto_tsquery('simple', :query)", wanted
        newest = "m.id > (SELECT COALESCE(max(id), 0) FROM messages) - :newest"
        inside = f"{newest} AND lower(m.body) LIKE :query ESCAPE '!'"
        values["newest"] = _INSIDE
        tries = ((words, query), (inside, _pattern(wanted)))
        for condition, value in tries:
            sql = (
                "SELECT m.conversation, m.number, m.message, m.body, c.title FROM messages m"
                f" JOIN conversations c ON c.id = m.conversation"
                f" WHERE {condition}{where} AND m.replaced = 0"
                " ORDER BY m.id DESC LIMIT :limit"
            )
            rows = self._read(sql, query=value, **values)
            if rows:
                break
        return [
            Hit(
                row["conversation"],
                row["number"],
                json.loads(row["message"])["role"],
                snippet(row["body"], wanted),
                row["title"],
            )
            for row in rows
        ]

    def _read(self, sql: str, **values: Any) -> Any:
        def work(connection: Any) -> Any:
            return execute(connection, sql, **values).mappings().all()

        return self._store.run(work, write=False)

    def _missing(self, name: str) -> StoreError:
        return self._store.error(f"has no conversation {name!r}", "missing")


class Journal:
    """What runs did, step by step, so that another process can go on where one ended."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock

    def begin(self, run_id: str, agent: str, data: Any = None) -> None:
        """Note that a run begins; its status is `running`.

        Raises:
            ConflictError: there is one of that id.
        """
        token, now = self._clock.new_id(), _now(self._clock)
        values = {"id": _name("run_id", run_id), "agent": clean(agent), "now": now, "token": token}
        values["data"] = _dump("data", data)

        def work(connection: Any) -> None:
            sql = (
                "INSERT INTO runs (id, agent, status, data, created, updated, token) VALUES"
                " (:id, :agent, 'running', :data, :now, :now, :token) ON CONFLICT (id) DO NOTHING"
            )
            if execute(connection, sql, **values).rowcount:
                return
            sql = "SELECT token FROM runs WHERE id = :id"
            if execute(connection, sql, id=run_id).scalar() != token:
                raise ConflictError(f"there is a run {run_id!r} already: choose another id")

        self._store.run(work)

    def append(self, run_id: str, number: int, kind: str, payload: Any) -> None:
        """Write a step down.

        Raises:
            ConflictError: this number is written already: another process works on the run.
            StoreError: there is no such run (`missing`), or the store cannot be used.
        """
        name, token = _name("run_id", run_id), self._clock.new_id()
        values = {"run": name, "number": number, "kind": clean(kind), "token": token}
        values["payload"] = _dump("payload", payload)

        def work(connection: Any) -> None:
            sql = "UPDATE runs SET updated = :now WHERE id = :run"
            if not execute(connection, sql, run=name, now=_now(self._clock)).rowcount:
                raise self._missing(name)
            sql = (
                "INSERT INTO steps (run, number, kind, payload, token) VALUES"
                " (:run, :number, :kind, :payload, :token) ON CONFLICT (run, number) DO NOTHING"
            )
            if execute(connection, sql, **values).rowcount:
                return
            sql = "SELECT token FROM steps WHERE run = :run AND number = :number"
            if execute(connection, sql, run=name, number=number).scalar() != token:
                raise ConflictError(
                    f"step {number} of the run {name!r} is written already: another process works on it"
                )

        self._store.run(work)

    def steps(self, run_id: str) -> list[Step]:
        """The steps in their order; none of a run that is not there."""
        sql = "SELECT number, kind, payload FROM steps WHERE run = :run ORDER BY number"
        rows = self._read(sql, run=_name("run_id", run_id))
        return [Step(row["number"], row["kind"], json.loads(row["payload"])) for row in rows]

    def finish(self, run_id: str, status: str) -> None:
        """Set the status: `done`, `failed`, `paused`, whatever the agent calls it."""
        name = _name("run_id", run_id)
        sql = "UPDATE runs SET status = :status, updated = :now WHERE id = :run"
        values = {"status": clean(status), "now": _now(self._clock), "run": name}
        if not self._store.run(lambda connection: execute(connection, sql, **values).rowcount):
            raise self._missing(name)

    def get(self, run_id: str) -> Run | None:
        """The run; `None` if there is none."""
        rows = self._read(f"SELECT {_RUN} FROM runs WHERE id = :id", id=_name("run_id", run_id))
        return _run(rows[0]) if rows else None

    def runs(self, status: str | None = None, *, limit: int = 100) -> list[Run]:
        """Runs, the last begun first; `status`: only these."""
        where = "" if status is None else "WHERE status = :status"
        sql = f"SELECT {_RUN} FROM runs {where} ORDER BY created DESC, id DESC LIMIT :limit"
        values = {} if status is None else {"status": status}
        return [_run(row) for row in self._read(sql, limit=limit, **values)]

    def _read(self, sql: str, **values: Any) -> Any:
        def work(connection: Any) -> Any:
            return execute(connection, sql, **values).mappings().all()

        return self._store.run(work, write=False)

    def _missing(self, name: str) -> StoreError:
        return self._store.error(f"has no run {name!r}", "missing")


def numbered_from(first: int, messages: Sequence[Stored], now: datetime) -> tuple[Stored, ...]:
    """The messages as they are kept: with numbers that begin with `first`, and with times."""
    return tuple(
        replace(stored, number=number, created=stored.created or now)
        for number, stored in enumerate(messages, first)
    )


def check_request(request: str | None, messages: Sequence[Stored]) -> str | None:
    """The request key as it is kept.

    Raises:
        LLMConfigError: it cannot be one, or there is no message to keep it with.
    """
    if request is None:
        return None
    if not messages:
        raise LLMConfigError("a request key needs a message that it is kept with: give one")
    key = _name("request", request)
    if len(key.encode()) > _REQUEST_BYTES:
        raise LLMConfigError(
            f"request has {len(key.encode())} bytes; give at most {_REQUEST_BYTES}"
        )
    return key


def repeated(name: str, number: int) -> RepeatedError:
    """The error of a request key that is there already."""
    return RepeatedError(
        f"message {number} of the conversation {name!r} has this request key already: it was said",
        number=number,
    )


def snippet(text: str, wanted: str) -> str:
    """The text around the first of the wanted words, on one line."""
    lower = text.lower()
    places = [lower.find(part) for part in (wanted.lower(), *wanted.lower().split())]
    at = next((place for place in places if place >= 0), 0)
    start, end = max(0, at - _SNIPPET), at + len(wanted) + _SNIPPET
    cut = " ".join(text[start:end].split())
    return ("…" if start else "") + cut + ("…" if end < len(text) else "")


_CONVERSATION: Final = "id, title, owner, created, updated, revision, parent, data"
_MESSAGE: Final = "m.number, m.message, m.usage, m.cost, m.model, m.status, m.created"
_RUN: Final = "id, agent, status, data, created, updated"
_INSERT_MESSAGE: Final = (
    "INSERT INTO messages (conversation, number, message, usage, cost, model, status, created, body,"
    " request) VALUES (:conversation, :number, :message, :usage, :cost, :model, :status, :created,"
    " :body, :request)"
)
_ALL: Final = 2**62  # more messages than there are


class _Engines(NamedTuple):
    """SQLAlchemy's engines for transactions that write, and for those that only read; often the same."""

    write: Any
    read: Any

    def dispose(self, *, close: bool = True) -> None:
        self.write.dispose(close=close)
        self.read.dispose(close=close)


class _Process:
    """What a process owns: connections, and the threads inside a transaction, each with its own."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.engines: _Engines | None = None
        self.inside: dict[int, Any] = {}
        self.broken = False


@dataclass(frozen=True)
class _Trouble:
    sign: str  # in the text of the error
    reason: Reason
    advice: str
    states: tuple[str, ...] = ()  # SQLSTATEs, or how they begin


# Python 3.10 does not hand over SQLite's error codes; its texts are the same in all versions.
_SQLITE_TROUBLES: Final = (
    _Trouble("not a database", "foreign", "is not a SQLite database: choose another path"),
    _Trouble("malformed", "corrupt", "is corrupt: restore it from a copy"),
    _Trouble("is full", "full", "cannot grow, the disk is full: make room"),
    _Trouble("disk I/O", "full", "cannot be written, the disk is full or fails: make room"),
    _Trouble("locked", "locked", "is locked by another process: end that process, or wait"),
    _Trouble("readonly", "read-only", "is read-only: allow writing to it and to its directory"),
    _Trouble(
        "unable to open",
        "read-only",
        "cannot be opened: it must be a file that may be written, in a directory that may be",
    ),
    _Trouble("ermission denied", "read-only", "may not be created: allow writing to its directory"),
)

# "PostgreSQL Error Codes", PostgreSQL 18. An error of connecting has no code, so its text must do; in
# another language it counts as unreachable.
_NEVER: Final = "\0"
_POSTGRES_TROUBLES: Final = (
    _Trouble("authentication failed", "refused", "refuses the login: look at the user", ("28",)),
    _Trouble("no pg_hba.conf entry", "refused", "refuses this user or host: look at pg_hba.conf"),
    _Trouble("does not exist", "missing", "has no such database or user: create it", ("3D000",)),
    _Trouble(_NEVER, "read-only", "is read-only: allow this user to write", ("25006", "42501")),
    _Trouble(_NEVER, "full", "cannot grow, the disk is full: make room", ("53100",)),
    _Trouble("too many clients", "unreachable", "has no connection left: try later", ("53300",)),
    _Trouble(_NEVER, "locked", "is locked by another writer: try again", ("55P03", "57014", "40")),
    _Trouble(_NEVER, "unreachable", "is being shut down: try later", ("57P", "08")),
)


def _parse(url: str) -> Any:
    try:
        import sqlalchemy.exc
        from sqlalchemy.engine import make_url
    except ImportError as error:
        raise _extra_missing() from error
    wanted = "give 'sqlite:///chat.db', ':memory:' or 'postgresql://user@host/database'"
    if url == MEMORY:
        url = "sqlite://"
    try:
        address = make_url(url)
    except (sqlalchemy.exc.ArgumentError, ValueError, AttributeError):
        # Without the URL: what cannot be read may hold a password anywhere.
        raise LLMConfigError(f"the URL of the store cannot be read: {wanted}") from None
    if address.drivername in ("postgresql", "postgres", "postgresql+psycopg"):
        try:
            import psycopg as _  # noqa: F401 - whether it is there
        except ImportError as error:
            raise _extra_missing() from error
        return address.set(drivername="postgresql+psycopg")
    if address.drivername not in ("sqlite", "sqlite+pysqlite"):
        raise LLMConfigError(f"a store cannot be kept in {address.drivername!r}: {wanted}")
    return address.set(drivername="sqlite+pysqlite")


def _extra_missing() -> LLMConfigError:
    return LLMConfigError("a store needs the extra `store`: pip install 'requests-llm[store]'")


def _path_of(address: Any) -> str | None:
    if not address.drivername.startswith("sqlite"):
        return None
    if address.database in (None, "", MEMORY):
        return MEMORY
    return os.path.realpath(str(address.database))


def _shown(address: Any) -> str:
    """Without the password, and without the query, where one may stand too."""
    if address.drivername.startswith("sqlite"):
        return repr(address.database or MEMORY)
    shown = address.set(drivername="postgresql", password=None).set(query={})
    return repr(shown.render_as_string(hide_password=True))


def _create(path: str) -> None:
    """Make the file, readable by its owner only; SQLite gives `-wal` and `-shm` the same mode."""
    with suppress(FileExistsError):
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))


def _prepare(connection: Any, _: Any) -> None:
    connection.isolation_level = None  # the transactions are begun here, see below
    connection.execute("PRAGMA foreign_keys = ON")
    # Bytes that the log of writes may keep on disk; while long reads overlap it grows without end.
    connection.execute(f"PRAGMA journal_size_limit = {64 << 20}")
    # SQLite's own knows ASCII only.
    connection.create_function("lower", 1, lambda text: text and text.lower(), deterministic=True)


def _begin(connection: Any) -> None:
    write = connection.get_execution_options().get("store_write", True)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")


def execute(connection: Any, sql: str, **values: Any) -> Any:
    """What SQLAlchemy gives for one statement with `:name` parameters."""
    return connection.execute(_statement(sql), values)


def execute_many(connection: Any, sql: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """One statement for many rows."""
    connection.execute(_statement(sql), rows)


@lru_cache(256)
def _statement(sql: str) -> Any:
    """A statement, read once: that costs as much as running it. There are few, for values are parameters."""
    import sqlalchemy

    return sqlalchemy.text(sql)


def _last_number(connection: Any, name: str) -> int:
    sql = "SELECT COALESCE(max(number), 0) FROM messages WHERE conversation = :id"
    return int(execute(connection, sql, id=name).scalar())


def _find_request(connection: Any, name: str, request: str) -> int | None:
    sql = "SELECT number FROM messages WHERE conversation = :id AND request = :request"
    number: int | None = execute(connection, sql, id=name, request=request).scalar()
    return number


def _token(connection: Any, name: str) -> Any:
    return execute(connection, "SELECT token FROM conversations WHERE id = :id", id=name).scalar()


def clean(text: str | None) -> str | None:
    """Text that both databases take: PostgreSQL has no NUL, and UTF-8 no half characters."""
    if text is None:
        return None
    return text.replace("\0", " ").encode("utf-8", "replace").decode()


def _name(what: str, given: Any) -> str:
    if not isinstance(given, str) or not 0 < len(given) <= _ID_LENGTH or clean(given) != given:
        raise LLMConfigError(
            f"{what} is {given!r:.80}; give a text of 1 to {_ID_LENGTH} characters without NUL"
        )
    return given


def _dump(what: str, value: Any) -> str:
    try:
        return json.dumps(value)  # in ASCII: every text passes, in every database
    except (TypeError, ValueError, RecursionError) as error:
        raise LLMConfigError(f"{what} cannot be written as JSON: {error}") from error


def _pattern(text: str) -> str:
    cleaned = (clean(text) or "").lower()
    for special in "!%_":
        cleaned = cleaned.replace(special, "!" + special)
    return f"%{cleaned}%"


def _now(clock: Clock) -> str:
    return _text_of(clock.utc())


def _text_of(moment: datetime) -> str:
    return moment.isoformat(timespec="microseconds")


def _message_row(stored: Stored, now: str) -> dict[str, Any]:
    said = {name: v for name, v in stored.message.model_dump().items() if v is not None}
    usage = stored.usage
    return {
        "message": _dump("a message", said),
        "usage": None if usage is None else _dump("usage", usage.model_dump()),
        "cost": None if stored.cost is None else str(stored.cost),
        "model": clean(stored.model),
        "status": stored.status,
        "created": now if stored.created is None else _text_of(stored.created),
        "body": (clean(stored.message.text) or "")[:_SEARCHED],
    }


def _stored(row: Mapping[str, Any]) -> Stored:
    usage, cost = row["usage"], row["cost"]
    return Stored(
        Message.model_validate(json.loads(row["message"])),
        None if usage is None else TokenUsage.model_validate(json.loads(usage)),
        None if cost is None else Decimal(cost),
        row["model"],
        row["status"],
        datetime.fromisoformat(row["created"]),
        row["number"],
    )


def _summary(row: Mapping[str, Any]) -> Summary:
    return Summary(
        row["id"],
        row["title"],
        row["owner"],
        datetime.fromisoformat(row["created"]),
        datetime.fromisoformat(row["updated"]),
        row["revision"],
        row["parent"],
        json.loads(row["data"]),
    )


def _run(row: Mapping[str, Any]) -> Run:
    return Run(
        row["id"],
        row["agent"],
        row["status"],
        json.loads(row["data"]),
        datetime.fromisoformat(row["created"]),
        datetime.fromisoformat(row["updated"]),
    )
