"""What the layers of ours add to a call."""

from __future__ import annotations

import time
from typing import Any

from figure import Figure, Goal, Job, Measure, cpu_each

ROUNDS = 200_000
CALLS = 2000
MESSAGES = [
    {"role": "system", "content": "You are a helpful assistant that answers in one sentence."},
    {"role": "user", "content": "What is the capital of France, and how many people live there?"},
]
ANSWER = (
    b'{"id":"c1","object":"chat.completion","model":"gpt-4","choices":[{"index":0,"message":'
    b'{"role":"assistant","content":"Paris, with two million."},"finish_reason":"stop"}],'
    b'"usage":{"prompt_tokens":33,"completion_tokens":9,"total_tokens":42}}'
)


def watchdog(job: Job) -> dict[str, float]:
    from LLM.transport import WATCHDOG, Exchange

    rounds = job.some(ROUNDS)
    sock = object()

    def once() -> None:
        exchange = Exchange(float("inf"))
        exchange.limit(1e12, "timeout")
        WATCHDOG.watch(exchange)
        exchange.attach(sock)
        exchange.finish()

    once()
    start = time.process_time()
    for _ in range(rounds):
        once()
    return {"cpu": (time.process_time() - start) / rounds}


def policies(job: Job) -> dict[str, float]:
    """The whole way of a call but the network, with every layer and with none."""
    from LLM import LLM, Budget, Price, RateLimiter
    from LLM.providers.base import WireResponse
    from LLM.transport import Transport

    # The network is cut off: what is left are our own layers.
    Transport.send = lambda *_: WireResponse(200, {"content-type": "application/json"}, ANSWER)

    def cost(mode: str = "on", **given: Any) -> float:
        llm = LLM(base_url="http://127.0.0.1:1", **given)
        llm.chat_completion(MESSAGES, max_tokens=100)

        def work() -> None:
            for _ in range(calls):
                llm.chat_completion(MESSAGES, max_tokens=100, cache=mode)

        return cpu_each(work, calls, seconds=0.05 if job.quick else 0.5)

    calls = job.some(CALLS)
    limiter = {"rate_limiter": RateLimiter(10**9, 10**12)}
    budget = {"budget": Budget(10**6), "price": Price(1, 2)}
    bare = cost()
    added = {
        "limiter": cost(**limiter),
        "budget": cost(**budget),
        "cache": cost("refresh", cache=":memory:"),
        "all": cost(
            "refresh",
            cache=":memory:",
            fallbacks=["other"],
            hooks=[lambda _: None],
            **limiter,
            **budget,
        ),
    }
    hit = cost(cache=":memory:")
    return {"hit": hit, **{name: seconds - bare for name, seconds in added.items()}}


FIGURES = (
    Figure(
        "watchdog",
        "watchdog",
        watchdog,
        (Measure("cpu", "CPU for one call", "µs"),),
        "What one call pays so that a thread of the process can end it: an exchange that is made, "
        "watched, given its socket and finished.",
        (Goal("cpu", 4e-6),),
        clients=("LLM",),
    ),
    Figure(
        "policies",
        "what policies add to a call",
        policies,
        (
            Measure("limiter", "rate limiter", "µs"),
            Measure("budget", "budget", "µs"),
            Measure("cache", "cache, a miss that is stored", "µs"),
            Measure("all", "all, with fallbacks and a hook", "µs"),
            Measure("hit", "a whole call that is a hit", "µs"),
        ),
        "CPU of `chat_completion` over a network that answers at once, less that of a client without "
        "policies: a prompt of two messages is counted, paced, priced, reserved, settled, keyed and "
        "stored. The last column is a whole call.",
        (Goal("all", 60e-6), Goal("hit", 200e-6)),
        clients=("LLM",),
    ),
)
