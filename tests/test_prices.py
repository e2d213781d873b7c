"""What a call costs: exact, by the user's prices or by the data, and `None` where nobody knows."""

import decimal
import pickle
import re
import subprocess
import sys
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from LLM.errors import LLMConfigError
from LLM.prices import Price, Pricing, add, context_window, dollars, dollars_text
from LLM.providers.hosts import HOSTS
from LLM.types import TokenUsage
from tests.fakes import work_of

genai_prices = pytest.importorskip("genai_prices", reason="the extra `cost` is not installed")
get_snapshot = genai_prices.data_snapshot.get_snapshot

NOW = datetime(2026, 11, 21, 12, tzinfo=timezone.utc)
IDS = {"gemini": "google", "xai": "x-ai"}
SERVED = [name for name, host in HOSTS.items() if host.base_url.startswith("https:")]


def usage(prompt=1000, completion=200, **parts):
    return TokenUsage(prompt_tokens=prompt, completion_tokens=completion, **parts)


def models(provider):
    wanted = IDS.get(provider, provider)
    row = next(row for row in get_snapshot().providers if row.id == wanted)
    return [model for model in row.models if row.find_model(model.id) is model]


def theirs(provider, model, tokens, at=NOW, context=None):
    return genai_prices.calc_price(
        genai_prices.Usage(
            input_tokens=tokens.prompt_tokens,
            output_tokens=tokens.completion_tokens,
            cache_read_tokens=tokens.cached_tokens,
            cache_write_tokens=tokens.cache_write_tokens,
            output_reasoning_tokens=tokens.reasoning_tokens,
        ),
        model,
        provider_id=IDS.get(provider, provider),
        genai_request_timestamp=at,
        price_context=context,
    ).total_price


@pytest.mark.parametrize("provider", SERVED)
@pytest.mark.parametrize(
    "tokens",
    [
        usage(),
        usage(1_000_000, 7, cached_tokens=300_001, cache_write_tokens=3, reasoning_tokens=5),
    ],
)
def test_every_model_of_the_data_costs_what_the_data_says(provider, tokens):
    pricing, compared = Pricing(), 0
    for at in (NOW, NOW.replace(hour=2), NOW - timedelta(days=700)):
        for model in models(provider):
            found = pricing.cost(provider, model.id, tokens, at=at)
            if found is None:
                prices = vars(model.get_prices(at))
                assert not (prices.get("input_mtok") and prices.get("output_mtok")), model.id
            else:
                assert found == theirs(provider, model.id, tokens, at), model.id
                compared += 1
    assert compared > 3


@pytest.mark.parametrize("provider", ["openai", "anthropic", "mistral", "gemini", "groq", "xai"])
def test_batch_prices_are_those_of_the_data(provider):
    compared = 0
    tokens = usage(cached_tokens=10)
    for model in models(provider):
        if any(variant.when == {"processing": "batch"} for variant in model.price_variants or []):
            found = Pricing().cost(provider, model.id, tokens, batch=True, at=NOW)
            batch = theirs(provider, model.id, tokens, NOW, {"processing": "batch"})
            if found is not None:
                assert found == batch, model.id
                compared += 1
    assert compared


def test_a_batch_without_data_costs_half_where_that_is_documented_and_is_unknown_elsewhere():
    long_ago = datetime(2026, 1, 1, tzinfo=timezone.utc)  # before the data knows batch prices
    pricing = Pricing()
    for provider, model in (("openai", "gpt-4o"), ("anthropic", "claude-sonnet-4-5")):
        whole = pricing.cost(provider, model, usage(), at=long_ago)
        assert pricing.cost(provider, model, usage(), at=long_ago, batch=True) == whole / 2
    assert pricing.cost("deepseek", "deepseek-chat", usage(), batch=True) is None
    assert pricing.cost("openai", "whisper-1", usage(), batch=True) is None


@pytest.mark.parametrize(
    "provider, model",
    [
        ("openai", "gpt-4o-2024-08-06"),
        (None, "openai/gpt-4o"),
        ("openrouter", "openai/gpt-4o"),
        ("anthropic", "claude-sonnet-4-5-20250929"),
        ("gemini", "models/gemini-2.5-flash"),
        ("xai", "grok-4"),
        ("azure", "gpt-4o"),
    ],
)
def test_names_as_servers_and_users_write_them_are_understood(provider, model):
    assert Pricing().cost(provider, model, usage()) > 0


@pytest.mark.parametrize(
    "provider, model",
    [
        ("openai", "no-such-model"),
        ("nobody", "gpt-4o"),
        (None, "gpt-4o"),  # who served it is unknown
        (None, None),
        ("openai", None),
        ("ollama", "llama3"),
        ("vllm", "gpt-4o"),
        ("lmstudio", "gpt-4o"),
        ("openai-compatible", "gpt-4o"),
        ("openai", "whisper-1"),  # by the hour, not by the token
        ("mistral", "mistral-ocr-2503"),
    ],
)
def test_an_unknown_price_is_none_and_neither_0_nor_an_error(provider, model):
    assert Pricing().cost(provider, model, usage()) is None
    assert Pricing().worst_case(provider, model, 10, 10) is None


@pytest.mark.parametrize(
    "tokens",
    [
        None,
        TokenUsage(),
        TokenUsage(prompt_tokens=1),
        TokenUsage(completion_tokens=1),
        usage(-1, 0),
        usage(1, -1),
        usage(10, 1, cached_tokens=11),
        usage(10, 1, cached_tokens=6, cache_write_tokens=6),
        usage(10, 1, reasoning_tokens=2),
    ],
)
def test_usage_that_is_unknown_or_contradicts_itself_has_no_cost(tokens):
    for pricing in (Pricing(), Pricing(Price(1, 1))):
        assert pricing.cost("openai", "gpt-4o", tokens) is None


def test_what_a_router_marks_free_costs_nothing():
    free = "meta-llama/llama-3.3-70b-instruct:free"
    assert Pricing().cost("openrouter", free, usage()) == 0
    assert Pricing().worst_case("openrouter", free, 9, 9) == 0


def test_a_price_of_ones_own_is_exact():
    price = Price("2.50", 10.1, cached="1.25", cache_write=3, reasoning=Decimal(20))
    tokens = usage(1000, 200, cached_tokens=300, cache_write_tokens=100, reasoning_tokens=50)
    expected = Decimal("2.5") * 600 + Decimal("1.25") * 300 + 3 * 100
    expected += Decimal("10.1") * 150 + 20 * 50
    assert price.cost(tokens) == expected / 1_000_000
    assert price.cost(usage(0, 0)) == 0
    assert price.worst_case(1000, 200) == Decimal(3 * 1000 + 20 * 200) / 1_000_000


def test_parts_without_a_price_cost_as_the_whole():
    tokens = usage(1000, 200, cached_tokens=300, cache_write_tokens=100, reasoning_tokens=50)
    assert Price(1, 2).cost(tokens) == Price(1, 2).cost(usage()) == Decimal("0.0014")
    assert Price(1, 2, cached=0).cost(tokens) == Decimal("0.0011")


def test_a_batch_of_ones_own_price_costs_the_fraction_that_was_said():
    assert Price(1, 1).cost(usage(), batch=True) == Decimal("0.0012")
    assert Pricing(Price(1, 1, batch="0.5")).cost("x", "y", usage(), batch=True) == Decimal(
        "0.0006"
    )


def test_ones_own_prices_go_before_the_data():
    one = Pricing(Price(1, 1))
    assert one.cost("ollama", "llama3", usage()) == one.cost("openai", "gpt-4o", usage())
    assert one.worst_case(None, "m", 1_000_000, 0) == 1
    some = Pricing({"openai/gpt-4o": Price(1, 1), "local": Price(0, 0)})
    assert some.cost("openai", "gpt-4o", usage()) == Decimal("0.0012")
    assert some.cost("openrouter", "openai/gpt-4o", usage()) == Decimal("0.0012")
    assert some.cost("vllm", "local", usage()) == 0
    assert some.cost("vllm", "other", usage()) is None
    assert some.cost("openai", "gpt-4o-mini", usage()) == theirs("openai", "gpt-4o-mini", usage())


@pytest.mark.parametrize("wrong", ["-1", "nan", "inf", -0.1, float("nan"), "€1", True, [], "x"])
def test_a_price_that_is_none_is_refused(wrong):
    for arguments in ({"input": wrong}, {"output": wrong}, {"cached": wrong}, {"batch": wrong}):
        with pytest.raises(LLMConfigError, match="US dollars"):
            Price(**{"input": 1, "output": 1, **arguments})


@pytest.mark.parametrize(
    "values, settings, message",
    [
        ((), {"input": 1, "output": 2, "cache": 3}, "knows no 'cache': did you mean 'cached'?"),
        ((1, 2), {"cached_input": 1}, "knows no 'cached_input': "),
        ((1, 2), {"xyz": 1}, "knows no 'xyz': it takes input, output, cached, cache_write, reason"),
        ((1,), {}, "needs input and output, in US dollars per million tokens: Price(input=…, out"),
        ((), {"output": 1}, "needs input and output"),
        ((), {}, "needs input and output"),
    ],
)
def test_a_price_says_what_it_takes(values, settings, message):
    with pytest.raises(LLMConfigError, match=f"^a Price {re.escape(message)}"):
        Price(*values, **settings)


@pytest.mark.parametrize("wrong", [1, "1", {"gpt-4o": 1}, {"gpt-4o": (1, 2)}])
def test_pricing_wants_prices(wrong):
    with pytest.raises(LLMConfigError, match=r"Price\(input=…, output=…\)"):
        Pricing(wrong)


@pytest.mark.parametrize(
    "text, amount",
    [
        ("0.50", "0.5"),
        (" $1 ", "1"),
        ("US$2", "2"),
        ("3 USD", "3"),
        (0.1, "0.1"),
        ("1_000", "1000"),
    ],
)
def test_dollars_are_read_as_people_write_them(text, amount):
    assert dollars(text, "usd") == Decimal(amount)


@pytest.mark.parametrize("text", ["5 EUR", "€5", "5€", "£1", "10 ct"])
def test_another_currency_is_refused_by_name(text):
    with pytest.raises(LLMConfigError, match="prices are in US dollars"):
        dollars(text, "usd")


@pytest.mark.parametrize(
    "amount, text",
    [
        (None, "unknown"),
        ("0.5", "$0.50"),
        ("12", "$12.00"),
        ("0.000123", "$0.000123"),
        ("0.0000001", "$0.00"),
        ("1E+1", "$10.00"),
    ],
)
def test_amounts_are_written_for_people(amount, text):
    assert dollars_text(amount and Decimal(amount)) == text


def test_sums_are_exact_whatever_precision_the_program_has_set():
    pricing, tokens = Pricing(Price("0.123456", "7.654321")), usage(123_457, 98_765)
    expected = pricing.cost("a", "b", tokens)
    with decimal.localcontext() as context:
        context.prec = 3
        assert pricing.cost("a", "b", tokens) == expected
        assert pricing.worst_case("a", "b", 123_457, 98_765) == expected
        assert add(Decimal("123.456"), Decimal("0.000001")) == Decimal("123.456001")


COUNTS = st.integers(0, 3_000_000)


@settings(deadline=None)  # whichever comes first loads the prices
@given(
    st.sampled_from(
        [
            ("openai", "gpt-5.5"),
            ("openai", "gpt-4o"),
            ("anthropic", "claude-sonnet-4-5"),
            ("gemini", "gemini-2.5-pro"),
            ("deepseek", "deepseek-chat"),
            ("xai", "grok-4"),
            ("openrouter", "perplexity/sonar-deep-research"),
        ]
    ),
    COUNTS,
    COUNTS,
    st.floats(0, 1),
    st.floats(0, 1),
    st.floats(0, 1),
)
def test_the_worst_case_is_never_below_the_cost(model, prompt, completion, read, written, thought):
    pricing = Pricing()
    cached = int(prompt * read)
    tokens = usage(
        prompt,
        completion,
        cached_tokens=cached,
        cache_write_tokens=int((prompt - cached) * written),
        reasoning_tokens=int(completion * thought),
    )
    cost = pricing.cost(*model, tokens)
    worst = pricing.worst_case(*model, prompt, completion)
    if cost is None:
        assert worst is None
    else:
        assert 0 <= cost <= worst


def test_the_worst_case_writes_all_of_the_prompt_to_the_cache():
    tokens = usage(1000, 0, cache_write_tokens=1000)
    found = Pricing().worst_case("anthropic", "claude-sonnet-4-5", 1000, 0)
    assert found == Pricing().cost("anthropic", "claude-sonnet-4-5", tokens)
    assert found > Pricing().cost("anthropic", "claude-sonnet-4-5", usage(1000, 0))


@pytest.mark.parametrize("hour", [0, 2, 8, 12, 20])
def test_the_worst_case_is_that_of_the_dearest_hour(hour, monkeypatch):
    at = NOW.replace(hour=hour)
    monkeypatch.setattr("LLM.prices.utc_now", lambda: at)
    pricing, tokens = Pricing(), usage()
    for model in ("deepseek-chat", "deepseek-reasoner", "deepseek-v4-pro", "deepseek-flash"):
        costs = [
            pricing.cost("deepseek", model, tokens, at=NOW.replace(hour=h, minute=m))
            for h in range(24)
            for m in (0, 30)
        ]
        assert pricing.worst_case("deepseek", model, 1000, 200) == max(costs)
        assert pricing.cost("deepseek", model, tokens) == theirs("deepseek", model, tokens, at)


def test_a_tier_counts_from_its_edge_in_the_worst_case():
    pricing = Pricing()
    below, edge, above = (
        pricing.worst_case("gemini", "gemini-2.5-pro", n, 0) / n
        for n in (199_999, 200_000, 200_001)
    )
    assert below < edge == above


def test_a_worst_case_needs_both_counts():
    assert Pricing().worst_case("openai", "gpt-4o", None, 1) is None
    assert Pricing(Price(1, 1)).worst_case("openai", "gpt-4o", 1, None) is None
    assert Pricing().worst_case("openai", "text-embedding-3-small", 1_000_000, 0) == Decimal("0.02")
    assert Pricing().worst_case("openai", "text-embedding-3-small", 1, 1) is None


def test_times_in_any_zone_mean_the_same_moment():
    pricing = Pricing()
    moment = datetime(2026, 8, 17, 3, 0, tzinfo=timezone.utc)  # a price begins on this day
    expected = theirs("deepseek", "deepseek-v4-pro", usage(), moment)
    east = moment.astimezone(timezone(timedelta(hours=-10)))
    naive = moment.replace(tzinfo=None)
    for at in (east, moment, naive, east):
        assert pricing.cost("deepseek", "deepseek-v4-pro", usage(), at=at) == expected


def test_pricing_is_pickled_with_the_prices_of_the_user_only():
    pricing = Pricing({"m": Price("0.1", 1)})
    pricing.cost("openai", "gpt-4o", usage())
    assert len(pickle.dumps(pricing)) < 1000
    assert pickle.loads(pickle.dumps(pricing)).cost(None, "m", usage()) == Decimal("0.0003")


def test_what_is_remembered_is_bounded():
    pricing = Pricing()
    for number in range(1500):
        assert pricing.cost("nobody", f"model-{number}", usage()) is None
    assert len(pricing._known) <= 1024


def test_a_price_costs_less_than_ten_microseconds():
    """With room for a busy machine, and for what measures coverage."""
    pricing, tokens = Pricing(), usage(cached_tokens=5)
    pricing.cost("openai", "gpt-4o", tokens)
    assert work_of(lambda: pricing.cost("openai", "gpt-4o", tokens), 1000) < 5


@pytest.mark.parametrize(
    "model, provider, window",
    [
        ("gpt-4o", "openai", 128_000),
        ("openai/gpt-4o", None, 128_000),
        ("gpt-4o", None, 128_000),
        ("claude-sonnet-4-5", "anthropic", 200_000),
        ("no-such-model", "openai", None),
        ("no-such-model", None, None),
        ("gpt-4o", "ollama", None),
        ("gpt-4o", "openai-compatible", None),
        ("gpt-4o", "nobody", None),
        ("gemini-2.5-pro", None, 1_048_576),  # not in Google's own list, but in a router's
        ("Gemini-2.5-Pro", None, 1_048_576),
        ("google/gemini-2.5-pro", None, 1_048_576),
        ("gemini-2.5-pro", "gemini", None),
        ("nobody/gemini-2.5-pro", None, None),
    ],
)
def test_context_windows_come_from_the_data(model, provider, window):
    assert context_window(model, provider) == window


def test_a_window_on_which_the_lists_do_not_agree_is_unknown(monkeypatch):
    from genai_prices import data_snapshot

    def row(name, *models):
        return SimpleNamespace(
            id=name, models=[SimpleNamespace(id=m, context_window=w) for m, w in models]
        )

    class Snapshot:
        providers = (
            row("maker", ("m", None), ("n", None)),
            row("one", ("maker/m", 100), ("maker/n", 100), ("stranger/p", 5)),
            row("two", ("maker/m", 200), ("maker/n", None), ("n", 7)),
        )

        def find_provider_model(self, *_):
            raise LookupError

    monkeypatch.setattr(data_snapshot, "get_snapshot", Snapshot)
    assert [context_window(name) for name in ("m", "n", "p")] == [None, 100, None]


def test_without_the_extra_only_ones_own_prices_are_known():
    code = """
import sys
import LLM.prices as p
from LLM.types import TokenUsage
assert "genai_prices" not in sys.modules
sys.modules["genai_prices"] = None
u = TokenUsage(prompt_tokens=1000000, completion_tokens=0)
assert p.Pricing().cost("openai", "gpt-4o", u) is None
assert p.Pricing().worst_case("openai", "gpt-4o", 1, 1) is None
assert p.context_window("gpt-4o") is None
assert p.Pricing(p.Price(3, 1)).cost("openai", "gpt-4o", u) == 3
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_worst_case_of_a_batch_is_at_its_price():
    own = Pricing(Price(input=1, output=10, batch=0.5))
    single = own.worst_case("mine", "m", 1000, 100)
    assert own.worst_case("mine", "m", 1000, 100, batch=True) == single / 2
    assert Pricing().worst_case("ollama", "m", 1000, 100, batch=True) is None


def test_the_worst_case_of_a_batch_by_the_price_data_is_half():
    prices = Pricing()
    single = prices.worst_case("openai", "gpt-4o-mini", 1000, 100)
    assert prices.worst_case("openai", "gpt-4o-mini", 1000, 100, batch=True) == single / 2
    # Nobody says what a batch costs there: no less than single calls is safe.
    single = prices.worst_case("groq", "llama-3.3-70b-versatile", 1000, 100)
    assert prices.worst_case("groq", "llama-3.3-70b-versatile", 1000, 100, batch=True) in (
        single,
        single / 2,
    )
