"""What one decision takes: features, privacy, difficulty, rules. Bars: p50 0.5 ms, p99 1.5 ms, on one core.

Prompts of up to 1,000 characters, under `deploy/policy.yaml` with an expression added: it asks for everything. Once as
the functions that decide (`observe` and `decide`, as the bar says), and once as a request meets them: `Agent.plan`,
which asks for the policy, the link and what was spent, too, and makes the journal's record. Not in either: the sensors'
readings, which are taken beside requests, and the tokenizer, in whose place tokens are estimated. The
detector alone, on 30,000 hostile characters: at most 10 ms. Placeholders put back over random splits: no mismatch.
"""

import asyncio
import random
import statistics
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from edge_agent.agent import Agent
from edge_agent.backends.cloud import Link
from edge_agent.offload import Offload
from router.decide import decide
from router.features import DeviceReading, LinkReading, estimate_tokens
from router.observe import observe
from router.policy import Policy, parse
from router.privacy.detect import Detector, Undecided
from router.privacy.inspect import redacted
from shared.schemas import ChatRequest, Message
from tests.benchmarks.ratios import Sample

POLICY = Path(__file__).parents[2] / "deploy" / "policy.yaml"
EXPRESSION = "  - {name: said, when: 'difficulty > 0.9 && hour > 3 && !personal', target: cloud}\n"
WORDS = "the quick report of march says that they paid 12 euros for a train to Rome, why def f(x): solve 3 + 4"
PERSONAL = ("+49 30 {}", "anna{}@example.org", "10.0.0.{}", "password={}")
REQUESTS, SPLITS_A_ROUND = 2000, 12_000
HOSTILE = ("4" * 30_000, "a@" * 15_000, "+49 " * 7_500, "%34" * 10_000, "QUtJ" * 7_500, "1.2.3." * 5_000)


def measure(_: Path, rounds: int) -> Iterator[Sample]:
    """Milliseconds, and mismatches."""
    policy = parse(POLICY.read_text().rstrip() + "\n" + EXPRESSION)
    for name, decide_one in (("decision", functions(policy)), ("decision by the agent", agent(policy))):
        taken = [asyncio.run(timed(decide_one, seed)) for seed in range(rounds + 1)][1:]  # the first reads the weights
        yield f"{name} p50, ms", [quantile(times, 50) for times in taken]
        yield f"{name} p99, ms", [quantile(times, 99) for times in taken]
    detector = Detector()
    yield "detector, worst of the hostile, ms", [worst(detector) for _ in range(rounds)]
    yield f"mismatches in {SPLITS_A_ROUND} restored splits", [mismatches(seed) for seed in range(rounds)]


Deciding = Callable[[ChatRequest], Awaitable[object]]
DEVICE = DeviceReading(model="small", context_length=2048, prefill_tokens_per_s=500.0, tokens_per_s=50.0, hour=9.0)
DEVICES = [replace(DEVICE, queue_depth=waiting) for waiting in range(3)]


def functions(policy: Policy) -> Deciding:
    link = LinkReading(model="large", context_length=8192, round_trip_s=0.03, first_token_s=0.3)

    async def decide_one(asked: ChatRequest) -> object:
        features = observe(asked, policy, prompt_tokens=estimate_tokens(asked))
        return decide(features, policy, device=DEVICES[features.prompt_tokens % 3], link=link)

    return decide_one


def agent(policy: Policy) -> Deciding:
    """With a model that is still loading, as far as its tokenizer goes, and a connection that is up."""
    local: Any = SimpleNamespace(named=lambda _: local, reading=lambda: SimpleNamespace(available=False))
    up = Link(connected=True, round_trip_s=0.03, model="large", context_length=8192)
    cloud: Any = SimpleNamespace(link=lambda: up)
    planning = Agent(local, Offload(cloud), policy=lambda _: policy, device=lambda _: DEVICE)
    return planning.plan


async def timed(decide_one: Deciding, seed: int) -> list[float]:
    """Milliseconds of each decision."""
    chance = random.Random(seed)
    times = []
    for number in range(REQUESTS):
        asked = request(text(chance, chance.randint(20, 1000)), number)
        started = time.perf_counter()
        await decide_one(asked)
        times.append((time.perf_counter() - started) * 1000)
    return times


def worst(detector: Detector) -> float:
    times = []
    for hostile in HOSTILE:
        started = time.perf_counter()
        with suppress(Undecided):  # too much of it: it stays on the device
            detector.find(hostile)
        times.append((time.perf_counter() - started) * 1000)
    return max(times)


def mismatches(seed: int) -> int:
    """Redacted texts streamed back in random pieces: how many come out other than they went in."""
    chance, detector, wrong = random.Random(seed), Detector(), 0
    for number in range(SPLITS_A_ROUND // 100):
        original = text(chance, 400)
        hidden, redaction = redacted(request(original, number), detector, b"secret")
        answer = hidden.messages[0].content
        for _ in range(100):
            restorer, at, out = redaction.restorer(), 0, ""
            while at < len(answer):
                size = chance.randint(1, 12)
                out, at = out + restorer.push(answer[at : at + size]), at + size
            wrong += out + restorer.flush() != original
    return wrong


def request(content: str, number: int) -> ChatRequest:
    return ChatRequest(id=f"r{number}", model="auto", messages=(Message(role="user", content=content),))


def text(chance: random.Random, length: int) -> str:
    """Prose with code and sums in it, and something personal now and then."""
    said, words = "", WORDS.split()
    while len(said) < length:
        personal = chance.random() < 0.02
        said += f"{chance.choice(PERSONAL).format(chance.randint(10**6, 10**7)) if personal else chance.choice(words)} "
    return said[:length].strip()


def quantile(values: list[float], percent: int) -> float:
    return statistics.quantiles(values, n=100)[percent - 1]
