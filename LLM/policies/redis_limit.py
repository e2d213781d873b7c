"""The sliding minute of a rate limit in Redis: one for many processes and machines."""

from __future__ import annotations

from typing import Any, NamedTuple

from LLM.policies.redis_script import RedisScript, Words

_WORDS = Words("rate limit", "redis_url", ", or choose if_unavailable='local'")

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
        # If the answer to a `take` is lost, it counts twice: too careful rather than too bold.
        self._script = RedisScript(url, "ratelimit.lua", _WORDS)
        self.address = self._script.address
        self._keys = [
            f"LLM:ratelimit:{name}:{part}"
            for part in ("entries", "counts", "queue", "tickets", "holds")
        ]
        self._minute = round(seconds * MICROSECONDS)

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
        return self._script.run(self._keys, command, self._minute, *arguments)
