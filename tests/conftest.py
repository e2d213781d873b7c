"""What holds for every test: nothing but loopback is reached, and the environment says nothing."""

import ipaddress
import os
import re
import socket

import pytest

# What could change which host is called, with which key, or over which network.
SPEAKING_VARIABLES = re.compile(
    r"(LLM|OPENAI|ANTHROPIC|OPENROUTER|OLLAMA|GEMINI|GOOGLE|MISTRAL|GROQ|DEEPSEEK|XAI|TOGETHER|AZURE"
    r"|VLLM|LMSTUDIO|HF|OTEL)_.*"
    r"|.*_API_KEY|MODEL_NAME|.*_PROXY|REQUESTS_CA_BUNDLE|CURL_CA_BUNDLE|SSL_CERT_(FILE|DIR)|NETRC",
    re.IGNORECASE,
)


@pytest.fixture(autouse=True)
def silent_environment(monkeypatch):
    for name in list(os.environ):
        if SPEAKING_VARIABLES.fullmatch(name):
            monkeypatch.delenv(name)


def is_local(host):
    """Whether a host never leaves this machine; no host at all is one to listen on."""
    if isinstance(host, bytes):
        host = host.decode()
    if host is None or host in {"", "localhost"} or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return False


@pytest.fixture(autouse=True)
def only_loopback(monkeypatch):
    """Fail a test that reaches for the network, also from a thread or below an `except`."""
    reached = []

    def check(host):
        if not is_local(host):
            reached.append(host)
            pytest.fail(f"the test reached for {host!r}: only loopback is allowed", pytrace=True)

    def guarded_connect(real):
        def connect(self, address):
            if self.family in {socket.AF_INET, socket.AF_INET6}:
                check(address[0])
            return real(self, address)

        return connect

    def guarded_getaddrinfo(host, *args, **kwargs):
        # RFC 6761: a name under .invalid never resolves, so there is nobody to ask.
        if isinstance(host, str) and host.endswith(".invalid"):
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        check(host)
        return getaddrinfo(host, *args, **kwargs)

    getaddrinfo = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", guarded_getaddrinfo)
    for name in ("connect", "connect_ex"):
        guarded = guarded_connect(getattr(socket.socket, name))
        monkeypatch.setattr(socket.socket, name, guarded)
    yield
    if reached:
        pytest.fail(f"the test reached for {reached}: only loopback is allowed", pytrace=False)


@pytest.fixture
def server():
    """A stand-in model on a loopback port of its own."""
    from LLM.testing import LocalServer

    with LocalServer() as running:
        yield running
