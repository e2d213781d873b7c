"""The pytest plugin: fixtures for programs that talk to models.

It is loaded in every run of pytest where this package is installed: what is heavy is imported by the
fixture that needs it.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

__all__ = ["block_network", "llm_cassette", "llm_faults", "llm_server"]

# The values of --llm-record, and the mode of the cassette that each means.
_MODES = {"once": "once", "all": "record", "none": "replay"}

# Far below the 255 bytes that file systems allow, four for each character.
_LONGEST_NAME = 60

# A test that has failed is not told at its end once more why.
_FAILED = pytest.StashKey[bool]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--llm-record`."""
    parser.getgroup("LLM").addoption(
        "--llm-record",
        nargs="?",
        const="all",
        default="once",
        choices=list(_MODES),
        help="what `llm_cassette` does: `once` (default) replays if there is a recording and records "
        "if there is none; `all` (or no value) records anew; `none` never records",
    )


def pytest_configure(config: pytest.Config) -> None:
    """The marker."""
    config.addinivalue_line("markers", "block_network: nothing beyond this machine can be reached")


def pytest_itemcollected(item: pytest.Item) -> None:
    """The marker asks for the fixture, before any other."""
    if item.get_closest_marker("block_network") is not None:
        names: list[str] = getattr(item, "fixturenames", [])
        if "block_network" not in names:
            names.insert(0, "block_network")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    """Remember what has failed."""
    try:
        return (yield)
    except BaseException:
        item.stash[_FAILED] = True
        raise


@pytest.fixture
def llm_server() -> Iterator[Any]:
    """A `LocalServer`: a model's host on this machine."""
    from LLM.testing.server import LocalServer

    with LocalServer() as server:
        yield server


@pytest.fixture
def llm_faults() -> Iterator[Any]:
    """A `FaultServer`: one that misbehaves by name."""
    from LLM.testing.faults import FaultServer

    with FaultServer() as server:
        yield server


@pytest.fixture
def llm_cassette(request: pytest.FixtureRequest) -> Iterator[Any]:
    """What the test's clients say, replayed from `cassettes/MODULE/TEST.jsonl` or recorded there.

    `--llm-record` says which.
    """
    from LLM.testing.cassette import use_cassette

    mode = _MODES[request.config.getoption("--llm-record")]
    path = _cassette_path(request.node.path, request.node.nodeid)
    with use_cassette(path, mode=mode) as cassette:
        yield cassette
        if _FAILED in request.node.stash:
            cassette.misses.clear()


@pytest.fixture
def block_network(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Nothing beyond this machine can be reached; also as a marker, `@pytest.mark.block_network`."""
    from LLM.testing.network import block_network as block

    with block() as reached:
        yield reached
        if _FAILED in request.node.stash:
            reached.clear()


def _cassette_path(module: Path, nodeid: str) -> Path:
    """`cassettes/MODULE/TEST.jsonl` beside the module; a name that no file can have gets a checksum."""
    name = nodeid.partition("::")[2].replace("::", ".") or "test"
    plain = re.sub(r"[^\w.-]+", "_", name).strip("._")[:_LONGEST_NAME]
    if plain != name:
        import zlib

        plain = f"{plain}-{zlib.crc32(name.encode('utf-8', 'replace')):08x}"
    return module.parent / "cassettes" / module.stem / f"{plain}.jsonl"
