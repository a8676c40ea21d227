"""What the cloud's answers cost, and how much they may cost in a day: values, and what an administrator writes of them.

Amounts are in the currency of the prices. The device's own answers cost nothing.
"""

from dataclasses import dataclass
from typing import Annotated, Final, Literal, Self

from pydantic import Field, StringConstraints

from router.conditions import Written

MILLION: Final = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """Of a million tokens."""

    input_per_million: float
    output_per_million: float
    currency: str

    def of(self, prompt_tokens: int, answer_tokens: int) -> float:
        return (prompt_tokens * self.input_per_million + answer_tokens * self.output_per_million) / MILLION


@dataclass(frozen=True, slots=True, kw_only=True)
class Spent:
    """What the cloud has cost on this day of the device's clock, requests in flight by what they may cost."""

    day: float = 0.0
    tenant: float = 0.0
    """Of that, for the tenant whose request it is."""
    key: float = 0.0
    """Of that, with the key that was shown."""


NOTHING_SPENT: Final = Spent()

PerMillion = Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)]
Amount = Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)]


class Tariff(Written):
    """What the cloud takes."""

    input_per_million: PerMillion = Field(description="for a million tokens of prompts")
    output_per_million: PerMillion = Field(description="for a million tokens of answers")
    currency: Annotated[str, StringConstraints(pattern=r"^[A-Z]{3}$")] = Field(description="such as EUR")

    @property
    def price(self) -> Price:
        return Price(**self.model_dump())


class Prices(Written):
    """Without them nothing is said of money."""

    cloud: Tariff = Field(description="what the cloud takes")


_WHOSE: Final = ("", " by the tenant", " with this key")


class Budgets(Written):
    """What the cloud may cost in a day of the device's clock, in the currency of the prices."""

    day: Amount | None = Field(None, description="all requests together")
    tenant_day: Amount | None = Field(None, description="each tenant (without keys, everybody is one)")
    key_day: Amount | None = Field(None, description="each key of a tenant")
    over: Literal["edge", "refuse"] = Field(
        "edge", description="what would be too much: stays on the device, or is refused if the cloud was to answer"
    )

    def upon(self, base: "Budgets | None") -> Self:
        """These, with those of `base` that are not given here."""
        given = {name: getattr(self, name) for name in self.model_fields_set}
        kept = {name: getattr(base, name) for name in base.model_fields_set} if base else {}
        return type(self)(**{**kept, **given})

    def beyond(self, spent: Spent, cost: float, currency: str) -> str | None:
        """Why a request that may cost this much is one too many; None if it is not."""
        limits = (self.day, self.tenant_day, self.key_day)
        for limit, so_far, whose in zip(limits, (spent.day, spent.tenant, spent.key), _WHOSE, strict=True):
            if limit is not None and so_far + cost > limit:
                left = f"{spelled(so_far)} of {spelled(limit)} {currency} spent today{whose}"
                return f"budget: {left}, this may cost {spelled(cost)}"
        return None


def spelled(amount: float) -> str:
    """In cents, or finer where that would say nothing."""
    return f"{amount:.2f}" if not amount or abs(amount) >= 1 else f"{amount:.3g}"
