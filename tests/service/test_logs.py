"""The service's log: its forms, and what is never in it."""

import io
import json
import logging
import re
import threading
from contextvars import copy_context

import pydantic
import pytest

from agents.service import logs
from agents.service.settings import Settings
from LLM import LLM, LLMAPIError, LLMConnectionError, LLMServerError

SECRET = "llm-0123456789-" + "Ab_-" * 10 + "xyz"
SAID = "what a person said"


@pytest.fixture
def log_to(logging_as_before):
    """Set logging up as the service does."""

    def configured(**settings):
        stream = io.StringIO()
        logs.configure(Settings.load(**settings), stream)
        return stream

    return configured


def lines(stream):
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_json_is_one_object_a_line_with_the_request_it_belongs_to(log_to):
    stream = log_to(log_format="json")
    token = logs.request_id.set("r-1")
    logging.getLogger("agents.service").info("GET %s\n200", "/x", extra={"status": 200, "no": None})
    logs.request_id.reset(token)
    logging.getLogger("agents.service").warning("later")
    first, second = lines(stream)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", first.pop("time"))
    assert first == {
        "level": "info",
        "logger": "agents.service",
        "message": "GET /x\n200",
        "request_id": "r-1",
        "status": 200,
    }
    assert second["request_id"] is None


def test_an_extra_cannot_pose_as_a_field_of_the_line(log_to):
    stream = log_to(log_format="json")
    logging.getLogger("agents").info(
        "x", extra={"level": "fake", "time": "fake", "request_id": "fake"}
    )
    (line,) = lines(stream)
    assert line["level"] == "info"
    assert line["request_id"] is None
    assert line["time"] != "fake"


def test_text_is_one_line_whatever_is_in_it(log_to):
    stream = log_to()
    token = logs.request_id.set("r-2")
    logging.getLogger("agents").info("a\nb\x1b[31m", extra={"path": "/x\ny\x1b"})
    logs.request_id.reset(token)
    (line,) = stream.getvalue().splitlines()
    assert re.match(r"[\d-]{10} [\d:.]{12} INFO    agents: a b", line)
    assert line.endswith("request_id=r-2")
    assert "\x1b" not in line


def test_a_thread_with_a_copy_of_the_context_bears_the_request(log_to):
    stream = log_to(log_format="json")
    token = logs.request_id.set("r-3")
    run = copy_context().run
    logs.request_id.reset(token)
    log = logging.getLogger("agents")
    thread = threading.Thread(target=run, args=(log.info, "from the thread"))
    thread.start()
    thread.join()
    assert lines(stream)[0]["request_id"] == "r-3"


def test_the_level_holds_for_ours_and_others_are_heard_from_warning_on(log_to):
    stream = log_to(log_level="DEBUG", log_format="json")
    for name in ("agents.service", "LLM", "uvicorn.error", "sqlalchemy.engine", "asyncio"):
        logging.getLogger(name).debug("d")
        logging.getLogger(name).warning("w")
    heard = [(line["logger"], line["message"]) for line in lines(stream)]
    assert heard == [
        ("agents.service", "d"),
        ("agents.service", "w"),
        ("LLM", "d"),
        ("LLM", "w"),
        ("uvicorn.error", "d"),
        ("uvicorn.error", "w"),
        ("sqlalchemy.engine", "w"),
        ("asyncio", "w"),
    ]


def test_an_error_level_silences_warnings_of_all(log_to):
    stream = log_to(log_level="error")
    logging.getLogger("agents").warning("w")
    logging.getLogger("other").warning("w")
    assert stream.getvalue() == ""


def test_configured_twice_it_says_things_once(log_to):
    log_to()
    stream = log_to()
    logging.getLogger("agents").info("once")
    assert stream.getvalue().count("once") == 1


def test_the_access_log_of_uvicorn_which_shows_searches_is_silent(log_to):
    stream = log_to()
    logging.getLogger("uvicorn.access").info("GET /conversations?q=%s", SAID)
    assert stream.getvalue() == ""


@pytest.mark.parametrize("form", ["text", "json"])
def test_a_key_is_in_no_line(log_to, form):
    stream = log_to(log_format=form)
    log = logging.getLogger("agents")
    log.info("key %s", SECRET, extra={"header": f"Bearer {'x' * 30}", "path": f"/{SECRET}"})
    try:
        raise RuntimeError(f"refused sk-{'y' * 30} and {SECRET}")
    except RuntimeError:
        log.exception("failed")
    text = stream.getvalue()
    assert "Ab_-Ab_-" not in text
    assert "xxxx" not in text
    assert "yyyy" not in text
    assert text.count("***") >= 4


class Model(pydantic.BaseModel):
    number: int


def fail(kind):
    try:
        Model(number=SAID)
    except ValueError as error:
        raise kind("in the open") from error


@pytest.mark.parametrize("form", ["text", "json"])
def test_an_exception_is_told_without_what_it_quotes(log_to, form):
    stream = log_to(log_format=form)
    try:
        fail(LLMConnectionError)
    except LLMConnectionError:
        logging.getLogger("agents").exception("failed")
    text = stream.getvalue()
    assert SAID not in text
    assert "ValidationError" in text
    assert "which led to" in text
    assert "LLMConnectionError: in the open" in text
    assert "in fail" in text
    assert text.index("ValidationError") < text.index("LLMConnectionError: in the open")


@pytest.mark.parametrize("form", ["text", "json"])
def test_what_a_model_server_says_is_shown_to_the_caller_and_not_logged(
    log_to, serve, server, form
):
    chat = serve()
    name = chat.new()
    stream = log_to(log_format=form, log_level="debug")
    for _ in range(3):
        server.reply(status=400, body={"error": {"message": f"cannot read: {SAID}"}})
    told = chat.say(name, SAID)
    assert (told.status_code, told.json()["detail"].endswith(SAID)) == (422, True)
    ours = chat.ask(
        "POST", "/v1/chat/completions", json={"messages": [{"role": "user", "content": "x"}]}
    )
    assert (ours.status_code, SAID in ours.text) == (400, True)
    with chat.streaming(name, SAID, path="regenerate") as response:
        assert SAID in response.text
    text = stream.getvalue()
    assert SAID not in text
    why = "LLMInvalidRequestError: openai-compatible answered 400; its words are not logged"
    assert text.count(f"call failed after 1 attempt: {why}") == 3
    assert text.count(f"an answer ended early: {why}") == 2
    assert text.count(f"The model server refuses the request: {why}") == 1


def raised(url):
    """Errors that a server worded, and those that quote them."""
    with LLM(base_url=url, model="m", max_retries=0) as llm:
        try:
            llm.chat_completion([{"role": "user", "content": "Hello"}])
        except LLMServerError as error:
            yield error
            try:
                raise LLMConnectionError(f"again: {error}") from error
            except LLMConnectionError as other:
                yield other


@pytest.mark.parametrize("how", ["argument", "named", "message", "extra", "exception"])
def test_a_server_s_words_are_nowhere_in_a_line(log_to, server, how):
    server.reply(status=503, body=f"<html><title>{SAID}</title>")
    log, told = logging.getLogger("agents"), []
    for error in raised(server.url):
        stream = log_to(log_format="json")
        if how == "argument":
            log.warning("%s %d %s", "x", 1, error)
        elif how == "named":
            log.warning("%(error)s", {"error": error})
        elif how == "message":
            log.warning(error)
        elif how == "extra":
            log.warning("x", extra={"error": error})
        else:
            log.warning("x", exc_info=error)
        told.append(stream.getvalue())
        assert SAID in str(error)
    assert len(told) == 2
    assert all("openai-compatible answered 503" in text and SAID not in text for text in told)


def test_an_error_in_our_own_words_is_logged_as_it_is(log_to):
    stream = log_to(log_format="json")
    try:
        raise LLMConnectionError("no connection") from LLMAPIError(SAID)
    except LLMConnectionError as error:
        logging.getLogger("agents").warning("it failed: %s", error)
        logging.getLogger("agents").warning("it failed: %s", ValueError(SAID))
    assert [line["message"] for line in lines(stream)] == [
        "it failed: no connection",
        "it failed: ValueError",
    ]


def test_of_a_foreign_exception_only_the_kind_is_told(log_to):
    stream = log_to()
    try:
        try:
            raise ValueError(SAID)
        finally:
            raise KeyError("k")
    except KeyError:
        logging.getLogger("agents").exception("failed")
    text = stream.getvalue()
    assert SAID not in text
    assert "KeyError: 'k'" in text
    assert "and while that was handled" in text


def test_the_parts_of_a_group_are_told():
    class Group(Exception):
        exceptions = (RuntimeError("one"), ValueError(SAID))

    text = logs.told(Group("two"))
    assert "RuntimeError: one" in text
    assert "ValueError" in text
    assert SAID not in text


def test_exceptions_that_go_in_a_circle_end():
    first, second = RuntimeError("1"), RuntimeError("2")
    first.__context__, second.__context__ = second, first
    assert logs.told(first).count("RuntimeError") == 2


def test_a_huge_value_is_cut(log_to):
    stream = log_to(log_format="json")
    logging.getLogger("agents").info("x" * 1_000_000, extra={"more": "y" * 1_000_000})
    assert len(stream.getvalue()) < 30_000
