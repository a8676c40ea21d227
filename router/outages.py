"""Who cannot answer just now, and why: a table of named rules for each side."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from router.facts import Case
from shared.errors import CausewayError, Overloaded, Unreachable
from shared.schemas import Target


@dataclass(frozen=True, slots=True)
class Outage:
    """Why a side cannot answer now. With no `error` it still can, only badly: better than nobody."""

    rule: str
    reason: str
    error: type[CausewayError] | None


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


def outage(case: Case, target: Target) -> Outage | None:
    return next((outage for rule in OUTAGES[target] if (outage := rule(case))), None)
