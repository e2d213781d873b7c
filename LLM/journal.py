"""The journal of a map: one line of JSON for each finished item, in the file before anybody is told.

The first line says what was asked of all items; a journal of another job is refused. One process at a time
may have it open. A line begins with the item's key, so that a million of them are looked through in
seconds; what follows is read only when it is wanted.
"""

from __future__ import annotations

import json
import logging
import os
import re
import stat
import sys
import threading
import weakref
from array import array
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, NamedTuple

from LLM.errors import LLMError

log = logging.getLogger("LLM")

_VERSION: Final = 1
_HEAD: Final = b'{"journal":"LLM.map","version":'
# As `_line` writes it. A key in quotes is the caller's own, a bare number is the place of an item.
_BEGINNING: Final = (
    rb'\{"key":(?:(\d{1,18})|("(?:[^"\\]|\\.)*")),"hash":"([0-9a-f]{16})","ok":(true|false),'
)
_SYNC_SECONDS: Final = 1.0  # the most that a machine that loses its power can take along


class JournalError(LLMError):
    """The journal cannot be used, or what it holds does not fit the items.

    Attributes:
        path: of the journal.
        busy: another run has it open.
    """

    def __init__(
        self, message: str = "", *, path: str = "", busy: bool = False, **details: Any
    ) -> None:
        super().__init__(message, **details)
        self.path = path
        self.busy = busy


class Mark(NamedTuple):
    """By what an item is known.

    Attributes:
        place: its number in the order of the items, from 0.
        key: the caller's own name for it; `None`: it is known by its place.
        hash: 64 bits of its content.
    """

    place: int
    key: str | None
    hash: int

    @property
    def name(self) -> str:
        """For a message."""
        return f"item {self.place}" if self.key is None else f"item {self.place} ({self.key!r:.80})"


class Journal:
    """A file of finished items, open and locked until `close`. Its methods may be called by all threads.

    Args:
        path: the file; it is made if it is not there, its folder is not.
        job: what is asked of all items, as plain JSON; it must be what it was when the file was made.

    Raises:
        JournalError: the file cannot be opened, is in use, or is not the journal of this job.
    """

    def __init__(self, path: str | os.PathLike[str], job: Mapping[str, Any]) -> None:
        self.path = os.fspath(path)
        self.notes: list[Any] = []  # of those who `note`, the oldest first
        self._lock = threading.Lock()
        self._failure: JournalError | None = None
        # Where the line of a finished item begins, and the hash of its content; 0: it is not finished
        # (no line begins there, the first one does). Of items known by their place, at that place.
        self._by_place = array("Q"), array("Q")
        # Of items with a key of their own, at the number that their key has here, and beside it the
        # place at which the key was met in this run.
        self._numbers: dict[str, int] = {}
        self._by_number = array("Q"), array("Q")
        self._met = array("q")
        self._file = _File(self._opened(), self.path)
        self._finalizer = weakref.finalize(self, self._file.close)
        try:
            self._take_over(job)
        except BaseException:
            self._finalizer()
            raise

    def __repr__(self) -> str:
        return f"Journal({self.path!r})"

    def __len__(self) -> int:
        """How many items were finished when it was opened."""
        return sum(
            offset > 0 for offsets in (self._by_place, self._by_number) for offset in offsets[0]
        )

    def find(self, mark: Mark) -> bytes | None:
        """The line of an item that is finished; `None` if it is still to be asked.

        Raises:
            JournalError: another item of this run has the same key; or the item's content is not what
                it was when it was finished; or the file cannot be read.
        """
        with self._lock:
            if mark.key is None:
                number, (offsets, hashes) = mark.place, self._by_place
            else:
                number, (offsets, hashes) = self._meet(mark), self._by_number
            if number >= len(offsets) or not offsets[number]:
                return None
            if hashes[number] != mark.hash:
                raise self._error(
                    f"{mark.name} is not what it was when {self.path} was written: "
                    "restore it, give it another key, or choose another journal"
                )
            try:
                return self._file.line_at(offsets[number])
            except (OSError, ValueError) as error:
                raise self._error(f"{self.path} cannot be read: {error}") from error

    def add(self, mark: Mark, *, ok: bool, fields: bytes) -> None:
        """Write down that an item is finished. When it returns, the operating system has the line.

        Args:
            ok: whether it need not be asked again.
            fields: the rest of the line, as the inside of a JSON object, without a line break.

        Raises:
            JournalError: it could not be written; nothing of it is left in the file, and nothing more
                will be written.
        """
        key = str(mark.place) if mark.key is None else json.dumps(mark.key)
        head = f'{{"key":{key},"hash":"{mark.hash:016x}","ok":{"true" if ok else "false"},'
        self._write(b"%s%s}\n" % (head.encode("ascii"), fields))

    def note(self, value: Any) -> None:
        """Write down anything else; whoever opens the journal again finds it in `notes`."""
        self._write(b'{"note":%s}\n' % json.dumps(value, separators=(",", ":")).encode("ascii"))
        self._file.sync()
        self.notes.append(value)

    def close(self) -> None:
        """Bring everything to the disk, and let others open it."""
        with self._lock:  # nobody is writing
            if self._failure is None:
                self._failure = self._error(f"{self.path} is closed")
            self._finalizer()

    def _meet(self, mark: Mark) -> int:
        """The number of a key, which may be met once in a run."""
        assert mark.key is not None  # noqa: S101 - tells mypy
        number = self._number(mark.key)
        if self._met[number] >= 0:
            raise self._error(
                f"items {self._met[number]} and {mark.place} have the same key {mark.key!r:.80}: "
                "each needs its own"
            )
        self._met[number] = mark.place
        return number

    def _number(self, key: str) -> int:
        number = self._numbers.setdefault(key, len(self._met))
        if number == len(self._met):
            self._met.append(-1)
            for values in self._by_number:
                values.append(0)
        return number

    def _opened(self) -> int:
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT
        flags |= (
            getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0)
        )
        try:
            file = os.open(self.path, flags, 0o600)  # it holds what was asked and answered
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise self._error(
                f"{self.path} cannot be written: {reason}; choose another path for the journal"
            ) from error
        try:
            if not stat.S_ISREG(os.fstat(file).st_mode):
                raise self._error(f"{self.path} is no file: choose another path for the journal")
            if not _locked(file):
                raise JournalError(
                    f"{self.path} is in use by another run: wait for its end, or choose another path",
                    path=self.path,
                    busy=True,
                )
        except BaseException:
            os.close(file)
            raise
        return file

    def _take_over(self, job: Mapping[str, Any]) -> None:
        """Read what is there; cut off a line that was torn when its writer died."""
        try:
            with Path(self.path).open("rb", buffering=1 << 20) as lines:
                first = lines.readline(1 << 24)
                torn = not first.endswith(b"\n") and _HEAD.startswith(first[: len(_HEAD)])
                if not first or torn:
                    end = 0
                else:
                    self._check(first, job)
                    end = len(first) + self._scan(lines, len(first))
            if end < os.fstat(self._file.number).st_size:
                os.ftruncate(self._file.number, end)
                log.warning("%s ended in a torn line, which was cut off", self.path)
            self._file.size = end
        except OSError as error:
            raise self._error(f"{self.path} cannot be read: {error.strerror or error}") from error
        if not end:
            head = _HEAD + b'%d,"job":%s}\n' % (_VERSION, json.dumps(job, sort_keys=True).encode())
            self._write(head)
            self._file.sync()
            _sync_folder(self.path)

    def _check(self, first: bytes, job: Mapping[str, Any]) -> None:
        """Whether it is a journal of ours, and of this job."""
        try:
            head = json.loads(first) if first.startswith(_HEAD) else {}
            version, known = head["version"], dict(head["job"])
        except (ValueError, KeyError, TypeError, RecursionError):
            raise self._error(f"{self.path} is not a journal: choose another path") from None
        if version != _VERSION:
            raise self._error(
                f"{self.path} is a journal of version {version}, and this library knows {_VERSION}: "
                "go on with the library that wrote it, or choose another path"
            )
        asked = json.loads(json.dumps(job))
        differing = [
            name
            for name in sorted(known.keys() | asked.keys())
            if known.get(name) != asked.get(name)
        ]
        if differing:
            told = ", ".join(
                f"{name} was {known.get(name)!r:.60} and is {asked.get(name)!r:.60}"
                for name in differing
            )
            raise self._error(
                f"{self.path} is the journal of another job ({told}): choose another path"
            )

    def _scan(self, lines: Any, offset: int) -> int:
        """Note where the finished items are. Returns the length of what is whole."""
        begin, size = offset, os.fstat(self._file.number).st_size
        unreadable = 0
        by_place, hashes = self._by_place
        match = re.compile(_BEGINNING).match
        for line in lines:
            if not line.endswith(b"\n"):
                break
            found = match(line)
            if found is None or not line.endswith(b"}\n"):
                unreadable += not self._take_note(line)
                offset += len(line)
                continue
            place, key, content, ok = found.groups()
            at = offset if ok == b"true" else 0
            if place is not None:
                number = int(place)
                if number >= len(by_place):
                    if number > size:  # no file of this size has so many items
                        unreadable, offset = unreadable + 1, offset + len(line)
                        continue
                    more = bytes(8 * (number + 1 - len(by_place) + number // 4))
                    by_place.frombytes(more)
                    hashes.frombytes(more)
                by_place[number], hashes[number] = at, int(content, 16)
            else:
                try:
                    number = self._number(json.loads(key.decode()))
                except ValueError:
                    unreadable, offset = unreadable + 1, offset + len(line)
                    continue
                self._by_number[0][number], self._by_number[1][number] = at, int(content, 16)
            offset += len(line)
        if unreadable:
            log.warning(
                "%s has %d damaged lines; those items are asked anew", self.path, unreadable
            )
        return offset - begin

    def _take_note(self, line: bytes) -> bool:
        with suppress(ValueError, KeyError, TypeError, RecursionError):
            self.notes.append(json.loads(line)["note"])
            return True
        return False

    def _write(self, line: bytes) -> None:
        with self._lock:
            if self._failure is not None:
                raise self._failure
            try:
                self._file.append(line)
            except OSError as error:
                self._failure = self._error(
                    f"{self.path} cannot be written: {error.strerror or error}; make room, and start "
                    "again with the same journal"
                )
                raise self._failure from error

    def _error(self, message: str) -> JournalError:
        return JournalError(message, path=self.path)


class _File:
    """The open file, apart from the journal, so that the thread that syncs it does not keep that alive."""

    def __init__(self, number: int, path: str) -> None:
        self.number = number
        self.path = path
        self.size = 0
        self._owner = os.getpid()
        self._dirty = False
        self._over = threading.Event()
        self._syncer: threading.Thread | None = None
        self._reader: Any = None  # the file once more, opened when a line is first read

    def append(self, line: bytes) -> None:
        """All of a line, or nothing of it."""
        written = 0
        try:
            written = os.write(self.number, line)
            while written < len(line):  # the disk is nearly full: the next write says so
                written += os.write(self.number, line[written:])
        except OSError:
            if written:
                with suppress(OSError):  # else whoever opens it next cuts the line off
                    os.ftruncate(self.number, self.size)
            raise
        self.size += len(line)
        self._dirty = True
        if self._syncer is None:
            self._syncer = threading.Thread(
                target=self._keep_synced, name="LLM journal", daemon=True
            )
            self._syncer.start()

    def line_at(self, offset: int) -> bytes:
        if self._reader is None:
            self._reader = Path(self.path).open("rb", buffering=1 << 18)  # noqa: SIM115 - see `close`
        self._reader.seek(offset)
        line: bytes = self._reader.readline()
        return line

    def sync(self) -> None:
        """Bring to the disk what the operating system has."""
        if self._dirty:
            self._dirty = False
            try:
                os.fsync(self.number)
            except OSError as error:
                log.warning("%s may not be on the disk: %s", self.path, error.strerror or error)

    def close(self) -> None:
        self._over.set()
        if self._reader is not None:
            self._reader.close()
        if os.getpid() != self._owner:  # a forked child must not unlock what its parent has locked
            os.close(self.number)
            return
        try:
            if self._syncer is not None and self._syncer is not threading.current_thread():
                self._syncer.join()
            self.sync()
        finally:  # also after Ctrl-C
            _unlock(self.number)
            os.close(self.number)

    def _keep_synced(self) -> None:
        while not self._over.wait(_SYNC_SECONDS):
            self.sync()


def finished(path: str) -> int:
    """How many items a journal has that need not be asked again; another may be writing it."""
    match = re.compile(_BEGINNING).match
    try:
        with Path(path).open("rb", buffering=1 << 20) as lines:
            begun = ((match(line), line) for line in lines)
            return sum(
                found is not None and found[4] == b"true" and line.endswith(b"}\n")
                for found, line in begun
            )
    except OSError:
        return 0


def _sync_folder(path: str) -> None:
    """That the file is there at all is on the disk, too."""
    with suppress(OSError):  # not every system lets a folder be opened
        folder = os.open(Path(path).resolve().parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


if sys.platform == "win32":
    import msvcrt

    _FAR: Final = 1 << 62  # a byte that is never written, so that others may read the file

    def _locked(file: int) -> bool:
        os.lseek(file, _FAR, os.SEEK_SET)
        try:
            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

    def _unlock(file: int) -> None:
        with suppress(OSError):
            os.lseek(file, _FAR, os.SEEK_SET)
            msvcrt.locking(file, msvcrt.LK_UNLCK, 1)

else:
    import fcntl

    def _locked(file: int) -> bool:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:  # some network file systems know no locks
            log.warning("a journal cannot be locked there: %s", error.strerror or error)
        return True

    def _unlock(file: int) -> None:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_UN)
