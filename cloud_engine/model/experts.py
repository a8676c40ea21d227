"""Mixture of experts: a router picks a few feed-forward parts for each token and weighs what they give.

The step's rows are sorted by expert, so that each expert with any tokens computes all of them at once. Where ranks
share the model, each has all experts in part, or some of them whole (`Experts.held`) and computes the rows of these.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from cloud_engine.model.config import Experts
from cloud_engine.model.layers import Destination, Destinations, Empty, GatedMlp, Norm, prefixed
from cloud_engine.model.projection import Projection


class MixtureOfExperts:
    def __init__(
        self,
        shape: Experts,
        hidden: int,
        empty: Empty,
        names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
    ) -> None:
        """`names` are those of an expert's gate, up and down in checkpoints."""
        self.shape = shape
        self.held = range(shape.count) if shape.held is None else shape.held
        self.router = Projection(empty(shape.count, hidden), exact=True)
        if shape.held is not None:
            empty = Empty(empty.make)
        self.experts = [GatedMlp(hidden, shape.intermediate_size, empty, names=names) for _ in self.held]

    def __call__(self, x: Tensor, norm: Norm | None = None, added: Tensor | None = None) -> Tensor:
        x = x if norm is None else norm(x)
        weights, chosen = self.route(x)
        order = chosen.flatten().argsort(stable=True)
        counts = chosen.flatten().bincount(minlength=self.shape.count).tolist()
        before = sum(counts[: self.held.start])
        counts = counts[self.held.start : self.held.stop]
        order = order[before : before + sum(counts)]
        rows = order // self.shape.chosen
        parts = [
            expert(part)
            for expert, part in zip(self.experts, x[rows].split_with_sizes(counts), strict=True)
            if len(part)
        ]
        weighed = torch.cat(parts) * weights.flatten()[order, None] if parts else x[rows]
        out = torch.zeros_like(x).index_add_(0, rows, weighed)
        return out if added is None else out + added

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and indices of each row's experts, both [T, chosen]: the largest of the softmax over all experts."""
        weights, chosen = self.router(x).float().softmax(-1).topk(self.shape.chosen)
        if self.shape.normalised:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights.to(x.dtype), chosen

    def destinations(self) -> Destinations:
        places = {"gate.weight": Destination(self.router.weight)}
        for index, expert in zip(self.held, self.experts, strict=True):
            places |= prefixed(f"experts.{index}", expert.destinations())
        return places

    def projections(self) -> Iterator[Projection]:
        yield self.router
        for expert in self.experts:
            yield from expert.projections()
