"""The command `doctor`: what is configured, which keys are set, which servers answer."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any
from urllib.parse import urlsplit

from LLM.commands.shared import FAILED, OK, config_of, dotenv_of, program
from LLM.commands.view import Screen, clean, one_line, screen_for
from LLM.errors import (
    LLMAPIError,
    LLMAuthenticationError,
    LLMConfigError,
    LLMConnectionError,
    LLMError,
    LLMTimeoutError,
)
from LLM.providers.hosts import ENVIRONMENT_HOSTS, HOSTS, host_of_model
from LLM.version import __version__

# Servers without a row of their own in the table of hosts, by the port that they choose themselves.
_OTHER_PORTS = (
    (8080, "llama.cpp"),
    (1337, "Jan"),
    (4000, "LiteLLM"),
    (5000, "text-generation-webui"),
    (30000, "SGLang"),
)
_PACKAGES = ("requests", "urllib3", "pydantic", "rich", "python-dotenv")
_NETWORK = re.compile(
    r"(HTTPS?|ALL|NO)_PROXY|(REQUESTS|CURL)_CA_BUNDLE|SSL_CERT_(FILE|DIR)", re.IGNORECASE
)
_PROBE_SECONDS = 2.0  # for a server on this machine, and for one that may be far away:
_REMOTE_PROBE_SECONDS = 10.0


@dataclass(frozen=True)
class _Probe:
    """What a server said when it was asked for its models."""

    base_url: str
    answers: bool
    detail: str
    latency_ms: float | None = None
    models: tuple[str, ...] = ()
    names: tuple[str, ...] = ()  # what is usually found there


def doctor(args: argparse.Namespace) -> int:
    report = _examine(args)
    if args.json:
        print(json.dumps(report, ensure_ascii=False, indent=2))
    else:
        _show_report(report, screen_for(args))
    return FAILED if report["problem"] else OK


def _examine(args: argparse.Namespace) -> dict[str, Any]:
    """All that there is to say, as plain values without a secret."""
    from concurrent.futures import ThreadPoolExecutor

    from LLM.config import Environment, LLMConfig

    problem, target = None, None
    env = Environment({})
    with ExitStack() as stack, ThreadPoolExecutor(16) as threads:
        try:
            env = Environment.read(dotenv_of(args))
            config = config_of(args, stack)
            asked = threads.submit(_probe, _probing(config, args))
            target = {**_target(config, args, env), **asdict(asked.result())}
        except LLMConfigError as error:
            problem = one_line(str(error))
        # Without a key: who listens on a usual port is not yet known.
        local = [
            threads.submit(
                _probe, _probing(LLMConfig(base_url=url, api_key=None), args), url, names
            )
            for url, names in _local_addresses(env).items()
        ]
        servers = [asdict(probe.result()) for probe in local]
    return {
        "versions": _versions(),
        "problem": problem,
        "target": target,
        "keys": _keys(env),
        "variables": _variables(env),
        "servers": servers,
    }


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {
        "requests-llm": __version__,
        "python": ".".join(map(str, sys.version_info[:3])),
    }
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def _target(config: Any, args: argparse.Namespace, env: Mapping[str, str]) -> dict[str, Any]:
    from LLM.providers.targets import find_target

    target = find_target(config)
    return {
        "provider": target.host.name,
        "dialect": target.host.dialect,
        "model": target.model,
        "key": target.key is not None,
        "chosen_by": _chosen_by(config, args, env),
    }


def _chosen_by(config: Any, args: argparse.Namespace, env: Mapping[str, str]) -> str:
    """What decided where calls go."""
    for option in ("local", "base_url", "provider"):
        if hasattr(args, option):
            return f"--{option.replace('_', '-')}"
    if config.is_set("base_url"):
        hosts = [HOSTS[name] for name in ENVIRONMENT_HOSTS]
        addresses = ["LLM_BASE_URL", *(host.base_url_variable for host in hosts)]
        keys = [name for host in hosts for name in host.key_variables]
        return next((name for name in (*addresses, *keys) if name and name in env), "environment")
    if host_of_model(config.model) is not None:
        return "the model's prefix"
    return "the default"


def _probing(config: Any, args: argparse.Namespace) -> Any:
    from LLM.providers.targets import find_target
    from LLM.transport import is_loopback

    near = is_loopback(urlsplit(find_target(config).base_url).hostname or "")
    seconds = getattr(args, "timeout", None) or (_PROBE_SECONDS if near else _REMOTE_PROBE_SECONDS)
    return config.replace(max_retries=0, timeout=seconds)


def _local_addresses(env: Any) -> dict[str, tuple[str, ...]]:
    """Where servers on this machine usually are, and what is usually found there."""
    from LLM.config import LLMConfig, versioned
    from LLM.transport import is_loopback

    home = LLMConfig().base_url
    found: dict[str, tuple[str, ...]] = {versioned(home): ("the default",)}
    for host in HOSTS.values():
        try:
            url = env.address(host)
            near = is_loopback(urlsplit(url).hostname or "")
        except ValueError:  # its variable holds no address
            continue
        if near:
            found[url] = (*found.get(url, ()), host.name)
    for port, name in _OTHER_PORTS:
        url = versioned(f"http://{urlsplit(home).hostname}:{port}")
        found[url] = (*found.get(url, ()), name)
    return found


def _probe(config: Any, url: str | None = None, names: tuple[str, ...] = ()) -> _Probe:
    """Ask a server for its models; the quicker of two calls is its latency (the first connects)."""
    from LLM.client import LLM
    from LLM.providers.targets import find_target

    url = url or find_target(config).base_url
    with LLM(config) as client:
        try:
            answers = [client.list_models() for _ in range(2)]
        except LLMError as error:
            answered, detail = _no_models(error, keyed=config.api_key is not None)
            return _Probe(url, answered, detail, names=names)
    models = tuple(clean(model.id) for model in answers[-1])
    latency = min(answer.latency_ms or 0.0 for answer in answers)
    listed = "1 model" if len(models) == 1 else f"{len(models)} models"
    return _Probe(url, True, f"{listed}, {latency:.1f} ms", latency, models, names)


def _no_models(error: LLMError, *, keyed: bool) -> tuple[bool, str]:
    """Whether a server is there that did not list its models, and what is the matter."""
    said = one_line(str(error))[:100]
    if isinstance(error, LLMAuthenticationError):
        return True, "does not take this key" if keyed else "wants a key"
    if isinstance(error, LLMAPIError):
        return False, f"something else answers: {said}"
    if isinstance(error.__cause__, ConnectionRefusedError):
        return False, "nothing there"
    if isinstance(error, LLMTimeoutError):
        return False, "no answer in time"
    if isinstance(error, LLMConnectionError):
        return False, f"no connection: {said}"
    return False, said


def _keys(env: Any) -> dict[str, dict[str, Any]]:
    """Which keys are set and can be used; never what they are."""
    found: dict[str, dict[str, Any]] = {
        "LLM_API_KEY": {"provider": None, "set": "LLM_API_KEY" in env, "problem": None}
    }
    for host in HOSTS.values():
        for name in host.key_variables:
            found[name] = {"provider": host.name, "set": name in env, "problem": None}
        try:
            env.key(host)
        except LLMConfigError as error:
            found[host.key_variables[0]]["problem"] = one_line(str(error))
    return found


def _variables(env: Mapping[str, str]) -> list[str]:
    """Other variables that have a say: their names, as an address may hold a password."""
    ours = {"LLM_BASE_URL", "LLM_MODEL", "MODEL_NAME"}
    ours.update(host.base_url_variable or "" for host in HOSTS.values())
    return sorted(name for name in env if name in ours or _NETWORK.fullmatch(name))


def _show_report(report: Mapping[str, Any], screen: Screen) -> None:
    versions = ", ".join(
        f"{name} {found or '(none)'}" for name, found in report["versions"].items()
    )
    screen.say(versions, "dim")
    if report["problem"]:
        screen.problem(report["problem"])
    else:
        screen.table("Calls go to", _target_rows(report["target"]))
    keys = report["keys"]
    found = [
        (not key["problem"], name, f"set, but {key['problem']}" if key["problem"] else "set")
        for name, key in keys.items()
        if key["set"]
    ]
    unset = ", ".join(name for name, key in keys.items() if not key["set"])
    screen.table("Keys", found)
    screen.say(f"  not set: {unset}", "dim")
    if report["variables"]:
        screen.say(f"\nOther variables that count\n  {', '.join(report['variables'])}")
    servers = [
        (
            server["answers"],
            urlsplit(server["base_url"]).netloc,
            server["detail"],
            " or ".join(server["names"]),
        )
        for server in report["servers"]
    ]
    screen.table("Servers on this machine", servers)
    if report["target"] and not report["target"]["answers"]:
        screen.say(f"\nTo try without any: {program()} chat --local")


def _target_rows(target: Mapping[str, Any]) -> list[tuple[bool | str, ...]]:
    models = target["models"]
    unlisted = models and target["model"] not in models
    answers = "yes" if target["answers"] else "no"
    return [
        (True, "address", f"{target['base_url']} ({target['chosen_by']})"),
        (True, "provider", target["provider"]),
        (not unlisted, "model", target["model"] + (" (not in its list)" if unlisted else "")),
        (True, "key", "is sent" if target["key"] else "none"),
        (target["answers"], "answers", f"{answers}: {target['detail']}"),
    ]
