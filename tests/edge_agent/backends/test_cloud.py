"""The cloud backend against the real endpoint, over real sockets, through a network that breaks."""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import pytest
import trustme
from fakes import EchoAnswer, ScriptedAnswer, text_of
from faults import Proxy, faulty
from serving import served
from starlette.applications import Starlette
from waiting import HANG_S, until

from cloud_engine.gateway.socket import SocketEndpoint
from edge_agent.backends.cloud import CloudBackend
from shared.errors import (
    BadRequest,
    CausewayError,
    DeadlineExceeded,
    Overloaded,
    PolicyDenied,
    RequestConflict,
    Unauthorized,
    UnknownModel,
    Unreachable,
    Unrecoverable,
)
from shared.executions import Rules
from shared.frames import SUBPROTOCOLS
from shared.schemas import Answer, ChatRequest, Delta, Label, ModelCard, Usage
from shared.streams import ClientRules

KEY = "cw-test-secret"
LAST = Delta(finish_reason="stop", usage=Usage(prompt_tokens=1, completion_tokens=2))
RULES = ClientRules(ping_every=0.1, ack_within=0.02)
QUICK = replace(RULES, silent_after=0.5, welcome_within=0.5)


def ask(request_id: str = "r1", prompt: str = "one two three", label: Label = "free") -> ChatRequest:
    return ChatRequest(id=request_id, model="m", prompt=prompt, label=label)


def words(count: int) -> list[Delta]:
    return [Delta(text=f"w{number} ", tokens=1) for number in range(count)]


def authenticate(headers: Any) -> str:
    if headers.get("authorization") != f"Bearer {KEY}":
        raise Unauthorized("bad key")
    return "tenant"


@dataclass
class Site:
    """A cloud behind a proxy, and a backend that knows only the proxy."""

    answer: Any
    endpoint: SocketEndpoint
    proxy: Proxy
    make: Callable[..., CloudBackend]

    @property
    def backend(self) -> CloudBackend:
        return self.make()


@asynccontextmanager
async def site(answer: Answer, *, rules: Rules | None = None) -> AsyncIterator[Site]:
    endpoint = SocketEndpoint(answer_for=lambda tenant: answer, authenticate=authenticate, rules=rules)
    made: list[CloudBackend] = []
    async with served(Starlette(routes=[endpoint.route()]), drain=endpoint.aclose) as port, faulty(port) as proxy:

        def make(key: str = KEY, **options: Any) -> CloudBackend:
            options = {"jitter": lambda: 0.1, "rules": RULES} | options
            made.append(CloudBackend(f"ws://127.0.0.1:{proxy.port}", key, **options))
            return made[-1]

        try:
            yield Site(answer, endpoint, proxy, make)
        finally:
            for backend in made:
                await backend.aclose()


async def collect(backend: CloudBackend, request: ChatRequest) -> list[Delta]:
    return [delta async for delta in backend.answer(request)]


@pytest.mark.parametrize("subprotocol", SUBPROTOCOLS)
async def test_an_answer_comes_whole(subprotocol: str) -> None:
    """Text, tokens, log probabilities, usage and route arrive as the cloud produced them, in both subprotocols."""
    request = replace_sampling(ask(), logprobs=2)
    async with site(EchoAnswer("cloud")) as cloud:
        deltas = await collect(cloud.make(subprotocols=(subprotocol,)), request)

    assert text_of(deltas) == "one two three "
    assert sum(delta.tokens for delta in deltas) == 3
    assert [entry.token for delta in deltas for entry in delta.logprobs] == ["one ", "two ", "three "]
    assert deltas[-1].usage == Usage(prompt_tokens=3, completion_tokens=3)
    assert deltas[-1].route == EchoAnswer("cloud").route
    assert cloud.answer.requests == [request]


async def test_many_requests_share_one_connection() -> None:
    """Twenty at once, all whole, one TCP connection; a prompt of 300 kB among them."""
    async with site(EchoAnswer()) as cloud:
        backend = cloud.backend
        prompts = [f"request number {number}" for number in range(20)] + ["big " * 75_000]
        asked = [collect(backend, ask(f"r{number}", prompt)) for number, prompt in enumerate(prompts)]
        answers = await asyncio.gather(*asked)

    assert [text_of(deltas) for deltas in answers] == [prompt.strip() + " " for prompt in prompts]
    assert cloud.proxy.happened["connected"] == 1


@pytest.mark.parametrize("reset", [False, True])
async def test_a_broken_connection_is_resumed(reset: bool) -> None:
    """Cut in mid-stream: the same execution goes on over a new connection, and no token comes twice or not at all."""
    gates = [asyncio.Event() for _ in range(3)]
    answer = ScriptedAnswer(*words(5), gates[0], *words(5), gates[1], *words(5), gates[2], *words(5), LAST)
    async with site(answer) as cloud:
        cloud.proxy.reset = reset
        got: list[Delta] = []
        async with aclosing(cloud.backend.answer(ask())) as deltas:
            async for delta in deltas:
                got.append(delta)
                parts = text_of(got).count("w4 ")
                if parts and not gates[min(parts, 3) - 1].is_set():
                    cloud.proxy.cut()
                    gates[parts - 1].set()

    assert text_of(got) == text_of(words(5)) * 4
    assert got[-1] == LAST
    assert len(answer.requests) == 1
    assert cloud.proxy.happened["cut"] == 3
    assert cloud.proxy.happened["connected"] == 4


@pytest.mark.parametrize("after", [130, 200, 260, 300, 333, 340, 345, 350, 400, 430])
async def test_a_cut_at_any_byte_loses_nothing(after: int) -> None:
    """The connection ends after so many bytes from the server: inside the upgrade, ACCEPT, DATA or END."""
    async with site(EchoAnswer()) as cloud:
        cloud.proxy.cut_after = after
        cloud.proxy.slice_to = 7
        try:
            got = text_of(await collect(cloud.backend, ask()))
        except Unreachable:
            assert after < 300, "only before anything was accepted"
            got = text_of(await collect(cloud.backend, ask()))

    assert got == "one two three "
    assert len(cloud.answer.requests) == 1
    assert cloud.proxy.happened["cut"]


async def test_a_silent_network_is_noticed() -> None:
    """Packets that vanish, without a close: found by our own ping, and the stream goes on elsewhere."""
    gate = asyncio.Event()
    async with site(ScriptedAnswer(*words(3), gate, *words(3), LAST)) as cloud:  # noqa: SIM117
        async with aclosing(cloud.make(rules=QUICK).answer(ask())) as deltas:
            got = [await anext(deltas)]
            cloud.proxy.black_hole = True
            gate.set()
            await until(lambda: cloud.proxy.happened["swallowed"] > 0)
            await until(lambda: cloud.proxy.happened["connected"] > 1)
            cloud.proxy.black_hole = False
            got += [delta async for delta in deltas]

    assert text_of(got) == text_of(words(3)) * 2


async def test_slow_and_sliced_bytes_change_nothing() -> None:
    """A network that delays and cuts every segment into crumbs."""
    async with site(EchoAnswer()) as cloud:
        cloud.proxy.slice_to, cloud.proxy.delay = 16, 0.0005
        got = text_of(await collect(cloud.make(rules=ClientRules()), ask(prompt="a b c " * 50)))

    assert got == "a b c " * 50
    assert cloud.proxy.happened["delayed"] > 20


async def test_nobody_there_is_said_at_once() -> None:
    """A refused connection before the first token: Unreachable, retryable, without waiting for the timeout."""
    async with site(EchoAnswer()) as cloud:
        cloud.proxy.refuse = True
        with pytest.raises(Unreachable) as failure:
            await collect(cloud.make(connect_timeout=2 * HANG_S), ask())

    assert failure.value.retryable
    assert cloud.proxy.happened["refused"]
    assert not cloud.answer.requests


async def test_a_server_that_says_nothing_is_given_up_in_time() -> None:
    """Bytes vanish during the upgrade: Unreachable after the connect timeout."""
    async with site(EchoAnswer()) as cloud:
        cloud.proxy.black_hole = True
        with pytest.raises(Unreachable):
            await collect(cloud.make(connect_timeout=0.2), ask())

    assert cloud.proxy.happened["swallowed"]


async def test_no_first_token_in_time() -> None:
    """DeadlineExceeded, and the cloud stops computing."""
    async with site(ScriptedAnswer(asyncio.Event())) as cloud:
        with pytest.raises(DeadlineExceeded) as failure:
            await collect(cloud.make(first_token_timeout=1.0), ask())
        await until(lambda: cloud.endpoint.running == 0 and cloud.endpoint.held == 0)

    assert failure.value.retryable
    assert cloud.answer.closed == ["r1"]


async def test_lost_before_the_first_token_is_given_back() -> None:
    """Accepted, then cut off for longer than it is worth waiting: Unreachable, so that the edge may answer itself."""
    async with site(ScriptedAnswer(asyncio.Event())) as cloud:
        backend = cloud.make(rules=replace(RULES, reattach_within=0.2))
        asked = asyncio.create_task(collect(backend, ask()))
        await cloud.answer.begun.wait()
        cloud.proxy.refuse = True
        cloud.proxy.cut()
        with pytest.raises(Unreachable):
            await asked
        assert cloud.endpoint.running == 1, "a disconnect is not a cancel"
        cloud.proxy.refuse = False
        await until(lambda: cloud.endpoint.running == 0)

    assert cloud.answer.closed == ["r1"], "the cancel was delivered once the cloud could be reached"


async def test_lost_after_the_first_token_ends_openly() -> None:
    """When the resume time is over: Unrecoverable, after everything that was received."""
    async with site(ScriptedAnswer(*words(3), asyncio.Event())) as cloud:
        got: list[Delta] = []
        with pytest.raises(Unrecoverable):
            async for delta in cloud.make(resume_ttl=0.3).answer(ask()):
                got.append(delta)
                cloud.proxy.refuse = True
                cloud.proxy.cut()

    assert text_of(words(3)).startswith(text_of(got))
    assert got


async def test_a_restarted_cloud_is_not_trusted_to_go_on() -> None:
    """Another epoch after the first token: Unrecoverable, never a silent splice of two answers."""
    async with site(ScriptedAnswer(*words(3), asyncio.Event())) as old, site(EchoAnswer()) as new:
        backend = old.backend
        got: list[Delta] = []
        with pytest.raises(Unrecoverable, match="restarted"):
            async for delta in backend.answer(ask()):
                got.append(delta)
                old.proxy.target = new.proxy.port
                old.proxy.cut()

        assert got
        assert text_of(await collect(backend, ask("r2"))) == "one two three "


async def test_leaving_cancels() -> None:
    """A generator that is closed stops the cloud's work; so does a task that is cancelled."""
    async with site(ScriptedAnswer(*words(1), asyncio.Event())) as cloud:
        backend = cloud.backend
        async with aclosing(backend.answer(ask("r1"))) as deltas:
            await anext(deltas)
        task = asyncio.create_task(collect(backend, ask("r2")))
        await until(lambda: len(cloud.answer.requests) == 2)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        await until(lambda: cloud.endpoint.running == 0 and cloud.endpoint.held == 0)

    assert sorted(cloud.answer.closed) == ["r1", "r2"]


async def test_edge_only_puts_no_byte_on_the_wire() -> None:
    """Not even a connection is made."""
    async with site(EchoAnswer()) as cloud:
        with pytest.raises(PolicyDenied):
            await collect(cloud.backend, ask(label="edge_only"))

    assert not cloud.proxy.happened
    assert not cloud.proxy.up


async def test_edge_only_adds_no_byte_to_a_live_connection() -> None:
    """The label is checked although the connection is there; the words never pass the proxy."""
    async with site(EchoAnswer()) as cloud:
        backend = cloud.make(rules=ClientRules())
        await collect(backend, ask("r1", "harmless"))
        await until(lambda: cloud.endpoint.held == 0)
        sent = len(cloud.proxy.up)
        with pytest.raises(PolicyDenied):
            await collect(backend, ask("r2", "private", label="edge_only"))
        assert len(cloud.proxy.up) == sent


@pytest.mark.parametrize("label", ["edge_only", "redact"])
async def test_the_label_is_looked_at_before_anything_else(label: Label) -> None:
    """By the backend itself, not only by its session: a closed one, which has no session to ask, says the same."""
    async with site(EchoAnswer()) as cloud:
        backend = cloud.make(rules=ClientRules())
        await backend.aclose()
        with pytest.raises(PolicyDenied):
            await collect(backend, ask(label=label))


@pytest.mark.parametrize("value", ["1", "true", "YES", "on", "whatever"])
async def test_no_cloud_means_no_cloud(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """CAUSEWAY_NO_CLOUD: refused by name and without a connection, kept or not, though every caller asks for one."""
    async with site(EchoAnswer()) as cloud:
        monkeypatch.setenv("CAUSEWAY_NO_CLOUD", value)
        backend = cloud.make(keep_connected=True)
        backend.start()
        with pytest.raises(PolicyDenied, match="CAUSEWAY_NO_CLOUD"):
            await collect(backend, ask())
        with pytest.raises(PolicyDenied):
            await backend._connect()
        await asyncio.sleep(0.2)  # the keeper has tried several times

    assert not cloud.proxy.happened


@pytest.mark.parametrize("value", ["", "0", "false", "no", "off"])
async def test_a_plain_no_leaves_the_cloud_on(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The switch is off where it says so."""
    monkeypatch.setenv("CAUSEWAY_NO_CLOUD", value)
    async with site(EchoAnswer()) as cloud:
        assert text_of(await collect(cloud.backend, ask())) == "one two three "


async def test_the_switch_cuts_a_live_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thrown while a connection is up: not one byte more is sent on it, it is cut, and no other is made."""
    async with site(EchoAnswer()) as cloud:
        backend = cloud.make(keep_connected=True)
        await collect(backend, ask("r1", "harmless"))
        monkeypatch.setenv("CAUSEWAY_NO_CLOUD", "1")
        sent = len(cloud.proxy.up)
        assert not backend.link().connected
        with pytest.raises(PolicyDenied):
            await collect(backend, ask("r2", "private"))
        await until(lambda: not backend._session.up)  # its next ping was due
        await asyncio.sleep(0.2)

        assert len(cloud.proxy.up) == sent
        assert cloud.proxy.happened["connected"] == 1


async def test_a_bad_key_is_said_and_not_shown() -> None:
    """Unauthorized, from the cloud; the key is in no message."""
    async with site(EchoAnswer()) as cloud:
        with pytest.raises(Unauthorized) as failure:
            await collect(cloud.make(key="cw-wrong"), ask())

    assert failure.value.source == "cloud"
    assert "cw-wrong" not in str(failure.value)


async def test_a_redirect_is_not_followed() -> None:
    """The key goes to the configured host only."""
    async with site(EchoAnswer()) as elsewhere:
        reply = b"HTTP/1.1 302 Found\r\nLocation: ws://127.0.0.1:%d/v1/connect\r\nContent-Length: 0\r\n\r\n"

        async def redirect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(reply % elsewhere.proxy.port)
            await writer.drain()
            writer.close()

        server = await asyncio.start_server(redirect, "127.0.0.1", 0)
        async with server:
            backend = CloudBackend(f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}", KEY)
            with pytest.raises(Unreachable, match="302"):
                await collect(backend, ask())
            await backend.aclose()

        assert not elsewhere.proxy.happened


async def test_the_clouds_errors_keep_their_type() -> None:
    """What failed there, which field, retry or not: all of it arrives; earlier output comes first."""
    failing = ScriptedAnswer(*words(2), UnknownModel("no such model", param="model", source="cloud"))
    async with site(failing) as cloud:
        got: list[Delta] = []
        with pytest.raises(UnknownModel) as failure:
            async for delta in cloud.backend.answer(ask()):
                got.append(delta)  # noqa: PERF401 - what came before the error is kept

    assert (failure.value.param, failure.value.source) == ("model", "cloud")
    assert text_of(got) == text_of(words(2))


async def test_one_failure_leaves_the_others_alone() -> None:
    """An over-long request and a doubled id are refused; their neighbour on the same connection is not disturbed."""
    gate = asyncio.Event()
    async with site(ScriptedAnswer(*words(2), gate, LAST)) as cloud:
        backend = cloud.backend
        async with aclosing(backend.answer(ask("r1"))) as deltas:
            got = [await anext(deltas)]
            with pytest.raises(BadRequest):
                await collect(backend, ask("r2", "x" * (1 << 20)))
            with pytest.raises(RequestConflict):
                await collect(backend, ask("r1"))
            gate.set()
            got += [delta async for delta in deltas]

    assert text_of(got) == text_of(words(2))


async def test_a_draining_cloud_is_seen() -> None:
    """After GOAWAY what runs ends, and new requests are Overloaded at once."""
    gate = asyncio.Event()
    async with site(ScriptedAnswer(*words(2), gate, LAST)) as cloud:
        backend = cloud.backend
        async with aclosing(backend.answer(ask("r1"))) as deltas:
            got = [await anext(deltas)]
            draining = asyncio.create_task(cloud.endpoint.drain(5))
            await until(lambda: backend.link().draining)
            with pytest.raises(Overloaded) as refusal:
                await collect(backend, ask("r2"))
            gate.set()
            got += [delta async for delta in deltas]
        await draining

    assert got[-1].finish_reason == "stop"
    assert refusal.value.retry_after == 1.0


async def test_the_link_tells_how_it_is() -> None:
    """Down at first; up, with a measured round trip and the cloud's model; down again with a reason."""
    card = ModelCard(id="smollm2", context_length=8192)
    async with site(EchoAnswer(), rules=Rules(models=(card,))) as cloud:
        backend = cloud.make(keep_connected=True)
        assert not backend.link().connected
        backend.start()
        await until(lambda: backend.link().connected)
        link = backend.link()
        cloud.proxy.refuse = True
        cloud.proxy.cut()
        await until(lambda: backend.link().last_error is not None)
        assert not backend.link().connected
        cloud.proxy.refuse = False
        await until(lambda: backend.link().connected)

    assert link.round_trip_s is not None
    assert 0 < link.round_trip_s < 1
    assert (link.model, link.context_length) == ("smollm2", 8192)


async def test_closing_ends_everything() -> None:
    """Requests fail by name, the cloud stops computing, no task of ours stays."""
    before = asyncio.all_tasks()
    async with site(ScriptedAnswer(*words(1), asyncio.Event())) as cloud:
        backend = cloud.backend
        asked = asyncio.create_task(collect(backend, ask()))
        await cloud.answer.begun.wait()
        await backend.aclose()
        with pytest.raises(Unreachable):
            await asked
        await until(lambda: cloud.endpoint.running == 0)
        with pytest.raises(Unreachable):
            await collect(backend, ask("r2"))

    assert asyncio.all_tasks() <= before


@pytest.mark.parametrize("url", ["http://localhost", "ws://example.org", "localhost:1", "wss://u:p@h", "wss://h/?k=v"])
def test_an_address_that_would_leak_is_refused(url: str) -> None:
    """No plaintext beyond loopback, no credentials in the address."""
    with pytest.raises(BadRequest) as refusal:
        CloudBackend(url, KEY)

    assert refusal.value.param == "cloud"


async def test_a_strange_certificate_gets_no_key() -> None:
    """wss:// verifies by default: a server with a certificate of its own making sees no request."""
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    seen = bytearray()

    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.extend(await reader.read(1000))
        writer.close()

    server = await asyncio.start_server(listen, "127.0.0.1", 0, ssl=context)
    async with server:
        backend = CloudBackend(f"wss://localhost:{server.sockets[0].getsockname()[1]}", KEY)
        with pytest.raises(CausewayError) as failure:
            await collect(backend, ask())
        await backend.aclose()

    assert isinstance(failure.value, Unreachable)
    assert not seen


def replace_sampling(request: ChatRequest, **fields: Any) -> ChatRequest:
    return msgspec.structs.replace(request, sampling=msgspec.structs.replace(request.sampling, **fields))
