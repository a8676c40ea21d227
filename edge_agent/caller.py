"""Who asks, and how: what the headers of a call say beyond its body."""

from dataclasses import dataclass
from typing import Final

from edge_agent.cache.control import NO_WISHES, Control


@dataclass(frozen=True, slots=True)
class Caller:
    """`tenant` is whose key was shown; empty where clients show none. Of the choices of one call, this is
    number `choice`."""

    tenant: str = ""
    cache: Control = NO_WISHES
    choice: int = 0


ANYONE: Final = Caller()
