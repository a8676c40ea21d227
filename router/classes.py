"""Scenario classes: how soon the first token of a kind of request should come, as targets that an administrator sets.

    asked for   the header x-causeway-class, else the body's causeway.class, else the policy's (or its tenant's)
                `default_class`
    given       by the first rule with a `class` whose conditions hold, whatever was asked for
    guessed     batch_processing for the service tier `flex`, real_time_chat for a chat, else content_generation

A guess is counted and shown; no decision is made by it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Final, Self

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from router.conditions import Written
from router.document import shorten
from shared.errors import BadRequest
from shared.schemas import ChatRequest

Milliseconds = Annotated[float, Field(gt=0, le=86_400_000, allow_inf_nan=False)]


class Targets(Written):
    """Of the first token, in milliseconds."""

    p50_ms: Milliseconds = Field(description="half of the requests have it by then")
    p95_ms: Milliseconds = Field(description="19 of 20; a side that is predicted to take longer is avoided")
    p99_ms: Milliseconds = Field(description="99 of 100")

    @model_validator(mode="after")
    def _rising(self) -> Self:
        if not self.p50_ms <= self.p95_ms <= self.p99_ms:
            raise PydanticCustomError("order", "p50_ms, p95_ms and p99_ms must not fall")
        return self


CHAT, GENERATION, BATCH = "real_time_chat", "content_generation", "batch_processing"
KNOWN: Final[Mapping[str, Targets]] = {
    CHAT: Targets(p50_ms=200, p95_ms=500, p99_ms=1000),
    GENERATION: Targets(p50_ms=2000, p95_ms=5000, p99_ms=10_000),
    BATCH: Targets(p50_ms=10_000, p95_ms=30_000, p99_ms=60_000),
}
"""What holds for those that no policy changes."""


@dataclass(frozen=True, slots=True)
class Class:
    """A request's class; `guessed` where nobody said."""

    name: str = CHAT
    guessed: bool = True


UNNAMED: Final = Class()


def class_of(request: ChatRequest, header: str | None, default: str | None, known: Mapping[str, Targets]) -> Class:
    """Raises BadRequest for a class that there is not."""
    asked = request.scenario if header is None else header
    if asked is not None and asked not in known:
        where = "causeway.class" if header is None else "x-causeway-class"
        raise BadRequest(f"no class {shorten(asked)}; there are {', '.join(known)}", param=where)
    if (named := asked or default) is not None:
        return Class(named, guessed=False)
    if request.priority == "batch":
        return Class(BATCH)
    return Class(CHAT if request.messages else GENERATION)
