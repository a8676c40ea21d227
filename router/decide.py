"""decide(): where a request goes, and why. Three tables of named rules, read in order.

    BARS         who may not answer this request     a side barred by one stays barred; both barred: refused, by name
    PREFERENCES  who should                          the first with an opinion
    OUTAGES      who cannot just now                 the other side stands in, where that is permitted

The same values give the same decision: nothing here reads a clock, a sensor or a coin.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from router.bars import OTHER, Bar, barred_sides
from router.classes import UNNAMED, Class
from router.facts import Case
from router.features import DeviceReading, LinkReading, RequestFeatures
from router.outages import outage
from router.policy import Policy
from router.predict import UNMEASURED, Predictions
from router.preferences import Choice, preferred
from shared.errors import RateLimited
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


def decide(features: RequestFeatures, policy: Policy, *, device: DeviceReading, link: LinkReading) -> Decision:
    """Raises UnknownModel, PolicyDenied, ContextTooLong, RateLimited, Overloaded or Unreachable when nobody may or can
    answer."""
    case = Case(features, policy, device, link)
    barred = barred_sides(case)
    choice = _reachable(case, barred, preferred(case, barred))
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


def _reachable(case: Case, barred: Mapping[Target, Bar], choice: Choice) -> Choice:
    """The choice, or the other side in its place; raises the outage's error if nobody can answer."""
    out = outage(case, choice.target)
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
    other_out = outage(case, other)
    return other_out.reason if other_out and other_out.error else None


def _refuse_beyond_budget(case: Case, choice: Choice) -> None:
    """Where the policy says so, what the cloud was to answer is refused until the day is over."""
    if choice.target != "cloud" or (why := case.beyond_budget) is None:
        return
    hour = case.device.hour
    raise RateLimited(why, source="edge", retry_after=None if hour is None else (24 - hour) * 3600)


def _edge_may_stand_in(case: Case, barred: Mapping[Target, Bar]) -> bool:
    return case.policy.fallback == "edge" and ("edge" not in barred or barred["edge"].stands_in)


def _escalates(case: Case, barred: Mapping[Target, Bar], choice: Choice) -> bool:
    """The cascade is for what was left to the edge by a goal, by weights or by the mode: no rule, bar or outage has
    spoken. Nothing is held back for a cloud that could not answer."""
    if case.policy.cascade is None or choice.target != "edge" or choice.rule not in ("goal", "weights", "mode"):
        return False
    return "cloud" not in barred and outage(case, "cloud") is None and case.beyond_budget is None
