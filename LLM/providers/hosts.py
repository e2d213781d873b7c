"""Every known host, as rows of data: where it is, what it speaks, which variable holds its key.

A compatible vendor is a row here and nothing else. Addresses and variables are the vendors' own
documentation's, as of 2026-11.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from difflib import get_close_matches
from typing import NamedTuple
from urllib.parse import urlsplit

from LLM.errors import LLMConfigError


class Quirk(NamedTuple):
    """How some models differ from their host's dialect.

    Attributes:
        models: a regular expression that the start of the model's name must match.
        refuses_temperature: leave `temperature` out unless it was set on purpose.
        max_tokens_name: what the field is called for these models.
    """

    models: str
    refuses_temperature: bool = False
    max_tokens_name: str = "max_tokens"


PLAIN = Quirk("")

# OpenAI, "Reasoning models", 2026-11: o1, o3, o4-mini, gpt-5 … refuse any temperature but 1 and want
# `max_completion_tokens`; the `-chat` variants do not reason.
_OPENAI_REASONING = r"(ft:)?(o\d|gpt-[5-9](?!.*-chat)|codex)"


class Host(NamedTuple):
    """Where an API is served and how it is spoken to.

    Attributes:
        name: what stands before the slash in `name/model`, and in `.provider` of answers and errors.
        base_url: with its version path; `""` for a server that only its user knows.
        dialect: `openai` or `anthropic`.
        key_variables: environment variables of its key, the first that is set wins.
        base_url_variable: environment variable that moves it.
        base_url_suffix: what that variable's value leaves out of the path, by the vendor's convention.
        stream_usage: whether it must be asked for the usage of a stream, and understands the question.
        routes: serves other providers' models, under names like `provider/model`.
        streams_above: tokens of `max_tokens` above which a whole answer may take too long to wait for
            in silence: it is streamed underneath. `None`: never.
        price_name: what the price data calls it; `None`: as we do.
        batch_price: part of the price that a call in a batch costs, where the price data does not say.
        trace_name: what OpenTelemetry's conventions call it; `None`: as we do.
        quirks: models that differ; the first that matches counts.
    """

    name: str
    base_url: str
    dialect: str = "openai"
    key_variables: tuple[str, ...] = ()
    base_url_variable: str | None = None
    base_url_suffix: str = ""
    stream_usage: bool = True
    routes: bool = False
    streams_above: int | None = None
    price_name: str | None = None
    batch_price: str | None = None
    trace_name: str | None = None
    quirks: tuple[Quirk, ...] = ()

    def quirk(self, model: str) -> Quirk:
        return next((quirk for quirk in self.quirks if re.match(quirk.models, model)), PLAIN)


# A server named by its address alone. Gateways understand both names of the token limit; an unknown
# server may not, so only the temperature of a reasoning model is left out there.
COMPATIBLE = Host(
    "openai-compatible", "", quirks=(Quirk(_OPENAI_REASONING, refuses_temperature=True),)
)

_ROWS = (
    Host(
        "openai",
        "https://api.openai.com/v1",
        key_variables=("OPENAI_API_KEY",),
        base_url_variable="OPENAI_BASE_URL",
        batch_price="0.5",  # "Batch API", since 2024-04; as of 2026-11
        quirks=(
            Quirk(
                _OPENAI_REASONING,
                refuses_temperature=True,
                max_tokens_name="max_completion_tokens",
            ),
        ),
    ),
    Host(
        "anthropic",
        "https://api.anthropic.com/v1",
        dialect="anthropic",
        key_variables=("ANTHROPIC_API_KEY",),
        base_url_variable="ANTHROPIC_BASE_URL",
        base_url_suffix="/v1",
        # It asks for streaming where an answer may take more than ten minutes ("Errors: long requests",
        # 2026-11); its own client reckons with 128,000 tokens an hour. Two minutes are silence enough:
        # a proxy or a NAT on the way forgets a connection that says nothing for longer.
        streams_above=128_000 // 30,
        batch_price="0.5",  # "Batch processing", since 2024-10; as of 2026-11
    ),
    Host(
        "openrouter",
        "https://openrouter.ai/api/v1",
        key_variables=("OPENROUTER_API_KEY",),
        base_url_variable="OPENROUTER_BASE_URL",
        routes=True,
    ),
    Host("groq", "https://api.groq.com/openai/v1", key_variables=("GROQ_API_KEY",)),
    # Mistral refuses `stream_options` and sends the usage unasked.
    Host(
        "mistral",
        "https://api.mistral.ai/v1",
        key_variables=("MISTRAL_API_KEY",),
        stream_usage=False,
        trace_name="mistral_ai",
    ),
    Host("deepseek", "https://api.deepseek.com/v1", key_variables=("DEEPSEEK_API_KEY",)),
    Host(
        "gemini",
        "https://generativelanguage.googleapis.com/v1beta/openai",
        key_variables=("GEMINI_API_KEY", "GOOGLE_API_KEY"),
        price_name="google",
        trace_name="gcp.gemini",
    ),
    Host("together", "https://api.together.xyz/v1", key_variables=("TOGETHER_API_KEY",)),
    Host(
        "xai",
        "https://api.x.ai/v1",
        key_variables=("XAI_API_KEY",),
        price_name="x-ai",
        trace_name="x_ai",
    ),
    # OLLAMA_API_KEY belongs to ollama.com, not to the server at OLLAMA_HOST: it is not sent there.
    Host(
        "ollama",
        "http://127.0.0.1:11434/v1",
        base_url_variable="OLLAMA_HOST",
        base_url_suffix="/v1",
    ),
    Host("vllm", "http://127.0.0.1:8000/v1", key_variables=("VLLM_API_KEY",)),
    Host("lmstudio", "http://127.0.0.1:1234/v1"),
)

HOSTS: Mapping[str, Host] = {row.name: row for row in _ROWS}

# Whose variables `LLMConfig.from_env` reads beside our own, in this order.
ENVIRONMENT_HOSTS = ("openai", "openrouter")


def known_host(name: str) -> Host:
    """The row of a provider's name.

    Raises:
        LLMConfigError: the name is unknown; the message names the nearest known ones.
    """
    if name in HOSTS:
        return HOSTS[name]
    if name == COMPATIBLE.name:
        return COMPATIBLE
    near = get_close_matches(name.lower(), HOSTS, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(HOSTS)}"
    raise LLMConfigError(f"provider {name!r} is unknown: {hint}")


def host_of_model(model: str) -> tuple[Host, str] | None:
    """`provider/model` → the host and the model's own name; `None` without a known prefix."""
    prefix, slash, rest = model.partition("/")
    if slash and rest and prefix in HOSTS:
        return HOSTS[prefix], rest
    return None


def host_of_url(base_url: str) -> Host:
    """The known host that an address belongs to, `COMPATIBLE` for any other."""
    address = urlsplit(base_url).netloc.lower()
    # Local servers are known by their port only, which says little of what listens there.
    return next(
        (row for row in _ROWS if row.base_url == f"https://{address}{urlsplit(row.base_url).path}"),
        COMPATIBLE,
    )


def address_from_variable(host: Host, value: str) -> str:
    """The base URL that a host's own variable means, in its vendor's convention."""
    if "://" not in value and not host.base_url.startswith("https:"):
        # A local server's variable (OLLAMA_HOST) is often `host:port`, or just a host.
        name, slash, path = value.partition("/")
        name = name.replace("0.0.0.0", "127.0.0.1", 1)  # noqa: S104 - listens on all, asked on one
        has_port = name.rpartition(":")[2].isdecimal() and not name.endswith("]")
        port = "" if has_port else f":{urlsplit(host.base_url).port}"
        value = f"http://{name}{port}{slash}{path}"
    value = value.rstrip("/")
    suffix = host.base_url_suffix
    return value if value.endswith(suffix) else value + suffix
