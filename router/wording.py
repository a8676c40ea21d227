"""How a prompt is worded, as numbers: text measures, word hashes, hashed n-grams. Linear time, bounded by `CLIP`.

All hashing is one polynomial prefix sum over the UTF-8 bytes, modulo 2**64: the hash of bytes [i, j) is
(P[j] - P[i]) * BASE**-i, so all words and all character n-grams of a text cost a few vector operations and no Python
loop (after Karp and Rabin 1987).
"""

import bisect
import functools
import math
import re
from dataclasses import dataclass
from itertools import chain, filterfalse, repeat

import numpy as np
from numpy.typing import NDArray

from router.lexicon import LEXICON

CLIP = 2400  # characters looked at: the first 1,800 and the last 600; the median question of the outcome tables has 340
_TAIL = 600
_BASE = 0x9E3779B97F4A7C15  # odd, so invertible modulo 2**64
_INVERSE = pow(_BASE, -1, 1 << 64)
_MIX = np.uint64(0xD6E8FEB86659FD93)
_PAIR = np.uint64(0xA0761D6478BD642F)
_ONE, _FAR, _NEAR = np.uint64(1), np.uint64(32), np.uint64(29)
_SIZES = (3, 4, 5)  # bytes of an n-gram
_INSIDE = bytes(97 <= byte <= 122 or 48 <= byte <= 57 or byte >= 128 for byte in range(256))  # of a word
_CAPITALS = bytes(range(65, 91))

_TOKEN = re.compile(r"[a-z]+|\d+(?:[.,]\d+)*|\\[a-z]+|[^\w\s]")
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
_FOREIGN = re.compile(r"[^\x00-\x7f]")
_OPTION = re.compile(r"\n[A-P][.)] ")
_SENTENCE = re.compile(r"[.!?](?=\s|$)")
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
def _categories() -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for number, words in enumerate(LEXICON.values()):
        for word in words.split():
            found[word] = (*found.get(word, ()), number)
    return found


@functools.cache
def _powers() -> tuple[Hashes, Hashes]:
    """BASE**i and BASE**-i for every byte position of a clipped text (up to 4 bytes a character, more once lowered)."""
    size = 6 * CLIP
    up = np.full(size, _BASE, np.uint64)
    down = np.full(size, _INVERSE, np.uint64)
    up[0] = down[0] = 1
    return np.multiply.accumulate(up), np.multiply.accumulate(down)


def clip(text: str) -> str:
    return text if len(text) <= CLIP else text[: CLIP - _TAIL] + text[-_TAIL:]


def read(text: str) -> Wording:
    clipped = clip(text)
    words, grams = _hash(clipped)
    return Wording(np.array(_measure(clipped, len(text)), np.float64), words, grams)


def _hash(text: str) -> tuple[Hashes, Hashes]:
    """Hashes of the words, and of all 3- to 5-byte grams, word pairs and words together (in no order that matters)."""
    flat = f" {' '.join(text.lower().split())} ".encode("utf-8", "ignore")
    size = len(flat)
    up, down = _powers()
    codes = np.add(np.frombuffer(flat, np.uint8), _ONE, dtype=np.uint64)
    codes *= up[:size]
    prefix = np.zeros(size + 1, np.uint64)
    codes.cumsum(out=prefix[1:])
    inside = np.frombuffer(flat.translate(_INSIDE), np.uint8)  # begins and ends with a blank, which no word holds
    edges = np.flatnonzero(inside[1:] != inside[:-1])
    edges += 1
    starts = edges[::2]
    words = prefix[edges[1::2]]
    words -= prefix[starts]
    words *= down[starts]
    _mix(words)
    return words, _grams(prefix, down, words)


def _grams(prefix: Hashes, down: Hashes, words: Hashes) -> Hashes:
    """All in one array, so that they are mixed at once."""
    size, pairs = len(prefix) - 1, max(len(words) - 1, 0)
    grams = np.empty(sum(max(size - n + 1, 0) for n in _SIZES) + pairs + len(words), np.uint64)
    at = 0
    for n in _SIZES:
        part = grams[at : at + max(size - n + 1, 0)]
        np.subtract(prefix[n:], prefix[: len(part)], out=part)
        part *= down[: len(part)]
        part += np.uint64(n)
        at += len(part)
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


def _measure(text: str, length: int) -> list[float]:
    """The text measures of `text`, cut from a prompt of `length` characters; logarithms of counts, shares and flags."""
    cut = _OPTION.search(text)
    stem, options = (text[: cut.start()], text[cut.start() :]) if cut else (text, "")
    tokens = _TOKEN.findall(stem.lower())
    return [
        math.log1p(length),
        *_shape(stem, tokens),
        *_quantities(_numbers(tokens), len(tokens)),
        *(_choices(options, tokens) if options else _NO_CHOICES),
        *_symbols(text, stem, options),
        *_program(stem),
        math.log1p(len(stem)) * (not options and "def " not in stem),
        float("\\" in stem and not options),
        float(bool(tokens) and tokens[0] in _OPENERS),
        *map(math.log1p, _subjects(tokens)),
    ]


def _subjects(tokens: list[str]) -> list[int]:
    """How many of the tokens each word list of the lexicon has."""
    counts = [0] * len(LEXICON)
    for category in chain.from_iterable(map(_categories().get, tokens, repeat(()))):
        counts[category] += 1
    return counts


def _words(tokens: list[str]) -> list[str]:
    """Of all tokens only words are nothing but letters."""
    return list(filter(str.isalpha, tokens))


def _numbers(tokens: list[str]) -> list[str]:
    return [token for token in filterfalse(str.isalpha, tokens) if token[0].isdigit()]


def _shape(stem: str, tokens: list[str]) -> list[float]:
    lengths = sorted(map(len, _words(tokens)))
    words, total = len(lengths), max(len(tokens), 1)
    size, sentences = max(words, 1), len(_SENTENCE.findall(stem))
    last = stem.rstrip()[-1:]
    return [
        math.log1p(len(stem)),
        math.log1p(words),
        math.log1p(len(tokens)),
        sum(lengths) / size,
        (words - bisect.bisect_right(lengths, 7)) / size,
        (words - bisect.bisect_right(lengths, 10)) / size,
        len(set(tokens)) / total,
        math.log1p(sentences),
        words / (1 + sentences),
        stem.count("?"),
        float(last == "?"),
        float("__" in stem or last == "_"),
    ]


def _quantities(numbers: list[str], tokens: int) -> list[float]:
    values = [_value(number) for number in numbers[:50] if len(number) < 20]
    return [
        math.log1p(len(numbers)),
        math.log1p(len(set(numbers))),
        len(numbers) / max(tokens, 1),
        math.log1p(max(values, default=0.0)),
        math.log1p(sum("." in number for number in numbers)),
        math.log1p(sum(map(len, numbers))),
        math.log1p(sum(value > 100 for value in values)),
        float(any(value % 1 for value in values)),
    ]


def _value(number: str) -> float:
    """With commas between thousands; of several points only the last is one."""
    if number.isdecimal():
        return float(number)
    whole, point, part = number.replace(",", "").rpartition(".")
    return float(f"{whole.replace('.', '')}{point}{part}")


_NO_CHOICES = (0.0, 0.0, 1.0, *([0.0] * 19))  # what `_choices` says of no options


def _choices(options: str, asked: list[str]) -> list[float]:
    """The answer options of a multiple-choice question: how many, how long, how numeric."""
    parts = _OPTION.split(options)[1:]
    lengths = [len(part) for part in parts]
    mean = sum(lengths) / len(lengths)
    spread = math.sqrt(sum((length - mean) ** 2 for length in lengths) / len(lengths))
    said = [_TOKEN.findall(part.lower()) for part in parts]
    count = len(parts)
    words = count + sum(len(_words(tokens)) for tokens in said)  # each option's own letter is one
    digits = len(_NUMBER.findall(options))
    bags = [set(tokens) for tokens in said[:16]]
    shared, offered = set.intersection(*bags), set.union(*bags)
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
        len(offered & set(asked)) / max(len(offered), 1),
        math.log1p(len(offered)),
        math.log10(max(values) + 1e-3) - math.log10(min(values) + 1e-3) if len(values) > 1 else 0.0,
        float(any(value % 1 for value in values)),
        float(options.rstrip()[-7:].lower() == "answer:"),
    ]


def _symbols(text: str, stem: str, options: str) -> list[float]:
    size = max(len(stem), 1)
    return [
        *(math.log1p(stem.count(sign)) for sign in "$\\(%/,\n"),
        math.log1p(sum(map(stem.count, "=<>+*^"))),
        math.log1p(sum(map(options.count, "=<>+*^\\$"))),
        math.log1p(stem.count('"') + stem.count("'")),
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
