"""Measures what training reaches, by cross-validation on the outcome tables: every number of DIFFICULTY.md.

Folds keep all rows of one question stem (over all tables) or of one passage together, so no model is tested on a
question that it, or a pair's twin of it, was trained on. The tables of words and n-gram rarity see the questions'
texts, never their outcomes.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from router import outcomes
from router.cascade import Hearing
from router.difficulty import Difficulty, Encoder
from router.fit import Encoded, fit_heads, fit_hearing, hear
from router.outcomes import EXPERTS, PAIRS, Rows, apgr, call_share

Array = NDArray[Any]
Fold = tuple[Array, Array]


def splits(rows: Rows, fold: Array) -> Iterator[Fold]:
    """(train, test) row numbers per fold; no row of any table that shares a group with a test row is trained on."""
    for number in range(int(fold.max()) + 1):
        test = fold == number
        yield np.flatnonzero(~np.isin(rows.group, rows.group[test])), np.flatnonzero(test)


def out_of_fold(rows: Rows, encoded: Encoded, encoder: Encoder, fold: Array, seed: int) -> Array:
    """Every row's gain from a model that saw no row of its group; NaN where `fold` is -1."""
    gain = np.full(len(rows.query), np.nan)
    for train, test in splits(rows, fold):
        model = Difficulty(encoder, fit_heads(rows, encoded, encoder, train, seed), EXPERTS)
        gain[test] = [model.judge(*encoded.row(row)).gain for row in test]
    return gain


@dataclass(frozen=True, slots=True)
class Told:
    """Every recorded answer with 0, 1 and 2 second opinions, one block after another."""

    blocks: dict[tuple[str, int], slice]
    at: Array  # row of `Rows`
    heard: Array  # how many second opinions
    inputs: Array
    weak: Array
    strong: Array


def told(rows: Rows, encoded: Encoded, folder: Path) -> Told:
    blocks: dict[tuple[str, int], slice] = {}
    parts: list[tuple[Array, ...]] = []
    end = 0
    for heard in outcomes.HEARD:
        answers = outcomes.load_answers(folder, heard)
        at = np.flatnonzero(rows.pair == heard.name)
        for peers in range(len(heard.peers) + 1):
            inputs = hear(rows, encoded, answers, at, peers)
            parts.append((at, np.full(len(at), peers), inputs, answers.weak, answers.strong))
            blocks[heard.name, peers] = slice(end, end := end + len(at))
    return Told(blocks, *(np.concatenate(side) for side in zip(*parts, strict=True)))


def hear_all(rows: Rows, all_told: Told, keep: Array, seed: int) -> Hearing:
    gain = (all_told.strong - all_told.weak)[keep]
    return fit_hearing(all_told.inputs[keep], gain, rows.expert[all_told.at[keep]], all_told.heard[keep], seed)


def hear_out_of_fold(rows: Rows, all_told: Told, gates: Array, fold: Array, seed: int) -> Array:
    """Per recorded answer, the gain from a model that saw no row of its question's group."""
    gain = np.full(len(all_told.at), np.nan)
    for train, test in splits(rows, fold):
        hearing = hear_all(rows, all_told, np.flatnonzero(np.isin(all_told.at, train)), seed)
        for one in np.flatnonzero(np.isin(all_told.at, test)):
            gain[one] = hearing.gain(all_told.inputs[one], gates[all_told.at[one]], int(all_told.heard[one]))
    return gain


TARGETS = (0.1, 0.2, 0.3, 0.5, 0.7, 0.9)


def frozen_shares(gain: Array, fold: Array) -> Array:
    """Cloud share minus target per (fold, target), each threshold frozen on the other folds' unseen rows."""
    misses = []
    for number in np.unique(fold):
        limits = np.quantile(gain[fold != number], 1 - np.array(TARGETS))
        misses.append(
            [(gain[fold == number] >= limit).mean() - target for limit, target in zip(limits, TARGETS, strict=True)]
        )
    return np.array(misses)


def frozen_line(name: str, runs: list[Fold]) -> str:
    misses = [100 * frozen_shares(gain, fold) for gain, fold in runs]
    each, whole = np.abs(np.concatenate(misses)), np.abs([miss.mean(0) for miss in misses])
    found = f"mean of folds {each.mean():.1f}, worst fold {each.max():.1f}, over all folds {whole.max():.1f}"
    return f"{name + ', frozen threshold':34s} cloud share off target by points: {found}"


def within(weak: Array, strong: Array, gain: Array, domain: Array) -> float:
    """APGR ranked inside each domain: score and gap pooled, the domain's own mean gain taken from both curves."""
    area = gap = 0.0
    for name in np.unique(domain):
        own = domain == name
        cost, quality = outcomes.curve(weak[own], strong[own], gain[own])
        area += own.sum() * (np.trapezoid(quality, cost) - weak[own].mean())
        gap += own.sum() * (strong[own].mean() - weak[own].mean())
    return float(area / gap)


def reliability(probability: Array, needed: Array, bins: int = 10) -> float:
    """Expected calibration error over `bins` equally filled bins."""
    order = np.array_split(np.argsort(probability), bins)
    return float(sum(len(part) * abs(probability[part].mean() - needed[part].mean()) for part in order) / len(needed))


def score_line(name: str, rows: Rows, mask: Array, gains: list[Array], folds: list[Array]) -> str:
    weak, strong = rows.weak[mask], rows.strong[mask]
    per = [apgr(weak, strong, gain[mask]) for gain in gains]
    by_fold = [
        apgr(rows.weak[part], rows.strong[part], gain[part])
        for gain, fold in zip(gains, folds, strict=True)
        for part in (mask & (fold == number) for number in np.unique(fold[mask]))
    ]
    half, most = (np.mean([call_share(weak, strong, gain[mask], share) for gain in gains]) for share in (0.5, 0.8))
    spread = f"sd {np.std(per):.3f} over splits; folds {np.mean(by_fold):.3f} sd {np.std(by_fold):.3f}"
    return f"{name:34s} APGR {np.mean(per):.3f} {spread}; CPT50 {half:.1f} CPT80 {most:.1f}"


def trial_questions(rows: Rows, encoded: Encoded, encoder: Encoder, seeds: int) -> Iterator[str]:
    """Query-only numbers: cross-validation, calibration of the frozen threshold, domains left out."""
    folds = [rows.folds(5, seed) for seed in range(seeds)]
    gains = [out_of_fold(rows, encoded, encoder, fold, seed) for seed, fold in enumerate(folds)]
    for pair in PAIRS:
        mask = rows.pair == pair.name
        yield score_line(pair.name, rows, mask, gains, folds)
        if rows.suspect[mask].any():
            yield score_line(f"{pair.name}, clean rows", rows, mask & ~rows.suspect, gains, folds)
        if len(np.unique(rows.domain[mask])) > 1:
            inside = np.mean(
                [within(rows.weak[mask], rows.strong[mask], gain[mask], rows.domain[mask]) for gain in gains]
            )
            yield f"{pair.name + ', inside its domains':34s} APGR {inside:.3f}"
        yield frozen_line(pair.name, [(gain[mask], fold[mask]) for gain, fold in zip(gains, folds, strict=True)])
    yield from trial_left_out(rows, encoded, encoder, seeds)


def trial_left_out(rows: Rows, encoded: Encoded, encoder: Encoder, seeds: int) -> Iterator[str]:
    for pair, count in (("mmlu", 5), ("zeroeval", 3)):
        folds = [rows.domain_folds(pair, count, seed) for seed in range(seeds if pair == "mmlu" else 1)]
        gains = [out_of_fold(rows, encoded, encoder, fold, seed) for seed, fold in enumerate(folds)]
        yield score_line(f"{pair}, domains left out", rows, rows.pair == pair, gains, folds)
        if pair == "mmlu":
            yield score_line(f"{pair} clean, domains left out", rows, (rows.pair == pair) & ~rows.suspect, gains, folds)
    kinds = rows.expert
    gain = out_of_fold(rows, encoded, encoder, kinds, 0)
    for left in PAIRS:
        yield score_line(f"{left.name}, its kinds left out", rows, rows.pair == left.name, [gain], [kinds])


def trial_answers(rows: Rows, encoded: Encoded, model: Difficulty, folder: Path, seeds: int) -> Iterator[str]:
    """Cascade numbers by how many second opinions there are."""
    gates = np.array([model.gate(dense) for dense in encoded.dense])
    all_told = told(rows, encoded, folder)
    runs = [hear_out_of_fold(rows, all_told, gates, rows.folds(5, seed), seed) for seed in range(seeds)]
    for (name, peers), block in all_told.blocks.items():
        weak, strong = all_told.weak[block], all_told.strong[block]
        per = [apgr(weak, strong, run[block]) for run in runs]
        bound = apgr(weak, strong, -weak)
        yield f"cascade {name}, {peers} second opinions APGR {np.mean(per):.3f} sd {np.std(per):.3f}; bound {bound:.3f}"


def trial_elsewhere(model: Difficulty, folder: Path) -> str:
    """MT-Bench, which nothing is trained on: what the prior is worth on open prompts (too few to prove anything)."""
    import pyarrow.parquet as parquet

    table = parquet.read_table(folder / "routellm_mtbench.parquet").to_pydict()
    verdicts = [model.verdict(query) for query in table["query"]]
    weak, strong = np.array(table["weak_score"]), np.array(table["strong_score"])
    familiar = np.mean([verdict.familiarity for verdict in verdicts])
    found = apgr(weak, strong, np.array([verdict.score for verdict in verdicts]))
    return f"mt-bench, never trained on, n={len(weak)}: APGR {found:.3f}, mean familiarity {familiar:.2f}"


def latency(act: Callable[[str], object], texts: list[str], clock: Callable[[], float] = time.perf_counter) -> str:
    took = []
    for text in texts:
        start = clock()
        act(text)
        took.append(1000 * (clock() - start))
    middle, rare, worst = np.quantile(took, [0.5, 0.99, 1])
    return f"p50 {middle:.2f} ms, p99 {rare:.2f} ms, worst {worst:.2f} ms over {len(texts)} prompts"
