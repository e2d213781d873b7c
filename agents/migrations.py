"""The tables of the store, version by version: what each version added, as SQL for both databases.

A version that was released is never changed; what is new gets a version of its own, at the end.
"""

# ruff: noqa: ISC004 - each statement begins a line and ends with a comma

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

# By which SQLite files of ours are known (`PRAGMA application_id`): "LLMs" in ASCII.
APPLICATION_ID: Final = 0x4C4C4D73

# `pg_advisory_xact_lock` takes any number; two that migrate one database must take the same.
MIGRATION_LOCK: Final = 0x4C4C4D73

TABLES: Final = ("conversations", "messages", "runs", "steps")

# What is written differently: {serial} is a number that the database counts up.
_SERIAL: Final = {
    "sqlite": "INTEGER PRIMARY KEY AUTOINCREMENT",
    "postgresql": "BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY",
}

# Times are ISO 8601 in UTC with six decimals, so that their order is that of the text; money is the text
# of a Decimal, for neither database has one that is exact in both. A `token` is new for each write: one
# that is repeated, because the connection was lost before the answer, knows its own work by it.
_FIRST: Final = (
    "CREATE TABLE conversations ("
    " id TEXT PRIMARY KEY, title TEXT, owner TEXT, created TEXT NOT NULL, updated TEXT NOT NULL,"
    " revision BIGINT NOT NULL, parent TEXT, data TEXT NOT NULL, token TEXT NOT NULL)",
    "CREATE INDEX conversations_by_owner ON conversations (owner, updated, id)",
    "CREATE INDEX conversations_by_time ON conversations (updated, id)",
    "CREATE TABLE messages ("
    " id {serial}, conversation TEXT NOT NULL REFERENCES conversations (id) ON DELETE CASCADE,"
    " number BIGINT NOT NULL, message TEXT NOT NULL, usage TEXT, cost TEXT, model TEXT,"
    " status TEXT NOT NULL CHECK (status IN ('ok', 'partial')), created TEXT NOT NULL,"
    " body TEXT NOT NULL, UNIQUE (conversation, number))",
    "CREATE TABLE runs ("
    " id TEXT PRIMARY KEY, agent TEXT NOT NULL, status TEXT NOT NULL, data TEXT NOT NULL,"
    " created TEXT NOT NULL, updated TEXT NOT NULL, token TEXT NOT NULL)",
    "CREATE INDEX runs_by_status ON runs (status, created, id)",
    "CREATE TABLE steps ("
    " run TEXT NOT NULL REFERENCES runs (id) ON DELETE CASCADE, number BIGINT NOT NULL,"
    " kind TEXT NOT NULL, payload TEXT NOT NULL, token TEXT NOT NULL, UNIQUE (run, number))",
)

# Full-text search. Words are taken as they stand ('simple', no diacritics removed), for the language of
# a conversation is not known; so both databases find the same.
_SEARCH: Final = {
    "sqlite": (
        "CREATE VIRTUAL TABLE message_words USING fts5 ("
        " body, content = 'messages', content_rowid = 'id', tokenize = 'unicode61 remove_diacritics 0')",
        "INSERT INTO message_words (message_words) VALUES ('rebuild')",
        "CREATE TRIGGER message_words_added AFTER INSERT ON messages BEGIN"
        " INSERT INTO message_words (rowid, body) VALUES (new.id, new.body); END",
        "CREATE TRIGGER message_words_gone AFTER DELETE ON messages BEGIN"
        " INSERT INTO message_words (message_words, rowid, body)"
        " VALUES ('delete', old.id, old.body); END",
    ),
    "postgresql": (
        "ALTER TABLE messages ADD COLUMN words tsvector"
        " GENERATED ALWAYS AS (to_tsvector('simple', body)) STORED",
        "CREATE INDEX messages_by_words ON messages USING GIN (words)",
    ),
}

# Messages that others took the place of, and those that a request key was kept with; then what the chat
# service keeps. Moments that are compared in SQL (`beat`, `made`) are seconds since 1970.
_SERVICE: Final = (
    "ALTER TABLE messages ADD COLUMN replaced INTEGER NOT NULL DEFAULT 0",
    "ALTER TABLE messages ADD COLUMN request TEXT",
    "CREATE UNIQUE INDEX messages_by_request ON messages (conversation, request)",
    "CREATE TABLE answering ("
    " conversation TEXT PRIMARY KEY REFERENCES conversations (id) ON DELETE CASCADE,"
    " token TEXT NOT NULL UNIQUE, started DOUBLE PRECISION NOT NULL, beat DOUBLE PRECISION NOT NULL,"
    " cancelled INTEGER NOT NULL, body TEXT NOT NULL)",
    "CREATE TABLE keys ("
    " id TEXT PRIMARY KEY, hash TEXT NOT NULL UNIQUE, name TEXT NOT NULL, owner TEXT NOT NULL,"
    " created TEXT NOT NULL, revoked TEXT, used TEXT, data TEXT NOT NULL)",
    "CREATE TABLE budgets ("
    " name TEXT NOT NULL, period TEXT NOT NULL, usd TEXT NOT NULL, tokens BIGINT NOT NULL,"
    " requests BIGINT NOT NULL, uncertain TEXT NOT NULL, PRIMARY KEY (name, period))",
    "CREATE TABLE reservations ("
    " id TEXT PRIMARY KEY, name TEXT NOT NULL, period TEXT NOT NULL, made DOUBLE PRECISION NOT NULL,"
    " usd TEXT NOT NULL, tokens BIGINT NOT NULL, requests BIGINT NOT NULL)",
    "CREATE INDEX reservations_of_budget ON reservations (name, period)",
    "CREATE TABLE spending ("
    " day TEXT NOT NULL, owner TEXT NOT NULL, model TEXT NOT NULL, calls BIGINT NOT NULL,"
    " prompt_tokens BIGINT NOT NULL, completion_tokens BIGINT NOT NULL, cost TEXT NOT NULL,"
    " unpriced BIGINT NOT NULL, interrupted BIGINT NOT NULL, token TEXT NOT NULL,"
    " PRIMARY KEY (day, owner, model))",
)


def migrations(dialect: str) -> Sequence[Sequence[str]]:
    """The statements of each version, the first being version 1."""
    serial = _SERIAL[dialect]
    return (
        [statement.replace("{serial}", serial) for statement in _FIRST],
        _SEARCH[dialect],
        _SERVICE,
    )
