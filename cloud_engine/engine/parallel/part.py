"""One rank's part of a model and the runner of it, made alike by rank 0 and by all others."""

from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch

from cloud_engine.engine.calibration import calibrate
from cloud_engine.engine.config import EngineConfig
from cloud_engine.engine.graphs import CudaCapture
from cloud_engine.engine.memory import kv_room, taking
from cloud_engine.engine.parallel.groups import Groups, connect
from cloud_engine.engine.parallel.stages import StagedModel
from cloud_engine.engine.runner import Runner, attention_for
from cloud_engine.model.decoder import Model
from cloud_engine.model.division import Division, Share
from cloud_engine.model.layers import Alone
from cloud_engine.model.weights import load_model


def division_of(config: EngineConfig) -> Division:
    return Division(tensor=config.tensor_parallel, pipeline=config.pipeline_parallel, experts=config.expert_parallel)


class Part:
    """`meeting` is where the ranks find each other (see `connect`)."""

    def __init__(self, path: Path, config: EngineConfig, rank: int, meeting: Path) -> None:
        self.device = f"cuda:{rank}" if config.device == "cuda" else config.device
        self.groups: Groups = connect(
            meeting, division_of(config), rank, torch.device(self.device), timedelta(seconds=2 * config.rank_timeout)
        )
        share = Share(division_of(config), rank, self.groups.peers or Alone())
        stage = load_model(path, dtype=config.dtype, device=self.device, share=share).pack(config.quantization)
        self.model: Model = StagedModel(stage, self.groups.pipe) if self.groups.pipe else stage

    def room(self, config: EngineConfig) -> int:
        """Bytes that this rank's blocks may take. All ranks find out at once, since a step may be computed for it."""
        return kv_room(self.model, replace(config, device=self.device))

    def runner(self, config: EngineConfig, text: list[int]) -> Runner:
        return runner_for(self.model, replace(config, device=self.device), text)


def runner_for(model: Model, config: EngineConfig, text: list[int]) -> Runner:
    """The runner of a model, or of a part of one. An FP8 cache is calibrated on `text`; all ranks do that at once."""
    if config.kv_dtype == "fp8":
        config = calibrate(model, config, text)
    kernel = attention_for(model.config, config)
    with taking(config):
        runner = Runner(model, config, kernel.attend, packed=kernel.packed)
    # What ranks say to each other is not recorded: with several of them every kernel is launched.
    if config.cuda_graphs and kernel.packed and runner.device.type == "cuda" and config.num_ranks == 1:
        runner.record(CudaCapture())
    return runner
