from edge_agent.counts import RouteCounts
from shared.schemas import Route
from shared.telemetry import RequestFinished


def event(outcome: str, route: Route | None = None) -> RequestFinished:
    return RequestFinished(request_id="r", model="auto", outcome=outcome, total_s=1.0, route=route)  # type: ignore[arg-type]


def test_counts_by_target_and_outcome() -> None:
    """Each event once; what no side ever answered is counted as such."""
    counts = RouteCounts()
    for each in (
        event("done", Route(target="edge", reason="x")),
        event("done", Route(target="edge", reason="x", failovers=1)),
        event("error", Route(target="cloud", reason="x")),
        event("error"),
    ):
        counts(each)

    assert counts.by_target() == {"edge": {"done": 2}, "cloud": {"error": 1}, "none": {"error": 1}}
    assert counts.failovers == 1
