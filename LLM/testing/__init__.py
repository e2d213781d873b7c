"""For tests and offline work: servers that play a model's host, rightly or not, recordings, a closed network.

Names are imported when they are first used.
"""

from importlib import import_module
from typing import Any

__all__ = [
    "BatchDesk",
    "CassetteError",
    "CassetteMiss",
    "FAULTS",
    "FaultServer",
    "LocalServer",
    "NetworkBlocked",
    "Received",
    "block_network",
    "record",
    "replay",
    "serve",
    "use_cassette",
]

_CASSETTE = ("CassetteError", "CassetteMiss", "record", "replay", "use_cassette")

_MODULES = {
    **dict.fromkeys(__all__, "LLM.testing.server"),
    "BatchDesk": "LLM.testing.batches",
    **dict.fromkeys(("FAULTS", "FaultServer"), "LLM.testing.faults"),
    **dict.fromkeys(_CASSETTE, "LLM.testing.cassette"),
    **dict.fromkeys(("NetworkBlocked", "block_network"), "LLM.testing.network"),
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return __all__
