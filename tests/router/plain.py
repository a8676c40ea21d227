"""The difficulty of a prompt step by step, as slowly as it is said: what the fast way is held against."""

import math
import re
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from router.difficulty import Difficulty
from router.lexicon import LEXICON
from router.wording import clip

WHOLE = 1 << 64
BASE = 0x9E3779B97F4A7C15
TOKEN = re.compile(r"[a-z]+|\d+(?:[.,]\d+)*|\\[a-z]+|[^\w\s]")
OPTION = re.compile(r"\n[A-P][.)] ")


@dataclass(frozen=True)
class Plain:
    measures: list[float]
    words: list[int]
    grams: list[int]


def read(text: str) -> Plain:
    clipped = clip(text)
    flat = f" {' '.join(clipped.lower().split())} ".encode("utf-8", "ignore")
    words = [mixed(summed(word)) for word in re.findall(rb"[a-z0-9\x80-\xff]+", flat)]
    grams = [mixed(summed(flat[at : at + n]) + n) for n in (3, 4, 5) for at in range(len(flat) - n + 1)]
    pairs = [mixed(one * 0xA0761D6478BD642F + other) for one, other in pairwise(words)]
    return Plain(measured(clipped, len(text)), words, sorted(grams + words + pairs))


def summed(piece: bytes) -> int:
    return sum((byte + 1) * pow(BASE, at, WHOLE) for at, byte in enumerate(piece))


def mixed(number: int) -> int:
    number %= WHOLE
    number ^= number >> 32
    number = number * 0xD6E8FEB86659FD93 % WHOLE
    return number ^ number >> 29


def measured(text: str, length: int) -> list[float]:
    cut = OPTION.search(text)
    stem, options = (text[: cut.start()], text[cut.start() :]) if cut else (text, "")
    tokens = TOKEN.findall(stem.lower())
    words = [token for token in tokens if "a" <= token[0] <= "z"]
    numbers = [token for token in tokens if token[0].isdigit()]
    size = max(len(words), 1)
    return [
        math.log1p(length),
        math.log1p(len(stem)),
        math.log1p(len(words)),
        math.log1p(len(tokens)),
        sum(map(len, words)) / size,
        sum(len(word) > 7 for word in words) / size,
        sum(len(word) > 10 for word in words) / size,
        len(set(tokens)) / max(len(tokens), 1),
        math.log1p(sentences := len(re.findall(r"[.!?](?=\s|$)", stem))),
        len(words) / (1 + sentences),
        stem.count("?"),
        float(stem.rstrip()[-1:] == "?"),
        float("__" in stem or stem.rstrip()[-1:] == "_"),
        *quantities(numbers, len(tokens)),
        *choices(options, tokens),
        *(math.log1p(stem.count(sign)) for sign in "$\\(%/,\n"),
        math.log1p(sum(char in "=<>+*^" for char in stem)),
        math.log1p(sum(char in "=<>+*^\\$" for char in options)),
        math.log1p(sum(char in "\"'" for char in stem)),
        math.log1p(sum(not char.isascii() for char in text)),
        sum(char.isupper() for char in stem) / max(len(stem), 1),
        float("Statement 1" in stem),
        float("Scenario 1" in stem),
        *program(stem),
        math.log1p(len(stem)) if not options and "def " not in stem else 0.0,
        float("\\" in stem and not options),
        float(tokens[:1] in [[word] for word in ("which", "what", "who", "how", "when", "where")]),
        *(math.log1p(sum(tokens.count(word) for word in set(words.split()))) for words in LEXICON.values()),
    ]


def quantities(numbers: list[str], tokens: int) -> list[float]:
    values = [float(re.sub(r"\.(?=.*\.)", "", number.replace(",", ""))) for number in numbers[:50] if len(number) < 20]
    return [
        math.log1p(len(numbers)),
        math.log1p(len(set(numbers))),
        len(numbers) / max(tokens, 1),
        math.log1p(max([*values, 0.0])),
        math.log1p(sum("." in number for number in numbers)),
        math.log1p(sum(map(len, numbers))),
        math.log1p(sum(value > 100 for value in values)),
        float(any(value % 1 for value in values)),
    ]


def choices(options: str, asked: list[str]) -> list[float]:
    parts = OPTION.split(options)[1:]
    lengths = [len(part) for part in parts] or [0]
    mean = sum(lengths) / len(lengths)
    spread = math.sqrt(sum((length - mean) ** 2 for length in lengths) / len(lengths))
    tokens, count = TOKEN.findall(options.lower()), len(parts)
    words = sum("a" <= token[0] <= "z" for token in tokens)
    bags = [set(TOKEN.findall(part.lower())) for part in parts[:16]]
    shared, offered = (set.intersection(*bags), set.union(*bags)) if bags else (set(), set())
    found = [re.match(r"\d+(?:,\d{3})*(?:\.\d+)?", part) for part in parts]
    values = [float(one[0].replace(",", "")) for one in found if one and len(one[0]) < 20]
    return [
        math.log1p(len(options)),
        count,
        float(count == 0),
        float(0 < count <= 4),
        float(count > 4),
        float(count == 10),
        sum(part[:1].isdigit() or part[:1] in ("$", "-", "+", "\\") for part in parts) / max(count, 1),
        math.log1p(max(lengths)),
        math.log1p(min(lengths)),
        spread / (1 + mean),
        math.log1p(words),
        math.log1p(sum(token[0].isdigit() for token in tokens)),
        words / max(count, 1),
        float("none of" in options or "None of" in options),
        float("all of" in options or "All of" in options),
        float(re.search(r"\bI+\b", options) is not None),
        math.log1p(len(shared)),
        len(offered & set(asked)) / max(len(offered), 1),
        math.log1p(len(offered)),
        math.log10(max(values) + 1e-3) - math.log10(min(values) + 1e-3) if len(values) > 1 else 0.0,
        float(any(value % 1 for value in values)),
        float(options.rstrip()[-7:].lower() == "answer:"),
    ]


def program(stem: str) -> list[float]:
    if "def " not in stem:
        return [0.0] * 7
    body = stem.rsplit("def ", 1)[-1]
    depth = max(len(line) - len(line.lstrip()) for line in body.split("\n"))
    tail = body.rsplit("assert", 1)[-1]
    counts = (len(body), body.count("    "), body.count("["), body.count("="), depth, len(tail))
    return [1.0, *map(math.log1p, counts)]


def encoded(model: Difficulty, text: str) -> tuple[np.ndarray, dict[int, float]]:
    """The dense inputs, and the weight of each n-gram's bucket."""
    encoder, plain = model.encoder, read(text)
    row = {int(key): at for at, key in enumerate(encoder.keys)}
    known = [encoder.vectors[row[word]].astype(float) for word in plain.words if word in row]
    vector = np.zeros(len(encoder.scale))
    if known:
        vector = sum(known) / len(known) * encoder.scale - encoder.centre
        vector = vector / (math.sqrt((vector**2).sum()) + 1e-9)
    count: dict[int, int] = {}
    for gram in plain.grams:
        bucket = gram % len(encoder.rarity)
        count[bucket] = count.get(bucket, 0) + 1
    weight = {bucket: (1 + math.log(n)) * float(encoder.rarity[bucket]) for bucket, n in sorted(count.items())}
    length = math.sqrt(sum(one**2 for one in weight.values())) + 1e-9
    dense = np.array([*plain.measures, *vector, len(known) / max(len(plain.words), 1)])
    return dense, {bucket: one / length for bucket, one in weight.items()}


def score(model: Difficulty, text: str) -> float:
    heads = model.heads
    dense, weight = encoded(model, text)
    inputs = np.clip((dense - heads.mean) / heads.spread, -6, 6)
    asked = np.exp(inputs @ heads.gate[:-1] + heads.gate[-1])
    asked = asked / asked.sum()
    gain = known = 0.0
    for expert, share in enumerate(asked):
        if share <= 1e-3:
            continue
        offset = heads.whiten[expert].astype(float) @ (inputs - heads.middle[expert])
        excess = max((offset**2).mean() / heads.reach[expert] - 1, 0)
        share = share * math.exp(-((excess / 0.25) ** 2))
        weak, strong = (
            logistic(float(inputs @ side[:-1, expert] + side[-1, expert])) for side in (heads.weak, heads.strong)
        )
        forest = zip(heads.feature[expert], heads.limit[expert], heads.leaf[expert], strict=True)
        trees = sum(walked(*tree, dense) for tree in forest)
        grams = sum(one * float(heads.gram[bucket, expert]) for bucket, one in weight.items()) + heads.base[expert]
        gain += share * float(heads.blend[expert] @ [strong - weak, trees, grams])
        known += share
    vector = dense[-1 - len(model.encoder.scale) : -1]
    gain += (1 - known) * (math.tanh(float(vector @ heads.prior[:-1])) * 0.25 + heads.prior[-1])
    return logistic(float(heads.curve[0] * gain + heads.curve[1]))


def logistic(logit: float) -> float:
    return 1 / (1 + math.exp(-min(max(logit, -30), 30)))


def walked(feature: np.ndarray, limit: np.ndarray, leaf: np.ndarray, inputs: np.ndarray) -> float:
    """The leaf of one tree that these inputs reach, node by node."""
    node = 0
    while node < 7:
        node = 2 * node + (2 if inputs[feature[node]] > limit[node] else 1)
    return float(leaf[node - 7])
