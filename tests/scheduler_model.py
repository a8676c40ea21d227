"""What tests of the scheduler share: small limits, sequences, and steps without a model."""

import math

from cloud_engine.engine.blocks import chain_root
from cloud_engine.engine.config import EngineConfig
from cloud_engine.engine.scheduler import Scheduler
from cloud_engine.engine.sequence import Sequence
from shared.schemas import Priority, Sampling


def limits(**changes) -> EngineConfig:
    values = {"model_len": 64, "block_size": 4, "num_blocks": 40, "max_num_seqs": 8, "max_num_batched_tokens": 16}
    return EngineConfig(**(values | changes))


def request(
    name: str,
    prompt: int | list[int] = 4,
    output: int = 4,
    *,
    tenant: str = "",
    priority: Priority = "interactive",
    deadline: float = math.inf,
) -> Sequence:
    """A sequence of `prompt` tokens, its own if only their number is given, that makes `output` more."""
    tokens = list(prompt) if isinstance(prompt, list) else [hash(name) % 1000 + 10] * prompt
    return Sequence(
        id=name,
        tokens=tokens,
        sampling=Sampling(),
        max_tokens=output,
        seed=0,
        stop_ids=frozenset({7}),
        root=chain_root(tenant),
        tenant=tenant,
        priority=priority,
        deadline=deadline,
    )


def advance(scheduler: Scheduler, token: int = 1) -> dict[str, int]:
    """One step in which every sampled token is `token`: how many tokens each sequence computed."""
    work = scheduler.schedule()
    scheduler.settle(work, [[token] for item in work if item.samples])
    return {item.sequence.id: item.count for item in work}


def drain(scheduler: Scheduler, steps: int = 10_000) -> list[str]:
    """Run to the end: the ids in the order in which they finished."""
    finished: list[str] = []
    for _ in range(steps):
        before = dict(scheduler.live)
        if not before:
            return finished
        advance(scheduler)
        finished += [name for name in before if name not in scheduler.live]
    raise AssertionError(f"{len(scheduler.live)} sequences are not finished after {steps} steps")
