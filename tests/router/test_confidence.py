"""router.confidence and router.calibrate: how sure a model was, and what that is worth."""

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from router.__main__ import app
from router.calibrate import Answered, Rival, Token, calibrate, section
from router.calibrate import heard as heard_of
from router.cascade_rules import Calibration, CascadeRules
from router.confidence import Heard, Tally, judge, probability
from router.decide import decide
from router.features import DeviceReading, LinkReading, RequestFeatures
from router.policy import InvalidPolicy, parse
from shared.errors import BadRequest
from shared.schemas import Delta, ModelCard, TokenLogprob, TopLogprob

RULES = CascadeRules(threshold=0.6, min_tokens=2)
CARD = ModelCard(id="small", context_length=100, digest="ab12" * 16)
SHARES = st.lists(st.floats(0.001, 1.0), min_size=1, max_size=5)


def token(text: str, shares: list[float]) -> TokenLogprob:
    top = tuple(TopLogprob(str(at), math.log(share)) for at, share in enumerate(shares))
    return TokenLogprob(text, math.log(shares[0]), (), top)


def tallied(*texts: str, last: bool = False, p: float = 0.5) -> Tally:
    tally = Tally()
    for at, text in enumerate(texts, 1):
        end = "stop" if last and at == len(texts) else None
        tally.push(Delta(text=text, tokens=1, logprobs=(token(text, [p]),), finish_reason=end))
    return tally


# --- what is heard ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "ends"),
    [
        ("It is so. And", True),
        ('He said "no." Then', True),
        ("Really? ", True),
        ("First line\n", True),
        ("\u3053\u308c\u306f\u3002", True),
        ("It is so.", False),
        ("Version 3.5 is", False),
        ("1. First", False),
        ("Well ... perhaps", False),
        ("\n\n", False),
    ],
)
def test_where_a_sentence_ends(text: str, ends: bool) -> None:
    """However it is cut into pieces: at a full stop that something follows, or at a line's end."""
    assert tallied(text).sentence is ends
    assert tallied(*text).sentence is ends


@settings(max_examples=100)
@given(st.lists(SHARES, min_size=1, max_size=6))
def test_signals_are_what_they_say(rows: list[list[float]]) -> None:
    """Against the formulas, written out: the rivals' probabilities made to sum to at most one."""
    rows = [sorted((share / max(1.0, sum(row)) for share in row), reverse=True) for row in rows]
    tally = Tally()
    for row in rows:
        tally.push(Delta(text="x", tokens=1, logprobs=(token("x", row),)))

    heard = tally.heard()

    rest = [[*row, max(0.0, 1 - sum(row))] for row in rows]
    entropy = sum(-sum(p * math.log(p) for p in row if p) for row in rest) / len(rows)
    assert heard.tokens == len(rows)
    assert heard.mean_logprob == pytest.approx(sum(math.log(row[0]) for row in rows) / len(rows))
    assert heard.least_logprob == pytest.approx(min(math.log(row[0]) for row in rows))
    assert heard.margin == pytest.approx(sum(row[0] - (row[1] if len(row) > 1 else 0) for row in rows) / len(rows))
    assert heard.entropy == pytest.approx(entropy, abs=1e-9)


def test_impossible_tokens_stay_finite() -> None:
    """A log probability of minus infinity, as some servers give for what a grammar forbids, spoils no sum."""
    tally = Tally()
    top = (TopLogprob("a", 0.0), TopLogprob("b", -math.inf))
    tally.push(Delta(text="x", tokens=1, logprobs=(TokenLogprob("x", -math.inf, (), top),)))

    heard = tally.heard()

    assert math.isfinite(heard.mean_logprob)
    assert (heard.margin, heard.entropy) == (1.0, 0.0)


def test_enough_is_a_sentence_the_end_or_a_limit() -> None:
    """Whichever comes first; a short first sentence waits for the least number of tokens."""
    assert not tallied("Yes. ").enough(RULES, 0.0)
    assert tallied("Yes. ", "It").enough(RULES, 0.0)
    assert not tallied("Yes. ", "It").enough(CascadeRules(threshold=0.6, hold="answer"), 0.0)
    assert tallied("Yes", last=True).enough(RULES, 0.0)
    assert tallied("Yes").enough(RULES, 10.0)
    assert tallied("Y" * 4000).enough(RULES, 0.0)


def test_what_repeats_itself() -> None:
    """Long runs of the same words; not short answers, and not a list whose lines begin alike."""
    assert tallied("no I said " * 20).heard().flaw == "repeats itself"
    assert not tallied("no " * 20).heard().flaw
    assert not tallied("".join(f"Number {at} comes after number {at - 1}.\n" for at in range(30))).heard().flaw


# --- what it is worth ------------------------------------------------------------------------------------------------


def test_without_a_calibration_the_tokens_mean_counts() -> None:
    """And it is said that nothing else is known."""
    judged = judge(Heard(tokens=4, mean_logprob=math.log(0.5)), RULES, CARD)

    assert judged.p == pytest.approx(0.5)
    assert judged.said == "cascade: p 0.50 < 0.60 (uncalibrated)"


def test_a_calibration_is_for_one_model_and_its_bytes() -> None:
    """By name, and where it says so by digest: another quantization is not judged by it."""
    curve = Calibration(digest="ab12", bias=1.0, mean_logprob=2.0)
    rules = CascadeRules(threshold=0.6, calibration={"small": curve})
    heard = Heard(tokens=4, mean_logprob=-1.0)

    assert judge(heard, rules, CARD).p == pytest.approx(1 / (1 + math.e))
    assert judge(heard, rules, CARD).said == "cascade: p 0.26 < 0.60"
    for other in (ModelCard(id="small", context_length=1, digest="ff"), ModelCard(id="other", context_length=1)):
        assert not judge(heard, rules, other).calibrated


@pytest.mark.parametrize(("p", "said"), [(0.5999, "0.59 < 0.60"), (0.6, "0.60 >= 0.60"), (0.601, "0.61 >= 0.60")])
def test_what_is_said_agrees_with_what_is_done(p: float, said: str) -> None:
    """Rounding never shows a probability on the wrong side of the threshold."""
    assert said in judge(Heard(tokens=1, mean_logprob=math.log(p)), RULES, CARD).said


def test_nothing_to_judge_by_is_no_reason_to_send() -> None:
    """A model that gives no probabilities is believed."""
    assert judge(Heard(chars=10), RULES, CARD).good


# --- when it applies -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "request_", "link", "escalates"),
    [
        ("mode: prefer_edge", {}, {}, True),
        ("mode: prefer_edge\ngoal: {quality: 0.9}", {"difficulty": 0.1, "difficult_from": 0.5}, {}, True),
        ("mode: prefer_edge\ngoal: {quality: 0.9}", {"difficulty": 0.6, "difficult_from": 0.5}, {}, False),
        ("mode: prefer_cloud", {}, {}, False),
        ("mode: prefer_cloud", {}, {"round_trip_s": 9.0}, False),
        ("mode: prefer_edge", {}, {"round_trip_s": 9.0}, False),
        ("mode: prefer_edge", {}, {"draining": True}, False),
        ("mode: prefer_edge", {}, {"admitting": False}, False),
        ("mode: prefer_edge", {"label": "edge_only"}, {}, False),
        ("mode: prefer_edge", {"model": "edge"}, {}, False),
        ("mode: only_edge", {}, {}, False),
        ("mode: prefer_edge\nrules: [{name: here, target: edge}]", {}, {}, False),
    ],
)
def test_only_what_was_left_to_the_edge_escalates(
    policy: str, request_: dict[str, Any], link: dict[str, Any], escalates: bool
) -> None:
    """Not what a bar, a rule or an outage decided, and never while the cloud could not answer."""
    decided = decide(
        RequestFeatures(prompt_tokens=5, **request_),
        parse(policy + "\ncascade: {threshold: 0.6}"),
        device=DeviceReading(model="small", context_length=2048),
        link=LinkReading(**{"model": "large", "context_length": 2048, **link}),
    )

    assert decided.escalates is escalates


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("cascade: {}", "cascade.threshold"),
        ("cascade: {threshold: 1.5}", "less than 1"),
        ("cascade: {threshold: .nan}", "cascade.threshold"),
        ("cascade: {threshold: 0.5, hold: word}", "cascade.hold"),
        ("cascade: {threshold: 0.5, treshold: 1}", "unknown field"),
        ("cascade: {threshold: 0.5, calibration: {small: {bias: 1, margn: 2}}}", "did you mean margin?"),
        ("cascade: {threshold: 0.5, calibration: {small: {bias: 1, digest: XY}}}", "digest"),
    ],
)
def test_mistakes_in_the_policy_are_named(text: str, said: str) -> None:
    """With their field."""
    with pytest.raises(InvalidPolicy) as caught:
        parse(f"mode: prefer_edge\n{text}")
    assert said in str(caught.value)


def test_tenants_may_have_their_own() -> None:
    """As with a goal: what is not given stays."""
    policy = parse("mode: prefer_edge\ntenants: {lab: {cascade: {threshold: 0.9}}}")
    assert policy.cascade is None
    assert policy.of("lab").cascade == CascadeRules(threshold=0.9)


# --- calibration -----------------------------------------------------------------------------------------------------


def table(count: int, seed: int = 7) -> list[Answered]:
    """Answers right with the probability 1 / (1 + exp(-(3 + 2 * mean log probability)))."""
    chance, rows = random.Random(seed), []
    for _ in range(count):
        shares = [chance.uniform(0.05, 0.9) ** 2 + 0.01 for _ in range(4)]
        mean = sum(map(math.log, shares)) / 4
        right = chance.random() < 1 / (1 + math.exp(-(3 + 2 * mean)))
        tokens = tuple(Token("word ", math.log(p), (Rival("word ", math.log(p)), Rival("x", -5.0))) for p in shares)
        rows.append(Answered("small:q4", right, tokens, "ab12"))
    return rows


def test_a_curve_is_found_again() -> None:
    """What made the outcomes is what the fit says, and its reliability is measured on answers it did not see."""
    (fitted,) = calibrate(table(2000), CascadeRules(threshold=0.5, hold="answer"))

    assert fitted.answers == sum(part.count for part in fitted.alone.bins) == 2000
    unseen = [heard_of(one, CascadeRules(threshold=0.5, hold="answer")) for one in table(200, seed=8)]
    off = [probability(one, fitted.calibration) - 1 / (1 + math.exp(-(3 + 2 * one.mean_logprob))) for one in unseen]
    assert sum(map(abs, off)) / len(off) < 0.05
    assert fitted.alone.error < 0.05
    assert fitted.alone.ranked > 0.7
    assert fitted.agreed is None


@pytest.mark.parametrize("seed", range(5))
def test_a_surer_answer_is_never_thought_worse_of(seed: int) -> None:
    """Signals say much the same, and few answers: no slope comes out the wrong way round, where extremes of one would
    make up for all others."""
    (fitted,) = calibrate(table(60, seed), CascadeRules(threshold=0.5, hold="answer"))

    curve = fitted.calibration
    assert min(curve.mean_logprob, curve.least_logprob, curve.margin, -curve.entropy) >= 0
    assert curve.mean_logprob + curve.least_logprob + curve.margin > 0


def test_what_it_prints_is_what_the_policy_takes(tmp_path: Path) -> None:
    """The section goes into a policy as it is, comments and all."""
    rows = [
        {
            "model": one.model,
            "right": one.right,
            "digest": one.digest,
            "logprobs": [
                {"token": t.token, "logprob": t.logprob, "bytes": None, "top_logprobs": [{"token": "a", "logprob": -1}]}
                for t in one.logprobs
            ],
        }
        for one in table(200)
    ]
    file = tmp_path / "outcomes.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)), "utf-8")

    result = CliRunner().invoke(app, ["calibrate", str(file), "--hold", "answer"])

    assert result.exit_code == 0, result.output
    written = "".join(f"  {line}\n" for line in result.stdout.splitlines())
    policy = parse(f"mode: prefer_edge\ncascade:\n  threshold: 0.6\n{written}")
    assert policy.cascade is not None
    assert policy.cascade.calibration["small:q4"].digest == "ab12"


def test_too_few_answers_are_refused() -> None:
    """A curve through nothing would look like knowledge."""
    with pytest.raises(BadRequest, match=r"small:q4: 20 answers, \d+ right"):
        calibrate(table(20), RULES)


@pytest.mark.parametrize("line", ["{", '{"model": "m"}', '{"model": "m", "right": 1, "logprobs": []}'])
def test_a_bad_line_is_named(tmp_path: Path, line: str) -> None:
    """By its number, and nothing is fitted."""
    file = tmp_path / "outcomes.jsonl"
    file.write_text(f'{{"model": "m", "right": true, "logprobs": []}}\n{line}\n', "utf-8")

    result = CliRunner().invoke(app, ["calibrate", str(file)])

    assert result.exit_code == 1
    assert "line 2" in result.stderr


def test_each_model_has_its_own_curve() -> None:
    """Another quantization is another model."""
    rows = table(200) + [Answered(one.model, one.right, one.logprobs, "ff00") for one in table(200, seed=8)]

    assert [one.calibration.digest for one in calibrate(rows, RULES)] == ["ab12", "ff00"]
    assert section([]) == "calibration:"
