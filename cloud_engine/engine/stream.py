"""The text side of one request: sampled tokens in, deltas out. Pure: no thread, no loop, no tensor."""

from cloud_engine.engine.sampler import Sampled
from cloud_engine.engine.sequence import Ending
from cloud_engine.model.tokenizer import Detokenizer, Tokenizer
from shared.schemas import Delta, FinishReason, Sampling, TokenLogprob, ToolPiece, TopLogprob, Usage
from shared.stops import StopScanner
from shared.tool_formats import ToolReader


class TextStream:
    """Concatenated, the texts of its deltas are the decoded output, cut before the first stop string."""

    def __init__(
        self, tokenizer: Tokenizer, sampling: Sampling, prompt_tokens: int, tools: ToolReader | None = None
    ) -> None:
        """`tools` finds calls in the text, if there are tools to call."""
        self._tokenizer, self._tools = tokenizer, tools
        self._detokenizer = Detokenizer(tokenizer, tokenizer.markers if tools is not None else None)
        self._scanner = StopScanner(sampling.stop)
        self._hidden = {*sampling.stop_token_ids, *(() if sampling.ignore_eos else tokenizer.stop_ids)}
        self._prompt_tokens = prompt_tokens
        self._pending = self._total = 0
        self._logprobs: list[TokenLogprob] = []

    @property
    def stopped(self) -> bool:
        """A stop string was found, or the one call that may be made is complete: whatever the model would go on to say,
        it is not wanted."""
        return self._scanner.hit is not None or (self._tools is not None and self._tools.done)

    def push(self, sampled: Sampled, ending: Ending | None, cached_tokens: int) -> Delta | None:
        """Take one token. None while all its text is held back; the delta that ends the stream has the usage."""
        self._total += 1
        self._pending += 1
        text = ""
        if sampled.token not in self._hidden:
            text = self._scanner.push(self._detokenizer.push(sampled.token))
            if sampled.logprob is not None:
                self._logprobs.append(self._logprob(sampled, sampled.logprob))
        text, calls = self._called(text)
        if ending is None and not self.stopped:
            return self._release(text, calls) if text or calls else None
        rest, more = self._called(self._scanner.push(self._detokenizer.flush()) + self._scanner.flush(), last=True)
        reason: FinishReason = "stop" if self.stopped or ending == "stop" else "length"
        if reason == "stop" and self._tools is not None and self._tools.calls:
            reason = "tool_calls"
        return self._release(text + rest, calls + more, reason, cached_tokens)

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
        self, text: str, calls: tuple[ToolPiece, ...], reason: FinishReason | None = None, cached_tokens: int = 0
    ) -> Delta:
        tokens, logprobs = self._pending, tuple(self._logprobs)
        self._pending, self._logprobs = 0, []
        usage = None
        if reason is not None:
            usage = Usage(prompt_tokens=self._prompt_tokens, completion_tokens=self._total, cached_tokens=cached_tokens)
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
        spelled = self._tokenizer.token_bytes(sampled.token)
        top = []
        for token, value in sampled.top:
            spelling = self._tokenizer.token_bytes(token)
            top.append(TopLogprob(spelling.decode(errors="replace"), value, tuple(spelling)))
        return TokenLogprob(spelled.decode(errors="replace"), logprob, tuple(spelled), tuple(top))
