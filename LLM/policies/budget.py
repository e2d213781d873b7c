"""What may be spent: the worst case of a call is reserved before it is sent, and settled afterwards."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from contextvars import ContextVar
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Final, Literal, Protocol, TypeAlias, runtime_checkable

from LLM.clock import Clock
from LLM.errors import LLMBudgetError, LLMConfigError
from LLM.forks import renew_after_fork
from LLM.policies.spending import Amount, Receipt, Spending, Standing
from LLM.policies.sqlite import DatabaseError
from LLM.prices import EXACT, ZERO, add, dollars, dollars_text

log = logging.getLogger("LLM")

Period: TypeAlias = Literal["day", "month"]

# How much of `2026-11-21` names the period.
_ABSURD = 10**12  # dollars, or tokens, of one call

_PERIODS = {None: 0, "month": 7, "day": 10}


@dataclass(frozen=True)
class BudgetState:
    """A budget at one moment. Limits and what remains of them are `None` where there is no limit.

    Attributes:
        name: the budget's.
        period: the day or month in UTC that this is about, `2026-11-21` or `2026-11`; `""`: all time.
        limit_usd: US dollars.
        limit_tokens: tokens, of prompts and answers.
        limit_requests: requests sent.
        spent: settled; with the worst case of those calls whose truth never came.
        reserved: the worst case of calls under way.
        uncertain_usd: US dollars of `spent` that are such a worst case.
    """

    name: str
    period: str
    limit_usd: Decimal | None
    limit_tokens: int | None
    limit_requests: int | None
    spent: Amount
    reserved: Amount
    uncertain_usd: Decimal

    @property
    def remaining_usd(self) -> Decimal | None:
        """US dollars that may still be reserved, at least 0."""
        return None if self.limit_usd is None else self._left(Amount(usd=self.limit_usd)).usd

    @property
    def remaining_tokens(self) -> int | None:
        """Tokens that may still be reserved, at least 0."""
        limit = self.limit_tokens
        return None if limit is None else self._left(Amount(tokens=limit)).tokens

    @property
    def remaining_requests(self) -> int | None:
        """Requests that may still be sent, at least 0."""
        limit = self.limit_requests
        return None if limit is None else self._left(Amount(requests=limit)).requests

    def _left(self, limit: Amount) -> Amount:
        return limit.minus(self.spent.plus(self.reserved))

    def __str__(self) -> str:
        pairs = (
            (dollars_text(self.spent.usd), self.limit_usd and dollars_text(self.limit_usd), ""),
            (f"{self.spent.tokens:,}", self.limit_tokens and f"{self.limit_tokens:,}", " tokens"),
            (
                f"{self.spent.requests:,}",
                self.limit_requests and f"{self.limit_requests:,}",
                " requests",
            ),
        )
        parts = [f"{spent} of {limit}{unit}" for spent, limit, unit in pairs if limit]
        when = f" in {self.period}" if self.period else ""
        return f"budget {self.name!r}: {', '.join(parts)} spent{when}"


@runtime_checkable
class Book(Protocol):
    """Where it stands what was reserved and spent: what `Budget(store=…)` takes, besides a URL.

    Threads call it at once. An `LLMError` that `reserve` or `standing` raises goes out as it is.
    """

    def reserve(
        self, name: str, period: str, amount: Amount, check: Callable[[Standing], None]
    ) -> Receipt:
        """Reserve `amount`, unless `check` raises; nobody else reserves between the two.

        Args:
            name: of the budget.
            period: `2026-11-21`, `2026-11`, or `""` for all time.
            amount: the worst case of a call.
            check: gets what stands now; raises if the amount does not fit beside it.
        """
        ...

    def settle(self, name: str, receipt: Receipt, truth: Amount, uncertain: Decimal) -> None:
        """Put `truth` in the place of a reservation. Never raises.

        Args:
            uncertain: US dollars of `truth` that are the worst case, for nobody knows better.
        """
        ...

    def standing(self, name: str, period: str) -> Standing:
        """What stands of a budget in a period."""
        ...


class _Memory:
    """The book of a budget that ends with its process."""

    def __init__(self) -> None:
        self._standings: dict[str, Standing] = {}
        self.after_fork()
        renew_after_fork(self)

    def after_fork(self) -> None:
        self._lock = threading.Lock()

    def reserve(
        self, _name: str, period: str, amount: Amount, check: Callable[[Standing], None]
    ) -> Receipt:
        with self._lock:
            if period not in self._standings:
                # Of what is over only the calls under way matter, which will be settled there.
                self._standings = {
                    key: old for key, old in self._standings.items() if old.reserved.requests
                }
            now = self._standings.get(period, Standing())
            check(now)
            self._standings[period] = now._replace(reserved=now.reserved.plus(amount))
        return Receipt("", period, amount)

    def settle(self, _name: str, receipt: Receipt, truth: Amount, uncertain: Decimal) -> None:
        with self._lock:
            now = self._standings[receipt.period]
            self._standings[receipt.period] = Standing(
                now.spent.plus(truth),
                now.reserved.minus(receipt.amount),
                add(now.uncertain, uncertain),
            )

    def standing(self, _name: str, period: str) -> Standing:
        with self._lock:
            return self._standings.get(period, Standing())


class Budget:
    """What may be spent; a call that might not fit is refused before it is sent. Threads may share one.

    Before a call its worst case is reserved, afterwards it is settled to the truth. Where the truth never
    comes (a broken stream, an answer without usage) the worst case counts as spent: `uncertain_usd`.
    `with llm.budget(budget):` holds every call of the block to it, `LLM(budget=…)` every call of a client.

    Args:
        usd: US dollars: a number, or text like `"0.50"` or `"$0.50"`; `None`: no such limit.
        tokens: tokens, of prompts and answers; `None`: no such limit.
        requests: requests sent; `None`: no such limit. One of the three must be given.
        warn_at: fraction of a limit; when so much of it is spent, `on_warn` is called, once in a period.
            `None`: never.
        on_warn: called with the budget; left out: a line in the log. If it raises, that is logged.
        unknown: what to do with a call whose worst case is unknown (no price, no `max_tokens`):
            `"refuse"` it, or `"allow"` it and count what becomes known.
        name: for messages; in a store, budgets of one name are one.
        period: `"day"` or `"month"`, in UTC, after which it begins anew; `None`: never.
        store: `"sqlite:///spend.db"`, a `Spending` or another `Book`: lasts over runs, shared among
            processes; `"redis://host"` (or `rediss://`, `unix://`; extra `redis`): among machines too; left
            out or `None`: in memory, and a forked child goes on with a copy of its own.

    Raises:
        LLMConfigError: a limit is no positive number, in another currency or unit, or none is given.
    """

    def __init__(
        self,
        usd: Decimal | float | str | None = None,
        *,
        tokens: int | None = None,
        requests: int | None = None,
        warn_at: float | None = 0.8,
        on_warn: Callable[[Budget], object] | None = None,
        unknown: Literal["refuse", "allow"] = "refuse",
        name: str = "default",
        period: Period | None = None,
        store: Book | str | None = None,
        clock: Clock | None = None,
        **unknown_units: Any,
    ) -> None:
        if unknown_units:
            raise LLMConfigError(
                f"a budget has no {next(iter(unknown_units))!r}: its units are usd, tokens and requests"
            )
        self.usd = None if usd is None else dollars(usd, "usd of a budget")
        if self.usd == 0:
            raise LLMConfigError("usd of a budget must be above 0")
        self.tokens = _whole(tokens, "tokens")
        self.requests = _whole(requests, "requests")
        if self.usd is None and self.tokens is None and self.requests is None:
            raise LLMConfigError("a budget needs a limit: usd, tokens or requests")
        if warn_at is not None and not _is_fraction(warn_at):
            raise LLMConfigError(f"warn_at must be above 0 and at most 1, not {warn_at!r}")
        if on_warn is not None and not callable(on_warn):
            raise LLMConfigError(f"on_warn must be a function, not {type(on_warn).__name__}")
        if unknown not in ("refuse", "allow"):
            raise LLMConfigError(f"unknown must be 'refuse' or 'allow', not {unknown!r}")
        if period not in _PERIODS:
            raise LLMConfigError(f"period must be 'day', 'month' or None, not {period!r}")
        if not isinstance(name, str) or not name:
            raise LLMConfigError(f"name of a budget must be text, not {name!r}")
        self.warn_at = None if warn_at is None else Decimal(str(warn_at))
        self._nearly = [
            None if limit is None or self.warn_at is None else EXACT.multiply(self.warn_at, limit)
            for limit in (self.usd, self.tokens, self.requests)
        ]
        self.on_warn = on_warn
        self.unknown: Final = unknown
        self.name = name
        self.period: Final = period
        self._clock = clock or Clock()
        self.store = _opened(store, self._clock) if isinstance(store, str) else store
        if not isinstance(self.store, (Book, type(None))):
            raise LLMConfigError(
                "store must be a URL, a Spending, or a Book with reserve, settle and standing, not "
                f"{type(store).__name__}"
            )
        self._book: Book = _Memory() if self.store is None else self.store
        self._warned: str | None = None
        self.after_fork()
        renew_after_fork(self)

    def after_fork(self) -> None:
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        if self.store is None:
            raise TypeError(
                f"budget {self.name!r} is in memory, a copy of it could be spent twice: "
                "give it a store='sqlite:///…' or 'redis://…'"
            )
        limits = {"tokens": self.tokens, "requests": self.requests, "on_warn": self.on_warn}
        how = {"warn_at": self.warn_at, "unknown": self.unknown, "clock": self._clock}
        which = {"name": self.name, "period": self.period, "store": self.store}
        return _budget, (self.usd, {**limits, **how, **which})

    def reserve(self, cost: Decimal | None, tokens: int | None, requests: int = 1) -> Reservation:
        """Set aside what a call may take at worst: its dollars, its tokens, and one request.

        Args:
            cost: US dollars; `None`: unknown.
            tokens: of prompt and answer; `None`: unknown.
            requests: of a batch, for which the other two are sums.

        Raises:
            LLMBudgetError: it does not fit, or the store cannot be used; nothing is set aside.
        """
        if self.unknown == "refuse":
            self._check_known(cost, tokens)
        amount = Amount(ZERO if cost is None else cost, tokens or 0, requests)
        try:
            receipt = self._book.reserve(
                self.name, self._now(), amount, lambda standing: self._check(amount, standing)
            )
        except DatabaseError as error:
            raise self._unusable(error) from error
        return Reservation(self, receipt)

    def state(self) -> BudgetState:
        """All of it at one moment; the properties ask for it one by one.

        Raises:
            LLMBudgetError: the store cannot be read.
        """
        return self._state(self._now())

    @property
    def spent_usd(self) -> Decimal:
        """US dollars that are settled, in this period."""
        return self.state().spent.usd

    @property
    def spent_tokens(self) -> int:
        """Tokens that are settled."""
        return self.state().spent.tokens

    @property
    def spent_requests(self) -> int:
        """Requests that are settled."""
        return self.state().spent.requests

    @property
    def reserved_usd(self) -> Decimal:
        """US dollars set aside for calls under way."""
        return self.state().reserved.usd

    @property
    def reserved_tokens(self) -> int:
        """Tokens set aside for calls under way."""
        return self.state().reserved.tokens

    @property
    def reserved_requests(self) -> int:
        """Requests under way."""
        return self.state().reserved.requests

    @property
    def remaining_usd(self) -> Decimal | None:
        """US dollars that may still be reserved; `None`: no such limit."""
        return self.state().remaining_usd

    @property
    def remaining_tokens(self) -> int | None:
        """Tokens that may still be reserved; `None`: no such limit."""
        return self.state().remaining_tokens

    @property
    def remaining_requests(self) -> int | None:
        """Requests that may still be sent; `None`: no such limit."""
        return self.state().remaining_requests

    @property
    def uncertain_usd(self) -> Decimal:
        """US dollars that count as spent although the truth never came: the worst case."""
        return self.state().uncertain_usd

    def __repr__(self) -> str:
        limits = {"usd": self.usd, "tokens": self.tokens, "requests": self.requests}
        text = ", ".join(f"{unit}={limit}" for unit, limit in limits.items() if limit is not None)
        return f"Budget({text}, name={self.name!r})"

    def __str__(self) -> str:
        return str(self.state())

    def settle(self, receipt: Receipt, cost: Decimal | None, tokens: int | None) -> None:
        """Put the truth in the place of a reservation; called by `Reservation.settle`."""
        worst = receipt.amount
        # A server may say anything. Nonsense is no truth, and least of all one that gives money back.
        cost = cost if cost is not None and 0 <= cost < _ABSURD else None
        tokens = tokens if tokens is not None and 0 <= tokens < _ABSURD else None
        truth = Amount(
            worst.usd if cost is None else cost,
            worst.tokens if tokens is None else tokens,
            worst.requests,
        )
        self._book.settle(self.name, receipt, truth, worst.usd if cost is None else ZERO)
        self._warn(receipt.period)

    def release(self, receipt: Receipt) -> None:
        """Give a reservation back; called by `Reservation.release`."""
        self._book.settle(self.name, receipt, Amount(), ZERO)

    def _now(self) -> str:
        length = _PERIODS[self.period]
        return self._clock.utc().date().isoformat()[:length] if length else ""

    def _state(self, period: str) -> BudgetState:
        try:
            standing = self._book.standing(self.name, period)
        except DatabaseError as error:
            raise self._unusable(error) from error
        return BudgetState(self.name, period, self.usd, self.tokens, self.requests, *standing)

    def _unusable(self, error: DatabaseError) -> LLMBudgetError:
        return LLMBudgetError(f"budget {self.name!r} cannot be checked, nothing was sent: {error}")

    def _check_known(self, cost: Decimal | None, tokens: int | None) -> None:
        if self.usd is not None and cost is None:
            raise LLMBudgetError(
                f"the call may cost nobody knows what, and budget {self.name!r} is in dollars: give "
                "the client a price=Price(…) (or install the extra [cost]) and the call max_tokens, "
                "or allow it with unknown='allow'"
            )
        if self.tokens is not None and tokens is None:
            raise LLMBudgetError(
                f"the call may take nobody knows how many tokens, and budget {self.name!r} limits "
                "them: give the call max_tokens, or allow it with unknown='allow'"
            )

    def _check(self, amount: Amount, standing: Standing) -> None:
        """Raise unless `amount` fits beside what is spent and reserved."""
        spent, held = standing.spent, standing.reserved
        if (
            (self.usd is None or add(add(spent.usd, held.usd), amount.usd) <= self.usd)
            and (self.tokens is None or spent.tokens + held.tokens + amount.tokens <= self.tokens)
            and (
                self.requests is None
                or spent.requests + held.requests + amount.requests <= self.requests
            )
        ):
            return
        taken = spent.plus(held)
        wanted = taken.plus(amount)
        what = None
        if self.usd is not None and wanted.usd > self.usd:
            left = dollars_text(Amount(usd=self.usd).minus(taken).usd)
            what = (
                f"cost {dollars_text(amount.usd)} at worst",
                f"{left} left of {dollars_text(self.usd)}",
                dollars_text(standing.reserved.usd) if standing.reserved.usd else "",
            )
        elif self.tokens is not None and wanted.tokens > self.tokens:
            what = (
                f"take {amount.tokens:,} tokens at worst",
                f"{max(0, self.tokens - taken.tokens):,} left of {self.tokens:,}",
                f"{standing.reserved.tokens:,}" if standing.reserved.tokens else "",
            )
        elif self.requests is not None:
            if amount.requests == 1:
                raise LLMBudgetError(
                    f"budget {self.name!r} has no request left of {self.requests:,}: enlarge it"
                )
            what = (
                f"take {amount.requests:,} requests",
                f"{max(0, self.requests - taken.requests):,} left of {self.requests:,}",
                f"{standing.reserved.requests:,}" if standing.reserved.requests else "",
            )
        if what is not None:
            worst, left, reserved = what
            under_way = f" ({reserved} reserved for calls under way)" if reserved else ""
            raise LLMBudgetError(
                f"the call may {worst}, and budget {self.name!r} has {left}{under_way}: "
                "lower max_tokens, shorten the prompt, or enlarge the budget"
            )

    def _warn(self, period: str) -> None:
        """Tell, once in a period, that a limit is nearly reached. Never raises."""
        if self.warn_at is None or self._warned == period:
            return
        try:
            if not self._is_nearly_spent(self._book.standing(self.name, period).spent):
                return
            with self._lock:
                if self._warned == period:
                    return
                self._warned = period
            if self.on_warn is None:
                log.warning("%s", self._state(period))
            else:
                self.on_warn(self)
        except Exception:
            log.exception("the warning of budget %r failed", self.name)

    def _is_nearly_spent(self, spent: Amount) -> bool:
        usd, tokens, requests = self._nearly
        return (
            (usd is not None and spent.usd >= usd)
            or (tokens is not None and spent.tokens >= tokens)
            or (requests is not None and spent.requests >= requests)
        )


class Reservation:
    """What is set aside for one call, until `settle` or `release`; the first of them counts."""

    def __init__(self, budget: Budget, receipt: Receipt) -> None:
        self.budget = budget
        self.amount = receipt.amount
        self._receipt = receipt
        # Taken by whoever ends it; an atomic operation, so that two threads cannot both.
        self._open = [True]

    def settle(self, cost: Decimal | None, tokens: int | None) -> None:
        """The call is over. Never raises.

        Args:
            cost: US dollars that it took; `None`: unknown, what was set aside counts as spent.
            tokens: that it took; `None`: unknown, likewise.
        """
        if self._end():
            self.budget.settle(self._receipt, cost, tokens)

    def release(self) -> None:
        """Nothing was sent, or the server refused: give all of it back. Never raises."""
        if self._end():
            self.budget.release(self._receipt)

    def _end(self) -> bool:
        try:
            return self._open.pop()
        except IndexError:
            return False


class Reservations:
    """What is set aside for one call in several budgets."""

    def __init__(self, parts: Sequence[Reservation] = ()) -> None:
        self.parts = tuple(parts)

    def settle(self, cost: Decimal | None, tokens: int | None) -> None:
        """The call is over; see `Reservation.settle`."""
        with (
            ExitStack() as stack
        ):  # all of them, also if the warning of one of them ends the program
            for part in self.parts:
                stack.callback(part.settle, cost, tokens)

    def release(self) -> None:
        """Give all of it back; see `Reservation.release`."""
        for part in self.parts:
            part.release()


def reserve_all(
    budgets: Sequence[Budget], cost: Decimal | None, tokens: int | None, requests: int = 1
) -> Reservation | Reservations:
    """Reserve in each of the budgets, or in none. One that is named twice counts once.

    Raises:
        LLMBudgetError: as `Budget.reserve`.
    """
    if len(budgets) == 1:
        return budgets[0].reserve(cost, tokens, requests)
    parts: list[Reservation] = []
    with ExitStack() as undo:
        for budget in dict.fromkeys(budgets):
            part = budget.reserve(cost, tokens, requests)
            undo.callback(part.release)
            parts.append(part)
        undo.pop_all()
    return Reservations(parts)


# A budget that is entered holds for the thread or task; the variable itself never changes.
_active: ContextVar[tuple[Entry, ...]] = ContextVar("LLM budgets", default=())


class Entry:
    """A budget that a context was held to, until `leave`."""

    __slots__ = ("budget", "open")

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self.open = True


def active_budgets() -> tuple[Budget, ...]:
    """The budgets that a call made here must fit, the outermost first."""
    entries = _active.get()
    return tuple(entry.budget for entry in entries if entry.open) if entries else ()


def enter(budget: Budget) -> Entry:
    """Hold the calls of this thread or task to a budget, beside those that hold already."""
    entry = Entry(budget)
    _active.set((*(other for other in _active.get() if other.open), entry))
    return entry


def leave(entry: Entry) -> None:
    """Undo `enter`, from whatever context and in whatever order: generators end as they like."""
    entry.open = False


def _budget(usd: Decimal | None, how: dict[str, Any]) -> Budget:
    return Budget(usd, **how)


def _opened(url: str, clock: Clock) -> Book:
    if url.startswith(("redis:", "rediss:", "unix:")):
        from LLM.policies.redis_budget import RedisBook

        return RedisBook(url, clock=clock)
    return Spending(url, clock=clock)


def _whole(limit: object, unit: str) -> int | None:
    """A limit as a number above 0; `1e6` is one."""
    if limit is None:
        return None
    if isinstance(limit, float) and limit.is_integer():
        limit = int(limit)
    if isinstance(limit, bool) or not isinstance(limit, int) or limit <= 0:
        raise LLMConfigError(f"{unit} of a budget must be a whole number above 0, not {limit!r}")
    return limit


def _is_fraction(value: object) -> bool:
    return (
        isinstance(value, (int, float, Decimal)) and not isinstance(value, bool) and 0 < value <= 1
    )
