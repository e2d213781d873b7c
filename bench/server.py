"""A model server that costs less than any client: canned bytes, one thread, one selector loop.

    python bench/server.py [PORT]

prints its port on the first line and ends when its standard input is closed. The first part of the
path says how to answer, the end of the path in which dialect:

    /plain/v1/chat/completions        one answer, few headers, Content-Length, like a local server
    /hosted/v1/chat/completions       the same, chunked, with the headers that a hosted service adds
    /slow-20/v1/chat/completions      the plain answer, after 20 ms
    /big/v1/chat/completions          an answer of 10 MB
    /burst-2000/v1/chat/completions   a stream of 2,000 text events, as fast as the socket takes it
    /paced-250-4/v1/chat/completions  a stream of 250 text events, 4 ms apart
    /MODE/v1/messages                 the same in Anthropic's dialect
    /MODE/api/chat                    the same in Ollama's dialect
    /plain/v1/models                  a list of models
    /stats                            counters as JSON: connections, requests, cpu_seconds

Connections are counted at their first request, and one that only asks for /stats is not counted.
A request body of any size is read and thrown away; only Content-Length bodies are understood. In a
stream every event is an HTTP chunk of its own, and the terminating chunk follows the end marker in
a write of its own: that is how real servers send it, and why a client that stops at the marker
loses its connection.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import json
import os
import selectors
import socket
import sys
import time
from collections.abc import Iterator

# Short pieces like a tokenizer's, 4 bytes on average.
TOKENS = (
    " The, quick, brown, fox, jumps, over, the, lazy, dog,., It, is, a, fine, day, and, no, one, "
    "minds,.,\n,"
    " So, we, go, on, to, see, what, there, may, be,:, river, s,tones, und,er, the, old, bri,dge, "
    ";, all, was,"
    " still, at, no,on, in, spring"
).split(",")
CREATED = 1760000000
BIG = 10_000_000  # bytes of text in the big answer
BLOCK = 50  # events that are rendered once and sent together in a burst

FEW_HEADERS = b"date: Mon, 03 Nov 2025 10:00:00 GMT\r\nserver: uvicorn\r\n"
HOSTED_HEADERS = (
    b"Date: Mon, 03 Nov 2025 10:00:00 GMT\r\n"
    b"Connection: keep-alive\r\n"
    b"access-control-expose-headers: X-Request-ID\r\n"
    b"openai-organization: user-5x7kq2m9v3p1\r\n"
    b"openai-processing-ms: 412\r\n"
    b"openai-project: proj_5x7kq2m9v3p1w8r6\r\n"
    b"openai-version: 2020-10-01\r\n"
    b"x-envoy-upstream-service-time: 431\r\n"
    b"x-ratelimit-limit-requests: 10000\r\n"
    b"x-ratelimit-limit-tokens: 2000000\r\n"
    b"x-ratelimit-remaining-requests: 9999\r\n"
    b"x-ratelimit-remaining-tokens: 1999981\r\n"
    b"x-ratelimit-reset-requests: 6ms\r\n"
    b"x-ratelimit-reset-tokens: 0s\r\n"
    b"x-request-id: req_4f1c2d0b7a9e4c63b7d5f0e1a2b3c4d5\r\n"
    b"cf-cache-status: DYNAMIC\r\n"
    b"strict-transport-security: max-age=31536000; includeSubDomains; preload\r\n"
    b"X-Content-Type-Options: nosniff\r\n"
    b"Server: cloudflare\r\n"
    b"CF-RAY: 98a1b2c3d4e5f607-FRA\r\n"
    b'alt-svc: h3=":443"; ma=86400\r\n'
)
TEXT = (
    "The answer is short: a stream is a sequence of events, each of them a small piece of text, and"
    " the\n"
    'client joins them. "Done" is an event too.'
)


def compact(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def chunk(body: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(body), body)


def whole(body: bytes, extra: bytes = FEW_HEADERS, chunked: bool = False) -> bytes:
    """A complete answer: status line, headers and body."""
    head = b"HTTP/1.1 200 OK\r\n" + extra + b"content-type: application/json\r\n"
    if chunked:
        return head + b"transfer-encoding: chunked\r\n\r\n" + chunk(body) + b"0\r\n\r\n"
    return head + b"content-length: %d\r\n\r\n" % len(body) + body


class OpenAI:
    path = "/chat/completions"
    content_type = b"text/event-stream; charset=utf-8"

    @staticmethod
    def answer(text: str) -> bytes:
        return json.dumps(
            {
                "id": "chatcmpl-B9MBs8CjcvOU2jLn4n570S5qMJKcT",
                "object": "chat.completion",
                "created": CREATED,
                "model": "gpt-4-0613",
                "choices": [
                    {
                        "index": 0,
                        "message": {
                            "role": "assistant",
                            "content": text,
                            "refusal": None,
                            "annotations": [],
                        },
                        "logprobs": None,
                        "finish_reason": "stop",
                    }
                ],
                "usage": {
                    "prompt_tokens": 19,
                    "completion_tokens": 33,
                    "total_tokens": 52,
                    "prompt_tokens_details": {"cached_tokens": 0, "audio_tokens": 0},
                    "completion_tokens_details": {"reasoning_tokens": 0, "audio_tokens": 0},
                },
                "service_tier": "default",
                "system_fingerprint": None,
            },
            ensure_ascii=False,
        ).encode()

    @staticmethod
    def event(delta: dict[str, str], finish: str | None = None) -> bytes:
        return b"data: %b\n\n" % compact(
            {
                "id": "chatcmpl-B9MBs8CjcvOU2jLn4n570S5qMJKcT",
                "object": "chat.completion.chunk",
                "created": CREATED,
                "model": "gpt-4-0613",
                "service_tier": "default",
                "system_fingerprint": "fp_34a54ae93c",
                "choices": [
                    {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
                ],
            }
        )

    @classmethod
    def opening(cls) -> list[bytes]:
        return [cls.event({"role": "assistant", "content": ""})]

    @classmethod
    def text(cls, token: str) -> bytes:
        return cls.event({"content": token})

    @classmethod
    def closing(cls) -> list[bytes]:
        return [cls.event({}, "stop"), b"data: [DONE]\n\n"]


class Anthropic:
    path = "/messages"
    content_type = b"text/event-stream; charset=utf-8"

    @staticmethod
    def message(content: list[object], stop: str | None) -> dict[str, object]:
        return {
            "id": "msg_01XFDUDYJgAACzvnptvVoYEL",
            "type": "message",
            "role": "assistant",
            "model": "claude-3-5-sonnet-20241022",
            "content": content,
            "stop_reason": stop,
            "stop_sequence": None,
            "usage": {
                "input_tokens": 19,
                "cache_creation_input_tokens": 0,
                "cache_read_input_tokens": 0,
                "output_tokens": 33,
                "service_tier": "standard",
            },
        }

    @classmethod
    def answer(cls, text: str) -> bytes:
        return compact(cls.message([{"type": "text", "text": text}], "end_turn"))

    @staticmethod
    def event(kind: str, **fields: object) -> bytes:
        return b"event: %b\ndata: %b\n\n" % (kind.encode(), compact({"type": kind, **fields}))

    @classmethod
    def opening(cls) -> list[bytes]:
        return [
            cls.event("message_start", message=cls.message([], None)),
            cls.event("content_block_start", index=0, content_block={"type": "text", "text": ""}),
        ]

    @classmethod
    def text(cls, token: str) -> bytes:
        return cls.event(
            "content_block_delta", index=0, delta={"type": "text_delta", "text": token}
        )

    @classmethod
    def closing(cls) -> list[bytes]:
        stop = {"stop_reason": "end_turn", "stop_sequence": None}
        return [
            cls.event("content_block_stop", index=0),
            cls.event("message_delta", delta=stop, usage={"output_tokens": 33}),
            cls.event("message_stop"),
        ]


class Ollama:
    path = "/api/chat"
    content_type = b"application/x-ndjson"

    @staticmethod
    def line(text: str, done: bool) -> dict[str, object]:
        value: dict[str, object] = {
            "model": "llama2",
            "created_at": "2025-11-03T10:00:00.123456789Z",
            "message": {"role": "assistant", "content": text},
            "done": done,
        }
        if done:
            value |= {
                "done_reason": "stop",
                "total_duration": 5191566416,
                "load_duration": 2154458,
                "prompt_eval_count": 19,
                "prompt_eval_duration": 383809000,
                "eval_count": 33,
                "eval_duration": 4799921000,
            }
        return value

    @classmethod
    def answer(cls, text: str) -> bytes:
        return compact(cls.line(text, True))

    @classmethod
    def opening(cls) -> list[bytes]:
        return []

    @classmethod
    def text(cls, token: str) -> bytes:
        return compact(cls.line(token, False)) + b"\n"

    @classmethod
    def closing(cls) -> list[bytes]:
        return [compact(cls.line("", True)) + b"\n"]


DIALECTS = (OpenAI, Anthropic, Ollama)


def big_text() -> str:
    """BIG bytes of plain text: line ends and quotes to escape, and now and then a character for
    which Python needs four bytes, as answers have them: every copy as a string takes 40 MB."""
    line = 'It was "noon" 🙂 the river lay still, and nobody on the bridge had anything to say.\n'
    return line * (BIG // len(line.encode()) + 1)


class Answers:
    """What is sent for a path; each path is rendered once.

    `once[path]` holds complete answers, `streams[path]` holds what is sent in several pieces:
    opening, text events, closing, and the gap before each piece in seconds.
    """

    def __init__(self) -> None:
        self.once: dict[bytes, bytes] = {}
        self.streams: dict[bytes, tuple[bytes, list[bytes], bytes, float]] = {}

    def learn(self, path: bytes) -> bool:
        """Renders the answer of a path that is asked for the first time; False if there is none."""
        _, mode, *rest = path.decode().split("?")[0].split("/")
        tail = "/" + "/".join(rest)
        if tail.endswith("/models"):
            models = [
                {"id": f"model-{i}", "object": "model", "created": CREATED, "owned_by": "us"}
                for i in range(20)
            ]
            self.once[path] = whole(compact({"object": "list", "data": models}))
            return True
        dialect = next((d for d in DIALECTS if tail.endswith(d.path)), None)
        if dialect is None:
            return False
        kind, *numbers = mode.split("-")
        if kind in ("burst", "paced"):
            count = int(numbers[0])
            gap = int(numbers[1]) / 1000 if kind == "paced" else 0.0
            head = b"HTTP/1.1 200 OK\r\n%bcontent-type: %b\r\ntransfer-encoding: chunked\r\n\r\n"
            opening = head % (FEW_HEADERS, dialect.content_type) + b"".join(
                map(chunk, dialect.opening())
            )
            events = [
                chunk(dialect.text(token))
                for token in itertools.islice(itertools.cycle(TOKENS), BLOCK)
            ]
            if kind == "burst":
                blocks, left = divmod(count, BLOCK)
                pieces = [b"".join(events)] * blocks + [b"".join(events[:left])] * bool(left)
            else:
                pieces = list(itertools.islice(itertools.cycle(events), count))
            self.streams[path] = (opening, pieces, b"".join(map(chunk, dialect.closing())), gap)
        elif kind == "big":
            self.once[path] = whole(dialect.answer(big_text()))
        elif kind == "hosted":
            self.once[path] = whole(dialect.answer(TEXT), HOSTED_HEADERS, chunked=True)
        elif kind == "slow":
            self.streams[path] = (whole(dialect.answer(TEXT)), [], b"", int(numbers[0]) / 1000)
        elif kind == "plain":
            self.once[path] = whole(dialect.answer(TEXT))
        else:
            return False
        return True

    def parts(self, path: bytes) -> tuple[Iterator[bytes], float]:
        """The writes of a stream, in order, and the gap before each of them."""
        opening, pieces, closing, gap = self.streams[path]
        ending = (closing, b"0\r\n\r\n") if closing else ()
        return itertools.chain((opening,), pieces, ending), gap


class Connection:
    __slots__ = ("counted", "gap", "head", "missing", "parts", "path", "rest", "sock")

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.head = b""
        self.path = b""
        self.missing = 0  # bytes of the request body that have not arrived yet
        self.parts: Iterator[bytes] | None = None
        self.gap = 0.0
        self.rest: memoryview | bytes = b""  # what the socket did not take
        self.counted = False


class Server:
    def __init__(self, port: int = 0) -> None:
        self.answers = Answers()
        self.connections = 0
        self.requests = 0
        self.selector = selectors.DefaultSelector()
        self.listener = socket.create_server(("127.0.0.1", port), backlog=256)
        self.listener.setblocking(False)
        self.port = self.listener.getsockname()[1]
        self.buffer = bytearray(1 << 20)
        self.timers: list[tuple[float, int, Connection, Iterator[bytes]]] = []
        self.order = itertools.count()

    def serve(self) -> None:
        """Serves until standard input is closed: the server cannot outlive whoever started it."""
        self.selector.register(self.listener, selectors.EVENT_READ, None)
        self.selector.register(sys.stdin.fileno(), selectors.EVENT_READ, "stdin")
        select = self.selector.select
        while True:
            for key, mask in select(self.until_next_timer()):
                conn = key.data
                if conn is None:
                    self.accept()
                elif conn == "stdin":
                    if not os.read(key.fd, 4096):
                        return
                elif mask & selectors.EVENT_READ:
                    self.read(conn)
                else:
                    self.write(conn)
            self.run_timers()

    def until_next_timer(self) -> float | None:
        return max(0.0, self.timers[0][0] - time.monotonic()) if self.timers else None

    def run_timers(self) -> None:
        while self.timers and self.timers[0][0] <= time.monotonic():
            due, _, conn, parts = heapq.heappop(self.timers)
            if conn.parts is not parts:
                continue  # closed, or asked again since
            piece = next(parts, None)
            if piece is None:
                conn.parts = None
                continue
            try:
                conn.sock.sendall(piece)
            except OSError:
                self.close(conn)
                continue
            self.wake(conn, due)  # not from now: lateness does not add up

    def wake(self, conn: Connection, since: float) -> None:
        if conn.parts:
            heapq.heappush(self.timers, (since + conn.gap, next(self.order), conn, conn.parts))

    def accept(self) -> None:
        try:
            sock, _ = self.listener.accept()
        except OSError:
            return
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.selector.register(sock, selectors.EVENT_READ, Connection(sock))

    def close(self, conn: Connection) -> None:
        conn.parts = None
        with contextlib.suppress(KeyError, ValueError):
            self.selector.unregister(conn.sock)
        conn.sock.close()

    def read(self, conn: Connection) -> None:
        try:
            count = conn.sock.recv_into(self.buffer)
        except BlockingIOError:
            return
        except OSError:
            count = 0
        if not count:
            self.close(conn)
        elif conn.missing:
            conn.missing -= count
            if conn.missing <= 0:
                self.answer(conn)
        else:
            self.read_head(conn, count)

    def read_head(self, conn: Connection, count: int) -> None:
        conn.head += self.buffer[:count]
        end = conn.head.find(b"\r\n\r\n")
        if end < 0:
            return
        head = conn.head
        conn.path = head.split(b" ", 2)[1]
        at = head[:end].lower().find(b"\r\ncontent-length:")
        length = int(head[at + 17 : head.find(b"\r\n", at + 17)]) if at >= 0 else 0
        conn.missing = max(0, length - (len(head) - end - 4))
        conn.head = b""
        if not conn.missing:
            self.answer(conn)

    def answer(self, conn: Connection) -> None:
        path, answers = conn.path, self.answers
        conn.missing = 0
        if path == b"/stats":
            conn.rest = whole(self.stats())
        else:
            if not conn.counted:
                conn.counted = True
                self.connections += 1
            self.requests += 1
            if path in answers.once or (
                path not in answers.streams and answers.learn(path) and path in answers.once
            ):
                conn.rest = answers.once[path]
            elif path in answers.streams:
                conn.parts, conn.gap = answers.parts(path)
                if conn.gap:
                    self.wake(conn, time.monotonic())
                    return
            else:
                conn.rest = b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n"
        self.write(conn)

    def write(self, conn: Connection) -> None:
        """Sends until everything is sent or the socket is full; then waits to become writable."""
        rest = conn.rest
        try:
            while True:
                if not rest:
                    rest = next(conn.parts, b"") if conn.parts else b""
                    if not rest:
                        conn.parts = None
                        break
                sent = conn.sock.send(rest)
                rest = b"" if sent == len(rest) else memoryview(rest)[sent:]
            waiting = selectors.EVENT_READ
        except BlockingIOError:
            waiting = selectors.EVENT_WRITE
        except OSError:
            self.close(conn)
            return
        conn.rest = rest
        if self.selector.get_key(conn.sock).events != waiting:
            self.selector.modify(conn.sock, waiting, conn)

    def stats(self) -> bytes:
        return compact(
            {
                "connections": self.connections,
                "requests": self.requests,
                "cpu_seconds": time.process_time(),
            }
        )


def main() -> None:
    server = Server(int(sys.argv[1]) if len(sys.argv) > 1 else 0)
    print(server.port, flush=True)
    server.serve()


if __name__ == "__main__":
    main()
