"""How ranks talk while they compute: sums and gathers within a stage, activations from stage to stage.

The process groups belong to one engine (torch's global default group is left alone), so that several engines, or
several ranks in tests, live in one process. gloo carries tensors of a CPU, on loopback only; NCCL those of GPUs.
"""

from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from cloud_engine.model.division import Division

dist: Any = torch.distributed
"""Its stubs leave out the classes that are used here."""
LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class GroupPeers:
    """The ranks of a stage (see `cloud_engine.model.layers.Peers`)."""

    rank: int
    size: int
    group: Any

    def sum(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        self.group.allreduce([x]).wait()
        return x

    def gather(self, x: Tensor) -> Tensor:
        options = dist.GatherOptions()
        options.rootRank = 0
        parts = [torch.empty_like(x) for _ in range(self.size)] if self.rank == 0 else []
        self.group.gather([parts] if parts else [], [x.contiguous()], options).wait()
        return torch.cat(parts, dim=-1) if parts else x[:0]


@dataclass(frozen=True, slots=True)
class Pipe:
    """The ranks with the same part of each stage, in the order of the stages."""

    rank: int
    size: int
    group: Any

    def send(self, x: Tensor, to: int) -> None:
        self.group.send([x.contiguous()], to, 0).wait()

    def receive(self, like: Tensor, source: int) -> Tensor:
        """Into a new tensor of the shape of `like`."""
        x = torch.empty_like(like)
        self.group.recv([x], source, 0).wait()
        return x


@dataclass(frozen=True, slots=True)
class Groups:
    """Those that one rank belongs to; None where it is the only member."""

    peers: GroupPeers | None
    pipe: Pipe | None

    def abort(self) -> None:
        """Make operations fail that wait on a GPU; gloo's fail by themselves when a member is gone."""
        for member in (self.peers, self.pipe):
            if member is not None:
                member.group.abort()


def connect(meeting: Path, division: Division, rank: int, device: torch.device, timeout: timedelta) -> Groups:
    """Meet the other ranks through the file `meeting`, new and the same for all. Raises RuntimeError if one of them
    has not come before `timeout`, which is also the limit of each later operation."""
    store = dist.FileStore(str(meeting), division.size)
    store.set_timeout(timeout)
    stage, part = division.place(rank)
    peers = pipe = None
    if division.tensor > 1:
        within = dist.PrefixStore(f"stage {stage}", store)
        peers = GroupPeers(part, division.tensor, _group(within, part, division.tensor, device, timeout))
    if division.pipeline > 1:
        across = dist.PrefixStore(f"part {part}", store)
        pipe = Pipe(stage, division.pipeline, _group(across, stage, division.pipeline, device, timeout))
    return Groups(peers, pipe)


def _group(store: Any, rank: int, size: int, device: torch.device, timeout: timedelta) -> Any:
    if device.type == "cuda":
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout
        return dist.ProcessGroupNCCL(store, rank, size, options)
    options = dist.ProcessGroupGloo._Options()
    options._timeout = timeout
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=LOOPBACK)]
    return dist.ProcessGroupGloo(store, rank, size, options)
