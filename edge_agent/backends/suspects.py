"""Requests that were running when the model's process died. Once may be chance; who was there twice is refused."""

import hashlib
from collections import OrderedDict
from collections.abc import Callable

import msgspec

from shared.errors import Quarantined
from shared.schemas import ChatRequest

MAX_CRASHES = 2
TTL_S = 600.0
MAX_SUSPECTS = 1024


def fingerprint(request: ChatRequest) -> bytes:
    """Of all that the model sees: whoever sends the same again under another id sends the same."""
    return hashlib.sha256(msgspec.msgpack.encode(msgspec.structs.replace(request, id="-"))).digest()


class Suspects:
    """Remembers fingerprints, not requests; the oldest are forgotten after TTL_S, or where there are too many."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._crashes: OrderedDict[bytes, tuple[int, float]] = OrderedDict()
        self.refused = 0

    def __len__(self) -> int:
        """How many are refused now."""
        self._forget()
        return sum(crashes >= MAX_CRASHES for crashes, _ in self._crashes.values())

    def check(self, mark: bytes) -> None:
        """Raises Quarantined."""
        self._forget()
        crashes, at = self._crashes.get(mark, (0, 0.0))
        if crashes >= MAX_CRASHES:
            self.refused += 1
            left = TTL_S - (self._clock() - at)
            raise Quarantined(
                f"the local model's process died {crashes} times while it answered this; refused for {left:.0f} s",
                source="edge",
            )

    def crashed(self, mark: bytes) -> None:
        crashes, _ = self._crashes.pop(mark, (0, 0.0))
        self._crashes[mark] = (crashes + 1, self._clock())
        while len(self._crashes) > MAX_SUSPECTS:
            self._crashes.popitem(last=False)

    def cleared(self, mark: bytes) -> None:
        """It was answered in full."""
        self._crashes.pop(mark, None)

    def _forget(self) -> None:
        oldest = self._clock() - TTL_S
        while self._crashes and next(iter(self._crashes.values()))[1] <= oldest:
            self._crashes.popitem(last=False)
