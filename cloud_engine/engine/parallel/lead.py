"""Rank 0 of an engine that several processes compute: to the engine, a runner like any other.

Only here is anything scheduled or sampled. The others are told each step's chunks, and compute their part of it.
"""

import os
import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import torch
from torch import Tensor

from cloud_engine.engine.chunk import Chunk
from cloud_engine.engine.config import EngineConfig, resolve
from cloud_engine.engine.parallel.messages import Begin, Failed, Load, Step
from cloud_engine.engine.parallel.part import Part, division_of
from cloud_engine.engine.parallel.processes import RankLost, RankProcess, Watch
from cloud_engine.engine.runner import Runner
from cloud_engine.model.config import ModelConfig
from cloud_engine.model.division import divide
from cloud_engine.model.weights import read_config
from shared.errors import UnsupportedParameter

LOAD_LIMIT_S = 1800.0


class Lead:
    """`close` ends the other ranks; they also end with this process, however it ends."""

    def __init__(self, path: Path, asked: EngineConfig, text: list[int]) -> None:
        """Start the ranks and load the model, each its part; `text` is what an FP8 cache is calibrated on. Raises what
        `load_model` raises, ValueError for limits that cannot be kept, RankLost if a rank fails."""
        asked.check_ranks()
        self._asked, self._text, self._size = asked, text, asked.num_ranks
        whole = read_config(path)
        self.config = _resolved(asked, whole, room=sys.maxsize)  # what cannot be is refused before anything is loaded
        if asked.device == "cuda":
            _prepare_cuda(self._size)
        self._part: Part | None = None
        self._others: list[RankProcess] = []
        self._watch = Watch(self._others, self._abort)
        self._folder = TemporaryDirectory(prefix="causeway-ranks-", ignore_cleanup_errors=True)
        try:
            with self._watch.limit(LOAD_LIMIT_S):
                self._runner = self._start(path, whole)
        except BaseException:
            self.close()
            raise
        self.model, self.device = self._runner.model, self._runner.device
        self.config = replace(self.config, kv_scales=self._runner.config.kv_scales)

    @property
    def failed(self) -> bool:
        return self._watch.lost

    def run(self, chunks: list[Chunk], last: Tensor | None = None) -> Tensor:
        """As `Runner.run`. Raises RankLost if a rank has died, or if the step takes longer than `rank_timeout`; from
        then on always."""
        with self._watch.limit(self.config.rank_timeout):
            self._tell(Step(chunks, [] if last is None else last.tolist()))
            logits = self._runner.run(chunks, last)
            if self.device.type == "cuda":  # only then has the step ended within its limit
                torch.cuda.synchronize(self.device)
        return logits

    @property
    def embeds(self) -> bool:
        return False

    def hidden(self, chunks: list[Chunk]) -> Tensor:  # noqa: ARG002 - an Executor has it
        raise UnsupportedParameter("several processes have parts of the model: no hidden states", param="model")

    def close(self) -> None:
        """Idempotent."""
        self._watch.close()
        self._folder.cleanup()

    def _start(self, path: Path, whole: ModelConfig) -> Runner:
        """All ranks load at once, after they have met."""
        self._others += [RankProcess(rank) for rank in range(1, self._size)]
        self._hear("awake")
        meeting, threads = Path(self._folder.name) / "meeting", max(1, torch.get_num_threads() // self._size)
        for other in self._others:
            other.channel.send(Load(other.rank, str(path.absolute()), str(meeting), threads, self._asked))
        if self._asked.device == "cpu":
            torch.set_num_threads(threads)
        self._part = Part(path, self._asked, 0, meeting)
        rooms = [self._part.room(self._asked), *self._hear("loaded")]
        if self._asked.device == "cpu":
            self._folder.cleanup()  # all have met; NCCL connects, through the same file, at its first use only
        self.config = _resolved(self._asked, whole, room=min(rooms))
        self._tell(Begin(self.config, self._text))
        runner = self._part.runner(self.config, self._text)
        self._hear("ready")
        return runner

    def _tell(self, message: Begin | Step) -> None:
        for other in self._others:
            other.channel.send(message)

    def _hear(self, point: Literal["awake", "loaded", "ready"]) -> list[int]:
        """Waits until all have come so far. Gives what each says of its room."""
        rooms = []
        for other in self._others:
            message = other.channel.receive()
            if isinstance(message, Failed):
                raise RankLost(f"rank {other.rank} of the engine failed: {message.message}")
            if message.point != point:
                raise RankLost(f"rank {other.rank} of the engine is {message.point}, not {point}")
            rooms.append(message.room)
        return rooms

    def _abort(self) -> None:
        if self._part is not None and self._asked.device == "cuda":
            self._part.groups.abort()


def _resolved(asked: EngineConfig, whole: ModelConfig, room: int) -> EngineConfig:
    """The same for all ranks: the one with the largest part of keys and values decides how many blocks there are, and
    the one with the least `room`."""
    division = division_of(asked)
    values = max(divide(whole, division, rank).kv_values for rank in range(division.size))
    return resolve(asked, model_len=whole.context_length, token_bytes=values * asked.kv_value_bytes, room=room)


def _prepare_cuda(size: int) -> None:
    if size > torch.cuda.device_count():
        raise ValueError(f"{size} ranks need as many GPUs, of which there are {torch.cuda.device_count()}")
    # NCCL's own watchdog would end this process, which has requests to fail properly: our watch does its work.
    os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"
