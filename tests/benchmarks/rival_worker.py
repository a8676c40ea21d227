"""One engine in a process of its own, which computes what it is asked line by line; see `rivals.py`.

    PYTHON rival_worker.py ours|vllm|transformers MODEL '{"slots": 64, "length": 256, ...}'

Reads `{"prompts": [[token, ...], ...], "outputs": [count, ...]}`, answers `{"wall_s": ..., "tokens": ...}`. PYTHON may
be another environment's: nothing of Causeway is imported for an engine that is not ours. Greedy, end of text ignored,
no prefix cache.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

Run = Callable[[list[list[int]], list[int]], int]
"""Computes a batch; gives the number of tokens that were asked for and generated."""


def ours(model: str, options: dict[str, Any]) -> Run:
    from pathlib import Path

    from cloud_engine.__main__ import SPINS

    os.environ.setdefault("GOMP_SPINCOUNT", SPINS)  # as the command line does, before torch is loaded
    from cloud_engine.bench.commands import engine_options
    from cloud_engine.bench.offline import engine_for, measure
    from cloud_engine.bench.workload import Job

    given = engine_options(options["set"])
    engine = engine_for(Path(model), options["slots"], options["length"], {"max_waiting": 4096, **given})

    def run(prompts: list[list[int]], outputs: list[int]) -> int:
        return measure(engine, [Job(*job) for job in zip(prompts, outputs, strict=True)], time.perf_counter).tokens

    return run


def vllm(model: str, options: dict[str, Any]) -> Run:
    os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    from vllm import LLM, SamplingParams

    engine = LLM(
        model,
        dtype=options["dtype"],
        max_model_len=options["length"] + 16,
        max_num_seqs=options["slots"],
        enable_prefix_caching=False,
    )

    def run(prompts: list[list[int]], outputs: list[int]) -> int:
        asked = [{"prompt_token_ids": prompt} for prompt in prompts]
        limits = [SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True) for count in outputs]
        return sum(len(one.outputs[0].token_ids) for one in engine.generate(asked, limits, use_tqdm=False))

    return run


def transformers(model: str, options: dict[str, Any]) -> Run:
    """`generate` on padded batches of `slots` requests, each until its longest output is there."""
    import torch
    from transformers import AutoModelForCausalLM

    folder, _, file = model.rpartition("/")
    place = (
        {"gguf_file": file, "pretrained_model_name_or_path": folder}
        if file.endswith(".gguf")
        else {"pretrained_model_name_or_path": model}
    )
    network = AutoModelForCausalLM.from_pretrained(**place, dtype=getattr(torch, options["dtype"])).eval()

    def batch(prompts: list[list[int]], outputs: list[int]) -> int:
        width, most = max(map(len, prompts)), max(outputs)
        padded = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        length = {"max_new_tokens": most, "min_new_tokens": most, "do_sample": False, "eos_token_id": None}
        with torch.inference_mode():
            made = network.generate(padded, attention_mask=mask, pad_token_id=0, **length)
        return sum(outputs) if made.shape[1] == width + most else 0

    def run(prompts: list[list[int]], outputs: list[int]) -> int:
        size = options["slots"]
        parts = [slice(at, at + size) for at in range(0, len(prompts), size)]
        return sum(batch(prompts[part], outputs[part]) for part in parts)

    return run


def main() -> None:
    name, model, options = sys.argv[1:]
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not come between the lines
    run = {"ours": ours, "vllm": vllm, "transformers": transformers}[name](model, json.loads(options))
    print(json.dumps({"ready": name}), file=replies, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        start = time.perf_counter()
        tokens = run(asked["prompts"], asked["outputs"])
        print(json.dumps({"wall_s": time.perf_counter() - start, "tokens": tokens}), file=replies, flush=True)


if __name__ == "__main__":
    main()
