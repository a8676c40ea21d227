"""The text side of one request: sampled tokens in, deltas out. Pure: no thread, no loop, no tensor."""

from typing import Literal

from cloud_engine.engine.sampler import Sampled
from cloud_engine.engine.sequence import Ending
from cloud_engine.model.tokenizer import Detokenizer, Tokenizer
from shared.answer_text import AnswerText, logprob_of
from shared.schemas import Delta, Sampling, TokenLogprob
from shared.tool_formats import ToolReader


class TextStream:
    """Concatenated, the texts of its deltas are the decoded output, cut before the first stop string."""

    def __init__(
        self, tokenizer: Tokenizer, sampling: Sampling, prompt_tokens: int, tools: ToolReader | None = None
    ) -> None:
        """`tools` finds calls in the text, if there are tools to call."""
        self._tokenizer = tokenizer
        self._detokenizer = Detokenizer(tokenizer, tokenizer.markers if tools is not None else None)
        self._hidden = {*sampling.stop_token_ids, *(() if sampling.ignore_eos else tokenizer.stop_ids)}
        self._answer = AnswerText(sampling.stop, prompt_tokens, tools)

    @property
    def stopped(self) -> bool:
        """See `AnswerText`."""
        return self._answer.stopped

    def push(self, sampled: Sampled, ending: Ending | None, cached_tokens: int) -> Delta | None:
        """Take one token. None while all its text is held back; the delta that ends the stream has the usage."""
        text, logprob = "", None
        if sampled.token not in self._hidden:
            text, logprob = self._detokenizer.push(sampled.token), self._logprob(sampled)
        reason: Literal["stop", "length"] | None = ending if ending in (None, "stop") else "length"
        return self._answer.push(text, logprob, reason, rest=self._detokenizer.flush, cached_tokens=cached_tokens)

    def _logprob(self, sampled: Sampled) -> TokenLogprob | None:
        if sampled.logprob is None:
            return None
        spell = self._tokenizer.token_bytes
        return logprob_of(spell(sampled.token), sampled.logprob, ((spell(token), at) for token, at in sampled.top))
