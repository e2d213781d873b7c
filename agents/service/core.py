"""The service behind its routes: who may ask, which models, held to what, and what it took."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from decimal import Decimal
from math import ceil
from typing import Any, Final, Literal, TypeVar

from starlette.requests import Request

from agents.agent import Cancel
from agents.calculator import calculator
from agents.context import StableContext
from agents.conversation import Conversation
from agents.service.answers import Answers, Threads
from agents.service.feed import Feed, Pulse
from agents.service.keys import Key, Keys
from agents.service.leases import Leases
from agents.service.ledger import Ledger
from agents.service.metrics import Metrics
from agents.service.middleware import LOOPBACK
from agents.service.problems import Problem
from agents.service.settings import Settings
from agents.service.talks import Talks
from agents.store import Store, Summary
from agents.tools import Toolbox
from agents.types import Message, TokenUsage
from LLM import (
    LLM,
    Budget,
    Clock,
    LLMConfigError,
    LLMTimeoutError,
    RateLimiter,
    context_window,
    otel,
)

log = logging.getLogger("agents.service")

T = TypeVar("T")
Period = Literal["day", "month"]

# The tools that a setting can name.
TOOLS: Final[dict[str, Any]] = {"calculator": calculator}

# Whose everything is, as long as there is no key.
NOBODY: Final = "local"

# Failed logins a minute from one address, after which the answer is 429: a key cannot be guessed, but
# trying takes the service's time.
_FAILURES: Final = 60

_KEPT: Final = 1000  # contexts of conversations, and strangers, that are remembered

# By which a proxy says that it is one: then the address that is seen is not that of the caller.
_FORWARDED: Final = ("forwarded", "x-forwarded-for", "x-real-ip", "via")


@dataclass(frozen=True)
class Caller:
    """Who is asking.

    Attributes:
        owner: whose conversations they see.
        key: what they showed; `None`: nobody needs one yet.
    """

    owner: str
    key: Key | None = None


class Service:
    """Everything that the routes lean on; one for each process.

    Args:
        settings: see `Settings`.
        llm: the client that is asked; left out: one made of the settings, closed with this object.
        tools: functions or `Tool`s that the model may call; left out: those that the settings name.
        clock: for tests.

    Raises:
        LLMConfigError: a setting cannot be used.
        StoreError: the database cannot.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        llm: LLM | None = None,
        tools: Iterable[Any] | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.settings = settings
        self.clock = clock or Clock()
        self.toolbox = Toolbox(_named(settings.tools) if tools is None else list(tools))
        self._own = ExitStack()
        if llm is None:
            hooks = [otel()] if settings.otel else []
            llm = self._own.enter_context(
                LLM(settings.llm_config(), price=settings.price(), hooks=hooks)
            )
        self.llm = llm
        default = settings.model or llm.config.model
        self._models = (default, *(model for model in settings.models if model != default))
        self.store = self._own.enter_context(Store.open(settings.database, clock=clock))
        self.keys = Keys(self.store, self.clock)
        self.ledger = Ledger(self.store, self.clock)
        self.metrics = Metrics()
        self.threads = Threads(settings.max_answers, self.clock)
        self.leases = Leases(self.store, self.clock)
        self.pulse = Pulse()
        self.answers = Answers(
            Talks(self.store, self.leases),
            self.leases,
            asking=self.asking,
            record=self.ledger.record,
            record_now=self.ledger.record_now,
            flush=self.ledger.flush,
            toolbox=self.toolbox,
            context=self._fitting,
            call={"temperature": settings.temperature, "max_tokens": settings.max_tokens},
            max_turns=settings.max_turns,
            threads=self.threads,
            pulse=self.pulse,
            metrics=self.metrics,
            clock=self.clock,
        )
        self._contexts: OrderedDict[tuple[str, str], StableContext] = OrderedDict()
        # Apart, so that many strangers do not make the service forget what a key has used.
        self._limiters: OrderedDict[str, RateLimiter] = OrderedDict()
        self._strangers: OrderedDict[str, RateLimiter] = OrderedDict()
        self._cancels: set[Cancel] = set()
        self._lock = threading.Lock()

    def cancel_all(self) -> None:
        """Tell all answers under way to end, also those of the vendors' APIs."""
        self.answers.cancel_all()
        for cancel in list(self._cancels):
            cancel.cancel()

    def close(self) -> None:
        """End the answers under way, marked as partial, and close what was opened."""
        self.cancel_all()
        self.answers.stop()
        self.ledger.flush()
        self._own.close()

    # Who asks

    def authenticate(self, request: Request) -> Caller:
        """Who is asking.

        Raises:
            Problem: 401: no key, or one that is unknown or revoked; 429: too many requests.
        """
        secret = _secret(request)
        key = self.keys.find(secret) if secret else None
        if key is not None:
            caller = Caller(key.owner, key)
        elif self.is_local(request) and not self.keys.any():
            caller = Caller(
                NOBODY
            )  # whatever it showed: clients made for others must show something
        else:
            self._refuse(request, "no key was given" if not secret else "the key is not known")
        request.state.owner = caller.owner
        most = key.requests_per_minute if key else None
        most = most or self.settings.requests_per_minute
        if most is not None:
            self._pace(f"key:{key.id if key else NOBODY}", most)
        return caller

    def is_local(self, request: Request) -> bool:
        """Whether it comes from this machine itself, and not through a proxy on it."""
        forwarded = any(name in request.headers for name in _FORWARDED)
        return request.client is not None and request.client.host in LOOPBACK and not forwarded

    def _refuse(self, request: Request, why: str) -> Any:
        peer = request.client.host if request.client else "?"
        self._pace(f"failures:{peer}", _FAILURES)
        raise Problem(
            401,
            "A key is needed",
            f"{why}: send Authorization: Bearer <key>; `python -m agents keys create` makes one",
            headers={"www-authenticate": "Bearer"},
        )

    def _pace(self, name: str, most: int) -> None:
        kept = self._strangers if name.startswith("failures:") else self._limiters
        limiter = self._remembered(kept, name, lambda: self._limiter(name, most))
        try:
            limiter.acquire(deadline_at=self.clock.now())
        except LLMTimeoutError:
            wait = max(1, ceil(limiter.wait_time_needed()))
            raise Problem(
                429,
                "Too many requests",
                f"not more than {most} a minute: wait {wait} s",
                headers={"retry-after": str(wait)},
            ) from None

    def _limiter(self, name: str, most: int) -> RateLimiter:
        shared = {"redis_url": self.settings.redis_url, "if_unavailable": "local"}
        return RateLimiter(
            most,
            None,
            clock=self.clock,
            **({"name": f"agents:{name}", **shared} if self.settings.redis_url else {}),  # type: ignore[arg-type]  # the values are of their names' types
        )

    def _remembered(self, kept: OrderedDict[Any, T], name: Any, make: Callable[[], T]) -> T:
        with self._lock:
            found = kept.get(name)
            if found is None:
                found = kept[name] = make()
                if len(kept) > _KEPT and kept is not self._limiters:
                    kept.popitem(last=False)
            kept.move_to_end(name)
            return found

    # What is asked

    def models(self) -> list[str]:
        """The models that callers may name; the first is the default."""
        return list(self._models)

    def checked_model(self, model: str | None) -> str:
        """The model to ask; `None`: the default.

        Raises:
            Problem: 404: none that callers may name.
        """
        if model is None:
            return self._models[0]
        if model not in self._models:
            named = ", ".join(self._models)
            raise Problem(404, "No such model", f"{model[:80]!r} is none of: {named}")
        return model

    @contextmanager
    def asking(
        self, caller: Caller, model: str | None = None, conversation: str | None = None
    ) -> Iterator[LLM]:
        """The client, held to the budgets of the caller and of a conversation, in this thread.

        Raises:
            Problem: 404: no such model.
        """
        self.checked_model(model)
        with ExitStack() as stack:
            for budget in self._budgets(caller, conversation):
                # Not for threads that are started meanwhile: they belong to other callers.
                stack.enter_context(self.llm.budget(budget, threads=False))
            yield self.llm

    def budget_of(self, caller: Caller) -> Budget | None:
        """What the caller may spend; `None`: no limit."""
        key, settings = caller.key, self.settings
        usd = settings.budget_usd
        period: Period | None = settings.budget_period
        if key is not None and key.budget_usd is not None:
            usd, period = key.budget_usd, key.budget_period
        return (
            None if usd is None else self._budget(usd, f"key:{key.id if key else NOBODY}", period)
        )

    def _budgets(self, caller: Caller, conversation: str | None) -> Iterator[Budget]:
        whole = self.budget_of(caller)
        if whole is not None:
            yield whole
        usd = self.settings.conversation_budget_usd
        if usd is not None and conversation is not None:
            yield self._budget(usd, f"conversation:{conversation}", None)

    def _budget(self, usd: Decimal, name: str, period: Period | None) -> Budget:
        return Budget(
            usd, name=name, period=period, store=self.ledger, warn_at=None, clock=self.clock
        )

    def _fitting(self, conversation: str, model: str, messages: list[Message]) -> list[Message]:
        """What is sent of a conversation; its beginning stays the same from call to call."""
        window = context_window(model)
        if window is None:
            return messages
        reserve = min(self.settings.max_tokens or 1024, window // 2)
        marks = model.startswith("anthropic/") or self.llm.config.provider == "anthropic"
        context = self._remembered(
            self._contexts,
            (conversation, model),
            lambda: StableContext(window, model=model, reserve=reserve, marks=marks),
        )
        return list(context.prepare(messages, tools=self.toolbox.schemas or None).messages)

    def record(
        self,
        owner: str,
        model: str | None,
        usage: TokenUsage | None,
        cost: Decimal | None,
        *,
        complete: bool = True,
    ) -> None:
        """Write down what an answer took that belongs to no conversation."""
        self.ledger.record(owner, model, usage, cost, complete=complete)
        self.metrics.answer_began()
        self.metrics.answer_ended("ok" if complete else "partial", usage, cost)

    def summary(self, caller: Caller, name: str) -> Summary:
        """A conversation of the caller, without its messages.

        Raises:
            Problem: 404: there is none, or it is another one's, which is not told.
        """
        try:
            found = self.store.conversations.get(name)
        except LLMConfigError:  # it cannot be a name
            found = None
        if found is None or found.owner != caller.owner:
            raise Problem(404, "Not found", "there is no such conversation")
        return found

    def conversation(self, caller: Caller, name: str) -> Conversation:
        """The same with its messages.

        Raises:
            Problem: as `summary`.
        """

        def read(_: Any) -> Conversation:
            self.summary(caller, name)
            return Conversation(self.store.conversations, name, llm=self.llm)

        return self.store.run(read, write=False)

    async def answer_in_thread(
        self, work: Callable[[Cancel], Iterator[T]]
    ) -> AsyncIterator[T | None]:
        """What a generator gives that runs in a thread of its own; `None` for each long pause.

        Args:
            work: gets what tells it to stop: when nobody reads on.

        Raises:
            Problem: 503: too many are under way.
        """
        cancel = Cancel()
        feed: Feed[T] = Feed(asyncio.get_running_loop(), cancel.cancel, self.pulse)
        trouble: list[Exception] = []

        def run() -> None:
            try:
                for item in work(cancel):
                    # The first piece begins an answer, the second is its first word.
                    feed.put(item, urgent=len(feed.items) < 2)
            except Exception as error:  # noqa: BLE001 - raised again where it is read
                trouble.append(error)
            finally:
                feed.finish()

        reader = feed.read()
        self._cancels.add(cancel)
        try:
            self.threads.start(run)
            async for item in reader:
                yield item
        finally:
            self._cancels.discard(cancel)
            reader.close()
        if trouble:
            raise trouble[0]


def _secret(request: Request) -> str | None:
    kind, _, secret = request.headers.get("authorization", "").partition(" ")
    if kind.lower() == "bearer" and secret.strip():
        return secret.strip()
    return request.headers.get("x-api-key") or None


def _named(tools: Iterable[str]) -> list[Any]:
    unknown = [name for name in tools if name not in TOOLS]
    if unknown:
        raise LLMConfigError(
            f"tools (AGENTS_TOOLS) names {unknown[0]!r}; there is: {', '.join(TOOLS)}. Tools of your "
            "own are given to create_app(tools=[…])"
        )
    return [TOOLS[name] for name in tools]
