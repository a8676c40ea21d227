"""How fast a decode step could be at best: memory has to give all weights and keys once, and gives so much a second."""

import time
from collections.abc import Callable

import torch

from cloud_engine.bench.figures import Row
from cloud_engine.engine.config import DTYPE_BYTES, EngineConfig
from cloud_engine.model.shapes import Shape, step_bytes

COPIES = 8


def bandwidth(device: torch.device, size: int, clock: Callable[[], float] = time.perf_counter) -> float:
    """Bytes a second that a copy of `size` bytes reads and writes, the best of some."""
    source = torch.zeros(size // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(COPIES):
        _wait(device)
        start = clock()
        target.copy_(source)
        _wait(device)
        seconds.append(clock() - start)
    return 2 * source.nbytes / min(seconds)


def floor(shape: Shape, config: EngineConfig, rows: int, context: int, bytes_s: float) -> Row:
    """Columns for a report: milliseconds of a step at least, tokens a second at most, and what memory gives."""
    needed = step_bytes(
        shape, rows, context, value_bytes=DTYPE_BYTES[config.dtype], kv_value_bytes=config.kv_value_bytes
    )
    seconds = needed / bytes_s
    return {
        "floor_ms": round(seconds * 1e3, 3),
        "floor_tok_s": round(rows / seconds, 1),
        "memory_gb_s": round(bytes_s / 1e9, 1),
    }


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
