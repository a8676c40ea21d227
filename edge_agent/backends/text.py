"""The text side of one local answer: sampled tokens in, deltas out. No thread, no loop, no model."""

import codecs
from collections.abc import Set
from functools import partial

from edge_agent.backends.sampling import Sampled
from shared.answer_text import AnswerText, Ending, logprob_of
from shared.schemas import Delta, Sampling, TokenLogprob
from shared.tool_formats import ToolReader


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
        self.cached_tokens = 0
        self._pieces = pieces
        self._ends = frozenset(sampling.stop_token_ids).union(() if sampling.ignore_eos else ends)
        self._hidden = self._ends | ends
        self._characters = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._max_tokens = max_tokens
        self._answer = AnswerText(sampling.stop, prompt_tokens, tools)

    @property
    def left(self) -> int:
        """How many tokens it can still take."""
        return self._max_tokens - self._answer.total

    def push(self, sampled: Sampled) -> Delta | None:
        """Take one token. None while all its text is held back; the delta that ends the answer has the usage."""
        ending: Ending | None = "length" if self.left == 1 else None
        if sampled.last or sampled.token in self._ends:
            ending = "stop"
        text, logprob = "", None
        if sampled.token not in (self._hidden if sampled.last else self._ends):
            text, logprob = self._characters.decode(self._pieces[sampled.token]), self._logprob(sampled)
        rest = partial(self._characters.decode, b"", final=True)
        return self._answer.push(text, logprob, ending, rest=rest, cached_tokens=self.cached_tokens)

    def _logprob(self, sampled: Sampled) -> TokenLogprob | None:
        if sampled.logprob is None:
            return None
        pieces = self._pieces
        return logprob_of(pieces[sampled.token], sampled.logprob, ((pieces[token], at) for token, at in sampled.top))
