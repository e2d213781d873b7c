"""The answers that are being written: each in a thread of its own, stored turn by turn, never asked twice."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from contextvars import copy_context
from decimal import Decimal
from functools import partial
from typing import Any, Final, Literal, NamedTuple, Protocol

from agents.agent import Agent, Cancel
from agents.service.feed import Feed, Pulse
from agents.service.leases import BusyError, Leases
from agents.service.logs import request_id
from agents.service.metrics import Metrics
from agents.service.problems import Problem, problem_of
from agents.service.talks import Checkpoint, Talks
from agents.service.views import message_view, money, total_of, usage_view
from agents.store import RepeatedError, Stored, StoreError, Summary
from agents.tools import Toolbox
from agents.types import AgentCancelledError, AgentEvent, Message, TokenUsage, Turn
from LLM import LLM, Clock, LLMCancelledError, LLMError

log = logging.getLogger("agents.service")

Status = Literal["ok", "partial", "error"]

# Seconds between two signs of life of the answers under way, which carry the text so far to the
# database: of a process that is killed no more than this is lost.
BEAT: Final = 2.0

# Seconds between two looks for answers whose process is gone.
_MEND_EVERY: Final = 10.0

# Seconds for which an answer that is there waits for a database that is not.
KEEP_TRYING: Final = 120.0

# Begins the name of a write that a caller's key for `regenerate` stands for.
_AGAIN: Final = "again:"

_BROKEN: Final = Problem(500, "Internal error", "tell those who run this service")

_STOP_SECONDS: Final = 10.0  # for threads that were cancelled to store what they have


class Event(NamedTuple):
    """One event of an answer: its name, and its data for JSON."""

    name: str
    data: dict[str, Any]

    def encode(self) -> bytes:
        """As a server-sent event."""
        return f"event: {self.name}\ndata: {json.dumps(self.data)}\n\n".encode()


class Asking(Protocol):
    """Gives the client to ask, held to the budgets of a caller and of a conversation."""

    def __call__(
        self, caller: Any, model: str, conversation: str | None = None
    ) -> AbstractContextManager[LLM]: ...


class RecordingNow(Protocol):
    """Writes down what an answer took, in the transaction of who calls it."""

    def __call__(
        self, owner: str, model: str | None, usage: TokenUsage | None, cost: Decimal | None
    ) -> None: ...


class Recording(Protocol):
    """Writes down what an answer took."""

    def __call__(
        self,
        owner: str,
        model: str | None,
        usage: TokenUsage | None,
        cost: Decimal | None,
        *,
        complete: bool = True,
    ) -> None: ...


class Threads:
    """Threads for answers, not more than so many at once."""

    def __init__(self, most: int, clock: Clock) -> None:
        self._most = most
        self._clock = clock
        self._lock = threading.Lock()
        self._threads: set[threading.Thread] = set()

    def __len__(self) -> int:
        return len(self._threads)

    def check(self) -> None:
        """Refuse what would be one too many, before anything is stored.

        Raises:
            Problem: 503.
        """
        if len(self._threads) >= self._most:
            raise _too_many(self._most)

    def start(self, work: Callable[[], object]) -> None:
        """Run it in a thread, with the context of the caller.

        Raises:
            Problem: 503: there are too many.
        """
        context = copy_context()

        def run() -> None:
            try:
                context.run(work)
            finally:
                with self._lock:
                    self._threads.discard(thread)

        thread = threading.Thread(target=run, name="answer", daemon=True)
        with self._lock:
            if len(self._threads) >= self._most:
                raise _too_many(self._most)
            self._threads.add(thread)
        try:
            thread.start()
        except BaseException:  # the machine has no more
            with self._lock:
                self._threads.discard(thread)
            raise

    def join(self, seconds: float) -> None:
        """Wait for those that run, so long in all; they have been told to end."""
        end = self._clock.now() + seconds
        for thread in list(self._threads):
            thread.join(max(0.0, end - self._clock.now()))


class Answer:
    """One answer under way.

    Attributes:
        token: its name in the lease.
        request: the caller's name for it; `None`: none.
        feed: its events.
        cancel: ends it.
        history: the conversation that it answers.
        replacing: number of the first message whose place it takes; `None`: none.
        stored: what it has come to.
        leased: whether it has the conversation for itself.
    """

    def __init__(
        self,
        conversation: Summary,
        caller: Any,
        model: str,
        *,
        token: str,
        loop: asyncio.AbstractEventLoop,
        pulse: Pulse,
        request: str | None,
    ) -> None:
        self.id = conversation.id
        self.system = conversation.data.get("system")
        self.revision = conversation.revision
        self.caller = caller
        self.model = model
        self.token = token
        self.request = request
        self.cancel = Cancel()
        self.feed: Feed[Event] = Feed(loop, self.cancel.cancel, pulse)
        self.history: Sequence[Stored] = ()
        self.replacing: int | None = None
        self.stored: list[Stored] = []
        self.status: Status = "ok"
        self.leased = False
        self._lock = threading.Lock()
        self._pieces: list[str] = []
        self._kept = 0
        self._last = ""

    def say(self, event: str, /, **data: Any) -> None:
        """An event for those who read; words after the first one may wait for the next beat."""
        self.feed.put(Event(event, data), urgent=event != self._last)
        self._last = event if event in ("text", "reasoning") else ""

    def tell(self, problem: Problem) -> None:
        """An error for those who read."""
        self.status = "error"
        self.say("error", **problem.body(request_id.get()))

    def heard(self, text: str) -> None:
        """A piece of text that is not stored yet."""
        with self._lock:
            self._pieces.append(text)

    @property
    def text(self) -> str:
        """What is not stored yet."""
        return "".join(self._pieces)

    def checkpoint(self) -> Checkpoint:
        """What another process needs to store if this one is gone."""
        with self._lock:
            return Checkpoint(self.text, self.name, self.model, self.replacing)

    @property
    def name(self) -> str:
        """Of the next write, by which it is known when it is tried again, also by another process."""
        if self.request is not None and self.request.startswith(_AGAIN) and not self._kept:
            return self.request
        return f"answer:{self.token}:{self._kept + 1}"

    def kept(self, revision: int, new: list[Stored]) -> None:
        """The next write came through."""
        with self._lock:
            self._kept += 1
            self._pieces.clear()
            self.replacing = None
        self.revision = revision
        self.stored += new

    def end(self) -> None:
        """The last event."""
        usage, cost = total_of(self.stored) if self.stored else (None, None)
        self.say(
            "done",
            status=self.status,
            usage=_tokens(usage),
            cost=money(cost),
            revision=self.revision,
        )
        self.feed.finish()


class Answers:
    """All answers of this process.

    Args:
        talks: where conversations are.
        leases: which conversations are being answered, in any process.
        asking: gives the client, held to budgets.
        record: writes down what an answer took that is not stored.
        record_now: the same of one that is, with its messages.
        flush: writes down what could not be written before.
        toolbox: the tools that the model may call.
        context: gets a conversation's id, a model and the messages, and gives those that fit its window.
        call: what each call of the model takes: `max_tokens=`, `temperature=` …
        max_turns: calls of the model in one answer.
        threads: what answers run in.
        pulse: wakes those who read.
        metrics: told of each answer.
    """

    def __init__(
        self,
        talks: Talks,
        leases: Leases,
        *,
        asking: Asking,
        record: Recording,
        record_now: RecordingNow,
        flush: Callable[[], object],
        toolbox: Toolbox,
        context: Callable[[str, str, list[Message]], list[Message]],
        call: dict[str, Any],
        max_turns: int,
        threads: Threads,
        pulse: Pulse,
        metrics: Metrics,
        clock: Clock,
    ) -> None:
        self._talks = talks
        self._leases = leases
        self._asking = asking
        self._record = record
        self._record_now = record_now
        self._flush = flush
        self._toolbox = toolbox
        self._context = context
        self._call = call
        self._max_turns = max_turns
        self._threads = threads
        self._pulse = pulse
        self._metrics = metrics
        self._clock = clock
        self._running: dict[str, Answer] = {}
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._beating: threading.Thread | None = None
        self._mend_at = float("-inf")

    def begin(self) -> None:
        """Store what answers of processes that are gone had come to, and watch over new ones."""
        self._beating = threading.Thread(target=self._beat, name="answers", daemon=True)
        self._beating.start()

    def cancel_all(self) -> None:
        """Tell all to end: what they have is stored, marked as partial."""
        for answer in list(self._running.values()):
            answer.cancel.cancel()

    def stop(self) -> None:
        """End all, and wait until they have stored what they have."""
        self._stopping.set()
        self.cancel_all()
        self._threads.join(_STOP_SECONDS)
        if self._beating is not None:
            self._beating.join(_STOP_SECONDS)

    def say(
        self,
        caller: Any,
        conversation: Summary,
        content: Any,
        *,
        model: str,
        request: str | None,
        loop: asyncio.AbstractEventLoop,
    ) -> Answer:
        """Store what the user says, then answer it.

        Args:
            request: the caller's name for it (`Idempotency-Key`): said again, it is not asked again.
            loop: where the events are read.

        Raises:
            Problem: 409 while another answer is written there, 422 if the name was another message's, 503
                if there are too many.
            StoreError: it could not be stored; nothing was asked.
        """
        name = None if request is None else f"user:{request}"
        answer = self._made(caller, conversation, model, name, loop)
        if name is not None:
            running = self._joined(conversation.id, name)
            if running is not None:
                return running
            number = self._talks.find(conversation.id, name)
            if number is not None:
                return self._again(answer, number, content)
        with self._taking(answer):
            said = Message(role="user", content=content)
            stored = self._begin(answer, said, name or f"user:{answer.token}")
            _check_same(stored[-1], content)
            answer.say("message", **_dumped(stored[-1]))
            answer.history = stored
            return self._start(answer)

    def regenerate(
        self,
        caller: Any,
        conversation: Summary,
        *,
        model: str,
        loop: asyncio.AbstractEventLoop,
        request: str | None = None,
    ) -> Answer:
        """Answer the last message of the user anew; the answer of before is kept, and shown no more.

        Raises:
            Problem: 409 while another answer is written there, or if nothing was said yet.
        """
        name = None if request is None else f"{_AGAIN}{request}"
        answer = self._made(caller, conversation, model, name, loop)
        if name is not None:
            running = self._joined(conversation.id, name)
            if running is not None:
                return running
            number = self._talks.find(conversation.id, name)
            if number is not None:
                stored = self._talks.load(conversation.id)
                new = _until_user([s for s in stored if s.number >= number])
                if not new or new[0].number != number:
                    raise _replaced()
                return self._told(answer, new)
        with self._taking(answer):
            before, after = _split(self._begin(answer))
            if not before:
                raise Problem(409, "Nothing to answer", "the user has said nothing yet")
            answer.replacing = after[0].number if after else None
            answer.history = before
            return self._start(answer)

    def cancel(self, conversation: str) -> bool:
        """Stop the answer that is written there, in whichever process; whether there was one."""
        running = self._running.get(conversation)
        if running is not None:
            running.cancel.cancel()
            return True
        return self._leases.cancel(conversation)

    def _joined(self, conversation: str, name: str) -> Answer | None:
        running = self._running.get(conversation)
        return running if running is not None and running.request == name else None

    def _again(self, answer: Answer, number: int, content: Any) -> Answer:
        """What came of a message that was sent before: the same again; if it broke off, it goes on now."""
        stored = self._talks.load(answer.id)
        at = next((n for n, s in enumerate(stored) if s.number == number), None)
        if at is None:
            raise _replaced()
        _check_same(stored[at], content)
        new = _until_user(stored[at + 1 :])
        if at + 1 + len(new) < len(stored) or (new and _is_end(new[-1])):
            answer.say("message", **_dumped(stored[at]))
            return self._told(answer, new)
        with self._taking(answer):
            if self._begin(answer) != stored:  # an answer came meanwhile
                raise _under_way()
            answer.say("message", **_dumped(stored[at]))
            self._tell_turn(answer, list(new))
            answer.stored = list(new)
            answer.history = stored
            return self._start(answer)

    def _told(self, answer: Answer, new: Sequence[Stored]) -> Answer:
        """An answer that is there already."""
        self._tell_turn(answer, list(new))
        answer.stored = list(new)
        whole = bool(new) and all(s.status == "ok" for s in new) and _is_end(new[-1])
        answer.status = "ok" if whole else "partial" if new else "error"
        answer.end()
        return answer

    def _made(
        self,
        caller: Any,
        conversation: Summary,
        model: str,
        request: str | None,
        loop: asyncio.AbstractEventLoop,
    ) -> Answer:
        token = self._clock.new_id()
        return Answer(
            conversation,
            caller,
            model,
            token=token,
            loop=loop,
            pulse=self._pulse,
            request=request,
        )

    @contextmanager
    def _taking(self, answer: Answer) -> Iterator[None]:
        """Make it the one answer of its conversation in this process, unless the block fails."""
        if self._stopping.is_set():
            raise Problem(503, "Stopping", "try again in a moment", headers={"retry-after": "2"})
        self._threads.check()
        with self._lock:
            if answer.id in self._running:
                raise _under_way()
            self._running[answer.id] = answer
        try:
            yield
        except BaseException as error:
            self._give_back(answer)
            # Others may read along already.
            if isinstance(error, LLMError):
                answer.tell(problem_of(error))
            else:
                answer.tell(error if isinstance(error, Problem) else _BROKEN)
            answer.end()
            raise

    def _begin(self, answer: Answer, said: Message | None = None, name: str = "") -> list[Stored]:
        """Take the conversation from all processes, and store what the user says."""
        try:
            stored = self._talks.begin(answer.id, answer.token, said, name)
        except (BusyError, RepeatedError):  # another one answers it, or just has
            raise _under_way() from None
        answer.leased = True
        return stored

    def _give_back(self, answer: Answer) -> None:
        leased, answer.leased = answer.leased, False
        if leased:
            with suppress(LLMError):  # it goes stale by itself
                self._leases.release(answer.token)
        with self._lock:
            if self._running.get(answer.id) is answer:
                del self._running[answer.id]

    def _start(self, answer: Answer) -> Answer:
        first = [Message(role="system", content=answer.system)] if answer.system else []
        messages = [*first, *(stored.message for stored in answer.history)]
        self._threads.start(lambda: self._write(answer, messages))
        return answer

    def _write(self, answer: Answer, messages: list[Message]) -> None:
        """The thread of an answer."""
        started = self._clock.now()
        self._metrics.answer_began()
        try:
            with self._asking(answer.caller, answer.model, answer.id) as llm:
                prompt = self._context(answer.id, answer.model, messages)
                agent = Agent(
                    llm,
                    tools=self._toolbox,
                    max_turns=self._max_turns,
                    clock=self._clock,
                    model=answer.model,
                    **self._call,
                )
                events = agent.stream(prompt, cancel=answer.cancel)
                for number, event in enumerate(events):
                    if not number:
                        self._metrics.first_token(self._clock.now() - started)
                    self._tell(answer, event)
        except LLMError as error:
            self._broken(answer, error)
        except Exception:
            log.exception("an answer failed")
            answer.tell(_BROKEN)
        finally:
            self._give_back(answer)
            self._metrics.answer_ended(answer.status, *total_of(answer.stored))
            answer.end()

    def _tell(self, answer: Answer, event: AgentEvent) -> None:
        if event.type == "text":
            answer.heard(event.text)
            answer.say("text", text=event.text)
        elif event.type == "reasoning":
            answer.say("reasoning", text=event.text)
        elif event.tool_call is not None:
            call = event.tool_call
            answer.say("tool_call", id=call.id, name=call.name, arguments=call.arguments)
        elif event.tool_result is not None:
            result = event.tool_result
            answer.say(
                "tool_result",
                id=result.call.id,
                name=result.call.name,
                content=result.content,
                outcome=result.outcome,
                seconds=round(result.seconds, 6),
            )
        elif event.turn is not None:
            self._turn(answer, event.turn)
        elif event.result is not None and event.result.paused:
            names = ", ".join(sorted({waiting.call.name for waiting in event.result.pending}))
            detail = (
                f"{names}: a person must decide, and cannot here: choose tools that need nobody"
            )
            answer.tell(Problem(422, "A tool waits for a person", detail))

    def _turn(self, answer: Answer, turn: Turn) -> None:
        response = turn.response
        usage = None if response.cached else response.usage
        cost = response.cost
        said = Message.model_validate(response.choices[0].message.model_dump(exclude_none=True))
        model = response.model or answer.model
        new = [
            Stored(said, usage, cost, model),
            *(Stored(result.message) for result in turn.results),
        ]
        spent = (answer.caller.owner, answer.model, usage, cost)
        try:
            # In one transaction, so that what is told of a day is what its messages say.
            spend = partial(self._record_now, *spent)
            kept = self._keep(answer, new, last=not turn.results, also=spend)
        except StoreError:  # it was paid for all the same
            self._record(*spent)
            raise
        self._tell_turn(answer, kept)

    def _keep(
        self,
        answer: Answer,
        messages: Sequence[Stored],
        *,
        last: bool,
        also: Callable[[], object] | None = None,
    ) -> list[Stored]:
        """Store messages of an answer, also if the database is away for a while."""
        end, wait = self._clock.now() + KEEP_TRYING, 0.1
        while True:
            try:
                revision, new = self._talks.keep(
                    answer.id,
                    answer.token,
                    messages,
                    name=answer.name,
                    replacing=answer.replacing,
                    last=last,
                    also=also,
                )
                break
            except StoreError as error:
                waits = error.retriable or error.reason in ("full", "conflict")
                if not waits or self._clock.now() >= end or self._stopping.is_set():
                    raise
                log.warning("an answer waits for the database: %s", error)
                self._clock.sleep(wait)
                wait = min(wait * 2, 5.0)
        if last:
            answer.leased = False
        answer.kept(revision, new)
        return new

    def _tell_turn(self, answer: Answer, new: list[Stored]) -> None:
        if new:
            usage, cost = total_of(new)
            answer.say(
                "turn",
                messages=[_dumped(stored) for stored in new],
                usage=_tokens(usage),
                cost=money(cost),
            )

    def _broken(self, answer: Answer, error: LLMError) -> None:
        """An answer that did not come to its end: what there is of it is stored."""
        stopped = isinstance(error, (AgentCancelledError, LLMCancelledError))
        text, usage = answer.text, _usage_of(error)
        if isinstance(error, StoreError):  # what could not be stored is not stored in pieces
            text = ""
        elif text or any(getattr(link, "maybe_billed", False) for link in _chain(error)):
            self._record(answer.caller.owner, answer.model, usage, None, complete=False)
        log.log(logging.INFO if stopped else logging.WARNING, "an answer ended early: %s", error)
        answer.status = "partial"
        if text:
            said = Message(role="assistant", content=text)
            cut = Stored(said, usage, None, answer.model, status="partial")
            try:
                self._tell_turn(answer, self._keep(answer, [cut], last=True))
            except LLMError as trouble:
                log.warning("what came of an answer could not be stored: %s", trouble)
                error, stopped = trouble, False
        if not stopped:
            answer.tell(problem_of(error))

    # Answers whose process is gone

    def _beat(self) -> None:
        failing = False
        while True:
            try:
                # One that has no lease yet has not lost it.
                running = [a for a in list(self._running.values()) if a.leased]
                texts = {a.token: a.checkpoint().dump() for a in running}
                lost = self._leases.beat(texts) if running else set()
                for answer in running:
                    if answer.token in lost:
                        answer.cancel.cancel()
                # After the beat: this process may have slept, and its own answers would seem abandoned.
                if self._clock.now() >= self._mend_at:
                    self._mend_at = self._clock.now() + _MEND_EVERY
                    self._talks.mend_all(but=texts)
                self._flush()
                failing = False
            except Exception as error:  # noqa: BLE001 - the next beat may come through
                if not failing:
                    log.warning("the answers under way cannot be watched over: %s", error)
                failing = True
            if self._stopping.wait(BEAT):
                return


def _split(stored: Sequence[Stored]) -> tuple[Sequence[Stored], Sequence[Stored]]:
    """A conversation up to the last message of the user, and what follows it."""
    for at in range(len(stored), 0, -1):
        if stored[at - 1].message.role == "user":
            return stored[:at], stored[at:]
    return (), stored


def _until_user(stored: Sequence[Stored]) -> Sequence[Stored]:
    end = next((n for n, s in enumerate(stored) if s.message.role == "user"), None)
    return stored[:end]


def _is_end(stored: Stored) -> bool:
    """Whether an answer can end with it; a tool's result goes to the model."""
    return stored.message.role == "assistant" and not stored.message.tool_calls


def _check_same(stored: Stored, content: Any) -> None:
    if stored.message.content != content:
        detail = "this Idempotency-Key was sent with another message: take a new key for a new one"
        raise Problem(422, "Used before", detail)


def _dumped(stored: Stored) -> dict[str, Any]:
    return message_view(stored).model_dump(mode="json")


def _tokens(usage: TokenUsage | None) -> dict[str, Any] | None:
    view = usage_view(usage)
    return None if view is None else view.model_dump()


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _usage_of(error: LLMError) -> TokenUsage | None:
    """What a broken stream had said of its tokens."""
    for link in _chain(error):
        usage = getattr(getattr(link, "partial", None), "usage", None)
        if isinstance(usage, TokenUsage):
            return usage
    return None


def _replaced() -> Problem:
    return Problem(409, "Replaced", "what this Idempotency-Key stands for was replaced since")


def _under_way() -> Problem:
    detail = "an answer is being written in this conversation: wait for it, or cancel it"
    return Problem(409, "Under way", detail, headers={"retry-after": "2"})


def _too_many(most: int) -> Problem:
    detail = f"{most} answers are under way, the limit of this process: try again in a moment"
    return Problem(503, "Too busy", detail, headers={"retry-after": "2"})
