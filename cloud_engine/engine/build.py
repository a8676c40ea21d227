"""From a model's files and a config to an engine: the one place that puts the parts together."""

from pathlib import Path

from cloud_engine.engine.calibration import TEXT, calibrate
from cloud_engine.engine.config import EngineConfig, resolve
from cloud_engine.engine.engine import Engine
from cloud_engine.engine.graphs import CudaCapture
from cloud_engine.engine.runner import Runner, attention_for
from cloud_engine.model.tokenizer import Tokenizer
from cloud_engine.model.weights import load_model


def build(path: Path, asked: EngineConfig, *, stop_ids: frozenset[int] = frozenset()) -> Engine:
    """An engine of the Hugging Face folder or GGUF file at `path`; takes seconds and much memory.

    Raises ModelInvalid or UnsupportedModel, ValueError for limits that cannot be kept.
    """
    model = load_model(path, dtype=asked.dtype, device=asked.device).pack(asked.quantization)
    length = model.config.context_length
    if asked.model_len > length:
        raise ValueError(f"model_len {asked.model_len} is over the model's context length of {length}")
    config = resolve(asked, model_len=length, token_bytes=model.config.kv_values * asked.kv_value_bytes)
    if config.kv_dtype == "fp8":
        config = calibrate(model, config, Tokenizer(path).encode(TEXT))
    kernel = attention_for(model.config, config)
    runner = Runner(model, config, kernel.attend, packed=kernel.packed)
    if config.cuda_graphs and kernel.packed and runner.device.type == "cuda":
        runner.record(CudaCapture())
    return Engine(runner, stop_ids=stop_ids, identity=str(path))
