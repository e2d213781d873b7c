"""What is built on top of `LLM`: tools, the agent loop, conversations, context.

The names are imported when they are first used, as those of `LLM` are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from agents.agent import Agent as Agent
    from agents.agent import Cancel as Cancel
    from agents.context import StableContext as StableContext
    from agents.context import fit as fit
    from agents.conversation import Conversation as Conversation
    from agents.retrieval import Document as Document
    from agents.retrieval import Index as Index
    from agents.retrieval import place as place
    from agents.retrieval import plan as plan
    from agents.retrieval import split as split
    from agents.store import ConflictError as ConflictError
    from agents.store import Store as Store
    from agents.store import StoreError as StoreError
    from agents.tools import Tool as Tool
    from agents.tools import Toolbox as Toolbox
    from agents.tools import ToolContext as ToolContext
    from agents.tools import ToolFailed as ToolFailed
    from agents.tools import ToolPending as ToolPending
    from agents.tools import ToolRetry as ToolRetry
    from agents.tools import tool as tool
    from agents.types import AgentCancelledError as AgentCancelledError
    from agents.types import AgentError as AgentError
    from agents.types import AgentLimitError as AgentLimitError
    from agents.types import AgentLoopError as AgentLoopError
    from agents.types import RunResult as RunResult

_MODULES = {
    "agents.agent": ("Agent", "Cancel"),
    "agents.context": ("StableContext", "fit"),
    "agents.conversation": ("Conversation",),
    "agents.retrieval": ("Document", "Index", "place", "plan", "split"),
    "agents.store": ("ConflictError", "Store", "StoreError"),
    "agents.tools": (
        "Tool",
        "ToolContext",
        "ToolFailed",
        "ToolPending",
        "ToolRetry",
        "Toolbox",
        "tool",
    ),
    "agents.types": (
        "AgentCancelledError",
        "AgentError",
        "AgentLimitError",
        "AgentLoopError",
        "RunResult",
    ),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = sorted(_HOME)  # noqa: PLE0605 - one table of names, not two


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    # Not kept here: `calculator` is the name of a module too, and importing that takes its place.
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
