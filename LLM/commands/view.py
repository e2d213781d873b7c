"""What is seen: answers and results go to stdout, everything else to stderr."""

from __future__ import annotations

import argparse
import os
import re
import sys
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import Any

from LLM.clock import Clock


class Screen:
    """Plain text, for pipes, files and plain terminals."""

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
