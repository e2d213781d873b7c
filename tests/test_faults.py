"""Whatever the server does: the right answer or the right error, in time, and the next call is right."""

import gc
import itertools
import logging
import pickle
import socket
import threading
import time
import traceback
import tracemalloc
from datetime import datetime, timezone
from pathlib import Path

import pytest

from LLM import LLM, ErrorType, LLMError
from LLM.testing.fault_wire import PART, RIGHT
from LLM.testing.faults import FAULTS, FaultServer, cases, faults_page, right_text

KEY = "sk-faulty-Zq7xW3vTn5Kp9Lm2"
# Seconds in which a call ends that no clock has to end, and that a clock may be late on a busy machine. What
# no clock ends lasts for ever.
GRACE = 10
# A row's clocks are short, so that nobody waits for them. On a busy machine what has to be in time may be
# late: then they are so many times as long.
PATIENCE = 12
CLOCKS = {"timeout", "connect_timeout", "deadline"}
QUESTIONS = (f"Question {number}?" for number in itertools.count(1))
CASES = list(cases())
IDS = [f"{f.name}-{d}-{'stream' if s else 'call'}" for f, d, s, _ in CASES]
MIB = 1024 * 1024


def open_files():
    """How many files this process holds open; 0 where the system does not tell."""
    folder = Path("/proc/self/fd")
    return len(list(folder.iterdir())) if folder.is_dir() else 0


@pytest.fixture(scope="module", autouse=True)
def nothing_is_left():
    """After all faults there are as many sockets and threads as before."""
    gc.collect()
    files = open_files()
    yield
    gc.collect()
    # A selector's, a pool's, a server's that is closing: not one for each of the rows. What was forgotten
    # is closed by a thread, a moment later.
    end = time.monotonic() + 30
    while open_files() > files + 12 and time.monotonic() < end:
        time.sleep(0.01)
    assert open_files() <= files + 12
    left = [t.name for t in threading.enumerate() if t.name.startswith("FaultServer")]
    assert left == []


@pytest.fixture(scope="session")
def certificates(tmp_path_factory):
    """Paths of an authority, and of what it has signed; made anew for each run."""
    import trustme

    folder = tmp_path_factory.mktemp("tls")
    authority = trustme.CA()
    authority.cert_pem.write_to_path(folder / "authority")
    expired = datetime(2020, 1, 1, tzinfo=timezone.utc)
    signed = {
        "good": authority.issue_cert("127.0.0.1", "localhost"),
        "expired": authority.issue_cert("127.0.0.1", not_after=expired),
        "other-host": authority.issue_cert("elsewhere.invalid"),
    }
    for name, certificate in signed.items():
        certificate.private_key_and_cert_chain_pem.write_to_path(folder / name)
    return folder


@pytest.fixture
def faulty():
    with FaultServer() as server:
        yield server


class Call:
    """One call, what came of it, and how long it took."""

    def __init__(self, llm, streams, question=None):
        self.question = question or next(QUESTIONS)
        self.pieces = []
        self.answer = self.error = None
        messages = [{"role": "user", "content": self.question}]
        began = time.monotonic()
        try:
            if streams:
                self._stream(llm.stream(messages))
            else:
                self.answer = llm.chat_completion(messages)
        except LLMError as error:
            self.error = error
        self.seconds = time.monotonic() - began

    def _stream(self, stream):
        with stream:
            for event in stream:
                if event.text_delta is not None:
                    self.pieces.append(event.text_delta)
        self.answer = stream.response
        assert self.answer is not None
        assert "".join(self.pieces) == self.answer.text

    def assert_right(self):
        if self.error is not None:
            raise self.error
        assert self.answer.text == right_text(self.question)

    def assert_outcome(self, outcome):
        if outcome.error is None:
            self._assert_answer(outcome)
            return
        assert self.error is not None, f"an answer: {self.answer!r:.300}"
        error = self.error
        facts = {"error": type(error).__name__, "retriable": error.retriable}
        expected = {"error": outcome.error, "retriable": outcome.retriable}
        if outcome.clock is not None:
            facts["clock"], expected["clock"] = getattr(error, "clock", None), outcome.clock
        if outcome.status is not None and (outcome.status != 200 or not self.pieces):
            status = getattr(error, "status_code", None)
            facts["status"], expected["status"] = status, outcome.status
        facts["wait"] = error.suggested_wait
        expected["wait"] = outcome.wait
        assert facts == expected, str(error)
        assert outcome.says in str(error)
        assert isinstance(error.error_type, ErrorType)
        assert error.attempts == len(error.history) >= 1
        assert error.provider
        assert error.model == "stand-in"
        self._assert_partial(outcome)

    def _assert_answer(self, outcome):
        if self.error is not None:
            raise self.error
        text, right = self.answer.text, right_text(self.question)
        if outcome.text == RIGHT:
            assert text == right
        elif outcome.text.startswith("~"):
            assert text == right.replace("🙂", outcome.text[1:])
        else:
            assert text == outcome.text
        text.encode()  # no half surrogate pair, which would fail in `print`
        assert len(self.answer.choices[0].message.tool_calls or []) == outcome.tools

    def _assert_partial(self, outcome):
        partial, handed = self.error.partial, "".join(self.pieces)
        if outcome.text == PART:
            assert handed
        elif outcome.text != "*":
            assert handed == outcome.text
        assert (partial.text if partial is not None else "") == handed
        if outcome.tools:
            assert len(partial.tool_calls) == outcome.tools


def clocks(fault, patience=1):
    """The settings of a row that are times, and the client's own timeout."""
    found = {"timeout": 30}
    for name in CLOCKS & fault.settings.keys():
        seconds = fault.settings[name]
        found[name] = seconds and seconds * patience
    return found


def client(url, fault, dialect, certificates=None, patience=1, **settings):
    given = {
        "base_url": url,
        "api_key": KEY,
        "model": "stand-in",
        "provider": "anthropic" if dialect == "messages" else None,
        "timeout": 30,
        "max_retries": 0,
        "retry_delay": 0,
        **(fault.settings | clocks(fault, patience) if fault else {}),
        **settings,
    }
    if certificates is not None and fault.trusted:
        given["verify"] = str(certificates / "authority")
    return LLM(**given)


def assert_in_time(call, fault, outcome, patience):
    name = {"connect": "connect_timeout", "idle": "timeout"}.get(outcome.clock, outcome.clock)
    assert call.seconds <= (clocks(fault, patience)[name] if name else 0) + GRACE


SECRET = KEY.removeprefix("sk-faulty-").lower()
PARTS_OF_KEY = [SECRET[i : i + 8] for i in range(len(SECRET) - 7)]


def shows_key(text):
    """Whether enough of the key is in a text to be of use, in small letters or not."""
    lower = text.lower()
    return any(part in lower for part in PARTS_OF_KEY)


def assert_keyless(error):
    """The key is in nothing that a person or a program gets to see of an error."""
    seen = [str(error), repr(error), repr(error.args), repr(vars(error)), repr(error.partial)]
    seen += getattr(error, "__notes__", [])
    told = traceback.TracebackException.from_exception(error, capture_locals=True)
    seen += told.format()
    links, todo = [], [error]
    while todo:
        link = todo.pop()
        if link is not None and link not in links:
            links.append(link)
            todo += [link.__cause__, link.__context__]
            seen += [str(link), repr(link), repr(link.args), repr(vars(link))]
    data = pickle.dumps(error)
    seen.append(data.decode("latin-1"))
    leaks = [text for text in seen if shows_key(text)]
    assert not leaks, leaks[0][:2000]
    again = pickle.loads(data)
    assert (type(again), str(again), again.history) == (type(error), str(error), error.history)


def assert_presentable(error):
    assert str(error).isprintable(), repr(str(error))
    assert 0 < len(str(error)) < 1000
    body = getattr(error, "body", "")
    assert len(body) <= 64 * 1024
    history = repr(error.history)
    assert history.isprintable()


@pytest.mark.parametrize("fault, dialect, streams, outcome", CASES, ids=IDS)
def test_fault(fault, dialect, streams, outcome, request, caplog):
    """The row's outcome, in time, without the key; the next call is right; a retry if it can help."""
    caplog.set_level(logging.DEBUG)
    folder = request.getfixturevalue("certificates") if fault.certificate else None
    path = str(folder / fault.certificate) if folder is not None else None

    def show(patience):
        with FaultServer(path) as server:
            assert_row(server, fault, dialect, streams, outcome, folder, patience)
            for received in server.received(fault.name):
                assert "cookie" not in received.headers
            assert server.requests() == (2 if fault.stage in ("refused", "backlog") else 0)

    try:
        show(1)
    except (AssertionError, LLMError):
        if not (fault.pause or CLOCKS & fault.settings.keys()):
            raise
        show(PATIENCE)
    assert not shows_key(caplog.text)


def assert_row(server, fault, dialect, streams, outcome, folder, patience):
    url = server.url(fault.name, times=1)
    with client(url, fault, dialect, folder, patience) as llm:
        question = "x" * fault.question_bytes or None
        call = Call(llm, streams, question)
        assert_in_time(call, fault, outcome, patience)
        call.assert_outcome(outcome)
        assert server.requests(fault.name) == fault.requests
        if call.error is not None:
            assert_keyless(call.error)
            assert_presentable(call.error)
        time.sleep(fault.pause * patience)
        for again in (streams, not streams):
            if fault.stage in ("refused", "backlog"):
                Call(llm.with_options(base_url=server.url()), again).assert_right()
            elif outcome.error is None or not (fault.tls and not call.error.retriable):
                follow_up(llm, fault, again)
    if outcome.error is not None and (not outcome.clock or fault.group == "Connections"):
        assert_retried(server, fault, dialect, streams, outcome, folder, patience)


def follow_up(llm, fault, streams):
    call = Call(llm, streams)
    if fault.tools:
        assert call.error is None
        assert call.answer.tool_calls
    else:
        call.assert_right()


def assert_retried(server, fault, dialect, streams, outcome, folder, patience):
    """With one retry: the answer after two attempts, or the error after one."""
    before = server.requests(fault.name)
    url = server.url(fault.name, times=1)
    with client(url, fault, dialect, folder, patience, max_retries=1) as llm:
        call = Call(llm, streams, "x" * fault.question_bytes or None)
    if fault.stage in ("refused", "backlog"):
        assert call.error.attempts == 2
    elif outcome.retried:
        assert call.error is None, repr(call.error)
        assert call.answer.attempts == 2
        assert server.requests(fault.name) - before == fault.requests + 1
        keys = {r.headers["idempotency-key"] for r in server.received(fault.name)[before:]}
        assert len(keys) == 1
    else:
        assert call.error is not None
        assert call.error.attempts == 1
        assert server.requests(fault.name) - before == fault.requests


TIMED = [f for f in FAULTS.values() if f.group.startswith("Time") and f.name != "request-unread"]


@pytest.mark.parametrize("streams", [False, True], ids=["call", "stream"])
def test_a_deadline_bounds_all_attempts(streams, faulty):
    """Every fault of time at once, each shown for ever to a client that would retry for minutes."""
    late, foreign = [], []

    def run(fault):
        given = {"timeout": 0.2, "deadline": 0.5, "max_retries": 1000}
        with client(faulty.url(fault.name), fault, "chat", **given) as llm:
            try:
                call = Call(llm, streams)
            except Exception as error:
                foreign.append((fault.name, error))
                return
        if call.seconds > 0.5 + GRACE:
            late.append((fault.name, call.seconds))

    rows = [f for f in TIMED if (f.streamed if streams else f.outcome) is not None]
    threads = [threading.Thread(target=run, args=(fault,)) for fault in rows]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (late, foreign) == ([], [])


@pytest.mark.parametrize("endpoint", ["completion", "models"])
@pytest.mark.parametrize("dialect", ["chat", "messages"])
def test_the_other_endpoints(endpoint, dialect, faulty):
    """Completions and lists of models take the faults below the body as a chat does."""
    wrong = []
    for fault in FAULTS.values():
        apart = (
            dialect not in fault.dialects
            or fault.group in ("TLS", "Wrong answers with 200")
            or fault.settings
        )
        if fault.outcome is None or apart or fault.question_bytes or fault.stage == "backlog":
            continue
        with client(faulty.url(fault.name, times=1), fault, dialect) as llm:
            came = None
            try:
                if endpoint == "completion":
                    came = llm.completion("Go on")
                    assert came.text == right_text("Go on")
                else:
                    came = llm.list_models()
                    assert came.data[0].id == "stand-in"
                name = None
            except LLMError as error:
                name = type(error).__name__
            except Exception as error:
                name = repr(error)
        if name != fault.outcome.error:
            wrong.append((fault.name, name, fault.outcome.error))
    assert wrong == []


@pytest.mark.parametrize(
    "name, streams",
    [
        ("gzip-bomb", False),
        ("gzip-bomb", True),
        ("gzip-bomb-in-error", False),
        ("stream-gzip-bomb", True),
        ("body-endless", False),
        ("chunks-endless", False),
        ("chunks-endless", True),
        ("length-huge", False),
        ("body-too-large", False),
        ("error-endless", False),
        ("error-endless", True),
        ("redirect-endless-body", False),
        ("header-endless", False),
        ("headers-endless", False),
        ("status-line-endless", False),
        ("chunk-extension-endless", False),
        ("trailer-endless", False),
        ("stream-line-endless", True),
        ("stream-event-endless", True),
        ("stream-event-of-empty-lines", True),
        ("stream-comment-endless", True),
        ("instead-endless-json", True),
    ],
)
def test_memory_is_bounded(name, streams, faulty):
    """At most three times what is allowed, and a constant."""
    limit = 500_000
    fault = FAULTS[name]
    with client(faulty.url(name), fault, "chat", max_response_bytes=limit) as llm:
        Call(client_of_right(faulty), streams=False)  # what is loaded once is loaded now
        gc.collect()
        tracemalloc.start()
        try:
            before, _ = tracemalloc.get_traced_memory()
            Call(llm, streams)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert peak - before <= 3 * limit + 2 * MIB


def client_of_right(server):
    return LLM(base_url=server.url(), model="stand-in")


def test_events_come_at_once_in_a_stream_without_a_length(faulty):
    def earlier(llm):
        """How many seconds the first event comes before the last."""
        begun = time.monotonic()
        with llm.stream([{"role": "user", "content": "Hello"}]) as stream:
            assert "".join(stream.text_stream)
            return time.monotonic() - begun - stream.time_to_first_token

    with client(faulty.url("stream-without-length-slowly"), None, "chat") as llm:
        # Once is enough: a reader who is held up finds all of it at once.
        assert any(earlier(llm) > 0.03 for _ in range(20))


def test_exhausted_retries_tell_of_each_attempt(faulty):
    with client(faulty.url("error-object"), None, "chat", max_retries=3) as llm:
        error = Call(llm, streams=False).error
    assert (error.attempts, error.status_code, error.request_id) == (4, 503, "req_1")
    assert [attempt.status for attempt in error.history] == [503] * 4
    assert "busy today" in error.body
    assert faulty.requests("error-object") == 4


def test_redirects_are_not_followed(faulty):
    with client(faulty.url("redirect-307"), None, "messages") as llm:
        error = Call(llm, streams=False).error
    assert error.status_code == 307
    assert faulty.elsewhere.partition("//")[2] in str(error)
    assert faulty.connections() == 0


def test_a_stale_connection_costs_one_resend_and_no_retry(faulty):
    with client(faulty.url("close-at-next-request", times=1), None, "chat") as llm:
        Call(llm, streams=False).assert_right()
        call = Call(llm, streams=False)
        call.assert_right()
    assert call.answer.attempts == 1
    assert faulty.connections("close-at-next-request") == 2


def test_the_connection_is_kept_after_what_is_harmless(faulty):
    for name in ("hints-103", "continue-100", "gzip", "trailers", "error-object", "body-null"):
        with client(faulty.url(name, times=1), None, "chat") as llm:
            Call(llm, streams=False)
            Call(llm, streams=False).assert_right()
        assert faulty.connections(name) == 1, name


def test_a_fault_is_shown_as_often_as_asked(faulty):
    url = faulty.url("error-object", times=2)
    with client(url, None, "chat") as llm:
        failed = [Call(llm, streams=False).error is not None for _ in range(4)]
    assert failed == [True, True, False, False]
    assert faulty.requests("error-object") == 4
    assert faulty.received("error-object")[0].headers["authorization"] == f"Bearer {KEY}"


def test_what_there_is_not_is_refused():
    with FaultServer() as server:
        with pytest.raises(ValueError, match="no fault 'drop-body'"):
            server.url("drop-body")
        with pytest.raises(ValueError, match="needs a certificate"):
            server.url("tls-right")
    with pytest.raises(RuntimeError, match="closed"):
        server.url()


def test_closing_ends_a_fault_in_progress():
    """Nobody waits for a client that never leaves."""
    server = FaultServer()
    address = server.url("silence-at-once").partition("//")[2].split(":")
    with socket.create_connection((address[0], int(address[1]))) as sock:
        while not server.connections("silence-at-once"):
            time.sleep(0.01)
        began = time.monotonic()
        server.close()
        assert time.monotonic() - began < GRACE
        sock.settimeout(20)
        assert sock.recv(1) == b""
    server.close()


def test_the_page_is_written_from_the_rows():
    """`python -m LLM.testing.faults > docs/faults.md` after a row has changed."""
    page = Path(__file__).parents[1] / "docs" / "faults.md"
    assert page.read_text("utf-8") == faults_page()
