"""Agreement of a second sample: how it is measured, what it is worth, and how that is calibrated."""

import math
import random
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from router.__main__ import app
from router.calibrate import Answered, Token, calibrate, section
from router.cascade_rules import AgreedCurve, Calibration, CascadeRules, SecondSample
from router.confidence import Heard, Tally, agreement, probability
from router.policy import InvalidPolicy, parse
from shared.errors import BadRequest
from shared.schemas import Delta, ToolPiece

RULES = CascadeRules(threshold=0.5, hold="answer")


@pytest.mark.parametrize(
    ("one", "other", "share"),
    [
        ("", "", 1.0),
        ("Paris", "", 0.0),
        ("It is Paris.", "it is PARIS", 1.0),
        ("It is Paris.", "It is Rome.", 2 / 3),
        ("Yes", "No", 0.0),
        ("3 + 4 = 7", "3 + 4 = 7.", 1.0),
        ("3 + 4 = 7", "3 + 4 = 8", (2 / 3 + 0) / 2),
        ("7", "It is 7", (0.5 + 1) / 2),
        ("That makes 1,000.", "That makes 1000.", (2 * 2 / 7 + 1) / 2),
        ("It is Paris.", "It is Paris, of 2 million.", 2 * 3 / 9),
        ("\u3053\u308c", "\u3053\u308c", 1.0),
    ],
)
def test_how_far_two_answers_agree(one: str, other: str, share: float) -> None:
    """Words in common, either way round; where both come down to a number, half of it is that number."""
    assert agreement(one, other) == agreement(other, one) == pytest.approx(share)


@settings(max_examples=100)
@given(st.text(max_size=80), st.text(max_size=80))
def test_agreement_is_a_share(one: str, other: str) -> None:
    """Of any two texts, and all of it of a text with itself."""
    assert 0 <= agreement(one, other) <= 1
    assert agreement(one, one) == 1


def test_calls_agree_by_what_they_call() -> None:
    """A call has no text, and is compared by its name and arguments."""
    tallies = [Tally() for _ in range(3)]
    for tally, city in zip(tallies, ("Rome", "Rome", "Oslo"), strict=True):
        tally.push(Delta(tool_calls=(ToolPiece(0, '{"ci', "c", "weather"),)))
        tally.push(Delta(tool_calls=(ToolPiece(0, f'ty": "{city}"}}'),)))

    assert agreement(tallies[0].said, tallies[1].said) == 1
    assert agreement(tallies[0].said, tallies[2].said) == pytest.approx(2 / 3)


def test_without_a_calibration_agreement_counts_half() -> None:
    """And nothing where none was heard."""
    assert probability(Heard(tokens=1, mean_logprob=math.log(0.8), agreement=0.4), None) == pytest.approx(0.6)
    assert probability(Heard(tokens=1, mean_logprob=math.log(0.8)), None) == pytest.approx(0.8)


def test_agreement_has_a_curve_of_its_own() -> None:
    """An answer whose second sample was not heard is judged by the curve without: no signal is made up."""
    curve = Calibration(bias=0.0, agreed=AgreedCurve(bias=-2.0, agreement=4.0))

    assert probability(Heard(tokens=1), curve) == pytest.approx(0.5)
    assert probability(Heard(tokens=1, agreement=1.0), curve) == pytest.approx(1 / (1 + math.exp(-2)))
    assert probability(Heard(tokens=1, agreement=0.0), curve) == pytest.approx(1 / (1 + math.exp(2)))
    assert probability(Heard(tokens=1, agreement=0.0), Calibration(bias=0.0)) == pytest.approx(0.5)


# --- the policy -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("second", "agreed", "said"),
    [
        ("{}", "", "with second samples of its own"),
        ("{model: tiny}", "", "with second samples of tiny"),
        ("{model: tiny}", ", agreed: {bias: 1, agreement: 1}", "with second samples of tiny"),
        ("{}", ", agreed: {bias: 1, agreement: 1, model: tiny}", "with second samples of its own"),
    ],
)
def test_a_calibration_without_these_second_samples_is_refused_by_name(second: str, agreed: str, said: str) -> None:
    """What they are worth is not known: at its place in the file. Without second_sample an older one still holds."""
    text = f"mode: prefer_edge\ncascade:\n  threshold: 0.5\n  calibration:\n    small: {{bias: 1{agreed}}}\n"

    with pytest.raises(InvalidPolicy) as caught:
        parse(f"{text}  second_sample: {second}\n")

    (problem,) = caught.value.problems
    assert (problem.line, problem.field) == (5, "cascade.calibration.small")
    assert said in problem.message
    assert parse(text).cascade is not None


def test_a_calibration_with_them_is_taken() -> None:
    """By the same model's, and by another's."""
    for second, model in (("{}", ""), ("{model: tiny}", ", model: tiny")):
        policy = parse(
            f"mode: prefer_edge\ncascade: {{threshold: 0.5, second_sample: {second}, "
            f"calibration: {{small: {{bias: 1, agreed: {{bias: 1, agreement: 1{model}}}}}}}}}"
        )
        assert policy.cascade is not None
        assert isinstance(policy.cascade.second_sample, SecondSample)


@pytest.mark.parametrize(
    ("cascade", "said"),
    [
        ("mark: ''", "cascade.mark"),
        ("mark: '  '", "cascade.mark"),
        ("second_sample: {temperature: 0}", "cascade.second_sample.temperature"),
        ("second_sample: {temprature: 1}", "did you mean temperature?"),
        ("second_sample: {max_tokens: 9999}", "cascade.second_sample.max_tokens"),
        ("second_sample: true", "must be a map"),
        ("calibration: {small: {bias: 1, agreed: {bias: 1}}}", "agreed.agreement"),
        ("calibration: {small: {bias: 1, agreed: {bias: 1, agreement: 1, agreemnt: 1}}}", "did you mean agreement?"),
    ],
)
def test_mistakes_are_named(cascade: str, said: str) -> None:
    """With their field."""
    with pytest.raises(InvalidPolicy) as caught:
        parse(f"mode: prefer_edge\ncascade: {{threshold: 0.5, {cascade}}}")
    assert said in str(caught.value)


# --- calibration ------------------------------------------------------------------------------------------------------


def agreeing(count: int, seed: int = 7) -> list[Answered]:
    """Answers that the tokens say nothing of, and that a second sample repeats where they are right, mostly."""
    chance, rows = random.Random(seed), []
    for _ in range(count):
        right = chance.random() < 0.4
        same = chance.random() < (0.9 if right else 0.2)
        first = tuple(Token(word, -chance.random()) for word in ("It ", "is ", "Rome."))
        second = tuple(Token(word, -1.0) for word in ("It ", "is ", "Rome." if same else "Oslo."))
        rows.append(Answered("small", right, first, "ab12", second))
    return rows


def test_second_samples_are_a_signal() -> None:
    """Where the tokens say nothing, the curve with agreement tells right from wrong, and the policy takes it."""
    (fitted,) = calibrate(agreeing(400), RULES)

    assert fitted.agreed is not None
    assert fitted.alone.ranked < 0.6
    assert fitted.agreed.ranked > 0.8
    assert fitted.agreed.error < 0.1
    written = "".join(f"  {line}\n" for line in section([fitted]).splitlines())
    policy = parse(f"mode: prefer_edge\ncascade:\n  threshold: 0.6\n  second_sample: {{}}\n{written}")
    assert policy.cascade is not None
    agreed = policy.cascade.calibration["small"].agreed
    assert agreed is not None
    assert agreed.agreement > 0


def test_the_command_shows_both_curves(tmp_path: Path) -> None:
    """Without and with second samples, as comments, and what the policy takes below."""
    file = tmp_path / "outcomes.jsonl"
    file.write_bytes(b"\n".join(msgspec.json.encode(row) for row in agreeing(100)))

    result = CliRunner().invoke(app, ["calibrate", str(file), "--hold", "none"])

    assert result.exit_code == 0, result.output
    assert "# calibration error" in result.stdout
    assert "# with second samples: error" in result.stdout
    assert "agreed: {bias: " in result.stdout


def test_second_samples_of_some_only_are_refused() -> None:
    """Or of several models: the curve would be of neither."""
    rows = agreeing(100)
    some = [*rows[:50], *(msgspec.structs.replace(row, second=None) for row in rows[50:])]
    several = [*rows[:50], *(msgspec.structs.replace(row, second_model="tiny") for row in rows[50:])]

    with pytest.raises(BadRequest, match="small: some answers have a second sample and some have none"):
        calibrate(some, RULES)
    with pytest.raises(BadRequest, match="small: its second samples are of several models"):
        calibrate(several, RULES)
