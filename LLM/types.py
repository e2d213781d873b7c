"""What is said: messages, responses, usage and stream events.

Values of the wire are pydantic models that keep the fields they do not know (a newer server loses
nothing) and take enumerations as plain strings (a new finish reason is not an error).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from enum import Enum
from typing import Annotated, Any, Final, NamedTuple, Protocol

from pydantic import BaseModel, ConfigDict, PrivateAttr, WrapValidator, model_validator

from LLM.errors import Attempt, LLMConfigError, LLMError


class Unset(Enum):
    """The type of `UNSET`: an argument that was left out. `None` is something else: it switches off."""

    UNSET = "left out"

    def __bool__(self) -> bool:
        return False

    def __repr__(self) -> str:
        return "UNSET"


UNSET: Final = Unset.UNSET


class Value(BaseModel):
    """A value of the wire."""

    # Built when first used: a script that only chats does not pay for the other values.
    model_config = ConfigDict(extra="allow", protected_namespaces=(), defer_build=True)


def _or_none(value: Any, validate: Callable[[Any], Any]) -> Any:
    try:
        return validate(value)
    except ValueError:
        return None


def _name(value: Any, validate: Callable[[Any], Any]) -> Any:
    return str(value) if type(value) in (int, float) else _or_none(value, validate)


# What stands beside what was said, in a form that nobody can use, is unknown: an answer that was paid
# for is not refused for it. A number where a name is due is a name.
OrNone = WrapValidator(_or_none)
Name = Annotated[str | None, WrapValidator(_name)]


class FunctionCall(Value):
    """The function that the model wants called; `arguments` is JSON text, as the model wrote it."""

    name: str = ""
    arguments: str = ""

    @model_validator(mode="before")
    @classmethod
    def _lenient(cls, data: Any) -> Any:
        # Some servers send the arguments as an object, or null for none.
        if isinstance(data, dict) and not isinstance(data.get("arguments", ""), str):
            arguments = data["arguments"]
            return {**data, "arguments": "" if arguments is None else _json(arguments)}
        return data


class ToolCall(Value):
    """One call of a tool, in OpenAI's form."""

    id: Name = None
    type: str | None = "function"
    function: FunctionCall = FunctionCall()  # a custom tool's call has none

    @property
    def name(self) -> str:
        return self.function.name

    @property
    def arguments(self) -> str:
        """The arguments as JSON text; nothing promises that it is valid."""
        return self.function.arguments


class Message(Value):
    """One message of a conversation.

    Attributes:
        role: `system`, `user`, `assistant`, `tool` or `developer`.
        content: text, a list of parts (`{"type": "text", …}`, `{"type": "image_url", …}`), or `None`.
        name: who speaks, where a server uses it.
        tool_calls: of an assistant: the calls that it wants made.
        tool_call_id: of a tool's answer: the call that it answers.
    """

    role: str
    content: str | list[Any] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None

    @property
    def text(self) -> str:
        """The text of `content`, its text parts joined; `""` if there is none."""
        return content_text(self.content)


class AssistantMessage(Message):
    """A message as a server answers it: some leave out the role."""

    role: str = "assistant"


_COUNTS = (
    "prompt_tokens",
    "completion_tokens",
    "total_tokens",
    "cached_tokens",
    "reasoning_tokens",
    "cache_write_tokens",
)
_ABSURD = 10**12  # tokens of one call


class TokenUsage(Value):
    """Tokens of a call; `None` means unknown, which is not 0.

    The convention, whatever the provider's own: `prompt_tokens` contains `cached_tokens` and
    `cache_write_tokens`, and `completion_tokens` contains `reasoning_tokens`. (OpenAI counts like
    that; Anthropic's `input_tokens` leaves the cached ones out, so they are added here.)

    `a + b` and `sum(usages)` add field by field; a sum with an unknown part is unknown.
    """

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    total_tokens: int | None = None
    cached_tokens: int | None = None
    reasoning_tokens: int | None = None
    cache_write_tokens: int | None = None

    @model_validator(mode="before")
    @classmethod
    def _flatten(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        prompt = data.get("prompt_tokens_details")
        completion = data.get("completion_tokens_details")
        flat = dict(data)
        if flat.get("cached_tokens") is None:
            flat["cached_tokens"] = _get(
                prompt, "cached_tokens", data.get("prompt_cache_hit_tokens")
            )
        if flat.get("reasoning_tokens") is None:
            flat["reasoning_tokens"] = _get(completion, "reasoning_tokens", None)
        for name in _COUNTS:  # nonsense is unknown: whoever adds up must not be set back by it
            count = flat.get(name)
            if type(count) is int and not 0 <= count < _ABSURD:
                flat[name] = None
        parts = flat.get("prompt_tokens"), flat.get("completion_tokens")
        if flat.get("total_tokens") is None and all(isinstance(part, int) for part in parts):
            flat["total_tokens"] = sum(parts)
        return flat

    def __add__(self, other: object) -> TokenUsage:
        if isinstance(other, int) and other == 0:  # the start of `sum()`
            return self
        if not isinstance(other, TokenUsage):
            return NotImplemented
        mine, theirs = self.__dict__, other.__dict__
        return TokenUsage.model_construct(
            **{
                name: None if value is None or theirs[name] is None else value + theirs[name]
                for name, value in mine.items()
            }
        )

    __radd__ = __add__


class Pricer(Protocol):
    """What knows the prices."""

    def cost(
        self, provider: str | None, model: str | None, usage: TokenUsage | None
    ) -> Decimal | None: ...


class SentRequest(NamedTuple):
    """The request of a call, without its key. `credential` is the header's name and its prefix."""

    method: str
    url: str
    headers: Mapping[str, str]
    body: bytes | None
    credential: tuple[str, str] | None
    key_variable: str


@dataclass(slots=True)
class CallInfo:
    """What the client knows of a call beside the answer itself.

    Attributes:
        provider: name of the provider that answered.
        model: the model that was asked for there.
        request_id: the server's id of the request.
        history: its attempts.
        latency_ms: milliseconds.
        cached: the answer came from the cache.
        fallbacks: what was tried before, and why it failed, as (model, reason).
        prices: what knows its cost.
        request: what was sent.
    """

    provider: str | None = None
    model: str | None = None
    request_id: str | None = None
    history: tuple[Attempt, ...] = ()
    latency_ms: float | None = None
    cached: bool = False
    fallbacks: tuple[tuple[str, str], ...] = ()
    prices: Pricer | None = None
    request: SentRequest | None = None

    def cost(self, usage: TokenUsage | None) -> Decimal | None:
        """US dollars for this usage; 0 for an answer from the cache, `None` if unknown."""
        if self.cached:
            return Decimal(0)
        return self.prices.cost(self.provider, self.model, usage) if self.prices else None

    def as_curl(self) -> str:
        """The request as a command for a shell."""
        if self.request is None:
            raise LLMConfigError("no request was sent for this answer, so there is none to show")
        from LLM.curl import as_curl

        return as_curl(*self.request[:-1], variable=self.request.key_variable)


class Ending(NamedTuple):
    """How a call ended, for those who waited for it.

    Attributes:
        usage: the tokens as far as they are known.
        complete: the whole answer came; `False` for a stream that was closed, cut or cancelled.
        error: what a stream failed with.
        answer: gives the response, or what came of it.
    """

    usage: TokenUsage | None
    complete: bool
    error: LLMError | None
    answer: Callable[[], Answer | None]


class Answer(Value):
    """What every response has: where it came from and what it took."""

    _info: CallInfo = PrivateAttr(default_factory=CallInfo)

    @property
    def info(self) -> CallInfo:
        """All that the client knows of the call, to be read."""
        # As `self._info`, but pydantic takes 2 µs for that, and each layer asks.
        info: CallInfo = (self.__pydantic_private__ or {})["_info"]
        return info

    @property
    def cost(self) -> Decimal | None:
        """US dollars, exactly; 0 from the cache; `None` if the price or the usage is unknown.

        Prices come from the client's `price=`, else from the data of the extra `cost`.
        """
        return self._info.cost(getattr(self, "usage", None))

    @property
    def cached(self) -> bool:
        """Whether it came from the cache: nothing was sent and nothing paid."""
        return self._info.cached

    @property
    def fallbacks(self) -> tuple[tuple[str, str], ...]:
        """The models that were tried before this one answered, each with the reason; mostly empty."""
        return self._info.fallbacks

    def as_curl(self) -> str:
        """The request as a command for a shell, the key as a variable.

        Raises:
            LLMConfigError: nothing was sent: it came from the cache, or was made by hand.
        """
        return self._info.as_curl()

    @property
    def provider(self) -> str | None:
        """Name of the provider that answered."""
        return self._info.provider

    @property
    def request_id(self) -> str | None:
        """The server's id of the request, to show its support; `None` if it sent none."""
        return self._info.request_id

    @property
    def attempts(self) -> int:
        """HTTP requests that the call took; 1 if nothing failed."""
        return len(self._info.history)

    @property
    def history(self) -> tuple[Attempt, ...]:
        """An `Attempt` for each of them."""
        return self._info.history

    @property
    def latency_ms(self) -> float | None:
        """Milliseconds from the call to the whole answer, waits and failed attempts included."""
        return self._info.latency_ms


class Choice(Value):
    """One answer of a response; `stop_reason` is the native word for `finish_reason`, where there is one."""

    index: int = 0
    message: AssistantMessage
    finish_reason: str | None = None
    stop_reason: Any = None


class ChatCompletionResponse(Answer):
    """An answer to `chat_completion`."""

    id: Name = None
    object: str | None = "chat.completion"
    created: Annotated[float | None, OrNone] = None
    model: Name = None
    choices: list[Choice]
    usage: Annotated[TokenUsage | None, OrNone] = None

    @property
    def text(self) -> str:
        """Text of the first choice; `""` if it is a tool call or a refusal."""
        return self.choices[0].message.text if self.choices else ""

    @property
    def tool_calls(self) -> list[ToolCall]:
        """Tool calls of the first choice."""
        return (self.choices[0].message.tool_calls or []) if self.choices else []

    @property
    def finish_reason(self) -> str | None:
        return self.choices[0].finish_reason if self.choices else None


class CompletionChoice(Value):
    index: int = 0
    text: str = ""
    finish_reason: str | None = None


class CompletionResponse(Answer):
    """An answer to `completion`; with a list of prompts, one choice each, in their order."""

    id: Name = None
    object: str | None = "text_completion"
    created: Annotated[float | None, OrNone] = None
    model: Name = None
    choices: list[CompletionChoice]
    usage: Annotated[TokenUsage | None, OrNone] = None

    @property
    def text(self) -> str:
        """Text of the first choice."""
        return self.choices[0].text if self.choices else ""

    @property
    def finish_reason(self) -> str | None:
        return self.choices[0].finish_reason if self.choices else None


class ModelInfo(Value):
    id: str
    object: str | None = "model"
    created: Annotated[float | None, OrNone] = None
    owned_by: str | None = None


class ModelsResponse(Answer):
    """An answer to `list_models`."""

    data: list[ModelInfo]

    def __iter__(self) -> Iterator[ModelInfo]:  # type: ignore[override]  # the models, not the fields
        return iter(self.data)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> ModelInfo:
        return self.data[index]

    def __contains__(self, model: Any) -> bool:
        return any(model in (known, known.id) for known in self.data)


class EventType(str, Enum):
    """What a `StreamEvent` carries, as a plain string."""

    TEXT_DELTA = "text_delta"
    REASONING_DELTA = "reasoning_delta"
    TOOL_CALL = "tool_call"
    MESSAGE_COMPLETE = "message_complete"
    ERROR = "error"

    def __str__(self) -> str:
        return self.value


class TextDelta(str):
    """A piece of text, as it came; it is a string, and `.text` is the same as a plain one."""

    __slots__ = ()

    @property
    def text(self) -> str:
        return str(self)


# Not pydantic: it is made for every token, and a validated model costs ten times as much (2 µs).
@dataclass(slots=True)
class StreamEvent:
    """One event of a stream; only what belongs to its type is set.

    Attributes:
        type: an `EventType`.
        text_delta: of `TEXT_DELTA`: the next piece of text.
        tool_call: of `TOOL_CALL`: a whole call, once its arguments are complete.
        reasoning_delta: of `REASONING_DELTA`: the next piece of the model's thinking.
        error: of `ERROR`: the `LLMError` (only with `on_error="event"`).
        finish_reason: of `MESSAGE_COMPLETE`: why the model stopped, `None` if the server did not say.
        usage: of `MESSAGE_COMPLETE`: tokens of the call, or `None` if unknown.
    """

    type: EventType
    text_delta: TextDelta | None = None
    tool_call: ToolCall | None = None
    reasoning_delta: str | None = None
    error: LLMError | None = None
    finish_reason: str | None = None
    usage: TokenUsage | None = None


class Reply(BaseModel):
    """A call as one flat value, success or not; what `generate` returns.

    Attributes:
        content: the text, `""` on failure.
        success: whether a whole answer came.
        error_message: one line, `None` on success.
        error: the `LLMError` itself, `None` on success.
        latency_ms: milliseconds that the call took.
        cost: US dollars; `None` if unknown.
        cached: whether it came from the cache.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, frozen=True, defer_build=True)

    content: str = ""
    success: bool = True
    error_message: str | None = None
    error: LLMError | None = None
    provider: str | None = None
    model: str | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    total_tokens: int | None = None
    finish_reason: str | None = None
    latency_ms: float | None = None
    tool_calls: list[ToolCall] = []
    cost: Decimal | None = None
    cached: bool = False

    def __bool__(self) -> bool:
        return self.success


@dataclass(frozen=True)
class Comparison:
    """What one model made of a question that several were asked; what `compare` returns.

    Attributes:
        model: as it was named.
        text: the answer, of a failure as far as it came.
        latency_ms: milliseconds from the call to the end.
        time_to_first_token_ms: milliseconds from the call to the first event; `None` if none came.
        usage: tokens, `None` if unknown.
        cost: US dollars, `None` if unknown.
        error: what went wrong, or `None`.
    """

    model: str
    text: str
    latency_ms: float
    time_to_first_token_ms: float | None
    usage: TokenUsage | None
    cost: Decimal | None
    finish_reason: str | None
    error: LLMError | None = None


def content_text(content: object) -> str:
    """The text in a message's content: itself, or its text parts joined."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return ""
    parts = (part.get("text") for part in content if isinstance(part, Mapping))
    return "".join(part for part in parts if isinstance(part, str))


def _get(details: object, name: str, default: Any) -> Any:
    value = details.get(name) if isinstance(details, Mapping) else None
    return default if value is None else value


def _json(value: object) -> str:
    import json  # needed for odd servers only

    return json.dumps(value, ensure_ascii=False)
