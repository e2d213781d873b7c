"""The values of a conversation and of an agent's run. `Message` and its kin are those of `LLM`."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Generic, Literal, TypeVar

from LLM import LLMError
from LLM.types import (
    ChatCompletionResponse,
    CompletionResponse,
    EventType,
    FunctionCall,
    Message,
    ModelsResponse,
    Reply,
    StreamEvent,
    TextDelta,
    TokenUsage,
    ToolCall,
)

__all__ = [
    "AgentCancelledError",
    "AgentError",
    "AgentEvent",
    "AgentLimitError",
    "AgentLoopError",
    "ChatCompletionResponse",
    "CompletionResponse",
    "EventType",
    "FunctionCall",
    "Message",
    "ModelsResponse",
    "Pending",
    "Reply",
    "RunResult",
    "StreamEvent",
    "TextDelta",
    "TokenUsage",
    "ToolCall",
    "ToolResult",
    "Turn",
]

T = TypeVar("T")

Outcome = Literal["ok", "retry", "failed", "pending"]


@dataclass(frozen=True)
class ToolResult:
    """What came of one tool call.

    Attributes:
        call: the call that it answers.
        content: the text that the model gets.
        outcome: `ok`; `retry`: the model should mend its call; `failed`: the model should know that it
            did not work; `pending`: a person must decide, nothing was run.
        seconds: how long the tool ran.
        value: what the function returned, for the program; `None` unless `ok`.
    """

    call: ToolCall
    content: str
    outcome: Outcome = "ok"
    seconds: float = 0.0
    value: Any = None

    @property
    def message(self) -> Message:
        """The message that tells the model."""
        return Message(role="tool", tool_call_id=self.call.id, content=self.content)


@dataclass(frozen=True)
class Turn:
    """One answer of the model, and what came of the calls in it.

    Attributes:
        number: from 1.
        response: the answer.
        results: of its tool calls, in their order; empty if it made none.
    """

    number: int
    response: ChatCompletionResponse
    results: tuple[ToolResult, ...] = ()


@dataclass(frozen=True)
class Pending:
    """A tool call that waits for a person.

    Attributes:
        call: what the model wants called.
        reason: why nobody may decide it but a person: `approval`, or `unknown`: the tool may run only
            once, was under way when the run broke off, and nobody knows whether it came to its end.
    """

    call: ToolCall
    reason: Literal["approval", "unknown"] = "approval"


@dataclass(frozen=True)
class RunResult(Generic[T]):
    """What an agent's run came to.

    Attributes:
        output: the answer: text, or an instance of the agent's `output_type`; `None` while it is paused
            and on an error.
        messages: the whole conversation, system message included.
        turns: each answer of the model with its results.
        usage: tokens of all turns; a part is `None` if a turn did not say.
        cost: US dollars of all turns; `None` if one of them is unknown.
        pending: calls that wait for a person; empty if the run is over.
        run_id: what `resume` takes.
    """

    output: T | None
    messages: tuple[Message, ...] = ()
    turns: tuple[Turn, ...] = ()
    usage: TokenUsage | None = None
    cost: Decimal | None = None
    pending: tuple[Pending, ...] = ()
    run_id: str | None = None

    @property
    def paused(self) -> bool:
        """Whether a person must decide before it goes on."""
        return bool(self.pending)


@dataclass(frozen=True)
class AgentEvent:
    """One event of a streamed run; only what belongs to its type is set.

    Attributes:
        type: `text`, `reasoning`, `tool_call`, `tool_result`, `turn` or `result`.
        text: of `text` and `reasoning`: the next piece.
        tool_call: of `tool_call`: a whole call that is about to be run.
        tool_result: of `tool_result`: what came of it.
        turn: of `turn`: the turn that is over.
        result: of `result`: the last event.
    """

    type: Literal["text", "reasoning", "tool_call", "tool_result", "turn", "result"]
    text: str = ""
    tool_call: ToolCall | None = None
    tool_result: ToolResult | None = None
    turn: Turn | None = None
    result: RunResult[Any] | None = None


class AgentError(LLMError):
    """A run ended without an answer.

    Attributes:
        result: everything so far: messages, turns, usage, cost.
    """

    def __init__(
        self, message: str = "", *, result: RunResult[Any] | None = None, **details: Any
    ) -> None:
        super().__init__(message, **details)
        self.result = result


class AgentLimitError(AgentError):
    """A limit was reached.

    Attributes:
        limit: which: `turns`, `tool_calls`, `tokens`, `cost` or `deadline`.
    """

    def __init__(self, message: str = "", *, limit: str = "turns", **details: Any) -> None:
        super().__init__(message, **details)
        self.limit = limit


class AgentLoopError(AgentError):
    """The model made the same calls with the same results again and again, also after it was told."""


class AgentCancelledError(AgentError):
    """The caller cancelled the run."""
