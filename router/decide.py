"""decide(): where a request goes, and why. Three tables of named rules, read in order.

    BARS         who may not answer this request     a side barred by one stays barred; both barred: refused, by name
    PREFERENCES  who should                          the first with an opinion
    OUTAGES      who cannot just now                 the other side stands in, where that is permitted

The same values give the same decision: nothing here reads a clock, a sensor or a coin.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from router.classes import UNNAMED, Class
from router.document import shorten
from router.facts import Case
from router.features import DeviceReading, LinkReading, RequestFeatures
from router.policy import Policy
from router.predict import UNMEASURED, Predictions
from shared.errors import (
    CausewayError,
    ContextTooLong,
    Overloaded,
    PolicyDenied,
    RateLimited,
    UnknownModel,
    Unreachable,
)
from shared.schemas import Label, Target


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """`reasons[0]` is the deciding one, short and printable ASCII: fit for a reply header. None holds prompt text."""

    target: Target
    fallback: Target | None
    """Who may answer instead if `target` fails in a retryable way before its first token. Only ever `edge`."""
    rule: str
    reasons: tuple[str, ...]
    label: Label = "free"
    """The strictest that the request's own label, and what was found in it, ask for: so its answer is kept."""
    redact: bool = False
    """Whoever sends this request to the cloud must first replace its personal data and secrets."""
    escalates: bool = False
    """The edge's answer is to be judged, and the cloud may give its own instead."""
    predictions: Predictions = UNMEASURED
    """What each side's answer would take and cost."""
    scenario: Class = UNNAMED
    """The request's class: asked for, guessed, or given by a rule."""

    @property
    def reason(self) -> str:
        return self.reasons[0]


@dataclass(frozen=True, slots=True)
class Bar:
    """Why `target` may not answer this request."""

    target: Target
    rule: str
    reason: str
    too_long: bool = False
    stands_in: bool = False
    """Not chosen, but may still answer in the other side's place when that fails, if the policy permits it."""


@dataclass(frozen=True, slots=True)
class Choice:
    target: Target
    rule: str
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Outage:
    """Why a side cannot answer now. With no `error` it still can, only badly: better than nobody."""

    rule: str
    reason: str
    error: type[CausewayError] | None


OTHER: Final[Mapping[Target, Target]] = {"edge": "cloud", "cloud": "edge"}


def decide(features: RequestFeatures, policy: Policy, *, device: DeviceReading, link: LinkReading) -> Decision:
    """Raises UnknownModel, PolicyDenied, ContextTooLong, RateLimited, Overloaded or Unreachable when nobody may or can
    answer."""
    case = Case(features, policy, device, link)
    barred = _barred(case)
    choice = _reachable(case, barred, _preferred(case, barred))
    _refuse_beyond_budget(case, choice)
    escalates = _escalates(case, barred, choice)
    return Decision(
        target=choice.target,
        fallback="edge" if choice.target == "cloud" and _edge_may_stand_in(case, barred) and device.available else None,
        rule=choice.rule,
        reasons=choice.reasons,
        label=case.care,
        redact=(choice.target == "cloud" or escalates) and case.care == "redact",
        escalates=escalates,
        predictions=case.predictions,
        scenario=case.scenario,
    )


# --- who may not answer -----------------------------------------------------------------------------------------------


def label(case: Case) -> Bar | None:
    if case.label != "edge_only":
        return None
    if case.labelled is not None:
        return Bar("cloud", case.labelled.name, f"{case.labelled.reason}; label edge_only: stays on the device")
    return Bar("cloud", "label", "label edge_only: stays on the device")


def privacy(case: Case) -> Bar | None:
    """What was found may not leave; what could not be looked through is taken for the worst."""
    found, care = case.request.privacy, case.care
    if found.undecided is not None and care != "free":
        return Bar("cloud", "privacy", f"stays on the device: {found.undecided}")
    if care != "edge_only" or not found.kinds:
        return None
    return Bar("cloud", "privacy", f"stays on the device: {_listed(found.kinds)} found")


def requested_model(case: Case) -> Bar | None:
    """`edge` or a real model's name: that side and no other. `cloud`: the cloud while it can answer. `auto`: open."""
    wanted = case.request.model
    at_edge, at_cloud = wanted in ("edge", case.device.model), wanted in ("cloud", case.link.model)
    if wanted == "auto" or (at_edge and at_cloud):
        return None
    if at_edge:
        return Bar("cloud", "requested_model", f"model {shorten(wanted)} requested")
    if at_cloud:
        return Bar("edge", "requested_model", f"model {shorten(wanted)} requested", stands_in=wanted == "cloud")
    raise _unknown_model(case)


def mode(case: Case) -> Bar | None:
    match case.policy.mode:
        case "only_edge":
            return Bar("cloud", "mode", "mode only_edge")
        case "only_cloud":
            return Bar("edge", "mode", "mode only_cloud")
        case _:
            return None


def firm_rule(case: Case) -> Bar | None:
    """A rule with `fallback: false`: its target or nobody."""
    match = case.match
    if match is None or match.rule.target is None or match.rule.fallback:
        return None
    return Bar(OTHER[match.rule.target], match.name, match.reason)


def no_cloud(case: Case) -> Bar | None:
    return None if case.link.configured else Bar("cloud", "no_cloud", "no cloud is configured")


def budget(case: Case) -> Bar | None:
    """More than may be spent in a day, where that keeps a request on the device."""
    if case.policy.budgets is None or case.policy.budgets.over != "edge" or (why := case.beyond_budget) is None:
        return None
    return Bar("cloud", "budget", why)


def edge_context(case: Case) -> Bar | None:
    return _too_long(case, "edge", case.device.context_length)


def cloud_context(case: Case) -> Bar | None:
    return _too_long(case, "cloud", case.link.context_length)


BARS: Final[tuple[Callable[[Case], Bar | None], ...]] = (
    label,
    privacy,
    requested_model,
    mode,
    firm_rule,
    no_cloud,
    budget,
    edge_context,
    cloud_context,
)


def _barred(case: Case) -> Mapping[Target, Bar]:
    """Each barred side with the first bar against it; one that forbids standing in outranks one that does not."""
    barred: dict[Target, Bar] = {}
    for rule in BARS:
        bar = rule(case)
        if bar and (bar.target not in barred or (barred[bar.target].stands_in and not bar.stands_in)):
            barred[bar.target] = bar
    if len(barred) == len(OTHER):
        raise _refusal(barred)
    return barred


def _listed(kinds: tuple[str, ...]) -> str:
    return ", ".join(kinds[:4]) + (" and more" if len(kinds) > 4 else "")


def _too_long(case: Case, target: Target, context_length: int | None) -> Bar | None:
    needed = case.request.required_context
    if context_length is None or needed <= context_length:
        return None
    reason = f"needs {needed} tokens, the {target} takes {context_length}"
    return Bar(target, f"{target}_context", reason, too_long=True)


def _refusal(barred: Mapping[Target, Bar]) -> CausewayError:
    why = "; ".join(f"not the {target}: {barred[target].reason}" for target in OTHER)
    if any(bar.too_long for bar in barred.values()):
        return ContextTooLong(f"the request is too long: {why}", param="messages")
    return PolicyDenied(f"nobody may answer this request: {why}")


def _unknown_model(case: Case) -> CausewayError:
    wanted = ascii(case.request.model)
    cloud_permitted = case.label != "edge_only" and case.policy.mode != "only_edge"
    if case.link.configured and case.link.model is None and cloud_permitted:
        return Unreachable(f"no model {wanted} on this device, and the cloud has not said what it has", param="model")
    known = dict.fromkeys(("auto", "edge", "cloud", case.device.model, case.link.model))
    return UnknownModel(f"no model {wanted}; there are {', '.join(filter(None, known))}", param="model")


# --- who should answer ------------------------------------------------------------------------------------------------


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


def _preferred(case: Case, barred: Mapping[Target, Bar]) -> Choice:
    for bar in barred.values():  # one at most: the other side is left, and why is the reason
        return Choice(OTHER[bar.target], bar.rule, (bar.reason,))
    return next(choice for rule in PREFERENCES if (choice := rule(case)))


# --- who cannot just now ----------------------------------------------------------------------------------------------


def edge_unavailable(case: Case) -> Outage | None:
    return None if case.device.available else Outage("edge_unavailable", "the edge model is not available", Overloaded)


def edge_queue_full(case: Case) -> Outage | None:
    device = case.device
    if not device.queue_full:
        return None
    return Outage("edge_queue_full", f"edge queue full ({device.queue_depth} of {device.queue_capacity})", Overloaded)


def cloud_draining(case: Case) -> Outage | None:
    return Outage("cloud_draining", "cloud is draining", Overloaded) if case.link.draining else None


def cloud_disconnected(case: Case) -> Outage | None:
    return None if case.link.connected else Outage("cloud_disconnected", "cloud is not connected", Unreachable)


def breaker_open(case: Case) -> Outage | None:
    return None if case.link.admitting else Outage("breaker_open", "cloud failed lately, breaker open", Unreachable)


def slow_link(case: Case) -> Outage | None:
    limit, seconds = case.policy.max_round_trip_ms, case.link.round_trip_s
    if seconds is None or seconds * 1000 <= limit:
        return None
    return Outage("slow_link", f"round trip {seconds * 1000:.0f} ms > {limit:.0f} ms", None)


OUTAGES: Final[Mapping[Target, tuple[Callable[[Case], Outage | None], ...]]] = {
    "edge": (edge_unavailable, edge_queue_full),
    "cloud": (cloud_draining, cloud_disconnected, breaker_open, slow_link),
}


def _outage(case: Case, target: Target) -> Outage | None:
    return next((outage for rule in OUTAGES[target] if (outage := rule(case))), None)


def _reachable(case: Case, barred: Mapping[Target, Bar], choice: Choice) -> Choice:
    """The choice, or the other side in its place; raises the outage's error if nobody can answer."""
    out = _outage(case, choice.target)
    if out is None:
        return choice
    other = OTHER[choice.target]
    obstacle = _obstacle(case, barred, other, failed=out.error is not None)
    if obstacle is None:
        return Choice(other, out.rule, (out.reason, *choice.reasons))
    if out.error is None:
        return Choice(choice.target, choice.rule, (*choice.reasons, out.reason))
    retry_after = case.link.retry_after_s if choice.target == "cloud" else None
    raise out.error(f"{out.reason}; not the {other}: {obstacle}", source=choice.target, retry_after=retry_after)


def _obstacle(case: Case, barred: Mapping[Target, Bar], other: Target, *, failed: bool) -> str | None:
    """What keeps `other` from standing in for the side that is out. A slow link does not."""
    if other in barred and not (barred[other].stands_in and failed):
        return barred[other].reason
    if other == "edge" and not _edge_may_stand_in(case, barred):
        return barred[other].reason if other in barred else "fallback none"
    other_out = _outage(case, other)
    return other_out.reason if other_out and other_out.error else None


def _refuse_beyond_budget(case: Case, choice: Choice) -> None:
    """Where the policy says so, what the cloud was to answer is refused until the day is over."""
    if choice.target != "cloud" or (why := case.beyond_budget) is None:
        return
    hour = case.device.hour
    raise RateLimited(why, source="edge", retry_after=None if hour is None else (24 - hour) * 3600)


def _edge_may_stand_in(case: Case, barred: Mapping[Target, Bar]) -> bool:
    return case.policy.fallback == "edge" and ("edge" not in barred or barred["edge"].stands_in)


# --- who may answer after all -----------------------------------------------------------------------------------------


def _escalates(case: Case, barred: Mapping[Target, Bar], choice: Choice) -> bool:
    """The cascade is for what was left to the edge by a goal, by weights or by the mode: no rule, bar or outage has
    spoken. Nothing is held back for a cloud that could not answer."""
    if case.policy.cascade is None or choice.target != "edge" or choice.rule not in ("goal", "weights", "mode"):
        return False
    return "cloud" not in barred and _outage(case, "cloud") is None and case.beyond_budget is None
