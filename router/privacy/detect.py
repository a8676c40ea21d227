"""What in a text is personal or secret, and where. Linear in the text; what cannot be checked counts as found.

One pass over all patterns at once (RE2's set) says which kinds a text could hold at all, and whether anything in it
could be encoded: most texts hold nothing and are done. Only those kinds are then searched for, and their candidates
checked.
"""

import bisect
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import re2

from router.privacy.forms import ENCODED, Form, Plain, TooMany, folded, others
from router.privacy.kinds import REGIONS, Kind, kinds

MAX_CHARS: Final = 200_000
MAX_FINDINGS: Final = 1000
CONTEXT_CHARS: Final = 48
MAX_WORDS: Final = 5000
MAX_WORD_CHARS: Final = 128
TOO_MUCH: Final = "the words are too much text together"
_UP_TO: Final = re.compile(r"\{(\d+),\d\d+\}")


class Undecided(Exception):
    """The text cannot be said to be clean: too long, or too much of it encoded. Whoever asked must take it for
    private."""


@dataclass(frozen=True, slots=True, order=True)
class Finding:
    """Characters `start` to `end` of the text are of `kind`."""

    start: int
    end: int
    kind: str
    secret: bool = False


class Detector:
    """`words` are the administrator's own: matched as whole words in any case, reported as kind `word`. Raises
    ValueError naming what is wrong with them, or with a kind or region that does not exist."""

    def __init__(
        self, *, regions: Sequence[str] = REGIONS, only: Iterable[str] | None = None, words: Sequence[str] = ()
    ) -> None:
        known = kinds(regions)
        wanted = {kind.name for kind in known} if only is None else set(only)
        if unknown := sorted(wanted - {kind.name for kind in known}):
            raise ValueError(f"no kind {unknown[0]!r}; there are {', '.join(sorted({kind.name for kind in known}))}")
        chosen = [kind for kind in known if kind.name in wanted]
        self._plain = Plain()
        self._kinds = (*chosen, Kind(name="word", pattern=_dictionary(words, self._plain))) if words else tuple(chosen)
        self._listed = {kind.name: place for place, kind in reversed([*enumerate(self._kinds)])}
        options = re2.Options()
        options.log_errors = False
        options.max_mem = 64 << 20
        try:
            self._any = _set((*(kind.pattern for kind in self._kinds), *ENCODED), options)
            self._patterns = [re2.compile(kind.pattern, options) for kind in self._kinds]
        except re2.error:
            raise ValueError(TOO_MUCH) from None
        if words and len(self._kinds) - 1 not in (self._any.Match(words[0].translate(self._plain).encode()) or ()):
            raise ValueError(TOO_MUCH)  # without the memory to search, a set says of every text that nothing is in it
        options.case_sensitive = False
        self._contexts = [re2.compile(kind.context, options) if kind.context else None for kind in self._kinds]

    def find(self, text: str, checked: Counter[int] | None = None) -> list[Finding]:
        """Findings in order, none overlapping another. Raises Undecided. Texts of one request are looked through with
        one `checked`: many of them together cost no more checks than one."""
        checked = Counter() if checked is None else checked
        if len(text) > MAX_CHARS:
            raise Undecided(f"{len(text)} characters are more than the {MAX_CHARS} that are looked through")
        form = folded(text, self._plain)
        raw, suspected = self._look(form)
        if not suspected:
            return []
        found = set[Finding]()  # several forms of a text show the same
        try:
            for finding in self._all(form, raw, suspected, checked):
                found.add(finding)
                if len(found) > MAX_FINDINGS:
                    raise Undecided(f"more than {MAX_FINDINGS} findings")
        except TooMany:
            raise Undecided("more encoded passages than are looked into") from None
        return apart(sorted(found, key=lambda one: (self._listed[one.kind], one)), text)

    def _look(self, form: Form) -> tuple[bytes, Sequence[int]]:
        """The form in UTF-8, and which of the kinds, or of ENCODED after them, it could hold: in any order."""
        raw = form.text.encode("utf-8", "surrogatepass")
        return raw, self._any.Match(raw) or ()

    def _all(self, form: Form, raw: bytes, suspected: Sequence[int], checked: Counter[int]) -> Iterator[Finding]:
        yield from self._in_form(form, raw, suspected, checked)
        if max(suspected) >= len(self._kinds):
            for other in others(form, self._plain):
                yield from self._in_form(other, *self._look(other), checked)

    def _in_form(self, form: Form, raw: bytes, suspected: Sequence[int], checked: Counter[int]) -> Iterator[Finding]:
        for index in suspected:
            if index >= len(self._kinds):
                continue
            kind = self._kinds[index]
            at = seen = 0  # the same place, in characters and in bytes
            for start, end in self._of_kind(index, raw, checked):
                at, seen = at + _length(raw[seen:start]), start
                yield Finding(*form.origin(at, at + _length(raw[start:end])), kind.name, kind.secret)

    def _of_kind(self, index: int, raw: bytes, checked: Counter[int]) -> Iterator[tuple[int, int]]:
        kind, context = self._kinds[index], self._contexts[index]
        if context is not None and not context.search(raw):
            return  # nowhere in the text: then near no candidate
        for match in self._patterns[index].finditer(raw):
            start, end = match.span(match.lastindex or 0)
            if context is not None and not context.search(_around(raw, start, end)):
                continue
            checked[index] += 1
            if checked[index] > kind.checks or kind.accepts(match.group().decode("utf-8", "surrogatepass")):
                yield start, end


def _set(patterns: Iterable[str], options: Any) -> Any:
    """Generous: it need not count how long a long match is, and so takes far fewer states."""
    found = re2.Set.SearchSet(options)
    for pattern in patterns:
        found.Add(_UP_TO.sub(r"{\1,}", pattern))
    found.Compile()
    return found


def _around(raw: bytes, start: int, end: int) -> bytes:
    """What stands right before a candidate and right after it; half a character at the cut hurts no pattern."""
    return raw[max(0, start - CONTEXT_CHARS) : start] + b" " + raw[end : end + CONTEXT_CHARS // 2]


def _length(raw: bytes) -> int:
    """Characters of some UTF-8: bytes that continue none."""
    return len(raw) if raw.isascii() else len(raw.decode("utf-8", "surrogatepass"))


def apart(found: Iterable[Finding], text: str) -> list[Finding]:
    """Of findings that overlap, the secret before the other, then what cuts no escape in two (of `\\nbob@example.com`
    the n is not bob's), then the longer, then the one given first."""
    kept: list[Finding] = []
    for finding in sorted(found, key=lambda one: (not one.secret, _cuts(text, one), one.start - one.end)):
        place = bisect.bisect(kept, finding)
        free_before = place == 0 or kept[place - 1].end <= finding.start
        if free_before and (place == len(kept) or finding.end <= kept[place].start):
            kept.insert(place, finding)
    return kept


def _cuts(text: str, finding: Finding) -> bool:
    """Whether it begins or ends between a backslash and what that makes special."""
    begins = text[finding.start - 1 : finding.start] == "\\" and text[finding.start] in "bfnrtux"
    return begins or (text[finding.end - 1] == "\\" and finding.end < len(text))


def _dictionary(words: Sequence[str], plain: Plain) -> str:
    if len(words) > MAX_WORDS:
        raise ValueError(f"{len(words)} words are more than {MAX_WORDS}")
    for word in words:
        if not 2 <= len(word.strip()) <= MAX_WORD_CHARS:
            raise ValueError(f"a word must have 2 to {MAX_WORD_CHARS} characters")
    folded = [word.translate(plain).split() for word in words]
    if [] in folded:
        raise ValueError("a word must have characters that can be seen")
    return "(?i)" + "|".join(map(_bounded, folded))


def _bounded(parts: Sequence[str]) -> str:
    """RE2 knows the bounds of ASCII words only; other scripts often write none. Between the parts of a word of several
    there may be any white space, or what joins them in names."""
    first, last = (r"\b" if char.isascii() and char.isalnum() else "" for char in (parts[0][0], parts[-1][-1]))
    return first + r"[\s_-]{1,4}".join(str(re2.escape(part)) for part in parts) + last
