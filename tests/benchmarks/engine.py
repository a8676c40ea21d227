"""The cloud engine beside `transformers` generate: output tokens per second, greedy, end of text ignored."""

import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

SIZES = (1, 8, 32, 64)
IN_TOKENS = OUT_TOKENS = 128


def measure(model: Path, rounds: int) -> Iterator[tuple[str, Sequence[float]]]:
    """Each engine in a process of its own, in turn, with the same number and length of random prompts."""
    ours: dict[int, list[float]] = {n: [] for n in SIZES}
    theirs: dict[int, list[float]] = {n: [] for n in SIZES}
    for _ in range(rounds):
        for n, rate in run("cloud_engine", "bench", "--model", str(model)):
            ours[n].append(rate)
        for n, rate in run("tests.benchmarks.engine", str(model)):
            theirs[n].append(rate)
    for n in SIZES:
        yield f"engine: ours, n={n}, tokens/s", ours[n]
        yield f"engine: transformers float32, n={n}, tokens/s", theirs[n]
        yield f"engine: ours / transformers, n={n}", [a / b for a, b in zip(ours[n], theirs[n], strict=True)]


def run(module: str, *args: str) -> Iterator[tuple[int, float]]:
    sizes = ["--n", *map(str, SIZES), "--in", str(IN_TOKENS), "--out", str(OUT_TOKENS)]
    done = subprocess.run([sys.executable, "-m", module, *args, *sizes], check=True, capture_output=True, text=True)
    for line in done.stdout.splitlines():
        if line.startswith("{"):
            row = json.loads(line)
            yield row["n"], row["out_tok_s"]


def transformers_rates(model: Path, sizes: Sequence[int]) -> Iterator[dict[str, float]]:
    """`generate` on one batch of equally long random prompts: its best case, no padding is computed."""
    import torch
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(model.parent, gguf_file=model.name, dtype=torch.float32).eval()
    rng = random.Random(0)
    length = {"max_new_tokens": OUT_TOKENS, "min_new_tokens": OUT_TOKENS, "do_sample": False, "eos_token_id": None}
    for n in sizes:
        prompts = torch.tensor([[rng.randint(100, 40_000) for _ in range(IN_TOKENS)] for _ in range(n)])
        start = time.perf_counter()
        with torch.inference_mode():
            network.generate(prompts, attention_mask=torch.ones_like(prompts), pad_token_id=0, **length)
        wall = time.perf_counter() - start
        yield {"n": n, "wall_s": round(wall, 3), "out_tok_s": round(n * OUT_TOKENS / wall, 1)}


if __name__ == "__main__":
    for row in transformers_rates(Path(sys.argv[1]), SIZES):
        print(json.dumps(row), flush=True)
