"""Throughput of the engine alone: random prompts, greedy, a fixed number of tokens, no prefix cache, no HTTP."""

import json
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from cloud_engine.engine.config import DTYPE_BYTES, DType, EngineConfig, resolve
from cloud_engine.engine.engine import Engine
from cloud_engine.engine.runner import Runner, attention_for
from cloud_engine.model.decoder import Decoder
from cloud_engine.model.weights import load_model
from shared.schemas import Sampling


def run(
    model: Path,
    n_list: Sequence[int],
    in_len: int = 128,
    out_len: int = 128,
    dtype: DType = "float32",
    seed: int = 0,
    *,
    device: str = "cpu",
    clock: Callable[[], float] = time.perf_counter,
) -> None:
    """Print one JSON object a line for each number of simultaneous requests: n, in, out, wall_s, out_tok_s.

    All requests are there from the start, so the wall time includes every prefill. Raises ModelInvalid or
    UnsupportedModel, and ValueError where prompt and output exceed the model's context.
    """
    weights = load_model(model, dtype=dtype, device=device).pack()
    # The first steps set up kernels and threads.
    measure(_engine(weights, 1, 16, 2, dtype, device), 1, 16, 2, seed, clock)
    for n in n_list:
        wall = measure(_engine(weights, n, in_len, out_len, dtype, device), n, in_len, out_len, seed, clock)
        row = {
            "n": n,
            "in": in_len,
            "out": out_len,
            "wall_s": round(wall, 3),
            "out_tok_s": round(n * out_len / wall, 1),
        }
        print(json.dumps(row), flush=True)  # noqa: T201 - this is the command's output


def measure(engine: Engine, n: int, in_len: int, out_len: int, seed: int, clock: Callable[[], float]) -> float:
    """Seconds from the first request's arrival to the last one's last token."""
    rng = random.Random(seed)  # noqa: S311 - not a secret
    sampling = Sampling(temperature=0, max_tokens=out_len, ignore_eos=True)
    prompts = [[rng.randrange(engine.vocab_size) for _ in range(in_len)] for _ in range(n)]
    start = clock()
    for index, prompt in enumerate(prompts):
        engine.add(str(index), prompt, sampling)
    while engine.has_work:
        engine.step()
    return clock() - start


def _engine(model: Decoder, n: int, in_len: int, out_len: int, dtype: DType, device: str) -> Engine:
    """An engine with room for exactly this load, so that the pool's size is no part of the measurement."""
    if (length := in_len + out_len) > model.config.context_length:
        raise ValueError(f"{length} tokens are over the model's context length of {model.config.context_length}")
    block_size = 16
    asked = EngineConfig(
        model_len=length,
        block_size=block_size,
        num_blocks=1 + n * (1 - -length // block_size),
        max_num_seqs=n,
        max_waiting=n,
        prefix_caching=False,
        dtype=dtype,
        device=device,
    )
    token_bytes = model.config.kv_values * DTYPE_BYTES[dtype]
    config = resolve(asked, model_len=model.config.context_length, token_bytes=token_bytes)
    kernel = attention_for(model.config, config)
    return Engine(Runner(model, config, kernel.attend, packed=kernel.packed))
