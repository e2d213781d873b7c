"""Answers remembered: in memory or in a SQLite file, and one call under way for each question."""

from __future__ import annotations

import hashlib
import json
import logging
import threading
import zlib
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Literal, NamedTuple, Protocol, TypeVar, get_args

from LLM.cancel import caller, current_scope, woken
from LLM.clock import Clock
from LLM.errors import LLMConfigError
from LLM.forks import renew_after_fork
from LLM.policies.sqlite import MEMORY, Connection, Database, DatabaseError, sqlite_path

T = TypeVar("T")

log = logging.getLogger("LLM")

CacheMode = Literal["on", "read", "refresh", "off"]
CACHE_MODES: tuple[CacheMode, ...] = get_args(CacheMode)

MAX_BYTES = 256 * 1024 * 1024

# A call should not wait for a cache: half a second for a locked file, and then, as for every other
# trouble, none at all for ten.
BUSY_TIMEOUT = 0.5
REST = 10.0

# A hit is noted on disk (for "least recently used") only if the last note is older, in seconds; so
# hits write nothing.
TOUCH_EVERY = 60.0

# How long to wait for another's answer if the call has no deadline, in seconds: a stream that
# somebody forgot to read must not hold up the rest for ever.
PATIENCE = 300.0


class CacheStats(NamedTuple):
    """What a cache did and holds.

    Attributes:
        hits: looks that found an answer, by this object.
        misses: looks that did not; one that waited for another's call (`flight`) is not over before the
            look that follows.
        entries: answers stored, also by other processes; 0 if the file cannot be read.
        bytes: their size as stored (on disk: compressed), without the bookkeeping.
    """

    hits: int
    misses: int
    entries: int
    bytes: int


class ResponseCache:
    """Answers by key, the least recently used dropped first; shared by threads, clients, processes.

    Trouble with the file never spoils a call: nothing is found or stored, the log says why once, and
    `error` holds it. After ten seconds the file is tried again.

    Args:
        url: `:memory:`, `sqlite:///relative.db` or `sqlite:////absolute/path.db`. A file is made
            when first used, readable by its owner only: it holds what was asked and answered.
        ttl: seconds after which an answer is too old to be used; `None`: never.
        max_bytes: of the stored answers together; an answer that is larger alone is not stored.
            `None`: no limit.

    Raises:
        LLMConfigError: a setting makes no sense.
    """

    def __init__(
        self,
        url: str = MEMORY,
        *,
        ttl: float | None = None,
        max_bytes: int | None = MAX_BYTES,
        clock: Clock | None = None,
    ) -> None:
        path = sqlite_path(url)
        self.url = url
        self.ttl = _positive("ttl", ttl, "seconds", (int, float))
        self.max_bytes = _positive("max_bytes", max_bytes, "bytes", (int,))
        self._clock = clock or Clock()
        self._store: _Store
        if path == MEMORY:
            self._store = _MemoryStore(self.ttl, self.max_bytes, self._clock)
        else:
            self._store = _FileStore(url, self.ttl, self.max_bytes, self._clock)
        self._begin()

    def _begin(self) -> None:
        self._hits = self._misses = 0
        self._tower = _Tower()
        self.after_fork()
        renew_after_fork(self)

    def after_fork(self) -> None:
        """Start with a lock of one's own: the old one may be held by a thread of the parent's."""
        self._lock = threading.Lock()
        self._own = threading.local()  # `missed`: the key that this thread did not find

    def get(self, key: str) -> bytes | None:
        """The value stored for `key`; `None` if there is none, it is too old, or the file fails."""
        value = self._store.get(key)
        self._own.missed = key if value is None else None
        with self._lock:
            if value is None:
                self._misses += 1
            else:
                self._hits += 1
        return value

    def put(self, key: str, value: bytes) -> None:
        """Store `value` for `key`, in place of what was there; trouble with the file is only logged."""
        self._store.put(key, bytes(value))

    def delete(self, key: str) -> None:
        """Forget `key`, if it is known."""
        self._store.delete(key)

    def clear(self) -> None:
        """Forget everything, also what other processes stored in the same file."""
        self._store.clear()

    def flight(self, key: str, *, until: float | None) -> Flight:
        """Take part in the one call for `key`: lead it, or wait until its leader is done.

        If the leader's call failed (`get` still finds none), those who waited go on by themselves, all
        at once: one after the other they would wait for a host that fails as often as they are. If it was
        cancelled, which says nothing of the host, the one that waited longest leads in its place. A
        thread that is leading a call never waits for another: two that wait for each other, or one
        that waits for its own unread stream, would never end. It goes on by itself.

        Args:
            until: when to stop waiting, in the clock's seconds; `None`: after five minutes.
        """
        patience = PATIENCE if until is None else until - self._clock.now()
        flight = self._tower.board(key, patience)
        if flight.leader and not flight.waited:
            # Another may have landed between the caller's look and now.
            flight.waited = self._store.has(key)
        if flight.waited and getattr(self._own, "missed", None) == key:
            # The caller looks again, and that look counts.
            self._own.missed = None
            with self._lock:
                self._misses -= 1
        return flight

    @property
    def error(self) -> LLMConfigError | None:
        """What is wrong with the file, as last seen; `None` if nothing is."""
        return self._store.error

    def check(self) -> None:
        """Open the file now, so that trouble shows before the first call.

        Raises:
            LLMConfigError: it cannot be used; the text says why and what to do.
        """
        self._store.check()
        if self._store.error is not None:
            raise self._store.error

    def stats(self) -> CacheStats:
        """What it did and holds."""
        entries, size = self._store.totals()
        with self._lock:
            return CacheStats(self._hits, self._misses, entries, size)

    def close(self) -> None:
        """Close the file, or forget what is in memory; using the cache again opens it again."""
        self._store.close()

    def __enter__(self) -> ResponseCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"ResponseCache({self.url!r}, ttl={self.ttl}, max_bytes={self.max_bytes})"

    def __getstate__(self) -> dict[str, Any]:
        # A copy in another process uses the same file; one of a cache in memory begins empty.
        return {**self.__dict__, "_lock": None, "_own": None, "_tower": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()


# --- where the values are ---


class _Store(Protocol):
    @property
    def error(self) -> LLMConfigError | None: ...

    def get(self, key: str) -> bytes | None: ...

    def has(self, key: str) -> bool: ...

    def put(self, key: str, value: bytes) -> None: ...

    def delete(self, key: str) -> None: ...

    def clear(self) -> None: ...

    def totals(self) -> tuple[int, int]: ...

    def check(self) -> None: ...

    def close(self) -> None: ...


class _MemoryStore:
    error = None

    def __init__(self, ttl: float | None, max_bytes: int | None, clock: Clock) -> None:
        self.ttl = ttl
        self.max_bytes = max_bytes
        self.clock = clock
        self._begin()

    def _begin(self) -> None:
        self._lock = threading.Lock()
        # Least recently used first: the value, and when it was written.
        self._entries: OrderedDict[str, tuple[bytes, float]] = OrderedDict()
        self._bytes = 0
        renew_after_fork(self)

    def after_fork(self) -> None:
        if self._lock.locked():  # another thread was changing it: it may be half done
            self._begin()

    def get(self, key: str) -> bytes | None:
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                return None
            value, written = entry
            if self._too_old(written):
                self._remove(key)
                return None
            self._entries.move_to_end(key)
            return value

    def has(self, key: str) -> bool:
        entry = self._entries.get(key)
        return entry is not None and not self._too_old(entry[1])

    def put(self, key: str, value: bytes) -> None:
        with self._lock:
            self._remove(key)
            if self.max_bytes is not None:
                if len(value) > self.max_bytes:
                    return
                while self._bytes + len(value) > self.max_bytes:
                    self._remove(next(iter(self._entries)))
            self._entries[key] = value, self.clock.now()
            self._bytes += len(value)

    def delete(self, key: str) -> None:
        with self._lock:
            self._remove(key)

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()
            self._bytes = 0

    def totals(self) -> tuple[int, int]:
        with self._lock:
            return len(self._entries), self._bytes

    def check(self) -> None:
        pass

    def close(self) -> None:
        self.clear()

    def _too_old(self, written: float) -> bool:
        return self.ttl is not None and self.clock.now() - written >= self.ttl

    def _remove(self, key: str) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            self._bytes -= len(entry[0])

    def __reduce__(self) -> tuple[Any, ...]:
        return _MemoryStore, (self.ttl, self.max_bytes, self.clock)


# `totals` has one row: to sum the sizes at each `put` would read the whole index. Times are seconds
# since 1970, for they must mean the same to every process.
_SCHEMA = """
CREATE TABLE entries (
    id INTEGER PRIMARY KEY,
    key TEXT NOT NULL UNIQUE,
    written REAL NOT NULL,
    used REAL NOT NULL,
    size INTEGER NOT NULL,
    value BLOB NOT NULL
);
CREATE INDEX entries_used ON entries (used, id, size);
CREATE TABLE totals (entries INTEGER NOT NULL, bytes INTEGER NOT NULL);
INSERT INTO totals VALUES (0, 0)
"""


class _FileStore:
    """Values are deflated, which also gives each a checksum: damaged bytes are noticed.

    It makes them 40 to 60 % smaller, for some 60 µs a `put` and 5 µs a hit (answers of 0.5 to 8 KB).
    """

    def __init__(self, url: str, ttl: float | None, max_bytes: int | None, clock: Clock) -> None:
        self.ttl = ttl
        self.max_bytes = max_bytes
        self.clock = clock
        self.database = Database(
            url,
            kind="cache",
            application_id=0x4C4C4D43,  # "LLMC"
            schema=_SCHEMA,
            busy_timeout=BUSY_TIMEOUT,
        )
        self._touched: dict[str, float] = {}
        self._flushed = 0.0
        # Of reading and of writing, by `write`: a full disk can still be read.
        self._errors: dict[bool, LLMConfigError | None] = {False: None, True: None}
        self._resume = {False: float("-inf"), True: float("-inf")}
        self._told: set[str] = set()

    @property
    def error(self) -> LLMConfigError | None:
        return self._errors[False] or self._errors[True]

    def get(self, key: str) -> bytes | None:
        def read(connection: Connection) -> tuple[float, float, bytes] | None:
            found: tuple[float, float, bytes] | None = connection.execute(
                "SELECT written, used, value FROM entries WHERE key = ?", (key,)
            ).fetchone()
            return found

        row = self._attempt(read, None, write=False)
        if row is None:
            return None
        now = self._now()
        try:
            written, used = float(row[0]), float(row[1])
            value = zlib.decompress(row[2])
        except (zlib.error, TypeError, ValueError):
            return None  # damaged; the next `put` replaces it
        if self._too_old(written, now):
            return None
        if now - used >= TOUCH_EVERY:
            self._touch(key, now)
        return value

    def has(self, key: str) -> bool:
        def read(connection: Connection) -> bool:
            query = "SELECT written FROM entries WHERE key = ?"
            row = connection.execute(query, (key,)).fetchone()
            return row is not None and not self._too_old(float(row[0]), self._now())

        return self._attempt(read, default=False, write=False)

    def put(self, key: str, value: bytes) -> None:
        stored = zlib.compress(value, 1)  # level 6 is a few percent smaller
        if self.max_bytes is not None and len(stored) > self.max_bytes:
            self.delete(key)
            return
        now = self._now()

        def write(connection: Connection) -> None:
            self._flush(connection, now)
            self._remove(connection, "key = ?", (key,))
            connection.execute(
                "INSERT INTO entries (key, written, used, size, value) VALUES (?, ?, ?, ?, ?)",
                (key, now, now, len(stored), stored),
            )
            connection.execute(
                "UPDATE totals SET entries = entries + 1, bytes = bytes + ?", (len(stored),)
            )
            self._evict(connection, key)

        self._attempt(write, None, write=True)

    def delete(self, key: str) -> None:
        self._attempt(lambda c: self._remove(c, "key = ?", (key,)), None, write=True)

    def clear(self) -> None:
        def write(connection: Connection) -> None:
            connection.execute("DELETE FROM entries")
            connection.execute("UPDATE totals SET entries = 0, bytes = 0")

        self._attempt(write, None, write=True)

    def totals(self) -> tuple[int, int]:
        def read(connection: Connection) -> tuple[int, int]:
            entries, size = connection.execute("SELECT entries, bytes FROM totals").fetchone()
            return entries, size

        return self._attempt(read, (0, 0), write=False)

    def check(self) -> None:
        self._resume = dict.fromkeys(self._resume, float("-inf"))
        self.totals()
        self._attempt(lambda c: c.execute("UPDATE totals SET bytes = bytes"), None, write=True)

    def close(self) -> None:
        if self._touched:
            self._attempt(lambda c: self._flush(c, self._now()), None, write=True)
        self.database.close()

    def __reduce__(self) -> tuple[Any, ...]:
        # By the absolute path: the other process may have another working directory.
        url = f"sqlite:///{self.database.path}"
        return _FileStore, (url, self.ttl, self.max_bytes, self.clock)

    def _too_old(self, written: float, now: float) -> bool:
        # From long ago or, by a clock that was wrong, from a far future.
        return self.ttl is not None and abs(now - written) >= self.ttl

    def _now(self) -> float:
        return self.clock.utc().timestamp()

    def _touch(self, key: str, now: float) -> None:
        self._touched[key] = now
        if now - self._flushed >= TOUCH_EVERY:
            self._flushed = now
            self._attempt(lambda c: self._flush(c, now), None, write=True)

    def _flush(self, connection: Connection, now: float) -> None:
        """Write down which entries were used, and drop those that are too old for anybody."""
        touched, self._touched = self._touched, {}
        if touched:
            query = "UPDATE entries SET used = ? WHERE key = ?"
            connection.executemany(query, [(used, key) for key, used in list(touched.items())])
        if self.ttl is not None:
            # By `used`, which has an index and is never before `written`.
            self._remove(connection, "used <= ?", (now - self.ttl,))

    def _evict(self, connection: Connection, kept: str) -> None:
        if self.max_bytes is None:
            return
        (size,) = connection.execute("SELECT bytes FROM totals").fetchone()
        if size <= self.max_bytes:
            return
        oldest = connection.execute(
            "SELECT id, size FROM entries WHERE key <> ? ORDER BY used, id", (kept,)
        )
        doomed: list[tuple[int]] = []
        freed = 0
        for number, length in oldest:
            doomed.append((number,))
            freed += length
            if size - freed <= self.max_bytes:
                break
        oldest.close()
        connection.executemany("DELETE FROM entries WHERE id = ?", doomed)
        connection.execute(
            "UPDATE totals SET entries = entries - ?, bytes = bytes - ?", (len(doomed), freed)
        )

    def _remove(self, connection: Connection, condition: str, values: tuple[Any, ...]) -> None:
        query = f"SELECT count(*), total(size) FROM entries WHERE {condition}"  # noqa: S608 - ours
        entries, size = connection.execute(query, values).fetchone()
        if entries:
            connection.execute(f"DELETE FROM entries WHERE {condition}", values)  # noqa: S608 - ours
            connection.execute(
                "UPDATE totals SET entries = entries - ?, bytes = bytes - ?", (entries, int(size))
            )

    def _attempt(self, work: Callable[[Connection], T], default: T, *, write: bool) -> T:
        if self.clock.now() < self._resume[write]:
            return default
        try:
            result = self.database.run(work, write=write)
        except DatabaseError as error:
            self._rest(error, write=write)
            return default
        except (TypeError, ValueError):  # a row that is no row of ours
            path = self.database.path
            self._rest(DatabaseError(f"cache {path} is damaged: delete it", "corrupt"), write=write)
            return default
        trouble = self._errors[write]
        if trouble is not None:
            for kind, known in self._errors.items():
                if known is trouble:
                    self._errors[kind] = None
        return result

    def _rest(self, error: DatabaseError, *, write: bool) -> None:
        trouble = LLMConfigError(f"{error}; calls go on without it")
        trouble.__cause__ = error
        for kind in (write, True):  # what cannot be read will not be written either
            self._errors[kind] = trouble
            self._resume[kind] = self.clock.now() + REST
        if str(trouble) not in self._told:
            self._told.add(str(trouble))
            log.error("%s", trouble)


# --- one flight for each key ---


class Flight:
    """One thread's part in the call for a key; as a context manager it is done at the end, unless kept.

    Attributes:
        leader: this thread makes the call, and others wait for its `done`. If not, it goes on by
            itself: it was waiting too long, or is leading already.
        waited: another call for the key was under way, so that the cache is worth another look.
    """

    __slots__ = (
        "__weakref__", "_key", "_kept", "_scope", "_seat", "_tower", "leader", "waited",
    )  # fmt: skip

    def __init__(self, tower: _Tower, key: str, seat: _Seat | None, *, waited: bool) -> None:
        self._tower = tower
        self._key = key
        self._seat = seat
        self._kept = False
        self._scope = current_scope()
        self.leader = seat is not None
        self.waited = waited

    @property
    def alone(self) -> bool:
        """Not the leader: nobody waits for this one."""
        return not self.leader

    def keep(self) -> None:
        """The end of the `with` block is not the end of the call: `done` will be called later."""
        self._kept = True

    def done(self) -> None:
        """The call is over, well or not: those who wait may look. Calling it again does nothing."""
        seat, self._seat = self._seat, None
        if seat is not None:
            scope = self._scope
            self._tower.land(self._key, seat, cut=scope is not None and scope.cancelled)

    def __enter__(self) -> Flight:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None or not self._kept:
            self.done()

    def __del__(self) -> None:
        self.done()


class _Waiter:
    """A thread that waits. The lock is held until somebody hands it the lead."""

    __slots__ = ("called", "caller", "leads")

    def __init__(self, caller: int) -> None:
        self.caller = caller
        self.leads = False
        self.called = threading.Lock()
        self.called.acquire()


class _Seat:
    """The lead of one key: who has it, and who waits for it, in order."""

    __slots__ = ("leader", "waiters")

    def __init__(self, leader: int) -> None:
        self.leader = leader
        self.waiters: deque[_Waiter] = deque()


class _Tower:
    """Who leads which key.

    `land` also runs when a flight that nobody holds any more is collected: at any moment, in any
    thread, even one that is in `board` just now. So the lock is reentrant, each step in it leaves things
    in order, and threads wait for a bare lock: a `Condition` or `Event` would deadlock there.
    """

    def __init__(self) -> None:
        self.after_fork()
        renew_after_fork(self)

    def after_fork(self) -> None:
        self._lock = threading.RLock()
        self.seats: dict[str, _Seat] = {}  # the parent's calls under way are not the child's

    def board(self, key: str, patience: float) -> Flight:
        me = caller()
        mine = _Seat(me)
        waiter: _Waiter | None = None
        with self._lock:
            while True:
                seat = self.seats.setdefault(key, mine)
                if seat is mine:
                    return Flight(self, key, mine, waited=False)
                leading = any(each.leader == me for each in list(self.seats.values()))
                if leading or patience <= 0:
                    return Flight(self, key, None, waited=False)
                waiter = waiter or _Waiter(me)
                seat.waiters.append(waiter)
                if self.seats.get(key) is seat:  # it has not landed meanwhile, so it will call us
                    break
        return self._wait(key, seat, waiter, patience)

    def _wait(self, key: str, seat: _Seat, waiter: _Waiter, patience: float) -> Flight:
        def give_up() -> None:
            with self._lock, suppress(ValueError):
                seat.waiters.remove(waiter)
                waiter.called.release()  # once: whoever takes it off the list

        called = False
        try:
            with woken(give_up):
                called = waiter.called.acquire(timeout=min(patience, threading.TIMEOUT_MAX))
        except BaseException:
            give_up()
            if waiter.leads:  # since a moment ago
                self.land(key, seat, cut=True)
            raise
        if not called:  # too late
            give_up()
        return Flight(self, key, seat if waiter.leads else None, waited=True)

    def land(self, key: str, seat: _Seat, *, cut: bool = False) -> None:
        """Have those who waited go on, or, if the call was cut off, the first of them lead."""
        with self._lock:
            if cut and seat.waiters and self.seats.get(key) is seat:
                heir = seat.waiters.popleft()
                seat.leader = heir.caller
                heir.leads = True
                heir.called.release()
                return
            if self.seats.get(key) is seat:
                del self.seats[key]
            while seat.waiters:
                seat.waiters.popleft().called.release()


# --- which call is which ---

# What a request may say without changing the answer: how it is carried, who asked, what is noted
# down. OpenAI's "Create chat completion" and Anthropic's "Messages", 2026-11.
_IRRELEVANT = (
    "stream",
    "stream_options",
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
)


def _number(text: str) -> float:
    """1.0 and 1 are one number, as in JSON itself."""
    number = float(text)
    return int(number) if number.is_integer() else number


# Made once: `json.loads` and `json.dumps` would make new ones for each call.
_decode = json.JSONDecoder(parse_float=_number).decode
_encode = json.JSONEncoder(sort_keys=True, separators=(",", ":")).encode


def cache_key(*, dialect: str, base_url: str, headers: Mapping[str, str], body: bytes) -> str:
    """The same for two requests that must get the same answer; 64 hexadecimal digits.

    The order of parameters does not matter, nor how the answer is carried (`stream`) or who asks
    (`user`, the credential). Of the headers only those count that choose among versions of the API:
    names that end in `-beta` or `-version`.

    Args:
        body: the JSON that would be sent.
    """
    request = _decode(body.decode()) if body else {}
    for name in _IRRELEVANT:
        request.pop(name, None)
    versions = {
        name.lower(): value
        for name, value in headers.items()
        if name.lower().endswith(("-beta", "-version"))
    }
    text = _encode([dialect, _without_login(base_url), versions, request])
    return hashlib.sha256(text.encode()).hexdigest()


def _without_login(url: str) -> str:
    if "@" not in url:
        return url.rstrip("/")
    scheme, mark, rest = url.rstrip("/").partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}{mark}{host.rpartition('@')[2]}{slash}{path}"


def _positive(name: str, value: T | None, unit: str, types: tuple[type, ...]) -> T | None:
    if value is None:
        return None
    # `not >` refuses NaN as well.
    number: Any = value  # that it can be compared is what `types` says
    if isinstance(value, bool) or not isinstance(value, types) or not number > 0:
        raise LLMConfigError(
            f"{name} of the cache must be more than 0 {unit}, or None, not {value!r}"
        )
    return value
