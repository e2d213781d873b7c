"""What holds for every test: nothing but loopback is reached, and the environment says nothing."""

import os
import re

import hypothesis
import pytest

from tests.databases import postgres, postgres_server

__all__ = ["postgres", "postgres_server"]  # one server for each worker

# No clock over examples: on a machine that is busy with the other workers even making one is slow.
hypothesis.settings.register_profile(
    "suite", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("suite")

# What could change which host is called, with which key, or over which network.
SPEAKING_VARIABLES = re.compile(
    r"(LLM|AGENTS|OPENAI|ANTHROPIC|OPENROUTER|OLLAMA|GEMINI|GOOGLE|MISTRAL|GROQ|DEEPSEEK|XAI|TOGETHER|AZURE"
    r"|VLLM|LMSTUDIO|HF|OTEL)_.*"
    r"|.*_API_KEY|MODEL_NAME|.*_PROXY|REQUESTS_CA_BUNDLE|CURL_CA_BUNDLE|SSL_CERT_(FILE|DIR)|NETRC",
    re.IGNORECASE,
)


@pytest.fixture(autouse=True)
def silent_environment(monkeypatch):
    for name in list(os.environ):
        if SPEAKING_VARIABLES.fullmatch(name):
            monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def only_loopback():
    """Fail a test that reaches for the network, also from a thread or below an `except`."""
    from LLM.testing import block_network

    with block_network():
        yield


@pytest.fixture
def server():
    """A stand-in model on a loopback port of its own."""
    from LLM.testing import LocalServer

    with LocalServer() as running:
        yield running
