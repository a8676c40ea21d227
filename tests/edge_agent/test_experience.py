from dataclasses import replace
from pathlib import Path

import pytest
from edge_sides import Turns, ask, collect, daemon_over, policy_file
from fakes import ScriptedAnswer

from edge_agent.experience import MAX_OPEN, MAX_PACES, Experience
from router.classes import KNOWN
from router.features import NO_CLOUD, DeviceReading, LinkReading, RequestFeatures, Trouble
from router.predict import FIRST_PIECES, Pace, Prediction, Predictions, lateness_s, predict
from router.records import Recorded
from shared.errors import UpstreamFailed
from shared.schemas import Cached, Delta, Route, Target, Usage
from shared.telemetry import RequestFinished


def record(target: Target | None = "edge", running: int = 0, **changes: object) -> Recorded:
    return Recorded(
        at=1.0,
        request=RequestFeatures(prompt_tokens=100),
        device=DeviceReading(model="small", context_length=100, running=running),
        link=NO_CLOUD,
        target=target,
        **changes,  # type: ignore[arg-type]
    )


def finished(request_id: str = "r", served: Target = "edge", tokens: int = 21, **changes: object) -> RequestFinished:
    values: dict[str, object] = {
        "request_id": request_id,
        "model": "auto",
        "outcome": "done",
        "total_s": 1.2,
        "first_token_s": 0.2,
        "usage": Usage(prompt_tokens=100, completion_tokens=tokens),
        "route": Route(target=served, reason="because"),
    }
    return RequestFinished(**(values | changes))  # type: ignore[arg-type]


def test_a_record_is_completed_and_kept() -> None:
    """Its outcome is what the event says; an event of no decision is nobody's."""
    kept: list[Recorded] = []
    experience = Experience(kept.append)
    experience.decided("r", record())
    experience(finished("other"))
    experience(finished())

    (one,) = kept
    assert (one.outcome.served, one.outcome.ending, one.outcome.completion_tokens) == ("edge", "done", 21)
    assert (one.outcome.first_token_s, one.outcome.total_s) == (0.2, 1.2)


def test_a_decision_may_be_told_again() -> None:
    """With more that is known of it: one row comes of it, also where no further decision would be waited for."""
    kept: list[Recorded] = []
    experience = Experience(kept.append)
    for number in range(MAX_OPEN):
        experience.decided(str(number), record())
    experience.decided("0", record(reason="later"))
    experience(finished("0"))

    assert [one.reason for one in kept] == ["later"]
    assert experience.lost == 0


def test_a_refusal_is_kept_at_once() -> None:
    """It has no end to wait for."""
    kept: list[Recorded] = []
    Experience(kept.append).decided("r", record(None, refused="policy_denied"))

    assert [one.refused for one in kept] == ["policy_denied"]


@pytest.mark.parametrize("target", ["edge", "cloud"])
def test_the_pace_of_who_answered_is_learned(target: Target) -> None:
    """20 further tokens in a second: 50 ms each; the other side's pace is not touched."""
    experience = Experience()
    experience.decided("r", record(target))
    experience(finished(served=target))

    pace = experience.pace(target, "small" if target == "edge" else "")
    assert pace.token.at(1) == pytest.approx(0.05)
    assert pace.first_token.at(100) == pytest.approx(0.2)
    assert experience.pace("cloud" if target == "edge" else "edge", "" if target == "edge" else "small") == Pace()


def test_each_model_of_the_device_has_its_own_pace() -> None:
    """What one took says nothing of another; more models than are kept make the first one forgotten."""
    experience = Experience()
    for number in range(MAX_PACES + 1):
        device = DeviceReading(model=f"m{number}", context_length=100)
        experience.decided("r", replace(record("edge"), device=device))
        experience(finished(total_s=1.2 + number))

    assert experience.pace("edge", "m1").token.at(1) == pytest.approx(0.1)
    assert experience.pace("edge", "m2").token.at(1) == pytest.approx(0.15)
    assert experience.pace("edge", "m0") == experience.pace("edge", "never asked") == Pace()


@pytest.mark.parametrize(
    "event",
    [
        finished(outcome="error", error_code="upstream_failed"),
        finished(outcome="cancelled"),
        finished(served="cloud"),
        finished(route=None),
        finished(route=Route(target="edge", reason="because", cached=Cached(use="hit"))),
        finished(route=Route(target="edge", reason="because", cached=Cached(use="shared"))),
        finished(first_token_s=None),
    ],
)
def test_what_went_otherwise_teaches_nothing(event: RequestFinished) -> None:
    """Failed, cancelled, answered by the other side or by the cache, without a token: that tells of other things."""
    experience = Experience()
    experience.decided("r", record())
    experience(event)

    assert experience.pace("edge", "small") == experience.pace("cloud") == Pace()


def test_what_losses_added_is_not_learned() -> None:
    """The cloud's pace is that of a link that loses nothing: a prediction adds what this one loses, but once."""
    trouble = Trouble(loss=0.1, resend_s=0.2, cuts_per_s=0.05, reconnect_s=0.5)
    experience, link = Experience(), LinkReading(trouble=trouble)
    late = lateness_s(trouble, 0.2, FIRST_PIECES)
    experience.decided("r", replace(record("cloud"), link=link))
    experience(finished(served="cloud"))
    pace = experience.pace("cloud")
    learned = replace(link, first_token_s=pace.first_token.at(100), token_s=pace.token.at(1))
    asked = RequestFeatures(prompt_tokens=100, expected_output_tokens=21)
    said = predict(asked, record().device, learned).cloud

    assert 0.02 < late < 0.2
    assert learned.first_token_s == pytest.approx(0.2 - late)
    assert said.first_token_s == pytest.approx(0.2, abs=0.005)
    assert said.total_s == pytest.approx(1.2, abs=0.005)


def test_predictions_are_held_against_what_happened() -> None:
    """The median of how far off they were, either way; what was not predicted does not count."""
    experience = Experience()
    said = [Prediction(first_token_s=0.1, total_s=1.0), Prediction(first_token_s=0.5, total_s=None), Prediction()]
    for number, edge in enumerate(said):
        experience.decided(str(number), record(predictions=Predictions(edge=edge)))
        experience(finished(str(number)))

    assert experience.accuracy()["edge"] == {"first_token_error_ms": 200.0, "total_error_ms": 200.0, "answers": 2}
    assert experience.accuracy()["cloud"] == {"first_token_error_ms": None, "total_error_ms": None, "answers": 0}


def test_targets_are_held_against_what_happened() -> None:
    """By class: a first token at a target has made it, a failure has missed all, who left first says nothing; and only
    classes that the policy has are shown."""
    experience = Experience()
    waits: list[dict[str, object]] = [
        {"first_token_s": 0.2},
        {"first_token_s": 0.5},
        {"first_token_s": 0.9},
        {"first_token_s": None, "outcome": "error", "error_code": "upstream_failed"},
        {"first_token_s": None, "outcome": "cancelled"},
    ]
    for number, how in enumerate(waits):
        experience.decided(str(number), record())
        experience(finished(str(number), **how))

    assert experience.attainment(KNOWN) == {
        "real_time_chat": {"requests": 4, "p50_ms": 0.25, "p95_ms": 0.5, "p99_ms": 0.75}
    }
    assert experience.attainment({}) == {}


def test_what_never_ends_is_bounded() -> None:
    """Beyond its limit decisions are counted as lost, and those before are still paired."""
    kept: list[Recorded] = []
    experience = Experience(kept.append)
    for number in range(MAX_OPEN + 3):
        experience.decided(str(number), record())
    experience(finished("0"))

    assert experience.lost == 3
    assert len(kept) == 1


async def test_a_daemon_learns_from_its_answers(tmp_path: Path) -> None:
    """After an answer from each side both have a pace and the next decision holds predictions; a failure adds none."""
    slow: tuple[Delta | float, ...] = (Delta(text="w ", tokens=1), *(0.002, Delta(text="w ", tokens=1)) * 11)
    last = Delta(finish_reason="stop", usage=Usage(prompt_tokens=5, completion_tokens=12))
    local, cloud = Turns((*slow, last), (UpstreamFailed("broken"),)), ScriptedAnswer(*slow, last)
    daemon = daemon_over(local, cloud, policy_file(tmp_path, "mode: prefer_cloud"))
    daemon.local.runtime.prefill_tokens_per_s = 100.0  # type: ignore[attr-defined]
    before = (await daemon.agent.plan(ask())).record.predictions
    for number, model in enumerate(("edge", "cloud", "edge")):
        await collect(daemon.intake, ask(id=str(number), model=model))
    after = (await daemon.agent.plan(ask())).record.predictions

    assert (before.edge.total_s, before.cloud.first_token_s) == (None, None)
    assert before.edge.first_token_s == pytest.approx(0.05)
    assert after.edge.total_s is not None
    assert after.cloud.total_s is not None
    assert after.edge.total_s > 0.05 + 255 * 0.002
    assert daemon.device.reading().token_s == pytest.approx(daemon.experience.pace("edge", "small").token.at(1))
    assert daemon.experience.accuracy()["edge"]["answers"] == 1
