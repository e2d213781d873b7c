"""A request as a command line, to paste into a shell; the key is a variable there."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

# A body as long as this is written over several lines, if that changes nothing but white space.
_PRETTY_BYTES = 4_000
# Linux takes 131,072 bytes for one argument (MAX_ARG_STRLEN); a longer body goes through a pipe.
_ARGUMENT_BYTES = 100_000

# What curl says of the connection itself, and what is true of the one call only: the same
# `Idempotency-Key` again would ask for the same answer again.
_LEFT_OUT = frozenset(
    {
        "accept-encoding",
        "connection",
        "content-length",
        "host",
        "idempotency-key",
        "transfer-encoding",
    }
)
_SECRET = frozenset(
    {"authorization", "proxy-authorization", "x-api-key", "api-key", "x-goog-api-key", "cookie"}
)
_SECRET_IN_URL = re.compile(
    r"(?<=[?&])((?:[\w-]*key|[\w-]*token|sig|signature)=)[^&#]+", re.IGNORECASE
)


def as_curl(
    method: str,
    url: str,
    headers: Mapping[str, str],
    body: bytes | None,
    credential: tuple[str, str] | None,
    variable: str = "API_KEY",
) -> str:
    """A command line for a POSIX shell that sends this request.

    Args:
        method: of HTTP.
        url: whole, with `https://`. A key in its query becomes the variable too.
        headers: those that are about the connection, and `Idempotency-Key`, are left out; the value
            of one that holds a secret, like `Authorization`, becomes the variable.
        body: `None` for none. It arrives as it is here; short JSON may differ in white space.
        credential: the key's header and what stands before the key there (`"Bearer "`, or `""`);
            `None`: no key is sent.
        variable: the shell variable that will hold the key.

    Raises:
        ValueError: `variable` is no name of a shell variable.
    """
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", variable):
        raise ValueError(f"variable: {variable!r} is no name of a shell variable")
    parts = [_url(url, variable)]
    if method != ("GET" if body is None else "POST"):
        parts.append(f"-X {_quote(method)}")
    secret = credential[0].lower() if credential else ""
    if credential:
        parts.append(f"-H {_secret_header(*credential, variable)}")
    for name, value in headers.items():
        if name.lower() in _LEFT_OUT or name.lower() == secret:
            continue
        if name.lower() in _SECRET:
            scheme, space, _ = value.partition(" ")
            parts.append(f"-H {_secret_header(name, scheme + space if space else '', variable)}")
        else:
            # `Name;` is how curl is told to send an empty header; `Name:` would take it out.
            parts.append(f"-H {_quote(f'{name}: {value}' if value else f'{name};')}")
    if body is None:
        return _lines(parts)
    if not any(name.lower() == "content-type" for name in headers):
        parts.append("-H 'Content-Type:'")  # curl would say that it is a form
    text, streams = _readable(body)
    if streams:
        parts.append("--no-buffer")
    if text is None:
        octal = "".join(f"\\{byte:03o}" for byte in body)
        return f"printf '{octal}' | " + _lines([*parts, "--data-binary @-"])
    if len(text.encode()) > _ARGUMENT_BYTES:
        # Not a here-document, which would add a line end; printf is part of the shell, without a limit.
        return f"printf %s {_quote(text)} | " + _lines([*parts, "--data-binary @-"])
    return _lines([*parts, f"--data-raw {_quote(text)}"])  # raw: an `@` at its start is no file


def _lines(parts: list[str]) -> str:
    return "curl " + " \\\n  ".join(parts)


def _quote(text: str) -> str:
    """For the shell, as one word: nothing is special between single quotes but themselves."""
    return "'" + text.replace("'", "'\\''") + "'"


def _secret_header(name: str, prefix: str, variable: str) -> str:
    before = re.sub(r'([\\"$`])', r"\\\1", f"{name}: {prefix}")
    return f'"{before}${variable}"'


def _url(url: str, variable: str) -> str:
    # Single-quoted but for the variable: `'…?key='"$API_KEY"'&x=1'`.
    pieces = _SECRET_IN_URL.split(url)
    for index in range(1, len(pieces), 2):
        pieces[index - 1] += pieces[index]
    word = f'"${variable}"'.join(_quote(piece) for piece in pieces[::2] if piece)
    if len(pieces) > 1 and not pieces[-1]:
        word += f'"${variable}"'
    # Otherwise curl takes brackets and braces for patterns.
    return f"--globoff {word}" if re.search(r"[\[\]{}]", url) else word


def _readable(body: bytes) -> tuple[str | None, bool]:
    """The body as text, `None` if it is none; and whether it asks for a stream."""
    try:
        text = body.decode()
    except UnicodeDecodeError:
        return None, False
    if "\0" in text:
        return None, False
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text, False
    streams = isinstance(value, dict) and value.get("stream") is True
    # Written by another hand, a number like 1.10 would not come back as it was. An interactive bash
    # looks for `!` in each line for itself, without regard to a quote that an earlier line opened.
    if len(body) <= _PRETTY_BYTES and "!" not in text:
        compact = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
        if compact == text:
            return json.dumps(value, ensure_ascii=False, indent=2), streams
    return text, streams
