"""From a model's files and a config to an engine: the one place that puts the parts together."""

from pathlib import Path

import structlog

from cloud_engine.engine.calibration import TEXT
from cloud_engine.engine.config import EngineConfig, resolve
from cloud_engine.engine.engine import Engine
from cloud_engine.engine.memory import kv_room
from cloud_engine.engine.parallel.lead import Lead
from cloud_engine.engine.parallel.part import runner_for
from cloud_engine.engine.runner import Runner
from cloud_engine.model.decoder import Decoder
from cloud_engine.model.shapes import Shape, random_model
from cloud_engine.model.tokenizer import Tokenizer
from cloud_engine.model.weights import load_model


def build(path: Path, asked: EngineConfig, *, stop_ids: frozenset[int] = frozenset()) -> Engine:
    """An engine of the Hugging Face folder or GGUF file at `path`, to be closed at the end; takes seconds and memory.

    Raises ModelInvalid or UnsupportedModel, ValueError for limits that cannot be kept, RankLost if several processes
    compute and one of them fails.
    """
    text = Tokenizer(path).encode(TEXT) if asked.kv_dtype == "fp8" else []
    runner = Lead(path, asked, text) if asked.num_ranks > 1 else _alone(_loaded(path, asked), asked, text)
    config = runner.config
    structlog.get_logger("causeway.engine").info("kv cache", tokens=config.kv_tokens, host_blocks=config.host_blocks)
    return Engine(runner, stop_ids=stop_ids, identity=str(path))


def build_random(shape: Shape, asked: EngineConfig) -> Engine:
    """An engine of random weights, in this process. Raises ValueError for limits that cannot be kept."""
    if asked.num_ranks > 1:
        raise ValueError("random weights are those of one process: tensor_parallel and pipeline_parallel must be 1")
    model = random_model(shape, dtype=asked.dtype, device=asked.device)
    return Engine(_alone(model, asked, list(range(min(256, shape.config.vocab_size)))), identity=shape.name)


def _loaded(path: Path, asked: EngineConfig) -> Decoder:
    return load_model(path, dtype=asked.dtype, device=asked.device)


def _alone(model: Decoder, asked: EngineConfig, text: list[int]) -> Runner:
    model.pack(asked.quantization)
    length, token_bytes = model.config.context_length, model.config.kv_values * asked.kv_value_bytes
    config = resolve(asked, model_len=length, token_bytes=token_bytes, room=kv_room(model, asked))
    return runner_for(model, config, text)
