"""What one event of a stream costs, when they come all at once and when they come one by one."""

from __future__ import annotations

from clients import Client
from figure import Figure, Goal, Job, Measure, cpu, cpu_each

BURST = 1000
PACED = 250


def read(client: Client, events: int) -> None:
    count = 0
    for _ in client.deltas():
        count += 1
    if count != events:
        raise AssertionError(f"{count} text events instead of {events}")


def burst(job: Job) -> dict[str, float]:
    client = job.open(f"burst-{BURST}")
    return {"cpu": cpu_each(lambda: read(client, BURST), BURST, 0.1 if job.quick else 0.5)}


def paced(job: Job) -> dict[str, float]:
    read(job.open("paced-20-1"), 20)
    client, events = job.open(f"paced-{PACED}-4"), PACED
    start = cpu()
    read(client, events)
    return {"cpu": (cpu() - start) / events}


FIGURES = (
    Figure(
        "burst",
        "one stream event, burst",
        burst,
        (Measure("cpu", "CPU per event", "µs"),),
        f"CPU of the client's process per text event of streams of {BURST:,} events, sent as fast "
        "as the socket takes "
        "them, each in an HTTP chunk of its own (280 bytes). Ours yields a `StreamEvent`; the SDKs "
        "yield their own "
        "event; the HTTP clients split lines and `json.loads` them. anthropic and ollama read their"
        " own dialects, "
        "whose events are half as long.",
        (Goal("cpu", 10e-6), Goal("cpu", 1 / 16, of="openai")),
    ),
    Figure(
        "paced",
        "one stream event, paced",
        paced,
        (Measure("cpu", "CPU per event", "µs"),),
        f"The same for a stream of {PACED} events that come 4 ms apart, as a model speaks: here "
        "each event costs a wake-up. "
        "The one request is part of the figure.",
        (Goal("cpu", 1.3, of="requests"),),
        rounds=0.6,
    ),
)
