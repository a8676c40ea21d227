import contextlib
import json
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from io import StringIO
from pathlib import Path

import pytest
from fakes import ScriptedAnswer
from prometheus_client import CollectorRegistry

from shared.errors import Cancelled, Overloaded
from shared.schemas import ChatRequest, Delta, Route, Switched, Usage
from shared.telemetry import RequestFinished, RequestLog, RequestMetrics, observed, set_up_logging

REQUEST = ChatRequest(id="r", model="m", prompt="the secret prompt")
ROUTE = Route(target="cloud", reason="code", failovers=2)
USAGE = Usage(prompt_tokens=10, completion_tokens=3, cached_tokens=4)
DONE = (
    Delta(text="a", tokens=1, route=ROUTE),
    Delta(text="b", tokens=2),
    Delta(finish_reason="stop", usage=USAGE, route=ROUTE),
)


def seconds() -> Iterator[float]:
    """A clock that is read once a second."""
    return iter(float(at) for at in range(1000))


async def events_of(*script: Delta | Exception, take: int | None = None) -> list[RequestFinished]:
    events: list[RequestFinished] = []
    ticks = seconds()
    stream = observed(
        ScriptedAnswer(*script).answer(REQUEST), REQUEST, (events.append,), tenant="t", clock=lambda: next(ticks)
    )
    try:
        async with aclosing(stream) as deltas:
            async for _ in deltas:
                take = None if take is None else take - 1
                if take == 0:
                    break
    except (Overloaded, Cancelled, ValueError):
        pass
    return events


async def test_a_finished_request_is_one_event() -> None:
    """Outcome, usage, route, and times by the clock that was given."""
    (event,) = await events_of(*DONE)
    assert event == RequestFinished(
        request_id="r",
        model="m",
        outcome="done",
        total_s=2.0,
        first_token_s=1.0,
        usage=USAGE,
        route=ROUTE,
        tenant="t",
        tokens=sum(delta.tokens for delta in DONE),
    )


@pytest.mark.parametrize(
    ("script", "take", "outcome", "code"),
    [
        ((Overloaded("x"),), None, "error", "overloaded"),
        ((DONE[0], Overloaded("x")), None, "error", "overloaded"),
        ((DONE[0], ValueError("x")), None, "error", "internal"),
        ((Cancelled("x"),), None, "cancelled", "cancelled"),
        (DONE, 1, "cancelled", None),
        ((DONE[0], Delta(finish_reason="cancelled", usage=USAGE)), None, "cancelled", None),
        (DONE, 3, "done", None),
    ],
)
async def test_every_end_is_exactly_one_event(
    script: tuple[Delta | Exception, ...], take: int | None, outcome: str, code: str | None
) -> None:
    """Error before or after a token, a fault, a cancel, a reader that leaves: one event each."""
    (event,) = await events_of(*script, take=take)
    assert (event.outcome, event.error_code) == (outcome, code)


async def test_closing_closes_what_is_observed() -> None:
    """The stream behind is ended with the one in front."""
    answer = ScriptedAnswer(*DONE)
    stream: AsyncGenerator[Delta, None] = observed(answer.answer(REQUEST), REQUEST, ())
    await anext(stream)
    await stream.aclose()
    assert answer.closed == ["r"]


async def test_metrics_count_what_happened() -> None:
    """Requests by target and outcome, tokens by kind, failovers, and both times."""
    registry = CollectorRegistry()
    metrics = RequestMetrics(registry)
    for event in await events_of(*DONE) + await events_of(Overloaded("x")):
        metrics(event)

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(name, labels)

    assert value("causeway_requests_total", target="cloud", outcome="done", code="") == 1
    assert value("causeway_requests_total", target="none", outcome="error", code="overloaded") == 1
    assert value("causeway_failovers_total") == 2
    assert [value("causeway_tokens_total", kind=kind) for kind in ("prompt", "cached", "completion")] == [10, 4, 3]
    assert value("causeway_first_token_seconds_sum", target="cloud") == 1
    assert value("causeway_output_token_seconds_sum", target="cloud") == 0.5


async def test_a_switch_is_counted_and_no_sides_pace() -> None:
    """The first token was the other side's, and the time per token is of neither."""
    registry = CollectorRegistry()
    above = Switched(target="edge", model="small", starts_at=9, usage=USAGE)
    route = Route(target="cloud", reason="unsure", switched=above)
    last = Delta(finish_reason="stop", usage=USAGE, route=route)
    (event,) = await events_of(DONE[0], Delta(text="---", route=route), DONE[1], last)

    RequestMetrics(registry)(event)

    assert registry.get_sample_value("causeway_switches_total") == 1
    assert registry.get_sample_value("causeway_requests_total", {"target": "cloud", "outcome": "done", "code": ""}) == 1
    assert registry.get_sample_value("causeway_first_token_seconds_count", {"target": "edge"}) == 1
    assert registry.get_sample_value("causeway_output_token_seconds_count", {"target": "cloud"}) is None


async def test_the_log_is_one_line_without_the_prompt(capsys: pytest.CaptureFixture[str]) -> None:
    """JSON on stderr with who, what and how long; an id cannot break the line."""
    set_up_logging()
    (event,) = await events_of(*DONE)
    RequestLog()(event)
    forged = RequestFinished(request_id='x"\n{"forged": 1}\x1b[31m', model="m", outcome="done", total_s=1.0)
    RequestLog()(forged)
    first, second = capsys.readouterr().err.splitlines()

    assert json.loads(first)["target"] == "cloud"
    assert json.loads(second)["id"] == forged.request_id
    assert "secret" not in first
    assert "\x1b" not in second


async def test_a_log_that_cannot_be_written_fails_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Standard error on a full disk, or closed: every answer and every event goes on."""
    for stream in (Path("/dev/full").open("w", encoding="utf-8", buffering=1), StringIO()):  # noqa: SIM115, ASYNC230
        monkeypatch.setattr("sys.stderr", stream)
        set_up_logging()
        if isinstance(stream, StringIO):
            stream.close()
        deltas = [delta async for delta in observed(ScriptedAnswer(*DONE).answer(REQUEST), REQUEST, (RequestLog(),))]
        monkeypatch.undo()
        with contextlib.suppress(OSError):
            stream.close()

        assert deltas == list(DONE)
