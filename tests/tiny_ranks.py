"""A model divided over ranks that are threads of the test: real groups and collectives, no process to wait for."""

import itertools
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch

from cloud_engine.engine.config import EngineConfig
from cloud_engine.engine.parallel.groups import Groups, connect
from cloud_engine.engine.parallel.part import runner_for
from cloud_engine.engine.parallel.stages import StagedModel
from cloud_engine.engine.runner import Runner
from cloud_engine.model.division import Division, Share
from cloud_engine.model.layers import Alone
from cloud_engine.model.weights import load_model

CONFIG = {"model_len": 64, "num_blocks": 21, "block_size": 4, "max_num_seqs": 8, "max_num_batched_tokens": 11}
TEXT = [number * 37 % 256 + 3 for number in range(60)]
CPU, LIMIT = torch.device("cpu"), timedelta(seconds=60)


class Threads:
    """Ranks by division, connected once for all models of a test module."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.numbers = folder, itertools.count()
        self.groups: dict[tuple[int, int], list[Groups]] = {}
        self.pool = ThreadPoolExecutor(max_workers=8)

    def connected(self, division: Division) -> list[Groups]:
        key = division.tensor, division.pipeline
        if key not in self.groups:
            meeting = self.folder / str(next(self.numbers))
            ranks = range(division.size)
            self.groups[key] = list(self.pool.map(lambda rank: connect(meeting, division, rank, CPU, LIMIT), ranks))
        return self.groups[key]

    def load(self, model: Path, division: Division, **config: object) -> "ThreadedRanks":
        groups = self.connected(division)
        ranks = range(division.size)
        runners = self.pool.map(lambda rank: runner(model, division, rank, groups[rank], config), ranks)
        return ThreadedRanks(self.pool, list(runners))


class ThreadedRanks:
    """To an engine, what a runner is."""

    failed = False

    def __init__(self, pool: ThreadPoolExecutor, runners: list[Runner]) -> None:
        self.pool, self.runners = pool, runners
        self.config, self.model, self.device = runners[0].config, runners[0].model, runners[0].device

    def run(self, chunks, last=None) -> torch.Tensor:
        logits, *others = self.pool.map(lambda runner: runner.run(chunks, last), self.runners)
        assert not any(len(other) for other in others)
        return logits

    def close(self) -> None:
        pass


def runner(path: Path, division: Division, rank: int, groups: Groups, config: dict[str, object]) -> Runner:
    peers = groups.peers or Alone()
    resolved = EngineConfig(**(CONFIG | config))
    model = load_model(path, share=Share(division, rank, peers)).pack(resolved.quantization)
    return runner_for(StagedModel(model, groups.pipe) if groups.pipe else model, resolved, TEXT)


@contextmanager
def threads(folder: Path):
    ranks = Threads(folder)
    yield ranks
    ranks.pool.shutdown()
