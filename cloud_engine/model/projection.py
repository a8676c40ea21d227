"""Matrix times weight, in whatever order of memory is best: see `cloud_engine.model.packing`."""

import torch.nn.functional as F
from torch import Tensor

from cloud_engine.engine.config import Quantization
from cloud_engine.model.packing import Packed, pack


class Projection:
    """`weight` [outputs, inputs], perhaps `bias` [outputs]. Call it with [rows, inputs]. An `exact` one is never
    quantized."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, exact: bool = False) -> None:
        self.weight, self.bias, self.exact = weight, bias, exact
        self._packed: Packed | None = None
        self.rows: int | None = None
        """The number of rows that every product has, if that is fixed: fewer are padded."""

    def __call__(self, x: Tensor) -> Tensor:
        if self.rows is not None and 0 < len(x) < self.rows:
            return self._product(F.pad(x, (0, 0, 0, self.rows - len(x))))[: len(x)]
        return self._product(x)

    def _product(self, x: Tensor) -> Tensor:
        if self._packed is None or not len(x):
            return F.linear(x, self.weight, self.bias)
        return self._packed(x)

    def pack(self, quantization: Quantization = "none", *, keep: bool = False) -> None:
        """Reorder the weight; unless it is to be kept (an embedding needs it too), give up its memory."""
        if self._packed is None:
            self._packed = pack(self.weight, self.bias, "none" if self.exact else quantization)
            if self._packed is not None and not keep:
                # Its shape stays, for inputs of no rows: one element seen everywhere.
                self.weight = self.weight.new_zeros(1).expand(self.weight.shape)
