"""What goes over the wire and what does not: connections, clocks, proxies, credentials, forks."""

import contextlib
import gc
import os
import signal
import socket
import ssl
import sys
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import requests
import responses
import trustme
import vcr
from requests.adapters import HTTPAdapter

from LLM import (
    LLM,
    LLMCancelledError,
    LLMConfig,
    LLMConnectionError,
    LLMError,
    LLMServerError,
    LLMTimeoutError,
)
from LLM.transport import WATCHDOG, Adapter, Exchange, Watchdog, is_loopback
from tests.fakes import (
    AT_ONCE,
    CHAT,
    FakeClock,
    RawServer,
    chunk,
    hang_up,
    http,
    raw_server,
    stream_head,
)

HELLO = [{"role": "user", "content": "Hello!"}]
KEY = "sk-very-secret-0123456789"


def client(url, **settings):
    settings = {"api_key": KEY, "max_retries": 0, **settings}
    return LLM(LLMConfig(base_url=url, **settings))


def test_the_request_as_it_goes_out():
    with raw_server(lambda c, n: c.sendall(http())) as server, client(server.url) as llm:
        llm.chat_completion(HELLO, temperature=0)
        request = server.requests[0]
    head, _, body = request.partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    assert lines[0] == "POST /v1/chat/completions HTTP/1.1"
    headers = dict(line.split(": ", 1) for line in lines[1:])
    assert headers.pop("Idempotency-Key")
    assert headers.pop("User-Agent").startswith("requests-llm/")
    assert headers == {
        "Host": server.url.removeprefix("http://"),
        "Accept": "application/json",
        "Content-Type": "application/json",
        "Accept-Encoding": "identity",
        "Authorization": f"Bearer {KEY}",
        "Content-Length": str(len(body)),
    }
    assert body == (
        b'{"model":"gpt-4","messages":[{"role":"user","content":"Hello!"}],"temperature":0}'
    )


def test_a_large_request_arrives_whole():
    text = "ä€😀" * 300_000
    with raw_server(lambda c, n: c.sendall(http())) as server, client(server.url) as llm:
        llm.chat_completion([{"role": "user", "content": text}])
        assert text.encode() in server.requests[0]


def test_drips_end_with_the_timeout():
    """A timeout that counts each read would wait for ever."""

    def drip(connection, number):
        connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n")
        for _ in range(1000):
            connection.sendall(b" ")
            time.sleep(0.02)

    with raw_server(drip) as server, client(server.url, timeout=0.3) as llm:
        started = time.monotonic()
        with pytest.raises(LLMTimeoutError) as caught:
            llm.chat_completion(HELLO)
        assert time.monotonic() - started < AT_ONCE  # all the drips take 20 s
    assert caught.value.clock == "timeout"
    assert caught.value.retriable
    assert isinstance(caught.value, TimeoutError)


def test_the_deadline_bounds_all_attempts_together():
    clock = FakeClock()

    def silent(connection, number):
        if number == 1:
            clock.time += 59.8
        connection.recv(1)

    config = LLMConfig(timeout=0.3, deadline=60, max_retries=50, retry_delay=0.01)
    with raw_server(silent) as server, LLM(config, base_url=server.url, clock=clock) as llm:
        with pytest.raises(LLMTimeoutError) as caught:
            llm.chat_completion(HELLO)
    assert caught.value.clock == "deadline"
    assert 2 <= caught.value.attempts < 50


def test_keep_alives_are_no_content():
    def comments(connection, number):
        connection.sendall(stream_head("connection: close") + chunk("a"))
        for _ in range(1000):
            connection.sendall(b": keep-alive\n\n")
            time.sleep(0.02)

    # On a busy machine the first event may be late as well, and is asked for again.
    again = {"max_retries": 50, "retry_delay": 0}
    with raw_server(comments) as server, client(server.url, timeout=0.3, **again) as llm:
        stream = llm.stream(HELLO)
        next(stream)
        started = time.monotonic()
        with pytest.raises(LLMTimeoutError) as caught:
            next(stream)
        assert time.monotonic() - started < AT_ONCE  # all the comments take 20 s
    assert caught.value.clock == "idle"
    assert caught.value.partial.text == "a"


def test_a_silent_listener_ends_with_the_timeout():
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with client(url, timeout=0.3) as llm, pytest.raises(LLMTimeoutError):
            llm.chat_completion(HELLO)


def test_a_name_that_nobody_resolves_in_time(monkeypatch):
    asked = threading.Event()
    real = socket.getaddrinfo

    def slow(host, *args, **kwargs):
        if host == "slow.localhost" and args[-1] != socket.AI_NUMERICHOST:
            asked.wait(60)
        return real(host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    with client("http://slow.localhost:9", connect_timeout=0.2) as llm:
        started = time.monotonic()
        with pytest.raises(LLMTimeoutError) as caught:
            llm.chat_completion(HELLO)
        asked.set()
    assert time.monotonic() - started < AT_ONCE
    assert caught.value.clock == "connect"


def test_a_name_that_does_not_exist():
    with (
        client("http://nowhere.invalid") as llm,
        pytest.raises(LLMConnectionError, match="resolve"),
    ):
        llm.chat_completion(HELLO)


def test_a_stale_connection_costs_one_free_resend():
    def answer(connection, number):
        connection.sendall(http())
        hang_up(connection) if number == 1 else None

    with raw_server(answer) as server, client(server.url) as llm:
        llm.chat_completion(HELLO)
        time.sleep(0.05)
        assert llm.chat_completion(HELLO).attempts == 1
        assert server.connections == 2


def test_a_connection_that_dies_under_the_request_is_resent_once():
    """The server closes when the second request on a connection comes: no byte of an answer."""

    def answer(connection, number):
        if number == 2:
            hang_up(connection)
        else:
            connection.sendall(http())

    with raw_server(answer) as server, client(server.url) as llm:
        assert llm.chat_completion(HELLO).attempts == 1
        assert llm.chat_completion(HELLO).attempts == 1
        assert len(server.requests) == 3


def test_a_fresh_connection_that_dies_is_not_resent_for_free():
    with raw_server(lambda c, n: hang_up(c)) as server, client(server.url) as llm:
        with pytest.raises(LLMConnectionError):
            llm.chat_completion(HELLO)
        assert len(server.requests) == 1


def test_bytes_after_a_response_are_nobodys_answer():
    wrong = CHAT.replace(b"right", b"WRONG")

    def answer(connection, number):
        connection.sendall(http() + (http(wrong) if number == 1 else b""))

    with raw_server(answer) as server, client(server.url) as llm:
        assert llm.chat_completion(HELLO).text == "right"
        assert llm.chat_completion(HELLO).text == "right"
        assert server.connections == 2


def test_early_hints_are_not_the_answer():
    hints = b"HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\n" * 3
    with raw_server(lambda c, n: c.sendall(hints + http())) as server, client(server.url) as llm:
        for _ in range(3):
            assert llm.chat_completion(HELLO).text == "right"
        assert server.connections == 1


def test_headers_cut_by_a_close_are_no_success():
    def answer(connection, number):
        connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n")
        hang_up(connection)

    with raw_server(answer) as server, client(server.url) as llm:
        with pytest.raises(LLMConnectionError, match="broke off"):
            llm.chat_completion(HELLO)


@pytest.mark.parametrize("how", ["requests", "session"])
def test_redirects_are_named_and_not_followed(how):
    with raw_server(lambda c, n: c.sendall(http())) as other:
        head = f"HTTP/1.1 307 Temporary\r\nlocation: {other.url}/v1\r\ntransfer-encoding: chunked\r\n\r\n"

        def answer(connection, number):
            connection.sendall(head.encode())
            with pytest.raises(OSError):  # a body that never ends
                while True:
                    connection.sendall(b"5\r\nhello\r\n")

        session = requests.Session() if how == "session" else None
        with raw_server(answer) as server:
            config = LLMConfig(base_url=server.url, api_key=KEY, max_retries=0)
            with LLM(config, session=session) as llm:
                with pytest.raises(LLMError, match=other.url) as caught:
                    llm.chat_completion(HELLO)
        assert caught.value.status_code == 307
        assert other.requests == []


def test_cookies_are_refused():
    answer = http(headers=["set-cookie: track=me; path=/"])
    with raw_server(lambda c, n: c.sendall(answer)) as server, client(server.url) as llm:
        llm.chat_completion(HELLO)
        llm.chat_completion(HELLO)
        assert b"track" not in server.requests[1]


@pytest.mark.parametrize("key", [KEY, None])
def test_netrc_is_not_read(tmp_path, monkeypatch, key):
    netrc = tmp_path / "netrc"
    netrc.write_text("default login somebody password hunter2\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    with (
        raw_server(lambda c, n: c.sendall(http())) as server,
        client(server.url, api_key=key) as llm,
    ):
        llm.chat_completion(HELLO)
        request = server.requests[0]
    assert b"Basic" not in request
    assert (KEY.encode() in request) == (key is not None)


def test_loopback_never_goes_through_a_proxy_of_the_environment(server, monkeypatch):
    with raw_server(lambda c, n: c.sendall(http())) as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        monkeypatch.setenv("ALL_PROXY", proxy.url)
        with client(server.url) as llm:
            llm.chat_completion(HELLO)
        assert proxy.requests == []


def test_another_host_goes_through_the_proxy_of_the_environment(monkeypatch):
    with raw_server(lambda c, n: c.sendall(http())) as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        with client("http://model.invalid") as llm:
            assert llm.chat_completion(HELLO).text == "right"
        assert proxy.requests[0].startswith(b"POST http://model.invalid/v1/chat/completions ")
        monkeypatch.setenv("NO_PROXY", "model.invalid")
        with client("http://model.invalid") as llm, pytest.raises(LLMConnectionError):
            llm.chat_completion(HELLO)


def test_a_proxy_of_the_config_counts_for_loopback_too(server):
    with raw_server(lambda c, n: c.sendall(http())) as proxy:
        with client(server.url, proxies={"http": proxy.url}) as llm:
            assert llm.chat_completion(HELLO).text == "right"
        assert len(proxy.requests) == 1


def test_a_dead_proxy_is_named():
    with client("http://model.invalid", proxies={"http": "http://127.0.0.1:9"}) as llm:
        with pytest.raises(LLMConnectionError, match="proxy"):
            llm.chat_completion(HELLO)


@pytest.mark.parametrize(
    "host, local",
    [
        ("localhost", True),
        ("a.localhost", True),
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("10.0.0.1", False),
        ("localhost.example.com", False),
        ("example.com", False),
    ],
)
def test_what_loopback_is(host, local):
    assert is_loopback(host) == local


def test_a_session_of_the_users_own(server):
    seen = []
    session = requests.Session()
    session.headers["X-Team"] = "ours"
    session.auth = ("user", "password")
    session.cookies["track"] = "me"
    session.hooks["response"].append(lambda response, **_: seen.append(response.status_code))
    session.mount("http://", HTTPAdapter(pool_maxsize=3))
    with LLM(LLMConfig(base_url=server.url, api_key=KEY), session=session) as llm:
        llm.chat_completion(HELLO)
        list(llm.stream(HELLO))
    received = server.requests[0].headers
    assert received["x-team"] == "ours"
    assert received["authorization"] == f"Bearer {KEY}"
    assert "cookie" not in received
    assert seen == [200, 200]
    assert server.connections == 1
    assert isinstance(session.get_adapter("http://x"), Adapter)
    assert session.get(f"{server.url}/health").status_code == 200  # and it still works without us
    session.close()


@responses.activate
def test_the_library_responses_sees_what_requests_is_asked_to_send():
    url = "http://127.0.0.1:8000/v1/chat/completions"
    responses.post(url, status=500, json={"error": {"message": "down"}})
    responses.post(url, json={"choices": [{"message": {"content": "mocked"}}]})
    with LLM(api_key=KEY, retry_delay=0) as llm:
        assert llm.chat_completion(HELLO).text == "mocked"
    sent = responses.calls[1].request
    assert sent.headers["Authorization"] == f"Bearer {KEY}"
    assert sent.headers["authorization"] == f"Bearer {KEY}"
    assert b'"messages"' in sent.body


@responses.activate
def test_the_library_responses_can_play_a_stream():
    body = chunk("mock") + chunk("ed", finish_reason="stop") + b"data: [DONE]\n\n"
    responses.post("http://127.0.0.1:8000/v1/chat/completions", body=body)
    with LLM() as llm:
        assert "".join(llm.stream(HELLO).text_stream) == "mocked"


def all_that_an_error_tells(error):
    parts = [repr(error), str(error), repr(error.args), repr(error.__dict__)]
    parts += traceback.TracebackException.from_exception(error, capture_locals=True).format()
    for inner in (error.__cause__, error.__context__):
        parts += [repr(inner), repr(getattr(inner, "__dict__", ""))]
    return "\n".join(parts)


@pytest.mark.parametrize("fault", ["refused", "reset", "status", "echo", "timeout", "garbage"])
def test_the_key_is_nowhere_in_an_error(fault):
    def answer(connection, number):
        if fault == "reset":
            hang_up(connection)
        elif fault == "status":
            connection.sendall(http(b"{}", "500 Oops"))
        elif fault == "echo":
            body = f'{{"error": {{"message": "Incorrect API key: {KEY}"}}}}'.encode()
            connection.sendall(http(body, "401 Unauthorized"))
        elif fault == "garbage":
            connection.sendall(f"HTTP/9 {KEY}\r\n\r\n".encode())
        else:
            time.sleep(1)

    with raw_server(answer) as server:
        url = "http://127.0.0.1:9" if fault == "refused" else server.url
        timeout = 0.3 if fault == "timeout" else 30
        with client(url, timeout=timeout) as llm, pytest.raises(LLMError) as caught:
            llm.chat_completion(HELLO)
    assert KEY not in all_that_an_error_tells(caught.value)
    assert caught.value.__context__ is None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_opens_its_own_connections(server):
    """With a warm pool, children would read each other's answers."""
    with client(server.url) as llm:
        llm.chat_completion(HELLO)
        children = []
        for number in range(4):
            child = os.fork()
            if child == 0:
                ask = [{"role": "user", "content": f"say child-{number}"}]
                right = all(llm.chat_completion(ask).text == f"child-{number}" for _ in range(20))
                os._exit(0 if right else 1)
            children.append(child)
        for _ in range(20):
            assert llm.chat_completion([{"role": "user", "content": "say parent"}]).text == "parent"
        assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0, 0]
    assert server.connections == 5


def test_the_watchdog_is_one_thread_and_lets_go():
    with raw_server(lambda c, n: c.sendall(http())) as server:
        clients = [client(server.url) for _ in range(3)]
        for llm in clients:
            llm.chat_completion(HELLO)
        names = [thread.name for thread in threading.enumerate()]
        assert names.count("LLM-watchdog") == 1
        for llm in clients:
            llm.close()
    assert not [e for e in WATCHDOG._watched if e.socket is not None]


def test_a_finished_exchange_cannot_be_stopped():
    """Its socket may serve another call by then."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        exchange = Exchange(float("inf"))
        exchange.attach(ours)
        exchange.finish()
        exchange.stop("timeout")
        assert exchange.stopped is None
        ours.sendall(b"still open")
        assert theirs.recv(10) == b"still open"


def test_an_exchange_stopped_before_it_has_a_socket():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        exchange = Exchange(float("inf"))
        exchange.stop("cancelled")
        exchange.attach(ours)
        assert theirs.recv(1) == b""


def test_sockets_are_given_back():
    """After a hundred failures of all kinds no socket and no thread is left."""

    def answer(connection, number):
        kind = number % 4
        if kind == 0:
            hang_up(connection)
        elif kind == 1:
            connection.sendall(http(b"oops", "500 Oops"))
        elif kind == 2:
            connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\nshort")
            hang_up(connection)
        else:
            connection.sendall(http())

    with raw_server(answer) as server, client(server.url) as llm:
        for _ in range(100):
            try:
                llm.chat_completion(HELLO)
            except (LLMServerError, LLMConnectionError):
                pass
        gc.collect()
        assert len(list(Path("/proc/self/fd").iterdir())) < 60


def test_an_answer_that_is_too_large_is_refused():
    body = CHAT.replace(b"right", b"x" * 5000)
    with raw_server(lambda c, n: c.sendall(http(body))) as server:
        with client(server.url, max_response_bytes=1000) as llm:
            with pytest.raises(LLMError, match="max_response_bytes"):
                llm.chat_completion(HELLO)


@pytest.mark.parametrize("way", ["response", "stream"])
def test_ctrl_c_closes_the_connection_and_the_next_call_is_right(way):
    asked, gone = threading.Event(), threading.Event()

    def answer(connection, number):
        if number > 1:
            connection.sendall(http())
            return
        asked.set()
        if way == "stream":
            connection.sendall(stream_head("connection: close") + chunk("a"))
        connection.recv(1)  # until the client goes away
        gone.set()

    def interrupt():
        asked.wait(30)
        time.sleep(0.05)  # so that, most times, it is the answer that is waited for
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    with raw_server(answer) as server, client(server.url) as llm:
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        threading.Thread(target=interrupt).start()
        try:
            with pytest.raises(KeyboardInterrupt):
                if way == "stream":
                    list(llm.stream(HELLO))
                else:
                    llm.chat_completion(HELLO)
        finally:
            signal.signal(signal.SIGINT, before)
        assert gone.wait(20)
        assert llm.chat_completion(HELLO).text == "right"


def test_a_held_stream_blocks_nobody():
    """More streams held open than the pool keeps: each gets a connection of its own."""

    def answer(connection, number):
        connection.sendall(stream_head("connection: close") + chunk(str(number)))
        connection.recv(1)

    with raw_server(answer) as server, client(server.url, pool_size=2) as llm:
        streams = [llm.stream(HELLO) for _ in range(6)]
        assert sorted(next(stream).text_delta for stream in streams) == list("123456")


def test_a_full_pool_is_nothing_to_warn_of(caplog):
    """Many threads at once are no mistake of the user's."""
    together = threading.Barrier(6)

    def answer(connection, number):
        together.wait(30)
        connection.sendall(http())

    with raw_server(answer) as server, client(server.url, pool_size=2) as llm:
        with ThreadPoolExecutor(6) as threads:
            answers = list(threads.map(lambda _: llm.chat_completion(HELLO).text, range(6)))
    assert answers == ["right"] * 6
    assert caplog.records == []


def test_a_key_over_plain_http_to_another_host_is_warned_of_once(monkeypatch, caplog):
    with raw_server(lambda c, n: c.sendall(http())) as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        with client("http://model.invalid") as llm:
            llm.chat_completion(HELLO)
            llm.chat_completion(HELLO)
    # urllib3 may still tell of connections of an earlier test.
    ours = [r for r in caplog.records if r.name == "LLM"]
    said = [r.getMessage() for r in ours if r.levelname == "WARNING"]
    assert said == ["the key goes to model.invalid unencrypted; use https"]


@contextmanager
def tls_server(path, answer):
    """A server with a certificate of an authority that nobody knows, and the authority's file."""
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    authority.cert_pem.write_to_path(path / "authority.pem")
    server = RawServer(answer, context)
    try:
        yield server.url.replace("http:", "https:"), str(path / "authority.pem")
    finally:
        server.close()


@pytest.fixture
def tls(tmp_path):
    with tls_server(tmp_path, lambda connection, _: connection.sendall(http())) as found:
        yield found


@pytest.mark.parametrize("size", [5000, 8192])  # bytes of an answer; 8,192 are read at once
@pytest.mark.parametrize("over_tls", [False, True])
def test_what_follows_an_answer_is_never_the_next_one(tmp_path, over_tls, size):
    """Whether it was read with the answer, or waits where the pool does not look: decrypted by TLS."""
    head = len(http(CHAT.ljust(5000))) - 5000
    right = http(CHAT.ljust(size - head))
    assert len(right) == size

    def answer(connection, _):
        connection.sendall(right + http(CHAT.replace(b"right", b"wrong")))

    with contextlib.ExitStack() as stack:
        if over_tls:
            url, authority = stack.enter_context(tls_server(tmp_path, answer))
            llm = stack.enter_context(client(url, verify=authority))
        else:
            llm = stack.enter_context(client(stack.enter_context(raw_server(answer)).url))
        assert [llm.chat_completion(HELLO).text for _ in range(3)] == ["right"] * 3


def test_a_certificate_that_is_not_trusted_names_its_issuer_and_the_setting(tls):
    url, _ = tls
    with client(url) as llm, pytest.raises(LLMConnectionError, match=r"trustme.*verify=") as caught:
        llm.chat_completion(HELLO)
    assert not caught.value.retriable


@pytest.mark.parametrize("how", ["verify", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE"])
def test_an_authority_of_ones_own(tls, monkeypatch, how):
    url, authority = tls
    settings = {"verify": authority} if how == "verify" else {}
    if not settings:
        monkeypatch.setenv(how, authority)
    with client(url, **settings) as llm:
        assert [llm.chat_completion(HELLO).text for _ in range(2)] == ["right", "right"]


def test_what_the_operating_system_trusts_counts_if_truststore_is_installed(tls, monkeypatch):
    url, authority = tls

    def system_context(protocol):
        context = ssl.SSLContext(protocol)
        context.load_verify_locations(authority)
        return context

    monkeypatch.setitem(sys.modules, "truststore", SimpleNamespace(SSLContext=system_context))
    with client(url) as llm:
        assert llm.chat_completion(HELLO).text == "right"


def test_vcrpy_records_and_replays(server, tmp_path):
    """Its users' cassettes work with us: it replaces urllib3's connections, and we let it."""
    film = vcr.VCR(match_on=["method", "path", "body"], filter_headers=["authorization"])
    cassette = str(tmp_path / "talk.yaml")
    for mode in ("once", "none"):
        with film.use_cassette(cassette, record_mode=mode), client(server.url) as llm:
            assert llm.chat_completion([{"role": "user", "content": "say hi"}]).text == "hi"
            stream = llm.stream([{"role": "user", "content": "say hi there"}])
            assert "".join(stream.text_stream) == "hi there"
    assert len(server.requests) == 2
    assert KEY not in Path(cassette).read_text(encoding="utf-8")


def test_a_hook_of_ones_own_session_may_ask_by_itself():
    """Its request is another one: it has its own timeout, and the outer call keeps its socket and clock."""

    def answer(connection, number):
        if b"/side" in server.requests[-1]:
            time.sleep(0.02)
            connection.sendall(http(b"{}"))
            return
        head, _, body = http().partition(b"\r\n\r\n")
        connection.sendall(head + b"\r\n\r\n" + body[:10])  # and no more

    with raw_server(answer) as server, requests.Session() as session:

        def look(response, **_):
            if "side" not in response.url:
                assert session.post(f"{server.url}/side", data=b"x", timeout=60).json() == {}

        session.hooks["response"].append(look)
        with LLM(base_url=server.url, session=session, timeout=1.2, max_retries=0) as llm:
            with pytest.raises(LLMTimeoutError):
                llm.chat_completion(HELLO)


def test_a_watchdog_that_could_not_start_starts_with_the_next_call(monkeypatch):
    dog, start, failed = Watchdog(), threading.Thread.start, []

    def refuse(thread):
        if thread.name == "LLM-watchdog":
            if not failed:
                failed.append(thread)
                raise RuntimeError("can't start new thread")
            thread.name = "a watchdog of this test"  # it outlives it
        start(thread)

    monkeypatch.setattr("LLM.transport.WATCHDOG", dog)
    monkeypatch.setattr(threading.Thread, "start", refuse)
    with raw_server(lambda c, n: time.sleep(5)) as server, client(server.url, timeout=1.1) as llm:
        with pytest.raises(LLMError, match="does not give a thread: can't start new thread"):
            llm.chat_completion(HELLO)
        with pytest.raises(LLMTimeoutError):
            llm.chat_completion(HELLO)


@contextmanager
def https_proxy(context):
    """A proxy that is itself reached by TLS: TLS to a server goes through it within TLS."""
    listener = socket.create_server(("127.0.0.1", 0))

    def pump(source, sink):
        with contextlib.suppress(OSError, ValueError):
            while data := source.recv(65536):
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                socket.socket.shutdown(end, socket.SHUT_RDWR)

    def serve(connection):
        with contextlib.suppress(OSError):
            with context.wrap_socket(connection, server_side=True) as near:
                head = b""
                while not head.endswith(b"\r\n\r\n"):
                    head += near.recv(4096)
                host, _, port = head.split()[1].decode().rpartition(":")
                with socket.create_connection((host, int(port))) as far:
                    near.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
                    back = threading.Thread(target=pump, args=(far, near), daemon=True)
                    back.start()
                    pump(near, far)
                    back.join()

    def accept():
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"https://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.close()


@pytest.mark.parametrize("how", ["timeout", "cancel"])
def test_a_call_through_tls_within_tls_ends_in_time(tmp_path, how):
    def answer(connection, _):
        connection.sendall(stream_head("connection: close") + chunk("a"))
        connection.recv(1)  # and no more

    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "authority.pem")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    server = RawServer(answer, context)
    settings = {
        "verify": str(tmp_path / "authority.pem"),
        "timeout": 1.1 if how == "timeout" else 60,
    }
    with https_proxy(context) as proxy, contextlib.closing(server):
        url = server.url.replace("http:", "https:")
        with client(url, proxies={"https": proxy}, **settings) as llm:
            stream = llm.stream(HELLO)
            assert next(stream).text_delta == "a"
            if how == "cancel":
                threading.Timer(0.1, stream.cancel).start()
            with pytest.raises(LLMTimeoutError if how == "timeout" else LLMCancelledError):
                next(stream)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has no fork")
def test_a_forked_child_is_refused_its_parents_stream_and_leaves_it_whole():
    """In the child nothing would end a read that gets no answer."""
    more = threading.Event()

    def answer(connection, _):
        connection.sendall(stream_head("connection: close") + chunk("one "))
        more.wait(30)
        connection.sendall(chunk("two", finish_reason="stop") + b"data: [DONE]\n\n")

    with raw_server(answer) as server, client(server.url, timeout=20) as llm:
        stream = llm.stream(HELLO)
        assert next(stream).text_delta == "one "
        child = os.fork()
        if not child:
            with contextlib.suppress(LLMCancelledError):
                next(stream)
                os._exit(1)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        more.set()
        assert stream.response.text == "one two"
