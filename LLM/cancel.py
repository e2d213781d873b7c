"""Ending a call from outside, wherever it waits: in a socket, a sleep, a queue."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar


class CancelScope:
    """What is done inside can be cancelled from any thread, and then ends with `LLMCancelledError`.

        with CancelScope() as scope:
            ...                             # another thread may call scope.cancel()
            llm.chat_completion(...)

    The socket of a call under way is closed at once; a wait (between attempts, for the rate limit, for
    another's answer) ends; what has not begun does not begin. It belongs to the context: a thread
    started inside has to be given that (`contextvars.copy_context().run`), or enters the scope itself:
    one scope may be entered by many threads and tasks at once, and again, one button for all of them. A
    stream that was opened inside ends too, as long as it is not over. Cancelled once, it stays so; a scope
    outside of it, of any that entered it, cancels it too.

    Args:
        caller: of work that runs in a borrowed thread: a number for the one who waits for it, which no
            other has now; `None`: each thread inside works for itself.

    Attributes:
        cancelled: whether `cancel` was called.
    """

    __slots__ = ("_places", "_wakers", "caller", "cancelled", "thread")

    def __init__(self, caller: int | None = None) -> None:
        self.cancelled = False
        self.caller = caller
        self.thread = None if caller is None else threading.current_thread()
        self._wakers: dict[Hashable, Callable[[], object]] = {}
        self._places: list[_Place] = []

    def cancel(self) -> None:
        """End what is under way inside, and let nothing begin any more; again: nothing."""
        if self.cancelled:
            return
        self.cancelled = True
        for wake in list(self._wakers.values()):
            wake()

    def add(self, key: Hashable, wake: Callable[[], object]) -> None:
        """Call `wake` when it is cancelled, at once if it is; perhaps twice, and from any thread."""
        self._wakers[key] = wake
        if self.cancelled:  # `cancel` may have looked just before
            wake()

    def discard(self, key: Hashable) -> None:
        """Take back what `add` said; nothing if it was not said."""
        self._wakers.pop(key, None)

    def enter(self) -> None:
        """Begin, in the context that this is called in; one that is outside of it cancels this one too."""
        stack = _stack.get()
        place = _Place(self, stack[-1].scope if stack else None)
        self._places.append(place)
        _stack.set((*stack, place))
        if place.outer is not None:
            place.outer.add(place, self.cancel)

    def leave(self) -> None:
        """What the last `enter` began is over; the context may be another or gone."""
        if self._places:
            self._places.pop().leave()

    def __enter__(self) -> CancelScope:
        self.enter()
        return self

    def __exit__(self, *_: object) -> None:
        stack = _stack.get()
        mine = next((place for place in reversed(stack) if place.scope is self), None)
        if mine is None:  # entered in another context
            self.leave()
            return
        _stack.set(tuple(place for place in stack if place is not mine))
        with suppress(ValueError):
            self._places.remove(mine)
        mine.leave()


class _Place:
    """That a context is inside a scope, once."""

    __slots__ = ("outer", "scope")

    def __init__(self, scope: CancelScope, outer: CancelScope | None) -> None:
        self.scope = scope
        self.outer = outer

    def leave(self) -> None:
        if self.outer is not None:
            self.outer.discard(self)


# Where a context is, the innermost last. The variable itself never changes; its values belong to the context.
_stack: ContextVar[tuple[_Place, ...]] = ContextVar("LLM cancel scopes", default=())


def current_scope() -> CancelScope | None:
    """The innermost scope; `None` outside of all."""
    stack = _stack.get()
    return stack[-1].scope if stack else None


def cancelled() -> bool:
    """Whether what runs here has been cancelled."""
    scope = current_scope()
    return scope is not None and scope.cancelled


def caller() -> int:
    """A number for the one that this is done for: a thread, unless it is a borrowed one."""
    scope = current_scope()
    if scope is None or scope.caller is None:
        return threading.get_ident()
    return scope.caller


def calling_thread() -> threading.Thread:
    """The thread of the one that this is done for."""
    scope = current_scope()
    if scope is None or scope.thread is None:
        return threading.current_thread()
    return scope.thread


@contextmanager
def woken(wake: Callable[[], object]) -> Iterator[None]:
    """While inside, cancelling calls `wake`, perhaps twice, and from another thread."""
    scope = current_scope()
    if scope is None:
        yield
        return
    key = object()
    scope.add(key, wake)
    try:
        yield
    finally:
        scope.discard(key)
