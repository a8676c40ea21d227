"""Stop strings in a stream: release text at once, but never a part of a stop string."""


class StopScanner:
    """Feed it text as it is generated; it gives back what may be shown.

    Only the longest suffix that could still grow into a stop string is held back. At the earliest hit, in the text as
    produced so far, the stream is cut before the stop string: `hit` is set and everything after it is swallowed.
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._held = ""
        self.hit: str | None = None

    def push(self, text: str) -> str:
        """Add newly generated text; returns the part that is safe to release."""
        if self.hit is not None:
            return ""
        self._held += text
        found = [(at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            at, self.hit = min(found, key=lambda pair: (pair[0], -len(pair[1])))
            released, self._held = self._held[:at], ""
            return released
        keep = max((overlap(self._held, stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        released, self._held = self._held[:cut], self._held[cut:]
        return released

    def flush(self) -> str:
        """The text still held back, once no more can come."""
        released, self._held = self._held, ""
        return released


def overlap(text: str, stop: str) -> int:
    """Length of the longest proper prefix of `stop` that `text` ends with."""
    for size in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
