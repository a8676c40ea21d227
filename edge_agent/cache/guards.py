"""Whether two questions that look alike may have the same answer: exact checks beside the distance of their vectors.

A vector says what a text is about, and hardly notices a "not", a number or two names that changed places. So both texts
are read word by word, by tables (`words.toml`): what says nothing is left out, phrases that say the same become one.
What is left must be the same in both. What cannot be read for sure, say code, many lines, a language that is not in
the tables, matches nothing.
"""

import functools
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from types import MappingProxyType
from typing import Final

import msgspec
import re2

MAX_CHARS: Final = 400
MAX_WORDS: Final = 64
UNREADABLE: Final = frozenset("`{}[]<>=|\\~^_\n\r\t\0")
"""Code, tables and lists: there, every character may count."""
_LEXICON: Final = (
    r"(?P<verbatim>(?:https?://|www\.)\S+|[^\s@]+@[^\s@]+|\"[^\"]*\"|“[^”]*”|«[^»]*»|„[^“”]*[“”])"
    r"|(?P<number>\d+(?:[.,:/-]\d+)*)"
    r"|(?P<word>\p{Latin}[\p{Latin}\p{M}\d]*(?:['\x{2019}.-][\p{Latin}\p{M}\d]+)*)"
    r"|(?P<end>[.!?;…]+)|(?P<pause>[,:()¿¡—]+)|(?P<other>\S)"
)
END, ASKED, PAUSE = ".", "?", ","

Words = tuple[str, ...]
Sentence = tuple[Words, ...]
"""Its parts: each begins with a linking word, after a pause, or with the sentence. What stands before all else, a
linking word at its head and a pause behind it (`In Python, how ...`), is put last."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What of a text must be the same in another one, for their answers to be."""

    language: str
    negation: Words
    numbers: Words
    names: Words
    """Quoted text, addresses, and words that mean something else with a capital letter, as they are written."""
    question: Words
    sentences: tuple[Sentence, ...]
    """In their order."""

    @property
    def words(self) -> Words:
        return tuple(sorted(word for sentence in self.sentences for part in sentence for word in part))


GUARDS: Final[tuple[tuple[str, Callable[[Reading], object]], ...]] = (
    ("language", lambda reading: reading.language),
    ("negation", lambda reading: reading.negation),
    ("numbers", lambda reading: reading.numbers),
    ("names", lambda reading: reading.names),
    ("question", lambda reading: reading.question),
    ("words", lambda reading: reading.words),
    ("order", lambda reading: reading.sentences),
)
"""By name, in the order in which they are asked."""


def difference(one: Reading, other: Reading) -> str | None:
    """The first guard that keeps the two apart; None if none does."""
    return next((name for name, of in GUARDS if of(one) != of(other)), None)


def read(text: str) -> Reading | None:
    """None if the text cannot be read for sure."""
    if len(text) > MAX_CHARS or not UNREADABLE.isdisjoint(text.strip()):
        return None
    tokens = _tokens(text.strip())
    language = _language(tokens)
    if language is None or len(tokens) > MAX_WORDS:
        return None
    return language.read(tokens)


@dataclass(frozen=True, slots=True)
class _Token:
    text: str
    kind: str

    @property
    def lower(self) -> str:
        return self.text if self.kind == "verbatim" else self.text.lower()


def _tokens(text: str) -> list[_Token]:
    """Words, numbers and signs. A word is parted at its apostrophes: `don't` is `do n't`, `l'eau` is `l eau`."""
    made = list[_Token]()
    for match in _pattern().finditer(text):
        found, kind = match.group().replace("\u2019", "'"), match.lastgroup or "other"
        if kind == "word":
            made += (_Token(part, kind) for part in _parted(found))
        elif kind == "end":
            made.append(_Token(ASKED if ASKED in found else END, kind))
        else:
            made.append(_Token(PAUSE if kind == "pause" else found, kind))
    return made


def _parted(word: str) -> list[str]:
    head, mark, tail = word.partition("'")
    if not mark:
        return [word]
    if head[-1:].lower() == "n" and tail.lower() == "t":
        return [head[:-1], "n't"] if len(head) > 1 else ["n't"]
    if tail.lower() in ("s", "d", "m", "re", "ve", "ll"):
        return [head, f"'{tail.lower()}"]
    return [head, *_parted(tail)]


@functools.cache
def _pattern() -> "re2._Regexp[str]":
    return re2.compile(_LEXICON)


class _Tables(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    typical: str
    polite: tuple[str, ...]
    auxiliary: str
    silent: str
    verbs: str
    asking: tuple[str, ...]
    commands: str
    linking: str
    negation: str
    numbers: str
    questions: str
    mention: str
    cased: str
    same: tuple[tuple[str, ...], ...]


class _Language:
    def __init__(self, name: str, tables: _Tables) -> None:
        self.name = name
        silent, linking, negation, questions = (
            frozenset(getattr(tables, field).split()) for field in ("silent", "linking", "negation", "questions")
        )
        self._silent, self._linking, self._negation, self._questions = silent, linking, negation, questions
        self._verbs, self._cased = frozenset(tables.verbs.split()), frozenset(tables.cased.split())
        self._mention = frozenset(tables.mention.split())
        self._numbers = dict(pair.split("=") for pair in tables.numbers.split())
        self._auxiliary, self._commands = frozenset(tables.auxiliary.split()), frozenset(tables.commands.split())
        self._polite = tuple(self._spelled(phrase) for phrase in tables.polite)
        self._asking = _Phrases(
            {
                (*self._spelled(asking), *polite, command): (command,)
                for asking in tables.asking
                for polite in ((), *self._polite)
                for command in self._commands
            }
        )
        self._canonical = frozenset(group[0] for group in tables.same if " " not in group[0])
        self._same = _Phrases(
            {self._spelled(phrase): self._spelled(group[0]) for group in tables.same for phrase in group}
        )
        self.common = (
            silent
            | linking
            | negation
            | questions
            | self._verbs
            | self._commands
            | self._auxiliary
            | set(tables.typical.split())
        )
        """Words that show that a text is in this language."""

    def _spelled(self, phrase: str) -> Words:
        return tuple(token.lower for token in self._split(_tokens(phrase)))

    def _split(self, tokens: Sequence[_Token]) -> list[_Token]:
        """French joins verbs and their subjects with hyphens: `peux-tu`."""
        if self.name != "fr":
            return list(tokens)
        return [
            _Token(part, one.kind)
            for one in tokens
            for part in (one.text.split("-") if one.kind == "word" else [one.text])
        ]

    def read(self, tokens: Sequence[_Token]) -> Reading | None:
        tokens = self._split(tokens)
        words = self._rewritten(tuple(token.lower for token in tokens))
        if words is None:
            return None
        return Reading(
            language=self.name,
            negation=tuple(word for word in words if word in self._negation),
            numbers=tuple(
                word for word in words if word[0].isdigit() or word in ("half", "quarter", "double", "twice")
            ),
            names=tuple(self._names(tokens)),
            question=self._question(words),
            sentences=tuple(self._sentences(words)),
        )

    def _rewritten(self, words: Words) -> Words | None:
        """With one phrase for all that say the same; None where two of them stand side by side, and differ."""
        plain = self._asking.replaced(self._without_polite(words))
        made = self._same.replaced(plain)
        if not self._mention.isdisjoint(made):
            return words
        if any(made.count(word) > max(1, plain.count(word)) for word in self._canonical):
            return None
        return tuple(self._numbers.get(word, word) for word in made)

    def _without_polite(self, words: Words) -> Words:
        """Politeness before or after what is asked is nothing; within it, it may be what is asked about."""
        opens = self._commands | self._questions | self._verbs | {END, ASKED, PAUSE}
        made, at = list[str](), 0
        while at < len(words):
            found = (_end(words, at, phrase) for phrase in self._polite)
            end = next((end for end in found if end is not None), None)
            begins = not made or made[-1] in (END, ASKED, PAUSE)
            if end is not None and begins and (end == len(words) or words[end] in opens):
                at = end
            else:
                made.append(words[at])
                at += 1
        return tuple(made)

    def _names(self, tokens: Sequence[_Token]) -> Iterator[str]:
        """A capital letter says nothing at the beginning of a sentence."""
        first = True
        for one in tokens:
            if one.kind == "verbatim" or (self._is_name(one) and not (first and one.text.istitle())):
                yield one.text
            first = one.kind == "end" or (first and one.kind in ("pause", "other"))

    def _is_name(self, token: _Token) -> bool:
        """Of those that a capital letter makes another word: `Turkey`, `US`, the `A` of `vitamin A`."""
        letter = len(token.text) == 1 and (self.name, token.text) != ("en", "I")
        return token.text != token.lower and (letter or token.lower in self._cased)

    def _question(self, words: Words) -> Words:
        """What is asked for; without such a word, whether anything is, and by which verb."""
        asked = tuple(word for word in words if word in self._questions)
        first = next((word for word in words if word not in (END, ASKED, PAUSE)), "")
        verb = first if first in self._verbs else ""
        if first in self._commands and not asked:
            return (first,)
        return asked or (ASKED if verb or ASKED in words else "", verb)

    def _sentences(self, words: Words) -> Iterator[Sentence]:
        parts, part, fronted = list[Words](), list[str](), list[Words]()
        for word, following in zip((*words, END), (*words[1:], END, END), strict=True):
            closes = word in (END, ASKED)
            silent = word in self._silent or (word in self._auxiliary and following not in (END, ASKED))
            if (closes or word == PAUSE or word in self._linking) and part:
                leads = word == PAUSE and not parts and not fronted and part[0] in self._linking
                (fronted if leads else parts).append(tuple(part))
                part = []
            if closes and (parts or fronted):
                yield (*parts, *fronted)
                parts, fronted = [], []
            if word not in (END, ASKED, PAUSE) and not silent:
                part.append(word)


class _Phrases:
    """Rewrites phrases, the longest first, from left to right; what was rewritten is not looked at again. A pause
    within a phrase is passed over: `sag mir, wo`."""

    def __init__(self, table: Mapping[Words, Words]) -> None:
        self._by_first: dict[str, list[tuple[Words, Words]]] = {}
        for phrase in sorted(table, key=len, reverse=True):
            self._by_first.setdefault(phrase[0], []).append((phrase, table[phrase]))

    def replaced(self, words: Words) -> Words:
        made, at = list[str](), 0
        while at < len(words):
            for phrase, instead in self._by_first.get(words[at], ()):
                if (end := _end(words, at, phrase)) is not None:
                    made += instead
                    at = end
                    break
            else:
                made.append(words[at])
                at += 1
        return tuple(made)


def _end(words: Words, at: int, phrase: Words) -> int | None:
    """Where this phrase ends if it begins at `at`."""
    for number, word in enumerate(phrase):
        if number and at < len(words) and words[at] == PAUSE:
            at += 1
        if at == len(words) or words[at] != word:
            return None
        at += 1
    return at


@functools.cache
def _languages() -> Mapping[str, _Language]:
    text = files("edge_agent.cache").joinpath("words.toml").read_text("utf-8")
    tables = msgspec.convert(tomllib.loads(text), dict[str, _Tables])
    return MappingProxyType({name: _Language(name, table) for name, table in tables.items()})


def _language(tokens: Sequence[_Token]) -> _Language | None:
    """The one that most of the text's words are common in; None if there is none, or more than one."""
    words = [part for token in tokens if token.kind == "word" for part in token.lower.split("-")]
    shares = sorted(
        ((sum(word in one.common for word in words), name) for name, one in _languages().items()), reverse=True
    )
    (best, name), (second, _) = shares[:2]
    foreign = any(token.kind == "other" and token.text.isalpha() for token in tokens)
    return _languages()[name] if best > second and not foreign else None
