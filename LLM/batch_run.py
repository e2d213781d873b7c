"""Many calls through the provider's batch API, as many batches as it takes, over crashes and restarts."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Final, NamedTuple

from LLM.batch import MapResult, Task, _kept, _Resumed
from LLM.batches import (
    FIRST_WAIT,
    LONGEST_WAIT,
    Batches,
    Draft,
    Incomplete,
    Spoiled,
    again,
    too_much,
    where_of,
)
from LLM.errors import (
    LLMAPIError,
    LLMBudgetError,
    LLMConfigError,
    LLMError,
    LLMInvalidRequestError,
    LLMTimeoutError,
)
from LLM.journal import Journal, JournalError
from LLM.providers.batches import Batch
from LLM.types import ChatCompletionResponse

# How far the provider's clock may be from ours when a batch is looked for by its time.
_CLOCKS_APART = timedelta(minutes=5)

# Reads of a file that lacks results, until it is believed that they do not come.
_READS: Final = 5

# By what an item is told from all others: its place if it has no key of its own, which `"0"` may be too.
_Known = int | str


@dataclass
class _Sent:
    """A batch of a run that is under way.

    Attributes:
        token: what the journal calls it.
        tasks: those without a result, by key.
        missed: how many looks at it failed, one after the other.
        unread: how many reads of its results broke off, without any that is new.
    """

    token: str
    tasks: dict[str, Task] = field(default_factory=dict)
    missed: int = 0
    unread: int = 0


class _Sending(NamedTuple):
    """What the journal says of a batch that a run was about to make.

    Attributes:
        file: the id of its input; `None`: it had none.
        since: before this it was not made.
        items: of each, what it is known by, and the hash of its content.
        where: what says where the batch is, as `Batches.poll` takes it.
    """

    file: str | None
    since: datetime
    items: dict[_Known, int]
    where: dict[str, Any]


class BatchRun:
    """Results of asking for each task through the provider's batches; the engine of `map(via="batch")`.

    It divides the tasks into batches under the provider's limits (those for another model apart), and looks
    after a few of them at a time. Their ids are in the journal: another run with the same journal goes on
    with the batches that are there, and pays nothing twice. Without a journal, closing it cancels them.

    Args:
        batches: where they are submitted.
        source: the tasks; taken as batches are filled.
        call: what all of them have in common, as `chat_completion` takes it.
        ordered: in the order of the tasks, which holds the answers of a batch or two in memory; else as
            they stand in the provider's files.
        journal: where finished tasks are written down, and found again. It is closed with the run.
        interval: seconds between two looks; `None`: 1 at first, then twice as long each time, up to 60.
        under_way: batches at a time.
        ends_at: the clock's time after which it ends with `LLMTimeoutError`; `None`: there is none.
        completion_window: as `Batches.submit` takes it.
        metadata: likewise.
    """

    def __init__(
        self,
        batches: Batches,
        source: Iterable[Task],
        call: Mapping[str, Any],
        *,
        ordered: bool = True,
        journal: Journal | None = None,
        interval: float | None = None,
        under_way: int = 2,
        ends_at: float | None = None,
        completion_window: str = "24h",
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self._batches = batches
        self._lent = batches._lent  # noqa: SLF001 - a run is a part of them
        self._source = iter(source)
        self._journal = journal
        self._interval = interval
        self._most = under_way
        self._ends_at = ends_at
        self._window, self._metadata = completion_window, metadata
        self._call = call
        self._sent: dict[str, _Sent] = {}  # by id
        # Of the items to be met that a batch of before holds: its id, and the hash of their content.
        self._expected: dict[_Known, tuple[str, int]] = {}
        self._drafts: list[Draft] = []
        self._refused: list[Draft] = []  # by the budget, while others are under way
        self._exhausted = False
        self._failure: Exception | None = None  # nothing more is sent
        self._raised: Exception | None = None  # by the items: what was taken before is sent
        self._closed = False
        self._results = _in_order(self._run()) if ordered else self._run()

    def __iter__(self) -> Iterator[MapResult]:
        return self

    def __next__(self) -> MapResult:
        try:
            return next(self._results)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Take no more; the batches go on if a journal knows of them, else they are cancelled."""
        if self._closed:
            return
        self._closed = True
        try:
            self._results.close()
        finally:  # also after a second Ctrl-C
            if self._journal is not None:
                self._journal.close()
        if self._journal is not None:
            return
        for id_ in self._sent:
            with suppress(LLMError):
                self._batches.cancel(id_)

    def _run(self) -> Generator[MapResult, None, None]:
        if self._journal is not None:
            self._go_on(self._journal)
        wait = first = FIRST_WAIT if self._interval is None else self._interval
        while True:
            yield from self._fill()
            if not self._sent:
                break
            before = len(self._sent)
            for id_ in list(self._sent):
                batch = self._look(id_)
                if batch is not None:
                    yield from self._read(batch)
            if len(self._sent) < before:
                wait = first
                continue
            self._sleep(wait)
            if self._interval is None:
                wait = min(2 * wait, LONGEST_WAIT)
        failure = self._failure or self._raised
        if failure is not None:
            raise failure

    def _fill(self) -> Iterator[MapResult]:
        """Take tasks and send batches, as many as may be under way; hand out what need not be asked."""
        refused, self._refused = self._refused, []
        for draft in refused:
            self._submit(draft)
        while self._failure is None and not self._exhausted:
            # Those that a batch of before holds must be met, before its results are read.
            if len(self._sent) + len(self._refused) >= self._most and not self._expected:
                return
            try:
                task = next(self._source, None)
            except Exception as error:  # noqa: BLE001 - raised when what was taken before is handed out
                self._raised, task = error, None
            if task is None:
                self._exhausted = True
                drafts, self._drafts = self._drafts, []
                for draft in drafts:
                    self._submit(draft)
                return
            result = self._take(task)
            if result is not None:
                yield result

    def _take(self, task: Task) -> MapResult | None:
        """Put a task into a batch; its result, if there is one already."""
        if task.error is not None:
            return task.result(None, task.error)
        known = _known(task)
        id_, content = self._expected.pop(known, (None, 0))
        line = None if self._journal is None else self._journal.find(task.mark)
        if line is not None and self._journal is not None:
            if id_ is not None:
                self._lent.memory.account(id_).skip(task.name)
            return _Resumed(task, line, self._journal.path)
        if id_ is not None:
            mark = task.mark
            if mark.hash != content:
                self._expected[known] = id_, content  # what the batch answers is not thrown away
                path = "" if self._journal is None else self._journal.path
                raise JournalError(
                    f"{mark.name} is not what it was when batch {id_} of {path} was sent: restore it, "
                    "give it another key, or choose another journal",
                    path=path,
                )
            self._sent[id_].tasks[task.name] = task
            return None
        try:
            call, body, path, how = self._batches._request(task, self._call)  # noqa: SLF001 - as above
        except LLMConfigError as error:
            return task.result(None, error)
        draft = next((known for known in self._drafts if known.belongs(call)), None)
        if draft is not None and draft.add(task, call, body, path):
            self._drafts.remove(draft)
            self._submit(draft)
        elif draft is not None:
            return None
        draft = Draft(self._lent, call, how)
        limit = draft.add(task, call, body, path)
        if limit:
            return task.result(None, too_much(draft, task, limit))
        self._drafts.append(draft)
        return None

    def _submit(self, draft: Draft) -> None:
        """Send a batch; a failure ends the run, once what is under way was handed out."""
        token = self._lent.clock.new_id()
        keys = {task.name: task for task in draft.tasks.values()}

        def before(file: str | None) -> None:
            at = self._lent.clock.utc().isoformat()
            where = where_of(draft.how)
            items = [[_known(task), f"{task.mark.hash:016x}"] for task in keys.values()]
            self._note(sending=token, file=file, at=at, items=items, where=where)

        if self._failure is not None:
            return
        try:
            batch = self._batches._send(draft, self._window, self._metadata, before)  # noqa: SLF001 - as above
        except LLMBudgetError as error:
            if self._sent:  # they hold the worst case, and give most of it back
                self._refused.append(draft)
            else:
                self._failure = error
        except LLMError as error:
            self._failure = error
            if not error.maybe_billed:
                self._note(refused=token)
        else:
            self._note(batch=batch.id, sending=token)
            self._sent[batch.id] = _Sent(token, keys)

    def _note(self, **what: Any) -> None:
        if self._journal is not None:
            self._journal.note({"batches": what})

    def _go_on(self, journal: Journal) -> None:
        """Find the batches of an earlier run that are not read to their end."""
        try:
            sending, made = _noted(journal.notes)
        except (KeyError, ValueError, TypeError, AttributeError, OverflowError) as error:
            raise JournalError(
                f"{journal.path} has a damaged line about its batches: restore the file, or choose "
                "another path for the journal",
                path=journal.path,
            ) from error
        ids = set(made.values())
        for token, what in sending.items():
            id_ = made.get(token) or self._find(what, ids)
            if id_ is None:
                continue
            if token not in made:
                ids.add(id_)
                self._note(batch=id_, sending=token)
            self._lent.memory.account(id_).where.update(what.where)
            self._sent[id_] = _Sent(token)
            self._expected.update({known: (id_, content) for known, content in what.items.items()})

    def _find(self, what: _Sending, known: set[str]) -> str | None:
        """The batch that a run was about to make when it died; `None` if it did not come to that."""
        keys = set(map(str, what.items))
        for batch in self._batches.list(**what.where):
            if batch.created is not None and batch.created < what.since:
                break
            if what.file is not None:
                if batch.raw.get("input_file_id") == what.file:
                    return batch.id
            elif (
                batch.id not in known
                and batch.counts is not None
                and batch.counts.total == len(keys)
                and self._batches._first_key(batch, keys, what.where, self._interval) in keys  # noqa: SLF001 - as above
            ):
                return batch.id
        return None

    def _look(self, id_: str) -> Batch | None:
        """A batch that is over, else `None`."""
        until, sent = self._until(), self._sent[id_]
        try:
            batch = self._batches.poll(id_, **until)
        except LLMError as error:
            sent.missed = again(error, sent.missed)
            return None
        sent.missed = 0
        return batch if batch.done else None

    def _read(self, batch: Batch) -> Iterator[MapResult]:
        """What came of a batch."""
        until, sent = self._until(), self._sent[batch.id]
        failure: LLMError | None = None
        try:
            with self._batches.results(batch, keys=sent.tasks, **until) as results:
                for found in results:
                    task = sent.tasks.pop(found.key, None)
                    if task is not None:
                        sent.unread = 0
                        yield self._finished(task, found.response, found.error)
        except (LLMInvalidRequestError, Spoiled) as error:
            failure = error  # of those that did not come
        except LLMError as error:
            # The next look reads it again; what came is not handed out twice.
            if not isinstance(error, Incomplete) or sent.unread + 1 < _READS:
                sent.unread = again(error, sent.unread)
                return
        while sent.tasks:
            task = sent.tasks.pop(next(iter(sent.tasks)))
            yield self._finished(task, None, failure or _without_result(batch))
        # Results of items that were not met, for these ended early, are there for the next run.
        if all(id_ != batch.id for id_, _ in self._expected.values()):
            self._note(read=sent.token)
        del self._sent[batch.id]

    def _finished(
        self, task: Task, response: ChatCompletionResponse | None, error: LLMError | None
    ) -> MapResult:
        """A result that is in the journal."""
        result = task.result(response, error)
        if self._journal is not None:
            self._journal.add(task.mark, ok=error is None, fields=_kept(result))
        return result

    def _until(self) -> dict[str, float]:
        """The deadline of one request."""
        if self._ends_at is None:
            return {}
        left = self._ends_at - self._lent.clock.now()
        if left <= 0:
            raise LLMTimeoutError("the deadline of the map has passed", clock="deadline")
        return {"deadline": left}

    def _sleep(self, seconds: float) -> None:
        self._lent.clock.sleep(min([seconds, *self._until().values()]))


def _known(task: Task) -> _Known:
    return task.place if task.key is None else task.key


def _noted(notes: Iterable[Any]) -> tuple[dict[str, _Sending], dict[str, str]]:
    """Of an earlier run: the batches that are not read to their end, and the ids of those made, by token.

    Raises:
        KeyError, ValueError, TypeError, AttributeError, OverflowError: a note is not as it was written.
    """
    sending: dict[str, _Sending] = {}
    made: dict[str, str] = {}
    for note in notes:
        what = note.get("batches") if isinstance(note, dict) else None
        if what is None:
            continue
        if "items" in what:
            items = {known: int(content, 16) for known, content in what["items"]}
            sending[what["sending"]] = _Sending(
                what["file"],
                datetime.fromisoformat(what["at"]).astimezone() - _CLOCKS_APART,
                items,
                dict(what["where"]),
            )
        elif "batch" in what:
            made[str(what["sending"])] = str(what["batch"])
        else:
            sending.pop(what["refused"] if "refused" in what else what["read"], None)
    return sending, made


def _without_result(batch: Batch) -> LLMAPIError:
    return LLMAPIError(
        f"batch {batch.id} is {batch.status}, and has no result for this item",
        code=f"batch_{batch.status}",
        provider=batch.provider,
        retriable=batch.status == "expired",
    )


def _in_order(results: Generator[MapResult, None, None]) -> Generator[MapResult, None, None]:
    """The same, by their places from 0. What comes after a place that never does, at the end."""
    waiting: dict[int, MapResult] = {}
    place = 0
    failure: Exception | None = None
    try:
        for result in results:
            waiting[result.index] = result
            while place in waiting:
                yield waiting.pop(place)
                place += 1
    except Exception as error:  # noqa: BLE001 - raised below, once what is there was handed out
        failure = error
    finally:
        results.close()
    for index in sorted(waiting):
        yield waiting[index]
    if failure is not None:
        raise failure
