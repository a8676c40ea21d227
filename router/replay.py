"""What a candidate policy would have done with requests that were recorded: no model is called, no text was kept.

A record holds the values that `decide` saw and what came of it. Replaying is calling `decide` again on the same values.
Times of the side that did not answer are estimated from the records of requests that it did answer, the nearest ones in
length; with none to go by, nothing is said.

What was spent is the candidate's own: its budgets and its rules see, at each request, what it would have spent on that
day until then, by the usage that was recorded or, where the cloud did not answer, as predicted.
"""

import statistics
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from router.decide import Decision, decide
from router.money import Price, Spent, spelled
from router.policy import Policy
from router.records import Recorded
from shared.errors import CausewayError, RateLimited

NEIGHBOURS = 25


@dataclass(slots=True)
class Amounts:
    """What the cloud took, and what it would have taken."""

    recorded: float = 0.0
    candidate: float = 0.0


@dataclass(slots=True)
class Comparison:
    """What would change. `moved` counts by (recorded, candidate), each a target or "refused"; `leaks` are requests that
    must stay on the device and would be sent: zero unless `decide` itself is broken."""

    total: int = 0
    moved: Counter[tuple[str, str]] = field(default_factory=Counter)
    rules: Counter[str] = field(default_factory=Counter)
    """By the rule that decides under the candidate."""
    redacted: int = 0
    leaks: int = 0
    first_token_change_s: float | None = None
    """Mean over the moved requests for which both sides' times are known or can be estimated."""
    estimated: int = 0
    """How many requests that mean is of."""
    first_token_error_s: float | None = None
    """How far off the recorded predictions were, in the median, of requests that went as decided."""
    total_error_s: float | None = None
    cost_change: float | None = None
    """What the cloud would take more or less, in `currency`; None where neither policy has a price."""
    currency: str = ""
    days: dict[str, Amounts] = field(default_factory=dict)
    """By day of the device's clock, in `currency`: of the replayed requests alone. Empty where nobody has a price."""
    tenants: dict[str, Amounts] = field(default_factory=dict)
    """The same by tenant, all days together."""
    over_budget: int = 0
    """Requests that the candidate's budgets would keep on the device, or refuse."""

    @property
    def changed(self) -> int:
        return sum(self.moved.values())


def replay(
    records: Iterable[Recorded],
    candidate: Policy,
    *,
    local_time: Callable[[float], time.struct_time] = time.localtime,
) -> Comparison:
    """Decide each recorded request again. Measures that the recorded policy did not ask for are not there: a candidate
    that asks for `difficulty` or privacy where the recorded one did not finds them unknown."""
    recorded = list(records)
    comparison, changes = Comparison(total=len(recorded)), list[float]()
    speeds = {target: _Speed(recorded, target) for target in ("edge", "cloud")}
    ledger = _Ledger(comparison, local_time)
    for record in recorded:
        policy = candidate.of(record.request.tenant)
        price = policy.price or record.price
        if price is not None:
            record = ledger.opened(record)
        decision, refusal = _decide(record, policy)
        before = record.target or "refused"
        after = decision.target if decision else "refused"
        if price is not None:
            ledger.count(record, after, price)
        comparison.over_budget += decision.rule == "budget" if decision else isinstance(refusal, RateLimited)
        comparison.rules[decision.rule if decision else "refused"] += 1
        comparison.redacted += decision is not None and decision.target == "cloud" and decision.redact
        comparison.leaks += after == "cloud" and record.request.label == "edge_only"
        if before == after:
            continue
        comparison.moved[before, after] += 1
        _count_cost(comparison, record, after, price)
        if decision is not None and record.target is not None:
            told = record.outcome.served == record.target and record.timed
            was = record.outcome.first_token_s if told else None
            becomes = speeds[decision.target].first_token_s(record.request.prompt_tokens)
            if was is not None and becomes is not None:
                changes.append(becomes - was)
    errors = [record.prediction_errors for record in recorded if record.went_well]
    comparison.first_token_error_s = _median(error.first_token_s for error in errors)
    comparison.total_error_s = _median(error.total_s for error in errors)
    if changes:
        comparison.first_token_change_s, comparison.estimated = statistics.fmean(changes), len(changes)
    return comparison


def _count_cost(comparison: Comparison, record: Recorded, after: str, price: Price | None) -> None:
    """What a request that moves takes more or less: by its usage where it is known, else as predicted."""
    if price is None:
        return
    predicted = _cost(record, price)
    before = predicted if record.target == "cloud" else 0.0
    if record.outcome.cost is not None:
        before = record.outcome.cost
    change = (predicted if after == "cloud" else 0.0) - before
    comparison.cost_change, comparison.currency = (comparison.cost_change or 0.0) + change, price.currency


class _Ledger:
    """What the candidate would have spent until each request, on its day. A day that the records begin in the middle of
    begins with what had been spent by then; requests under way count for what they came to."""

    def __init__(self, comparison: Comparison, local_time: Callable[[float], time.struct_time]) -> None:
        self._comparison, self._local_time = comparison, local_time
        self._first = self._day = ""
        self._begun, self._by_tenant, self._by_key = 0.0, dict[str, float](), dict[str, float]()

    def opened(self, record: Recorded) -> Recorded:
        """The record with the candidate's own spending."""
        day = time.strftime("%Y-%m-%d", self._local_time(record.at))
        tenant, key, seen = record.request.tenant, record.request.key, record.request.spent
        if day != self._day:
            self._first = self._first or day
            self._day, self._begun, self._by_tenant, self._by_key = day, seen.day if day == self._first else 0.0, {}, {}
        if tenant not in self._by_tenant and day == self._first:
            self._by_tenant[tenant] = seen.tenant
            self._begun -= seen.tenant
        if key not in self._by_key and day == self._first:
            self._by_key[key] = seen.key
        spent = Spent(
            day=self._begun + sum(self._by_tenant.values()),
            tenant=self._by_tenant.get(tenant, 0.0),
            key=self._by_key.get(key, 0.0),
        )
        return replace(record, request=replace(record.request, spent=spent))

    def count(self, record: Recorded, after: str, price: Price) -> None:
        tenant, was = record.request.tenant, record.outcome.cost or 0.0
        cost = was if after == (record.target or "refused") else _cost(record, price) if after == "cloud" else 0.0
        for sums, whose in ((self._by_tenant, tenant), (self._by_key, record.request.key)):
            sums[whose] = sums.get(whose, 0.0) + cost
        self._comparison.currency = price.currency
        for amounts, name in ((self._comparison.days, self._day), (self._comparison.tenants, tenant)):
            one = amounts.setdefault(name, Amounts())
            one.recorded, one.candidate = one.recorded + was, one.candidate + cost


def _cost(record: Recorded, price: Price) -> float:
    answer_tokens = record.outcome.completion_tokens or record.request.expected_output_tokens
    return price.of(record.request.prompt_tokens, answer_tokens)


def _decide(record: Recorded, policy: Policy) -> tuple[Decision | None, CausewayError | None]:
    try:
        return decide(record.request, policy, device=record.device, link=record.link), None
    except CausewayError as error:
        return None, error


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


class _Speed:
    """How long one side took to the first token, by the length of the prompt."""

    def __init__(self, records: Sequence[Recorded], target: str) -> None:
        seen = [
            (record.request.prompt_tokens, record.outcome.first_token_s)
            for record in records
            if record.outcome.served == target and record.timed and record.outcome.first_token_s is not None
        ]
        self._seen = sorted(seen, key=lambda one: one[0])
        self._lengths = [tokens for tokens, _ in self._seen]

    def first_token_s(self, prompt_tokens: int) -> float | None:
        """The median of the nearest in length; None if that side answered nothing."""
        if not self._seen:
            return None
        at = bisect_right(self._lengths, prompt_tokens)
        around = self._seen[max(at - NEIGHBOURS, 0) : at + NEIGHBOURS]
        around.reverse()  # of one length the latest, never the quickest
        nearest = sorted(around, key=lambda one: abs(one[0] - prompt_tokens))[:NEIGHBOURS]
        return statistics.median(seconds for _, seconds in nearest)


def plain(comparison: Comparison) -> dict[str, Any]:
    """Its fields as JSON knows them."""
    moved = [{"from": old, "to": new, "count": count} for (old, new), count in comparison.moved.most_common()]
    fields = {name: getattr(comparison, name) for name in Comparison.__dataclass_fields__}
    money = {
        name: {key: asdict(amounts) for key, amounts in getattr(comparison, name).items()}
        for name in ("days", "tenants")
    }
    return {**fields, **money, "moved": moved, "rules": dict(comparison.rules), "changed": comparison.changed}


def said(comparison: Comparison) -> str:
    """In a sentence, for people."""
    moves = [f"move {count} to the {to}" for (_, to), count in comparison.moved.most_common() if to != "refused"]
    refused = sum(count for (_, to), count in comparison.moved.items() if to == "refused")
    parts = [*moves, *([f"refuse {refused} more"] if refused else [])] or ["change nothing"]
    text = f"{', '.join(parts)} (of {comparison.total})"
    text += f"; {comparison.redacted} redacted, {comparison.leaks} private leaks"
    if comparison.first_token_change_s is not None:
        ms = comparison.first_token_change_s * 1000
        text += f"; first token {ms:+.0f} ms on {comparison.estimated} of the moved"
    if comparison.cost_change is not None:
        sign = "+" if comparison.cost_change >= 0 else "-"
        text += f"; {sign}{spelled(abs(comparison.cost_change))} {comparison.currency}"
    if comparison.days:
        dearest = max(amounts.candidate for amounts in comparison.days.values())
        text += f"; at most {spelled(dearest)} {comparison.currency} a day"
    if comparison.over_budget:
        text += f"; {comparison.over_budget} beyond the budget"
    return text
