"""How far off predicted times are: prompts of 80 to 600 tokens, one at a time and eight at once, on the device.

Errors are shares of what it took, from the daemon's own journal: predicted before the request ran, held against what
happened. The answers are of a known length (`ignore_eos`), so that the length, which nobody knows, is not in them. The
first round is left out: nothing is predicted before something was measured.
"""

import json
import random
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import local

from router.records import Recorded, read

CLIENTS = 8
OUT_TOKENS = 32
WORDS = (20, 60, 150, 300)


def measure(model: Path, rounds: int) -> Iterator[tuple[str, Sequence[float]]]:
    with tempfile.TemporaryDirectory() as name:
        folder, rng = Path(name), random.Random(7)
        daemon = local.start("edge-agent", folder / "log", "serve", "--model", str(model), "--port", "0")
        try:
            alone = sum(one_by_one(daemon.url, rng) for _ in range(rounds + 1))
            for _ in range(rounds):
                at_once(daemon.url, rng)
        finally:
            local.end(daemon.process)
        (journal,) = folder.rglob("journal.db")
        records = list(read(journal))
    yield from errors("one at a time", records[len(WORDS) : alone])
    yield from errors(f"{CLIENTS} at once", records[alone:])


def errors(what: str, records: Sequence[Recorded]) -> Iterator[tuple[str, Sequence[float]]]:
    off = [(one.prediction_errors, one.outcome) for one in records if one.went_well]
    first = [e.first_token_s / o.first_token_s for e, o in off if e.first_token_s is not None and o.first_token_s]
    total = [e.total_s / o.total_s for e, o in off if e.total_s is not None and o.total_s]
    yield f"predictions, {what}: first token off by, as a share of it", first
    yield f"predictions, {what}: whole answer off by, as a share of it", total


def one_by_one(url: str, rng: random.Random) -> int:
    for words in WORDS:
        ask(url, words, rng.randrange(10**9))
    return len(WORDS)


def at_once(url: str, rng: random.Random) -> None:
    """Different lengths; they find each other running, not all at the start."""
    with ThreadPoolExecutor(CLIENTS) as pool:
        list(pool.map(lambda words: ask(url, words, rng.randrange(10**9)), WORDS * (CLIENTS // len(WORDS))))


def ask(url: str, words: int, seed: int) -> None:
    """A prompt that nobody has asked before, from its first word on."""
    rng = random.Random(seed)
    prompt = " ".join(
        f"{rng.choice(('ship', 'river', 'bridge', 'stone'))} {rng.randrange(100)}" for _ in range(words // 2)
    )
    message = {"role": "user", "content": f"{seed} {prompt}"}
    body = {"model": "edge", "messages": [message], "max_tokens": OUT_TOKENS, "ignore_eos": True, "seed": 1}
    headers = {"content-type": "application/json", "cache-control": "no-store"}
    httpx.post(f"{url}/v1/chat/completions", content=json.dumps(body), headers=headers, timeout=300).raise_for_status()
