"""router.outcomes: the split that keeps training and test questions apart, and the metrics."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.answer import plain
from router.outcomes import Answers, Rows, apgr, call_share, curve, groups, stem

PASSAGE = "It was the best of times, it was the worst of times, " * 10


def rows_of(queries: list[str], domains: list[str]) -> Rows:
    size = len(queries)
    zeros = np.zeros(size)
    return Rows(
        queries,
        np.array(["pair"] * size),
        np.array(domains),
        np.zeros(size, np.int64),
        np.array(groups(queries)),
        np.zeros(size, bool),
        zeros,
        zeros,
        zeros[:, None],
    )


def test_a_question_is_its_stem() -> None:
    """Options, case, spacing and letter forms do not make another question."""
    assert stem("What  is\nTHIS?\nA. one\nB. two") == stem("what is this?\nA) three") == "what is this?"


def test_questions_on_one_passage_share_a_group() -> None:
    """Long questions with one opening are one group; short ones and other passages are not."""
    first, second, other, short = groups([f"{PASSAGE} Who?", f"{PASSAGE} When?", f"x{PASSAGE} Who?", "Who?"])

    assert first == second
    assert len({first, other, short}) == 3


def test_an_instruction_before_every_question_is_no_passage() -> None:
    """An opening shared by a whole table does not weld the table into one group."""
    names = groups([f"{PASSAGE} question {number}" for number in range(60)])

    assert len(set(names)) == 60


@given(st.integers(2, 6), st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_folds_never_part_a_group_or_a_domain(count: int, seed: int) -> None:
    """Rows of one group share a fold; with domains left out, rows of one domain do."""
    queries = [f"question {number // 2}?\nA. {number}" for number in range(80)]
    rows = rows_of(queries, [f"domain {number // 2 % 9}" for number in range(80)])

    fold, by_domain = rows.folds(count, seed), rows.domain_folds("pair", count, seed)

    assert all(len(set(fold[rows.group == group])) == 1 for group in rows.group)
    assert all(len(set(by_domain[rows.domain == name])) == 1 for name in rows.domain)
    assert set(by_domain) <= set(range(count))


def test_the_area_is_half_for_ties_and_grows_with_the_order() -> None:
    """One score for all is random (0.5); the true gain is best, its reverse worst."""
    rng = np.random.default_rng(3)
    weak, strong = (rng.random(500) < 0.5).astype(float), (rng.random(500) < 0.8).astype(float)
    gain = strong - weak

    assert apgr(weak, strong, np.zeros(500)) == pytest.approx(0.5)
    assert apgr(weak, strong, gain) > 0.9
    assert apgr(weak, strong, gain) + apgr(weak, strong, -gain) == pytest.approx(1.0)


def test_the_curve_starts_at_the_edge_and_ends_at_the_cloud() -> None:
    """Nothing sent costs nothing and is as good as the edge; everything sent is as good as the cloud."""
    weak, strong, score = np.array([0.0, 1, 0, 1]), np.array([1.0, 1, 1, 0]), np.array([0.9, 0.2, 0.8, 0.1])

    cost, quality = curve(weak, strong, score)

    assert (cost[0], cost[-1]) == (0, 1)
    assert (quality[0], quality[-1]) == (weak.mean(), strong.mean())
    assert call_share(weak, strong, score, 0.5) == pytest.approx(12.5)


def test_what_the_others_said_becomes_signals() -> None:
    """Agreement is by value, dissent is the largest group of others with one answer, silence is no answer."""
    edge, *peers = [[plain(text)] for text in ("1,200", "1200.0", "7", "7.0", "")]
    answers = Answers(["1,200"], edge, np.array([90.0]), np.zeros(1), np.ones(1), peers)

    assert answers.signals(0, 0) == {"answer_chars": 90.0}
    assert answers.signals(0, 1) == {
        "answer_chars": 90.0,
        "agreement": 1.0,
        "silent": 0.0,
        "dissent": 0.0,
        "peers": 1.0,
    }
    assert answers.signals(0, 4) == {
        "answer_chars": 90.0,
        "agreement": 0.25,
        "silent": 0.25,
        "dissent": 0.5,
        "peers": 4.0,
    }
