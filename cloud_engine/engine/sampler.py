"""The next token of each sequence, from its row of logits.

Order: penalties, temperature, top-k, top-p, min-p, draw. Greedy is the argmax of the penalised logits (of equal ones
the lowest id), not a small temperature. A draw depends on the sequence's seed and the token's position alone, never on
the batch around it or on what was drawn before: a seed gives the same text when batches change or work is redone.
"""

import hashlib
import math
import struct
from collections.abc import Sequence as List
from dataclasses import dataclass

import torch
from torch import Tensor

from cloud_engine.engine.draw import Draw, has_penalty
from shared.schemas import Sampling

FAILED = -1
"""Token of a row whose best logit is not finite: nothing sensible can be drawn, and nothing else should suffer."""


COLDEST = 1e-30
"""The lowest temperature that float32 can divide by."""


@dataclass(frozen=True, slots=True)
class Sampled:
    """A token, and if asked for its log probability and the likeliest tokens (id, log probability), best first."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


def sample(logits: Tensor, draws: List[Draw]) -> list[Sampled]:
    """One token for each row of `logits` [n, vocab], which is not changed."""
    logits = _penalised(logits.float(), draws)
    best, tokens = logits.max(dim=-1)
    drawn = [index for index, draw in enumerate(draws) if draw.sampling.temperature > 0]
    if drawn:
        rows = logits[drawn] - best[drawn, None]
        tokens[drawn] = _draw(rows, [draws[index] for index in drawn])
    chosen = torch.where(best.isfinite(), tokens, FAILED).tolist()
    sampled = [Sampled(token) for token in chosen]
    for index, draw in enumerate(draws):
        if draw.sampling.logprobs is not None and chosen[index] != FAILED:
            sampled[index] = _with_logprobs(logits[index], chosen[index], draw.sampling.logprobs)
    return sampled


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) with 48 random bits, fixed by its arguments."""
    digest = hashlib.blake2b(struct.pack("<qQ", seed, position), digest_size=6).digest()
    return int.from_bytes(digest, "little") / (1 << 48)


def _penalised(logits: Tensor, draws: List[Draw]) -> Tensor:
    rows = [index for index, draw in enumerate(draws) if has_penalty(draw.sampling)]
    if rows:
        logits = logits.clone()
    for index in rows:
        _penalise(logits[index], draws[index])
    return logits


def _penalise(row: Tensor, draw: Draw) -> None:
    """In place. Repetition counts prompt and output and scales; presence and frequency count output and subtract."""
    sampling, output = draw.sampling, draw.output
    seen = row.new_tensor(draw.seen, dtype=torch.int64)
    scale = torch.where(row[seen] > 0, 1 / sampling.repetition_penalty, sampling.repetition_penalty)
    row[seen] = row[seen] * scale
    if output:
        counts = torch.bincount(row.new_tensor(output, dtype=torch.int64), minlength=row.shape[0])
        row -= sampling.presence_penalty * (counts > 0) + sampling.frequency_penalty * counts


def _draw(logits: Tensor, draws: List[Draw]) -> Tensor:
    """Rows relative to their best logit, so that no temperature overflows. Inverse of the cumulative distribution, in
    float64 and in order of token id, at the sequence's own uniform number."""
    settings = [draw.sampling for draw in draws]
    logits = logits / _column([max(item.temperature, COLDEST) for item in settings], logits)
    if any(item.top_k or item.top_p < 1 for item in settings):
        logits = _top_k_top_p(logits, settings)
    if any(item.min_p for item in settings):
        floors = [math.log(item.min_p) if item.min_p else -math.inf for item in settings]
        logits = logits.masked_fill(logits < _column(floors, logits), -math.inf)
    cumulative = logits.softmax(dim=-1).double().cumsum(dim=-1)
    points = torch.tensor([[uniform(draw.seed, draw.position)] for draw in draws], dtype=torch.float64)
    # Right of the point is the first token whose own probability is not zero; u < 1 keeps it inside.
    return torch.searchsorted(cumulative, points.to(logits.device) * cumulative[:, -1:], right=True)[:, 0]


def _top_k_top_p(logits: Tensor, settings: List[Sampling]) -> Tensor:
    """Keep the k likeliest, then of those the fewest whose probability reaches p; the likeliest always stays."""
    vocabulary = logits.shape[-1]
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    limits = _column([item.top_k or vocabulary for item in settings], logits)
    beyond = torch.arange(vocabulary, device=logits.device) >= limits
    ordered = ordered.masked_fill(beyond, -math.inf)
    probabilities = ordered.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    top_p = _column([item.top_p for item in settings], logits)
    ordered = ordered.masked_fill((before >= top_p) & (top_p < 1), -math.inf)
    return torch.empty_like(logits).scatter_(-1, order, ordered)


def _column(values: List[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=like.device)[:, None]


def _with_logprobs(row: Tensor, token: int, count: int) -> Sampled:
    logprobs = row.log_softmax(dim=-1)
    values, ids = logprobs.topk(count)
    return Sampled(token, float(logprobs[token]), tuple(zip(ids.tolist(), values.tolist(), strict=True)))
