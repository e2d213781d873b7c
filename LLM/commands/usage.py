"""The command `usage`: what was spent, by day and model."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from datetime import date, timedelta
from decimal import Decimal
from functools import reduce
from pathlib import Path
from typing import Any

from LLM.clock import utc_now
from LLM.commands.shared import OK, Failure, dotenv_of
from LLM.commands.view import Screen, screen_for
from LLM.errors import LLMConfigError

# Days without a call are drawn too, so that the chart shows time as it went by; in a longer one, months
# of them would hide the rest.
_LONGEST_CHART = 62


def usage(args: argparse.Namespace) -> int:
    from LLM.policies.spending import Spending
    from LLM.policies.sqlite import DatabaseError

    where = args.store or _from_environment(args)
    url, path = _place(where)
    spending = Spending(url)
    try:
        rows = spending.by_day_and_model(args.since)
        budgets = spending.budgets()
    except DatabaseError as error:
        raise Failure(str(error)) from error
    finally:
        spending.close()
    table = _grouped(rows, args.by)
    if args.json:
        report = {
            "store": path,
            "since": args.since and args.since.isoformat(),
            "rows": [_value(row) for row in table],
            "total": _value(_sums(rows)),
            "budgets": [_standing(budget) for budget in budgets],
        }
        print(json.dumps(report, ensure_ascii=False, indent=2))
        return OK
    screen = screen_for(args)
    since = f" since {args.since}" if args.since else ""
    if rows or (budgets and not since):
        screen.say(f"{path}{since}, days in UTC", "dim")
    else:
        screen.say(f"{path} holds no calls{since}")
    if rows:
        _show(rows, table, args.by, screen)
    if budgets:
        _show_budgets(budgets, screen)
    return OK


def first_day(text: str) -> date:
    """What `--since` names; today is one of the last `7d`."""
    from LLM.policies import spending

    try:
        return spending.first_day(text, utc_now().date())
    except LLMConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _from_environment(args: argparse.Namespace) -> str:
    from LLM.config import Environment

    store = Environment.read(dotenv_of(args)).first("LLM_USAGE_STORE")
    if not store:
        raise LLMConfigError(
            "nothing says where calls are written down: set LLM_USAGE_STORE=sqlite:///spend.db "
            "(for the command line and LLMConfig.from_env; in a program LLM(usage_store=…)), "
            "or name a file with --store"
        )
    return store


def _place(where: str) -> tuple[str, str]:
    """URL and path of a store that is there: to look must not make one."""
    from LLM.policies.sqlite import MEMORY, sqlite_path

    is_url = "://" in where or where == MEMORY
    url = where if is_url else f"sqlite:///{Path(where).expanduser().absolute()}"
    path = sqlite_path(url)
    if path == MEMORY:
        raise Failure(f"{where} is the memory of one program; name a file")
    file = Path(path)
    if not file.is_file():
        what = (
            "is no file" if file.exists() else "is not there; the first call that is kept makes it"
        )
        raise Failure(f"the usage store {path!r} {what}")
    if not file.stat().st_size:
        raise Failure(f"the usage store {path!r} is empty: no call was written down in it")
    return url, path


# The numbers of calls and tokens that can be added up of the rows of the ledger.
_SUMS = (
    "calls",
    "cache_hits",
    "prompt_tokens",
    "completion_tokens",
    "cached_tokens",
    "unpriced",
    "interrupted",
)


def _sums(rows: Sequence[Any]) -> dict[str, Any]:
    from LLM.prices import ZERO, add

    sums = {name: sum(getattr(row, name) for row in rows) for name in _SUMS}
    return {**sums, "known_cost": reduce(add, (row.known_cost for row in rows), ZERO)}


def _grouped(rows: Sequence[Any], by: str) -> list[dict[str, Any]]:
    """Sums by day (the earliest first), by model (the dearest first), or by both."""
    groups: dict[tuple[str, str], list[Any]] = {}
    for row in rows:
        day = row.day if by != "model" else ""
        model = f"{row.provider or 'unknown'}/{row.model or 'unknown'}" if by != "day" else ""
        groups.setdefault((day, model), []).append(row)
    table = [
        {**({"day": day} if day else {}), **({"model": model} if model else {}), **_sums(group)}
        for (day, model), group in groups.items()
    ]
    return sorted(table, key=lambda row: (row.get("day", ""), -row["known_cost"], -_tokens(row)))


def _tokens(row: Mapping[str, Any]) -> int:
    return int(row["prompt_tokens"] + row["completion_tokens"])


def _value(row: Mapping[str, Any]) -> dict[str, Any]:
    """For JSON: sums of money are text, which loses no digit; what is unknown is `null`."""
    known = _exact(row["known_cost"])
    return {**row, "cost": None if _is_unknown(row) else known, "known_cost": known}


def _is_unknown(row: Mapping[str, Any]) -> bool:
    return bool(row["unpriced"] or row["interrupted"])


def _exact(amount: Decimal) -> str:
    return format(amount, "f")


def _standing(budget: Any) -> dict[str, Any]:
    spent, reserved, uncertain = budget.standing
    return {
        "budget": budget.name,
        "period": budget.period,
        "cost": _exact(spent.usd),
        "tokens": spent.tokens,
        "requests": spent.requests,
        "reserved": _exact(reserved.usd),
        "uncertain": _exact(uncertain),
    }


class _Money:
    """Dollars with as many decimals as the largest amount, the total, makes sensible: 2, 4 or 6."""

    def __init__(self, most: Decimal) -> None:
        self._places = 2 if most >= 1 else 4 if most >= Decimal("0.01") else 6

    def of(self, row: Mapping[str, Any]) -> str:
        cost: Decimal = row["known_cost"]
        if not _is_unknown(row):
            return self._text(cost)
        return f"{self._text(cost)}+" if cost else "unknown"

    def _text(self, cost: Decimal) -> str:
        least = Decimal(1).scaleb(-self._places)
        return f"<${least:f}" if 0 < cost < least else f"${cost:,.{self._places}f}"


def _show(rows: Sequence[Any], table: Sequence[Mapping[str, Any]], by: str, screen: Screen) -> None:
    names = ["day", "model"] if by == "both" else [by]
    head = [*names, "calls", "prompt", "cached", "completion", "cost"]
    everything = _sums(rows)
    money = _Money(everything["known_cost"])
    lines, last = [], ""
    for row in table:
        named = [str(row[name]) for name in names]
        if named[0] == last:
            named[0] = ""  # a day is said once
        last = row[names[0]]
        lines.append([*named, *_figures(row, money)])
    total = (
        ["all", *[""] * (len(names) - 1), *_figures(everything, money)] if len(table) > 1 else []
    )
    screen.grid(head, lines, total=total, texts=len(names))
    is_marked = any(line[-1].endswith("+") for line in [*lines, total] if line)
    for remark in _remarks(everything, is_marked=is_marked):
        screen.say(remark, "dim")
    _chart(table if by != "both" else _grouped(rows, "day"), by, money, screen)


def _figures(row: Mapping[str, Any], money: _Money) -> list[str]:
    parts = ("calls", "prompt_tokens", "cached_tokens", "completion_tokens")
    return [*(f"{row[part]:,}" for part in parts), money.of(row)]


def _remarks(total: Mapping[str, Any], *, is_marked: bool) -> list[str]:
    found = []
    if total["cache_hits"]:
        found.append(f"{_count(total['cache_hits'])} came from our own cache, free.")
    doubts = {"without a known price": total["unpriced"], "interrupted": total["interrupted"]}
    told = [f"{_count(number)} {what}" for what, number in doubts.items() if number]
    if told:
        found.append(f"{'+ is the least it can be: ' if is_marked else ''}{', '.join(told)}.")
    return found


def _count(number: int) -> str:
    return "1 call" if number == 1 else f"{number:,} calls"


def _chart(table: Sequence[Mapping[str, Any]], by: str, money: _Money, screen: Screen) -> None:
    name = "model" if by == "model" else "day"
    in_dollars = any(row["known_cost"] for row in table)
    bars = [
        (
            str(row[name]),
            float(row["known_cost"]) if in_dollars else float(_tokens(row)),
            money.of(row) if in_dollars else f"{_tokens(row):,}",
        )
        for row in table
    ]
    if name == "day":
        bars = _with_idle_days(bars)
    screen.bars(f"{'US dollars' if in_dollars else 'Tokens'} by {name}", bars)


def _with_idle_days(bars: Sequence[tuple[str, float, str]]) -> list[tuple[str, float, str]]:
    first, last = date.fromisoformat(bars[0][0]), date.fromisoformat(bars[-1][0])
    span = (last - first).days + 1
    if span > _LONGEST_CHART:
        return list(bars)
    busy = {label: (label, value, text) for label, value, text in bars}
    days = [(first + timedelta(days=place)).isoformat() for place in range(span)]
    return [busy.get(day, (day, 0.0, "")) for day in days]


def _show_budgets(budgets: Sequence[Any], screen: Screen) -> None:
    from LLM.prices import dollars_text

    rows = [
        (
            budget.name,
            budget.period or "all time",
            dollars_text(budget.standing.spent.usd),
            f"{budget.standing.spent.tokens:,}",
            f"{budget.standing.spent.requests:,}",
            dollars_text(budget.standing.reserved.usd),
        )
        for budget in budgets
    ]
    head = ("budget", "period", "spent", "tokens", "requests", "reserved")
    screen.grid(head, rows, texts=2)
