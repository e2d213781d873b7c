"""One chat completion, many times in one process."""

from __future__ import annotations

from figure import Figure, Goal, Job, Measure, cpu_each

CALLS = 50


def chat(job: Job, mode: str = "plain") -> dict[str, float]:
    client = job.open(mode)

    def calls() -> None:
        for _ in range(CALLS):
            client.chat()

    return {"cpu": cpu_each(calls, CALLS, 0.1 if job.quick else 0.5)}


def hosted(job: Job) -> dict[str, float]:
    return chat(job, "hosted")


FIGURES = (
    Figure(
        "chat",
        "one chat completion",
        chat,
        (Measure("cpu", "CPU per call", "µs"),),
        f"CPU of the client's process per call: {CALLS} calls to warm up, then batches of {CALLS} "
        "for half a second. "
        "The answer has 700 bytes and the few headers of a local server. `requests` is "
        "`Session.post` and `.json()`.",
        (Goal("cpu", 0.6, of="requests"), Goal("cpu", 0.35, of="openai")),
    ),
    Figure(
        "hosted",
        "one chat completion, hosted headers",
        hosted,
        (Measure("cpu", "CPU per call", "µs"),),
        "As above, with a chunked answer and the 23 headers of a hosted service.",
        rounds=0.6,
    ),
)
