"""The labelled texts: what is private in each, by kind and place. Written for this test; no text is a real person's.

In the file, `[[kind:value]]` marks a value, `\\n` is a line's end, and a `¦` in a credential, left out here, keeps
scanners of repositories from taking it for a real one.
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from router.privacy.detect import Detector, Finding

_MARK = re.compile(r"\[\[(\w+):(.*?)\]\]", re.DOTALL)


@dataclass(frozen=True)
class Labelled:
    text: str
    private: tuple[Finding, ...]


@dataclass(frozen=True)
class Score:
    """Of one kind, or of all: how many were found rightly, wrongly, and not at all."""

    right: int
    wrong: int
    missed: int

    @property
    def precision(self) -> float:
        return self.right / max(1, self.right + self.wrong)

    @property
    def recall(self) -> float:
        return self.right / max(1, self.right + self.missed)


def texts() -> Iterator[Labelled]:
    for line in Path(__file__).with_name("labelled.txt").read_text().splitlines():
        yield _parse(line.replace("\\n", "\n").replace("¦", ""))


def score(detector: Detector) -> dict[str, Score]:
    """By kind. A finding is right if it is of the kind marked at a place that it overlaps."""
    right, wrong, missed = Counter[str](), Counter[str](), Counter[str]()
    for labelled in texts():
        found = detector.find(labelled.text)
        for finding in found:
            good = any(_same(finding, marked) for marked in labelled.private)
            (right if good else wrong)[finding.kind] += 1
        for marked in labelled.private:
            missed[marked.kind] += not any(_same(finding, marked) for finding in found)
    return {kind: Score(right[kind], wrong[kind], missed[kind]) for kind in sorted({*right, *wrong, *missed})}


def _same(one: Finding, other: Finding) -> bool:
    return one.kind == other.kind and one.start < other.end and other.start < one.end


def _parse(marked: str) -> Labelled:
    text, at, private = "", 0, []
    for match in _MARK.finditer(marked):
        text += marked[at : match.start()]
        private.append(Finding(len(text), len(text) + len(match[2]), match[1]))
        text, at = text + match[2], match.end()
    return Labelled(text + marked[at:], tuple(private))
