"""What the service is deployed with: Dockerfile, compose.yaml and `make serve`, as far as they can be read
and their commands be run without an engine.
"""

import fnmatch
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from agents.service.settings import Settings
from LLM.testing import LocalServer
from tests.databases import Postgres

ROOT = Path(__file__).parents[2]
SECRET = re.compile(r"\w*(KEY|PASSWORD|SECRET|TOKEN)\w*=", re.IGNORECASE)


@pytest.fixture(scope="module")
def steps():
    """The Dockerfile's instructions: (name, what follows), with continued lines joined."""
    text = (ROOT / "Dockerfile").read_text("utf-8").replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(name, rest.strip()) for name, _, rest in (line.partition(" ") for line in lines)]


@pytest.fixture(scope="module")
def compose():
    return yaml.safe_load((ROOT / "compose.yaml").read_text("utf-8"))


def last_stage(steps):
    start = max(place for place, (name, _) in enumerate(steps) if name == "FROM")
    return dict(steps[start:])


def test_the_image_runs_as_nobody_special_and_listens_where_it_says(steps):
    stage = last_stage(steps)
    assert stage["USER"] not in ("root", "0")
    assert f"useradd --create-home --uid 10001 {stage['USER']}" in stage["RUN"]
    variables = dict(re.findall(r"(AGENTS_\w+)=(\S+)", stage["ENV"]))
    settings = Settings.load(
        **{name.removeprefix("AGENTS_").lower(): value for name, value in variables.items()}
    )
    assert settings.host == "0.0.0.0"
    assert stage["EXPOSE"] == str(settings.port)
    assert settings.database.removeprefix("sqlite:///").startswith(stage["VOLUME"])


def test_what_the_image_is_built_from_is_there_and_not_ignored(steps):
    rules = (ROOT / ".dockerignore").read_text("utf-8").split()
    kept = {rule[1:] for rule in rules if rule.startswith("!")}
    copied = [rest.split()[:-1] for name, rest in steps if name == "COPY" and "--from" not in rest]
    wanted = {source for sources in copied for source in sources}
    assert "*" in rules
    assert wanted == kept
    assert all((ROOT / source).exists() for source in wanted)
    # All that the wheel is built of, which tests/test_packaging.py builds.
    assert wanted == {"pyproject.toml", "setup.cfg", "README.md", "LICENSE", "LLM", "agents"}


def test_no_secret_gets_into_the_image(steps):
    assert [rest for name, rest in steps if name in ("ENV", "ARG") and SECRET.search(rest)] == []
    rules = (ROOT / ".dockerignore").read_text("utf-8").split()
    for name in (".env", "chat.db", "data", ".git"):
        assert any(fnmatch.fnmatch(name, rule) for rule in rules if not rule.startswith("!"))


def test_the_extras_of_the_image_exist(steps):
    metadata = (ROOT / "pyproject.toml").read_text("utf-8")
    (extras,) = re.findall(r"\[([\w,]+)\]\"", " ".join(rest for _, rest in steps))
    for extra in extras.split(","):
        assert re.search(rf"^{extra} = \[", metadata, re.MULTILINE), extra


def test_the_health_check_knows_a_live_service_from_a_dead_one(steps):
    command = json.loads(last_stage(steps)["HEALTHCHECK"].partition("CMD")[2])
    assert command[:2] == ["python", "-c"]

    def check(port):
        source = command[2].replace("8080", str(port))
        assert source != command[2]
        return subprocess.run([sys.executable, "-c", source], capture_output=True, check=False)

    with LocalServer() as live:  # its /health is as the service's
        port = live.url.rpartition(":")[2].partition("/")[0]
        assert check(port).returncode == 0
    assert check(port).returncode == 1


def test_what_the_image_starts_is_a_command(steps):
    stage = last_stage(steps)
    entry, words = json.loads(stage["ENTRYPOINT"]), json.loads(stage["CMD"])
    shown = subprocess.run(
        [sys.executable, *entry[1:], *words, "--help"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert shown.stdout.startswith("usage: python -m agents serve")


def test_compose_waits_for_the_database_and_keeps_its_data(compose):
    chat, database = compose["services"]["chat"], compose["services"]["database"]
    assert chat["depends_on"]["database"]["condition"] == "service_healthy"
    assert database["healthcheck"]["test"][0] == "CMD"
    (volume,) = database["volumes"]
    name, _, place = volume.partition(":")
    assert name in compose["volumes"]
    assert place == "/var/lib/postgresql/data"
    assert "ports" not in database
    assert all(port.startswith("127.0.0.1:") for port in chat["ports"])
    # After the grace answers tell their end, and are stored.
    assert int(chat["stop_grace_period"].rstrip("s")) > Settings.load().grace + 5


def test_compose_holds_no_password_and_asks_for_one(compose):
    for service in compose["services"].values():
        for name, value in service["environment"].items():
            if "PASSWORD" in name:
                assert value.startswith("${POSTGRES_PASSWORD:?"), name
            elif "KEY" in name:
                assert value == f"${{{name}:-}}"


def test_the_settings_that_compose_gives_exist(compose):
    variables = compose["services"]["chat"]["environment"]
    known = Settings.load().environment()
    ours = [name for name in variables if name.startswith("AGENTS_")]
    assert ours
    assert [name for name in ours if name not in known] == []
    assert Settings.load(database=variables["AGENTS_DATABASE"], workers=2).workers == 2


def test_compose_asks_the_database_with_a_program_that_it_has(compose, postgres: Postgres):
    """The health check, as the database's own program takes it."""
    _, program, *options = compose["services"]["database"]["healthcheck"]["test"]
    found = postgres.programs / program
    if not found.exists():
        found = shutil.which(program)
    if found is None:
        pytest.skip(f"{program} is not on this machine")
    ready = subprocess.run(
        [found, *options, "--host", postgres.folder], capture_output=True, check=False
    )
    assert ready.returncode == 0


def test_make_serve_is_what_the_guide_says():
    made = subprocess.run(
        ["make", "--no-print-directory", "--dry-run", "--always-make", "serve", "ARGS=--port 9000"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert "--editable '.[cli,server]'" in made
    assert made.splitlines()[-1].endswith("-m agents serve --port 9000")
    assert "sqlite:///data/chat.db" in made
    assert "/data/" in (ROOT / ".gitignore").read_text("utf-8").split()
