"""The pytest plugin and the closed network, as a user's own test run meets them."""

import os
import socket
import subprocess
import sys
import threading

import pytest

from LLM import LLM
from LLM.testing import NetworkBlocked, block_network

pytest_plugins = ["pytester"]


@pytest.fixture
def run(pytester, monkeypatch):
    """Runs pytest in a process of its own, with no plugin but this; its entry point may be installed."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")

    def run(*arguments):
        return pytester.runpytest_subprocess(
            "-p", "LLM.testing.plugin", "--strict-markers", "-Werror", *arguments
        )

    return run


def test_the_fixtures(pytester, run):
    pytester.makepyfile(
        """
        import socket, pytest
        from LLM import LLM, LLMError

        HELLO = [{"role": "user", "content": "Hello!"}]

        def test_server(llm_server, block_network):
            with LLM(base_url=llm_server.url) as llm:
                assert llm.chat_completion(HELLO).text
            assert block_network == []

        def test_faults(llm_faults):
            with LLM(base_url=llm_faults.url("headers-cut"), max_retries=0) as llm:
                assert not llm.generate(HELLO).success

        @pytest.mark.block_network
        def test_marked():
            socket.getaddrinfo("example.com", 443)

        @pytest.mark.block_network
        def test_swallowed():
            try:
                socket.create_connection(("192.0.2.1", 443))
            except BaseException:
                pass

        def test_not_marked():
            assert "guarded" not in socket.getaddrinfo.__name__

        @pytest.mark.block_network
        class TestClass:
            def test_marked(self, block_network):
                assert "guarded" in socket.getaddrinfo.__name__
        """
    )
    ran = run()
    ran.assert_outcomes(passed=5, failed=1, errors=1)
    ran.stdout.fnmatch_lines(["*the network is blocked: reached for 'example.com'*"])
    ran.stdout.fnmatch_lines(["*the network is blocked: reached for '192.0.2.1'*"])


def test_a_cassette_for_each_test(pytester, run):
    pytester.makepyfile(
        test_talk="""
        import pytest
        from LLM import LLM
        from LLM.testing import LocalServer

        def ask(text):
            with LocalServer([text]) as server, LLM(base_url=server.url) as llm:
                reply = llm.chat_completion([{"role": "user", "content": "Hello!"}])
            return reply.text, len(server.requests)

        class TestOne:
            def test_it(self, llm_cassette, request):
                said, asked = ask(request.config.rootpath.joinpath("say").read_text())
                assert (said, asked) == ("first", 0), (said, asked)

        @pytest.mark.parametrize("word", ["a/b", "a_b", "x" * 300], ids=str)
        def test_names(word, llm_cassette):
            assert ask(word)[0] == word
        """
    )
    folder = pytester.path / "cassettes" / "test_talk"
    say = pytester.path / "say"
    say.write_text("first")

    run("--llm-record", "none").assert_outcomes(errors=4)
    run().assert_outcomes(passed=3, failed=1)  # recorded: it was asked once
    assert (folder / "TestOne.test_it.jsonl").is_file()
    assert len(list(folder.iterdir())) == 4

    say.write_text("second")
    run("--llm-record=none").assert_outcomes(passed=4)
    run("--llm-record").stdout.fnmatch_lines(["*('second', 1)*"])
    run().stdout.fnmatch_lines(["*('second', 0)*"])


def test_the_plugin_is_light():
    """It is loaded in every run of pytest where we are installed, whatever is tested."""
    code = (
        "import pytest, sys; before = set(sys.modules); import LLM.testing.plugin;"
        "print(*sorted(set(sys.modules) - before))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ
    )
    ours = {"LLM", "LLM.testing", "LLM.testing.plugin", "LLM.version"}
    assert {name for name in ran.stdout.split() if name.partition(".")[0] == "LLM"} == ours
    assert not {"requests", "urllib3", "pydantic", "ssl"} & set(ran.stdout.split())


def test_loopback_is_open_while_the_network_is_blocked(server):
    with block_network() as reached, LLM(base_url=server.url) as llm:
        llm.chat_completion([{"role": "user", "content": "Hello!"}])
        assert socket.getaddrinfo("localhost", 80)
        assert socket.gethostbyname("127.0.0.1") == "127.0.0.1"
        assert socket.getaddrinfo(None, 0)
        one, other = socket.socketpair()
        with one, other, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.sendto(b"x", ("127.0.0.1", 9))
        with pytest.raises(socket.gaierror):
            socket.getaddrinfo("model.invalid", 80)
    assert reached == []


@pytest.mark.parametrize(
    "reach",
    [
        lambda: socket.getaddrinfo("example.com", 80),
        lambda: socket.getaddrinfo(b"example.com", 80),
        lambda: socket.gethostbyname("example.com"),
        lambda: socket.gethostbyname_ex("example.com"),
        lambda: socket.gethostbyaddr("192.0.2.1"),
        lambda: socket.create_connection(("192.0.2.1", 80)),
        lambda: socket.socket().connect_ex(("192.0.2.1", 80)),
        lambda: socket.socket(socket.AF_INET6).connect(("2001:db8::1", 80)),
        lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("192.0.2.1", 53)),
        lambda: LLM(base_url="http://192.0.2.1").generate("Hello!"),
        lambda: LLM(base_url="http://example.com").generate("Hello!"),
    ],
)
@pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)
def test_what_leaves_this_machine_is_told_at_once(reach):
    """No retry and no `except Exception` takes it for an outage."""
    before = socket.getaddrinfo, socket.socket.connect
    with pytest.raises(
        NetworkBlocked, match=r"reached for '(example\.com|192\.0\.2\.1|2001:db8::1)'"
    ):
        with block_network():
            reach()
    assert (socket.getaddrinfo, socket.socket.connect) == before


def test_what_a_thread_reached_for_is_told_at_the_end():
    def reach():
        with pytest.raises(NetworkBlocked):
            socket.getaddrinfo("example.com", 80)

    with pytest.raises(NetworkBlocked, match=r"example\.com"):
        with block_network():
            thread = threading.Thread(target=reach)
            thread.start()
            thread.join()
