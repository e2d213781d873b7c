"""Conversation: the history, the context and the cost of one talk with a model."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any, Final, Literal

from agents.store import ConflictError, Hit, Store, Stored, StoreError, Summary, snippet
from agents.types import ChatCompletionResponse, EventType, Message, StreamEvent, TokenUsage
from LLM import LLM, Clock, LLMConfigError, LLMError, Stream

Form = Literal["openai", "anthropic"]

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

    def branch(self, at: int | None = None) -> Conversation:
        """A new conversation that begins with the first `at` messages of the history.

        Args:
            at: `None`: all of them; below 0: without the last ones, as in a slice.

        Raises:
            LLMConfigError: there are not so many, or a tool call would lose its result.
        """
        stored = self._state.stored
        number = len(stored) if at is None else at + len(stored) if at < 0 else at
        if not 0 <= number <= len(stored):
            raise LLMConfigError(f"at is {at}; the history has {len(stored)} messages")
        if number < len(stored) and stored[number].message.role == "tool":
            raise LLMConfigError(f"at is {at}, between a tool call and its result; choose another")
        new = self._conversations.branch(self.id, number)
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
        _check_form(form)
        return _EXPORTS[form](self.system, self.history)

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
        if form is not None:
            _check_form(form)
        system, messages = _imported(data, form)
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

    def _append(self, state: _State, new: Sequence[Stored]) -> None:
        first = next((s.message.text for s in new if s.message.role == "user"), "").split()
        title = self._summary.title or " ".join(first)[:_TITLE] or None
        revision = self._conversations.append(self.id, new, state.revision, title=title)
        self._summary = replace(self._summary, title=title, revision=revision)
        numbered = [replace(s, number=n) for n, s in enumerate(new, len(state.stored) + 1)]
        self._state = _State(revision, (*state.stored, *numbered))

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


class _Memory:
    """What `agents.store.Conversations` does, without a database, for this process and its threads."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._locks: dict[int, threading.Lock] = {}
        # One value for each conversation, replaced as a whole: no lock is needed to read it.
        self._kept: dict[str, tuple[Summary, tuple[Stored, ...]]] = {}

    @property
    def _lock(self) -> threading.Lock:
        """A forked child has its own: the parent's may be held by a thread that is not there."""
        return self._locks.setdefault(os.getpid(), threading.Lock())

    def create(self, id: str | None, **fields: Any) -> Summary:
        name, now = id or self._clock.new_id(), self._clock.utc()
        summary = Summary(name, created=now, updated=now, revision=0, **fields)
        self._kept[name] = summary, ()
        return summary

    def get(self, id: str) -> Summary | None:
        found = self._kept.get(id)
        return found[0] if found else None

    def load(self, id: str) -> tuple[int, tuple[Stored, ...]]:
        summary, stored = self._find(id)
        return summary.revision, stored

    def append(
        self,
        id: str,
        messages: Sequence[Stored],
        revision: int,
        *,
        title: str | None,
    ) -> int:
        with self._lock:
            summary, stored = self._find(id)
            if summary.revision != revision:
                raise ConflictError(
                    f"the conversation {id!r} was changed by another writer: reload it"
                )
            now = self._clock.utc()
            new = [
                replace(s, number=n, created=s.created or now)
                for n, s in enumerate(messages, len(stored) + 1)
            ]
            title = summary.title or title
            changed = replace(summary, revision=revision + 1, title=title, updated=now)
            self._kept[id] = changed, (*stored, *new)
        return revision + 1

    def update(self, id: str, **changes: Any) -> None:
        with self._lock:
            summary, stored = self._find(id)
            self._kept[id] = replace(summary, **changes), stored

    def delete(self, id: str) -> bool:
        return self._kept.pop(id, None) is not None

    def branch(self, id: str, at: int) -> str:
        summary, stored = self._find(id)
        name = self._clock.new_id()
        free = tuple(replace(s, usage=None, cost=Decimal(0)) for s in stored[:at])
        now = self._clock.utc()
        new = replace(summary, id=name, parent=id, revision=0, created=now, updated=now)
        self._kept[name] = new, free
        return name

    def search(self, text: str, *, limit: int, conversation: str) -> list[Hit]:
        words = text.lower().split()
        return [
            Hit(conversation, s.number, s.message.role, snippet(s.message.text, text))
            for s in reversed(self._find(conversation)[1])
            if words and all(word in s.message.text.lower() for word in words)
        ][:limit]

    def _find(self, name: str) -> tuple[Summary, tuple[Stored, ...]]:
        if name not in self._kept:
            raise StoreError(f"there is no conversation {name!r}", reason="missing")
        return self._kept[name]


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
        return [_as_message(message, number) for number, message in enumerate(said)]
    return [Message(role="user", content=list(said))]


def _as_message(value: Any, number: int) -> Message:
    problem = ""
    if isinstance(value, Message):
        return value
    try:
        return Message.model_validate(value)
    except ValueError as error:
        problem = str(error).splitlines()[1].strip()
    raise LLMConfigError(f"messages[{number}] is not a message: look at {problem!r}")


# Exchange with the vendors' forms. Sources: OpenAI's "Create chat completion" and Anthropic's "Create a
# Message", 2026-11.

# Other fields are a server's own, and another one would refuse them.
_OPENAI_FIELDS: Final = ("role", "content", "name", "refusal", "tool_calls", "tool_call_id")


def _check_form(form: str) -> None:
    if form not in _EXPORTS:
        raise LLMConfigError(f"form is {form!r}; it must be one of {', '.join(_EXPORTS)}")


def _to_openai(system: str | None, history: Sequence[Message]) -> dict[str, Any]:
    messages = [] if system is None else [{"role": "system", "content": system}]
    for message in history:
        said = message.model_dump(exclude_none=True)
        if isinstance(message.content, list):
            said["content"] = [_part(block) for block in message.content]
        messages.append({name: said[name] for name in _OPENAI_FIELDS if name in said})
    return {"messages": messages}


def _to_anthropic(system: str | None, history: Sequence[Message]) -> dict[str, Any]:
    systems = [] if system is None else [system]
    turns: list[dict[str, Any]] = []
    for message in history:
        if message.role in ("system", "developer"):
            systems.append(message.text)
        elif message.role == "tool":
            result: dict[str, Any] = {"type": "tool_result", "tool_use_id": message.tool_call_id}
            if message.content:
                result["content"] = _blocks(message.content)
            last = turns[-1] if turns else None
            if last and _kind(last["content"]) == "tool_result":
                last["content"].append(result)  # those of one answer stand in one message
            else:
                turns.append({"role": "user", "content": [result]})
        elif message.role == "assistant":
            turns.append({"role": "assistant", "content": _answer_blocks(message)})
        else:
            turns.append({"role": message.role, "content": _blocks(message.content or "")})
    data: dict[str, Any] = {"messages": turns}
    return {"system": "\n\n".join(systems), **data} if systems else data


_EXPORTS: Final = {"openai": _to_openai, "anthropic": _to_anthropic}


def _kind(content: Any) -> Any:
    """The type of the last block."""
    return content[-1].get("type") if isinstance(content, list) and content else None


def _blocks(content: str | list[Any]) -> Any:
    return content if isinstance(content, str) else [_block(part) for part in content]


def _block(part: Any) -> Any:
    if not isinstance(part, Mapping) or part.get("type") != "image_url":
        return part
    image = part.get("image_url")
    url = str(image.get("url", "") if isinstance(image, Mapping) else image)
    if not url.startswith("data:"):
        return {"type": "image", "source": {"type": "url", "url": url}}
    head, _, data = url.removeprefix("data:").partition(",")
    source = {"type": "base64", "media_type": head.split(";")[0], "data": data}
    return {"type": "image", "source": source}


def _part(block: Any) -> Any:
    source = block.get("source") if isinstance(block, Mapping) else None
    if not isinstance(source, Mapping) or block.get("type") != "image":
        return block
    url = source.get("url") or f"data:{source.get('media_type')};base64,{source.get('data')}"
    return {"type": "image_url", "image_url": {"url": url}}


def _answer_blocks(message: Message) -> Any:
    # Its own blocks, as they came: thinking must go back unchanged with its signature.
    native = (message.model_extra or {}).get("content_blocks")
    if native:
        return native
    if not message.tool_calls:
        return _blocks(message.content or "")
    text, blocks = message.content, []
    if isinstance(text, str) and text:
        blocks.append({"type": "text", "text": text})
    elif isinstance(text, list):
        blocks.extend(_block(part) for part in text)
    for call in message.tool_calls:
        used = {"id": call.id, "name": call.name, "input": _arguments(call.arguments)}
        blocks.append({"type": "tool_use", **used})
    return blocks


def _arguments(text: str) -> Any:
    """An object, as the form demands; what is none is kept under a name, and found again by it."""
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return {"invalid_json": text}
    return value if isinstance(value, dict) else {"value": value}


def _imported(data: Any, form: str | None) -> tuple[str | None, list[Message]]:
    body = data if isinstance(data, Mapping) else {"messages": data}
    given = body.get("messages")
    if not isinstance(given, (list, tuple)) or not all(isinstance(m, Mapping) for m in given):
        raise LLMConfigError('data is no conversation; give {"messages": [{"role": …}, …]}')
    if form is None:
        form = "anthropic" if "system" in body or any(map(_is_native, given)) else "openai"
    if form == "anthropic":
        given = [message for turn in given for message in _from_anthropic(turn)]
    messages = [_as_message(message, number) for number, message in enumerate(given)]
    if "system" in body:
        return _text(body["system"]), messages
    if messages and messages[0].role in ("system", "developer"):
        return messages[0].text, messages[1:]
    return None, messages


def _is_native(message: Mapping[str, Any]) -> bool:
    content = message.get("content")
    native = ("image", "document", "thinking", "redacted_thinking", "tool_use", "tool_result")
    return isinstance(content, list) and any(
        isinstance(block, Mapping) and block.get("type") in native for block in content
    )


def _text(content: Any) -> str:
    return Message(role="user", content=content).text


def _from_anthropic(turn: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    role, content = turn.get("role"), turn.get("content")
    if not isinstance(content, list) or not all(isinstance(b, Mapping) for b in content):
        yield {"role": role, "content": content}
        return
    if role == "assistant":
        yield _answer(content)
        return
    rest = []
    for block in content:
        if block.get("type") == "tool_result":
            said = block.get("content", "")
            if isinstance(said, list):
                said = [_part(part) for part in said]
            yield {"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": said}
        else:
            rest.append(_part(block))
    if rest:
        yield {"role": role, "content": rest}


def _answer(blocks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    text = "".join(block.get("text", "") for block in blocks if block.get("type") == "text")
    message: dict[str, Any] = {"role": "assistant", "content": text or None}
    calls = [
        {
            "id": block.get("id"),
            "type": "function",
            "function": {
                "name": block.get("name"),
                "arguments": _arguments_text(block.get("input")),
            },
        }
        for block in blocks
        if block.get("type") == "tool_use"
    ]
    if calls:
        message["tool_calls"] = calls
    kinds = [block.get("type") for block in blocks]
    if set(kinds) - {"text", "tool_use"} or kinds.count("text") > 1:
        message["content_blocks"] = [dict(block) for block in blocks]
    return message


def _arguments_text(value: Any) -> str:
    if isinstance(value, Mapping) and value.keys() == {"invalid_json"}:
        return str(value["invalid_json"])
    return json.dumps(value or {}, ensure_ascii=False)


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
