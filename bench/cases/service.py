"""The chat service under load: many streams at once, and what ten thousand messages leave behind.

Three processes share the machine: the stand-in model, the service with SQLite, and this one, which is
all the people at once.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from figure import Figure, Goal, Job, Measure

WORDS, PACE = 50, 0.02  # an answer of a second, as a quick hosted model writes it
THINKING = (
    0.3  # seconds of a person between two messages: few, so that nearly all streams run at once
)
ADDRESS = re.compile(r"http://127\.0\.0\.1:(\d+)")
MODEL = (
    "import sys, time\n"
    "from LLM.testing import LocalServer\n"
    "words, pace = int(sys.argv[1]), float(sys.argv[2])\n"
    "with LocalServer(lambda _: 'word ' * words, token_delay=pace) as server:\n"
    "    print(server.url, flush=True)\n"
    "    time.sleep(3600)\n"
)


@contextmanager
def running(*command: str, **variables: str) -> Iterator[tuple[int, int]]:
    """A server in a process of its own: its process and its port."""
    process = subprocess.Popen(
        [sys.executable, *command],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1", **variables},
    )  # fmt: skip
    try:
        found = None
        while found is None:
            line = process.stdout.readline()
            assert line, command
            found = ADDRESS.search(line)
        yield process.pid, int(found[1])
    finally:
        process.terminate()
        process.communicate(timeout=30)


@contextmanager
def service(words: int, pace: float) -> Iterator[tuple[int, int, int]]:
    """The service with its model: its process, its port, and the model's port."""
    with (
        tempfile.TemporaryDirectory() as folder,
        running("-c", MODEL, str(words), str(pace)) as (
            _,
            model,
        ),
    ):
        settings = {
            "AGENTS_DATABASE": f"sqlite:///{folder}/chat.db",
            "AGENTS_BASE_URL": f"http://127.0.0.1:{model}",
            "AGENTS_TOOLS": "none",
            "AGENTS_INPUT_PRICE": "0.15",
            "AGENTS_OUTPUT_PRICE": "0.60",
            "AGENTS_REQUESTS_PER_MINUTE": "none",
            "AGENTS_LOG_LEVEL": "error",
        }
        with running("-m", "agents", "serve", "--port", "0", **settings) as (process, port):
            wait_for(port)
            yield process, port, model


def wait_for(port: int) -> None:
    import http.client

    for _ in range(200):
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("GET", "/ready")
            if connection.getresponse().status == 200:
                return
        except OSError:
            time.sleep(0.05)
    raise AssertionError("the service does not start")


async def post(port: int, path: str, body: object, mark: bytes) -> tuple[float | None, bytes]:
    """Seconds until the mark is there, `None` if it never is; and the whole answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    data = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\ncontent-type: application/json\r\n"
        f"accept: text/event-stream\r\ncontent-length: {len(data)}\r\nconnection: close\r\n\r\n"
    )
    started, first, got = time.perf_counter(), None, b""
    writer.write(head.encode() + data)
    while piece := await reader.read(65536):
        got += piece
        if first is None and mark in got:
            first = time.perf_counter() - started
    writer.close()
    return first, got


async def people(port: int, count: int, rounds: int, *, direct: bool) -> tuple[list[float], int]:
    """Seconds to the first word of each answer of so many people, and how many answers were not whole."""
    firsts: list[float] = []
    bad = 0

    async def person(number: int) -> None:
        nonlocal bad
        await asyncio.sleep(number * (WORDS * PACE + THINKING) / count)
        if direct:
            path, mark, end = "/v1/chat/completions", b"word", b"[DONE]"
            body = {
                "messages": [{"role": "user", "content": "Go on"}],
                "model": "m",
                "stream": True,
            }
        else:
            _, made = await post(port, "/conversations", {}, b"")
            name = json.loads(made.partition(b"\r\n\r\n")[2])["id"]
            path, body = f"/conversations/{name}/messages", {"content": "Go on"}
            mark, end = b"event: text", b"event: done"
        for _ in range(rounds):
            first, got = await post(port, path, body, mark)
            if first is None or end not in got or b"event: error" in got:
                bad += 1
            else:
                firsts.append(first)
            await asyncio.sleep(THINKING)

    await asyncio.gather(*map(person, range(count)))
    return firsts, bad


def streams(job: Job) -> dict[str, float]:
    rounds = 2 if job.quick else 6
    with service(WORDS, PACE) as (_, port, model):
        asyncio.run(people(port, 10, 1, direct=False))  # warm
        alone, _ = asyncio.run(people(model, 50, rounds, direct=True))
        fifty, bad = asyncio.run(people(port, 50, rounds, direct=False))
        many, worse = asyncio.run(people(port, 200, rounds, direct=False))
    return {
        "added": median(fifty) - median(alone),
        "first": median(fifty),
        "crowd": median(many),
        "errors": bad + worse,
        "answers": len(fifty) + len(many),
    }


def resident(process: int) -> int:
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def messages(port: int, count: int) -> None:
    """So many messages of eight people, twenty to a conversation."""

    async def person() -> None:
        for number in range(count // 8):
            if number % 20 == 0:
                _, made = await post(port, "/conversations", {}, b"")
                name = json.loads(made.partition(b"\r\n\r\n")[2])["id"]
            _, got = await post(port, f"/conversations/{name}/messages", {"content": "Go on"}, b"")
            assert b"event: done" in got

    await asyncio.gather(*(person() for _ in range(8)))


def memory(job: Job) -> dict[str, float]:
    with service(5, 0.0) as (process, port, _):
        asyncio.run(messages(port, job.some(2_000)))
        before = resident(process)
        started = time.perf_counter()
        asyncio.run(messages(port, job.some(8_000)))
        seconds = time.perf_counter() - started
        after = resident(process)
    return {"grown": after - before, "resident": after, "rate": job.some(8_000) / seconds}


FIGURES = (
    Figure(
        "service",
        "streams of the chat service",
        streams,
        (
            Measure("added", "added to the first word, 50 streams", "ms"),
            Measure("first", "first word, 50 streams", "ms"),
            Measure("crowd", "first word, 200 streams", "ms"),
            Measure("errors", "answers that failed", ""),
            Measure("answers", "answers", ""),
        ),
        "So many people talk at once, each with a conversation of their own in SQLite, to a model that "
        "writes 50 words a second. Medians of the time from the request to the first word; what the "
        "service adds is the difference to the same load on the model itself. Model, service and people "
        "share the machine.",
        (Goal("added", 10e-3), Goal("errors", 0)),
        clients=("LLM",),
        in_parent=True,
        rounds=0.5,
        seconds=300.0,
    ),
    Figure(
        "service-memory",
        "memory of the chat service",
        memory,
        (
            Measure("grown", "grown over the last 8,000 of 10,000 messages", "MiB"),
            Measure("resident", "resident", "MiB"),
            Measure("rate", "messages per second", "/s"),
        ),
        "Ten thousand messages of eight people, each answered and stored, with a model that answers at "
        "once.",
        (Goal("grown", 10 << 20),),
        clients=("LLM",),
        in_parent=True,
        rounds=0,
        seconds=900.0,
    ),
)
