"""The command line: `python -m LLM chat`, `ask`, `models`, `serve`, `doctor` and `demo`.

The client, the server and rich are imported where they are used: `--help` needs none of them. What
is handed on between functions is therefore `Any` where it is a client, a config or a response.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import shlex
import shutil
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn, Protocol
from urllib.parse import urlsplit

from LLM.clock import Clock
from LLM.errors import (
    LLMAPIError,
    LLMAuthenticationError,
    LLMConfigError,
    LLMConnectionError,
    LLMError,
    LLMNotFoundError,
    LLMTimeoutError,
)
from LLM.providers.hosts import COMPATIBLE, ENVIRONMENT_HOSTS, HOSTS
from LLM.version import __version__

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130  # exit codes; 130 is a shell's own for Ctrl-C

Said = dict[str, str]  # one message, in the form that every provider is given


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments after the program's name; left out: the process's.

    Returns:
        The exit code: 0 done, 1 failed, 2 not understood or not usable as configured, 130 Ctrl-C.
    """
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        # What a model says, or a file holds, need not fit the terminal's encoding.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        args = _parse(sys.argv[1:] if argv is None else argv)
        with _narrated(verbose=args.verbose):
            code: int = args.run(args)
        sys.stdout.flush()
    except SystemExit as done:  # argparse, after it has said why
        return done.code if isinstance(done.code, int) else USAGE
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        _discard_output()
        return FAILED
    except LLMConfigError as error:
        _complain(error)
        return USAGE
    except (_Failure, LLMError) as error:
        _complain(error)
        return FAILED
    except OSError as error:
        what = f"{error.filename}: " if error.filename else ""
        _complain(f"{what}{error.strerror or error}")
        return FAILED
    return code


class _Failure(Exception):
    """A command failed; the text is for the person who typed it."""


def _complain(error: object) -> None:
    print(f"error: {_one_line(str(error))}", file=sys.stderr)


def _discard_output() -> None:
    """Nobody reads on: what is still buffered goes nowhere, and the exit stays silent."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def _narrated(*, verbose: bool) -> Iterator[None]:
    """Say on stderr why a call takes long; with `verbose`, all that the client logs."""
    log = logging.getLogger("LLM")
    handler, level = _Narrator(verbose=verbose), log.level
    log.addHandler(handler)
    if verbose or sys.stderr.isatty():
        log.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        log.setLevel(level)
        log.removeHandler(handler)


class _Narrator(logging.Handler):
    def __init__(self, *, verbose: bool) -> None:
        super().__init__()
        self._verbose = verbose

    def emit(self, record: logging.LogRecord) -> None:
        # A retry is the one thing that a waiting person must know of; failures are told by themselves.
        retrying = record.levelno == logging.DEBUG and str(record.msg).startswith("attempt ")
        if self._verbose or (retrying and sys.stderr.isatty()):
            print(f"({_one_line(record.getMessage())})", file=sys.stderr)


# The arguments.

_DESCRIPTION = "Talk to language models from the command line."
_EPILOG = """\
Without --base-url, --provider or --local the environment says where calls go:
  LLM_BASE_URL with LLM_API_KEY
{variables}
and LLM_MODEL which model is asked. The prefix of a model chooses its provider, as in
--model {example}. `{me} doctor` shows what is found.
"""
_ASK_EPILOG = """\
  {me} ask "What is 5 x 3?"
  git diff | {me} ask "Write a commit message for this."
  {me} ask --json "Hello" | jq .usage
"""


class _Parser(argparse.ArgumentParser):
    """Says what was probably meant."""

    def error(self, message: str) -> NoReturn:
        wrong = re.search(r"invalid choice: '([^']*)' \(choose from", message)
        if wrong:
            message = f"there is no command {wrong[1]!r}; {_command_hint(wrong[1])}"
        self.exit(USAGE, f"error: {_one_line(message)}\nhelp: {self.prog} --help\n")


def _command_hint(typed: str) -> str:
    near = get_close_matches(typed, _COMMANDS, n=1)
    if near:
        return f"did you mean {near[0]!r}?"
    if " " in typed.strip():
        return f'to ask a question: {_me()} ask "…"'
    return f"there are {', '.join(_COMMANDS)}"


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = _parser()
    if argv and argv[0].startswith("-") and argv[0] not in ("-h", "--help", "--version"):
        parser.error(f"{argv[0]} goes after the command, as in `{parser.prog} ask {argv[0]} …`")
    args, rest = parser.parse_known_args(argv, argparse.Namespace(verbose=False))
    if not hasattr(args, "run"):
        parser.print_help(sys.stderr)
        parser.exit(USAGE)
    unknown = [word for word in rest if word.startswith("-")]
    if hasattr(args, "words") and not unknown:
        args.words += rest  # of a question without quotes, what stood after an option
    elif rest:
        args.parser.error(_unknown(unknown or rest, args.parser))
    if getattr(args, "local", False) and hasattr(args, "base_url"):
        args.parser.error("--local brings an address of its own; leave out --base-url")
    return args


def _unknown(words: Sequence[str], parser: argparse.ArgumentParser) -> str:
    word = words[0].partition("=")[0]
    if not word.startswith("-"):
        return f"{parser.prog} takes no {word!r}"
    options = re.findall(r"--[a-z-]+", parser.format_help())
    begun = [option for option in options if option.startswith(word)]
    near = begun or get_close_matches(word, options, n=1)
    hint = f"did you mean {near[0]}?" if near else f"`{parser.prog} --help` lists them"
    return f"there is no option {word}; {hint}"


def _parser() -> _Parser:
    me = _me()
    variables = "\n".join(
        f"  {HOSTS[name].base_url_variable} or {HOSTS[name].key_variables[0]}"
        for name in ENVIRONMENT_HOSTS
    )
    example = f"{next(iter(HOSTS))}/…"
    form = argparse.RawDescriptionHelpFormatter
    epilog = _EPILOG.format(me=me, variables=variables, example=example)
    parser = _Parser(
        prog=me, description=_DESCRIPTION, epilog=epilog, formatter_class=form, allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"requests-llm {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", title="commands")
    for name, (run, about, options) in _COMMANDS.items():
        command = commands.add_parser(
            name,
            help=about,
            description=f"{about[:1].upper()}{about[1:]}.",
            epilog=_ASK_EPILOG.format(me=me) if run is _ask else None,
            formatter_class=form,
            argument_default=argparse.SUPPRESS,  # left out is not None: it takes the config's default
            allow_abbrev=False,
        )
        for add in options:
            add(command)
        command.add_argument(
            "-v", "--verbose", action="store_true", help="show what the client logs"
        )
        command.set_defaults(run=run, parser=command)
    return parser


def _add_words(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "words",
        nargs="*",
        default=[],
        metavar="QUESTION",
        help="what to ask; what is piped in goes before it, or is the question if there is none",
    )


def _add_place(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("which model")
    group.add_argument("-m", "--model", metavar="NAME", help="model, or provider/model")
    group.add_argument("--base-url", metavar="URL", help="where the API is served")
    group.add_argument("--provider", metavar="NAME", help=f"one of {', '.join(HOSTS)}")
    group.add_argument(
        "--local", action="store_true", help="use the built-in stand-in model: no network, no key"
    )
    group.add_argument(
        "--timeout",
        type=_number_or_none,
        metavar="SECONDS",
        help="longest wait for the first and between two pieces of the answer; 'none' for no limit",
    )
    group.add_argument("--dotenv", action="store_true", help="also read the nearest .env file")
    group.add_argument("--env-file", metavar="FILE", help="also read this .env file")


def _add_wishes(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("how to answer")
    group.add_argument("-s", "--system", metavar="TEXT", help="instructions put before everything")
    group.add_argument(
        "-t",
        "--temperature",
        type=_number_or_none,
        metavar="T",
        help="0.0 to 2.0; 'none' for the model's own",
    )
    group.add_argument("--max-tokens", type=int, metavar="N", help="longest answer, in tokens")


def _add_form(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", default=False, help="print JSON")
    _add_plain(parser)


def _add_plain(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--plain",
        action="store_true",
        default=False,
        help="no colour, and Markdown as it is written",
    )


def _add_listening(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    parser.add_argument(
        "--port", type=_port, default=8000, help="port (%(default)s); 0: a free one"
    )
    parser.add_argument(
        "--gguf",
        default=None,
        metavar="FILE",
        help="serve this model with llama.cpp (extra `local`)",
    )
    parser.add_argument(
        "--context", type=int, default=None, help="tokens of a conversation (the model's own)"
    )
    parser.add_argument(
        "--latency", type=float, default=0.0, metavar="SECONDS", help="wait before each answer"
    )
    parser.add_argument(
        "--token-delay", type=float, default=0.0, metavar="SECONDS", help="wait between two tokens"
    )


def _port(text: str) -> int:
    number = int(text)
    if not 0 <= number <= 65535:
        raise argparse.ArgumentTypeError(f"{number} is no port: 0 to 65535")
    return number


def _number_or_none(text: str) -> float | None:
    if text.lower() == "none":
        return None
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor 'none'") from None


# Whom to call.

# Seconds between two tokens of the built-in model when a person looks on: fast, and seen to stream.
_READING_PACE = 0.02
_SETTINGS = ("model", "base_url", "provider", "temperature", "max_tokens", "timeout")


@contextmanager
def _connected(args: argparse.Namespace) -> Iterator[Any]:
    """The client that the arguments describe. An error that leaves the block is explained."""
    from LLM.client import LLM

    with ExitStack() as stack:
        client = stack.enter_context(LLM(_config(args, stack)))
        try:
            yield client
        except LLMConfigError:
            raise
        except LLMError as error:
            raise _Failure(_explain(error, client.config)) from error


def _config(args: argparse.Namespace, stack: ExitStack) -> Any:
    """The settings; with `--local` the server runs until `stack` is closed."""
    from LLM.config import LLMConfig

    given = {name: value for name, value in vars(args).items() if name in _SETTINGS}
    if getattr(args, "local", False):
        server = stack.enter_context(_local_server())
        return LLMConfig(**{"model": server.models[0], **given, "base_url": server.url})
    config = LLMConfig.from_env(_dotenv(args), **given)
    # Nobody said that a server is there: if none is, say so at once.
    return config.replace(max_retries=0) if _is_default_address(config) else config


def _local_server() -> Any:
    from LLM.testing import LocalServer

    return LocalServer(token_delay=_READING_PACE if sys.stdout.isatty() else 0.0)


def _dotenv(args: argparse.Namespace) -> bool | str:
    file: str = getattr(args, "env_file", "")
    return file or getattr(args, "dotenv", False)


def _is_default_address(config: Any) -> bool:
    from LLM.providers.targets import find_target

    return find_target(config).host is COMPATIBLE and not config.is_set("base_url")


def _explain(error: LLMError, config: Any) -> str:
    """An error in one line, with what to do about it where only the command line knows."""
    from LLM.providers.targets import find_target

    text = _one_line(str(error))
    if isinstance(error.__cause__, ConnectionRefusedError) and _is_default_address(config):
        keys = " or ".join(HOSTS[name].key_variables[0] for name in ENVIRONMENT_HOSTS)
        return (
            f"nothing answers at {config.base_url}: start a server there (`{_me()} serve`), "
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
        return f"{text} (`{_me()} models` lists what is there)"
    return text


def _me() -> str:
    """How this program is called from here, also from a virtual environment that is not active."""
    python = Path("python" if shutil.which("python") else "python3")
    if sys.prefix != sys.base_prefix and os.environ.get("VIRTUAL_ENV") != sys.prefix:
        python = Path(sys.executable)
        with suppress(ValueError, OSError):
            python = python.relative_to(Path.cwd())
    return f"{shlex.quote(str(python))} -m LLM"


# One answer.


@dataclass(frozen=True)
class _Answer:
    """An answer that has been shown; `response` is `None` if Ctrl-C stopped it."""

    text: str
    response: Any = None
    first_token: float | None = None  # seconds


def _show_answer(
    client: Any, messages: Sequence[Said], screen: _Screen, *, model: str | None, stoppable: bool
) -> _Answer:
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
        return _Answer("".join(pieces))
    answer = _Answer("".join(pieces), stream.response, stream.time_to_first_token)
    for remark in _remarks(answer):
        screen.note(remark)
    return answer


def _remarks(answer: _Answer) -> Iterator[str]:
    """What a reader must know of an answer that is not plainly complete."""
    finish = answer.response.finish_reason
    if finish == "length":
        yield "(cut: the answer reached the largest number of tokens; see --max-tokens)"
    elif finish == "content_filter":
        yield "(cut: the provider's content filter stopped the answer)"
    elif not answer.text:
        names = ", ".join(call.name for call in answer.response.tool_calls)
        yield f"(no text, but a call of the tool {names})" if names else "(the answer is empty)"


def _as_json(response: Any, indent: int | None = 2) -> str:
    """The whole response, and what the client knows of the call."""
    call = {
        "provider": response.provider,
        "request_id": response.request_id,
        "attempts": response.attempts,
        "latency_ms": response.latency_ms,
    }
    value = {**response.model_dump(), "call": call}
    return json.dumps(value, ensure_ascii=False, indent=indent, default=str)


def _with_system(system: str | None, said: Sequence[Said]) -> list[Said]:
    return [{"role": "system", "content": system}, *said] if system else list(said)


# ask


def _ask(args: argparse.Namespace) -> int:
    messages = _with_system(getattr(args, "system", None), [_user(_question(args))])
    with _connected(args) as client:
        if args.json:
            # Streamed too, so that a long answer has the same time limits in both forms.
            with client.stream(messages) as stream:
                print(_as_json(stream.response))
        else:
            _show_answer(client, messages, _screen(args), model=None, stoppable=False)
    return OK


def _question(args: argparse.Namespace) -> str:
    """The words of the command line, after what is piped in (a long text goes before its question)."""
    piped = "" if sys.stdin.isatty() else sys.stdin.read().strip()
    question = "\n\n".join(filter(None, (piped, " ".join(args.words).strip())))
    if not question:
        args.parser.error(f'nothing to ask; write {_me()} ask "…", or pipe a text in')
    return question


def _user(text: str) -> Said:
    return {"role": "user", "content": text}


# chat


def _chat(args: argparse.Namespace) -> int:
    with _connected(args) as client:
        return _Chat(client, _screen(args), args).run()


_CHAT_COMMANDS = {
    "help": ("", "this list"),
    "reset": ("", "forget the conversation"),
    "retry": ("", "ask the last question again"),
    "system": ("TEXT", "set the system message; 'none' removes it; alone: show it"),
    "model": ("NAME", "ask another model from now on; alone: show it"),
    "models": ("", "list the models of this server"),
    "save": ("FILE", "write the conversation to a file; as JSON if it ends in .json"),
    "quit": ("", "leave; so do /exit and Ctrl-D"),
}
_CHAT_HELP = """\
A line that opens with \"\"\" goes on until one that ends with it. Ctrl-C stops an answer."""


class _Chat:
    """A conversation of several turns, and the commands of the person in it."""

    def __init__(self, client: Any, screen: _Screen, args: argparse.Namespace) -> None:
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
        asked = [*(self._said if before is None else before), _user(question)]
        messages = _with_system(self._system, asked)
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
            with self._client.stream(messages, model=self._model) as stream:
                response = stream.response
            print(_as_json(response, indent=None), flush=True)
            return str(response.text)
        return _show_answer(
            self._client,
            messages,
            self._screen,
            model=self._model,
            stoppable=self._interactive,
        ).text

    def _explained(self, error: LLMError) -> str:
        changes = {} if self._model is None else {"model": self._model}
        return _explain(error, self._client.config.replace(**changes))

    def _obey(self, name: str, rest: str) -> None:
        name = {"exit": "quit", "q": "quit", "bye": "quit", "clear": "reset", "h": "help"}.get(
            name, name
        )
        if name not in _CHAT_COMMANDS:
            near = get_close_matches(name, _CHAT_COMMANDS, n=1)
            hint = f"did you mean /{near[0]}?" if near else "/help lists them"
            self._failed = True
            self._screen.problem(f"there is no command /{name}; {hint}")
            return
        command: Callable[[str], None] = getattr(self, f"_do_{name}")
        command(rest)

    def _do_help(self, _: str) -> None:
        for name, (argument, about) in _CHAT_COMMANDS.items():
            self._screen.note(f"  {f'/{name} {argument}':14}  {about}")
        self._screen.note(_CHAT_HELP)

    def _do_reset(self, _: str) -> None:
        self._said, self._last_question = [], None
        self._screen.note("(a new conversation)")

    def _do_retry(self, _: str) -> None:
        if self._last_question is None:
            self._screen.note("(nothing was asked yet)")
            return
        answered = self._said and self._said[-2] == _user(self._last_question)
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
            path.write_text(_transcript(self._conversation(), path.suffix), encoding="utf-8")
        except OSError as error:
            self._screen.problem(f"{path} cannot be written: {error.strerror or error}")
            return
        self._saved.add(path.resolve())
        count = len(self._said) // 2
        self._screen.note(f"({count} {'turn' if count == 1 else 'turns'} saved in {path})")

    def _do_quit(self, _: str) -> None:
        self._over = True

    def _conversation(self) -> list[Said]:
        return _with_system(self._system, self._said)


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


# models, serve


def _models(args: argparse.Namespace) -> int:
    with _connected(args) as client:
        models = client.list_models()
    if args.json:
        print(_as_json(models))
    else:
        print("\n".join(_clean(model.id) for model in models) or "(the list is empty)")
    return OK


def _serve(args: argparse.Namespace) -> int:
    if args.gguf:
        return _serve_gguf(args)
    from LLM.testing import serve

    serve(args.host, args.port, latency=args.latency, token_delay=args.token_delay)
    return OK


def _serve_gguf(args: argparse.Namespace) -> int:
    from LLM.engine import serve_gguf

    try:
        server = serve_gguf(args.gguf, args.host, args.port, context=args.context)
    except (FileNotFoundError, RuntimeError) as error:
        raise _Failure(str(error)) from None
    print(
        f"Serving {Path(args.gguf).name} at {server.listening_address} (Ctrl-C stops it)",
        flush=True,
    )
    threading.Event().wait()
    return OK


# demo

_DEMO_QUESTIONS = (
    "Hello, my name is Ada. What is 5 x 3?",
    "Now divide that by 3. And what is my name?",
)


def _demo(args: argparse.Namespace) -> int:
    from LLM.client import LLM
    from LLM.testing import LocalServer

    screen = _screen(args)
    screen.say("A talk with a stand-in model, through a server on this machine.", "dim")
    said: list[Said] = []
    with (
        LocalServer(token_delay=_READING_PACE) as server,
        LLM(base_url=server.url, model=server.models[0]) as client,
    ):
        for question in _DEMO_QUESTIONS:
            screen.say(f"\n> {question}", "bold")
            said.append(_user(question))
            answer = _show_answer(client, said, screen, model=None, stoppable=False)
            said.append({"role": "assistant", "content": answer.text})
            screen.say(f"({_measured(answer)})", "dim")
    screen.say(_next_steps())
    return OK


def _measured(answer: _Answer) -> str:
    usage = answer.response.usage
    first = "" if answer.first_token is None else f"first token after {_ms(answer.first_token)}, "
    tokens = (usage.prompt_tokens, usage.completion_tokens) if usage else (None, None)
    read, written = ("?" if count is None else count for count in tokens)
    return f"{first}{read} tokens in, {written} out"


def _ms(seconds: float) -> str:
    milliseconds = seconds * 1000
    return f"{milliseconds:.1f} ms" if milliseconds < 10 else f"{milliseconds:.0f} ms"


def _next_steps() -> str:
    me = _me()
    host = HOSTS[ENVIRONMENT_HOSTS[0]]
    own = next(host.name for host in HOSTS.values() if not host.key_variables)
    steps = [
        (f"{me} chat --local", "talk to the stand-in yourself"),
        (f"{me} chat --model {own}/llama3.2", "talk to a model that runs on this machine"),
        (f"{host.key_variables[0]}=… {me} chat", "talk to a hosted one"),
        (f"{me} doctor", "see what is set up here"),
    ]
    width = max(len(command) for command, _ in steps)
    lines = [f"  {command:{width}}  {about}" for command, about in steps]
    return "\n".join(["\nThat worked. Next:", *lines])


# doctor

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


def _doctor(args: argparse.Namespace) -> int:
    with ExitStack() as stack:
        report = _examine(args, stack)
    if args.json:
        print(json.dumps(report, ensure_ascii=False, indent=2))
    else:
        _show_report(report, _screen(args))
    return FAILED if report["problem"] else OK


def _examine(args: argparse.Namespace, stack: ExitStack) -> dict[str, Any]:
    """All that there is to say, as plain values without a secret."""
    from concurrent.futures import ThreadPoolExecutor

    from LLM.config import Environment

    problem, target = None, None
    env = Environment({})
    with ThreadPoolExecutor(16) as threads:
        try:
            env = Environment.read(_dotenv(args))
            config = _config(args, stack)
            asked = threads.submit(_probe, _probing(config, args))
            target = {**_target(config, args, env), **asdict(asked.result())}
        except LLMConfigError as error:
            problem = _one_line(str(error))
        local = [
            threads.submit(_probe, _probing_local(url, args), url, names)
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
    from LLM.providers.hosts import host_of_model

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


def _probing_local(url: str, args: argparse.Namespace) -> Any:
    from LLM.config import LLMConfig

    # Without a key: who listens on a usual port is not yet known.
    return _probing(LLMConfig(base_url=url, api_key=None), args)


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
    models = tuple(_clean(model.id) for model in answers[-1])
    latency = min(answer.latency_ms or 0.0 for answer in answers)
    listed = "1 model" if len(models) == 1 else f"{len(models)} models"
    return _Probe(url, True, f"{listed}, {latency:.1f} ms", latency, models, names)


def _no_models(error: LLMError, *, keyed: bool) -> tuple[bool, str]:
    """Whether a server is there that did not list its models, and what is the matter."""
    if isinstance(error, LLMAuthenticationError):
        return True, "does not take this key" if keyed else "wants a key"
    if isinstance(error, LLMAPIError):
        return False, f"something else answers: {_one_line(str(error))[:100]}"
    if isinstance(error.__cause__, ConnectionRefusedError):
        return False, "nothing there"
    if isinstance(error, LLMTimeoutError):
        return False, "no answer in time"
    if isinstance(error, LLMConnectionError):
        return False, f"no connection: {_one_line(str(error))[:100]}"
    return False, _one_line(str(error))[:100]


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
            found[host.key_variables[0]]["problem"] = _one_line(str(error))
    return found


def _variables(env: Mapping[str, str]) -> list[str]:
    """Other variables that have a say: their names, as an address may hold a password."""
    ours = {"LLM_BASE_URL", "LLM_MODEL", "MODEL_NAME"}
    ours.update(host.base_url_variable or "" for host in HOSTS.values())
    return sorted(name for name in env if name in ours or _NETWORK.fullmatch(name))


def _show_report(report: Mapping[str, Any], screen: _Screen) -> None:
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
        (server["answers"], _place(server["base_url"]), server["detail"], _usually(server))
        for server in report["servers"]
    ]
    screen.table("Servers on this machine", servers)
    if report["target"] and not report["target"]["answers"]:
        screen.say(f"\nTo try without any: {_me()} chat --local")


def _target_rows(target: Mapping[str, Any]) -> list[tuple[bool | str, ...]]:
    models = target["models"]
    unlisted = models and target["model"] not in models
    return [
        (True, "address", f"{target['base_url']} ({target['chosen_by']})"),
        (True, "provider", target["provider"]),
        (not unlisted, "model", target["model"] + (" (not in its list)" if unlisted else "")),
        (True, "key", "is sent" if target["key"] else "none"),
        (target["answers"], "answers", f"{_yes_no(target['answers'])}: {target['detail']}"),
    ]


def _place(url: str) -> str:
    return urlsplit(url).netloc


def _usually(server: Mapping[str, Any]) -> str:
    return " or ".join(server["names"])


def _yes_no(yes: object) -> str:
    return "yes" if yes else "no"


# What is seen. Answers and results go to stdout, everything else to stderr.


class _View(Protocol):
    """Where one answer appears."""

    def __enter__(self) -> _View: ...
    def __exit__(self, *exc_info: object) -> None: ...
    def think(self) -> None: ...
    def write(self, text: str) -> None: ...


class _Screen:
    """Plain text, for pipes, files and plain terminals."""

    def answer(self) -> _View:
        return _PlainView()

    def say(self, text: str, style: str = "") -> None:  # noqa: ARG002 - for those who can show one
        """A line of the result."""
        print(text, flush=True)

    def note(self, text: str) -> None:
        """A line beside the result."""
        sys.stdout.flush()
        print(_clean(text), file=sys.stderr)

    def problem(self, text: str) -> None:
        sys.stdout.flush()
        _complain(text)

    def table(self, title: str, rows: Sequence[tuple[bool | str, ...]]) -> None:
        """Rows of a mark (whether all is well) and of cells."""
        print(f"\n{title}")
        widths = [max(map(len, map(str, column))) for column in zip(*rows, strict=True)]
        for row in rows:
            cells = zip(row[1:], widths[1:], strict=True)
            print(f"  {'  '.join(f'{cell:{width}}' for cell, width in cells)}".rstrip())


class _PlainView:
    """The text as it comes."""

    def __init__(self) -> None:
        self._terminal = sys.stdout.isatty()
        self._thinking = False
        self._line_open = False

    def __enter__(self) -> _PlainView:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._line_open:
            sys.stdout.write("\n")
        sys.stdout.flush()

    def think(self) -> None:
        if not self._thinking and self._terminal:
            self._thinking = True
            print("(thinking …)", file=sys.stderr)

    def write(self, text: str) -> None:
        # A pipe gets every byte; a terminal would obey some of them.
        sys.stdout.write(_clean(text) if self._terminal else text)
        sys.stdout.flush()
        self._line_open = not text.endswith("\n")


class _RichScreen(_Screen):
    """Colour and Markdown, with rich."""

    def __init__(self) -> None:
        from rich.console import Console

        self._out = Console(highlight=False)
        self._err = Console(stderr=True, highlight=False)

    def answer(self) -> _View:
        return _MarkdownView()

    def say(self, text: str, style: str = "") -> None:
        self._out.print(text, style=style or None, markup=False, emoji=False)

    def note(self, text: str) -> None:
        self._err.print(_clean(text), style="dim", markup=False, emoji=False)

    def problem(self, text: str) -> None:
        from rich.text import Text

        self._err.print(Text.assemble(("error:", "bold red"), " ", _one_line(text)))

    def table(self, title: str, rows: Sequence[tuple[bool | str, ...]]) -> None:
        from rich.padding import Padding
        from rich.table import Table
        from rich.text import Text

        shown = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
        for mark, *cells in rows:
            texts = [Text(str(cell)) for cell in cells]
            texts[1].stylize("green" if mark else "dim")
            shown.add_row(*texts)
        self._out.print(f"\n{title}", style="bold", markup=False)
        if rows:
            self._out.print(Padding(shown, (0, 0, 0, 2), expand=False))


class _MarkdownView:
    """Markdown, a block at a time: finished ones are printed, the one that grows is redrawn.

    Only one thread draws until the end: two would step on each other's lines, and in the main one
    Ctrl-C could come between the lines.
    """

    def __init__(self) -> None:
        from rich.console import Console
        from rich.live import Live
        from rich.spinner import Spinner

        self._console = Console(highlight=False)
        self._spinner = Spinner("dots")
        self._live = Live(self._spinner, console=self._console, transient=True, auto_refresh=False)
        self._new: deque[str] = deque()
        self._growing = ""
        self._printed = False
        self._over = threading.Event()
        self._painter = threading.Thread(target=self._paint, daemon=True)

    def __enter__(self) -> _MarkdownView:
        self._live.start()
        self._painter.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._over.set()
        self._painter.join()
        self._live.stop()
        self._print(self._growing + "".join(self._new))

    def think(self) -> None:
        if not self._spinner.text:
            self._spinner.update(text="thinking …", style="dim")

    def write(self, text: str) -> None:
        self._new.append(_clean(text))

    def _paint(self) -> None:
        """Redraw 12 times a second, and never for more than a fifth of the time."""
        clock = Clock()
        pause = 0.0
        while not self._over.wait(pause):
            begun = clock.now()
            self._redraw()
            pause = max(1 / 12, 4 * (clock.now() - begun))

    def _redraw(self) -> None:
        while self._new:
            self._growing += self._new.popleft()
        finished, self._growing = _split_blocks(self._growing)
        self._print(finished)
        started = self._printed or self._growing
        block = _Block(self._growing, spaced=self._printed, growing=True)
        self._live.update(block if started else self._spinner, refresh=True)

    def _print(self, text: str) -> None:
        if text.strip():
            self._console.print(_Block(text, spaced=self._printed))
            self._printed = True


class _Block:
    """Markdown in lines without blanks at their ends, for those who copy it.

    Args:
        text: what to show.
        spaced: an empty line before it.
        growing: only as much of its end as the terminal has lines for.
    """

    def __init__(self, text: str, *, spaced: bool, growing: bool = False) -> None:
        self._text = text
        self._spaced = spaced
        self._growing = growing

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        from rich.segment import Segment

        # Room for the ^C that the terminal writes: a line break there would spoil the redrawing.
        narrower = options.update(width=max(1, options.max_width - 2))
        lines = console.render_lines(_markdown(self._text), narrower, pad=False)
        for line in lines:
            while line and not line[-1].text.strip():
                line.pop()
            if line:
                line[-1] = Segment(line[-1].text.rstrip(), line[-1].style)
        while lines and not lines[-1]:
            lines.pop()
        while lines and not lines[0]:
            del lines[0]
        if lines and self._spaced:
            lines.insert(0, [])
        for line in lines[-max(1, console.height - 2) :] if self._growing else lines:
            yield from line
            yield Segment.line()


_FENCE = re.compile(r"\s*(`{3,}|~{3,})(.*)")


def _split_blocks(text: str) -> tuple[str, str]:
    """Cut Markdown where a block surely ends: the finished blocks, and what may still go on.

    A block ends at an empty line that is followed by one without indentation, outside of code.
    """
    position = end = 0
    fence = ""
    after_empty = False
    for line in text.splitlines(keepends=True):
        if not fence and after_empty and not line[0].isspace():
            end = position
        marks = _FENCE.match(line)
        if marks and not fence:
            fence = marks[1]
        elif marks and marks[1].startswith(fence) and not marks[2].strip():
            fence = ""
        after_empty = not line.strip()
        position += len(line)
    return text[:end], text[end:]


def _markdown(text: str) -> Any:
    """Markdown as a model means it: tags are text, a line ends where it ends, code is not indented."""
    from markdown_it import MarkdownIt
    from rich.markdown import CodeBlock, Markdown
    from rich.syntax import Syntax

    class Code(CodeBlock):
        def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
            yield Syntax(str(self.text).rstrip(), self.lexer_name, theme=self.theme, word_wrap=True)

    # The theme takes the terminal's own colours.
    shown = Markdown("", hyperlinks=False, code_theme="ansi_dark")
    shown.elements = {**shown.elements, "fence": Code, "code_block": Code}  # type: ignore[misc]  # for this one only
    parser = MarkdownIt("commonmark", {"html": False}).enable("strikethrough").enable("table")
    shown.parsed = parser.parse(text)
    for token in shown.parsed:
        for child in token.children or ():
            if child.type == "softbreak":
                child.type = "hardbreak"
    return shown


def _screen(args: argparse.Namespace) -> _Screen:
    """With rich where it is installed and stdout is a terminal that can show it."""
    able = sys.stdout.isatty() and os.environ.get("TERM", "") != "dumb"
    return _RichScreen() if able and not args.plain and _has_rich() else _Screen()


def _has_rich() -> bool:
    return all(
        find_spec(name) for name in ("rich", "markdown_it")
    )  # before 13 it had another parser


# Control characters, by which a text could command the terminal, but for the line end and the tab.
_CONTROLS = {code: None for code in (*range(32), *range(127, 160)) if code not in (9, 10)}


def _clean(text: str) -> str:
    return text.translate(_CONTROLS)


def _one_line(text: str) -> str:
    return _clean(" ".join(text.split()))


_Options = tuple[Callable[[argparse.ArgumentParser], None], ...]
_COMMANDS: Mapping[str, tuple[Callable[[argparse.Namespace], int], str, _Options]] = {
    "chat": (
        _chat,
        "talk with a model, turn by turn; what is piped in is a turn for each line",
        (_add_place, _add_wishes, _add_form),
    ),
    "ask": (_ask, "get one answer", (_add_words, _add_place, _add_wishes, _add_form)),
    "models": (_models, "list the models that a server offers", (_add_place, _add_form)),
    "serve": (_serve, "run a server here: a stand-in model, or a GGUF file", (_add_listening,)),
    "doctor": (
        _doctor,
        "show what is configured, which keys are set, which servers answer",
        (_add_place, _add_form),
    ),
    "demo": (_demo, "watch a short talk with the stand-in model", (_add_plain,)),
}
