"""What tests do as a client of a running daemon: stream an answer, leave early, read a metric, wait for a fact."""

import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import local
from waiting import HANG_S

HELLO = [{"role": "user", "content": "Say hello to the world."}]


def metric(url: str, name: str, key: str = "any", **labels: str) -> float:
    """Sum of a Prometheus sample over the label sets that have at least `labels`."""
    text = httpx.get(f"{url}/metrics", headers={"authorization": f"Bearer {key}"}).raise_for_status().text
    wanted = [f'{label}="{value}"' for label, value in labels.items()]
    lines = [line for line in text.splitlines() if line.split("{")[0].split(" ")[0] == name]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if all(label in line for label in wanted))


def until(true: Callable[[], bool], seconds: float = HANG_S) -> bool:
    """Poll until it holds; False if it did not within the time."""
    deadline = time.monotonic() + seconds
    while not (held := true()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return held


def stream(client: httpx.Client, **body: Any) -> tuple[list[dict[str, Any]], httpx.Headers]:
    """All events of one streamed chat completion, and the reply's headers."""
    wanted = {"messages": HELLO, "max_tokens": 24, "temperature": 0, "stream": True}
    with client.stream("POST", "/v1/chat/completions", json=wanted | body) as reply:
        reply.raise_for_status()
        return list(local.events(reply)), reply.headers


def text_of(events: list[dict[str, Any]]) -> str:
    return "".join(choice["delta"].get("content") or "" for event in events for choice in event.get("choices", []))


@contextmanager
def sent_and_left(url: str, body: dict[str, Any]) -> Iterator[None]:
    """Send a chat request over a raw socket; on leaving the block the connection is closed, nothing of it read."""
    host, port = url.removeprefix("http://").split(":")
    data = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: {host}:{port}\r\ncontent-type: application/json\r\n"
    with socket.create_connection((host, int(port)), timeout=HANG_S) as connection:
        connection.sendall(f"{head}content-length: {len(data)}\r\n\r\n".encode() + data)
        yield
