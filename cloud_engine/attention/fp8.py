"""Keys and values kept as 8-bit floats (e4m3), half the memory of bfloat16.

Each layer's keys and values are divided by a scale of theirs before they are stored. Scores are linear in the keys, and
results in the values, so the scales go into the queries and the results: no kernel needs to know of them. They are
powers of two, by which every dtype multiplies exactly; a finer scale would gain nothing, since the relative step of a
float is the same at every magnitude.
"""

import math

from torch import Tensor

from cloud_engine.attention.batch import FP8_MAX, Attention, AttentionBatch

HEADROOM = 2.0
"""How much larger than any seen in calibration a number may be before it is clipped. It costs one of the 17 powers of
two that e4m3 spans."""


class Scaled:
    """Any attention, over an FP8 cache whose `batch.scales` it applies."""

    def __init__(self, attend: Attention) -> None:
        self.attend = attend

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, cache: Tensor, batch: AttentionBatch, /) -> Tensor:
        keys, values = batch.scales
        return self.attend(q * keys, k / keys, v / values, cache, batch).mul_(values)


def scale_for(largest: float) -> float:
    """The scale under which numbers up to `largest`, and `HEADROOM` beyond, can be stored. Raises ValueError if it is
    not finite."""
    if not math.isfinite(largest):
        raise ValueError(f"the largest key or value is {largest}")
    return 2.0 ** math.ceil(math.log2(largest * HEADROOM / FP8_MAX)) if largest > 0 else 1.0
