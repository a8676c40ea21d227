"""The device side of a step: what is launched on it is computed in order, while the host goes on.

On CUDA a launch returns once the kernels are queued. On a CPU it computes; `Worker` makes a device of that too, with a
thread of its own that computes what the engine's thread launches.
"""

from collections.abc import Callable
from collections.abc import Sequence as List
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import torch
from torch import Tensor

from cloud_engine.engine.chunk import Chunk
from cloud_engine.engine.draw import Draw
from cloud_engine.engine.executor import Executor
from cloud_engine.engine.sampler import Sampled, choose, read
from cloud_engine.staging import fetch

Result = Callable[[], list[Sampled]]
"""Waits for a step, and gives what it sampled: one for each draw."""


class Device(Protocol):
    def launch(self, chunks: list[Chunk], draws: List[Draw]) -> Result:
        """Start a step. What it is told must not change until its result is there."""
        ...

    def close(self) -> None: ...


class Direct:
    """Launches from the calling thread. Keeps the last step's tokens for the next one, see `Chunk.previous`."""

    def __init__(self, runner: Executor) -> None:
        self._runner = runner
        self._last: Tensor | None = None

    def launch(self, chunks: list[Chunk], draws: List[Draw]) -> Result:
        ahead = any(chunk.previous is not None for chunk in chunks)
        logits = self._runner.run(chunks, self._last) if ahead else self._runner.run(chunks)
        with torch.inference_mode():
            self._last, report = choose(logits, draws)
            reported = fetch(report)
        return lambda: read(reported(), draws)

    def close(self) -> None:
        pass


class Worker:
    """A device of its own thread: `launch` returns at once. The thread starts with the first step; `close` ends it."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="device")

    def launch(self, chunks: list[Chunk], draws: List[Draw]) -> Result:
        step = self._thread.submit(self._device.launch, chunks, draws)
        return lambda: step.result()()

    def close(self) -> None:
        self._thread.shutdown()


def device_for(runner: Executor) -> Device:
    """What an engine of this configuration launches its steps on."""
    direct = Direct(runner)
    asynchronous = runner.config.async_depth and runner.device.type == "cpu"
    return Worker(direct) if asynchronous else direct
