import asyncio
import json
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from itertools import pairwise
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from serving import served

from cloud_engine.bench.figures import Report
from cloud_engine.bench.load import (
    Answer,
    Ask,
    Objective,
    Reply,
    Target,
    closed_loop,
    open_loop,
    poisson,
    read,
    summary,
)
from cloud_engine.bench.serving import Plan, run
from cloud_engine.engine.config import EngineConfig
from cloud_engine.engine.serving import load_engine
from cloud_engine.gateway.limits import TenantLimits
from cloud_engine.gateway.server import Gateway
from shared.guard import Guard

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n"
USAGE = {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 3}}
RNG = random.Random(0)


def event(value: object) -> bytes:
    return b"data: %s\n\n" % (value if isinstance(value, bytes) else json.dumps(value).encode())


def text(content: str) -> bytes:
    return event({"choices": [{"text": content}]})


class StandIn:
    """Answers with three tokens: the first after `first` seconds (None: never), one every `gap`; or with `reply` at
    once. One at a time if it is `serial`."""

    def __init__(
        self, first: float | None = 0.0, gap: float = 0.0, *, reply: bytes = b"", serial: bool = False
    ) -> None:
        self.first, self.gap, self.reply = first, gap, reply
        self.turn = asyncio.Semaphore(1 if serial else 1000)
        self.bodies: list[dict[str, object]] = []
        self.running = self.most = 0

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.running += 1
        self.most = max(self.most, self.running)
        with suppress(OSError, asyncio.IncompleteReadError):
            head = await reader.readuntil(b"\r\n\r\n")
            size = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length"))
            self.bodies.append(json.loads(await reader.readexactly(int(size.split(b":")[1]))))
            async with self.turn:
                await self._answer(reader, writer)
        self.running -= 1
        writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.reply:
            writer.write(self.reply)
            return
        writer.write(HEAD)
        if self.first is None:
            await reader.read()  # until the client leaves
            return
        await asyncio.sleep(self.first)
        for at in range(3):
            await asyncio.sleep(self.gap if at else 0)
            writer.write(text(f"t{at}"))
            await writer.drain()
        writer.write(event(USAGE) + event(b"[DONE]"))
        await writer.drain()


@asynccontextmanager
async def standing_in(stand_in: StandIn, **options: object) -> AsyncIterator[Target]:
    server = await asyncio.start_server(stand_in, "127.0.0.1", 0)
    yield Target(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1", "m", **options)  # type: ignore[arg-type]
    server.close()
    await server.wait_closed()


def asks(target: Target, count: int) -> list[Ask]:
    return [target.ask(4, 3, RNG) for _ in range(count)]


async def test_known_delays_are_measured() -> None:
    """A server whose first token takes 0.2 s and whose gaps take 0.05 s: no less is measured, and every gap counts."""
    async with standing_in(StandIn(0.2, 0.05)) as target:
        work = asks(target, 4)
        replies, wall = await open_loop(target, work, [0.0, 0.0, 0.01, 0.02])
    answers = [read(reply, 3) for reply in replies]
    assert [answer.error for answer in answers] == [None] * 4
    for answer in answers:
        assert len(answer.texts) == 3
        # What is measured includes how late a busy loop looks, so single gaps may be shorter than what was waited.
        assert 0.2 <= answer.texts[0] <= answer.texts[2]
        assert answer.texts[2] >= 0.3
        assert answer.end_s >= answer.texts[2]
        assert (answer.prompt_tokens, answer.output_tokens) == (5, 3)
    row = summary(replies, [3] * 4, wall, Objective(10, 10))
    assert row["ttft_ms_p50"] >= 200
    assert row["ok"] == row["good"] == 4
    assert summary(replies, [3] * 4, wall, Objective(0.1, 10))["good"] == 0


async def test_requests_come_when_they_are_due_whatever_the_server_does() -> None:
    """Open loop: a server that answers one at a time has all of them at once, and the wait behind the others counts."""
    stand_in = StandIn(0.1, serial=True)
    async with standing_in(stand_in) as target:
        replies, wall = await open_loop(target, asks(target, 6), [0.0] * 6)
    firsts = sorted(read(reply, 3).texts[0] for reply in replies)
    assert stand_in.most == 6
    assert all(first >= 0.1 * (at + 1) - 0.02 for at, first in enumerate(firsts))
    assert wall >= 0.58


async def test_a_late_client_is_the_servers_time_too() -> None:
    """A request that could not be sent when it was due has been waiting since then."""
    async with standing_in(StandIn()) as target:
        replies, _ = await open_loop(target, asks(target, 1), [-3.0])
    assert 3.0 <= replies[0].late_s <= read(replies[0], 3).texts[0]


async def test_a_closed_loop_has_as_many_as_it_has_clients() -> None:
    """Never more at once, and each asks again when it was answered; replies are in the order of the requests."""
    stand_in = StandIn(0.01)
    async with standing_in(stand_in, path="chat/completions") as target:
        work = asks(target, 10)
        replies, _ = await closed_loop(target, work, 2)
    assert stand_in.most == 2
    assert len(stand_in.bodies) == 10
    assert "messages" in stand_in.bodies[0]
    assert all(read(reply, 3).error is None for reply in replies)


WHOLE = text("a") + event(USAGE) + event(b"[DONE]")


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        (HEAD + WHOLE, None),
        (b"HTTP/1.1 503 Busy\r\ncontent-length: 2\r\n\r\nno", "http_503"),
        (HEAD + text("a") + event(USAGE), "no_end"),
        (HEAD + event(USAGE) + event(b"[DONE]"), "no_end"),
        (HEAD + text("a") + event({"error": {"message": "x"}}) + event(b"[DONE]"), "error_event"),
        (HEAD + event(b"{not json"), "error_event"),
        (HEAD + text("a") + event({"usage": {"prompt_tokens": 1, "completion_tokens": 2}}) + event(b"[DONE]"),
         "other_length"),
        (b"no http", "RemoteProtocolError"),
    ],
)  # fmt: skip
async def test_what_is_not_whole_is_an_error_of_its_kind(reply: bytes, error: str | None) -> None:
    """Counted by kind, no part of the latencies, and never good."""
    async with standing_in(StandIn(reply=reply)) as target:
        replies, wall = await open_loop(target, asks(target, 2), [0.0, 0.0])
    row = summary(replies, [3, 3], wall, Objective(100, 100))
    assert row["errors"] == ({error: 2} if error else {})
    assert row["ok"] == row["good"] == (0 if error else 2)
    assert (row["ttft_ms_p50"] is None) == bool(error)


async def test_silence_ends_and_is_counted() -> None:
    """A server that says nothing, and one that is not there."""
    async with standing_in(StandIn(None), timeout_s=0.2) as target:
        replies, _ = await closed_loop(target, asks(target, 1), 1)
    assert read(replies[0], 3).error == "timeout"
    replies, _ = await closed_loop(target, asks(target, 1), 1)
    assert read(replies[0], 3).error == "ConnectError"


def test_figures_are_those_of_the_times() -> None:
    """All gaps of all answers, rates over the wall time; good is what meets both limits."""
    pieces = [text("a") + text("b"), text("c"), event(USAGE) + event(b"[DONE]")]
    slow = Reply(late_s=0.5, end_s=4.0, status=200, pieces=list(zip([1.0, 3.0, 4.0], pieces, strict=True)))
    fast = Reply(end_s=0.4, status=200, pieces=list(zip([0.1, 0.3, 0.4], pieces, strict=True)))
    broken = Reply(end_s=9.0, broken="timeout")
    row = summary([slow, fast, broken], [3, 3, 3], 10.0, Objective(0.2, 0.1))
    assert (row["requests"], row["ok"], row["errors"], row["good"]) == (3, 2, {"timeout": 1}, 1)
    assert (row["req_s"], row["out_tok_s"], row["goodput_req_s"]) == (0.2, 0.6, 0.1)
    assert (row["ttft_ms_p50"], row["ttft_ms_max"]) == (550.0, 1000.0)
    assert (row["itl_ms_p50"], row["itl_ms_max"]) == (100.0, 2000.0)  # 0, 2 and 0, 0.2 seconds
    assert (row["e2e_ms_max"], row["late_ms_max"]) == (4000.0, 500.0)


def test_good_is_first_token_and_mean_gap() -> None:
    """Each limit can be what is missed."""
    answer = Answer([0.5, 0.7, 0.9], 1.0, 1, 3, None)
    assert answer.is_good(0.5, 0.21)
    assert not answer.is_good(0.4, 0.21)
    assert not answer.is_good(0.5, 0.19)
    assert not Answer([0.5], 1.0, 1, 3, "no_end").is_good(1, 1)


def test_arrivals_are_poisson_and_seeded() -> None:
    """In order, from zero, at the rate that was asked for, with the spread of an exponential."""
    due = poisson(4.0, 4001, seed=3)
    gaps = [after - before for before, after in pairwise(due)]
    assert due[0] == 0.0
    assert due == poisson(4.0, 4001, seed=3) != poisson(4.0, 4001, seed=4)
    assert sum(gaps) / 4000 == pytest.approx(0.25, rel=0.05)
    assert sum(gap > 0.25 for gap in gaps) / 4000 == pytest.approx(0.3679, abs=0.03)


async def test_our_own_gateway_is_measured(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Open and closed rows against the engine behind HTTP: every answer whole, tokens as asked for."""
    engine = load_engine(tiny_model, EngineConfig(num_blocks=200, max_num_seqs=4), name="tiny")
    await engine.start()
    gateway = Gateway(engine, engine.model_card(), keys=None, limits=TenantLimits(), guard=Guard(),
                      registry=CollectorRegistry())  # fmt: skip
    async with served(gateway.app) as port:
        target = Target(f"http://127.0.0.1:{port}/v1", "cloud")
        plan = Plan([20.0], [2], requests=5, prompt_tokens=6, output_tokens=8, repeats=2, warm_up=1)
        await run(target, plan, Report())
        assert engine.stats().generated_tokens == 8 + 4 * 40
    await engine.aclose()
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith('{"loop"')]
    assert [(row["loop"], row["load"], row["seed"]) for row in rows] == [
        ("open", 20.0, 0), ("closed", 2, 0), ("open", 20.0, 1), ("closed", 2, 1),
    ]  # fmt: skip
    assert all((row["ok"], row["output_tokens"]) == (5, 40) for row in rows)
