"""The command `chat`: a conversation of several turns, and the commands of the person in it."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from LLM.commands.shared import (
    FAILED,
    OK,
    Said,
    connected,
    explain,
    print_answer,
    show_answer,
    user,
    with_system,
)
from LLM.commands.view import Screen, screen_for
from LLM.errors import LLMError


def chat(args: argparse.Namespace) -> int:
    with connected(args) as client:
        return _Chat(client, screen_for(args), args).run()


_COMMANDS = {
    "help": ("", "this list"),
    "reset": ("", "forget the conversation"),
    "retry": ("", "ask the last question again"),
    "system": ("TEXT", "set the system message; 'none' removes it; alone: show it"),
    "model": ("NAME", "ask another model from now on; alone: show it"),
    "models": ("", "list the models of this server"),
    "save": ("FILE", "write the conversation to a file; as JSON if it ends in .json"),
    "quit": ("", "leave; so do /exit and Ctrl-D"),
}
_HELP = """\
A line that opens with \"\"\" goes on until one that ends with it. Ctrl-C stops an answer."""


class _Chat:
    """A conversation of several turns, and the commands of the person in it."""

    def __init__(self, client: Any, screen: Screen, args: argparse.Namespace) -> None:
        self._client = client
        self._screen = screen
        self._json = args.json
        self._local = getattr(args, "local", False)
        self._system: str | None = getattr(args, "system", None)
        self._model: str | None = None  # None: the config's
        self._said: list[Said] = []
        self._last_question: str | None = None
        self._saved: set[Path] = set()
        self._interactive = sys.stdin.isatty()
        self._failed = False
        self._over = False

    def run(self) -> int:
        if self._interactive:
            self._greet()
        while not self._over:
            try:
                line = self._read()
                if line is None:
                    break
                self._take(line.strip())
            except KeyboardInterrupt:
                if not self._interactive:
                    raise
                self._screen.note("\n(Ctrl-D or /quit leaves)")
        return FAILED if self._failed and not self._interactive else OK

    def _greet(self) -> None:
        _enable_line_editing()
        what = "a stand-in model that follows fixed rules" if self._local else self._where()
        self._screen.note(f"{what} · /help lists the commands, Ctrl-D leaves")

    def _where(self) -> str:
        from LLM.providers.targets import address, find_target

        target = find_target(self._client.config, self._model)
        return f"{target.model} at {address(target)}"

    def _read(self) -> str | None:
        """What is said next; `None` at the end."""
        line = self._read_line("> ")
        if not (self._interactive and line and line.startswith('"""')):
            return line
        lines = [line[3:]]
        while not lines[-1].rstrip().endswith('"""'):
            line = self._read_line(". ")
            if line is None:
                return None
            lines.append(line)
        return "\n".join(lines).rstrip().removesuffix('"""')

    def _read_line(self, prompt: str) -> str | None:
        if self._interactive and sys.stdout.isatty():
            try:
                return input(prompt)
            except EOFError:
                print()
                return None
        if self._interactive:  # the answers go to a file
            print(prompt, end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        return line.removesuffix("\n") if line else None

    def _take(self, line: str) -> None:
        command = re.fullmatch(r"/([a-zA-Z]+)(?:\s+(.*))?", line, re.DOTALL)
        if command:
            self._obey(command[1].lower(), (command[2] or "").strip())
        elif self._interactive and line in ("exit", "quit"):
            self._over = True
        elif line:
            self._turn(line)

    def _turn(self, question: str, before: Sequence[Said] | None = None) -> None:
        """One question and its answer; if it fails, the conversation stays as it was.

        Args:
            before: what the question goes on from; left out: the whole conversation.
        """
        self._last_question = question
        asked = [*(self._said if before is None else before), user(question)]
        messages = with_system(self._system, asked)
        try:
            text = self._answer_text(messages)
        except LLMError as error:
            self._failed = True
            self._screen.problem(self._explained(error))
            return
        if text:  # else there is nothing that a model could be shown as its answer
            self._said = [*asked, {"role": "assistant", "content": text}]

    def _answer_text(self, messages: Sequence[Said]) -> str:
        if self._json:
            return print_answer(self._client, messages, model=self._model, indent=None)
        answer = show_answer(
            self._client, messages, self._screen, model=self._model, stoppable=self._interactive
        )
        return answer.text

    def _explained(self, error: LLMError) -> str:
        changes = {} if self._model is None else {"model": self._model}
        return explain(error, self._client.config.replace(**changes))

    def _obey(self, name: str, rest: str) -> None:
        name = {"exit": "quit", "q": "quit", "bye": "quit", "clear": "reset", "h": "help"}.get(
            name, name
        )
        if name not in _COMMANDS:
            near = get_close_matches(name, _COMMANDS, n=1)
            hint = f"did you mean /{near[0]}?" if near else "/help lists them"
            self._failed = True
            self._screen.problem(f"there is no command /{name}; {hint}")
            return
        command: Callable[[str], None] = getattr(self, f"_do_{name}")
        command(rest)

    def _do_help(self, _: str) -> None:
        for name, (argument, about) in _COMMANDS.items():
            self._screen.note(f"  {f'/{name} {argument}':14}  {about}")
        self._screen.note(_HELP)

    def _do_reset(self, _: str) -> None:
        self._said, self._last_question = [], None
        self._screen.note("(a new conversation)")

    def _do_retry(self, _: str) -> None:
        if self._last_question is None:
            self._screen.note("(nothing was asked yet)")
            return
        answered = self._said and self._said[-2] == user(self._last_question)
        self._turn(self._last_question, self._said[:-2] if answered else None)

    def _do_system(self, text: str) -> None:
        if text:
            self._system = None if text.lower() == "none" else text
        self._screen.note(f"(system message: {self._system or 'none'})")

    def _do_model(self, name: str) -> None:
        from LLM.providers.targets import find_target

        if name:
            try:
                find_target(self._client.config, name)
            except LLMError as error:
                self._screen.problem(str(error))
                return
            self._model = name
        self._screen.note(f"({self._where()})")

    def _do_models(self, _: str) -> None:
        try:
            models = self._client.list_models()
        except LLMError as error:
            self._screen.problem(self._explained(error))
            return
        for model in models:
            self._screen.note(f"  {model.id}")

    def _do_save(self, name: str) -> None:
        if not name:
            self._screen.problem("save to which file? /save talk.md")
            return
        path = Path(name).expanduser()
        if path.exists() and path.resolve() not in self._saved:
            self._screen.problem(f"{path} is there already; choose another name")
            return
        try:
            conversation = with_system(self._system, self._said)
            path.write_text(_transcript(conversation, path.suffix), encoding="utf-8")
        except OSError as error:
            self._screen.problem(f"{path} cannot be written: {error.strerror or error}")
            return
        self._saved.add(path.resolve())
        count = len(self._said) // 2
        self._screen.note(f"({count} {'turn' if count == 1 else 'turns'} saved in {path})")

    def _do_quit(self, _: str) -> None:
        self._over = True


def _transcript(messages: Sequence[Said], suffix: str) -> str:
    """A conversation as JSON, or for a person."""
    if suffix.lower() == ".json":
        return json.dumps(messages, ensure_ascii=False, indent=2) + "\n"
    return "\n".join(f"## {said['role']}\n\n{said['content'].strip()}\n" for said in messages)


def _enable_line_editing() -> None:
    """Arrow keys and the history of this talk, where Python has them; a pasted text stays one."""
    try:
        import readline
    except ImportError:
        return
    readline.parse_and_bind("set enable-bracketed-paste on")
