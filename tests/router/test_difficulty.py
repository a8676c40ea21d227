"""router.difficulty, router.cascade, router.wording and router.weights: the learned scores as they ship."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router import wording
from router.cascade import SIGNALS, Cascade
from router.difficulty import Difficulty, score, score_after
from router.weights import InvalidWeights
from shared.errors import BadRequest
from tests.router import plain
from tests.router.texts import TEXTS

HELLO = "Hi there! How are you doing today?"
SUM = "Tom has 3 apples and buys 4 more. How many apples does he have?"
MEDICINE = (
    "Which of the following is the most common cause of community acquired pneumonia?\n"
    "A. Streptococcus pneumoniae\nB. Klebsiella pneumoniae\nC. Legionella\nD. Mycoplasma\nAnswer:"
)
CODE = (
    "You are given a Python function and an assertion containing an input to the function. Complete the assertion with "
    "a literal (no unsimplified expressions, no function calls) containing the output when executing the provided code "
    "on the given input, even if the function is incorrect or incomplete. \n\n[PYTHON]\n"
    "def f(text, chars):\n    out = []\n    for n, c in enumerate(text):\n"
    "        if c in chars:\n            out.append(text.count(c) * n)\n    out.sort(reverse=True)\n    return out\n"
    "assert f('abracadabra', 'bra') == ??\n[/PYTHON]"
)


@pytest.fixture(scope="module")
def shipped() -> Difficulty:
    return Difficulty.load()


@pytest.fixture(scope="module")
def cascade(shipped: Difficulty) -> Cascade:
    return Cascade.load(shipped)


def test_scores_are_probabilities_one_a_text(shipped: Difficulty) -> None:
    """`score` gives one number strictly inside 0..1 per text, the same one alone and among others."""
    texts = [HELLO, SUM, MEDICINE, CODE, ""]

    scores = score(texts)

    assert scores == [shipped.score([text])[0] for text in texts]
    assert all(0 < number < 1 for number in scores)
    assert score([]) == []


def test_what_small_models_fail_at_scores_higher() -> None:
    """Predicting a program's output needs the cloud more than a sum of two numbers or a greeting does."""
    hello, addition, code = score([HELLO, SUM, CODE])

    assert code > addition
    assert code > hello


@given(st.text(max_size=400))
@settings(max_examples=150, deadline=None)
def test_every_text_gets_a_finite_score(text: str) -> None:
    """No text, lone surrogates and control characters included, raises or yields anything but a probability."""
    assert 0 < score([text])[0] < 1


@pytest.mark.parametrize(
    "text", ["\ud800 broken", "9" * 5000, "1.2.3,4 ١٢٣ ²", "\nA. \nA. ", "\x00", "(" * 10_000, "İ" * 4000]
)
def test_odd_texts_are_scored(text: str) -> None:
    """Texts that trip number parsing, option splitting, lowering or encoding are scored like any other."""
    assert 0 < score([text])[0] < 1


def test_work_is_bounded_by_the_clip() -> None:
    """Beyond the clip the middle of a text is not looked at, so cost does not grow with length."""
    left, right = ("word " * 1000 + filling * 20_000 + "end " * 1000 for filling in ("a", "7"))

    assert score([left]) == score([right])
    assert len(wording.clip(left)) == wording.CLIP


def test_unfamiliar_text_falls_back_to_the_prior(shipped: Difficulty) -> None:
    """What no expert was trained on is left to the prior: known kinds are familiar, noise is not."""
    noise = shipped.verdict("zxqv blorptang ### 9q9q9q :: vvvv " * 20)

    assert shipped.verdict(MEDICINE).familiarity > 0.9
    assert shipped.verdict(CODE).familiarity > 0.9
    assert noise.familiarity < 0.3
    assert abs(noise.gain) < 0.6


def test_each_kind_of_question_goes_to_its_expert(shipped: Difficulty) -> None:
    """The gate sends a multiple-choice question, a word problem and a program to the expert that knows its kind."""
    for text, expert in ((MEDICINE, "choice"), (SUM, "arithmetic"), (CODE, "code")):
        shares = shipped.verdict(text).experts

        assert max(shares, key=lambda name: shares[name]) == expert


def test_thresholds_fall_as_more_may_go_to_the_cloud(shipped: Difficulty) -> None:
    """The threshold for a larger share is never higher, for each expert and over all."""
    for expert in (None, *shipped.names):
        limits = [shipped.threshold(share, expert) for share in (0.0, 0.1, 0.3, 0.5, 0.9, 1.0)]

        assert limits == sorted(limits, reverse=True)


def test_a_goal_becomes_a_threshold_with_an_outlook(shipped: Difficulty) -> None:
    """A cost goal and a quality goal meet: what a share should recover needs about that share, and beats chance."""
    for expert in (None, "choice", "many_choices", "arithmetic"):
        cheap = shipped.at_share(0.3, expert)
        kept = shipped.at_recovery(cheap.recovered, expert)

        assert 0.3 < cheap.recovered < 1
        assert kept.cloud_share == pytest.approx(0.3, abs=0.011)
        assert kept.threshold == pytest.approx(cheap.threshold, abs=0.01)
    assert shipped.at_share(0).recovered == 0
    assert shipped.at_share(1).recovered == pytest.approx(1)


def test_weights_are_read_at_first_use_not_at_import() -> None:
    """Importing opens no file and needs none of the libraries that training needs; scoring needs numpy only."""
    code = (
        "import sys\n"
        "for name in 'scipy sklearn pyarrow torch tokenizers safetensors wordllama'.split(): sys.modules[name] = None\n"
        "opened = []\n"
        "sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == 'open' else None)\n"
        "import router.difficulty, router.cascade\n"
        "assert not any('.npz' in name for name in opened)\n"
        "assert 0 < router.difficulty.score(['hello'])[0] < 1\n"
        "assert 0 < router.difficulty.score_after('1+1?', '2') < 1\n"
        "assert any('.npz' in name for name in opened)\n"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)

    assert done.returncode == 0, done.stderr


def arrays_of(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as archive:
        return {name: archive[name] for name in archive.files}


@pytest.fixture
def packed(shipped: Difficulty, tmp_path: Path) -> Path:
    path = tmp_path / "difficulty.npz"
    shipped.save(path, {})
    return path


def test_saved_weights_score_the_same(shipped: Difficulty, packed: Path) -> None:
    """What is saved and loaded again decides the same."""
    assert Difficulty.load(packed).score([MEDICINE, CODE]) == pytest.approx(shipped.score([MEDICINE, CODE]), abs=1e-6)


DAMAGE: dict[str, tuple[Callable[[dict[str, np.ndarray]], None], str]] = {
    "missing array": (lambda arrays: arrays.__delitem__("gate"), "gate"),
    "not finite": (lambda arrays: arrays["weak"].__setitem__((0, 0), np.nan), "weak"),
    "wrong shape": (lambda arrays: arrays.__setitem__("mean", arrays["mean"][:-1]), "mean"),
    "text for numbers": (lambda arrays: arrays.__setitem__("base", np.array(["x"] * len(arrays["base"]))), "base"),
    "input that is not there": (lambda arrays: arrays["feature"].__setitem__((0, 0, 0), 9999), "feature"),
    "other version": (lambda arrays: arrays.__setitem__("about", np.array('{"version": 99}')), "about"),
    "no description": (lambda arrays: arrays.__delitem__("about"), "path"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_weights_are_refused_by_name(packed: Path, name: str) -> None:
    """A weights file with anything wrong is refused with an error that names the array, never half believed."""
    damage, param = DAMAGE[name]
    arrays = arrays_of(packed)
    damage(arrays)
    np.savez(packed, **arrays)

    with pytest.raises(InvalidWeights) as refused:
        Difficulty.load(packed)

    assert refused.value.param == param


@pytest.mark.parametrize("keep", [0, 100, 50_000, -30])
def test_cut_off_weights_are_refused(packed: Path, keep: int) -> None:
    """A file cut off anywhere, an empty and a missing one are InvalidWeights, not whatever the reader trips over."""
    packed.write_bytes(packed.read_bytes()[:keep])

    with pytest.raises(InvalidWeights):
        Difficulty.load(packed)
    with pytest.raises(InvalidWeights):
        Difficulty.load(packed.with_name("absent.npz"))


def test_pickles_are_never_loaded(packed: Path) -> None:
    """An array of objects, which would be unpickled, is refused."""
    arrays = arrays_of(packed)
    arrays["base"] = np.array([print] * 5, dtype=object)
    np.savez(packed, **arrays)

    with pytest.raises(InvalidWeights):
        Difficulty.load(packed)


@given(st.lists(st.text("abcdefgh0123", min_size=1, max_size=8), min_size=1, max_size=12))
def test_a_word_hashes_the_same_wherever_it_stands(words: list[str]) -> None:
    """Equal words have equal hashes at any position and in any case; different words have different ones."""
    hashes = wording.read(", ".join(words).upper()).words

    assert len(hashes) == len(words)
    assert [int(wording.read(word).words[0]) for word in words] == [int(number) for number in hashes]
    assert len(set(hashes.tolist())) == len(set(words))


def test_grams_hold_every_piece_of_the_text() -> None:
    """The n-grams of a text are those of its parts, plus the pieces across the seam."""
    whole, part = (set(wording.read(text).grams.tolist()) for text in ("alpha beta gamma", "beta"))

    assert part <= whole


@given(st.one_of(TEXTS, st.sampled_from([HELLO, SUM, MEDICINE, CODE]), st.just(MEDICINE * 12)))
@settings(max_examples=40, deadline=None)
def test_the_fast_score_is_the_plain_one(shipped: Difficulty, text: str) -> None:
    """For any text the score is what the tables say when every step is worked out one by one."""
    assert shipped.score([text])[0] == pytest.approx(plain.score(shipped, text), abs=1e-5)


def test_agreement_lowers_and_dissent_raises_the_need(cascade: Cascade) -> None:
    """A second opinion that agrees makes the cloud less needed than one that does not."""
    known = {"answer_chars": 300.0, "peers": 1.0}

    agreed = cascade.score(MEDICINE, "A", {**known, "agreement": 1.0})
    differed = cascade.score(MEDICINE, "A", {**known, "agreement": 0.0})

    assert 0 < agreed < differed < 1


@pytest.mark.parametrize("query", [MEDICINE, SUM, CODE, HELLO])
@pytest.mark.parametrize("answer", ["A", "7", "['a', 'b']", ""])
def test_more_agreement_never_raises_the_need(cascade: Cascade, query: str, answer: str) -> None:
    """All else alike, the score falls or stays as more second opinions agree, and somewhere it falls."""
    known = {"answer_chars": 300.0, "peers": 2.0, "dissent": 0.0}

    needed = [cascade.score(query, answer, {**known, "agreement": share}) for share in (0.0, 0.5, 1.0)]

    assert needed == sorted(needed, reverse=True)
    assert needed[0] > needed[-1]


def test_the_cascade_works_on_what_little_is_known() -> None:
    """With no signal the answer alone is scored, an empty one included."""
    assert 0 < score_after(SUM, "") < 1
    assert 0 < score_after(SUM, "The answer is 7.", {"agreement": 0.5, "peers": 4}) < 1


@pytest.mark.parametrize(
    ("signals", "param"),
    [
        ({"vibes": 1.0}, "signals.vibes"),
        ({"agreement": 1.5}, "signals.agreement"),
        ({"answer_chars": float("nan")}, "signals.answer_chars"),
        ({"answer_chars": float("inf")}, "signals.answer_chars"),
        ({"silent": -0.1}, "signals.silent"),
        ({"dissent": 2.0}, "signals.dissent"),
    ],
)
def test_bad_signals_are_refused_by_name(signals: dict[str, float], param: str) -> None:
    """An unknown signal or one out of its range is a bad request that names it."""
    with pytest.raises(BadRequest) as refused:
        score_after(SUM, "7", signals)

    assert refused.value.param == param


@given(st.text(max_size=200), st.dictionaries(st.sampled_from(sorted(SIGNALS)), st.floats(0, 1)))
@settings(max_examples=60, deadline=None)
def test_every_answer_gets_a_finite_score(answer: str, signals: dict[str, float]) -> None:
    """Any answer with any signals in range yields a probability."""
    assert 0 < score_after(SUM, answer, signals) < 1
