"""Calls that are awaited: 32, 100 and 1,000 at a time."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

from clients import HI, OURS
from figure import Figure, Goal, Job, Measure

SECONDS = 2.0
AT_A_TIME = (32, 100, 1000)

AWAITED = "openai async"
PEERS = (OURS, AWAITED, "flexllm", "requests")
ENVIRONMENTS = {AWAITED: "openai", "flexllm": "flexllm"}

Call = Callable[[], Awaitable[Any]]


def ours(url: str, _: int) -> Call:
    from LLM import AsyncLLM

    llm = AsyncLLM(base_url=url + "/v1", model="gpt-4", api_key="sk-test")
    return lambda: llm.chat_completion(HI)


def official(url: str, _: int) -> Call:
    from openai import AsyncOpenAI

    client = AsyncOpenAI(base_url=url + "/v1", api_key="sk-test")
    return lambda: client.chat.completions.create(model="gpt-4", messages=HI, temperature=0.7)


def flexllm(url: str, at_a_time: int) -> Call:
    from flexllm import LLMClient

    client = LLMClient(
        base_url=url + "/v1", api_key="sk-test", model="gpt-4", concurrency_limit=at_a_time
    )
    return lambda: client.chat(HI)


OPENED = {OURS: ours, AWAITED: official, "flexllm": flexllm}


async def awaited(
    open_client: Callable[[str, int], Call], url: str, tasks: int, until: float
) -> int:
    call = open_client(url, tasks)
    await asyncio.gather(*(call() for _ in range(min(tasks, 32))))
    begun = time.perf_counter()
    until += begun
    calls = 0

    async def work() -> None:
        nonlocal calls
        while time.perf_counter() < until:
            await call()
            calls += 1

    await asyncio.gather(*(work() for _ in range(tasks)))
    return round(calls / (time.perf_counter() - begun))


def in_threads(job: Job, count: int, seconds: float) -> int:
    """What plain threads over one `requests.Session` with a pool of that size do."""
    import requests
    from clients import body

    session = requests.Session()
    session.mount("http://", requests.adapters.HTTPAdapter(pool_maxsize=count))
    url = job.url("plain") + "/v1/chat/completions"
    calls = [0] * count
    begun = time.perf_counter()

    def work(number: int) -> None:
        while time.perf_counter() < begun + seconds:
            session.post(url, json=body(HI), timeout=60).json()
            calls[number] += 1

    workers = [threading.Thread(target=work, args=(number,)) for number in range(count)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return round(sum(calls) / (time.perf_counter() - begun))


def aio(job: Job) -> dict[str, float]:
    seconds = 0.3 if job.quick else SECONDS
    rates: dict[str, float] = {}
    for count in AT_A_TIME:
        if job.client == "requests":
            rate = in_threads(job, count, seconds)
        else:
            opened = OPENED[job.client]
            rate = asyncio.run(awaited(opened, job.url("plain"), count, seconds))
        rates[f"rate_{count}"] = rate
    return rates


FIGURES = (
    Figure(
        "aio",
        "Calls that are awaited",
        aio,
        tuple(
            Measure(f"rate_{count}", f"calls per second, {count:,} at a time", "/s")
            for count in AT_A_TIME
        ),
        "Calls that so many tasks of one event loop finish in a second of wall-clock time, on one client "
        "with default settings; of `flexllm` with its limit raised to as many. `requests` stands for "
        "plain threads without any event loop, one for each call, with a pool of as many connections.",
        tuple(
            goal
            for count in AT_A_TIME
            for goal in (
                Goal(f"rate_{count}", 3.0, of=AWAITED, at_least=True),
                Goal(f"rate_{count}", 1.0, of="flexllm", at_least=True),
            )
        ),
        clients=PEERS,
        rounds=0.6,
    ),
)
