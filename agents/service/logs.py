"""The service's log: one line for each thing that happens, with the id of the request it belongs to.

What was said is never in it, and neither is a key: an exception is told by where it happened and what it
is, and its text only if it is of a kind that quotes no data. A model server's words may quote the request.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from datetime import datetime, timezone
from typing import Any, Final, TextIO

from agents.service.settings import Settings
from LLM import LLMAPIError, LLMError, LLMOutputError

# The id of the request that is being answered; a thread of its own needs a copy of the context.
request_id: ContextVar[str | None] = ContextVar("request_id", default=None)

_OURS: Final = ("agents", "LLM", "uvicorn")
_STANDARD: Final = frozenset(
    {*vars(logging.makeLogRecord({})), "message", "asctime", "taskName", "color_message"}
)
_KEYS: Final = re.compile(
    r"(?P<kind>\bllm-\w+-|\bsk-|\b(?:bearer|basic)\s+)[\w.~+/=-]{16,}", re.IGNORECASE
)
# Their texts speak of the program; those of others, like pydantic's, quote what they were given.
_TELLING: Final = (
    LLMError,
    OSError,
    TypeError,
    LookupError,
    AttributeError,
    NameError,
    ImportError,
    RuntimeError,
)
# Of these the server of the model, or the model itself, chose the words.
_WORDED: Final = (LLMAPIError, LLMOutputError)
# What a request's line says in words already.
_IN_THE_MESSAGE: Final = frozenset({"method", "route", "status"})
_MOST: Final = 10_000  # characters of one value: a line stays one that a collector takes


def configure(settings: Settings, stream: TextIO | None = None) -> None:
    """Send what the service, the library and uvicorn log to one place, in one form.

    Other libraries are heard from WARNING on: below, they may quote what they handle. Called again, it
    replaces what it did before.

    Args:
        settings: `log_format` and `log_level` count.
        stream: where it goes; left out, stderr.
    """
    handler = _Handler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter() if settings.log_format == "json" else TextFormatter())
    handler.addFilter(_is_news)
    root, level = logging.getLogger(), settings.log_level.upper()
    for old in [old for old in root.handlers if isinstance(old, _Handler)]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(max(logging.WARNING, logging.getLevelName(level)))
    for name in _OURS:
        logging.getLogger(name).setLevel(level)
    # uvicorn's own handlers, if its defaults were set up before us.
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
    # It shows whole addresses, and with them what was searched for; the service logs requests itself.
    logging.getLogger("uvicorn.access").propagate = False


class JsonFormatter(logging.Formatter):
    """An object on one line: time, level, logger, message, request_id, and what else was given."""

    def format(self, record: logging.LogRecord) -> str:
        """One line, without a line break."""
        line: dict[str, Any] = {
            "time": _time(record).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": _message(record),
            "request_id": request_id.get(),
        }
        line.update((name, _plain(value)) for name, value in _extras(record) if name not in line)
        if record.exc_info and record.exc_info[1] is not None:
            line["exception"] = _safe(told(record.exc_info[1]))
        return json.dumps(line, ensure_ascii=False)


class TextFormatter(logging.Formatter):
    """A line for people; an exception follows it, indented."""

    def format(self, record: logging.LogRecord) -> str:
        """One line, and more only for an exception."""
        message = _message(record)
        extras = "".join(
            f" {name}={_plain(value)}"
            for name, value in _extras(record)
            if name not in _IN_THE_MESSAGE
        )
        request = request_id.get()
        line = (
            f"{_time(record):%Y-%m-%d %H:%M:%S.%f}"[:-3]
            + f" {record.levelname:7} {record.name}: {_one_line(message + extras)}"
            + (f" request_id={request}" if request else "")
        )
        if record.exc_info and record.exc_info[1] is not None:
            line += "\n" + "\n".join(
                f"    {row}" for row in _safe(told(record.exc_info[1])).split("\n")
            )
        return line


def told(error: BaseException) -> str:
    """An exception and what led to it: where it happened, and what it is."""
    parts: list[str] = []
    for each, link in _chain(error):
        frames = "".join(traceback.format_tb(each.__traceback__)).rstrip()
        text = _words(each)
        what = type(each).__qualname__ + (f": {text}" if text else "")
        parts.append("\n".join(filter(None, (link, frames, what))))
    return "\n".join(parts)


def _words(error: BaseException) -> str:
    """What an exception says, without what it may quote; empty: nothing that could be told."""
    if not isinstance(error, _TELLING):
        return ""
    text = str(error)
    for each, _ in _chain(error):
        if isinstance(each, _WORDED) and (each is error or str(each) in text):
            status = getattr(each, "status_code", None)
            place = each.provider or "the model"
            return f"{place} answered {status or 'with an error'}; its words are not logged"
    return text


def _message(record: logging.LogRecord) -> str:
    """What is logged, with exceptions among the arguments as they are told."""
    args: Any = record.args
    if isinstance(args, Mapping):
        args = {name: _shown(value) for name, value in args.items()}
    elif args:
        args = tuple(map(_shown, args))
    text = str(_shown(record.msg))
    return _safe(text % args if args else text)


def _shown(value: Any) -> Any:
    if not isinstance(value, BaseException):
        return value
    text = _words(value)
    # The kind first, where nothing else would tell it.
    return text if text == str(value) else ": ".join(filter(None, (type(value).__qualname__, text)))


def _chain(error: BaseException) -> Iterator[tuple[BaseException, str]]:
    """An exception, after what it came from, and those of a group; each with how it is linked."""
    seen: set[int] = set()
    waiting: list[tuple[BaseException, str]] = [(error, "")]
    found: list[tuple[BaseException, str]] = []
    while waiting:
        each, link = waiting.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        found.append((each, link))
        if each.__cause__ is not None:
            waiting.append((each.__cause__, "which led to"))
        elif each.__context__ is not None and not each.__suppress_context__:
            waiting.append((each.__context__, "and while that was handled"))
        # An ExceptionGroup, which Python 3.10 does not know.
        waiting.extend((part, "as part of") for part in getattr(each, "exceptions", ()))
    links = ["", *(link for _, link in reversed(found) if link)]
    return zip((each for each, _ in reversed(found)), links, strict=True)


class _Handler(logging.StreamHandler):  # type: ignore[type-arg]  # Python 3.10 takes none
    """Known by its class, so that it can be replaced."""


def _is_news(record: logging.LogRecord) -> bool:
    """Not the traceback of a request that a stop cut, as uvicorn has said before."""
    return not (record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError))


def _extras(record: logging.LogRecord) -> Iterator[tuple[str, Any]]:
    return (
        (name, value)
        for name, value in vars(record).items()
        if name not in _STANDARD and not name.startswith("_") and value is not None
    )


def _plain(value: Any) -> Any:
    """A value that JSON has."""
    return value if isinstance(value, (bool, int, float)) else _safe(str(_shown(value)))


def _safe(text: str) -> str:
    cut = text if len(text) <= _MOST else text[:_MOST] + "…"
    return _KEYS.sub(lambda found: found["kind"] + "***", cut)


def _one_line(text: str) -> str:
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _time(record: logging.LogRecord) -> datetime:
    return datetime.fromtimestamp(record.created, timezone.utc)
