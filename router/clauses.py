"""What a policy is made of: rules, what it is to achieve, its words on privacy, the cache and a cloud that fails."""

import difflib
from functools import cached_property
from typing import Annotated, Self

from pydantic import Field, StringConstraints, field_validator, model_validator
from pydantic_core import PydanticCustomError

from router.conditions import ClassName, Condition, When, Written
from router.document import Path, shorten
from router.privacy.checks import SUPPORTED_REGIONS
from router.privacy.detect import MAX_WORD_CHARS, MAX_WORDS, Detector
from router.privacy.kinds import KINDS, REGIONS
from shared.schemas import Label, Target


def incoherent(path: Path, message: str) -> PydanticCustomError:
    """A fault found by comparing several fields, placed at one of them."""
    return PydanticCustomError("incoherent", "{message}", {"message": message, "path": path})


Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_.-]{0,63}$")]
"""Goes into reply headers, hence the narrow alphabet."""


class Rule(Written):
    """The first rule with a target whose conditions hold says where the request goes. Every rule whose conditions hold
    gives it its label; the strictest counts. The first with a class whose conditions hold gives it its class."""

    name: Name = Field(description="shown in the reason of every reply that it decides")
    when: Condition = Field(When(), description="a map of conditions, or one expression; nothing at all means always")
    target: Target | None = Field(None, description="where the request goes; none: a label or a class only")
    label: Label = Field("free", description="what the request is labelled at least, wherever another rule sends it")
    scenario: ClassName | None = Field(
        None, alias="class", description="the scenario class of the request, whatever it asked for"
    )
    fallback: bool = Field(True, description="false: this target or nobody, whatever happens")

    @property
    def silent(self) -> bool:
        """It says nothing."""
        return self.target is None and self.label == "free" and self.scenario is None

    @property
    def unconditional(self) -> bool:
        """None that comes after it is ever asked where to go."""
        return self.target is not None and self.when == When()

    @property
    def labelling(self) -> "Rule":
        """What is left of it where it may not say where to go."""
        return self.model_copy(update={"target": None, "fallback": True})

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.silent:
            raise PydanticCustomError("missing", "is required", {"path": ("target",)})
        if self.target is None and not self.fallback:
            raise incoherent(("fallback",), "needs a target")
        return self


Weight = Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)]
Word = Annotated[str, StringConstraints(min_length=2, max_length=MAX_WORD_CHARS, strip_whitespace=True)]


class PrivacyRules(Written):
    """What happens to a request in which the detector finds something, beyond what its own label says."""

    personal: Annotated[Label, Field(description="personal data: sent, replaced before it is sent, or kept here")] = (
        "redact"
    )
    secrets: Annotated[Label, Field(description="credentials: sent, replaced before they are sent, or kept here")] = (
        "redact"
    )
    kinds: Annotated[
        Annotated[tuple[str, ...], Field(min_length=1, max_length=64)] | None,
        Field(description="kinds looked for, such as email or iban; all if not given"),
    ] = None
    regions: Annotated[
        tuple[str, ...],
        Field(min_length=1, max_length=64, description="whose phone numbers are known without a country code"),
    ] = REGIONS
    words: Annotated[
        tuple[Word, ...], Field(max_length=MAX_WORDS, description="words of your own that count as personal data")
    ] = ()

    @field_validator("kinds")
    @classmethod
    def _known_kinds(cls, names: tuple[str, ...] | None) -> tuple[str, ...] | None:
        return _known(names or (), KINDS, "kind") and names

    @field_validator("regions")
    @classmethod
    def _known_regions(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        return _known(names, SUPPORTED_REGIONS, "region")

    @property
    def off(self) -> bool:
        return self.personal == self.secrets == "free"

    @model_validator(mode="after")
    def _searchable(self) -> Self:
        """A dictionary that no detector can be made of must not come into force."""
        try:
            _ = self.words and self.detector
        except ValueError as error:
            raise incoherent(("words",), str(error)) from None
        return self

    @cached_property
    def detector(self) -> Detector:
        """Made at the first request that needs it, or with a policy that has words; some 50 ms."""
        return Detector(regions=self.regions, only=self.kinds, words=self.words)


def _known(names: tuple[str, ...], known: frozenset[str], what: str) -> tuple[str, ...]:
    if unknown := [name for name in names if name not in known]:
        close = difflib.get_close_matches(unknown[0][:80], known, n=1)
        there = (
            f"did you mean {close[0]}?"
            if close
            else f"known are {', '.join(sorted(known)[:40])}{' and others' * (len(known) > 40)}"
        )
        said = {"what": what, "name": shorten(unknown[0]), "there": there}
        raise PydanticCustomError("unknown", "no {what} {name}; {there}", said)
    return names


class Goal(Written):
    """What the learned difficulty is to achieve; exactly one of the two."""

    cloud_share: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="at most this share of requests to the cloud"
    )
    quality: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="keep this part of what the cloud does better, with as few requests there as that takes"
    )

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.cloud_share is None) == (self.quality is None):
            raise PydanticCustomError("goal", "give either cloud_share or quality")
        return self


class Weights(Written):
    """What counts how much, in a unit of the administrator's choice. The cloud is asked where

        quality * difficulty > second * (its time - the edge's) + money * its cost + battery * (its drain - the edge's)

    by the predicted times of the whole answer, the predicted cost in the currency of the prices, and what either is
    predicted to take of the charge that is left, in percent.
    """

    quality: Weight = Field(description="worth of an answer that is right where the edge's would be wrong")
    second: Weight = Field(0.0, description="worth of a second less until the whole answer is there")
    money: Weight = Field(0.0, description="worth of one unit of money not spent")
    battery: Weight = Field(
        0.0, description="worth of one percent of the charge that is left; nothing while plugged in or not known"
    )


class SemanticRules(Written):
    """Answers to questions that say the same in other words. Off unless it is written."""

    threshold: Annotated[
        float, Field(ge=0.5, le=1, description="least cosine of two questions' vectors; the guards decide in any case")
    ] = 0.85


class CacheRules(Written):
    """Which answers are kept, to be served again to the same question. The README of the edge agent has the rest."""

    enabled: Annotated[bool, Field(description="false: no answer is kept, and none is served again")] = True
    ttl_s: Annotated[float, Field(gt=0, le=31_536_000, description="no older answer is served")] = 86_400.0
    sampled: Annotated[bool, Field(description="keep answers that chance had a part in, too")] = False
    edge_only: Annotated[
        bool, Field(description="keep answers to edge_only requests: in memory, and on disk where that is encrypted")
    ] = True
    shared: Annotated[bool, Field(description="keep answers to free requests in the shared Redis, if there is one")] = (
        True
    )
    semantic: Annotated[
        SemanticRules | None, Field(description="serve an answer to the same question in other words; none: never")
    ] = None


class Breaker(Written):
    """When the cloud counts as down, and how soon it is tried again."""

    consecutive_failures: Annotated[int, Field(ge=1, le=1000, description="so many one after the other open it")] = 3
    window: Annotated[int, Field(ge=1, le=1000, description="latest outcomes that failure_ratio looks at")] = 20
    failure_ratio: Annotated[float, Field(gt=0, le=1, description="share of a full window that opens it")] = 0.5
    cool_down_s: Annotated[float, Field(gt=0, le=3600, description="the first wait; doubled each time it fails")] = 2.0
    max_cool_down_s: Annotated[float, Field(gt=0, le=86_400, description="no wait is longer")] = 60.0
    probe_timeout_s: Annotated[float, Field(gt=0, le=3600, description="an unanswered probe is given up by then")] = (
        30.0
    )

    @model_validator(mode="after")
    def _growing(self) -> Self:
        if self.max_cool_down_s < self.cool_down_s:
            raise PydanticCustomError("order", "max_cool_down_s is less than cool_down_s")
        return self
