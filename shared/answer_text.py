"""What becomes of an answer's text once it is decoded, at either end: stop strings, calls of tools, deltas, usage."""

from collections.abc import Callable, Iterable
from typing import Literal

from shared.schemas import Delta, FinishReason, TokenLogprob, ToolPiece, TopLogprob, Usage
from shared.stops import StopScanner
from shared.tool_formats import ToolReader

Ending = Literal["stop", "length"]


class AnswerText:
    """One token's text after another in, deltas out; their texts are the answer's, cut before the first stop string.

    `tools` finds calls in the text, if there are tools to call.
    """

    def __init__(self, stop: tuple[str, ...], prompt_tokens: int, tools: ToolReader | None) -> None:
        self.total = 0
        """Tokens taken so far."""
        self._prompt_tokens, self._tools = prompt_tokens, tools
        self._scanner = StopScanner(stop)
        self._pending = 0
        self._logprobs: list[TokenLogprob] = []

    @property
    def stopped(self) -> bool:
        """A stop string was found, or the one call that may be made is complete: whatever the model would go on to say,
        it is not wanted."""
        return self._scanner.hit is not None or (self._tools is not None and self._tools.done)

    def push(
        self,
        text: str,
        logprob: TokenLogprob | None,
        ending: Ending | None,
        *,
        rest: Callable[[], str],
        cached_tokens: int,
    ) -> Delta | None:
        """Take one token's text. None while all text is held back; the delta that ends the answer has the usage. `rest`
        gives what the decoder still holds, once no more can come."""
        self.total += 1
        self._pending += 1
        if logprob is not None:
            self._logprobs.append(logprob)
        said, calls = self._called(self._scanner.push(text))
        if ending is None and not self.stopped:
            return self._release(said, calls) if said or calls else None
        more, others = self._called(self._scanner.push(rest()) + self._scanner.flush(), last=True)
        reason: FinishReason = "stop" if self.stopped or ending == "stop" else "length"
        if reason == "stop" and self._tools is not None and self._tools.calls:
            reason = "tool_calls"
        usage = Usage(prompt_tokens=self._prompt_tokens, completion_tokens=self.total, cached_tokens=cached_tokens)
        return self._release(said + more, calls + others, reason, usage)

    def _called(self, text: str, *, last: bool = False) -> tuple[str, tuple[ToolPiece, ...]]:
        """What of the text is said, and what is called."""
        if self._tools is None:
            return text, ()
        said, calls = self._tools.push(text)
        if last:
            rest, more = self._tools.flush()
            return said + rest, calls + more
        return said, calls

    def _release(
        self,
        text: str,
        calls: tuple[ToolPiece, ...],
        reason: FinishReason | None = None,
        usage: Usage | None = None,
    ) -> Delta:
        tokens, logprobs = self._pending, tuple(self._logprobs)
        self._pending, self._logprobs = 0, []
        return Delta(
            text=text,
            tokens=tokens,
            logprobs=logprobs,
            tool_calls=calls,
            finish_reason=reason,
            usage=usage,
            stop=None if reason is None else self._scanner.hit,
        )


def logprob_of(piece: bytes, logprob: float, top: Iterable[tuple[bytes, float]]) -> TokenLogprob:
    """A token by its bytes, with its log probability and the likeliest tokens' at its place."""
    likeliest = tuple(TopLogprob(_spelled(other), value, tuple(other)) for other, value in top)
    return TokenLogprob(_spelled(piece), logprob, tuple(piece), likeliest)


def _spelled(piece: bytes) -> str:
    return piece.decode("utf-8", errors="replace")
