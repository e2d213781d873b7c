"""The command line of the chat service: `python -m agents serve`, `keys` and `doctor`."""

# What needs an extra is imported where it is used, so that its absence can be told in one line. What is
# handed on between functions is therefore `Any` where it is settings, a store or a server.

from __future__ import annotations

import argparse
import errno
import inspect
import ipaddress
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import webbrowser
from ast import literal_eval
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from decimal import Decimal, InvalidOperation
from difflib import get_close_matches
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, NamedTuple, NoReturn

from LLM import (
    LLM,
    LLMAuthenticationError,
    LLMConfigError,
    LLMConnectionError,
    LLMError,
    LLMTimeoutError,
    __version__,
)

log = logging.getLogger("agents.service")

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130  # exit codes; 130 is a shell's own for Ctrl-C

_PROGRAM: Final = "python -m agents"
_EXTRA: Final = "the chat service needs the extra `server`: pip install 'requests-llm[server]'"


class Failure(Exception):
    """A command failed; the text is for the person who typed it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments after the program's name; left out: the process's.

    Returns:
        The exit code: 0 done, 1 failed, 2 not understood or not usable as configured, 130 Ctrl-C.
    """
    try:
        args = _parse(argv)
        code: int = args.run(args)
        sys.stdout.flush()
    except SystemExit as done:  # argparse, after it has said why
        return done.code if isinstance(done.code, int) else USAGE
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        with suppress(OSError, ValueError):  # nobody reads on: the exit stays silent
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except LLMConfigError as error:
        return _complain(error, USAGE)
    except (Failure, LLMError) as error:
        return _complain(error, FAILED)
    except OSError as error:
        what = f"{error.filename}: " if error.filename else ""
        return _complain(f"{what}{error.strerror or error}", FAILED)
    return code


def _complain(error: object, code: int) -> int:
    print(f"error: {_one_line(str(error))}", file=sys.stderr)
    return code


def _one_line(text: str) -> str:
    return _clean(" ".join(text.split()))


def _clean(text: str) -> str:
    """Without what would steer a terminal."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


# The arguments.

_DESCRIPTION = "A chat service: your models behind a page and an HTTP API, with history and cost."
_EPILOG = """\
All settings can be given as variables (AGENTS_PORT=9000) or in a TOML file (port = 9000) that --config
or AGENTS_CONFIG names. Where the model is, and its key, is found as `python -m LLM doctor` shows.
"""
_SERVE_EPILOG = f"""\
  {_PROGRAM} serve --local                            a stand-in model: no network, no key
  {_PROGRAM} serve --base-url http://127.0.0.1:11434 --model llama3.2
  OPENAI_API_KEY=… {_PROGRAM} serve --model openai/gpt-4o-mini
"""
_KEYS_EPILOG = f"""\
  {_PROGRAM} keys create alice --budget 5 --period month
  {_PROGRAM} keys list
  {_PROGRAM} keys revoke alice
"""


class _Parser(argparse.ArgumentParser):
    """Says what was probably meant."""

    def error(self, message: str) -> NoReturn:
        wrong = re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message)
        if wrong:
            there = re.findall(r"[\w-]+", wrong[2])
            near = get_close_matches(wrong[1], there, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(there)}"
            message = f"there is no {wrong[1]!r}; {hint}"
        self.exit(USAGE, f"error: {_one_line(message)}\nhelp: {self.prog} --help\n")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _parser(_PROGRAM, _DESCRIPTION, _EPILOG)
    parser.add_argument("--version", action="version", version=f"requests-llm {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", title="commands", parser_class=_Parser)

    serve = _command(commands, "serve", _serve, "run the chat service", _SERVE_EPILOG)
    serve.add_argument("--host", help="address to listen on (127.0.0.1)")
    serve.add_argument("--port", type=_port, help="port (8080); 0: a free one")
    serve.add_argument("--workers", type=int, metavar="N", help="processes (1); more: PostgreSQL")
    serve.add_argument("--open", action="store_true", default=False, help="show it in the browser")
    _add_model(serve)
    _add_place(serve)

    about = "make, list and revoke the keys by which callers are let in"
    keys = _command(commands, "keys", None, about, _KEYS_EPILOG)
    actions = keys.add_subparsers(metavar="ACTION", title="actions", parser_class=_Parser)
    create = _command(actions, "create", _create_key, "make a key; it is printed this once")
    create.add_argument("name", metavar="NAME", help="what the key is called")
    create.add_argument("--owner", help="whose conversations it sees (NAME)")
    create.add_argument(
        "--budget", type=_dollars, metavar="USD", help="US dollars it may spend in a period"
    )
    create.add_argument("--period", choices=("day", "month"), help="of the budget (day)")
    create.add_argument(
        "--requests-per-minute",
        type=_whole,
        dest="pace",  # not the setting of this name
        metavar="N",
        help="requests it may make in a minute",
    )
    _add_place(create)
    listing = _command(actions, "list", _list_keys, "show the keys, as far as they are kept")
    _add_json(listing)
    _add_place(listing)
    revoke = _command(actions, "revoke", _revoke_key, "let a key in no more, from now on")
    revoke.add_argument("key", metavar="ID|NAME", help="which one")
    _add_place(revoke)

    about = "show settings, database, model and keys, and what is wrong with them"
    doctor = _command(commands, "doctor", _doctor, about)
    _add_json(doctor)
    _add_model(doctor)
    _add_place(doctor)

    args, rest = parser.parse_known_args(argv)
    if not hasattr(args, "run"):
        (args.parser if hasattr(args, "parser") else parser).print_help(sys.stderr)
        raise SystemExit(USAGE)
    if rest:
        args.parser.error(_unknown(rest[0], args.parser))
    if getattr(args, "local", False) and hasattr(args, "base_url"):
        args.parser.error("--local brings an address of its own; leave out --base-url")
    return args


def _parser(name: str, description: str, epilog: str | None) -> _Parser:
    form = argparse.RawDescriptionHelpFormatter
    return _Parser(
        prog=name,
        description=description,
        epilog=epilog,
        formatter_class=form,
        allow_abbrev=False,
    )


def _command(
    commands: Any,
    name: str,
    run: Callable[[argparse.Namespace], int] | None,
    about: str,
    epilog: str | None = None,
) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name,
        help=about,
        description=f"{about[:1].upper()}{about[1:]}.",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,  # left out is not None: other settings may say it
        allow_abbrev=False,
    )
    command.set_defaults(parser=command, **({"run": run} if run else {}))
    return command


def _add_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("which model")
    group.add_argument("-m", "--model", metavar="NAME", help="model, or provider/model")
    group.add_argument("--base-url", metavar="URL", help="where its API is served")
    group.add_argument(
        "--local",
        action="store_true",
        help="a stand-in that follows fixed rules: no network, no key",
    )


def _add_place(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--database", metavar="URL", help="sqlite:///chat.db or postgresql://user@host/database"
    )
    parser.add_argument("--config", metavar="FILE", help="a TOML file of settings (AGENTS_CONFIG)")


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", default=False, help="print JSON")


def _unknown(word: str, parser: argparse.ArgumentParser) -> str:
    word = word.partition("=")[0]
    if not word.startswith("-"):
        return f"{parser.prog} takes no {word!r}"
    near = get_close_matches(word, re.findall(r"--[a-z-]+", parser.format_help()), n=1)
    hint = f"did you mean {near[0]}?" if near else f"`{parser.prog} --help` lists them"
    return f"there is no option {word}; {hint}"


def _port(text: str) -> int:
    with suppress(ValueError):
        if 0 <= int(text) <= 65535:
            return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is no port: 0 to 65535")


def _whole(text: str) -> int:
    with suppress(ValueError):
        if int(text) > 0:
            return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")


def _dollars(text: str) -> Decimal:
    with suppress(InvalidOperation):
        amount = Decimal(text)
        if amount.is_finite() and amount > 0:
            return amount
    raise argparse.ArgumentTypeError(f"{text!r} is no amount of US dollars above 0")


def _settings(args: argparse.Namespace) -> Any:
    """The settings, with the arguments over them."""
    try:
        from agents.service.settings import Settings
    except ImportError as error:
        raise LLMConfigError(_EXTRA) from error
    given = {name: value for name, value in vars(args).items() if name in Settings.model_fields}
    if given.get("local"):  # whatever the environment says of another model
        given = {"base_url": None, "provider": None, "model": None, "models": (), **given}
    elif "base_url" in given:
        given["local"] = False
    return Settings.load(getattr(args, "config", None), **given)


@contextmanager
def _opened(settings: Any, *, make: bool = True) -> Iterator[Any]:
    """The database; `make`: a SQLite file that is not there is made, else that is a failure."""
    from agents.store import Store

    if not make and _is_missing(settings):
        raise Failure(
            f"there is no database {settings.shown()['database']} yet: name another with --database; "
            "`serve` and `keys create` make one"
        )
    with Store.open(settings.database) as store:
        yield store


def _is_missing(settings: Any) -> bool:
    """Whether the database is a SQLite file that is not there yet."""
    file = settings.database.removeprefix("sqlite:///")
    return settings.is_sqlite and file != settings.database and not Path(file).exists()


# serve

# What the stand-in is said to cost, in US dollars per million tokens, so that costs can be looked at.
_PRETENDED_PRICE: Final = ("0.15", "0.60")
# Seconds between two of its tokens: fast, and seen to stream.
_READING_PACE: Final = 0.02
_LOOK_SECONDS: Final = 1.0  # in which the server of the model should answer
# What the server waits beyond `grace`: answers that are cancelled then tell their end.
_LAST_WORDS: Final = 2.0
_STARTUP_FAILURE: Final = 3  # uvicorn's exit code of a process whose application did not start
_STAND_IN_SECONDS: Final = 5.0  # in which it must have ended

# It ends with its standard input, which is closed by our end, also a sudden one; and being of a session
# of its own it does not hear a terminal's Ctrl-C, so that running answers can come to their end.
_STAND_IN: Final = """
import sys
from LLM.testing import LocalServer
with LocalServer(token_delay=float(sys.argv[1])) as server:
    print(server.url, server.models[0], flush=True)
    sys.stdin.read()
"""


def _serve(args: argparse.Namespace) -> int:
    settings = _settings(args)
    if not all(map(find_spec, ("fastapi", "uvicorn", "prometheus_client"))):
        raise LLMConfigError(_EXTRA)
    from agents.service import logs

    with ExitStack() as stack:
        keys = _check_access(settings)
        listening = stack.enter_context(_listening(settings))
        if settings.local:
            settings = stack.enter_context(_stand_in(settings))
        with LLM(settings.llm_config()) as client:
            model, place = _asked(client)
        logs.configure(settings)
        for name in _unknown_variables(settings):
            log.warning(
                "the variable %s is no setting, and is not read%s", name, _meant(name, settings)
            )
        address = _address(settings.host, listening.getsockname()[1])
        lines = [
            f"chat at {address}  (Ctrl-C stops)",
            f"  model     {model}{_about_model(settings) if settings.local else f' at {place}'}",
            f"  database  {settings.shown()['database']}",
            f"  keys      {'needed' if keys else 'none yet: whoever is on this machine may use it'}",
        ]

        def announce() -> None:
            print("\n".join(map(_clean, lines)), flush=True)
            if args.open:
                threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()
            if not settings.local:
                threading.Thread(target=_try_model, args=(settings,), daemon=True).start()

        if settings.workers > 1:
            return _run_workers(settings, listening, announce, stack)
        return _run_server(settings, listening, announce)


def _check_access(settings: Any) -> bool:
    """Whether keys are needed.

    Raises:
        LLMConfigError: others could reach the service, and there is no key that keeps them out.
    """
    from agents.service.keys import Keys

    with _opened(settings) as store:
        needed = bool(Keys(store).any())
    if not needed and not _is_loopback(settings.host):
        raise LLMConfigError(
            f"other machines can reach {settings.host}, and there is no key yet: make one with "
            f"`{_PROGRAM} keys create NAME`, for the same database, or listen on 127.0.0.1"
        )
    return needed


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@contextmanager
def _listening(settings: Any) -> Iterator[socket.socket]:
    host, port = settings.host, settings.port
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listening = socket.create_server((host, port), family=family, backlog=2048)
        # asyncio sees no TCP in a socket made like this, and would let each first piece wait 40 ms.
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise Failure(
                f"port {port} of {host} is in use: stop the program that uses it, or take another "
                f"one, as with --port {port + 1 if port < 65535 else 8080} (0: a free one)"
            ) from None
        reason = error.strerror or str(error)
        raise Failure(f"cannot listen on {host} port {port}: {reason}") from None
    with listening:
        yield listening


@contextmanager
def _stand_in(settings: Any) -> Iterator[Any]:
    """The settings with which the stand-in model is asked, which runs meanwhile."""
    process = subprocess.Popen(  # noqa: S603 - this Python, and the text above
        [sys.executable, "-c", _STAND_IN, str(_READING_PACE)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        url, _, model = (process.stdout.readline() if process.stdout else "").strip().partition(" ")
        if not model:
            raise Failure("the stand-in model did not start")
        prices: dict[str, Any] = {}
        if settings.price() is None:
            prices = dict(zip(("input_price", "output_price"), _PRETENDED_PRICE, strict=True))
        asked = settings.model or next(iter(settings.models), model)
        yield settings.replace(base_url=url, provider=None, model=asked, **prices)
    finally:
        for pipe in (process.stdin, process.stdout):
            if pipe:
                pipe.close()
        try:
            process.wait(_STAND_IN_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _asked(client: LLM) -> tuple[str, str]:
    """The model that a client asks, as its host names it, and where that is: its repr tells both."""
    found = re.fullmatch(r"LLM\(model=(.+), base_url=(.+)\)", repr(client))
    assert found is not None  # noqa: S101 - so it is documented
    return str(literal_eval(found[1])), str(literal_eval(found[2]))


def _try_model(settings: Any) -> None:
    """Warn if nobody answers where the model should be; the service goes on, for that may change."""
    thread = threading.get_ident()
    # What fails here is told here, once.
    library, quiet = logging.getLogger("LLM"), lambda record: record.thread != thread
    library.addFilter(quiet)
    try:
        with LLM(settings.llm_config().replace(max_retries=0)) as client:
            _, place = _asked(client)
            client.list_models(timeout=_LOOK_SECONDS, deadline=_LOOK_SECONDS)
    except LLMTimeoutError:
        log.warning("the model server %s did not answer within %g s", place, _LOOK_SECONDS)
    except LLMConnectionError as error:
        log.warning("the model server cannot be asked: %s", error)
    except LLMAuthenticationError:
        log.warning("the model server %s refuses the key, or wants one", place)
    except LLMError as error:  # it is there; not each has a list
        log.debug("the model server gives no list of its models: %s", error)
    finally:
        library.removeFilter(quiet)


def _about_model(settings: Any) -> str:
    price = settings.price()
    return (
        "  (a stand-in that follows fixed rules; its price is pretended: "
        f"${price.input} in, ${price.output} out per million tokens)"
    )


def _address(host: str, port: int) -> str:
    everywhere = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - how it is reached from here
    host = everywhere.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _options(settings: Any) -> dict[str, Any]:
    """How uvicorn is run; what it logs is set up by the service."""
    return {
        "log_config": None,
        "access_log": False,
        "server_header": False,
        "ws": "none",
        "lifespan": "on",
        "timeout_graceful_shutdown": settings.grace + _LAST_WORDS,
    }


def _run_server(settings: Any, listening: socket.socket, announce: Callable[[], None]) -> int:
    import uvicorn

    from agents.service.app import create_app
    from agents.service.worker import watch

    app = create_app(settings)

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if self.started:
                announce()

        def handle_exit(self, sig: int, frame: Any) -> None:
            if self.should_exit and sig == signal.SIGINT:  # the second Ctrl-C
                os._exit(INTERRUPTED)
            super().handle_exit(sig, frame)

    # A factory, for it is called when the server has set its handlers of signals.
    server = Server(uvicorn.Config(lambda: watch(app), factory=True, **_options(settings)))

    def interrupt(*_: object) -> None:
        if not server.should_exit:  # before uvicorn listens to signals; after it, it repeats them
            raise KeyboardInterrupt

    for sig in (signal.SIGINT, signal.SIGTERM):
        signal.signal(sig, interrupt)
    try:
        server.run([listening])
    except SystemExit:  # uvicorn's, after it has logged why
        raise Failure("the service could not start; the log says why") from None
    return OK


def _run_workers(
    settings: Any, listening: socket.socket, announce: Callable[[], None], stack: ExitStack
) -> int:
    from uvicorn import Config, Server
    from uvicorn.supervisors import Multiprocess

    from agents.service.app import create_app

    # What a worker cannot start with is found here: uvicorn would begin it again for ever.
    create_app(settings).state.service.close()
    os.environ.update(settings.environment())
    if not os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="agents-metrics-"))
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder
    app = "agents.service.app:from_environment"
    config = Config(app, factory=True, workers=settings.workers, **_options(settings))
    # Earlier versions of uvicorn want to be told what to run.
    older = "target" in inspect.signature(Multiprocess).parameters
    given: dict[str, Any] = {"target": Server(config).run} if older else {}
    supervisor = Multiprocess(config, sockets=[listening], **given)
    announce()  # who connects before a worker is ready waits for it
    supervisor.run()
    if any(process.process.exitcode == _STARTUP_FAILURE for process in supervisor.processes):
        raise Failure("the service could not start; the log says why")
    return OK


# keys


def _create_key(args: argparse.Namespace) -> int:
    from agents.service.core import NOBODY
    from agents.service.keys import Keys

    with _opened(_settings(args)) as store:
        keys = Keys(store)
        left_behind = not keys.any() and bool(store.conversations.list(NOBODY, limit=1))
        key, secret = keys.create(
            args.name,
            owner=getattr(args, "owner", None),
            budget_usd=getattr(args, "budget", None),
            budget_period=getattr(args, "period", "day"),
            requests_per_minute=getattr(args, "pace", None),
        )
    print(secret, flush=True)
    print(
        f"This is the key {key.name!r} of {key.owner!r}, for the service with the database {store.url}. "
        "Keep it now: only a hash of it is stored.\n"
        "It goes into the page when it asks, and into the header `Authorization: Bearer …`.",
        file=sys.stderr,
    )
    if left_behind and key.owner != NOBODY:
        print(
            f"The conversations held so far, without a key, belong to {NOBODY!r}: "
            f"a key made with `--owner {NOBODY}` sees them.",
            file=sys.stderr,
        )
    return OK


def _list_keys(args: argparse.Namespace) -> int:
    from agents.service.keys import Keys

    with _opened(_settings(args), make=False) as store:
        keys = Keys(store).list()
    if args.json:
        print(json.dumps([_key(key) for key in keys], ensure_ascii=False, indent=2))
    elif not keys:
        print(f"There is no key yet; `{_PROGRAM} keys create NAME` makes one.", file=sys.stderr)
    else:
        head = ("id", "name", "owner", "budget", "requests", "created", "last used", "state")
        _print_table([head, *(_row(key) for key in keys)])
    return OK


def _key(key: Any) -> dict[str, Any]:
    times = {name: getattr(key, name) for name in ("created", "used", "revoked")}
    return {
        "id": key.id,
        "name": key.name,
        "owner": key.owner,
        "budget_usd": None if key.budget_usd is None else str(key.budget_usd),
        "budget_period": key.budget_period,
        "requests_per_minute": key.requests_per_minute,
        **{name: at and at.isoformat() for name, at in times.items()},
    }


def _row(key: Any) -> tuple[str, ...]:
    period = f"a {key.budget_period}" if key.budget_period else "in all"
    budget = "" if key.budget_usd is None else f"${key.budget_usd} {period}"
    pace = "" if key.requests_per_minute is None else f"{key.requests_per_minute} a minute"
    return (
        key.id,
        key.name,
        key.owner,
        budget,
        pace,
        f"{key.created:%Y-%m-%d}",
        f"{key.used:%Y-%m-%d %H:%M}" if key.used else "never",
        "revoked" if key.revoked else "valid",
    )


def _revoke_key(args: argparse.Namespace) -> int:
    from agents.service.keys import Keys

    with _opened(_settings(args), make=False) as store:
        key = Keys(store).revoke(args.key)
    print(f"The key {key.name!r} ({key.id}) is revoked.", file=sys.stderr)
    return OK


def _print_table(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (f"{_clean(cell):{width}}" for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())


# doctor

_PROBE_SECONDS: Final = 5.0
# Packages, and what each is for.
_PACKAGES: Final[Mapping[str, str]] = {
    "fastapi": "the service",
    "uvicorn": "the service",
    "sqlalchemy": "the database",
    "psycopg": "PostgreSQL",
    "prometheus-client": "/metrics",
    "genai-prices": "prices of known models",
    "tiktoken": "exact token counts",
    "redis": "one rate limit for all workers",
    "opentelemetry-sdk": "traces",
}


class _Finding(NamedTuple):
    well: bool
    what: str
    facts: Mapping[str, Any] = {}
    wrong: str = "WRONG"  # the word for it, if it is not well


def _doctor(args: argparse.Namespace) -> int:
    report: dict[str, Any] = {"versions": _versions(), "settings": None, "unknown_variables": []}
    try:
        settings = _settings(args)
    except LLMConfigError as error:
        findings = {"settings": _Finding(False, str(error))}
    else:
        report["settings"] = settings.shown()
        report["unknown_variables"] = _unknown_variables(settings)
        findings = {
            **_examine_database(settings),
            "model": _examine_model(settings),
        }
    for name, finding in findings.items():
        told = {"ok": finding.well, "detail": _one_line(finding.what), **finding.facts}
        report["problem" if name == "settings" else name] = told
    wrong = not all(finding.well for finding in findings.values())
    if args.json:
        print(json.dumps({"ok": not wrong, **report}, ensure_ascii=False, indent=2))
    else:
        _show(report, findings)
    return FAILED if wrong else OK


def _versions() -> dict[str, str | None]:
    python = ".".join(map(str, sys.version_info[:3]))
    found: dict[str, str | None] = {"requests-llm": __version__, "python": python}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def _unknown_variables(settings: Any) -> list[str]:
    """Variables that look like settings and are none: probably written wrongly."""
    known = settings.environment()
    return sorted(
        name
        for name in os.environ
        if name.upper().startswith("AGENTS_") and name.upper() not in known
    )


def _meant(name: str, settings: Any) -> str:
    near = get_close_matches(name.upper(), settings.environment(), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _examine_database(settings: Any) -> dict[str, _Finding]:
    """The database, and the keys in it."""
    where = settings.shown()["database"]
    if _is_missing(settings):  # to look must not make one
        return {
            "database": _Finding(True, f"{where} is not there yet: the first start makes it"),
            "keys": _Finding(_is_loopback(settings.host), _about_keys(0, settings)),
        }
    from agents.service.keys import Keys

    try:
        with _opened(settings) as store:
            format_, conversations = store.run(_counted, write=False)
            keys = Keys(store).list()
    except LLMError as error:
        return {"database": _Finding(False, str(error))}
    valid = sum(key.revoked is None for key in keys)
    counted = "1 conversation" if conversations == 1 else f"{conversations:,} conversations"
    facts = {"format": format_, "conversations": conversations}
    return {
        "database": _Finding(True, f"{where}: {counted}, format {format_}", facts),
        "keys": _Finding(
            bool(keys) or _is_loopback(settings.host),
            _about_keys(len(keys), settings, valid),
            {"valid": valid, "revoked": len(keys) - valid},
        ),
    }


def _counted(connection: Any) -> tuple[int, int]:
    newest = connection.exec_driver_sql("SELECT max(version) FROM schema_version").scalar()
    return newest, connection.exec_driver_sql("SELECT count(*) FROM conversations").scalar()


def _about_keys(made: int, settings: Any, valid: int = 0) -> str:
    if made:
        return f"{valid} valid, {made - valid} revoked: callers need one"
    if _is_loopback(settings.host):
        return "none: whoever is on this machine may use the service"
    return f"none, and other machines can reach {settings.host}: `serve` will not start"


def _examine_model(settings: Any) -> _Finding:
    if settings.local:
        return _Finding(True, "the stand-in, which `serve` starts")
    logging.getLogger("LLM").addHandler(logging.NullHandler())  # what failed is told below
    try:
        config = settings.llm_config()
        facts: dict[str, Any] = {"model": config.model}
        with LLM(config.replace(max_retries=0, timeout=_PROBE_SECONDS)) as client:
            asked, place = _asked(client)
            there = [model.id for model in client.list_models()]
    except LLMConfigError as error:
        return _Finding(False, str(error))
    except LLMError as error:
        return _Finding(False, f"{config.model}: {error}", facts)
    listed = "1 model" if len(there) == 1 else f"{len(there)} models"
    told, facts = f"{config.model}: {place} lists {listed}", {**facts, "models": there}
    if {asked, f"{asked}:latest"} & {*there}:  # as Ollama lists what has no tag
        return _Finding(True, told, facts)
    # A server may take names that it does not list.
    near = get_close_matches(asked, there, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return _Finding(False, f"{told}, this one not among them{hint}", facts, wrong="unsure")


def _show(report: Mapping[str, Any], findings: Mapping[str, _Finding]) -> None:
    print(
        f"requests-llm {report['versions']['requests-llm']}, python {report['versions']['python']}"
    )
    if report["settings"]:
        print("\nSettings")
        _print_table([(f"  {k}", _plain(v)) for k, v in report["settings"].items()])
    print("\nPackages")
    found = (
        (f"  {name}", report["versions"][name] or "(none)", f"for {about}")
        for name, about in _PACKAGES.items()
    )
    _print_table(list(found))
    print("\nState")
    _print_table(
        [(f"  {name}", "ok" if at.well else at.wrong, at.what) for name, at in findings.items()]
    )
    for name in report["unknown_variables"]:
        print(f"\nThe variable {name} is no setting; it is not read.")


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)
