"""The command `batch`: OpenAI's batch format in and out, and what happens when something is wrong."""

import json
import os
import resource
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from LLM.cli import main
from LLM.testing import LocalServer

ROOT = Path(__file__).parents[1]


def line(place, **body):
    body = {"messages": [{"role": "user", "content": f"What is {place} x 3?"}], **body}
    return {
        "custom_id": f"r{place}",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": body,
    }


def write(path, lines):
    texts = [text if isinstance(text, str) else json.dumps(text) for text in lines]
    path.write_text("\n".join(texts) + "\n")
    return path


def read(path):
    return [json.loads(text) for text in path.read_text().splitlines()]


@pytest.fixture
def files(tmp_path):
    return write(
        tmp_path / "in.jsonl", [line(place) for place in range(20)]
    ), tmp_path / "out.jsonl"


@pytest.fixture
def batch(server):
    def run(source, output, *more):
        place = ["--base-url", server.url]
        return main(["batch", str(source), "-o", str(output), *place, *map(str, more)])

    return run


def test_each_line_is_answered_in_openais_output_format(batch, server, files, capsys):
    source, output = files

    assert batch(source, output) == 0

    lines = read(output)
    assert [found["custom_id"] for found in lines] == [f"r{place}" for place in range(20)]
    assert all(found.keys() == {"id", "custom_id", "response", "error"} for found in lines)
    assert all(found["response"].keys() == {"status_code", "request_id", "body"} for found in lines)
    body = lines[7]["response"]["body"]
    assert body["choices"][0]["message"]["content"] == "7 * 3 = 21."
    assert (lines[7]["response"]["status_code"], lines[7]["error"]) == (200, None)
    assert len({found["id"] for found in lines}) == 20
    assert "temperature" not in server.requests[0].json
    assert "20 answered, " in capsys.readouterr().err


def test_an_output_that_is_there_is_not_overwritten(batch, files, capsys):
    source, output = files
    batch(source, output)
    before = output.read_bytes()

    assert batch(source, output) == 1
    assert "is begun: --resume goes on with it" in capsys.readouterr().err
    assert output.read_bytes() == before

    (output.parent / "out.jsonl.journal").unlink()
    for more in ((), ("--resume",)):
        assert batch(source, output, *more) == 1
        assert "is there, and no " in capsys.readouterr().err
        assert output.read_bytes() == before


def test_resumed_it_asks_only_for_what_is_missing(batch, server, files, capsys):
    source, output = files
    batch(source, output)
    server.clear()
    write(source, [line(place) for place in range(25)])
    output.unlink()

    assert batch(source, output, "--resume") == 0

    assert len(server.requests) == 5
    assert [found["custom_id"] for found in read(output)] == [f"r{place}" for place in range(25)]
    assert "25 answered (20 of them before)" in capsys.readouterr().err


def test_bad_lines_are_named_and_left_out(batch, tmp_path, capsys):
    source = write(
        tmp_path / "in.jsonl",
        [
            line(0),
            "rubbish",
            "[]",
            "",
            "{}",
            '{"custom_id": "r0", "body": {"messages": []}}',
            '{"body": ' + "[" * 100_000,
            line(6),
        ],
    )

    assert batch(source, tmp_path / "out.jsonl") == 1

    assert [found["custom_id"] for found in read(tmp_path / "out.jsonl")] == ["r0", "r6"]
    told = capsys.readouterr().err
    assert f"error: {source}:2: it is not JSON: Expecting value at character 1" in told
    assert f"{source}:3: it is a JSON list, not an object" in told
    assert f'{source}:5: it has no "body"' in told
    assert f"{source}:6: its custom_id 'r0' is that of line 1" in told
    assert f"{source}:7: " in told
    assert "2 answered, 5 bad lines left out" in told


def test_a_bad_line_can_stop_it_and_what_was_before_is_kept(batch, server, tmp_path, capsys):
    source = write(tmp_path / "in.jsonl", [line(0), line(1), "rubbish", line(3)])

    assert batch(source, tmp_path / "out.jsonl", "--on-bad-line", "stop") == 1

    told = capsys.readouterr().err
    assert f"{source}:3: it is not JSON" in told
    assert "2 answered so far" in told
    write(source, [line(0), line(1), line(2), line(3)])
    assert batch(source, tmp_path / "out.jsonl", "--on-bad-line", "stop", "--resume") == 0
    assert len(server.requests) == 4


def test_failed_items_say_why_and_are_asked_again(batch, server, files, capsys):
    source, output = files
    server.reply(
        lambda received: (
            {"status": 400, "text": "no such thing"}
            if "What is 3 x" in str(received.json)
            else None
        )
    )

    assert batch(source, output) == 1

    failed = read(output)[3]
    assert failed["response"]["status_code"] == 400
    assert "no such thing" in failed["response"]["body"]["error"]["message"]
    told = capsys.readouterr().err
    assert "error: r3: " in told
    assert "19 answered, 1 failed" in told
    server.reply(lambda _: None)
    assert batch(source, output, "--resume") == 0
    assert read(output)[3]["response"]["status_code"] == 200
    assert len(server.requests) == 21


def test_a_line_of_another_endpoint_fails_alone(batch, tmp_path):
    source = write(tmp_path / "in.jsonl", [{**line(0), "url": "/v1/embeddings"}, line(1)])

    assert batch(source, tmp_path / "out.jsonl") == 1

    first, second = read(tmp_path / "out.jsonl")
    assert first["response"] is None
    assert first["error"]["code"] == "config_error"
    assert "only /v1/chat/completions is known" in first["error"]["message"]
    assert second["response"]["status_code"] == 200


def test_a_model_that_is_named_is_meant_for_all(batch, server, tmp_path):
    source = write(tmp_path / "in.jsonl", [line(0, model="a"), line(1, model="b"), line(2)])

    batch(source, tmp_path / "one.jsonl")
    assert sorted(request.json["model"] for request in server.requests)[:2] == ["a", "b"]
    server.clear()
    batch(source, tmp_path / "two.jsonl", "-m", "mine", "--max-tokens", 5, "-t", 0.5)

    bodies = [request.json for request in server.requests]
    assert {body["model"] for body in bodies} == {"mine"}
    assert {(body["max_tokens"], body["temperature"]) for body in bodies} == {(5, 0.5)}


def test_standard_input_and_output(batch, files, capfdbinary, monkeypatch):
    source, _ = files
    with source.open("rb") as piped:
        monkeypatch.setattr(sys, "stdin", os.fdopen(os.dup(piped.fileno())))
        monkeypatch.setattr(sys, "stdout", os.fdopen(os.dup(1), "w"))
        with sys.stdin, sys.stdout:
            assert batch("-", "-") == 0

    found = [json.loads(text) for text in capfdbinary.readouterr().out.splitlines()]
    assert len(found) == 20


@pytest.mark.parametrize(
    "more, why",
    [
        (["missing.jsonl", "-o", "out"], "missing.jsonl cannot be read: No such file"),
        (["in.jsonl"], "where do the answers go? -o FILE"),
        (["in.jsonl", "-o", "-", "--resume"], "--resume needs a file"),
        (["in.jsonl", "-o", "in.jsonl"], "in.jsonl is also what is read"),
        (["in.jsonl", "-o", "nowhere/out"], "nowhere/out.journal cannot be written"),
        (["in.jsonl", "-o", "folder"], "folder is a folder: name a file in it"),
        (["in.jsonl", "-o", "x", "--concurrency", "0"], "no whole number from 1 to 10,000"),
        (["in.jsonl", "-o", "x", "--budget", "-1"], "no such number above 0"),
        (["in.jsonl", "-o", "x", "--via", "car"], "'car' is unknown"),
    ],
)
def test_what_cannot_be_is_said_at_once(files, tmp_path, monkeypatch, capsys, more, why):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    before = files[0].read_bytes()

    assert main(["batch", *more, "--base-url", "http://127.0.0.1:9"]) in (1, 2)

    assert why in capsys.readouterr().err
    assert files[0].read_bytes() == before


def test_a_changed_input_under_an_old_journal_is_refused(batch, server, files, capsys):
    source, output = files
    batch(source, output)
    write(source, [line(0), {**line(1), "custom_id": "r2"}])

    assert batch(source, output, "--resume") == 1
    assert "item 1 ('r2') is not what it was" in capsys.readouterr().err
    assert batch(source, output, "--resume", "-m", "another") == 1
    assert "is the journal of another job (model was " in capsys.readouterr().err


def test_a_resumed_run_that_fails_leaves_a_full_output_as_it_was(batch, files, tmp_path, capsys):
    source, output = files
    assert batch(source, output) == 0
    before = output.read_bytes()
    write(source, [line(0), {**line(1), "custom_id": "r2"}])

    assert batch(source, output, "--resume") == 1
    assert output.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "in.jsonl",
        "out.jsonl",
        "out.jsonl.journal",
    ]
    write(source, [line(place) for place in range(25)])
    assert batch(source, output, "--resume") == 0
    assert len(read(output)) == 25


def test_a_wrong_key_ends_it_though_each_line_names_a_model(files, capsys, monkeypatch):
    source, output = files
    write(source, [line(place, model="m") for place in range(200)])
    monkeypatch.setenv("LLM_API_KEY", "wrong")
    with LocalServer(api_key="right") as server:
        where = ["--base-url", server.url, "--concurrency", "2"]
        assert main(["batch", str(source), "-o", str(output), *where]) == 1
        assert len(server.requests) <= 4


@pytest.mark.skipif(sys.platform == "win32", reason="it needs a POSIX shell")
@pytest.mark.parametrize(
    "closed, source, output, code, why",
    [
        ("<&-", "in.jsonl", "out", 0, b"20 answered"),
        (">&-", "in.jsonl", "out", 0, b"20 answered"),
        ("2>&-", "in.jsonl", "out", 0, b""),
        ("<&- >&- 2>&-", "in.jsonl", "out", 0, b""),
        ("<&-", "-", "out", 1, b"standard input is closed"),
        (">&-", "in.jsonl", "-", 1, b"standard output is closed"),
    ],
)
def test_closed_standard_streams_are_borne_with(files, tmp_path, closed, source, output, code, why):
    words = [sys.executable, "-m", "LLM", "batch", source, "-o", output, "--local"]
    done = subprocess.run(
        ["/bin/sh", "-c", f"{shlex.join(words)} {closed}"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (code, b""), done.stderr
    assert why in done.stderr
    assert b"Traceback" not in done.stderr
    if code == 0:
        assert len(read(tmp_path / output)) == 20


@pytest.mark.parametrize("gap", [0.0, 0.01, 0.03, 0.06])
def test_ctrl_c_twice_ends_it_as_once(files, gap):
    source, output = files
    write(source, [line(place) for place in range(500)])
    with LocalServer(latency=0.1) as server:
        child = subprocess.Popen(command(source, output, server), stderr=subprocess.PIPE)
        wait_for(lambda: len(server.requests) > 4)
        child.send_signal(signal.SIGINT)
        time.sleep(gap)
        child.send_signal(signal.SIGINT)
        _, told = child.communicate(timeout=40)
    assert child.returncode == 130
    assert b"Traceback" not in told


def test_a_budget_stops_it_and_says_how_to_go_on(server, files, capsys, monkeypatch):
    source, output = files
    write(source, [line(place, max_tokens=10) for place in range(20)])
    place = ["--base-url", server.url, "-m", "openai/gpt-4o"]

    assert main(["batch", str(source), "-o", str(output), *place, "--budget", "0.000001"]) == 1

    told = capsys.readouterr().err
    assert "budget" in told
    assert "--resume goes on" in told
    assert not server.requests


def test_a_dry_run_counts_and_prices_and_sends_nothing(server, files, capsys):
    pytest.importorskip("genai_prices")
    source, _ = files
    write(source, [line(place, max_tokens=100, model="gpt-4o-mini") for place in range(20)])
    where = ["--provider", "openai"]

    assert main(["batch", str(source), "--dry-run", *where]) == 0
    shown = capsys.readouterr().out
    assert main(["batch", str(source), "--dry-run", "--via", "batch", *where]) == 0
    cheaper = capsys.readouterr().out

    assert "20 items, " in shown
    assert " tokens of prompts" in shown
    assert "answers: 2,000 tokens at most" in shown

    def dollars(text):
        return float(text.partition("cost: $")[2].split()[0])

    assert dollars(cheaper) == pytest.approx(dollars(shown) / 2, rel=0.01)
    assert 2000 * 0.6e-6 < dollars(shown) < 2000 * 0.6e-6 + 0.001


def test_a_dry_run_says_what_it_cannot_know(server, files, capsys):
    source, _ = files
    write(source, [line(0), "rubbish"])

    assert main(["batch", str(source), "--dry-run", "--base-url", server.url, "-m", "mine"]) == 1

    shown = capsys.readouterr().out
    assert "no max_tokens bounds them" in shown
    assert "cost: unknown, for the price of mine is" in shown
    assert "1 bad lines" in shown
    assert not server.requests


def command(source, output, server, *more):
    place = ["--base-url", server.url, "--concurrency", "4"]
    return [sys.executable, "-m", "LLM", "batch", str(source), "-o", str(output), *place, *more]


def wait_for(condition):
    until = time.monotonic() + 40
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.005)


@pytest.mark.parametrize("how, code", [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_stopped_in_the_middle_it_goes_on_with_what_is_missing(files, how, code):
    source, output = files
    write(source, [line(place) for place in range(200)])
    over = threading.Event()

    def answer(_):
        if len(server.requests) > 30:
            over.wait(50)

    with LocalServer(answer) as server:
        child = subprocess.Popen(command(source, output, server), stderr=subprocess.PIPE)
        wait_for(lambda: len(server.requests) > 30)
        child.send_signal(how)
        _, told = child.communicate(timeout=40)
        over.set()
        assert child.returncode == code
        if how == signal.SIGINT:
            assert b"answered so far" in told
            assert b"the same command with --resume goes on" in told
        again = subprocess.run(
            command(source, output, server, "--resume"), capture_output=True, check=False
        )
        assert again.returncode == 0, again.stderr
        assert [found["custom_id"] for found in read(output)] == [f"r{i}" for i in range(200)]
        asked = Counter(request.body for request in server.requests)
        assert len(asked) == 200
        assert asked.total() <= 204


def test_a_full_disk_says_so_and_loses_nothing(batch, server, files, capsys):
    source, output = files
    write(source, [line(place) for place in range(200)])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        assert batch(source, output) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    told = capsys.readouterr().err
    assert " cannot be written: File too large" in told
    assert "--resume goes on" in told
    kept = sum(b'"ok":true' in line for line in Path(f"{output}.journal").read_bytes().splitlines())
    assert f"{kept:,} answered so far" in told
    assert batch(source, output, "--resume") == 0
    assert len(read(output)) == 200
    # Only what was in flight when the disk was full was asked twice.
    assert len(server.requests) <= 200 + 16 + 1


def test_a_reader_that_goes_away_ends_it_silently(files, server):
    source, _ = files
    write(source, [line(place) for place in range(500)])
    child = subprocess.Popen(
        command(source, "-", server), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    child.stdout.readline()
    child.stdout.close()
    told = child.stderr.read()
    child.stderr.close()

    assert child.wait(40) == 1
    assert b"Traceback" not in told


def test_the_demo_adds_up(capsys):
    assert main(["demo", "batch", "--items", "60", "--plain"]) == 0

    shown = capsys.readouterr().out
    assert "Signal 9 ended it after " in shown
    assert "= 60 items + " in shown
    assert "The journal holds each of the 60 answers once." in shown
