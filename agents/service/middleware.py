"""What holds for every request: its id, its size, where it may come from, what its answer may load."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable, Iterable, MutableMapping
from typing import Final

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from agents.service.logs import request_id
from agents.service.problems import Problem
from LLM import Clock

log = logging.getLogger("agents.service")

# Seconds in which a body must have come: longer is a client that holds a place on purpose.
BODY_SECONDS: Final = 60.0

LOOPBACK: Final = frozenset({"127.0.0.1", "localhost", "::1", "[::1]"})

_GIVEN_ID: Final = re.compile(r"[\w.-]{1,64}", re.ASCII)

# Nothing but what the service itself serves is loaded, and no text becomes HTML or a script, also by an
# error in the page.
CONTENT_SECURITY_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
_HEADERS: Final = (
    (b"content-security-policy", CONTENT_SECURITY_POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"permissions-policy", b"camera=(), geolocation=(), microphone=()"),
)


class Guard:
    """The outermost layer of the application.

    Args:
        app: what it guards.
        max_body_bytes: longest body of a request.
        hosts: host names that a request may be for, besides loopback; `None`: any. A page of another site
            can make a browser ask a name of its own that leads to this machine ("DNS rebinding").
        observe: called with method, route, status and seconds of each request.
        tell: makes the answer of what is refused here.
        clock: tells the time and makes the ids.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        max_body_bytes: int,
        hosts: Iterable[str] | None,
        observe: Callable[[str, str, int, float], object],
        tell: Callable[[Request, Problem], Response],
        clock: Clock,
    ) -> None:
        self._app = app
        self._most = max_body_bytes
        self._hosts = None if hosts is None else LOOPBACK | {host.lower() for host in hosts}
        self._observe = observe
        self._tell = tell
        self._clock = clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        given = headers.get(b"x-request-id", "")
        name = given if _GIVEN_ID.fullmatch(given) else self._clock.new_id()
        token = request_id.set(name)
        started, status = self._clock.now(), 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                named = {key.lower() for key, _ in message["headers"]}
                more = [pair for pair in _HEADERS if pair[0] not in named]
                if b"cache-control" not in named:
                    more.append((b"cache-control", b"no-store"))
                message["headers"] = [
                    *message["headers"],
                    *more,
                    (b"x-request-id", name.encode()),
                ]
            await send(message)

        try:
            try:
                self._check(scope, headers)
                await self._app(scope, _Body(receive, self._most), answer)
            except Problem as problem:
                if status:
                    raise
                await self._tell(Request(scope), problem)(scope, receive, answer)
            except Exception:
                log.exception("%s %s failed", scope["method"], scope["path"])
                if status:  # half an answer: only breaking the connection says so
                    raise
                broken = Problem(500, "Internal error", "tell those who run this service")
                await self._tell(Request(scope), broken)(scope, receive, answer)
        finally:
            seconds = self._clock.now() - started
            route = getattr(scope.get("route"), "path", "other")
            self._observe(scope["method"], route, status, seconds)
            log.info(
                "%s %s %s",
                scope["method"],
                scope["path"],
                status or "no answer",
                extra={
                    "method": scope["method"],
                    "route": route,
                    "status": status,
                    "seconds": round(seconds, 6),
                    "owner": scope.get("state", {}).get("owner"),
                },
            )
            request_id.reset(token)

    def _check(self, scope: Scope, headers: MutableMapping[bytes, str]) -> None:
        """Refuse what a page of another site makes a browser send."""
        host = headers.get(b"host", "").lower()
        if self._hosts is not None and _without_port(host) not in self._hosts:
            raise Problem(
                421,
                "Not for this host",
                "the Host header names no host that this service answers to: see public_hosts",
            )
        origin = headers.get(b"origin")
        foreign = origin is not None and origin.lower().partition("://")[2] != host
        if foreign or headers.get(b"sec-fetch-site") in ("cross-site", "same-site"):
            # A link to the page may be followed from anywhere; it shows nothing of its own accord.
            if scope["method"] in ("GET", "HEAD") and headers.get(b"sec-fetch-mode") == "navigate":
                return
            raise Problem(403, "From another site", "this service answers to its own page alone")
        length = headers.get(b"content-length", "0")
        if not (length.isascii() and length.isdigit()):
            raise Problem(400, "Malformed request", "content-length is no number")
        if int(length) > self._most:
            raise _too_large(self._most)


class _Body:
    """`receive`, which stops a body that is too long or too slow."""

    def __init__(self, receive: Receive, most: int) -> None:
        self._receive = receive
        self._most = most
        self._got = 0
        self._whole = False
        self._until = asyncio.get_running_loop().time() + BODY_SECONDS

    async def __call__(self) -> Message:
        if self._whole:
            return await self._receive()
        try:
            left = self._until - asyncio.get_running_loop().time()
            message = await asyncio.wait_for(self._receive(), left)
        except asyncio.TimeoutError:
            detail = f"the body did not come within {BODY_SECONDS:.0f} s"
            raise Problem(408, "Too slow", detail) from None
        if message["type"] == "http.request":
            self._got += len(message.get("body", b""))
            if self._got > self._most:
                raise _too_large(self._most)
            self._whole = not message.get("more_body", False)
        return message


def _too_large(most: int) -> Problem:
    return Problem(413, "Too large", f"the body is longer than {most:,} bytes: send less")


def _without_port(host: str) -> str:
    return re.sub(r":\d+$", "", host)
