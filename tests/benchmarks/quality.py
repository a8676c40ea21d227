"""What rounding costs: perplexity on a text, and how often the greedy next token is still that of float32.

    PYTHONPATH=deploy python -m tests.benchmarks.quality TEXT [--model FILE.gguf] [--tokens 4096]

The text is read in windows of 512 tokens, each through the paged cache at once. One JSON object a line for float32,
bfloat16, int8 weights with float32 and with bfloat16, and int8 weights alone (as on a GPU).
"""

import argparse
import json
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from cloud_engine.engine.chunk import Chunk
from cloud_engine.engine.config import DType, EngineConfig, Quantization
from cloud_engine.engine.runner import Runner, attention_for
from cloud_engine.model import packing
from cloud_engine.model.tokenizer import Tokenizer
from cloud_engine.model.weights import load_model
from shared.models import default_store, resolve

WINDOW = 512


def logits(path: Path, tokens: list[int], dtype: DType, quantization: Quantization) -> Iterator[Tensor]:
    """Of each whole window [WINDOW, vocab], in float32."""
    model = load_model(path, dtype=dtype).pack(quantization)
    config = EngineConfig(model_len=WINDOW, num_blocks=WINDOW // 16 + 1, max_num_seqs=1, dtype=dtype)
    kernel = attention_for(model.config, config)
    runner = Runner(model, config, kernel.attend, packed=kernel.packed)
    table = list(range(1, config.num_blocks))
    for start in range(0, len(tokens) - WINDOW, WINDOW):
        yield runner.run([Chunk(tokens[start : start + WINDOW], 0, table, WINDOW)]).float()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--model", default="smollm2:135m")
    parser.add_argument("--tokens", type=int, default=4096)
    args = parser.parse_args()
    path = resolve(args.model, store=default_store(os.environ, Path.home()))
    tokens = Tokenizer(path).encode(args.text.read_text())[: args.tokens + 1]
    exact = [window.argmax(-1) for window in logits(path, tokens, "float32", "none")]
    runs: list[tuple[str, DType, Quantization]] = [
        ("float32", "float32", "none"),
        ("bfloat16", "bfloat16", "none"),
        ("int8, float32", "float32", "int8"),
        ("int8, bfloat16", "bfloat16", "int8"),
        ("int8 weights alone, float32", "float32", "int8"),
    ]
    for name, dtype, quantization in runs:
        if "alone" in name:
            packing.features = lambda: 0
        loss, alike, count = 0.0, 0, 0
        for index, window in enumerate(logits(path, tokens, dtype, quantization)):
            following = torch.tensor(tokens[index * WINDOW + 1 : (index + 1) * WINDOW + 1])
            loss += float(torch.nn.functional.cross_entropy(window, following, reduction="sum"))
            alike += int((window.argmax(-1) == exact[index]).sum())
            count += WINDOW
        row = {"weights": name, "perplexity": round(float(torch.tensor(loss / count).exp()), 3)}
        print(json.dumps(row | {"greedy_agreement": round(alike / count, 4), "tokens": count}), flush=True)


if __name__ == "__main__":
    main()
