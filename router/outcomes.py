"""Outcome tables (who answered which question right), their split into folds, and the metrics of a router over them.

Reads the parquet files of a folder given by path; pyarrow is needed here and in training only.
"""

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from router.answer import plain, silent

Floats = NDArray[np.float64]
_PASSAGE = 300  # characters of opening that two long questions must share to be taken for questions on one passage ...
_TEMPLATE = 30  # ... unless more than this many share them: then it is an instruction before every question of a table

OTHERS = 10  # models of a table, beside the pair's own, whose outcomes are read
EXPERTS = ("choice", "many_choices", "arithmetic", "code", "contest")


@dataclass(frozen=True, slots=True)
class Pair:
    """Which column of a table is the edge (weak), which the cloud (strong)."""

    name: str
    table: str
    weak: str
    strong: str
    experts: dict[str, str]  # domain -> expert; "" = every other domain


PAIRS = (
    Pair("mmlu", "routellm_mmlu", "weak_score", "strong_score", {"": "choice"}),
    Pair("gsm8k", "routellm_gsm8k", "weak_score", "strong_score", {"": "arithmetic"}),
    Pair("mmlu_pro", "mmlu_pro", "ok:Phi-3-mini-4k-instruct", "ok:gemini-1.5-pro-002", {"": "many_choices"}),
    Pair(
        "zeroeval",
        "zeroeval",
        "ok:Phi-3.5-mini-instruct",
        "ok:gpt-4o-2024-08-06",
        {"gsm": "arithmetic", "crux": "code", "math-l5": "contest"},
    ),
)


@dataclass(frozen=True, slots=True)
class Rows:
    """Every question of every pair. weak, strong: who was right, 0 or 1; others (N, OTHERS): the same of its table's
    other models, NaN where there is none."""

    query: list[str]
    pair: NDArray[np.str_]
    domain: NDArray[np.str_]
    expert: NDArray[np.int64]
    group: NDArray[np.str_]
    suspect: NDArray[np.bool_]
    weak: Floats
    strong: Floats
    others: Floats

    def folds(self, count: int, seed: int) -> NDArray[np.int64]:
        """A fold per row; rows of one stem or one passage always share theirs."""
        return np.array([_bucket(f"{seed}:{group}", count) for group in self.group])

    def domain_folds(self, pair: str, count: int, seed: int) -> NDArray[np.int64]:
        """Whole domains of `pair`, in folds of about equal size; -1 for the rows of other pairs."""
        names, sizes = np.unique(self.domain[self.pair == pair], return_counts=True)
        rng = np.random.default_rng(seed)
        load = np.zeros(count)
        fold: dict[str, int] = {}
        for at in np.argsort(-sizes * rng.uniform(0.5, 1.5, len(sizes))):
            fold[str(names[at])] = int(np.argmin(load + rng.uniform(0, 30, count)))
            load[fold[str(names[at])]] += sizes[at]
        return np.array([fold[str(d)] if p == pair else -1 for p, d in zip(self.pair, self.domain, strict=True)])


def load(folder: Path) -> Rows:
    import pyarrow.parquet as parquet

    parts: dict[str, list[object]] = {name: [] for name in Rows.__slots__}
    for pair in PAIRS:
        table = parquet.read_table(folder / f"{pair.table}.parquet").to_pydict()
        size = len(table["query"])
        weak, strong = (np.array(table[column], float) for column in (pair.weak, pair.strong))
        experts = [pair.experts.get(domain, pair.experts.get("", "")) for domain in table["domain"]]
        parts["query"] += table["query"]
        parts["pair"] += [pair.name] * size
        parts["domain"] += table["domain"]
        parts["expert"] += [EXPERTS.index(expert) for expert in experts]
        parts["suspect"] += table.get("suspect", [False] * size)
        parts["weak"] += weak.tolist()
        parts["strong"] += strong.tolist()
        others = np.full((size, OTHERS), np.nan)
        found = [column for column in table if column.startswith("ok:") and column not in (pair.weak, pair.strong)]
        for at, column in enumerate(sorted(found)[:OTHERS]):
            others[:, at] = np.array(table[column], float)
        parts["others"] += list(others)
    queries = [str(query) for query in parts["query"]]
    parts["group"] = list(groups(queries))
    return Rows(queries, *(np.array(parts[name]) for name in Rows.__slots__[1:]))


@dataclass(frozen=True, slots=True)
class Heard:
    """A pair whose edge answers are recorded: the edge, the cloud, and the local models asked for a second opinion."""

    name: str
    table: str
    weak: str
    strong: str
    peers: tuple[str, ...]


HEARD = (
    Heard(
        "zeroeval",
        "zeroeval",
        "Phi-3.5-mini-instruct",
        "gpt-4o-2024-08-06",
        ("gemma-2-2b-it", "Meta-Llama-3.1-8B-Instruct"),
    ),
    Heard(
        "mmlu_pro",
        "mmlu_pro",
        "Meta-Llama-3_1-8B-Instruct",
        "gemini-1.5-pro-002",
        ("Phi-3-mini-4k-instruct", "Mistral-7B-Instruct-v0.2"),
    ),
)


@dataclass(frozen=True, slots=True)
class Answers:
    """Per question of a Heard pair, in the order of its `Rows`: the edge's final answer and what is known of it.

    compared, peers: final answers of the edge and of each peer in the form of `answer.plain`.
    """

    answer: list[str]
    compared: list[str]
    chars: Floats
    weak: Floats
    strong: Floats
    peers: list[list[str]]

    def signals(self, at: int, peers: int) -> dict[str, float]:
        """What `score_after` would be told of row `at` had `peers` local models been asked for a second opinion."""
        known: dict[str, float] = {"answer_chars": float(self.chars[at])}
        if peers:
            own, given = self.compared[at], [peer[at] for peer in self.peers[:peers]]
            others = Counter(other for other in given if other not in ("", own))
            known["agreement"] = sum(own != "" and other == own for other in given) / peers
            known["silent"] = given.count("") / peers
            known["dissent"] = max(others.values(), default=0) / peers
            known["peers"] = float(peers)
        return known


def load_answers(folder: Path, heard: Heard) -> Answers:
    import pyarrow.parquet as parquet

    table = parquet.read_table(folder / f"{heard.table}.parquet").to_pydict()

    def final(model: str) -> list[str]:
        found = [str(text or "").strip() for text in table[f"pred:{model}"]]
        return ["" if silent(text) else text for text in found]

    answer, *peers = (final(model) for model in (heard.weak, *heard.peers))
    compared = [list(map(plain, each)) for each in (answer, *peers)]
    weak, strong = (np.array(table[f"ok:{model}"], float) for model in (heard.weak, heard.strong))
    return Answers(answer, compared[0], np.array(table[f"chars:{heard.weak}"], float), weak, strong, compared[1:])


def stem(query: str) -> str:
    """The question without its options, normalised: the key by which questions are split and deduplicated."""
    cut = re.search(r"\nA[.)] ", query)
    return re.sub(r"\s+", " ", unicodedata.normalize("NFKC", query[: cut.start()] if cut else query)).strip().lower()


def groups(queries: Sequence[str]) -> list[str]:
    """A name per query, equal for queries with one stem or, if long, with one opening passage (union-find)."""
    parent: dict[str, str] = {}

    def find(name: str) -> str:
        while parent.setdefault(name, name) != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    stems = [stem(query) for query in queries]
    sharing = Counter(text[:_PASSAGE] for text in set(stems))
    for text in stems:
        if len(text) > _PASSAGE + 100 and sharing[text[:_PASSAGE]] <= _TEMPLATE:
            parent[find(f"passage {text[:_PASSAGE]}")] = find(text)
    return [hashlib.sha256(find(text).encode()).hexdigest()[:16] for text in stems]


def _bucket(name: str, count: int) -> int:
    return int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) % count


def curve(weak: Floats, strong: Floats, score: Floats) -> tuple[Floats, Floats]:
    """Cost (share sent to the cloud) and mean quality over every threshold; tied scores share their gain evenly."""
    order = np.argsort(-score, kind="stable")
    ranked = score[order]
    edges = np.flatnonzero(np.r_[True, ranked[1:] != ranked[:-1], True])
    steps = np.add.reduceat((strong - weak)[order], edges[:-1])
    return edges / len(score), weak.mean() + np.r_[0, np.cumsum(steps)] / len(score)


def apgr(weak: Floats, strong: Floats, score: Floats) -> float:
    """Average performance gap recovered: area between curve and edge level over the gap; 0.5 = a random router."""
    cost, quality = curve(weak, strong, score)
    return float((np.trapezoid(quality, cost) - weak.mean()) / (strong.mean() - weak.mean()))


def call_share(weak: Floats, strong: Floats, score: Floats, recovered: float) -> float:
    """CPT: the smallest share of cloud calls that recovers `recovered` of the gap, in percent."""
    cost, quality = curve(weak, strong, score)
    goal = weak.mean() + recovered * (strong.mean() - weak.mean())
    at = int(np.argmax(quality >= goal - 1e-12))
    if at == 0:
        return 0.0
    inside = (goal - quality[at - 1]) / (quality[at] - quality[at - 1])
    return float(100 * (cost[at - 1] + (cost[at] - cost[at - 1]) * inside))
