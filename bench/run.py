"""Measures `LLM` and its peers and writes `docs/benchmarks.md`.

    python bench/run.py                       everything: ten minutes, and the installations
    python bench/run.py --only chat,burst     two figures
    python bench/run.py --quick               one short round, printed and not written
    python bench/run.py --no-peers            ours and the layers under it, printed and not written
    python bench/run.py --list                the figures

See `figure.py` for how to add a figure, and `clients.py` for how to add a client.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pkgutil
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path

import cases
import envs
import page
from clients import ENVIRONMENTS, OURS, UNDER_OURS
from figure import Figure, Job, environment

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "docs" / "benchmarks.md"
# The order of the page; modules that are not named follow.
ORDER = ("startup", "chat", "stream", "connections", "memory", "big", "threads", "installed")


def main() -> int:
    found = discover()
    options = arguments([figure.name for _, figure in found])
    if options.list:
        print("\n".join(f"{figure.name:14} {figure.title}" for _, figure in found))
        return 0
    chosen = [
        (case, figure) for case, figure in found if not options.only or figure.name in options.only
    ]
    started = time.monotonic()
    known = dict(ENVIRONMENTS)
    for case, _ in chosen:
        known.update(getattr(importlib.import_module(f"cases.{case}"), "ENVIRONMENTS", {}))
    needed = [name for name in known if any(name in figure.clients for _, figure in chosen)]
    pythons = prepare(needed, known, options)
    rounds = 1 if options.quick else options.rounds
    rows: list[str] = []
    blocks: dict[str, str] = {}
    today = date.today().isoformat()
    columns = [name for name in ENVIRONMENTS if name in pythons or not options.no_peers]
    with server() as origin:
        for case, figure in chosen:
            begun = time.monotonic()
            results = measure(case, figure, pythons, origin, rounds, options.quick)
            rows += page.summary_rows(figure, results, columns)
            names = [name for name in known if name in results]
            blocks[figure.name] = page.section(figure, results, names, today)
            report(figure, results, time.monotonic() - begun)
        server_cost = page.show(cost_of_server(origin), "µs")
    versions = ", ".join(
        f"{name} {envs.version(python, distribution(name))}" for name, python in pythons.items()
    )
    machine = page.HOW.format(
        server=server_cost,
        machine=this_machine(),
        python=platform.python_version(),
        date=today,
        versions=versions,
    )
    print(f"\nserver: {server_cost} of CPU for one chat completion\n{versions}\n")
    print(page.summary("", rows, columns))
    if options.quick or options.no_peers:
        print("\nprinted only: a quick run, or one without peers, does not replace the page")
    else:
        page.write(options.page, {"machine": machine, **blocks}, rows, columns)
        print(f"\nwritten: {options.page.name}")
    print(f"{time.monotonic() - started:.0f} s")
    return 0


def arguments(names: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Measures LLM and its peers; see the head of bench/run.py."
    )
    parser.add_argument(
        "--only", action="append", metavar="FIGURE", help="figures, comma-separated or repeated"
    )
    parser.add_argument(
        "--quick", action="store_true", help="one short round; the page stays as it is"
    )
    parser.add_argument(
        "--rounds", type=int, default=5, metavar="N", help="default 5; slow figures take fewer"
    )
    parser.add_argument(
        "--no-peers", action="store_true", help="only ours, http.client, urllib3 and requests"
    )
    parser.add_argument(
        "--upgrade", action="store_true", help="install the newest of every client again"
    )
    parser.add_argument(
        "--page", type=Path, default=PAGE, metavar="FILE", help="default docs/benchmarks.md"
    )
    parser.add_argument("--list", action="store_true", help="name the figures and stop")
    options = parser.parse_args()
    options.only = [name for part in options.only or () for name in part.split(",") if name]
    if unknown := sorted(set(options.only) - set(names)):
        parser.error(f"no figure {', '.join(unknown)}; there are {', '.join(names)}")
    if options.rounds < 1:
        parser.error("--rounds needs at least 1")
    return options


def discover() -> list[tuple[str, Figure]]:
    """All figures with the name of their module, in the order of the page."""
    modules = [module.name for module in pkgutil.iter_modules(cases.__path__)]
    modules.sort(key=lambda name: (ORDER.index(name) if name in ORDER else len(ORDER), name))
    return [
        (name, figure)
        for name in modules
        for figure in importlib.import_module(f"cases.{name}").FIGURES
    ]


def prepare(
    names: list[str], known: dict[str, str | None], options: argparse.Namespace
) -> dict[str, str]:
    """The interpreter of each client; one that cannot be installed is left out, with a line that "
    "says so."""
    pythons: dict[str, str] = {}
    for name in names:
        if options.no_peers and name in ENVIRONMENTS and name != OURS:
            if name in UNDER_OURS and OURS in pythons:
                pythons[name] = pythons[OURS]
            continue
        try:
            pythons[name] = envs.prepare(name, known[name], options.upgrade)
        except envs.NotInstalled as error:
            print(f"{name}: skipped, cannot be installed: {error}", flush=True)
    return pythons


@contextmanager
def server() -> Iterator[str]:
    """The server in a process of its own; gives its origin."""
    process = subprocess.Popen(
        [sys.executable, "-s", str(HERE / "server.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdin
        assert process.stdout
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    finally:
        # It ends by itself when its standard input is closed, also if we are killed.
        process.stdin.close()  # type: ignore[union-attr]
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def measure(
    case: str, figure: Figure, pythons: dict[str, str], origin: str, rounds: int, quick: bool
) -> dict[str, page.Rounds]:
    """All rounds of a figure. A client that fails twice in a row is not tried again."""
    results: dict[str, page.Rounds] = {name: [] for name in figure.clients if name in pythons}
    for number in range(max(1, round(rounds * figure.rounds))):
        # Forwards and backwards in turn, so that drift of the machine does not favour the same
        # neighbour.
        for name in list(results)[:: -1 if number % 2 else 1]:
            if results[name][-2:] == [None, None]:
                results[name].append(None)
                continue
            job = Job(name, origin, pythons[name], quick)
            try:
                results[name].append(
                    figure.work(job) if figure.in_parent else in_child(case, figure, job)
                )
            except subprocess.TimeoutExpired as error:
                print(f"  {figure.name}, {name}: not done after {error.timeout:.0f} s", flush=True)
                results[name].append(None)
            except subprocess.CalledProcessError as error:
                print(f"  {figure.name}, {name}: {last_line(error.stderr)}", flush=True)
                results[name].append(None)
    return results


def in_child(case: str, figure: Figure, job: Job) -> dict[str, float]:
    command = [job.python, "-s", str(HERE / "child.py"), case, figure.name, job.client, job.origin]
    done = subprocess.run(
        [*command, "1" if job.quick else "0"],
        cwd=tempfile.gettempdir(),
        env=environment(),
        check=True,
        capture_output=True,
        text=True,
        timeout=figure.seconds,
    )
    return json.loads(done.stdout.splitlines()[-1])


def last_line(output: str | bytes | None) -> str:
    text = output.decode(errors="replace") if isinstance(output, bytes) else output or ""
    return (text.strip().splitlines() or ["failed without a word"])[-1][:300]


def report(figure: Figure, results: dict[str, page.Rounds], seconds: float) -> None:
    for measure_ in figure.measures:
        print(f"{figure.title}: {measure_.title}", flush=True)
        for name, rounds in results.items():
            base = page.times(page.ratio(rounds, results.get("requests"), measure_.key))
            print(
                f"  {name:12} {page.spread(rounds, measure_)}{base.replace(')', ' requests)')}",
                flush=True,
            )
        for goal in figure.goals:
            if goal.measure == measure_.key:
                verdict = {True: "met", False: "NOT met", None: "not known"}[
                    page.met(goal, results)
                ]
                value = page.times(page.reached(goal, results)) if goal.of else ""
                print(
                    f"  to reach: {page.wording(goal, measure_.unit)}{value}: {verdict}", flush=True
                )
    print(f"  [{seconds:.0f} s]", flush=True)


def cost_of_server(origin: str, calls: int = 1000) -> float:
    """CPU seconds that the server needs for one chat completion."""
    job = Job("http.client", origin, sys.executable)
    client = job.open("plain")
    client.chat()
    before = job.stats()["cpu_seconds"]
    for _ in range(calls):
        client.chat()
    return (job.stats()["cpu_seconds"] - before) / calls


def distribution(client: str) -> str:
    return "requests-llm" if client == OURS else client


def this_machine() -> str:
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(
            line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        pass
    return (
        f"{model}, {os.cpu_count()} cores, {platform.system()} {platform.release().split('-')[0]}"
    )


if __name__ == "__main__":
    sys.exit(main())
