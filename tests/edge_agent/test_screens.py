import io
import itertools
import os
import re
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import ROOT
from rich.console import Console

from edge_agent.screens import Plain, Rich, harmless, split_blocks, terminal

ANSWER = """# A title

Some *emphasis* and `code`, and a line that is long enough to be wrapped on any narrow terminal there is.

```python
def f():

    return 1
```

1. one

2. two
"""
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def shown(*pieces: str, width: int = 60, height: int = 20) -> str:
    """What a terminal of this size was sent."""
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=width, height=height, highlight=False)
    with Rich(console, clock=itertools.count().__next__).answer() as show:  # each piece is drawn
        for piece in pieces:
            show(piece)
    return out.getvalue()


def final(sent: str) -> list[str]:
    """The lines that are left, where a terminal obeys: move up and erase are followed, colours dropped."""
    lines, row = [""], 0
    for part in re.split(r"(\x1b\[[0-9;?]*[A-Za-z]|\n|\r)", sent):
        if part == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif part == "\x1b[1A":
            row -= 1
        elif part == "\x1b[2K":
            lines[row] = ""
        elif part and part != "\r" and not ESCAPE.fullmatch(part):
            lines[row] += part
    return [line.rstrip() for line in lines]


@pytest.mark.parametrize("width", [20, 60, 200])
@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_an_answer_is_shown_once_however_it_comes(width: int, size: int) -> None:
    """Letter by letter or at once: what stays is every word, once, in order, and no line is wider than the terminal."""
    pieces = [ANSWER[at : at + size] for at in range(0, len(ANSWER), size)]
    lines = final(shown(*pieces, width=width))
    words = re.findall(r"\w+", " ".join(lines))

    assert words == re.findall(r"\w+", ANSWER.replace("```python", ""))
    assert max(len(line) for line in lines) <= width


def test_a_long_block_does_not_scroll_the_terminal() -> None:
    """While it grows only its end is shown; when it is whole, all of it stays."""
    block = "```\n" + "".join(f"line {number}\n" for number in range(100)) + "```\n"
    sent = shown(*block.splitlines(keepends=True), height=10)

    assert [line for line in final(sent) if line.strip()] == [f" line {number}" for number in range(100)]


def test_an_interrupted_answer_stays_as_far_as_it_came() -> None:
    """Ctrl-C: what was said is still there, and the terminal's cursor is shown again."""
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=40, height=20, highlight=False)
    with pytest.raises(KeyboardInterrupt), Rich(console).answer() as show:
        show("half an ans")
        raise KeyboardInterrupt

    assert "half an ans" in "".join(final(out.getvalue()))
    assert out.getvalue().rindex("\x1b[?25h") > out.getvalue().rindex("\x1b[?25l")


@pytest.mark.parametrize(
    "attack",
    ["\x1b]0;title\x07", "\x1b[2J", "\x9b31m", "\x1bPq", "a\rb", "a\x08b", "\u202egnp.exe", "\x1b]8;;http://x\x1b\\"],
)
def test_a_model_does_not_control_the_terminal(attack: str) -> None:
    """Escapes, carriage returns, backspaces, turned text: nothing of it reaches a terminal, also split in two."""
    controls = set(re.findall(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", attack))
    sent = ESCAPE.sub("", shown("before ", attack[:1], attack[1:], " after\n\nmore"))

    assert controls
    assert not controls & set(sent.replace("\r", ""))
    assert "before" in sent
    assert harmless("tab\tand\nline") == "tab\tand\nline"


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet="a `~\n#-", max_size=120), st.integers(1, 9))
def test_blocks_are_split_without_loss(text: str, size: int) -> None:
    """Piece by piece or at once: what is split off, in order, and what is left are the text."""
    whole, rest = "", ""
    for at in range(0, len(text), size):
        block, rest = split_blocks(rest + text[at : at + size])
        whole += block

    assert whole + rest == text


def test_a_fence_is_not_cut() -> None:
    """An empty line in code ends nothing, whatever fence it is; the same outside does."""
    assert split_blocks("a\n\nb") == ("a\n\n", "b")
    assert split_blocks("```py\na\n\nb\n") == ("", "```py\na\n\nb\n")
    assert split_blocks("````\n```\n\nb\n````\n\nc") == ("````\n```\n\nb\n````\n\n", "c")


def test_a_pipe_gets_the_bytes_of_the_answer() -> None:
    """Unchanged on one stream; everything else on the other."""
    out, aside = io.StringIO(), io.StringIO()
    screen = Plain(out, aside)
    with screen.answer() as show:
        show("a\x1b[1mb")
    screen.note("who")

    assert (out.getvalue(), aside.getvalue()) == ("a\x1b[1mb\n", "who\n")


def test_terminals_and_pipes_are_told_apart() -> None:
    """No terminal: lines come from the pipe until it ends, nothing is asked for, and the screen is plain."""
    read, screen = terminal(io.StringIO("one\ntwo"), io.StringIO(), io.StringIO())

    assert isinstance(screen, Plain)
    assert [read(), read()] == ["one\n", "two"]
    with pytest.raises(EOFError):
        read()


@pytest.mark.skipif(sys.platform == "win32", reason="no pty")
def test_in_a_real_terminal(tmp_path: object) -> None:
    """Through a pseudo-terminal: a prompt, Markdown, and Ctrl-D ends it with status 0."""
    import pty

    main, side = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "edge_agent", "chat", "--url", "http://127.0.0.1:9", "--state-dir", str(tmp_path)],
        stdin=side, stdout=side, stderr=side, cwd=ROOT, env=os.environ | {"TERM": "xterm", "COLUMNS": "60"},
    )  # fmt: skip
    os.close(side)
    seen = b""
    for typed, awaited in ((b"/help\n", b"/save FILE"), (b"hello\n", b"edge-agent serve"), (b"\x04", b"")):
        while b"> " not in seen:
            seen += os.read(main, 4096)
        seen = b""
        os.write(main, typed)
        while awaited and awaited not in seen:
            seen += os.read(main, 4096)
    status = process.wait(30)
    os.close(main)

    assert status == 0
