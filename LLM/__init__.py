"""A synchronous client for language models that a script can depend on.

    from LLM import LLM, LLMConfig

    with LLM(LLMConfig(model="openai/gpt-4o-mini")) as llm:
        print(llm.chat_completion([{"role": "user", "content": "Hello!"}]).text)

The names are imported when they are first used, so that `import LLM` itself costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from LLM.version import __version__ as __version__

if TYPE_CHECKING:
    from LLM.aio import AsyncLLM as AsyncLLM
    from LLM.aio import AsyncStream as AsyncStream
    from LLM.batch import MapProgress as MapProgress
    from LLM.batch import MapResult as MapResult
    from LLM.batch import MapRun as MapRun
    from LLM.batches import Batches as Batches
    from LLM.batches import BatchResults as BatchResults
    from LLM.cancel import CancelScope as CancelScope
    from LLM.client import LLM as LLM
    from LLM.clock import Clock as Clock
    from LLM.config import LLMConfig as LLMConfig
    from LLM.errors import (
        Attempt as Attempt,
    )
    from LLM.errors import (
        ErrorInfo as ErrorInfo,
    )
    from LLM.errors import (
        ErrorType as ErrorType,
    )
    from LLM.errors import (
        LLMAPIError as LLMAPIError,
    )
    from LLM.errors import (
        LLMAuthenticationError as LLMAuthenticationError,
    )
    from LLM.errors import (
        LLMBudgetError as LLMBudgetError,
    )
    from LLM.errors import (
        LLMCancelledError as LLMCancelledError,
    )
    from LLM.errors import (
        LLMConfigError as LLMConfigError,
    )
    from LLM.errors import (
        LLMConnectionError as LLMConnectionError,
    )
    from LLM.errors import (
        LLMContentFilterError as LLMContentFilterError,
    )
    from LLM.errors import (
        LLMContextLengthError as LLMContextLengthError,
    )
    from LLM.errors import (
        LLMError as LLMError,
    )
    from LLM.errors import (
        LLMInvalidRequestError as LLMInvalidRequestError,
    )
    from LLM.errors import (
        LLMNotFoundError as LLMNotFoundError,
    )
    from LLM.errors import (
        LLMOutputError as LLMOutputError,
    )
    from LLM.errors import (
        LLMQuotaError as LLMQuotaError,
    )
    from LLM.errors import (
        LLMRateLimitError as LLMRateLimitError,
    )
    from LLM.errors import (
        LLMResponseError as LLMResponseError,
    )
    from LLM.errors import (
        LLMServerError as LLMServerError,
    )
    from LLM.errors import (
        LLMStreamError as LLMStreamError,
    )
    from LLM.errors import (
        LLMTimeoutError as LLMTimeoutError,
    )
    from LLM.errors import (
        classify_error as classify_error,
    )
    from LLM.journal import JournalError as JournalError
    from LLM.output import InvalidOutputError as InvalidOutputError
    from LLM.output import Output as Output
    from LLM.output import Parsed as Parsed
    from LLM.output import ParsedStream as ParsedStream
    from LLM.policies.budget import Book as Book
    from LLM.policies.budget import Budget as Budget
    from LLM.policies.cache import ResponseCache as ResponseCache
    from LLM.policies.fallback import FallbackPolicy as FallbackPolicy
    from LLM.policies.ratelimit import RateLimitConfig as RateLimitConfig
    from LLM.policies.ratelimit import RateLimiter as RateLimiter
    from LLM.policies.ratelimit import TokenAwareRateLimiter as TokenAwareRateLimiter
    from LLM.policies.retry import RetryPolicy as RetryPolicy
    from LLM.policies.retry import retry_with_backoff as retry_with_backoff
    from LLM.policies.spending import Amount as Amount
    from LLM.policies.spending import Receipt as Receipt
    from LLM.policies.spending import Spending as Spending
    from LLM.policies.spending import Standing as Standing
    from LLM.policies.usage import ModelUsage as ModelUsage
    from LLM.policies.usage import UsageTotals as UsageTotals
    from LLM.prices import Price as Price
    from LLM.providers.batches import Batch as Batch
    from LLM.providers.batches import BatchCounts as BatchCounts
    from LLM.stream import Stream as Stream
    from LLM.telemetry import AttemptFailed as AttemptFailed
    from LLM.telemetry import CallFinished as CallFinished
    from LLM.telemetry import CallStarted as CallStarted
    from LLM.telemetry import Waited as Waited
    from LLM.telemetry import audit as audit
    from LLM.tokens import TokenCount as TokenCount
    from LLM.tokens import context_window as context_window
    from LLM.tokens import count_tokens as count_tokens
    from LLM.tracing import otel as otel
    from LLM.types import (
        UNSET as UNSET,
    )
    from LLM.types import (
        ChatCompletionResponse as ChatCompletionResponse,
    )
    from LLM.types import (
        Choice as Choice,
    )
    from LLM.types import (
        Comparison as Comparison,
    )
    from LLM.types import (
        CompletionChoice as CompletionChoice,
    )
    from LLM.types import (
        CompletionResponse as CompletionResponse,
    )
    from LLM.types import (
        EventType as EventType,
    )
    from LLM.types import (
        FunctionCall as FunctionCall,
    )
    from LLM.types import (
        Message as Message,
    )
    from LLM.types import (
        ModelInfo as ModelInfo,
    )
    from LLM.types import (
        ModelsResponse as ModelsResponse,
    )
    from LLM.types import (
        Reply as Reply,
    )
    from LLM.types import (
        StreamEvent as StreamEvent,
    )
    from LLM.types import (
        TextDelta as TextDelta,
    )
    from LLM.types import (
        TokenUsage as TokenUsage,
    )
    from LLM.types import (
        ToolCall as ToolCall,
    )
    from LLM.types import (
        Unset as Unset,
    )

_MODULES = {
    "LLM.batch": ("MapProgress", "MapResult", "MapRun"),
    "LLM.batches": ("BatchResults", "Batches"),
    "LLM.aio": ("AsyncLLM", "AsyncStream"),
    "LLM.cancel": ("CancelScope",),
    "LLM.client": ("LLM",),
    "LLM.clock": ("Clock",),
    "LLM.config": ("LLMConfig",),
    "LLM.errors": (
        "Attempt",
        "ErrorInfo",
        "ErrorType",
        "LLMAPIError",
        "LLMAuthenticationError",
        "LLMBudgetError",
        "LLMCancelledError",
        "LLMConfigError",
        "LLMConnectionError",
        "LLMContentFilterError",
        "LLMContextLengthError",
        "LLMError",
        "LLMInvalidRequestError",
        "LLMNotFoundError",
        "LLMOutputError",
        "LLMQuotaError",
        "LLMRateLimitError",
        "LLMResponseError",
        "LLMServerError",
        "LLMStreamError",
        "LLMTimeoutError",
        "classify_error",
    ),
    "LLM.journal": ("JournalError",),
    "LLM.output": ("InvalidOutputError", "Output", "Parsed", "ParsedStream"),
    "LLM.policies.budget": ("Book", "Budget"),
    "LLM.policies.cache": ("ResponseCache",),
    "LLM.policies.fallback": ("FallbackPolicy",),
    "LLM.policies.ratelimit": ("RateLimitConfig", "RateLimiter", "TokenAwareRateLimiter"),
    "LLM.policies.spending": ("Amount", "Receipt", "Spending", "Standing"),
    "LLM.policies.usage": ("ModelUsage", "UsageTotals"),
    "LLM.prices": ("Price",),
    "LLM.providers.batches": ("Batch", "BatchCounts"),
    "LLM.telemetry": ("AttemptFailed", "CallFinished", "CallStarted", "Waited", "audit"),
    "LLM.tokens": ("TokenCount", "context_window", "count_tokens"),
    "LLM.policies.retry": ("RetryPolicy", "retry_with_backoff"),
    "LLM.stream": ("Stream",),
    "LLM.tracing": ("otel",),
    "LLM.types": (
        "UNSET",
        "ChatCompletionResponse",
        "Choice",
        "Comparison",
        "CompletionChoice",
        "CompletionResponse",
        "EventType",
        "FunctionCall",
        "Message",
        "ModelInfo",
        "ModelsResponse",
        "Reply",
        "StreamEvent",
        "TextDelta",
        "TokenUsage",
        "ToolCall",
        "Unset",
    ),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = sorted(_HOME)  # noqa: PLE0605 - one table of names, not two


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
