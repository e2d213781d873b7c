"""A long night in short: many calls, one in ten faulty, and nothing is left behind.

`make soak` runs it whole (20,000 calls); the suite runs a part of it.
"""

import gc
import logging
import os
import resource
import threading
from pathlib import Path

from LLM import LLM, LLMConfig, LLMError
from tests.fakes import CHAT, chunk, hang_up, http, raw_server, stream_head

CALLS = int(os.environ.get("LLM_SOAK_CALLS", "1200"))
HELLO = [{"role": "user", "content": "Hello!"}]


def answer(connection, number):
    """Nine right answers, then one of many faults."""
    if number % 10:
        if number % 2:
            connection.sendall(http(CHAT))
        else:
            said = chunk("right", finish_reason="stop") + b"data: [DONE]\n\n"
            body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(said), said)
            connection.sendall(stream_head("transfer-encoding: chunked") + body)
        return
    fault = number // 10 % 7
    if fault == 0:
        hang_up(connection)
    elif fault == 1:
        connection.sendall(http(b'{"error": "down"}', "500 Oops"))
    elif fault == 2:
        connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 999\r\n\r\ncut")
        hang_up(connection)
    elif fault == 3:
        connection.sendall(http(b"<html>login</html>"))
    elif fault == 4:
        connection.sendall(stream_head("transfer-encoding: chunked") + b"5\r\nda")
        hang_up(connection)
    elif fault == 5:
        connection.sendall(http(CHAT) + b"left over")
    else:
        connection.sendall(http(b"{}", "429 Slow down", ["retry-after: 0"]))


def call(llm, number):
    """Ask for a stream or not, as the server's count says; whatever comes must be right or ours."""
    try:
        if number % 2:
            return llm.chat_completion(HELLO).text
        with llm.stream(HELLO) as stream:
            return stream.response.text
    except LLMError:
        return None


def used():
    gc.collect()
    sockets = [fd for fd in Path("/proc/self/fd").iterdir() if "socket" in _target(fd)]
    return (
        len(sockets),
        threading.active_count(),
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    )


def _target(fd):
    try:
        return str(fd.readlink())
    except OSError:
        return ""


def test_a_long_night_leaves_nothing_behind(monkeypatch):
    # pytest keeps every log record, and with it every error, until the test is over.
    monkeypatch.setattr(logging.getLogger("LLM"), "disabled", True)
    wrong, right = [], 0
    with raw_server(answer) as server:
        config = LLMConfig(base_url=server.url, timeout=30, max_retries=0)
        with LLM(config) as llm:
            for number in range(CALLS):
                said = call(llm, number)
                right += said == "right"
                if said not in ("right", None):
                    wrong.append((number, said))
                server.requests.clear() if number % 1000 == 999 else None
                if number == 500:
                    before = used()
            after = used()
    assert wrong == []
    assert right > CALLS * 0.4
    assert after[0] <= before[0] + 2
    assert after[1] <= before[1] + 2
    assert after[2] <= before[2] + 20 * 1024  # KiB
