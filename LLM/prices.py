"""What a call costs, in US dollars: the user's own prices, or those of the extra `[cost]`.

Sums of money are exact decimals. What is not known is `None`, never 0.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from decimal import Context, Decimal, DecimalException
from difflib import get_close_matches
from functools import reduce
from typing import Any, NamedTuple, TypeAlias

from LLM.clock import utc_now
from LLM.errors import LLMConfigError
from LLM.providers.hosts import COMPATIBLE, HOSTS, host_of_model
from LLM.types import UNSET, TokenUsage, Unset

Number: TypeAlias = Decimal | float | str

ZERO = Decimal(0)

# Exact whatever precision the program has set for decimals of its own: the dearest call imaginable
# (10^9 dollars) in the smallest unit that any price has (10^-12 dollars) needs 21 digits.
EXACT = Context(prec=100)

_BATCH = {"processing": "batch"}

# More models than any program calls; past it the known ones are looked up anew.
_REMEMBERED = 1024


def dollars(value: object, what: str) -> Decimal:
    """US dollars from a number or from text like `0.50`, `$0.50` or `0.50 USD`; not negative.

    Raises:
        LLMConfigError: it is none, or it is in another currency; the message begins with `what`.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, str, Decimal)):
        raise LLMConfigError(f"{what} must be US dollars, not {type(value).__name__}")
    text = str(value).strip()
    if isinstance(value, str):
        text = re.sub(
            r"^(us)?\$\s*|\s*(usd|us dollars?|dollars?|\$)$", "", text, flags=re.IGNORECASE
        )
    try:
        amount = Decimal(text)
    except DecimalException:
        hint = " (budgets and prices are in US dollars)" if _names_a_currency(text) else ""
        raise LLMConfigError(f"{what} must be US dollars like 0.50, not {value!r}{hint}") from None
    if not amount.is_finite() or amount < 0:
        raise LLMConfigError(f"{what} must be 0 or more US dollars, not {value!r}")
    return amount


def _names_a_currency(text: str) -> bool:
    return bool(re.search(r"\d", text) and re.search(r"[^\d\s.,+_-]", text))


def dollars_text(amount: Decimal | None) -> str:
    """An amount for people: `$0.50`, `$0.000123`; six decimals at most, `unknown` for `None`."""
    if amount is None:
        return "unknown"
    text = f"{EXACT.quantize(amount, Decimal('0.000001')):f}".rstrip("0")
    whole, _, part = text.partition(".")
    return f"${whole}.{part:0<2}"


def add(a: Decimal, b: Decimal) -> Decimal:
    """The exact sum."""
    return EXACT.add(a, b)


@dataclass(frozen=True, init=False)
class Price:
    """What a model costs, in US dollars per million tokens.

    Args:
        input: a number, or text like `"0.15"`, which is exact; 0 is free.
        output: likewise.
        cached: prompt tokens read from the provider's cache; left out or `None`, they cost as `input`.
        cache_write: prompt tokens written to it; left out or `None`, as `input`.
        reasoning: left out or `None`, as `output`.
        batch: fraction of all these that a call in a batch costs; 0.5 at OpenAI and Anthropic (2026-11).

    Raises:
        LLMConfigError: a price is missing, unknown, negative or no number.
    """

    input: Decimal
    output: Decimal
    cached: Decimal
    cache_write: Decimal
    reasoning: Decimal
    batch: Decimal

    def __init__(
        self,
        input: Number | Unset = UNSET,  # noqa: A002 - the field's own word
        output: Number | Unset = UNSET,
        *,
        cached: Number | None = None,
        cache_write: Number | None = None,
        reasoning: Number | None = None,
        batch: Number = 1,
        **unknown: object,
    ) -> None:
        if unknown or isinstance(input, Unset) or isinstance(output, Unset):
            raise LLMConfigError(_not_a_price(unknown))
        given = {
            "input": input,
            "output": output,
            "cached": input if cached is None else cached,
            "cache_write": input if cache_write is None else cache_write,
            "reasoning": output if reasoning is None else reasoning,
            "batch": batch,
        }
        for name, value in given.items():
            object.__setattr__(self, name, dollars(value, f"the price {name}"))
        object.__setattr__(self, "_alone", self._rates(None))  # made once: each call asks

    def cost(self, usage: TokenUsage, batch: bool = False) -> Decimal | None:
        """US dollars for these tokens; `None` if prompt or completion tokens are unknown."""
        rates: _Rates = self._rates(self.batch) if batch else self._alone  # type: ignore[attr-defined]  # no field: derived
        return rates.cost(usage)

    def worst_case(self, prompt_tokens: int, completion_tokens: int) -> Decimal:
        """The most that so many tokens can cost, in US dollars."""
        input_, output = max(self.input, self.cache_write), max(self.output, self.reasoning)
        total = EXACT.multiply(input_, Decimal(prompt_tokens))
        return EXACT.fma(output, Decimal(completion_tokens), total).scaleb(-6, EXACT)

    def _rates(self, factor: Decimal | None) -> _Rates:
        return _Rates(
            _Rate(self.input),
            _Rate(self.output),
            _Rate(self.cached),
            _Rate(self.cache_write),
            _Rate(self.reasoning),
            factor=factor,
        )


def _not_a_price(unknown: Mapping[str, object]) -> str:
    taken = "input, output, cached, cache_write, reasoning, batch"
    for name in sorted(unknown):
        near = get_close_matches(name, taken.split(", "), n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"it takes {taken}"
        return f"a Price knows no {name!r}: {hint}"
    return (
        f"a Price needs input and output, in US dollars per million tokens: Price(input=…, output=…); "
        f"it takes {taken}"
    )


class _Rate(NamedTuple):
    """Dollars per million tokens; `tiers` are (prompt tokens, price above them for all), ascending."""

    base: Decimal
    tiers: tuple[tuple[int, Decimal], ...] = ()

    def at(self, prompt: int) -> Decimal:
        price = self.base
        for start, dearer in self.tiers:
            if prompt > start:
                price = dearer
        return price

    def worst(self, prompt: int) -> Decimal:
        return max([self.base, *(price for start, price in self.tiers if prompt >= start)])


class _Rates(NamedTuple):
    """All prices of a model at one moment; `None` for a rate that nobody knows."""

    input: _Rate | None
    output: _Rate | None
    cached: _Rate | None
    cache_write: _Rate | None
    reasoning: _Rate | None
    request: Decimal = ZERO
    factor: Decimal | None = None

    def cost(self, usage: TokenUsage) -> Decimal | None:
        prompt, completion = usage.prompt_tokens, usage.completion_tokens
        if prompt is None or completion is None:
            return None
        cached, written = usage.cached_tokens or 0, usage.cache_write_tokens or 0
        reasoning = usage.reasoning_tokens or 0
        fresh, said = prompt - cached - written, completion - reasoning
        if min(fresh, cached, written, said, reasoning) < 0:
            return None  # counts that contradict each other say nothing of the price
        total = ZERO
        for tokens, rate in (
            (fresh, self.input),
            (cached, self.cached),
            (written, self.cache_write),
            (said, self.output),
            (reasoning, self.reasoning),
        ):
            if tokens:
                if rate is None:
                    return None
                total = EXACT.fma(rate.at(prompt) if rate.tiers else rate.base, tokens, total)
        if self.factor is not None:
            total = EXACT.multiply(total, self.factor)
        return add(total.scaleb(-6, EXACT), self.request)

    def worst_case(self, prompt: int, completion: int) -> Decimal | None:
        total = self.request
        sides = (
            (prompt, self.input, self.cache_write),
            (completion, self.output, self.reasoning),
        )
        for tokens, plain, special in sides:
            if tokens > 0:
                if plain is None:
                    return None
                price = max(rate.worst(prompt) for rate in (plain, special or plain))
                if self.factor is not None:
                    price = EXACT.multiply(price, self.factor)
                total = add(total, EXACT.multiply(price, Decimal(tokens)).scaleb(-6, EXACT))
        return total

    def dearer(self, other: _Rates) -> _Rates:
        """The dearer of each rate, over all its tiers."""
        return _Rates(
            _dearer(self.input, other.input),
            _dearer(self.output, other.output),
            _dearer(self.cached, other.cached),
            _dearer(self.cache_write, other.cache_write),
            _dearer(self.reasoning, other.reasoning),
            max(self.request, other.request),
        )


def _dearer(a: _Rate | None, b: _Rate | None) -> _Rate | None:
    if a is None or b is None:
        return None
    starts = sorted({start for start, _ in a.tiers + b.tiers})
    tiers = ((start, max(a.at(start + 1), b.at(start + 1))) for start in starts)
    return _Rate(max(a.base, b.base), tuple(tiers))


class Pricing:
    """What calls cost: the user's own prices first, then the data of the extra `[cost]`.

    Nothing is fetched from the network, and nothing raises for a model that nobody knows. Servers of
    one's own (`ollama`, `vllm`, `lmstudio`, an address) have no known price but the user's.

    Args:
        price: one `Price` for everything, or a mapping from `provider/model` or `model` to `Price`.

    Raises:
        LLMConfigError: `price` is something else.
    """

    def __init__(self, price: Price | Mapping[str, Price] | None = None) -> None:
        if isinstance(price, Mapping):
            wrong = [name for name, own in price.items() if not isinstance(own, Price)]
            if wrong:
                raise LLMConfigError(f"price[{wrong[0]!r}] must be a Price(input=…, output=…)")
            price = dict(price)
        elif price is not None and not isinstance(price, Price):
            raise LLMConfigError(
                "price must be a Price(input=…, output=…) or a mapping from model to Price,"
                f" not {type(price).__name__}"
            )
        self.price = price
        self._known: dict[tuple[str | None, str], _Model | None] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.price,)

    def cost(
        self,
        provider: str | None,
        model: str | None,
        usage: TokenUsage | None,
        *,
        batch: bool = False,
        at: datetime | None = None,
    ) -> Decimal | None:
        """US dollars, exactly.

        Args:
            provider: name of the host that answered, as in `response.provider`.
            model: as it was asked for.
            usage: what the server said; cached tokens that it does not mention cost as fresh ones.
            batch: the call was made through the provider's batch interface.
            at: when it was made; left out or `None` is now. A time without a zone is UTC.

        Returns:
            `None` if it is unknown: no usage, no prompt or completion tokens, no price. Cache writes
            are priced as those for five minutes; searches and other tools on the server are not counted.
        """
        if usage is None:
            return None
        own = self._own(provider, model)
        if own is not None:
            return own.cost(usage, batch)
        known = self._model(provider, model)
        rates = known.rates(_in_utc(at), batch) if known else None
        return rates.cost(usage) if rates else None

    def worst_case(
        self,
        provider: str | None,
        model: str | None,
        prompt_tokens: int | None,
        completion_tokens: int | None,
        *,
        batch: bool = False,
    ) -> Decimal | None:
        """The most that a call made now can cost, in US dollars; `None` if that is unknown.

        Nothing is read from a cache; all of the prompt may be written to one, and all of the completion
        may be reasoning, if that is dearer. Of tiers by length and of hours of the day, the dearest that
        may apply.

        Args:
            provider: name of the host.
            model: as it is asked for.
            prompt_tokens: of the prompt.
            completion_tokens: of the longest answer.
            batch: the call goes through the provider's batch interface; where its prices are unknown,
                those of a single call.
        """
        if prompt_tokens is None or completion_tokens is None:
            return None
        own = self._own(provider, model)
        if own is not None:
            most = own.worst_case(prompt_tokens, completion_tokens)
            return EXACT.multiply(most, own.batch) if batch else most
        known = self._model(provider, model)
        if known is None:
            return None
        rates = known.worst_rates(utc_now(), batch) or known.worst_rates(utc_now())
        return rates.worst_case(prompt_tokens, completion_tokens) if rates else None

    def _own(self, provider: str | None, model: str | None) -> Price | None:
        if not isinstance(self.price, dict):
            return self.price
        if model is None:
            return None
        return self.price.get(f"{provider}/{model}") or self.price.get(model)

    def _model(self, provider: str | None, model: str | None) -> _Model | None:
        if model is None:
            return None
        key = (provider, model)
        try:
            return self._known[key]
        except KeyError:
            info = _find(provider, model)
        known = None
        if info is not None:
            known = _Model(info, model, _batch_factor(provider))
        if len(self._known) >= _REMEMBERED:
            self._known.clear()
        self._known[key] = known
        return known


class _Model:
    """A model of the price data, and its prices of the last day (or minute) that was asked for."""

    def __init__(self, info: Any, name: str, batch_factor: Decimal | None) -> None:
        self._info = info
        self._batch_factor = batch_factor
        self._free = name.endswith(":free")  # how routers mark what costs nothing
        self._conditional = info.prices if isinstance(info.prices, list) else []
        constraints = [part.constraint for part in self._conditional if part.constraint]
        self._by_hour = any(hasattr(constraint, "start_time") for constraint in constraints)
        variants = (
            getattr(info, "price_variants", None) or []
        )  # newer than the oldest release we take
        self._batch = [variant for variant in variants if variant.when == _BATCH]
        self._last: tuple[Any, _Rates | None] = (None, None)

    def rates(self, at: datetime, batch: bool) -> _Rates | None:
        if batch:
            return self._batch_rates(at)
        # Prices of the data begin on a day or, for a few, at a minute of every day.
        when = at.replace(second=0, microsecond=0) if self._by_hour else at.date()
        last, rates = self._last
        if when != last:
            rates = self._compiled(self._info.get_prices(at))
            self._last = (when, rates)
        return rates

    def worst_rates(self, at: datetime, batch: bool = False) -> _Rates | None:
        """The dearest of now and of every hour of this day; of a batch, those of its moment."""
        now = self.rates(at, batch)
        if batch:
            return now
        hours = []
        for part in reversed(self._conditional):
            if part.constraint is None or not hasattr(part.constraint, "start_time"):
                if part.constraint is None or part.constraint.active(at):
                    break
            else:
                hours.append(self._compiled(part.prices))
        return reduce(_Rates.dearer, filter(None, hours), now) if now else None

    def _batch_rates(self, at: datetime) -> _Rates | None:
        if any(part.constraint is None or part.constraint.active(at) for part in self._batch):
            return self._compiled(self._info.get_prices(at, _BATCH))
        rates = self.rates(at, batch=False) if self._batch_factor else None
        return rates._replace(factor=self._batch_factor) if rates else None

    def _compiled(self, prices: Any) -> _Rates | None:
        known = {name: _rate(price) for name, price in vars(prices).items() if price is not None}
        if not known and not self._free:
            return None
        if not known:
            free = _Rate(ZERO)
            return _Rates(free, free, free, free, free)
        fresh, output = known.get("input_mtok"), known.get("output_mtok")
        request = known.get("requests_kcount")
        return _Rates(
            fresh,
            output,
            known.get("cache_read_mtok", fresh),
            known.get("cache_write_mtok", fresh),
            known.get("output_reasoning_mtok", output),
            request.base.scaleb(-3, EXACT) if request else ZERO,
        )


def _rate(price: Any) -> _Rate:
    if isinstance(price, Decimal):
        return _Rate(price)
    return _Rate(price.base, tuple((tier.start, tier.price) for tier in price.tiers))


def context_window(model: str, provider: str | None = None) -> int | None:
    """Tokens that a model takes, prompt and completion together, by the data of the extra `[cost]`.

    Args:
        model: its name; `provider/model` names the host too.
        provider: the host's name; left out or `None`, the model's maker, as far as its name tells. What
            the maker's own list lacks is taken from those of routers, if they agree.

    Returns:
        `None` if it is unknown: not in the data, a server of one's own, or no data (no extra).
    """
    info = _find(provider, model, or_its_maker=True)
    window = getattr(info, "context_window", None)
    if window is None and provider is None and host_of_model(model) is None:
        window = _window_among_routers(model)
    return window if isinstance(window, int) else None


def _window_among_routers(model: str) -> int | None:
    """What all say who list it as `maker/model`; `None` if they do not agree."""
    try:
        from genai_prices.data_snapshot import get_snapshot

        rows = get_snapshot().providers
    except ImportError:
        return None
    makers = {row.id for row in rows}
    wanted = model.lower()
    found = set()
    for info in (info for row in rows for info in row.models):
        maker, slash, name = info.id.lower().partition("/")
        if slash and maker in makers and wanted in (name, f"{maker}/{name}"):
            found.add(info.context_window)
    found.discard(None)
    return found.pop() if len(found) == 1 else None


def _in_utc(at: datetime | None) -> datetime:
    if at is None:
        return utc_now()
    if at.tzinfo is None:
        return at.replace(tzinfo=timezone.utc)
    return at if at.tzinfo is timezone.utc else at.astimezone(timezone.utc)


def _find(provider: str | None, model: str, *, or_its_maker: bool = False) -> Any:
    """The model in the price data of genai-prices; `None` if it is not there."""
    if provider is None:
        host = host_of_model(model)
        if host is not None:
            provider, model = host[0].name, host[1]
        elif not or_its_maker:
            return None
    if provider is not None and _is_private(provider):
        return None
    try:
        from genai_prices.data_snapshot import get_snapshot

        snapshot = get_snapshot()
        row = None
        if provider is not None:
            wanted = HOSTS[provider].price_name or provider if provider in HOSTS else provider
            # By its exact name: the package's own search takes `openai-compatible` for OpenAI.
            row = next((row for row in snapshot.providers if row.id == wanted), None)
            if row is None:
                return None
        return snapshot.find_provider_model(model.removeprefix("models/"), row, None, None)[1]
    except (ImportError, LookupError):
        return None


def _batch_factor(provider: str | None) -> Decimal | None:
    host = HOSTS.get(provider or "")
    return Decimal(host.batch_price) if host is not None and host.batch_price else None


def _is_private(provider: str) -> bool:
    """Whether the name says only where a server is, not who runs it."""
    host = HOSTS.get(provider)
    return provider == COMPATIBLE.name or (
        host is not None and not host.base_url.startswith("https:")
    )
