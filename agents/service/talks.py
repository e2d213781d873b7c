"""What answers write into conversations: each write has a name, by which it is known when it comes again."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

from agents.conversation import title_of
from agents.service.leases import Abandoned, Leases
from agents.store import RepeatedError, Store, Stored, StoreError
from agents.types import Message
from LLM import LLMError

log = logging.getLogger("agents.service")


class Checkpoint(NamedTuple):
    """What there is of an answer that is not stored yet, for a process that has to end it for another.

    Attributes:
        text: so far.
        name: of the write that would store it.
        replacing: number of the first message whose place it takes; `None`: none.
    """

    text: str
    name: str
    model: str
    replacing: int | None

    def dump(self) -> str:
        """As text."""
        return json.dumps(self._asdict())


class Talks:
    """The conversations of a store, as answers write to them: under a lease, so that nobody else does."""

    def __init__(self, store: Store, leases: Leases) -> None:
        self._store = store
        self._leases = leases
        self._conversations = store.conversations

    def find(self, conversation: str, name: str) -> int | None:
        """The number of the message that was written under this name."""
        return self._conversations.find_request(conversation, name)

    def load(self, conversation: str) -> list[Stored]:
        """The whole conversation."""
        return list(self._conversations.load(conversation)[1])

    def begin(
        self, conversation: str, token: str, said: Message | None = None, name: str = ""
    ) -> list[Stored]:
        """Take the conversation, and store what the user says, in one transaction.

        Args:
            said: `None`: nothing new.

        Returns:
            The whole conversation.

        Raises:
            BusyError: somebody else has it.
            RepeatedError: what the user says was stored before, and something follows it.
        """

        def work(_: Any) -> list[Stored]:
            left = self._leases.take(conversation, token)
            if left is not None:
                self._mend(left)
            revision, stored = self._conversations.load(conversation)
            if said is None:
                return list(stored)
            number = self.find(conversation, name)
            if number is None:
                new = [Stored(said)]
                _, kept = self._conversations.keep(
                    conversation, new, revision, title=title_of(new), request=name
                )
                return [*stored, *kept]
            # The first time had come through, and the connection was lost before it said so; or it was
            # another process, which is gone.
            if stored and stored[-1].number == number:
                return list(stored)
            raise RepeatedError("it was said before", number=number)

        return self._store.run(work)

    def keep(
        self,
        conversation: str,
        token: str,
        messages: Sequence[Stored],
        *,
        name: str,
        replacing: int | None = None,
        last: bool = False,
        also: Callable[[], object] | None = None,
    ) -> tuple[int, list[Stored]]:
        """Store messages of an answer, once, however often it is tried.

        Args:
            also: what else is written in this transaction, once; `None`: nothing.
            last: they are the last ones: the conversation is free with the same write.

        Returns:
            The revision, and the messages as they stand.
        """

        def work(_: Any) -> tuple[int, list[Stored]]:
            kept = self._kept(conversation, messages, name, replacing, also)
            if last:
                self._leases.release(token)
            return kept

        return self._store.run(work)

    def _kept(
        self,
        conversation: str,
        messages: Sequence[Stored],
        name: str,
        replacing: int | None,
        also: Callable[[], object] | None = None,
    ) -> tuple[int, list[Stored]]:
        found = self.find(conversation, name)
        if found is not None:
            revision, stored = self._conversations.load(conversation)
            there = [s for s in stored if s.number >= found]
            cut = len(there) == 1 and there[0].status == "partial"
            if not cut or messages[0].status == "partial":
                # These went unstored if a part of them, stored by another process, is what is found.
                if also is not None and there and there[0].status == "partial":
                    also()
                return revision, there
            # Another process took this one for gone, and stored as much as it knew of.
            name, replacing = f"{name}:whole", found
        summary = self._conversations.get(conversation)
        if summary is None:
            raise StoreError(f"the conversation {conversation!r} was deleted", reason="missing")
        revision, new = self._conversations.keep(
            conversation, messages, summary.revision, replacing=replacing, request=name
        )
        if also is not None:
            also()
        return revision, list(new)

    def mend_all(self, but: Collection[str] = ()) -> None:
        """Store what answers had come to whose process is gone; what cannot be stored waits.

        Args:
            but: tokens of this process's own answers.
        """
        for left in self._leases.stale(but):
            try:
                self._end(left)
            except LLMError as error:
                log.warning("an answer of a process that is gone cannot be stored yet: %s", error)

    def _end(self, left: Abandoned) -> None:
        def work(_: Any) -> None:
            if self._leases.end(left):
                self._mend(left)

        self._store.run(work)

    def _mend(self, left: Abandoned) -> None:
        if not left.text:
            return
        saved = Checkpoint(**json.loads(left.text))
        if not saved.text or self.find(left.conversation, saved.name) is not None:
            return
        said = Message(role="assistant", content=saved.text)
        partial = Stored(said, model=saved.model, status="partial")
        self._kept(left.conversation, [partial], saved.name, saved.replacing)
        log.warning("an answer of a process that is gone is stored as far as it came")
