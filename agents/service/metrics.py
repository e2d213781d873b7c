"""What Prometheus reads: requests, answers, tokens, dollars. Numbers only, with few and known labels."""

from __future__ import annotations

import os
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any, Final, Literal

import prometheus_client.multiprocess
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)

from LLM import TokenUsage

_processes: Final[Any] = prometheus_client.multiprocess  # which has no types

Outcome = Literal["ok", "partial", "error"]

_METHODS: Final = frozenset("GET HEAD POST PUT PATCH DELETE OPTIONS".split())
_KINDS: Final = ("prompt_tokens", "completion_tokens", "cached_tokens", "reasoning_tokens")
# Seconds: a request may be a look-up of a millisecond, or an answer of minutes.
_REQUEST_SECONDS: Final = (0.005, 0.02, 0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_FIRST_TOKEN_SECONDS: Final = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60)


class Metrics:
    """The numbers of one application.

    Several processes count together if `PROMETHEUS_MULTIPROC_DIR` names a folder that is theirs alone,
    and did so when `prometheus_client` was imported: each then reports the sums.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._folder = _shared_folder()
        self._requests = self._make(
            Counter, "requests", "Requests answered", ("method", "route", "status")
        )
        self._request_seconds = self._make(
            Histogram,
            "request_seconds",
            "Seconds from a request to the end of its answer",
            ("method", "route"),
            buckets=_REQUEST_SECONDS,
        )
        self._running = self._make(
            Gauge, "answers_running", "Answers under way", multiprocess_mode="livesum"
        )
        self._answers = self._make(Counter, "answers", "Answers that ended", ("outcome",))
        self._tokens = self._make(Counter, "tokens", "Tokens that models reported", ("kind",))
        self._cost = self._make(Counter, "cost_dollars", "US dollars that answers cost")
        self._unpriced = self._make(
            Counter, "answers_unpriced", "Answers whose cost is not known, and not in cost_dollars"
        )
        self._first_token = self._make(
            Histogram,
            "first_token_seconds",
            "Seconds from a request to the first piece of its answer",
            buckets=_FIRST_TOKEN_SECONDS,
        )
        for outcome in ("ok", "partial", "error"):  # a rate needs a 0 to start from
            self._answers.labels(outcome)

    def observe_request(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count a request.

        Args:
            method: of HTTP; one that HTTP does not have counts as `other`.
            route: the template, `/conversations/{id}`; never a path, of which there are endless many.
            status: of HTTP; 0: the client went away before there was one.
            seconds: until the last byte.
        """
        method = method if method in _METHODS else "other"
        self._requests.labels(method, route, str(status)).inc()
        self._request_seconds.labels(method, route).observe(seconds)

    def answer_began(self) -> None:
        """An answer is under way; `answer_ended` must follow."""
        self._running.inc()

    def first_token(self, seconds: float) -> None:
        """The first piece of an answer came, so many seconds after the request."""
        self._first_token.observe(seconds)

    def answer_ended(
        self, outcome: Outcome, usage: TokenUsage | None = None, cost: Decimal | None = None
    ) -> None:
        """An answer is over.

        Args:
            outcome: `ok`, `partial` (it was cut or stopped) or `error`.
            usage: tokens; `None`: unknown, nothing is counted.
            cost: US dollars; `None`: unknown, which is counted.
        """
        self._running.dec()
        self._answers.labels(outcome).inc()
        for kind in _KINDS:
            if tokens := getattr(usage, kind, None):
                self._tokens.labels(kind.removesuffix("_tokens")).inc(tokens)
        if cost is None:
            self._unpriced.inc()
        else:
            self._cost.inc(float(cost))

    def render(self) -> tuple[bytes, str]:
        """All numbers in Prometheus's text format, and its content type."""
        registry = self.registry
        if self._folder is not None:
            _forget_the_dead(self._folder)
            registry = CollectorRegistry()
            _processes.MultiProcessCollector(registry, str(self._folder))
        return generate_latest(registry), CONTENT_TYPE_LATEST

    def _make(
        self, kind: Callable[..., Any], name: str, about: str, *labels: Any, **more: Any
    ) -> Any:
        return kind(f"agents_{name}", about, *labels, registry=self.registry, **more)


def _shared_folder() -> Path | None:
    """The folder in which processes count together, as prometheus_client reads it; `None`: none."""
    try:
        return Path(_processes.MultiProcessCollector(CollectorRegistry())._path)  # noqa: SLF001 - only it knows
    except ValueError:
        return None


def _forget_the_dead(folder: Path) -> None:
    """A worker that was killed has no answers under way: its gauges are not summed any more."""
    for file in folder.glob("gauge_live*_*.db"):
        process = int(file.stem.rpartition("_")[2])
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            _processes.mark_process_dead(process, str(folder))
        except OSError:  # it lives, and is not ours
            continue
