"""Who may not answer a request, and why: a table of named rules. A side that one of them bars stays barred."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from router.document import shorten
from router.facts import Case
from shared.errors import CausewayError, ContextTooLong, PolicyDenied, UnknownModel, Unreachable
from shared.schemas import Target

OTHER: Final[Mapping[Target, Target]] = {"edge": "cloud", "cloud": "edge"}


@dataclass(frozen=True, slots=True)
class Bar:
    """Why `target` may not answer this request."""

    target: Target
    rule: str
    reason: str
    too_long: bool = False
    stands_in: bool = False
    """Not chosen, but may still answer in the other side's place when that fails, if the policy permits it."""


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
    return None if case.link.configured else Bar("cloud", "no_cloud", "no cloud is in use")


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


def barred_sides(case: Case) -> Mapping[Target, Bar]:
    """Each barred side with the first bar against it; one that forbids standing in outranks one that does not. Raises
    ContextTooLong, PolicyDenied, UnknownModel or Unreachable where both are."""
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
