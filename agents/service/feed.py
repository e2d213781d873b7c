"""From a thread to the event loop: what an answer's thread says, for whoever reads it over HTTP."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, Generic, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

log = logging.getLogger("agents.service")

T = TypeVar("T")

# Seconds without an event after which a comment is sent: proxies end connections that seem idle, most
# after 60 s.
KEEP_ALIVE: Final = 15.0

# Seconds between two looks for words after the first: an eye does not see them.
BEAT: Final = 0.01

# Seconds that a client may leave what is sent unread.
SEND_SECONDS: Final = 60.0

_COMMENT: Final = b": keep-alive\n\n"


class Pulse:
    """Wakes the readers of many feeds together, each `BEAT` seconds, as long as there are any.

    To wake the loop from a thread is a write to a pipe and a change of threads, which for each word of
    each of many answers costs more than all the rest.
    """

    def __init__(self) -> None:
        self._readers: set[Reader[Any]] = set()
        self._beating = False

    def join(self, reader: Reader[Any]) -> None:
        """Look after this reader; called in the event loop."""
        self._readers.add(reader)
        if not self._beating:
            self._beating = True
            asyncio.get_running_loop().call_later(BEAT, self._beat)

    def leave(self, reader: Reader[Any]) -> None:
        """It does not read any more."""
        self._readers.discard(reader)

    def _beat(self) -> None:
        for reader in list(self._readers):
            reader.look()
        self._beating = bool(self._readers)
        if self._beating:
            asyncio.get_running_loop().call_later(BEAT, self._beat)


class Feed(Generic[T]):
    """What one thread says, in order, for any number of readers on the event loop.

    A reader that comes late gets all of it. When the last one goes away before the end, `on_abandoned` is
    called, in the event loop.

    Args:
        pulse: what wakes readers of things that are not urgent; `None`: all is.

    Attributes:
        items: all that was said so far.
        finished: whether that is all.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        on_abandoned: Callable[[], object],
        pulse: Pulse | None = None,
    ) -> None:
        self.items: list[T] = []
        self.finished = False
        self.pulse = pulse
        self._loop = loop
        self._on_abandoned = on_abandoned
        self._readers: set[Reader[T]] = set()
        self._lock = threading.Lock()
        self._telling = False

    def put(self, item: T, *, urgent: bool = True) -> None:
        """Say something; called by the thread. What is not urgent may wait for the next beat."""
        self.items.append(item)
        if urgent or self.pulse is None:
            self._tell()

    def finish(self) -> None:
        """That was all; called by the thread."""
        self.finished = True
        self._tell()

    def read(self) -> Reader[T]:
        """A reader from the beginning; called in the event loop. To be closed by who reads."""
        reader = Reader(self)
        self._readers.add(reader)
        if self.pulse is not None:
            self.pulse.join(reader)
        return reader

    def _tell(self) -> None:
        # Waking the loop is a write to a pipe: once for all that is said until it wakes.
        with self._lock:
            if self._telling:
                return
            self._telling = True
        try:
            self._loop.call_soon_threadsafe(self._wake)
        except RuntimeError:  # the loop is closed: the service has stopped
            self._telling = False

    def _wake(self) -> None:
        with self._lock:
            self._telling = False
        for reader in self._readers:
            reader.wake()

    def leave(self, reader: Reader[T]) -> None:
        """Nobody reads there any more."""
        self._readers.discard(reader)
        if self.pulse is not None:
            self.pulse.leave(reader)
        if not self._readers and not self.finished:
            self._on_abandoned()


class Reader(Generic[T]):
    """One who reads a `Feed`."""

    def __init__(self, feed: Feed[T]) -> None:
        self._feed = feed
        self._at = 0
        self._gone = False
        self._waiting: asyncio.Future[bool] | None = None

    def gone(self) -> None:
        """The client went away: reading ends."""
        self._gone = True
        self.wake()

    def look(self) -> None:
        """Go on reading, if there is something new."""
        if self._waiting is not None and self._at < len(self._feed.items):
            self.wake()

    def wake(self, *, said: bool = True) -> None:
        """Go on reading; `said`: not because of a long pause."""
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(said)

    async def batches(self) -> AsyncIterator[list[T]]:
        """What is said, all that is there at once; an empty list for each pause of `KEEP_ALIVE` seconds."""
        feed, loop = self._feed, asyncio.get_running_loop()
        while not self._gone:
            # Asked first: what is put before the end must not be missed.
            finished = feed.finished
            new = feed.items[self._at :]
            if new:
                self._at += len(new)
                yield new
                continue
            if finished:
                return
            self._waiting = loop.create_future()
            if feed.finished or self._at < len(feed.items):
                continue
            pause = loop.call_later(KEEP_ALIVE, lambda: self.wake(said=False))
            try:
                said = await self._waiting
            finally:
                pause.cancel()
            if not said:
                yield []

    async def __aiter__(self) -> AsyncIterator[T | None]:
        """The same one by one; `None` for each long pause."""
        async for batch in self.batches():
            for item in batch:
                yield item
            if not batch:
                yield None

    def close(self) -> None:
        """Stop reading."""
        self._feed.leave(self)


async def all_of(feed: Feed[T], receive: Receive) -> list[T]:
    """All that is said; less, if the client goes away before."""
    reader = feed.read()
    watching = asyncio.ensure_future(_watch(receive, reader))
    try:
        async for _ in reader.batches():
            pass
    finally:
        watching.cancel()
        reader.close()
    return feed.items


class FeedResponse(Response):
    """A feed as server-sent events; a client that goes away is noticed at once.

    Args:
        feed: what is sent.
        encode: an item as bytes of the stream.
        headers: beside those of an event stream.
    """

    def __init__(
        self,
        feed: Feed[T],
        encode: Callable[[T], bytes],
        *,
        headers: dict[str, str] | None = None,
        status_code: int = 200,
    ) -> None:
        # nginx would keep the events back in its buffer; others do not know the header.
        named = {"cache-control": "no-store", "x-accel-buffering": "no", **(headers or {})}
        super().__init__(status_code=status_code, headers=named, media_type="text/event-stream")
        del self.headers["content-length"]
        self._feed: Feed[Any] = feed
        self._encode = encode

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 - ASGI's form
        reader = self._feed.read()
        watching = asyncio.ensure_future(_watch(receive, reader))
        slow = _SlowReader()
        try:
            await send(
                {
                    "type": "http.response.start",
                    "status": self.status_code,
                    "headers": self.raw_headers,
                }
            )
            async for batch in reader.batches():
                body = b"".join(map(self._encode, batch)) or _COMMENT
                with slow.bounded():
                    await send({"type": "http.response.body", "body": body, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except asyncio.CancelledError:
            if not slow.cut:
                raise
            log.info("a client did not read for %.0f s: cut", SEND_SECONDS)
        finally:
            slow.close()
            watching.cancel()
            reader.close()


class _SlowReader:
    """Ends the task that made it when a client leaves unread what is sent: its place and memory are freed.

    One timer for the whole response, not one for each event.
    """

    def __init__(self) -> None:
        self.cut = False
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.current_task()
        self._since: float | None = None
        self._timer = self._loop.call_later(SEND_SECONDS, self._look)

    @contextmanager
    def bounded(self) -> Iterator[None]:
        self._since = self._loop.time()
        try:
            yield
        finally:
            self._since = None

    def _look(self) -> None:
        left = SEND_SECONDS
        if self._since is not None:
            left -= self._loop.time() - self._since
        if left <= 0 and self._task is not None:
            self.cut = True
            self._task.cancel()
        else:
            self._timer = self._loop.call_later(left, self._look)

    def close(self) -> None:
        self._timer.cancel()


async def _watch(receive: Receive, reader: Reader[Any]) -> None:
    """Tell the reader when its client goes away."""
    while (await receive())["type"] != "http.disconnect":
        pass
    reader.gone()
