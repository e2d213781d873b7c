"""Thirty-two threads on one client."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from clients import CLIENTS
from figure import Figure, Goal, Job, Measure

THREADS = 32
SECONDS = 1.0
WAVES = 10


def threads(job: Job) -> dict[str, float]:
    calls, errors = [0] * THREADS, [0] * THREADS
    client = job.open("plain")
    until = 0.0

    def call(number: int) -> None:
        try:
            client.chat()
            calls[number] += 1
        except Exception:  # noqa: BLE001 - whatever it is, it is counted
            errors[number] += 1

    def call_until(number: int) -> None:
        while time.perf_counter() < until:
            call(number)

    for number in range(THREADS):
        call(number)
    calls[:] = [0] * THREADS
    start = time.perf_counter()
    until = start + (0.3 if job.quick else SECONDS)
    together(call_until)
    rate = sum(calls) / (time.perf_counter() - start)

    opened = job.stats()["connections"]
    client = job.open("slow-20")
    wave = threading.Barrier(THREADS)

    def call_in_waves(number: int) -> None:
        for _ in range(WAVES):
            wave.wait(60)
            call(number)

    together(call_in_waves)
    connections = job.stats()["connections"] - opened
    return {"rate": rate, "discarded": max(0, connections - THREADS), "errors": sum(errors)}


def together(work: Callable[[int], None]) -> None:
    workers = [threading.Thread(target=work, args=(number,)) for number in range(THREADS)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


FIGURES = (
    Figure(
        "threads",
        "32 threads on one client",
        threads,
        (
            Measure("rate", "calls per second", "/s"),
            Measure("discarded", "connections beyond one for each thread", ""),
            Measure("errors", "errors", ""),
        ),
        "Calls that all threads together finish in a second of wall-clock time, on one client with "
        "default settings. `http.client` is left out: its connection cannot be shared. Connections "
        f"are counted by the server in {WAVES} further waves, in which all threads call at once and"
        " "
        "each answer takes 20 ms: a pool that is too small discards connections after each wave.",
        (Goal("rate", 1.5, of="requests", at_least=True), Goal("discarded", 0), Goal("errors", 0)),
        clients=tuple(name for name in CLIENTS if name != "http.client"),
        rounds=0.6,
    ),
)
