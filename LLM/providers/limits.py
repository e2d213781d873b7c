"""What servers say about their rate limits in the headers of an answer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime

from LLM.policies.ratelimit import ServerLimits

# A reset that is further off than a day is not one of a limit per minute; nor is a date that long past.
DAY = 86_400.0

# Longer than any honest value.
MAX_LENGTH = 64

# From here on a plain number is no duration but a date: seconds or milliseconds since 1970.
EPOCH_SECONDS = 1e9
EPOCH_MILLISECONDS = 1e12

# A server that names its limits by the minute, but not the reset, means the end of the minute.
MINUTE = 60.0

_UNITS = {
    "ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": DAY,
}  # fmt: skip
_PART = re.compile(r"([0-9]+(?:\.[0-9]+)?)(ns|us|µs|ms|s|m|h|d)")
_DURATION = re.compile(rf"(?:{_PART.pattern})+")
_NUMBER = re.compile(r"[0-9]+(?:\.[0-9]+)?")
_COUNT = re.compile(r"([0-9]{1,15})(?:\.0+)?")

_Limit = tuple[int | None, int | None, float | None]
_NOTHING: _Limit = (None, None, None)

# The headers of (limit, remaining, reset), the most telling form first. As of 2026-11:
# - OpenAI, Groq, Together, vLLM's and litellm's proxies: durations. Groq counts its requests by the day:
#   a limit by the day is above any by the minute, so taking it for one refuses nothing.
# - Anthropic: RFC 3339. Its `tokens` are those of whichever limit is the tightest.
# - Mistral, Cerebras (tokens): by the minute, and no reset.
_REQUESTS = (
    ("x-ratelimit-limit-requests", "x-ratelimit-remaining-requests", "x-ratelimit-reset-requests"),
    ("anthropic-ratelimit-requests-limit", "anthropic-ratelimit-requests-remaining",
     "anthropic-ratelimit-requests-reset"),
)  # fmt: skip
_TOKENS = (
    ("x-ratelimit-limit-tokens", "x-ratelimit-remaining-tokens", "x-ratelimit-reset-tokens"),
    ("anthropic-ratelimit-tokens-limit", "anthropic-ratelimit-tokens-remaining",
     "anthropic-ratelimit-tokens-reset"),
)  # fmt: skip
_PARTS = (
    ("anthropic-ratelimit-input-tokens-limit", "anthropic-ratelimit-input-tokens-remaining",
     "anthropic-ratelimit-input-tokens-reset"),
    ("anthropic-ratelimit-output-tokens-limit", "anthropic-ratelimit-output-tokens-remaining",
     "anthropic-ratelimit-output-tokens-reset"),
)  # fmt: skip
_REQUESTS_BY_MINUTE = ("req-minute", "requests-minute")
_TOKENS_BY_MINUTE = ("tokens-minute",)
# OpenRouter (milliseconds since 1970), and the IETF's draft "RateLimit header fields" up to its version 6
# (seconds). Nobody says for how long the limit is, so only what remains is taken.
_UNNAMED = (
    ("", "x-ratelimit-remaining", "x-ratelimit-reset"),
    ("", "ratelimit-remaining", "ratelimit-reset"),
)


def read_limits(headers: Mapping[str, str], now: datetime) -> ServerLimits | None:
    """The limits that an answer's headers tell of; never raises.

    What makes no sense is left out: -1, a limit of 0 and what stands beside it, texts that are no
    numbers, resets further away than a day.

    Args:
        headers: with lower-case names.
        now: the date, from which dates are measured if the answer bears none of its own.

    Returns:
        `None` if nothing is said.
    """
    if not any("ratelimit-" in name for name in headers):
        return None
    now = _answered(headers) or now
    requests = _first(headers, now, _REQUESTS, _REQUESTS_BY_MINUTE, _UNNAMED)
    tokens = _first(headers, now, _TOKENS, _TOKENS_BY_MINUTE, ())
    limits = ServerLimits(*requests, *_with_parts(tokens, headers, now))
    return None if limits == ServerLimits() else limits


def _first(
    headers: Mapping[str, str],
    now: datetime,
    plain: tuple[tuple[str, str, str], ...],
    by_minute: tuple[str, ...],
    unnamed: tuple[tuple[str, str, str], ...],
) -> _Limit:
    for names in plain:
        found = _read(headers, names, now)
        if found != _NOTHING:
            return found
    for name in by_minute:
        names = (
            f"x-ratelimit-limit-{name}",
            f"x-ratelimit-remaining-{name}",
            f"x-ratelimit-reset-{name}",
        )
        limit, remaining, reset = _read(headers, names, now)
        if limit is not None or remaining is not None:
            return limit, remaining, MINUTE if reset is None else reset
    for names in unnamed:
        found = _read(headers, names, now)
        if found != _NOTHING:
            return found
    return _NOTHING


def _with_parts(tokens: _Limit, headers: Mapping[str, str], now: datetime) -> _Limit:
    """Prompt and answer may have limits of their own: one that is used up uses up the whole."""
    parts = [_read(headers, names, now) for names in _PARTS]
    for _, remaining, reset in parts:
        exhausted = remaining == 0 and reset is not None
        if exhausted and (tokens[1] != 0 or (tokens[2] or 0.0) < (reset or 0.0)):
            tokens = (tokens[0], 0, reset)
    if tokens == _NOTHING and all(None not in part for part in parts):
        (limit, remaining, reset), (more, more_remaining, later) = parts
        return (
            (limit or 0) + (more or 0),
            (remaining or 0) + (more_remaining or 0),
            max(reset or 0.0, later or 0.0),
        )
    return tokens


def _read(headers: Mapping[str, str], names: tuple[str, str, str], now: datetime) -> _Limit:
    limit_name, remaining_name, reset_name = names
    limit = _count(headers.get(limit_name))
    if not limit and limit_name in headers:
        return _NOTHING  # Azure and Mistral send -1 and 0 for limits that they do not tell
    return limit, _count(headers.get(remaining_name)), _reset(headers.get(reset_name), now)


def _count(text: str | None) -> int | None:
    found = _COUNT.fullmatch(_honest(text) or "")
    return int(found[1]) if found else None


def _reset(text: str | None, now: datetime) -> float | None:
    """Seconds until then, from a number, a duration or a date."""
    text = _honest(text) or ""
    if _NUMBER.fullmatch(text):
        number = float(text)
        if number < EPOCH_SECONDS:
            return _within_a_day(number)
        return _until(number / (1000 if number >= EPOCH_MILLISECONDS else 1), now)
    if _DURATION.fullmatch(text):
        return _within_a_day(sum(float(n) * _UNITS[unit] for n, unit in _PART.findall(text)))
    date = _date(text)
    return None if date is None else _until(date.timestamp(), now)


def _until(timestamp: float, now: datetime) -> float | None:
    seconds = timestamp - now.timestamp()
    return _within_a_day(max(0.0, seconds)) if seconds > -DAY else None


def _within_a_day(seconds: float) -> float | None:
    return seconds if seconds <= DAY else None


def _date(text: str) -> datetime | None:
    """RFC 3339; Python 3.10 knows neither `Z` nor nine digits of a second."""
    plain = re.sub(r"\.([0-9]{1,6})[0-9]*", lambda found: "." + found[1].ljust(6, "0"), text)
    try:
        date = datetime.fromisoformat(re.sub("[zZ]$", "+00:00", plain))
        date = date if date.tzinfo else date.replace(tzinfo=timezone.utc)
        date.timestamp()
    except (ValueError, OverflowError):
        return None
    return date


def _answered(headers: Mapping[str, str]) -> datetime | None:
    """When the server answered, by its own clock: a wrong clock on either side does no harm."""
    text = headers.get("date")
    if not isinstance(text, str) or len(text) > MAX_LENGTH:
        return None
    try:
        date = parsedate_to_datetime(text)
        date.timestamp()
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
    return date if date.tzinfo else date.replace(tzinfo=timezone.utc)


def _honest(text: str | None) -> str | None:
    """The text without what surrounds it, unless it is too long to mean anything."""
    return text.strip() if isinstance(text, str) and len(text) <= MAX_LENGTH else None
