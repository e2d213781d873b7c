"""Bearer keys: who may use the service, whose conversations they see, and what they may spend."""

# ruff: noqa: S608 - only names of columns and conditions of this module are put into SQL

from __future__ import annotations

import builtins
import hashlib
import hmac
import json
import logging
import secrets
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any, Final, Literal

from agents.store import ConflictError, Store, StoreError, clean, execute
from LLM import Budget, Clock, LLMConfigError

log = logging.getLogger("agents.service")

Period = Literal["day", "month"]

# "llm-", ten digits that name the key, and 256 bits of chance.
_PREFIX: Final = "llm-"
_SECRET_LENGTH: Final = len(_PREFIX) + 10 + 1 + 43

_NAME_LENGTH: Final = 200  # characters

# How exact `used` is; finer would be a write for each request.
_USED_EVERY: Final = timedelta(minutes=1)


@dataclass(frozen=True)
class Key:
    """A key without its secret.

    Attributes:
        id: names it; part of the secret.
        owner: whose conversations it sees.
        created, revoked, used: in UTC, `used` to the minute; `None`: never.
        budget_usd: US dollars that it may spend in each period; `None`: no limit.
        budget_period: `None`: for all time, or no limit.
        requests_per_minute: `None`: no limit.
    """

    id: str
    name: str
    owner: str
    created: datetime
    revoked: datetime | None = None
    used: datetime | None = None
    budget_usd: Decimal | None = None
    budget_period: Period | None = None
    requests_per_minute: int | None = None


class Keys:
    """The keys of a store, of which it knows only what is needed to recognize them (SHA-256)."""

    def __init__(self, store: Store, clock: Clock | None = None) -> None:
        self._store = store
        self._clock = clock or Clock()

    def create(
        self,
        name: str,
        *,
        owner: str | None = None,
        budget_usd: Decimal | float | str | None = None,
        budget_period: Period | None = "day",
        requests_per_minute: int | None = None,
    ) -> tuple[Key, str]:
        """Make a key.

        Args:
            name: what people call it, 1 to 200 characters.
            owner: whose conversations it sees; left out: those of its name, which then must be nobody
                else's.
            budget_usd: US dollars that it may spend in each period; `None`: no limit.
            budget_period: `None`: for all time.
            requests_per_minute: `None`: no limit.

        Returns:
            The key, and its secret, which nobody can tell again.

        Raises:
            ConflictError: there is a key of this name, or for an owner of this name.
            LLMConfigError: one of the arguments cannot be used.
        """
        key_id = secrets.token_hex(5)
        secret = f"{_PREFIX}{key_id}-{secrets.token_urlsafe(32)}"
        limits = _limits(budget_usd, budget_period, requests_per_minute)
        row = {
            "id": key_id,
            "hash": _hash(secret),
            "name": _checked("name", name),
            "owner": _checked("name", name) if owner is None else _checked("owner", owner),
            "created": self._now(),
            "revoked": None,
            "used": None,
            "data": json.dumps(limits),
        }

        def work(connection: Any) -> None:
            if owner is None:
                self._check_free(connection, row)
            sql = (
                f"INSERT INTO keys ({_KEY}, hash) VALUES (:id, :name, :owner, :created, :revoked, :used,"
                " :data, :hash) ON CONFLICT (hash) DO NOTHING"  # the first time had come through
            )
            execute(connection, sql, **row)

        self._store.run(work)
        return _key(row), secret

    def find(self, secret: str) -> Key | None:
        """The key with this secret; `None` if there is none, or if it was revoked."""
        if len(secret) != _SECRET_LENGTH or not secret.startswith(_PREFIX):
            return None
        key_id = clean(secret[len(_PREFIX) :].partition("-")[0])
        rows = self._read(f"SELECT {_KEY}, hash FROM keys WHERE id = :id", id=key_id)
        known = rows[0]["hash"] if rows else ""
        if not hmac.compare_digest(known, _hash(secret)) or rows[0]["revoked"] is not None:
            return None
        key = _key(rows[0])
        if key.used is None or self._clock.utc() - key.used >= _USED_EVERY:
            self._note_use(key)
        return key

    def list(self) -> list[Key]:
        """All keys, revoked ones too, the oldest first."""
        return [_key(row) for row in self._read(f"SELECT {_KEY} FROM keys ORDER BY created, id")]

    def revoke(self, id_or_name: str) -> Key:
        """Make a key worthless for ever; one that is revoked already stays as it is.

        Raises:
            StoreError: there is no such key (`missing`), or several of this name.
        """
        wanted = clean(id_or_name)

        def work(connection: Any) -> Any:
            sql = f"SELECT {_KEY} FROM keys WHERE id = :wanted"
            rows = execute(connection, sql, wanted=wanted).mappings().all()
            if not rows:
                sql = f"SELECT {_KEY} FROM keys WHERE name = :wanted AND revoked IS NULL"
                rows = execute(connection, sql, wanted=wanted).mappings().all()
            if len(rows) != 1:
                return rows
            sql = "UPDATE keys SET revoked = COALESCE(revoked, :now) WHERE id = :id"
            execute(connection, sql, id=rows[0]["id"], now=self._now())
            sql = f"SELECT {_KEY} FROM keys WHERE id = :id"
            return execute(connection, sql, id=rows[0]["id"]).mappings().all()

        rows = self._store.run(work)
        if not rows:
            raise StoreError(f"there is no key {wanted!r:.80}", reason="missing")
        if len(rows) > 1:
            ids = ", ".join(row["id"] for row in rows)
            raise StoreError(f"there are several keys {wanted!r:.80}: give the id, one of {ids}")
        return _key(rows[0])

    def any(self) -> bool:
        """Whether there ever was a key, revoked or not."""
        return bool(self._read("SELECT 1 AS one FROM keys LIMIT 1"))

    def _check_free(self, connection: Any, row: dict[str, Any]) -> None:
        if not self._store.sqlite:  # there every writer waits for the one before
            execute(connection, "LOCK TABLE keys IN SHARE ROW EXCLUSIVE MODE")
        sql = (
            "SELECT id FROM keys WHERE (name = :name OR owner = :name) AND revoked IS NULL"
            " AND hash != :hash LIMIT 1"
        )
        found = execute(connection, sql, name=row["name"], hash=row["hash"]).scalar()
        if found is not None:
            raise ConflictError(
                f"the key {found} has the name or the owner {row['name']!r} already: choose another "
                "name, or say with --owner (in Python: owner=) whose conversations this one sees"
            )

    def _note_use(self, key: Key) -> None:
        sql = "UPDATE keys SET used = :now WHERE id = :id"
        try:
            self._store.run(lambda connection: execute(connection, sql, id=key.id, now=self._now()))
        except StoreError as error:  # no reason to keep anybody out
            log.warning("the use of the key %s was not noted: %s", key.id, error)

    def _now(self) -> str:
        return self._clock.utc().isoformat(timespec="microseconds")

    def _read(self, sql: str, **values: Any) -> builtins.list[Any]:
        return self._store.run(
            lambda connection: execute(connection, sql, **values).mappings().all(), write=False
        )


_KEY: Final = "id, name, owner, created, revoked, used, data"


def _hash(secret: str) -> str:
    # Chance of 256 bits needs no slow hash: there is nothing to guess.
    return hashlib.sha256(secret.encode("utf-8", "replace")).hexdigest()


def _checked(what: str, given: Any) -> str:
    if not isinstance(given, str) or not given.isprintable():
        problem = "text with characters that can be printed"
    elif not given.strip() or len(given) > _NAME_LENGTH:
        problem = f"1 to {_NAME_LENGTH} characters"
    else:
        return given
    raise LLMConfigError(f"{what} of a key is {given!r:.80}; give {problem}")


def _limits(usd: Any, period: Any, requests: Any) -> dict[str, Any]:
    if requests is not None and (type(requests) is not int or requests < 1):
        raise LLMConfigError(
            f"requests_per_minute of a key is {requests!r}; give a whole number above 0, or None"
        )
    if usd is None:
        return {"usd": None, "period": None, "requests": requests}
    budget = Budget(usd, period=period)  # refuses what is none
    return {"usd": str(budget.usd), "period": period, "requests": requests}


def _key(row: Any) -> Key:
    limits = json.loads(row["data"])
    usd = limits["usd"]
    return Key(
        row["id"],
        row["name"],
        row["owner"],
        datetime.fromisoformat(row["created"]),
        _moment(row["revoked"]),
        _moment(row["used"]),
        None if usd is None else Decimal(usd),
        limits["period"],
        limits["requests"],
    )


def _moment(text: str | None) -> datetime | None:
    return None if text is None else datetime.fromisoformat(text)
