"""`demo budget`: what it says is what happened."""

import io
import re
import sys
import time

import pytest

from LLM import cli
from LLM.commands import demo
from tests.fakes import patiently

QUICK = ("demo", "budget", "--calls", "60", "--seconds", "0.5")


@pytest.fixture
def run(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO())

    def run(*argv):
        code = cli.main(argv)
        return (code, *capsys.readouterr())

    return run


def number(pattern, text):
    return int(re.search(pattern, text)[1])


def test_calls_are_paced_budgeted_cached_and_reported(run):
    # On a slow machine no call has to wait for the limiter, unless its minutes are longer.
    patiently(lambda seconds: assert_all_is_shown(run, seconds), 2, 20)


def assert_all_is_shown(run, seconds):
    begun = time.monotonic()
    code, out, err = run("demo", "budget", "--calls", "60", "--seconds", str(seconds))
    assert (code, err) == (0, "")
    assert time.monotonic() - begun > 0.75 * seconds
    seen, calls, hits, refused = map(
        int,
        re.search(
            r"The server saw (\d+) requests = (\d+) calls − (\d+) from the cache − (\d+) refused",
            out,
        ).groups(),
    )
    assert calls == 60
    assert seen == calls - hits - refused
    assert hits > 5
    assert refused > 0
    marks = "".join(re.findall(r"^([.wcx]+) +\d+/60 ", out, re.MULTILINE))
    assert (len(marks), marks.count("c"), marks.count("x")) == (calls, hits, refused)
    assert marks.count("w") == number(r"limiter +(\d+) calls waited", out) > 0
    answered, cached = map(int, re.search(r"/stand-in +(\d+) +(\d+) ", out).groups())
    assert (answered, cached) == (calls - refused, hits)
    assert re.search(
        r"^refused: the call may cost \$.* at worst, and budget 'demo'", out, re.MULTILINE
    )
    assert out.count("warned: budget 'demo': $") == 1
    assert number(r"cache +(\d+) hits", out) == hits


def test_one_call_is_enough(run):
    code, out, _ = run("demo", "budget", "--calls", "1", "--seconds", "0.1")
    assert code == 0
    assert "The server saw 1 requests = 1 calls − 0 from the cache − 0 refused." in out


def test_repeats_ask_what_was_asked_before():
    asked = [demo._asked(number) for number in range(100)]
    repeats = [place for place, question in enumerate(asked) if question in asked[:place]]
    assert repeats == list(range(3, 100, 4))


def test_a_server_that_counts_otherwise_is_a_failure(run, monkeypatch):
    from LLM.testing import LocalServer

    counted = LocalServer.requests.fget
    monkeypatch.setattr(LocalServer, "requests", property(lambda self: counted(self)[1:]))
    code, _, err = run("demo", "budget", "--calls", "4", "--seconds", "0.2")
    assert code == 1
    assert re.fullmatch(r"error: the server saw \d+ requests, which is not 4 calls .*\n", err)


def test_a_call_that_fails_otherwise_is_a_failure(run, monkeypatch):
    from LLM.testing import LocalServer

    class Broken(LocalServer):
        def __init__(self, **settings):
            super().__init__(["1 * 3 = 3.", {"text": "broken", "status": 400}], **settings)

    monkeypatch.setattr("LLM.testing.LocalServer", Broken)
    code, _, err = run("demo", "budget", "--calls", "20", "--seconds", "0.2")
    assert code == 1
    assert "error: a call failed: " in err
    assert "broken" in err


@pytest.mark.parametrize("plain", [True, False])
def test_on_a_terminal_one_line_changes(run, monkeypatch, plain):
    if not plain:
        pytest.importorskip("rich")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    screen = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    screen.isatty = lambda: True
    monkeypatch.setattr(sys, "stdout", screen)
    assert run(*QUICK, *(["--plain"] if plain else []))[0] == 0
    shown = screen.buffer.getvalue().decode()
    assert re.search(r"\r(\x1b\[2K)?█*[▏▎▍▌▋▊▉]? +\d+/60  \$0\.0\d+ spent", shown)
    seen = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", shown)
    assert "The server saw " in seen


@pytest.mark.parametrize(
    "argv, hint",
    [
        (["bugdet"], "did you mean 'budget'?"),
        (["xyzzy"], "there are talk, budget"),
        (["budget", "--calls", "0"], "above 0"),
        (["budget", "--calls", "many"], "above 0"),
        (["budget", "--seconds", "nan"], "above 0"),
    ],
)
def test_what_cannot_be_shown_is_said(run, argv, hint):
    code, out, err = run("demo", *argv)
    assert (code, out) == (2, "")
    assert hint in err


def test_the_talk_can_be_named(run):
    code, out, _ = run("demo", "talk", "--plain")
    assert code == 0
    assert "Your name is Ada." in out
