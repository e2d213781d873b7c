"""What servers say about their limits: each form that is known, and nothing from nonsense."""

from datetime import datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from LLM.policies.ratelimit import ServerLimits
from LLM.providers.limits import read_limits

NOW = datetime(2026, 11, 21, 12, 0, 0, tzinfo=timezone.utc)


def read(**headers):
    return read_limits({name.replace("_", "-"): value for name, value in headers.items()}, NOW)


def reset(text):
    limits = read(x_ratelimit_limit_requests="60", x_ratelimit_reset_requests=text)
    return limits.requests_reset


def test_openais_form():
    assert read(
        x_ratelimit_limit_requests="5000",
        x_ratelimit_remaining_requests="4999",
        x_ratelimit_reset_requests="12ms",
        x_ratelimit_limit_tokens="450000",
        x_ratelimit_remaining_tokens="0",
        x_ratelimit_reset_tokens="6m0s",
    ) == ServerLimits(5000, 4999, 0.012, 450_000, 0, 360.0)


def test_anthropics_form():
    assert read(
        anthropic_ratelimit_requests_limit="50",
        anthropic_ratelimit_requests_remaining="49",
        anthropic_ratelimit_requests_reset="2026-11-21T12:00:01Z",
        anthropic_ratelimit_tokens_limit="48000",
        anthropic_ratelimit_tokens_remaining="47000",
        anthropic_ratelimit_tokens_reset="2026-11-21T12:00:30.5Z",
        anthropic_ratelimit_input_tokens_limit="40000",
        anthropic_ratelimit_input_tokens_remaining="39000",
        anthropic_ratelimit_input_tokens_reset="2026-11-21T12:00:20Z",
        anthropic_ratelimit_output_tokens_limit="8000",
        anthropic_ratelimit_output_tokens_remaining="8000",
        anthropic_ratelimit_output_tokens_reset="2026-11-21T12:00:00Z",
    ) == ServerLimits(50, 49, 1.0, 48_000, 47_000, 30.5)


def parts(input_left, output_left, **more):
    return read(
        anthropic_ratelimit_input_tokens_limit="40000",
        anthropic_ratelimit_input_tokens_remaining=input_left,
        anthropic_ratelimit_input_tokens_reset="2026-11-21T12:00:20Z",
        anthropic_ratelimit_output_tokens_limit="8000",
        anthropic_ratelimit_output_tokens_remaining=output_left,
        anthropic_ratelimit_output_tokens_reset="2026-11-21T12:00:40Z",
        **more,
    )


def test_limits_of_prompt_and_answer_are_added():
    assert parts("1000", "500") == ServerLimits(None, None, None, 48_000, 1500, 40.0)


@pytest.mark.parametrize(
    "input_left, output_left, wait", [("0", "500", 20), ("500", "0", 40), ("0", "0", 40)]
)
def test_one_part_that_is_used_up_uses_up_the_whole(input_left, output_left, wait):
    limits = parts(
        input_left,
        output_left,
        anthropic_ratelimit_tokens_limit="48000",
        anthropic_ratelimit_tokens_remaining="500",
        anthropic_ratelimit_tokens_reset="2026-11-21T12:00:10Z",
    )
    assert limits == ServerLimits(None, None, None, 48_000, 0, wait)
    assert parts(input_left, output_left).tokens_remaining == 0


@pytest.mark.parametrize("name", ["req-minute", "requests-minute"])
def test_forms_by_the_minute(name):
    """Mistral's and Cerebras's; without a reset the minute ends within a minute."""
    headers = {
        f"x-ratelimit-limit-{name}": "60",
        f"x-ratelimit-remaining-{name}": "59",
        "x-ratelimit-limit-tokens-minute": "50000",
        "x-ratelimit-remaining-tokens-minute": "47196",
        "x-ratelimit-reset-tokens-minute": "11.4",
        "x-ratelimit-limit-tokens-month": "4000000",
        "x-ratelimit-remaining-requests-day": "0",
        "x-ratelimit-tokens-query-cost": "2804",
    }
    assert read_limits(headers, NOW) == ServerLimits(60, 59, 60.0, 50_000, 47_196, 11.4)


def test_forms_that_do_not_name_their_window():
    """OpenRouter's, in milliseconds since 1970, and the IETF's draft: only what remains is taken."""
    later = str(int((NOW + timedelta(seconds=7)).timestamp() * 1000))
    found = read(x_ratelimit_limit="20", x_ratelimit_remaining="0", x_ratelimit_reset=later)
    assert found == ServerLimits(None, 0, 7.0)
    found = read(ratelimit_limit="100, 100;w=60", ratelimit_remaining="3", ratelimit_reset="20")
    assert found == ServerLimits(None, 3, 20.0)


@pytest.mark.parametrize(
    "text, seconds",
    [
        ("12ms", 0.012),
        ("1s", 1),
        ("6m0s", 360),
        ("1h2m3.5s", 3723.5),
        ("2m59.56s", 179.56),
        ("8.64s", 8.64),
        ("500us", 0.0005),
        ("500µs", 0.0005),
        ("90ns", 9e-8),
        ("1d", 86_400),
        ("0", 0),
        ("17", 17),
        (" 17 ", 17),
        ("0.25", 0.25),
        ("86400", 86_400),
        (str(int(NOW.timestamp()) + 30), 30),
        (str(int(NOW.timestamp() * 1000) + 1500), 1.5),
        ("2026-11-21T12:00:45Z", 45),
        ("2026-11-21T12:00:45z", 45),
        ("2026-11-21T13:00:45+01:00", 45),
        ("2026-11-21T12:00:45.123456789Z", 45.123456),
        ("2026-11-21T12:00:45", 45),
        ("2026-11-21 12:00:45", 45),
        ("2026-11-21T11:59:50Z", 0),  # just past
        ("2026-11-19T11:59:50Z", None),
        ("2026-11-23T11:59:50Z", None),
        ("9999-12-31T23:59:59-23:59", None),
        ("0001-01-01T00:00:00+23:59", None),
        ("86401", None),
        ("25h", None),
        ("99999999999999999999999h", None),
        ("1e3", None),
        ("-5", None),
        ("-1s", None),
        ("nan", None),
        ("inf", None),
        ("", None),
        ("soon", None),
        ("6m 0s", None),
        ("٣s", None),
        ("1s" * 40, None),
    ],
)
def test_resets(text, seconds):
    found = reset(text)
    assert found == (seconds if seconds is None else pytest.approx(seconds, abs=2e-6))


def test_dates_are_measured_from_the_answers_own():
    """A wrong clock on either side does no harm."""
    limits = read(
        date="Sat, 21 Nov 2026 15:30:00 GMT",
        anthropic_ratelimit_requests_reset="2026-11-21T15:30:10Z",
    )
    assert limits.requests_reset == 10


@pytest.mark.parametrize("date", ["", "yesterday", "x" * 1000, None, "Sat, 99 Nov 2026 15:30:00"])
def test_a_date_that_is_none_is_not_used(date):
    limits = read(date=date, anthropic_ratelimit_requests_reset="2026-11-21T12:00:10Z")
    assert limits.requests_reset == 10


@pytest.mark.parametrize("limit", ["-1", "0", "", "many", "1" * 16, "1.5", "1e5", None])
def test_a_limit_that_means_nothing_takes_what_stands_beside_it_along(limit):
    """Azure sends -1 and 0, Mistral 0 for a key without an allowance: no reason to wait for a reset."""
    assert (
        read(
            x_ratelimit_limit_requests=limit,
            x_ratelimit_remaining_requests="0",
            x_ratelimit_reset_requests="60",
        )
        is None
    )


@pytest.mark.parametrize("left", ["-1", "none", "", "9" * 100])
def test_what_remains_may_be_nonsense_too(left):
    assert read(x_ratelimit_limit_tokens="100", x_ratelimit_remaining_tokens=left) == ServerLimits(
        tokens_limit=100
    )


def test_whole_numbers_may_have_a_point():
    assert read(x_ratelimit_limit_tokens="100.0").tokens_limit == 100


def test_without_a_word_there_is_nothing():
    assert read_limits({}, NOW) is None
    assert read(content_type="text/html", ratelimit_policy="10;w=1") is None


NAMES = [
    f"{prefix}-{part}"
    for prefix, parts in {
        "x-ratelimit-limit": ("requests", "tokens", "req-minute", "tokens-minute"),
        "x-ratelimit-remaining": ("requests", "tokens", "req-minute", "tokens-minute"),
        "x-ratelimit-reset": ("requests", "tokens", "req-minute", "tokens-minute"),
        "anthropic-ratelimit-tokens": ("limit", "remaining", "reset"),
        "anthropic-ratelimit-input-tokens": ("limit", "remaining", "reset"),
        "anthropic-ratelimit-output-tokens": ("limit", "remaining", "reset"),
        "ratelimit": ("remaining", "reset"),
    }.items()
    for part in parts
] + ["date"]
VALUES = (
    st.text(max_size=80)
    | st.text("0123456789.:-+TZhms ", max_size=40)
    | st.integers().map(str)
    | st.floats().map(str)
    | st.datetimes(timezones=st.timezones()).map(lambda d: d.isoformat())
    | st.none()
)


@given(st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=20), VALUES, max_size=12))
def test_whatever_comes_it_never_raises_and_makes_sense(headers):
    limits = read_limits(headers, NOW)
    if limits is None:
        return
    assert limits != ServerLimits()
    for limit, remaining, wait in (limits[:3], limits[3:]):
        assert limit is None or limit > 0
        assert remaining is None or remaining >= 0
        assert wait is None or 0 <= wait <= 86_400
