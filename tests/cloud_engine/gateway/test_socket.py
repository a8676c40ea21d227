"""The WebSocket endpoint against peers that do not keep the rules, over real sockets."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from fakes import EchoAnswer, ScriptedAnswer
from serving import served
from starlette.applications import Starlette
from waiting import HANG_S, until
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from cloud_engine.gateway.socket import SocketEndpoint
from shared import frames
from shared.errors import Forbidden, Unauthorized
from shared.executions import Rules
from shared.frames import JSON, MSGPACK, WIRE_PATH, Codec, Frame, Limits, body_hash, encode_request
from shared.schemas import Answer, ChatRequest, Delta, Label, Usage
from shared.telemetry import RequestFinished

LAST = Delta(finish_reason="stop", usage=Usage(prompt_tokens=1, completion_tokens=2))
TENANTS = {"Bearer a": "alice", "Bearer b": "bob"}
QUICK = Rules(orphan_grace=1.0, body_within=0.2, limits=Limits(resume_ttl=0.3))
BAD_FRAME, NO_HELLO, TOO_LARGE = 4400, 4408, 4413


def authenticate(headers: Any) -> str:
    key = headers.get("authorization")
    if key == "Bearer revoked":
        raise Forbidden("this key may not connect")
    if key not in TENANTS:
        raise Unauthorized("bad or missing key", param="authorization")
    return TENANTS[key]


class Site:
    def __init__(self, port: int, endpoint: SocketEndpoint, events: list[RequestFinished]) -> None:
        self.port, self.endpoint, self.events = port, endpoint, events

    def dial(self, key: str | None = "a", subprotocol: str | None = MSGPACK, **headers: str) -> connect:
        sent = headers | ({"Authorization": f"Bearer {key}"} if key else {})
        offered: Any = [subprotocol] if subprotocol else None
        url = f"ws://127.0.0.1:{self.port}{WIRE_PATH}"
        return connect(url, additional_headers=sent, subprotocols=offered, compression=None, max_size=None, proxy=None)

    @asynccontextmanager
    async def peer(self, key: str = "a", subprotocol: str = MSGPACK) -> AsyncIterator["Peer"]:
        """A connection that has said HELLO."""
        async with self.dial(key, subprotocol) as websocket:
            peer = Peer(websocket, subprotocol)
            await peer.send(frames.Hello(1, 1, "test"))
            peer.welcome = await peer.expect(frames.Welcome)
            yield peer


class Peer:
    """A client that may say anything."""

    welcome: frames.Welcome

    def __init__(self, websocket: ClientConnection, subprotocol: str) -> None:
        self.websocket = websocket
        self.codec = Codec.client(subprotocol, 1 << 20)

    async def send(self, *sent: Frame) -> None:
        for frame in sent:
            await self.websocket.send(self.codec.encode(frame))

    async def open(self, sid: int = 1, rid: str = "r1", window: int = 64, label: Label = "free") -> None:
        body = encode_request(ChatRequest(id=rid, model="m", prompt="one two three", label=label))
        await self.send(frames.Open(sid, rid, body_hash(body), len(body), window), frames.Body(sid, 0, body))

    async def next(self) -> Frame:
        async with asyncio.timeout(HANG_S):
            return self.codec.decode(await self.websocket.recv())

    async def expect(self, kind: type[Any]) -> Any:
        frame = await self.next()
        assert isinstance(frame, kind), frame
        return frame

    async def closed(self) -> int:
        """The code the server closes with, after whatever it still sends."""
        async with asyncio.timeout(HANG_S):
            with pytest.raises(ConnectionClosed) as closing:
                while True:
                    await self.websocket.recv()
        assert closing.value.rcvd is not None
        return closing.value.rcvd.code

    async def works(self) -> bool:
        await self.send(frames.Ping(7))
        return await self.next() == frames.Pong(7)


@asynccontextmanager
async def site(answer: Answer | None = None, rules: Rules | None = None, **options: Any) -> AsyncIterator[Site]:
    events: list[RequestFinished] = []
    chosen = answer or EchoAnswer("cloud")
    endpoint = SocketEndpoint(
        answer_for=lambda tenant: chosen,
        authenticate=authenticate,
        rules=rules,
        listeners=(events.append,),
        **options,
    )
    async with served(Starlette(routes=[endpoint.route()]), drain=endpoint.aclose) as port:
        yield Site(port, endpoint, events)


# --- the door ---


@pytest.mark.parametrize(
    ("options", "status"),
    [
        ({"key": None}, 401),
        ({"key": "wrong"}, 401),
        ({"key": "a' OR 1=1 --"}, 401),
        ({"key": "revoked"}, 403),
        ({"Origin": "https://evil.example"}, 403),
        ({"subprotocol": None}, 400),
        ({"subprotocol": "graphql-ws"}, 400),
    ],
)
async def test_a_bad_upgrade_is_refused_with_its_status(options: dict[str, Any], status: int) -> None:
    """Before the connection is accepted, as a typed error; a good peer is not disturbed."""
    async with site() as cloud, cloud.peer() as good:
        with pytest.raises(InvalidStatus) as refusal:
            await cloud.dial(**options)
        assert refusal.value.response.status_code == status
        assert b'"code"' in (refusal.value.response.body or b"")
        assert await good.works()


async def test_connections_of_a_tenant_are_bounded() -> None:
    """429 for one too many; another tenant is let in."""
    async with site(max_connections=1) as cloud, cloud.peer("a"):
        with pytest.raises(InvalidStatus) as refusal:
            await cloud.dial("a")
        assert refusal.value.response.status_code == 429
        async with cloud.peer("b") as other:
            assert await other.works()


async def test_no_hello_is_not_waited_for() -> None:
    """A peer that says nothing is closed with 4408, told why first."""
    async with site(rules=Rules(hello_within=0.2)) as cloud, cloud.dial() as websocket:
        peer = Peer(websocket, MSGPACK)
        assert (await peer.expect(frames.Err)).code == "deadline_exceeded"
        assert await peer.closed() == NO_HELLO


@pytest.mark.parametrize(
    ("subprotocol", "message", "code", "close"),
    [
        (MSGPACK, b"\xc1", "bad_frame", BAD_FRAME),
        (MSGPACK, b"", "bad_frame", BAD_FRAME),
        (MSGPACK, '["ping",1]', "bad_frame", BAD_FRAME),
        (JSON, b'["ping",1]', "bad_frame", BAD_FRAME),
        (JSON, "{}", "bad_frame", BAD_FRAME),
        (JSON, '["welcome",1,"e",{}]', "bad_frame", BAD_FRAME),
        (JSON, '["hello",1,1,"again"]', "bad_frame", BAD_FRAME),
        (JSON, '["ack",1,1,1e309,1]', "bad_frame", BAD_FRAME),
        (JSON, '["ping",1]' + " " * (64 << 10), "too_large", TOO_LARGE),
    ],
    ids=repr,
)
async def test_what_is_not_a_frame_ends_its_connection_only(
    subprotocol: str, message: bytes | str, code: str, close: int
) -> None:
    """A typed error, then the close code; others go on."""
    async with site() as cloud, cloud.peer() as good:
        async with cloud.peer(subprotocol=subprotocol) as bad:
            await bad.websocket.send(message)
            error = await bad.expect(frames.Err)
            assert (error.code, error.scope) == (code, "connection")
            assert await bad.closed() == close
        assert await good.works()


@pytest.mark.parametrize(
    ("first", "code"), [('["hello",2,9,"later",1]', "unsupported_version"), ('["ping",1]', "bad_frame")]
)
async def test_the_first_frame_must_be_a_hello_we_speak(first: str, code: str) -> None:
    """Another version, or no HELLO first."""
    async with site() as cloud, cloud.dial(subprotocol=JSON) as websocket:
        peer = Peer(websocket, JSON)
        await websocket.send(first)
        assert (await peer.expect(frames.Err)).code == code
        assert await peer.closed() == BAD_FRAME


async def test_a_message_beyond_the_sockets_limit_is_cut_off() -> None:
    """What is too large even to be refused by name is closed by the WebSocket layer; others go on."""
    async with site() as cloud, cloud.peer() as good:
        async with cloud.peer() as bad:
            await bad.websocket.send(b"x" * (3 << 20))
            with pytest.raises(ConnectionClosed):
                await bad.next()
        assert await good.works()


# --- one bad stream ---

TOKEN = "x" * 22


@pytest.mark.parametrize(
    ("frame", "code"),
    [
        (frames.Ack(9, 1, 1, 1), "unknown_request"),
        (frames.Cancel(9), "unknown_request"),
        (frames.Body(9, 0, b"x"), "unknown_request"),
        (frames.Open(9, "r9", b"h" * 32, (1 << 20) + 1, 1), "too_large"),
        (frames.Open(9, "r9", b"h" * 32, 0, 1), "too_large"),
        (frames.Open(1, "other", b"h" * 32, 5, 1), "bad_frame"),
        (frames.Open(9, "r1", b"h" * 32, 5, 1), "request_conflict"),
        (frames.Ack(1, 1, 99, 1), "bad_frame"),
        (frames.Resume(9, "r1", "old", TOKEN, 0, 1), "unrecoverable"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
async def test_a_bad_stream_frame_costs_only_its_stream(frame: Frame, code: str) -> None:
    """A typed error with that stream's number; the connection lives on."""
    async with site(ScriptedAnswer(asyncio.Event())) as cloud, cloud.peer() as peer:
        await peer.open()
        await peer.expect(frames.Accept)
        await peer.send(frame)
        error = await peer.expect(frames.Err)
        assert (error.sid, error.code, error.scope) == (getattr(frame, "sid", None), code, "stream")
        assert await peer.works()


PRIVATE = ChatRequest(id="r1", model="m", prompt="p", label="edge_only")


@pytest.mark.parametrize(
    ("body", "opened", "code", "param"),
    [
        (b"not a request", "r1", "bad_request", "body"),
        (encode_request(ChatRequest(id="r2", model="m", prompt="p")), "r1", "bad_request", "id"),
        (
            encode_request(ChatRequest(id="r1", model="m", prompt="p", label="edge_only")),
            "r1",
            "policy_denied",
            "label",
        ),
    ],
)
async def test_a_bad_request_is_named(body: bytes, opened: str, code: str, param: str) -> None:
    """The body is checked before anything runs."""
    answer = ScriptedAnswer(LAST)
    async with site(answer) as cloud, cloud.peer() as peer:
        await peer.send(frames.Open(1, opened, body_hash(body), len(body), 1), frames.Body(1, 0, body))
        error = await peer.expect(frames.Err)
        assert (error.code, error.param) == (code, param)
        assert not answer.requests


async def test_a_body_that_is_not_what_was_opened_is_refused() -> None:
    """Another hash, a piece out of place, or a body that never comes."""
    async with site(rules=QUICK) as cloud, cloud.peer() as peer:
        await peer.send(frames.Open(1, "r1", b"h" * 32, 3, 1), frames.Body(1, 0, b"abc"))
        assert (await peer.expect(frames.Err)).param == "sha256"
        await peer.send(frames.Open(2, "r2", b"h" * 32, 3, 1), frames.Body(2, 1, b"ab"))
        assert (await peer.expect(frames.Err)).param == "off"
        await peer.send(frames.Open(3, "r3", b"h" * 32, 3, 1), frames.Body(3, 0, b"ab"))
        assert (await peer.expect(frames.Err)).code == "deadline_exceeded"
        assert await peer.works()


async def test_streams_of_a_connection_are_bounded() -> None:
    """One over the announced limit is refused; those that run are not touched."""
    rules = Rules(limits=Limits(max_streams=2))
    async with site(ScriptedAnswer(asyncio.Event()), rules) as cloud, cloud.peer() as peer:
        assert peer.welcome.limits.max_streams == 2
        for sid in (1, 2):
            await peer.open(sid, f"r{sid}")
            await peer.expect(frames.Accept)
        await peer.open(3, "r3")
        assert (await peer.expect(frames.Err)).code == "rate_limited"
        assert cloud.endpoint.running == 2


# --- resume and idempotency ---


async def test_somebody_elses_token_opens_nothing() -> None:
    """A good token from another tenant, a wrong token and an unknown id get the same answer, to the letter."""
    async with site(ScriptedAnswer(asyncio.Event())) as cloud, cloud.peer("a") as alice, cloud.peer("b") as bob:
        await alice.open()
        token = (await alice.expect(frames.Accept)).token
        epoch = alice.welcome.epoch
        refusals = []
        await bob.send(frames.Resume(1, "r1", epoch, token, 0, 1))
        refusals.append(await bob.expect(frames.Err))
        await bob.send(frames.Resume(2, "r-random", epoch, token, 0, 1))
        refusals.append(await bob.expect(frames.Err))
        await alice.send(frames.Resume(2, "r1", epoch, TOKEN, 0, 1))
        refusals.append(await alice.expect(frames.Err))
        assert await alice.works()

    assert {error.code for error in refusals} == {"unknown_request"}
    assert len({error.message for error in refusals}) == 1


async def test_a_newer_connection_takes_the_stream_over() -> None:
    """RESUME fences the older attachment off: it is told, gets nothing more, and its acks count for nothing."""
    gate = asyncio.Event()
    answer = ScriptedAnswer(Delta(text="one ", tokens=1), gate, Delta(text="two", tokens=1), LAST)
    async with site(answer) as cloud, cloud.peer() as old, cloud.peer() as new:
        await old.open()
        accepted = await old.expect(frames.Accept)
        assert (await old.expect(frames.Data)).text == "one "
        await new.send(frames.Resume(1, "r1", new.welcome.epoch, accepted.token, 1, 64))
        resumed = await new.expect(frames.Resumed)
        assert resumed.attach > accepted.attach
        assert resumed.token != accepted.token
        assert (await old.expect(frames.Err)).code == "superseded"
        await old.send(frames.Ack(1, accepted.attach, 1, 64))
        gate.set()
        data, end = await new.expect(frames.Data), await new.expect(frames.End)
        assert (data.seq, data.off, data.text) == (2, 4, "two")
        assert end.total_bytes == 7
        assert await old.works()

    assert len(answer.requests) == 1


async def test_the_same_request_never_runs_twice() -> None:
    """Opened again with the same body it attaches to the same execution, from the start; once answered and
    acknowledged it is refused rather than run again."""
    async with site() as cloud, cloud.peer() as first, cloud.peer() as second:
        await first.open()
        await first.expect(frames.Accept)
        await second.open()
        accepted = await second.expect(frames.Accept)
        text = ""
        while not isinstance(frame := await second.next(), frames.End):
            text += frame.text  # type: ignore[union-attr]
        await second.send(frames.Ack(1, accepted.attach, frame.seq, 64))
        await until(lambda: cloud.endpoint.held == 0)
        await second.open(2)
        assert (await second.expect(frames.Err)).code == "unrecoverable"

    assert text == "one two three "
    assert len(cloud.events) == 1


# --- time, slowness, the end ---


async def test_credit_holds_output_back() -> None:
    """With a window of one frame the second one comes only after the first was acknowledged."""
    answer = ScriptedAnswer(*[Delta(text="x" * 4096, tokens=1)] * 2, LAST)
    async with site(answer) as cloud, cloud.peer() as peer:
        await peer.open(window=1)
        attach = (await peer.expect(frames.Accept)).attach
        assert (await peer.expect(frames.Data)).seq == 1
        assert await peer.works(), "the answer to a ping, and no data before it"
        await peer.send(frames.Ack(1, attach, 1, 1))
        assert (await peer.expect(frames.Data)).seq == 2


async def test_a_cancel_stops_the_work() -> None:
    """CANCEL at any time, twice: one END(cancelled), one event, the run closed."""
    answer = ScriptedAnswer(Delta(text="one", tokens=1), asyncio.Event())
    async with site(answer) as cloud, cloud.peer() as peer:
        await peer.open()
        await peer.expect(frames.Accept)
        await peer.expect(frames.Data)
        await peer.send(frames.Cancel(1), frames.Cancel(1))
        assert (await peer.expect(frames.End)).finish_reason == "cancelled"
        assert await peer.works()
        await until(lambda: cloud.endpoint.running == 0)

    assert answer.closed == ["r1"]
    assert [event.outcome for event in cloud.events] == ["cancelled"]


async def test_an_orphan_is_cancelled_and_audited() -> None:
    """A client that never comes back: its run goes on for the grace time, then ends, with one event and no memory."""
    answer = ScriptedAnswer(asyncio.Event())
    async with site(answer, QUICK) as cloud:
        async with cloud.peer() as peer:
            await peer.open()
            await peer.expect(frames.Accept)
        assert cloud.endpoint.running == 1
        await until(lambda: cloud.endpoint.running == 0 and cloud.endpoint.held == 0)

    assert answer.closed == ["r1"]
    assert [event.tenant for event in cloud.events] == ["alice"]


async def test_a_slow_consumer_is_detached_and_may_come_back() -> None:
    """No acknowledgement for too long: told so, detached, resumable; the connection is kept."""
    answer = ScriptedAnswer(Delta(text="one", tokens=1), asyncio.Event())
    rules = Rules(slow_after=0.2)
    async with site(answer, rules) as cloud, cloud.peer() as peer:
        await peer.open()
        token = (await peer.expect(frames.Accept)).token
        await peer.expect(frames.Data)
        assert (await peer.expect(frames.Err)).code == "slow_consumer"
        await peer.send(frames.Resume(2, "r1", peer.welcome.epoch, token, 0, 64))
        assert (await peer.expect(frames.Resumed)).from_seq == 1
        assert (await peer.expect(frames.Data)).text == "one"


async def test_an_engine_that_breaks_is_an_internal_error() -> None:
    """Nothing of the exception's text gets out; the stream ends openly."""
    async with site(ScriptedAnswer(Delta(text="one", tokens=1), ValueError("s3cret"))) as cloud, cloud.peer() as peer:
        await peer.open()
        await peer.expect(frames.Accept)
        await peer.expect(frames.Data)
        error = await peer.expect(frames.Err)

    assert (error.code, error.seq) == ("internal", 2)
    assert "s3cret" not in error.message


async def test_draining_finishes_what_runs_and_takes_nothing_new() -> None:
    """GOAWAY, Overloaded for the next request, the running one complete, then 1001."""
    gate = asyncio.Event()
    async with site(ScriptedAnswer(gate, LAST)) as cloud, cloud.peer() as peer:
        await peer.open()
        attach = (await peer.expect(frames.Accept)).attach
        draining = asyncio.create_task(cloud.endpoint.drain(5))
        await peer.expect(frames.Goaway)
        await peer.open(2, "r2")
        assert (await peer.expect(frames.Err)).code == "overloaded"
        gate.set()
        end = await peer.expect(frames.End)
        await peer.send(frames.Ack(1, attach, end.seq, 1))
        assert await peer.closed() == 1001
        await draining
        assert cloud.endpoint.held == 0


async def test_draining_does_not_wait_for_ever() -> None:
    """What does not end in time is told so, with an error that another target may retry."""
    async with site(ScriptedAnswer(asyncio.Event())) as cloud, cloud.peer() as peer:
        await peer.open()
        await peer.expect(frames.Accept)
        await asyncio.wait_for(cloud.endpoint.drain(0.1), HANG_S)
        await peer.expect(frames.Goaway)
        assert (await peer.expect(frames.Err)).code == "overloaded"
        assert await peer.closed() == 1001


SERVER = """
import asyncio
from starlette.applications import Starlette
from cloud_engine.gateway.socket import SocketEndpoint
from shared.schemas import Delta
from shared.serving import serve

class Endless:
    async def answer(self, request):
        while True:
            yield Delta(text="x" * 2000, tokens=1)
            await asyncio.sleep(0)

endpoint = SocketEndpoint(answer_for=lambda tenant: Endless(), authenticate=lambda headers: "tenant")
asyncio.run(serve(Starlette(routes=[endpoint.route()]), "127.0.0.1", 0, drain=endpoint.aclose))
"""


async def test_a_peer_that_never_reads_costs_little() -> None:
    """It opens as many endless answers as it may, gives all the credit there is, asks for replies, and reads nothing:
    the server's memory grows by less than 2 MiB."""
    root = Path(__file__).parents[3]
    with subprocess.Popen(  # noqa: ASYNC220 - it starts once, before anything is timed
        [sys.executable, "-c", SERVER], stdout=subprocess.PIPE, cwd=root, text=True
    ) as server:
        try:
            assert server.stdout is not None
            line = await asyncio.to_thread(server.stdout.readline)
            cloud = Site(int(line.rpartition(":")[2]), None, [])  # type: ignore[arg-type]
            async with cloud.peer() as warm:
                await warm.open(1, "warm")
                await warm.expect(frames.Accept)
                await warm.send(frames.Cancel(1))
                memory = psutil.Process(server.pid).memory_info
                before = memory().rss
                async with cloud.dial() as deaf:
                    deaf.transport.pause_reading()
                    peer = Peer(deaf, MSGPACK)
                    await peer.send(frames.Hello(1, 1))
                    for sid in range(1, 33):
                        await peer.open(sid, f"r{sid}", 4096)
                    for number in range(200):
                        await peer.send(frames.Ping(number))
                    for number in range(40):  # the server has had time for all it would do
                        await warm.send(frames.Ping(number))
                        while await warm.next() != frames.Pong(number):
                            pass
                    grown = memory().rss - before
                    deaf.transport.abort()
        finally:
            os.kill(server.pid, signal.SIGTERM)
            await asyncio.to_thread(server.wait, 10)

    assert grown < 2 << 20
