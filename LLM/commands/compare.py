"""The command `compare`: several models answer the same question, side by side."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

from LLM.commands.shared import (
    FAILED,
    OK,
    Said,
    connected,
    explain,
    milliseconds,
    question,
    remarks,
    user,
    with_system,
)
from LLM.commands.view import Column, Screen, one_line, screen_for
from LLM.errors import LLMConfigError
from LLM.providers.hosts import HOSTS, host_of_model


def compare(args: argparse.Namespace) -> int:
    models: list[str] = getattr(args, "models", [])
    if not models:
        example = f"-m gpt-4o -m {next(iter(HOSTS))}/…"
        args.parser.error(f'which models? name each: {args.parser.prog} {example} "…"')
    messages = with_system(getattr(args, "system", None), [user(question(args))])
    screen = screen_for(args)
    # One without a prefix is asked where `ask` would ask it; a prefix chooses its host anyway.
    args.model = next((name for name in models if host_of_model(name) is None), models[0])
    with connected(args) as client:
        with nullcontext() if args.json else screen.busy(f"asking {', '.join(models)} …"):
            answers = _ask_all(client, models, messages)
        errors = [_explained(answer, client.config) for answer in answers]
    if args.json:
        values = [_value(answer, error) for answer, error in zip(answers, errors, strict=True)]
        print(json.dumps(values, ensure_ascii=False, indent=2))
    else:
        _show(answers, errors, screen)
    return FAILED if all(errors) else OK


def _ask_all(client: Any, models: Sequence[str], messages: Sequence[Said]) -> list[Any]:
    """The answers; Ctrl-C does not wait for the end of those that have begun."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as thread:
        asked = thread.submit(client.compare, models, messages)
        try:
            answers: list[Any] = asked.result()
        except KeyboardInterrupt:
            client.close()  # which ends the answers under way
            raise
    return answers


def _explained(answer: Any, config: Any) -> str:
    """Why there is no whole answer; `""` if there is."""
    if answer.error is None:
        return ""
    if isinstance(answer.error, LLMConfigError):
        return one_line(str(answer.error))
    return explain(answer.error, config.replace(model=answer.model))


def _value(answer: Any, error: str) -> dict[str, Any]:
    return {
        "model": answer.model,
        "text": answer.text,
        "characters": len(answer.text),
        "words": len(answer.text.split()),
        "latency_ms": answer.latency_ms,
        "time_to_first_token_ms": answer.time_to_first_token_ms,
        "usage": answer.usage and answer.usage.model_dump(),
        "cost": None if answer.cost is None else float(answer.cost),
        "finish_reason": answer.finish_reason,
        "error": error or None,
    }


def _show(answers: Sequence[Any], errors: Sequence[str], screen: Screen) -> None:
    columns = []
    for answer, error in zip(answers, errors, strict=True):
        said = () if error else tuple(remarks(answer.finish_reason, answer.text))
        columns.append(Column(answer.model, answer.text, said, error))
    screen.side_by_side(columns)
    head = ("model", "latency", "first", "words", "chars", "tokens in", "out", "cost")
    screen.grid(head, [_figures(answer) for answer in answers])


def _figures(answer: Any) -> tuple[str, ...]:
    from LLM.prices import dollars_text

    first, usage = answer.time_to_first_token_ms, answer.usage
    tokens = (usage.prompt_tokens, usage.completion_tokens) if usage else (None, None)
    return (
        answer.model,
        milliseconds(answer.latency_ms),
        "—" if first is None else milliseconds(first),
        f"{len(answer.text.split()):,}",
        f"{len(answer.text):,}",
        *("—" if count is None else f"{count:,}" for count in tokens),
        "—" if answer.error is not None and answer.cost is None else dollars_text(answer.cost),
    )
