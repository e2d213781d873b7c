"""Recordings: what was answered once is answered again, without a socket, a secret or a doubt."""

import gzip
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from LLM import LLM, LLMConnectionError, LLMError, LLMServerError, LLMStreamError, LLMTimeoutError
from LLM.testing import (
    CassetteError,
    CassetteMiss,
    FaultServer,
    LocalServer,
    record,
    replay,
    use_cassette,
)
from LLM.testing.cassette import _Redactor, _rewritten
from LLM.transport import Transport
from tests.fakes import (
    AT_ONCE,
    CHAT,
    FakeClock,
    chunk,
    hang_up,
    http,
    patiently,
    raw_server,
    stream_head,
)

KEY = "sk-very-secret-0123456789"
# No server ever listened there: only a recording can answer. Its port does not matter to it.
NOWHERE = "http://127.0.0.1:9"


def hello(text="Hello!"):
    return [{"role": "user", "content": text}]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "talk.jsonl"


def lines(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def client(url=NOWHERE, **settings):
    return LLM(base_url=url, **{"retry_delay": 0, "retry_jitter": 0, **settings})


@pytest.mark.parametrize("model", ["gpt-4", "anthropic/claude-3-5-sonnet-20241022"])
def test_what_was_recorded_is_replayed_in_both_dialects(server, path, model):
    def talk(url):
        provider, _, name = model.rpartition("/")
        settings = {"provider": provider, "api_key": KEY} if provider else {}
        with client(url, model=name, **settings) as llm:
            whole = llm.chat_completion(hello("What is 5 x 3?"))
            events = list(llm.stream(hello("Count to 5")))
            models = [model.id for model in llm.list_models()]
        return whole.model_dump(), events, models

    with record(path) as recorder:
        said = talk(server.url)
    asked = len(server.requests)
    with replay(path) as cassette:
        again = talk(NOWHERE)
    assert again == said
    assert said[0]["choices"][0]["message"]["content"] == "5 * 3 = 15."
    assert (asked, len(server.requests), recorder.count) == (3, 3, 3)
    assert cassette.unused == []
    assert Transport.tapes == ()


def test_a_retried_call_is_one_exchange_for_each_attempt(server, path):
    server.reply(status=503)
    with record(path), client(server.url) as llm:
        assert llm.chat_completion(hello()).attempts == 2
    assert [line["response"]["status"] for line in lines(path)] == [503, 200]
    with replay(path), client() as llm:
        reply = llm.chat_completion(hello())
    assert [attempt.status for attempt in reply.history] == [503, 200]


def test_the_same_request_again_gets_the_next_answer(path):
    with LocalServer(["One.", "Two."]) as server, record(path), client(server.url) as llm:
        said = [llm.chat_completion(hello()).text for _ in range(2)]
    with replay(path) as cassette, client() as llm:
        assert [llm.chat_completion(hello()).text for _ in range(2)] == said == ["One.", "Two."]
        with pytest.raises(CassetteMiss, match="asked once more than it is recorded"):
            llm.chat_completion(hello())
        cassette.misses.clear()


def test_the_order_of_keys_and_the_way_of_writing_numbers_do_not_matter(server, path):
    with record(path), client(server.url) as llm:
        llm.chat_completion(hello(), temperature=1, seed=2, extra_body={"a": {"x": 1, "y": 2}})
    with replay(path), client() as llm:
        llm.chat_completion(
            [{"content": "Hello!", "role": "user"}],
            seed=2,
            temperature=1.0,
            extra_body={"a": {"y": 2, "x": 1}},
        )


def test_another_host_is_another_request_unless_told_otherwise(server, path):
    with record(path), client(server.url) as llm:
        llm.chat_completion(hello())
    elsewhere = "http://model.invalid"
    with replay(path) as cassette, client(elsewhere) as llm:
        with pytest.raises(CassetteMiss, match=r"\+POST model\.invalid/v1/chat"):
            llm.chat_completion(hello())
        cassette.misses.clear()
    with replay(path, ignore_host=True), client(elsewhere) as llm:
        llm.chat_completion(hello())


def test_a_miss_shows_the_nearest_recording_and_touches_no_network(server, path):
    with record(path), client(server.url) as llm:
        llm.chat_completion(hello("What is 2 + 2?"))
        llm.completion("Once upon a time")
    asked = len(server.requests)
    with replay(path) as cassette, client(server.url, api_key=KEY) as llm:
        with pytest.raises(CassetteMiss) as caught:
            llm.chat_completion(hello(f"What is 2 + 3? {KEY}"))
        assert len(cassette.unused) == 2
        cassette.misses.clear()
    told = str(caught.value)
    assert "The nearest is line 1" in told
    assert '-      "content": "What is 2 + 2?"' in told
    assert '+      "content": "What is 2 + 3? ***"' in told
    assert KEY not in told
    assert not isinstance(
        caught.value, LLMError
    )  # else it would be retried, and `generate` hide it
    assert len(server.requests) == asked


def test_a_miss_that_was_swallowed_still_fails_the_block(server, path):
    with record(path), client(server.url) as llm:
        llm.chat_completion(hello())
    with pytest.raises(CassetteMiss, match="no recording"):
        with replay(path), client() as llm:
            with pytest.raises(AssertionError):
                llm.generate("Something else")
    with pytest.raises(KeyError):  # what ended the block comes first
        with replay(path) as cassette:
            cassette.misses.append("x")
            raise KeyError


def test_an_empty_recording_answers_nothing(path):
    path.touch()
    with replay(path) as cassette, client() as llm:
        with pytest.raises(CassetteMiss, match="is empty"):
            llm.chat_completion(hello())
        cassette.misses.clear()


def test_no_credential_is_ever_written(path):
    def echo(request):
        sent = request.headers.get("authorization", "")
        return f"You sent {sent}, and said: {request.json['messages'][0]['content']}"

    with LocalServer() as server, record(path), client(server.url, api_key=KEY) as llm:
        server.reply(echo)
        assert KEY in llm.chat_completion(hello(f"I am {KEY}")).text
        text = "".join(llm.stream(hello(f"I am {KEY}")).text_stream)
        assert KEY in text
        server.reply(status=401, body=f"no such key: {KEY}", headers={"x-request-id": KEY})
        with pytest.raises(LLMError):
            llm.chat_completion(hello())
    written = path.read_text("utf-8")
    assert KEY not in written
    assert "uthorization" not in written
    assert "Bearer" in written  # what was said is there
    # The key of the one who replays may be another, or none.
    for other in (KEY, "sk-another-key", None):
        with replay(path), client(api_key=other) as llm:
            assert (
                llm.chat_completion(hello("I am ***")).text
                == "You sent Bearer ***, and said: I am ***"
            )
            got = "".join(llm.stream(hello("I am ***")).text_stream)
            assert got == text.replace(KEY, "***")
    # In pieces of words, it is not there either.
    assert "0123456789" not in written


def test_an_innocent_word_that_is_the_key_of_the_one_who_replays(server, path):
    with record(path), client(server.url, api_key=KEY) as llm:
        llm.chat_completion(hello("This is a test"))
    with replay(path), client(api_key="test") as llm:
        llm.chat_completion(hello("This is a test"))


@pytest.mark.parametrize("secret", [KEY, 'sk-"quoted"', "sk-/slash\\", "sk-ключ"])
@pytest.mark.parametrize("size", [1, 3, 50, 1000])
def test_a_secret_across_pieces_and_events(secret, size):
    events = "".join(
        f"event: x\ndata: {json.dumps({'index': 0, 'delta': {'t': piece}})}\r\n\r\n"
        for piece in ["I am ", secret[:4], secret[4:7], secret[7:], ".", secret]
    )
    events += f": {secret}\rdata: {secret}\n\ndata: [DONE]\n\n"
    pieces = [events[at : at + size] for at in range(0, len(events), size)]
    from pydantic import SecretStr

    told = _Redactor(SecretStr(secret), None).body(pieces)
    assert len(told) == len(pieces)
    values = [
        json.loads(line[5:])["delta"]["t"]
        for line in "".join(told).splitlines()
        if line.startswith("data: {")
    ]
    assert "".join(values) == "I am ***.***"
    assert secret not in "".join(told)
    assert "".join(told).endswith("data: ***\n\ndata: [DONE]\n\n")


def test_what_goes_across_parts_is_put_where_it_begins():
    def censor(text):
        return text.replace("Alice", "N.N.")

    assert _rewritten(["Hi Al", "i", "ce!", " Bye"], censor) == ["Hi N.N.", "", "!", " Bye"]
    assert _rewritten(["Alice", "Al", "ice"], censor) == ["N.N.", "N.N.", ""]
    assert _rewritten(["a", "b"], lambda text: text + "!" if text == "ab" else text) == ["a", "b!"]


def test_a_function_of_ones_own_redacts_both_ways(path):
    def censor(text):
        return text.replace("Alice", "N.N.").replace("\n", "")  # would break JSON, if given any

    with LocalServer() as server, record(path, redact=censor), client(server.url) as llm:
        server.reply(lambda request: "Alice is called Alice")
        llm.chat_completion(hello("Alice\n?"))
        list(llm.stream(hello("Alice\n?")))
    assert "Alice" not in path.read_text("utf-8")
    with replay(path, redact=censor), client() as llm:
        assert llm.chat_completion(hello("Alice\n?")).text == "N.N. is called N.N."
        assert llm.stream(hello("Alice\n?")).response.text == "N.N. is called N.N."


def test_stream_timing_is_kept_if_asked_for(path):
    said = [chunk("One"), chunk(" two"), chunk(" three", finish_reason="stop"), b"data: [DONE]\n\n"]
    read = threading.Semaphore()  # the next piece comes when the last was read, so that it is one

    def answer(connection, number):
        connection.sendall(stream_head("connection: close"))
        for piece in said:
            read.acquire(timeout=30)
            time.sleep(0.02)
            connection.sendall(piece)
        hang_up(connection)

    with raw_server(answer) as server, record(path), client(server.url) as llm:
        for _ in llm.stream(hello()):
            read.release()
    (line,) = lines(path)
    pieces = line["response"]["pieces"]
    assert [text.encode() for _, text in pieces] == said
    assert all(seconds > 0.01 for seconds, _ in pieces)
    recorded = sum(seconds for seconds, _ in pieces)
    for speed, expected in ((1, recorded), (4, recorded / 4), (None, 0)):
        clock = FakeClock()
        with replay(path, speed=speed), LLM(base_url=NOWHERE, clock=clock) as llm:
            assert llm.stream(hello()).response.text == "One two three"
        assert sum(clock.slept) == pytest.approx(expected, abs=1e-3)


def edited(path, **changes):
    """A recording of one exchange, with another response."""
    line = {"request": {"method": "POST", "url": f"{NOWHERE}/v1/chat/completions"}}
    line["request"]["body"] = {"model": "gpt-4", "messages": hello(), "temperature": 0.7}
    if "pieces" in changes:
        line["request"]["body"].update(stream=True, stream_options={"include_usage": True})
    line["response"] = {"status": 200, "headers": {}, **changes}
    path.write_text(json.dumps(line) + "\n", "utf-8")


@pytest.mark.parametrize(
    "limits, expected",
    [({"timeout": 70}, "timeout"), ({"timeout": None, "deadline": 80}, "deadline")],
)
def test_the_clocks_of_a_call_run_while_it_is_replayed(path, limits, expected):
    edited(path, seconds=200, body=CHAT.decode())
    clock = FakeClock()
    with replay(path, speed=1), LLM(base_url=NOWHERE, clock=clock, max_retries=0, **limits) as llm:
        with pytest.raises(LLMTimeoutError) as caught:
            llm.chat_completion(hello())
    assert caught.value.clock == expected
    # A timeout is real time: what the machine took counts.
    assert sum(clock.slept) == pytest.approx(80 if expected == "deadline" else 70, abs=20)


def test_a_deadline_counts_the_waits_of_a_stream_together(path):
    edited(
        path, pieces=[[30, chunk("One").decode()], [30, chunk(" two").decode()], [30, "data: x"]]
    )
    clock = FakeClock()
    with replay(path, speed=1), LLM(base_url=NOWHERE, clock=clock) as llm:
        stream = llm.stream(hello(), timeout=50, deadline=80)
        with pytest.raises(LLMTimeoutError) as caught:
            list(stream)
    assert (caught.value.clock, caught.value.partial.text) == ("deadline", "One two")


def test_a_replayed_stream_can_be_cancelled(path):
    edited(path, pieces=[[0, chunk("One").decode()], [60, "data: [DONE]\n\n"]])
    with replay(path, speed=1), client() as llm:
        stream = llm.stream(hello())
        threading.Timer(0.05, stream.cancel).start()
        began = time.monotonic()
        with pytest.raises(LLMError, match="cancelled"):
            list(stream)
    assert time.monotonic() - began < AT_ONCE


def test_a_broken_stream_breaks_again(path):
    def answer(connection, number):
        connection.sendall(stream_head("transfer-encoding: chunked"))
        data = chunk("Hel") + chunk("lo")
        connection.sendall(b"%x\r\n%b\r\n" % (len(data), data))
        hang_up(connection)

    def failure(url):
        with client(url) as llm, pytest.raises(LLMStreamError) as caught:
            list(llm.stream(hello()))
        return str(caught.value).partition(": ")[2], caught.value.partial.text

    with raw_server(answer) as server, record(path):
        said = failure(server.url)
    with replay(path):
        assert failure(NOWHERE) == said
    assert said[1] == "Hello"


def test_a_body_that_was_cut_or_too_slow_is_so_again(path):
    def answer(connection, number):
        connection.sendall(http()[:-10])
        if number == 1:
            hang_up(connection)

    def errors(url):
        with client(url, max_retries=0) as llm:
            for timeout in (30, 0.2):
                with pytest.raises(LLMConnectionError) as caught:
                    llm.chat_completion(hello(), timeout=timeout)
                yield type(caught.value), getattr(caught.value, "clock", None)

    with raw_server(answer) as server, record(path):
        said = list(errors(server.url))
    with replay(path):
        assert list(errors(NOWHERE)) == said
    assert said == [(LLMConnectionError, None), (LLMTimeoutError, "timeout")]


def test_no_answer_at_all_is_recorded_too(path):
    def answer(connection, number):
        if number == 1:
            hang_up(connection)
        elif number == 2:
            connection.recv(1)  # until the client goes away
        else:
            connection.sendall(http())

    def show(seconds):
        path.unlink(missing_ok=True)
        with raw_server(answer) as server, record(path), client(server.url) as llm:
            said = llm.chat_completion(hello(), timeout=seconds)
        assert [attempt.error for attempt in said.history] == names

    names = ["LLMConnectionError", "LLMTimeoutError", None]
    patiently(show, 0.2, 5)
    with replay(path, speed=100), client() as llm:
        again = llm.chat_completion(hello())
    assert [attempt.error for attempt in again.history] == names


def test_what_did_not_connect_says_so_again(path):
    def failure(url):
        with client(url, max_retries=0) as llm:
            return str(llm.generate(hello()).error)

    with socket.create_server(("127.0.0.1", 0)) as gone:
        url = f"http://127.0.0.1:{gone.getsockname()[1]}"
    with record(path):
        said = failure(url)
    assert "is the server running?" in said
    with replay(path):
        assert failure(url) == said


def test_a_timeout_without_answer_ends_early_under_a_shorter_one(path):
    edited(path)
    line = lines(path)[0]
    del line["response"]
    line["error"] = {"type": "LLMConnectionError", "message": "gone", "seconds": 50}
    path.write_text(json.dumps(line))
    with replay(path, speed=1), LLM(base_url=NOWHERE, clock=FakeClock(), max_retries=0) as llm:
        with pytest.raises(LLMTimeoutError):
            llm.chat_completion(hello(), timeout=2)


def test_a_stream_that_its_reader_left(path, server):
    def read(llm, count):
        stream = llm.stream(hello("Count to 300"))
        events = [next(stream).text_delta for _ in range(count)]
        stream.close()
        return events

    server.reply(" ".join(map(str, range(300))))
    with LocalServer([" ".join(map(str, range(200)))], token_delay=0.05) as slow:
        with record(path), client(slow.url) as llm:
            said = read(llm, 3)
    assert lines(path)[0]["response"]["left"] is True
    with replay(path), client() as llm:
        assert read(llm, 3) == said
    with pytest.raises(CassetteMiss, match="line 1: the recording ends here"):
        with replay(path), client() as llm:
            with pytest.raises(LLMStreamError, match="the recording ends here"):
                read(llm, 190)


def test_a_stream_that_goes_on_after_the_recording(path):
    with (
        LocalServer(["one two three four five"], token_delay=0.02) as server,
        client(server.url) as llm,
    ):
        with record(path) as recorder:
            stream = llm.stream(hello())
        assert recorder.count == 1
        assert stream.response.text == "one two three four five"
    (line,) = lines(path)
    assert line["response"]["left"] is True


def test_a_packed_body_is_written_unpacked(path):
    said = json.loads(CHAT)
    said["choices"][0]["message"]["content"] = f"The key is {KEY}."
    body = gzip.compress(json.dumps(said).encode())

    def answer(connection, number):
        cut = body if number == 1 else body[:-10]
        connection.sendall(http(cut, headers=["content-encoding: gzip"]))

    with raw_server(answer) as server, record(path):
        with client(server.url, api_key=KEY, max_retries=0) as llm:
            assert KEY in llm.chat_completion(hello()).text
            with pytest.raises(LLMConnectionError):
                llm.chat_completion(hello())
    assert KEY not in path.read_text("utf-8")
    with replay(path), client(max_retries=0) as llm:
        assert llm.chat_completion(hello()).text == "The key is ***."
        with pytest.raises(LLMConnectionError):
            llm.chat_completion(hello())


def test_bytes_that_are_no_text_are_kept(path):
    events = b'data: {"x":"\xff"}\n\n' + chunk("EURO", finish_reason="stop") + b"data: [DONE]\n\n"
    events = events.replace(b"EURO", "grün €".encode())

    def answer(connection, number):
        connection.sendall(stream_head("connection: close"))
        at = events.index("€".encode()) + 1
        connection.sendall(events[:at])
        time.sleep(0.05)
        connection.sendall(events[at:])
        hang_up(connection)

    with raw_server(answer) as server, record(path), client(server.url) as llm:
        said = llm.stream(hello()).response.text
    pieces = [piece for _, piece in lines(path)[0]["response"]["pieces"]]
    assert any(isinstance(piece, dict) for piece in pieces)
    with replay(path), client() as llm:
        assert llm.stream(hello()).response.text == said


def test_errors_and_their_advice(server, path):
    server.reply(status=429, headers={"retry-after": "600", "set-cookie": "a=b"})
    with record(path), client(server.url) as llm:
        with pytest.raises(LLMError) as first:
            llm.chat_completion(hello())
    headers = lines(path)[0]["response"]["headers"]
    assert set(headers) - {"date"} == {"retry-after", "content-type", "x-request-id"}
    with replay(path), client() as llm:
        with pytest.raises(LLMError) as again:
            llm.chat_completion(hello())
    assert (str(again.value), again.value.suggested_wait) == (str(first.value), 600)
    assert again.value.request_id == first.value.request_id


def test_an_error_status_answers_a_stream_too(server, path):
    server.reply(status=500)
    with record(path), client(server.url, max_retries=0) as llm:
        with pytest.raises(LLMServerError):
            llm.stream(hello())
    with replay(path), client(max_retries=0) as llm:
        with pytest.raises(LLMServerError):
            llm.stream(hello())


ODD = [
    "gzip-bomb",
    "stream-gzip-bomb",
    "brotli",
    "echo-at-the-body-cut",
    "error-brotli",
    "length-huge",
    "wait-date",
    "gzip-bomb-in-error",
]


@pytest.mark.parametrize("fault", ODD)
def test_what_a_client_refuses_is_refused_again(path, fault):
    def failure(url):
        limits = {"timeout": 2, "max_retries": 0, "max_response_bytes": 1 << 20}
        with client(url, api_key=KEY, **limits) as llm:
            error = None
            try:
                list(llm.stream(hello())) if "stream" in fault else llm.chat_completion(hello())
            except LLMError as caught:
                error = caught
        return type(error), getattr(error, "status_code", None), getattr(error, "suggested_wait", 0)

    with FaultServer() as server:
        with record(path):
            said = failure(server.url(fault))
    assert KEY not in path.read_text("utf-8")
    with replay(path):
        assert failure(NOWHERE) == said


def test_threads_get_each_its_own_answer(path):
    def ask(llm, number):
        text = f"Say {number}"
        if number % 2:
            return llm.stream(hello(text)).response.text
        return llm.chat_completion(hello(text)).text

    def all_of(url):
        with client(url) as llm, ThreadPoolExecutor(16) as pool:
            return list(pool.map(lambda number: ask(llm, number), range(80)))

    with LocalServer() as server, record(path):
        said = all_of(server.url)
    assert len(lines(path)) == 80
    with replay(path) as cassette:
        assert all_of(NOWHERE) == said
    assert not cassette.unused


def test_two_streams_at_a_time_are_replayed_in_the_order_they_began(path):
    server = LocalServer(["first one", "second"], token_delay=0.01)
    with server, record(path), client(server.url) as llm:
        first = llm.stream(hello())
        assert llm.stream(hello()).response.text == "second"
        assert first.response.text == "first one"
    assert [line["number"] for line in lines(path)] == [2, 1]
    with replay(path), client() as llm:
        assert llm.stream(hello()).response.text == "first one"


def test_clients_made_before_and_after_are_back_on_the_network(server, path):
    with client(server.url) as llm:
        with record(path):
            llm.chat_completion(hello())
        llm.chat_completion(hello())
        with replay(path):
            llm.chat_completion(hello())
        llm.chat_completion(hello())
    assert len(lines(path)) == 1
    assert len(server.requests) == 3


def test_what_was_never_sent_is_not_recorded(server, path):
    with record(path), LLM(base_url=server.url) as llm:
        with pytest.raises(LLMTimeoutError):
            llm.chat_completion(hello(), deadline=1e-9)
    assert lines(path) == []


GOOD = '{"request":{"method":"GET","url":"http://x/v1/models","body":null},"response":{"status":200,"headers":{},"body":"{}"}}'


@pytest.mark.parametrize(
    "text, told",
    [
        (GOOD[:60], "line 1: not JSON"),
        (f"{GOOD}\n\n{GOOD[:-1]}", "line 3: not JSON"),
        ("interactions:\n- request: {}\n", "line 1: not JSON"),
        (f"{GOOD}\n[]\n", "line 2: not a recorded exchange"),
        ('{"role": "user", "content": "Hi"}', "line 1: not a recorded exchange"),
        (GOOD.replace('"status":200', '"status":"ok"'), "line 1: not a recorded exchange"),
        (GOOD.replace('"GET"', "5"), "line 1: not a recorded exchange"),
        (GOOD.replace('"{}"', '{"base64":"!"}'), "line 1: not a recorded exchange"),
        (GOOD.replace('"response"', '"error"'), "line 1: not a recorded exchange"),
        ("\udcff", "line 1: not"),
    ],
)
def test_a_torn_or_foreign_file_is_named_with_its_line(path, text, told):
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(CassetteError) as caught:
        replay(path)
    assert f"{path}, {told}" in str(caught.value)


def test_no_file(path):
    with pytest.raises(CassetteError, match="there is no recording"):
        replay(path)


@pytest.mark.parametrize("speed", [0, -1, float("inf"), float("nan")])
def test_a_speed_that_is_none(path, speed):
    path.touch()
    with pytest.raises(ValueError, match="speed"):
        replay(path, speed=speed)


def test_once_records_once(server, path):
    for _ in range(2):
        with use_cassette(path), client(server.url) as llm:
            llm.chat_completion(hello())
    assert len(server.requests) == 1
    with use_cassette(path, mode="record"), client(server.url) as llm:
        llm.chat_completion(hello())
    assert len(server.requests) == 2
    path.unlink()
    with pytest.raises(CassetteError):
        use_cassette(path, mode="replay")
    with pytest.raises(ValueError, match="mode is 'never'"):
        use_cassette(path, mode="never")


def test_a_recording_begins_anew_and_stays_where_it_was_begun(server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "deep" / "er" / "talk.jsonl"
    for _ in range(2):
        with record("deep/er/talk.jsonl"), client(server.url) as llm:
            monkeypatch.chdir("deep")
            llm.chat_completion(hello())
        monkeypatch.chdir(tmp_path)
    assert len(lines(path)) == 1


def test_a_password_in_a_proxied_address_is_not_written():
    assert _Redactor(None, None).url("http://me:pw@host:1/v1?a=b") == "http://host:1/v1?a=b"
