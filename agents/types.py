"""The values of a conversation, handed on from `LLM.types`, where they are defined once."""

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
    "ChatCompletionResponse",
    "CompletionResponse",
    "EventType",
    "FunctionCall",
    "Message",
    "ModelsResponse",
    "Reply",
    "StreamEvent",
    "TextDelta",
    "TokenUsage",
    "ToolCall",
]
