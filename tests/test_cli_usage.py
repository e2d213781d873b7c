"""`usage`: what was spent, out of a store that earlier calls were written down in."""

import io
import json
import re
import sqlite3
import sys
from datetime import date, datetime, timedelta, timezone
from decimal import Decimal

import pytest

from LLM import cli
from LLM.commands import usage, view
from LLM.policies.budget import Budget
from LLM.policies.spending import Spending
from LLM.types import TokenUsage
from tests.fakes import FakeClock


class Days(FakeClock):
    """A clock on which the day can be chosen."""

    def utc(self):
        return datetime.combine(self.day, datetime.min.time(), timezone.utc)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "spend.db"


@pytest.fixture
def spend(path):
    """Write a call down: `spend("2026-11-01", "openai/gpt-4o", 100, 10, "0.5")`."""
    clock = Days()
    store = Spending(f"sqlite:///{path}", clock=clock)

    def spend(day, name, prompt, completion, dollars=None, cached_tokens=0, **facts):
        clock.day = date.fromisoformat(day)
        tokens = TokenUsage(
            prompt_tokens=prompt,
            completion_tokens=completion,
            total_tokens=prompt + completion,
            cached_tokens=cached_tokens,
        )
        cost = None if dollars is None else Decimal(dollars)
        store.record(*name.split("/"), tokens, cost, **facts)

    yield spend
    store.close()


@pytest.fixture
def some(spend):
    spend("2026-11-01", "openai/gpt-4o", 1000, 100, "1.00", cached_tokens=300)
    spend("2026-11-01", "openai/gpt-4o", 1000, 100, "1.00")
    spend("2026-11-01", "anthropic/claude", 500, 50, "3.00")
    spend("2026-11-04", "openai/gpt-4o", 200, 20, "0.25")


@pytest.fixture
def run(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "stdin", io.StringIO())

    def run(*argv):
        code = cli.main(["usage", *map(str, argv)])
        return (code, *capsys.readouterr())

    return run


@pytest.fixture
def report(run, path):
    def report(*argv):
        code, out, err = run("--json", "--store", path, *argv)
        assert (code, err) == (0, "")
        return json.loads(out)

    return report


def words(text):
    return [line.split() for line in text.splitlines()]


@pytest.mark.usefixtures("some")
def test_a_table_by_day_and_model_with_totals(run, path):
    code, out, err = run("--store", path)
    assert (code, err) == (0, "")
    lines = words(out)
    assert lines[0] == [f"{path},", "days", "in", "UTC"]
    assert lines[2:7] == [
        ["day", "model", "calls", "prompt", "cached", "completion", "cost"],
        ["2026-11-01", "anthropic/claude", "1", "500", "0", "50", "$3.00"],
        ["openai/gpt-4o", "2", "2,000", "300", "200", "$2.00"],  # the day is said once
        ["2026-11-04", "openai/gpt-4o", "1", "200", "0", "20", "$0.25"],
        ["all", "4", "2,700", "300", "270", "$5.25"],
    ]


@pytest.mark.usefixtures("some")
def test_a_chart_by_day_shows_idle_days_too(run, path):
    out = run("--store", path)[1]
    chart = out.partition("US dollars by day\n")[2].splitlines()
    assert [line.split()[0] for line in chart] == [f"2026-11-0{day}" for day in (1, 2, 3, 4)]
    assert chart[0].endswith("█  $5.00")
    assert len(chart[0]) == 80  # the screen's width
    assert chart[1:3] == ["2026-11-02", "2026-11-03"]
    assert chart[3].count("█") == round(chart[0].count("█") * 0.05)


@pytest.mark.usefixtures("some")
def test_by_day_or_by_model(run, report, path):
    assert [(row["day"], row["cost"]) for row in report("--by", "day")["rows"]] == [
        ("2026-11-01", "5.00"),
        ("2026-11-04", "0.25"),
    ]
    rows = report("--by", "model")["rows"]
    assert [(row["model"], row["calls"], row["cost"]) for row in rows] == [
        ("anthropic/claude", 1, "3.00"),
        ("openai/gpt-4o", 3, "2.25"),
    ]
    assert "US dollars by model\nanthropic/claude  █" in run("--store", path, "--by", "model")[1]


@pytest.mark.usefixtures("some")
def test_json_has_the_rows_and_their_total(report, path):
    found = report()
    assert found["store"] == str(path)
    assert found["rows"][0] == {
        "day": "2026-11-01",
        "model": "anthropic/claude",
        "calls": 1,
        "cache_hits": 0,
        "prompt_tokens": 500,
        "completion_tokens": 50,
        "cached_tokens": 0,
        "cost": "3.00",
        "known_cost": "3.00",
        "unpriced": 0,
        "interrupted": 0,
    }
    assert found["total"]["cost"] == found["total"]["known_cost"] == "5.25"
    assert found["budgets"] == []


def test_json_loses_no_digit_and_tells_unknown_from_nothing(report, spend):
    spend("2026-11-01", "openai/a", 100, 10, "12345678901234567890")
    spend("2026-11-02", "openai/a", 100, 10, "0.00000000012345")
    spend("2026-11-03", "openai/a", 100, 10, "1E-7")
    spend("2026-11-03", "openai/a", 100, 10)
    spend("2026-11-04", "local/a", 100, 10)
    spend("2026-11-05", "local/a", 100, 10, "0.1", complete=False)
    found = report()
    assert [(row["cost"], row["known_cost"]) for row in found["rows"]] == [
        ("12345678901234567890",) * 2,
        ("0.00000000012345",) * 2,
        (None, "0.0000001"),
        (None, "0"),
        (None, "0.1"),
    ]
    total = found["total"]
    assert total["known_cost"] == "12345678901234567890.10000010012345"
    assert total["cost"] is None


@pytest.mark.usefixtures("some")
def test_since_a_day(run, report, path):
    found = report("--since", "2026-11-02")
    assert (found["since"], found["total"]["calls"]) == ("2026-11-02", 1)
    assert " since 2026-11-02, " in run("--store", path, "--since", "2026-11-02")[1]
    code, out, _ = run("--store", path, "--since", "2026-12-01")
    assert (code, out) == (0, f"{path} holds no calls since 2026-12-01\n")
    assert report("--since", "2026-12-01")["rows"] == []


def test_the_last_days_end_today():
    today = datetime.now(timezone.utc).date()
    assert usage.first_day("1d") in (today, today + timedelta(days=1))  # it may be midnight
    assert usage.first_day("1d") - usage.first_day("7d") == timedelta(days=6)


@pytest.mark.parametrize("text", ["yesterday", "2026-02-30", "7", "-1d", "999999d", "99999999d"])
def test_what_is_no_day_is_said(run, path, text):
    code, out, err = run("--store", path, f"--since={text}")
    assert (code, out) == (2, "")
    assert f"{text!r} is neither a day" in err
    if text == "-1d":
        assert run("--store", path, "--since", text) == (code, out, err)


def test_what_is_unknown_is_marked(run, spend, path):
    spend("2026-11-01", "local/a", 100, 10)
    spend("2026-11-01", "openai/b", 100, 10, "0.50")
    spend("2026-11-01", "openai/b", 100, 10)
    spend("2026-11-01", "openai/c", 100, 10, "0.50", complete=False)
    spend("2026-11-01", "openai/d", 100, 10, "0.001")
    spend("2026-11-01", "openai/d", 100, 10, cached=True)
    spend("2026-11-01", "openai/e", 100, 10, "0.01")
    out = run("--store", path, "--by", "model")[1]
    costs = {line[0]: line[-1] for line in words(out.partition("\n\nUS dollars")[0])[3:-2]}
    assert costs == {
        "local/a": "unknown",
        "openai/b": "$0.50+",
        "openai/c": "$0.50+",
        "openai/d": "<$0.01",
        "openai/e": "$0.01",
        "all": "$1.01+",
    }
    assert "1 call came from our own cache, free.\n" in out
    assert "+ is the least it can be: 2 calls without a known price, 1 call interrupted.\n" in out


def test_a_mark_that_is_not_there_is_not_explained(run, spend, path):
    spend("2026-11-01", "local/a", 100, 10)
    out = run("--store", path)[1]
    assert "\n1 call without a known price.\n" in out
    assert "+" not in out
    spend("2026-11-02", "local/a", 100, 10, "1.00")  # in the sum of both days
    assert "\n+ is the least it can be: 1 call without a known price.\n" in run("--store", path)[1]


def test_small_sums_have_more_decimals(run, spend, path):
    spend("2026-11-01", "openai/a", 100, 10, "0.0000125")
    assert "$0.000012" in run("--store", path)[1]
    spend("2026-11-01", "openai/a", 100, 10, "0.02")
    assert "$0.0200" in run("--store", path)[1]


def test_without_a_cost_the_chart_is_about_tokens(run, spend, path):
    spend("2026-11-01", "local/a", 1000, 500)
    out = run("--store", path)[1]
    assert re.search(r"Tokens by day\n2026-11-01  █+  1,500\n", out)
    assert "\nall" not in out  # one line is its own total


def test_calls_of_nobody_and_of_nothing(run, path):
    Spending(f"sqlite:///{path}").record(None, None, None)
    out = run("--store", path)[1]
    assert "unknown/unknown" in out
    assert out.splitlines()[-1].endswith("0")


def test_a_long_time_is_shown_without_its_idle_days(run, spend, path):
    spend("2025-01-01", "local/a", 10, 5, "1")
    spend("2026-11-01", "local/a", 10, 5, "1")
    chart = run("--store", path)[1].partition("US dollars by day\n")[2]
    assert len(chart.splitlines()) == 2


def test_budgets_of_the_store_are_shown(run, report, path):
    budget = Budget("2.00", name="thesis", period="month", store=f"sqlite:///{path}")
    budget.reserve(Decimal("0.50"), 100).settle(Decimal("0.25"), 80)
    code, out, _ = run("--store", path)
    assert code == 0
    assert out.startswith(f"{path}, days in UTC\n")
    assert "holds no calls" not in out
    assert re.search(r"\nthesis  \d{4}-\d\d  +\$0\.25 +80 +1 +\$0\.00\n", out)
    assert report()["budgets"][0]["cost"] == "0.25"
    assert "holds no calls since 2100-01-01\n" in run("--store", path, "--since", "2100-01-01")[1]


@pytest.mark.usefixtures("some")
def test_the_store_is_named_by_path_url_or_environment(run, path, monkeypatch, tmp_path):
    shown = run("--store", path)
    assert run("--store", f"sqlite:///{path}") == shown
    monkeypatch.chdir(tmp_path)
    assert run("--store", "spend.db") == shown
    for name in (f"sqlite:///{path}", "spend.db"):
        monkeypatch.setenv("LLM_USAGE_STORE", name)
        assert run() == shown
    monkeypatch.delenv("LLM_USAGE_STORE")
    pytest.importorskip("dotenv")
    (tmp_path / "my.env").write_text("LLM_USAGE_STORE=sqlite:///spend.db\n")
    assert run("--env-file", "my.env") == shown


def test_what_the_command_line_asks_is_written_down(server, path, report, monkeypatch, capsys):
    monkeypatch.setenv("LLM_USAGE_STORE", f"sqlite:///{path}")
    for command in (["ask"], ["compare", "-m", "one", "-m", "two"]):
        assert cli.main([*command, "--base-url", server.url, "hello"]) == 0
    capsys.readouterr()
    total = report()["total"]
    assert (total["calls"], total["prompt_tokens"]) == (3, 3)
    assert {row["model"].rpartition("/")[2] for row in report()["rows"]} >= {"one", "two"}


def test_a_store_named_by_path_is_written_to(server, report, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LLM_USAGE_STORE", "spend.db")
    assert cli.main(["ask", "--base-url", server.url, "hello"]) == 0
    capsys.readouterr()
    assert report()["total"]["calls"] == 1


@pytest.mark.usefixtures("run")
@pytest.mark.parametrize("more", [[], ["-v"]])
def test_what_could_not_be_written_down_is_said(server, monkeypatch, tmp_path, capsys, more):
    monkeypatch.setenv("LLM_USAGE_STORE", f"sqlite:///{tmp_path}/none/x.db")
    assert cli.main(["ask", "--base-url", server.url, *more, "hello"]) == 0
    out, err = capsys.readouterr()
    assert out
    warnings = [line for line in err.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 1
    assert f"has no directory: create '{tmp_path}/none'" in warnings[0]
    assert more or err.count("\n") == 1


@pytest.mark.usefixtures("run")
def test_a_failure_is_told_once(server, capsys):
    assert cli.main(["ask", "--base-url", f"{server.url}/nowhere", "hello"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_without_a_store_one_line_says_how_to_get_one(run):
    code, out, err = run()
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert "LLM_USAGE_STORE=sqlite:///" in err
    assert "--store" in err


def test_to_look_makes_nothing(run, tmp_path):
    code, out, err = run("--store", tmp_path / "none.db")
    assert (code, out) == (1, "")
    assert "is not there" in err
    assert "is no file" in run("--store", tmp_path)[2]
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "empty.db").touch()
    code, _, err = run("--store", tmp_path / "empty.db")
    assert code == 1
    assert "is empty" in err
    assert (tmp_path / "empty.db").stat().st_size == 0


def test_what_is_no_store_is_said(run, tmp_path):
    text, foreign = tmp_path / "a.txt", tmp_path / "b.db"
    text.write_text("not a database, but long enough to be taken for one\n" * 40)
    with sqlite3.connect(foreign) as connection:
        connection.execute("CREATE TABLE mine (x)")
    connection.close()
    for file, problem in ((text, "not a SQLite database"), (foreign, "another program")):
        before = file.read_bytes()
        code, out, err = run("--store", file)
        assert (code, out) == (1, "")
        assert err.startswith("error: ")
        assert problem in err
        assert file.read_bytes() == before
    assert "name a file" in run("--store", ":memory:")[2]
    assert run("--store", "postgres://x/y")[0] == 2


def test_what_cannot_be_asked_for_is_said(run):
    assert "did you mean 'day'?" in run("--by", "days")[2]
    assert "'hour' is unknown; there are day, model, both" in run("--by", "hour")[2]


@pytest.mark.usefixtures("some")
@pytest.mark.parametrize("columns", [60, 80, 120])
def test_on_a_terminal_it_fits(path, monkeypatch, columns):
    pytest.importorskip("rich")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", str(columns))
    screen = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    screen.isatty = lambda: True
    monkeypatch.setattr(sys, "stdout", screen)
    assert cli.main(["usage", "--store", str(path)]) == 0
    shown = screen.buffer.getvalue().decode()
    out = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", shown)
    assert max(map(len, out.splitlines())) <= columns
    assert re.search(r"^all .* \$5\.25$", out, re.MULTILINE)
    assert re.search(r"^2026-11-01  █+  \$5\.00$", out, re.MULTILINE)


@pytest.mark.parametrize(
    "part, drawn", [(0.0, ""), (0.001, "▏"), (0.5, "█████"), (0.55, "█████▌"), (1.0, "█" * 10)]
)
def test_a_bar_is_drawn_in_eighths(monkeypatch, part, drawn):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="utf-8"))
    assert view.bar(part, 10) == drawn


def test_a_terminal_without_blocks_gets_other_bars(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert [view.bar(part, 10) for part in (0.0, 0.001, 0.5)] == ["", "#", "#####"]
