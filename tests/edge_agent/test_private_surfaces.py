"""On every surface, in every field that holds text: what is private leaves as placeholders and comes back as itself,
and nothing that reports of it (headers, logs, metrics, status, plans, errors) has either."""

from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest
from edge_apps import TOKEN, edge
from edge_sides import Remote
from structlog.testing import capture_logs

from edge_agent.cache.answers import AnswerCache
from edge_agent.cache.memory import MemoryLayer
from edge_agent.cache.store import Store
from shared.errors import UpstreamFailed
from shared.schemas import ChatRequest, Delta, TokenLogprob, Usage

ADDRESS, SSN = "anna@example.org", "123456788"
SAY = f"Repeat: my ssn is {SSN}, write to {ADDRESS} now, {SSN}"
PARAMETERS = {"type": "object", "properties": {"to": {"enum": [ADDRESS]}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "mail", "arguments": f'{{"to": "{ADDRESS}", "n": {SSN}}}'}}
MESSAGES = [
    {"role": "system", "content": f"You help {ADDRESS}."},
    {"role": "user", "content": "hello", "name": "anna"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": f'{{"mail": "{ADDRESS}", "ssn": {SSN}}}', "tool_call_id": "c1"},
    {"role": "user", "content": [{"type": "text", "text": SAY[:20]}, {"type": "text", "text": SAY[20:]}]},
]
TOOLS = [{"type": "function", "function": {"name": "mail", "description": f"As {ADDRESS}", "parameters": PARAMETERS}}]
OWNER = {"user": ADDRESS, "metadata": {"owner": ADDRESS, ADDRESS: "x"}}
LOGPROBS = {"logprobs": True, "top_logprobs": 1}

CALLS: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": ("/v1/chat/completions", {"messages": MESSAGES, "tools": TOOLS, "stop": [ADDRESS], **OWNER, **LOGPROBS}),
    "completion": (
        "/v1/completions",
        {"prompt": SAY, "user": ADDRESS, "stop": ADDRESS, "max_tokens": 99, "logprobs": 1},
    ),
    "responses": (
        "/v1/responses",
        {"input": SAY, "instructions": f"For {ADDRESS}", "include": ["message.output_text.logprobs"], **OWNER},
    ),
    "messages": (
        "/v1/messages",
        {
            "messages": [{"role": "user", "content": [{"type": "text", "text": SAY}]}],
            "system": [{"type": "text", "text": f"For {ADDRESS}"}],
            "max_tokens": 99,
            "metadata": {"user_id": ADDRESS},
            "stop_sequences": [ADDRESS],
        },
    ),
    "ollama chat": ("/api/chat", {"messages": [{"role": "user", "content": SAY}], "options": {"stop": [ADDRESS]}}),
    "ollama generate": ("/api/generate", {"prompt": SAY, "system": f"For {ADDRESS}", "logprobs": True}),
}


class Spelling:
    """Says the last text that it was sent, three letters a token, with each token's probability."""

    def __init__(self) -> None:
        self.error: str | None = None

    async def answer(self, request: ChatRequest) -> AsyncGenerator[Delta, None]:
        text = request.prompt or request.messages[-1].content
        if self.error is not None:
            raise UpstreamFailed(self.error)
        for at in range(0, len(text), 3):
            token = text[at : at + 3]
            said = (TokenLogprob(token, -0.1, tuple(token.encode())),) if request.sampling.logprobs is not None else ()
            yield Delta(text=token, tokens=1, logprobs=said)
        yield Delta(finish_reason="stop", usage=Usage(prompt_tokens=9, completion_tokens=9))


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("name", CALLS)
async def test_out_as_placeholders_and_back_as_itself(tmp_path: Path, name: str, stream: bool) -> None:
    """P-1, P-8: no original on the wire, no placeholder at the client; reports have neither."""
    path, fields = CALLS[name]
    remote = Remote(Spelling())
    async with edge(tmp_path, cloud=remote, policy="mode: prefer_cloud\n") as it, it.http() as http:
        with capture_logs() as logs:
            reply = await http.post(path, json={"model": "auto", "stream": stream, **fields})
            plan = await http.post("/v1/route", json={"model": "auto", "messages": MESSAGES, "tools": TOOLS})
            reports = [(await http.get("/metrics")).text]
            admin = {"authorization": f"Bearer {TOKEN}"}
            reports += [(await http.get(where, headers=admin)).text for where in ("/admin/status", "/admin/policy")]

    assert reply.status_code == 200, reply.text
    (sent,) = remote.seen
    assert ADDRESS not in str(sent)
    assert SSN not in str(sent)
    assert sent.label == "free"
    assert "<EMAIL_" not in reply.text
    assert "<US_SSN_" not in reply.text
    assert "EMAIL_" not in reply.text
    spoken = _text(reply.text) if stream else reply.text
    assert ADDRESS in spoken
    assert SSN in spoken
    assert plan.json()["redact"] is True
    for report in (str(logs), plan.text, str(dict(reply.headers)), *reports):
        for private in (ADDRESS, SSN, "EMAIL_"):
            assert private not in report


def _text(body: str) -> str:
    """What a stream's pieces spell, whatever they are called."""
    return "".join(
        part.partition('"')[0]
        for key in ('"content":"', '"text":"', '"delta":"', '"response":"')
        for part in body.split(key)[1:]
    )


async def test_a_later_turn_hides_what_an_earlier_one_told(tmp_path: Path) -> None:
    """P-6: the conversation that the device keeps for Responses goes out redacted whole, with equal placeholders."""
    remote = Remote(Spelling())
    async with edge(tmp_path, cloud=remote, policy="mode: prefer_cloud\n") as it, it.http() as http:
        first = (await http.post("/v1/responses", json={"model": "auto", "input": SAY})).json()
        asked = {"model": "auto", "input": f"and {SSN}?", "previous_response_id": first["id"]}
        second = await http.post("/v1/responses", json=asked)

    assert f"and {SSN}?" in second.text
    assert len(remote.seen[1].messages) == 3
    assert SSN not in str(remote.seen)
    assert remote.seen[1].messages[0] == remote.seen[0].messages[0]
    assert remote.seen[1].messages[1].content == remote.seen[0].messages[0].content


async def test_what_the_cloud_says_of_an_error_has_no_original(tmp_path: Path) -> None:
    """It was never told one; and its own words are no longer than an error's."""
    side = Spelling()
    side.error = "cannot answer"
    async with (
        edge(tmp_path, cloud=Remote(side), policy="mode: only_cloud\nfallback: none\n") as it,
        it.http() as http,
    ):
        with capture_logs() as logs:
            reply = await http.post("/v1/chat/completions", json={"model": "auto", "messages": MESSAGES})

    assert reply.status_code == 502
    assert ADDRESS not in reply.text + str(logs)


async def test_answers_from_the_cache_are_whole(tmp_path: Path) -> None:
    """P-8: an answer that was restored is kept restored, and served so to the same question alone."""
    remote = Remote(Spelling())
    body = {"model": "auto", "messages": [{"role": "user", "content": SAY}], "temperature": 0}
    other = body | {"messages": [{"role": "user", "content": SAY.replace(ADDRESS, "ben@example.org")}]}
    async with edge(tmp_path, cloud=remote, policy="mode: prefer_cloud\n") as it, it.http() as http:
        it.daemon.agent._cache = AnswerCache(Store((MemoryLayer(1 << 20),)))
        replies = [await http.post("/v1/chat/completions", json=asked) for asked in (body, body, other)]

    assert [reply.headers.get("x-causeway-cache", "").partition(";")[0] for reply in replies] == ["miss", "hit", "miss"]
    assert len(remote.seen) == 2
    texts = [reply.json()["choices"][0]["message"]["content"] for reply in replies]
    assert texts == [SAY, SAY, SAY.replace(ADDRESS, "ben@example.org")]
