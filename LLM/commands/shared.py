"""What the commands share: exit codes, whom to call, and how one answer is asked for and shown."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from LLM.commands.view import Screen, one_line
from LLM.errors import LLMAuthenticationError, LLMConfigError, LLMError, LLMNotFoundError
from LLM.providers.hosts import COMPATIBLE, ENVIRONMENT_HOSTS, HOSTS

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130  # exit codes; 130 is a shell's own for Ctrl-C

Said = dict[str, str]  # one message, in the form that every provider is given


class Failure(Exception):
    """A command failed; the text is for the person who typed it."""


# Whom to call.

# Seconds between two tokens of the built-in model when a person looks on: fast, and seen to stream.
READING_PACE = 0.02
_SETTINGS = ("model", "base_url", "provider", "temperature", "max_tokens", "timeout")


@contextmanager
def connected(args: argparse.Namespace) -> Iterator[Any]:
    """The client that the arguments describe. An error that leaves the block is explained."""
    from LLM.client import LLM

    with ExitStack() as stack:
        client = stack.enter_context(LLM(config_of(args, stack)))
        try:
            yield client
        except LLMConfigError:
            raise
        except LLMError as error:
            raise Failure(explain(error, client.config)) from error


def config_of(args: argparse.Namespace, stack: ExitStack) -> Any:
    """The settings; with `--local` the server runs until `stack` is closed."""
    from LLM.config import LLMConfig

    given = {name: value for name, value in vars(args).items() if name in _SETTINGS}
    if getattr(args, "local", False):
        from LLM.testing import LocalServer

        pace = READING_PACE if sys.stdout is not None and sys.stdout.isatty() else 0.0
        server = stack.enter_context(LocalServer(token_delay=pace))
        return LLMConfig(**{"model": server.models[0], **given, "base_url": server.url})
    config = LLMConfig.from_env(dotenv_of(args), **given)
    # Nobody said that a server is there: if none is, say so at once.
    return config.replace(max_retries=0) if _is_default_address(config) else config


def dotenv_of(args: argparse.Namespace) -> bool | str:
    file: str = getattr(args, "env_file", "")
    return file or getattr(args, "dotenv", False)


def _is_default_address(config: Any) -> bool:
    from LLM.providers.targets import find_target

    return find_target(config).host is COMPATIBLE and not config.is_set("base_url")


def explain(error: LLMError, config: Any) -> str:
    """An error in one line, with what to do about it where only the command line knows."""
    from LLM.providers.targets import find_target

    text = one_line(str(error))
    if isinstance(error.__cause__, ConnectionRefusedError) and _is_default_address(config):
        keys = " or ".join(HOSTS[name].key_variables[0] for name in ENVIRONMENT_HOSTS)
        return (
            f"nothing answers at {config.base_url}: start a server there (`{program()} serve`), "
            f"use the built-in model (--local), or set {keys}"
        )
    if isinstance(error, LLMAuthenticationError):
        target = find_target(config)
        if target.key is not None:
            return text
        if target.host.key_variables and not config.is_set("base_url"):
            return f"{text} (set {' or '.join(target.host.key_variables)})"
        return f"{text} (no key was sent; set LLM_BASE_URL and LLM_API_KEY together, or use --provider)"
    if isinstance(error, LLMNotFoundError):
        return f"{text} (`{program()} models` lists what is there)"
    return text


def program() -> str:
    """How this program is called from here, also from a virtual environment that is not active."""
    python = Path("python" if shutil.which("python") else "python3")
    if sys.prefix != sys.base_prefix and os.environ.get("VIRTUAL_ENV") != sys.prefix:
        python = Path(sys.executable)
        with suppress(ValueError, OSError):
            python = python.relative_to(Path.cwd())
    return f"{shlex.quote(str(python))} -m LLM"


# One answer.


@dataclass(frozen=True)
class Answer:
    """An answer that has been shown; `response` is `None` if Ctrl-C stopped it."""

    text: str
    response: Any = None
    first_token: float | None = None  # seconds


def show_answer(
    client: Any,
    messages: Sequence[Said],
    screen: Screen,
    *,
    model: str | None = None,
    stoppable: bool = False,
) -> Answer:
    """Ask, and show the answer as it comes; if `stoppable`, Ctrl-C ends it and what came is kept."""
    pieces: list[str] = []
    try:
        with screen.answer() as view, client.stream(messages, model=model) as stream:
            for event in stream:
                if event.text_delta is not None:
                    pieces.append(str(event.text_delta))
                    view.write(pieces[-1])
                elif event.reasoning_delta is not None:
                    view.think()
    except KeyboardInterrupt:
        if not stoppable:
            raise
        screen.note("(stopped)")
        return Answer("".join(pieces))
    answer = Answer("".join(pieces), stream.response, stream.time_to_first_token)
    response = answer.response
    for remark in remarks(response.finish_reason, answer.text, response.tool_calls):
        screen.note(remark)
    return answer


def remarks(finish: str | None, text: str, tool_calls: Sequence[Any] = ()) -> Iterator[str]:
    """What a reader must know of an answer that is not plainly complete."""
    if finish == "length":
        yield "(cut: the answer reached the largest number of tokens; see --max-tokens)"
    elif finish == "content_filter":
        yield "(cut: the provider's content filter stopped the answer)"
    elif not text:
        names = ", ".join(call.name for call in tool_calls)
        yield f"(no text, but a call of the tool {names})" if names else "(the answer is empty)"


def print_answer(
    client: Any, messages: Sequence[Said], *, model: str | None = None, indent: int | None = 2
) -> str:
    """Ask, and print the whole response as JSON; returns its text."""
    # Streamed too, so that a long answer has the same time limits in both forms.
    with client.stream(messages, model=model) as stream:
        response = stream.response
    print(as_json(response, indent), flush=True)
    return str(response.text)


def as_json(response: Any, indent: int | None = 2) -> str:
    """The whole response, and what the client knows of the call."""
    call = {
        "provider": response.provider,
        "request_id": response.request_id,
        "attempts": response.attempts,
        "latency_ms": response.latency_ms,
    }
    value = {**response.model_dump(), "call": call}
    return json.dumps(value, ensure_ascii=False, indent=indent, default=str)


def milliseconds(number: float) -> str:
    """A duration for people."""
    return f"{number:.1f} ms" if number < 10 else f"{number:,.0f} ms"


def question(args: argparse.Namespace) -> str:
    """The words of the command line, after what is piped in (a long text goes before its question)."""
    piped = "" if sys.stdin.isatty() else sys.stdin.read().strip()
    asked = "\n\n".join(filter(None, (piped, " ".join(args.words).strip())))
    if not asked:
        args.parser.error(f'nothing to ask; write {args.parser.prog} "…", or pipe a text in')
    return asked


def with_system(system: str | None, said: Sequence[Said]) -> list[Said]:
    return [{"role": "system", "content": system}, *said] if system else list(said)


def user(text: str) -> Said:
    return {"role": "user", "content": text}
