"""What the administrator writes: a `Policy`, read from YAML by `parse`. The README says how to write one."""

import difflib
import hashlib
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Annotated, Any, Final, Literal, Self
from zoneinfo import ZoneInfo

import pydantic
from pydantic import BaseModel, Field, StringConstraints, field_validator, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from router.cascade_rules import AgreedCurve, Calibration, CascadeRules, SecondSample
from router.classes import KNOWN, Targets
from router.clauses import Breaker, CacheRules, Goal, PrivacyRules, Rule, Weights, incoherent
from router.conditions import MAP, TEXT, ClassName, Range, TenantName, When, Written
from router.document import Document, InvalidPolicy, Path, Problem, read, shorten
from router.features import EXPECTED_OUTPUT_TOKENS
from router.money import Budgets, Price, Prices, Tariff
from shared.schemas import MAX_OUTPUT_TOKENS, Label

__all__ = [
    "InvalidPolicy",
    "Policy",
    "Problem",
    "json_schema",
    "parse",
]

Mode = Literal["prefer_edge", "only_edge", "prefer_cloud", "only_cloud"]

MAX_RULES: Final = 256
MAX_TENANTS: Final = 256
MAX_CLASSES: Final = 32


_OVERRIDDEN: Final = ("mode", "fallback", "label", "goal", "weights", "cascade", "privacy", "default_class")


Rules = Annotated[
    tuple[Rule, ...],
    Field(max_length=MAX_RULES, description="the first that holds applies", json_schema_extra={"minItems": 1}),
]


class Override(Written):
    """What differs from the policy around it; what is not given stays. Its rules come first, and one that has the name
    of a common rule takes its place."""

    mode: Mode | None = Field(None, description="another standing preference")
    fallback: Literal["edge", "none"] | None = Field(None, description="whether the edge may stand in for the cloud")
    label: Label | None = Field(None, description="what these requests are labelled at least")
    rules: Rules = Field((), description="before the common ones; one of the same name takes that one's place")
    goal: Goal | None = Field(None, description="another goal, in place of the policy's goal or weights")
    weights: Weights | None = Field(None, description="other weights, in place of the policy's goal or weights")
    cascade: CascadeRules | None = Field(None, description="another cascade")
    privacy: PrivacyRules | None = Field(None, description="in place of all that the policy says under privacy")
    budgets: Budgets | None = Field(None, description="those that differ")
    default_class: ClassName | None = Field(None, description="of requests that name none")

    def over(self, base: "Policy", **others: Any) -> "Policy":
        """`base` with these changes and `others`; raises pydantic.ValidationError if they contradict each other."""
        given = {name: value for name in _OVERRIDDEN if (value := getattr(self, name))}
        if self.goal or self.weights:  # what the request is chosen by instead
            given = {"goal": None, "weights": None, **given}
        if self.budgets is not None:
            given["budgets"] = self.budgets.upon(base.budgets)
        mode, own = given.get("mode", base.mode), {rule.name for rule in self.rules}
        reached = not (self.rules and self.rules[-1].unconditional)
        common = [rule if reached and _permits(mode, rule) else rule.labelling for rule in base.rules]
        kept = tuple(rule for rule in common if rule.name not in own and not rule.silent)
        same = {name: getattr(base, name) for name in Policy.model_fields}
        return Policy(**{**same, **given, "rules": self.rules + kept, "tenants": {}, **others})


def _permits(mode: Mode, rule: Rule) -> bool:
    return rule.target is None or not mode.startswith("only_") or mode == f"only_{rule.target}"


class Policy(Written):
    """Where requests may go, where they should go, and what happens when that side cannot answer."""

    version: Literal[1] = Field(1, description="of this language")
    mode: Mode = Field(description="the standing preference, or the one side that may answer at all")
    fallback: Literal["edge", "none"] = Field(
        "edge", description="may the edge stand in, before the first token, for a cloud that cannot answer"
    )
    label: Label = Field("free", description="what every request is labelled at least")
    rules: Rules = Field((), description="in order: the first whose conditions all hold decides")
    goal: Goal | None = Field(None, description="for requests that no rule decides: by their learned difficulty")
    weights: Weights | None = Field(
        None, description="for requests that no rule decides, instead of a goal: quality against time and money"
    )
    cascade: CascadeRules | None = Field(
        None, description="for requests that no rule decides: the edge's answer if it is good enough, else the cloud's"
    )
    privacy: PrivacyRules = Field(PrivacyRules(), description="what happens to personal data and secrets")
    cache: CacheRules = Field(CacheRules(), description="which answers are kept, to be served again")
    prices: Prices | None = Field(None, description="what answers cost; without them nothing is said of money")
    classes: Annotated[dict[ClassName, Targets], Field(max_length=MAX_CLASSES)] = Field(
        default_factory=dict, description="more scenario classes, or other targets of the known ones"
    )
    default_class: ClassName | None = Field(
        None, description="of requests that name none; without it a class is guessed, and decides nothing"
    )
    budgets: Budgets | None = Field(None, description="what the cloud may cost in a day; needs prices")
    expected_output_tokens: Annotated[
        int, Field(ge=1, le=MAX_OUTPUT_TOKENS, description="guessed length of an answer without max_tokens")
    ] = EXPECTED_OUTPUT_TOKENS
    first_token_timeout_s: Annotated[
        float, Field(gt=0, le=3600, description="how long the cloud may take to its first token")
    ] = 10.0
    max_round_trip_ms: Annotated[
        float, Field(gt=0, le=3_600_000, description="a slower link is avoided while the edge can answer")
    ] = 2000.0
    breaker: Breaker = Field(Breaker(), description="when the cloud counts as down, and how soon it is tried again")
    timezone: (
        Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_+-]{1,32}(/[A-Za-z0-9_+-]{1,32}){0,2}$")] | None
    ) = Field(
        None, description="whose clock the conditions weekday and hour go by, such as Europe/Berlin; else the device's"
    )
    tenants: Annotated[dict[TenantName, Override], Field(max_length=MAX_TENANTS)] = Field(
        default_factory=dict, description="what differs for a tenant's requests"
    )
    shadow: Override | None = Field(None, description="decided beside the policy and recorded, never acted on")

    @field_validator("timezone")
    @classmethod
    def _known_zone(cls, name: str | None) -> str | None:
        try:
            _ = name and ZoneInfo(name)
        except (KeyError, ValueError, OSError):
            raise PydanticCustomError(
                "unknown", "no time zone {name}; write one such as Europe/Berlin", {"name": shorten(str(name))}
            ) from None
        return name

    @cached_property
    def zone(self) -> ZoneInfo | None:
        return ZoneInfo(self.timezone) if self.timezone else None

    @cached_property
    def targets(self) -> Mapping[str, Targets]:
        """Of all classes that a request can have."""
        return {**KNOWN, **self.classes}

    @cached_property
    def price(self) -> Price | None:
        """What the cloud takes, if that is known."""
        return self.prices.cloud.price if self.prices else None

    def of(self, tenant: str) -> "Policy":
        """What holds for this tenant's requests."""
        return self._of_tenants.get(tenant, self)

    @cached_property
    def shadowing(self) -> "Policy | None":
        """This policy with its shadow's changes."""
        return self.shadow.over(self, shadow=None) if self.shadow else None

    @cached_property
    def _of_tenants(self) -> dict[str, "Policy"]:
        return {name: override.over(self) for name, override in self.tenants.items()}

    @cached_property
    def routing(self) -> tuple[Rule, ...]:
        """The rules that say where a request goes; then those that label it, and those that give it a class."""
        return tuple(rule for rule in self.rules if rule.target is not None)

    @cached_property
    def labelling(self) -> tuple[Rule, ...]:
        return tuple(rule for rule in self.rules if rule.label != "free")

    @cached_property
    def classing(self) -> tuple[Rule, ...]:
        return tuple(rule for rule in self.rules if rule.scenario is not None)

    @cached_property
    def fingerprint(self) -> str:
        """Names what is in force, whatever its file is called or how it is written."""
        return hashlib.sha256(self.model_dump_json(by_alias=True).encode()).hexdigest()[:12]

    @cached_property
    def asks_difficulty(self) -> bool:
        return self.goal is not None or self.weights is not None or self.asks("difficulty")

    @cached_property
    def asks_bucket(self) -> bool:
        return self.asks("bucket")

    @cached_property
    def asks_privacy(self) -> bool:
        labels = (self.label, *(rule.label for rule in self.rules))
        return self.asks("personal", "secret") or not self.privacy.off or "redact" in labels

    def asks(self, *facts: str) -> bool:
        """Whether some rule asks for one of them."""
        return any(fact in rule.when.asked for rule in self.rules for fact in facts)

    @model_validator(mode="after")
    def _coherent(self) -> Self:
        """Every rule has its own name and can apply; `only_*` is contradicted by none."""
        first_with: dict[str, int] = {}
        last = len(self.rules)
        for number, rule in enumerate(self.rules):
            if first_with.setdefault(rule.name, number) != number:
                raise incoherent(("rules", number, "name"), f"rules[{first_with[rule.name]}] has this name")
            if not _permits(self.mode, rule):
                raise incoherent(("rules", number, "target"), f"mode {self.mode} never sends a request there")
            if number > last and rule.target is not None:
                raise incoherent(("rules", number), f"never reached: rules[{last}] has no conditions")
            last = min(last, number) if rule.unconditional else last
        if (aimless := _aimless(self)) is not None:
            raise incoherent(("budgets",), aimless)
        if self.weights is not None and self.goal is not None:
            raise incoherent(("weights",), "give either goal or weights")
        if self.weights is not None and self.weights.money and self.prices is None:
            raise incoherent(("weights", "money"), "without prices nobody can tell what the cloud costs")
        for path, name in _named_classes(self):
            if name not in self.targets:
                raise incoherent(path, f"no class {name}; there are {', '.join(self.targets)}")
        for name, override in self.tenants.items():
            _refuse_contradiction(("tenants", name), override, self)
        if self.shadow is not None:
            _refuse_contradiction(("shadow",), self.shadow, self, shadow=None)
        return self


def _named_classes(policy: Policy) -> Iterator[tuple[Path, str]]:
    if policy.default_class is not None:
        yield ("default_class",), policy.default_class
    for number, rule in enumerate(policy.rules):
        if rule.scenario is not None:
            yield ("rules", number, "class"), rule.scenario


def _aimless(policy: Policy) -> str | None:
    """Why its budgets could never have a say."""
    budgets = policy.budgets
    if budgets is None:
        return None
    if budgets.day is None and budgets.tenant_day is None and budgets.key_day is None:
        return "give day, tenant_day or key_day"
    return "without prices nobody can tell what was spent" if policy.prices is None else None


def _refuse_contradiction(path: Path, override: Override, base: Policy, **others: Any) -> None:
    try:
        override.over(base, **others)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        raise incoherent((*path, *first.get("ctx", {}).get("path", ())), first["msg"]) from None


def parse(source: str | bytes, *, name: str = "policy") -> Policy:
    """The policy written in `source`; `name` is what error messages call it.

    Total: whatever the source holds, it returns a Policy or raises InvalidPolicy.
    """
    document = read(source, name=name)
    try:
        policy = Policy.model_validate(document.value)
    except pydantic.ValidationError as error:
        raise InvalidPolicy(name, tuple(sorted(_problem(document, detail) for detail in error.errors()))) from None
    if empty := sorted(document.problem(path, "no rule is given; leave it out") for path in _empty_lists(document)):
        raise InvalidPolicy(name, tuple(empty))
    return policy


def _empty_lists(document: Document) -> list[Path]:
    """Lists of rules that somebody began, or that a template left behind: not to be taken for "no rules"."""
    tenants = [path for path in document.marks if len(path) == 2 and path[0] == "tenants"]
    places: list[Path] = [("rules",), ("shadow", "rules"), *((*tenant, "rules") for tenant in tenants)]
    return [path for path in places if path in document.marks and (*path, 0) not in document.marks]


def json_schema() -> dict[str, Any]:
    """JSON Schema of a policy file, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | Policy.model_json_schema(by_alias=True)


def _problem(document: Document, detail: ErrorDetails) -> Problem:
    loc = tuple(step for step in detail["loc"] if step not in (MAP, TEXT))
    path: Path = (*loc, *detail.get("ctx", {}).get("path", ()))
    if detail["type"] != "missing":  # drop what was never written, such as the `==` that a bare number stands for
        path = document.nearest(path)
    return document.problem(path, _message(detail, loc))


def _message(detail: ErrorDetails, loc: Path) -> str:
    match detail["type"]:
        case "extra_forbidden":
            return "unknown field" + _suggestion(loc)
        case "missing":
            return "is required"
        case "string_pattern_mismatch":
            return f"must match {detail['ctx']['pattern']}"
        case "model_type":
            return "must be a map" if loc else "must be a map, such as `mode: prefer_edge`"
        case "too_long":
            return f"at most {detail['ctx']['max_length']} are allowed"
        case "less_than" | "less_than_equal" if (detail.get("ctx") or {}).get("lt", detail["ctx"].get("le")) == 1:
            return f"{_plainly(detail['msg'])}: a share, so 0.3 for 30 %"
        case _:
            return _plainly(detail["msg"])


_WORDS: Final = {
    "Input should": "must",
    "String should": "must",
    "tuple": "list",
    "a valid boolean": "true or false",
    "a valid integer": "a whole number",
    "a valid ": "a ",
}


def _plainly(said: str) -> str:
    """What pydantic says, in the words of who writes a policy."""
    for theirs, ours in _WORDS.items():
        said = said.replace(theirs, ours)
    return shorten(said, 300)


def _suggestion(loc: tuple[int | str, ...]) -> str:
    models: dict[str, type[BaseModel]] = {
        "when": When,
        "breaker": Breaker,
        "privacy": PrivacyRules,
        "goal": Goal,
        "weights": Weights,
        "cache": CacheRules,
        "cascade": CascadeRules,
        "agreed": AgreedCurve,
        "second_sample": SecondSample,
        "shadow": Override,
        "prices": Prices,
        "budgets": Budgets,
    }
    of_maps: dict[str, type[BaseModel]] = {"tenants": Override, "calibration": Calibration}
    of_maps |= {"prices": Tariff, "classes": Targets}
    parent: type[BaseModel] = Policy
    for before, step in zip(("", *loc), loc[:-1], strict=False):
        parent = Rule if isinstance(step, int) else of_maps.get(str(before)) or models.get(step, Range)
    names = [field.alias or name for name, field in parent.model_fields.items()]
    close = difflib.get_close_matches(str(loc[-1])[:80], names, n=1)
    return f"; did you mean {close[0]}?" if close else f"; known here: {', '.join(names)}"
