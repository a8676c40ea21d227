"""Who should answer a request that both sides may answer: a table of named rules, of which the first with an opinion
decides."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from router.bars import OTHER, Bar
from router.facts import Case
from router.predict import Predictions
from shared.schemas import Target


@dataclass(frozen=True, slots=True)
class Choice:
    target: Target
    rule: str
    reasons: tuple[str, ...]


def administrator(case: Case) -> Choice | None:
    match = case.match
    return (
        None if match is None or match.rule.target is None else Choice(match.rule.target, match.name, (match.reason,))
    )


def roomier_context(case: Case) -> Choice | None:
    """The prompt fits both sides, but on one of them a usual answer would be cut short."""
    needed = case.request.needs_context
    limits: dict[Target, int | None] = {"edge": case.device.context_length, "cloud": case.link.context_length}
    cramped = [target for target, limit in limits.items() if limit is not None and needed > limit]
    if len(cramped) != 1:
        return None
    reason = f"may need {needed} tokens, the {cramped[0]} takes {limits[cramped[0]]}"
    return Choice(OTHER[cramped[0]], "roomier_context", (reason,))


def scenario(case: Case) -> Choice | None:
    """The side that is predicted to make the target of the request's class, where the one that would be chosen is
    predicted to miss it. A prediction that is not to be had says nothing, nor does a class that was guessed."""
    name, targets = case.scenario.name, case.policy.targets.get(case.scenario.name)
    if targets is None or case.scenario.guessed:
        return None
    predicted = case.predictions
    said = {"edge": predicted.edge.first_token_s, "cloud": predicted.cloud.first_token_s}
    standing, limit = goal(case) or weights(case) or standing_preference(case), targets.p95_ms / 1000
    slow, other = said[standing.target], said[OTHER[standing.target]]
    if slow is None or other is None or slow <= limit or other > limit:
        return None
    reason = f"class {name}: {standing.target} first token {slow * 1000:.0f} ms > {targets.p95_ms:.0f} ms"
    return Choice(OTHER[standing.target], "scenario", (reason, *standing.reasons))


def goal(case: Case) -> Choice | None:
    """The learned difficulty against the threshold that achieves the administrator's goal."""
    difficulty, limit = case.request.difficulty, case.request.difficult_from
    if difficulty is None or limit is None:
        return None
    if difficulty >= limit:
        return Choice("cloud", "goal", (f"goal: difficulty {difficulty:.2f} >= {limit:.2f}",))
    return Choice("edge", "goal", (f"goal: difficulty {difficulty:.2f} < {limit:.2f}",))


def weights(case: Case) -> Choice | None:
    """What the cloud would gain, against what it would take longer, cost and drain. A time that counts and is not to be
    had leaves the choice to others."""
    counts, difficulty, predicted = case.policy.weights, case.request.difficulty, case.predictions
    if counts is None or difficulty is None:
        return None
    here, there, cost = predicted.edge.total_s, predicted.cloud.total_s, predicted.cloud.cost
    if counts.second and (here is None or there is None):
        return None
    time = counts.second * (there - here) if here is not None and there is not None else 0.0
    money = counts.money * (cost or 0.0)
    drain = counts.battery * _further_drain(predicted)
    gain = counts.quality * difficulty
    target: Target = "cloud" if gain > time + money + drain else "edge"
    said = f"weights: quality {gain:.3g}, time {0 - time:+.3g}, money {0 - money:+.3g}"
    return Choice(target, "weights", (f"{said}, battery {0 - drain:+.3g}" if counts.battery else said,))


def _further_drain(predicted: Predictions) -> float:
    """What the cloud takes more of the charge than the edge, in percent; nothing unless both are known."""
    here, there = predicted.edge.battery_percent, predicted.cloud.battery_percent
    return 0.0 if here is None or there is None else there - here


def standing_preference(case: Case) -> Choice:
    return Choice("cloud" if case.policy.mode == "prefer_cloud" else "edge", "mode", (f"mode {case.policy.mode}",))


PREFERENCES: Final[tuple[Callable[[Case], Choice | None], ...]] = (
    administrator,
    roomier_context,
    scenario,
    goal,
    weights,
    standing_preference,
)


def preferred(case: Case, barred: Mapping[Target, Bar]) -> Choice:
    for bar in barred.values():  # one at most: the other side is left, and why is the reason
        return Choice(OTHER[bar.target], bar.rule, (bar.reason,))
    return next(choice for rule in PREFERENCES if (choice := rule(case)))
