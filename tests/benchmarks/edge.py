"""The edge daemon at 1 and at 8 clients, beside a bare llama.cpp loop over as many sequences."""

import http.client
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import local

OUT_TOKENS = 128
CLIENTS = 8
PROMPT = "Request {}: tell me a story about a ship and its friends."


def measure(model: Path, rounds: int) -> Iterator[tuple[str, Sequence[float]]]:
    """Tokens per second while decoding: bare loops, one client, eight clients in sum; and their ratios."""
    bare, batched, single, many = [], [], [], []
    with tempfile.TemporaryDirectory() as folder:
        daemon = local.start("edge-agent", Path(folder) / "log", "serve", "--model", str(model), "--port", "0")
        try:
            decode_rate(daemon.url, 1, seed=0)
            for number in range(1, rounds + 1):
                bare.append(bare_rate(model, 1))
                single.append(decode_rate(daemon.url, 1, seed=number))
                batched.append(bare_rate(model, CLIENTS))
                many.append(decode_rate(daemon.url, CLIENTS, seed=number))
        finally:
            local.end(daemon.process)
    yield "edge: bare llama.cpp loop, tokens/s", bare
    yield f"edge: bare llama.cpp loop over {CLIENTS} sequences, tokens/s", batched
    yield "edge: 1 client over HTTP, tokens/s", single
    yield f"edge: {CLIENTS} clients over HTTP, tokens/s in sum", many
    yield "edge: 1 client / bare loop (bar: at least 0.95)", [a / b for a, b in zip(single, bare, strict=True)]
    yield (
        f"edge: {CLIENTS} clients / bare loop (bar: at least 0.95)",
        [a / b for a, b in zip(many, batched, strict=True)],
    )
    yield f"edge: {CLIENTS} clients / 1 client (bar: at least 1.4)", [a / b for a, b in zip(many, single, strict=True)]


def bare_rate(model: Path, n_seqs: int) -> float:
    """A process of its own, as the daemon is one."""
    command = [sys.executable, "-m", "tests.benchmarks.bare_llama", str(model), str(n_seqs), str(OUT_TOKENS)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


def decode_rate(url: str, clients: int, *, seed: int) -> float:
    """Tokens per second, of all clients in sum, between the first token anybody got and the last one."""
    with ThreadPoolExecutor(clients) as pool:
        spans = list(pool.map(lambda i: stream_span(url, f"{seed}-{i}"), range(clients)))
    after_first = clients * (OUT_TOKENS - 1)
    return after_first / (max(last for _, last in spans) - min(first for first, _ in spans))


def stream_span(url: str, name: str) -> tuple[float, float]:
    """When the first and the last text of one answer arrived. `ignore_eos` makes every answer equally long.

    A client as light as can be, which parses afterwards: it runs on the cores that are being measured.
    """
    body = {
        "model": "edge",
        "messages": [{"role": "user", "content": PROMPT.format(name)}],
        "max_tokens": OUT_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    arrived: list[tuple[float, bytes]] = []
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=300)
    with closing(connection):
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json"})
        reply = connection.getresponse()
        while data := reply.read1(1 << 16):
            arrived.append((time.perf_counter(), data))
    texts = [stamp for stamp, data in arrived if b'"content":"' in data and b'"content":""' not in data]
    if f'"completion_tokens":{OUT_TOKENS}'.encode() not in b"".join(data for _, data in arrived):
        raise RuntimeError(f"status {reply.status}: not {OUT_TOKENS} tokens")
    return texts[0], texts[-1]
