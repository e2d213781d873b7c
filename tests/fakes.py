"""What tests hand in: a clock that does not wait, and raw servers that say exactly what they are told."""

import functools
import socket
import threading
import time
import timeit
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from importlib.util import find_spec

import pytest

from LLM.clock import Clock
from LLM.errors import LLMError

# The data of prices and windows wants a newer pydantic than the oldest that we take: `make test-lowest`
# goes without it.
needs_price_data = pytest.mark.skipif(
    find_spec("genai_prices") is None, reason="the extra `cost` is not installed"
)


# Seconds. A busy machine may leave a thread alone for a while: what must come at once is given so long, in
# tests where it would take far longer if it did not.
AT_ONCE = 10


def until(holds, seconds=30):
    """Wait for what other threads do."""
    end = time.monotonic() + seconds
    while not (found := holds()):
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.005)
    return found


def work_of(call, number):
    """The processor's time for one call, in sums of a thousand numbers, some 10 µs each.

    They are as many on a slow machine as on a quick one.
    """

    def fastest(call, number):
        return min(timeit.repeat(call, number=number, repeat=5, timer=time.thread_time)) / number

    return fastest(call, number) / fastest(lambda: sum(range(1000)), 200)


def within(seconds):
    """For a test whose steps must come within so many seconds: it is done again if the machine held them up.

    A failure in time is a failure.
    """

    def decorate(test):
        @functools.wraps(test)
        def show(*args, **fixtures):
            for _ in range(20):
                begun = time.monotonic()
                try:
                    return test(*args, **fixtures)
                except AssertionError:
                    if time.monotonic() - begun < seconds:
                        raise
            raise AssertionError(f"twenty times it took more than {seconds} s")

        return show

    return decorate


def patiently(show, *seconds):
    """Show what holds if so many seconds are enough to begin something; if not, with the next number."""
    for tried in seconds[:-1]:
        with suppress(AssertionError, LLMError):
            return show(tried)
    return show(seconds[-1])


class FakeClock(Clock):
    """Time passes only in `sleep`; what was slept is remembered."""

    def __init__(self):
        self.time = 1000.0
        self.slept = []

    def now(self):
        return self.time

    def utc(self):
        return datetime.fromtimestamp(self.time, timezone.utc)

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.time += seconds


class RawServer:
    """A server that answers each request on each connection as a function says.

    `answer(connection, number)` is called for every request, counted over all connections from 1.
    """

    def __init__(self, answer, tls=None):
        self.answer = answer
        self.tls = tls
        self.requests = []
        self.connections = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._open = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            self._open.append(connection)
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            if self.tls is not None:
                connection = self.tls.wrap_socket(connection, server_side=True)
            with connection, connection.makefile("rb") as reader:
                while (request := read_request(reader)) is not None:
                    self.requests.append(request)
                    self.answer(connection, len(self.requests))
        except (OSError, ValueError):
            pass

    def close(self):
        with suppress(OSError):
            hang_up(self._listener)  # which wakes who waits for the next connection
        self._listener.close()
        for connection in self._open:
            with suppress(OSError):
                hang_up(connection)
            connection.close()


def hang_up(connection):
    """End the connection now; `close` would wait for the reader of the next request."""
    connection.shutdown(socket.SHUT_RDWR)


def read_request(reader):
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        line = reader.readline()
        if not line:
            return None
        head += line
    length = 0
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            length = int(line.split(b":")[1])
    return head + reader.read(length)


@contextmanager
def raw_server(answer):
    server = RawServer(answer)
    try:
        yield server
    finally:
        server.close()


CHAT = b'{"id":"c1","choices":[{"message":{"role":"assistant","content":"right"},"finish_reason":"stop"}]}'


def http(body=CHAT, status="200 OK", headers=()):
    """A whole HTTP answer with its length."""
    lines = [f"HTTP/1.1 {status}", "content-type: application/json", f"content-length: {len(body)}"]
    return "\r\n".join([*lines, *headers, "", ""]).encode() + body


def chunk(text, **choice):
    """One event of a chat stream, with a piece of text."""
    import json

    value = {"id": "c1", "choices": [{"index": 0, "delta": {"content": text}, **choice}]}
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def stream_head(*headers):
    lines = ["HTTP/1.1 200 OK", "content-type: text/event-stream", *headers, "", ""]
    return "\r\n".join(lines).encode()
