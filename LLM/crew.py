"""Threads that work for coroutines: what blocks runs in one of them, and its outcome is awaited.

Handing work over is what costs, so it is done with little: a thread that has just become free is the
first to be used again (its memory is warm, and those that are not needed end by themselves), and all
that was finished meanwhile is told to the event loop at once.
"""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from contextvars import Context, copy_context
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

from LLM.cancel import CancelScope
from LLM.errors import LLMCancelledError, LLMConfigError, LLMError
from LLM.forks import renew_after_fork
from LLM.reaper import REAPER

T = TypeVar("T")

Loop = asyncio.AbstractEventLoop

# A thread without work ends after this time, in seconds.
IDLE = 5.0
# How long a cancelled await waits for its thread to have tidied up (its budget settled, its connection
# closed), in seconds: that takes less than a millisecond, unless a hook or a full disk holds it up.
GRACE = 0.05
# How long `close` waits for threads that a hook or a full disk holds up, in seconds.
LEAVE = 1.0
# Items of an iterator that are read before they are asked for.
AHEAD = 64


def running_loop() -> Loop:
    """The event loop that this runs in.

    Raises:
        LLMConfigError: there is none.
    """
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        raise LLMConfigError(
            "there is no running asyncio event loop: await this in a coroutine of asyncio.run(…); "
            "in other code, and under trio, use LLM itself, in threads"
        ) from None


class _Work(Protocol):
    """What a thread of the crew does, and what can be done with it meanwhile.

    Attributes:
        scope: what cancels it.
        begun: it goes on with something: it comes before what is new.
        urgent: it takes no time and must not wait: it gets a thread beyond the limit.
    """

    scope: CancelScope
    begun: bool
    urgent: bool

    def do(self) -> None:
        """Do it, in a thread; never raises."""

    def drop(self) -> None:
        """It will not be done."""


class _Arrival(Protocol):
    def arrive(self) -> None:
        """Tell those who wait; in their loop."""


class _Arrivals:
    """What threads have for one event loop; many things go over with one call."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._arrived: deque[_Arrival] = deque()
        self._told = False

    def put(self, arrival: _Arrival) -> None:
        self._arrived.append(arrival)
        if self._told:  # and has not looked yet: it will find this one too
            return
        self._told = True
        try:
            self._loop.call_soon_threadsafe(self._hand_over)
        except RuntimeError:  # the loop is closed: nobody waits any more
            self._told = False
            self._arrived.clear()

    def _hand_over(self) -> None:
        self._told = False
        while self._arrived:
            self._arrived.popleft().arrive()


class _Hand:
    """A thread of the crew. It sleeps on the lock, which is held until there is work."""

    __slots__ = ("called", "work")

    def __init__(self, work: _Work | None) -> None:
        self.work = work
        self.called = threading.Lock()
        self.called.acquire()


class Crew:
    """At most `most` threads, begun when they are needed and ended when they are not.

    Args:
        most: threads at a time; what comes above waits, first come, first served.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.closed = False
        self.after_fork()
        renew_after_fork(self)

    def after_fork(self) -> None:
        """In a child: its threads, and what they did, are the parent's."""
        self._lock = threading.Lock()
        self._idle: list[_Hand] = []
        self._waiting: OrderedDict[_Work, None] = OrderedDict()
        self._at_work: set[_Work] = set()
        self._arrivals: dict[Loop, _Arrivals] = {}
        self._readings: weakref.WeakSet[Reading[Any, Any]] = weakref.WeakSet()
        self.size = 0

    async def run(self, work: Callable[[], T], *, seconds: float | None = None) -> T:
        """What `work` returns or raises, in a thread, with the caller's context.

        Cancelled, it cancels the scope that `work` runs in, and ends when that has ended it, or, if that
        takes longer than `GRACE`, before.

        Args:
            seconds: `work` is begun by then, whatever else there is to do: it ends itself when it is late.
        """
        loop = running_loop()
        REAPER.begin()
        call = _Call(work, loop, self.arrivals(loop))
        late = None
        if not self.start(call) and seconds is not None:
            late = loop.call_later(seconds, self.hurry, call)
        try:
            return await call.future
        except asyncio.CancelledError:
            call.scope.cancel()
            if self.withdraw(call):
                call.scope.leave()
            else:
                await call.ended(GRACE)
            raise
        except GeneratorExit:  # its task was dropped, or the loop closed: this is a finalizer
            REAPER.take(partial(self._abandon, call))
            raise
        finally:
            if late is not None:
                late.cancel()
            del call  # it holds what is raised, whose traceback holds this frame

    async def run_apart(self, work: Callable[[], T]) -> T:
        """The same in a thread of its own, also when the crew is closed."""
        loop = running_loop()
        call = _Call(work, loop, self.arrivals(loop))
        threading.Thread(target=call.do, name="LLM-async", daemon=True).start()
        return await call.future

    def arrivals(self, loop: Loop) -> _Arrivals:
        found = self._arrivals.get(loop)
        if found is None:
            with self._lock:
                for old in [old for old in self._arrivals if old.is_closed()]:
                    del self._arrivals[old]
                found = self._arrivals.setdefault(loop, _Arrivals(loop))
        return found

    def start(self, work: _Work) -> bool:
        """Have it done. Returns whether a thread does it already.

        Raises:
            LLMConfigError: the crew is closed.
        """
        with self._lock:
            if self.closed:
                raise LLMConfigError("the AsyncLLM is closed; make a new one")
            if self._idle:
                hand = self._idle.pop()
                hand.work = work
                self._at_work.add(work)
                hand.called.release()
                return True
            # One thread beyond the limit does all that is urgent.
            if self.size >= self.most + int(work.urgent):
                self._waiting[work] = None
                if work.begun or work.urgent:
                    self._waiting.move_to_end(work, last=False)
                return False
            self.size += 1
            self._at_work.add(work)
        self._hire(work)
        return True

    def hurry(self, work: _Work) -> None:
        """Have it done now, if it still waits."""
        if not self.withdraw(work):
            return
        work.urgent = True
        try:
            self.start(work)
        except LLMError:  # closed just now
            work.drop()

    def take_care_of(self, reading: Reading[Any, Any]) -> None:
        """Cut it off when the crew is closed."""
        self._readings.add(reading)

    def withdraw(self, work: _Work) -> bool:
        """Take it back. Returns whether it had not begun."""
        with self._lock:
            return self._waiting.pop(work, self) is None

    def close(self) -> None:
        """Cancel everything; the threads end as soon as they have nothing to do."""
        with self._lock:
            self.closed = True
            idle, self._idle = self._idle, []
            self.size -= len(idle)
            waiting = list(self._waiting)
            self._waiting.clear()
            at_work = list(self._at_work)
        for hand in idle:
            hand.called.release()
        for work in at_work:
            work.scope.cancel()
        for work in waiting:
            work.drop()
        for reading in list(self._readings):
            reading.cut()

    async def gone(self) -> None:
        """Wait until the threads of a closed crew have ended, for a second at the most."""
        loop = running_loop()
        end = loop.time() + LEAVE
        while self.size and loop.time() < end:  # noqa: ASYNC110 - threads set no events
            await asyncio.sleep(0.001)

    def _abandon(self, call: _Call[Any]) -> None:
        """End a call that nobody awaits any more."""
        call.scope.cancel()
        if self.withdraw(call):
            call.scope.leave()

    def _hire(self, work: _Work) -> None:
        hand = _Hand(work)
        try:
            threading.Thread(
                target=self._serve, args=(hand,), name="LLM-async", daemon=True
            ).start()
        except RuntimeError as error:  # no more of them: those that are there have to do
            with self._lock:
                self.size -= 1
                self._at_work.discard(work)
                if self.size:
                    self._waiting[work] = None
                    return
            raise LLMError(f"the system does not give a thread: {error}") from None

    def _serve(self, hand: _Hand) -> None:
        work, hand.work = hand.work, None
        while work is not None:
            work.do()
            work, ends = self._next(hand, work)
            if ends:
                return
            if work is None:
                if not self._sleep(hand):
                    return
                work, hand.work = hand.work, None

    def _next(self, hand: _Hand, done: _Work) -> tuple[_Work | None, bool]:
        """What to do after `done`, `None`: sleep until called; and whether to end instead."""
        with self._lock:
            self._at_work.discard(done)
            extra = self.size > self.most
            if self._waiting and (not extra or next(iter(self._waiting)).urgent):
                work, _ = self._waiting.popitem(last=False)
                self._at_work.add(work)
                return work, False
            if extra or self.closed:
                self.size -= 1
                return None, True
            # From now on it may be called, each time once: who is called must wake by that call, and not
            # look whether there is work already, or the call would still be there the next time.
            self._idle.append(hand)
            return None, False

    def _sleep(self, hand: _Hand) -> bool:
        """Wait to be called; not true if nobody did for long, and the thread ends."""
        if hand.called.acquire(timeout=IDLE):
            return True
        with self._lock:
            if hand in self._idle:
                self._idle.remove(hand)
                self.size -= 1
                return False
        hand.called.acquire()  # it was called just now
        return True


class _Call(Generic[T]):
    """A function that a thread calls, and the future of its outcome."""

    __slots__ = (
        "_arrivals", "_context", "_ended", "_error", "_loop", "_over", "_value", "_work", "begun",
        "future", "scope", "urgent",
    )  # fmt: skip

    def __init__(self, work: Callable[[], T], loop: Loop, arrivals: _Arrivals) -> None:
        self.begun = self.urgent = False
        self.future: asyncio.Future[T] = loop.create_future()
        self._work = work
        self._loop = loop
        self._arrivals = arrivals
        self._context = copy_context()
        self.scope = CancelScope(id(asyncio.current_task(loop)))
        self._context.run(self.scope.enter)
        self._ended: asyncio.Future[None] | None = None
        self._over = False
        self._value: Any = None
        self._error: BaseException | None = None

    def do(self) -> None:
        try:
            self._value = self._context.run(self._work)
        except BaseException as error:  # noqa: BLE001 - whatever it is, it is for who awaits
            self._error = error
        self.scope.leave()
        self._arrivals.put(self)
        del self  # an error's traceback holds this frame, and would hold itself

    def drop(self) -> None:
        self._error = LLMCancelledError("the AsyncLLM was closed before the call began")
        self.scope.leave()
        self._arrivals.put(self)

    def arrive(self) -> None:
        error, self._error = self._error, None
        self._over = True
        if self._ended is not None:
            if not self._ended.done():
                self._ended.set_result(None)
        elif self.future.done():  # cancelled, and that is not known to `run` yet
            pass
        elif error is not None:
            self.future.set_exception(error)
        else:
            self.future.set_result(self._value)

    async def ended(self, seconds: float) -> None:
        """Wait until the thread is done with it, at most `seconds`."""
        if not self._over:
            self._ended = self._loop.create_future()
            await asyncio.wait([self._ended], timeout=seconds)


class _Source(Protocol):
    """What is read: an iterator that can be closed."""

    def __iter__(self) -> Iterator[Any]: ...
    def close(self) -> Any: ...


S = TypeVar("S", bound=_Source)


class Reading(Generic[S, T]):
    """An iterator that threads read ahead, for a coroutine that awaits its items.

    A thread reads until it is `ahead` items in front of its reader, and is lent to others then. State
    is changed by one thread at a time, the one that reads, but for `_closing`.

    Args:
        begin: makes the iterator; called in a thread, in the context that this is made in.
        ahead: items read before they are asked for.
        alone: what is done for the items is all done for one caller; else each thread of the iterator's
            own works for itself.
        left: seconds until it ends itself; asked when somebody waits for it first, and then as often as
            it waits for a thread, which it gets by then. `None`: it has no end.

    Attributes:
        source: the iterator, once it has begun.
        scope: what cancels it.
        over: nothing more comes, and all is closed.
    """

    def __init__(
        self,
        crew: Crew,
        begin: Callable[[], S],
        *,
        ahead: int = AHEAD,
        alone: bool = True,
        left: Callable[[], float | None] = lambda: None,
    ) -> None:
        self.scope = CancelScope()
        self.source: S | None = None
        self.over = self.begun = self.urgent = False
        self._crew = crew
        self._begin = begin
        self._ahead = ahead
        self._alone = alone
        self._left = left
        self._queued = False  # it waits for a thread, or did so when it was last looked at
        self._context: Context = copy_context()
        self._loop: Loop | None = None
        self._lock = threading.Lock()
        self._ready: deque[T] = deque()
        self._failure: BaseException | None = None
        self._reading = self._closing = False
        self._cut_off = False  # closed by cancelling who read it, in the middle
        # How often there was news, and who waits for more of it.
        self._news = 0
        self._waiters: list[asyncio.Future[None]] = []
        self._told = False

    async def open(self) -> None:
        """Wait until the iterator is there; raises what that raises."""
        while True:
            news = self._news
            if self.source is not None or self._closing:
                return
            if self.over:
                self._raise()
            self._go_on()
            await self._more_than(news)

    async def next(self) -> T:
        """The next item.

        Raises:
            StopAsyncIteration: there is none.
        """
        while not self._ready:
            news = self._news
            if self._closing:
                if self._cut_off:
                    raise LLMCancelledError(
                        "closed before its end: who waited for its next item was cancelled, perhaps by a "
                        "timeout"
                    )
                raise StopAsyncIteration
            if self._ready:
                break
            if self.over:
                self._raise()
            self._go_on()
            await self._more_than(news)
        item = self._ready.popleft()
        if len(self._ready) <= self._ahead // 2 and not (self._reading or self.over):
            self._go_on()
        return item

    async def close(self) -> None:
        """Stop, and wait until all is closed; again: nothing."""
        self.stop()
        await self._ended(None)

    def stop(self) -> None:
        """Stop: the socket is closed now, the rest is tidied up by a thread. From any thread."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
            begun = self._reading or self.source is not None
            idle = not self._reading
            if not begun:
                self.over = True
        self._ready.clear()
        if not begun or self.over:
            return
        self.scope.cancel()
        if idle:
            self.urgent = True
            self._start()
        else:
            self._crew.hurry(self)  # it may wait for a thread

    def _raise(self) -> None:
        failure, self._failure = self._failure, None
        if failure is None:
            raise StopAsyncIteration
        try:
            raise failure
        finally:
            del failure  # it holds this frame

    def _go_on(self) -> None:
        """Have it read on, if nobody does."""
        if self._reading:
            return
        if self._loop is None:
            self._loop = running_loop()
            self._arrivals = self._crew.arrivals(self._loop)
            self._crew.take_care_of(self)
            if self._alone:
                self.scope.caller = id(asyncio.current_task(self._loop))
                self.scope.thread = threading.current_thread()
            self._left()
            self._context.run(self.scope.enter)
        self._start()

    def _start(self) -> None:
        self._reading = True
        try:
            self._queued = not self._crew.start(self)
        except LLMError:
            if not (self._closing or self.scope.cancelled):
                self._reading = False
                raise
            self.drop()

    def do(self) -> None:
        while True:
            self._context.run(self._read)
            with self._lock:
                if self.over or not self._closing:
                    self._reading = False
                    break
        self._tell()

    def drop(self) -> None:
        self.scope.cancel()
        REAPER.begin()
        REAPER.take(self.do)

    def cut(self) -> None:
        """End it from outside: whoever reads gets `LLMCancelledError` after what has come."""
        with self._lock:
            if self._reading or self.over:
                return
            self._reading = True
        self.drop()

    def _read(self) -> None:
        over = False
        try:
            if self.source is None and not self._closing:
                self.source = self._begin()
                self.begun = True
                self._tell()
            if self.source is not None:
                items = iter(self.source)
                # What is cancelled is read to its end, which is near: it is the error that says so.
                while not self._closing and (
                    len(self._ready) < self._ahead or self.scope.cancelled
                ):
                    self._ready.append(next(items))
                    self._tell()
        except StopIteration:
            over = True
        except BaseException as error:  # noqa: BLE001 - whatever it is, it is for who awaits
            self._failure = error
            over = True
        if over or self._closing:
            self._end()

    def _end(self) -> None:
        try:
            if self.source is not None:
                self.source.close()
        except BaseException as error:  # noqa: BLE001 - the same
            self._failure = self._failure or error
        self.scope.leave()
        self.over = True

    def _tell(self) -> None:
        self._news += 1
        if self._waiters and not self._told:
            self._told = True
            self._arrivals.put(self)

    def arrive(self) -> None:
        self._told = False
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    async def _more_than(self, news: int) -> None:
        """Wait for more news than there was. Cancelled, it is closed."""
        waiter = self._waiter(news)
        late = None
        left = self._left() if self._queued else None
        if left is not None and self._loop is not None:
            late = self._loop.call_later(left, self._crew.hurry, self)
        try:
            await waiter
        except asyncio.CancelledError:
            self._cut_off = self._cut_off or not (self.over or self._closing)
            self.stop()
            await self._ended(GRACE)
            raise
        finally:
            if late is not None:
                late.cancel()

    def _waiter(self, news: int) -> asyncio.Future[None]:
        loop = running_loop()
        if loop is not self._loop:
            raise LLMConfigError("it was begun in another event loop; read it to its end there")
        waiter: asyncio.Future[None] = loop.create_future()
        self._waiters.append(waiter)
        if self._news != news:  # it came in between, and may not have been told
            waiter.set_result(None)
        return waiter

    async def _ended(self, seconds: float | None) -> None:
        """Wait until it is over, at most `seconds`; `None`: as long as it takes."""
        loop = self._loop
        end = None if seconds is None or loop is None else loop.time() + seconds
        while loop is not None:
            news = self._news
            left = None if end is None else end - loop.time()
            if (self.over and not self._reading) or (left is not None and left <= 0):
                return
            await asyncio.wait([self._waiter(news)], timeout=left)
