"""Fits the tables and coefficients of router.difficulty and router.cascade. Needs the extra `train`.

Deterministic: the same rows and seed give the same arrays.
"""

import re
import warnings
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from sklearn.ensemble import HistGradientBoostingRegressor
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, Ridge

from router.cascade import AGREEMENT, DIRECTIONS, ROUNDS, Hearing, describe, join
from router.difficulty import Encoder
from router.heads import Heads
from router.outcomes import EXPERTS, Answers, Rows
from router.wording import Wording, read

Array = NDArray[Any]
BITS = 16
VECTOR = 64
TREES = 120
WORDS = 30_000
OPTIONAL = frozenset({"choice", "many_choices"})  # experts for questions with options to choose from
BY_WORDS = frozenset({"choice"})  # experts that hear the word vectors; the others do as well or better without
# Per expert: the penalty of its linear logits (the inverse of C), and the blend of logits, trees and n-grams.
PENALTY = {"choice": 2000.0, "many_choices": 3000.0, "arithmetic": 600.0, "code": 1000.0, "contest": 150.0}
BLEND = {
    "choice": (0.4, 0.2, 0.4),
    "many_choices": (0.1, 0.45, 0.45),
    "arithmetic": (0.6, 0.4, 0.0),
    "code": (0.3, 0.7, 0.0),
    "contest": (0.7, 0.1, 0.2),
}
# How far at most an expert's word reaches, in mean squared standard deviations. What was learned over many domains was
# seen to hold in left-out ones; of an expert of one or two there is no such evidence, so it speaks for these alone.
MANY, WIDE, NARROW = 8, 1.6, 1.0
HARD = (
    "Solve this equation step by step and prove the result.", "Write a Python function that implements this algorithm.",
    "Find the bug in this code and fix it.", "Calculate the probability of this event.",
    "Extract these fields from the text as JSON.",
    "Reason about this logic puzzle and deduce who is right.", "What is the time complexity of this algorithm?",
    "Given these constraints, compute the optimal value.",
)  # fmt: skip
EASY = (
    "Hello, how are you today?", "Write a short friendly email to a colleague.", "Tell me a story about a dragon.",
    "Pretend you are a pirate and talk to me.", "Give me ideas for a birthday party.",
    "Describe a beautiful beach at sunset.",
    "Write a poem about spring.", "Thanks, that was helpful!",
)  # fmt: skip


class Encoded:
    """Every row's inputs, computed once: dense (N, D) and n-grams (N, 2**BITS)."""

    def __init__(self, encoder: Encoder, read_rows: list[Wording]) -> None:
        self.dense = np.array([encoder.dense(one) for one in read_rows])
        pairs = [encoder.sparse(one) for one in read_rows]
        starts = np.r_[0, np.cumsum([len(where) for where, _ in pairs])]
        columns, weights = (np.concatenate([pair[side] for pair in pairs]) for side in (0, 1))
        self.grams = sparse.csr_matrix((weights.astype(np.float32), columns, starts), (len(pairs), 1 << BITS))

    def row(self, at: int) -> tuple[Array, Array, Array]:
        span = slice(self.grams.indptr[at], self.grams.indptr[at + 1])
        return self.dense[at], self.grams.indices[span], self.grams.data[span]


def static_vectors() -> tuple[Callable[[str], Array], list[str]]:
    """WordLlama's static token vectors (MIT): word -> mean (256,) of its tokens, and its own whole words."""
    from safetensors.numpy import load_file
    from tokenizers import Tokenizer

    folder = Path(str(metadata.distribution("wordllama").locate_file("wordllama")))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizers" / "l2_supercat_tokenizer_config.json"))
    (table,) = load_file(str(folder / "weights" / "l2_supercat_256.safetensors")).values()
    whole = sorted(token[1:] for token in tokenizer.get_vocab() if token[:1] == "\u2581" and token[1:].isalpha())

    def vector(word: str) -> Array:
        return np.asarray(table[tokenizer.encode(word, add_special_tokens=False).ids].astype(np.float64).mean(0))

    return vector, [word for word in whole if word.isascii() and word.islower()]


def fit_encoder(queries: list[str], read_rows: list[Wording]) -> Encoder:
    """Label-free tables: word vectors cut to VECTOR principal directions of the questions' means, and n-gram rarity."""
    vector, vocabulary = static_vectors()
    count: dict[str, int] = {}
    for query in set(queries):
        for word in set(re.findall(r"[a-z0-9]+", query.lower())):
            count[word] = count.get(word, 0) + 1
    frequent = sorted((word for word in count if count[word] > 1), key=lambda word: (-count[word], word))
    words = list(dict.fromkeys([*frequent[: WORDS // 2], *vocabulary, *frequent]))[:WORDS]
    table = np.array([vector(word) for word in words])
    keys = np.array([int(read(word).words[0]) for word in words], np.uint64)
    order = np.argsort(keys)
    keys, table = keys[order], table[order]
    means = []
    for one in read_rows:
        at = np.minimum(np.searchsorted(keys, one.words), len(keys) - 1)
        at = at[keys[at] == one.words]
        if len(at):
            means.append(table[at].mean(0))
    centre = np.mean(means, axis=0)
    _, _, directions = np.linalg.svd(np.cov((np.array(means) - centre).T))
    cut = table @ directions[:VECTOR].T
    scale = np.abs(cut).max(0) / 127
    df = np.zeros(1 << BITS)
    for one in read_rows:
        df[np.unique(one.grams & np.uint64((1 << BITS) - 1)).astype(np.int64)] += 1
    rarity = np.log((1 + len(read_rows)) / (1 + df)) + 1
    return Encoder(
        keys,
        np.round(cut / scale).astype(np.int8),
        scale.astype(np.float32),
        (centre @ directions[:VECTOR].T).astype(np.float32),
        rarity.astype(np.float32),
    )


def fit_heads(rows: Rows, encoded: Encoded, encoder: Encoder, keep: Array, seed: int) -> Heads:
    """Every expert, the gate, familiarity and the prior from the rows in `keep` (indices)."""
    dense = encoded.dense[keep]
    mean, spread = dense.mean(0), dense.std(0) + 1e-6
    inputs = np.clip((dense - mean) / spread, -6, 6)
    expert = rows.expert[keep]
    present = [at for at in range(len(EXPERTS)) if (expert == at).sum() > 50]
    parts = {
        at: _fit_expert(rows, encoded, inputs, keep[expert == at], expert == at, EXPERTS[at], seed) for at in present
    }
    empty = _empty_expert(dense.shape[1])
    stack = {name: np.array([parts.get(at, empty)[name] for at in range(len(EXPERTS))]) for name in empty}
    return Heads(
        mean=mean,
        spread=spread,
        gate=_fit_gate(inputs, expert),
        weak=stack["weak"].T,
        strong=stack["strong"].T,
        feature=stack["feature"].astype(np.int16),
        limit=stack["limit"],
        leaf=stack["leaf"],
        gram=stack["gram"].T.astype(np.float16),
        base=stack["base"],
        blend=np.array([BLEND[name] for name in EXPERTS]),
        middle=stack["middle"],
        whiten=stack["whiten"].astype(np.float32),
        reach=stack["reach"],
        prior=_fit_prior(encoder),
        curve=np.array([4.0, -1.0]),
        quantiles=np.tile(np.linspace(0, 1, 101), (len(EXPERTS) + 1, 1)),
    )


def _empty_expert(width: int) -> dict[str, Array]:
    """An expert without training rows: says 0, and nothing is familiar to it."""
    return {
        "weak": np.zeros(width + 1), "strong": np.zeros(width + 1), "feature": np.zeros((TREES, 7)),
        "limit": np.zeros((TREES, 7)),
        "leaf": np.zeros((TREES, 8)), "gram": np.zeros(1 << BITS), "base": np.zeros(()), "middle": np.full(width, 1e3),
        "whiten": np.eye(width), "reach": np.ones(()),
    }  # fmt: skip


def _fit_expert(
    rows: Rows, encoded: Encoded, inputs: Array, at: Array, own: Array, name: str, seed: int
) -> dict[str, Array]:
    x, dense = inputs[own], encoded.dense[at]
    weak, strong = (settle(side[at], rows.others[at], rows.domain[at]) for side in (rows.weak, rows.strong))
    _, number, size = np.unique(rows.domain[at], return_inverse=True, return_counts=True)
    middle, whiten, reach = _fit_familiarity(x, WIDE if len(size) >= MANY else NARROW)
    if name not in BY_WORDS:
        x[:, -1 - VECTOR :] = dense[:, -1 - VECTOR :] = 0
    weight = 1 / np.sqrt(size[number])
    weight /= weight.mean()
    gain = strong - weak
    feature, limit, leaf = _fit_trees(dense, gain, weight, seed)
    ridge = Ridge(alpha=10.0, solver="sparse_cg").fit(encoded.grams[at], gain)
    return {
        "weak": _fit_logit(x, weak, weight, PENALTY[name]), "strong": _fit_logit(x, strong, weight, PENALTY[name]),
        "feature": feature, "limit": limit, "leaf": leaf, "gram": ridge.coef_, "base": np.array(ridge.intercept_),
        "middle": middle, "whiten": whiten, "reach": reach,
    }  # fmt: skip


def settle(right: Array, others: Array, domain: Array) -> Array:
    """Outcomes (N,), less of a toss: each is averaged with what the other models' outcomes on its question (N, M)
    say of it, by one ridge regression inside all domains, which keep their means. Where no other answered, it stays.
    """
    both = np.column_stack([right, others])
    asked = ~np.isnan(both)
    centred = np.zeros(both.shape)
    for name in np.unique(domain):
        here = (domain == name)[:, None] & asked
        mean = np.where(here, both, 0).sum(0) / np.maximum(here.sum(0), 1)
        centred[here] = (both - mean)[here]
    some = asked[:, 1:].any(1)
    if not some.any():
        return right
    own, beside = centred[some, 0], centred[some, 1:]
    settled = right.astype(float)
    settled[some] += (Ridge(alpha=5.0, fit_intercept=False).fit(beside, own).predict(beside) - own) / 2
    return np.asarray(np.clip(settled, 0, 1))


def _fit_logit(x: Array, share: Array, weight: Array, penalty: float) -> Array:
    """Logistic regression on soft labels: every row counts once as right and once as wrong, weighted."""
    label = np.r_[np.ones(len(x)), np.zeros(len(x))]
    both = np.r_[weight * share, weight * (1 - share)]
    fitted = LogisticRegression(C=1 / penalty, max_iter=300).fit(np.r_[x, x], label, both)
    return np.asarray(np.r_[fitted.coef_[0], fitted.intercept_])


def _fit_trees(
    x: Array, gain: Array, weight: Array, seed: int, monotone: Array | None = None
) -> tuple[Array, Array, Array]:
    """Boosted trees of depth 3 in heap order: feature, limit (TREES, 7), leaf (TREES, 8); tree 0 holds the mean."""
    options = {
        "max_iter": TREES,
        "learning_rate": 0.04,
        "max_depth": 3,
        "min_samples_leaf": 30,
        "l2_regularization": 10.0,
        "monotonic_cst": monotone,
    }
    fitted = HistGradientBoostingRegressor(**options, max_features=0.4, early_stopping=False, random_state=seed).fit(
        x, gain, weight
    )
    feature, limit, leaf = np.zeros((TREES, 7)), np.full((TREES, 7), np.inf), np.zeros((TREES, 8))
    for number, (tree,) in enumerate(fitted._predictors):
        _flatten(tree.nodes, 0, 0, feature[number], limit[number], leaf[number])
    leaf[0] += fitted._baseline_prediction.item()
    return feature, np.minimum(limit, 1e30), leaf


def _flatten(nodes: Array, node: int, heap: int, feature: Array, limit: Array, leaf: Array) -> None:
    """Copy a tree into its heap; a leaf above the bottom is repeated under a node that always goes left."""
    found = nodes[node]
    if heap >= 7:
        leaf[heap - 7] = found["value"]
    elif found["is_leaf"]:
        _flatten(nodes, node, 2 * heap + 1, feature, limit, leaf)
        _flatten(nodes, node, 2 * heap + 2, feature, limit, leaf)
    else:
        feature[heap], limit[heap] = found["feature_idx"], found["num_threshold"]
        _flatten(nodes, int(found["left"]), 2 * heap + 1, feature, limit, leaf)
        _flatten(nodes, int(found["right"]), 2 * heap + 2, feature, limit, leaf)


def _fit_familiarity(x: Array, most: float) -> tuple[Array, Array, Array]:
    """Centre, whitening matrix (shrunk covariance), and the distance that few unseen rows of its own exceed, at most
    `most`."""
    halves = [(x[0::2], x[1::2]), (x[1::2], x[0::2])]
    distances = [
        np.square((other - middle) @ whiten.T).mean(1) for seen, other in halves for middle, whiten in [_whiten(seen)]
    ]
    return *_whiten(x), np.minimum(1.1 * np.quantile(np.concatenate(distances), 0.95), most)


def _whiten(x: Array) -> tuple[Array, Array]:
    covariance = 0.9 * np.cov((x - x.mean(0)).T) + 0.1 * np.eye(x.shape[1])
    return x.mean(0), np.linalg.inv(np.linalg.cholesky(covariance))


def _fit_gate(inputs: Array, expert: Array) -> Array:
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", ConvergenceWarning
        )  # stopped early on purpose: the kinds are told apart long before
        fitted = LogisticRegression(C=0.3, max_iter=60).fit(inputs, expert)
    slopes, offsets = fitted.coef_, fitted.intercept_
    if len(fitted.classes_) == 2:  # of two classes only the second's logit is kept
        slopes, offsets = np.vstack([0 * slopes, slopes]), np.r_[0, offsets]
    gate = np.zeros((inputs.shape[1] + 1, len(EXPERTS)))
    gate[-1] = -30.0
    gate[:-1, fitted.classes_], gate[-1, fitted.classes_] = slopes.T, offsets
    return gate


def _fit_prior(encoder: Encoder) -> Array:
    """For a prompt that no expert knows: a quarter either way along the line from easy to hard example prompts."""
    span = slice(-1 - len(encoder.scale), -1)
    hard, easy = (np.mean([encoder.dense(read(text))[span] for text in texts], axis=0) for texts in (HARD, EASY))
    line = (hard - easy) / (np.linalg.norm(hard - easy) + 1e-9)
    return np.asarray(np.r_[line * 2, 0.25 - float((hard + easy) @ line) * 0.25])


def hear(rows: Rows, encoded: Encoded, answers: Answers, at: Array, peers: int) -> Array:
    """Inputs of the cascade per answer of a pair whose rows in `rows` are `at`, had `peers` models given an opinion."""
    measures = len(read("").measures)
    described = [
        describe(rows.query[row], answers.answer[number], answers.signals(number, peers))
        for number, row in enumerate(at)
    ]
    return np.array([join(encoded.dense[row], measures, each) for row, each in zip(at, described, strict=True)])


def fit_hearing(inputs: Array, gain: Array, expert: Array, heard: Array, seed: int) -> Hearing:
    """By how many opinions were `heard` (0 to ROUNDS - 1): a forest over answers to questions with options and one
    over all others, each expert having that of its kind. An answer that others agree with is not thought worse of.
    """
    monotone = np.zeros(inputs.shape[1], np.int64)
    described = inputs.shape[1] - len(describe("", "", {}))
    monotone[described + AGREEMENT] = -1
    optional = np.isin(expert, [EXPERTS.index(name) for name in OPTIONAL])
    plain = inputs.copy()
    plain[:, described - DIRECTIONS : described] = 0  # without options they only added noise

    def forests(number: int) -> list[tuple[Array, Array, Array]]:
        sides = ((optional & (heard == number), inputs), (~optional & (heard == number), plain))
        grown = [_fit_trees(x[own], gain[own], np.ones(int(own.sum())), seed, monotone) for own, x in sides]
        return [grown[name not in OPTIONAL] for name in EXPERTS]

    every = [forests(number) for number in range(ROUNDS)]
    feature, limit, leaf = (np.array([[each[side] for each in round_] for round_ in every]) for side in range(3))
    return Hearing(feature.astype(np.int16), limit, leaf, np.array([4.0, -1.0]))


def calibrate(gain: Array, needed: Array, weight: Array) -> Array:
    """Slope and intercept from gain to the probability that the cloud is needed (Platt 1999), slope at least 0.5."""
    fitted = LogisticRegression(C=1e3).fit(gain[:, None], needed, weight)
    return np.array([max(float(fitted.coef_[0, 0]), 0.5), float(fitted.intercept_[0])])
