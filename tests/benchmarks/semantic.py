"""The semantic cache: pairs that must not match and pairs that may, by vectors alone and with the guards; and what the
vectors cost. Needs `edge-agent pull all-minilm`."""

import asyncio
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import psutil

from edge_agent.cache.guards import difference, read
from edge_agent.embedder import Embedder
from router.clauses import SemanticRules
from shared.models import default_store

PAIRS = Path(__file__).parents[1] / "edge_agent" / "cache" / "pairs"
THRESHOLDS = (0.7, 0.8, 0.85, 0.9, 0.95, 0.99)
SHORT = "Why does the sky over the sea look blue at noon?"
Rows = Iterator[tuple[str, Sequence[float]]]


def measure(_: Path, rounds: int) -> Rows:
    yield from asyncio.run(_measure(rounds))


async def _measure(rounds: int) -> list[tuple[str, Sequence[float]]]:
    embedder = Embedder.named("all-minilm", default_store(os.environ, Path.home()))
    try:
        costs = await _costs(embedder, rounds)
        return [*await _rates(embedder), *costs]
    finally:
        await embedder.aclose()


async def _rates(embedder: Embedder) -> list[tuple[str, Sequence[float]]]:
    """Shares in percent, of all pairs and of those written after the guards' tables."""
    made = list[tuple[str, Sequence[float]]]()
    default = SemanticRules().threshold
    for what, all_files in (
        ("false hits", ("near_misses", "held_out")),
        ("hits", ("paraphrases", "held_out_paraphrases")),
    ):
        for files in (all_files, all_files[1:]):
            pairs = [line.split("\t")[1:] for file in files for line in _lines(file)]
            cosines = await _cosines(embedder, pairs)
            passed = np.array([_passes(*pair) for pair in pairs])
            name = f"semantic: {what} of {len(pairs)} pairs" + (" (held out)" if files != all_files else "")
            for threshold in THRESHOLDS if files == all_files else (default,):
                near = cosines >= threshold
                made.append((f"{name}, vectors alone, from {threshold:g}, %", [100 * float(near.mean())]))
                made.append((f"{name}, with guards, from {threshold:g}, %", [100 * float((near & passed).mean())]))
    return made


def _lines(file: str) -> list[str]:
    return (PAIRS / f"{file}.tsv").read_text("utf-8").splitlines()


def _passes(one: str, other: str) -> bool:
    first, second = read(one), read(other)
    return first is not None and second is not None and difference(first, second) is None


async def _cosines(embedder: Embedder, pairs: list[list[str]]) -> np.ndarray:
    sides = [await embedder.embed([pair[side] for pair in pairs]) for side in (0, 1)]
    return np.einsum("nd,nd->n", *sides)


async def _costs(embedder: Embedder, rounds: int) -> list[tuple[str, Sequence[float]]]:
    process = psutil.Process()
    before, began = process.memory_info().rss, time.perf_counter()
    await embedder.embed([SHORT])
    loaded = time.perf_counter() - began
    made: list[tuple[str, Sequence[float]]] = [
        ("embedding: model loaded and first text, ms", [1e3 * loaded]),
        ("embedding: memory it takes, MiB", [(process.memory_info().rss - before) / 2**20]),
    ]
    for count in (1, 8, 64):
        texts = [f"{SHORT} {number}" for number in range(count)]
        made.append(
            (f"embedding: {count} short texts at once, ms a text", [await _ms(embedder, texts) for _ in range(rounds)])
        )
    began = time.perf_counter()
    for _ in range(1000):
        read(SHORT)
    made.append(("guards: one text read, us", [1e3 * (time.perf_counter() - began)]))
    return made


async def _ms(embedder: Embedder, texts: list[str], repeats: int = 10) -> float:
    began = time.perf_counter()
    for _ in range(repeats):
        await embedder.embed(texts)
    return 1e3 * (time.perf_counter() - began) / repeats / len(texts)
