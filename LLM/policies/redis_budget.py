"""The book of a budget in Redis: one for many processes and machines."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from decimal import ROUND_CEILING, Decimal
from typing import Any

from LLM.clock import Clock
from LLM.errors import LLMConnectionError
from LLM.forks import renew_after_fork
from LLM.policies.redis_script import RedisScript, Words
from LLM.policies.spending import Amount, Receipt, Standing
from LLM.prices import EXACT, ZERO

log = logging.getLogger("LLM")

# Seconds before a Redis that did not answer is told again what was settled, and one that hangs is asked
# anything, so that not each call waits for it in vain.
RETRY_AFTER = 5.0

# Seconds that the budget of a day or month stays there after it was last used: somebody may ask.
KEPT = 366 * 24 * 3600

# How many more calls of the same size may come between the last look and a reservation, largest
# first: if so many would fit, a reservation needs no look of its own.
_SLACKS = (64, 8, 1, 0)

# Budgets whose standing is remembered.
_REMEMBERED = 1024

_FEMTO = Decimal("1e-15")
_WORDS = Words("budget", "store")


class RedisBook:
    """What is reserved and spent, for all that name the same server, budget and period.

    Exact, to 10⁻¹⁵ dollars, to which each amount is rounded up. A reservation takes one round trip, while the
    limit is not near, and settling takes one. What nobody settles for an hour is spent and uncertain.

    A Redis that hangs holds a call for the two seconds of `redis_script.TIMEOUT`, whatever its deadline;
    for `RETRY_AFTER` all further ones fail at once.

    It lasts as long as that Redis keeps its data: for money, let it write to disk (`appendonly yes`) and
    throw nothing out (`maxmemory-policy noeviction`).

    Args:
        url: `redis://`, `rediss://` or `unix://`, as redis-py takes it.
        clock: paces what is tried again.

    Raises:
        LLMConfigError: the extra is missing, or the address is none.
    """

    def __init__(self, url: str, *, clock: Clock | None = None) -> None:
        self._script = RedisScript(url, "budget.lua", _WORDS)
        self._clock = clock or Clock()
        self._known: dict[tuple[str, str], Standing] = {}
        self.after_fork()
        renew_after_fork(self)

    def after_fork(self) -> None:
        # What was left to settle is the parent's to settle.
        self._unsettled: deque[tuple[str, Receipt, Amount, Decimal]] = deque()
        self._settling = threading.Lock()
        self._not_before = float("-inf")
        self._complained = False
        # It hung just now: until when it is not asked, and what it said, or did not.
        self._hung: tuple[float, LLMConnectionError] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return _book, (self._script, self._clock)

    def __repr__(self) -> str:
        return f"RedisBook({self._script.address!r})"

    def reserve(
        self, name: str, period: str, amount: Amount, check: Callable[[Standing], None]
    ) -> Receipt:
        """Reserve, unless `check` raises for what stands now.

        Args:
            check: must let pass whatever is less than something that it lets pass: it is also asked whether
                more than what stands would fit, and the server then compares.

        Raises:
            LLMConnectionError: Redis does not answer.
            LLMConfigError: it refuses us.
        """
        self._settle_rest()
        self._refuse_hung()
        receipt = Receipt(self._clock.new_id(), period, amount)
        try:
            self._reserve(name, receipt, check)
        except LLMConnectionError:
            # Only the answer may be lost, and the reservation made: it is given back when Redis is there.
            self._unsettled.append((name, receipt, Amount(), ZERO))
            raise
        return receipt

    def settle(self, name: str, receipt: Receipt, truth: Amount, uncertain: Decimal) -> None:
        """Put the truth in the place of a reservation. Never raises: it is tried again if it fails."""
        settlement = (name, receipt, truth, uncertain)
        if self._clock.now() < self._not_before or not self._settle(*settlement):
            self._unsettled.append(settlement)
        self._settle_rest()

    def standing(self, name: str, period: str) -> Standing:
        """What stands of a budget.

        Raises:
            LLMConnectionError: Redis does not answer.
            LLMConfigError: it refuses us.
        """
        self._settle_rest()
        return self._look(name, period)

    def _look(self, name: str, period: str) -> Standing:
        self._refuse_hung()
        return self._run("look", name, period)[1]

    def _refuse_hung(self) -> None:
        """Raise at once what would take seconds to find out again."""
        hung = self._hung
        if hung is not None and self._clock.now() < hung[0]:
            raise LLMConnectionError(str(hung[1]))

    def _reserve(self, name: str, receipt: Receipt, check: Callable[[Standing], None]) -> None:
        period, amount = receipt.period, receipt.amount
        standing = self._known.get((name, period))
        while True:
            if standing is None or (most := _most(standing, amount, check)) is None:
                # Never refused by what stood a while ago.
                standing = self._look(name, period)
                most = _most(standing, amount, check)
                if most is None:
                    check(standing)
                    continue  # it has room, whatever it said a moment ago
            done, standing = self._run(
                "reserve", name, period, receipt.id, _text(amount), _text(most)
            )
            if done:
                return

    def _run(
        self, command: str, name: str, period: str, *arguments: object
    ) -> tuple[bool, Standing]:
        keys = [f"LLM:budget:{name}:{period}:{part}" for part in ("sums", "parts", "open", "given")]
        try:
            done, spent, held, doubt = self._script.run(
                keys, command, KEPT if period else 0, *arguments
            )
        except LLMConnectionError as error:
            if self._script.hung(error):
                self._not_before = self._clock.now() + RETRY_AFTER
                self._hung = self._not_before, error
            raise
        self._hung = None
        standing = Standing(_amount(spent), _amount(held), _amount(doubt).usd)
        if len(self._known) >= _REMEMBERED:
            self._known = {}
        self._known[name, period] = standing
        return bool(done), standing

    def _settle(self, name: str, receipt: Receipt, truth: Amount, uncertain: Decimal) -> bool:
        doubt = _text(Amount(usd=uncertain))
        try:
            self._run("settle", name, receipt.period, receipt.id, _text(truth), doubt)
        except Exception as error:  # noqa: BLE001 - the call is done; the worst case stays reserved
            self._not_before = self._clock.now() + RETRY_AFTER
            if not self._complained:
                self._complained = True
                log.warning("a budget keeps the worst case of a call for now: %s", error)
            return False
        self._complained = False
        return True

    def _settle_rest(self) -> None:
        """Settle what could not be settled; one thread does it for all."""
        while (
            self._unsettled
            and self._clock.now() >= self._not_before
            and self._settling.acquire(blocking=False)
        ):
            try:
                while self._unsettled and self._settle(*self._unsettled[0]):
                    self._unsettled.popleft()
            finally:
                self._settling.release()


def _book(script: RedisScript, clock: Clock) -> RedisBook:
    return RedisBook(script.url, clock=clock)


def _most(standing: Standing, amount: Amount, check: Callable[[Standing], None]) -> Amount | None:
    """The most that may stand before `amount` is added, as far as it is worth asking.

    `None`: less than stands.
    """
    for slack in _SLACKS:
        more = Amount(
            EXACT.multiply(amount.usd, slack), amount.tokens * slack, amount.requests * slack
        )
        reserved = standing.reserved.plus(more)
        try:
            check(standing._replace(reserved=reserved))
        except Exception:  # noqa: BLE001, S112 - what it raises for what does not stand is nobody's
            continue
        return standing.spent.plus(reserved)
    return None


def _text(amount: Amount) -> str:
    """As budget.lua reads it; never less than it is."""
    femto = int(EXACT.divide(amount.usd, _FEMTO).to_integral_value(ROUND_CEILING))
    dollars, rest = divmod(femto, 10**15)
    return f"{dollars} {rest} {amount.tokens} {amount.requests}"


def _amount(text: str) -> Amount:
    dollars, femto, tokens, requests = map(int, text.split())
    usd = Decimal(f"{dollars}.{femto:015}".rstrip("0")) if femto else Decimal(dollars)
    return Amount(usd or ZERO, tokens, requests)
