"""Settings of the chat service: where they come from, and what is said of those that cannot be used."""

import os
import re
from decimal import Decimal
from pathlib import Path

import pytest

from agents.service.settings import Settings, without_password
from LLM import LLMConfigError, Price

SECRET = "hunter2-very-secret"


@pytest.fixture
def file(tmp_path):
    def write(text):
        path = tmp_path / "chat.toml"
        path.write_text(text, "utf-8")
        return path

    return write


def problem(config=None, **given):
    with pytest.raises(LLMConfigError) as caught:
        Settings.load(config, **given)
    text = str(caught.value)
    assert "\n" not in text
    assert SECRET not in repr(caught.value.__dict__) + text
    assert caught.value.__cause__ is None
    return text


def test_argument_beats_environment_beats_file_beats_default(file, monkeypatch):
    monkeypatch.setenv("AGENTS_PORT", "2")
    monkeypatch.setenv("AGENTS_MAX_TURNS", "2")
    path = file("port = 1\nmax_turns = 1\nmax_tokens = 1\n")
    settings = Settings.load(path, port=3)
    found = (settings.port, settings.max_turns, settings.max_tokens, settings.workers)
    assert found == (3, 2, 1, 1)


def test_a_variable_names_the_file_and_an_argument_beats_it(file, monkeypatch, tmp_path):
    other = tmp_path / "other.toml"
    other.write_text("port = 7")
    monkeypatch.setenv("AGENTS_CONFIG", str(file("port = 6")))
    assert Settings.load().port == 6
    assert Settings.load(other).port == 7


def test_an_empty_variable_counts_as_unset(monkeypatch):
    monkeypatch.setenv("AGENTS_PORT", "")
    monkeypatch.setenv("AGENTS_CONFIG", "")
    assert Settings.load().port == 8080


@pytest.mark.parametrize("word", ["none", "None"])
def test_none_switches_off_what_can_be(word, monkeypatch, file):
    monkeypatch.setenv("AGENTS_REQUESTS_PER_MINUTE", word)
    monkeypatch.setenv("AGENTS_TOOLS", word)
    settings = Settings.load(file(f"system = '{word}'\ndeadline = '{word}'\n"))
    assert settings.requests_per_minute is settings.system is settings.deadline is None
    assert settings.tools == ()


def test_a_list_is_written_with_commas_or_as_toml_has_it(monkeypatch, file):
    monkeypatch.setenv("AGENTS_MODELS", "openai/gpt-4o, gpt-4 ,")
    settings = Settings.load(file("tools = ['calculator']\npublic_hosts = 'a.example'"))
    assert settings.models == ("openai/gpt-4o", "gpt-4")
    assert settings.tools == ("calculator",)
    assert settings.public_hosts == ("a.example",)


def test_unknown_names_of_the_file_are_all_named(file):
    text = problem(file("prot = 1\nhost = 'x'\nnonsense = 2\n"))
    assert "'prot' (did you mean 'port'?)" in text
    assert "'nonsense'" in text


def test_an_unknown_argument_is_named():
    assert problem(prot=1) == "there is no setting 'prot' (did you mean 'port'?)"


@pytest.mark.parametrize("text", ["port = ", "port 80", "= 1"])
def test_a_file_that_is_no_toml_says_where(file, text):
    assert re.match(
        r"the settings file '.*chat.toml' cannot be read: .*(line 1|at end)", problem(file(text))
    )


def test_a_value_of_the_file_is_told_with_the_file_unless_another_beats_it(file, monkeypatch):
    path = file('port = 70000\ninput_price = "1"\nworkers = 2\n')
    assert problem(path).startswith(f"port (in {path}): ")
    monkeypatch.setenv("AGENTS_PORT", "70001")
    assert problem(path).startswith("port (AGENTS_PORT): ")
    assert problem(path, port=1, input_price=None).endswith(f"({path} gives workers)")


def test_a_file_that_is_not_there_is_named(tmp_path):
    assert "there is no settings file" in problem(tmp_path / "none.toml")


@pytest.mark.parametrize(
    "name, value",
    [
        ("port", "x"),
        ("port", 70000),
        ("workers", 0),
        ("host", ""),
        ("temperature", 3),
        ("timeout", 0),
        ("deadline", float("inf")),
        ("budget_usd", 0),
        ("budget_usd", "NaN"),
        ("budget_period", "week"),
        ("requests_per_minute", 0),
        ("max_answers", 0),
        ("grace", -1),
        ("log_format", "xml"),
        ("log_level", "loud"),
        ("input_price", -1),
    ],
)
def test_what_cannot_be_used_is_named_with_its_variable(name, value, monkeypatch):
    assert f"{name} (AGENTS_{name.upper()}):" in problem(**{name: value})
    monkeypatch.setenv(f"AGENTS_{name.upper()}", str(value))
    if value != "":
        assert f"{name} (AGENTS_{name.upper()}):" in problem()


def test_an_error_never_shows_what_was_given():
    problem(database=[f"postgresql://u:{SECRET}@h/d"], prot=SECRET)


def test_prices_come_in_pairs():
    assert problem(input_price="0.15").startswith("output_price (AGENTS_OUTPUT_PRICE) is missing")
    assert Settings.load().price() is None
    priced = Settings.load(input_price="0.15", output_price=0.6)
    assert priced.price() == Price("0.15", "0.60")


def test_many_workers_need_postgresql():
    assert "give database (AGENTS_DATABASE) as postgresql://" in problem(workers=2)
    assert Settings.load(workers=2, database="postgresql://u@h/d").workers == 2


def test_the_first_of_the_models_is_the_default_one():
    settings = Settings.load(base_url="http://127.0.0.1:1", models=("b", "a"))
    assert settings.llm_config().model == "b"
    assert settings.offered() == ("b", "a")
    named = settings.replace(model="a")
    assert named.llm_config().model == "a"
    assert named.offered() == ("a", "b")
    assert "model (AGENTS_MODEL) is 'c'" in problem(models=("a", "b"), model="c")


def test_the_environment_of_the_library_says_where_the_model_is(monkeypatch):
    monkeypatch.setenv("LLM_BASE_URL", "http://127.0.0.1:9/v1")
    monkeypatch.setenv("LLM_API_KEY", SECRET)
    monkeypatch.setenv("LLM_MODEL", "llama")
    config = Settings.load().llm_config()
    assert (config.base_url, config.model) == ("http://127.0.0.1:9/v1", "llama")
    assert config.api_key.get_secret_value() == SECRET
    # A key that was set for another address stays at home.
    other = Settings.load(base_url="http://127.0.0.1:8/v1").llm_config()
    assert other.api_key is None


def test_limits_of_an_answer_go_to_the_client():
    config = Settings.load(model="m", max_tokens=5, timeout="none", temperature=0).llm_config()
    assert (config.max_tokens, config.timeout, config.temperature) == (5, None, 0)
    assert Settings.load(model="m").llm_config().temperature is None


def test_the_stand_in_is_started_by_serve_only():
    with pytest.raises(LLMConfigError, match="only `python -m agents serve` starts"):
        Settings.load(local=True).llm_config()


def test_settings_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        Settings.load().port = 1


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"system": "Two\nlines, with a comma", "tools": (), "requests_per_minute": None},
        {"system": "", "models": ("a", "b"), "budget_usd": "0.10", "otel": True, "timeout": None},
    ],
)
def test_another_process_gets_the_same_settings_by_the_environment(given, monkeypatch, file):
    settings = Settings.load(file("port = 1\nmax_tokens = 3"), **given)
    monkeypatch.setenv("AGENTS_CONFIG", "nowhere.toml")
    monkeypatch.setenv("AGENTS_GRACE", "3")
    for name, value in settings.environment().items():
        monkeypatch.setenv(name, value)
    assert Settings.load() == settings


def test_a_copy_is_checked_and_asks_nobody_again(monkeypatch):
    settings = Settings.load(port=1)
    monkeypatch.setenv("AGENTS_PORT", "2")
    monkeypatch.setenv("AGENTS_GRACE", "3")
    copy = settings.replace(budget_usd="1.50")
    assert (copy.port, copy.grace, copy.budget_usd) == (1, 20.0, Decimal("1.50"))
    with pytest.raises(LLMConfigError):
        settings.replace(port=-1)


@pytest.mark.parametrize(
    "url, shown",
    [
        ("postgresql://u:SECRET@host:5432/db", "postgresql://u:***@host:5432/db"),
        ("postgresql://u:SEC/RET@host/db", "postgresql://u:***@host/db"),
        ("postgresql://u:SEC?RET@host/db?x=1", "postgresql://u:***@host/db"),
        ("postgresql://u:SEC@RET@host/db", "postgresql://u:***@host/db"),
        ("postgresql://host/db?user=u&password=SECRET", "postgresql://host/db"),
        ("redis://:SECRET@host:6379/0", "redis://:***@host:6379/0"),
        ("postgresql://u@host/db", "postgresql://u@host/db"),
        ("sqlite:///a@b.db", "sqlite:///a@b.db"),
        ("SECRET", "(not shown)"),
    ],
)
def test_a_password_is_not_shown(url, shown):
    assert without_password(url) == shown


def test_no_password_is_in_what_is_shown():
    url = f"postgresql://u:{SECRET}@host/db"
    settings = Settings.load(database=url, redis_url=f"redis://:{SECRET}@host")
    assert SECRET not in f"{settings.shown()} {settings!r} {settings}"
    assert settings.shown()["database"] == "postgresql://u:***@host/db"
    assert settings.database == url


def test_every_setting_is_described_with_what_none_means():
    for name, field in Settings.model_fields.items():
        assert field.description, name
        if "None" in str(field.annotation):
            assert "None: " in field.description, name


def test_the_guide_s_table_is_that_of_the_settings():
    def shown(value):
        if value is None or value == ():
            return "none"
        if isinstance(value, tuple):
            return ", ".join(value)
        return str(value).lower() if isinstance(value, bool) else str(value)

    rows = [
        f"| `{name}` | `{shown(field.default)}` | {field.description} |"
        for name, field in Settings.model_fields.items()
    ]
    guide = (Path(__file__).parents[2] / "docs" / "guides" / "service.md").read_text("utf-8")
    assert "\n".join(rows) in guide, "\n".join(rows)


def test_an_odd_variable_of_others_does_no_harm(monkeypatch):
    monkeypatch.setitem(os.environ, "AGENTS_", "x")
    monkeypatch.setitem(os.environ, "AGENTS_NONSENSE", "x")
    assert Settings.load().port == 8080
