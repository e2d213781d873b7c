"""What is seen: answers and results go to stdout, everything else to stderr."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from importlib.util import find_spec
from typing import Any, NamedTuple

from LLM.clock import Clock


class Column(NamedTuple):
    """One of several answers side by side: `text` is Markdown, what follows it is said about it."""

    title: str
    text: str
    remarks: Sequence[str] = ()
    error: str = ""


class Screen:
    """Plain text, for pipes, files and plain terminals."""

    @property
    def width(self) -> int:
        """Characters of a line."""
        return shutil.get_terminal_size().columns

    def answer(self) -> _PlainView | _MarkdownView:
        """Where one answer appears."""
        return _PlainView()

    def say(self, text: str, style: str = "") -> None:  # noqa: ARG002 - for those who can show one
        """A line of the result."""
        print(text, flush=True)

    def note(self, text: str) -> None:
        """A line beside the result."""
        sys.stdout.flush()
        print(clean(text), file=sys.stderr)

    def problem(self, text: str) -> None:
        sys.stdout.flush()
        complain(text)

    def table(self, title: str, rows: Sequence[tuple[bool | str, ...]]) -> None:
        """Rows of a mark (whether all is well) and of cells."""
        print(f"\n{title}")
        widths = [max(map(len, map(str, column))) for column in zip(*rows, strict=True)]
        for row in rows:
            cells = zip(row[1:], widths[1:], strict=True)
            print(f"  {'  '.join(f'{cell:{width}}' for cell, width in cells)}".rstrip())

    def grid(
        self,
        head: Sequence[str],
        rows: Sequence[Sequence[str]],
        *,
        total: Sequence[str] = (),
        texts: int = 1,
    ) -> None:
        """A table with a head, of which the first columns hold `texts` and the others numbers."""
        lines = [head, *rows, *([total] if total else [])]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        print()
        for line in lines:
            cells = (
                f"{clean(cell):<{width}}" if place < texts else f"{cell:>{width}}"
                for place, (cell, width) in enumerate(zip(line, widths, strict=True))
            )
            print("  ".join(cells).rstrip())

    def bars(self, title: str, rows: Sequence[tuple[str, float, str]]) -> None:
        """A bar for each row of a label, a value from 0 up, and the value as text."""
        print(f"\n{title}")
        for label, drawn, text in _drawn(rows, self.width):
            print(f"{label}  {drawn}{text}".rstrip())

    def side_by_side(self, columns: Sequence[Column]) -> None:
        """Several answers; here one below the other."""
        terminal = sys.stdout.isatty()
        for place, (title, text, remarks, error) in enumerate(columns):
            print(f"{'' if place == 0 else chr(10)}== {clean(title)}")
            if text:
                print((clean(text) if terminal else text).rstrip("\n"))
            for line in (*remarks, *([f"error: {error}"] if error else [])):
                print(line)
        sys.stdout.flush()

    def busy(self, text: str) -> AbstractContextManager[Any]:
        """Show, where it does not spoil the result, that something goes on."""
        return _noted(text) if sys.stderr.isatty() else _noted("")

    def live(self) -> Live:
        """A line that changes."""
        return Live(lines=not sys.stdout.isatty())


class Live:
    """A line that is written again and again; where that is not possible, only now and then."""

    def __init__(self, *, lines: bool) -> None:
        self._lines = lines
        self._width = 0

    def __enter__(self) -> Live:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._width:
            print(flush=True)

    def update(self, text: str) -> None:
        """Write `text` in the place of what was there."""
        if not self._lines:
            print(f"\r{text:{self._width}}", end="", flush=True)
            self._width = len(text)

    def say(self, text: str, style: str = "") -> None:  # noqa: ARG002 - for those who can show one
        """Write a line that stays, above the one that changes."""
        print(f"\r{text:{self._width}}" if self._width else text, flush=True)
        self._width = 0


@contextmanager
def _noted(text: str) -> Iterator[None]:
    """A remark on stderr that is wiped out at the end."""
    print(text, end="", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        print(f"\r{'':{len(text)}}\r" if text else "", end="", file=sys.stderr, flush=True)


def _drawn(rows: Sequence[tuple[str, float, str]], width: int) -> Iterator[tuple[str, str, str]]:
    """Each row's label, bar and text, so that the longest one fits."""
    labels, values, texts = zip(*rows, strict=True)
    name = max(map(len, labels))
    room = max(1, width - name - max(map(len, texts)) - 4)
    most = max(values)
    for label, value, text in rows:
        drawn = bar(value / most if most else 0.0, room)
        yield f"{clean(label):<{name}}", drawn, f"  {text}" if drawn else text


def bar(part: float, width: int) -> str:
    """A bar of up to `width` characters, in eighths of one; whatever is above 0 can be seen."""
    eighths = max(round(part * width * 8), 1 if part > 0 else 0)
    full, rest = divmod(eighths, 8)
    try:
        "█▏".encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return "#" * max(full, 1 if part > 0 else 0)
    return "█" * full + " ▏▎▍▌▋▊▉"[rest].strip()


class _PlainView:
    """The text as it comes."""

    def __init__(self) -> None:
        self._terminal = sys.stdout.isatty()
        self._thinking = False
        self._line_open = False

    def __enter__(self) -> _PlainView:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._line_open:
            sys.stdout.write("\n")
        sys.stdout.flush()

    def think(self) -> None:
        if not self._thinking and self._terminal:
            self._thinking = True
            print("(thinking …)", file=sys.stderr)

    def write(self, text: str) -> None:
        # A pipe gets every byte; a terminal would obey some of them.
        sys.stdout.write(clean(text) if self._terminal else text)
        sys.stdout.flush()
        self._line_open = not text.endswith("\n")


class _RichScreen(Screen):
    """Colour and Markdown, with rich."""

    def __init__(self) -> None:
        from rich.console import Console

        self._out = Console(highlight=False)
        self._err = Console(stderr=True, highlight=False)

    def answer(self) -> _MarkdownView:
        return _MarkdownView()

    def say(self, text: str, style: str = "") -> None:
        self._out.print(text, style=style or None, markup=False, emoji=False)

    def note(self, text: str) -> None:
        self._err.print(clean(text), style="dim", markup=False, emoji=False)

    def problem(self, text: str) -> None:
        from rich.text import Text

        self._err.print(Text.assemble(("error:", "bold red"), " ", one_line(text)))

    def table(self, title: str, rows: Sequence[tuple[bool | str, ...]]) -> None:
        from rich.padding import Padding
        from rich.table import Table
        from rich.text import Text

        shown = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
        for mark, *cells in rows:
            texts = [Text(str(cell)) for cell in cells]
            texts[1].stylize("green" if mark else "dim")
            shown.add_row(*texts)
        self._out.print(f"\n{title}", style="bold", markup=False)
        if rows:
            self._out.print(Padding(shown, (0, 0, 0, 2), expand=False))

    @property
    def width(self) -> int:
        return self._out.width

    def grid(
        self,
        head: Sequence[str],
        rows: Sequence[Sequence[str]],
        *,
        total: Sequence[str] = (),
        texts: int = 1,
    ) -> None:
        from rich.box import SIMPLE
        from rich.table import Table
        from rich.text import Text

        shown = Table(
            box=SIMPLE,
            show_edge=False,
            pad_edge=False,
            padding=(0, 1, 0, 0),
            show_footer=bool(total),
        )
        for place, name in enumerate(head):
            name_only = place < texts
            shown.add_column(
                name,
                total[place] if total else "",
                header_style="bold",
                footer_style="bold",
                justify="left" if name_only else "right",
                overflow="fold",
                no_wrap=not name_only,
            )
        for row in rows:
            shown.add_row(*(Text(clean(cell)) for cell in row))
        self._out.print()
        self._out.print(shown)

    def bars(self, title: str, rows: Sequence[tuple[str, float, str]]) -> None:
        from rich.text import Text

        self._out.print(f"\n{title}", style="bold", markup=False)
        for label, drawn, text in _drawn(rows, self.width):
            self._out.print(
                Text.assemble(f"{label}  ", (drawn, "green"), text), no_wrap=True, crop=True
            )

    def side_by_side(self, columns: Sequence[Column]) -> None:
        from rich.box import MINIMAL
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        # Narrower than this an answer can hardly be read: the next ones go below.
        beside = max(1, self.width // 26)
        for start in range(0, len(columns), beside):
            shown = Table(box=MINIMAL, show_edge=False, pad_edge=False, expand=True)
            cells = []
            for title, text, remarks, error in columns[start : start + beside]:
                shown.add_column(Text(clean(title), style="bold"), ratio=1, overflow="fold")
                cell: list[Any] = [_Block(clean(text), spaced=False)] if text else []
                cell += [Text(clean(remark), style="dim") for remark in remarks]
                if error:
                    cell.append(Text.assemble(("error:", "bold red"), " ", one_line(error)))
                cells.append(Group(*cell))
            shown.add_row(*cells)
            if start:
                self._out.print()
            self._out.print(shown)

    def busy(self, text: str) -> AbstractContextManager[Any]:
        return self._out.status(f"[dim]{text}[/dim]")

    def live(self) -> Live:
        return _RichLive(self._out)


class _RichLive(Live):
    """Drawn only when something is said: no second thread steps on its lines."""

    def __init__(self, console: Any) -> None:
        from rich.live import Live as Region

        super().__init__(lines=False)
        self._console = console
        # What others print on stdout is not caught: `bar` asks it for its encoding.
        self._region = Region(
            "", console=console, auto_refresh=False, redirect_stdout=False, transient=True
        )

    def __enter__(self) -> Live:
        self._region.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._region.stop()

    def update(self, text: str) -> None:
        from rich.text import Text

        self._region.update(Text(text, no_wrap=True, overflow="ellipsis"), refresh=True)

    def say(self, text: str, style: str = "") -> None:
        self._console.print(text, style=style or None, markup=False, emoji=False)


class _MarkdownView:
    """Markdown, a block at a time: finished ones are printed, the one that grows is redrawn.

    Only one thread draws until the end: two would step on each other's lines, and in the main one
    Ctrl-C could come between the lines.
    """

    def __init__(self) -> None:
        from rich.console import Console
        from rich.live import Live
        from rich.spinner import Spinner

        self._console = Console(highlight=False)
        self._spinner = Spinner("dots")
        self._live = Live(self._spinner, console=self._console, transient=True, auto_refresh=False)
        self._new: deque[str] = deque()
        self._growing = ""
        self._printed = False
        self._over = threading.Event()
        self._painter = threading.Thread(target=self._paint, daemon=True)

    def __enter__(self) -> _MarkdownView:
        self._live.start()
        self._painter.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._over.set()
        self._painter.join()
        self._live.stop()
        self._print(self._growing + "".join(self._new))

    def think(self) -> None:
        if not self._spinner.text:
            self._spinner.update(text="thinking …", style="dim")

    def write(self, text: str) -> None:
        self._new.append(clean(text))

    def _paint(self) -> None:
        """Redraw 12 times a second, and never for more than a fifth of the time."""
        clock = Clock()
        pause = 0.0
        while not self._over.wait(pause):
            begun = clock.now()
            self._redraw()
            pause = max(1 / 12, 4 * (clock.now() - begun))

    def _redraw(self) -> None:
        while self._new:
            self._growing += self._new.popleft()
        finished, self._growing = _split_blocks(self._growing)
        self._print(finished)
        started = self._printed or self._growing
        block = _Block(self._growing, spaced=self._printed, growing=True)
        self._live.update(block if started else self._spinner, refresh=True)

    def _print(self, text: str) -> None:
        if text.strip():
            self._console.print(_Block(text, spaced=self._printed))
            self._printed = True


class _Block:
    """Markdown in lines without blanks at their ends, for those who copy it.

    Args:
        text: what to show.
        spaced: an empty line before it.
        growing: only as much of its end as the terminal has lines for.
    """

    def __init__(self, text: str, *, spaced: bool, growing: bool = False) -> None:
        self._text = text
        self._spaced = spaced
        self._growing = growing

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        from rich.segment import Segment

        # Room for the ^C that the terminal writes: a line break there would spoil the redrawing.
        narrower = options.update(width=max(1, options.max_width - 2))
        lines = console.render_lines(_markdown(self._text), narrower, pad=False)
        for line in lines:
            while line and not line[-1].text.strip():
                line.pop()
            if line:
                line[-1] = Segment(line[-1].text.rstrip(), line[-1].style)
        while lines and not lines[-1]:
            lines.pop()
        while lines and not lines[0]:
            del lines[0]
        if lines and self._spaced:
            lines.insert(0, [])
        for line in lines[-max(1, console.height - 2) :] if self._growing else lines:
            yield from line
            yield Segment.line()


_FENCE = re.compile(r"\s*(`{3,}|~{3,})(.*)")


def _split_blocks(text: str) -> tuple[str, str]:
    """Cut Markdown where a block surely ends: the finished blocks, and what may still go on.

    A block ends at an empty line that is followed by one without indentation, outside of code.
    """
    position = end = 0
    fence = ""
    after_empty = False
    for line in text.splitlines(keepends=True):
        if not fence and after_empty and not line[0].isspace():
            end = position
        marks = _FENCE.match(line)
        if marks and not fence:
            fence = marks[1]
        elif marks and marks[1].startswith(fence) and not marks[2].strip():
            fence = ""
        after_empty = not line.strip()
        position += len(line)
    return text[:end], text[end:]


def _markdown(text: str) -> Any:
    """Markdown as a model means it: tags are text, a line ends where it ends, code is not indented."""
    from markdown_it import MarkdownIt
    from rich.markdown import CodeBlock, Markdown
    from rich.syntax import Syntax

    class Code(CodeBlock):
        def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
            yield Syntax(str(self.text).rstrip(), self.lexer_name, theme=self.theme, word_wrap=True)

    # The theme takes the terminal's own colours.
    shown = Markdown("", hyperlinks=False, code_theme="ansi_dark")
    shown.elements = {**shown.elements, "fence": Code, "code_block": Code}  # type: ignore[misc]  # for this one only
    parser = MarkdownIt("commonmark", {"html": False}).enable("strikethrough").enable("table")
    shown.parsed = parser.parse(text)
    for token in shown.parsed:
        for child in token.children or ():
            if child.type == "softbreak":
                child.type = "hardbreak"
    return shown


def screen_for(args: argparse.Namespace) -> Screen:
    """With rich where it is installed and stdout is a terminal that can show it."""
    able = sys.stdout.isatty() and os.environ.get("TERM", "") != "dumb" and not args.plain
    # Before 13, rich had another parser.
    has_rich = able and all(find_spec(name) for name in ("rich", "markdown_it"))
    return _RichScreen() if has_rich else Screen()


# Control characters, by which a text could command the terminal, but for the line end and the tab.
_CONTROLS = {code: None for code in (*range(32), *range(127, 160)) if code not in (9, 10)}


def clean(text: str) -> str:
    return text.translate(_CONTROLS)


def one_line(text: str) -> str:
    return clean(" ".join(text.split()))


def complain(error: object) -> None:
    print(f"error: {one_line(str(error))}", file=sys.stderr)
