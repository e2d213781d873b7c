"""What the layers of ours add to a call."""

from __future__ import annotations

import time

from figure import Figure, Goal, Job, Measure

ROUNDS = 200_000


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
)
