"""What was spent, kept in a SQLite file: by day and model, and what stands of each budget."""

from __future__ import annotations

import logging
import os
import re
import threading
from collections import deque
from collections.abc import Callable
from datetime import date, datetime, timedelta, timezone
from decimal import Decimal
from typing import Any, NamedTuple, TypeAlias

from LLM.clock import Clock
from LLM.errors import LLMConfigError
from LLM.forks import renew_after_fork
from LLM.policies.sqlite import Connection, Database
from LLM.prices import ZERO, add
from LLM.types import TokenUsage

log = logging.getLogger("LLM")

# Seconds after which a reservation that nobody settled counts as spent, and as uncertain: its process
# is gone, or its call takes longer than any we know. Settled later, the truth still counts.
ABANDONED_AFTER = 3600

# Seconds before a file that could not be written is tried again, so that no call waits for it in vain.
RETRY_AFTER = 30

# "LLMS"
_APPLICATION_ID = 0x4C4C4D53

# Money is text, because it is exact.
_SCHEMA = """
CREATE TABLE ledger (
    day TEXT NOT NULL, budget TEXT NOT NULL, provider TEXT NOT NULL, model TEXT NOT NULL,
    calls INTEGER NOT NULL, hits INTEGER NOT NULL,
    prompt INTEGER NOT NULL, completion INTEGER NOT NULL, cached INTEGER NOT NULL,
    usd TEXT NOT NULL, unpriced INTEGER NOT NULL, interrupted INTEGER NOT NULL,
    PRIMARY KEY (day, budget, provider, model)
) WITHOUT ROWID;
CREATE TABLE budgets (
    name TEXT NOT NULL, period TEXT NOT NULL,
    usd TEXT NOT NULL, tokens INTEGER NOT NULL, requests INTEGER NOT NULL, uncertain TEXT NOT NULL,
    PRIMARY KEY (name, period)
) WITHOUT ROWID;
CREATE TABLE reservations (
    id TEXT PRIMARY KEY, name TEXT NOT NULL, period TEXT NOT NULL, made REAL NOT NULL,
    usd TEXT NOT NULL, tokens INTEGER NOT NULL, requests INTEGER NOT NULL
) WITHOUT ROWID;
CREATE INDEX reservations_of_budget ON reservations (name, period)
"""


class Amount(NamedTuple):
    """What a budget counts: US dollars, tokens and requests."""

    usd: Decimal = ZERO
    tokens: int = 0
    requests: int = 0

    def plus(self, other: Amount) -> Amount:
        """The sum, part by part, exact."""
        return Amount(
            add(self.usd, other.usd), self.tokens + other.tokens, self.requests + other.requests
        )

    def minus(self, other: Amount) -> Amount:
        """The difference, part by part at least 0."""
        return Amount(
            max(ZERO, add(self.usd, other.usd.copy_negate())),
            max(0, self.tokens - other.tokens),
            max(0, self.requests - other.requests),
        )


class Standing(NamedTuple):
    """What stands of a budget in a period; `uncertain` dollars are part of `spent`."""

    spent: Amount = Amount()
    reserved: Amount = Amount()
    uncertain: Decimal = ZERO


class Receipt(NamedTuple):
    """A reservation that was made."""

    id: str
    period: str
    amount: Amount


class Spent(NamedTuple):
    """A row of the ledger: what a model took on a day.

    Attributes:
        day: the day in UTC, `2026-11-21`.
        budget: what the calls were booked on; `""`: nothing in particular.
        provider: name of the host; `""`: unknown.
        model: as it was asked for; `""`: unknown.
        calls: all of them, those answered from the cache included.
        cache_hits: answered from the cache: no tokens, no money.
        prompt_tokens: as far as they are known.
        completion_tokens: likewise.
        cached_tokens: of the prompt, read from the provider's cache.
        known_cost: US dollars, as far as they are known.
        unpriced: calls whose cost is unknown.
        interrupted: calls whose end did not come; what is known of them is counted.
    """

    day: str
    budget: str
    provider: str
    model: str
    calls: int
    cache_hits: int
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    known_cost: Decimal
    unpriced: int
    interrupted: int

    @property
    def cost(self) -> Decimal | None:
        """US dollars; `None` if it is unknown of any call: `known_cost` is the least it can be then."""
        return None if self.unpriced or self.interrupted else self.known_cost


class BudgetRow(NamedTuple):
    """What stands of a stored budget; `period` is a day, a month, or `""` for all time."""

    name: str
    period: str
    standing: Standing


Key: TypeAlias = tuple[str, str, str, str]
_Settlement: TypeAlias = tuple[str, Receipt, Amount, Decimal]


class Spending:
    """The file that remembers what was spent, over runs and among processes.

    Args:
        url: `sqlite:///spend.db`, `sqlite:////absolute/path.db`, or a path that ends in `.db`, `.sqlite` or
            `.sqlite3`.
        clock: tells the day.

    Raises:
        LLMConfigError: the URL is no such one. The file itself is opened when first used.
    """

    def __init__(self, url: str, *, clock: Clock | None = None) -> None:
        self.url = store_url(url)
        self._clock = clock or Clock()
        self._database = Database(
            self.url, kind="usage store", application_id=_APPLICATION_ID, schema=_SCHEMA
        )
        self._complained = False
        self._not_before = float("-inf")
        self.after_fork()
        renew_after_fork(self)

    def after_fork(self) -> None:
        # What was left to write is the parent's to write.
        self._unwritten: dict[Key, Spent] = {}
        self._unsettled: deque[_Settlement] = deque()
        self._lock = threading.Lock()
        self._writing = threading.Lock()
        self._settling = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return _spending, (self.url, self._clock)

    def __repr__(self) -> str:
        return f"Spending({self.url!r})"

    # The ledger

    def record(
        self,
        provider: str | None,
        model: str | None,
        usage: TokenUsage | None,
        cost: Decimal | None = None,
        *,
        budget: str = "",
        complete: bool = True,
        cached: bool = False,
    ) -> None:
        """Write down a call, some 0.1 ms. Never raises: what cannot be written is logged and tried later.

        Args:
            provider: name of the host that answered.
            model: as it was asked for.
            usage: as far as it is known.
            cost: US dollars; `None`: unknown.
            budget: a name to book it on.
            complete: whether the answer came to its end.
            cached: answered from the cache: free, its tokens are not counted.
        """
        key = (self._clock.utc().date().isoformat(), budget, provider or "", model or "")
        tokens = usage if usage is not None and not cached else TokenUsage()
        row = Spent(
            *key,
            calls=1,
            cache_hits=int(cached),
            prompt_tokens=tokens.prompt_tokens or 0,
            completion_tokens=tokens.completion_tokens or 0,
            cached_tokens=tokens.cached_tokens or 0,
            known_cost=ZERO if cached or cost is None else cost,
            unpriced=int(cost is None and not cached),
            interrupted=int(not complete and not cached),
        )
        with self._lock:
            before = self._unwritten.get(key)
            self._unwritten[key] = row if before is None else _joined(before, row)
        if self._clock.now() >= self._not_before:
            self._write_if_nobody_does()

    def by_day_and_model(self, since: date | str | None = None) -> list[Spent]:
        """What was spent, the latest day first.

        Args:
            since: the first day (UTC), as a date or as `2026-11-21`; or `7d`, the last seven days, today
                being one of them; left out or `None`: all.

        Raises:
            LLMConfigError: `since` is none of these.
            DatabaseError: the file cannot be read.
        """
        today = self._clock.utc().date()
        first = "" if since is None else first_day(since, today).isoformat()
        self.flush()
        rows = self._database.run(
            lambda connection: connection.execute(
                "SELECT * FROM ledger WHERE day >= ? ORDER BY day DESC, budget, provider, model",
                (first,),
            ).fetchall(),
            write=False,
        )
        return [_spent(row) for row in rows]

    def budgets(self) -> list[BudgetRow]:
        """What stands of every budget in the file, the latest period first.

        Raises:
            DatabaseError: the file cannot be read.
        """
        self._settle_all()
        query = "SELECT name, period FROM budgets UNION SELECT name, period FROM reservations"

        def read(connection: Connection) -> list[BudgetRow]:
            found = connection.execute(f"{query} ORDER BY period DESC, name").fetchall()
            return [
                BudgetRow(name, period, self._standing(connection, name, period))
                for name, period in found
            ]

        return self._database.run(read, write=False)

    def flush(self) -> bool:
        """Try again to write what could not be written; whether all is written now."""
        with self._writing:
            self._write()
        self._settle_all()
        return not self._unwritten and not self._unsettled

    def close(self) -> None:
        """Write what is left and close the file; it is opened again when needed."""
        self.flush()
        self._database.close()

    def _write_if_nobody_does(self) -> None:
        # One thread writes for all; what was added while it let go is seen by asking once more.
        while self._unwritten and self._writing.acquire(blocking=False):
            try:
                if not self._write():
                    return
            finally:
                self._writing.release()

    def _write(self) -> bool:
        with self._lock:
            rows, self._unwritten = self._unwritten, {}
        if not rows:
            return True
        try:
            self._database.run(lambda connection: _add_rows(connection, rows))
        except Exception as error:  # noqa: BLE001 - whatever it is, no call is spoiled
            with self._lock:
                for key, row in self._unwritten.items():
                    rows[key] = _joined(rows[key], row) if key in rows else row
                self._unwritten = rows
            self._complain(f"what was spent is not written down yet: {error}")
            return False
        self._complained, self._not_before = False, float("-inf")
        return True

    def _complain(self, text: str) -> None:
        """Once for each trouble."""
        self._not_before = self._clock.now() + RETRY_AFTER
        if not self._complained:
            self._complained = True
            log.warning(text)

    # Budgets

    def reserve(
        self, name: str, period: str, amount: Amount, check: Callable[[Standing], None]
    ) -> Receipt:
        """Reserve, in one transaction, unless `check` raises.

        Raises:
            DatabaseError: the file cannot be used; nothing is reserved.
        """
        self._settle_all()
        now = self._clock.utc().timestamp()
        receipt = Receipt(self._clock.new_id(), period, amount)

        def work(connection: Connection) -> None:
            _give_up_old(connection, name, period, now - ABANDONED_AFTER)
            check(self._standing(connection, name, period))
            connection.execute(
                "INSERT INTO reservations VALUES (?, ?, ?, ?, ?, ?, ?)",
                (receipt.id, name, period, now, str(amount.usd), amount.tokens, amount.requests),
            )

        self._database.run(work)
        return receipt

    def settle(self, name: str, receipt: Receipt, truth: Amount, uncertain: Decimal) -> None:
        """Put the truth in the place of a reservation. Never raises: it is tried again if it fails."""
        self._unsettled.append((name, receipt, truth, uncertain))
        self._settle_all()

    def standing(self, name: str, period: str) -> Standing:
        """What stands of a budget.

        Raises:
            DatabaseError: the file cannot be read.
        """
        self._settle_all()
        return self._database.run(
            lambda connection: self._standing(connection, name, period), write=False
        )

    def _standing(self, connection: Connection, name: str, period: str) -> Standing:
        spent, uncertain = _spent_of_budget(connection, name, period)
        reserved = Amount()
        old = self._clock.utc().timestamp() - ABANDONED_AFTER
        for made, usd, tokens, requests in connection.execute(
            "SELECT made, usd, tokens, requests FROM reservations WHERE name = ? AND period = ?",
            (name, period),
        ).fetchall():
            amount = Amount(Decimal(usd), tokens, requests)
            if made > old:
                reserved = reserved.plus(amount)
            else:
                spent, uncertain = spent.plus(amount), add(uncertain, amount.usd)
        return Standing(spent, reserved, uncertain)

    def _settle_all(self) -> None:
        if not self._unsettled:
            return
        with self._settling:
            settlements = list(self._unsettled)

            def work(connection: Connection) -> None:
                for settlement in settlements:
                    # One that cannot be written must not keep those behind it from being written.
                    try:
                        _settle(connection, *settlement)
                    except (OverflowError, TypeError, ValueError) as error:
                        self._complain(f"a budget keeps the worst case of a call: {error}")

            try:
                self._database.run(work)
            except Exception as error:  # noqa: BLE001 - the call is done; the worst case stays reserved
                self._complain(f"a budget keeps the worst case of a call for now: {error}")
            else:
                self._complained = False
                for _ in settlements:
                    self._unsettled.popleft()


def store_url(where: str) -> str:
    """The URL of a store that may be given as a path."""
    if "://" not in where and where.endswith((".db", ".sqlite", ".sqlite3")):
        return f"sqlite:///{os.path.expanduser(where)}"  # noqa: PTH111 - pathlib is slow to import
    return where


def first_day(since: date | str, today: date) -> date:
    """The day that `2026-11-01` names, or with which the last `7d` begin, `today` being one of them.

    Raises:
        LLMConfigError: it is neither.
    """
    if isinstance(since, datetime):
        return since.astimezone(timezone.utc).date() if since.tzinfo else since.date()
    if isinstance(since, date):
        return since
    text = since if isinstance(since, str) else ""
    days = re.fullmatch(r"(\d{1,5})d", text, re.ASCII)
    try:
        if days and int(days[1]):
            return today - timedelta(days=int(days[1]) - 1)
        if re.fullmatch(r"\d{4}-\d\d-\d\d", text, re.ASCII):
            return date.fromisoformat(text)
    except (ValueError, OverflowError):  # 2026-02-30; before the year 1
        pass
    raise LLMConfigError(f"{since!r} is neither a day like 2026-11-01 nor days like 7d")


def _spending(url: str, clock: Clock) -> Spending:
    return Spending(url, clock=clock)


def _joined(a: Spent, b: Spent) -> Spent:
    """Two rows of one key as one."""
    return Spent(
        *a[:4],
        calls=a.calls + b.calls,
        cache_hits=a.cache_hits + b.cache_hits,
        prompt_tokens=a.prompt_tokens + b.prompt_tokens,
        completion_tokens=a.completion_tokens + b.completion_tokens,
        cached_tokens=a.cached_tokens + b.cached_tokens,
        known_cost=add(a.known_cost, b.known_cost),
        unpriced=a.unpriced + b.unpriced,
        interrupted=a.interrupted + b.interrupted,
    )


def _spent(row: Any) -> Spent:
    return Spent._make([*row[:9], Decimal(row[9]), *row[10:]])


def _add_rows(connection: Connection, rows: dict[Key, Spent]) -> None:
    for key, row in rows.items():
        found = connection.execute(
            "SELECT * FROM ledger WHERE day = ? AND budget = ? AND provider = ? AND model = ?", key
        ).fetchone()
        whole = row if found is None else _joined(_spent(found), row)
        connection.execute(
            "REPLACE INTO ledger VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            [str(part) if isinstance(part, Decimal) else part for part in whole],
        )


def _spent_of_budget(connection: Connection, name: str, period: str) -> tuple[Amount, Decimal]:
    found = connection.execute(
        "SELECT usd, tokens, requests, uncertain FROM budgets WHERE name = ? AND period = ?",
        (name, period),
    ).fetchone()
    if found is None:
        return Amount(), ZERO
    usd, tokens, requests, uncertain = found
    return Amount(Decimal(usd), tokens, requests), Decimal(uncertain)


def _keep(
    connection: Connection, name: str, period: str, spent: Amount, uncertain: Decimal
) -> None:
    connection.execute(
        "REPLACE INTO budgets VALUES (?, ?, ?, ?, ?, ?)",
        (name, period, str(spent.usd), spent.tokens, spent.requests, str(uncertain)),
    )


def _settle(
    connection: Connection, name: str, receipt: Receipt, truth: Amount, uncertain: Decimal
) -> None:
    spent, doubt = _spent_of_budget(connection, name, receipt.period)
    gone = connection.execute("DELETE FROM reservations WHERE id = ?", (receipt.id,)).rowcount == 0
    if gone:  # given up meanwhile: the worst case is part of what was spent
        spent = spent.minus(receipt.amount)
        doubt = max(ZERO, add(doubt, receipt.amount.usd.copy_negate()))
    _keep(connection, name, receipt.period, spent.plus(truth), add(doubt, uncertain))


def _give_up_old(connection: Connection, name: str, period: str, before: float) -> None:
    """Count reservations that nobody settled as spent, so that a file does not fill with them."""
    which = "FROM reservations WHERE name = ? AND period = ? AND made <= ?"
    old = connection.execute(
        f"SELECT usd, tokens, requests {which}",
        (name, period, before),
    ).fetchall()
    if old:
        connection.execute(f"DELETE {which}", (name, period, before))
        spent, doubt = _spent_of_budget(connection, name, period)
        for usd, tokens, requests in old:
            amount = Amount(Decimal(usd), tokens, requests)
            spent, doubt = spent.plus(amount), add(doubt, amount.usd)
        _keep(connection, name, period, spent, doubt)
