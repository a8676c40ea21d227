"""What recorded decisions come to: how many went where and why, how long they took, how far off the predictions were,
what they cost. Values in, values out."""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from router.classes import Targets
from router.money import Price
from router.records import Recorded
from shared.schemas import Target

DOTS: Final = 400
"""Of predictions beside what happened, the latest."""
PERIODS: Final = 400
HOURLY_S: Final = 48 * 3600.0
"""A record that spans no more is shown by the hour."""
SIDES: Final[tuple[Target, ...]] = ("edge", "cloud")
SERVERS: Final = ("edge", "cloud", "cache")


@dataclass(frozen=True, slots=True)
class Spread:
    """Percentiles of `count` values: the least of them that so many are at or below."""

    count: int
    p50: float
    p95: float
    p99: float


@dataclass(frozen=True, slots=True)
class Group:
    """Decisions that have something in common. `cost` by currency."""

    name: str
    decisions: int
    to_cloud: int
    refused: int
    failed: int
    first_token_s: Spread | None
    cost: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Wait:
    """What was waited for an answer from one place: a side, or the cache."""

    server: str
    first_token_s: Spread | None
    total_s: Spread | None


@dataclass(frozen=True, slots=True)
class Forecast:
    """Predictions for one side held against what happened; `dots` are the latest (predicted, happened), in seconds."""

    target: Target
    what: str
    answers: int
    off_s: Spread
    too_low: float
    """The share of them that said less than it took."""
    dots: tuple[tuple[float, float], ...]


@dataclass(frozen=True, slots=True)
class Attained:
    """Of a class's requests, the share whose first token came within each target."""

    name: str
    requests: int
    p50: float
    p95: float
    p99: float


@dataclass(frozen=True, slots=True)
class Period:
    """An hour or a day (UTC) that had decisions. `by_goal`: those that the policy's goal decided."""

    label: str
    decisions: int
    to_cloud: int
    by_goal: int
    goal_to_cloud: int
    cost: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Judgements:
    """What cascades made of the edge's answers."""

    judged: int
    escalated: int


@dataclass(frozen=True, slots=True)
class Activity:
    """The groups are ordered by size, the periods by time."""

    decisions: int
    first_at: float | None
    last_at: float | None
    policies: Sequence[tuple[str, int]]
    targets: Sequence[Group]
    rules: Sequence[Group]
    tenants: Sequence[Group]
    classes: Sequence[Group]
    endings: Sequence[tuple[str, int]]
    waits: Sequence[Wait]
    attained: Sequence[Attained]
    forecasts: Sequence[Forecast]
    periods: Sequence[Period]
    judgements: Judgements
    shadowed: int
    """Decisions beside which a shadow policy decided, and how often it would have chosen otherwise."""
    shadow_differs: int
    cost: Mapping[str, float]


def summarise(records: Iterable[Recorded], targets: Mapping[str, Targets]) -> Activity:
    """`targets` of the classes; a class without any is counted, and not held against them."""
    seen = sorted(records, key=lambda record: record.at)
    shadowed = [record for record in seen if record.shadow is not None]
    return Activity(
        decisions=len(seen),
        first_at=seen[0].at if seen else None,
        last_at=seen[-1].at if seen else None,
        policies=Counter(record.policy for record in seen).most_common(),
        targets=_groups(seen, lambda record: record.target or "refused"),
        rules=_groups(seen, lambda record: record.rule or "refused"),
        tenants=_groups(seen, lambda record: record.request.tenant),
        classes=_groups(seen, lambda record: record.request.scenario.name),
        endings=Counter(record.refused or record.outcome.ending or "not ended" for record in seen).most_common(),
        waits=[_wait(server, seen) for server in SERVERS if any(_server(record) == server for record in seen)],
        attained=[_attained(name, seen, targets[name]) for name in _classes(seen) if name in targets],
        forecasts=list(_forecasts(seen)),
        periods=_periods(seen),
        judgements=Judgements(
            sum(record.judged is not None for record in seen),
            sum(record.judged is not None and not record.judged.good for record in seen),
        ),
        shadowed=len(shadowed),
        shadow_differs=sum(record.shadow is not None and record.shadow.target != record.target for record in shadowed),
        cost=_cost(seen),
    )


def spread(values: Iterable[float | None]) -> Spread | None:
    """None of none."""
    known = sorted(value for value in values if value is not None)
    if not known:
        return None
    return Spread(len(known), *(known[max(0, math.ceil(part * len(known)) - 1)] for part in (0.5, 0.95, 0.99)))


def _groups(records: Sequence[Recorded], key: Callable[[Recorded], str]) -> list[Group]:
    found: dict[str, list[Recorded]] = defaultdict(list)
    for record in records:
        found[key(record)].append(record)
    return [_group(name, of) for name, of in sorted(found.items(), key=lambda one: (-len(one[1]), one[0]))]


def _group(name: str, records: Sequence[Recorded]) -> Group:
    return Group(
        name=name,
        decisions=len(records),
        to_cloud=sum(record.target == "cloud" for record in records),
        refused=sum(bool(record.refused) for record in records),
        failed=sum(_failed(record) for record in records),
        first_token_s=spread(record.outcome.first_token_s for record in records),
        cost=_cost(records),
    )


def _failed(record: Recorded) -> bool:
    return not record.refused and record.outcome.ending not in ("", "done", "cancelled")


def _server(record: Recorded) -> str:
    """Who answered it: `edge`, `cloud`, `cache`; empty if nobody did."""
    if record.outcome.ending != "done":
        return ""
    return (record.outcome.served or "") if record.outcome.worked else "cache"


def _wait(server: str, records: Sequence[Recorded]) -> Wait:
    own = [record.outcome for record in records if _server(record) == server]
    return Wait(server, spread(one.first_token_s for one in own), spread(one.total_s for one in own))


def _classes(records: Sequence[Recorded]) -> list[str]:
    return sorted({record.request.scenario.name for record in records})


def _attained(name: str, records: Sequence[Recorded], targets: Targets) -> Attained:
    """A request that failed before its first token missed them all; whoever left before it says nothing."""
    waits = [
        math.inf if record.outcome.first_token_s is None else record.outcome.first_token_s
        for record in records
        if record.request.scenario.name == name
        and not record.refused
        and (record.outcome.first_token_s is not None or record.outcome.ending not in ("", "cancelled"))
    ]
    limits = (targets.p50_ms, targets.p95_ms, targets.p99_ms)
    shares = [sum(wait * 1000 <= limit for wait in waits) / max(len(waits), 1) for limit in limits]
    return Attained(name, len(waits), *shares)


def _forecasts(records: Sequence[Recorded]) -> Iterator[Forecast]:
    for target in SIDES:
        for what in ("first_token_s", "total_s"):
            pairs = [
                (said, happened)
                for record in records
                if record.went_well
                and record.target == target
                and (said := getattr(getattr(record.predictions, target), what)) is not None
                and (happened := getattr(record.outcome, what)) is not None
            ]
            off = spread(abs(said - happened) for said, happened in pairs)
            if off is not None:
                low = sum(said < happened for said, happened in pairs) / len(pairs)
                yield Forecast(target, what, len(pairs), off, low, tuple(pairs[-DOTS:]))


def _periods(records: Sequence[Recorded]) -> list[Period]:
    """The latest PERIODS of them."""
    if not records:
        return []
    hourly = records[-1].at - records[0].at <= HOURLY_S
    found: dict[str, list[Recorded]] = defaultdict(list)
    for record in records:
        moment = datetime.fromtimestamp(record.at, UTC)
        found[moment.strftime("%Y-%m-%d %H:00" if hourly else "%Y-%m-%d")].append(record)
    return [_period(label, of) for label, of in list(found.items())[-PERIODS:]]


def _period(label: str, records: Sequence[Recorded]) -> Period:
    by_goal = [record for record in records if record.rule == "goal"]
    return Period(
        label=label,
        decisions=len(records),
        to_cloud=sum(record.target == "cloud" for record in records),
        by_goal=len(by_goal),
        goal_to_cloud=sum(record.target == "cloud" for record in by_goal),
        cost=_cost(records),
    )


def _cost(records: Iterable[Recorded]) -> dict[str, float]:
    """By currency, of those whose cost is known."""
    cost: dict[str, float] = defaultdict(float)
    for record in records:
        if record.price is not None and record.outcome.cost is not None:
            cost[record.price.currency] += record.outcome.cost
    return dict(cost)


def mean_call_cost(records: Sequence[Recorded], price: Price) -> float:
    """What the cloud would take for one of these requests, on average: by the length its answer had, else the one
    expected."""
    costs = [
        price.of(
            record.request.prompt_tokens, record.outcome.completion_tokens or record.request.expected_output_tokens
        )
        for record in records
    ]
    return sum(costs) / len(costs) if costs else 0.0
