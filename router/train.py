"""Learns router/weights/*.npz from outcome tables. Needs the extra `train` (pyarrow, scikit-learn, wordllama).

    python -m router.train build --data DIR [--out DIR]   the weights, the same for the same tables and seed
    python -m router.train evaluate --data DIR            the measured numbers of DIFFICULTY.md, by cross-validation

Outcome tables are read from where they lie and never copied: what is written holds hashes, averages and coefficients.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from router import outcomes, trial
from router.assess import MEASURED, Assessment, Floats, Scored, assess, pooled
from router.assess import save as save_assessments
from router.cascade import Cascade
from router.difficulty import Difficulty, Encoder
from router.fit import Encoded, calibrate, fit_encoder, fit_heads
from router.outcomes import EXPERTS, PAIRS, Rows
from router.wording import read

SEED = 5
SIDES = {"weak_score": "Mixtral-8x7B", "strong_score": "GPT-4"}
"""Of the tables whose columns do not say."""


def prepare(folder: Path) -> tuple[Rows, Encoder, Encoded]:
    rows = outcomes.load(folder)
    wordings = [read(query) for query in rows.query]
    encoder = fit_encoder(rows.query, wordings)
    return rows, encoder, Encoded(encoder, wordings)


def build(folder: Path, target: Path, seed: int) -> None:
    """Fit on every row; the curve and the thresholds come from rows that the model which scored them had not seen."""
    rows, encoder, encoded = prepare(folder)
    fold = rows.folds(5, seed)
    gain = trial.out_of_fold(rows, encoded, encoder, fold, seed)
    sizes = np.bincount(rows.expert, minlength=len(EXPERTS))
    curve = calibrate(gain, rows.strong > rows.weak, 1 / np.sqrt(sizes[rows.expert]))
    score = 1 / (1 + np.exp(-curve[0] * gain - curve[1]))
    marks = np.linspace(0, 1, 101)
    quantiles = [np.quantile(score[rows.expert == at], marks) for at in range(len(EXPERTS))]
    heads = fit_heads(rows, encoded, encoder, np.arange(len(rows.query)), seed)
    model = Difficulty(
        encoder, replace(heads, curve=curve, quantiles=np.array([*quantiles, np.quantile(score, marks)])), EXPERTS
    )
    about = {"seed": seed, "rows": len(rows.query)}
    target.mkdir(parents=True, exist_ok=True)
    model.save(target / "difficulty.npz", about)
    save_assessments(target / MEASURED, measured(rows, score))
    gates = np.array([model.gate(dense) for dense in encoded.dense])
    told = trial.told(rows, encoded, folder)
    curve = calibrate(
        trial.hear_out_of_fold(rows, told, gates, fold, seed), told.strong > told.weak, np.ones(len(told.at))
    )
    hearing = replace(trial.hear_all(rows, told, np.arange(len(told.at)), seed), curve=curve)
    Cascade(model, hearing).save(target / "cascade.npz", about)


def measured(rows: Rows, score: Floats) -> list[Assessment]:
    """What these scores are worth, over all and by pair; rows with broken labels are left out."""
    tables = []
    for pair in PAIRS:
        own = (rows.pair == pair.name) & ~rows.suspect
        sides = " → ".join(SIDES.get(side, side.removeprefix("ok:")) for side in (pair.weak, pair.strong))
        edge, cloud, said, domain = rows.weak[own], rows.strong[own], score[own], rows.domain[own].tolist()
        tables.append(Scored(f"{pair.name}: {sides}", edge, cloud, said, domain))
    return [assess(table) for table in (pooled(tables), *tables)]


def evaluate(folder: Path, seeds: int) -> None:
    rows, encoder, encoded = prepare(folder)
    say(f"{len(rows.query)} rows, {len(set(rows.group))} groups, {seeds} splits")
    for line in trial.trial_questions(rows, encoded, encoder, seeds):
        say(line)
    model = Difficulty.load()
    for line in trial.trial_answers(rows, encoded, model, folder, seeds):
        say(line)
    say(trial.trial_elsewhere(model, folder))
    say(f"shipped weights: {trial.latency(model.verdict, [query for query in rows.query[::7] if len(query) <= 1000])}")


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m router.train", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("action", choices=("build", "evaluate"))
    parser.add_argument("--data", type=Path, required=True, help="folder with the outcome tables (parquet)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "weights", help="folder for the weights")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--splits", type=int, default=3, help="how many random splits to average (evaluate)")
    chosen = parser.parse_args(argv)
    if chosen.action == "build":
        build(chosen.data, chosen.out, chosen.seed)
    else:
        evaluate(chosen.data, chosen.splits)


if __name__ == "__main__":
    main()
