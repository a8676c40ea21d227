"""The text side of one local answer: sampled tokens in, deltas out. No thread, no loop, no model."""

import codecs
from collections.abc import Set
from typing import Literal

from edge_agent.backends.sampling import Sampled
from shared.schemas import Delta, FinishReason, Sampling, TokenLogprob, ToolPiece, TopLogprob, Usage
from shared.stops import StopScanner
from shared.tool_formats import ToolReader

Ending = Literal["stop", "length"]


class TextStream:
    """Concatenated, the texts of its deltas are the decoded output, cut before the first stop string.

    `pieces` are the tokens' bytes, of which a character may need several; `ends` the tokens that end an answer.
    """

    def __init__(
        self,
        pieces: list[bytes],
        ends: Set[int],
        sampling: Sampling,
        *,
        prompt_tokens: int,
        max_tokens: int,
        tools: ToolReader | None = None,
    ) -> None:
        self._tools = tools
        self.cached_tokens = 0
        self._pieces = pieces
        self._ends = frozenset(sampling.stop_token_ids).union(() if sampling.ignore_eos else ends)
        self._hidden = self._ends | ends
        self._characters = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._scanner = StopScanner(sampling.stop)
        self._prompt_tokens = prompt_tokens
        self._max_tokens = max_tokens
        self._pending = self._total = 0
        self._logprobs: list[TokenLogprob] = []

    @property
    def left(self) -> int:
        """How many tokens it can still take."""
        return self._max_tokens - self._total

    def push(self, sampled: Sampled) -> Delta | None:
        """Take one token. None while all its text is held back; the delta that ends the answer has the usage."""
        self._total += 1
        self._pending += 1
        text = ""
        ending: Ending | None = "length" if self._total >= self._max_tokens else None
        if sampled.last or sampled.token in self._ends:
            ending = "stop"
        if sampled.token not in (self._hidden if sampled.last else self._ends):
            text = self._scanner.push(self._characters.decode(self._pieces[sampled.token]))
            if sampled.logprob is not None:
                self._logprobs.append(self._logprob(sampled, sampled.logprob))
        text, calls = self._called(text)
        if self._scanner.hit is not None or (self._tools is not None and self._tools.done):
            ending = "stop"
        if ending is None:
            return self._release(text, calls) if text or calls else None
        rest, more = self._called(
            self._scanner.push(self._characters.decode(b"", final=True)) + self._scanner.flush(), last=True
        )
        called = ending == "stop" and self._tools is not None and self._tools.calls
        return self._release(text + rest, calls + more, "tool_calls" if called else ending)

    def _called(self, text: str, *, last: bool = False) -> tuple[str, tuple[ToolPiece, ...]]:
        """What of the text is said, and what is called."""
        if self._tools is None:
            return text, ()
        said, calls = self._tools.push(text)
        if last:
            rest, more = self._tools.flush()
            return said + rest, calls + more
        return said, calls

    def _release(self, text: str, calls: tuple[ToolPiece, ...], reason: FinishReason | None = None) -> Delta:
        tokens, logprobs = self._pending, tuple(self._logprobs)
        self._pending, self._logprobs = 0, []
        usage = None
        if reason is not None:
            usage = Usage(
                prompt_tokens=self._prompt_tokens, completion_tokens=self._total, cached_tokens=self.cached_tokens
            )
        return Delta(
            text=text,
            tokens=tokens,
            logprobs=logprobs,
            tool_calls=calls,
            finish_reason=reason,
            usage=usage,
            stop=None if reason is None else self._scanner.hit,
        )

    def _logprob(self, sampled: Sampled, logprob: float) -> TokenLogprob:
        top = tuple(TopLogprob(*self._spelled(token, value)) for token, value in sampled.top)
        return TokenLogprob(*self._spelled(sampled.token, logprob), top)

    def _spelled(self, token: int, logprob: float) -> tuple[str, float, tuple[int, ...]]:
        piece = self._pieces[token]
        return piece.decode("utf-8", errors="replace"), logprob, tuple(piece)
