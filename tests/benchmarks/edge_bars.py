"""What the edge daemon promises of its runtime, one figure after the other, each daemon as a client sees it.

    PYTHONPATH=deploy python -m tests.benchmarks edge_bars --rounds 3

Memory is the proportional share (PSS) of all its processes. Every prompt is new, unless it is said otherwise.
"""

import asyncio
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import local
import msgspec
import psutil

from cloud_engine.bench.load import Ask, Reply, Target, closed_loop, open_loop, read
from edge_agent.facts import facts_of
from tests.benchmarks.ratios import Sample, by_pairs

SLOTS, CONTEXT = 8, 2048
LONG_PROMPT, SYSTEM_PROMPT, CROWD = 2000, 1000, 100
WRITTEN, BEGAN_S = 700, 4.0
"""Tokens of those that are being written, and when the long prompt comes."""
LOAD = """
import sys, time
from pathlib import Path
from edge_agent.backends.native import Native
began = time.perf_counter()
Native(Path(sys.argv[1]), slots=8, context=2048, threads=None)
print(time.perf_counter() - began)
"""


def measure(model: Path, rounds: int) -> Iterator[Sample]:
    """See the bars in the names."""
    starts, loads, idles = list[float](), list[float](), list[float]()
    rows: list[dict[str, float]] = []
    for seed in range(rounds):
        loads.append(load_s(model))
        began = time.perf_counter()
        with serving(model) as (target, process):
            starts.append(time.perf_counter() - began)
            idles.append(pss(process) / 2**20)
            rows.append(asyncio.run(one_round(target, random.Random(seed))))
    both = zip(starts, loads, strict=True)
    beside = (model.stat().st_size + SLOTS * CONTEXT * facts_of(model).kv_bytes) / 2**20
    yield "edge: start to ready, s", starts
    yield "edge: start to ready less the model's load, s (bar: at most 2)", [a - b for a, b in both]
    yield "edge: memory of the idle daemon, MiB", idles
    yield "edge: the same less model file and KV, MiB (bar: at most 300)", [idle - beside for idle in idles]
    for name in rows[0]:
        yield f"edge: {name}", [row[name] for row in rows]
    yield (
        "edge: worst gap while a long prompt is read / worst before (bar: at most 3)",
        by_pairs([row["worst gap then, ms"] for row in rows], [row["worst gap of 7 decoding, ms"] for row in rows]),
    )
    yield (
        "edge: first token after the same system prompt / first (bar: at most 0.1)",
        by_pairs([row["first token, found, s"] for row in rows], [row["first token, 1,000 tokens, s"] for row in rows]),
    )


@contextmanager
def serving(model: Path) -> Iterator[tuple[Target, psutil.Process]]:
    """A daemon with the default slots and context, without a cache of answers."""
    with tempfile.TemporaryDirectory() as folder:
        settings = Path(folder) / "edge.toml"
        settings.write_text("cache = false\n")
        arguments = ("serve", "--model", str(model), "--port", "0", "--config", str(settings))
        daemon = local.start("edge-agent", Path(folder) / "log", *arguments)
        try:
            yield Target(f"{daemon.url}/v1", "edge"), daemon.process
        finally:
            local.end(daemon.process)


def load_s(model: Path) -> float:
    done = subprocess.run([sys.executable, "-c", LOAD, str(model)], check=True, capture_output=True, text=True)
    return float(done.stdout)


def pss(process: psutil.Process) -> int:
    """Bytes of a process and its children: what they share with others is counted by its share."""
    family = [process, *process.children(recursive=True)]
    return sum(one.memory_full_info().pss for one in family)


async def one_round(target: Target, rng: random.Random) -> dict[str, float]:
    await closed_loop(target, [target.ask(8, 8, rng)], 1)
    before, then = await gaps_beside_a_long_prompt(target, rng)
    cold, found = await system_prompt(target, rng)
    answered, refused, others = await crowd(target, rng)
    return {
        "worst gap of 7 decoding, ms": before * 1e3,
        "worst gap then, ms": then * 1e3,
        "first token, 1,000 tokens, s": cold,
        "first token, found, s": found,
        f"{CROWD} clients: answered": answered,
        f"{CROWD} clients: refused, with Retry-After": refused,
        f"{CROWD} clients: anything else (bar: 0)": others,
    }


async def gaps_beside_a_long_prompt(target: Target, rng: random.Random) -> tuple[float, float]:
    """Seven answers are being written; then a prompt of 2,000 tokens is read. Their worst gap before and then, in s."""
    asks = [*(target.ask(8, WRITTEN, rng) for _ in range(SLOTS - 1)), target.ask(LONG_PROMPT, 1, rng)]
    replies, _ = await open_loop(target, asks, [*[0.0] * (SLOTS - 1), BEGAN_S])
    ended = BEGAN_S + read(replies.pop(), 1).texts[0]
    before, then = list[float](), list[float]()
    for reply in replies:
        for one, other in pairwise(read(reply, WRITTEN).texts):
            if one > BEGAN_S / 2 and other < BEGAN_S:
                before.append(other - one)
            elif one > BEGAN_S and other < ended:
                then.append(other - one)
    return max(before), max(then)


async def system_prompt(target: Target, rng: random.Random) -> tuple[float, float]:
    """First-token seconds of two questions after the same 1,000 tokens."""
    system = target.ask(SYSTEM_PROMPT, 1, rng).body
    text = msgspec.json.decode(system)["prompt"]
    firsts = []
    for question in ("one", "two"):
        body = msgspec.json.decode(system) | {"prompt": f"{text} Now {question}:", "max_tokens": 4}
        (reply,), _ = await closed_loop(target, [Ask(msgspec.json.encode(body), 4)], 1)
        firsts.append(read(reply, 4).texts[0])
    return firsts[0], firsts[1]


async def crowd(target: Target, rng: random.Random) -> tuple[int, int, int]:
    """All at once: how many are answered in full, refused as they should be, and neither."""
    replies, _ = await closed_loop(target, [target.ask(8, 16, rng) for _ in range(CROWD)], CROWD)
    answered = sum(read(reply, 16).error is None for reply in replies)
    refused = sum(map(is_refusal, replies))
    return answered, refused, CROWD - answered - refused


def is_refusal(reply: Reply) -> bool:
    """429 or 503 whose body says when to come back: its header is checked by the daemon's own tests."""
    return reply.broken is None and reply.status in (429, 503)
