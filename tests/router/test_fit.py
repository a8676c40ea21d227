"""router.fit: training finds what there is to find, and twice the same. Needs the extra `train`."""

from dataclasses import fields, replace

import numpy as np
import pytest

from router.cascade import AGREEMENT, ROUNDS, describe
from router.cascade import opinions as opinions_of
from router.difficulty import Difficulty, Encoder
from router.fit import BITS, NARROW, VECTOR, Encoded, calibrate, fit_heads, fit_hearing, settle
from router.outcomes import EXPERTS, Rows, apgr, groups
from router.wording import read

TOPICS = {"hard": "integral theorem eigenvalue proof", "easy": "apples oranges kitchen garden"}


def made_up(count: int, seed: int) -> Rows:
    """Questions of two kinds and two topics; the edge is right on the easy topic only, the cloud on all."""
    rng = np.random.default_rng(seed)
    queries, expert, weak = [], [], []
    for number in range(count):
        topic = "hard" if rng.random() < 0.5 else "easy"
        words = " ".join(rng.choice(TOPICS[topic].split(), 6))
        options = "\nA. one\nB. two\nAnswer:" if number % 2 else ""
        queries.append(f"Number {number} asks about {words}?{options}")
        expert.append(0 if number % 2 else 2)
        weak.append(float(topic == "easy"))
    ones = np.ones(count)
    names = np.array(["made"] * count)
    found = np.array(weak)
    return Rows(
        queries, names, names, np.array(expert), np.array(groups(queries)), ones == 0, found, ones, found[:, None]
    )


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    words = sorted({word for topic in TOPICS.values() for word in topic.split()})
    keys = np.array([int(read(word).words[0]) for word in words], np.uint64)
    rng = np.random.default_rng(0)
    order = np.argsort(keys)
    vectors = rng.integers(-127, 127, (len(keys), VECTOR)).astype(np.int8)[order]
    return Encoder(keys[order], vectors, np.full(VECTOR, 0.01), np.zeros(VECTOR), np.ones(1 << BITS))


def test_training_finds_the_signal_and_repeats_itself(encoder: Encoder) -> None:
    """On unseen questions the order is nearly perfect, and the same rows and seed give the same arrays."""
    rows, unseen = made_up(400, 1), made_up(200, 2)
    encoded = Encoded(encoder, [read(query) for query in rows.query])

    first, second = (fit_heads(rows, encoded, encoder, np.arange(400), seed=3) for _ in range(2))

    model = Difficulty(encoder, first, EXPERTS)
    model.check()
    gain = np.array([model.verdict(query).gain for query in unseen.query])
    assert apgr(unseen.weak, unseen.strong, gain) > 0.7
    for field in fields(first):
        np.testing.assert_array_equal(getattr(first, field.name), getattr(second, field.name), err_msg=field.name)


def test_the_same_prompt_encodes_the_same_in_training_and_in_use(encoder: Encoder) -> None:
    """A row of the training matrices is what the running model computes for that text."""
    rows = made_up(5, 1)
    encoded = Encoded(encoder, [read(query) for query in rows.query])

    for at, query in enumerate(rows.query):
        dense, where, weight = encoded.row(at)
        assert dense == pytest.approx(encoder.dense(read(query)))
        assert where.tolist() == encoder.sparse(read(query))[0].tolist()
        assert weight == pytest.approx(encoder.sparse(read(query))[1], abs=1e-6)


def test_calibration_recovers_the_probability() -> None:
    """The curve finds the slope and intercept that made the outcomes, and never turns round."""
    rng = np.random.default_rng(4)
    gain = rng.normal(size=20_000)
    needed = rng.random(20_000) < 1 / (1 + np.exp(-2 * gain + 1))

    assert calibrate(gain, needed, np.ones(20_000)) == pytest.approx([2.0, -1.0], abs=0.1)
    assert calibrate(-gain, needed, np.ones(20_000))[0] > 0


def test_the_cascade_learns_from_agreement_and_keeps_kinds_apart() -> None:
    """Where agreement tells right from wrong, the forest of that kind of question hears it, and no other does."""
    rng = np.random.default_rng(6)
    described = describe("", "", {})
    inputs = np.zeros((2000, 20 + len(described)))
    agreed = inputs[:, 20 + AGREEMENT] = (rng.random(2000) < 0.5).astype(float)
    expert = np.arange(2000) % 2 + 1  # many_choices, arithmetic
    gain = np.where(expert == 1, 1 - agreed, 0.3)

    opinions = np.arange(2000) // 2 % ROUNDS
    gain[opinions == 0] = 0.6  # nobody was asked

    hearing = fit_hearing(inputs, gain, expert, opinions, seed=1)

    def said(name: str, agreement: float, heard: int = 1) -> float:
        asked = np.zeros(inputs.shape[1])
        asked[20 + AGREEMENT] = agreement
        return hearing.gain(asked, np.array([float(name == each) for each in EXPERTS]), heard)

    assert said("choice", 0.0) == said("many_choices", 0.0) > 0.9
    assert said("many_choices", 1.0) < 0.1
    assert said("many_choices", 1.0, heard=2) < 0.1
    assert said("code", 0.0) == said("arithmetic", 1.0) == pytest.approx(0.3)
    assert said("choice", 0.0, heard=0) == said("choice", 1.0, heard=0) == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("signals", "heard"),
    [
        ({}, 0),
        ({"peers": 2}, 0),
        ({"agreement": 1.0}, 1),
        ({"agreement": 1.0, "peers": 0}, 1),
        ({"agreement": 0.5, "peers": 2}, 2),
        ({"agreement": 0.5, "peers": 900}, 2),
    ],
)
def test_opinions_are_counted_as_far_as_they_are_learned_apart(signals: dict[str, float], heard: int) -> None:
    """None without an agreement, whatever else is said; one where it is not said of how many; two for all more."""
    assert opinions_of(signals) == heard


def test_an_expert_of_few_domains_reaches_less_far(encoder: Encoder) -> None:
    """What was learned over many domains may speak for a new one; what was learned on one speaks for that alone."""
    rows = made_up(800, 1)
    encoded = Encoded(encoder, [read(query) for query in rows.query])
    encoded.dense[:40] += np.random.default_rng(0).normal(size=encoded.dense[:40].shape) * 9  # some far from the rest
    many = replace(rows, domain=np.array([f"domain {number % 20}" for number in range(800)]))

    few, wide = (fit_heads(each, encoded, encoder, np.arange(800), seed=3).reach for each in (rows, many))

    assert few[0] == NARROW
    assert wide[0] > NARROW


def test_what_others_know_of_a_question_settles_its_outcome() -> None:
    """Outcomes move towards the truth that the others' outcomes share; a domain keeps its mean, a row nobody else
    answered keeps its own."""
    rng = np.random.default_rng(7)
    truth = rng.random(3000)
    right, *others = (rng.random((7, 3000)) < truth).astype(float)
    beside = np.array(others).T
    beside[:100] = np.nan
    domain = np.array(["one", "two", "three"])[np.arange(3000) % 3]

    settled = settle(right, beside, domain)

    assert np.abs(settled - truth).mean() < 0.8 * np.abs(right - truth).mean()
    assert settled[:100].tolist() == right[:100].tolist()
    for name in ("one", "two", "three"):
        assert settled[domain == name].mean() == pytest.approx(right[domain == name].mean(), abs=0.01)
