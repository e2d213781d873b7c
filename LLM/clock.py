"""Time, sleep and chance as an object, so that nothing else reads or draws them directly."""

from __future__ import annotations

import os
import random
import threading
import time
from datetime import datetime, timezone

from LLM.cancel import current_scope, woken
from LLM.forks import renew_after_fork


class Clock:
    """The real clock. Tests hand in one of their own with the same methods."""

    def now(self) -> float:
        """Seconds on a clock that never jumps; only differences mean anything."""
        return time.monotonic()

    def utc(self) -> datetime:
        """The date and time, for what is a date on the wire (`Retry-After`)."""
        return utc_now()

    def sleep(self, seconds: float) -> None:
        """Wait, at least `seconds` (0 and less: not at all); less only if what waits is cancelled."""
        if seconds <= 0:
            return
        if current_scope() is None:
            time.sleep(seconds)
            return
        over = threading.Event()
        with woken(over.set):
            over.wait(seconds)

    def new_id(self) -> str:
        """A string that no other call of any process has."""
        return _IDS.next()


def utc_now() -> datetime:
    """The date and time, in UTC."""
    return datetime.now(timezone.utc)


class _Ids:
    """Ids of 128 bits, many drawn at once: each question to the system lets another thread go first."""

    def __init__(self) -> None:
        self.after_fork()
        renew_after_fork(self)

    def after_fork(self) -> None:
        self._drawn: list[str] = []

    def next(self) -> str:
        while True:
            try:
                return self._drawn.pop()
            except IndexError:
                drawn = os.urandom(16 * 64).hex()
                self._drawn += [drawn[at : at + 32] for at in range(0, len(drawn), 32)]


_IDS = _Ids()


class Chance(random.Random):
    """A generator of one's own, seeded by the operating system; a forked child draws its own numbers."""

    def __init__(self) -> None:
        super().__init__()
        renew_after_fork(self)

    def after_fork(self) -> None:
        self.seed()
