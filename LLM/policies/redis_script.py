"""A Lua script on a Redis server: reached in bounded time, and its troubles in words."""

from __future__ import annotations

import pkgutil
from typing import Any, NamedTuple
from urllib.parse import parse_qs, urlsplit

from LLM.errors import LLMConfigError, LLMConnectionError

# Longer than any answer of a Redis that is well; then it counts as away. Seconds.
TIMEOUT = 2.0


class Words(NamedTuple):
    """How errors speak of what the script is for.

    Attributes:
        user: what needs Redis: `rate limit`.
        setting: where its address was given: `redis_url`.
        advice: what else to do while it does not answer, to end a line; or nothing.
    """

    user: str
    setting: str
    advice: str = ""


class RedisScript:
    """One atomic script, sent to one server; threads may share it.

    Args:
        url: `redis://`, `rediss://` or `unix://`, as redis-py takes it.
        file: of the script, beside this module.
        words: how errors speak of it.

    Raises:
        LLMConfigError: the extra is missing, or the address is none.
    """

    def __init__(self, url: str, file: str, words: Words) -> None:
        try:
            import redis
            from redis.backoff import NoBackoff
            from redis.retry import Retry
        except ImportError:
            raise LLMConfigError(
                f"a {words.user} with {words.setting} needs the extra redis: "
                "pip install 'requests-llm[redis]'"
            ) from None
        self.url = url
        self.file = file
        self.words = words
        self.address = _address(url, words.setting)
        # A pooled connection that broke meanwhile is replaced at once; what hangs is not asked again. If
        # an answer is lost, the script runs twice, and must allow for that.
        options = {
            "retry": Retry(NoBackoff(), 1, supported_errors=(redis.ConnectionError,)),
            "socket_timeout": TIMEOUT,
            "socket_connect_timeout": TIMEOUT,
        }
        try:
            client: Any = redis.Redis.from_url(url, decode_responses=True, **options)
            pool = client.connection_pool
            pool.connection_class(**pool.connection_kwargs)  # options of the address, looked at now
        except (ValueError, TypeError):  # its message could repeat the password
            raise _bad_address(self.address, words.setting) from None
        self._hung = redis.TimeoutError
        self._failures = (redis.RedisError, OSError)
        self._denied = (redis.AuthenticationError, redis.exceptions.AuthorizationError)
        self._script: Any = client.register_script(pkgutil.get_data("LLM.policies", file) or b"")

    def run(self, keys: list[str], *arguments: object) -> list[Any]:
        """What the script answers.

        Args:
            keys: all that it touches, of one family: their names differ after the last colon.

        Raises:
            LLMConfigError: the server refuses us, or holds something else under these names.
            LLMConnectionError: it does not answer.
        """
        user, setting, advice = self.words
        try:
            answer: list[Any] = self._script(keys=keys, args=arguments)
        except self._denied:
            raise LLMConfigError(
                f"the {user}'s Redis at {self.address} refuses us: check user and password"
            ) from None
        except self._failures as error:
            if "WRONGTYPE" in str(error):  # it answers, and something else of that name is there
                raise LLMConfigError(
                    f"the {user}'s Redis at {self.address} holds something else under "
                    f"{keys[0].rpartition(':')[0]}:*: give the {user.split()[-1]} another name="
                ) from None
            raise LLMConnectionError(
                f"the {user}'s Redis at {self.address} does not answer ({type(error).__name__}): "
                f"start it, {'or ' if not advice else ''}correct {setting}{advice}"
            ) from error
        return answer

    def hung(self, error: LLMConnectionError) -> bool:
        """Whether it took the connection and said nothing, so that asking takes `TIMEOUT` each time."""
        return isinstance(error.__cause__, self._hung)

    def __reduce__(self) -> tuple[Any, ...]:
        if has_password(self.url):
            raise TypeError(
                f"the address of the {self.words.user}'s Redis holds a password, which is never "
                "pickled: make it anew there"
            )
        return RedisScript, (self.url, self.file, self.words)


def has_password(url: str) -> bool:
    """Whether the address carries one, which nobody else must see."""
    parts = urlsplit(url)
    return bool(parts.password) or "password" in parse_qs(parts.query)


def _address(url: object, setting: str) -> str:
    """The address without user, password and options, for people."""
    try:
        parts = urlsplit(url if isinstance(url, str) else "")
        host = parts.hostname or ""
        port = f":{parts.port}" if parts.port else ""
    except ValueError:
        raise _bad_address("one that cannot be read", setting) from None
    address = f"{parts.scheme}://{host}{port}{parts.path}"
    if parts.scheme not in ("redis", "rediss", "unix") or not (host or parts.path.strip("/")):
        raise _bad_address(address if host else "one that cannot be read", setting)
    return address


def _bad_address(address: str, setting: str) -> LLMConfigError:
    return LLMConfigError(
        f"{setting} must be redis://host:port/number, rediss://… or unix:///path, not {address}"
    )
