"""Who asks, and how: what the headers of a call say beyond its body."""

from dataclasses import dataclass
from typing import Final

from edge_agent.cache.control import NO_WISHES, Control

CLASS_HEADER: Final = "x-causeway-class"


@dataclass(frozen=True, slots=True)
class Caller:
    """`tenant` is whose key was shown, `key` that key's id; both empty where clients show none. Of the choices of one
    call, this is number `choice`. `scenario` is the class that was asked for, if one was."""

    tenant: str = ""
    key: str = ""
    cache: Control = NO_WISHES
    choice: int = 0
    scenario: str | None = None


ANYONE: Final = Caller()
