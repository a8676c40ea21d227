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


async def test_a_class_is_asked_for_in_a_header(tmp_path: Path) -> None:
    """Plans and answers know it; one that there is not is the caller's mistake, and is named; the status counts."""
    body = {"model": "auto", "messages": HELLO}
    async with edge(tmp_path, Local(EchoAnswer()), policy=POLICY) as it, it.http() as http:
        asked = {"x-causeway-class": "batch_processing"}
        seen = (await http.post(PATH, json=body, headers=asked)).json()["seen"]["request"]["scenario"]
        answered = await http.post("/v1/chat/completions", json=body, headers=asked)
        wrong = [
            await http.post(path, json=body, headers={"x-causeway-class": "zap"})
            for path in (PATH, "/v1/chat/completions")
        ]
        made = it.daemon.experience.attainment(it.daemon.policy.policy.targets)

    assert seen == {"name": "batch_processing", "guessed": False}
    assert answered.status_code == 200
    assert [(reply.status_code, reply.json()["error"]["param"]) for reply in wrong] == [(400, "x-causeway-class")] * 2
    assert made == {"batch_processing": {"requests": 1, "p50_ms": 1, "p95_ms": 1, "p99_ms": 1}}


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
