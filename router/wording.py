"""How a prompt is worded, as numbers: text measures, word hashes, hashed n-grams. Linear time, bounded by `CLIP`.

All hashing is one polynomial prefix sum over the UTF-8 bytes, modulo 2**64: the hash of bytes [i, j) is
(P[j] - P[i]) * BASE**-i, so all words and all character n-grams of a text cost a few vector operations and no Python
loop (after Karp and Rabin 1987).
"""

import functools
import math
import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import repeat

import numpy as np
from numpy.typing import NDArray

from router.lexicon import LEXICON
from router.tokens import Tokens, tokens

CLIP = 2400  # characters looked at: the first 1,800 and the last 600; the median question of the outcome tables has 340
_TAIL = 600
_BASE = 0x9E3779B97F4A7C15  # odd, so invertible modulo 2**64
_INVERSE = pow(_BASE, -1, 1 << 64)
_MIX = np.uint64(0xD6E8FEB86659FD93)
_PAIR = np.uint64(0xA0761D6478BD642F)
_FAR, _NEAR = np.uint64(32), np.uint64(29)
_SIZES = (3, 4, 5)  # bytes of an n-gram
_CODES = bytes((byte + 1) % 256 for byte in range(256))  # of a byte; that of the one which no UTF-8 has is 0
_INSIDE = bytes(97 <= byte <= 122 or 48 <= byte <= 57 or byte >= 128 for byte in range(256))  # of a word
_CAPITALS = bytes(range(65, 91))

_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
_FOREIGN = re.compile(r"[^\x00-\x7f]")
_OPTION = re.compile(r"\n[A-P][.)] ")
_VALUE = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?")
_ROMAN = re.compile(r"\bI+\b")

_OPENERS = frozenset(("which", "what", "who", "how", "when", "where"))

Floats = NDArray[np.float64]
Hashes = NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class Wording:
    """One prompt as numbers: `measures` (MEASURES floats), a hash per word in order, a hash per n-gram occurrence."""

    measures: Floats
    words: Hashes
    grams: Hashes


@functools.cache
def _categories() -> dict[bytes, bytes]:
    """The numbers of the word lists that a word is in, one a byte."""
    found: dict[bytes, bytes] = {}
    for number, words in enumerate(LEXICON.values()):
        for word in words.encode().split():
            found[word] = found.get(word, b"") + bytes([number])
    return found


@functools.cache
def _powers() -> tuple[Hashes, Hashes]:
    """BASE**i and BASE**-(i + 1) for every place in a clipped text's bytes (up to 3 a character, more once lowered)."""
    size = 6 * CLIP
    up, down = np.full(size, _BASE, np.uint64), np.full(size, _INVERSE, np.uint64)
    up[0] = 1
    return np.multiply.accumulate(up), np.multiply.accumulate(down)


def clip(text: str) -> str:
    return text if len(text) <= CLIP else text[: CLIP - _TAIL] + text[-_TAIL:]


def read(text: str) -> Wording:
    clipped = clip(text)
    whole = _plain(clipped)
    cut = _OPTION.search(clipped)
    if cut is None:
        measures = _measure(clipped, clipped, "", whole, len(text))
    else:
        stem, options = clipped[: cut.start()], clipped[cut.start() :]
        measures = _measure(clipped, stem, options, _plain(stem), len(text))
    return Wording(np.array(measures, np.float64), *_hash(whole))


def _plain(text: str) -> str:
    """In lower case, with one blank between words and around them all."""
    return f" {' '.join(text.lower().split())} "


def _hash(text: str) -> tuple[Hashes, Hashes]:
    """Hashes of the words, and of all 3- to 5-byte grams, word pairs and words together (in no order that matters)."""
    flat = text.encode("utf-8", "ignore")
    up, down = _powers()
    codes = np.frombuffer((b"\xff" + flat).translate(_CODES), np.uint8)  # a 0 before them all: sums begin with none
    prefix = np.add.accumulate(codes * up[: len(codes)])
    inside = np.frombuffer(flat.translate(_INSIDE), np.uint8)  # begins and ends with a blank, which no word holds
    (edges,) = (inside[1:] != inside[:-1]).nonzero()  # the last byte before each
    starts, after = edges[::2], prefix[1:]
    words = after[edges[1::2]]
    words -= after[starts]
    words *= down[1:][starts]
    _mix(words)
    return words, _grams(prefix, down, words)


def _grams(prefix: Hashes, down: Hashes, words: Hashes) -> Hashes:
    """All in one array, so that they are mixed at once."""
    places, pairs = [max(len(prefix) - n, 0) for n in _SIZES], max(len(words) - 1, 0)
    grams = np.empty(sum(places) + pairs + len(words), np.uint64)
    at = 0
    for n, count in zip(_SIZES, places, strict=True):
        part = grams[at : at + count]
        np.subtract(prefix[n:], prefix[:count], out=part)
        part *= down[:count]
        part += np.uint64(n)
        at += count
    both = grams[at : at + pairs]
    np.multiply(words[:-1], _PAIR, out=both)
    both += words[1:]
    _mix(grams[: at + pairs])
    grams[at + pairs :] = words
    return grams


def _mix(hashes: Hashes) -> None:
    hashes ^= hashes >> _FAR
    hashes *= _MIX
    hashes ^= hashes >> _NEAR


def _measure(text: str, stem: str, options: str, asked: str, length: int) -> list[float]:
    """The text measures of `text`, cut from a prompt of `length` characters: its stem, which `asked` is in plain, and
    its options. Logarithms of counts, shares and flags."""
    said = tokens(asked)
    return [
        math.log1p(length),
        *_shape(stem, asked, said),
        *_quantities(said.numbers, said.total),
        *(_choices(options, said) if options else _NO_CHOICES),
        *_symbols(text, stem, options, said.signs),
        *_program(stem),
        math.log1p(len(stem)) * (not options and "def " not in stem),
        float("\\" in stem and not options),
        float(said.first in _OPENERS),
        *map(math.log1p, _subjects(said)),
    ]


def _subjects(said: Tokens) -> list[int]:
    """How many of the tokens each word list of the lexicon has."""
    counts = [0] * len(LEXICON)
    for number in b"".join(map(_categories().get, said.words + said.commands, repeat(b""))):
        counts[number] += 1
    return counts


def _shape(stem: str, asked: str, said: Tokens) -> list[float]:
    lengths = list(map(len, said.words))
    words, long = len(lengths), [length for length in lengths if length > 7]
    size, sentences = max(words, 1), sum(map(asked.count, (". ", "! ", "? ")))
    last = stem.rstrip()[-1:]
    return [
        math.log1p(len(stem)),
        math.log1p(words),
        math.log1p(said.total),
        sum(lengths) / size,
        len(long) / size,
        len([length for length in long if length > 10]) / size,
        len(said.kinds) / max(said.total, 1),
        math.log1p(sentences),
        words / (1 + sentences),
        said.signs.count(b"?"),
        float(last == "?"),
        float("__" in stem or last == "_"),
    ]


def _quantities(numbers: Sequence[str], tokens: int) -> Sequence[float]:
    if not numbers:
        return _NO_QUANTITIES
    values = [float(number) if number.isdecimal() else _value(number) for number in numbers[:50] if len(number) < 20]
    return [
        math.log1p(len(numbers)),
        math.log1p(len(set(numbers))),
        len(numbers) / tokens,
        math.log1p(max(values, default=0.0)),
        math.log1p(len([number for number in numbers if "." in number])),
        math.log1p(sum(map(len, numbers))),
        math.log1p(len([value for value in values if value > 100])),
        float(not all(map(float.is_integer, values))),
    ]


_NO_QUANTITIES = (0.0,) * 8


def _value(number: str) -> float:
    """With commas between thousands; of several points only the last is one."""
    whole, point, part = number.replace(",", "").rpartition(".")
    return float(f"{whole.replace('.', '')}{point}{part}")


_NO_CHOICES = (0.0, 0.0, 1.0, *([0.0] * 19))  # what `_choices` says of no options


def _choices(options: str, asked: Tokens) -> list[float]:
    """The answer options of a multiple-choice question: how many, how long, how numeric."""
    parts = _OPTION.split(options)[1:]
    lengths = [len(part) for part in parts]
    mean = sum(lengths) / len(lengths)
    spread = math.sqrt(sum((length - mean) ** 2 for length in lengths) / len(lengths))
    said = [tokens(part.lower()) for part in parts]
    count = len(parts)
    words = count + sum(len(one.words) for one in said)  # each option's own letter is one
    digits = len(_NUMBER.findall(options))
    bags = [one.kinds for one in said[:16]]
    shared, offered = functools.reduce(operator.and_, bags), functools.reduce(operator.or_, bags)
    values = [
        float(found[0].replace(",", "")) for part in parts if (found := _VALUE.match(part)) and len(found[0]) < 20
    ]
    numeric = sum(part[:1].isdigit() or part[:1] in tuple("$-+\\") for part in parts) / count
    return [
        math.log1p(len(options)),
        count,
        0.0,
        float(count <= 4),
        float(count > 4),
        float(count == 10),
        numeric,
        math.log1p(max(lengths)),
        math.log1p(min(lengths)),
        spread / (1 + mean),
        math.log1p(words),
        math.log1p(digits),
        words / count,
        float("none of" in options or "None of" in options),
        float("all of" in options or "All of" in options),
        float(_ROMAN.search(options) is not None),
        math.log1p(len(shared)),
        len(offered & asked.kinds) / max(len(offered), 1),
        math.log1p(len(offered)),
        math.log10(max(values) + 1e-3) - math.log10(min(values) + 1e-3) if len(values) > 1 else 0.0,
        float(any(value % 1 for value in values)),
        float(options.rstrip()[-7:].lower() == "answer:"),
    ]


def _symbols(text: str, stem: str, options: str, signs: bytes) -> list[float]:
    """`signs` are those of the stem."""
    size = max(len(stem), 1)
    return [
        *map(math.log1p, map(signs.count, b"$\\(%/,")),
        math.log1p(stem.count("\n")),
        math.log1p(sum(map(signs.count, b"=<>+*^"))),
        math.log1p(sum(map(options.count, "=<>+*^\\$")) if options else 0),
        math.log1p(sum(map(signs.count, b"\"'"))),
        math.log1p(0 if text.isascii() else len(_FOREIGN.findall(text))),
        _capitals(stem) / size,
        float("Statement 1" in stem),
        float("Scenario 1" in stem),
    ]


def _capitals(text: str) -> int:
    plain = text.encode("ascii", "ignore")
    foreign = () if len(plain) == len(text) else _FOREIGN.findall(text)
    return len(plain) - len(plain.translate(None, _CAPITALS)) + sum(map(str.isupper, foreign))


def _program(stem: str) -> list[float]:
    """Measures of the last function in the text; all zero where there is none."""
    if "def " not in stem:
        return [0.0] * 7
    body = stem.rsplit("def ", 1)[-1]
    depth = max(len(line) - len(line.lstrip()) for line in body.split("\n"))
    return [
        1.0,
        math.log1p(len(body)),
        math.log1p(body.count("    ")),
        math.log1p(body.count("[")),
        math.log1p(body.count("=")),
        math.log1p(depth),
        math.log1p(len(body.rsplit("assert", 1)[-1])),
    ]
