"""What became of each decision: its record is completed by its outcome, both sides' paces are learned from those that
went well, predictions are held against what happened, and what it cost is counted."""

import statistics
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from edge_agent.spending import Spending
from router.classes import Targets
from router.predict import ALL_PIECES, FIRST_PIECES, Pace, lateness_s
from router.records import Outcome, Recorded
from shared.schemas import Target, Usage
from shared.telemetry import RequestFinished

MAX_OPEN = 4096
MAX_PACES = 64
"""Of models of this device; the one that was learned first makes way."""
LATEST = 256
"""Answers over which errors are reported."""


@dataclass(slots=True)
class Errors:
    """How far off the predictions for one side were, in seconds, either way."""

    first_token_s: deque[float] = field(default_factory=lambda: deque(maxlen=LATEST))
    total_s: deque[float] = field(default_factory=lambda: deque(maxlen=LATEST))


MISSED: Final = float("inf")


class Experience:
    """`decided` when a decision was made, again when more of it is known, and as a Listener when its request has ended;
    `keep` then gets the whole. All on the event loop, and at once."""

    def __init__(self, keep: Callable[[Recorded], None] | None = None, spending: Spending | None = None) -> None:
        self._keep = keep
        self.spending = spending or Spending()
        self._open: dict[str, Recorded] = {}
        self._paces: dict[tuple[Target, str], Pace] = {}
        self._errors: Mapping[Target, Errors] = {"edge": Errors(), "cloud": Errors()}
        self._waits: dict[str, deque[float]] = {}
        self.lost = 0
        """Decisions whose end nobody waited for: too many were open."""

    def pace(self, target: Target, model: str = "") -> Pace:
        """Of one model of this device, or of the cloud, which needs no name."""
        return self._paces.get((target, model), Pace())

    def decided(self, request_id: str, record: Recorded) -> None:
        if record.refused:
            self._done(record)
        elif request_id in self._open or len(self._open) < MAX_OPEN:
            self._open[request_id] = record
            self.spending.begun(request_id, record)
        else:
            self.lost += 1
            self.spending.ended(request_id, replace(record, outcome=Outcome(cost=record.may_cost)))

    def __call__(self, event: RequestFinished, /) -> None:
        record = self._open.pop(event.request_id, None)
        if record is None:
            return
        outcome = Outcome(
            served=event.route.target if event.route else None,
            ending=event.error_code or event.outcome,
            first_token_s=event.first_token_s,
            total_s=event.total_s,
            completion_tokens=event.usage.completion_tokens if event.usage else 0,
            cache=event.route.cached.use if event.route and event.route.cached else "",
            cost=_cost(record, event),
            switched=event.route is not None and event.route.switched is not None,
        )
        record = replace(record, outcome=outcome)
        self.spending.ended(event.request_id, record)
        self._waited(record)
        self._done(record)

    def accuracy(self) -> dict[str, dict[str, float | int | None]]:
        """By target: the median absolute error of the latest predictions in milliseconds, and of how many."""
        return {
            target: {
                "first_token_error_ms": _median_ms(errors.first_token_s),
                "total_error_ms": _median_ms(errors.total_s),
                "answers": len(errors.first_token_s),
            }
            for target, errors in self._errors.items()
        }

    def attainment(self, classes: Mapping[str, Targets]) -> dict[str, dict[str, float | int]]:
        """By class: the share of its latest requests whose first token came within each target, and of how many. One
        that failed before it has missed them all."""
        return {
            name: {"requests": len(waits), **_within(waits, classes[name])}
            for name, waits in self._waits.items()
            if name in classes
        }

    def _waited(self, record: Recorded) -> None:
        """Who left before the first token says nothing."""
        seconds = record.outcome.first_token_s
        if seconds is None and record.outcome.ending != "cancelled":
            seconds = MISSED
        if seconds is not None:
            self._waits.setdefault(record.request.scenario.name, deque(maxlen=LATEST)).append(seconds)

    def _done(self, record: Recorded) -> None:
        if record.went_well:
            self._learn(record)
        if self._keep is not None:
            self._keep(record)

    def _learn(self, record: Recorded) -> None:
        target, outcome = record.target, record.outcome
        if target is None or outcome.first_token_s is None or outcome.total_s is None:
            return
        errors, off = self._errors[target], record.prediction_errors
        if off.first_token_s is not None:
            errors.first_token_s.append(off.first_token_s)
        if off.total_s is not None:
            errors.total_s.append(off.total_s)
        model = record.device.model if target == "edge" else ""
        first, total = outcome.first_token_s, outcome.total_s
        if target == "cloud":  # what losses added is predicted anew each time, and must not be counted twice
            trouble = record.link.trouble
            first = max(0.0, first - lateness_s(trouble, first, FIRST_PIECES))
            total = max(first, total - lateness_s(trouble, total, ALL_PIECES))
        pace = self.pace(target, model).after(
            prompt_tokens=record.request.prompt_tokens,
            first_token_s=first,
            tokens=outcome.completion_tokens,
            total_s=total,
            together=record.device.running + 1 if target == "edge" else 1,
        )
        if (target, model) not in self._paces and len(self._paces) >= MAX_PACES:
            del self._paces[next(iter(self._paces))]
        self._paces[target, model] = pace


def _cost(record: Recorded, event: RequestFinished) -> float | None:
    """By its usage; of an answer that was cut off, by as much of it as came. A cloud that failed before its first token
    takes nothing, one that was told to stop has read the prompt. What stands above a mark is the edge's."""
    price, route = record.price, event.route
    if price is None:
        return None
    if route is None or route.target == "edge":
        asked = record.target == "cloud" or (record.judged is not None and not record.judged.good)
        stopped = asked and event.outcome == "cancelled" and not (route and route.failovers)
        return price.of(record.request.prompt_tokens, 0 if route else event.tokens) if stopped else 0.0
    if route.cached and route.cached.saved:
        return 0.0
    above = route.switched.usage if route.switched else Usage(prompt_tokens=0, completion_tokens=0)
    if event.usage is None:
        return price.of(record.request.prompt_tokens, event.tokens - above.completion_tokens)
    return price.of(
        event.usage.prompt_tokens - above.prompt_tokens, event.usage.completion_tokens - above.completion_tokens
    )


def _within(waits: deque[float], targets: Targets) -> dict[str, float]:
    limits = targets.model_dump()
    return {name: round(sum(wait * 1000 <= limit for wait in waits) / len(waits), 4) for name, limit in limits.items()}


def _median_ms(seconds: deque[float]) -> float | None:
    return round(statistics.median(seconds) * 1000, 1) if seconds else None
