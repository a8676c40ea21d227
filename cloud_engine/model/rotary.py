"""Rotary positions: which angle each pair of a head's numbers is turned by at each position."""

import math

import torch
from torch import Tensor

from cloud_engine.model.config import Rope

Rotation = tuple[Tensor, Tensor]
"""Cosines and sines of the step's positions, each [T, 1, D/2]."""


def rotary_table(rope: Rope, head_dim: int, length: int) -> Rotation:
    """Cosines and sines of every position below `length`, each [length, 1, D/2], in float32."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    frequencies = _scaled(1.0 / rope.theta**exponents, rope)
    angles = torch.outer(torch.arange(length, dtype=torch.float32), frequencies)[:, None]
    return angles.cos(), angles.sin()


def _scaled(frequencies: Tensor, rope: Rope) -> Tensor:
    """Apply the model's rotary scaling. `llama3` (as released with Llama 3.1) stretches wavelengths beyond the original
    context by `factor`, keeps short ones and interpolates between."""
    if rope.factors:
        frequencies = frequencies / torch.tensor(rope.factors)
    scaling = rope.scaling
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    turns = scaling.original_length * frequencies / (2 * math.pi)
    span = scaling.high_freq_factor - scaling.low_freq_factor
    kept = ((turns - scaling.low_freq_factor) / span).clamp(0, 1)
    return kept * frequencies + (1 - kept) * frequencies / scaling.factor
