"""How many calls a second: arithmetic and a simulation, from what was measured; see docs/scale.md.

    python bench/scale.py          print the tables
    python bench/scale.py --write  put them into docs/scale.md

The simulation is a closed network: each thread of each worker makes one call after the other. A call needs
its worker's interpreter, one at a time; the Redis, one at a time, if limits are shared; a permit of
the sliding minute; and the provider, who answers any number at once, each after a while. The same seed
gives the same tables.
"""

from __future__ import annotations

import heapq
import random
import sys
from collections import deque
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "scale.md"

# Measured on the machine of docs/benchmarks.md, in seconds: there, `threads` (2,771 calls a second in one
# process) and `redis` (a reservation that is settled, and a permit that is corrected: 4 scripts).
WORKER = 1 / 2771
REDIS = 185e-6 + 120e-6
# A Redis in the same zone answers in half a millisecond; a call that is bounded asks it four times.
ROUND_TRIP = 4 * 0.5e-3

# A call that classifies or extracts: tokens, seconds, bytes on the wire with their headers.
PROMPT, COMPLETION = 500, 200
LATENCY = 2.0
BYTES = 4 * PROMPT + 4 * COMPLETION + 2500

TEN_MILLION = 10_000_000
DAY = 86_400


@dataclass(frozen=True)
class Setup:
    """What makes calls, and what bounds it; limits are per minute."""

    name: str
    workers: int = 1
    threads: int = 16
    latency: float = LATENCY
    redis: bool = False
    requests: float = inf
    tokens: float = inf
    bits: float = 1e9  # of the network, per second

    @property
    def walls(self) -> dict[str, float]:
        """Calls per second that each part would let through, if it were the only one."""
        round_trips = ROUND_TRIP if self.redis else 0.0
        return {
            "threads": self.workers * self.threads / (self.latency + WORKER + round_trips),
            "interpreters": self.workers / WORKER,
            "Redis": 1 / REDIS if self.redis else inf,
            "requests per minute": self.requests / 60,
            "tokens per minute": self.tokens / (PROMPT + COMPLETION) / 60,
            "network": self.bits / 8 / BYTES,
        }

    @property
    def wall(self) -> str:
        return min(self.walls, key=lambda name: self.walls[name])


class Station:
    """Serves one after the other, in the order in which they come."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.free_at = 0.0

    def serve(self, now: float) -> float:
        self.free_at = max(now, self.free_at) + self.seconds
        return self.free_at


class Minute:
    """The sliding minute: when a call that comes now may go on."""

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self.given: deque[float] = deque()

    def permit(self, now: float) -> float:
        if self.limit == inf:
            return now
        if len(self.given) >= self.limit:
            now = max(now, self.given.popleft() + 60)
        self.given.append(now)
        return now


def simulate(setup: Setup, seconds: float) -> float:
    """Calls per second in the second half of so many seconds, which is past the start."""
    chance = random.Random(1)
    interpreters = [Station(WORKER) for _ in range(setup.workers)]
    redis, network = Station(REDIS), Station(8 * BYTES / setup.bits)
    minute = Minute(min(setup.requests, setup.tokens // (PROMPT + COMPLETION)))
    # A call takes turns: what comes next for it, and when. All begin within a latency.
    turns = [
        (chance.random() * setup.latency, number, 0)
        for number in range(setup.workers * setup.threads)
    ]
    heapq.heapify(turns)
    done = 0
    while turns[0][0] < seconds:
        now, number, stage = heapq.heappop(turns)
        if stage == 0:
            after = interpreters[number % setup.workers].serve(now)
        elif stage == 1:
            after = redis.serve(now) + ROUND_TRIP if setup.redis else now
        elif stage == 2:
            after = minute.permit(now)
        elif stage == 3:
            # Half of an answer's time is always needed, the rest is as it happens.
            after = network.serve(now) + setup.latency * (0.5 + chance.random())
        else:
            done += now >= seconds / 2
            after, stage = now, -1
        heapq.heappush(turns, (after, number, stage + 1))
    return done / (seconds / 2)


ONE = Setup("one process, 16 threads")
SETUPS = (
    ONE,
    replace(ONE, name="one process, 128 threads", threads=128),
    replace(ONE, name="one process, 1,000 threads", threads=1000),
    replace(ONE, name="one process, 5,000 threads", threads=5000),
    replace(ONE, name="8 workers × 128, shared limits", workers=8, threads=128, redis=True),
    replace(
        ONE, name="8 workers × 128, 10,000 requests a minute",
        workers=8, threads=128, redis=True, requests=10_000,
    ),
    replace(
        ONE, name="8 workers × 128, 2 million tokens a minute",
        workers=8, threads=128, redis=True, tokens=2e6,
    ),
    replace(ONE, name="32 workers × 512, shared limits", workers=32, threads=512, redis=True),
    replace(ONE, name="32 workers × 512, no shared limits", workers=32, threads=512),
    replace(
        ONE, name="32 workers × 512, 100 Mbit/s", workers=32, threads=512, bits=100e6,
    ),
)  # fmt: skip

# Measured by bench/cases (`threads`, `ray`) on two cores, which the server and Ray share.
MEASURED = (
    (Setup("one process, 32 threads, no wait", threads=32, latency=1e-4), 2771),
    (Setup("Ray, 1 worker × 32, no wait", threads=32, latency=1e-4), 2395),
    (Setup("Ray, 1 worker × 32, 20 ms", threads=32, latency=0.02), 1590),
    (Setup("Ray, 2 workers × 32, no wait", workers=2, threads=32, latency=1e-4), 3889),
    (Setup("Ray, 2 workers × 32, 20 ms", workers=2, threads=32, latency=0.02), 2965),
)

# US dollars per million tokens, prompt and completion, as listed in 2026-11; batch APIs take half.
PRICES = (("0.15 / 0.60", 0.15, 0.60), ("1.00 / 5.00", 1.0, 5.0), ("2.50 / 10.00", 2.5, 10.0))


def tables() -> str:
    lines = ["| what | walls alone let through | simulated | the wall | ten million take |"]
    lines.append("| --- | --- | --- | --- | --- |")
    for setup in SETUPS:
        bounded = min(setup.requests, setup.tokens) < inf
        rate = simulate(setup, 240 if bounded else 16)
        lines.append(
            f"| {setup.name} | {setup.walls[setup.wall]:,.0f}/s | {rate:,.0f}/s | {setup.wall} | "
            f"{span(TEN_MILLION / rate)} |"
        )
    lines += ["", "| what | simulated | measured | measured ÷ simulated |"]
    lines.append("| --- | --- | --- | --- |")
    for setup, measured in MEASURED:
        rate = simulate(setup, 4)
        lines.append(f"| {setup.name} | {rate:,.0f}/s | {measured:,}/s | {measured / rate:.2f} |")
    lines += ["", "| price per million tokens | ten million calls | through a batch API |"]
    lines.append("| --- | --- | --- |")
    for name, prompt, completion in PRICES:
        dollars = TEN_MILLION * (PROMPT * prompt + COMPLETION * completion) / 1e6
        lines.append(f"| ${name} | ${dollars:,.0f} | ${dollars / 2:,.0f} |")
    return "\n".join(lines)


def span(seconds: float) -> str:
    if seconds >= 2 * DAY:
        return f"{seconds / DAY:.1f} days"
    return f"{seconds / 3600:.1f} hours"


def page(text: str) -> str:
    """The page with new tables."""
    head, begin, rest = text.partition("<!-- scale -->\n")
    end = rest[rest.index("<!-- /scale -->") :]
    return f"{head}{begin}{tables()}\n{end}"


if __name__ == "__main__":
    if "--write" in sys.argv:
        PAGE.write_text(page(PAGE.read_text("utf-8")), "utf-8")
    else:
        print(tables())
