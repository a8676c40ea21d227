"""The conditions of a rule: a map, all of whose entries must hold, or one expression; see `router.expression`."""

from collections.abc import Iterator, Mapping
from functools import cached_property, partial
from typing import Annotated, Final, Literal, Self, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PlainSerializer,
    PlainValidator,
    StringConstraints,
    Tag,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

from router.expression import FUNCTIONS, MAX_CHARS, Expression, Fact, InvalidExpression, compiled
from shared.schemas import LABELS, Label

HUGE: Final = 1e15

Number = Annotated[float, Field(ge=-HUGE, le=HUGE, allow_inf_nan=False)]
ModelName = Annotated[str, StringConstraints(pattern=r"^[!-~]{1,256}$")]


class Written(BaseModel):
    """Strict: `"800"` is no number and `1` is no truth value. Immutable, and so safe to share between requests."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, validate_default=False)


class Range(Written):
    """Numbers between limits; in YAML `{">": 800}`, `{">=": 10, "<": 20}` or the number itself."""

    above: Number | None = Field(None, alias=">")
    at_least: Number | None = Field(None, alias=">=")
    below: Number | None = Field(None, alias="<")
    at_most: Number | None = Field(None, alias="<=")
    equal: Number | None = Field(None, alias="==")

    def holds(self, value: float) -> bool:
        return (
            (self.above is None or value > self.above)
            and (self.at_least is None or value >= self.at_least)
            and (self.below is None or value < self.below)
            and (self.at_most is None or value <= self.at_most)
            and (self.equal is None or value == self.equal)
        )

    def __str__(self) -> str:
        return " and ".join(f"{sign} {limit:.15g}" for sign, limit in self._limits())

    def _limits(self) -> Iterator[tuple[str, float]]:
        for name, field in type(self).model_fields.items():
            if (limit := getattr(self, name)) is not None:
                yield str(field.alias), limit

    @model_validator(mode="after")
    def _some_number_fits(self) -> Self:
        limits = dict(self._limits())
        if not limits:
            raise PydanticCustomError("empty_range", "no limit given; write a number or one of > >= < <= ==")
        low = max((limits[sign] for sign in (">", ">=", "==") if sign in limits), default=-HUGE)
        high = min((limits[sign] for sign in ("<", "<=", "==") if sign in limits), default=HUGE)
        if low > high or (low == high and not self.holds(low)):
            raise PydanticCustomError("impossible_range", "no number can be {limits}", {"limits": str(self)})
        return self


def _spelled_out(value: object) -> object:
    """A bare number stands for equality."""
    if isinstance(value, Range | dict):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise PydanticCustomError("not_limits", 'must be a number or limits such as {">": 800}')
    return {"==": value}


def _listed(value: object) -> object:
    """One name stands for a list of one."""
    if value == ():
        raise PydanticCustomError("no_names", "must name at least one")
    return (value,) if isinstance(value, str) else value


_LIMITS: Final = {
    "type": "object",
    "properties": {sign: {"type": "number"} for sign in (">", ">=", "<", "<=", "==")},
    "additionalProperties": False,
    "minProperties": 1,
}
Limits = Annotated[
    Range, BeforeValidator(_spelled_out), WithJsonSchema({"anyOf": [{"type": "number"}, _LIMITS], "title": "Limits"})
]
Models = Annotated[
    tuple[ModelName, ...],
    Field(max_length=64),
    BeforeValidator(_listed),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}]}),
]
"""One name or several, any of which is meant."""

Weekday = Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"]
WEEKDAYS: Final[tuple[Weekday, ...]] = get_args(Weekday)
Weekdays = Annotated[tuple[Weekday, ...], Field(max_length=7), BeforeValidator(_listed)]

ClassName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_.-]{0,63}$")]
Classes = Annotated[tuple[ClassName, ...], Field(max_length=64), BeforeValidator(_listed)]

TenantName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._-]{1,64}$")]
Tenants = Annotated[tuple[TenantName, ...], Field(max_length=64), BeforeValidator(_listed)]

_condition = partial(Field, default=None)


class When(Written):
    """Conditions, all of which must hold. One that asks for something not measured does not hold."""

    prompt_tokens: Limits | None = _condition(description="tokens of the whole prompt")
    expected_output_tokens: Limits | None = _condition(description="the smaller of max_tokens and the policy's guess")
    turns: Limits | None = _condition(description="messages by the user, this one included")
    code: bool | None = _condition(description="the prompt looks like program code (a hint)")
    maths: bool | None = _condition(description="the prompt looks like mathematics (a hint)")
    json_: bool | None = _condition(alias="json", description="the prompt speaks of or shows JSON (a hint)")
    tools: bool | None = _condition(description="tool messages, or a prompt that asks for tool calls (a hint)")
    personal: bool | None = _condition(description="personal data or secrets were found in it, or nobody can tell")
    secret: bool | None = _condition(description="credentials were found in it")
    difficulty: Limits | None = _condition(description="learned probability that the cloud is needed, 0 to 1")
    label: Label | None = _condition(description="the request's label")
    model: Models | None = _condition(description="the requested model, virtual or real: one name or a list")
    class_: Classes | None = _condition(alias="class", description="the request's scenario class: one name or a list")
    tenant: Tenants | None = _condition(description="whose key the client showed: one tenant or a list")
    fits_edge: bool | None = _condition(description="prompt and expected output fit the edge model's context")
    fits_cloud: bool | None = _condition(description="prompt and expected output fit the cloud model's context")
    queue_depth: Limits | None = _condition(description="requests waiting on the device")
    running: Limits | None = _condition(description="requests being answered on the device")
    edge_first_token_ms: Limits | None = _condition(description="predicted wait for the first token at the edge")
    cloud_first_token_ms: Limits | None = _condition(description="predicted wait for the first token from the cloud")
    edge_total_ms: Limits | None = _condition(description="predicted time of the whole answer at the edge")
    cloud_total_ms: Limits | None = _condition(description="predicted time of the whole answer from the cloud")
    cloud_cost: Limits | None = _condition(description="predicted cost of the answer from the cloud, by the prices")
    edge_battery_percent: Limits | None = _condition(
        description="predicted: what the answer takes of the charge that is left, made at the edge; 0 if plugged in"
    )
    cloud_battery_percent: Limits | None = _condition(
        description="predicted: the same, for waiting until the cloud has made it"
    )
    spent_today: Limits | None = _condition(description="what the cloud has cost today, by the prices")
    tenant_spent_today: Limits | None = _condition(description="of that, for the tenant who asks")
    key_spent_today: Limits | None = _condition(description="of that, with the key that was shown")
    cloud_failure_ratio: Limits | None = _condition(description="share of the latest requests that the cloud failed")
    round_trip_ms: Limits | None = _condition(description="round trip to the cloud")
    battery_percent: Limits | None = _condition(description="charge left in the device's battery")
    on_battery: bool | None = _condition(description="the device runs on its battery")
    cpu_percent: Limits | None = _condition(description="load of the device's processors, our own work included")
    cpu_percent_others: Limits | None = _condition(description="load of the device's processors by other programs")
    memory_available_mb: Limits | None = _condition(description="memory of the device that can be had, in megabytes")
    temperature_c: Limits | None = _condition(description="of the device's processor, in degrees Celsius")
    online: bool | None = _condition(description="the device has a route to some network")
    metered: bool | None = _condition(description="its traffic costs, as the user has set")
    weekday: Weekdays | None = _condition(description="of the device's clock: one day or a list")
    hour: Limits | None = _condition(description="of the device's clock, 0 to 24; 13.5 is half past one")
    bucket: Limits | None = _condition(description="0 to 100, drawn once for each conversation: for trials on a share")

    @cached_property
    def asked(self) -> Mapping[str, "Range | tuple[str, ...] | str | bool"]:
        """The facts that must be known, in the order of the fields above, and what is asked of each."""
        return {fact: asked for name, fact in FACT_NAMES.items() if (asked := getattr(self, name)) is not None}

    def holds(self, facts: Mapping[str, Fact]) -> bool:
        """No fact is read after one that does not hold."""
        for name, condition in self.asked.items():  # noqa: SIM110 - all() of a generator takes three times as long
            if not _holds(condition, facts[name]):
                return False
        return True

    def limits(self, fact: str) -> str:
        """What was asked of a number, like ` > 800`."""
        condition = self.asked[fact]
        return f" {condition}" if isinstance(condition, Range) else ""


FACT_NAMES: Final = {name: field.alias or name for name, field in When.model_fields.items()}
FIELD_NAMES: Final = {fact: name for name, fact in FACT_NAMES.items()}


def _holds(condition: Range | tuple[str, ...] | str | bool, value: Fact) -> bool:
    if value is None:
        return False
    if isinstance(condition, Range):
        return not isinstance(value, str) and condition.holds(float(value))
    if isinstance(condition, tuple):
        return value in condition
    return value == condition


def samples() -> Mapping[str, tuple[Fact, ...]]:
    """Some values of each fact, by its name: what an expression is tried on."""
    texts: dict[str, tuple[Fact, ...]] = {"label": LABELS, "weekday": WEEKDAYS}
    texts |= {"model": ("auto", "edge"), "tenant": ("", "a"), "class": ("real_time_chat", "batch_processing")}
    kinds: dict[object, tuple[Fact, ...]] = {bool | None: (False, True)}
    return {
        fact: texts.get(fact) or kinds.get(When.model_fields[name].annotation, (0.0, 1e9))
        for fact, name in FIELD_NAMES.items()
    }


def _expression(value: object) -> Expression:
    if isinstance(value, Expression):
        return value
    if not isinstance(value, str):
        raise PydanticCustomError("no_condition", "must be a map of conditions, or an expression in quotes")
    try:
        return compiled(value, samples())
    except InvalidExpression as error:
        raise PydanticCustomError("expression", "{said}", {"said": str(error)}) from None


MAP, TEXT = "(map)", "(text)"
"""How pydantic calls the two ways to write a condition; no part of a field's name."""

Condition = Annotated[
    Annotated[When, Tag(MAP)]
    | Annotated[
        Expression,
        PlainValidator(_expression),
        PlainSerializer(lambda expression: expression.text, return_type=str),
        WithJsonSchema(
            {
                "type": "string",
                "maxLength": MAX_CHARS,
                "description": "an expression (CEL), true or false, over the same facts as a map has: "
                f"{', '.join(FIELD_NAMES)}. "
                "Operators: && || ! == != < <= > >= in ?: and arithmetic on decimals (2.0); functions: "
                f"{', '.join(sorted(FUNCTIONS))}",
                "examples": ["prompt_tokens > 800.0 && !code", "(hour >= 18.0 || hour < 7.0) && difficulty > 0.4"],
            }
        ),
        Tag(TEXT),
    ],
    Discriminator(lambda value: MAP if isinstance(value, dict | When) else TEXT),
]
