"""What each of several ranks has of a model: a part of every matrix, and some of the layers."""

from dataclasses import dataclass, replace

from cloud_engine.model.config import Experts, ModelConfig, Stage, UnsupportedModel
from cloud_engine.model.layers import Peers


@dataclass(frozen=True, slots=True, kw_only=True)
class Division:
    """`tensor` ranks share each matrix, `pipeline` stages follow one another: `size` ranks, those of a stage adjacent.
    With `experts`, the ranks of a stage have some experts whole instead of a part of each."""

    tensor: int = 1
    pipeline: int = 1
    experts: bool = False

    @property
    def size(self) -> int:
        return self.tensor * self.pipeline

    def place(self, rank: int) -> tuple[int, int]:
        """Of a rank: its stage, and its number among those that share the stage's matrices."""
        return divmod(rank, self.tensor)


@dataclass(frozen=True, slots=True)
class Share:
    """One rank of a division; its `peers` are those of its stage."""

    division: Division
    rank: int
    peers: Peers


def divide(config: ModelConfig, division: Division, rank: int) -> ModelConfig:
    """The part that `rank` has of a whole model. Raises UnsupportedModel if it cannot be divided so."""
    if division.size == 1:
        return config
    stage, part = division.place(rank)
    ranks = division.tensor
    _check(config, division)
    first, end = (number * config.num_layers // division.pipeline for number in (stage, stage + 1))
    return replace(
        config,
        num_heads=config.num_heads // ranks,
        num_kv_heads=max(1, config.num_kv_heads // ranks),
        kv_copies=max(1, ranks // config.num_kv_heads),
        intermediate_size=config.intermediate_size // ranks,
        experts=_experts(config.experts, division, part),
        layers=config.layers[first:end],
        stage=Stage(first_layer=first, begins=stage == 0, ends=stage == division.pipeline - 1),
    )


def _experts(experts: Experts, division: Division, part: int) -> Experts:
    ranks = division.tensor
    if not experts.count or ranks == 1:
        return experts
    if division.experts:
        return replace(experts, held=range(part * experts.count // ranks, (part + 1) * experts.count // ranks))
    return replace(experts, intermediate_size=experts.intermediate_size // ranks)


def _check(config: ModelConfig, division: Division) -> None:
    ranks, experts = division.tensor, config.experts
    if division.pipeline > config.num_layers:
        raise UnsupportedModel(
            f"{config.num_layers} layers cannot be divided over {division.pipeline} stages", param="pipeline_parallel"
        )
    if division.experts and not experts.count:
        raise UnsupportedModel("the model has no experts to divide over ranks", param="expert_parallel")
    plain = not experts.count or experts.dense
    sizes = {
        "attention heads": config.num_heads,
        "columns of the feed-forward part": config.intermediate_size if plain else 0,
        "columns of an expert": 0 if division.experts else experts.intermediate_size,
    }
    for what, size in sizes.items():
        if size % ranks:
            raise UnsupportedModel(f"{size} {what} cannot be divided over {ranks} ranks", param="tensor_parallel")
    if config.num_kv_heads % ranks and ranks % config.num_kv_heads:
        raise UnsupportedModel(
            f"{config.num_kv_heads} key-value heads can neither be divided over {ranks} ranks nor copied evenly",
            param="tensor_parallel",
        )
