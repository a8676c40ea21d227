"""A whole answer, put together from its deltas; for surfaces that say some of it in one piece."""

from dataclasses import dataclass
from typing import Any

import msgspec

from shared.errors import UpstreamFailed
from shared.replies import finish_reason
from shared.schemas import Delta, FinishReason, Route, TokenLogprob, ToolPiece, Usage


@dataclass(slots=True)
class Called:
    """A call, as far as it has been written."""

    id: str
    name: str
    arguments: str = ""

    def add(self, piece: ToolPiece) -> None:
        self.arguments += piece.arguments

    def object(self) -> dict[str, Any]:
        """The arguments. Raises UpstreamFailed if the model wrote something else."""
        try:
            return msgspec.json.decode(self.arguments or "{}", type=dict[str, Any])
        except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
            raise UpstreamFailed("the model wrote a call whose arguments are no JSON object") from error


class Gathered:
    """Add every delta; then `last` has the reason, the usage and the stop string."""

    def __init__(self) -> None:
        self.calls: dict[int, Called] = {}
        self.logprobs: list[TokenLogprob] = []
        self.route: Route | None = None
        self._texts: list[str] = []
        self._last: Delta | None = None

    def add(self, delta: Delta) -> None:
        """Raises Cancelled: no surface here knows a cancelled answer."""
        finish_reason(delta)
        self._texts.append(delta.text)
        self.logprobs.extend(delta.logprobs)
        for piece in delta.tool_calls:
            self.calls.setdefault(piece.index, Called(piece.id or "", piece.name or "")).add(piece)
        self.route = delta.route or self.route
        if delta.finish_reason is not None:
            self._last = delta

    @property
    def text(self) -> str:
        return "".join(self._texts)

    @property
    def answer(self) -> str:
        """The text without what stands above a mark: of two answers, the one that counts."""
        above = self.route.switched if self.route else None
        return self.text[above.starts_at :] if above else self.text

    @property
    def last(self) -> Delta:
        """Raises UpstreamFailed if it has not come."""
        if self._last is None:
            raise UpstreamFailed("the answer ended before its last token")
        return self._last

    @property
    def reason(self) -> FinishReason:
        return self.last.finish_reason or "stop"

    @property
    def usage(self) -> Usage:
        return self.last.usage or Usage(prompt_tokens=0, completion_tokens=0)

    @property
    def whole_calls(self) -> list[Called]:
        """Those that can be given as a whole: what the token limit cut short is left out, as the reason says."""
        calls = list(self.calls.values())
        return calls[:-1] if self.reason == "length" and calls and not _complete(calls[-1]) else calls

    @property
    def sound_calls(self) -> list[Called]:
        """Those whose arguments are an object."""
        return [call for call in self.calls.values() if _complete(call)]


def _complete(call: Called) -> bool:
    try:
        call.object()
    except UpstreamFailed:
        return False
    return True
