"""The edge daemon beside a bare llama.cpp decode loop, and beside itself at 1 and 8 clients."""

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import local

OUT_TOKENS = 128
CLIENTS = 8
PROMPT = "Request {}: tell me a story about a ship and its friends."


def measure(model: Path, rounds: int) -> Iterator[tuple[str, Sequence[float]]]:
    """Tokens per second while decoding: bare loop, one client, eight clients in sum; and their ratios."""
    bare, single, many = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        daemon = local.start("edge-agent", Path(folder) / "log", "serve", "--model", str(model), "--port", "0")
        try:
            decode_rate(daemon.url, 1, seed=0)
            for number in range(1, rounds + 1):
                bare.append(bare_rate(model))
                single.append(decode_rate(daemon.url, 1, seed=number))
                many.append(decode_rate(daemon.url, CLIENTS, seed=number))
        finally:
            local.end(daemon.process)
    yield "edge: bare llama.cpp loop, tokens/s", bare
    yield "edge: 1 client over HTTP, tokens/s", single
    yield f"edge: {CLIENTS} clients over HTTP, tokens/s in sum", many
    yield "edge: 1 client / bare loop (bar: at least 0.95)", [a / b for a, b in zip(single, bare, strict=True)]
    yield f"edge: {CLIENTS} clients / 1 client (bar: at least 1.3)", [a / b for a, b in zip(many, single, strict=True)]


def bare_rate(model: Path) -> float:
    """A process of its own, as the daemon is one."""
    command = [sys.executable, "-m", "tests.benchmarks.bare_llama", str(model), "1", str(OUT_TOKENS)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


def decode_rate(url: str, clients: int, *, seed: int) -> float:
    """Tokens per second, of all clients in sum, between the first token anybody got and the last one."""
    with ThreadPoolExecutor(clients) as pool:
        spans = list(pool.map(lambda i: stream_span(url, f"{seed}-{i}"), range(clients)))
    after_first = clients * (OUT_TOKENS - 1)
    return after_first / (max(last for _, last in spans) - min(first for first, _ in spans))


def stream_span(url: str, name: str) -> tuple[float, float]:
    """When the first and the last text of one answer arrived. `ignore_eos` makes every answer equally long."""
    body = {
        "model": "edge",
        "messages": [{"role": "user", "content": PROMPT.format(name)}],
        "max_tokens": OUT_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    stamps: list[float] = []
    tokens = 0
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=300) as reply:
        reply.raise_for_status()
        for event in local.events(reply):
            if any(choice["delta"].get("content") for choice in event["choices"]):
                stamps.append(time.perf_counter())
            if event.get("usage"):
                tokens = event["usage"]["completion_tokens"]
    if tokens != OUT_TOKENS:
        raise RuntimeError(f"{tokens} tokens instead of {OUT_TOKENS}")
    return stamps[0], stamps[-1]
