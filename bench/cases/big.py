"""Ten megabytes, one way and the other."""

from __future__ import annotations

from statistics import median

from clients import HI, Messages
from figure import Figure, Goal, Job, Measure, cpu, forget_peak, memory, peak_memory

BYTES = 10_000_000
MESSAGES = 1000
CALLS = 5
MEASURES = (
    Measure("cpu", "CPU per call", "ms"),
    Measure("memory", "peak memory over that before the call", "MiB"),
)


def big(job: Job, mode: str, messages: Messages, characters: int) -> dict[str, float]:
    job.open("plain").chat()
    client = job.open(mode)
    times, peak = [], 0
    forget_peak()
    before = memory()
    for _ in range(CALLS):
        start = cpu()
        length = len(client.chat(messages))
        times.append(cpu() - start)
        peak = peak or peak_memory()
        if length < characters:
            raise AssertionError(f"{length} characters instead of {characters}")
    return {"cpu": median(times), "memory": peak - before}


def answer(job: Job) -> dict[str, float]:
    return big(job, "big", HI, BYTES * 9 // 10)


def request(job: Job) -> dict[str, float]:
    line = 'It was "noon"; the river lay still, and nobody on the bridge had anything to say.\n'
    size = BYTES // MESSAGES
    text = (line * (size // len(line) + 1))[:size]
    roles = ("user", "assistant")
    # Each message a string of its own, as in a conversation.
    messages = [{"role": roles[i % 2], "content": f"{i:4}{text[4:]}"} for i in range(MESSAGES)]
    return big(job, "plain", messages, 1)


FIGURES = (
    Figure(
        "answer-10mb",
        "answer of 10 MB",
        answer,
        MEASURES,
        "One chat completion whose text has 10 MB of UTF-8, with an emoji in each line, so that a "
        f"copy of it as a string takes 40 MB: the median of {CALLS} calls in a process; the memory "
        "is that of the first.",
        (Goal("cpu", 1, of="openai"), Goal("memory", 60 << 20)),
        rounds=0.6,
    ),
    Figure(
        "request-10mb",
        "request of 10 MB",
        request,
        MEASURES,
        f"The same with 10 MB in the question, a talk of {MESSAGES:,} messages of 10 kB; the "
        "messages are there before the measurement begins.",
        (Goal("cpu", 1 / 5, of="openai"), Goal("memory", 25 << 20)),
        rounds=0.6,
    ),
)
