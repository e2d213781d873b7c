"""What all calls took together, by model: tokens and money, exact among threads."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from typing import Any, NamedTuple, TypeAlias

from LLM.clock import Clock
from LLM.forks import renew_after_fork
from LLM.prices import ZERO, Pricing, add, dollars_text
from LLM.types import UNSET, TokenUsage, Unset

# A cost that is known, that is known to be unknown (`None`), or what can tell it from the usage.
Cost: TypeAlias = Decimal | Callable[[TokenUsage], Decimal | None] | None

# Calls that wait to be priced: some 1 MB of them, and a script that never asks for its costs and makes
# fewer calls never loads the prices.
PENDING = 4096

_FIELDS = tuple(TokenUsage.model_fields)
NOTHING = TokenUsage(**dict.fromkeys(_FIELDS, 0))


@dataclass
class ModelUsage:
    """What the calls of one model, or all calls, took.

    Attributes:
        calls: all of them, those answered from the cache included.
        cached: answered from the cache: no tokens, no money.
        interrupted: their end did not come, and with it the truth; what is known of them is counted.
        unpriced: their cost is unknown.
        total: tokens; a part that is unknown of any call is `None`.
        known: tokens, as far as they are known; a part that no call knows is 0.
        known_cost: US dollars, as far as they are known.
    """

    calls: int = 0
    cached: int = 0
    interrupted: int = 0
    unpriced: int = 0
    total: TokenUsage = field(default_factory=NOTHING.model_copy)
    known: TokenUsage = field(default_factory=NOTHING.model_copy)
    known_cost: Decimal = ZERO

    @property
    def cost(self) -> Decimal | None:
        """US dollars; `None` if it is unknown of any call: `known_cost` is the least it can be then."""
        return None if self.unpriced or self.interrupted else self.known_cost

    def __add__(self, other: ModelUsage) -> ModelUsage:
        return ModelUsage(
            self.calls + other.calls,
            self.cached + other.cached,
            self.interrupted + other.interrupted,
            self.unpriced + other.unpriced,
            self.total + other.total,
            self.known + other.known,
            add(self.known_cost, other.known_cost),
        )


class _Call(NamedTuple):
    provider: str | None
    model: str | None
    usage: TokenUsage | None
    complete: bool
    cached: bool
    cost: Cost | Unset
    at: datetime


class UsageTotals:
    """Counts calls; what they cost is worked out when somebody asks. Threads may share one.

    Args:
        pricing: prices of calls recorded without a cost; left out or `None`: those of the extra `[cost]`.
        clock: tells when a call was made, for prices that change.
    """

    def __init__(self, pricing: Pricing | None = None, *, clock: Clock | None = None) -> None:
        self._pricing = pricing or Pricing()
        self._utc = (clock or Clock()).utc
        self._pending: deque[_Call] = deque()
        self._sums: dict[tuple[str | None, str | None], _Sum] = {}
        self.after_fork()
        renew_after_fork(self)

    def after_fork(self) -> None:
        self._lock = threading.Lock()

    def record(
        self,
        provider: str | None,
        model: str | None,
        usage: TokenUsage | None,
        *,
        complete: bool = True,
        cached: bool = False,
        cost: Cost | Unset = UNSET,
    ) -> None:
        """Count a call.

        Args:
            provider: name of the host that answered.
            model: as it was asked for.
            usage: as far as it is known.
            complete: whether the answer came to its end.
            cached: answered from the cache: free, its tokens are not counted.
            cost: US dollars; `None`: unknown; a function: asked later, with the usage; left out: by
                the prices of this object.
        """
        self._pending.append(_Call(provider, model, usage, complete, cached, cost, self._utc()))
        # One thread does the sums, the others need not wait for it.
        if len(self._pending) >= PENDING and self._lock.acquire(blocking=False):
            try:
                self._fold()
            finally:
                self._lock.release()

    @property
    def by_model(self) -> dict[str, ModelUsage]:
        """What each model took, by `provider/model`."""
        with self._lock:
            self._fold()
            found: dict[str, ModelUsage] = {}
            for (provider, model), sums in sorted(self._sums.items(), key=str):
                found[f"{provider or 'unknown'}/{model or 'unknown'}"] = sums.snapshot()
            return found

    def snapshot(self) -> ModelUsage:
        """All models together, at one moment; the properties below ask for it one by one."""
        return sum(self.by_model.values(), ModelUsage())

    @property
    def calls(self) -> int:
        """Calls, those answered from the cache included."""
        return self.snapshot().calls

    @property
    def cached(self) -> int:
        """Calls answered from the cache, which are free."""
        return self.snapshot().cached

    @property
    def interrupted(self) -> int:
        """Calls whose end did not come; what is known of them is counted."""
        return self.snapshot().interrupted

    @property
    def unpriced(self) -> int:
        """Calls whose cost is unknown."""
        return self.snapshot().unpriced

    @property
    def total(self) -> TokenUsage:
        """Tokens; a part that is unknown of any call is `None`."""
        return self.snapshot().total

    @property
    def known(self) -> TokenUsage:
        """Tokens, as far as they are known."""
        return self.snapshot().known

    @property
    def cost(self) -> Decimal | None:
        """US dollars; `None` if it is unknown of any call."""
        return self.snapshot().cost

    @property
    def known_cost(self) -> Decimal:
        """US dollars, as far as they are known."""
        return self.snapshot().known_cost

    def reset(self) -> None:
        """Begin anew."""
        with self._lock:
            self._pending.clear()
            self._sums.clear()

    def __str__(self) -> str:
        """A table, a line for each model."""
        rows = self.by_model
        if not rows:
            return "no calls"
        table = [("model", "calls", "prompt", "completion", "cost")]
        table += [_row(name, used) for name, used in rows.items()]
        everything = sum(rows.values(), ModelUsage())
        if len(rows) > 1:
            table.append(_row("all", everything))
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = [
            "  ".join(
                cell.rjust(width) if place else cell.ljust(width)
                for place, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in table
        ]
        remarks = {
            "from the cache": everything.cached,
            "interrupted": everything.interrupted,
            "without a known cost": everything.unpriced,
        }
        lines += [f"{_count(number)} {what}" for what, number in remarks.items() if number]
        return "\n".join(lines)

    def __repr__(self) -> str:
        used = self.snapshot()
        return f"<UsageTotals: {_count(used.calls)}, {_money(used)}>"

    def _fold(self) -> None:
        """Price what is pending and add it up; the caller holds the lock."""
        # As many as there are now: others may add calls as quickly as they are taken away.
        for _ in range(len(self._pending)):
            try:
                call = self._pending.popleft()
            except IndexError:  # a fork in the middle of another thread's sums
                return
            key = (call.provider, call.model)
            if key not in self._sums:
                self._sums[key] = _Sum()
            self._sums[key].count(call, self._cost(call))

    def _cost(self, call: _Call) -> Decimal | None:
        usage = call.usage
        if call.cached:
            return ZERO
        if callable(call.cost) or isinstance(call.cost, Unset):
            if usage is None:
                return None
            if not call.complete and usage.prompt_tokens is not None:
                # The least that it can have cost.
                usage = usage.model_copy(update={"completion_tokens": usage.completion_tokens or 0})
            if callable(call.cost):
                return call.cost(usage)
            return self._pricing.cost(call.provider, call.model, usage, at=call.at)
        return call.cost


class _Sum:
    """The sums of one model while they grow; plain integers, which are quick to add."""

    def __init__(self) -> None:
        self.calls = self.cached = self.interrupted = self.unpriced = 0
        self.tokens = dict.fromkeys(_FIELDS, 0)
        self.unknown: set[str] = set()
        self.cost = ZERO

    def count(self, call: _Call, cost: Decimal | None) -> None:
        self.calls += 1
        if call.cached:
            self.cached += 1
            return
        self.interrupted += not call.complete
        if cost is None:
            self.unpriced += 1
        else:
            self.cost = add(self.cost, cost)
        if call.usage is None:
            self.unknown.update(_FIELDS)
            return
        for name, tokens in _parts(call.usage).items():
            if tokens is not None:
                self.tokens[name] += tokens
            if tokens is None or not call.complete:
                self.unknown.add(name)
        if call.usage.total_tokens is None:
            parts = (call.usage.prompt_tokens, call.usage.completion_tokens)
            self.tokens["total_tokens"] += sum(part or 0 for part in parts)

    def snapshot(self) -> ModelUsage:
        total = {name: None if name in self.unknown else n for name, n in self.tokens.items()}
        return ModelUsage(
            self.calls,
            self.cached,
            self.interrupted,
            self.unpriced,
            TokenUsage(**total),
            TokenUsage(**self.tokens),
            self.cost,
        )


def _parts(usage: TokenUsage) -> Mapping[str, int | None]:
    values: Mapping[str, Any] = usage.__dict__
    return {name: values.get(name) for name in _FIELDS}


def _row(name: str, used: ModelUsage) -> tuple[str, str, str, str, str]:
    known, total = used.known, used.total
    return (
        name,
        f"{used.calls:,}",
        _tokens(known.prompt_tokens, total.prompt_tokens),
        _tokens(known.completion_tokens, total.completion_tokens),
        _money(used),
    )


def _tokens(known: int | None, total: int | None) -> str:
    return f"{known or 0:,}" if total is not None else f"{known:,}+" if known else "unknown"


def _money(used: ModelUsage) -> str:
    if used.cost is not None or not used.known_cost:
        return dollars_text(used.cost)
    return f"{dollars_text(used.known_cost)}+"


def _count(number: int) -> str:
    return "1 call" if number == 1 else f"{number:,} calls"
