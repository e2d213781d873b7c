"""Many items: rates beside pools of threads and batch libraries, a hard server, memory, resuming."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from clients import OURS
from figure import Figure, Goal, Job, Measure, forget_peak, memory, peak_memory

ITEMS = 2000
AT_A_TIME = (1, 8, 32, 128)
HARD_ITEMS = 1000
LIMIT = 500  # requests per second that the hard server takes
MANY = 1_000_000

ABL = "async-batch-llm"
ENVIRONMENTS = {"flexllm": "flexllm", ABL: "async-batch-llm[openai]"}
PEERS = (OURS, "requests", "openai", "flexllm", ABL)

# From the texts, and how many at a time, to the answers; `None` for one that failed.
Map = Callable[[list[str], int], list[Any]]


def ours(url: str) -> Map:
    from LLM import LLM

    llm = LLM(base_url=url + "/v1", model="gpt-4", api_key="sk-test")

    def run(texts: list[str], at_a_time: int) -> list[Any]:
        with llm.map(texts, concurrency=at_a_time) as results:
            return [result.text or None for result in results]

    return run


def pooled(name: str) -> Callable[[str], Map]:
    def opened(url: str) -> Map:
        from clients import CLIENTS

        client = CLIENTS[name](url)

        def ask(text: str) -> Any:
            try:
                return client.chat([{"role": "user", "content": text}])
            except Exception:  # noqa: BLE001 - whatever it is, it is no answer
                return None

        def run(texts: list[str], at_a_time: int) -> list[Any]:
            with ThreadPoolExecutor(at_a_time) as pool:
                return list(pool.map(ask, texts))

        return run

    return opened


def flexllm(url: str) -> Map:
    from flexllm import LLMClient

    def run(texts: list[str], at_a_time: int) -> list[Any]:
        client = LLMClient(
            base_url=url + "/v1", api_key="sk-test", model="gpt-4", concurrency_limit=at_a_time
        )
        asked = [[{"role": "user", "content": text}] for text in texts]
        return asyncio.run(client.chat_completions_batch(asked, show_progress=False))

    return run


def async_batch_llm(url: str) -> Map:
    from async_batch_llm import (
        LLMWorkItem,
        OpenAIModel,
        OpenAIStrategy,
        ParallelBatchProcessor,
        ProcessorConfig,
        RateLimitConfig,
    )
    from openai import AsyncOpenAI

    async def work(texts: list[str], at_a_time: int) -> list[Any]:
        # Its default is to stand still for five minutes after a 429.
        limit = RateLimitConfig(cooldown_seconds=0.1, slow_start_items=0)
        config = ProcessorConfig(concurrency=at_a_time, rate_limit=limit)
        async with AsyncOpenAI(base_url=url + "/v1", api_key="sk-test", max_retries=0) as client:
            model = OpenAIModel("gpt-4", client, api_surface="chat_completions")
            strategy = OpenAIStrategy(model)
            async with ParallelBatchProcessor(config=config) as processor:
                for number, text in enumerate(texts):
                    await processor.add_work(
                        LLMWorkItem(item_id=str(number), strategy=strategy, prompt=text)
                    )
                found = await processor.process_all()
        return [result.output if result.success else None for result in found.results]

    return lambda texts, at_a_time: asyncio.run(work(texts, at_a_time))


OPENED: dict[str, Callable[[str], Map]] = {
    OURS: ours,
    "requests": pooled("requests"),
    "openai": pooled("openai"),
    "flexllm": flexllm,
    ABL: async_batch_llm,
}


def rates(job: Job) -> dict[str, float]:
    run = OPENED[job.client](job.url("plain"))
    texts = [f"item {number}" for number in range(job.some(ITEMS))]
    run(texts[:50], 8)
    found: dict[str, float] = {}
    errors = 0
    for at_a_time in AT_A_TIME:
        begun = time.perf_counter()
        answers = run(texts, at_a_time)
        found[f"at_{at_a_time}"] = len(texts) / (time.perf_counter() - begun)
        errors += len(texts) - sum(bool(answer) for answer in answers)
    return {**found, "errors": errors}


@contextmanager
def hard_server() -> Iterator[tuple[str, Counter[str]]]:
    """One request in ten gets a 503; more than `LIMIT` in a second get a 429 that says when to come again."""
    seen: Counter[str] = Counter()
    numbers, lock, window = itertools.count(1), threading.Lock(), [0.0, 0]
    answer = {"role": "assistant", "content": "ok"}
    whole = {
        "id": "x",
        "object": "chat.completion",
        "created": 1,
        "model": "gpt-4",
        "choices": [{"index": 0, "message": answer, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
    }
    bodies = {
        200: json.dumps(whole).encode(),
        429: b'{"error": {"message": "too fast", "code": "rate_limit_exceeded"}}',
        503: b'{"error": {"message": "overloaded"}}',
    }

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            with lock:
                now = time.monotonic()
                if now - window[0] >= 0.1:
                    window[:] = [now, 0]
                window[1] += 1
                limited = window[1] > LIMIT / 10
                status = 429 if limited else 503 if next(numbers) % 10 == 0 else 200
                seen[str(status)] += 1
            self.send_response(status)
            if status == 429:
                self.send_header("retry-after-ms", "100")
                self.send_header("retry-after", "1")
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(bodies[status])))
            self.end_headers()
            self.wfile.write(bodies[status])

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 256

    with Server(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}", seen
        finally:
            server.shutdown()


def hard(job: Job) -> dict[str, float]:
    texts = [f"item {number}" for number in range(job.some(HARD_ITEMS))]
    with hard_server() as (url, seen):
        begun = time.perf_counter()
        answers = OPENED[job.client](url)(texts, 16)
        seconds = time.perf_counter() - begun
    missing = len(texts) - sum(bool(answer) for answer in answers)
    return {"seconds": seconds, "missing": missing, "requests": seen.total() / len(texts)}


def many(job: Job) -> dict[str, float]:
    """A plain function over many items, then a journal with as many lines, looked through and handed out."""
    from LLM.batch import ThreadedMap, tasks
    from LLM.journal import Journal
    from LLM.types import ChatCompletionResponse

    count = job.some(MANY)
    choice = {"message": {"role": "assistant", "content": "ok"}, "finish_reason": "stop"}
    said = ChatCompletionResponse.model_validate({"choices": [choice]})

    def run(items: int, journal: Journal | None = None) -> int:
        texts = (f"item {number}" for number in range(items))
        results = ThreadedMap(lambda _: said, tasks(texts), concurrency=16, journal=journal)
        return sum(result.resumed for result in results)

    run(10_000)
    forget_peak()
    before, begun = memory(), time.perf_counter()
    run(count)
    found = {
        "grown": max(0, peak_memory() - before),
        "per_item": (time.perf_counter() - begun) / count,
    }
    with tempfile.TemporaryDirectory() as folder:
        path, job_ = Path(folder) / "j", {"model": "m"}
        Journal(path, job_).close()
        line = '{{"key":{},"hash":"{:016x}","ok":true,"seconds":0.5,"info":{},"response":{}}}\n'
        info = json.dumps({"provider": "p", "model": "m", "cost": "0.001", "cached": False})
        body = said.model_dump_json()
        with path.open("a") as file:
            for task in tasks(f"item {number}" for number in range(count)):
                file.write(line.format(task.place, task.mark.hash, info, body))
        os.sync()
        begun = time.perf_counter()
        journal = Journal(path, job_)
        found["scan"] = time.perf_counter() - begun
        assert run(count, journal) == count
        found["resume"] = time.perf_counter() - begun
    return found


FIGURES = (
    Figure(
        "map",
        "A list of prompts, several at a time",
        rates,
        (
            *(
                Measure(f"at_{count}", f"items per second, {count} at a time", "/s")
                for count in AT_A_TIME
            ),
            Measure("errors", "items without an answer", ""),
        ),
        f"The same {ITEMS:,} texts: ours by `map`, `requests` and the official client on a "
        "`ThreadPoolExecutor`, the others by their own batches.",
        (Goal("at_32", 1.0, of="requests", at_least=True), Goal("errors", 0)),
        clients=PEERS,
        rounds=0.6,
        seconds=300,
    ),
    Figure(
        "map-hard",
        "A list of prompts for a server that limits and fails",
        hard,
        (
            Measure("seconds", "until the last answer", "ms"),
            Measure("missing", "items without an answer", ""),
            Measure("requests", "requests for each item", ""),
        ),
        f"{HARD_ITEMS:,} items, 16 at a time, for a server that takes {LIMIT} requests a second, answers "
        "429 to more, and 503 to one in ten. Settings are each library's own, but for the five minutes "
        f"that `{ABL}` stands still after a 429: 0.1 s here.",
        (Goal("missing", 0),),
        clients=PEERS,
        rounds=0.4,
        seconds=180,
    ),
    Figure(
        "map-many",
        "A million items",
        many,
        (
            Measure("grown", "memory over all items, beyond that of 10,000", "MB"),
            Measure("per_item", "time for an item", "µs"),
            Measure("scan", "a journal of a million lines, looked through", "ms"),
            Measure("resume", "and all of its items handed out", "ms"),
        ),
        f"A plain function in place of the call, over {MANY:,} items, on 16 threads; then a journal with as "
        "many finished items, opened, and resumed to its end.",
        (Goal("grown", 10e6), Goal("scan", 10)),
        clients=(OURS,),
        rounds=0.2,
        seconds=300,
    ),
)
