"""What stays in memory while events pass."""

from __future__ import annotations

from figure import Figure, Goal, Job, Measure, memory

EVENTS = 200_000
LITELLM_EVENTS = 20_000  # at 1.4 ms for an event the full number takes five minutes
WARM = 5_000
STREAM = 2_000


def growth(job: Job) -> dict[str, float]:
    events = job.some(LITELLM_EVENTS if job.client == "litellm" else EVENTS)
    warm_up(job)
    start = most = memory()
    for count, _ in enumerate(job.open(f"burst-{events}").deltas()):
        if count % 1000 == 0:
            most = max(most, memory())
    one = max(most, memory()) - start
    client = job.open(f"burst-{STREAM}")
    start = most = memory()
    for _ in range(events // STREAM):
        for _ in client.deltas():
            pass
        most = max(most, memory())
    return {"one": one, "many": most - start}


def warm_up(job: Job) -> None:
    for _ in job.open(f"burst-{WARM}").deltas():
        pass


FIGURES = (
    Figure(
        "memory",
        "memory over 200,000 events",
        growth,
        (
            Measure("one", "growth in one stream of 200,000 events", "MiB"),
            Measure("many", f"growth over streams of {STREAM:,} events, 200,000 in all", "MiB"),
        ),
        f"Growth of resident memory after a first stream of {WARM:,} events, the most that was "
        "seen. The text of the one "
        "long stream alone is 0.7 MiB, which a client that can hand over the whole answer at the "
        "end has to keep. "
        f"litellm reads {LITELLM_EVENTS:,} events only.",
        (Goal("one", 1 << 20), Goal("many", 1 << 20)),
        rounds=0,
        seconds=240,
    ),
)
