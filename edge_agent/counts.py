"""How many requests went where: what the administration shows."""

from collections import Counter

from shared.telemetry import RequestFinished


class RouteCounts:
    """Listener. Keys are `target outcome`, such as `cloud done`; requests refused before a decision count as `none`."""

    def __init__(self) -> None:
        self._finished: Counter[tuple[str, str]] = Counter()
        self.failovers = 0

    def __call__(self, event: RequestFinished, /) -> None:
        self._finished[event.route.target if event.route else "none", event.outcome] += 1
        self.failovers += event.route.failovers if event.route else 0

    def by_target(self) -> dict[str, dict[str, int]]:
        """`{"edge": {"done": 3}, "cloud": {"done": 1, "error": 1}}`."""
        counts: dict[str, dict[str, int]] = {}
        for (target, outcome), number in sorted(self._finished.items()):
            counts.setdefault(target, {})[outcome] = number
        return counts
