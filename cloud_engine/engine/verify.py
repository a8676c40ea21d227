"""Checking drafted tokens: one step computes them all, and the right ones are kept.

A draft's rows are sampled as plain decoding would sample them, from logits and with the noise of their positions; the
draft is right as far as it says the same. A token x that was guessed without looking at the noise is then kept with its
probability p(x), and what stands in its place otherwise follows p without x: the rule of speculative decoding (see
arXiv 2211.17192) for a draft that is certain of itself. So a seed gives the same text with drafts and without.
"""

from cloud_engine.engine.sampler import Sampled


def kept(draft: tuple[int, ...], sampled: list[Sampled]) -> list[Sampled]:
    """Up to the first token that the draft did not foresee."""
    right = 0
    while right < len(draft) and sampled[right].token == draft[right]:
        right += 1
    return sampled[: right + 1]
