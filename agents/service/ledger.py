"""Money in SQL: what stands of each budget, exact over processes, and what each owner spent on a day."""

# ruff: noqa: S608 - only names of columns and conditions of this module are put into SQL

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from datetime import date
from decimal import Decimal
from typing import Any, Final, NamedTuple

from agents.store import Store, clean, execute
from agents.types import TokenUsage
from LLM import Amount, Clock, Receipt, Standing

log = logging.getLogger("agents.service")

# Seconds after which a reservation that nobody settled counts as spent, and as uncertain: its process is
# gone. Settled later, the truth still counts.
_ABANDONED_AFTER: Final = 3600

# Seconds before a store that could not be written is tried again, so that no answer waits for it in vain.
_RETRY_AFTER: Final = 5

_ABSURD: Final = 10**12  # dollars, or tokens, of one call

_NAME_LENGTH: Final = 200  # characters of an owner or a model; PostgreSQL's index takes 2,704 bytes

_ZERO: Final = Decimal(0)


class SpentRow(NamedTuple):
    """What a model took on a day.

    Attributes:
        day: in UTC, `2026-11-21`.
        cost: US dollars, as far as they are known.
        unpriced: calls whose cost is unknown.
        interrupted: calls whose end did not come.
    """

    day: str
    model: str
    calls: int
    prompt_tokens: int
    completion_tokens: int
    cost: Decimal
    unpriced: int
    interrupted: int

    def plus(self, other: SpentRow) -> SpentRow:
        """Both as one, under the day and the model of this one."""
        return SpentRow(
            self.day,
            self.model,
            self.calls + other.calls,
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
            _sum(self.cost, other.cost),
            self.unpriced + other.unpriced,
            self.interrupted + other.interrupted,
        )


class _Settlement(NamedTuple):
    name: str
    receipt: Receipt
    truth: Amount
    uncertain: Decimal


class _Batch(NamedTuple):
    """Rows by day, owner and model; written with one token, by which a second try knows them."""

    token: str
    rows: dict[tuple[str, str, str], SpentRow]


class Ledger:
    """The ledger of a store: a `Book` for `LLM.Budget`, and the usage by day. Threads share it."""

    def __init__(self, store: Store, clock: Clock | None = None) -> None:
        self._store = store
        self._clock = clock or Clock()
        self._lock = threading.Lock()
        self._unwritten: dict[tuple[str, str, str], SpentRow] = {}
        self._batch: _Batch | None = None
        self._unsettled: deque[_Settlement] = deque()
        self._writing = threading.Lock()
        self._settling = threading.Lock()
        self._not_before = float("-inf")

    # Budgets

    def reserve(
        self, name: str, period: str, amount: Amount, check: Callable[[Standing], None]
    ) -> Receipt:
        """Reserve, in one transaction, unless `check` raises.

        Raises:
            StoreError: the store cannot be used; nothing is reserved.
        """
        self._settle_all()
        receipt = Receipt(self._clock.new_id(), period, amount)
        row = {"id": receipt.id, "name": name, "period": period, **_columns(amount)}

        def work(connection: Any) -> None:
            self._lock_budget(connection, name, period)
            sql = "SELECT 1 FROM reservations WHERE id = :id"
            if execute(connection, sql, id=receipt.id).scalar():
                return  # the first time had come through
            check(self._standing(connection, name, period))
            sql = (
                "INSERT INTO reservations (id, name, period, made, usd, tokens, requests)"
                " VALUES (:id, :name, :period, :made, :usd, :tokens, :requests)"
            )
            execute(connection, sql, **row, made=self._clock.utc().timestamp())

        self._store.run(work)
        return receipt

    def settle(self, name: str, receipt: Receipt, truth: Amount, uncertain: Decimal) -> None:
        """Put the truth in the place of a reservation. Never raises: it is tried again if it fails."""
        self._unsettled.append(_Settlement(name, receipt, truth, uncertain))
        self._settle_all()

    def standing(self, name: str, period: str) -> Standing:
        """What stands of a budget.

        Raises:
            StoreError: the store cannot be read.
        """
        self._settle_all()
        return self._store.run(
            lambda connection: self._standing(connection, name, period), write=False
        )

    def _lock_budget(self, connection: Any, name: str, period: str) -> None:
        """Whoever reserves or settles in this budget waits here for the one before."""
        sql = (
            "INSERT INTO budgets (name, period, usd, tokens, requests, uncertain)"
            " VALUES (:name, :period, '0', 0, 0, '0') ON CONFLICT (name, period) DO NOTHING"
        )
        execute(connection, sql, name=name, period=period)
        sql = f"SELECT 1 FROM budgets WHERE name = :name AND period = :period{self._locked}"
        execute(connection, sql, name=name, period=period)

    def _standing(self, connection: Any, name: str, period: str) -> Standing:
        # One statement: between two, a settlement could be seen in neither or in both.
        sql = (
            "SELECT NULL AS made, usd, tokens, requests, uncertain FROM budgets"
            " WHERE name = :name AND period = :period UNION ALL"
            " SELECT made, usd, tokens, requests, usd FROM reservations"
            " WHERE name = :name AND period = :period"
        )
        spent, reserved, uncertain = Amount(), Amount(), _ZERO
        old = self._clock.utc().timestamp() - _ABANDONED_AFTER
        for row in execute(connection, sql, name=name, period=period):
            amount = Amount(Decimal(row.usd), row.tokens, row.requests)
            if row.made is not None and row.made > old:
                reserved = reserved.plus(amount)
            else:
                spent, uncertain = spent.plus(amount), _sum(uncertain, Decimal(row.uncertain))
        return Standing(spent, reserved, uncertain)

    def _settle_all(self, *, at_once: bool = False) -> None:
        if not self._unsettled or not (at_once or self._is_time()):
            return
        with self._settling:
            settlements = list(self._unsettled)
            try:
                self._store.run(lambda connection: self._settle(connection, settlements))
            except Exception as error:  # noqa: BLE001 - the call is done; the worst case stays reserved
                self._complain("a budget keeps the worst case of a call for now: %s", error)
                return
            for _ in settlements:
                self._unsettled.popleft()

    def _settle(self, connection: Any, settlements: Sequence[_Settlement]) -> None:
        # In one order, so that two processes cannot wait for each other.
        for name, receipt, truth, uncertain in sorted(settlements, key=_budget_of):
            budget = {"name": name, "period": receipt.period}
            self._lock_budget(connection, **budget)
            sql = "DELETE FROM reservations WHERE id = :id"
            if not execute(connection, sql, id=receipt.id).rowcount:
                continue  # the first time had come through
            sql = (
                "SELECT usd, tokens, requests, uncertain FROM budgets"
                " WHERE name = :name AND period = :period"
            )
            row = execute(connection, sql, **budget).one()
            spent = Amount(Decimal(row.usd), row.tokens, row.requests).plus(truth)
            doubt = str(_sum(Decimal(row.uncertain), uncertain))
            sql = (
                "UPDATE budgets SET usd = :usd, tokens = :tokens, requests = :requests,"
                " uncertain = :doubt WHERE name = :name AND period = :period"
            )
            execute(connection, sql, **budget, **_columns(spent), doubt=doubt)

    # Usage

    def record(
        self,
        owner: str,
        model: str | None,
        usage: TokenUsage | None,
        cost: Decimal | None,
        *,
        complete: bool = True,
    ) -> None:
        """Write down a call. Never raises: what cannot be written is logged, and tried again later.

        Args:
            model: as it was asked for; `None`: unknown.
            usage: as far as it is known.
            cost: US dollars; `None`: unknown.
            complete: whether the answer came to its end.
        """
        key, row = self._spent(owner, model, usage, cost, complete=complete)
        with self._lock:
            before = self._unwritten.get(key)
            self._unwritten[key] = row if before is None else before.plus(row)
        if self._is_time():
            self._write_if_nobody_does()

    def record_now(
        self, owner: str, model: str | None, usage: TokenUsage | None, cost: Decimal | None
    ) -> None:
        """The same, as a part of the transaction in which it is called, or in one of its own.

        Raises:
            StoreError: it is not written, and will not be.
        """
        key, row = self._spent(owner, model, usage, cost)
        batch = _Batch(self._clock.new_id(), {key: row})
        self._store.run(lambda connection: self._add(connection, batch))

    def _spent(
        self,
        owner: str,
        model: str | None,
        usage: TokenUsage | None,
        cost: Decimal | None,
        *,
        complete: bool = True,
    ) -> tuple[tuple[str, str, str], SpentRow]:
        day = self._clock.utc().date().isoformat()
        key = (day, _short(owner), _short(model or ""))
        tokens = usage or TokenUsage()
        known = cost if cost is not None and cost.is_finite() and 0 <= cost < _ABSURD else None
        row = SpentRow(
            day,
            key[2],
            calls=1,
            prompt_tokens=_sane(tokens.prompt_tokens),
            completion_tokens=_sane(tokens.completion_tokens),
            cost=_ZERO if known is None else known,
            unpriced=int(known is None),
            interrupted=int(not complete),
        )
        return key, row

    def by_day_and_model(self, owner: str | None, since: date) -> list[SpentRow]:
        """What was spent, the latest day first.

        Args:
            owner: `None`: all owners together.
            since: the first day, in UTC.

        Raises:
            StoreError: the store cannot be read.
        """
        self._write_all()
        whose = "" if owner is None else " AND owner = :owner"
        values = {} if owner is None else {"owner": _short(owner)}
        sql = f"SELECT {_SPENT} FROM spending WHERE day >= :since{whose} ORDER BY day DESC, model"
        rows = self._store.run(
            lambda connection: execute(connection, sql, since=since.isoformat(), **values).all(),
            write=False,
        )
        found: dict[tuple[str, str], SpentRow] = {}
        for row in map(_spent, rows):
            key = (row.day, row.model)
            found[key] = found[key].plus(row) if key in found else row
        return list(found.values())

    def flush(self) -> bool:
        """Try again, at once, to write what could not be written; whether all is written now.

        Without it that is tried again with the next call, after some seconds.
        """
        self._write_all()
        self._settle_all(at_once=True)
        return not (self._unwritten or self._batch or self._unsettled)

    def _write_all(self) -> None:
        """Wait for the thread that writes, then write what is left."""
        with self._writing:
            while self._write():
                pass

    def _write_if_nobody_does(self) -> None:
        # One thread writes for all; what was added while it let go is seen by asking once more.
        while (self._unwritten or self._batch) and self._writing.acquire(blocking=False):
            try:
                if not self._write():
                    return
            finally:
                self._writing.release()

    def _write(self) -> bool:
        """Whether there was something, and it is written."""
        if self._batch is None:
            with self._lock:
                rows, self._unwritten = self._unwritten, {}
            if not rows:
                return False
            self._batch = _Batch(self._clock.new_id(), rows)
        batch = self._batch
        try:
            self._store.run(lambda connection: self._add(connection, batch))
        except Exception as error:  # noqa: BLE001 - whatever it is, no answer is spoiled
            self._complain("what was spent is not written down yet: %s", error)
            return False
        self._batch = None
        return True

    def _add(self, connection: Any, batch: _Batch) -> None:
        for (day, owner, model), row in sorted(batch.rows.items()):  # in one order, as budgets
            key = {"day": day, "owner": owner, "model": model}
            sql = (
                f"INSERT INTO spending ({_SPENT}, owner, token) VALUES"
                " (:day, :model, 0, 0, 0, '0', 0, 0, :owner, '')"
                " ON CONFLICT (day, owner, model) DO NOTHING"
            )
            execute(connection, sql, **key)
            which = "WHERE day = :day AND owner = :owner AND model = :model"
            sql = f"SELECT {_SPENT}, token FROM spending {which}{self._locked}"
            found = execute(connection, sql, **key).one()
            if found.token == batch.token:
                continue  # the first time had come through
            both = _spent(found[:-1]).plus(row)._asdict()
            sql = (
                "UPDATE spending SET calls = :calls, prompt_tokens = :prompt_tokens,"
                " completion_tokens = :completion_tokens, cost = :cost, unpriced = :unpriced,"
                f" interrupted = :interrupted, token = :token {which}"
            )
            values = {**both, "cost": str(both["cost"]), "owner": owner, "token": batch.token}
            execute(connection, sql, **values)

    @property
    def _locked(self) -> str:
        """On SQLite every writer waits for the one before."""
        return "" if self._store.sqlite else " FOR UPDATE"

    def _is_time(self) -> bool:
        return self._clock.now() >= self._not_before

    def _complain(self, text: str, error: Exception) -> None:
        self._not_before = self._clock.now() + _RETRY_AFTER
        log.warning(text, error)


_SPENT: Final = "day, model, calls, prompt_tokens, completion_tokens, cost, unpriced, interrupted"


def _spent(row: Any) -> SpentRow:
    read = SpentRow._make(row)
    return read._replace(cost=Decimal(read.cost))


def _columns(amount: Amount) -> dict[str, Any]:
    return {"usd": str(amount.usd), "tokens": amount.tokens, "requests": amount.requests}


def _budget_of(settlement: _Settlement) -> tuple[str, str]:
    return settlement.name, settlement.receipt.period


def _sum(a: Decimal, b: Decimal) -> Decimal:
    """Exact, whatever the precision of this thread's arithmetic."""
    return Amount(usd=a).plus(Amount(usd=b)).usd


def _sane(tokens: int | None) -> int:
    """A server may say anything; nonsense counts as unknown."""
    return tokens if tokens is not None and 0 <= tokens < _ABSURD else 0


def _short(text: str) -> str:
    return (clean(text) or "")[:_NAME_LENGTH]
