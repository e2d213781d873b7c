"""What a figure is: the work, its measures and what they should reach.

A module in `cases/` holds a tuple `FIGURES`; the runner finds it by itself. The work of a figure is
called with a `Job` once in each round for each client, in a fresh process of the client's
environment, and returns plain numbers by name. With `in_parent=True` it is called in the runner's
process instead, for what can only be seen from outside. A case that compares with further packages
names them in a dict `ENVIRONMENTS` (client → requirement, see `clients.py`) and looks at
`job.client` itself.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from clients import CLIENTS, Client

if sys.platform != "win32":
    import resource

SCRIPT_SECONDS = 60.0  # after which a script under measurement is ended


@dataclass(frozen=True)
class Measure:
    """One number of a figure, kept in seconds, bytes or pieces; `unit` says how the page shows "
    "it."""

    key: str
    title: str
    unit: str


@dataclass(frozen=True)
class Goal:
    """`measure` of ours should be at most `limit`, or at least.

    With `of`, the limit is a ratio: ours over that client's, in the same round.
    """

    measure: str
    limit: float  # a plain number: seconds, bytes, pieces, or a ratio if `of` is given
    of: str | None = None
    at_least: bool = False


@dataclass(frozen=True)
class Figure:
    name: str
    title: str
    work: Callable[[Job], dict[str, float]]
    measures: tuple[Measure, ...]
    how: str
    goals: tuple[Goal, ...] = ()
    clients: tuple[str, ...] = tuple(CLIENTS)
    rounds: float = 1.0  # times the rounds asked for; 0 is a single round
    in_parent: bool = False
    seconds: float = 120.0  # after which a process is ended and counted as failed


@dataclass(frozen=True)
class Job:
    client: str
    origin: str
    python: str
    quick: bool = False

    def url(self, mode: str) -> str:
        return f"{self.origin}/{mode}"

    def open(self, mode: str) -> Client:
        return CLIENTS[self.client](self.url(mode))

    def some(self, count: int) -> int:
        """`count`, or a tenth of it in a quick run."""
        return max(1, count // 10) if self.quick else count

    def stats(self) -> dict[str, float]:
        """The server's counters; asking is not counted."""
        import http.client

        connection = http.client.HTTPConnection(self.origin.split("//")[1], timeout=10)
        try:
            connection.request("GET", "/stats")
            return json.loads(connection.getresponse().read())
        finally:
            connection.close()

    def script_cpu(self, source: str) -> float:
        """CPU seconds of a whole script in a fresh interpreter of the client's environment."""
        before = cpu(resource.RUSAGE_CHILDREN)
        subprocess.run(
            [self.python, "-s", "-c", source],
            cwd=tempfile.gettempdir(),  # `-c` looks there for modules: it may not be our repository
            env=environment(),
            check=True,
            capture_output=True,
            timeout=SCRIPT_SECONDS,
        )
        return cpu(resource.RUSAGE_CHILDREN) - before


def environment() -> dict[str, str]:
    """The user's environment without what would change the work.

    Proxies, keys, addresses, certificates and Python's own settings are left out.
    """
    ends = ("_PROXY", "_API_KEY", "_BASE_URL", "_CA_BUNDLE")
    starts = (
        "PYTHON",
        "OPENAI_",
        "ANTHROPIC_",
        "LLM_",
        "LITELLM_",
        "OLLAMA_",
        "SSL_CERT_",
        "OPENROUTER_",
    )
    kept = {
        k: v
        for k, v in os.environ.items()
        if not k.upper().endswith(ends) and not k.upper().startswith(starts)
    }
    # litellm would otherwise fetch its price list from the network when it is imported.
    return {**kept, "LITELLM_LOCAL_MODEL_COST_MAP": "True", "PYTHONWARNINGS": "ignore"}


def cpu(who: int | None = None) -> float:
    """User and system seconds, of this process if not told otherwise."""
    usage = resource.getrusage(resource.RUSAGE_SELF if who is None else who)
    return usage.ru_utime + usage.ru_stime


def cpu_each(work: Callable[[], object], units: int, seconds: float = 0.5) -> float:
    """CPU seconds of one unit, where `work()` does `units` of them.

    Once to warm up, then for `seconds` of CPU, at least twice.
    """
    work()
    runs, start = 0, cpu()
    give_up = time.monotonic() + 20 * seconds
    while runs < 2 or (cpu() - start < seconds and time.monotonic() < give_up):
        work()
        runs += 1
    return (cpu() - start) / (runs * units)


def memory() -> int:
    """Resident bytes now; where only the peak can be known (not Linux), the peak."""
    try:
        pages = Path("/proc/self/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return peak_memory()


def forget_peak() -> None:
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets the peak


def peak_memory() -> int:
    """The most resident bytes since `forget_peak`; where that is unknown, since the start."""
    with suppress(OSError):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
