"""What a long prompt costs those who decode: their worst gap between tokens, before and while it is computed.

PYTHONPATH=deploy python -m tests.benchmarks interference --rounds 5
"""

import random
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from cloud_engine.bench.offline import engine_for
from cloud_engine.engine.engine import Engine
from shared.schemas import Sampling
from tests.benchmarks.formats import FORMATS
from tests.benchmarks.ratios import Sample

DECODING, QUIET_STEPS = 8, 40
LONG_PROMPT = 2048
TOKENS = range(100, 40_000)


def measure(model: Path, rounds: int) -> Iterator[Sample]:
    """In each format. Each round has prompts of its own. A bar: the worst gap grows by at most one chunk's time."""
    for name, options in FORMATS.items():
        yield from in_format(model, rounds, name, options)


def in_format(model: Path, rounds: int, form: str, options: Mapping[str, Any]) -> Iterator[Sample]:
    engine = engine_for(model, DECODING + 1, LONG_PROMPT + 512, options)
    rng, names = random.Random(0), map(str, count())
    prefill_alone(engine, next(names), rng)  # the first steps set up kernels and threads
    gaps = [gaps_of_others(engine, names, rng) for _ in range(rounds)]
    quiet, loaded, chunk = zip(*gaps, strict=True)
    yield f"interference, {form}: worst gap of {DECODING} decoding, ms", quiet
    yield f"interference, {form}: worst gap while {LONG_PROMPT} tokens are prefilled, ms", loaded
    yield f"interference, {form}: slowest chunk of that prompt alone, ms", chunk
    yield (
        f"interference, {form}: growth of the worst gap / chunk (bar: at most 1)",
        [(after - before) / one for before, after, one in zip(quiet, loaded, chunk, strict=True)],
    )


def gaps_of_others(engine: Engine, names: Iterator[str], rng: random.Random) -> tuple[float, float, float]:
    """Milliseconds: the worst step before and while the long prompt is computed, and its slowest chunk alone."""
    decoding = [next(names) for _ in range(DECODING)]
    for name in decoding:
        engine.add(name, prompt(rng, 32), Sampling(temperature=0, max_tokens=400, ignore_eos=True))
    for _ in range(4):
        engine.step()  # past their own prefill
    quiet = max(timed_step(engine) for _ in range(QUIET_STEPS))
    late = engine.add(next(names), prompt(rng, LONG_PROMPT), Sampling(temperature=0, max_tokens=2, ignore_eos=True))
    loaded = []
    while not late.num_output:
        loaded.append(timed_step(engine))
    for name in decoding:
        engine.abort(name)
    while engine.has_work:
        engine.step()
    return quiet, max(loaded), prefill_alone(engine, next(names), rng)


def prefill_alone(engine: Engine, name: str, rng: random.Random) -> float:
    engine.add(name, prompt(rng, LONG_PROMPT), Sampling(temperature=0, max_tokens=1, ignore_eos=True))
    steps = []
    while engine.has_work:
        steps.append(timed_step(engine))
    return max(steps)


def timed_step(engine: Engine) -> float:
    start = time.perf_counter()
    engine.step()
    return (time.perf_counter() - start) * 1e3


def prompt(rng: random.Random, size: int) -> Sequence[int]:
    return [rng.choice(TOKENS) for _ in range(size)]
