"""router.assess: what scores are worth on a table, beside the slow way of finding it out."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.assess import (
    MARKS,
    MEASURED,
    TARGETS,
    Assessment,
    Scored,
    assess,
    pooled,
    reliability,
    save,
    shipped_assessments,
)
from router.difficulty import shipped_difficulty
from router.outcomes import PAIRS, apgr, call_share, curve
from router.weights import InvalidWeights

FEW = st.integers(2, 6).flatmap(
    lambda size: st.tuples(
        *(
            st.lists(st.sampled_from(values), min_size=size, max_size=size)
            for values in ([0.0, 1.0], [0.0, 0.5, 1.0], [0.1, 0.5, 0.9])
        )
    )
)


def table(edge: list[float], cloud: list[float], score: list[float], domain: list[str] | None = None) -> Scored:
    return Scored("a table", np.array(edge), np.array(cloud), np.array(score), domain or [""] * len(edge))


def tried(edge: list[float], cloud: list[float], score: list[float]) -> list[float]:
    """Mean quality with 0, 1 ... N questions sent to the cloud, over every order that the scores allow."""
    orders = [
        order
        for order in itertools.permutations(range(len(edge)))
        if all(score[one] >= score[next_] for one, next_ in itertools.pairwise(order))
    ]

    def quality(order: tuple[int, ...], sent: int) -> float:
        return sum(cloud[at] if at in order[:sent] else edge[at] for at in order) / len(order)

    return [sum(quality(order, sent) for order in orders) / len(orders) for sent in range(len(edge) + 1)]


@given(FEW)
@settings(max_examples=60, deadline=None)
def test_the_curve_is_the_mean_over_every_order_of_ties(case: tuple[list[float], list[float], list[float]]) -> None:
    """At each number of calls, the curve is what all orders that the scores allow come to on average."""
    edge, cloud, score = case
    cost, quality = curve(*map(np.array, case))
    slow = tried(edge, cloud, score)
    shares = [sent / len(edge) for sent in range(len(edge) + 1)]

    assert np.interp(shares, cost, quality) == pytest.approx(slow)
    if np.mean(cloud) > np.mean(edge):
        area = sum((one + after) / 2 for one, after in itertools.pairwise(slow)) / len(edge)
        expected = (area - np.mean(edge)) / (np.mean(cloud) - np.mean(edge))
        assert assess(table(*case)).figures.apgr == pytest.approx(expected)


@given(FEW, st.sampled_from([0.5, 0.8]))
@settings(max_examples=60, deadline=None)
def test_the_calls_it_takes_are_where_the_curve_gets_there_first(
    case: tuple[list[float], list[float], list[float]], part: float
) -> None:
    """CPT is where the slow curve first reaches the goal: none of the shares before it does."""
    edge, cloud, score = map(np.array, case)
    if cloud.mean() <= edge.mean():
        return
    goal = edge.mean() + part * (cloud.mean() - edge.mean())
    found = call_share(edge, cloud, score, part) / 100
    cost, quality = curve(edge, cloud, score)
    fine = np.linspace(0, 1, 5001)
    slow = np.interp(fine, cost, quality)

    assert np.interp(found, cost, quality) == pytest.approx(goal)
    assert (slow[fine < found - 1e-9] < goal + 1e-9).all()


@given(FEW)
@settings(max_examples=40, deadline=None)
def test_an_assessment_keeps_its_promises(case: tuple[list[float], list[float], list[float]]) -> None:
    """It begins at the edge's quality and ends at the cloud's; the oracle is nowhere worse; thresholds fall; every row
    is in one bin."""
    one = assess(table(*case))

    assert one.quality[0] == pytest.approx(one.figures.edge, abs=1e-5)
    assert one.quality[-1] == pytest.approx(one.figures.cloud, abs=1e-5)
    assert len(one.quality) == len(one.oracle) == len(one.thresholds) == MARKS
    assert all(best >= got - 2e-6 for best, got in zip(one.oracle, one.quality, strict=True))
    assert list(one.thresholds) == sorted(one.thresholds, reverse=True)
    assert sum(part.count for part in one.bins) == one.figures.rows


def test_a_threshold_is_where_it_would_be_if_it_were_tried() -> None:
    """To a hundredth: the share that reaches it and the quality there, as counting says."""
    rng = np.random.default_rng(4)
    score = rng.random(2000)
    edge, cloud = (rng.random(2000) < 0.5).astype(float), (rng.random(2000) < 0.5 + score / 2).astype(float)
    one = assess(Scored("t", edge, cloud, score, [""] * 2000))

    for threshold in (0.05, 0.3, 0.77, 0.95):
        found, sent = one.at(threshold), score >= threshold
        assert found.cloud_share == pytest.approx(sent.mean(), abs=0.01)
        assert found.quality == pytest.approx(np.where(sent, cloud, edge).mean(), abs=0.01)
    assert (one.at(2.0).cloud_share, one.at(-1.0).cloud_share) == (0, 1)
    assert one.recovered(one.figures.cloud) == pytest.approx(1)


def test_one_score_for_all_sends_all_or_nothing() -> None:
    """A threshold at the common score sends everything, one above it nothing."""
    one = assess(table([0, 1, 0], [1, 1, 1], [0.4, 0.4, 0.4]))

    assert (one.at(0.4).cloud_share, one.at(0.41).cloud_share) == (1, 0)
    assert one.figures.apgr == pytest.approx(0.5)


def test_a_cloud_that_is_no_better_has_no_gap_to_recover() -> None:
    """No number is made up where there is nothing to gain."""
    one = assess(table([1, 0], [0, 1], [0.2, 0.8], ["law", "art"]))

    assert (one.figures.apgr, one.figures.cpt50, one.oracle_apgr, one.recovered(0.5)) == (None, None, None, None)
    assert [(domain.name, domain.apgr) for domain in one.domains] == [("art", pytest.approx(0.5)), ("law", None)]


def test_tables_together_are_one_whose_domains_they_are() -> None:
    """Every question counts once, and each table can be told apart."""
    one, other = table([0, 1], [1, 1], [0.9, 0.1]), replace(table([0, 0, 1], [1, 0, 1], [0.4, 0.5, 0.6]), name="b")
    whole = assess(pooled([one, other]))

    assert whole.figures.rows == 5
    assert [(domain.name, domain.rows) for domain in whole.domains] == [("a table", 2), ("b", 3)]


def test_calibrated_scores_are_on_the_diagonal() -> None:
    """What is said with probability p comes true with frequency p; what is said too boldly does not."""
    rng = np.random.default_rng(2)
    said = rng.random(20_000)
    came = rng.random(20_000) < said

    assert all(one.said == pytest.approx(one.right, abs=0.04) for one in reliability(said, came))
    assert any(abs(one.said - one.right) > 0.2 for one in reliability(said**4, came))


def test_what_was_measured_is_shipped_and_meets_the_tables() -> None:
    """The weights bring their own assessment, of every pair they were learned from, better than chance on each."""
    together, *assessments = shipped_assessments()

    assert len(assessments) == len(PAIRS)
    assert together.figures.rows == sum(one.figures.rows for one in assessments)
    assert [one.name for one in together.domains] == sorted(one.figures.name for one in assessments)
    assert all(
        together.at(shipped_difficulty().threshold(share)).cloud_share == pytest.approx(share, abs=0.05)
        for share in TARGETS
    )
    assert all(name.figures.name.startswith(pair.name) for name, pair in zip(assessments, PAIRS, strict=True))
    assert all((one.figures.apgr or 0) > 0.55 and one.error < 0.1 for one in assessments)


def test_a_damaged_assessment_is_named(tmp_path, monkeypatch) -> None:
    """What cannot be read is an error of the weights, not a page without numbers."""
    path = tmp_path / MEASURED
    kept = assess(table([0, 1], [1, 1], [0.9, 0.1]))
    save(path, [kept])
    monkeypatch.setattr("router.assess.shipped", lambda name: tmp_path / name)
    shipped_assessments.cache_clear()
    try:
        assert shipped_assessments() == (kept,)
        path.write_text(path.read_text()[:-9])
        shipped_assessments.cache_clear()
        with pytest.raises(InvalidWeights) as raised:
            shipped_assessments()
    finally:
        shipped_assessments.cache_clear()
    assert raised.value.param == MEASURED


def test_the_area_of_the_kept_curve_is_the_exact_one() -> None:
    """A curve at a hundred shares is close to the exact one: what is drawn is what is said."""
    rng = np.random.default_rng(7)
    score = rng.random(900).round(2)
    edge, cloud = (rng.random(900) < 0.4).astype(float), (rng.random(900) < 0.4 + score / 2).astype(float)
    one: Assessment = assess(Scored("t", edge, cloud, score, [""] * 900))
    drawn = (np.trapezoid(one.quality, dx=1 / (MARKS - 1)) - edge.mean()) / (cloud.mean() - edge.mean())

    assert drawn == pytest.approx(apgr(edge, cloud, score), abs=0.005)
