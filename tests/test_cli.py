"""The command line, as a person and as a script use it: in process, through pipes, on a terminal."""

import io
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from LLM import cli
from LLM.commands import doctor, shared, view
from LLM.testing import LocalServer
from tests.fakes import until

ROOT = Path(__file__).parents[1]
SECRET = "sk-very-secret-0123456789"
HELLO = (
    "Hello! I am a stand-in model: I follow fixed rules, so that programs can be tested offline.\n"
)


class Typed(io.StringIO):
    """A terminal's stdin: lines, and an exception where a key is pressed that raises one."""

    def __init__(self, *lines):
        super().__init__()
        self._lines = list(lines)

    def isatty(self):
        return True

    def readline(self, *_):
        line = self._lines.pop(0) if self._lines else ""
        if isinstance(line, type):
            raise line
        return line + "\n" if line else ""


class Shown(io.StringIO):
    """A terminal's stdout."""

    def isatty(self):
        return True


@pytest.fixture
def run(capsys, monkeypatch):
    """Run a command in process: (exit code, stdout, stderr)."""

    def run(*argv, stdin=None):
        typed = (
            Typed() if stdin is None else io.StringIO(stdin) if isinstance(stdin, str) else stdin
        )
        monkeypatch.setattr(sys, "stdin", typed)
        code = cli.main(argv)
        return (code, *capsys.readouterr())

    return run


@pytest.fixture
def at(server):
    """The options that lead to the server."""
    return "--base-url", server.url, "--model", "stand-in"


def asked(server):
    """The texts of the last request."""
    return [message["content"] for message in server.requests[-1].json["messages"]]


def python(*argv, **options):
    return subprocess.Popen(
        [sys.executable, "-m", "LLM", *argv],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=options.pop("stdin", subprocess.DEVNULL),
        text=True,
        **options,
    )


# ask


def test_ask_prints_the_answer_and_nothing_else(run, at):
    assert run("ask", *at, "hello") == (0, HELLO, "")


def test_a_question_needs_no_quotes(run, server, at):
    run("ask", "What", "is", *at, "5 x", "3?")
    assert asked(server) == ["What is 5 x 3?"]


def test_ask_sends_what_was_said(run, server, at):
    options = ["--system", "Be brief.", "--temperature", "0.2", "--max-tokens", "5"]
    code, out, err = run("ask", *at, *options, "hello")
    assert (code, out) == (0, "Hello! I am a\n")
    assert "largest number of tokens" in err
    sent = server.requests[-1].json
    assert asked(server) == ["Be brief.", "hello"]
    assert (sent["model"], sent["temperature"], sent["max_tokens"]) == ("stand-in", 0.2, 5)


def test_none_switches_a_setting_off(run, server, at):
    assert run("ask", *at, "--temperature", "none", "--timeout", "none", "hello")[0] == 0
    assert "temperature" not in server.requests[-1].json


def test_what_is_piped_in_is_the_question_or_goes_before_it(run, server, at):
    run("ask", *at, stdin="hello\n")
    assert asked(server) == ["hello"]
    run("ask", *at, "Summarise it.", stdin="A long text.\n")
    assert asked(server) == ["A long text.\n\nSummarise it."]


def test_ask_json_is_the_whole_response(run, server, at):
    code, out, err = run("ask", *at, "--json", "hello")
    response = json.loads(out)
    assert (code, err) == (0, "")
    assert response["choices"][0]["message"]["content"] == HELLO.strip()
    assert response["usage"]["completion_tokens"] > 0
    assert response["call"]["attempts"] == 1
    assert response["call"]["request_id"]


def test_a_failed_call_says_why_in_one_line(run, server, at):
    server.reply("no such thing\n here", status=400)
    code, out, err = run("ask", *at, "hello")
    assert (code, out) == (1, "")
    assert re.fullmatch(r"error: .*no such thing here.*\n", err)


def test_a_cut_answer_is_a_failure_and_what_came_is_shown(run, server, at):
    event = {"choices": [{"index": 0, "delta": {"content": "The answer is"}}]}
    server.reply(
        body=f"data: {json.dumps(event)}\n\n", headers={"content-type": "text/event-stream"}
    )
    code, out, err = run("ask", *at, "hello")
    assert (code, out) == (1, "The answer is\n")
    assert err.startswith("error: ")


@pytest.mark.parametrize(
    "reply, remark",
    [
        ({"text": ""}, "(the answer is empty)"),
        ({"text": "Well", "finish_reason": "content_filter"}, "content filter"),
        ({"tool_calls": [{"name": "search"}]}, "a call of the tool search"),
    ],
)
def test_an_answer_that_is_not_plain_text_is_remarked_on(run, server, at, reply, remark):
    server.reply(**reply)
    code, _, err = run("ask", *at, "hello")
    assert code == 0
    assert remark in err


def test_reasoning_is_not_the_answer(run, server, at):
    server.reply("42", reasoning="Let me think.")
    assert run("ask", *at, "hello") == (0, "42\n", "")


def test_a_pipe_gets_every_character(run, server, at):
    server.reply("\x1b[31mred\x1b[0m\n")
    assert run("ask", *at, "hello")[1] == "\x1b[31mred\x1b[0m\n"


def test_verbose_shows_the_retries(run, server, at):
    server.reply(status=503, headers={"retry-after-ms": "1"})
    code, out, err = run("ask", *at, "-v", "hello")
    assert (code, out) == (0, HELLO)
    assert "(attempt 2 of 4 " in err


def test_an_interrupted_ask_ends_with_130():
    with LocalServer(token_delay=0.05) as server:
        child = python("ask", "--base-url", server.url, "count to 500")
        begun = child.stdout.read(3)
        child.send_signal(signal.SIGINT)
        rest, err = child.communicate(timeout=40)
    assert child.returncode == 130
    assert re.match(r"1, (2.*)?\n$", begun + rest)
    assert err == ""


def test_a_broken_pipe_is_quiet():
    with LocalServer(token_delay=0.001) as server:
        child = python("ask", "--base-url", server.url, "count to 500")
        assert child.stdout.read(3) == "1, "
        child.stdout.close()
        assert child.stderr.read() == ""
        assert child.wait(timeout=40) == 1
        child.stderr.close()


def test_an_answer_that_the_terminal_cannot_write_is_no_crash(server):
    server.reply("naïve \U0001f600")
    env = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    child = python("ask", "--base-url", server.url, "hello", env=env)
    out, err = child.communicate(timeout=40)
    assert (child.returncode, out, err) == (0, "na?ve ?\n", "")


# Where calls go.


def test_local_needs_nothing(run, monkeypatch):
    monkeypatch.setenv("LLM_BASE_URL", "http://nowhere.invalid")
    assert run("ask", "--local", "hello")[:2] == (0, HELLO)
    assert run("ask", "--local", "--provider", "anthropic", "hello")[:2] == (0, HELLO)


def test_the_environment_says_where_calls_go(run, server, monkeypatch):
    monkeypatch.setenv("LLM_BASE_URL", server.url)
    monkeypatch.setenv("LLM_API_KEY", SECRET)
    monkeypatch.setenv("LLM_MODEL", "mine")
    assert run("ask", "hello")[0] == 0
    assert server.requests[-1].json["model"] == "mine"
    assert server.requests[-1].headers["authorization"] == f"Bearer {SECRET}"


def test_a_key_of_the_environment_does_not_follow_base_url(run, server, at, monkeypatch):
    monkeypatch.setenv("LLM_API_KEY", SECRET)
    assert run("ask", *at, "hello")[0] == 0
    assert "authorization" not in server.requests[-1].headers


def test_settings_come_from_an_env_file(run, server, tmp_path, monkeypatch):
    pytest.importorskip("dotenv")
    (tmp_path / ".env").write_text(f"LLM_BASE_URL={server.url}\n")
    monkeypatch.chdir(tmp_path)
    assert run("ask", "--dotenv", "hello")[:2] == (0, HELLO)
    assert run("ask", "--env-file", str(tmp_path / ".env"), "hello")[:2] == (0, HELLO)
    code, _, err = run("ask", "--env-file", "missing", "hello")
    assert code == 2
    assert "'missing'" in err


def is_free(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


@pytest.mark.skipif(not is_free(8000), reason="a server runs at the default address")
def test_without_a_server_the_error_says_how_to_get_one(run):
    code, out, err = run("ask", "hello")
    assert (code, out) == (1, "")
    assert err.count("\n") == 1
    assert "-m LLM serve" in err
    assert "--local" in err
    assert "OPENAI_API_KEY" in err


def test_a_missing_key_is_named(run, monkeypatch):
    with LocalServer(api_key="right") as server:
        code, _, err = run("ask", "--base-url", server.url, "hello")
        assert code == 1
        assert "LLM_BASE_URL and LLM_API_KEY" in err
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        code, _, err = run("ask", "--provider", "openai", "hello")
        assert code == 1
        assert "(set OPENAI_API_KEY)" in err
        monkeypatch.setenv("LLM_BASE_URL", server.url)
        monkeypatch.setenv("LLM_API_KEY", SECRET)
        code, _, err = run("ask", "hello")
    assert code == 1
    assert "no key was sent" not in err
    assert SECRET not in err


def test_an_unknown_model_leads_to_the_list(run, server, at):
    server.reply("The model does not exist", status=404)
    code, _, err = run("ask", *at, "hello")
    assert code == 1
    assert "-m LLM models`" in err


# What cannot be understood.


@pytest.mark.parametrize(
    "argv, hint",
    [
        (["aks", "hello"], "did you mean 'ask'?"),
        (["What is 5 x 3?"], "ask "),
        (["xyzzy"], "there are chat, ask"),
        (["ask", "--modle", "x", "hello"], "did you mean --model?"),
        (["ask", "--temp=1", "hello"], "did you mean --temperature?"),
        (["ask", "--qqq", "hello"], "--help"),
        (["--local", "ask", "hello"], "goes after the command"),
        (["models", "extra"], "takes no 'extra'"),
        (["ask", "--temperature", "warm", "hello"], "neither a number nor 'none'"),
        (["ask", "--temperature", "9", "hello"], "between 0.0 and 2.0"),
        (["ask", "--provider", "opnai", "hello"], "did you mean 'openai'?"),
        (["ask", "--base-url", "127.0.0.1:1", "hello"], "scheme"),
        (["ask", "--local", "--base-url", "http://127.0.0.1:1", "hello"], "leave out --base-url"),
        (["ask"], "nothing to ask"),
    ],
)
def test_what_is_wrong_with_a_command_is_said_with_a_hint(run, argv, hint):
    code, out, err = run(*argv)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert hint in err


def test_no_command_shows_the_help(run):
    code, out, err = run()
    assert (code, out) == (2, "")
    assert "doctor" in err


def test_help_and_version(run):
    code, out, _ = run("--help")
    assert code == 0
    assert all(command in out for command in cli._COMMANDS)
    assert re.fullmatch(r"requests-llm \d+\.\d+.*\n", run("--version")[1])
    code, out, _ = run("ask", "--help")
    assert code == 0
    assert "git diff" in out


def test_help_needs_nothing_heavy():
    code = (
        "import sys; from LLM.cli import main; main(['chat', '--help']);"
        "print(sorted({'requests', 'urllib3', 'pydantic', 'rich'} & set(sys.modules)))"
    )
    fresh = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert fresh.stdout.splitlines()[-1] == "[]"


# models, serve, demo


def test_models_lists_one_a_line(run, at):
    code, out, _ = run("models", *at)
    assert code == 0
    assert out.splitlines()[:2] == ["stand-in", "gpt-4"]
    assert json.loads(run("models", *at, "--json")[1])["data"][0]["id"] == "stand-in"


def test_serve_serves_until_it_is_interrupted(run):
    child = python("serve", "--port", "0")
    url = re.search(r"http://\S+", child.stdout.readline())[0]
    assert run("ask", "--base-url", url, "hello")[:2] == (0, HELLO)
    child.send_signal(signal.SIGINT)
    assert child.communicate(timeout=40) == ("", "")
    assert child.returncode == 0


def test_serve_says_when_the_port_is_taken(run, server):
    code, out, err = run("serve", "--port", str(server.port))
    assert (code, out) == (1, "")
    assert err.startswith(f"error: cannot listen on 127.0.0.1:{server.port}: the port is in use")


def test_demo_shows_both_sides_and_what_to_try_next(run):
    begun = time.monotonic()
    code, out, err = run("demo")
    assert time.monotonic() - begun < 30
    assert (code, err) == (0, "")
    assert "What is 5 x 3?" in out
    assert "= 15." in out
    assert "Now divide that by 3." in out
    assert "Your name is Ada. 15 / 3 = 5." in out
    assert len(re.findall(r"first token after [\d.]+ ms, \d+ tokens in, \d+ out", out)) == 2
    assert "chat --local" in out


# doctor


@pytest.fixture
def checkup(run, server, monkeypatch):
    """The doctor's findings when one server runs on a usual port."""
    monkeypatch.setattr(doctor, "_OTHER_PORTS", ((server.port, "mine"),))

    def checkup(*argv):
        code, out, err = run("doctor", "--json", "--base-url", server.url, *argv)
        assert (code, err) == (0, "")
        return json.loads(out)

    return checkup


def test_doctor_tells_where_calls_go(checkup, server):
    target = checkup("--model", "gpt-4")["target"]
    assert target["base_url"] == f"{server.url}/v1"
    assert (target["model"], target["key"], target["answers"]) == ("gpt-4", False, True)
    assert target["chosen_by"] == "--base-url"
    assert 0 < target["latency_ms"] < 30_000


def test_doctor_finds_servers_on_the_usual_ports(checkup, server):
    found = {probe["base_url"]: probe for probe in checkup()["servers"]}
    mine = found.pop(f"{server.url}/v1")
    assert mine["names"] == ["mine"]
    assert mine["models"][0] == "stand-in"
    assert any("the default" in probe["names"] for probe in found.values())


def test_doctor_asks_strangers_without_a_key(checkup, server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    checkup()
    assert all("authorization" not in request.headers for request in server.requests)


@pytest.mark.parametrize(
    "reply, answers, detail",
    [
        ({"status": 401}, True, "wants a key"),
        ({"status": 404}, False, "something else answers"),
        ({"body": "<html><title>Hi</title></html>"}, False, "something else answers"),
    ],
)
def test_doctor_tells_what_answers(checkup, server, reply, answers, detail):
    for _ in range(2):  # once as the target, once on a usual port
        server.reply(**reply)
    target = checkup()["target"]
    assert target["answers"] is answers
    assert target["detail"].startswith(detail)


def test_doctor_tells_that_nothing_answers(run, monkeypatch):
    monkeypatch.setattr(doctor, "_OTHER_PORTS", ())
    code, out, _ = run("doctor", "--base-url", "http://127.0.0.1:9")
    assert code == 0
    assert re.search(r"answers +no: nothing there\n", out)
    assert "chat --local" in out
    monkeypatch.setenv("LLM_BASE_URL", "http://nowhere.invalid")
    assert "no connection" in run("doctor")[1]


def test_doctor_tells_that_a_server_is_silent(run):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        out = run("doctor", "--json", "--base-url", url, "--timeout", "0.1")[1]
    assert json.loads(out)["target"]["detail"] == "no answer in time"


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_doctor_never_shows_a_key(run, server, monkeypatch, form):
    for name in [key for host in cli.HOSTS.values() for key in host.key_variables]:
        monkeypatch.setenv(name, SECRET)
    monkeypatch.setenv("LLM_BASE_URL", server.url)
    monkeypatch.setenv("LLM_API_KEY", SECRET)
    monkeypatch.setenv("GROQ_API_KEY", f"{SECRET}\n{SECRET}")
    monkeypatch.setenv("NO_PROXY", f"http://user:{SECRET}@proxy")
    server.reply(f"bad key {SECRET}", status=400)
    code, out, err = run("doctor", *form)
    assert code == 0
    assert SECRET not in out + err
    assert "GROQ_API_KEY has a line break" in out
    assert "LLM_BASE_URL" in out
    assert "NO_PROXY" in out


@pytest.mark.parametrize(
    "variables, argv, chosen_by",
    [
        ({"LLM_BASE_URL": "http://127.0.0.1:9"}, [], "LLM_BASE_URL"),
        ({"OPENAI_BASE_URL": "http://127.0.0.1:9"}, [], "OPENAI_BASE_URL"),
        ({"OLLAMA_HOST": "127.0.0.1:9", "LLM_MODEL": "ollama/x"}, [], "the model's prefix"),
        ({"OLLAMA_HOST": "127.0.0.1:9"}, ["--provider", "ollama"], "--provider"),
        ({}, ["--local"], "--local"),
    ],
)
def test_doctor_tells_what_decided(run, monkeypatch, variables, argv, chosen_by):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    target = json.loads(run("doctor", "--json", *argv)[1])["target"]
    assert target["chosen_by"] == chosen_by
    assert target["base_url"] == "http://127.0.0.1:9/v1" or argv == ["--local"]


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_doctor_reports_what_cannot_work(run, monkeypatch, form):
    monkeypatch.setenv("LLM_BASE_URL", "nonsense")
    monkeypatch.setenv("OLLAMA_HOST", "x:port")  # nor can this, which is not used
    code, out, err = run("doctor", *form)
    assert code == 1
    assert "has no scheme" in out + err
    assert "127.0.0.1:8000" in out  # the rest is told all the same


# chat, through a pipe


def test_each_line_that_is_piped_in_is_a_turn(run, server, at):
    code, out, err = run("chat", *at, stdin="My name is Bo.\n\nWhat is my name?\n")
    assert (code, err) == (0, "")
    assert out.splitlines()[-1] == "Your name is Bo."
    assert len(out.splitlines()) == len(server.requests) == 2


def test_chat_json_is_a_line_for_each_answer(run, at):
    _, out, _ = run("chat", *at, "--json", stdin="My name is Bo.\nWhat is my name?\n")
    first, second = map(json.loads, out.splitlines())
    assert first["usage"]["total_tokens"] > 0
    assert second["choices"][0]["message"]["content"] == "Your name is Bo."


def test_a_failed_turn_leaves_the_conversation_as_it_was(run, server, at):
    def second_fails(received):
        last = received.json["messages"][-1]["content"]
        return {"text": "broken", "status": 400} if last == "two" else last

    server.reply(second_fails)
    code, out, err = run("chat", *at, stdin="one\ntwo\nthree\n")
    assert code == 1
    assert out == "one\nthree\n"
    assert re.fullmatch(r"error: .*broken\n", err)
    assert asked(server) == ["one", "one", "three"]


def test_the_system_message_can_be_set_and_removed(run, server, at):
    lines = "/system Be brief.\nhello\n/system\n/system none\nhello\n"
    _, _, err = run("chat", *at, "--system", "Be kind.", stdin=lines)
    assert [request.json["messages"][0]["content"] for request in server.requests] == [
        "Be brief.",
        "hello",
    ]
    assert err.splitlines() == [
        "(system message: Be brief.)",
        "(system message: Be brief.)",
        "(system message: none)",
    ]


def test_the_model_can_be_changed(run, server, at):
    _, _, err = run("chat", *at, stdin="hello\n/model gpt-4\nhello\n/model\n/models\n")
    assert [r.json["model"] for r in server.requests if r.json] == ["stand-in", "gpt-4"]
    assert f"(gpt-4 at 127.0.0.1:{server.port})" in err
    assert "gpt-4o-mini" in err


def test_a_provider_that_is_not_ready_is_told_at_once(run, server, at, monkeypatch):
    monkeypatch.setenv("GROQ_API_KEY", "a\nb")
    monkeypatch.setenv("LLM_MODEL", "ollama/x")
    _, _, err = run("chat", stdin="/model groq/x\n")
    assert "GROQ_API_KEY has a line break" in err


def test_reset_forgets_and_retry_asks_again(run, server, at):
    lines = "/retry\nMy name is Bo.\n/retry\n/reset\nWhat is my name?\n"
    _, out, err = run("chat", *at, stdin=lines)
    assert "nothing was asked" in err
    assert [len(request.json["messages"]) for request in server.requests] == [1, 1, 1]
    assert out.splitlines()[-1] == "You have not told me your name yet."


def test_a_retry_that_fails_keeps_the_answer(run, server, at):
    server.reply("first")
    server.reply("broken", status=400)
    run("chat", *at, stdin="hello\n/retry\nhello\n")
    assert asked(server) == ["hello", "first", "hello"]


def test_a_conversation_is_saved_for_people_and_for_programs(run, at, tmp_path):
    text, data = tmp_path / "talk.md", tmp_path / "talk.json"
    lines = f"/system Be brief.\nhello\n/save {text}\n/save {data}\nhi\n/save {data}\n"
    _, _, err = run("chat", *at, stdin=lines)
    assert (
        text.read_text() == f"## system\n\nBe brief.\n\n## user\n\nhello\n\n## assistant\n\n{HELLO}"
    )
    roles = [message["role"] for message in json.loads(data.read_text())]
    assert roles == ["system", *["user", "assistant"] * 2]
    assert f"(2 turns saved in {data})" in err


def test_a_list_of_models_that_fails_is_told(run, server, at):
    server.reply("broken", status=400)
    assert "broken" in run("chat", *at, stdin="/models\n")[2]


def test_an_interrupted_pipe_ends_with_130(run, at, monkeypatch):
    stdin = io.StringIO()
    monkeypatch.setattr(stdin, "readline", Typed(KeyboardInterrupt).readline, raising=False)
    monkeypatch.setattr(sys, "stdin", stdin)
    assert cli.main(["chat", *at]) == 130


def test_saving_overwrites_nothing_of_others(run, at, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    lines = f"/save\n/save {tmp_path}/mine.txt\n/save {tmp_path}/no/such.txt\n"
    _, _, err = run("chat", *at, stdin=lines)
    assert (tmp_path / "mine.txt").read_text() == "mine"
    assert [line.startswith("error: ") for line in err.splitlines()] == [True] * 3


def test_an_unknown_command_gets_a_hint_and_a_path_is_no_command(run, server, at):
    _, _, err = run("chat", *at, stdin="/rest\n/xyzzy\n/etc/hosts is a file\n/help\n/quit\nnever\n")
    assert "did you mean /reset?" in err
    assert "/help lists them" in err
    assert "/save FILE" in err
    assert asked(server) == ["/etc/hosts is a file"]


# chat, typed


def test_typed_lines_are_prompted_for(run, server, at):
    code, out, err = run("chat", *at, stdin=Typed("hello", "exit", "never"))
    assert (code, out) == (0, HELLO)
    assert err.startswith(f"stand-in at 127.0.0.1:{server.port} · /help")
    assert err.count("> ") == 2


def test_three_quotes_hold_lines_together(run, server, at):
    run("chat", *at, stdin=Typed('"""one', "two", 'three"""', "/quit"))
    assert asked(server) == ["one\ntwo\nthree"]
    run("chat", *at, stdin=Typed('"""one', "two"))  # and then Ctrl-D
    assert len(server.requests) == 1


def test_interrupting_the_prompt_does_not_leave(run, server, at):
    code, out, err = run("chat", *at, stdin=Typed(KeyboardInterrupt, "hello"))
    assert (code, out) == (0, HELLO)
    assert "Ctrl-D or /quit leaves" in err


def test_a_typed_failure_is_no_failure_of_the_program(run, server, at):
    server.reply("broken", status=400)
    code, _, err = run("chat", *at, stdin=Typed("hello"))
    assert code == 0
    assert "broken" in err


# On a terminal.

# A child gets the terminal as its own, so that Ctrl-C reaches it as a signal.
OWN_TERMINAL = (
    "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0);"
    "os.execv(sys.executable, [sys.executable, '-m', 'LLM', *sys.argv[1:]])"
)


class Terminal:
    """A program on a terminal, and the person in front of it."""

    def __init__(self, *argv):
        import pty

        self.end, far_end = pty.openpty()
        self.program = subprocess.Popen(
            [sys.executable, "-c", OWN_TERMINAL, *argv],
            cwd=ROOT,
            stdin=far_end,
            stdout=far_end,
            stderr=far_end,
            start_new_session=True,
            env={**os.environ, "TERM": "xterm", "COLUMNS": "80", "LINES": "24"},
        )
        os.close(far_end)
        self.seen = ""

    def type(self, text):
        os.write(self.end, text.encode())

    def wait_for(self, text):
        """All that came up to `text`."""
        until = time.monotonic() + 30
        while text not in self.seen:
            ready, _, _ = select.select([self.end], [], [], max(0, until - time.monotonic()))
            try:
                self.seen += os.read(self.end, 4096).decode() if ready else pytest.fail(self.seen)
            except OSError:  # the program has ended
                pytest.fail(self.seen)
        before, _, self.seen = self.seen.partition(text)
        return before

    def leave(self):
        self.type("\x04")
        return self.program.wait(timeout=40)


@contextmanager
def terminal(*argv):
    shown = Terminal(*argv)
    try:
        yield shown
    finally:
        shown.program.kill()
        shown.program.wait()
        os.close(shown.end)


@pytest.mark.parametrize("form", [["--plain"], []])
def test_ctrl_c_stops_the_answer_and_not_the_program(form):
    pytest.importorskip("pty")
    server = LocalServer(token_delay=0.03)
    with server, terminal("chat", "--base-url", server.url, *form) as person:
        person.wait_for("> ")
        person.type("My name is Bo. Count to 900\n")
        person.wait_for("6, 7, 8")
        person.type("\x03")
        person.wait_for("(stopped)")
        person.wait_for("> ")
        person.type("What is my name?\n")
        person.wait_for("Your name is Bo.")
        person.wait_for("> ")
        assert person.leave() == 0
        kept = server.requests[-1].json["messages"]
    assert [message["role"] for message in kept] == ["user", "assistant", "user"]
    assert "6, 7, 8" in kept[1]["content"]
    assert "900" not in kept[1]["content"]


def test_ctrl_c_stops_a_wait_and_the_next_question_is_the_first():
    pytest.importorskip("pty")
    server = LocalServer([{"text": "late", "delay": 60}])
    with server, terminal("chat", "--base-url", server.url, "--plain") as person:
        person.wait_for("> ")
        person.type("hello\n")
        until(lambda: server.requests)
        person.type("\x03")
        person.wait_for("(stopped)")
        person.wait_for(
            "> "
        )  # typed before it, a Ctrl-D would fall between two modes of the terminal
        person.type("again\n")
        person.wait_for("again")
        person.wait_for("> ")
        assert person.leave() == 0
        assert asked(server) == ["again"]


@pytest.fixture
def shown(run, monkeypatch):
    """Run a command whose stdout is a terminal with rich: (exit code, what was written there)."""
    pytest.importorskip("rich")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")

    def shown(*argv):
        screen = Shown()
        monkeypatch.setattr(sys, "stdout", screen)
        return run(*argv)[0], screen.getvalue()

    return shown


MARKDOWN = """# Title

Some **bold** text with `code`, <b>tags</b>
and a second line.

```python
def f():

    return "<x>"
```

| a | b |
|---|---|
| 1 | 2 |
"""


def test_markdown_is_rendered_and_nothing_is_lost(shown, server, at):
    server.reply(MARKDOWN, reasoning="Hm.")
    code, out = shown("ask", *at, "hello")
    assert code == 0
    text = re.sub(r"\x1b\[[\d;?]*[A-Za-z]|\r", "", out)
    for lines in (
        "Some bold text with code, <b>tags</b>\nand a second line.\n",
        '\n\ndef f():\n\n    return "<x>"\n\n',
        " a  b\n ────\n 1  2\n",
    ):
        assert lines in text


def test_plain_is_as_it_is_written_but_for_control_characters(shown, server, at):
    server.reply("**bold** \x1b[31mred\a\n", reasoning="Hm.")
    assert shown("ask", *at, "--plain", "hello") == (0, "**bold** [31mred\n")


def test_a_terminal_that_can_do_nothing_gets_plain_text(shown, monkeypatch, at):
    monkeypatch.setenv("TERM", "dumb")
    assert shown("ask", *at, "hello") == (0, HELLO)


def test_everything_can_be_shown_in_colour(shown, server, at):
    code, out = shown("doctor", *at)
    assert code == 0
    assert "Servers on this machine" in out
    server.reply("broken", status=400)
    assert shown("ask", *at, "hello")[0] == 1


def test_the_commands_of_a_chat_can_be_shown_in_colour(shown, monkeypatch, server, at):
    monkeypatch.setattr("builtins.input", lambda prompt: lines.pop(0) if lines else end())

    def end():
        raise EOFError

    lines = ["/help", "/xyzzy", "hello"]
    code, out = shown("chat", *at)
    assert code == 0
    assert "stand-in model" in out


@pytest.mark.parametrize(
    "text, finished",
    [
        ("one\n\ntwo", "one\n\n"),
        ("one\n\n", ""),
        ("one\ntwo", ""),
        ("1. one\n\n   still one\n\n2. two", "1. one\n\n   still one\n\n"),
        ("```\none\n\ntwo\n", ""),
        ("```\none\n\ntwo\n```\n\nthree", "```\none\n\ntwo\n```\n\n"),
        ("~~~~\n```\n\none\n~~~\n\n", ""),
        ("", ""),
    ],
)
def test_a_block_ends_where_nothing_can_go_on(text, finished):
    assert view._split_blocks(text) == (finished, text[len(finished) :])


def test_the_program_is_called_as_it_can_be_called_from_here(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "prefix", str(tmp_path / ".venv"))
    monkeypatch.setattr(sys, "executable", str(tmp_path / ".venv" / "bin" / "python"))
    monkeypatch.delenv("VIRTUAL_ENV", raising=False)
    monkeypatch.chdir(tmp_path)
    assert shared.program() == ".venv/bin/python -m LLM"
    monkeypatch.setenv("VIRTUAL_ENV", str(tmp_path / ".venv"))
    assert shared.program() in ("python -m LLM", "python3 -m LLM")
