"""The scales of an FP8 cache, from what a model's keys and values are on real text.

Run once, at load: the scales are part of the engine's frozen configuration before any block is computed.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from cloud_engine.attention import paged
from cloud_engine.attention.batch import AttentionBatch
from cloud_engine.attention.fp8 import scale_for
from cloud_engine.engine.chunk import Chunk
from cloud_engine.engine.config import EngineConfig
from cloud_engine.engine.runner import Runner
from cloud_engine.model.decoder import Model

TEXT = """\
The lighthouse keeper wrote to his sister every Sunday: "The storm took two boats, and 1,384 bricks of the old wall."
def mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0
Question: if a train leaves at 07:45 and needs 2 h 30 min, when does it arrive? Answer: at 10:15, because 45 + 30 = 75.
{"name": "Zoë", "tags": ["a", "b"], "price": 19.99, "url": "https://example.org/?q=1&r=2"}
Der Nebel hob sich langsam über dem Fluss. La réponse est simple : rien ne presse.
今日は天気がいい。
1. Wash the rice. 2. Boil it for 12 minutes. 3. Let it rest.\n\n\tNOTE!!! Do not open the lid...
"""
MAX_TOKENS = 512


class Extremes:
    """An attention that remembers the largest key and value, in magnitude, of each of its calls: of each layer."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, cache: Tensor, batch: AttentionBatch, /) -> Tensor:
        self.seen.append(torch.stack((k.abs().amax(), v.abs().amax())))
        return paged.attend(q, k, v, cache, batch)


def calibrate(model: Model, config: EngineConfig, tokens: Sequence[int]) -> EngineConfig:
    """`config` with the scales of an FP8 cache, from one run over `tokens` of text (the first `MAX_TOKENS` of them).
    Raises ValueError if the model's keys or values are not finite there."""
    tokens = list(tokens[: min(MAX_TOKENS, config.model_len)])
    blocks = -(-len(tokens) // config.block_size)
    extremes = Extremes()
    runner = Runner(
        model, replace(config, kv_dtype="auto", deterministic=False, num_blocks=blocks + 1, host_blocks=0), extremes
    )
    runner.run([Chunk(tokens, 0, list(range(1, blocks + 1)), 1)])
    scales = [(scale_for(key), scale_for(value)) for key, value in torch.stack(extremes.seen).tolist()]
    return replace(config, kv_scales=tuple(scales))
