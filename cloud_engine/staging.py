"""Small tensors on their way between host and device, without making either wait for the other.

To CUDA they go through pinned memory, which torch's own allocator hands out again only after the copy is done; a copy
from ordinary memory would make the host wait for everything that is queued on the device.
"""

from collections.abc import Callable
from collections.abc import Sequence as List

import torch
from torch import Tensor

Numbers = List[int] | List[float] | List[List[int]] | List[List[float]]


def stage(values: Numbers, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The values as a tensor on the device."""
    if device.type != "cuda":
        return torch.tensor(values, dtype=dtype, device=device)
    return torch.tensor(values, dtype=dtype, pin_memory=True).to(device, non_blocking=True)


def fetch(tensor: Tensor) -> Callable[[], Tensor]:
    """Start to copy a tensor to the host; the result waits for the copy, and for it alone."""
    if tensor.device.type != "cuda":
        return lambda: tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    copied = torch.cuda.current_stream(tensor.device).record_event()

    def wait() -> Tensor:
        copied.synchronize()
        return host

    return wait
