"""How large the KV cache may be: what is free once the weights are loaded, less a reserve and a step's own needs.

The measure is what is free, not what the machine has: other processes keep what they hold, a second engine on the same
GPU among them. It is taken right before the blocks are. If somebody was faster all the same, the allocation fails with
the same error as if there had been too little from the start.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Protocol

import torch

from cloud_engine.engine.chunk import Chunk
from cloud_engine.engine.config import EngineConfig, TooLittleMemory, step_budget
from cloud_engine.engine.runner import Runner
from cloud_engine.model.decoder import Model

RESERVE = 0.15
"""Of what is free: for fragments, CUDA graphs, other processes that grow, and on a CPU for a step's own tensors."""
UNMEASURED = 1 << 30
"""Taken to be free where the system does not say."""
BYTES_PER_LOGIT = 32
"""What sampling holds of each: numbers, sorted numbers, their places, probabilities, sums."""


class Meter(Protocol):
    """Of one GPU, in bytes: what is free for this process to take, what its tensors hold, and held at most since
    `reset`."""

    def free(self) -> int: ...
    def held(self) -> int: ...
    def peak(self) -> int: ...
    def reset(self) -> None: ...


class CudaMeter:
    def __init__(self, device: torch.device) -> None:
        self.device = device

    def free(self) -> int:
        torch.cuda.empty_cache()  # or torch would count as taken what it only keeps
        return torch.cuda.mem_get_info(self.device)[0]

    def held(self) -> int:
        torch.cuda.synchronize(self.device)
        return torch.cuda.memory_allocated(self.device)

    def peak(self) -> int:
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device)

    def reset(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)


def kv_room(
    model: Model,
    config: EngineConfig,
    host: Callable[[], int] = lambda: host_free(),
    meter: Callable[[torch.device], Meter] = CudaMeter,
) -> int:
    """Bytes that the KV cache of this loaded model, or rank's part of one, may take; 0 if `config` says its size. Ranks
    share the host's memory. Swaps come first there, and on a CPU that is also where the cache is: raises
    TooLittleMemory if they cannot be had."""
    if config.num_blocks or config.kv_bytes:
        return 0
    device = torch.device(config.device)
    room = _usable(host()) // config.num_ranks - config.host_bytes
    if room < 0:
        raise TooLittleMemory(f"host_bytes {config.host_bytes} is {-room} more than may be taken of the host's memory")
    if device.type != "cuda":
        return room
    gauge = meter(device)
    needs = peak_of_a_step(model, config, gauge)
    return max(0, _usable(gauge.free()) - needs)


def peak_of_a_step(model: Model, config: EngineConfig, gauge: Meter) -> int:
    """What the largest step takes beside weights and blocks: found by computing one, a whole budget of tokens."""
    length = min(config.model_len or model.config.context_length, step_budget(config))
    count, per = -(-step_budget(config) // length), -(-length // config.block_size)
    trial = replace(config, num_blocks=1 + per, model_len=length, kv_dtype="auto", host_blocks=0, host_bytes=0)
    runner = Runner(model, trial)
    chunk = Chunk([0] * length, 0, list(range(1, 1 + per)), -(-config.max_num_seqs // count))
    gauge.reset()
    before = gauge.held()
    runner.run([chunk] * count)
    return gauge.peak() - before + BYTES_PER_LOGIT * config.max_num_seqs * model.config.vocab_size


@contextmanager
def taking(config: EngineConfig) -> Iterator[None]:
    """Turns the allocator's error into TooLittleMemory."""
    try:
        yield
    except RuntimeError as error:
        if not any(words in str(error) for words in ("out of memory", "allocate memory")):
            raise
        raise TooLittleMemory(
            f"{config.num_blocks} KV blocks and {config.host_blocks} in host memory could not be had; another process "
            "may have taken what was free. Lower kv_blocks, kv_bytes or kv_host_bytes, or start again"
        ) from error


def host_free(root: Path = Path("/")) -> int:
    """Bytes a process may still take: what the kernel says is available, and what the memory limits of its control
    groups leave (version 1 and 2, its own group and those above it). Pages of files that the kernel would drop count as
    free in both."""
    available = dict(_numbers(root / "proc/meminfo")).get("MemAvailable:")
    left = [] if available is None else [available * 1024]
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        group = PurePosixPath(path.lstrip("/"))
        for above in (group, *group.parents):
            if not controllers:
                left += _left(root / "sys/fs/cgroup" / above, "memory.max", "memory.current", "inactive_file")
            elif "memory" in controllers.split(","):
                folder = root / "sys/fs/cgroup/memory" / above
                left += _left(folder, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    return max(0, min(left)) if left else UNMEASURED


def _left(folder: Path, limit: str, usage: str, reclaimable: str) -> list[int]:
    """Nothing if the group has no limit, or is not there under this name (a container sees its own as the root)."""
    limits, used = _lines(folder / limit), _lines(folder / usage)
    if not limits or not used or limits[0] == "max":
        return []
    return [int(limits[0]) - int(used[0]) + dict(_numbers(folder / "memory.stat")).get(reclaimable, 0)]


def _numbers(file: Path) -> Iterator[tuple[str, int]]:
    for line in _lines(file):
        name, value, *_ = line.split()
        yield name, int(value)


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text().splitlines()
    except OSError:
        return []


def _usable(free: int) -> int:
    return int(free * (1 - RESERVE))
