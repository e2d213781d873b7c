"""What remembered answers cost: their key, a hit, a put."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable

from figure import Figure, Goal, Job, Measure, cpu_each

ROUNDS = 10_000
KEYS = 1_000
ANSWER = json.dumps(
    {
        "id": "chatcmpl-8Zk2mVbXn1",
        "object": "chat.completion",
        "created": 1_790_000_000,
        "model": "gpt-4",
        "choices": [
            {
                "index": 0,
                "message": {
                    "role": "assistant",
                    "content": " ".join(f"word{n * n % 997}" for n in range(250)),
                },
                "finish_reason": "stop",
            }
        ],
        "usage": {"prompt_tokens": 12, "completion_tokens": 250, "total_tokens": 262},
    }
).encode()


def each(job: Job, once: Callable[[str], object], share: float = 1.0) -> float:
    """Seconds of CPU for `once(key)`, over a thousand keys."""
    rounds = job.some(int(ROUNDS * share))
    keys = [f"{n % KEYS:064x}" for n in range(rounds)]

    def work() -> None:
        for key in keys:
            once(key)

    return cpu_each(work, rounds, seconds=0.05 if job.quick else 0.5)


def key(job: Job) -> dict[str, float]:
    from LLM.policies.cache import cache_key

    messages = [{"role": "user", "content": "Hello!"}]
    body = json.dumps({"model": "gpt-4", "messages": messages, "temperature": 0.7}).encode()
    headers = {
        "authorization": "Bearer none",
        "content-type": "application/json",
        "accept": "application/json",
        "user-agent": "bench",
        "idempotency-key": "0" * 32,
    }

    def once(_: str) -> None:
        cache_key(dialect="openai", base_url="http://127.0.0.1:8000", headers=headers, body=body)

    return {"cpu": each(job, once)}


def memory(job: Job) -> dict[str, float]:
    from LLM.policies.cache import ResponseCache

    with ResponseCache() as cache:
        put = each(job, lambda key: cache.put(key, ANSWER))
        return {"hit": each(job, cache.get), "put": put}


def disk(job: Job) -> dict[str, float]:
    from LLM.policies.cache import ResponseCache

    with (
        tempfile.TemporaryDirectory() as folder,
        ResponseCache(f"sqlite:///{folder}/cache.db") as cache,
    ):
        for number in range(KEYS):
            cache.put(f"{number:064x}", ANSWER)
        put = each(job, lambda key: cache.put(key, ANSWER), share=0.1)
        return {"hit": each(job, cache.get), "put": put}


FIGURES = (
    Figure(
        "cache-key",
        "cache: key",
        key,
        (Measure("cpu", "CPU for one key", "µs"),),
        "The key of a short chat request: its JSON read, put in order and hashed.",
        (Goal("cpu", 30e-6),),
        clients=("LLM",),
    ),
    Figure(
        "cache-memory",
        "cache: in memory",
        memory,
        (Measure("hit", "CPU for one hit", "µs"), Measure("put", "CPU for one put", "µs")),
        "`ResponseCache()` with a thousand answers of 2 KB.",
        (Goal("hit", 10e-6),),
        clients=("LLM",),
    ),
    Figure(
        "cache-disk",
        "cache: on disk",
        disk,
        (Measure("hit", "CPU for one hit", "µs"), Measure("put", "CPU for one put", "µs")),
        '`ResponseCache("sqlite:///…")` with a thousand answers of 2 KB, deflated, in WAL mode.',
        (Goal("hit", 0.5e-3),),
        clients=("LLM",),
    ),
)
