"""`FaultServer`: a model's host that misbehaves by name, and the table of all that it can do.

`python -m LLM.testing.faults > docs/faults.md` writes the table as a page.
"""

from __future__ import annotations

import json
import select
import selectors
import socket
import ssl
import struct
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from types import MappingProxyType
from typing import Any

from LLM.clock import Clock
from LLM.testing.fault_bodies import BODY_FAULTS
from LLM.testing.fault_http import HTTP_FAULTS
from LLM.testing.fault_streams import STREAM_FAULTS
from LLM.testing.fault_wire import PART, RIGHT, Asked, End, Fault, Outcome, right, right_text
from LLM.testing.server import Received

__all__ = ["FAULTS", "Fault", "FaultServer", "Outcome", "faults_page", "right_text"]

FAULTS: Mapping[str, Fault] = MappingProxyType(
    {fault.name: fault for fault in (*HTTP_FAULTS, *BODY_FAULTS, *STREAM_FAULTS)}
)

# How long stop() waits for the threads of its connections, in seconds.
_JOIN_TIMEOUT = 1.0
_MAX_HEAD = 1024 * 1024

# What is listened to with nobody behind it: more than any backlog of 0 takes.
_FILLERS = 8


class FaultServer:
    """A server on loopback that speaks both dialects, and misbehaves in the way that is asked for.

    Each call of `url` opens a port with one fault::

        with FaultServer() as server:
            llm = LLM(base_url=server.url("drip-body"), timeout=2)

    Faults are the rows of `FAULTS`. Without a fault, and after it was shown `times` times, a port
    answers rightly: with a text that repeats the question (`right_text`), so that an answer to
    another question cannot be taken for it.

    Args:
        certificate: path of a PEM file with a certificate and its key, which the faults of TLS show.
    """

    def __init__(self, certificate: str | None = None) -> None:
        self._certificate = certificate
        self._lock = threading.Lock()
        self._ports: list[_Port] = []
        self._selector = selectors.DefaultSelector()
        self._wake, self._woken = socket.socketpair()
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._stopping = False
        self._threads: dict[threading.Thread, _Connection] = {}
        self._thread: threading.Thread | None = None
        self._elsewhere: str | None = None

    def __enter__(self) -> FaultServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def url(
        self, name: str | None = None, *, times: int | None = None, certificate: str | None = None
    ) -> str:
        """A base URL, without a path, whose endpoints misbehave in this way.

        Args:
            name: a key of `FAULTS`; `None` is a right server.
            times: how often the fault is shown before the port answers rightly; `None`: always.
            certificate: as for the class, for this port alone.

        Raises:
            ValueError: there is no such fault, or it needs a certificate and none was given.
        """
        if name is not None and name not in FAULTS:
            raise ValueError(f"there is no fault {name!r}; look into LLM.testing.FAULTS")
        fault = FAULTS[name] if name is not None else None
        context = None
        if fault is not None and fault.certificate:
            path = certificate or self._certificate
            if path is None and fault.stage == "request":
                raise ValueError(f"{name!r} needs a certificate: FaultServer(certificate=PATH)")
            if path is not None:
                context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
                context.load_cert_chain(path)
        port = _Port(fault, times, context)
        with self._lock:
            if self._stopping:
                port.close()
                raise RuntimeError("the server is closed")
            self._ports.append(port)
        if port.accepts:
            self._start()
            self._wake.send(b"+")
        return port.url

    def requests(self, name: str | None = None) -> int:
        """How many requests came whole to the ports with this fault; `None`: to those without one."""
        return len(self.received(name))

    def connections(self, name: str | None = None) -> int:
        """How many connections the ports with this fault accepted."""
        with self._lock:
            return sum(port.connections for port in self._ports if port.name == name)

    def received(self, name: str | None = None) -> list[Received]:
        """The requests that came whole to the ports with this fault, in their order."""
        with self._lock:
            return [r for port in self._ports if port.name == name for r in port.received]

    @property
    def elsewhere(self) -> str:
        """Base URL of the right server that redirects lead to; its requests count under `None`."""
        if self._elsewhere is None:
            self._elsewhere = self.url()
        return self._elsewhere

    def close(self) -> None:
        """Close all ports and connections, also those in the middle of a fault."""
        with self._lock:
            if self._stopping:
                return
            self._stopping = True
            thread, live = self._thread, list(self._threads.items())
        for _, connection in live:
            connection.stop()
        self._wake.send(b"-")
        if thread is not None:
            thread.join(_JOIN_TIMEOUT)
        for member, _ in live:
            member.join(_JOIN_TIMEOUT)
        self._selector.close()
        self._wake.close()
        self._woken.close()
        for port in self._ports:
            port.close()

    def _start(self) -> None:
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._accept, name="FaultServer", daemon=True
                )
                self._thread.start()

    def _accept(self) -> None:
        known = 0
        while not self._stopping:
            with self._lock:
                fresh, known = self._ports[known:], len(self._ports)
            for port in fresh:
                if port.accepts:
                    self._selector.register(port.listener, selectors.EVENT_READ, port)
            for key, _ in self._selector.select():
                if key.data is None:
                    self._woken.recv(1024)
                else:
                    self._serve(key.data)

    def _serve(self, port: _Port) -> None:
        try:
            sock, _ = port.listener.accept()
        except OSError:  # the client has left already
            return
        connection = _Connection(self, port, sock)
        thread = threading.Thread(target=self._run, args=(connection,), daemon=True)
        with self._lock:
            port.connections += 1
            if self._stopping:
                sock.close()
                return
            self._threads[thread] = connection
            thread.start()

    def _run(self, connection: _Connection) -> None:
        try:
            connection.run()
        finally:
            with self._lock:
                self._threads.pop(threading.current_thread(), None)

    def note(self, port: _Port, received: Received) -> None:
        """A request came whole."""
        with self._lock:
            port.received.append(received)

    def takes(self, port: _Port, stage: str) -> bool:
        """Whether the port's fault is shown at this stage, now."""
        with self._lock:
            return port.takes(stage)


class _Port:
    """A listening socket with one fault."""

    def __init__(self, fault: Fault | None, times: int | None, tls: ssl.SSLContext | None) -> None:
        self.name = fault.name if fault else None
        self.fault = fault
        self.tls = tls
        self.connections = 0
        self.received: list[Received] = []
        self._left = float("inf") if times is None else times
        stage = fault.stage if fault else "request"
        self.listener = socket.socket()
        self._fillers: list[socket.socket] = []
        self.listener.bind(("127.0.0.1", 0))
        self.address = self.listener.getsockname()
        self.accepts = stage in ("request", "connection")
        if self.accepts:
            self.listener.listen(128)
        elif stage == "backlog":
            self.listener.listen(0)
            self._fill()
        scheme = "https" if fault is not None and fault.tls else "http"
        self.url = f"{scheme}://127.0.0.1:{self.address[1]}"

    def _fill(self) -> None:
        """Take all places of the backlog, so that nobody else gets one."""
        for _ in range(_FILLERS):
            filler = socket.socket()
            filler.setblocking(False)
            filler.connect_ex(self.address)
            self._fillers.append(filler)
        # A connection on loopback is there at once, or never.
        select.select([], self._fillers, [], 0.1)

    def takes(self, stage: str) -> bool:
        if self.fault is None or self.fault.stage != stage or self._left <= 0:
            return False
        self._left -= 1
        return True

    def close(self) -> None:
        self.listener.close()
        for filler in self._fillers:
            filler.close()


class _Gone(Exception):
    """The client left, or the server stops."""


class _Connection:
    """One connection: reads requests, plays scripts."""

    def __init__(self, server: FaultServer, port: _Port, sock: socket.socket) -> None:
        self._server = server
        self._port = port
        self._sock = sock
        self._raw = sock  # below TLS
        self._buffer = b""
        self._over = False
        self._clock = Clock()

    def stop(self) -> None:
        """End it, from another thread."""
        self._over = True
        with suppress(OSError):
            socket.socket.shutdown(self._sock, socket.SHUT_RDWR)

    def run(self) -> None:
        """Serve until either side closes; a client may do so at any time."""
        try:
            with suppress(_Gone, OSError):
                self._serve()
        finally:
            self._sock.close()
            self._raw.close()

    def _serve(self) -> None:
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self._server.takes(self._port, "connection"):
            nothing = Received("", "", {}, b"", None)
            self._play(self._asked(nothing))
            return
        if self._port.tls is not None:
            self._sock = self._port.tls.wrap_socket(self._sock, server_side=True)
        while True:
            asked = self._asked(self._read_request())
            if self._server.takes(self._port, "request"):
                self._play(asked)
            else:
                self._send(right(asked))

    def _asked(self, received: Received) -> Asked:
        endpoint = received.path.partition("?")[0].removeprefix("/v1/")
        fault = self._port.fault
        known = endpoint in ("chat/completions", "completions", "messages", "models")
        return Asked(
            received,
            endpoint if known else "models",
            self._server.elsewhere if fault is not None and fault.group == "Redirects" else "",
            fault is not None and fault.tools,
        )

    def _play(self, asked: Asked) -> None:
        assert self._port.fault is not None  # noqa: S101 - for the type checker
        for step in self._port.fault.script(asked):
            if isinstance(step, bytes):
                self._send(step)
            elif isinstance(step, End):
                self._ends[step](self)
            else:
                self._pause(step)

    def _send(self, sent: bytes) -> None:
        if self._over:
            raise _Gone
        self._sock.sendall(sent)

    def _pause(self, seconds: float) -> None:
        """Wait, but not for a client that has left."""
        until = self._clock.now() + seconds
        while (left := until - self._clock.now()) > 0:
            if select.select([self._raw_or_tls()], [], [], left)[0]:
                self._gather()

    def _raw_or_tls(self) -> socket.socket:
        if self._sock.fileno() < 0:
            raise _Gone
        return self._sock

    def _gather(self) -> None:
        """Read what the client sends meanwhile; raise if that is its end."""
        more = self._sock.recv(65536)
        if not more or self._over:
            raise _Gone
        self._buffer += more

    def _hold(self) -> None:
        # What comes is left in the network's buffers: a server that does not listen.
        poll = 0.05
        while not self._over:
            try:
                self._sock.setblocking(True)
                if self._left_by_client():
                    raise _Gone
            except ssl.SSLError:
                raise _Gone from None
            self._clock.sleep(poll)
        raise _Gone

    def _left_by_client(self) -> bool:
        """Whether the client closed; without reading what it has sent before."""
        if not select.select([self._sock], [], [], 0)[0]:
            return False
        if isinstance(self._sock, ssl.SSLSocket):
            return not self._sock.recv(65536)
        return not self._sock.recv(1, socket.MSG_PEEK)

    def _close(self) -> None:
        if isinstance(self._sock, ssl.SSLSocket):
            with suppress(OSError, ValueError):
                self._sock = self._sock.unwrap()
        raise _Gone

    def _ragged(self) -> None:
        self._shut()
        raise _Gone

    def _shut(self) -> None:
        with suppress(OSError):
            socket.socket.shutdown(self._sock, socket.SHUT_RDWR)

    def _reset(self) -> None:
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        raise _Gone

    def _next(self) -> None:
        while not self._buffer:
            self._gather()
        self._buffer = b""

    def _drain(self) -> None:
        while True:
            self._gather()
            self._buffer = b""

    _ends: Mapping[End, Callable[[_Connection], None]] = MappingProxyType(
        {
            End.HOLD: _hold,
            End.CLOSE: _close,
            End.RAGGED: _ragged,
            End.RESET: _reset,
            End.NEXT: _next,
            End.DRAIN: _drain,
        }
    )

    def _read_request(self) -> Received:
        while b"\r\n\r\n" not in self._buffer:
            if len(self._buffer) > _MAX_HEAD:
                raise _Gone
            self._gather()
        top, _, rest = self._buffer.partition(b"\r\n\r\n")
        first, *lines = top.decode("latin-1").split("\r\n")
        method, path, _ = first.split(" ", 2)
        headers = {
            name.strip().lower(): value.strip()
            for name, _, value in (line.partition(":") for line in lines)
        }
        pieces, missing = [rest], int(headers.get("content-length", "0")) - len(rest)
        while missing > 0:
            self._buffer = b""
            self._gather()
            pieces.append(self._buffer)
            missing -= len(self._buffer)
        body = b"".join(pieces)
        cut = len(body) + missing if missing < 0 else len(body)
        body, self._buffer = body[:cut], body[cut:]
        received = Received(method, path, headers, body, _json(body))
        self._server.note(self._port, received)
        return received


def _json(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        return None


_HEAD = """\
# Faults

What a call comes to when the server misbehaves. Each row is a test, in each dialect that it names,
against a socket that does just this; the page is written from the same rows
(`python -m LLM.testing.faults > docs/faults.md`). In every row only an `LLMError` leaves the client, within
its clock and half a second, with the key nowhere in it, and the next call on the same client is right.

Any of them can be had by name, to see how a program of one's own takes it:

```python
from LLM import LLM, LLMError
from LLM.testing import FaultServer

with FaultServer() as server:
    with LLM(base_url=server.url("headers-cut", times=1), retry_delay=0) as llm:
        reply = llm.chat_completion([{{"role": "user", "content": "Hello!"}}])
    assert (reply.attempts, server.requests("headers-cut")) == (2, 2)
```

`times=1` shows the fault once and answers rightly from then on; left out, the fault stays. *Retried* means
that the client tries again by itself; of a stream it can, as long as nothing was handed over.

{rows} rows, {cases} cases.
"""


def cases() -> Iterator[tuple[Fault, str, bool, Outcome]]:
    """Each fault in each dialect, streamed (`True`) and not, with its outcome."""
    for fault in FAULTS.values():
        for dialect in fault.dialects:
            for streams, outcome in ((False, fault.outcome), (True, fault.streamed)):
                if outcome is not None:
                    yield fault, dialect, streams, outcome


def faults_page() -> str:
    """`docs/faults.md`."""
    pieces = [_HEAD.format(rows=len(FAULTS), cases=sum(1 for _ in cases()))]
    groups = dict.fromkeys(fault.group for fault in FAULTS.values())
    for group in groups:
        lines = [
            f"\n## {group}\n",
            "| fault | the server | a call | a stream |",
            "| --- | --- | --- | --- |",
        ]
        for fault in FAULTS.values():
            if fault.group == group:
                cells = [
                    f"`{fault.name}`",
                    _what(fault),
                    _words(fault.outcome),
                    _words(fault.streamed),
                ]
                lines.append(f"| {' | '.join(cells)} |")
        pieces.append("\n".join(lines) + "\n")
    return "".join(pieces)


def _what(fault: Fault) -> str:
    only = "" if len(fault.dialects) > 1 else f" ({fault.dialects[0]} only)"
    return fault.says.replace("|", "\\|") + only


def _words(outcome: Outcome | None) -> str:
    """An outcome in a few words."""
    if outcome is None:
        return ""
    facts = []
    if outcome.error is None:
        words = {RIGHT: "the answer", "": "an empty answer"}.get(outcome.text, "an answer")
        words = "tool calls" if outcome.tools and not outcome.text else words
    else:
        words = f"`{outcome.error}`"
        if outcome.clock:
            words = f"`{outcome.error}({outcome.clock})`"
        if outcome.status and outcome.status != 200:
            facts.append(str(outcome.status))
        if outcome.text == PART or outcome.tools:
            facts.append("with what came")
        if outcome.wait is not None:
            facts.append(f"wait {outcome.wait:g} s")
        if outcome.retried:
            facts.append("retried")
        elif outcome.slow:
            facts.append("too long to retry")
    return ", ".join([words, *facts])


if __name__ == "__main__":
    sys.stdout.write(faults_page())
