"""Throughput of the engine alone: random prompts, greedy, a fixed number of tokens, no prefix cache, no HTTP."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import torch

from cloud_engine.bench.figures import Report, milliseconds, spread
from cloud_engine.bench.floor import bandwidth, floor
from cloud_engine.bench.workload import Job, Lengths, jobs, longest
from cloud_engine.engine.build import build, build_random
from cloud_engine.engine.config import EngineConfig
from cloud_engine.engine.engine import Engine
from cloud_engine.model.shapes import Shape
from shared.errors import Internal
from shared.schemas import Sampling

Clock = Callable[[], float]

COPIED_BYTES = 1 << 28
"""More than any cache holds."""


@dataclass(frozen=True, slots=True)
class Round:
    """Seconds from the start to the last token of all; for each request, when its tokens came."""

    wall_s: float
    tokens: int
    arrivals: list[list[float]]

    @property
    def rate(self) -> float:
        return self.tokens / self.wall_s

    @property
    def firsts(self) -> list[float]:
        return [times[0] for times in self.arrivals]

    @property
    def gaps(self) -> list[float]:
        """Between two tokens, or two groups of tokens that one step gave, of the same request."""
        return [after - before for times in self.arrivals for before, after in pairwise(times)]


@dataclass(frozen=True, slots=True)
class Plan:
    """What to measure. In a mix the two lengths are means (see `workload`); each repeat has prompts of its own."""

    n_list: Sequence[int]
    prompt_tokens: int
    output_tokens: int
    lengths: Lengths = "fixed"
    repeats: int = 1
    seed: int = 0


Source = Path | Shape
"""A model's files, or the shape of one with random weights."""


def run(
    model: Source, plan: Plan, options: Mapping[str, Any], report: Report, clock: Clock = time.perf_counter
) -> None:
    """Report a row for each number of requests: n, in, out, wall_s and out_tok_s (medians, with their ranges) and
    percentiles of first-token time and gaps; of a shape also what memory allows at best in the middle of the answers.

    All requests are there from the start, so the wall time includes every prefill. `options` are EngineConfig's.
    Raises ModelInvalid or UnsupportedModel, and ValueError for limits that cannot be kept.
    """
    engine = engine_for(model, max(plan.n_list), longest(plan.lengths, plan.prompt_tokens, plan.output_tokens), options)
    tokens = range(engine.vocab_size)
    # The first steps set up kernels and threads.
    measure(engine, jobs("fixed", max(plan.n_list), 4, 2, tokens=tokens, seed=plan.seed), clock)
    middle = plan.prompt_tokens + plan.output_tokens // 2
    given = bandwidth(torch.device(engine.config.device), COPIED_BYTES) if isinstance(model, Shape) else 0.0
    for n in plan.n_list:
        sizes = plan.lengths, n, plan.prompt_tokens, plan.output_tokens
        seeds = range(plan.seed, plan.seed + plan.repeats)
        row = _row(n, plan, [measure(engine, jobs(*sizes, tokens=tokens, seed=seed), clock) for seed in seeds])
        report.add(row | (floor(model, engine.config, n, middle, given) if isinstance(model, Shape) else {}))


def measure(engine: Engine, work: Sequence[Job], clock: Clock) -> Round:
    """All requests at once, each to its last token. Raises Internal if the engine gave another number of tokens."""
    arrivals: dict[str, list[float]] = {str(index): [] for index in range(len(work))}
    start = clock()
    sequences = [
        engine.add(str(index), job.prompt, Sampling(temperature=0, max_tokens=job.output, ignore_eos=True))
        for index, job in enumerate(work)
    ]
    while engine.has_work:
        outputs, now = engine.step(), clock() - start
        for name in {output.sequence.id for output in outputs}:
            arrivals[name].append(now)
    wall = clock() - start
    if any(sequence.num_output != job.output for sequence, job in zip(sequences, work, strict=True)):
        raise Internal("the engine did not generate the tokens that were asked for")
    return Round(wall, sum(job.output for job in work), list(arrivals.values()))


def engine_for(model: Source, n: int, length: int, options: Mapping[str, Any]) -> Engine:
    """An engine with room for this load, so that the pool's size is no part of the measurement. Without drafts unless
    `options` ask for them: what a model says to random tokens turns in circles, which makes them easy."""
    asked = EngineConfig(model_len=length, max_num_seqs=n, max_waiting=n, prefix_caching=False, drafting=False)
    asked = replace(asked, **options)
    if not asked.num_blocks:
        # One block more for each than it fills: what the scheduler keeps free for the running ones to grow into.
        asked = replace(asked, num_blocks=1 + n * (2 + length // asked.block_size))
    return build(model, asked) if isinstance(model, Path) else build_random(model, asked)


def _row(n: int, plan: Plan, rounds: Sequence[Round]) -> dict[str, Any]:
    return {
        "n": n,
        "in": plan.prompt_tokens,
        "out": plan.output_tokens,
        **spread("wall_s", [one.wall_s for one in rounds], 3),
        **spread("out_tok_s", [one.rate for one in rounds], 1),
        "lengths": plan.lengths,
        "repeats": plan.repeats,
        **milliseconds("ttft", list(chain.from_iterable(one.firsts for one in rounds))),
        **milliseconds("itl", list(chain.from_iterable(one.gaps for one in rounds))),
    }
