"""Decisions over HTTP, without anything being run."""

from pathlib import Path
from typing import Any

import pytest
from edge_apps import edge
from edge_sides import Local, Remote
from fakes import EchoAnswer

PATH = "/v1/route"
POLICY = "mode: prefer_edge\nrules: [{name: long-talks, when: {turns: 2}, target: cloud}]"
HELLO: list[Any] = [{"role": "user", "content": "zebra-canary"}]


async def test_a_plan_says_who_would_answer_why_and_by_which_policy(tmp_path: Path) -> None:
    """Target, rule, reasons, fallback, label, predictions, the policy's fingerprint and what was seen; no side is
    asked, and no text of the request comes back."""
    local, remote = Local(EchoAnswer(), tokens=7), Remote(EchoAnswer("cloud"))
    async with edge(tmp_path, local, remote, policy=POLICY) as it, it.http() as http:
        here = (await http.post(PATH, json={"model": "auto", "messages": HELLO})).json()
        there = (await http.post(PATH, json={"model": "auto", "messages": HELLO * 2})).json()
        private = {"model": "auto", "messages": HELLO * 2, "causeway": {"label": "edge_only"}}
        kept = await http.post(PATH, json=private)
        fingerprint = it.daemon.policy.policy.fingerprint

    assert (here["object"], here["target"], there["target"], kept.json()["target"]) == (
        "route",
        "edge",
        "cloud",
        "edge",
    )
    assert (there["rule"], there["fallback"]) == ("rule long-talks", "edge")
    assert kept.json()["label"] == "edge_only"
    assert here["policy"] == there["policy"] == fingerprint
    assert here["reasons"]
    assert here["seen"]["request"]["prompt_tokens"] == 7
    assert {"request", "device", "link"} == here["seen"].keys()
    assert set(there["predictions"]) == {"edge", "cloud"}
    assert "zebra" not in kept.text
    assert not local.inner.requests  # type: ignore[attr-defined]
    assert not remote.seen


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"model": "zap", "messages": HELLO}, 200, "model_not_found"),
        ({"model": "auto", "messages": HELLO, "temperature": 9}, 400, "bad_request"),
    ],
)
async def test_a_refusal_is_a_plan_too(tmp_path: Path, body: dict[str, Any], status: int, code: str) -> None:
    """What would be refused by the policy or for its model is told with its error; a bad body is an error itself."""
    async with edge(tmp_path, EchoAnswer()) as it, it.http() as http:
        reply = await http.post(PATH, json=body)

    said = reply.json()
    assert reply.status_code == status
    assert (said["refused"] if status == 200 else said["error"])["code"] == code
