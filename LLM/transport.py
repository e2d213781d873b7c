"""The only module that touches the network: the pool, the clocks of an attempt, cancelling.

It stands on `requests` and `urllib3` and mends, at their own seams, what a dependable client cannot
live with (each has its test): a `timeout` there is per read, so a server that drips holds its caller
for ever; 1xx answers are taken for the answer; headers cut short are an empty success; bytes left
over from one answer begin the next. Whatever they raise leaves here as an `LLMError`, without the
request (and so without the key) hanging from it.
"""

from __future__ import annotations

import errno
import http.client
import ipaddress
import logging
import os
import queue
import socket
import ssl
import sys
import threading
import zlib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar, Literal
from urllib.parse import urlsplit

import requests
import urllib3.exceptions
from requests.adapters import HTTPAdapter
from requests.cookies import RequestsCookieJar
from requests.models import PreparedRequest
from requests.utils import get_environ_proxies
from urllib3 import HTTPHeaderDict
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.response import HTTPResponse
from urllib3.util.wait import wait_for_write

from LLM.cancel import CancelScope, current_scope, woken
from LLM.clock import Clock
from LLM.config import LLMConfig, environment_ca_bundle
from LLM.errors import (
    LLMCancelledError,
    LLMConfigError,
    LLMConnectionError,
    LLMError,
    LLMResponseError,
    LLMTimeoutError,
)
from LLM.forks import renew_after_fork
from LLM.providers.base import MAX_ERROR_BODY, Call, WireRequest, WireResponse, clean, redact
from LLM.version import __version__

log = logging.getLogger("LLM")

_READ_SIZE = 64 * 1024

# How long a stream that has said all waits for the end of the response, so that its connection can be
# used again; most servers send both in one packet.
_END_GRACE = 0.05

# A time limit below this, in seconds, is kept to the millisecond, by the socket; the watchdog may be a
# tenth of a second late.
_PRECISE = 1.0

# A body up to this size travels in one packet train with its headers; a larger one would be copied.
_JOIN_LIMIT = 64 * 1024

# Longest line that frames a chunk (its size and extensions); the standard library's limit is the same.
_MAX_CHUNK_LINE = 65536

FOREVER = float("inf")

_USER_AGENT = f"requests-llm/{__version__}"


class Exchange:
    """One request and its answer, under its clocks.

    `due` is the time at which the watchdog ends it, and `clock` the name of the limit that this is.
    After any outcome ask `stopped` first: an exchange that was stopped looks like many things to the
    libraries below, an empty success among them.
    """

    __slots__ = (
        "__weakref__",
        "_finished",
        "_lock",
        "answered",
        "clock",
        "deadline_at",
        "due",
        "fresh_only",
        "reused",
        "scope",
        "sent",
        "socket",
        "stopped",
        "timeout",
    )

    def __init__(self, deadline_at: float) -> None:
        self.deadline_at = deadline_at
        self.due = self.deadline_at
        self.clock = "deadline"
        self.stopped: str | None = None  # why: the name of a clock, "cancelled" or "closed"
        self.reused = False  # the connection had served before
        self.sent = False  # the server may have begun to work, and to charge for it
        self.answered = False  # a byte of the answer came
        self.timeout: float | None = None  # seconds, for the message
        self.fresh_only = False  # do not take a pooled connection
        self.socket: Any = None
        self.scope: CancelScope | None = None  # what can cancel it
        self._finished = False
        self._lock = threading.Lock()

    def limit(self, due: float, clock: str) -> None:
        """End at `due`, or at the deadline if that is nearer."""
        if due < self.deadline_at:
            self.due, self.clock = due, clock
        else:
            self.due, self.clock = self.deadline_at, "deadline"

    def attach(self, sock: Any) -> None:
        """Use this socket from now on."""
        with self._lock:
            self.socket = sock
            if self.stopped:
                _shut_down(sock)

    def stop(self, why: str) -> None:
        """End it from any thread: whoever waits for its socket wakes up. Once it is finished: nothing."""
        with self._lock:
            if self._finished or self.stopped:
                return
            self.stopped = why
            if self.socket is not None:
                _shut_down(self.socket)

    def finish(self) -> None:
        """Let go of the socket: it may serve another call now."""
        with self._lock:
            self._finished = True
            self.socket = None
        WATCHDOG.unwatch(self)
        if self.scope is not None:
            self.scope.discard(self)

    def cancel(self) -> None:
        """Stop it because somebody wants it so."""
        self.stop("cancelled")


def _shut_down(sock: Any) -> None:
    if not isinstance(sock, socket.socket):  # TLS within the TLS of a proxy
        sock = getattr(sock, "socket", sock)
    with suppress(OSError, TypeError):  # not connected yet, or gone already
        # Not SSLSocket.shutdown: it would make the reader take ciphertext for the answer.
        socket.socket.shutdown(sock, socket.SHUT_RDWR)


class Watchdog:
    """One thread for the whole process that ends what is due, however a server keeps it busy.

    It looks ten times a second while anything is under way, and sleeps otherwise: registering costs
    a call under a microsecond, and none is ended more than a tenth of a second late.
    """

    TICK = 0.1
    LINGER = 20  # idle ticks before it sleeps until it is woken

    def __init__(self) -> None:
        self.after_fork()
        renew_after_fork(self)

    def after_fork(self) -> None:
        self._watched: dict[Exchange, None] = {}
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._parked = True
        self._wake = threading.Event()
        self._clock = Clock()

    def watch(self, exchange: Exchange) -> None:
        self._watched[exchange] = None
        if self._parked:
            try:
                self._rouse()
            except RuntimeError as error:  # the next call tries again
                self.unwatch(exchange)
                raise LLMError(f"the system does not give a thread: {error}") from None

    def watches(self, exchange: Exchange) -> bool:
        """Whether it will be ended when it is due."""
        return exchange in self._watched

    def unwatch(self, exchange: Exchange) -> None:
        self._watched.pop(exchange, None)

    def _rouse(self) -> None:
        with self._lock:
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="LLM-watchdog", daemon=True)
                thread.start()
                self._thread = thread
            self._parked = False
            self._wake.set()

    def _run(self) -> None:
        idle = 0
        while True:
            now = self._clock.now()
            nearest = now + self.TICK
            watched = list(self._watched)
            for exchange in watched:
                if exchange.due <= now:
                    exchange.stop(exchange.clock)
                elif exchange.due < nearest:
                    nearest = exchange.due
            idle = 0 if watched else idle + 1
            if idle < self.LINGER:
                self._clock.sleep(nearest - now)
                continue
            self._wake.clear()
            self._parked = True
            if not self._watched:  # else a call came just now and saw us still awake
                self._wake.wait()
            self._parked = False
            idle = 0


WATCHDOG = Watchdog()


class _Current(threading.local):
    """The exchange that this thread is in: how a connection deep inside urllib3 learns of it."""

    exchange: Exchange | None = None


_current = _Current()


class _Response(http.client.HTTPResponse):
    """An HTTP response that tells a cut one from a whole one. Parses headers and chunks itself.

    The standard library goes through an e-mail parser, which takes the end of the connection for
    the end of the headers, and hands out a chunk at a time, which costs more than the chunk.
    """

    def __init__(self, sock: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        self._wire = sock
        self.plain: dict[str, str] = {}  # the headers by lower-case name, the first of each
        self._held = b""  # bytes of the chunked framing that are not understood yet
        self._broken: http.client.HTTPException | None = None
        self._left = -1  # bytes left in the chunk; -1: its size line comes next; -2: the trailer

    def begin(self) -> None:
        if self.headers is not None:
            return
        if not self.fp.peek(1):
            raise http.client.RemoteDisconnected(
                "the server closed the connection without an answer"
            )
        exchange = _current.exchange
        if exchange is not None:
            exchange.answered = True
        version, status, reason = self._read_status()
        while 100 <= status < 200 and status != 101:  # 103 Early Hints and its kin
            self._read_header_lines()
            version, status, reason = self._read_status()
        self.code = self.status = status
        self.reason = reason.strip()
        self.version = 10 if version in ("HTTP/1.0", "HTTP/0.9") else 11
        if not version.startswith(("HTTP/1.", "HTTP/0.9")):
            raise http.client.UnknownProtocol(version)
        self.headers = self.msg = message = http.client.HTTPMessage()
        self.plain = {}
        for name, value in self._read_header_lines():
            message.set_raw(name, value)
            known = self.plain.setdefault(name.lower(), value)
            if known != value and name.lower() == "content-length":
                raise http.client.HTTPException("two different lengths")  # RFC 9112, section 6.3
        self._frame()

    def _read_header_lines(self) -> list[tuple[str, str]]:
        headers: list[tuple[str, str]] = []
        for _ in range(200):
            line = self.fp.readline(65537)
            if line in (b"\r\n", b"\n"):
                return headers
            if not line.endswith(b"\n"):
                if len(line) > 65536:
                    raise http.client.LineTooLong("header line")
                raise http.client.IncompleteRead(line)
            text = line.decode("latin-1").rstrip("\r\n")
            name, colon, value = text.partition(":")
            if text[:1] in " \t" and headers:  # a folded line
                headers[-1] = (headers[-1][0], f"{headers[-1][1]} {text.strip()}")
            elif colon and name == name.strip() and name:
                headers.append((name, value.strip()))
        raise http.client.HTTPException("got more than 200 headers")

    def _frame(self) -> None:
        """How long the body is, and whether the connection lives on."""
        coding = self.plain.get("transfer-encoding")
        self.chunked = coding is not None
        if coding is not None and coding.strip().lower() != "chunked":
            raise http.client.HTTPException(f"unknown transfer encoding {coding[:40]!r}")
        self.chunk_left = None
        connection = self.plain.get("connection", "").lower()
        self.will_close = "close" in connection or (
            self.version == 10 and "keep-alive" not in connection
        )
        length = self.plain.get("content-length", "")
        known = length.isdecimal() and len(length) < 19 and not self.chunked
        self.length = int(length) if known else None
        if self.status in (204, 304) or self.status == 101 or self._method == "HEAD":  # type: ignore[attr-defined]  # the same
            self.length = 0
        if self.length is None and not self.chunked:
            self.will_close = True

    def read1(self, n: int = -1) -> bytes:
        """What there is of the body: of a chunked one, all the chunks that have come; b"" at the end."""
        if self.fp is None:
            return b""
        if not self.chunked:
            return self._read1_plain(n)
        while self._left != -2:
            if self._broken is not None:
                raise self._broken
            data = self._held + self.fp.read1(_READ_SIZE)
            if len(data) == len(self._held):
                raise http.client.IncompleteRead(b"")
            self._held = b""
            body = self._unframe(data)
            if body:
                return body
        self._skip_trailer()
        self._close_conn()
        return b""

    def _read1_plain(self, n: int) -> bytes:
        size = _READ_SIZE if n < 0 else n
        data = self.fp.read1(size if self.length is None else min(size, self.length))
        if self.length is not None:
            if not data and self.length:
                raise http.client.IncompleteRead(b"", self.length)
            self.length -= len(data)
        if not data or self.length == 0:
            self._close_conn()
        return data

    def _unframe(self, data: bytes) -> bytes:
        """The body bytes in `data`; what is not understood yet is held."""
        pieces: list[bytes] = []
        position, size = 0, len(data)
        while position < size and self._left != -2:
            if self._left > 0:
                piece = data[position : position + self._left]
                pieces.append(piece)
                position += len(piece)
                self._left -= len(piece)
                continue
            try:
                end, left = self._next_size(data, position)
            except http.client.HTTPException as error:
                if not pieces:
                    raise
                self._broken = error  # what came before is good; the next read says this
                break
            if end < 0:
                break
            position, self._left = end, left or -2
        self._held = data[position:]
        if len(self._held) > _MAX_CHUNK_LINE and self._left != -2:
            raise http.client.LineTooLong("chunk size")
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _next_size(self, data: bytes, position: int) -> tuple[int, int]:
        """Where the next chunk begins and its size; (-1, 0) if its size line has not come yet."""
        if self._left == 0:  # the line end that closes the last chunk
            end = data.find(b"\n", position)
            if end < 0:
                return -1, 0
            if data[position:end].strip(b"\r"):
                raise http.client.HTTPException("a chunk is longer than its size says")
            position = end + 1
        end = data.find(b"\n", position)
        return (-1, 0) if end < 0 else (end + 1, _chunk_size(data[position:end]))

    def _skip_trailer(self) -> None:
        """Read to the blank line that ends a chunked body; many servers send nothing before it."""
        for _ in range(200):
            while b"\n" not in self._held:
                more = self.fp.read1(_READ_SIZE)
                self._held += more
                if not more or len(self._held) > _MAX_CHUNK_LINE:
                    # A few servers close here; nothing of the body is missing, but nobody may read on.
                    self.will_close = True
                    _shut_down(self._wire)
                    return
            line, _, self._held = self._held.partition(b"\n")
            if not line.strip(b"\r"):
                return
        raise http.client.HTTPException("got more than 200 trailers")

    def _close_conn(self) -> None:
        """The body is over: see to it that nothing after it can be taken for the next answer."""
        if not self.will_close and self.fp is not None and self._has_more():
            _shut_down(self._wire)  # the pool finds it dropped and opens another
        super()._close_conn()  # type: ignore[misc]  # private: not in the stubs

    def _has_more(self) -> bool:
        """Whether bytes after the answer were read already; those that were not the pool sees itself."""
        if self._held:
            return True
        if not isinstance(self._wire, socket.socket):  # it does not tell what it has decrypted
            try:
                self._wire.settimeout(0)
                return bool(self.fp.peek(1))
            except (OSError, ValueError):
                return False
        self.fp.raw.readinto = _nothing  # type: ignore[method-assign]  # `peek` asks it if its buffer is empty
        pending = getattr(self._wire, "pending", None)  # what TLS has decrypted
        return bool(self.fp.peek(1)) or (pending is not None and pending() > 0)


def _nothing(_: Any) -> None:
    """What a socket says that has nothing to read."""


def _chunk_size(line: bytes) -> int:
    digits = line.split(b";", 1)[0].strip()
    if not digits or len(digits) > 16 or digits.strip(b"0123456789abcdefABCDEF"):
        raise http.client.HTTPException("a chunk without a size")
    return int(digits, 16)


class _Wire(HTTPConnection):
    """A connection that tells the exchange which socket it uses, from before it is connected."""

    response_class = _Response  # for the answer to CONNECT
    tainted = False  # the request was not taken whole: never pooled

    def _new_conn(self) -> socket.socket:
        exchange = _current.exchange
        if exchange is None:
            return super()._new_conn()
        return _connect(self, exchange)

    def connect(self) -> None:
        exchange = _current.exchange
        try:
            super().connect()
        except TimeoutError as error:  # in the TLS handshake, or while a proxy opens a tunnel
            raise urllib3.exceptions.ConnectTimeoutError(self, "no connection in time") from error
        self.tainted = False
        if exchange is not None:
            exchange.attach(self.sock)

    def request(  # type: ignore[override]  # as urllib3's own does
        self,
        method: str,
        url: str,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
        **_: Any,
    ) -> None:
        """Send a request: in one piece, where urllib3 makes a call for each header, and two packets."""
        if body is not None and not isinstance(body, bytes):
            raise TypeError("the transport sends bytes")
        lines = [f"{method} {url} HTTP/1.1", f"Host: {self._host_header()}"]
        lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
        head = "\r\n".join(lines)
        if head.count("\n") != len(lines) - 1 or head.count("\r") != len(lines) - 1:
            raise ValueError("a header has a line break in it")
        data = head.encode("latin-1") + b"\r\n\r\n"
        self._asked = (method, url)
        try:
            if self.sock is None:
                self.connect()
            self._set_timeout()
            exchange = _current.exchange
            if exchange is not None:
                exchange.sent = True
            if body is not None and len(body) <= _JOIN_LIMIT:
                self.sock.sendall(data + body)
            else:
                self.sock.sendall(data)
                if body is not None:
                    self.sock.sendall(body)
        except OSError:
            # urllib3 goes on to read an answer that may have come before the request was whole.
            self.tainted = True
            raise

    def getresponse(self) -> HTTPResponse:  # type: ignore[override]  # as urllib3's own does
        """The answer's head, in the form that urllib3 gives it."""
        method, url = self._asked
        self._set_timeout()
        answer = _Response(self.sock, method=method)
        try:
            answer.begin()
        except BaseException:
            answer.close()
            raise
        if answer.will_close:
            super().close()  # the socket lives on in the answer
        return HTTPResponse(
            body=answer,
            headers=HTTPHeaderDict(answer.plain),
            status=answer.status,
            version=answer.version,
            reason=answer.reason,
            preload_content=False,
            decode_content=False,
            original_response=answer,
            request_method=method,
            request_url=url,
        )

    def _set_timeout(self) -> None:
        """Give the socket its timeout; none, where the watchdog keeps the time.

        With one, each send and each read is preceded by a `poll`, and to set it is a system call as well:
        for each of them other threads take the interpreter, and this one has to wait for it.
        """
        seconds = self.timeout
        watched = _current.exchange is not None and not sys.is_finalizing()
        if watched and isinstance(self.sock, socket.socket) and (seconds or _PRECISE) >= _PRECISE:
            seconds = None
        if self.sock.gettimeout() != seconds:
            self.sock.settimeout(seconds)

    def _host_header(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == self.default_port else f"{host}:{self.port}"


class _SecureWire(_Wire, HTTPSConnection):
    """The same over TLS. While the handshake wraps the socket, a duplicate stands in for it."""

    def connect(self) -> None:
        self._stand_in: socket.socket | None = None
        try:
            super().connect()
        finally:
            if self._stand_in is not None:
                self._stand_in.close()

    def _new_conn(self) -> socket.socket:
        sock = super()._new_conn()
        exchange = _current.exchange
        if exchange is not None:
            self._stand_in = sock.dup()
            exchange.attach(self._stand_in)
        return sock


def _connect(wire: HTTPConnection, exchange: Exchange) -> socket.socket:
    """A connected socket, within `wire.timeout` seconds for the name and all addresses together."""
    clock = Clock()
    seconds = wire.timeout if isinstance(wire.timeout, (int, float)) else FOREVER
    end = clock.now() + seconds
    host = wire._dns_host  # noqa: SLF001 - the name with the dot that the resolver must see
    try:
        addresses = _resolve(host, wire.port, end - clock.now())
    except OSError as error:
        raise urllib3.exceptions.NameResolutionError(host, wire, error) from error  # type: ignore[arg-type]  # any OSError will do
    failure: OSError = OSError("the name has no address")
    for index, (family, kind, protocol, _, address) in enumerate(addresses):
        sock = socket.socket(family, kind, protocol)
        try:
            for option in wire.socket_options or ():
                sock.setsockopt(*option)
            # A share of what is left for each address, so that one dead end leaves time for the next.
            left = (end - clock.now()) / (len(addresses) - index)
            sock.settimeout(None if left == FOREVER else max(left, 0.001))
            if wire.source_address:
                sock.bind(wire.source_address)
            exchange.attach(sock)
            _reach(sock, address, exchange)
            sock.settimeout(None if seconds == FOREVER else max(end - clock.now(), 0.001))
            return sock
        except OSError as error:
            failure = error
            sock.close()
    if isinstance(failure, TimeoutError):
        raise urllib3.exceptions.ConnectTimeoutError(
            wire, f"no connection to {host} in {seconds} s"
        )
    raise urllib3.exceptions.NewConnectionError(wire, str(failure)) from failure


def _reach(sock: socket.socket, address: Any, exchange: Exchange) -> None:
    """Connect, within the socket's timeout; a stop that comes before there is anything to stop counts."""
    timeout = sock.gettimeout()
    sock.settimeout(0)
    code = sock.connect_ex(address)
    if code in (errno.EINPROGRESS, errno.EWOULDBLOCK):
        exchange.attach(sock)  # from now on a stop reaches it
        if not wait_for_write(sock, timeout):
            raise TimeoutError("timed out")
        code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if code or exchange.stopped:
        raise OSError(code, os.strerror(code)) if code else OSError("stopped")
    sock.settimeout(timeout)


def _resolve(host: str, port: int, seconds: float) -> list[Any]:
    """The addresses of a name. The system's resolver cannot be told to stop, so it runs apart."""
    try:
        return socket.getaddrinfo(host, port, 0, socket.SOCK_STREAM, 0, socket.AI_NUMERICHOST)
    except socket.gaierror:
        pass  # a name
    answers: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def look_up() -> None:
        try:
            answers.put(socket.getaddrinfo(host, port, 0, socket.SOCK_STREAM))
        except (OSError, UnicodeError) as error:
            answers.put(OSError(str(error)))

    threading.Thread(target=look_up, name="LLM-resolver", daemon=True).start()
    try:
        with woken(lambda: answers.put(OSError("stopped"))):
            answer = answers.get(timeout=None if seconds == FOREVER else max(seconds, 0.001))
    except queue.Empty:
        raise TimeoutError(f"looking up {host} took more than {seconds:.1f} s") from None
    if isinstance(answer, OSError):
        raise answer
    return list(answer)


class _Pool(HTTPConnectionPool):
    @property
    def ConnectionCls(self) -> Any:  # type: ignore[override]  # noqa: N802 - urllib3's name for it
        """Ours, unless a recorder (vcrpy) has put one of its own in the place of urllib3's."""
        return _of_urllib3_or(HTTPConnectionPool.ConnectionCls, HTTPConnection, _Wire)

    def _get_conn(self, timeout: float | None = None) -> Any:
        if self.pool is None:  # the client was closed or reset just now: one of its own, not pooled
            return self._new_conn()
        conn: Any = super()._get_conn(timeout)
        exchange = _current.exchange
        if exchange is not None and conn.sock is not None:
            if exchange.fresh_only:
                conn.close()
            else:
                exchange.reused = True
                exchange.attach(conn.sock)
        return conn

    def _put_conn(self, conn: Any) -> None:
        if conn is not None and getattr(conn, "tainted", False):
            conn.close()
        pool = self.pool
        if pool is None or self.block:
            super()._put_conn(conn)
            return
        try:
            pool.put(conn, block=False)
        except queue.Full:  # of which urllib3 would warn in the user's log
            if conn is not None:
                conn.close()


class _SecurePool(_Pool, HTTPSConnectionPool):
    @property
    def ConnectionCls(self) -> Any:  # type: ignore[override]  # noqa: N802 - urllib3's name for it
        """The same over TLS."""
        return _of_urllib3_or(HTTPSConnectionPool.ConnectionCls, HTTPSConnection, _SecureWire)


def _of_urllib3_or(current: Any, stock: Any, ours: Any) -> Any:
    return ours if current is stock else current


class Adapter(HTTPAdapter):
    """`HTTPAdapter` over these connections; a session of one's own can mount it.

    It never retries and never follows: that is the pipeline's business.
    """

    _POOLS = {"http": _Pool, "https": _SecurePool}  # noqa: RUF012 - never changed

    @classmethod
    def like(cls, stock: HTTPAdapter) -> Adapter:
        """One of ours with the settings of `requests`' own. It never blocks on a full pool."""
        settings = vars(stock)
        return cls(settings["_pool_connections"], settings["_pool_maxsize"], stock.max_retries)

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs)
        self._pools: dict[Any, Any] = {}
        self._trust: ssl.SSLContext | Literal[False] | None = None  # None: not looked yet
        self.poolmanager.pool_classes_by_scheme = self._POOLS

    def get_connection_with_tls_context(
        self, request: PreparedRequest, verify: Any, proxies: Any = None, cert: Any = None
    ) -> Any:
        # Which pool serves an address is a long question with always the same answer.
        key = (request.url, verify, cert, *(proxies or {}).items())
        pool = self._pools.get(key)
        if pool is None or pool.pool is None:  # closed: this host has made room for others
            pool = super().get_connection_with_tls_context(request, verify, proxies, cert)
            self._pools[key] = pool
        return pool

    def cert_verify(self, conn: Any, url: Any, verify: Any, cert: Any) -> None:
        super().cert_verify(conn, url, verify, cert)  # type: ignore[no-untyped-call]  # its stubs say nothing
        if verify is True and conn.scheme == "https":  # else the user has said what to trust
            if self._trust is None:
                self._trust = _system_trust()
            if self._trust:
                conn.conn_kw["ssl_context"] = self._trust

    def build_response(self, req: PreparedRequest, resp: Any) -> requests.Response:
        """The response without cookies, and without a copy of its headers."""
        response = requests.Response()
        response.status_code = resp.status
        response.headers = resp.headers
        response.raw = resp
        response.reason = resp.reason
        response.url = req.url or ""
        response.request = req
        response.connection = self
        return response

    def close(self) -> None:
        self._pools.clear()
        super().close()

    def proxy_manager_for(self, proxy: str, **kwargs: Any) -> Any:
        manager = super().proxy_manager_for(proxy, **kwargs)
        if not proxy.lower().startswith("socks"):  # PySocks brings connections of its own
            manager.pool_classes_by_scheme = self._POOLS
        return manager


def _system_trust() -> ssl.SSLContext | Literal[False]:
    """A context that trusts what the operating system does, if `truststore` is installed."""
    try:
        import truststore
    except ImportError:
        return False
    context: ssl.SSLContext = truststore.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    return context


class _NoCookies(RequestsCookieJar):
    """Cookies are neither kept nor sent back: an API has no use for them, a gateway may track with them."""

    def extract_cookies(self, *_: Any) -> None:
        """Nothing."""


class _Headers(dict[str, str]):
    """The headers of a request; found under any spelling, as in `requests`, and quick to copy."""

    def __missing__(self, name: str) -> str:
        lower = name.lower()
        for known, value in self.items():
            if known.lower() == lower:
                return value
        raise KeyError(name)

    def add(self, name: str, value: str) -> None:
        """Set a header that is not there yet, under any spelling."""
        if name not in self and name.lower() not in map(str.lower, self):
            self[name] = value


class Transport:
    """Sends requests over one pooled `requests.Session`; shared by all threads.

    Args:
        config: for the pool and the network's settings.
        clock: the clock of the calls' deadlines.
        session: a session of the user's: its adapters, hooks and proxies are used; its
            authentication, cookies and redirects are not. Stock adapters in it are replaced by ours
            with the same settings; with another kind of adapter, a server that drips its headers
            can outlast the clocks.
    """

    # What `LLM.testing.cassette` puts before the network, for all clients of the process; the last counts.
    tapes: ClassVar[tuple[Any, ...]] = ()

    def __init__(
        self, config: LLMConfig, clock: Clock, session: requests.Session | None = None
    ) -> None:
        self._config = config
        self.given = session
        # What a call's deadline is measured with; sockets know only the real one.
        self._calls_clock = clock
        self._clock = Clock()
        self.closed = False
        self.after_fork()
        renew_after_fork(self)

    def after_fork(self) -> None:
        """Start over, leaving what there was untouched: in a child the connections are the parent's."""
        self._lock = threading.Lock()
        self._session: requests.Session | None = None
        self._streams: set[Exchange] = set()
        self._networks: dict[str, dict[str, Any]] = {}
        self._warned: set[str] = set()

    def send(self, request: WireRequest, call: Call) -> WireResponse:
        """The answer, read whole, within the call's clocks."""
        exchange = self._exchange(call, "timeout")
        try:
            raw = self._answer(request, exchange, call)
            return _read_all(raw, exchange, request, call.max_response_bytes)
        finally:
            exchange.finish()

    def open(self, request: WireRequest, call: Call) -> WireStream | WireResponse:
        """The answer as a stream; as a whole if it is not a 2xx."""
        exchange = self._exchange(call, "idle")
        stream = None
        try:
            raw = self._answer(request, exchange, call)
            if not 200 <= raw.status < 300:
                return _read_all(raw, exchange, request, call.max_response_bytes)
            stream = WireStream(raw, exchange, request, call, self._streams, self._clock)
            return stream
        finally:
            if stream is None:
                exchange.finish()

    def close(self) -> None:
        """Close the pool and every open stream; a later request opens new ones."""
        self.closed = True
        self._let_go()
        streams, self._streams = self._streams, set()
        for exchange in list(streams):
            exchange.stop("closed")

    def renew(self) -> None:
        """A fresh pool; whatever is under way finishes on the old one."""
        self._let_go()
        self._streams = set()

    def _exchange(self, call: Call, clock: str) -> Exchange:
        """A new exchange under the call's clocks, watched."""
        self.closed = False
        now = self._clock.now()
        left = FOREVER
        if call.deadline_at is not None:
            left = call.deadline_at - self._calls_clock.now()
        exchange = Exchange(now + left)
        exchange.timeout = call.timeout
        if call.timeout is not None:
            exchange.limit(now + call.timeout, clock)
        WATCHDOG.watch(exchange)
        scope = current_scope()
        if scope is not None:
            exchange.scope = scope
            scope.add(exchange, exchange.cancel)
        return exchange

    def _answer(self, request: WireRequest, exchange: Exchange, call: Call) -> Any:
        """The response with its body unread: from the network, or from what stands before it."""
        if not self.tapes:
            return self._fetch(request, exchange, call)
        return self.tapes[-1].answer(request, exchange, call, self._calls_clock, self._fetch)

    def _fetch(self, request: WireRequest, exchange: Exchange, call: Call) -> Any:
        """The same from the network. A stale connection costs one immediate resend."""
        for last in (True,) if request.once else (False, True):
            exchange.fresh_only = last
            failure = self._try(request, exchange, call)
            if not isinstance(failure, LLMError):
                return failure
            stale = exchange.reused and not exchange.answered and not exchange.stopped
            if last or not stale or isinstance(failure, LLMTimeoutError):
                break
            exchange.reused = False
        raise failure

    def _try(self, request: WireRequest, exchange: Exchange, call: Call) -> Any:
        now = self._clock.now()
        left = max(exchange.due - now, 0.001)
        connect = min(call.connect_timeout, left)
        network = self._network(request)
        _current.exchange = exchange
        exchange.sent = self.given is not None  # its adapters may not be ours, and say nothing
        try:
            response = self._live_session().send(
                self._prepare(request),
                stream=True,
                timeout=(connect, None if left == FOREVER else left),
                allow_redirects=False,
                **network,
            )
            raw: Any = response.raw
        except Exception as error:  # noqa: BLE001 - the seam: nothing foreign passes
            return translate(error, exchange, request, connect)
        finally:
            _current.exchange = None
        if exchange.stopped:
            raw.close()
            return translate(OSError("stopped"), exchange, request, connect)
        return raw

    def _live_session(self) -> requests.Session:
        session = self._session
        if session is None:
            with self._lock:
                session = self._session
                if session is None:
                    session = self._session = self._new_session()
        return session

    def _new_session(self) -> requests.Session:
        session = self.given
        if session is None:
            session = requests.Session()
            session.trust_env = False  # proxies and CA bundle are looked up once, in _network
            session.cookies = _NoCookies()
            adapter = Adapter(pool_connections=32, pool_maxsize=self._config.pool_size)
            session.mount("https://", adapter)
            session.mount("http://", adapter)
        else:
            for prefix, stock in list(session.adapters.items()):
                if type(stock) is HTTPAdapter:
                    session.mount(prefix, Adapter.like(stock))
        return session

    def _let_go(self) -> None:
        """Forget the session; close what is pooled. A connection in use closes when it comes back."""
        with self._lock:
            session, self._session = self._session, None
        if session is self.given and session is not None:
            for adapter in session.adapters.values():
                if isinstance(adapter, Adapter):
                    adapter.close()
        elif session is not None:
            session.close()

    def _prepare(self, request: WireRequest) -> PreparedRequest:
        """What `requests` would prepare, without .netrc, cookies, and parsing the URL each time."""
        prepared = PreparedRequest()
        prepared.method = request.method
        prepared.url = request.url
        headers = _Headers(request.headers)
        headers.add("User-Agent", _USER_AGENT)
        headers.add("Accept-Encoding", "identity")
        if request.credential is not None and request.key is not None:
            name, prefix = request.credential
            headers[name] = prefix + request.key.get_secret_value()
        if request.body is not None:
            headers["Content-Length"] = str(len(request.body))
        prepared.headers = headers  # type: ignore[assignment]  # as good as requests' own
        prepared.body = request.body
        prepared.hooks = {"response": [_no_redirect]}
        if self.given is not None:
            for name, value in self.given.headers.items():
                headers.add(name, str(value))
            prepared.hooks["response"] += self.given.hooks.get("response", [])
        return prepared

    def _network(self, request: WireRequest) -> dict[str, Any]:
        """Proxies, trust and client certificate for a host; looked up once, for it is slow."""
        found = self._networks.get(request.url)
        if found is None:
            found = self._networks[request.url] = self._look_up_network(request)
        return found

    def _look_up_network(self, request: WireRequest) -> dict[str, Any]:
        config, url = self._config, request.url
        host = urlsplit(url).hostname or ""
        proxies: dict[str, str] = dict(self.given.proxies) if self.given is not None else {}
        if not is_loopback(host):
            proxies = {**get_environ_proxies(url, no_proxy=None), **proxies}
        if config.proxies is not None:
            proxies.update(config.proxies)
        verify: bool | str = config.verify
        if verify is True and self.given is not None:
            verify = self.given.verify if self.given.verify is not None else True
        if verify is True:
            verify = environment_ca_bundle() or True
        self._warn_of_plain_http(request, host)
        cert = config.cert or (self.given.cert if self.given is not None else None)
        for path in (verify, *(cert if isinstance(cert, tuple) else (cert,))):
            if isinstance(path, str) and not Path(path).exists():
                raise LLMConfigError(f"verify or cert names {path!r}, and there is no such file")
        return {"proxies": proxies, "verify": verify, "cert": cert}

    def _warn_of_plain_http(self, request: WireRequest, host: str) -> None:
        plain = request.url.startswith("http://") and request.key is not None
        if plain and not is_loopback(host) and host not in self._warned:
            self._warned.add(host)
            log.warning("the key goes to %s unencrypted; use https", clean(host))


class WireStream:
    """The body of a 2xx answer, as it comes.

    The idle clock runs only while somebody waits: `expect` starts it, `rest` stops it.
    """

    def __init__(
        self,
        raw: Any,
        exchange: Exchange,
        request: WireRequest,
        call: Call,
        streams: set[Exchange],
        clock: Clock,
    ) -> None:
        self.status: int = raw.status
        self.headers = _headers(raw)
        self._body = _Body(raw)
        self._sock = exchange.socket
        self._exchange = exchange
        self._request = request
        self._timeout: float | None = call.timeout
        self._clock = clock
        self._streams = streams
        self._decode = _decoder(self.headers, call.max_response_bytes, request)
        self._closed = False
        streams.add(exchange)

    def expect(self, seconds: float | None = None) -> None:
        """Somebody waits for content from now on, for `seconds` or the call's `timeout` at the most."""
        wait = self._timeout if seconds is None else min(seconds, self._timeout or seconds)
        if wait is not None:
            self._exchange.limit(self._clock.now() + wait, "idle")

    def rest(self) -> None:
        """Nobody waits: only the deadline counts."""
        self._exchange.limit(FOREVER, "idle")

    def read(self) -> bytes:
        """The next bytes, as soon as there are any; b"" at the end.

        Raises:
            LLMConnectionError: the stream broke, a clock ran out, or it was stopped.
        """
        data = b""
        if not WATCHDOG.watches(self._exchange):  # a forked child: the stream is its parent's
            self._exchange.stopped = self._exchange.stopped or "closed"
            raise translate(OSError("stopped"), self._exchange, self._request, None)
        try:
            while not data:
                raw = self._body.read()
                if self._exchange.stopped:
                    break
                if self._decode is None:
                    return raw
                data = self._decode.feed(raw) if raw else self._decode.finish()
                if not raw:
                    return data
            else:
                return data
            broken = translate(OSError("stopped"), self._exchange, self._request, None)
        except LLMError as error:
            broken = error
        except Exception as error:  # noqa: BLE001 - the seam: nothing foreign passes
            broken = translate(error, self._exchange, self._request, None)
        self.close()
        raise broken

    def finish(self) -> None:
        """All was said: keep the connection if the response ends now, else close it."""
        if self._closed:
            return
        if self._sock is not None:
            end = self._clock.now() + _END_GRACE
            with suppress(Exception):  # it is closed then, and nothing of it was needed
                self._sock.settimeout(_END_GRACE)
                while self._body.read() and self._clock.now() < end:
                    pass
        self.close()

    def cancel(self) -> None:
        """Stop it from any thread."""
        self._exchange.cancel()

    def close(self) -> None:
        """Let go of the connection: back to the pool if the response was read to its end, else closed."""
        if self._closed:
            return
        self._closed = True
        self._exchange.finish()
        self._streams.discard(self._exchange)
        self._body.close()


def _no_redirect(response: requests.Response, **_: Any) -> None:
    # The first of the hooks. Those of the user may send requests of their own, which are not this exchange.
    _current.exchange = None
    # requests would read the whole body of a redirect, however long, even when told not to follow.
    response.headers.pop("location", None)


def _headers(raw: Any) -> dict[str, str]:
    ours = getattr(raw, "_original_response", None)
    if isinstance(ours, _Response):
        return ours.plain
    return {name.lower(): value for name, value in raw.headers.items()}


class _Body:
    """The bytes of an answer's body; gives its connection back when it is whole, else closes it."""

    def __init__(self, raw: Any) -> None:
        ours = getattr(raw, "_original_response", None)
        self._ours = ours if isinstance(ours, _Response) else None
        self._raw = raw

    def read(self) -> bytes:
        """What has come, b"" at the end."""
        if self._ours is not None:
            return self._ours.read1()
        # Not urllib3's own: a recorder's. What it plays has come already.
        foreign = not isinstance(self._raw, HTTPResponse)
        data: bytes = (
            self._raw.read(_READ_SIZE)
            if foreign
            else self._raw.read1(_READ_SIZE, decode_content=False)
        )
        return data

    def read_whole(self) -> bytes:
        """All of a body whose length is known, in one piece."""
        data: bytes = (
            self._raw.read(decode_content=False) if self._ours is None else self._ours.read()
        )
        return data

    def close(self) -> None:
        """Give the connection back, or close it; first let its exchange finish."""
        whole = self._raw.closed if self._ours is None else self._ours.isclosed()
        if not whole:
            self._raw.close()
        self._raw.release_conn()


def _read_all(raw: Any, exchange: Exchange, request: WireRequest, limit: int) -> WireResponse:
    """The answer with its decoded body: within `limit`, or, of an error, as much as is worth keeping."""
    headers = _headers(raw)
    excerpt = not 200 <= raw.status < 300
    body = _Body(raw)
    pieces: list[bytes] = []
    failure: LLMError | None = None
    try:
        _collect(body, pieces, headers, MAX_ERROR_BODY if excerpt else limit, request, excerpt)
    except LLMError as error:
        failure = error
    except Exception as error:  # noqa: BLE001 - the seam: nothing foreign passes
        failure = translate(error, exchange, request, None)
    finally:
        exchange.finish()
        body.close()
    if exchange.stopped:
        failure = translate(OSError("stopped"), exchange, request, None)
    # An error that says so in its first line is not less true if the rest does not come.
    if failure is not None and not (excerpt and exchange.stopped in (None, "timeout", "idle")):
        raise failure
    return WireResponse(raw.status, headers, b"".join(pieces))


def _collect(
    body: _Body,
    pieces: list[bytes],
    headers: Mapping[str, str],
    limit: int,
    request: WireRequest,
    excerpt: bool,
) -> None:
    decode = _decoder(headers, limit, request)
    length = headers.get("content-length", "")
    if decode is None and not excerpt and length.isdecimal() and len(length) < 19:
        if int(length) > limit:
            raise too_large(request, limit)
        pieces.append(body.read_whole())
        return
    size = 0
    while size <= limit:
        data = body.read()
        piece = data if decode is None else decode.feed(data) if data else decode.finish()
        size += len(piece)
        pieces.append(piece)
        if not data:
            return
    if not excerpt:
        raise too_large(request, limit)


def too_large(request: WireRequest, limit: int) -> LLMResponseError:
    return LLMResponseError(
        f"the answer of {_place(request)} is larger than {limit} bytes; raise max_response_bytes if it may be"
    )


class _Inflater:
    """gzip and deflate, bounded: a small body that unfolds into gigabytes is refused, a cut one too."""

    def __init__(self, limit: int, request: WireRequest) -> None:
        self._limit, self._request = limit, request
        self._size = 0
        self._inflate: Any = None

    def feed(self, data: bytes) -> bytes:
        pieces = []
        while data:
            if self._size > self._limit:  # what came before it has been handed over
                raise too_large(self._request, self._limit)
            if self._inflate is None:
                self._inflate = zlib.decompressobj(_window(data))
            out = self._inflate.decompress(data, self._limit - self._size + 1)
            self._size += len(out)
            pieces.append(out)
            if self._size > self._limit:
                break
            data = self._inflate.unconsumed_tail
            if self._inflate.eof and self._inflate.unused_data[:2] == b"\x1f\x8b":
                # A gzip file may be several, one after the other.
                data, self._inflate = self._inflate.unused_data, None
        return b"".join(pieces)

    def finish(self) -> bytes:
        if self._inflate is None or not self._inflate.eof:
            raise http.client.IncompleteRead(b"")
        return b""


def _window(data: bytes) -> int:
    """How zlib is to read what begins like this: gzip, zlib, or deflate without any header."""
    if data[0] == 0x1F:
        return zlib.MAX_WBITS | 16
    wrapped = data[0] & 0x0F == 8 and (len(data) < 2 or (data[0] << 8 | data[1]) % 31 == 0)
    return zlib.MAX_WBITS if wrapped else -zlib.MAX_WBITS


def _decoder(headers: Mapping[str, str], limit: int, request: WireRequest) -> _Inflater | None:
    encoding = headers.get("content-encoding", "identity").strip()
    if encoding.lower() in ("identity", ""):
        return None
    if encoding.lower() in ("gzip", "x-gzip", "deflate"):
        return _Inflater(limit, request)
    said = clean(redact(encoding, request.key))[:40]
    raise LLMResponseError(
        f"{_place(request)} answered in an encoding that was not asked for: {said}"
    )


def is_loopback(host: str) -> bool:
    """Whether a host is this machine."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _place(request: WireRequest) -> str:
    parts = urlsplit(request.url)
    return f"{parts.scheme}://{parts.netloc}"


def translate(
    error: BaseException, exchange: Exchange, request: WireRequest, connect: float | None
) -> LLMError:
    """What went wrong, as one of ours, by its cause. The cause it keeps is a bare copy of the root."""
    place = _place(request)
    failure: LLMError
    causes = list(_causes(error))
    root = causes[-1]
    stopped = exchange.stopped
    if stopped in ("cancelled", "closed"):
        what = "the client was closed" if stopped == "closed" else "cancelled"
        failure = LLMCancelledError(f"{place}: {what} before the answer was whole")
        failure.maybe_billed = exchange.sent
        return failure
    connecting = any(type(c) is urllib3.exceptions.ConnectTimeoutError for c in causes)
    unresolved = _any(causes, urllib3.exceptions.NameResolutionError)
    if stopped or connecting or isinstance(root, TimeoutError):
        clock = stopped or exchange.clock
        if not stopped and (connecting or unresolved):
            clock = "connect"
        failure = LLMTimeoutError(
            _TIMEOUTS[clock].format(place=place, connect=connect, timeout=exchange.timeout or 0),
            clock=clock,
        )
    elif _any(causes, ssl.SSLCertVerificationError):
        failure = LLMConnectionError(
            f"{place}: its certificate{_issuer(request, exchange)} is not trusted "
            f"({_reason(root)}); set verify= to the CA bundle that knows it, or the variable "
            "REQUESTS_CA_BUNDLE",
            retriable=False,
        )
    elif "WRONG_VERSION_NUMBER" in str(getattr(root, "reason", "")):
        failure = LLMConnectionError(
            f"{place} does not speak TLS; write http:// if that is meant", retriable=False
        )
    elif _any(causes, urllib3.exceptions.ProxyError):
        failure = LLMConnectionError(f"{place}: the proxy failed ({_says(root)})")
    elif unresolved:
        failure = LLMConnectionError(f"{place}: the name cannot be resolved ({_says(root)})")
    elif _any(causes, urllib3.exceptions.NewConnectionError):
        hint = "; is the server running?" if _refused(root) else ""
        failure = LLMConnectionError(f"{place}: no connection ({_says(root)}){hint}")
    elif _any(
        causes, requests.exceptions.InvalidURL, requests.exceptions.InvalidSchema, UnicodeError
    ):
        failure = LLMConfigError(f"{place} is not an address that can be called")
    elif exchange.answered:
        failure = LLMConnectionError(f"{place}: the answer broke off ({_says(root)})")
    else:
        failure = LLMConnectionError(
            f"{place}: the connection broke before an answer came ({_says(root)})"
        )
    failure.args = (redact(str(failure), request.key),)
    failure.maybe_billed = exchange.sent
    if isinstance(root, OSError):
        told = redact(_says(root), request.key)
        failure.__cause__ = OSError(root.errno, told) if root.errno else OSError(told)
    return failure


def _reason(error: BaseException) -> str:
    return clean(str(getattr(error, "verify_message", "") or error))[:200]


def _issuer(request: WireRequest, exchange: Exchange) -> str:
    """Who signed a certificate that is not trusted: it says whether a corporate proxy stands between.

    The library does not tell, so the certificate is fetched once more, and nothing is sent.
    """
    parts = urlsplit(request.url)
    address = (parts.hostname or "", parts.port or 443)
    # Half of what is left, at most a second: it connects, then shakes hands.
    seconds = min(1.0, (exchange.due - Clock().now()) / 2)
    if seconds < 0.05:
        return ""
    with suppress(OSError, ValueError, IndexError):
        pem = ssl.get_server_certificate(address, timeout=seconds)
        names = _der_names(ssl.PEM_cert_to_DER_cert(pem))
        if names:
            return f", issued by {clean(', '.join(names))[:200]!r},"
    return ""


def _der_names(certificate: bytes) -> list[str]:
    """The texts of a certificate's issuer (RFC 5280, section 4.1): the standard library has no parser."""

    def children(data: bytes) -> list[tuple[int, bytes]]:
        found, at = [], 0
        while at < len(data):
            tag, length, at = data[at], data[at + 1], at + 2
            if length >= 0x80:
                size = length & 0x7F
                length, at = int.from_bytes(data[at : at + size], "big"), at + size
            found.append((tag, data[at : at + length]))
            at += length
        return found

    fields = children(children(children(certificate)[0][1])[0][1])
    if fields[0][0] == 0xA0:  # the version, which may be left out
        fields = fields[1:]
    names = children(fields[2][1])  # after the serial number and the algorithm
    return [
        text.decode("utf-8", "replace")
        for _, entry in names
        for _, pair in children(entry)
        for _, text in children(pair)[1:2]
    ]


_TIMEOUTS = {
    "connect": "{place}: no connection within {connect:.3g} s (connect_timeout)",
    "timeout": "{place}: no whole answer within {timeout:.3g} s (timeout)",
    "idle": "{place}: the stream brought no content for {timeout:.3g} s (timeout)",
    "deadline": "{place}: the call was not done at its deadline",
}


def _causes(error: BaseException) -> Iterable[BaseException]:
    """`error` and what it wraps, by whatever way the libraries below wrap it."""
    seen: set[int] = set()
    current: Any = error
    while isinstance(current, BaseException) and id(current) not in seen and len(seen) < 20:
        seen.add(id(current))
        yield current
        inner = [
            a
            for a in (getattr(current, "reason", None), *current.args[::-1], current.__cause__)
            if isinstance(a, BaseException)
        ]
        outer = None if current.__suppress_context__ else current.__context__
        current = inner[0] if inner else outer


def _any(causes: list[BaseException], *classes: type[BaseException]) -> bool:
    return any(isinstance(cause, classes) for cause in causes)


def _refused(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno == errno.ECONNREFUSED


def _says(error: BaseException) -> str:
    if isinstance(error, http.client.IncompleteRead):
        return "cut short"
    return clean(str(error))[:200] or type(error).__name__
