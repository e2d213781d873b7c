"""`docs/benchmarks.md`: what stands between `<!-- bench:NAME -->` and `<!-- /bench:NAME -->`.

Everything outside the markers stays as it is, and so do blocks of figures that were not measured
this time, and rows of the overview that are not ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median

from clients import OURS
from figure import Figure, Goal, Measure

Rounds = list[dict[str, float] | None]  # the results of one client, None where a round failed
Results = dict[str, Rounds]  # by client

SKELETON = """# Benchmarks

What a call through `LLM` costs, compared with the layers under it and with other clients. The page
is written by `make bench`; parts outside the `bench:` markers are written by hand and kept.

## Overview

<!-- bench:summary -->
<!-- /bench:summary -->

## How it is measured

<!-- bench:machine -->
<!-- /bench:machine -->

## The figures
"""

HOW = """\
Every number is taken in a fresh process of an environment that holds one client and what it brings
along. A round measures each client once, one after the other; the rounds repeat, so that all
clients see the same minutes of the machine. Shown are medians of the rounds. A ratio is formed
inside each round, and the median of the ratios is shown. CPU is user and system time of the
client's process (`getrusage`). The server is a process of its own on the loopback interface: one
thread, canned bytes, {server} of CPU for one chat completion. It speaks plain HTTP; nothing else is
reached. Clients run with their default settings.

{machine}; Python {python}; measured on {date}. Versions: {versions}."""

SCALES = {"ms": 1e3, "µs": 1e6, "MiB": 1 / (1 << 20), "MB": 1e-6, "/s": 1, "": 1}


def put(text: str, name: str, body: str) -> str:
    """`text` with the block `name` replaced, or added at the end if there is none."""
    first, last = f"<!-- bench:{name} -->", f"<!-- /bench:{name} -->"
    block = f"{first}\n{body.strip()}\n{last}"
    if first in text and last in text:
        return text[: text.index(first)] + block + text[text.index(last) + len(last) :]
    return f"{text.rstrip()}\n\n{block}\n"


def block(text: str, name: str) -> str:
    first, last = f"<!-- bench:{name} -->", f"<!-- /bench:{name} -->"
    return (
        text[text.index(first) + len(first) : text.index(last)]
        if first in text and last in text
        else ""
    )


def show(value: float | None, unit: str) -> str:
    if value is None:
        return "–"
    value *= SCALES[unit]
    digits = 0 if abs(value) >= 100 or value == int(value) else 1 if abs(value) >= 10 else 2
    return f"{value:,.{digits}f}{' ' * (unit not in ('', '/s'))}{unit}"


def middle(rounds: Rounds | None, measure: str) -> float | None:
    values = [one[measure] for one in rounds or () if one]
    return median(values) if values else None


def ratio(over: Rounds | None, under: Rounds | None, measure: str) -> float | None:
    """The median of the ratios of the rounds in which both were measured."""
    pairs = [
        (a[measure], b[measure]) for a, b in zip(over or (), under or (), strict=False) if a and b
    ]
    return median(a / b for a, b in pairs) if pairs and all(b for _, b in pairs) else None


def reached(goal: Goal, results: Results) -> float | None:
    ours = results.get(OURS)
    return (
        ratio(ours, results.get(goal.of), goal.measure) if goal.of else middle(ours, goal.measure)
    )


def met(goal: Goal, results: Results) -> bool | None:
    value = reached(goal, results)
    if value is None:
        return None
    return value >= goal.limit if goal.at_least else value <= goal.limit


def wording(goal: Goal, unit: str) -> str:
    sign = "≥" if goal.at_least else "≤"
    if not goal.of:
        return f"{sign} {show(goal.limit, unit)}"
    number = f"1/{1 / goal.limit:.0f}" if goal.limit < 0.25 else f"{goal.limit:g}"
    return f"{sign} {number} × {goal.of}"


def times(value: float | None) -> str:
    return "" if value is None else f" ({value:.3f} ×)" if value < 0.1 else f" ({value:.2f} ×)"


def summary_rows(figure: Figure, results: Results, clients: Sequence[str]) -> list[str]:
    """One row for each measure: its goals, ours, and what the other clients need."""
    rows = []
    for measure in figure.measures:
        goals = [goal for goal in figure.goals if goal.measure == measure.key]
        verdicts = [met(goal, results) for goal in goals]
        verdict = (
            "" if not goals else "–" if None in verdicts else "yes" if all(verdicts) else "**no**"
        )
        to_reach = "; ".join(
            wording(goal, measure.unit) + (times(reached(goal, results)) if goal.of else "")
            for goal in goals
        )
        title = figure.title + ("" if len(figure.measures) == 1 else f": {measure.title}")
        cells = [
            title,
            show(middle(results.get(OURS), measure.key), measure.unit),
            to_reach,
            verdict,
        ]
        cells += [
            show(middle(results.get(name), measure.key), measure.unit)
            for name in clients
            if name != OURS
        ]
        rows.append("| " + " | ".join(cells) + " |")
    return rows


def summary(old: str, rows: Sequence[str], clients: Sequence[str]) -> str:
    """The overview with new rows in place of the old ones of the same figure; other rows stay."""
    head = [
        "figure",
        OURS,
        "to reach (ours ÷ theirs)",
        "met",
        *(name for name in clients if name != OURS),
    ]
    kept = {line.split("|")[1].strip(): line for line in old.splitlines() if line.startswith("| ")}
    fresh = {line.split("|")[1].strip(): line for line in rows}
    kept.pop("figure", None)
    kept.pop("---", None)
    lines = list((kept | fresh).values())
    return "\n".join(
        ["| " + " | ".join(head) + " |", "| --- |" + " --- |" * (len(head) - 1), *lines]
    )


def section(figure: Figure, results: Results, clients: Sequence[str], date: str) -> str:
    """The heading, table and explanation of one figure."""
    head = ["", *(f"{measure.title}" for measure in figure.measures)]
    base = next((goal.of for goal in figure.goals if goal.of), "requests")
    first = figure.measures[0]
    has_ratio = any(
        ratio(results.get(name), results.get(base), first.key) for name in clients if name != base
    )
    lines = [f"### {figure.title}", "", f"{figure.how}", ""]
    lines.append(
        "| " + " | ".join([*head, *([f"{first.title} ÷ {base}"] if has_ratio else [])]) + " |"
    )
    lines.append("| --- |" + " --- |" * (len(head) - 1 + has_ratio))
    for name in clients:
        if name not in results:
            continue
        cells = [name, *(spread(results[name], measure) for measure in figure.measures)]
        if has_ratio:
            cells.append(
                times(ratio(results[name], results.get(base), first.key)).strip(" ()") or "–"
            )
        lines.append("| " + " | ".join(cells) + " |")
    count = max((len(rounds) for rounds in results.values()), default=0)
    lines += [
        "",
        f"{count} round{'s' * (count != 1)}, {date}: `make bench ARGS='--only {figure.name}'`",
    ]
    return "\n".join(lines)


def spread(rounds: Rounds, measure: Measure) -> str:
    values = [one[measure.key] for one in rounds if one]
    if not values:
        return "failed"
    text = show(median(values), measure.unit)
    low, high = show(min(values), measure.unit), show(max(values), measure.unit)
    return text if low == high else f"{text} ({low} – {high})"


def write(path: Path, blocks: dict[str, str], rows: Sequence[str], clients: Sequence[str]) -> None:
    text = path.read_text(encoding="utf-8") if path.is_file() else SKELETON
    text = put(text, "summary", summary(block(text, "summary"), rows, clients))
    for name, body in blocks.items():
        text = put(text, name, body)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
