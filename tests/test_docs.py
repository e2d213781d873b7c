"""The code blocks of README and docs are run, each document in order and against a local server."""

import builtins
import contextlib
import re
import socket
import subprocess
import sys
import unittest
from pathlib import Path

import pytest
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# What the documents and `LLMConfig` call the server that a reader has at hand.
DEFAULT_ADDRESS = ("127.0.0.1", 8000)


@pytest.fixture
def default_server(server, monkeypatch):
    """The default address leads to this test's own server: code runs as it is printed."""
    host = re.search(r"//([^:/]+):(\d+)", server.url)
    address = (host[1], int(host[2]))
    for name in ("connect", "connect_ex"):
        guarded = getattr(socket.socket, name)

        def connect(self, to, guarded=guarded):
            return guarded(self, address if to == DEFAULT_ADDRESS else to)

        monkeypatch.setattr(socket.socket, name, connect)
    return server


@pytest.fixture
def reader(monkeypatch, tmp_path):
    """Someone who follows the document in an empty folder: greets, then has nothing more to say."""
    said = iter(["Hello!", ""])

    def read_line(prompt=""):
        print(prompt, end="")
        line = next(said, None)
        if line is None:
            raise EOFError
        return line

    monkeypatch.setattr(builtins, "input", read_line)
    monkeypatch.setattr(sys, "argv", ["example.py"])
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
@pytest.mark.usefixtures("default_server", "reader")
def test_the_code_of_a_document_runs(document):
    """Blocks marked ```python; not ```python no-run, nor what follows `<!-- skip: next -->`."""
    parsed = Sybil(parsers=[PythonCodeBlockParser(), SkipParser()]).parse(document)
    # As a script's: what looks up its own module, like pickle or a dataclass, finds one.
    parsed.namespace["__name__"] = "__main__"
    for example in parsed.examples():
        with contextlib.suppress(unittest.SkipTest):
            example.evaluate()


def test_recipes_are_short():
    recipes = ROOT / "docs" / "recipes.md"
    blocks = re.findall(
        r"^```python\n(.*?)^```", recipes.read_text("utf-8"), re.MULTILINE | re.DOTALL
    )
    assert blocks
    assert [block for block in blocks if block.count("\n") >= 20] == []


@pytest.mark.timeout(900)  # it takes 15 s on a machine that has nothing else to do
def test_the_documentation_builds_without_a_warning(tmp_path):
    options = "--builder html --fail-on-warning --keep-going --nitpicky --quiet".split()
    built = subprocess.run(
        [sys.executable, "-m", "sphinx", *options, "--doctree-dir", tmp_path / "trees",
         ROOT / "docs", tmp_path / "html"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    assert (tmp_path / "html" / "index.html").is_file()
