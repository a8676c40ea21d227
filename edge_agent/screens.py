"""Where a conversation is shown: plain text for pipes, Markdown as it comes for terminals.

What a model says is not to be trusted with a terminal: escape sequences could retitle it, hide text or worse, so
control characters are taken out before it is shown there.
"""

import importlib
import re
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Final, Protocol, TextIO

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.markdown import Markdown
from rich.segment import Segment
from rich.text import Text

from edge_agent.fences import fence_after

Show = Callable[[str], None]
CONTROLS: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""All but newline and tab; with them, what turns the direction of text."""
MIN_LINES: Final = 3
REFRESH_S: Final = 1 / 12


class Screen(Protocol):
    def answer(self) -> AbstractContextManager[Show]:
        """The place for one answer, shown piece by piece."""

    def note(self, text: str) -> None:
        """A word of ours: who answered, an error, the reply to a command."""


class Plain:
    """Answers on `out`, unchanged, so that they can be piped on; everything else on `aside`."""

    def __init__(self, out: TextIO, aside: TextIO) -> None:
        self._out, self._aside = out, aside

    @contextmanager
    def answer(self) -> Iterator[Show]:
        try:
            yield self._show
        finally:
            self._show("\n")

    def note(self, text: str) -> None:
        self._aside.write(f"{text}\n")
        self._aside.flush()

    def _show(self, piece: str) -> None:
        self._out.write(piece)
        self._out.flush()


class Rich:
    """Markdown: whole blocks are printed and stay, the one being written is shown under them as it grows."""

    def __init__(
        self, console: Console, keyboard: TextIO | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._console, self._keyboard, self._clock = console, keyboard, clock

    @contextmanager
    def answer(self) -> Iterator[Show]:
        text, due = "", 0.0
        try:
            # Refreshed here and not by a thread of Live's, which can write between the parts of what is printed here.
            with _unechoed(self._keyboard), Live(console=self._console, transient=True, auto_refresh=False) as live:

                def show(piece: str) -> None:
                    nonlocal text, due
                    whole, text = split_blocks(text + harmless(piece))
                    if whole:
                        live.update(Text())
                        self._print(whole)
                    if whole or self._clock() >= due:
                        due = self._clock() + REFRESH_S
                        live.update(Tail(Markdown(text, hyperlinks=False)), refresh=True)

                yield show
        finally:
            if text.strip():
                self._print(text)

    def note(self, text: str) -> None:
        self._console.print(Text(harmless(text), style="dim"))

    def _print(self, markdown: str) -> None:
        self._console.print(Markdown(markdown, hyperlinks=False))


class Tail:
    """The last lines of something, as many as fit the terminal: what grows there must not scroll it."""

    def __init__(self, whole: Markdown) -> None:
        self._whole = whole

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        fitting = max(MIN_LINES, console.height - 2)
        for line in console.render_lines(self._whole, options, pad=False)[-fitting:]:
            yield from line
            yield Segment.line()


@contextmanager
def _unechoed(keyboard: TextIO | None) -> Iterator[None]:
    """What is typed during an answer is kept for the next prompt, and not written into the answer."""
    try:
        termios = importlib.import_module("termios")
        before = termios.tcgetattr(keyboard)
    except (ImportError, OSError, ValueError, TypeError, AttributeError):  # no terminal, or not one of this kind
        yield
        return
    quiet = list(before)
    quiet[3] &= ~termios.ECHO
    termios.tcsetattr(keyboard, termios.TCSADRAIN, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(keyboard, termios.TCSADRAIN, before)


def terminal(given: TextIO, out: TextIO, aside: TextIO) -> tuple[Callable[[], str], Screen]:
    """How lines are read and answers shown: edited and in Markdown where a person sits, plain where not."""
    if given.isatty():
        with suppress(ImportError):  # not on every system
            importlib.import_module("readline")  # lends input() its editing; what was typed is kept in memory alone
    screen: Screen = Rich(Console(file=out, highlight=False), given) if out.isatty() else Plain(out, aside)
    return (lambda: input("> " if out.isatty() else "")) if given.isatty() else (lambda: _read(given)), screen


def _read(given: TextIO) -> str:
    line = given.readline()
    if not line:
        raise EOFError
    return line


def harmless(text: str) -> str:
    return CONTROLS.sub("", text)


def split_blocks(text: str) -> tuple[str, str]:
    """The Markdown blocks that are complete, and the rest. A block ends at an empty line, but not within a fence."""
    fence, end, at = "", 0, 0
    for line in text.splitlines(keepends=True):
        if not line.endswith("\n"):
            break
        at += len(line)
        fence = fence_after(line, fence)
        if not fence and not line.strip():
            end = at
    return text[:end], text[end:]
