"""What garbage collection may not do itself: end what somebody forgot, with locks and callbacks.

A finalizer runs wherever its thread happens to allocate, also inside a lock that the end needs, and
would then wait for itself for ever. So it only hands over what is to be ended.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from queue import SimpleQueue

from LLM.forks import renew_after_fork

log = logging.getLogger("LLM")


class Reaper:
    """One thread for the process that ends what was forgotten; it starts with the first that may be."""

    def __init__(self) -> None:
        self.after_fork()
        renew_after_fork(self)

    def after_fork(self) -> None:
        # Its `put` may be called while it is being called: the only queue of which that is true.
        self._forgotten: SimpleQueue[Callable[[], object]] = SimpleQueue()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def begin(self) -> None:
        """Be there for what is forgotten from now on. A finalizer itself could not start a thread."""
        if self._thread is None:
            with self._lock:
                if self._thread is None:
                    thread = threading.Thread(target=self._work, name="LLM reaper", daemon=True)
                    thread.start()
                    self._thread = thread

    def take(self, end: Callable[[], object]) -> None:
        """For finalizers: `end` is called soon, by the reaper's thread."""
        self._forgotten.put(end)

    def _work(self) -> None:
        forgotten = self._forgotten
        while True:
            end = forgotten.get()
            try:
                end()
            except Exception:
                log.exception("what was forgotten could not be ended")
            del end  # while waiting for the next, hold nothing


REAPER = Reaper()
