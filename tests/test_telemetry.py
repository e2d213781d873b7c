"""Events of a call: what hooks get, log lines, the audit file, spans and metrics."""

import json
import logging
import os
import stat
import subprocess
import sys
import threading
from decimal import Decimal
from pathlib import Path

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.trace import SpanKind, StatusCode

from LLM import telemetry
from LLM.errors import LLMConfigError, LLMRateLimitError, LLMServerError, LLMStreamError
from LLM.telemetry import (
    AttemptFailed,
    Audit,
    CallFinished,
    CallStarted,
    Hooks,
    Open,
    Waited,
    audit,
    emit,
    logging_hook,
)
from LLM.tracing import otel
from LLM.types import ChatCompletionResponse, Message, TokenUsage
from tests.fakes import FakeClock

KEY = "sk-proj-0123456789abcdef"
USAGE = TokenUsage(prompt_tokens=10, completion_tokens=5, cached_tokens=4)


def started(call_id="c1", **changes):
    event = CallStarted(
        call_id, "chat", "openai", "gpt-4", "https://api.openai.com/v1", False,
        {"temperature": 0.5}, [{"role": "user", "content": "the prompt"}],
    )  # fmt: skip
    return event._replace(**changes)


def failed(**changes):
    error = LLMServerError("overloaded", status_code=503)
    event = AttemptFailed("c1", "openai", "gpt-4", 1, 503, error, 0.25, 1.0, 4)
    return event._replace(**changes)


def finished(call_id="c1", **changes):
    event = CallFinished(
        call_id, "chat", "openai", "gpt-4", False, 1.25, None, 2, USAGE, request_id="req-1",
        cost_from=lambda: Decimal("0.00045"), answer_from=lambda: ANSWER,
    )  # fmt: skip
    return event._replace(**changes)


ANSWER = ChatCompletionResponse.model_validate(
    {
        "id": "chatcmpl-1",
        "model": "gpt-4-0613",
        "choices": [{"message": {"content": "the answer"}, "finish_reason": "stop"}],
    }
)
UNSAID = ChatCompletionResponse(choices=[])


def test_events_cannot_be_changed():
    for event in (started(), failed(), finished(), Waited("c1", "p", "m", "rate_limit", 1.0)):
        with pytest.raises(AttributeError):
            event.model = "other"


def test_what_was_said_is_not_in_the_text_of_an_event():
    assert repr(started(params={"user": "the prompt"})) == (
        "CallStarted(call_id='c1', endpoint='chat', provider='openai', model='gpt-4',"
        " base_url='https://api.openai.com/v1', stream=False)"
    )
    assert "the answer" not in repr(finished())
    assert "complete=True" in repr(finished())


def test_cost_and_answer_are_looked_up_when_asked():
    asked = []
    event = finished(cost_from=lambda: asked.append("cost"), answer_from=lambda: asked.append("a"))
    assert asked == []
    assert (event.cost_usd, event.answer) == (None, None)
    assert asked == ["cost", "a"]
    assert finished().cost_usd == Decimal("0.00045")
    unknown = finished(cost_from=None, answer_from=None)
    assert (unknown.cost_usd, unknown.answer) == (None, None)


def test_what_the_server_said_of_its_answer_is_read_from_it():
    event = finished()
    assert event.response_model == "gpt-4-0613"
    assert (event.response_id, event.finish_reason) == ("chatcmpl-1", "stop")
    event = finished(answer_from=None)
    assert (event.response_model, event.response_id, event.finish_reason) == (None, None, None)


def broken_hook(event):
    raise ValueError("the hook's own fault")


def test_a_failing_hook_breaks_nothing_and_is_logged_once_by_name(caplog):
    got = []
    hooks = Hooks([broken_hook, got.append, broken_hook])
    for _ in range(3):
        emit(hooks, started())
    assert got == [started()] * 3
    said = [(record.levelname, record.getMessage()) for record in caplog.records]
    message = "the hook broken_hook failed, and the call goes on: ValueError: the hook's own fault"
    assert said == [("WARNING", message)] * 2
    assert not caplog.records[0].exc_info


def test_a_debugging_reader_gets_the_traceback_of_a_hook(caplog):
    caplog.set_level(logging.DEBUG, "LLM")
    emit(Hooks([broken_hook]), started())
    assert caplog.records[0].exc_info


def test_hooks_in_a_plain_tuple_work_too(caplog):
    emit((broken_hook, broken_hook), started())
    assert len(caplog.records) == 2


def test_what_stops_the_program_is_not_held_back():
    def interrupted(event):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        emit(Hooks([interrupted]), started())


def test_a_hook_that_is_no_function_is_refused_at_once():
    with pytest.raises(TypeError, match=r"'calls\.jsonl' is no function"):
        Hooks(["calls.jsonl"])
    assert not Hooks()


@pytest.mark.parametrize(
    "event, line",
    [
        (started(), ("DEBUG", "request: chat, model gpt-4, 1 messages, temperature 0.5")),
        (started(messages="a prompt", params={}),
         ("DEBUG", "request: chat, model gpt-4, 1 messages, temperature None")),
        (started(messages=("a", "b")),
         ("DEBUG", "request: chat, model gpt-4, 2 messages, temperature 0.5")),
        (failed(), ("DEBUG", "attempt 2 of 4 in 1.0 s: 503")),
        (failed(status=None, attempt=2), ("DEBUG", "attempt 3 of 4 in 1.0 s: LLMServerError")),
        (failed(retry_in_seconds=0.0), ("DEBUG", "attempt 2 of 4 in 0.0 s: 503")),
        (failed(retry_in_seconds=None), None),
        (finished(), ("INFO", "call finished: req-1, 15 tokens, 1250 ms")),
        (finished(usage=None), ("INFO", "call finished: req-1, None tokens, 1250 ms")),
        (finished(request_id=None, cached=True),
         ("INFO", "call finished: None, 15 tokens, 1250 ms, cached")),
        (finished(complete=False), ("INFO", "call finished: req-1, 15 tokens, 1250 ms, interrupted")),
        (finished(error=LLMServerError("down"), complete=False),
         ("ERROR", "call failed after 2 attempts: down")),
        (finished(error=LLMServerError("down"), attempts=1),
         ("ERROR", "call failed after 1 attempt: down")),
        (Waited("c1", "p", "m", "rate_limit", 2.34), ("INFO", "waited 2.3 s for the rate limit")),
        (Waited("c1", "p", "m", "cache", 2.34),
         ("DEBUG", "waited 2.3 s for the same call of another thread")),
    ],
)  # fmt: skip
def test_the_log_lines(event, line, caplog):
    caplog.set_level(logging.DEBUG, "LLM")
    logging_hook(event)
    said = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert said == ([line] if line else [])


def test_no_line_is_put_together_for_a_level_that_is_off(caplog):
    caplog.set_level(logging.ERROR, "LLM")
    logging_hook(started(params=None))  # would fail if it were looked at
    logging_hook(finished(duration_seconds=None))
    assert caplog.records == []


def test_what_hooks_remember_is_bounded(monkeypatch):
    monkeypatch.setattr(telemetry, "MAX_OPEN", 2)
    open_calls = Open()
    assert [open_calls.remember(str(n), n) for n in range(4)] == [None, None, 0, 1]
    assert list(open_calls) == ["2", "3"]


# The audit file


@pytest.fixture
def path(tmp_path):
    return tmp_path / "calls.jsonl"


def lines(path):
    return [json.loads(line) for line in path.read_text("ascii").splitlines()]


def test_one_line_a_call_says_what_it_took_and_not_what_was_said(path):
    hook = audit(path, clock=FakeClock())
    for event in (started(), failed(), finished()):
        hook(event)
    assert lines(path) == [
        {
            "time": "1970-01-01T00:16:40.000+00:00",
            "call_id": "c1",
            "endpoint": "chat",
            "provider": "openai",
            "model": "gpt-4",
            "response_model": "gpt-4-0613",
            "stream": False,
            "duration_seconds": 1.25,
            "time_to_first_token_seconds": None,
            "attempts": 2,
            "tried_before": [],
            "prompt_tokens": 10,
            "completion_tokens": 5,
            "total_tokens": 15,
            "cached_tokens": 4,
            "reasoning_tokens": None,
            "cost_usd": "0.00045",
            "cached": False,
            "complete": True,
            "finish_reason": "stop",
            "request_id": "req-1",
            "response_id": "chatcmpl-1",
            "error": None,
            "status": None,
        }
    ]


def test_a_failed_call_says_how_and_not_what_the_server_quoted(path):
    error = LLMRateLimitError("you said: the prompt", status_code=429)
    audit(path)(finished(error=error, usage=None, cost_from=None, complete=False))
    (line,) = lines(path)
    assert (line["error"], line["status"], line["complete"]) == ("rate_limit", 429, False)
    assert (line["total_tokens"], line["cost_usd"]) == (None, None)
    assert "the prompt" not in path.read_text()


def test_contents_are_written_if_asked(path):
    hook = audit(path, contents=True)
    messages = [Message(role="user", content="the prompt"), {"role": "user", "content": "\ud83d"}]
    hook(started(messages=messages))
    hook(finished())
    hook(finished(error=LLMServerError("too much"), answer_from=None))
    first, second = lines(path)
    assert first["messages"] == [{"role": "user", "content": "the prompt"}, messages[1]]
    assert first["answer"]["choices"][0]["message"]["content"] == "the answer"
    assert (second["messages"], second["answer"]) == (None, None)
    assert second["error_message"] == "too much"


def test_what_json_cannot_hold_is_written_as_text(path):
    hook = audit(path, contents=True)
    hook(started(messages=[{"role": "user", "content": b"\x00"}]))
    hook(finished(answer_from=lambda: {1, 2}))
    assert lines(path)[0]["answer"] == "{1, 2}"


@pytest.mark.parametrize(
    "echo",
    [KEY, f"Bearer {KEY[8:]}", f"api key:{KEY[8:]}", f"API-KEY={KEY[8:]}", "gsk_0123456789abcdef",
     "AIza0123456789abcdef"],
)  # fmt: skip
def test_a_key_that_a_server_echoes_is_not_written(path, echo):
    error = LLMServerError(f"refused {echo}, sorry")
    audit(path, contents=True)(finished(error=error, request_id=echo))
    assert "0123456789abcdef" not in path.read_text()
    assert "sorry" in path.read_text()


@pytest.mark.parametrize(
    "name",
    ["gpt-4o-mini-2024-07-18", "hf-internal-testing-tiny", "sk-small", "org/key-value-model"],
)
def test_a_models_name_is_not_taken_for_a_key(path, name):
    audit(path)(finished(model=name))
    assert lines(path)[0]["model"] == name


def test_the_file_is_the_owners_alone_and_made_when_the_first_call_ends(path):
    hook = audit(path)
    hook(started())
    assert not path.exists()
    hook(finished())
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_closed_file_is_opened_again_and_appended_to(path):
    hook = audit(path)
    hook.close()
    for _ in range(2):
        hook(finished())
        hook.close()
        hook.close()
    assert len(lines(path)) == 2


def test_a_hook_that_nobody_keeps_closes_its_file(path):
    code = f"""
import os
from LLM.telemetry import CallFinished, audit
hook = audit({str(path)!r})
before = len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else 0
hook(CallFinished("c", "chat", "p", "m", False, 1.0, None, 1, None))
del hook
after = len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else 0
assert before == after, (before, after)
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)
    assert len(lines(path)) == 1


def test_a_missing_folder_is_logged_once_and_calls_go_on(tmp_path, caplog):
    path = tmp_path / "missing" / "calls.jsonl"
    hooks = Hooks([audit(path)])
    for _ in range(3):
        emit(hooks, finished())
    (record,) = caplog.records
    assert f"the hook audit('{path}') failed" in record.getMessage()
    assert "No such file or directory" in record.getMessage()
    path.parent.mkdir()
    emit(hooks, finished())
    assert len(lines(path)) == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_a_full_disk_is_logged_once_and_calls_go_on(caplog):
    hooks = Hooks([audit("/dev/full")])
    for _ in range(3):
        emit(hooks, finished())
    (record,) = caplog.records
    assert "No space left" in record.getMessage()


def test_after_half_a_line_a_whole_one_begins_anew(path, monkeypatch):
    hook, write = audit(path), os.write
    monkeypatch.setattr(os, "write", lambda file, line: write(file, line[:20]))
    with pytest.raises(OSError, match="the disk took 20 of"):
        hook(finished())
    monkeypatch.undo()
    hook(finished())
    hook(finished())
    half, *whole = path.read_text().splitlines()
    assert len(half) == 20
    assert [json.loads(line)["call_id"] for line in whole] == ["c1", "c1"]


def test_threads_and_processes_write_whole_lines(path):
    """Long ones, from four processes of four threads each."""
    code = f"""
import threading
from LLM.telemetry import CallFinished, CallStarted, audit
hook = audit({str(path)!r}, contents=True)
def run(name):
    for n in range(25):
        hook(CallStarted(f"{{name}}-{{n}}", "chat", "p", "m", "http://h", False, {{}}, "x" * 20_000))
        hook(CallFinished(f"{{name}}-{{n}}", "chat", "p", "m", False, 1.0, None, 1, None))
threads = [threading.Thread(target=run, args=(n,)) for n in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
"""
    children = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(4)]
    assert [child.wait(50) for child in children] == [0] * 4
    written = lines(path)
    assert len(written) == 400
    assert {line["messages"] for line in written} == {"x" * 20_000}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_child_writes_to_the_same_file(path):
    hook = audit(path)
    hook(finished("parent"))
    with hook._lock:
        child = os.fork()
        if child == 0:
            hook(finished("child"))
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
    hook(finished("parent again"))
    assert [line["call_id"] for line in lines(path)] == ["parent", "child", "parent again"]


def test_an_audit_says_what_it_is():
    assert repr(audit("a.jsonl")) == "audit('a.jsonl')"
    assert repr(Audit("a.jsonl", contents=True)) == "audit('a.jsonl', contents=True)"


# OpenTelemetry


class Collected:
    """An SDK that keeps what it gets."""

    def __init__(self, **settings):
        self._spans = InMemorySpanExporter()
        self.tracers = TracerProvider(shutdown_on_exit=False, **settings)
        self.tracers.add_span_processor(SimpleSpanProcessor(self._spans))
        self._reader = InMemoryMetricReader()
        self.meters = MeterProvider([self._reader], shutdown_on_exit=False)

    def hook(self, **settings):
        return otel(tracer_provider=self.tracers, meter_provider=self.meters, **settings)

    def span(self):
        (span,) = self.spans()
        return span

    def spans(self):
        return self._spans.get_finished_spans()

    def metrics(self):
        """Name → [(attributes, sum, bounds)]"""
        data = self._reader.get_metrics_data()
        metrics = data.resource_metrics[0].scope_metrics[0].metrics if data else []
        return {
            metric.name: [
                (dict(point.attributes), point.sum, tuple(point.explicit_bounds), metric.unit)
                for point in metric.data.data_points
            ]
            for metric in metrics
        }


@pytest.fixture
def collected():
    return Collected()


def run(hook, *events):
    for event in events:
        hook(event)


def test_a_call_is_a_span_in_the_conventions(collected):
    params = {
        "temperature": 0.5, "top_p": 1, "max_tokens": 99, "seed": 7, "stop": "END", "n": 2,
        "response_format": {"type": "json_schema"}, "user": "alice", "presence_penalty": None,
    }  # fmt: skip
    run(
        collected.hook(),
        started(params=params, stream=True),
        finished(time_to_first_token_seconds=0.2),
    )
    span = collected.span()
    assert (span.name, span.kind) == ("chat gpt-4", SpanKind.CLIENT)
    assert span.status.status_code is StatusCode.UNSET
    assert dict(span.attributes) == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "openai",
        "gen_ai.request.model": "gpt-4",
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 1,
        "gen_ai.request.max_tokens": 99,
        "gen_ai.request.seed": 7,
        "gen_ai.request.stop_sequences": ("END",),
        "gen_ai.request.choice.count": 2,
        "gen_ai.request.stream": True,
        "gen_ai.output.type": "json",
        "gen_ai.response.model": "gpt-4-0613",
        "gen_ai.response.id": "chatcmpl-1",
        "gen_ai.response.finish_reasons": ("stop",),
        "gen_ai.response.time_to_first_chunk": 0.2,
        "gen_ai.usage.input_tokens": 10,
        "gen_ai.usage.output_tokens": 5,
        "gen_ai.usage.cache_read.input_tokens": 4,
        "server.address": "api.openai.com",
        "server.port": 443,
        "llm.attempts": 2,
        "llm.cached": False,
        "llm.complete": True,
        "llm.request_id": "req-1",
    }


@pytest.mark.parametrize(
    "endpoint, name",
    [("chat", "chat gpt-4"), ("completion", "text_completion gpt-4"), ("models", "list_models"),
     ("embeddings", "embeddings gpt-4")],
)  # fmt: skip
def test_the_name_of_a_span(collected, endpoint, name):
    run(collected.hook(), started(endpoint=endpoint), finished(endpoint=endpoint))
    assert collected.span().name == name


@pytest.mark.parametrize(
    "base_url, address",
    [
        ("http://127.0.0.1:8000", ("127.0.0.1", 8000)),
        ("http://localhost/v1", ("localhost", 80)),
        ("https://h:444/v1", ("h", 444)),
        ("http://[::1]:9/v1", ("::1", 9)),
        ("", (None, None)),
    ],
)
def test_where_the_host_is(collected, base_url, address):
    run(collected.hook(), started(base_url=base_url), finished())
    span = collected.span().attributes
    assert (span.get("server.address"), span.get("server.port")) == address


@pytest.mark.parametrize(
    "params, attribute, value",
    [
        ({"stop_sequences": ["a", "b"]}, "gen_ai.request.stop_sequences", ("a", "b")),
        ({"max_completion_tokens": 5}, "gen_ai.request.max_tokens", 5),
        ({"response_format": {"type": "text"}}, "gen_ai.output.type", "text"),
        ({"response_format": "json"}, "gen_ai.output.type", None),
        ({"n": 1}, "gen_ai.request.choice.count", None),
        ({"temperature": "hot"}, "gen_ai.request.temperature", None),
    ],
)
def test_what_was_asked_for(collected, params, attribute, value):
    run(collected.hook(), started(params=params), finished())
    assert collected.span().attributes.get(attribute) == value


def test_the_parent_is_the_span_in_which_the_call_started(collected):
    hook, tracer = collected.hook(), collected.tracers.get_tracer("test")
    with tracer.start_as_current_span("work") as parent:
        hook(started())
    thread = threading.Thread(target=hook, args=(finished(),))  # a stream may end anywhere
    thread.start()
    thread.join()
    work, call = collected.spans()
    assert work.name == "work"
    assert call.parent.span_id == parent.get_span_context().span_id


def test_failed_attempts_and_waits_are_events_of_the_span(collected):
    run(
        collected.hook(), started(), failed(), failed(status=None, retry_in_seconds=None),
        Waited("c1", "openai", "gpt-4", "rate_limit", 2.0), finished(),
    )  # fmt: skip
    assert [(event.name, dict(event.attributes)) for event in collected.span().events] == [
        ("llm.attempt_failed", {"llm.attempt": 1, "llm.duration_seconds": 0.25, "error.type": "server_error",
                                "http.response.status_code": 503, "llm.retry_in_seconds": 1.0}),
        ("llm.attempt_failed",
         {"llm.attempt": 1, "llm.duration_seconds": 0.25, "error.type": "server_error"}),
        ("llm.waited", {"llm.reason": "rate_limit", "llm.seconds": 2.0}),
    ]  # fmt: skip


@pytest.mark.parametrize("capture, said", [(None, "LLMStreamError"), (True, "cut: the prompt")])
def test_a_failure_is_an_error_of_the_span(collected, capture, said):
    error = LLMStreamError("cut: the prompt")
    hook = collected.hook(capture_content=capture)
    run(hook, started(), finished(error=error, complete=False, usage=None, answer_from=None))
    span = collected.span()
    assert (span.status.status_code, span.status.description) == (StatusCode.ERROR, said)
    assert span.attributes["error.type"] == "stream_error"
    assert span.attributes["llm.complete"] is False


@pytest.mark.parametrize("capture", [None, False])
def test_contents_are_not_recorded_unasked(collected, capture):
    run(collected.hook(capture_content=capture), started(), finished())
    recorded = collected.span().to_json()
    assert "the prompt" not in recorded
    assert "the answer" not in recorded


def test_contents_are_recorded_if_asked_in_the_form_of_the_conventions(collected):
    call = {"id": "t1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [
        {"role": "system", "content": "be brief"},
        Message(role="user", content=[{"type": "text", "text": "look"},
                                      {"type": "image_url", "image_url": {"url": "u"}}]),
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "t1", "content": "42"},
        Message(role="assistant", tool_calls=[call]),
        {"role": "user", "content": ["a plain piece", 7]},
    ]  # fmt: skip
    run(collected.hook(capture_content=True), started(messages=messages), finished())
    recorded = collected.span().attributes
    asked = {"type": "tool_call", "id": "t1", "name": "f", "arguments": "{}"}
    assert json.loads(recorded["gen_ai.input.messages"]) == [
        {"role": "system", "parts": [{"type": "text", "content": "be brief"}]},
        {"role": "user", "parts": [{"type": "text", "content": "look"},
                                   {"type": "image_url", "image_url": {"url": "u"}}]},
        {"role": "assistant", "parts": [asked]},
        {"role": "tool", "parts": [{"type": "tool_call_response", "id": "t1", "response": "42"}]},
        {"role": "assistant", "parts": [asked]},
        {"role": "user", "parts": [{"type": "text", "content": "a plain piece"}, 7]},
    ]  # fmt: skip
    assert json.loads(recorded["gen_ai.output.messages"]) == [
        {"role": "assistant", "parts": [{"type": "text", "content": "the answer"}],
         "finish_reason": "stop"}
    ]  # fmt: skip


@pytest.mark.parametrize(
    "messages, answer, said",
    [
        ("a prompt", {"choices": [{"text": "on"}]}, [{"type": "text", "content": "on"}]),
        (["a prompt"], {"choices": []}, None),
        ("a prompt", "no response at all", None),
        (None, None, None),
    ],
)
def test_contents_of_other_endpoints(collected, messages, answer, said):
    hook = collected.hook(capture_content=True)
    run(hook, started(messages=messages), finished(answer_from=lambda: answer))
    recorded = collected.span().attributes
    if messages is None:
        assert "gen_ai.input.messages" not in recorded
    else:
        (message,) = json.loads(recorded["gen_ai.input.messages"])
        assert message == {"role": "user", "parts": [{"type": "text", "content": "a prompt"}]}
    outputs = json.loads(recorded.get("gen_ai.output.messages", "[]"))
    assert [one["parts"] for one in outputs] == ([said] if said else [])


def test_metrics_in_the_conventions(collected):
    run(collected.hook(), started(), finished(time_to_first_token_seconds=0.5))
    metrics = collected.metrics()
    common = {
        "gen_ai.operation.name": "chat", "gen_ai.provider.name": "openai",
        "gen_ai.request.model": "gpt-4", "gen_ai.response.model": "gpt-4-0613",
        "server.address": "api.openai.com", "server.port": 443,
    }  # fmt: skip
    tokens = metrics["gen_ai.client.token.usage"]
    assert [(attributes, total, unit) for attributes, total, _, unit in tokens] == [
        ({**common, "gen_ai.token.type": "input"}, 10, "{token}"),
        ({**common, "gen_ai.token.type": "output"}, 5, "{token}"),
    ]
    assert tokens[0][2][:3] == (1, 4, 16)
    assert tokens[0][2][-1] == 67108864
    for name, seconds in (("operation.duration", 1.25), ("operation.time_to_first_chunk", 0.5)):
        ((attributes, total, bounds, unit),) = metrics[f"gen_ai.client.{name}"]
        assert (attributes, total, unit) == (common, seconds, "s")
        assert (bounds[0], bounds[-1], len(bounds)) == (0.01, 81.92, 14)


def test_metrics_of_a_failure_say_so_and_count_no_unknown_tokens(collected):
    error = LLMServerError("down")
    run(collected.hook(), started(), finished(error=error, usage=None, answer_from=None))
    metrics = collected.metrics()
    assert list(metrics) == ["gen_ai.client.operation.duration"]
    assert metrics["gen_ai.client.operation.duration"][0][0]["error.type"] == "server_error"


def test_half_known_usage_is_counted_by_half(collected):
    run(collected.hook(), started(), finished(usage=TokenUsage(prompt_tokens=3)))
    assert len(collected.metrics()["gen_ai.client.token.usage"]) == 1


def test_an_answer_out_of_the_cache_used_no_tokens(collected):
    run(collected.hook(), started(), finished(cached=True))
    assert "gen_ai.client.token.usage" not in collected.metrics()
    attributes = collected.span().attributes
    assert attributes["llm.cached"] is True
    assert "gen_ai.usage.input_tokens" not in attributes


def test_after_a_fallback_the_provider_is_who_answered(collected):
    run(collected.hook(), started(), finished(provider="anthropic", model="claude"))
    assert collected.span().attributes["gen_ai.provider.name"] == "anthropic"
    ((attributes, *_),) = collected.metrics()["gen_ai.client.operation.duration"]
    assert attributes["gen_ai.request.model"] == "claude"
    assert "server.address" not in attributes


def test_a_span_ends_whatever_goes_wrong_with_it(collected):
    def fails():
        raise ValueError("no answer")

    hook = collected.hook()
    hook(started())
    with pytest.raises(ValueError, match="no answer"):
        hook(finished(answer_from=fails))
    assert collected.span().name == "chat gpt-4"


def test_calls_that_never_end_are_ended_when_there_are_too_many(collected, monkeypatch):
    monkeypatch.setattr(telemetry, "MAX_OPEN", 2)
    hook = collected.hook()
    run(hook, *(started(str(n)) for n in range(3)))
    assert len(collected.spans()) == 1
    run(hook, *(finished(str(n)) for n in range(3)))
    assert len(collected.spans()) == 3


def test_the_end_of_a_call_that_began_before_the_hook_is_measured(collected):
    run(collected.hook(), failed(), finished())
    assert collected.spans() == ()
    assert "gen_ai.client.operation.duration" in collected.metrics()


def test_what_is_not_sampled_costs_no_attributes():
    collected = Collected(sampler=ALWAYS_OFF)

    asked = []

    def answer():
        asked.append(1)
        return UNSAID

    run(collected.hook(capture_content=True), started(), failed(), finished(answer_from=answer))
    assert collected.spans() == ()
    assert len(asked) == 1  # by the metrics, for the model's name


def test_a_forked_child_does_not_end_its_parents_spans(collected):
    hook = collected.hook()
    hook(started())
    hook.after_fork()
    hook(finished())
    assert collected.spans() == ()


def test_without_an_sdk_nothing_happens():
    hook = otel()
    run(hook, started(), failed(), finished())
    assert repr(hook) == "otel(capture_content=False)"


def test_an_api_without_advice_on_buckets_is_taken_as_it_is():
    class Meter:
        def create_histogram(self, name, unit, description):
            return name

    hook = otel()
    again = type(hook)(hook._trace, hook._tracer, Meter(), capture_content=False)
    assert again._tokens == "gen_ai.client.token.usage"


def test_without_the_extra_one_is_told_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    with pytest.raises(LLMConfigError, match=r"pip install 'requests-llm\[otel\]'"):
        otel()


def test_the_modules_are_light():
    code = """
import sys, LLM.telemetry, LLM.tracing, LLM.curl, LLM.policies.fallback
assert not [name for name in sys.modules if name.startswith("opentelemetry")]
"""
    subprocess.run([sys.executable, "-c", code], check=True)
