"""Matrix times weight, in whatever order of memory is best: see `cloud_engine.model.packing`."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from cloud_engine.engine.config import Quantization
from cloud_engine.model.packing import Packed, RowNorm, Surrounded, pack
from cloud_engine.model.rowwise import silu_gate


class Projection:
    """`weight` [outputs, inputs], perhaps `bias` [outputs]; `gate` makes half as many columns of the outputs. Call it
    with x [rows, inputs] for gate(norm(x) * weight + bias) + added. An `exact` one is never quantized."""

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        exact: bool = False,
        gate: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.weight, self.bias, self.exact, self.gate = weight, bias, exact, gate
        self._packed: Packed | None = None
        self.rows: int | None = None
        """The number of rows that every product has, if that is fixed: fewer are padded."""

    def __call__(self, x: Tensor, norm: RowNorm | None = None, added: Tensor | None = None) -> Tensor:
        rows = x.shape[0]
        if self.rows is None or not 0 < rows < self.rows:
            return self._compute(x, norm, added)
        more = 0, 0, 0, self.rows - rows
        return self._compute(F.pad(x, more), norm, None if added is None else F.pad(added, more))[:rows]

    def _compute(self, x: Tensor, norm: RowNorm | None, added: Tensor | None) -> Tensor:
        packed = self._packed if x.shape[0] else None
        if isinstance(packed, Surrounded) and (self.gate is None or packed.gated):
            return packed(x, norm, added)
        x = x if norm is None else norm(x)
        out = F.linear(x, self.weight, self.bias) if packed is None else packed(x)
        out = out if self.gate is None else self.gate(out)
        return out if added is None else out + added

    def pack(self, quantization: Quantization = "none", *, keep: bool = False) -> None:
        """Reorder the weight; unless it is to be kept (an embedding needs it too), give up its memory."""
        if self._packed is None:
            how = "none" if self.exact else quantization
            self._packed = pack(self.weight, self.bias, how, gated=self.gate is silu_gate)
            if self._packed is not None and not keep:
                # Its shape stays, for inputs of no rows: one element seen everywhere.
                self.weight = self.weight.new_zeros(1).expand(self.weight.shape)
