"""First-token time of a prompt of 1,024 tokens: computed, found in the KV cache, and read back from host memory.

Each round has a prompt of its own, so nothing but what the round put there is found. Between the hit on the device and
the one in host memory, other prompts fill the pool until the first is evicted. A bar: a hit costs at most 0.15 of cold.
"""

import random
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from cloud_engine.engine.build import build
from cloud_engine.engine.config import EngineConfig
from cloud_engine.engine.engine import Engine
from shared.schemas import Sampling
from tests.benchmarks.formats import FORMATS
from tests.benchmarks.ratios import Sample, by_pairs

TOKENS = 1024
FIRST = Sampling(temperature=0, max_tokens=1, ignore_eos=True)
Clock = Callable[[], float]


def measure(model: Path, rounds: int) -> Iterator[Sample]:
    """Seconds of each kind, and the ratios to cold, in each format."""
    for name, options in FORMATS.items():
        yield from in_format(model, rounds, name, options)


def in_format(model: Path, rounds: int, form: str, options: Mapping[str, Any]) -> Iterator[Sample]:
    engine = engine_for(model, options)
    first_token(engine, prompt(0, 64), time.perf_counter)  # sets up kernels and threads
    samples = [one_round(engine, seed, time.perf_counter) for seed in range(1, rounds + 1)]
    engine.close()
    colds, hits, hosts = zip(*samples, strict=True)
    yield f"prefix, {form}: cold, s", colds
    yield f"prefix, {form}: hit, s", hits
    yield f"prefix, {form}: hit / cold", by_pairs(hits, colds)
    yield f"prefix, {form}: in host memory, s", hosts
    yield f"prefix, {form}: in host memory / cold", by_pairs(hosts, colds)


def engine_for(model: Path, options: Mapping[str, Any]) -> Engine:
    """A pool that two such prompts fill, and host memory for four."""
    blocks = TOKENS // 16 + 1
    config = EngineConfig(model_len=TOKENS + 16, num_blocks=1 + 2 * blocks, host_blocks=4 * blocks)
    return build(model, replace(config, **options))


def one_round(engine: Engine, seed: int, clock: Clock) -> tuple[float, float, float]:
    """Seconds to the first token: cold, from the device's blocks, from host memory. Raises RuntimeError if what should
    have been found was not, or the reverse."""
    ours = prompt(seed, TOKENS)
    cold, none = timed(engine, ours, clock)
    hit, here = timed(engine, ours, clock)
    for other in (1, 2):
        first_token(engine, prompt(1000 * seed + other, TOKENS), clock)
    loaded = engine.stats().prefix_host_hit_tokens
    host, there = timed(engine, ours, clock)
    loaded = engine.stats().prefix_host_hit_tokens - loaded
    if none or min(here, there) < TOKENS - 16 or loaded < 0.9 * TOKENS:
        raise RuntimeError(f"cached tokens were {none}, {here}, {there}, of which {loaded} from host memory")
    return cold, hit, host


def timed(engine: Engine, tokens: list[int], clock: Clock) -> tuple[float, int]:
    """Seconds, and how many of the prompt's tokens were found."""
    before = engine.stats().prefix_hit_tokens
    seconds = first_token(engine, tokens, clock)
    return seconds, engine.stats().prefix_hit_tokens - before


def first_token(engine: Engine, tokens: list[int], clock: Clock) -> float:
    start = clock()
    sequence = engine.add("one", tokens, FIRST)
    while not sequence.num_output:
        engine.step()
    return clock() - start


def prompt(seed: int, length: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(1000) for _ in range(length)]
