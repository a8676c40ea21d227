"""What a rule can ask: one `Case` holds all that a decision sees, and FACTS reads each condition's value from it.

A new condition is a field of `conditions.When` and a line of FACTS; a test holds the two together.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from router.classes import Class
from router.clauses import Rule
from router.conditions import WEEKDAYS
from router.expression import Fact
from router.features import DeviceReading, LinkReading, RequestFeatures
from router.lazily import lazily
from router.policy import Policy
from router.predict import Predictions, predict
from shared.schemas import LABELS, Label


@dataclass(frozen=True, slots=True)
class Match:
    """A rule that applies. `reason` shows the conditions that held, like `rule long: prompt_tokens 1200 > 800`."""

    rule: Rule
    reason: str

    @property
    def name(self) -> str:
        return f"rule {self.rule.name}"


@dataclass(frozen=True)
class Case:
    """One request, one policy, one moment. What follows from them is worked out once, and only if it is asked for."""

    request: RequestFeatures
    policy: Policy
    device: DeviceReading
    link: LinkReading

    @lazily
    def facts(self) -> "Facts":
        return Facts(self)

    @lazily
    def scenario(self) -> Class:
        """The request's class: what the first rule gives that has one and holds, else the one that was asked for or
        guessed, which is also what these rules see."""
        if not self.policy.classing:
            return self.request.scenario
        own = Facts(self)
        own["class"] = self.request.scenario.name
        given = (rule.scenario for rule in self.policy.classing if _matching(rule, own, safe=False) is not None)
        name = next(given, None)
        return self.request.scenario if name is None else Class(name, guessed=False)

    @lazily
    def labelled(self) -> Match | None:
        """The first of the rules that give the strictest label; None unless it is stricter than the request's own and
        the policy's."""
        found, strictest = None, self._asked
        for rule in self.policy.labelling:
            if LABELS.index(rule.label) >= strictest:
                continue
            if (match := _matching(rule, self.facts, safe=True)) is not None:
                found, strictest = match, LABELS.index(rule.label)
        return found

    @lazily
    def label(self) -> Label:
        """The strictest of the request's own, the policy's and its rules'."""
        return self.labelled.rule.label if self.labelled else LABELS[self._asked]

    @property
    def _asked(self) -> int:
        return min(LABELS.index(self.request.label), LABELS.index(self.policy.label))

    @lazily
    def care(self) -> Label:
        """How carefully this request is handled: the strictest that its label and what was found in it ask for."""
        found, rules = self.request.privacy, self.policy.privacy
        asked = {self.label}
        if found.secret or found.undecided is not None:
            asked.add(rules.secrets)
        if found.personal:
            asked.add(rules.personal)
        return next(care for care in LABELS if care in asked)

    @lazily
    def match(self) -> Match | None:
        """The administrator's rule that applies: the first with a target whose conditions hold. A rule for the cloud
        does not apply to an edge_only request, which may not go there."""
        for rule in self.policy.routing:
            if rule.target == "cloud" and self.label == "edge_only":
                continue
            if (match := _matching(rule, self.facts, safe=rule.target == "edge")) is not None:
                return match
        return None

    @lazily
    def predictions(self) -> Predictions:
        return predict(self.request, self.device, self.link, self.policy.price)

    @lazily
    def beyond_budget(self) -> str | None:
        """Why the policy's budgets have no room for this request in the cloud; None if they have."""
        budgets, price = self.policy.budgets, self.policy.price
        if budgets is None or price is None:
            return None
        cost = price.of(self.request.prompt_tokens, self.request.answer_tokens)
        return budgets.beyond(self.request.spent, cost, price.currency)


FACTS: Final[Mapping[str, Callable[[Case], Fact]]] = {
    "prompt_tokens": lambda case: case.request.prompt_tokens,
    "expected_output_tokens": lambda case: case.request.expected_output_tokens,
    "turns": lambda case: case.request.turns,
    "code": lambda case: case.request.code,
    "maths": lambda case: case.request.maths,
    "json": lambda case: case.request.json,
    "tools": lambda case: case.request.tools,
    "personal": lambda case: case.request.privacy.personal,
    "secret": lambda case: case.request.privacy.secret,
    "difficulty": lambda case: case.request.difficulty,
    "label": lambda case: case.request.label,
    "model": lambda case: case.request.model,
    "class": lambda case: case.scenario.name,
    "tenant": lambda case: case.request.tenant,
    "fits_edge": lambda case: _fits(case, case.device.context_length),
    "fits_cloud": lambda case: _fits(case, case.link.context_length),
    "queue_depth": lambda case: case.device.queue_depth,
    "running": lambda case: case.device.running,
    "edge_first_token_ms": lambda case: _ms(case.predictions.edge.first_token_s),
    "cloud_first_token_ms": lambda case: _ms(case.predictions.cloud.first_token_s),
    "edge_total_ms": lambda case: _ms(case.predictions.edge.total_s),
    "cloud_total_ms": lambda case: _ms(case.predictions.cloud.total_s),
    "cloud_cost": lambda case: case.predictions.cloud.cost,
    "edge_battery_percent": lambda case: case.predictions.edge.battery_percent,
    "cloud_battery_percent": lambda case: case.predictions.cloud.battery_percent,
    "spent_today": lambda case: case.request.spent.day if case.policy.price else None,
    "tenant_spent_today": lambda case: case.request.spent.tenant if case.policy.price else None,
    "key_spent_today": lambda case: case.request.spent.key if case.policy.price else None,
    "cloud_failure_ratio": lambda case: case.link.failure_ratio,
    "round_trip_ms": lambda case: _ms(case.link.round_trip_s),
    "battery_percent": lambda case: case.device.battery_percent,
    "on_battery": lambda case: case.device.on_battery,
    "cpu_percent": lambda case: case.device.cpu_percent,
    "cpu_percent_others": lambda case: case.device.cpu_percent_others,
    "memory_available_mb": lambda case: _mb(case.device.memory_available),
    "temperature_c": lambda case: case.device.temperature_c,
    "online": lambda case: case.device.online,
    "metered": lambda case: case.device.metered,
    "weekday": lambda case: _clock(case)[0],
    "hour": lambda case: _clock(case)[1],
    "bucket": lambda case: case.request.bucket,
}


class Facts(dict[str, Fact]):
    """Of one case, by name; each read when it is first asked for."""

    def __init__(self, case: Case) -> None:
        self._case = case

    def __missing__(self, name: str) -> Fact:
        fact = self[name] = FACTS[name](self._case)
        return fact


def _matching(rule: Rule, facts: Facts, *, safe: bool) -> Match | None:
    """With the facts that were asked for, like `prompt_tokens 1200 > 800`; None unless the rule's conditions hold.

    What was not measured holds for no condition. An expression that fails all the same is taken for the safe side: it
    holds if that is `safe`, since it keeps the request on the device or makes its label stricter.
    """
    holds = rule.when.holds(facts)
    if holds is None and safe:
        return Match(rule, f"rule {rule.name}: its condition failed")
    if not holds:
        return None
    known = [(name, value) for name in rule.when.asked if (value := facts[name]) is not None]
    said = ", ".join(f"{name} {_spelled(value)}{rule.when.limits(name)}" for name, value in known)
    return Match(rule, f"rule {rule.name}: {said or 'always'}")


def _spelled(value: float | str | bool) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return value
    return f"{round(value, 1):.10g}" if abs(value) >= 1 else f"{value:.2g}"


def _clock(case: Case) -> tuple[str | None, float | None]:
    """The day of the week and the hour where the policy's schedules are, else where the device is."""
    zone, device = case.policy.zone, case.device
    if zone is None:
        return device.weekday, device.hour
    if device.at is None:
        return None, None
    there = datetime.fromtimestamp(device.at, zone)
    return WEEKDAYS[there.weekday()], there.hour + there.minute / 60


def _fits(case: Case, context_length: int | None) -> bool | None:
    return None if context_length is None else case.request.needs_context <= context_length


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1000


def _mb(size: int | None) -> float | None:
    return None if size is None else size / 1e6
