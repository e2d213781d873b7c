"""Bytes → server-sent events: incremental, bounded, no I/O.

The format is WHATWG HTML, "Server-sent events", section 9.2.6. Only CR, LF and CRLF end a line, across
any chunk border; U+2028 and its kin are text. Each byte is looked at a bounded number of times, so
a line of many megabytes costs linear time.
"""

from __future__ import annotations

# (name of the event, b"" if it has none; its data, lines joined by LF)
Event = tuple[bytes, bytes]

_TOO_LARGE = "an event of the stream is larger than {} bytes"

# What a line of an event costs in memory beside its bytes: many empty ones would be free otherwise.
_LINE_COST = 48

_STRAY_LIMIT = 64 * 1024

_BOM = b"\xef\xbb\xbf"


class EventTooLargeError(ValueError):
    """An event grew past the limit before it ended."""


class SSEDecoder:
    """Feed it bytes as they come; it returns the events that they complete.

    Args:
        max_event_bytes: size at which an unfinished event is refused with `EventTooLargeError`.
    """

    __slots__ = (
        "_after_cr",
        "_data",
        "_limit",
        "_line",
        "_name",
        "_refused",
        "_size",
        "_started",
        "stray",
    )

    def __init__(self, max_event_bytes: int = 64 * 1024 * 1024) -> None:
        self._limit = max_event_bytes
        self._line: list[bytes] = []  # pieces of a line whose end has not come
        self._data: list[bytes] = []  # data lines of the event under way
        self._name = b""
        self._size = 0  # bytes held in _line and _data
        self._after_cr = False  # the last byte was CR: an LF that follows belongs to it
        self._refused = False
        self.stray = b""  # the last line that is no field but begins like JSON: an error, perhaps
        self._started = False  # past the place where a byte order mark may stand

    def feed(self, chunk: bytes) -> list[Event]:
        """The events that end within `chunk`, in order; often none."""
        # What most servers send most of the time: one whole event of one line.
        if (
            self._started
            and not self._size
            and not self._data
            and not self._after_cr
            and chunk[:6] == b"data: "
            and chunk[-2:] == b"\n\n"
            and chunk.count(b"\n") == 2
            and b"\r" not in chunk
            and not self._name
            and len(chunk) <= self._limit
        ):
            return [(b"", chunk[6:-2])]
        if self._refused:
            raise EventTooLargeError(_TOO_LARGE.format(self._limit))
        if not self._started:
            chunk = self._skip_bom(chunk)
        if self._after_cr and chunk[:1] == b"\n":
            chunk = chunk[1:]
            self._after_cr = False
        if not chunk:
            return []
        self._after_cr = chunk[-1:] == b"\r"
        if b"\r" in chunk:
            chunk = chunk.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        lines = chunk.split(b"\n")
        rest = lines.pop()
        events: list[Event] = []
        try:
            self._take_lines(lines, rest, events)
        except EventTooLargeError:
            if not events:
                raise
            self._refused = True  # those that came before it are good
        return events

    def _take_lines(self, lines: list[bytes], rest: bytes, events: list[Event]) -> None:
        if lines:
            if self._line:
                self._size -= sum(map(len, self._line))
                lines[0] = b"".join((*self._line, lines[0]))
                self._line = []
            for line in lines:
                self._take(line, events)
        if rest:
            self._line.append(rest)
            self._grow(len(rest))

    def finish(self) -> list[Event]:
        """The event that the end of the stream cut off before its blank line, if it has data.

        The specification drops it; real servers end with a `data: [DONE]` and no blank line.
        """
        if self._refused:
            raise EventTooLargeError(_TOO_LARGE.format(self._limit))
        events: list[Event] = []
        self._started = True
        if self._line:
            line, self._line = b"".join(self._line), []
            self._size -= len(line)
            self._take(line, events)
        self._take(b"", events)
        return events

    def _skip_bom(self, chunk: bytes) -> bytes:
        """`chunk` with what was held back, without a byte order mark; b"" while it may be one."""
        held = b"".join(self._line) + chunk
        self._line, self._size = [], 0
        if len(held) < len(_BOM) and _BOM.startswith(held):
            self._line, self._size = ([held], len(held)) if held else ([], 0)
            return b""
        self._started = True
        return held[3:] if held.startswith(_BOM) else held

    def _take(self, line: bytes, events: list[Event]) -> None:
        if line[:5] == b"data:":
            value = line[6:] if line[5:6] == b" " else line[5:]
            self._data.append(value)
            self._grow(len(value) + (_LINE_COST if len(self._data) > 1 else 0))
        elif not line:
            if self._data:
                data = self._data[0] if len(self._data) == 1 else b"\n".join(self._data)
                events.append((self._name, data))
                self._data, self._size = [], 0
            self._name = b""
        elif line[:6] == b"event:":
            self._name = line[7:] if line[6:7] == b" " else line[6:]
        elif line == b"data":
            self._data.append(b"")
            self._grow(_LINE_COST)
        elif line[:1] == b"{":
            self.stray = line[:_STRAY_LIMIT]
        # Comments (": keep-alive"), `id`, `retry` and unknown fields say nothing to us.

    def _grow(self, size: int) -> None:
        self._size += size
        if self._size > self._limit:
            raise EventTooLargeError(_TOO_LARGE.format(self._limit))
