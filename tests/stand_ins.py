"""Upstreams for tests: our own OpenAI surface, served for real, and raw servers that answer anything."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

from prometheus_client import CollectorRegistry
from serving import served

from cloud_engine.gateway.upstream import Timeouts, Upstream
from shared.guard import Guard
from shared.http import create_app
from shared.schemas import Answer, ChatRequest, Delta, Message, ModelCard, Sampling, Usage

KEY = "sk-canary"
CARD = ModelCard(id="real", context_length=2048)
ONE, LAST = Delta(text="one", tokens=1), Delta(finish_reason="stop", usage=Usage(prompt_tokens=3, completion_tokens=1))
PATIENT = Timeouts(60, 60, 60)


def request(text: str = "a b c", label: str = "free", **sampling: Any) -> ChatRequest:
    messages = (Message(role="user", content=text),)
    return ChatRequest(id="r1", model="auto", messages=messages, sampling=Sampling(**sampling), label=label)  # type: ignore[arg-type]


async def collect(answer: Any, one: ChatRequest, begun: asyncio.Event | None = None) -> list[Delta]:
    """All of an answer; `begun` is set at its first delta."""
    got = []
    async with aclosing(answer.answer(one)) as deltas:
        async for delta in deltas:
            got.append(delta)
            if begun is not None:
                begun.set()
    return got


@asynccontextmanager
async def opened(port: int, **options: Any) -> AsyncIterator[Upstream]:
    upstream = Upstream(f"http://127.0.0.1:{port}/v1", "real", KEY, **{"context_length": 2048, **options})
    try:
        yield upstream
    finally:
        await upstream.aclose()


@asynccontextmanager
async def real(inner: Answer, **options: Any) -> AsyncIterator[Upstream]:
    """Our own OpenAI surface, served for real, as the upstream."""
    seen: list[str] = []

    def answer_for(headers: Any) -> Answer:
        seen.append(headers.get("authorization", ""))
        return inner

    app = create_app(answer_for=answer_for, models=lambda: [CARD], health=lambda: {"status": "ok"},
                     registry=CollectorRegistry(), source="cloud", guard=Guard())  # fmt: skip
    async with served(app) as port, opened(port, **options) as upstream:
        yield upstream
    assert set(seen) <= {f"Bearer {KEY}"}


def http(body: bytes, status: str = "200 OK", kind: str = "text/event-stream", *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"content-type: {kind}", f"content-length: {len(body)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def events(*pieces: Any) -> bytes:
    shown = [piece if isinstance(piece, str) else json.dumps(piece) for piece in pieces]
    return "".join(f"data: {piece}\n\n" for piece in shown).encode()


class Faulty:
    """A raw server that answers every request with the same bytes, then repeats others, hangs, or closes."""

    def __init__(self, reply: bytes, *, hang: bool = False, repeat: bytes = b"") -> None:
        self.reply, self.hang, self.repeat = reply, hang, repeat
        self.heads: list[bytes] = []
        self.left = asyncio.Event()

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            head = await reader.readuntil(b"\r\n\r\n")
            self.heads.append(head)
            lengths = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length")]
            await reader.readexactly(int(lengths[0].split(b":")[1]) if lengths else 0)
            writer.write(self.reply)
            await writer.drain()
            while self.repeat:
                writer.write(self.repeat)
                await writer.drain()
                await asyncio.sleep(0.01)
            if self.hang:
                await reader.read()
        self.left.set()
        writer.close()


@asynccontextmanager
async def faulty(reply: bytes, *, hang: bool = False, repeat: bytes = b"", **options: Any) -> AsyncIterator[
    tuple[Upstream, Faulty]
]:  # fmt: skip
    stand_in = Faulty(reply, hang=hang, repeat=repeat)
    server = await asyncio.start_server(stand_in, "127.0.0.1", 0)
    async with opened(server.sockets[0].getsockname()[1], **{"timeouts": PATIENT, **options}) as upstream:
        yield upstream, stand_in
    server.close()
    await server.wait_closed()


HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
PIECE = {"choices": [{"index": 0, "delta": {"content": "one"}, "finish_reason": None}]}
FINISH = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}


def chunked(body: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(body), body)


FAULTS: dict[str, tuple[bytes, str]] = {
    "401": (http(f'{{"error":{{"message":"bad key {KEY}"}}}}'.encode(), "401 Unauthorized"), "upstream_failed"),
    "404": (http(b'{"error":{"code":"model_not_found"}}', "404 Not Found"), "model_not_found"),
    "429": (http(b"", "429 Too Many Requests", "text/plain", "retry-after: 9"), "rate_limited"),
    "503": (http(b"", "503 Service Unavailable"), "overloaded"),
    "500": (http(b"oops", "500 Internal Server Error"), "upstream_failed"),
    "long refusal": (http(b"x" * 200_000, "400 Bad Request"), "bad_request"),
    "html": (http(b"<html></html>", kind="text/html"), "upstream_failed"),
    "no stream": (http(b'{"choices": []}', kind="application/json"), "upstream_failed"),
    "204": (http(b"", "204 No Content"), "upstream_failed"),
    "gzip": (http(events(FINISH), "200 OK", "text/event-stream", "content-encoding: gzip"), "upstream_failed"),
    "no json": (http(events("{not json")), "upstream_failed"),
    "no json later": (http(events(PIECE, "{not json")), "upstream_failed"),
    "no end": (http(events(PIECE)), "upstream_failed"),
    "DONE alone": (http(events(PIECE, "[DONE]")), "upstream_failed"),
    "empty": (http(b""), "upstream_failed"),
    "cut": (HEAD + chunked(events(PIECE)), "upstream_failed"),
    "bad chunk": (HEAD + b"zz\r\n", "upstream_failed"),
    "giant line": (HEAD + chunked(b"data: " + b"x" * (2 << 20)), "upstream_failed"),
    "no http": (b"not http at all\r\n\r\n", "upstream_failed"),
    "closed": (b"", "upstream_failed"),
    "giant header": (b"HTTP/1.1 200 OK\r\nx: " + b"y" * 300_000, "upstream_failed"),
}
"""What a server may answer that is no answer, and the code of the error that it is."""
