"""The end of a process that serves: its answers end in time, and a worker ends with its parent."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from multiprocessing import Pipe, parent_process
from multiprocessing.connection import Connection, wait
from typing import Any, Final

from fastapi import FastAPI

log = logging.getLogger("agents.service")

# Seconds that a thread may go on while another waits, 0.005 by default. A message passes from thread to
# thread some six times before its first word, and gives way at each statement of SQL: at 50 streams 45 ms
# with 0.005, 11 to 13 with 0.001, 7 with this, and no more work for the processor.
_SWITCH: Final = 0.0003


def watch(app: FastAPI) -> FastAPI:
    """Look after the end of the process that an application is served in.

    Told to stop, the answers under way have `grace` seconds; then they are cancelled, so that what they
    have is stored and their last event goes out, before the server cuts its connections. A worker whose
    parent is gone tells itself to stop.

    Called in the main thread, when the server has set its handlers of signals; elsewhere it does nothing.

    Returns:
        The same application.
    """
    sys.setswitchinterval(_SWITCH)
    if threading.current_thread() is not threading.main_thread():
        return app
    told, teller = Pipe(duplex=False)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _telling(teller, signal.getsignal(number)))
    threading.Thread(target=_end, args=(app.state.service, told), name="end", daemon=True).start()
    return app


def _telling(teller: Connection, before: Any) -> Any:
    """A handler that tells the waiting thread, and does what was done before."""

    def handle(number: int, frame: Any) -> None:
        teller.send_bytes(b"stop")  # no lock, as of an event: what was interrupted could hold it
        if callable(before):
            before(number, frame)

    return handle


def _end(service: Any, told: Connection) -> None:
    parent = parent_process()
    if told not in wait([told] if parent is None else [told, parent.sentinel]):
        log.warning("the process that began this worker is gone, so the worker ends")
        os.kill(os.getpid(), signal.SIGTERM)
    service.clock.sleep(service.settings.grace)
    service.cancel_all()
