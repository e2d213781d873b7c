"""Which host a call goes to, how it is spoken to, and which key it gets."""

import pytest

from LLM import LLM
from LLM.config import LLMConfig
from LLM.errors import LLMConfigError
from LLM.providers.hosts import (
    COMPATIBLE,
    HOSTS,
    address_from_variable,
    host_of_model,
    host_of_url,
    known_host,
)
from LLM.providers.targets import find_target

OPENAI = "https://api.openai.com/v1"
ANTHROPIC = "https://api.anthropic.com/v1"
DEFAULT = "http://127.0.0.1:8000/v1"


def place(target):
    return target.host.name, target.base_url, target.model


@pytest.mark.parametrize("name", HOSTS)
def test_every_host_is_a_usable_row(name):
    host = HOSTS[name]
    assert host.name == name
    assert host.dialect in {"openai", "anthropic"}
    local = host.base_url.startswith("http://127.0.0.1:")
    assert local or host.base_url.startswith("https://")
    assert not host.base_url.endswith("/")
    assert local or host.key_variables
    assert LLM(model=f"{name}/some-model").config.base_url  # a client of it can be made


def test_the_hosts_of_the_contract_are_known():
    assert {*HOSTS} >= {
        *"openai anthropic ollama openrouter groq mistral deepseek gemini together xai".split(),
        *"vllm lmstudio".split(),
    }


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({}, ("openai-compatible", DEFAULT, "gpt-4")),
        ({"model": "openai/gpt-4o-mini"}, ("openai", OPENAI, "gpt-4o-mini")),
        (
            {"model": "anthropic/claude-3-5-sonnet-20241022"},
            ("anthropic", ANTHROPIC, "claude-3-5-sonnet-20241022"),
        ),
        ({"model": "ollama/llama2"}, ("ollama", "http://127.0.0.1:11434/v1", "llama2")),
        (
            {"model": "openrouter/openai/gpt-4o"},
            ("openrouter", "https://openrouter.ai/api/v1", "openai/gpt-4o"),
        ),
        (
            {"model": "together/meta-llama/Llama-3-8b"},
            ("together", "https://api.together.xyz/v1", "meta-llama/Llama-3-8b"),
        ),
        # an unknown prefix, or half of one, is the model's own name
        (
            {"model": "meta-llama/Llama-3"},
            ("openai-compatible", DEFAULT, "meta-llama/Llama-3"),
        ),
        ({"model": "openai/"}, ("openai-compatible", DEFAULT, "openai/")),
        ({"model": "/openai"}, ("openai-compatible", DEFAULT, "/openai")),
        ({"model": "openai"}, ("openai-compatible", DEFAULT, "openai")),
        # an explicit address or provider: the model's name as it stands
        (
            {"base_url": "https://openrouter.ai/api/v1", "model": "openai/gpt-4o"},
            ("openrouter", "https://openrouter.ai/api/v1", "openai/gpt-4o"),
        ),
        (
            {"base_url": "http://127.0.0.1:8000", "model": "openai/gpt-4o"},
            ("openai-compatible", DEFAULT, "openai/gpt-4o"),
        ),
        (
            {"provider": "openrouter", "model": "openai/gpt-4o"},
            ("openrouter", "https://openrouter.ai/api/v1", "openai/gpt-4o"),
        ),
        ({"base_url": "https://api.anthropic.com"}, ("anthropic", ANTHROPIC, "gpt-4")),
        (
            {"base_url": "https://API.OpenAI.com/v1"},
            ("openai", "https://API.OpenAI.com/v1", "gpt-4"),
        ),
        # the dialect forced at any address
        (
            {"base_url": "http://127.0.0.1:9", "provider": "anthropic", "model": "m"},
            ("anthropic", "http://127.0.0.1:9/v1", "m"),
        ),
        (
            {"provider": "openai-compatible", "base_url": "http://h/api", "model": "a/b"},
            ("openai-compatible", "http://h/api", "a/b"),
        ),
        ({"provider": "anthropic", "models": {"anthropic": "c"}}, ("anthropic", ANTHROPIC, "c")),
        (
            {"provider": "anthropic", "models": {"anthropic": "c"}, "model": "d"},
            ("anthropic", ANTHROPIC, "d"),
        ),
    ],
)
def test_settings_choose_the_host(settings, expected):
    assert place(find_target(LLMConfig(**settings))) == expected


@pytest.mark.parametrize(
    "settings, model, provider, expected",
    [
        ({}, "other", None, ("openai-compatible", DEFAULT, "other")),
        ({}, "anthropic/claude", None, ("anthropic", ANTHROPIC, "claude")),
        ({"model": "openai/a"}, "anthropic/b", None, ("anthropic", ANTHROPIC, "b")),
        ({"model": "openai/a"}, "b", None, ("openai-compatible", DEFAULT, "b")),
        ({}, "claude", "anthropic", ("anthropic", ANTHROPIC, "claude")),
        ({}, "a/b", "openrouter", ("openrouter", "https://openrouter.ai/api/v1", "a/b")),
        ({"models": {"openai": "m"}}, None, "openai", ("openai", OPENAI, "m")),
        (
            {"base_url": "http://h"},
            "openai/a",
            None,
            ("openai-compatible", "http://h/v1", "openai/a"),
        ),
        ({"base_url": "http://h"}, "a", "openai", ("openai", OPENAI, "a")),
        ({"provider": "openai", "model": "a"}, "x/b", None, ("openai", OPENAI, "x/b")),
    ],
)
def test_a_call_may_switch_model_and_host(settings, model, provider, expected):
    assert place(find_target(LLMConfig(**settings), model, provider)) == expected


@pytest.mark.parametrize(
    "model, provider, problem",
    [
        (None, "openai", "which model of openai"),
        ("m", "opnai", "did you mean 'openai'"),
        ("m", "openai-compatible", "base_url"),
        ("", None, "model"),
        (4, None, "model"),
    ],
)
def test_a_call_that_names_no_host_or_model_is_refused(model, provider, problem):
    with pytest.raises(LLMConfigError, match=problem):
        find_target(LLMConfig(), model, provider)


def test_a_compatible_server_needs_an_address():
    with pytest.raises(LLMConfigError, match="base_url"):
        LLMConfig(provider="openai-compatible")


VARIABLES = {
    "OPENAI_API_KEY": "k-openai",
    "ANTHROPIC_API_KEY": "k-anthropic",
    "GROQ_API_KEY": "k-groq",
    "GEMINI_API_KEY": "k-gemini",
    "GOOGLE_API_KEY": "k-google",
    "OLLAMA_API_KEY": "k-ollama",
}


@pytest.mark.parametrize(
    "settings, model, provider, key",
    [
        # each host takes the key of its own variable
        ({"model": "openai/m"}, None, None, "k-openai"),
        ({"model": "anthropic/m"}, None, None, "k-anthropic"),
        ({"model": "gemini/m"}, None, None, "k-gemini"),
        ({"provider": "groq", "model": "m"}, None, None, "k-groq"),
        ({"model": "openai/m"}, "groq/m", None, "k-groq"),
        ({"model": "openai/m"}, "m", "anthropic", "k-anthropic"),
        ({"model": "deepseek/m"}, None, None, None),
        ({"model": "ollama/m"}, None, None, None),  # its key belongs to ollama.com
        # an explicit one goes before, and only where it was meant for
        ({"model": "openai/m", "api_key": "x"}, None, None, "x"),
        ({"model": "openai/m", "api_key": "x"}, "openai/n", None, "x"),
        ({"model": "openai/m", "api_key": "x"}, "groq/n", None, "k-groq"),
        ({"model": "openai/m", "api_key": "x"}, "deepseek/n", None, None),
        ({"model": "openai/m", "api_key": "x"}, "n", None, None),
        ({"model": "openai/m", "api_key": None}, None, None, None),
        ({"model": "openai/m", "api_key": ""}, None, None, None),
        ({"api_keys": {"groq": "y"}, "model": "groq/m"}, None, None, "y"),
        ({"api_keys": {"groq": "y"}, "model": "openai/m"}, "groq/m", None, "y"),
        ({"api_keys": {"groq": "y"}, "model": "openai/m"}, None, None, "k-openai"),
        # nothing of the environment goes to an explicit or the default address
        ({}, None, None, None),
        ({"base_url": "http://h", "model": "openai/m"}, None, None, None),
        ({"base_url": OPENAI, "model": "m"}, None, None, None),
        ({"base_url": "http://h", "provider": "openai", "model": "m"}, None, None, None),
        ({"base_url": "http://h", "api_key": "x"}, None, None, "x"),
        ({"base_url": "http://h", "api_key": "x"}, "m", "openai", "k-openai"),
        ({"api_key": "x"}, None, None, "x"),
        ({"api_key": "x"}, "openai/m", None, "k-openai"),
        ({"api_key": "x"}, "m", "deepseek", None),
    ],
)
def test_a_key_goes_only_where_it_belongs(monkeypatch, settings, model, provider, key):
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)
    target = find_target(LLMConfig(**settings), model, provider)
    assert (target.key and target.key.get_secret_value()) == key


def test_no_host_is_ever_paired_with_another_hosts_variable(monkeypatch):
    variables = {v: f"key-of-{name}" for name, host in HOSTS.items() for v in host.key_variables}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    for config in (LLMConfig(), LLMConfig.from_env(), LLMConfig(api_key="mine")):
        for name, host in HOSTS.items():
            key = find_target(config, "m", name).key
            expected = f"key-of-{name}" if host.key_variables else None
            assert (key and key.get_secret_value()) == expected


@pytest.mark.parametrize(
    "url, name",
    [
        ("https://api.openai.com/v1", "openai"),
        ("https://api.openai.com", "openai"),
        ("https://API.GROQ.COM/openai/v1", "groq"),
        ("https://api.anthropic.com", "anthropic"),
        ("https://generativelanguage.googleapis.com/v1beta/openai", "gemini"),
        ("https://api.openai.com.evil.example/v1", "openai-compatible"),
        ("https://evil.example/api.openai.com", "openai-compatible"),
        ("http://127.0.0.1:11434", "openai-compatible"),
        ("https://my.azure.example/openai", "openai-compatible"),
    ],
)
def test_a_known_address_is_recognised_and_a_similar_one_is_not(url, name):
    assert host_of_url(url).name == name


@pytest.mark.parametrize(
    "name, value, url",
    [
        ("openai", "https://proxy/v1", "https://proxy/v1"),
        ("openai", "https://proxy/v1/", "https://proxy/v1"),
        ("anthropic", "https://api.anthropic.com", ANTHROPIC),  # its convention leaves /v1 out
        ("anthropic", "https://proxy/v1", "https://proxy/v1"),
        ("anthropic", "https://gateway/anthropic/", "https://gateway/anthropic/v1"),
        ("ollama", "http://box:9999", "http://box:9999/v1"),
        ("ollama", "box:9999", "http://box:9999/v1"),
        ("ollama", "box", "http://box:11434/v1"),
        ("ollama", "0.0.0.0", "http://127.0.0.1:11434/v1"),
        ("ollama", "0.0.0.0:5", "http://127.0.0.1:5/v1"),
        ("ollama", "[::1]:5", "http://[::1]:5/v1"),
        ("ollama", "https://ollama.example", "https://ollama.example/v1"),
    ],
)
def test_a_hosts_own_variable_means_what_its_vendor_says(monkeypatch, name, value, url):
    assert address_from_variable(HOSTS[name], value) == url
    monkeypatch.setenv(HOSTS[name].base_url_variable, value)
    assert find_target(LLMConfig(model=f"{name}/m")).base_url == url


@pytest.mark.parametrize(
    "model, refuses, field",
    [
        ("gpt-4", False, "max_tokens"),
        ("gpt-4o-mini", False, "max_tokens"),
        ("gpt-4.1", False, "max_tokens"),
        ("gpt-3.5-turbo", False, "max_tokens"),
        ("chatgpt-4o-latest", False, "max_tokens"),
        ("o1", True, "max_completion_tokens"),
        ("o3-mini", True, "max_completion_tokens"),
        ("o4-mini-2025-04-16", True, "max_completion_tokens"),
        ("gpt-5", True, "max_completion_tokens"),
        ("gpt-5-nano", True, "max_completion_tokens"),
        ("ft:o4-mini:me::1", True, "max_completion_tokens"),
        ("omni-moderation", False, "max_tokens"),
        ("gpt-oss-120b", False, "max_tokens"),
    ],
)
def test_reasoning_models_are_known_by_their_names(model, refuses, field):
    quirk = HOSTS["openai"].quirk(model)
    assert (quirk.refuses_temperature, quirk.max_tokens_name) == (refuses, field)
    assert COMPATIBLE.quirk(model).max_tokens_name == "max_tokens"


def test_a_prefix_must_be_whole():
    assert host_of_model("openai/x") == (HOSTS["openai"], "x")
    assert host_of_model("openaix/x") is None
    assert host_of_model("OpenAI/x") is None


@pytest.mark.parametrize("name", [*HOSTS, "openai-compatible"])
def test_every_name_is_known_by_itself(name):
    assert known_host(name).name == name


def test_a_name_in_other_letters_is_refused_with_the_right_one():
    with pytest.raises(LLMConfigError, match="did you mean 'openai'"):
        known_host("OpenAI")
