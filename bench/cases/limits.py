"""What the rate limiter costs: permits that are taken, corrected, and never waited for."""

from __future__ import annotations

import threading
import time

from figure import Figure, Goal, Job, Measure

PERMITS = 100_000
THREADS = 8


def limiter(job: Job) -> dict[str, float]:
    from LLM.policies.ratelimit import RateLimiter

    permits = job.some(PERMITS)
    # Limits that are never reached.
    shared = RateLimiter(10**9, 10**12)

    def work(count: int) -> None:
        for _ in range(count):
            shared.acquire(500, scope="https://host/v1 model").correct(321)

    work(1000)
    start = time.perf_counter()
    work(permits)
    one = permits / (time.perf_counter() - start)

    threads = [threading.Thread(target=work, args=(permits // THREADS,)) for _ in range(THREADS)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {"one": one, "eight": permits / (time.perf_counter() - start)}


FIGURES = (
    Figure(
        "limiter",
        "rate limiter",
        limiter,
        (
            Measure("one", "permits, one thread", "/s"),
            Measure("eight", "permits, 8 threads", "/s"),
        ),
        "A permit is taken from a limiter that all threads share, and corrected to what was used; "
        "requests and tokens of the last minute are counted, and no limit is reached.",
        (Goal("one", 10_000, at_least=True), Goal("eight", 10_000, at_least=True)),
        clients=("LLM",),
    ),
)
