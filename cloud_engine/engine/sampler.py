"""The next token of each sequence, from its row of logits.

Order: penalties, biases, what may not be drawn at all, temperature, top-k, top-p, min-p, draw. Greedy is the argmax of
the logits before the temperature (of equal ones the lowest id), not a small temperature. A draw depends on the
sequence's seed and the token's position alone, never on the batch around it or on what was drawn before: a seed gives
the same text when batches change or work is redone.
"""

import math
from collections.abc import Sequence as List
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cloud_engine.engine.draw import Draw, has_penalty
from cloud_engine.model.rowwise import greatest
from cloud_engine.staging import stage
from shared.noise import uniform
from shared.schemas import Sampling

FAILED = -1
"""Token of a row whose best logit is not finite: nothing sensible can be drawn, and nothing else should suffer."""


KEEPING = 1 << 63
"""Added to a position, it gives a second random number: the one by which a guess is kept."""

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
    return read(choose(logits, draws)[1], draws)


def choose(logits: Tensor, draws: List[Draw]) -> tuple[Tensor, Tensor]:
    """The tokens [n], and the report [n, w] (float64) that `read` takes: all that the host wants to know in one tensor.
    Nothing here waits for the device: all rows at once, and what depends on settings is decided on the host."""
    if any(map(_changes, draws)):
        logits = _permitted(_biased(_penalised(logits.float(), draws), draws), draws)
    best, tokens = greatest(logits)
    drawn = [index for index, draw in enumerate(draws) if draw.sampling.temperature > 0]
    if len(drawn) == len(draws) > 0:
        tokens = _draw(logits - best[:, None], draws)
    elif drawn:
        rows = _rows(drawn, logits)
        relative = logits.index_select(0, rows) - best.index_select(0, rows)[:, None]
        tokens.index_copy_(0, rows, _draw(relative, [draws[index] for index in drawn]))
    tokens = torch.where(best.isfinite(), tokens, FAILED)
    return tokens, torch.cat([tokens[:, None].double(), *_logprobs(logits, tokens, draws)], dim=1)


def _changes(draw: Draw) -> bool:
    """Whether it sees other logits than the model's."""
    changed = draw.sampling.logit_bias or draw.barred or draw.mask is not None
    return bool(changed) or has_penalty(draw.sampling)


def read(report: Tensor, draws: List[Draw]) -> list[Sampled]:
    """The report of `choose`, on the host."""
    return [_sampled(row, draw.sampling.logprobs) for row, draw in zip(report.tolist(), draws, strict=True)]


def _sampled(row: List[float], logprobs: int | None) -> Sampled:
    """A row is the token, its log probability, k likeliest tokens and their log probabilities; or the token alone."""
    token, likeliest = int(row[0]), (len(row) - 2) // 2
    if logprobs is None or token == FAILED:
        return Sampled(token)
    ids, values = row[2 : 2 + likeliest], row[2 + likeliest :]
    return Sampled(token, row[1], tuple((int(one), value) for one, value in zip(ids, values, strict=True))[:logprobs])


def _logprobs(logits: Tensor, tokens: Tensor, draws: List[Draw]) -> list[Tensor]:
    """Columns of the report [n, 1 + 2k], if anybody asked for log probabilities; rows of the others are zero."""
    wanted = {index: draw.sampling.logprobs for index, draw in enumerate(draws) if draw.sampling.logprobs is not None}
    if not wanted:
        return []
    rows = _rows(list(wanted), logits)
    logprobs = logits.index_select(0, rows).float().log_softmax(dim=-1)
    own = logprobs.gather(1, tokens.index_select(0, rows)[:, None].clamp(min=0))
    values, ids = logprobs.topk(min(max(wanted.values()), logits.shape[1]), dim=-1)
    found = torch.cat([own.double(), ids.double(), values.double()], dim=1)
    return [found.new_zeros(len(draws), found.shape[1]).index_copy_(0, rows, found)]


def _penalised(logits: Tensor, draws: List[Draw]) -> Tensor:
    """Repetition counts prompt and output and scales; presence and frequency count output and subtract."""
    index = [index for index, draw in enumerate(draws) if has_penalty(draw.sampling)]
    if not index:
        return logits
    penalised = [draws[row] for row in index]
    settings = [draw.sampling for draw in penalised]
    rows = _rows(index, logits)
    values = logits.index_select(0, rows)
    repetition = [item.repetition_penalty for item in settings]
    scale = torch.where(values > 0, _column([1 / value for value in repetition], values), _column(repetition, values))
    seen = _counts([draw.seen for draw in penalised], values) > 0
    values = torch.where(seen, values * scale, values)
    counts = _counts([draw.output for draw in penalised], values)
    presence = _column([item.presence_penalty for item in settings], values) * (counts > 0)
    frequency = _column([item.frequency_penalty for item in settings], values) * counts
    return logits.index_copy(0, rows, values - (presence + frequency))


def _counts(tokens: List[List[int]], like: Tensor) -> Tensor:
    """How often each token of the vocabulary is in each list, as floats of the shape of `like`."""
    longest = max(map(len, tokens))
    padded = [[*row, *[0] * (longest - len(row))] for row in tokens]
    present = torch.arange(longest, device=like.device) < _column([len(row) for row in tokens], like)
    places = stage(padded, torch.int64, like.device).view(len(tokens), longest)
    return torch.zeros_like(like).scatter_add_(1, places, present.to(like.dtype))


def _biased(logits: Tensor, draws: List[Draw]) -> Tensor:
    """With each draw's `logit_bias` added, and minus infinity to what it bars."""
    changes = [(row, *item) for row, draw in enumerate(draws) for item in draw.sampling.logit_bias.items()]
    changes += [(row, token, -math.inf) for row, draw in enumerate(draws) for token in draw.barred]
    if not changes:
        return logits
    rows, tokens, values = zip(*changes, strict=True)
    places = tuple(stage(list(part), torch.int64, logits.device) for part in (rows, tokens))
    return logits.index_put(places, stage(list(values), logits.dtype, logits.device), accumulate=True)


def _permitted(logits: Tensor, draws: List[Draw]) -> Tensor:
    """Minus infinity where a mask has no bit, or ends: a vocabulary may be padded."""
    masks = {row: draw.mask for row, draw in enumerate(draws) if draw.mask is not None}
    if not masks:
        return logits
    whole = torch.frombuffer(bytearray(b"".join(masks.values())), dtype=torch.uint8)
    packed = whole.view(len(masks), -1).to(logits.device, non_blocking=True)
    bits = (packed[:, :, None] >> torch.arange(8, dtype=torch.uint8, device=logits.device)) & 1
    allowed = bits.flatten(1).bool()[:, : logits.shape[-1]]
    allowed = F.pad(allowed, (0, logits.shape[-1] - allowed.shape[-1]))
    rows = _rows(list(masks), logits)
    return logits.index_copy(0, rows, logits.index_select(0, rows).masked_fill(~allowed, -math.inf))


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
    weights = logits.softmax(dim=-1).double()
    if any(draw.guess for draw in draws):
        weights = torch.stack([_given_guess(row, draw) for row, draw in zip(weights, draws, strict=True)])
    cumulative = weights.cumsum(dim=-1)
    points = stage([[uniform(draw.seed, draw.position)] for draw in draws], torch.float64, logits.device)
    # Right of the point is the first token whose own probability is not zero; u < 1 keeps it inside.
    return torch.searchsorted(cumulative, points * cumulative[:, -1:], right=True)[:, 0]


def _given_guess(p: Tensor, draw: Draw) -> Tensor:
    """Weights to draw from for a guess x that was drawn from q: x alone with probability p(x) / q(x), else what p has
    over q. Both together give p (speculative sampling, see arXiv 2211.17192)."""
    if draw.guess is None:
        return p
    token, odds = draw.guess
    ids, values = zip(*odds, strict=True)
    q = torch.zeros_like(p).scatter_(0, _rows(ids, p), stage(values, p.dtype, p.device))
    rest = (p - q).clamp_(min=0)
    rest = torch.where(rest.sum() > 0, rest, p)  # q is p but for rounding
    keep = uniform(draw.seed, draw.position + KEEPING) * q[token] < p[token]
    return torch.where(keep, torch.zeros_like(p).index_fill_(0, _rows([token], p), 1), rest)


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
    return stage(values, torch.float32, like.device)[:, None]


def _rows(index: List[int], like: Tensor) -> Tensor:
    return stage(index, torch.int64, like.device)
