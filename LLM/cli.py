"""The command line: `python -m LLM chat`, `ask`, `compare`, `models`, `usage` and the others."""

# The client, the server and rich are imported where they are used: `--help` needs none of them. What is
# handed on between functions is therefore `Any` where it is a client, a config or a response.

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

from LLM.commands.batch import batch
from LLM.commands.chat import chat
from LLM.commands.compare import compare
from LLM.commands.demo import DEMOS, demo
from LLM.commands.doctor import doctor
from LLM.commands.shared import (
    FAILED,
    INTERRUPTED,
    OK,
    USAGE,
    Failure,
    as_json,
    connected,
    print_answer,
    program,
    question,
    show_answer,
    user,
    with_system,
)
from LLM.commands.usage import first_day, usage
from LLM.commands.view import clean, complain, one_line, screen_for
from LLM.errors import LLMConfigError, LLMError
from LLM.providers.hosts import ENVIRONMENT_HOSTS, HOSTS
from LLM.version import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments after the program's name; left out: the process's.

    Returns:
        The exit code: 0 done, 1 failed, 2 not understood or not usable as configured, 130 Ctrl-C.
    """
    _open_what_is_closed()
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
        complain(error)
        return USAGE
    except (Failure, LLMError) as error:
        complain(error)
        return FAILED
    except OSError as error:
        what = f"{error.filename}: " if error.filename else ""
        complain(f"{what}{error.strerror or error}")
        return FAILED
    return code


def _open_what_is_closed() -> None:
    """Standard streams that the caller closed (`2>&-`) lead nowhere, and no file gets their number."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            nowhere = Path(os.devnull).open(mode, encoding="utf-8")  # noqa: SIM115 - till the end
            setattr(sys, name, nowhere)


def _discard_output() -> None:
    """Nobody reads on: what is still buffered goes nowhere, and the exit stays silent."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def _narrated(*, verbose: bool) -> Iterator[None]:
    """Say on stderr what is wrong, and why a call takes long; with `verbose`, all that the client logs."""
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
        # A retry is what a waiting person must know of; failures are told by themselves.
        kind, text = str(record.msg), one_line(record.getMessage())
        retrying = record.levelno == logging.DEBUG and kind.startswith("attempt ")
        if record.levelno >= logging.WARNING and not kind.startswith("call failed "):
            print(f"warning: {text}", file=sys.stderr)
        elif self._verbose or (retrying and sys.stderr.isatty()):
            print(f"({text})", file=sys.stderr)


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
        self.exit(USAGE, f"error: {one_line(message)}\nhelp: {self.prog} --help\n")


def _command_hint(typed: str) -> str:
    near = get_close_matches(typed, _COMMANDS, n=1)
    if near:
        return f"did you mean {near[0]!r}?"
    if " " in typed.strip():
        return f'to ask a question: {program()} ask "…"'
    return f"there are {', '.join(_COMMANDS)}"


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = _parser()
    argv = _with_days(argv)
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


def _with_days(argv: Sequence[str]) -> list[str]:
    """`--since -1d` as one word: it is no option, and what is wrong with it should be said."""
    words = list(argv)
    for place, word in enumerate(words[:-1]):
        if word == "--since" and re.match(r"-\d", words[place + 1]):
            words[place : place + 2] = [f"{word}={words[place + 1]}"]
            break
    return words


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
    me = program()
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
    _add_address(group)


def _add_places(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("which models")
    group.add_argument(
        "-m",
        "--model",
        dest="models",
        action="append",
        metavar="NAME",
        help="model, or provider/model; once for each",
    )
    _add_address(group)


def _add_address(group: Any) -> None:
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
    _add_env(group)


def _add_env(group: Any) -> None:
    group.add_argument("--dotenv", action="store_true", help="also read the nearest .env file")
    group.add_argument("--env-file", metavar="FILE", help="also read this .env file")


def _add_wishes(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("how to answer")
    group.add_argument("-s", "--system", metavar="TEXT", help="instructions put before everything")
    _add_sampling_to(group)


def _add_sampling_to(group: Any) -> None:
    group.add_argument(
        "-t",
        "--temperature",
        type=_number_or_none,
        metavar="T",
        help="0.0 to 2.0; 'none' for the model's own",
    )
    group.add_argument("--max-tokens", type=int, metavar="N", help="longest answer, in tokens")


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    _add_sampling_to(parser.add_argument_group("how to answer, where a line does not say"))


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


def _add_batch(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "input",
        metavar="FILE",
        help="calls in OpenAI's batch format, a JSON object for each line; - for standard input",
    )
    parser.add_argument(
        "-o",
        "--output",
        default=None,
        metavar="FILE",
        help="where answers go, in OpenAI's format; - for standard output, which cannot be resumed",
    )
    parser.add_argument(
        "--resume", action="store_true", default=False, help="go on with an output that is begun"
    )
    parser.add_argument(
        "--concurrency",
        type=_whole,
        default=16,
        metavar="N",
        help="calls at a time (%(default)s)",
    )
    parser.add_argument(
        "--budget",
        type=_above_zero(float),
        default=None,
        metavar="USD",
        help="stop before more than this is spent",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        default=False,
        help="count items and tokens and price them; send nothing",
    )
    parser.add_argument(
        "--via",
        type=_one_of("calls", "batch"),
        default="calls",
        metavar="HOW",
        help="calls, or batch: the provider's batch API, at its lower price, within a day",
    )
    parser.add_argument(
        "--on-bad-line",
        type=_one_of("skip", "stop"),
        default="skip",
        metavar="WHAT",
        help="what a line that is no call does: skip (it is told and left out) or stop",
    )


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--store",
        default=None,
        metavar="FILE",
        help="where calls were written down: a path, or sqlite:///path (LLM_USAGE_STORE)",
    )
    parser.add_argument(
        "--since",
        type=first_day,
        default=None,
        metavar="DAY",
        help="the first day, 2026-11-01, or the last days, 7d; today is one of them",
    )
    parser.add_argument(
        "--by",
        type=_one_of("day", "model", "both"),
        default="both",
        metavar="WHAT",
        help="a line for each day, model, or both (%(default)s)",
    )
    _add_env(parser)


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "which",
        nargs="?",
        type=_one_of(*DEMOS),
        default=next(iter(DEMOS)),
        metavar="WHICH",
        help="; ".join(f"{name}: {about}" for name, (_, about) in DEMOS.items()),
    )
    group = parser.add_argument_group("budget")
    group.add_argument(
        "--calls", type=_above_zero(int), default=200, metavar="N", help="%(default)s"
    )
    group.add_argument(
        "--seconds",
        type=_above_zero(float),
        default=12.0,
        metavar="S",
        help="about how long it takes (%(default)s)",
    )
    parser.add_argument_group("batch").add_argument(
        "--items", type=_above_zero(int), default=5000, metavar="N", help="%(default)s"
    )


def _one_of(*names: str) -> Callable[[str], str]:
    def checked(text: str) -> str:
        if text not in names:
            near = get_close_matches(text, names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(names)}"
            raise argparse.ArgumentTypeError(f"{text!r} is unknown; {hint}")
        return text

    return checked


def _above_zero(kind: Callable[[str], float]) -> Callable[[str], float]:
    def checked(text: str) -> float:
        with suppress(ValueError):
            number = kind(text)
            if 0 < number < 1e6:
                return number
        raise argparse.ArgumentTypeError(f"{text!r} is no such number above 0")

    return checked


def _whole(text: str) -> int:
    with suppress(ValueError):
        if 1 <= int(text) <= 10_000:
            return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 to 10,000")


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


# ask


def _ask(args: argparse.Namespace) -> int:
    messages = with_system(getattr(args, "system", None), [user(question(args))])
    with connected(args) as client:
        if args.json:
            print_answer(client, messages)
        else:
            show_answer(client, messages, screen_for(args))
    return OK


# models, serve


def _models(args: argparse.Namespace) -> int:
    with connected(args) as client:
        models = client.list_models()
    if args.json:
        print(as_json(models))
    else:
        print("\n".join(clean(model.id) for model in models) or "(the list is empty)")
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
        raise Failure(str(error)) from None
    print(
        f"Serving {Path(args.gguf).name} at {server.listening_address} (Ctrl-C stops it)",
        flush=True,
    )
    threading.Event().wait()
    return OK


_Options = tuple[Callable[[argparse.ArgumentParser], None], ...]
_COMMANDS: Mapping[str, tuple[Callable[[argparse.Namespace], int], str, _Options]] = {
    "chat": (
        chat,
        "talk with a model, turn by turn; what is piped in is a turn for each line",
        (_add_place, _add_wishes, _add_form),
    ),
    "ask": (_ask, "get one answer", (_add_words, _add_place, _add_wishes, _add_form)),
    "compare": (
        compare,
        "ask several models the same, side by side",
        (_add_words, _add_places, _add_wishes, _add_form),
    ),
    "batch": (
        batch,
        "answer a file of calls, several at a time; what is answered survives a crash",
        (_add_batch, _add_place, _add_sampling),
    ),
    "models": (_models, "list the models that a server offers", (_add_place, _add_form)),
    "serve": (_serve, "run a server here: a stand-in model, or a GGUF file", (_add_listening,)),
    "doctor": (
        doctor,
        "show what is configured, which keys are set, which servers answer",
        (_add_place, _add_form),
    ),
    "usage": (usage, "show what was spent, by day and model", (_add_report, _add_form)),
    "demo": (demo, "watch the stand-in model at work, on this machine", (_add_demo, _add_plain)),
}
