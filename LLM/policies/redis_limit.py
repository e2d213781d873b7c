"""The sliding minute of a rate limit in Redis: one for many processes and machines."""

from __future__ import annotations

import pkgutil
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from LLM.errors import LLMConfigError, LLMConnectionError

# Longer than any answer of a Redis that is well; then it counts as away. Seconds.
TIMEOUT = 2.0

MICROSECONDS = 1_000_000


class Taken(NamedTuple):
    """What came of asking for a permit.

    Attributes:
        entry: the name of what was counted; `None` if there is no room yet.
        wait: seconds after which to ask again.
        held: seconds that the scope is held back, for all.
    """

    entry: str | None
    wait: float
    held: float


class RedisWindow:
    """What all that share the limit have taken, and who of them waits. Time is the Redis server's own.

    Args:
        url: `redis://`, `rediss://` or `unix://`, as redis-py takes it.
        name: which limit; its keys are `LLM:ratelimit:{name}:…` and vanish when nobody uses them.
        seconds: how long the minute is.

    Raises:
        LLMConfigError: the extra is missing, or the address is none.
    """

    def __init__(self, url: str, name: str, seconds: float) -> None:
        try:
            import redis
            from redis.backoff import NoBackoff
            from redis.retry import Retry
        except ImportError:
            raise LLMConfigError(
                "a rate limit with redis_url needs the extra redis: pip install 'requests-llm[redis]'"
            ) from None
        self.address = _address(url)
        # A pooled connection that broke meanwhile is replaced at once. If the answer to a `take` is
        # lost, it counts twice: too careful rather than too bold.
        options = {
            "retry": Retry(NoBackoff(), 1),
            "socket_timeout": TIMEOUT,
            "socket_connect_timeout": TIMEOUT,
        }
        try:
            self._redis: Any = redis.Redis.from_url(url, decode_responses=True, **options)
            pool = self._redis.connection_pool
            pool.connection_class(**pool.connection_kwargs)  # options of the address, looked at now
        except (ValueError, TypeError):  # its message could repeat the password
            raise _bad_address(self.address) from None
        self._failures = (redis.RedisError, OSError)
        self._denied = (redis.AuthenticationError, redis.exceptions.AuthorizationError)
        self._keys = [
            f"LLM:ratelimit:{name}:{part}"
            for part in ("entries", "counts", "queue", "tickets", "holds")
        ]
        self._minute = round(seconds * MICROSECONDS)
        source = pkgutil.get_data("LLM.policies", "ratelimit.lua")
        self._script: Any = self._redis.register_script(source or b"")

    def take(
        self, max_requests: int, max_tokens: int, tokens: int, scope: str, ticket: str
    ) -> Taken:
        """Count a request if there is room, also for those who came before; else keep `ticket`'s place.

        Limits of -1 are none. A place is lost after 2 s of silence.
        """
        entry, wait, held = self._run("take", max_requests, max_tokens, tokens, scope, ticket)
        return Taken(entry or None, int(wait) / MICROSECONDS, int(held) / MICROSECONDS)

    def look(self, max_requests: int, max_tokens: int, tokens: int, scope: str) -> float:
        """Seconds that a request would wait now."""
        wait = self._run("look", max_requests, max_tokens, tokens, scope, "")[1]
        return int(wait) / MICROSECONDS

    def leave(self, ticket: str) -> None:
        """Give up a place."""
        self._run("leave", ticket)

    def add(self, tokens: int) -> None:
        """Count tokens without a request."""
        self._run("add", tokens)

    def change(self, entry: str, requests: int, tokens: int) -> None:
        """Correct what was counted; what is older than the minute stays as it was."""
        self._run("change", entry, requests, tokens)

    def hold(self, scope: str, seconds: float) -> None:
        """Hold a scope back, for all."""
        self._run("hold", scope, round(seconds * MICROSECONDS))

    def usage(self) -> tuple[int, int]:
        """Requests and tokens of the last minute."""
        requests, tokens = self._run("usage")
        return int(requests), int(tokens)

    def _run(self, command: str, *arguments: object) -> list[Any]:
        try:
            answer: list[Any] = self._script(
                keys=self._keys, args=[command, self._minute, *arguments]
            )
        except self._denied:
            raise LLMConfigError(
                f"the rate limit's Redis at {self.address} refuses us: check user and password"
            ) from None
        except self._failures as error:
            if "WRONGTYPE" in str(error):  # it answers, and something else of that name is there
                raise LLMConfigError(
                    f"the rate limit's Redis at {self.address} holds something else under "
                    f"{self._keys[0].rpartition(':')[0]}:*: give the limit another name="
                ) from None
            raise LLMConnectionError(
                f"the rate limit's Redis at {self.address} does not answer ({type(error).__name__}): "
                "start it, correct redis_url, or choose if_unavailable='local'"
            ) from error
        return answer


def _address(url: object) -> str:
    """The address without user, password and options, for people."""
    try:
        parts = urlsplit(url if isinstance(url, str) else "")
        host = parts.hostname or ""
        port = f":{parts.port}" if parts.port else ""
    except ValueError:
        raise _bad_address("one that cannot be read") from None
    address = f"{parts.scheme}://{host}{port}{parts.path}"
    if parts.scheme not in ("redis", "rediss", "unix") or not (host or parts.path.strip("/")):
        raise _bad_address(address if host else "one that cannot be read")
    return address


def _bad_address(address: str) -> LLMConfigError:
    return LLMConfigError(
        f"redis_url must be redis://host:port/number, rediss://… or unix:///path, not {address}"
    )
