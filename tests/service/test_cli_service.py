"""`python -m agents`, as a person and as an operator use it: processes, signals, exit codes."""

import contextlib
import functools
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import psycopg
import pytest
import requests

from agents import cli
from agents.service.keys import Keys
from agents.service.settings import Settings
from agents.store import Store
from LLM import LLM
from LLM.testing import LocalServer
from tests import fakes

ROOT = Path(__file__).parents[2]
SECRET = "hunter2-very-secret"
SLOW = 120.0  # seconds after which a test gives up
until = functools.partial(fakes.until, seconds=SLOW)

pytestmark = pytest.mark.timeout(180)  # many begin several processes


@pytest.fixture
def database(tmp_path):
    return f"sqlite:///{tmp_path}/chat.db"


@pytest.fixture
def run(capsys):
    """Run a command in process: (exit code, stdout, stderr)."""

    def run(*argv):
        code = cli.main(argv)
        return (code, *capsys.readouterr())

    return run


class Service:
    """A service in a process of its own."""

    def __init__(self, folder, *argv, **variables):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "agents", "serve", "--port", "0", *map(str, argv)],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(ROOT), **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.said, self.log = [], []
        self._reading = threading.Thread(target=self._read, daemon=True)
        self._reading.start()
        for line in self.process.stdout:
            self.said.append(line)
            if line.startswith("  keys"):
                break
        else:
            self.process.wait(SLOW)
            raise AssertionError("".join(self.log))
        self.url = re.match(r"chat at (http://\S+:\d+)  \(Ctrl-C stops\)\n", self.said[0])[1]
        self.http = requests.Session()

    def _read(self):
        with self.process.stderr as pipe:
            self.log.extend(pipe)

    def post(self, path, body=None, **options):
        return self.http.post(self.url + path, json=body, timeout=SLOW, **options)

    def get(self, path, **options):
        return self.http.get(self.url + path, timeout=SLOW, **options)

    def conversation(self):
        return self.post("/conversations").json()["id"]

    def stream(self, conversation, text):
        """The lines of an answer's events, as they come."""
        response = self.post(
            f"/conversations/{conversation}/messages",
            {"content": text},
            headers={"accept": "text/event-stream"},
            stream=True,
        )
        assert response.status_code == 200, response.text
        return response.iter_lines(decode_unicode=True)

    def stop(self, how=signal.SIGTERM):
        self.process.send_signal(how)
        return self.process.wait(SLOW)

    def close(self):
        self.http.close()
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
        self._reading.join()


@pytest.fixture
def serve(tmp_path):
    """Start services; what still runs at the end is ended."""
    with contextlib.ExitStack() as stack:

        def started(*argv, **variables):
            service = Service(tmp_path, *argv, **variables)
            stack.callback(service.close)
            return service

        yield started


@pytest.fixture
def refused(run):
    """What a service says that does not start: (exit code, one line)."""

    def refused(*argv):
        code, out, err = run("serve", *argv)
        assert (out, err.count("\n")) == ("", 1)
        assert err.startswith("error: ")
        return code, err

    return refused


def guide_commands(start):
    """The commands of the guide that begin so; there are some."""
    guide = (ROOT / "docs" / "guides" / "service.md").read_text("utf-8")
    found = [line for line in guide.splitlines() if line.startswith(start)]
    assert found
    return found


# serve


def test_serve_local_shows_the_page_holds_a_talk_and_stops_at_ctrl_c(serve, tmp_path):
    browser = tmp_path / "browser"
    browser.write_text(f'#!/bin/sh\necho "$1" > {tmp_path}/shown\n')
    browser.chmod(0o755)
    service = serve("--local", "--open", AGENTS_LOG_FORMAT="json", BROWSER=f"{browser} %s")
    answers = stand_in_of(service)
    assert re.search(r"model +stand-in  \(a stand-in .* pretended: \$0.15 in", service.said[1])
    assert service.said[2].split() == ["database", "sqlite:///chat.db"]
    assert "none yet" in service.said[3]
    health = service.get("/health")
    assert health.json()["status"] == "ok"
    said = service.post(f"/conversations/{service.conversation()}/messages", {"content": "5 x 3?"})
    assert "15" in said.json()["messages"][-1]["content"]
    assert said.json()["cost"] is not None
    until(lambda: (tmp_path / "shown").exists() and (tmp_path / "shown").read_text())
    assert (tmp_path / "shown").read_text().strip() == service.url
    assert service.stop(signal.SIGINT) == 0
    assert not answers()
    (line,) = [line for line in map(json.loads, service.log) if line.get("route") == "/health"]
    assert line["request_id"] == health.headers["x-request-id"]
    assert (tmp_path / "chat.db").stat().st_mode & 0o777 == 0o600


def stand_in_of(service):
    """The address of the stand-in, and whether it still answers."""
    log = []

    def told():
        log[:] = re.findall(r"openai-compatible at ([\d.]+):(\d+)", "".join(service.log))
        return log

    until(told)
    host, port = log[0]

    def answers():
        with (
            contextlib.suppress(OSError),
            socket.create_connection((host, int(port)), 30),
        ):
            return True
        return False

    return answers


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_share_port_and_numbers_and_what_runs_after_the_grace_is_told_as_partial(
    serve, held, postgres, workers
):
    database = postgres.new()
    service = serve(
        "--base-url", held.url, "--model", "stand-in", "--database", database,
        "--workers", workers, AGENTS_GRACE="0.1",
    )  # fmt: skip
    for _ in range(6):
        requests.get(f"{service.url}/health", timeout=SLOW)  # a connection each
    assert 'route="/health",status="200"} 6.0' in service.get("/metrics").text
    name = service.conversation()
    lines = service.stream(name, "Hello")
    until(lambda: next(lines) == "event: text")
    assert service.stop() == 0
    *_, event, last = filter(None, lines)
    assert event == "event: done"
    assert '"status": "partial"' in last
    assert not re.search("Exception|Traceback|Cancel", "".join(service.log))
    with Store.open(database) as store:
        question, answer = store.conversations.messages(name)
        rows = store.run(lambda c: c.exec_driver_sql("SELECT 1 FROM answering").all(), write=False)
    assert (question.message.text, question.status) == ("Hello", "ok")
    assert (answer.message.role, answer.status) == ("assistant", "partial")
    assert answer.message.text == "Once upon"
    assert rows == []


def test_a_second_ctrl_c_ends_it_at_once(serve, held):
    service = serve("--base-url", held.url, "--model", "stand-in")
    lines = service.stream(service.conversation(), "Hello")
    until(lambda: next(lines) == "event: text")
    service.process.send_signal(signal.SIGINT)
    until(lambda: "Shutting down" in "".join(service.log))
    assert service.process.poll() is None
    assert service.stop(signal.SIGINT) == 130


def test_others_get_in_with_a_key_only(serve, refused, run, database):
    options = ("--local", "--host", "0.0.0.0", "--database", database)
    code, line = refused(*options)
    assert code == 2
    assert "other machines can reach 0.0.0.0" in line
    assert "`python -m agents keys create NAME`" in line
    _, secret, _ = run("keys", "create", "ada", "--database", database)
    service = serve(*options)
    assert service.said[3].split() == ["keys", "needed"]
    assert service.get("/session").status_code == 401
    known = service.get("/session", headers={"authorization": f"Bearer {secret.strip()}"})
    assert known.json()["owner"] == "ada"
    for command in guide_commands("curl "):
        shown = subprocess.run(
            ["sh", "-c", command.replace("http://127.0.0.1:8080", service.url)],
            env={**os.environ, "KEY": secret.strip()},
            capture_output=True, check=False,
        )  # fmt: skip
        assert shown.returncode == 0, command
        assert json.loads(shown.stdout)


@pytest.mark.parametrize("host, near", [("127.0.0.2", True), ("::1", True), ("localhost", True),
                                        ("0.0.0.0", False), ("::", False), ("10.0.0.1", False),
                                        ("chat.example", False)])  # fmt: skip
def test_what_counts_as_this_machine_alone(host, near):
    assert cli._is_loopback(host) is near


def test_a_port_in_use_is_told_with_another_one(refused, database):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, line = refused("--local", "--port", str(port), "--database", database)
    assert code == 1
    assert line.startswith(f"error: port {port} of 127.0.0.1 is in use")
    assert f"--port {port + 1}" in line


def test_an_address_that_is_not_ours_is_told(run, database, tmp_path):
    run("keys", "create", "ada", "--database", database)
    ended = subprocess.run(
        [sys.executable, "-m", "agents", "serve", "--host", "192.0.2.1", "--database", database],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=SLOW, check=False,
    )  # fmt: skip
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.startswith("error: cannot listen on 192.0.2.1 port 8080: ")


@pytest.mark.parametrize(
    "argv, told",
    [
        (["--workers", "2", "--local"], "SQLite is for one process"),
        (["--config", "none.toml"], "there is no settings file 'none.toml'"),
        (["--database", f"mysql://u:{SECRET}@h/d"], "cannot be kept in"),
        (["--port", "0", "--base-url", "ftp://x"], "base_url"),
    ],
)
def test_what_cannot_be_used_is_told_in_one_line(refused, monkeypatch, tmp_path, argv, told):
    monkeypatch.chdir(tmp_path)
    code, line = refused(*argv)
    assert code == 2
    assert told in line
    assert SECRET not in line


@pytest.mark.usefixtures("logging_as_before")
@pytest.mark.parametrize("workers", [1, 2])
def test_a_tool_that_there_is_not_is_told(run, monkeypatch, postgres, workers):
    monkeypatch.setenv("AGENTS_TOOLS", "nonsense")
    argv = ("--port", "0", "--workers", str(workers), "--database", postgres.new())
    code, out, err = run("serve", *argv)
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith("error: tools (AGENTS_TOOLS) names 'nonsense'")


def test_a_database_that_is_away_is_told(refused):
    url = f"postgresql://u:{SECRET}@127.0.0.1:1/d"
    code, line = refused("--local", "--database", url)
    assert code == 1
    assert "cannot be reached" in line
    assert SECRET not in line


@pytest.mark.parametrize("module", ["agents.service.settings", "uvicorn", "fastapi"])
def test_a_missing_extra_is_told(refused, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)  # as if it could not be imported
    code, line = refused("--local")
    assert code == 2
    assert line.endswith("needs the extra `server`: pip install 'requests-llm[server]'\n")


def test_workers_and_the_stand_in_end_with_a_parent_that_is_killed(serve, postgres):
    service = serve("--local", "--workers", "2", "--database", postgres.new())
    stand_in_answers = stand_in_of(service)
    assert service.get("/health").status_code == 200
    assert stand_in_answers()
    service.stop(signal.SIGKILL)
    address = ("127.0.0.1", int(service.url.rpartition(":")[2]))

    def is_free():
        with contextlib.suppress(OSError), socket.create_server(address):
            return True
        return False

    until(is_free)
    until(lambda: not service._reading.is_alive())  # the log ends with the last who could write it
    log = "".join(service.log)
    assert log.count("so the worker ends") == 2
    assert "Traceback" not in log
    until(lambda: not stand_in_answers())


def test_serve_says_where_the_model_is_and_that_nobody_is_there(serve):
    nobody = "http://127.0.0.1:1"
    service = serve(LLM_BASE_URL=nobody, AGENTS_PROT="1")
    assert service.said[1].split() == ["model", "gpt-4", "at", f"{nobody}/v1"]
    until(lambda: any("WARNING agents.service: the model server" in line for line in service.log))
    log = "".join(service.log)
    assert "call failed" not in log
    odd = "AGENTS_PROT is no setting, and is not read; did you mean AGENTS_PORT?"
    assert odd in log
    assert service.get("/health").status_code == 200


def test_a_model_server_that_is_away_or_mute_or_wants_a_key_is_told(caplog, monkeypatch):
    def told(seconds, url):
        monkeypatch.setattr(cli, "_LOOK_SECONDS", seconds)
        caplog.clear()
        cli._try_model(Settings(base_url=url, model="x"))
        (line,) = caplog.messages
        return line

    nobody = "http://127.0.0.1:1"
    assert told(30, nobody).startswith(f"the model server cannot be asked: {nobody}: no conn")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        mute = f"http://127.0.0.1:{silent.getsockname()[1]}"
        assert told(0.2, mute) == f"the model server {mute}/v1 did not answer within 0.2 s"
    with LocalServer(api_key="sk-right") as server:
        line = f"the model server {server.url}/v1 refuses the key, or wants one"
        assert told(30, server.url) == line


# keys


def test_a_key_is_printed_once_and_alone(run, database):
    at = ("--database", database)
    code, out, err = run("keys", "create", "ada", *at, "--budget", "2.50", "--period", "month")
    assert code == 0
    assert re.fullmatch(r"llm-[\w]+-[\w-]{43}\n", out)
    assert "only a hash" in err
    assert out.strip() not in err
    with Store.open(database) as store:
        found = Keys(store).find(out.strip())
    assert (found.owner, str(found.budget_usd), found.budget_period) == ("ada", "2.50", "month")
    _, listed, _ = run("keys", "list", *at)
    assert out.strip()[-43:] not in listed
    assert "$2.50 a month" in listed
    _, listed, _ = run("keys", "list", *at, "--json")
    (row,) = json.loads(listed)
    assert (row["name"], row["budget_usd"], row["revoked"]) == ("ada", "2.50", None)
    assert "hash" not in row


def test_a_revoked_key_is_worth_nothing(run, database):
    at = ("--database", database)
    _, secret, _ = run(
        "keys", "create", "ada", "--owner", "team", "--requests-per-minute", "3", *at
    )
    code, out, err = run("keys", "revoke", "ada", *at)
    assert (code, out) == (0, "")
    assert "'ada'" in err
    with Store.open(database) as store:
        assert Keys(store).find(secret.strip()) is None
    assert "revoked" in run("keys", "list", *at)[1]


def test_a_key_that_is_not_there_or_twice_is_told(run, database):
    at = ("--database", database)
    with Store.open(database):
        pass
    assert run("keys", "list", *at)[1:] == (
        "",
        "There is no key yet; `python -m agents keys create NAME` makes one.\n",
    )
    code, out, err = run("keys", "revoke", "ada", *at)
    assert (code, out, err.count("\n")) == (1, "", 1)
    run("keys", "create", "ada", *at)
    code, out, err = run("keys", "create", "ada", *at)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert " --owner " in err


@pytest.mark.parametrize("argv", [("list",), ("revoke", "ada")])
def test_only_create_makes_a_database(run, tmp_path, database, argv):
    code, out, err = run("keys", *argv, "--database", database)
    assert (code, out) == (1, "")
    assert err.startswith(f"error: there is no database {database} yet: ")
    assert list(tmp_path.iterdir()) == []
    assert run("keys", "create", "ada", "--database", database)[0] == 0


def test_the_first_key_says_whose_the_talks_of_before_are(run, database):
    at = ("--database", database)
    with Store.open(database) as store:
        store.conversations.create(owner="local")
    first, second = (run("keys", "create", name, *at)[2] for name in ("ada", "bob"))
    assert "belong to 'local': a key made with `--owner local` sees them" in first
    assert "'local'" not in second


@pytest.mark.parametrize("number", ["0", "-1", "1.5"])
def test_a_pace_is_a_whole_number_and_its_option_is_named(run, number):
    code, out, err = run("keys", "create", "ada", f"--requests-per-minute={number}")
    assert (code, out) == (2, "")
    assert err.startswith("error: argument --requests-per-minute: ")
    assert "AGENTS_" not in err


@pytest.mark.parametrize("amount", ["0", "-1", "nan", "much"])
def test_a_budget_is_an_amount_of_dollars(run, amount):
    code, out, err = run("keys", "create", "ada", f"--budget={amount}")
    assert (code, out) == (2, "")
    assert "no amount of US dollars" in err


def test_a_name_cannot_steer_the_terminal(run, database):
    code, out, err = run("keys", "create", "ada\x1b[31m", "--database", database)
    assert (code, out) == (2, "")
    assert "\x1b" not in err


# doctor


def test_doctor_finds_all_well(run, server, database):
    run("keys", "create", "ada", "--database", database)
    run("keys", "create", "bob", "--database", database)
    run("keys", "revoke", "bob", "--database", database)
    at = ("--base-url", server.url, "--model", "stand-in", "--database", database)
    code, out, err = run("doctor", *at, "--json")
    report = json.loads(out)
    assert (code, err, report["ok"]) == (0, "", True)
    assert report["settings"]["model"] == "stand-in"
    assert report["database"]["conversations"] == 0
    assert (report["keys"]["valid"], report["keys"]["revoked"]) == (1, 1)
    assert "stand-in" in report["model"]["models"]
    assert report["versions"]["fastapi"]
    code, out, _ = run("doctor", *at)
    assert code == 0
    assert "WRONG" not in out
    assert "1 valid, 1 revoked" in out


def test_doctor_says_what_is_wrong(run, tmp_path):
    url = f"postgresql://u:{SECRET}@127.0.0.1:1/d"
    code, out, err = run("doctor", "--base-url", "http://127.0.0.1:1", "--database", url, "--json")
    report = json.loads(out)
    assert (code, err, report["ok"]) == (1, "", False)
    assert not report["database"]["ok"]
    assert not report["model"]["ok"]
    assert "refused" in report["model"]["detail"]
    assert SECRET not in out


def test_doctor_is_not_sure_of_a_model_that_its_server_does_not_list(run, server, database):
    at = ("--base-url", server.url, "--database", database)
    code, out, _ = run("doctor", *at, "--model", "gpt-4o-mni")
    assert code == 1
    assert re.search(
        r"model +unsure +gpt-4o-mni: .*not among them; did you mean 'gpt-4o-mini'\?", out
    )
    assert "WRONG" not in out
    assert not json.loads(run("doctor", *at, "--model", "other", "--json")[1])["ok"]


def test_a_model_and_its_place_are_known_by_the_names_that_its_host_uses():
    with LLM(model="groq/llama-3.1-8b-instant") as llm:
        assert cli._asked(llm) == ("llama-3.1-8b-instant", "https://api.groq.com/openai/v1")


def test_doctor_makes_no_database(run, tmp_path, database):
    code, out, _ = run("doctor", "--local", "--database", database)
    assert code == 0
    assert "not there yet" in out
    assert list(tmp_path.iterdir()) == []


def test_doctor_tells_of_settings_that_cannot_be_used_and_of_odd_variables(run, monkeypatch):
    monkeypatch.setenv("AGENTS_PROT", "1")
    assert "AGENTS_PROT is no setting" in run("doctor", "--local")[1]
    monkeypatch.setenv("AGENTS_PORT", "x")
    code, out, _ = run("doctor", "--local", "--json")
    assert code == 1
    assert "AGENTS_PORT" in json.loads(out)["problem"]["detail"]


def test_doctor_tells_that_serve_would_refuse(run, monkeypatch, database):
    monkeypatch.setenv("AGENTS_HOST", "0.0.0.0")
    code, out, _ = run("doctor", "--local", "--database", database)
    assert code == 1
    assert "`serve` will not start" in out


def test_doctor_knows_postgresql(run, postgres):
    url = postgres.new()
    assert run("doctor", "--local", "--database", url)[0] == 0
    with psycopg.connect(url) as connection:
        assert connection.execute("SELECT count(*) FROM keys").fetchone() == (0,)


# how it is called


@pytest.mark.parametrize(
    "argv, told",
    [
        (["serv"], "did you mean 'serve'?"),
        (["keys", "creat"], "did you mean 'create'?"),
        (["serve", "--prot", "1"], "did you mean --port?"),
        (["serve", "now"], "takes no 'now'"),
        (["serve", "--port", "70000"], "is no port"),
        (["serve", "--local", "--base-url", "http://x"], "leave out --base-url"),
        (["keys", "create"], "NAME"),
        ([], "usage:"),
        (["keys"], "usage:"),
    ],
)
def test_what_is_not_understood_is_told_with_what_was_meant(run, argv, told):
    code, out, err = run(*argv)
    assert (code, out) == (2, "")
    assert told in err


@pytest.mark.parametrize("argv", [["--help"], ["serve", "--help"], ["keys", "create", "--help"]])
def test_help_is_there(run, argv):
    code, out, err = run(*argv)
    assert (code, err) == (0, "")
    assert "usage: python -m agents" in out


def test_the_commands_of_the_guide_are_understood():
    """All but `$(…)` and variables before it: what `python -m agents` gets."""
    for line in guide_commands(("python -m agents", "OPENAI_API_KEY", "AGENTS_MODELS")):
        words = shlex.split(line.partition("python -m agents ")[2])
        assert hasattr(cli._parse(words), "run"), line
