"""`block_network`: nothing beyond this machine can be reached, and whoever tries is told so."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from LLM.transport import is_loopback

__all__ = ["NetworkBlocked", "block_network"]

_INTERNET = {socket.AF_INET, socket.AF_INET6}
_LOOKUPS = ("getaddrinfo", "gethostbyname", "gethostbyname_ex", "gethostbyaddr")


class NetworkBlocked(BaseException):
    """Something reached beyond this machine.

    Not an `Exception`: what retries or forgives network errors would take it for one of them.
    """


@contextmanager
def block_network() -> Iterator[list[str]]:
    """Let nothing in this process connect to, or look up, anything but this machine.

    Loopback addresses, `localhost` and Unix sockets work as ever; a name under `.invalid` is not
    found, as everywhere. It holds for all threads, for what goes through Python's `socket` module.

    Returns:
        Gives the list of what was reached for; it stays empty if all is well.

    Raises:
        NetworkBlocked: at once where it happens; and at the end of the block, if a thread or an
            `except` below has swallowed it.
    """
    reached: list[str] = []

    def check(host: Any) -> None:
        name = host.decode("ascii", "replace") if isinstance(host, bytes) else host
        if not _is_here(name):
            reached.append(str(name))
            raise NetworkBlocked(_told(reached[-1:]))

    def connecting(real: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(sock: socket.socket, *args: Any) -> Any:
            address = args[-1] if args else None
            if sock.family in _INTERNET and isinstance(address, tuple) and address:
                check(address[0])
            return real(sock, *args)

        return guarded

    def looking_up(real: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(host: Any, *args: Any, **kwargs: Any) -> Any:
            # RFC 6761: a name under .invalid never resolves, so there is nobody to ask.
            if isinstance(host, str) and host.endswith(".invalid"):
                raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
            check(host)
            return real(host, *args, **kwargs)

        return guarded

    with ExitStack() as patches:
        for name in ("connect", "connect_ex", "sendto"):
            guarded = connecting(getattr(socket.socket, name))
            patches.enter_context(mock.patch.object(socket.socket, name, guarded))
        for name in _LOOKUPS:
            patches.enter_context(
                mock.patch.object(socket, name, looking_up(getattr(socket, name)))
            )
        yield reached
    if reached:
        raise NetworkBlocked(_told(reached))


def _is_here(host: str | None) -> bool:
    """Whether a host is this machine; none at all is an address to listen on."""
    return not host or host in {"0.0.0.0", "::"} or is_loopback(host.partition("%")[0])  # noqa: S104 - compared only


def _told(reached: list[str]) -> str:
    hosts = ", ".join(map(repr, reached))
    return f"the network is blocked: reached for {hosts}; only this machine is allowed"
