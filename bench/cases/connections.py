"""How many connections the server sees."""

from __future__ import annotations

from figure import Figure, Goal, Job, Measure

CALLS = 1000
STREAMS = 20


def connections(job: Job) -> dict[str, float]:
    start = job.stats()["connections"]
    client = job.open("plain")
    for _ in range(job.some(CALLS)):
        client.chat()
    after_calls = job.stats()["connections"]
    client = job.open("burst-20")
    for _ in range(STREAMS):
        for _ in client.deltas():
            pass
    return {"calls": after_calls - start, "streams": job.stats()["connections"] - after_calls}


FIGURES = (
    Figure(
        "connections",
        "connections",
        connections,
        (
            Measure("calls", f"for {CALLS:,} calls", ""),
            Measure("streams", f"for {STREAMS} streams in a row", ""),
        ),
        "Counted by the server. Each stream is read to its end; the end of the HTTP body arrives "
        "just after the end "
        "marker of the stream.",
        (Goal("calls", 1), Goal("streams", 1)),
        rounds=0,
    ),
)
