"""The answers that are being written: each in a thread of its own, stored turn by turn, never asked twice."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from contextvars import copy_context
from decimal import Decimal
from typing import Any, Final, Literal, NamedTuple, Protocol

from agents.agent import Agent, Cancel
from agents.conversation import Conversation
from agents.service.feed import Feed
from agents.service.leases import Abandoned, BusyError, Leases
from agents.service.metrics import Metrics
from agents.service.problems import Problem, problem_of
from agents.service.views import message_view, money, total_of, usage_view
from agents.store import ConflictError, RepeatedError, Store, Stored, StoreError
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

_TRIES: Final = 3  # to store a message in a conversation that others write to

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

    def __init__(self, most: int) -> None:
        self._most = most
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
        thread.start()

    def join(self, seconds: float) -> None:
        """Wait for those that run; they have been told to end."""
        for thread in list(self._threads):
            thread.join(seconds)


class Answer:
    """One answer under way.

    Attributes:
        token: its name in the lease.
        feed: its events.
        cancel: ends it.
        leased: whether it has the conversation for itself.
    """

    def __init__(
        self,
        conversation: Conversation,
        caller: Any,
        model: str,
        *,
        token: str,
        loop: asyncio.AbstractEventLoop,
        request: str | None,
    ) -> None:
        self.conversation = conversation
        self.caller = caller
        self.model = model
        self.token = token
        self.request = request
        self.cancel = Cancel()
        self.feed: Feed[Event] = Feed(loop, self.cancel.cancel)
        self.replacing: int | None = None
        self.stored: list[Stored] = []
        self.status: Status = "ok"
        self.leased = False
        self._pieces: list[str] = []
        self._kept = 0

    def say(self, event: str, /, **data: Any) -> None:
        """An event for those who read."""
        self.feed.put(Event(event, data))

    def heard(self, text: str) -> None:
        """A piece of text that is not stored yet."""
        self._pieces.append(text)

    @property
    def text(self) -> str:
        """What is not stored yet."""
        return "".join(self._pieces)

    def checkpoint(self) -> str:
        """What another process needs to store if this one is gone."""
        return json.dumps(
            {
                "text": self.text,
                "replacing": self.replacing,
                "model": self.model,
                "name": self._name(self._kept + 1),
            }
        )

    def _name(self, number: int) -> str:
        """Of a write, by which it is known when it is tried again, also by another process."""
        return f"answer:{self.token}:{number}"

    def keep(
        self,
        messages: Sequence[Stored],
        store: Store,
        clock: Clock,
        *,
        last: Callable[[], object] | None = None,
    ) -> list[Stored]:
        """Store messages of the answer, also if the database is away for a while.

        A write whose answer was lost is known again by its name, so it is not done twice.

        Args:
            last: done in the same transaction.
        """

        def work(_: Any) -> tuple[Stored, ...]:
            kept = self.conversation.add(messages, replacing=self.replacing, request=name)
            if last is not None:
                last()
            return kept

        self._kept += 1
        name = self._name(self._kept)
        end, wait = clock.now() + KEEP_TRYING, 0.1
        while True:
            try:
                new = store.run(work)
                break
            except RepeatedError as error:
                self.conversation.reload()
                new = tuple(s for s in self.conversation.stored if s.number >= error.number)
                break
            except StoreError as error:
                if not error.retriable or clock.now() >= end:
                    raise
                log.warning("an answer waits for the database: %s", error)
                clock.sleep(wait)
                wait = min(wait * 2, 5.0)
        self._pieces.clear()
        self.replacing = None
        self.stored += new
        return list(new)

    def end(self) -> None:
        """The last event."""
        usage, cost = total_of(self.stored)
        self.say(
            "done",
            status=self.status,
            usage=_tokens(usage),
            cost=money(cost),
            revision=self.conversation.revision,
        )
        self.feed.finish()


class Answers:
    """All answers of this process.

    Args:
        store: where conversations are.
        leases: which conversations are being answered, in any process.
        asking: gives the client, held to budgets.
        record: writes down what an answer took.
        flush: writes down what could not be written before.
        toolbox: the tools that the model may call.
        context: gets a conversation's id, a model and the messages, and gives those that fit its window.
        call: what each call of the model takes: `max_tokens=`, `temperature=` …
        max_turns: calls of the model in one answer.
        threads: what answers run in.
        metrics: told of each answer.
    """

    def __init__(
        self,
        store: Store,
        leases: Leases,
        *,
        asking: Asking,
        record: Recording,
        flush: Callable[[], object],
        toolbox: Toolbox,
        context: Callable[[str, str, list[Message]], list[Message]],
        call: dict[str, Any],
        max_turns: int,
        threads: Threads,
        metrics: Metrics,
        clock: Clock,
    ) -> None:
        self._store = store
        self._leases = leases
        self._asking = asking
        self._record = record
        self._flush = flush
        self._toolbox = toolbox
        self._context = context
        self._call = call
        self._max_turns = max_turns
        self._threads = threads
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

    def stop(self) -> None:
        """End those that still run: what they have is stored, marked as partial."""
        self._stopping.set()
        for answer in list(self._running.values()):
            answer.cancel.cancel()
        self._threads.join(_STOP_SECONDS)
        if self._beating is not None:
            self._beating.join(_STOP_SECONDS)

    def say(
        self,
        caller: Any,
        conversation: Conversation,
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
            Problem: 409 while another answer is written there, 503 if there are too many.
            StoreError: it could not be stored; nothing was asked.
        """
        name = None if request is None else f"user:{request}"
        if name is not None:
            running = self._running.get(conversation.id)
            if running is not None and running.request == name:
                return running
            number = self._store.conversations.find_request(conversation.id, name)
            if number is not None:
                return self._again(caller, conversation, number, name, model=model, loop=loop)
        answer = self._take(caller, conversation, model, name, loop)
        try:
            stored = self._said(answer, Message(role="user", content=content), name)
        except RepeatedError as error:  # another process was quicker by a moment
            self._give_back(answer)
            return self._again(caller, conversation, error.number, name, model=model, loop=loop)
        except BaseException:
            self._give_back(answer)
            raise
        answer.say("message", **_dumped(stored))
        return self._start(answer, conversation.stored)

    def _said(self, answer: Answer, said: Message, name: str | None) -> Stored:
        """Take the conversation and store what the user says, both in one transaction."""
        conversation = answer.conversation

        def work(_: Any) -> Stored:
            self._lease(answer)
            return conversation.add([said], request=name)[0]

        for left in range(_TRIES, 0, -1):
            try:
                stored = self._store.run(work)
                answer.leased = True
                return stored
            except RepeatedError:
                raise
            except ConflictError:
                if left == 1:
                    raise
                conversation.reload()
        raise AssertionError  # pragma: no cover - the last try either returns or raises

    def regenerate(
        self,
        caller: Any,
        conversation: Conversation,
        *,
        model: str,
        loop: asyncio.AbstractEventLoop,
        request: str | None = None,
    ) -> Answer:
        """Answer the last message of the user anew; the answer of before is kept, and shown no more.

        Raises:
            Problem: 409 while another answer is written there, or if nothing was said yet.
        """
        name = None if request is None else f"again:{request}"
        running = self._running.get(conversation.id)
        if name is not None and running is not None and running.request == name:
            return running
        answer = self._take(caller, conversation, model, name, loop)
        try:
            self._lease_alone(answer)
            before, after = _split(conversation.stored)
            if not before:
                raise Problem(409, "Nothing to answer", "the user has said nothing yet")
            answer.replacing = after[0].number if after else None
        except BaseException:
            self._give_back(answer)
            raise
        return self._start(answer, before)

    def cancel(self, conversation: str) -> bool:
        """Stop the answer that is written there, in whichever process; whether there was one."""
        running = self._running.get(conversation)
        if running is not None:
            running.cancel.cancel()
            return True
        return self._leases.cancel(conversation)

    def _again(
        self,
        caller: Any,
        conversation: Conversation,
        number: int,
        name: str | None,
        *,
        model: str,
        loop: asyncio.AbstractEventLoop,
    ) -> Answer:
        """What came of a message that was sent before: the same again; if it broke off, an answer now."""
        conversation.reload()
        stored = conversation.stored
        at = next((n for n, s in enumerate(stored) if s.number == number), None)
        if at is None:
            raise Problem(409, "Replaced", "the message of this Idempotency-Key was replaced since")
        following = stored[at + 1 :]
        end = next((n for n, s in enumerate(following) if s.message.role == "user"), None)
        new = following[:end]
        if new or end is not None:  # answered; or the talk went on without an answer
            answer = self._made(caller, conversation, model, name, loop)
            answer.say("message", **_dumped(stored[at]))
            self._tell_turn(answer, list(new))
            answer.stored = list(new)
            whole = bool(new) and all(s.status == "ok" for s in new)
            answer.status = "ok" if whole else "partial" if new else "error"
            answer.end()
            return answer
        answer = self._take(caller, conversation, model, name, loop)
        try:
            self._lease_alone(answer)
        except BaseException:
            self._give_back(answer)
            raise
        if conversation.stored != stored:  # an answer came meanwhile
            self._give_back(answer)
            return self._again(caller, conversation, number, name, model=model, loop=loop)
        answer.say("message", **_dumped(stored[at]))
        return self._start(answer, stored)

    def _made(
        self,
        caller: Any,
        conversation: Conversation,
        model: str,
        request: str | None,
        loop: asyncio.AbstractEventLoop,
    ) -> Answer:
        return Answer(
            conversation,
            caller,
            model,
            token=self._clock.new_id(),
            loop=loop,
            request=request,
        )

    def _take(self, caller: Any, conversation: Conversation, *how: Any) -> Answer:
        """An answer that is the only one of its conversation in this process."""
        if self._stopping.is_set():
            raise Problem(503, "Stopping", "try again in a moment", headers={"retry-after": "2"})
        self._threads.check()
        self._mend_if_due()
        answer = self._made(caller, conversation, *how)
        with self._lock:
            if conversation.id in self._running:
                raise _under_way()
            self._running[conversation.id] = answer
        return answer

    def _lease(self, answer: Answer) -> None:
        """Take the conversation from all processes; within a transaction."""
        try:
            left = self._leases.take(answer.conversation.id, answer.token)
        except BusyError:
            raise _under_way() from None
        if left is not None:
            self._mend(left)
            answer.conversation.reload()

    def _lease_alone(self, answer: Answer) -> None:
        """The same, and see what is there."""
        conversation = answer.conversation

        def work(_: Any) -> None:
            self._lease(answer)
            conversation.reload()

        self._store.run(work)
        answer.leased = True

    def _forget(self, answer: Answer) -> None:
        with self._lock:
            if self._running.get(answer.conversation.id) is answer:
                del self._running[answer.conversation.id]

    def _give_back(self, answer: Answer) -> None:
        leased, answer.leased = answer.leased, False
        if leased:
            with suppress(LLMError):  # it goes stale by itself
                self._leases.release(answer.token)
        self._forget(answer)

    def _start(self, answer: Answer, history: Sequence[Stored]) -> Answer:
        system = answer.conversation.system
        first = [] if not system else [Message(role="system", content=system)]
        messages = [*first, *(stored.message for stored in history)]
        try:
            self._threads.start(lambda: self._write(answer, messages))
        except BaseException:
            self._give_back(answer)
            raise
        return answer

    def _write(self, answer: Answer, messages: list[Message]) -> None:
        """The thread of an answer."""
        started = self._clock.now()
        self._metrics.answer_began()
        try:
            with self._asking(answer.caller, answer.model, answer.conversation.id) as llm:
                prompt = self._context(answer.conversation.id, answer.model, messages)
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
            answer.status = "error"
            problem = Problem(500, "Internal error", "tell those who run this service")
            answer.say("error", **problem.body(None))
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
            answer.status = "error"
            names = ", ".join(sorted({waiting.call.name for waiting in event.result.pending}))
            detail = (
                f"{names}: a person must decide, and cannot here: choose tools that need nobody"
            )
            answer.say("error", **Problem(422, "A tool waits for a person", detail).body(None))

    def _turn(self, answer: Answer, turn: Turn) -> None:
        response = turn.response
        usage = None if response.cached else response.usage
        cost = response.cost
        said = Message.model_validate(response.choices[0].message.model_dump(exclude_none=True))
        model = response.model or answer.model
        self._record(answer.caller.owner, answer.model, usage, cost)
        new = [
            Stored(said, usage, cost, model),
            *(Stored(result.message) for result in turn.results),
        ]
        if turn.results:
            kept = answer.keep(new, self._store, self._clock)
        else:  # the end: the conversation is free with the same write
            release = self._leases.release
            kept = answer.keep(new, self._store, self._clock, last=lambda: release(answer.token))
            answer.leased = False
        self._tell_turn(answer, kept)

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
        lost = isinstance(error, StoreError)
        text, usage = answer.text, _usage_of(error)
        log_ = log.info if stopped else log.warning
        log_("an answer ended early: %s", error)
        answer.status = "partial" if stopped else "error"
        if not isinstance(error, LLMError) or lost or not (text or usage):
            text = "" if lost else text
        if not lost and (text or error.maybe_billed):
            self._record(answer.caller.owner, answer.model, usage, None, complete=False)
        if text:
            said = Message(role="assistant", content=text)
            partial = Stored(said, usage, None, answer.model, status="partial")
            try:
                self._tell_turn(answer, answer.keep([partial], self._store, self._clock))
            except LLMError as trouble:
                log.warning("what came of an answer could not be stored: %s", trouble)
                answer.status, error, stopped = "error", trouble, False
        if not stopped:
            answer.say("error", **problem_of(error).body(None))

    # Answers whose process is gone

    def _beat(self) -> None:
        failing = False
        while True:
            try:
                self._mend_if_due()
                # One that has no lease yet has not lost it.
                running = [a for a in list(self._running.values()) if a.leased]
                lost = (
                    self._leases.beat({a.token: a.checkpoint() for a in running})
                    if running
                    else set()
                )
                for answer in running:
                    if answer.token in lost:
                        answer.cancel.cancel()
                self._flush()
                failing = False
            except Exception as error:  # noqa: BLE001 - the next beat may come through
                if not failing:
                    log.warning("the answers under way cannot be watched over: %s", error)
                failing = True
            if self._stopping.wait(BEAT):
                return

    def _mend_if_due(self) -> None:
        now = self._clock.now()
        if now < self._mend_at:
            return
        self._mend_at = now + _MEND_EVERY
        for found in self._leases.abandoned():
            self._mend(found)

    def _mend(self, left: Abandoned) -> None:
        """Store what the answer of a process that is gone had come to."""
        saved = json.loads(left.text or "{}")
        if not saved.get("text"):
            return
        said = Message(role="assistant", content=saved["text"])
        partial = Stored(said, None, None, saved["model"], status="partial")
        conversations = self._store.conversations
        try:
            revision, _ = conversations.load(left.conversation)
            replacing, name = saved["replacing"], saved["name"]
            conversations.append(
                left.conversation, [partial], revision, replacing=replacing, request=name
            )
        except RepeatedError:
            return  # it had been stored, and died before it said so
        except ConflictError as error:
            log.warning("what came of an answer could not be stored: %s", error)
        else:
            log.warning("an answer of a process that is gone is stored as far as it came")


def _split(stored: Sequence[Stored]) -> tuple[Sequence[Stored], Sequence[Stored]]:
    """A conversation up to the last message of the user, and what follows it."""
    for at in range(len(stored), 0, -1):
        if stored[at - 1].message.role == "user":
            return stored[:at], stored[at:]
    return (), stored


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


def _under_way() -> Problem:
    detail = "an answer is being written in this conversation: wait for it, or cancel it"
    return Problem(409, "Under way", detail, headers={"retry-after": "2"})


def _too_many(most: int) -> Problem:
    detail = f"{most} answers are under way, the limit of this process: try again in a moment"
    return Problem(503, "Too busy", detail, headers={"retry-after": "2"})
