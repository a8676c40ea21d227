"""How a prompt is worded, as numbers: text measures, word hashes, hashed n-grams. Linear time, bounded by `CLIP`.

All hashing is one polynomial prefix sum over the UTF-8 bytes, modulo 2**64: the hash of bytes [i, j) is
(P[j] - P[i]) * BASE**-i, so all words and all character n-grams of a text cost a few vector operations and no Python
loop (after Karp and Rabin 1987).
"""

import functools
import math
import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from router.lexicon import LEXICON

CLIP = 2400  # characters looked at: the first 1,800 and the last 600; the median question of the outcome tables has 340
_TAIL = 600
_BASE = 0x9E3779B97F4A7C15  # odd, so invertible modulo 2**64
_INVERSE = pow(_BASE, -1, 1 << 64)
_MIX = np.uint64(0xD6E8FEB86659FD93)
_PAIR = np.uint64(0xA0761D6478BD642F)

_TOKEN = re.compile(r"[a-z]+|\d+(?:[.,]\d+)*|\\[a-z]+|[^\w\s]")
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
    """Hashes of the words, and of all 3- to 5-byte grams, words and word pairs together."""
    flat = f" {' '.join(text.lower().split())} ".encode("utf-8", "ignore")[: 6 * CLIP]
    data = np.frombuffer(flat, np.uint8)
    up, down = _powers()
    prefix = np.zeros(len(data) + 1, np.uint64)
    np.cumsum((data.astype(np.uint64) + np.uint64(1)) * up[: len(data)], out=prefix[1:])
    inside = ((data >= 97) & (data <= 122)) | ((data >= 48) & (data <= 57)) | (data >= 128)
    edges = np.flatnonzero(np.diff(inside.astype(np.int8), prepend=0, append=0))
    starts, ends = edges[::2], edges[1::2]
    words = _mix((prefix[ends] - prefix[starts]) * down[starts])
    grams = [
        _mix((prefix[n:] - prefix[:-n]) * down[: len(data) - n + 1] + np.uint64(n)) for n in (3, 4, 5) if len(data) >= n
    ]
    return words, np.concatenate([*grams, words, _mix(words[:-1] * _PAIR + words[1:])])


def _mix(hashes: Hashes) -> Hashes:
    hashes = hashes ^ (hashes >> np.uint64(32))
    hashes = hashes * _MIX
    return hashes ^ (hashes >> np.uint64(29))


def _measure(text: str, length: int) -> list[float]:
    """The text measures of `text`, cut from a prompt of `length` characters; logarithms of counts, shares and flags."""
    cut = _OPTION.search(text)
    stem, options = (text[: cut.start()], text[cut.start() :]) if cut else (text, "")
    tokens = _TOKEN.findall(stem.lower())
    counts, numbers, found = _tally(tokens)
    sentences = len(_SENTENCE.findall(stem))
    return [
        math.log1p(length),
        *_shape(stem, tokens, found, sentences),
        *_quantities(numbers, len(tokens)),
        *_choices(options, tokens),
        *_symbols(text, stem, options),
        *_program(stem),
        math.log1p(len(stem)) * (not options and "def " not in stem),
        float("\\" in stem and not options),
        float(bool(tokens) and tokens[0] in _OPENERS),
        *map(math.log1p, counts),
    ]


def _tally(tokens: list[str]) -> tuple[list[int], list[str], tuple[int, int, int, int]]:
    """Lexicon counts, the numbers, and (words, their letters, words over 7 letters, words over 10)."""
    known = _categories()
    counts = [0] * len(LEXICON)
    numbers: list[str] = []
    words = letters = long = longer = 0
    for token in tokens:
        for category in known.get(token, ()):
            counts[category] += 1
        if token[0].isdigit():
            numbers.append(token)
        elif "a" <= token[0] <= "z":
            size = len(token)
            words, letters, long, longer = words + 1, letters + size, long + (size > 7), longer + (size > 10)
    return counts, numbers, (words, letters, long, longer)


def _shape(stem: str, tokens: list[str], found: tuple[int, int, int, int], sentences: int) -> list[float]:
    words, letters, long, longer = found
    total, size = max(len(tokens), 1), max(words, 1)
    last = stem.rstrip()[-1:]
    return [
        math.log1p(len(stem)),
        math.log1p(words),
        math.log1p(len(tokens)),
        letters / size,
        long / size,
        longer / size,
        len(set(tokens)) / total,
        math.log1p(sentences),
        words / (1 + sentences),
        stem.count("?"),
        float(last == "?"),
        float("__" in stem or last == "_"),
    ]


def _quantities(numbers: list[str], tokens: int) -> list[float]:
    values = [float(re.sub(r"\.(?=.*\.)", "", number.replace(",", ""))) for number in numbers[:50] if len(number) < 20]
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


def _choices(options: str, asked: list[str]) -> list[float]:
    """The answer options of a multiple-choice question: how many, how long, how numeric."""
    parts = _OPTION.split(options)[1:]
    lengths = [len(part) for part in parts] or [0]
    mean = sum(lengths) / len(lengths)
    spread = math.sqrt(sum((length - mean) ** 2 for length in lengths) / len(lengths))
    tokens = _TOKEN.findall(options.lower())
    words = sum("a" <= token[0] <= "z" for token in tokens)
    digits = sum(token[0].isdigit() for token in tokens)
    count = len(parts)
    bags = [set(_TOKEN.findall(part.lower())) for part in parts[:16]]
    shared, offered = (set.intersection(*bags), set.union(*bags)) if bags else (set(), set())
    values = [
        float(found[0].replace(",", "")) for part in parts if (found := _VALUE.match(part)) and len(found[0]) < 20
    ]
    numeric = sum(part[:1].isdigit() or part[:1] in tuple("$-+\\") for part in parts) / max(count, 1)
    return [
        math.log1p(len(options)),
        count,
        float(count == 0),
        float(0 < count <= 4),
        float(count > 4),
        float(count == 10),
        numeric,
        math.log1p(max(lengths)),
        math.log1p(min(lengths)),
        spread / (1 + mean),
        math.log1p(words),
        math.log1p(digits),
        words / max(count, 1),
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
        math.log1p(len(text) - len(text.encode("ascii", "ignore"))),
        sum(map(str.isupper, stem)) / size,
        float("Statement 1" in stem),
        float("Scenario 1" in stem),
    ]


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
