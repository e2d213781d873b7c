"""Where a call goes: from settings, `model=` and `provider=` to a host, an address and a key."""

from __future__ import annotations

from urllib.parse import urlsplit

from pydantic import SecretStr

from LLM.config import LLMConfig, versioned
from LLM.errors import LLMConfigError
from LLM.providers import openai
from LLM.providers.base import Provider, Target
from LLM.providers.hosts import (
    COMPATIBLE,
    Host,
    host_of_model,
    host_of_url,
    known_host,
)


def provider_of(target: Target) -> Provider:
    """The dialect that a target's host speaks."""
    if target.host.dialect == "anthropic":
        from LLM.providers import anthropic  # a script that never asks it does not pay for it

        return anthropic
    return openai


def find_target(config: LLMConfig, model: str | None = None, provider: str | None = None) -> Target:
    """The target of a call; `None` means: as the config says.

    With an explicit `base_url` or `provider` the model's name is passed on as it stands. Otherwise a
    known prefix chooses the host. A key is only ever paired with the address that it belongs to.

    Raises:
        LLMConfigError: the provider is unknown, or it is not known which model to ask there.
    """
    config.require_keys()
    wanted = config.model if model is None else model
    if not isinstance(wanted, str) or not wanted.strip():
        raise LLMConfigError(f"model must be a name like 'gpt-4', and is {wanted!r}")
    if provider is not None and provider != config.provider:
        host = known_host(provider)
        if model is None and provider not in config.models:
            raise LLMConfigError(
                f"which model of {provider}? give model=, or LLMConfig(models={{{provider!r}: …}})"
            )
        return _at_its_own_address(
            config, host, config.models[provider] if model is None else model
        )
    implied = config.address_is_implied and model is not None and host_of_model(wanted) is not None
    if config.is_set("base_url") and not implied:
        host = known_host(config.provider) if config.provider else host_of_url(config.base_url)
        return Target(host, versioned(config.base_url), wanted, config.api_key)
    if config.provider is not None:
        if model is None and not config.is_set("model"):
            wanted = config.models.get(config.provider, wanted)
        return _at_its_own_address(config, known_host(config.provider), wanted, main=True)
    found = host_of_model(wanted)
    if found is not None:
        host, name = found
        own = host_of_model(config.model)
        return _at_its_own_address(config, host, name, main=own is not None and own[0] is host)
    # The default address. A key given for a prefix's host is not meant for it.
    key = None if host_of_model(config.model) else config.api_key
    return Target(COMPATIBLE, versioned(config.base_url), wanted, key)


def fallback_target(config: LLMConfig, choice: str | LLMConfig) -> Target:
    """The target of a fallback.

    A known prefix chooses the host, also beside an explicit `base_url`: another model of the same
    server bears none, unless that server routes.
    """
    if isinstance(choice, LLMConfig):
        return find_target(choice)
    found = host_of_model(choice) if isinstance(choice, str) else None
    if found is not None and not find_target(config).host.routes:
        host, name = found
        return _at_its_own_address(config, host, name, main=host.name == config.provider)
    return find_target(config, choice)


def _at_its_own_address(config: LLMConfig, host: Host, model: str, *, main: bool = False) -> Target:
    """A known host where it is, with its key: the config's if `main`, else its own.

    A key left out is looked up in the host's variable; `api_key=None` sends none.
    """
    if host is COMPATIBLE:
        raise LLMConfigError(f"{host.name!r} has no address of its own; give base_url=")
    env = config.environment
    key: SecretStr | None = config.api_keys.get(host.name)
    if main and config.is_set("api_key"):
        key = config.api_key
    elif key is None:
        key = env.key(host)
    return Target(host, versioned(env.address(host)), model, key)


def address(target: Target) -> str:
    """`host:port` of a target, for logs."""
    return urlsplit(target.base_url).netloc
