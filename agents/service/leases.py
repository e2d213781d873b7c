"""Who answers in which conversation: one at a time, over all processes, and nobody for ever."""

# ruff: noqa: S608 - only names of columns and conditions of this module are put into SQL

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from agents.store import ConflictError, Store, StoreError, clean, execute
from LLM import Clock

# How often `take` looks again when a lease came or went in the same moment.
_TRIES: Final = 5


class BusyError(ConflictError):
    """An answer is under way in this conversation: wait for it, or cancel it."""

    def __init__(self, message: str = "", **details: Any) -> None:
        super().__init__(message, **{"retriable": True, **details})


@dataclass(frozen=True)
class Abandoned:
    """An answer that nobody works on any more.

    Attributes:
        text: what had come of it.
        token: of the lease; as the request key of the message that is kept, it keeps it once.
    """

    conversation: str
    text: str
    token: str


class Leases:
    """The leases of a store.

    The clocks of the machines that share it must agree to some seconds.

    Args:
        stale_after: seconds without a beat after which a holder counts as gone.
    """

    def __init__(
        self, store: Store, clock: Clock | None = None, *, stale_after: float = 15.0
    ) -> None:
        self._store = store
        self._clock = clock or Clock()
        self._stale_after = stale_after

    def take(self, conversation: str, token: str) -> Abandoned | None:
        """Take the lease of a conversation.

        Args:
            token: new for each answer; names the lease from now on.

        Returns:
            What the holder before left behind, if it is gone; the caller is the only one who gets it.

        Raises:
            BusyError: a holder that is alive has it.
            StoreError: there is no such conversation (`missing`).
        """

        def work(connection: Any) -> Abandoned | None:
            now = self._now()
            values = {"id": conversation, "token": token, "now": now}
            for _ in range(_TRIES):
                if execute(connection, _TAKE, **values).rowcount:
                    return None
                sql = (
                    f"SELECT token, beat, body FROM answering WHERE conversation = :id{self._lock}"
                )
                found = execute(connection, sql, id=conversation).mappings().first()
                if found is not None:
                    break
                sql = "SELECT 1 FROM conversations WHERE id = :id"
                if execute(connection, sql, id=conversation).scalar() is None:
                    raise self._store.error(f"has no conversation {conversation!r}", "missing")
            else:
                raise self._busy(conversation)
            if found["token"] == token:  # the first time had come through
                return None
            if found["beat"] > now - self._stale_after:
                raise self._busy(conversation)
            sql = (
                "UPDATE answering SET token = :token, started = :now, beat = :now, cancelled = 0,"
                " body = '' WHERE conversation = :id"
            )
            execute(connection, sql, **values)
            return Abandoned(conversation, found["body"], found["token"])

        return self._store.run(work)

    def beat(self, texts: Mapping[str, str]) -> set[str]:
        """Say that the holders of these leases are alive, and what they have so far.

        Args:
            texts: by token.

        Returns:
            The tokens of answers that must stop: somebody cancelled them, or the lease is lost.
        """
        if not texts:
            return set()

        def work(connection: Any) -> set[str]:
            sql = "UPDATE answering SET beat = :now, body = :body WHERE token = :token"
            now = self._now()
            for token in sorted(texts):
                execute(connection, sql, token=token, now=now, body=clean(texts[token]))
            rows = execute(connection, "SELECT token FROM answering WHERE cancelled = 0").scalars()
            return set(texts) - set(rows)

        return self._store.run(work)

    def cancel(self, conversation: str) -> bool:
        """Ask the holder to stop, in whichever process it is; `False` if nobody answers there."""
        sql = "UPDATE answering SET cancelled = 1 WHERE conversation = :id AND beat > :stale"
        values = {"id": conversation, "stale": self._stale()}
        return bool(self._store.run(lambda c: execute(c, sql, **values).rowcount))

    def release(self, token: str) -> None:
        """Give a lease back; one that is lost is no error."""
        sql = "DELETE FROM answering WHERE token = :token"
        self._store.run(lambda connection: execute(connection, sql, token=token))

    def running(self, conversations: Iterable[str]) -> set[str]:
        """Those of the conversations in which somebody answers now."""
        sql = "SELECT conversation FROM answering WHERE beat > :stale"
        values = {"stale": self._stale()}
        rows = self._store.run(
            lambda connection: execute(connection, sql, **values).scalars().all(), write=False
        )
        return set(conversations).intersection(rows)

    def stale(self, but: Collection[str] = ()) -> list[Abandoned]:
        """What holders that are gone left behind; `end` takes it away.

        Args:
            but: tokens of holders that are known to live.
        """
        sql = "SELECT conversation, body, token FROM answering WHERE beat <= :stale"
        values = {"stale": self._stale()}
        rows = self._store.run(lambda c: execute(c, sql, **values).all(), write=False)
        return [Abandoned(*row) for row in rows if row.token not in but]

    def end(self, left: Abandoned) -> bool:
        """Take away the lease of a holder that is gone; of many who do so, one gets `True`."""
        sql = "DELETE FROM answering WHERE token = :token AND beat <= :stale"
        values = {"token": left.token, "stale": self._stale()}
        return bool(self._store.run(lambda c: execute(c, sql, **values).rowcount))

    @property
    def _lock(self) -> str:
        """SQLite has one writer at a time, and no such words."""
        return "" if self._store.sqlite else " FOR UPDATE"

    def _now(self) -> float:
        return self._clock.utc().timestamp()

    def _stale(self) -> float:
        return self._now() - self._stale_after

    def _busy(self, conversation: str) -> StoreError:
        return BusyError(
            f"an answer is under way in the conversation {conversation!r}: wait for it, or cancel it"
        )


_TAKE: Final = (
    "INSERT INTO answering (conversation, token, started, beat, cancelled, body)"
    " SELECT id, :token, :now, :now, 0, '' FROM conversations WHERE id = :id"
    " ON CONFLICT (conversation) DO NOTHING"
)
