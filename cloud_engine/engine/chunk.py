"""What one step computes of one sequence, as plain data: all that a device, or another process, is told."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Swap:
    """Copy a block between the device and a slot of host memory: into the block if it `loads`, else out of it. Every
    rank of a model copies its own part of the block, to and from its own memory."""

    block: int
    slot: int
    loads: bool


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive `tokens` of a sequence, the first at position `start`, and the blocks of the whole sequence: token i
    is kept in slot `table[i // block_size] * block_size + i % block_size`. The logits of the last `sampled` of them are
    wanted (none while a prompt is computed in parts).

    `previous`: the one token here is not known yet, it is what the step launched before this one samples at that place
    (counted over the sequences that it samples). Only the device has it in time; `tokens` holds a placeholder.
    The `swaps` of all a step's chunks are done, in order, before any chunk is computed."""

    tokens: list[int]
    start: int
    table: list[int]
    sampled: int
    previous: int | None = None
    swaps: tuple[Swap, ...] = ()

    @property
    def count(self) -> int:
        return len(self.tokens)

    @property
    def end(self) -> int:
        """The sequence's length once these are computed."""
        return self.start + len(self.tokens)
