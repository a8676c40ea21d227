"""Checking drafted tokens: one step computes them all, and the right ones are kept.

A draft's rows are sampled as plain decoding would sample them, from logits and with the noise of their positions; the
draft is right as far as it says the same. A token x that was guessed without looking at the noise is then kept with its
probability p(x), and what stands in its place otherwise follows p without x: the rule of speculative decoding (see
arXiv 2211.17192) for a draft that is certain of itself. So a seed gives the same text with drafts and without. If the
drafter says what distribution q it drew from, more is kept, with probability p(x) / q(x): see `sampler`.

A drafter outside (the edge) sends each draft with the length of the sequence that it continues. A message that comes
twice is answered twice and computed once; one that comes late changes nothing.
"""

import math
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as List

from cloud_engine.engine.draw import Odds
from cloud_engine.engine.sampler import Sampled
from cloud_engine.engine.scheduler import Scheduler
from cloud_engine.engine.sequence import Round, Sequence, State, Verified
from cloud_engine.engine.work import Work
from shared.errors import BadRequest, StaleDraft, UnknownRequest

MAX_DRAFT = 32
"""Tokens of one draft."""
MAX_ENDED = 256
"""Requests that have ended and whose last draft is still remembered."""
TOLERANCE = 1e-3
"""How far a distribution's sum may be from 1."""


class Verifier:
    """The drafts that come from outside, each for a sequence that was added as `drafted`."""

    def __init__(self, scheduler: Scheduler, vocab_size: int) -> None:
        self._scheduler, self._vocab_size = scheduler, vocab_size
        self._ended: OrderedDict[str, Sequence] = OrderedDict()

    def verify(
        self, request: str, base_length: int, draft_ids: List[int], draft_probs: List[Mapping[int, float]] | None
    ) -> Verified | None:
        """Let the next step check the tokens `draft_ids` (MAX_DRAFT at most, perhaps none), which continue the first
        `base_length` tokens of a drafted sequence, and give one more. None until that is done; then the same message
        gets the result, as often as it comes. What finds no room in the step counts as rejected.

        `draft_probs` are the distributions that the tokens were drawn from, each with the tokens it may give: after the
        request's own temperature, top-k, top-p and min-p, whole, summing to 1. Without them a token is kept with the
        probability that the model gives it. A draft for a prompt that is not computed yet is ignored.

        Raises UnknownRequest, BadRequest, and StaleDraft for a sequence of another length than `base_length`.
        """
        sequence = self._scheduler.live.get(request) or self._ended.get(request)
        if sequence is None or not sequence.drafted:
            raise UnknownRequest("no drafted request of this id is here", param="request")
        new = Round(base_length, *self._checked(draft_ids, draft_probs))
        last = sequence.round
        if last is not None and (new.length, new.draft, new.odds) == (last.length, last.draft, last.odds):
            return last.result
        if base_length != sequence.num_tokens or sequence.ending is not None:
            raise StaleDraft(
                f"the request has {sequence.num_tokens} tokens, not {base_length}"
                if sequence.ending is None
                else "the request has ended",
                param="base_length",
            )
        if not sequence.num_output:
            return Verified(0, (), sequence.num_tokens, None)
        if sequence.state is not State.HELD:
            raise StaleDraft("another draft for this length is being checked", param="base_length")
        sequence.round = new
        self._scheduler.resume(sequence, new.draft, new.odds)
        return None

    def settled(self, work: Iterable[Work], taken: Iterable[int]) -> None:
        """`taken` says how many tokens came of each work, the last of them perhaps none but an error."""
        for item, count in zip(work, taken, strict=True):
            sequence = item.sequence
            if not sequence.drafted or not count:
                continue
            tokens = sequence.tokens[sequence.num_tokens - count + (sequence.ending == "error") :]
            if sequence.round is not None and sequence.round.result is None:
                right = sum(one == other for one, other in zip(item.draft, tokens, strict=False))
                sequence.round.result = Verified(right, tuple(tokens), sequence.num_tokens, sequence.ending)
            if sequence.ending is not None:
                self._remember(sequence)

    def _remember(self, sequence: Sequence) -> None:
        self._ended[sequence.id] = sequence
        self._ended.move_to_end(sequence.id)
        if len(self._ended) > MAX_ENDED:
            self._ended.popitem(last=False)

    def _checked(
        self, ids: List[int], probs: List[Mapping[int, float]] | None
    ) -> tuple[tuple[int, ...], tuple[Odds, ...]]:
        if len(ids) > MAX_DRAFT:
            raise BadRequest(f"a draft has {MAX_DRAFT} tokens at most", param="draft_ids")
        if not all(type(token) is int and 0 <= token < self._vocab_size for token in ids):
            raise BadRequest(f"a token id is not a number from 0 to {self._vocab_size - 1}", param="draft_ids")
        if probs is None:
            return tuple(ids), ()
        if len(probs) != len(ids):
            raise BadRequest("there must be a distribution for each token", param="draft_probs")
        return tuple(ids), tuple(self._odds(token, odds) for token, odds in zip(ids, probs, strict=True))

    def _odds(self, token: int, odds: Mapping[int, float]) -> Odds:
        if not all(type(key) is int and 0 <= key < self._vocab_size for key in odds):
            raise BadRequest("a distribution has a token id outside the vocabulary", param="draft_probs")
        total = math.fsum(odds.values()) if all(0 <= value <= 1 for value in odds.values()) else math.nan
        if not abs(total - 1) <= TOLERANCE:
            raise BadRequest("a distribution's probabilities must be from 0 to 1 and sum to 1", param="draft_probs")
        if not odds.get(token):
            raise BadRequest("a drafted token has no probability in its distribution", param="draft_probs")
        return tuple((key, value / total) for key, value in sorted(odds.items()))


def kept(draft: tuple[int, ...], sampled: list[Sampled]) -> list[Sampled]:
    """Up to the first token that the draft did not foresee."""
    right = 0
    while right < len(draft) and sampled[right].token == draft[right]:
        right += 1
    return sampled[: right + 1]
