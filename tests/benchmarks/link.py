"""First-token time through edge -> WebSocket -> cloud beside the cloud's own HTTP endpoint."""

import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx
import local

PAIRS_PER_ROUND = 12
PROMPT = "{} Please explain in a few sentences why the sky over the sea looks blue at noon and red in the evening."


def measure(model: Path, rounds: int) -> Iterator[tuple[str, Sequence[float]]]:
    """Pairs of requests in alternating order; every prompt is new, so no prefix cache helps either side."""
    direct, through = [], []
    with tempfile.TemporaryDirectory() as folder:
        cloud, edge = local.start_both(Path(folder), str(model), 0, 0)
        try:
            key = (Path(folder) / "edge.key").read_text()
            with (
                httpx.Client(base_url=cloud.url, headers={"authorization": f"Bearer {key}"}, timeout=60) as to_cloud,
                httpx.Client(base_url=edge.url, timeout=60) as to_edge,
            ):
                for number in range(-4, rounds * PAIRS_PER_ROUND):
                    sides = [(to_cloud, direct, "a"), (to_edge, through, "b")]
                    for client, times, side in sides if number % 2 else sides[::-1]:
                        seconds = first_token(client, f"{side}{number + 100}")
                        if number >= 0:
                            times.append(seconds * 1e3)
        finally:
            local.end(edge.process)
            local.end(cloud.process)
    yield "link: cloud's own HTTP, first token, ms", direct
    yield "link: edge -> WebSocket -> cloud, first token, ms", through
    yield (
        "link: through the edge / direct (bar: at most 1.10)",
        [through_s / direct_s for through_s, direct_s in zip(through, direct, strict=True)],
    )


def first_token(client: httpx.Client, name: str) -> float:
    """Seconds from sending the request to the first text. The name leads the prompt, so nothing of it is cached."""
    body = {
        "model": "cloud",
        "messages": [{"role": "system", "content": name}, {"role": "user", "content": PROMPT.format(name)}],
        "max_tokens": 4,
        "temperature": 0,
        "stream": True,
    }
    start = time.perf_counter()
    first = 0.0
    with client.stream("POST", "/v1/chat/completions", json=body) as reply:
        reply.raise_for_status()
        for event in local.events(reply):
            if not first and any(choice["delta"].get("content") for choice in event["choices"]):
                first = time.perf_counter() - start
    return first
