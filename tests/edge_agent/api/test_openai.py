import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path

import httpx
import openai
import pytest
from bad_input import BODIES, CHAT, REQUESTS, chat, exchange, status_of
from edge_sides import HERE, THERE, Local, Remote, Turns, daemon_over, policy_file
from fakes import EchoAnswer, ScriptedAnswer
from serving import served
from waiting import HANG_S

from edge_agent.api.openai import openai_app
from edge_agent.daemon import Daemon
from shared.errors import Unreachable, UpstreamFailed
from shared.guard import Guard
from shared.keys import Keys, new_key
from shared.schemas import Answer

JSON = {"content-type": "application/json"}
HELLO = [{"role": "user", "content": "Hello there my friend"}]


class Edge:
    """A running edge over scripted sides."""

    def __init__(self, daemon: Daemon, port: int) -> None:
        self.daemon = daemon
        self.port = port
        self.url = f"http://127.0.0.1:{port}"

    def http(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=self.url, timeout=60)

    def openai(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="any-key-will-do", max_retries=0, timeout=60)


@asynccontextmanager
async def edge(
    folder: Path,
    local: Answer | None = None,
    cloud: Answer | None = None,
    *,
    policy: str = "mode: prefer_edge",
    keys: Keys | None = None,
) -> AsyncIterator[Edge]:
    daemon = daemon_over(local, cloud, policy_file(folder, policy))
    async with served(openai_app(daemon, keys=keys, guard=Guard())) as port:
        yield Edge(daemon, port)


async def test_the_whole_table_of_bad_input_is_refused(tmp_path: Path) -> None:
    """Status, code and field of every body as the table says; no side is asked, and the next request is served."""
    local, remote = Local(EchoAnswer()), Remote(EchoAnswer("cloud"))
    async with edge(tmp_path, local, remote) as it, it.http() as http:
        for case in BODIES:
            reply = await http.post(case.path, content=case.body, headers={**JSON, **case.headers})
            error = reply.json()["error"]
            assert (reply.status_code, error["code"], error["param"]) == (case.status, case.code, case.param), case.name
        for raw in REQUESTS:
            assert status_of(await exchange(it.port, raw.data)) in raw.statuses, raw.name
        assert not local.inner.requests  # type: ignore[attr-defined]
        assert not remote.seen
        assert (await http.post(CHAT, content=chat(), headers=JSON)).status_code == 200


@pytest.mark.parametrize("target", ["edge", "cloud"])
async def test_the_official_client_works_unchanged(tmp_path: Path, target: str) -> None:
    """Streaming with usage, whole, several choices, logprobs, completions, models, errors: on either route."""
    async with edge(tmp_path, EchoAnswer("edge"), EchoAnswer("cloud")) as it, it.openai() as client:
        chunks = [
            chunk
            async for chunk in await client.chat.completions.create(
                model=target, messages=HELLO, stream=True, stream_options={"include_usage": True}
            )
        ]
        whole = await client.chat.completions.create(
            model=target, messages=HELLO, n=2, seed=7, logprobs=True, top_logprobs=2, temperature=0.5, top_p=0.9,
            stop=["zebra"], max_tokens=3, user="me", metadata={"a": "b"}, store=False,
        )  # fmt: skip
        text = await client.completions.create(model=target, prompt="one two", max_tokens=5)
        names = [model.id async for model in client.models.list()]
        with pytest.raises(openai.NotFoundError) as unknown:
            await client.chat.completions.create(model="gpt-17", messages=HELLO)
        with pytest.raises(openai.BadRequestError) as bad:
            await client.chat.completions.create(model=target, messages=HELLO, temperature=9)

    assert (
        "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices).split()
        == HELLO[0]["content"].split()
    )
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 4
    last = next(chunk for chunk in chunks if chunk.choices and chunk.choices[0].finish_reason)
    assert last.model_extra is not None
    assert last.model_extra["causeway"]["route"] == target
    assert len(whole.choices) == 2
    assert whole.choices[0].finish_reason == "length"
    assert whole.choices[0].logprobs is not None
    assert text.choices[0].text.split() == ["one", "two"]
    assert names == ["auto", "edge", "cloud", "small", "large"]
    assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")
    assert bad.value.param == "temperature"


@pytest.mark.parametrize("stream", [True, False])
async def test_every_reply_says_who_served_it_and_why(tmp_path: Path, stream: bool) -> None:
    """Route, reason and failovers in the headers; here of an answer that the edge gave in the cloud's stead."""
    cloud = ScriptedAnswer(Unreachable("no connection"))
    async with edge(tmp_path, Turns(HERE), cloud, policy="mode: prefer_cloud") as it, it.http() as http:
        reply = await http.post(CHAT, content=chat(stream=stream), headers=JSON)

    assert reply.status_code == 200
    assert reply.headers["x-causeway-route"] == "edge"
    assert reply.headers["x-causeway-reason"] == "cloud unreachable: no connection; answered by the edge"
    assert reply.headers["x-causeway-failovers"] == "1"
    assert '"causeway":{"route":"edge"' in reply.text


async def test_a_cut_after_the_first_token_is_an_explicit_error(tmp_path: Path) -> None:
    """The stream ends with an error event that says who failed, without [DONE], and with nothing spliced in."""
    cloud = ScriptedAnswer(THERE[0], UpstreamFailed("the engine died"))
    async with edge(tmp_path, Turns(HERE), cloud, policy="mode: prefer_cloud") as it:
        async with it.http() as http:
            reply = await http.post(CHAT, content=chat(stream=True), headers=JSON)
        async with it.openai() as client:
            with pytest.raises(openai.APIError, match="the engine died"):
                async for _ in await client.chat.completions.create(model="auto", messages=HELLO, stream=True):
                    pass

    assert reply.status_code == 200
    assert "here" not in reply.text
    assert "[DONE]" not in reply.text
    assert '"source":"cloud"' in reply.text.splitlines()[-2]


@pytest.mark.parametrize("where", ["body", "header"])
async def test_a_label_keeps_a_request_here(tmp_path: Path, where: str) -> None:
    """edge_only in body or header: answered here against the policy's preference, and nothing reaches the cloud."""
    remote = Remote(Turns(THERE))
    fields = {"causeway": {"label": "edge_only"}} if where == "body" else {}
    headers = {"x-causeway-label": "edge_only"} if where == "header" else {}
    async with edge(tmp_path, Turns(HERE), remote, policy="mode: prefer_cloud") as it, it.http() as http:
        reply = await http.post(CHAT, content=chat(**fields), headers=JSON | headers)
        refused = await http.post(CHAT, content=chat(model="cloud", **fields), headers=JSON | headers)

    assert reply.headers["x-causeway-route"] == "edge"
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "policy_denied")
    assert not remote.seen


@pytest.mark.parametrize("target", ["edge", "cloud"])
@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_stops_the_side_that_answers(tmp_path: Path, target: str, stream: bool) -> None:
    """Closing the connection closes the answer behind it, through agent and offload."""
    side = ScriptedAnswer(HERE[0], asyncio.Event())
    sides = (side, None) if target == "edge" else (None, side)
    async with edge(tmp_path, *sides) as it, it.http() as http:
        request = asyncio.create_task(http.post(CHAT, content=chat(model=target, stream=stream), headers=JSON))
        await asyncio.wait_for(side.begun.wait(), HANG_S)
        request.cancel()
        await asyncio.wait_for(side.ended.wait(), HANG_S)

        assert it.daemon.intake.running == 0


async def test_with_keys_every_route_but_health_needs_one(tmp_path: Path) -> None:
    """Beyond loopback the keys hold for inference, models and metrics."""
    key = new_key(tmp_path / "keys", "client", now=datetime.now(UTC))
    async with edge(tmp_path, keys=Keys(tmp_path / "keys", source="edge")) as it, it.http() as http:
        paths = ["/v1/models", "/v1/models/auto", "/metrics"]
        bare = [(await http.get(path)).status_code for path in paths]
        bare.append((await http.post(CHAT, content=chat(), headers=JSON)).status_code)
        health = await http.get("/health")
        http.headers["authorization"] = f"Bearer {key}"
        good = [(await http.get(path)).status_code for path in paths]
        good.append((await http.post(CHAT, content=chat(), headers=JSON)).status_code)

    assert bare == [401] * 4
    assert good == [200] * 4
    assert health.json() == {"status": "ok", "edge": "ready", "cloud": "none"}


async def test_on_loopback_any_key_will_do(tmp_path: Path) -> None:
    """With any key or none; Host and Origin are checked all the same."""
    async with edge(tmp_path) as it, it.http() as http:
        for headers in ({}, {"authorization": "Bearer sk-anything"}, {"authorization": "Basic x"}):
            assert (await http.post(CHAT, content=chat(), headers=JSON | headers)).status_code == 200
        for headers in ({"host": "evil.example"}, {"origin": "https://evil.example"}):
            assert (await http.post(CHAT, content=chat(), headers=JSON | headers)).status_code == 403


async def test_draining_is_told_and_finishes_what_runs(tmp_path: Path) -> None:
    """New requests get 503 with Retry-After, health is 503, the running answer ends well."""
    gate = asyncio.Event()
    side = ScriptedAnswer(HERE[0], gate, *HERE[1:])
    async with edge(tmp_path, side) as it, it.http() as http:
        running = asyncio.create_task(http.post(CHAT, content=chat(), headers=JSON))
        await asyncio.wait_for(side.begun.wait(), HANG_S)
        draining = asyncio.create_task(it.daemon.intake.drain())
        await asyncio.sleep(0)
        late = await http.post(CHAT, content=chat(), headers=JSON)
        health = await http.get("/health")
        gate.set()
        done = await running
        await asyncio.wait_for(draining, HANG_S)

    assert (late.status_code, late.json()["error"]["code"]) == (503, "overloaded")
    assert int(late.headers["retry-after"]) >= 1
    assert health.status_code == 503
    assert done.json()["choices"][0]["message"]["content"] == "from here"
