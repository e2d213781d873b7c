"""For tests and offline work: a local server that plays a model's host, and one that misbehaves.

Names are imported when they are first used.
"""

from importlib import import_module
from typing import Any

__all__ = ["FAULTS", "FaultServer", "LocalServer", "Received", "serve"]

_MODULES = {
    **dict.fromkeys(__all__, "LLM.testing.server"),
    **dict.fromkeys(("FAULTS", "FaultServer"), "LLM.testing.faults"),
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return __all__
