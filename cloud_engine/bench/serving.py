"""Runs of load on a server, one after the other: what `cloud-engine bench-serve` does."""

import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from cloud_engine.bench.figures import Report
from cloud_engine.bench.load import Ask, Objective, Reply, Target, closed_loop, open_loop, poisson, summary
from cloud_engine.bench.workload import Lengths, jobs
from shared.config import ENV_PREFIX, InvalidSettings

STOP_S = 30.0
LISTENING = "listening on "


@dataclass(frozen=True, slots=True)
class Plan:
    """Rows of open load (`rates`, requests a second) and of closed load (`clients`). In a mix the lengths are means."""

    rates: Sequence[float]
    clients: Sequence[int]
    requests: int
    prompt_tokens: int
    output_tokens: int
    lengths: Lengths = "fixed"
    repeats: int = 1
    seed: int = 0
    warm_up: int = 4
    objective: Objective = field(default_factory=Objective)

    def asks(self, target: Target, seed: int) -> list[Ask]:
        sizes = jobs(self.lengths, self.requests, self.prompt_tokens, self.output_tokens, tokens=range(1), seed=seed)
        rng = random.Random(seed)  # noqa: S311 - not a secret
        return [target.ask(len(job.prompt), job.output, rng) for job in sizes]


async def run(target: Target, plan: Plan, report: Report) -> None:
    """Report a row for each rate (`load` is requests a second) and each number of clients, `repeats` times, each with
    prompts and arrivals of its own."""
    rng = random.Random(-1)  # noqa: S311 - not a secret
    first = [target.ask(plan.prompt_tokens, plan.output_tokens, rng) for _ in range(plan.warm_up)]
    await closed_loop(target, first, max(1, plan.warm_up))
    loads = [("open", rate) for rate in plan.rates] + [("closed", clients) for clients in plan.clients]
    for seed in range(plan.seed, plan.seed + plan.repeats):
        for at, (loop, load) in enumerate(loads):
            asks = plan.asks(target, len(loads) * seed + at)
            replies, wall_s = await _load(loop, load, target, asks, seed)
            counted = summary(replies, [ask.output for ask in asks], wall_s, plan.objective)
            report.add({"loop": loop, "load": load, "seed": seed} | counted)


async def _load(loop: str, load: float, target: Target, asks: list[Ask], seed: int) -> tuple[list[Reply], float]:
    if loop == "open":
        return await open_loop(target, asks, poisson(load, len(asks), seed))
    return await closed_loop(target, asks, int(load))


@contextmanager
def started(model: str, settings: Mapping[str, str]) -> Iterator[str]:
    """The base URL of a `cloud-engine serve` of its own on a free port. Raises InvalidSettings if it does not start."""
    asked = {"log_level": "warning", "concurrent": "0", **settings}
    env = {**os.environ, **{f"{ENV_PREFIX}{name.upper()}": value for name, value in asked.items()}}
    command = [sys.executable, "-m", "cloud_engine", "serve", "--model", model, "--port", "0"]
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=log, text=True) as process,
    ):
        try:
            line = process.stdout.readline() if process.stdout else ""
            if not line.startswith(LISTENING):
                log.seek(0)
                raise InvalidSettings(log.read().strip()[-2000:] or "the engine did not start")
            yield f"{line.removeprefix(LISTENING).strip()}/v1"
        finally:
            process.terminate()
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
