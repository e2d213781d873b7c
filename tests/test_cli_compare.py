"""`compare`: several models answer the same question, in a pipe, for a program, on a terminal."""

import io
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from LLM import cli
from LLM.commands import view
from LLM.testing import LocalServer

ROOT = Path(__file__).parents[1]

HELLO = (
    "Hello! I am a stand-in model: I follow fixed rules, so that programs can be tested offline."
)


@pytest.fixture
def run(capsys, monkeypatch):
    """Run `compare`: (exit code, stdout, stderr)."""

    def run(*argv, stdin=""):
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        code = cli.main(["compare", *argv])
        return (code, *capsys.readouterr())

    return run


@pytest.fixture
def shown(run, monkeypatch):
    """Run it on a terminal with rich: (exit code, the screen)."""
    pytest.importorskip("rich")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")

    def shown(*argv, columns=80):
        monkeypatch.setenv("COLUMNS", str(columns))
        screen = io.StringIO()
        screen.isatty = lambda: True
        monkeypatch.setattr(sys, "stdout", screen)
        code = run(*argv)[0]
        return code, re.sub(r"\x1b\[[\d;?]*[A-Za-z]|\r", "", screen.getvalue())

    return shown


@pytest.fixture
def at(server):
    return "--base-url", server.url


def by_model(server, replies):
    """Let each model say its own, at whatever time it is asked."""
    server.reply(lambda received: replies[received.json["model"]])


def test_each_model_gets_the_question_and_its_answer_is_shown_with_its_figures(run, server, at):
    by_model(server, {"one": "Yes.", "two": "No, I do not\nthink so."})
    code, out, err = run(*at, "-m", "one", "-m", "two", "Is", "it", "so?")
    assert (code, err) == (0, "")
    answers, _, figures = out.partition("\n\nmodel ")
    assert answers == "== one\nYes.\n\n== two\nNo, I do not\nthink so."
    one, two = figures.splitlines()[1:]
    assert re.fullmatch(
        r"one +[\d.,]+ ms +[\d.,]+ ms +1 +4 +4 +2 +\S+", one
    )  # words, characters, tokens
    assert re.match(r"two +[\d.,]+ ms +[\d.,]+ ms +6 +22 ", two)
    asked = [request.json["messages"] for request in server.requests]
    assert asked == [[{"role": "user", "content": "Is it so?"}]] * 2


def test_it_takes_what_ask_takes(run, server, at):
    options = ["--system", "Be brief.", "--max-tokens", "3", "--temperature", "0.5"]
    code, out, _ = run(*at, "-m", "one", *options, "Explain.", stdin="A text.\n")
    assert code == 0
    assert "(cut: the answer reached the largest number of tokens" in out
    sent = server.requests[-1].json
    assert [said["content"] for said in sent["messages"]] == ["Be brief.", "A text.\n\nExplain."]
    assert (sent["max_tokens"], sent["temperature"]) == (3, 0.5)


def test_json_is_a_list_with_everything(run, server, at):
    by_model(server, {"one": "Yes indeed.", "two": {"text": "broken", "status": 400}})
    code, out, err = run(*at, "--json", "-m", "one", "-m", "two", "hello")
    assert (code, err) == (0, "")
    one, two = json.loads(out)
    assert (one["model"], one["text"], one["words"], one["characters"]) == (
        "one",
        "Yes indeed.",
        2,
        11,
    )
    assert one["usage"]["completion_tokens"] == 3
    assert 0 < one["time_to_first_token_ms"] <= one["latency_ms"]
    assert (one["error"], one["finish_reason"]) == (None, "stop")
    assert (two["model"], two["text"], two["usage"]) == ("two", "", None)
    assert "broken" in two["error"]


def test_one_that_fails_does_not_spoil_the_others(run, server, at):
    by_model(server, {"one": {"text": "broken\nreally", "status": 400}, "two": "Yes."})
    code, out, err = run(*at, "-m", "one", "-m", "two", "hello")
    assert (code, err) == (0, "")
    assert re.search(r"== one\nerror: .*broken really\n\n== two\nYes\.\n", out)
    assert re.search(r"one +[\d.,]+ ms +— +0 +0 +— +— +—\n", out)


def test_a_cut_answer_is_shown_as_far_as_it_came(run, server, at):
    event = {"choices": [{"index": 0, "delta": {"content": "The answer is"}}]}
    server.reply(
        body=f"data: {json.dumps(event)}\n\n", headers={"content-type": "text/event-stream"}
    )
    code, out, _ = run(*at, "-m", "one", "hello")
    assert code == 1
    assert re.match(r"== one\nThe answer is\nerror: ", out)


def test_if_none_answers_it_fails_as_ask_does(run, server, at, monkeypatch):
    server.reply(lambda _: {"text": "broken", "status": 400})
    assert run(*at, "-m", "one", "-m", "two", "hello")[0] == 1
    code, _, err = run(*at, "-m", "one", "--temperature", "9", "hello")
    assert code == 2
    assert "between 0.0 and 2.0" in err


def test_a_prefix_chooses_the_host(run, server, monkeypatch):
    monkeypatch.setenv("OLLAMA_HOST", server.url)
    monkeypatch.setenv("GROQ_API_KEY", "a\nb")
    code, out, _ = run("-m", "ollama/one", "-m", "groq/two", "hello")
    assert code == 0
    assert server.requests[-1].json["model"] == "one"
    assert out.startswith(f"== ollama/one\n{HELLO}\n\n== groq/two\nerror: ")
    assert "GROQ_API_KEY has a line break" in out
    code, out, err = run("-m", "groq/two", "-m", "ollama/one", "hello")
    assert (code, out) == (2, "")
    assert "GROQ_API_KEY has a line break" in err


def test_one_without_a_prefix_is_asked_where_ask_would(run, server, monkeypatch):
    monkeypatch.setenv("LLM_BASE_URL", server.url)
    monkeypatch.setenv("LLM_API_KEY", "sk-mine")
    monkeypatch.setenv("LLM_MODEL", "another")
    assert run("-m", "one", "-m", "two", "hello")[0] == 0
    assert {request.json["model"] for request in server.requests} == {"one", "two"}
    assert all(r.headers["authorization"] == "Bearer sk-mine" for r in server.requests)


@pytest.mark.parametrize(
    "argv, hint",
    [
        (["hello"], "which models? name each"),
        (["-m", "one"], "nothing to ask"),
        (["-m", "", "hello"], "model"),
        (["--modle", "one", "hello"], "did you mean --model?"),
    ],
)
def test_what_is_missing_is_said(run, argv, hint):
    code, out, err = run(*argv)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert hint in err


def test_on_a_terminal_answers_stand_side_by_side(shown, server, at):
    by_model(server, {"one": "**Yes** indeed.", "two": {"text": "broken", "status": 400}})
    code, out = shown(*at, "-m", "one", "-m", "two", "hello")
    assert code == 0
    assert re.search(r"^one +│ two *$", out, re.MULTILINE)
    assert re.search(r"^Yes indeed\. +│ error: ", out, re.MULTILINE)
    assert re.search(r"^model +latency +first ", out, re.MULTILINE)
    assert max(map(len, out.splitlines())) <= 80


def test_what_does_not_fit_beside_goes_below(shown, server, at):
    models = [word for name in ("one", "two", "three") for word in ("-m", name)]
    out = shown(*at, *models, "--max-tokens", "3", "hello", columns=60)[1]
    assert re.search(r"^one +│ two *$", out, re.MULTILINE)
    assert re.search(r"^three *$", out, re.MULTILINE)
    assert "(cut: the answer" in out
    assert max(map(len, out.splitlines())) <= 60


def test_a_plain_terminal_is_not_commanded_by_an_answer(shown, server, at):
    server.reply("\x1b[31mred\a")
    out = shown(*at, "-m", "one", "--plain", "hello")[1]
    assert "== one\n[31mred\n" in out


def test_an_interrupted_comparison_does_not_wait_for_the_answers():
    argv = ["-m", "one", "-m", "two", "count to 900"]
    with (
        LocalServer(token_delay=0.05) as server,
        subprocess.Popen(
            [sys.executable, "-m", "LLM", "compare", "--base-url", server.url, *argv],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as child,
    ):
        while len(server.requests) < 2:
            time.sleep(0.01)
        time.sleep(0.5)  # both answers have begun
        child.send_signal(signal.SIGINT)
        try:
            assert child.communicate(timeout=20) == ("", "")
        finally:
            child.kill()
    assert child.returncode == 130


def test_that_it_goes_on_is_said_on_stderr_and_wiped_out(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with view.Screen().busy("asking …"):
        assert capsys.readouterr().err == "asking …"
    assert capsys.readouterr().err == "\r        \r"
