import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager

import httpx
import pytest
from bad_input import BODIES, CHAT, COMPLETIONS, REQUESTS, Body, chat, completion, exchange, status_of
from fakes import EchoAnswer, ScriptedAnswer
from prometheus_client import CollectorRegistry, Counter
from serving import served
from waiting import HANG_S

from shared import surface as surface_module
from shared.errors import (
    BY_CODE,
    CausewayError,
    Overloaded,
    RateLimited,
    Unauthorized,
    UnknownModel,
    UpstreamFailed,
)
from shared.guard import Guard
from shared.http import create_app
from shared.replies import error_body
from shared.schemas import Answer, ChatRequest, Delta, ModelCard, Route, Usage

LAST = Delta(finish_reason="stop", usage=Usage(prompt_tokens=3, completion_tokens=2))


class KnowsModels:
    """An Answer that knows the model `auto` only."""

    def __init__(self, inner: Answer) -> None:
        self.inner = inner

    async def answer(self, request: ChatRequest) -> AsyncGenerator[Delta, None]:
        if request.model != "auto":
            raise UnknownModel("there is auto", param="model")
        async for delta in self.inner.answer(request):
            yield delta


@asynccontextmanager
async def surface(
    answer: Answer | CausewayError, *, guard: Guard | None = None, status: str = "ok", **options: object
) -> AsyncIterator[int]:
    def answer_for(headers: Mapping[str, str]) -> Answer:
        if isinstance(answer, CausewayError):
            raise answer
        return answer

    registry = CollectorRegistry()
    Counter("seen", "A metric", registry=registry).inc()
    app = create_app(
        answer_for=answer_for,
        models=lambda: [ModelCard(id="auto", context_length=2048), ModelCard(id="org/real", context_length=8192)],
        health=lambda: {"status": status},
        registry=registry,
        source="edge",
        guard=guard or Guard(),
    )
    async with served(app, **options) as port:
        yield port


@asynccontextmanager
async def client(port: int) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
        yield http


def post(body: bytes, *headers: str, path: str = CHAT) -> bytes:
    lines = [
        f"POST {path} HTTP/1.1",
        "host: 127.0.0.1",
        "content-type: application/json",
        f"content-length: {len(body)}",
        *headers,
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def events(text: str) -> list[str]:
    return [line.removeprefix("data: ") for line in text.split("\n\n") if line]


async def test_every_bad_body_is_refused_by_name_and_serving_goes_on() -> None:
    """Each body of the table gets its status, code and field, none reaches the model, and the next one is served."""
    echo = EchoAnswer()
    async with surface(KnowsModels(echo)) as port, client(port) as http:
        for case in BODIES:
            await refused(http, case)
        assert not echo.requests
        assert (await http.post(CHAT, content=chat(), headers={"content-type": "application/json"})).status_code == 200


async def refused(http: httpx.AsyncClient, case: Body) -> None:
    headers = {"content-type": "application/json", **case.headers}
    reply = await http.post(case.path, content=case.body, headers=headers)
    error = reply.json()["error"]
    got = (reply.status_code, error["code"], error["param"])
    assert got == (case.status, case.code, case.param), f"{case.name}: {error}"
    assert error["source"] == "edge"
    assert error["message"]


async def test_every_bad_request_is_refused_on_the_raw_socket() -> None:
    """Requests that no client library would send get a 4xx, and the server serves on."""
    echo = EchoAnswer()
    async with surface(echo) as port:
        for case in REQUESTS:
            assert status_of(await exchange(port, case.data)) in case.statuses, case.name
            assert not echo.requests, case.name
        assert status_of(await exchange(port, b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")) == 200


async def test_loopback_and_configured_names_are_served() -> None:
    """Every loopback name with any port is a good Host, and so is a configured one."""
    async with surface(EchoAnswer(), guard=Guard(hosts=frozenset({"edge.lan"}))) as port:
        for host in ("localhost", "LOCALHOST:1", "127.0.0.1:65535", "[::1]", "[::1]:8484", "edge.lan"):
            assert status_of(await exchange(port, f"GET /v1/models HTTP/1.1\r\nhost: {host}\r\n\r\n".encode())) == 200


async def test_preflight_of_a_foreign_page_gets_no_permission() -> None:
    """A foreign Origin's preflight is refused without any CORS header; an allow-listed one gets them."""
    mine = "http://console.example"
    async with surface(EchoAnswer(), guard=Guard(origins=frozenset({mine}))) as port, client(port) as http:
        ask = {"access-control-request-method": "POST", "access-control-request-headers": "content-type"}
        bad = await http.options(CHAT, headers={"origin": "http://evil.example", **ask})
        good = await http.options(CHAT, headers={"origin": mine, **ask})

    assert bad.status_code == 403
    assert not [name for name in bad.headers if name.startswith("access-control")]
    assert good.status_code == 204
    assert good.headers["access-control-allow-origin"] == mine


async def test_websocket_of_a_foreign_page_is_refused() -> None:
    """An upgrade with a foreign Origin or Host is answered 403 before any route sees it."""
    upgrade = (
        "GET /any HTTP/1.1\r\nhost: {host}\r\n{extra}connection: upgrade\r\nupgrade: websocket\r\n"
        "sec-websocket-version: 13\r\nsec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
    )
    async with surface(EchoAnswer()) as port:
        for host, extra in (("127.0.0.1", "origin: https://evil.example\r\n"), ("evil.example", "")):
            answer = await exchange(port, upgrade.format(host=host, extra=extra).encode())
            assert status_of(answer) == 403
            assert b'"code":"forbidden"' in answer


async def test_a_body_over_the_limit_is_refused_at_once() -> None:
    """413 for a declared length, without reading the body, and for a chunked body as soon as it is over."""
    async with surface(EchoAnswer(), guard=Guard(max_body=1000)) as port:
        declared = post(b"").replace(b"content-length: 0", b"content-length: 1001")
        assert status_of(await exchange(port, declared)) == 413
        chunked = post(b"").replace(b"content-length: 0", b"transfer-encoding: chunked") + b"3e8\r\n" + b" " * 1000
        assert status_of(await exchange(port, chunked + b"\r\n1\r\n \r\n")) == 413
        assert status_of(await exchange(port, post(b" " * 5_000_000))) == 413
        exact = chat() + b" " * (1000 - len(chat()))
        assert status_of(await exchange(port, post(exact))) == 200


async def test_a_body_shorter_than_declared_costs_nothing() -> None:
    """A client that declares more than it sends is timed out with 408, and one that leaves is forgotten."""
    echo = EchoAnswer()
    async with surface(echo, guard=Guard(body_timeout=0.2)) as port:
        short = post(chat()).replace(b"content-length: ", b"content-length: 9")
        assert status_of(await exchange(port, short)) == 408
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(short)
        await writer.drain()
        writer.close()
        await writer.wait_closed()
    assert not echo.requests


async def test_headers_that_do_not_end_are_timed_out() -> None:
    """A slowloris gets 408 and is closed, on a fresh connection and on a kept-alive one."""
    async with surface(EchoAnswer(), header_timeout=0.2) as port:
        assert status_of(await exchange(port, b"GET /health HT")) == 408
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
        await reader.readuntil(b'"ok"}')
        writer.write(b"GET /hea")
        async with asyncio.timeout(HANG_S):
            assert (await reader.read()).startswith(b"HTTP/1.1 408")
        writer.close()


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("tokens", [0, 1])
async def test_a_client_that_leaves_stops_the_answer(stream: bool, tokens: int) -> None:
    """Closing the socket ends the answer: streaming or not, before and after the first token."""
    sent = asyncio.Event()
    sent.set()
    script = [Delta(text="one", tokens=1)] * tokens
    answer = ScriptedAnswer(*script, sent, asyncio.Event())
    async with surface(answer) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(post(chat(stream=stream)))
        await answer.begun.wait()
        if stream and tokens:
            await reader.readuntil(b'"content":"one"')
        writer.close()
        async with asyncio.timeout(HANG_S):
            await answer.ended.wait()
        assert answer.running == 0


async def test_leaving_stops_every_choice() -> None:
    """With n choices, all of them end when the client leaves."""
    answer = ScriptedAnswer(Delta(text="one", tokens=1), asyncio.Event())
    async with surface(answer) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(post(chat(stream=True, n=4)))
        await reader.readuntil(b'"index":3')
        writer.close()
        async with asyncio.timeout(HANG_S):
            await answer.idle()
        assert sorted(answer.closed) == sorted(request.id for request in answer.requests)


async def test_a_reader_that_never_reads_stalls_its_answer_not_our_memory() -> None:
    """Deltas are pulled only as fast as the socket takes them."""
    pulled = 0

    class Endless:
        async def answer(self, request: ChatRequest) -> AsyncGenerator[Delta, None]:
            nonlocal pulled
            while True:
                pulled += 1
                yield Delta(text="x" * 1000, tokens=1)
                await asyncio.sleep(0)

    async with surface(Endless()) as port:
        _, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
        writer.write(post(chat(stream=True)))
        seen = -1
        while seen != pulled or not pulled:
            seen = pulled
            await asyncio.sleep(0.3)  # the socket's buffers fill, then nothing moves any more
        assert pulled * 1000 < 16_000_000
        writer.close()


async def test_a_reader_that_never_reads_is_given_up_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its answer is closed, and its connection cut without an end."""
    monkeypatch.setattr(surface_module, "SEND_TIMEOUT", 0.5)
    closed = asyncio.Event()

    class Endless:
        async def answer(self, _: ChatRequest) -> AsyncGenerator[Delta, None]:
            try:
                while True:
                    yield Delta(text="x" * 65536, tokens=1)
            finally:
                closed.set()

    async with surface(Endless()) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
        writer.write(post(chat(stream=True)))
        await asyncio.wait_for(closed.wait(), HANG_S)
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await asyncio.wait_for(reader.readexactly(1 << 30), HANG_S)
        writer.close()


async def test_each_write_has_its_own_time() -> None:
    """A reader that is slow, but reads, is waited for however long it takes in all."""
    read = asyncio.Event()

    async def send(_: object) -> None:
        await read.wait()

    now = asyncio.get_running_loop().time
    reply = surface_module.Reply(send, "r", "edge", error_body)
    assert reply.patience(now()) == surface_module.SEND_TIMEOUT
    for _ in range(2):
        read.clear()
        writing = asyncio.create_task(reply.write(b"a", more=True))
        await asyncio.sleep(0)
        waiting_since = now()
        assert reply.patience(waiting_since + surface_module.SEND_TIMEOUT) <= 0 < reply.patience(waiting_since)
        read.set()
        await writing

        assert reply.patience(waiting_since + 1e6) == surface_module.SEND_TIMEOUT


async def test_no_tasks_are_left_behind() -> None:
    """After a hundred abandoned requests the loop has as many tasks as before."""
    answer = ScriptedAnswer(Delta(text="one", tokens=1), asyncio.Event())
    async with surface(answer) as port:
        before = len(asyncio.all_tasks())
        for at in range(100):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(post(chat(stream=at % 2 == 0, n=1 + at % 3)))
            if at % 2 == 0:
                await reader.readuntil(b"data: ")
            writer.close()
            await writer.wait_closed()
        async with asyncio.timeout(HANG_S):
            while answer.running or len(asyncio.all_tasks()) > before:  # noqa: ASYNC110 - tasks tell nobody their end
                await asyncio.sleep(0.01)


async def test_an_error_before_the_first_token_has_its_own_status() -> None:
    """Each error of the tree comes back with its status, code, source and Retry-After, streaming or not."""
    answer = ScriptedAnswer()
    async with surface(answer) as port, client(port) as http:
        for cls in BY_CODE.values():
            for stream in (True, False):
                answer.script = (Delta(), cls("no luck", param="x", source="cloud", retry_after=1.2))
                reply = await http.post(CHAT, content=chat(stream=stream), headers={"content-type": "application/json"})
                error = reply.json()["error"]
                assert reply.status_code == cls.status
                assert reply.headers["retry-after"] == "2"
                got = tuple(error[name] for name in ("code", "message", "param", "source", "retryable"))
                assert got == (cls.code, "no luck", "x", "cloud", cls.retryable)


async def test_an_error_after_the_first_token_is_an_explicit_event() -> None:
    """A stream that fails ends with an error event and no [DONE]; the connection ends cleanly."""
    answer = ScriptedAnswer(Delta(text="one", tokens=1), UpstreamFailed("it broke", source="cloud"))
    async with surface(answer) as port, client(port) as http:
        reply = await http.post(CHAT, content=chat(stream=True), headers={"content-type": "application/json"})

    assert reply.status_code == 200
    assert json.loads(events(reply.text)[-1])["error"]["code"] == "upstream_failed"
    assert "[DONE]" not in reply.text


async def test_an_answer_that_just_ends_is_an_error() -> None:
    """Without a last delta there is no [DONE] and no 200: a cut is never silent."""
    answer = ScriptedAnswer(Delta(text="one", tokens=1))
    async with surface(answer) as port, client(port) as http:
        streamed = await http.post(CHAT, content=chat(stream=True), headers={"content-type": "application/json"})
        whole = await http.post(CHAT, content=chat(), headers={"content-type": "application/json"})

    assert json.loads(events(streamed.text)[-1])["error"]["code"] == "upstream_failed"
    assert whole.status_code == 502


async def test_a_fault_of_ours_is_a_500_without_its_text(capsys: pytest.CaptureFixture[str]) -> None:
    """An unexpected exception is an Internal error; its message, which may hold a prompt, goes nowhere."""
    answer = ScriptedAnswer(ValueError("the secret prompt"))
    async with surface(answer) as port, client(port) as http:
        reply = await http.post(CHAT, content=chat(), headers={"content-type": "application/json"})

    assert reply.status_code == 500
    assert reply.json()["error"]["code"] == "internal"
    logged = capsys.readouterr()
    assert "secret" not in reply.text + logged.out + logged.err
    assert "ValueError" in logged.out + logged.err


async def test_what_the_framework_refuses_is_an_error_object_too() -> None:
    """404 and 405 have OpenAI error objects as well."""
    async with surface(EchoAnswer()) as port, client(port) as http:
        missing = await http.get("/v2/anything")
        wrong = await http.get(CHAT)

    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "not_found")
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (405, "method_not_allowed")
    assert wrong.headers["allow"] == "POST"


async def test_route_and_request_id_are_headers_that_cannot_be_forged() -> None:
    """Reply headers say route, reason, failovers and the client's id; a reason with line ends cannot add a header.

    Executions go by an id of ours, so that a client may send the same one again.
    """
    reason = "cloud_down\r\nset-cookie: a=b " + "é" * 500
    answer = ScriptedAnswer(Delta(text="a", tokens=1, route=Route(target="edge", reason=reason, failovers=2)), LAST)
    async with surface(answer) as port, client(port) as http:
        for stream in (True, False):
            headers = {"content-type": "application/json", "x-request-id": "mine-1"}
            reply = await http.post(CHAT, content=chat(stream=stream), headers=headers)
            assert reply.headers["x-causeway-route"] == "edge"
            assert reply.headers["x-causeway-reason"].startswith("cloud_down??set-cookie: a=b ??")
            assert reply.headers["x-causeway-failovers"] == "2"
            assert reply.headers["x-request-id"] == "mine-1"
            assert "set-cookie" not in reply.headers
    assert len({request.id for request in answer.requests}) == 2


async def test_models_health_and_metrics() -> None:
    """The three GET routes answer; an id with a slash is found; health turns 503 when not ok."""
    async with surface(EchoAnswer()) as port, client(port) as http:
        assert [card["id"] for card in (await http.get("/v1/models")).json()["data"]] == ["auto", "org/real"]
        assert (await http.get("/v1/models/org/real")).json()["context_length"] == 8192
        assert (await http.get("/v1/models/none")).json()["error"]["code"] == "model_not_found"
        assert (await http.get("/health")).status_code == 200
        assert "seen_total 1.0" in (await http.get("/metrics")).text
    async with surface(EchoAnswer(), status="draining") as port, client(port) as http:
        assert (await http.get("/health")).status_code == 503


async def test_every_route_but_health_asks_who_it_is() -> None:
    """Where no key was accepted, only /health answers."""
    async with surface(Unauthorized("no key")) as port, client(port) as http:
        for path in (CHAT, COMPLETIONS, "/v1/models", "/v1/models/auto", "/metrics"):
            method = "POST" if path in (CHAT, COMPLETIONS) else "GET"
            reply = await http.request(method, path, content=chat(), headers={"content-type": "application/json"})
            assert reply.status_code == 401, path
            assert reply.headers["www-authenticate"] == "Bearer"
        assert (await http.get("/health")).status_code == 200


async def test_a_label_in_the_header_or_the_body_holds() -> None:
    """edge_only in either place reaches the Answer."""
    echo = EchoAnswer()
    async with surface(echo) as port, client(port) as http:
        json_type = {"content-type": "application/json"}
        await http.post(CHAT, content=chat(), headers={**json_type, "x-causeway-label": "edge_only"})
        await http.post(CHAT, content=chat(causeway={"label": "edge_only"}), headers=json_type)
        await http.post(COMPLETIONS, content=completion(), headers={**json_type, "x-causeway-label": "free"})
    assert [request.label for request in echo.requests] == ["edge_only", "edge_only", "free"]


async def test_stopping_tells_the_requests_that_did_not_end() -> None:
    """On shutdown a running stream ends with an error event, a waiting reply with 503."""
    answer = ScriptedAnswer(Delta(text="one", tokens=1), asyncio.Event())
    async with surface(answer) as port:
        streaming, one = await asyncio.open_connection("127.0.0.1", port)
        one.write(post(chat(stream=True)))
        await streaming.readuntil(b'"content":"one"')
        waiting, two = await asyncio.open_connection("127.0.0.1", port)
        answer.begun.clear()
        two.write(post(chat()))
        await answer.begun.wait()
    assert b'"code":"overloaded"' in await streaming.read()
    assert status_of(await waiting.read()) == 503
    assert answer.running == 0
    one.close()
    two.close()


async def test_overload_is_told_with_when_to_come_back() -> None:
    """A full queue answers 503, a limit 429, each with Retry-After."""
    for error in (Overloaded("full", retry_after=0.1), RateLimited("slow down", retry_after=7)):
        async with surface(error) as port, client(port) as http:
            reply = await http.post(CHAT, content=chat(), headers={"content-type": "application/json"})
            assert reply.status_code == error.status
            assert int(reply.headers["retry-after"]) >= 1


JSON = {"content-type": "application/json"}


async def test_an_answer_that_does_not_keep_its_deadline_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """504 before the first token, an explicit error event after it; the answer is closed in both cases."""
    monkeypatch.setattr(surface_module, "DEADLINE_GRACE", 0.0)
    never = asyncio.Event()
    scripted = ScriptedAnswer(never)
    body = chat(causeway={"deadline_s": 0.05}, stream=True)
    async with surface(scripted) as port, client(port) as http:
        early = await http.post(CHAT, headers=JSON, content=body)
        scripted.script = (Delta(text="one", tokens=1), never)
        late = await http.post(CHAT, headers=JSON, content=body)
        await scripted.idle()
        scripted.script = (TimeoutError("an answer's own"),)
        own = await http.post(CHAT, headers=JSON, content=chat(causeway={"deadline_s": 60}))
    assert (early.status_code, early.json()["error"]["code"]) == (504, "deadline_exceeded")
    assert late.status_code == 200
    assert '"code":"deadline_exceeded"' in late.text
    assert "[DONE]" not in late.text
    assert own.json()["error"]["code"] == "internal"
