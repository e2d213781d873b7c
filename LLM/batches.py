"""The providers' batch APIs: many calls sent as one job, answered within a day, at half the price.

A batch lives at the provider. Its id is all that a process needs to go on with it.
"""

from __future__ import annotations

import io
import logging
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, NamedTuple

from LLM.batch import MapResult, Task, tasks
from LLM.clock import Clock
from LLM.errors import (
    LLMAPIError,
    LLMConfigError,
    LLMConnectionError,
    LLMError,
    LLMInvalidRequestError,
    LLMResponseError,
    LLMTimeoutError,
)
from LLM.forks import renew_after_fork
from LLM.pipeline import (
    Done,
    Handler,
    Job,
    build_pipeline,
    exchange,
    observe,
    parse_answer,
    retry,
    worst_case,
)
from LLM.policies.budget import Budget, Reservation, Reservations, reserve_all
from LLM.policies.retry import RetryPolicy, RetryQuota
from LLM.prices import ZERO, Pricing, add
from LLM.providers.base import (
    MALFORMED,
    Call,
    Provider,
    WireRequest,
    WireResponse,
    parse_json,
    request_id,
    unexpected,
)
from LLM.providers.batches import Batch, BatchWire, batch_path, batch_wire
from LLM.providers.targets import provider_of
from LLM.telemetry import Hook
from LLM.tokens import TokenCount
from LLM.transport import Transport, WireStream, too_large
from LLM.types import Answer, CallInfo, Ending, TokenUsage

log = logging.getLogger("LLM")

# Seconds between two looks at a batch: soon at first, for a short one; then as OpenAI's guide does.
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0

# Looks that may fail one after the other (each with its retries) before waiting is given up.
_PATIENCE = 10

# A slow line: a batch of 200 MB may take this much longer to send, in bytes per second.
_SLOWEST_UPLOAD = 1_000_000

# What an item may not say of itself: it is true of the whole batch, or of no batch at all.
_OF_THE_BATCH = ("timeout", "deadline", "extra_headers")


class Lent(NamedTuple):
    """What a client lends to its batches.

    Attributes:
        describe: a call from its endpoint, its subject and all its arguments by name.
        count: the tokens of its prompt.
        record: notes what an answer took.
    """

    transport: Transport
    clock: Clock
    hooks: tuple[Hook, ...]
    retries: RetryPolicy
    quota: RetryQuota
    prices: Pricing
    memory: BatchMemory
    budgets: Callable[[], Sequence[Budget]]
    describe: Callable[[str, Any, Mapping[str, Any]], Call]
    count: Callable[[Call], TokenCount]
    record: Callable[[CallInfo, TokenUsage | None], None]


@dataclass
class _Account:
    """What is known of one batch: where it went, what was set aside for it, what came of it."""

    where: dict[str, Any] = field(default_factory=dict)
    model: str | None = None
    keys: dict[str, str] = field(default_factory=dict)  # by custom id, where it does not tell
    reservation: Reservation | Reservations | None = None
    counted: set[str] | None = field(default_factory=set)  # `None`: all of it
    cost: Decimal | None = ZERO
    tokens: int | None = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, key: str, cost: Decimal | None, tokens: int | None) -> bool:
        """Add up a result, unless it was; says whether it was new."""
        with self.lock:
            if self.counted is None or key in self.counted:
                return False
            self.counted.add(key)
            self.cost = None if cost is None or self.cost is None else add(self.cost, cost)
            self.tokens = None if tokens is None or self.tokens is None else self.tokens + tokens
            return True

    def skip(self, key: str) -> None:
        """Do not count a result: another run did."""
        with self.lock:
            if self.counted is not None:
                self.counted.add(key)

    def close(self) -> None:
        """All results were read: what was set aside becomes what it took."""
        with self.lock:
            self.counted = None
            reservation, self.reservation = self.reservation, None
        if reservation is not None:
            reservation.settle(self.cost, self.tokens)


class BatchMemory:
    """The accounts of the batches that a client sent or read; shared by the clients made of it."""

    def __init__(self) -> None:
        self._accounts: dict[str, _Account] = {}
        self.after_fork()
        renew_after_fork(self)

    def after_fork(self) -> None:
        self._lock = threading.Lock()

    def account(self, id_: str) -> _Account:
        with self._lock:
            return self._accounts.setdefault(id_, _Account())

    def open(self, id_: str, account: _Account) -> None:
        with self._lock:
            self._accounts[id_] = account


@dataclass(frozen=True)
class _BatchPrices:
    """What knows the prices of calls in a batch."""

    prices: Pricing

    def cost(
        self, provider: str | None, model: str | None, usage: TokenUsage | None
    ) -> Decimal | None:
        return self.prices.cost(provider, model, usage, batch=True)


class Incomplete(LLMConnectionError):
    """A results file ended well, and lacks some of what the batch says it has."""


class Spoiled(LLMResponseError):
    """A results file is whole, and some of its lines are no results: to read it again is of no use."""


class _Said(Answer):
    """What a batch API answered, as it stands."""

    value: dict[str, Any]


class _Speaker:
    """A provider whose answers are taken as they stand; its errors are the dialect's."""

    def __init__(self, provider: Provider) -> None:
        self.build = provider.build
        self.error = provider.error
        self.decoder = provider.decoder
        self.output_limit = provider.output_limit

    def parse(self, call: Call, response: WireResponse) -> _Said:
        try:
            value = parse_json(response.body)
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise unexpected(call, response, "not a JSON object")
        return _Said(value=value)


class _Download:
    """A results file under way: an outcome of the pipeline, whose lines are read as they come."""

    def __init__(self, wire: WireStream, call: Call, request: WireRequest) -> None:
        self.status, self.headers = wire.status, wire.headers
        self.info = CallInfo(call.target.host.name, call.target.model, request_id(wire.headers))
        self._wire, self._call, self._request = wire, call, request

    @property
    def request_id(self) -> str | None:
        return self.info.request_id

    def when_done(self, callback: Callable[[Ending], None]) -> None:
        callback(Ending(None, True, None, lambda: None))  # what is in it is noted by itself

    def lines(self) -> Iterator[bytes]:
        """Its lines that are not empty, one at a time, whatever the size of the file.

        Raises:
            LLMConnectionError: it broke off.
            LLMResponseError: a line is larger than `max_response_bytes`.
        """
        pieces: list[bytes] = []
        size = 0
        while True:
            self._wire.expect()
            data = self._wire.read()
            self._wire.rest()  # whoever reads the lines may take his time
            first, *others = data.split(b"\n")
            pieces.append(first)
            size += len(first)
            if size > self._call.max_response_bytes:
                raise too_large(self._request, self._call.max_response_bytes)
            if not others and data:
                continue
            for line in (b"".join(pieces), *others[:-1]):
                if line and not line.isspace():
                    yield line
            if not data:
                return
            pieces, size = [others[-1]], len(others[-1])

    def close(self) -> None:
        self._wire.close()


class BatchResults:
    """The results of a batch, as they come off the wire: an iterator of `MapResult`, in any order.

    Attributes:
        batch: the batch, as it was when this began.
        keys: those that came so far: after an error, what need not be asked for again.
    """

    def __init__(
        self, batch: Batch, keys: dict[str, None], results: Generator[MapResult, None, None]
    ) -> None:
        self.batch = batch
        self._keys = keys
        self._results = results

    @property
    def keys(self) -> list[str]:
        return list(self._keys)

    def __iter__(self) -> Iterator[MapResult]:
        return self

    def __next__(self) -> MapResult:
        return next(self._results)

    def close(self) -> None:
        """Let go of the connection."""
        self._results.close()

    def __enter__(self) -> BatchResults:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Draft:
    """A batch that is being put together; nothing of it was sent."""

    def __init__(self, lent: Lent, call: Call, how: Mapping[str, Any]) -> None:
        self.lent, self.how = lent, how
        self.first = call
        self.wire: BatchWire = batch_wire(call.target)
        self.boundary = f"batch-{lent.clock.new_id()}"
        self.frame = self.wire.frame(self.boundary)
        self.path = ""
        self.tasks: dict[str, Task] = {}  # by custom id
        self.budgets = lent.budgets()
        self.model: str | None = call.target.model
        self.cost: Decimal | None = ZERO
        self.tokens: int | None = 0
        self._body = io.BytesIO()
        self._body.write(self.frame.opening)
        self._size = 0 if self.wire.uploads else len(self.frame.opening + self.frame.closing)

    def belongs(self, call: Call) -> bool:
        """Whether a call can be in the same batch: the same host, and the same model if it must."""
        ours, theirs = self.first.target, call.target
        same = (ours.host, ours.base_url, ours.key) == (theirs.host, theirs.base_url, theirs.key)
        kind = self.first.endpoint == call.endpoint or not self.wire.one_model
        return same and kind and (ours.model == theirs.model or not self.wire.one_model)

    def add(self, task: Task, call: Call, body: bytes, path: str) -> str:
        """Take a call in; `""`, or the limit that it would be over.

        Raises:
            LLMConfigError: its key is that of another.
            LLMBudgetError: nothing says how long its answer may become.
        """
        custom_id = self.wire.custom_id(task.name)
        other = self.tasks.get(custom_id)
        if other is not None:
            raise LLMConfigError(
                f"items {other.place} and {task.place} have the same key {task.name!r:.80}: "
                "each needs its own"
            )
        if len(self.tasks) >= self.wire.most_requests:
            return f"{self.wire.most_requests:,} requests"
        piece = self.wire.piece(custom_id, path, body)
        size = self._size + len(piece) + (len(self.frame.between) if self.tasks else 0)
        if size > self.wire.most_bytes:
            return f"{self.wire.most_bytes // 1_000_000} MB"
        if self.budgets:
            self._reckon(call)
        if self.tasks:
            self._body.write(self.frame.between)
        self._body.write(piece)
        self._size = size
        self.tasks[custom_id] = task
        self.path = path
        if call.target.model != self.model:
            self.model = None
        return ""

    def _reckon(self, call: Call) -> None:
        provider = provider_of(call.target)
        request = WireRequest("POST", "", {}, None)
        most = provider.output_limit(call)
        job = Job(call, provider, request, 0.0, False, "off", self.lent.count(call), most)
        cost, tokens = worst_case(job, self.budgets, self.lent.prices, batch=True)
        self.cost = None if cost is None or self.cost is None else add(self.cost, cost)
        self.tokens = None if tokens is None or self.tokens is None else self.tokens + tokens

    def body(self) -> bytes:
        """All of it; it takes nothing in any more."""
        self._body.write(self.frame.closing)
        return self._body.getvalue()

    def account(self) -> _Account:
        """What is to be known of it later.

        Raises:
            LLMBudgetError: it does not fit.
        """
        names = {
            name: task.name for name, task in self.tasks.items() if self.wire.key(name) != task.name
        }
        account = _Account(where=where_of(self.how), model=self.model, keys=names)
        if self.budgets:
            account.reservation = reserve_all(self.budgets, self.cost, self.tokens, len(self.tasks))
        return account


class Batches:
    """The batch API of the client's provider; `llm.batches`.

    A batch is answered within a day, mostly at half the price. It lives at the provider: its id is all
    that another process needs to go on. Every method takes the id, or the `Batch` itself.

    What is not at the client's own provider is named as in a call: `model="anthropic/…"`, or `provider=`
    and `model=`. A client remembers it of the batches that it submitted.
    """

    def __init__(self, lent: Lent) -> None:
        self._lent = lent

    def submit(
        self,
        items: Iterable[Any],
        *,
        completion_window: str = "24h",
        metadata: Mapping[str, str] | None = None,
        **call: Any,
    ) -> Batch:
        """Send calls as one batch.

        Nothing is sent if one of them cannot be: it is looked at first, as are the provider's limits
        (OpenAI: 50,000 requests of one model, 200 MB; Anthropic: 100,000, 256 MB; 2026-11). Inside
        `with llm.budget(…)` the worst case of all is reserved, at the price of a batch; it is settled
        when the results were read by this client.

        Args:
            items: as `LLM.map` takes them: texts, lists of messages, mappings with `messages` or `prompt`,
                a `key` and fields of their own, or lines of OpenAI's batch format. One without a key is
                known by its place, from `"0"`.
            completion_window: within which OpenAI shall be done.
            metadata: up to 16 names and texts that OpenAI keeps with the batch; Anthropic has none.
            call: what all calls have in common, as `LLM.chat_completion` takes it; `timeout`, `deadline` and
                `extra_headers` are those of the submission.

        Returns:
            The batch; keep its `id`.

        Raises:
            LLMConfigError: an item, or all together, cannot be sent; says which and why.
            LLMBudgetError: the worst case does not fit.
            LLMError: the submission failed. With `maybe_billed` the batch may be there all the same: look
                at `list()` before it is submitted again.
        """
        draft: Draft | None = None
        for task in tasks(items, given=call):
            described, body, path, how = self._request(task, call)
            if draft is None:
                draft = Draft(self._lent, described, how)
            if not draft.belongs(described):
                raise LLMConfigError(
                    f"{named(task)} is for {described.target.model} at {described.target.base_url}, and a "
                    f"batch goes to {_bound(draft)}: submit them apart, or use map(…, via='batch')"
                )
            limit = draft.add(task, described, body, path)
            if limit:
                raise too_much(draft, task, limit)
        if draft is None:
            raise LLMConfigError("a batch needs at least one item")
        return self._send(draft, completion_window, metadata)

    def poll(self, batch: Batch | str, **where: Any) -> Batch:
        """How far a batch is.

        Args:
            batch: it, or its id.
            where: `model=` and `provider=` if it is not at the client's own; `timeout=`, `deadline=`.

        Raises:
            LLMNotFoundError: there is no such batch.
            LLMError: it cannot be said, after the retries that could help.
        """
        id_, call = self._about(batch, where)
        return self._ask(call, batch_wire(call.target).poll(call, id_))

    def wait(
        self,
        batch: Batch | str,
        *,
        interval: float | None = None,
        deadline: float | None = None,
        progress: Callable[[Batch], object] | None = None,
        **where: Any,
    ) -> Batch:
        """Look at a batch until it is over.

        A look that fails, though a later one may not, is made again: ten of them end the wait.

        Args:
            batch: it, or its id.
            interval: seconds between two looks; left out or `None`: 1 at first, then twice as long each time,
                up to 60.
            deadline: seconds for all of it; `None`: no limit. The batch goes on when it is over.
            progress: called with what each look saw.
            where: as `poll` takes it.

        Raises:
            LLMTimeoutError: it was not over by the deadline.
            LLMError: what the last look failed with.
        """
        clock = self._lent.clock
        until = None if deadline is None else clock.now() + deadline
        seconds, failed = FIRST_WAIT if interval is None else interval, 0
        where.pop("deadline", None)
        while True:
            left = None if until is None else until - clock.now()
            if left is not None and left <= 0:
                raise LLMTimeoutError(
                    f"batch {_id(batch)} was not over by the deadline; it goes on",
                    clock="deadline",
                )
            try:
                more = {} if left is None else {"deadline": left}
                seen = self.poll(batch, **where, **more)
                failed = 0
                if progress is not None:
                    progress(seen)
                if seen.done:
                    return seen
            except LLMError as error:
                if getattr(error, "clock", "") == "deadline" and (
                    until is None or clock.now() < until
                ):
                    raise  # that of a `with llm.deadline(…)` around
                failed = again(error, failed)
            now = clock.now()
            clock.sleep(seconds if until is None else min(seconds, max(0.0, until - now)))
            if interval is None:
                seconds = min(2 * seconds, LONGEST_WAIT)

    def cancel(self, batch: Batch | str, **where: Any) -> Batch:
        """End a batch; what was answered by then has results, and costs.

        Args:
            batch: it, or its id.
            where: as `poll` takes it.
        """
        id_, call = self._about(batch, where)
        return self._ask(call, batch_wire(call.target).cancel(call, id_))

    def list(self, *, limit: int | None = None, **where: Any) -> Iterator[Batch]:
        """The account's batches, the newest first, as far as the provider keeps them.

        Args:
            limit: at most so many; `None`: all.
            where: as `poll` takes it.
        """
        call = self._describe(where)
        wire = batch_wire(call.target)
        after: str | None = None
        left = limit
        while left is None or left > 0:
            said = self._say(call, wire.page(call, after))
            page = said.get("data")
            if not isinstance(page, list):
                raise LLMResponseError(f"{call.target.base_url} answered without a list of batches")
            for value in page:
                if left is not None:
                    if left <= 0:
                        return
                    left -= 1
                yield _as_batch(call, wire, value)
            after = page[-1].get("id") if page and said.get("has_more") else None
            if after is None:
                return

    def results(
        self, batch: Batch | str, *, keys: Iterable[str] = (), **where: Any
    ) -> BatchResults:
        """What came of a batch: a result for each request, as the provider's file is read, in any order.

        An item that failed, expired or was cancelled is a result with its error. The file may be read
        again; what its answers took is counted once by each client, at the price of a batch.

        Args:
            batch: it, or its id; it must be over.
            keys: those that were submitted, where another process did and the provider could not be given
                them as they are (Anthropic: longer than 42 bytes, with other signs than A-Z a-z 0-9 _ -).
            where: as `poll` takes it; `timeout` is that of a silence.

        Returns:
            An iterator of `MapResult`; its `keys` are those that came.

        Raises:
            LLMConfigError: the batch is not over.
            LLMInvalidRequestError: it failed as a whole; says why.
            LLMConnectionError: while it is read: the file broke off.
            LLMResponseError: a line is no result; after all that are.
        """
        where.setdefault("deadline", None)  # that of the config is meant for one call
        if not isinstance(batch, Batch) or not batch.done:
            batch = self.poll(batch, **where)
        if not batch.done:
            raise LLMConfigError(
                f"batch {batch.id} is {batch.status}: its results can be had once it is over; wait() waits"
            )
        _, call = self._about(batch, where)
        account = self._lent.memory.account(batch.id)
        wire = batch_wire(call.target)
        names = {wire.custom_id(key): key for key in keys}
        account.keys.update({name: key for name, key in names.items() if wire.key(name) != key})
        if batch.status == "failed":
            account.close()
            raise _failed(batch, call)
        came: dict[str, None] = {}
        return BatchResults(batch, came, self._results(batch, call, account, came))

    def _request(
        self, task: Task, common: Mapping[str, Any]
    ) -> tuple[Call, bytes, str, dict[str, Any]]:
        """A task's call, its body, the path that it would go to alone, and all its arguments.

        Raises:
            LLMConfigError: it cannot be sent in a batch.
        """
        if task.error is not None:
            raise task.error
        for name in _OF_THE_BATCH:
            if name in task.request:
                raise LLMConfigError(
                    f"{named(task)} has a {name} of its own: a batch has one for all of them"
                )
        how = {**common, **task.request}
        if "extra_body" in common and "extra_body" in task.request:
            how["extra_body"] = {**(common["extra_body"] or {}), **task.request["extra_body"]}
        fields = dict(how)
        if fields.pop("stream", False):
            raise LLMConfigError(f"{named(task)} is to be streamed, and a batch has no streams")
        try:
            call = self._lent.describe("chat", fields.pop("messages", None), fields)
            request = provider_of(call.target).build(call)
        except LLMConfigError as error:
            raise LLMConfigError(f"{named(task)}: {error}") from None
        return call, request.body or b"", batch_path(call, request), how

    def _send(
        self,
        draft: Draft,
        window: str = "24h",
        metadata: Mapping[str, str] | None = None,
        before: Callable[[str | None], object] = lambda _: None,
    ) -> Batch:
        """Reserve, upload, create; `before` is called when the next request makes the batch."""
        account = draft.account()
        try:
            batch = self._create(draft, window, metadata, before)
        except BaseException as error:
            if account.reservation is not None:
                if isinstance(error, LLMError) and not error.maybe_billed:
                    account.reservation.release()
                else:  # nobody knows whether the batch is there
                    account.reservation.settle(None, None)
            raise
        self._lent.memory.open(batch.id, account)
        return batch

    def _create(
        self,
        draft: Draft,
        window: str,
        metadata: Mapping[str, str] | None,
        before: Callable[[str | None], object],
    ) -> Batch:
        wire, call = draft.wire, self._describe(draft.how)
        body = draft.body()
        longer = len(body) / _SLOWEST_UPLOAD
        patient = call._replace(timeout=None if call.timeout is None else call.timeout + longer)
        request = wire.send(patient, body, draft.boundary)
        if not wire.uploads:
            before(None)
            return _as_batch(call, wire, self._say(patient, request, once=True))
        file = self._say(patient, request).get("id")
        if not isinstance(file, str):
            raise LLMResponseError(f"{call.target.base_url} took the file and told no id of it")
        before(file)
        create = wire.create(call, file, draft.path, window, metadata)
        return _as_batch(
            call,
            wire,
            self._say(call, create, once=True, instead=lambda: self._of_file(call, file)),
        )

    def _of_file(self, call: Call, file: str) -> dict[str, Any] | None:
        """The batch that was made of a file, if there is one among the newest."""
        page = self._say(call, batch_wire(call.target).page(call, None)).get("data")
        found = (b for b in page or () if isinstance(b, dict) and b.get("input_file_id") == file)
        return next(found, None)

    def _about(self, batch: Batch | str, where: Mapping[str, Any]) -> tuple[str, Call]:
        """The id of a batch, and a call to where it is."""
        id_ = _id(batch)
        known = self._lent.memory.account(id_).where
        return id_, self._describe({**known, **where})

    def _describe(self, how: Mapping[str, Any]) -> Call:
        """A call that asks the batch API itself."""
        kept = {name: how[name] for name in _WHERE if name in how}
        return self._lent.describe("batches", None, kept)

    def _ask(self, call: Call, request: WireRequest) -> Batch:
        return _as_batch(call, batch_wire(call.target), self._say(call, request))

    def _say(
        self,
        call: Call,
        request: WireRequest,
        *,
        once: bool = False,
        instead: Callable[[], dict[str, Any] | None] | None = None,
    ) -> dict[str, Any]:
        """What the API answers.

        Args:
            once: it must not happen twice: what may have been done is not tried again.
            instead: looks whether it was done; then it can be tried again.
        """
        lent = self._lent
        handler = exchange(lent.transport, lent.clock)
        if once:
            handler, request = _only_once(handler, instead), request._replace(once=True)
        try:
            value: dict[str, Any] = self._through(handler, call, request).answer.value
        except LLMError as error:
            found = instead() if instead is not None and error.maybe_billed else None
            if found is None:
                raise
            return found
        return value

    def _through(self, handler: Handler, call: Call, request: WireRequest) -> Any:
        """The answer to a request, through the layers that hold for every request."""
        lent = self._lent
        layers = [
            observe(lent.clock, lent.hooks, lent.prices, lambda *_: None),
            retry(lent.retries, lent.quota, lent.clock, lent.hooks),
        ]
        job = Job(call, _Speaker(provider_of(call.target)), request, lent.clock.now())
        return build_pipeline(handler, layers)(job)

    def _open(self, job: Job) -> _Download:
        """One attempt to get at a results file."""
        # Its size is bounded by its lines: it is never held as a whole.
        call = job.call._replace(stream=True, max_response_bytes=2**62)
        wire = self._lent.transport.open(job.request, call)
        if isinstance(wire, WireResponse):
            raise job.provider.error(job.call, wire)
        return _Download(wire, job.call, job.request)

    def _lines(self, call: Call, request: WireRequest) -> Iterator[bytes]:
        download = self._through(self._open, call, request)
        try:
            yield from download.lines()
        except LLMError as error:
            error.provider = error.provider or call.target.host.name
            raise
        finally:
            download.close()

    def _outcomes(
        self, batch: Batch, call: Call
    ) -> Generator[tuple[str | None, WireResponse | LLMAPIError], None, None]:
        """The lines of all its files, by custom id; `None` and an error for one that is no result."""
        wire = batch_wire(call.target)
        for request in wire.results(call, batch):
            for line in self._lines(call, request):
                try:
                    outcome = wire.outcome(call, line)
                except MALFORMED:
                    outcome = None
                if outcome is not None:
                    yield outcome
                    continue
                response = WireResponse(200, {"content-type": "application/jsonl"}, line)
                yield None, unexpected(call, response, "a line that is no result of a batch")

    def _results(
        self, batch: Batch, call: Call, account: _Account, came: dict[str, None]
    ) -> Generator[MapResult, None, None]:
        wire = batch_wire(call.target)
        spoiled, problem = 0, None
        for custom_id, outcome in self._outcomes(batch, call):
            if custom_id is None:
                spoiled, problem = spoiled + 1, problem or outcome
                continue
            key = account.keys.get(custom_id)
            if key is None:
                try:
                    key = wire.key(custom_id)
                except ValueError:  # not of our making
                    key = custom_id
            if key in came:
                continue  # said twice; the first counts
            result = self._result(len(came), key, outcome, call, account)
            came[key] = None
            yield result
        total = batch.counts.total if batch.counts is not None else 0
        if isinstance(problem, LLMResponseError) and (len(came) < total or not total):
            if (
                not came or len(came) + spoiled != total
            ):  # a page in its place, or a file that was cut
                raise problem
            account.close()
            raise Spoiled(
                f"batch {batch.id}: of its {total:,} results {spoiled:,} cannot be read: {problem}",
                body=problem.body,
                provider=batch.provider,
            )
        if batch.status == "completed" and len(came) < total:
            raise Incomplete(
                f"batch {batch.id} has {total:,} results, and only {len(came):,} came; read them again"
            )
        account.close()

    def _first_key(
        self, batch: Batch, keys: Iterable[str], where: Mapping[str, Any], interval: float | None
    ) -> str | None:
        """Which of these keys the first result of a batch is for, once it is over; `None`: another's."""
        over = self.wait(batch, interval=interval, **where)
        _, call = self._about(over, where)
        names = {batch_wire(call.target).custom_id(key): key for key in keys}
        with closing(self._outcomes(over, call)) as outcomes:
            found = (custom_id for custom_id, _ in outcomes if custom_id is not None)
            return next((names.get(custom_id) for custom_id in found), None)

    def _result(
        self,
        index: int,
        key: str,
        outcome: WireResponse | LLMAPIError,
        call: Call,
        account: _Account,
    ) -> MapResult:
        target = call.target
        answer: Any = None
        error: LLMError | None = None
        if isinstance(outcome, LLMAPIError):
            error = outcome
        else:
            job = Job(call._replace(endpoint="chat"), provider_of(target), _NOTHING, 0.0)
            try:
                answer = parse_answer(job, outcome).answer
            except LLMError as failure:
                error = failure
        if error is not None:
            error.model = account.model
            # What was not answered is free; an answer that nobody understands is not.
            known = not error.maybe_billed
            account.count(key, ZERO if known else None, 0 if known else None)
            return MapResult(index=index, key=key, item=None, response=None, error=error)
        info: CallInfo = answer.info
        info.model = account.model or answer.model or target.model
        info.prices = _BatchPrices(self._lent.prices)
        info.request_id = info.request_id or None
        total = answer.usage.total_tokens if answer.usage is not None else None
        if account.count(key, answer.cost, total):
            self._lent.record(info, answer.usage)
        return MapResult(index=index, key=key, item=None, response=answer, error=None)


# What of a call's arguments says where the batch API is, and how long it may take.
_WHERE = ("model", "provider", "timeout", "deadline", "extra_headers")
_NOTHING = WireRequest("GET", "", {}, None)


def where_of(how: Mapping[str, Any]) -> dict[str, Any]:
    return {name: how[name] for name in ("model", "provider") if how.get(name) is not None}


def _only_once(handler: Handler, instead: Callable[[], dict[str, Any] | None] | None) -> Handler:
    """A handler of what must not happen twice."""
    unsure = False

    def guarded(job: Job) -> Any:
        nonlocal unsure
        if unsure and instead is not None:
            found = instead()
            if found is not None:
                return Done(_Said(value=found), 200, {})
        try:
            return handler(job)
        except LLMError as error:
            # Answers of a gateway too: what stands behind it may have gone on.
            status = getattr(error, "status_code", None)
            unsure = error.maybe_billed or status in (500, 502, 504)
            error.maybe_billed = unsure
            if unsure and instead is None:
                error.retriable = False
                told = "the batch may have been made all the same; look at batches.list() before"
                error.args = (f"{error}: {told} it is submitted again",)
            raise

    return guarded


def _as_batch(call: Call, wire: BatchWire, value: Any) -> Batch:
    try:
        return wire.batch(call, value)
    except MALFORMED:
        pass
    response = WireResponse(200, {"content-type": "application/json"}, b"{}")
    raise unexpected(call, response, "not a batch")


def _id(batch: Batch | str) -> str:
    return batch.id if isinstance(batch, Batch) else batch


def again(error: LLMError, failed: int) -> int:
    """Count a look that failed; raises it if another would be of no use."""
    if not error.retriable or failed + 1 >= _PATIENCE:
        raise error
    log.warning("a look at a batch failed, and is made again: %s", error)
    return failed + 1


def _failed(batch: Batch, call: Call) -> LLMInvalidRequestError:
    why = batch.problem or "the provider did not say why"
    return LLMInvalidRequestError(
        f"batch {batch.id} failed, and none of it was run: {why}",
        code="batch_failed",
        provider=batch.provider,
        model=call.target.model,
    )


def named(task: Task) -> str:
    return f"item {task.place}" + ("" if task.key is None else f" ({task.key!r:.60})")


def too_much(draft: Draft, task: Task, limit: str) -> LLMConfigError:
    return LLMConfigError(
        f"a batch of {draft.first.target.host.name} holds {limit}, and {named(task)} is over it: submit "
        "several, or use map(…, via='batch'), which divides them"
    )


def _bound(draft: Draft) -> str:
    target = draft.first.target
    return f"{target.model} at {target.base_url}" if draft.wire.one_model else target.base_url
