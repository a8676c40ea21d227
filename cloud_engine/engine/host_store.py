"""Host memory for the contents of KV blocks: the device's side of `host_cache`.

On CUDA the memory is pinned and a stream of its own does the copying, between host and a staging tensor; only gathering
blocks into staging, and scattering them back, is on the stream that computes. So a step waits for what it reads, not
for what is saved. Host memory is touched in that one stream alone, by one copy after the other.
"""

from collections.abc import Iterable, Sequence
from itertools import groupby

import torch
from torch import Tensor

from cloud_engine.engine.chunk import Swap


class HostStore:
    """`num_slots` blocks of all the layers in `caches` [2, num_blocks, block_size, Hkv, D], as bytes."""

    def __init__(self, caches: Sequence[Tensor], num_slots: int) -> None:
        self.caches = [cache.view(torch.uint8) for cache in caches]
        block = (len(caches), 2, *self.caches[0].shape[2:])
        self.device = caches[0].device
        on_cuda = self.device.type == "cuda"
        self.memory = torch.empty((num_slots, *block), dtype=torch.uint8, pin_memory=on_cuda)
        self.stream: torch.cuda.Stream | None = None
        if on_cuda:
            self.stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]

    def apply(self, swaps: Iterable[Swap]) -> None:
        """Do them in order. What is saved was computed in steps before, what is loaded is read in the step after."""
        for loads, group in groupby(swaps, key=lambda swap: swap.loads):
            same = list(group)
            blocks = torch.tensor([swap.block for swap in same]).to(self.device)
            slots = [swap.slot for swap in same]
            if loads:
                self._load(slots, blocks)
            else:
                self._save(blocks, slots)

    def _save(self, blocks: Tensor, slots: list[int]) -> None:
        held = torch.stack([cache.index_select(1, blocks) for cache in self.caches])
        staging = held.permute(2, 0, 1, 3, 4, 5).contiguous()
        if self.stream is None:
            self._to_host(staging, slots)
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            self._to_host(staging, slots)
        staging.record_stream(self.stream)

    def _load(self, slots: list[int], blocks: Tensor) -> None:
        if self.stream is None:
            staging = self._from_host(slots)
        else:
            with torch.cuda.stream(self.stream):
                staging = self._from_host(slots)
            computing = torch.cuda.current_stream(self.device)
            computing.wait_stream(self.stream)
            staging.record_stream(computing)
        for layer, cache in enumerate(self.caches):
            cache.index_copy_(1, blocks, staging[:, layer].transpose(0, 1))

    def _to_host(self, staging: Tensor, slots: list[int]) -> None:
        for at, slot in enumerate(slots):
            self.memory[slot].copy_(staging[at], non_blocking=True)

    def _from_host(self, slots: list[int]) -> Tensor:
        staging = self.memory.new_empty((len(slots), *self.memory.shape[1:]), device=self.device)
        for at, slot in enumerate(slots):
            staging[at].copy_(self.memory[slot], non_blocking=True)
        return staging
