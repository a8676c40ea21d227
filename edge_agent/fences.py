"""Code fences of Markdown: what stands between two of them is not read as Markdown."""

import re
from typing import Final

_FENCE: Final = re.compile(r"^ {0,3}(`{3,}|~{3,})")


def fence_after(line: str, fence: str = "") -> str:
    """The fence that is open after this line, where `fence` was open before it; empty if none is."""
    mark = _FENCE.match(line)
    if mark and not fence:
        return mark[1]
    closes = mark and mark[1].startswith(fence) and not line.strip(" \n`~")
    return "" if closes else fence


def open_fence(text: str) -> str:
    """The one that the text has left open, or nothing."""
    fence = ""
    for line in text.splitlines():
        fence = fence_after(line, fence)
    return fence
