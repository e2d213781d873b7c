"""The client, as a script sees it, against a local server."""

import gc
import logging
import subprocess
import sys
import threading
import time

import pytest

from agents.types import Message
from LLM import (
    LLM,
    EventType,
    LLMAPIError,
    LLMCancelledError,
    LLMConfig,
    LLMConfigError,
    LLMConnectionError,
    LLMError,
    LLMQuotaError,
    LLMRateLimitError,
    LLMServerError,
    LLMStreamError,
    RetryPolicy,
)
from LLM.clock import Clock
from LLM.transport import Watchdog
from tests.fakes import AT_ONCE, FakeClock, chunk, hang_up, http, raw_server, stream_head

HELLO = [{"role": "user", "content": "Hello!"}]
BOTH = pytest.mark.parametrize("provider", [None, "anthropic"])


def client(server, clock=None, **settings):
    settings.setdefault("api_key", "sk-secret-1234")
    if settings.get("provider", "") is None:
        del settings["provider"]
    return LLM(LLMConfig(base_url=server.url, **settings), clock=clock)


@BOTH
def test_a_two_turn_talk_streams_and_remembers(server, provider):
    with client(server, provider=provider) as llm:
        talk = [Message(role="user", content="What is 5 x 3?")]
        first = llm.chat_completion(talk)
        talk += [first.choices[0].message, Message(role="user", content="Now divide that by 3.")]
        with llm.stream(talk) as stream:
            text = "".join(stream.text_stream)
    assert "15" in first.text
    assert "5" in text
    assert stream.response.text == text


@BOTH
def test_a_stream_and_a_response_say_the_same(server, provider):
    with client(server, provider=provider) as llm:
        whole = llm.chat_completion(HELLO)
        stream = llm.stream(HELLO)
        events = list(stream)
    assert "".join(e.text_delta for e in events if e.text_delta) == whole.text
    assert events[-1].type == EventType.MESSAGE_COMPLETE == "message_complete"
    assert events[-1].finish_reason == whole.finish_reason == "stop"
    assert stream.usage == stream.response.usage == whole.usage
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    assert 0 < stream.time_to_first_token < 30


@BOTH
def test_tool_calls_come_whole_in_both_forms(server, provider):
    tool = {
        "type": "function",
        "function": {
            "name": "calculator",
            "description": "Work out an expression.",
            "parameters": {
                "type": "object",
                "properties": {"expression": {"type": "string"}},
                "required": ["expression"],
            },
        },
    }
    ask = [{"role": "user", "content": "What is 12 * 12?"}]
    with client(server, provider=provider) as llm:
        whole = llm.chat_completion(ask, tools=[tool])
        events = list(llm.stream(ask, tools=[tool]))
        call = whole.choices[0].message.tool_calls[0]
        answer = {"role": "tool", "tool_call_id": call.id, "content": "144"}
        final = llm.chat_completion([*ask, whole.choices[0].message, answer], tools=[tool])
    streamed = [event.tool_call for event in events if event.type == "tool_call"]
    assert [(c.name, c.arguments) for c in streamed] == [(call.name, call.arguments)]
    assert whole.finish_reason == events[-1].finish_reason == "tool_calls"
    assert "144" in final.text


def test_completions_of_one_and_of_several_prompts(server):
    with client(server) as llm:
        assert llm.completion("say hi").choices[0].text == "hi"
        assert [c.text for c in llm.completion(["say one", "say two"]).choices] == ["one", "two"]
        with llm.completion("say hi there", stream=True) as stream:
            assert "".join(stream.text_stream) == "hi there"
        assert stream.response.choices[0].text == "hi there"


def test_a_completion_from_the_messages_dialect(server):
    with client(server, provider="anthropic") as llm:
        assert llm.completion("say hi").choices[0].text == "hi"
        with pytest.raises(LLMConfigError, match="one string"):
            llm.completion(["say one", "say two"])


@BOTH
def test_models_are_listed(server, provider):
    with client(server, provider=provider) as llm:
        models = llm.list_models()
    assert [model.id for model in models] == [m.id for m in models.data] == list(server.models)


def test_a_response_tells_what_it_took(server):
    server.reply(status=503)
    server.reply("fine", delay=0.01)
    clock = FakeClock()
    with client(server, clock, retry_jitter=0) as llm:
        response = llm.chat_completion(HELLO)
    first, second = response.history
    assert response.attempts == 2
    assert (first.status, first.error, first.waited) == (503, "LLMServerError", 0)
    assert (second.status, second.error, second.waited) == (200, None, 1.0)
    assert first.request_id
    assert second.request_id == response.request_id
    assert response.latency_ms == 1000.0
    assert response.provider == "openai-compatible"


def test_waits_double_as_documented(server):
    clock = FakeClock()
    server.reply(lambda _: {"status": 500})
    with client(server, clock, retry_delay=2.0, max_retries=5, retry_jitter=0) as llm:
        with pytest.raises(LLMServerError) as caught:
            llm.chat_completion(HELLO)
    assert clock.slept == [2, 4, 8, 16, 32]
    assert caught.value.attempts == 6
    assert [attempt.waited for attempt in caught.value.history] == [0, 2, 4, 8, 16, 32]


def test_all_attempts_send_the_same_bytes_under_one_idempotency_key(server):
    server.reply(status=500)
    server.reply(status=500)
    with client(server, FakeClock()) as llm:
        llm.chat_completion(HELLO)
        llm.chat_completion(HELLO)
    keys = [received.headers["idempotency-key"] for received in server.requests]
    assert len({received.body for received in server.requests[:3]}) == 1
    assert keys[0] == keys[1] == keys[2] != keys[3]


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 413, 422, 501])
def test_what_cannot_help_is_not_repeated(server, status):
    server.reply(lambda _: {"status": status})
    with client(server, FakeClock()) as llm, pytest.raises(LLMAPIError) as caught:
        llm.chat_completion(HELLO)
    assert caught.value.status_code == status
    assert len(server.requests) == 1


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504, 529])
def test_what_may_help_is_repeated(server, status):
    server.reply(status=status)
    with client(server, FakeClock()) as llm:
        assert llm.chat_completion(HELLO).attempts == 2


@pytest.mark.parametrize("status, said, requests", [(500, "false", 1), (400, "true", 2)])
def test_x_should_retry_is_obeyed(server, status, said, requests):
    server.reply(status=status, headers={"x-should-retry": said})
    with client(server, FakeClock()) as llm:
        try:
            llm.chat_completion(HELLO)
        except LLMAPIError as error:
            assert error.status_code == status
    assert len(server.requests) == requests


def test_retry_after_is_waited_and_a_long_one_is_raised(server):
    clock = FakeClock()
    server.reply(status=429, headers={"retry-after": "7.5"})
    server.reply("fine")
    server.reply(status=429, headers={"retry-after": "3600"})
    with client(server, clock) as llm:
        llm.chat_completion(HELLO)
        assert clock.slept == [7.5]
        with pytest.raises(LLMRateLimitError) as caught:
            llm.chat_completion(HELLO)
    assert clock.slept == [7.5]
    assert caught.value.suggested_wait == 3600


def test_a_wait_beyond_the_deadline_is_not_slept(server):
    clock = FakeClock()
    server.reply(lambda _: {"status": 503})
    with client(server, clock, deadline=2.5, retry_jitter=0) as llm:
        with pytest.raises(LLMServerError) as caught:
            llm.chat_completion(HELLO)
    assert clock.slept == [1.0]
    assert caught.value.attempts == 2


def test_an_exhausted_quota_is_tried_once(server):
    body = {"error": {"message": "You exceeded your quota", "code": "insufficient_quota"}}
    server.reply(status=429, body=body)
    with client(server, FakeClock()) as llm, pytest.raises(LLMQuotaError) as caught:
        llm.chat_completion(HELLO)
    assert not caught.value.retriable
    assert len(server.requests) == 1


def test_a_policy_of_the_users_own(server):
    clock = FakeClock()
    server.reply(lambda _: {"status": 500})
    with LLM(base_url=server.url, retries=RetryPolicy(2, delay=5, jitter=0), clock=clock) as llm:
        with pytest.raises(LLMServerError):
            llm.chat_completion(HELLO)
    assert clock.slept == [5, 10]


def test_nothing_is_retried_after_the_first_event():
    def answer(connection, number):
        connection.sendall(stream_head("connection: close") + chunk("Hel"))
        hang_up(connection)

    with raw_server(answer) as server, client(server, FakeClock()) as llm:
        stream = llm.stream(HELLO)
        assert next(stream).text_delta == "Hel"
        with pytest.raises(LLMStreamError) as caught:
            next(stream)
        with pytest.raises(StopIteration):
            next(stream)
        assert len(server.requests) == 1
    assert caught.value.partial.text == "Hel"
    assert caught.value.history == stream.history


def test_a_stream_that_fails_before_its_first_event_is_retried():
    def answer(connection, number):
        if number == 1:
            connection.sendall(stream_head("connection: close"))
        else:
            body = chunk("right", finish_reason="stop") + b"data: [DONE]\n\n"
            connection.sendall(stream_head(f"content-length: {len(body)}") + body)
        hang_up(connection)

    with raw_server(answer) as server, client(server, FakeClock()) as llm:
        stream = llm.stream(HELLO)
        assert stream.response.text == "right"
        assert stream.response.attempts == stream.attempts == 2


def test_errors_as_events(server):
    server.reply(lambda _: {"status": 400, "body": {"error": {"message": "no"}}})
    with client(server) as llm:
        (event,) = llm.stream(HELLO, on_error="event")
        assert event.type == EventType.ERROR
        assert isinstance(event.error, LLMAPIError)
        with pytest.raises(LLMAPIError):
            list(llm.stream(HELLO, on_error="event").text_stream)
        with pytest.raises(LLMConfigError, match="on_error"):
            llm.stream(HELLO, on_error="ignore")


def test_generate_never_raises(server):
    with client(server, FakeClock()) as llm:
        good = llm.generate("say hi", system="Be brief.")
        server.reply(lambda _: {"status": 401})
        bad = llm.generate("say hi")
        empty = llm.generate([])
    assert (good.content, good.success, good.error_message) == ("hi", True, None)
    assert good.total_tokens == good.input_tokens + good.output_tokens
    assert good.model == "gpt-4"
    assert good.latency_ms == 0  # on a clock that stands still
    assert server.requests[0].json["messages"][0] == {"role": "system", "content": "Be brief."}
    assert not bad.success
    assert bad.error.status_code == 401
    assert "401" in bad.error_message
    assert bad.model == "gpt-4"
    assert isinstance(empty.error, LLMConfigError)


def test_messages_are_never_changed(server):
    message = Message(role="user", content="Hello!")
    plain = {"role": "user", "content": [{"type": "text", "text": "Hello!"}]}
    before = message.model_copy(deep=True), {**plain, "content": [dict(plain["content"][0])]}
    with client(server) as llm:
        llm.chat_completion([message, plain])
        llm.with_options(provider="anthropic").chat_completion(iter([message, plain]))
    assert (message, plain) == before


def test_left_out_is_not_none(server):
    with client(server) as llm:
        llm.chat_completion(HELLO)
        llm.chat_completion(HELLO, temperature=None, max_tokens=5, top_p=0.5, stop=None)
        llm.chat_completion(HELLO, extra_body={"model": "other"}, extra_headers={"X-Tag": "a"})
    first, second, third = (received.json for received in server.requests)
    assert first["temperature"] == 0.7
    assert "max_tokens" not in first
    assert "temperature" not in second
    assert "stop" not in second
    assert (second["max_tokens"], second["top_p"]) == (5, 0.5)
    assert third["model"] == "other"
    assert server.requests[2].headers["x-tag"] == "a"


@pytest.mark.parametrize(
    "messages, says",
    [
        ([], "empty"),
        ("Hello!", "list of messages"),
        ({"role": "user"}, "list of messages"),
        (7, "list of messages"),
        ([{"content": "no role"}], r"messages\[0\] has no role"),
        ([*HELLO, {"role": "user"}], r"messages\[1\].*no content"),
        ([*HELLO, "text"], r"messages\[1\] is a str"),
        ([{"role": "user", "content": float("nan")}], r"messages\[0\].content.*not finite"),
        ([{"role": "user", "content": b"bytes"}], r"messages\[0\].content \(bytes\)"),
        ([{"role": "user", "content": "\ud800"}], "surrogate"),
        ([{"role": "user", "content": {1, 2}}], r"content \(set\)"),
    ],
)
def test_bad_messages_are_refused_before_anything_is_sent(server, messages, says):
    with client(server) as llm, pytest.raises(LLMConfigError, match=says):
        llm.chat_completion(messages)
    assert server.requests == []
    assert llm.get_request_count() == 0


def test_a_message_that_holds_itself_is_refused(server):
    content = []
    content.append(content)
    with client(server) as llm, pytest.raises(LLMConfigError, match="contains itself"):
        llm.chat_completion([{"role": "user", "content": content}])


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": 2.5},
        {"temperature": "hot"},
        {"max_tokens": 0},
        {"max_tokens": 1.5},
        {"timeout": 0},
        {"deadline": -1},
        {"provider": "opnai"},
        {"model": " "},
        {"extra_headers": {"Authorization": "Bearer sk-other"}},
        {"extra_headers": {"X-Bad": "a\r\nb"}},
    ],
)
def test_bad_arguments_are_refused_before_anything_is_sent(server, wrong):
    with client(server) as llm, pytest.raises(LLMConfigError) as caught:
        llm.chat_completion(HELLO, **wrong)
    assert "sk-other" not in str(caught.value)
    assert server.requests == []


def test_counts_and_the_last_response(server):
    with client(server, FakeClock()) as llm:
        assert llm.get_last_response() is None
        server.reply(status=500)
        first = llm.chat_completion(HELLO)
        assert llm.get_request_count() == 1
        assert llm.get_last_response() is first
        with llm.stream(HELLO) as stream:
            list(stream)
        assert llm.get_last_response() == stream.response
        others = []
        thread = threading.Thread(target=lambda: others.append(llm.get_last_response()))
        thread.start()
        thread.join()
        assert others == [None]
        llm.reset_session()
        assert (llm.get_request_count(), llm.get_last_response()) == (0, None)
        llm.chat_completion(HELLO)
        assert (llm.get_request_count(), server.connections) == (1, 2)


def test_close_and_use_again(server):
    llm = client(server)
    with llm:
        llm.chat_completion(HELLO)
    assert llm.closed
    llm.close()
    llm.chat_completion(HELLO)
    assert not llm.closed
    llm.close()
    assert server.connections == 2


def test_with_options_shares_the_pool(server):
    with client(server) as llm:
        llm.chat_completion(HELLO)
        cool = llm.with_options(temperature=0.0, model="gpt-4o-mini")
        cool.chat_completion(HELLO)
        assert llm.get_request_count() == 2
        with pytest.raises(LLMConfigError, match="pool_size"):
            llm.with_options(pool_size=3)
        with pytest.raises(LLMConfigError, match="'temperature'"):
            llm.with_options(temperatur=1)
    assert server.connections == 1
    assert (server.requests[1].json["temperature"], server.requests[1].json["model"]) == (
        0.0,
        "gpt-4o-mini",
    )
    assert llm.config.temperature == 0.7


def test_a_call_can_switch_provider_on_the_same_client(server, monkeypatch):
    monkeypatch.setenv("ANTHROPIC_BASE_URL", server.url)
    monkeypatch.setenv("ANTHROPIC_API_KEY", "sk-ant-5678")
    with client(server, models={"anthropic": "claude-3-5-sonnet-20241022"}) as llm:
        llm.chat_completion(HELLO)
        switched = llm.chat_completion(HELLO, provider="anthropic")
        with pytest.raises(LLMConfigError, match="which model of mistral"):
            llm.chat_completion(HELLO, provider="mistral")
    ours, theirs = server.requests
    assert switched.provider == "anthropic"
    assert theirs.path == "/v1/messages"
    assert theirs.json["model"] == "claude-3-5-sonnet-20241022"
    assert theirs.headers["x-api-key"] == "sk-ant-5678"
    assert "authorization" not in theirs.headers
    assert ours.headers["authorization"] == "Bearer sk-secret-1234"


def test_a_thousand_calls_and_twenty_streams_use_one_connection(server):
    with client(server) as llm:
        for _ in range(1000):
            llm.chat_completion(HELLO)
        for _ in range(20):
            for _event in llm.stream(HELLO):
                pass
    assert server.connections == 1


def test_thirty_two_threads_share_a_client(server):
    wrong = []

    def work(number):
        for turn in range(50):
            word = f"word-{number}-{turn}"
            ask = [{"role": "user", "content": f"say {word}"}]
            said = llm.stream(ask).response.text if turn % 2 else llm.chat_completion(ask).text
            if said != word:
                wrong.append((word, said))

    with client(server) as llm:
        threads = [threading.Thread(target=work, args=(n,)) for n in range(32)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []
        assert llm.get_request_count() == 1600
    assert server.connections <= 32


def slow_stream(connection, number):
    connection.sendall(stream_head("connection: close") + chunk("one "))
    connection.recv(1)  # until the client goes away


def test_cancel_from_another_thread_ends_a_stream():
    with raw_server(slow_stream) as server, client(server) as llm:
        stream = llm.stream(HELLO)
        next(stream)
        threading.Timer(0.1, stream.cancel).start()
        started = time.monotonic()
        with pytest.raises(LLMCancelledError) as caught:
            list(stream)
        assert time.monotonic() - started < AT_ONCE  # and not until its timeout
    assert caught.value.partial.text == "one "
    assert not caught.value.retriable


def test_closing_the_client_ends_abandoned_streams():
    with raw_server(slow_stream) as server:
        llm = client(server)
        stream = llm.stream(HELLO)
        llm.close()
        assert next(stream).text_delta == "one "
        with pytest.raises(LLMCancelledError, match="closed"):
            next(stream)


def test_a_stream_that_nobody_holds_is_closed():
    gone = threading.Event()

    def answer(connection, number):
        slow_stream(connection, number)
        gone.set()

    with raw_server(answer) as server, client(server) as llm:
        stream = llm.stream(HELLO)
        next(stream)
        del stream
        gc.collect()
        assert gone.wait(20)


def test_leaving_a_stream_half_read_leaves_the_next_call_right(server):
    with client(server) as llm:
        with llm.stream([{"role": "user", "content": "count to 500"}]) as stream:
            next(stream)
        assert list(stream) == []
        assert llm.chat_completion([{"role": "user", "content": "say right"}]).text == "right"


def test_the_timeout_of_a_stream_counts_the_wait_for_content_only(monkeypatch):
    """A reader that takes its time between events is no reason to give up."""
    ahead, more = [0], threading.Event()
    monkeypatch.setattr(Clock, "now", lambda _: time.monotonic() + ahead[0])

    def answer(connection, number):
        connection.sendall(stream_head("connection: close") + chunk("a") + chunk("b"))
        more.wait(30)
        done = chunk("c", finish_reason="stop") + b"data: [DONE]\n\n"
        connection.sendall(done)
        hang_up(connection)

    with raw_server(answer) as server, client(server, timeout=60) as llm:
        stream = llm.stream(HELLO)
        next(stream)
        ahead[0] = 1000
        time.sleep(2 * Watchdog.TICK)  # whoever looks after the timeouts has looked
        assert next(stream).text_delta == "b"
        more.set()
        assert [event.text_delta for event in stream] == ["c", None]


def test_logging_says_what_happened_and_never_what_was_said(server, caplog):
    caplog.set_level(logging.DEBUG)
    server.reply(status=503)
    server.reply("the answer")
    with client(server, FakeClock(), retry_jitter=0) as llm:
        llm.chat_completion([{"role": "user", "content": "the prompt"}])
        server.reply(status=401)
        with pytest.raises(LLMError):
            llm.chat_completion(HELLO)
        llm.reset_session()
    ours = [(r.levelname, r.getMessage()) for r in caplog.records if r.name == "LLM"]
    text = "\n".join(message for _, message in ours)
    assert [level for level, _ in ours if level != "DEBUG"] == [
        "INFO",
        "INFO",
        "ERROR",
        "INFO",
        "INFO",
    ]
    assert "attempt 2 of 4 in 1.0 s: 503" in text
    assert "gpt-4" in text
    assert "1 messages" in text
    everything = "\n".join(record.getMessage() for record in caplog.records)
    for secret in ("sk-secret", "the prompt", "the answer"):
        assert secret not in everything


def test_the_client_is_lazy_and_leaves_no_warning(server):
    """In a script that closes nothing: not the client, not a stream it has begun."""
    code = f"""
from LLM import LLM
llm = LLM(base_url={server.url!r})
llm.chat_completion([dict(role="user", content="hi")])
stream = llm.stream([dict(role="user", content="count to 400")])
next(stream)
other = LLM(base_url={server.url!r})
other.stream([dict(role="user", content="count to 400")])
"""
    command = [sys.executable, "-X", "dev", "-W", "error", "-c", code]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")


def test_nothing_is_opened_before_the_first_call():
    llm = LLM(base_url="http://127.0.0.1:9", max_retries=0)
    with pytest.raises(LLMConnectionError, match=r"127\.0\.0\.1:9") as caught:
        llm.chat_completion(HELLO)
    assert caught.value.retriable
    assert isinstance(caught.value, ConnectionError)
    assert caught.value.provider == "openai-compatible"


def test_wrong_kinds_of_config():
    with pytest.raises(TypeError, match="LLMConfig"):
        LLM({"model": "gpt-4"})
    with pytest.raises(LLMConfigError, match="did you mean 'model'"):
        LLM(modle="gpt-4")
    assert LLM(LLMConfig(model="a"), model="b").config.model == "b"
    assert "gpt-4" in repr(LLM(api_key="sk-secret-1234"))
    assert "sk-secret" not in repr(LLM(api_key="sk-secret-1234"))


@pytest.mark.parametrize("name", "api_key base_url headers max_retries on_error".split())
def test_a_setting_of_the_client_is_not_sent_with_a_call(server, name):
    """It would go into the body: a key to whatever server is asked."""
    with client(server) as llm, pytest.raises(LLMConfigError, match="with_options") as caught:
        llm.chat_completion(HELLO, **{name: "sk-other-1234"})
    assert "sk-other" not in str(caught.value)
    assert server.requests == []


def test_a_header_is_sent_once_whatever_its_spelling():
    with raw_server(lambda c, n: c.sendall(http())) as raw:
        with client(raw, default_headers={"user-agent": "mine", "X-A": "1"}) as llm:
            llm.chat_completion(HELLO, extra_headers={"x-a": "2", "ACCEPT": "*/*"})
        lines = raw.requests[0].partition(b"\r\n\r\n")[0].decode().split("\r\n")[1:]
    sent = [(name.lower(), value) for name, _, value in (line.partition(": ") for line in lines)]
    assert len(dict(sent)) == len(sent)
    assert {("user-agent", "mine"), ("x-a", "2"), ("accept", "*/*")} <= set(sent)


def test_closing_a_client_made_of_another_closes_nothing(server):
    with client(server) as llm:
        stream = llm.stream([{"role": "user", "content": "count to 50"}])
        with llm.with_options(timeout=5) as hasty:
            hasty.chat_completion(HELLO)
        assert stream.response.text.endswith("50.")
        assert not llm.closed


def test_a_stream_remembers_its_error(server):
    server.reply(lambda _: {"status": 401})
    with client(server) as llm:
        stream = llm.stream(HELLO, on_error="event")
        assert stream.response is None
        assert stream.error.status_code == 401
        assert "over" in repr(stream)


def test_models_can_be_looked_for(server):
    with client(server) as llm:
        models = llm.list_models()
    assert "gpt-4" in models
    assert models[0].id == server.models[0]
    assert len(models) == len(server.models)


def test_a_file_of_certificates_that_is_not_there(server):
    with client(server, verify="/no/such.pem") as llm, pytest.raises(LLMConfigError, match="such"):
        llm.chat_completion(HELLO)
    with pytest.raises(TypeError, match="Session"):
        LLM(session=3)
