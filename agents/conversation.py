"""Conversation: the history, the context and the cost of one talk with a model."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import Any, Final

from agents.forms import Form, as_message, read_messages, write_messages
from agents.store import (
    ConflictError,
    Hit,
    Store,
    Stored,
    StoreError,
    Summary,
    check_request,
    numbered_from,
    repeated,
    snippet,
)
from agents.types import ChatCompletionResponse, EventType, Message, StreamEvent, TokenUsage
from LLM import LLM, Clock, LLMConfigError, LLMError, Stream

_TITLE: Final = 60  # characters of the first question that name a talk without a title

# How often `retry_conflict` tries: a writer that loses this often is one of very many.
_TRIES: Final = 20

_NO_TOKENS: Final = TokenUsage(**dict.fromkeys(TokenUsage.model_fields, 0))


@dataclass(frozen=True)
class _State:
    revision: int
    stored: tuple[Stored, ...]


class Conversation:
    """One talk: what was said goes along with each call, and each whole answer is kept.

    A call that fails, and a stream that is cut, closed or cancelled, leave the history as it was. If
    another `Conversation` of the same id wrote in between, `ConflictError` is raised and nothing is kept;
    `reload()` then shows what the other one wrote.

    Attributes:
        id: of the conversation.
        llm: the client that is asked.
        context: what makes of the messages those that are sent; `None`: all are sent.
    """

    def __init__(
        self,
        conversations: Any,
        id: str,
        *,
        llm: LLM,
        context: Callable[[list[Message]], Iterable[Message]] | None = None,
        retry_conflict: bool = False,
        store: Store | None = None,
    ) -> None:
        self.id = id
        self.llm = llm
        self.context = context
        self._conversations = conversations
        self._retry_conflict = retry_conflict
        self._own_store = store
        self._summary, self._state = self._read()

    @classmethod
    def open(
        cls,
        store: Store | str | None = None,
        id: str | None = None,
        *,
        llm: LLM,
        system: str | None = None,
        owner: str | None = None,
        title: str | None = None,
        context: Callable[[list[Message]], Iterable[Message]] | None = None,
        retry_conflict: bool = False,
        clock: Clock | None = None,
    ) -> Conversation:
        """Go on with a conversation, or begin one.

        Args:
            store: a `Store`; the URL of one, which is then closed with this object; `None`: in memory.
            id: left out: a new one.
            system: the system message, which is sent first and is kept beside the history; left out: as
                it was.
            owner: whose it is; a conversation of another owner is not opened. `None`: not asked.
            title: of a new conversation; left out: the beginning of the first question.
            context: gets the messages before each call, system message included, and gives those to
                send: to fit a window, for instance. What is kept does not change.
            retry_conflict: an answer that lost against another writer is kept after what that one
                wrote, though the model did not know it; else it is a `ConflictError`.
            clock: for tests: tells the time and makes the ids.

        Raises:
            LLMConfigError: the store's URL cannot be used, or the extra `store` is missing.
            StoreError: the store cannot be used, or the conversation is another owner's (`missing`).
        """
        own = kept = None
        if isinstance(store, str):
            own = kept = Store.open(store, clock=clock)
        elif store is not None:
            kept = store
        conversations: Any = kept.conversations if kept else _Memory(clock or Clock())
        try:
            found = None if id is None else conversations.get(id)
            if found is None:
                data = {} if system is None else {"system": system}
                try:
                    found = conversations.create(id, title=title, owner=owner, data=data)
                except ConflictError:  # another one was quicker by a moment
                    found = conversations.get(id)
            if found is None or (owner is not None and found.owner != owner):
                raise StoreError(f"{owner!r} has no conversation {id!r}", reason="missing")
            if system is not None and found.data.get("system") != system:
                conversations.update(found.id, data={**found.data, "system": system})
            return cls(
                conversations,
                found.id,
                llm=llm,
                context=context,
                retry_conflict=retry_conflict,
                store=own,
            )
        except BaseException:
            if own is not None:
                own.close()
            raise

    def say(self, said: Any, **options: Any) -> ChatCompletionResponse:
        """Say something, and get the answer; both are kept.

        Args:
            said: a text, a list of content parts, a message, or a list of messages (the results of tool
                calls, for instance).
            options: what `LLM.chat_completion` takes but `stream`.

        Raises:
            ConflictError: another writer was quicker. If that happened before the call, nothing was
                sent; if after, `.partial` is the answer.
            LLMError: the call failed; the history is as it was.
        """
        if options.get("stream"):
            raise LLMConfigError("say() waits for the whole answer; use stream()")
        turn = _as_turn(said)
        state = self._fresh(turn)
        reply: ChatCompletionResponse = self.llm.chat_completion(
            self._prompt(state, turn), **options
        )
        self._keep(state, turn, reply)
        return reply

    def stream(self, said: Any, **options: Any) -> ConversationStream:
        """Say something, and get the answer as it comes; both are kept when it is whole.

        Args:
            options: what `LLM.stream` takes; `said` is as in `say`.
        """
        turn = _as_turn(said)
        state = self._fresh(turn)
        stream = self.llm.stream(self._prompt(state, turn), **options)
        return ConversationStream(stream, lambda reply: self._keep(state, turn, reply))

    def add(
        self,
        messages: Sequence[Stored | Message | Mapping[str, Any]],
        *,
        replacing: int | None = None,
        request: str | None = None,
    ) -> tuple[Stored, ...]:
        """Keep messages that were not said through `say` or `stream`: what an agent said, for instance.

        Args:
            messages: `Stored` ones say what they took; of an answer that is not, the cost is unknown.
            replacing: the number of the first message whose place they take, with all after it; those
                leave the history and stay in the database. `None`: none.
            request: a key of yours that the first of them gets; what is added twice is kept once.

        Returns:
            The messages as they are kept, with their numbers.

        Raises:
            RepeatedError: a message of the conversation has this request key.
            ConflictError: another writer was quicker; nothing was kept.
        """
        new = [
            message if isinstance(message, Stored) else Stored(as_message(message, number))
            for number, message in enumerate(messages)
        ]
        return self._append(self._state, new, replacing=replacing, request=request)

    def prompt(self, said: Any = ()) -> list[Message]:
        """What a call would be sent: the system message, the history and `said`, through `context`.

        Args:
            said: as in `say`; left out: nothing.
        """
        nothing = isinstance(said, (list, tuple)) and not said
        return self._prompt(self._state, [] if nothing else _as_turn(said))

    @property
    def history(self) -> tuple[Message, ...]:
        """What was said, without the system message."""
        return tuple(stored.message for stored in self._state.stored)

    @property
    def stored(self) -> tuple[Stored, ...]:
        """The same with what each message took."""
        return self._state.stored

    @property
    def usage(self) -> TokenUsage:
        """Tokens of all answers; a part is `None` if one of them did not say."""
        paid = [stored.usage for stored in self._state.stored if _is_paid(stored)]
        unknown = TokenUsage()
        return sum((usage or unknown for usage in paid), start=_NO_TOKENS)

    @property
    def cost(self) -> Decimal | None:
        """US dollars of all answers; `None` if one of them is unknown."""
        costs = [stored.cost for stored in self._state.stored if _is_paid(stored)]
        known = [cost for cost in costs if cost is not None]
        return sum(known, start=Decimal(0)) if len(known) == len(costs) else None

    @property
    def title(self) -> str | None:
        """What it is called; `None` before the first question."""
        return self._summary.title

    @title.setter
    def title(self, title: str) -> None:
        self._conversations.update(self.id, title=title)
        self._summary = replace(self._summary, title=title)

    @property
    def owner(self) -> str | None:
        """Whose it is."""
        return self._summary.owner

    @property
    def summary(self) -> Summary:
        """All that is known of it but its messages."""
        return self._summary

    @property
    def revision(self) -> int:
        """Grows by one with each write, as far as this object knows."""
        return self._state.revision

    @property
    def system(self) -> str | None:
        """The system message."""
        system: str | None = self._summary.data.get("system")
        return system

    def reload(self) -> None:
        """See what others have written."""
        self._summary, self._state = self._read()

    def _read(self) -> tuple[Summary, _State]:
        summary: Summary | None = self._conversations.get(self.id)
        if summary is None:
            raise self._gone()
        revision, stored = self._conversations.load(self.id)
        return summary, _State(revision, tuple(stored))

    def _gone(self) -> StoreError:
        return StoreError(f"the conversation {self.id!r} was deleted", reason="missing")

    def branch(self, at: int | None = None, *, id: str | None = None) -> Conversation:
        """A new conversation that begins with the first `at` messages of the history.

        Args:
            at: `None`: all of them; below 0: without the last ones, as in a slice.
            id: of the new one; if it is a branch of this one already, that is opened. Left out: a new one.

        Raises:
            LLMConfigError: there are not so many, or a tool call would lose its result.
        """
        stored = self._state.stored
        number = len(stored) if at is None else at + len(stored) if at < 0 else at
        if not 0 <= number <= len(stored):
            raise LLMConfigError(f"at is {at}; the history has {len(stored)} messages")
        if number < len(stored) and stored[number].message.role == "tool":
            raise LLMConfigError(f"at is {at}, between a tool call and its result; choose another")
        last = stored[number - 1].number if number else 0
        new = self._conversations.branch(self.id, last, new=id)
        return Conversation(
            self._conversations,
            new,
            llm=self.llm,
            context=self.context,
            retry_conflict=self._retry_conflict,
        )

    def search(self, text: str, *, limit: int = 20) -> list[Hit]:
        """Messages of this conversation with these words, the newest first."""
        found: list[Hit] = self._conversations.search(text, limit=limit, conversation=self.id)
        return found

    def delete(self) -> None:
        """Forget it; its branches stay."""
        self._conversations.delete(self.id)
        self._state = _State(-1, ())

    def export(self, form: Form = "openai") -> dict[str, Any]:
        """The conversation as a value for JSON, in the form that the vendor's API takes.

        Args:
            form: `"openai"`: `{"messages": […]}`; `"anthropic"`: `{"system": …, "messages": […]}`.
        """
        return write_messages(form, self.system, self.history)

    @classmethod
    def import_(
        cls,
        data: Any,
        store: Store | str | None = None,
        id: str | None = None,
        *,
        llm: LLM,
        form: Form | None = None,
        **options: Any,
    ) -> Conversation:
        """A new conversation out of what `export` gave, or of an API's own messages.

        Args:
            data: `{"messages": […]}`, with `"system"` or without, or the list of messages alone.
            form: left out: found out from the data.
            options: what `open` takes.

        Raises:
            LLMConfigError: it is neither; says which message and why.
            ConflictError: the conversation is there and is not empty.
        """
        system, messages = read_messages(data, form)
        options.setdefault("system", system)
        if id is not None and store is not None:
            # Looked at before it is opened, which would set the system message.
            _check_empty(store, id)
        conversation = cls.open(store, id, llm=llm, **options)
        try:
            if conversation.history:
                raise _taken(id)
            free = [Stored(message, cost=Decimal(0)) for message in messages]
            conversation._append(conversation._state, free)  # noqa: SLF001 - its own class
        except BaseException:
            conversation.close()
            raise
        return conversation

    def close(self) -> None:
        """Close the store, if it was opened here."""
        if self._own_store is not None:
            self._own_store.close()

    def __enter__(self) -> Conversation:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Conversation {self.id!r}, {len(self._state.stored)} messages>"

    def _fresh(self, turn: Sequence[Message]) -> _State:
        """What the call goes by; a conversation that has changed is found out before it is paid for."""
        state = self._state
        found = self._conversations.get(self.id)
        if found is None:
            raise self._gone()
        if found.revision == state.revision:
            return state
        if not self._retry_conflict:
            raise ConflictError(
                f"the conversation {self.id!r} was changed by another writer: reload() it"
            )
        self.reload()
        self._check_order(turn)
        return self._state

    def _prompt(self, state: _State, turn: Sequence[Message]) -> list[Message]:
        first = [] if self.system is None else [Message(role="system", content=self.system)]
        messages = [*first, *(stored.message for stored in state.stored), *turn]
        return messages if self.context is None else list(self.context(messages))

    def _keep(self, state: _State, turn: Sequence[Message], reply: ChatCompletionResponse) -> None:
        usage = None if reply.cached else reply.usage  # the cache's tokens were not used again
        answer = Stored(_plain(reply.choices[0].message), usage, reply.cost, reply.model)
        new = [*(Stored(message) for message in turn), answer]
        try:
            for left in range(_TRIES, 0, -1):
                try:
                    self._append(state, new)
                    return
                except ConflictError:
                    if not (self._retry_conflict and left > 1):
                        raise
                self.reload()
                self._check_order(turn)
                state = self._state
        except LLMError as error:
            error.partial = reply  # it was paid for
            raise

    def _append(
        self,
        state: _State,
        new: Sequence[Stored],
        *,
        replacing: int | None = None,
        request: str | None = None,
    ) -> tuple[Stored, ...]:
        title = self._summary.title or title_of(new)
        kept: tuple[Stored, ...]
        revision, kept = self._conversations.keep(
            self.id, new, state.revision, title=title, replacing=replacing, request=request
        )
        self._summary = replace(self._summary, title=title, revision=revision)
        self._state = _State(revision, (*_before(state.stored, replacing), *kept))
        return kept

    def _check_order(self, turn: Sequence[Message]) -> None:
        """Refuse what another writer's turn would tear: tool calls and their results."""
        stored = self._state.stored
        waiting = bool(stored and stored[-1].message.tool_calls)
        if waiting or turn[0].role == "tool":
            raise ConflictError(
                f"the conversation {self.id!r} was changed by another writer, within a tool call"
            )


class ConversationStream:
    """A streamed answer that is kept when it is whole; otherwise like `LLM.Stream`.

    It is kept before its last event is handed over: whoever has seen `MESSAGE_COMPLETE` knows it safe.
    """

    def __init__(self, stream: Stream, keep: Callable[[ChatCompletionResponse], None]) -> None:
        self._stream = stream
        self._keep = keep
        self._kept = False

    def __iter__(self) -> Iterator[StreamEvent]:
        return self

    def __next__(self) -> StreamEvent:
        event = next(self._stream)
        if event.type is EventType.MESSAGE_COMPLETE and not self._kept:
            self._kept = True
            self._keep(self._stream.response)
        return event

    @property
    def text_stream(self) -> Iterator[str]:
        """The text alone, piece by piece."""
        for event in self:
            if event.text_delta is not None:
                yield event.text_delta
            elif event.error is not None:
                raise event.error

    @property
    def response(self) -> Any:
        """The whole answer; reads the rest of the stream first."""
        for _ in self:
            pass
        return self._stream.response

    @property
    def usage(self) -> TokenUsage | None:
        """Tokens as far as the server has said."""
        return self._stream.usage

    @property
    def cost(self) -> Decimal | None:
        """US dollars for the usage known so far; `None` if unknown."""
        return self._stream.cost

    @property
    def error(self) -> LLMError | None:
        """What it failed with; `None` so far."""
        return self._stream.error

    def cancel(self) -> None:
        """Stop it from another thread; nothing is kept."""
        self._stream.cancel()

    def close(self) -> None:
        """Stop reading; an answer that is not whole by now is not kept."""
        self._stream.close()

    def __enter__(self) -> ConversationStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True)
class _Kept:
    summary: Summary
    stored: tuple[Stored, ...] = ()
    last: int = 0  # the number that was given last
    requests: Mapping[str, int] = field(default_factory=dict)


class _Memory:
    """What `agents.store.Conversations` does, without a database, for this process and its threads."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._locks: dict[int, threading.Lock] = {}
        # One value for each conversation, replaced as a whole: no lock is needed to read it.
        self._kept: dict[str, _Kept] = {}

    @property
    def _lock(self) -> threading.Lock:
        """A forked child has its own: the parent's may be held by a thread that is not there."""
        return self._locks.setdefault(os.getpid(), threading.Lock())

    def create(self, id: str | None, **fields: Any) -> Summary:
        name, now = id or self._clock.new_id(), self._clock.utc()
        summary = Summary(name, created=now, updated=now, revision=0, **fields)
        self._kept[name] = _Kept(summary)
        return summary

    def get(self, id: str) -> Summary | None:
        found = self._kept.get(id)
        return found.summary if found else None

    def load(self, id: str) -> tuple[int, tuple[Stored, ...]]:
        kept = self._find(id)
        return kept.summary.revision, kept.stored

    def keep(
        self,
        id: str,
        messages: Sequence[Stored],
        revision: int,
        *,
        title: str | None,
        replacing: int | None,
        request: str | None,
    ) -> tuple[int, tuple[Stored, ...]]:
        key = check_request(request, messages)
        with self._lock:
            kept = self._find(id)
            if key is not None and key in kept.requests:
                raise repeated(id, kept.requests[key])
            summary, now = kept.summary, self._clock.utc()
            if summary.revision != revision:
                raise ConflictError(
                    f"the conversation {id!r} was changed by another writer: reload it"
                )
            new = numbered_from(kept.last + 1, messages, now)
            title = summary.title or title
            self._kept[id] = _Kept(
                replace(summary, revision=revision + 1, title=title, updated=now),
                (*_before(kept.stored, replacing), *new),
                kept.last + len(new),
                kept.requests if key is None else {**kept.requests, key: kept.last + 1},
            )
        return revision + 1, new

    def update(self, id: str, **changes: Any) -> None:
        with self._lock:
            kept = self._find(id)
            self._kept[id] = replace(kept, summary=replace(kept.summary, **changes))

    def delete(self, id: str) -> bool:
        return self._kept.pop(id, None) is not None

    def branch(self, id: str, at: int, *, new: str | None = None) -> str:
        kept = self._find(id)
        name = new or self._clock.new_id()
        if name in self._kept:
            if self._kept[name].summary.parent == id:
                return name
            raise ConflictError(f"there is a conversation {name!r} already: choose another id")
        free = tuple(replace(s, usage=None, cost=Decimal(0)) for s in kept.stored if s.number <= at)
        now = self._clock.utc()
        made = replace(kept.summary, id=name, parent=id, revision=0, created=now, updated=now)
        self._kept[name] = _Kept(made, free, free[-1].number if free else 0)
        return name

    def search(self, text: str, *, limit: int, conversation: str) -> list[Hit]:
        words = text.lower().split()
        return [
            Hit(conversation, s.number, s.message.role, snippet(s.message.text, text))
            for s in reversed(self._find(conversation).stored)
            if words and all(word in s.message.text.lower() for word in words)
        ][:limit]

    def _find(self, name: str) -> _Kept:
        if name not in self._kept:
            raise StoreError(f"there is no conversation {name!r}", reason="missing")
        return self._kept[name]


def _before(stored: tuple[Stored, ...], replacing: int | None) -> tuple[Stored, ...]:
    """What is left of the history when the message `replacing` and all after it are replaced."""
    if replacing is None:
        return stored
    return tuple(message for message in stored if message.number < replacing)


def title_of(new: Sequence[Stored]) -> str | None:
    """What a talk that begins with these messages is called; `None` before the first question."""
    first = next((s.message.text for s in new if s.message.role == "user"), "").split()
    return " ".join(first)[:_TITLE] or None


def _is_paid(stored: Stored) -> bool:
    """Whether it counts: an answer, and not one that came for free."""
    return stored.message.role == "assistant" and (stored.usage is not None or stored.cost != 0)


def _plain(message: Message) -> Message:
    return Message.model_validate(message.model_dump(exclude_none=True))


def _as_turn(said: Any) -> list[Message]:
    if isinstance(said, str):
        return [Message(role="user", content=said)]
    if isinstance(said, (Message, Mapping)):
        said = [said]
    if not isinstance(said, Sequence) or isinstance(said, bytes) or not said:
        raise LLMConfigError(
            f"said is {type(said).__name__}; give a text, a list of parts, or messages"
        )
    if all(isinstance(m, Message) or (isinstance(m, Mapping) and "role" in m) for m in said):
        return [as_message(message, number) for number, message in enumerate(said)]
    return [Message(role="user", content=list(said))]


def _taken(id_: str | None) -> ConflictError:
    return ConflictError(f"there is a conversation {id_!r} already: choose another id")


def _check_empty(store: Store | str, id_: str) -> None:
    opened = Store.open(store) if isinstance(store, str) else store
    try:
        if opened.conversations.get(id_) is not None and opened.conversations.messages(id_):
            raise _taken(id_)
    finally:
        if opened is not store:
            opened.close()
