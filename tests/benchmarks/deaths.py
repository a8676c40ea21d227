"""The model's process is killed again and again under load: what clients of the daemon see of it.

    PYTHONPATH=deploy python -m tests.benchmarks deaths --rounds 1

Every client has a word of its own and asks for lines of it, so another's word in its answer shows that two were mixed.
A bar: 50 deaths, nobody waits more than 2 s for the next thing to happen, no answer is mixed, the daemon stays up.
"""

import asyncio
import json
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import local
import psutil

KILLS = 50
TOKENS = 12
WORDS = ("zebra", "violin", "falcon", "cactus", "marble", "walnut", "glacier", "lantern")
START_S = 60.0
PROCESS = "edge_agent.backends.process"


@dataclass(slots=True)
class Asked:
    """One request under way: when something last happened to it, and whether a death has it waiting."""

    heard: float
    since_death: float | None = None


@dataclass(slots=True)
class Seen:
    """What clients saw. `silences`: from each death to the next thing that a waiting client heard, in seconds."""

    done: int = 0
    failed: int = 0
    refused: int = 0
    mixed: list[str] = field(default_factory=list)
    on_topic: int = 0
    """Pieces of answers in which the client's own word stands."""
    silences: list[float] = field(default_factory=list)
    restarts: int = 0
    running: dict[int, Asked] = field(default_factory=dict)

    def heard(self, number: int) -> None:
        asked, now = self.running[number], time.perf_counter()
        if asked.since_death is not None:
            self.silences.append(now - asked.since_death)
        asked.heard, asked.since_death = now, None


def measure(model: Path, rounds: int) -> Iterator[tuple[str, Sequence[float]]]:
    seen = [kill_under_load(model, KILLS, seed) for seed in range(rounds)]
    yield f"deaths: restarts of {KILLS}", [one.restarts for one in seen]
    yield "deaths: answers complete", [one.done for one in seen]
    yield "deaths: answers that ended with an error", [one.failed for one in seen]
    yield "deaths: requests refused meanwhile", [one.refused for one in seen]
    yield "deaths: answers that were not the request's (bar: 0)", [len(one.mixed) for one in seen]
    yield "deaths: longest silence after a death, s (bar: at most 2)", [max(one.silences) for one in seen]


def kill_under_load(model: Path, kills: int, seed: int, clients: int = len(WORDS)) -> Seen:
    """Raises if the daemon does not serve on after the last death."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = ("serve", "--model", str(model), "--port", "0", "--context", "256", "--slots", str(clients))
        daemon = local.start("edge-agent", Path(folder) / "log", *arguments)
        try:
            return asyncio.run(_run(daemon, kills, WORDS[:clients], random.Random(seed)))
        finally:
            local.end(daemon.process)


async def _run(daemon: local.Daemon, kills: int, words: Sequence[str], rng: random.Random) -> Seen:
    seen, numbers = Seen(), iter(range(1_000_000))
    async with httpx.AsyncClient(base_url=daemon.url, timeout=START_S) as http:
        clients = [asyncio.create_task(_client(http, seen, numbers, word)) for word in words]
        for _ in range(kills):
            await _until_answering(http, seen)
            await asyncio.sleep(rng.random() * 0.3)
            now = time.perf_counter()
            for asked in seen.running.values():
                asked.since_death = asked.since_death or now
            _model_process(daemon).kill()
        await _until_answering(http, seen)
        for client in clients:
            client.cancel()
        await asyncio.gather(*clients, return_exceptions=True)
        metrics = (await http.get("/metrics")).text
    seen.restarts = int(float(metrics.split("\ncauseway_edge_restarts_total ")[1].split("\n")[0]))
    return seen


def _model_process(daemon: local.Daemon) -> psutil.Process:
    (process,) = [child for child in daemon.process.children() if PROCESS in child.cmdline()]
    return process


async def _until_answering(http: httpx.AsyncClient, seen: Seen) -> None:
    """The process is there again and somebody has got an answer from it."""
    deadline, before = time.monotonic() + START_S, seen.done
    while seen.done == before or (await http.get("/health")).json()["edge"] != "ready":
        if time.monotonic() > deadline:
            raise RuntimeError("it does not come back")
        await asyncio.sleep(0.02)


async def _client(http: httpx.AsyncClient, seen: Seen, numbers: Iterator[int], word: str) -> None:
    while True:
        number = next(numbers)
        seen.running[number] = Asked(time.perf_counter())
        try:
            await _ask(http, seen, number, word)
        finally:
            seen.heard(number)
            del seen.running[number]


async def _ask(http: httpx.AsyncClient, seen: Seen, number: int, word: str) -> None:
    body = {"model": "edge", "prompt": f"{number}: {word}" + f" {word}" * 20, "max_tokens": TOKENS, "temperature": 0}
    pieces, ended, failed = list[str](), False, False
    async with http.stream("POST", "/v1/completions", json=body | {"ignore_eos": True, "stream": True}) as reply:
        if reply.status_code != 200:
            seen.refused += 1
            seen.heard(number)
            await asyncio.sleep(0.25)
            return
        async for line in reply.aiter_lines():
            seen.heard(number)
            ended = ended or line == "data: [DONE]"
            with suppress(json.JSONDecodeError):
                event = json.loads(line.removeprefix("data: "))
                failed = failed or "error" in event
                pieces += [choice.get("text") or "" for choice in event.get("choices", ())]
    text = "".join(pieces)
    if failed or not ended:
        seen.failed += 1
    else:
        seen.done += 1
    seen.on_topic += word in text
    if any(other in text for other in WORDS if other != word):
        seen.mixed.append(f"{word}: {text}")
