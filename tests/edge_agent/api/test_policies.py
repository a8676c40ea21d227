"""The policy's administration over HTTP."""

import asyncio
import threading
from pathlib import Path

import httpx
import numpy as np
import pytest
from administration import CLOUD, administration
from typer.testing import CliRunner

from edge_agent.api import policies as module
from router import difficulty
from router.__main__ import app as commands
from router.policy import parse
from router.replay import replay
from router.weights import shipped

WRONG = "mode: prefer_cloud\nrules:\n  - {name: a, when: {cod: true}, target: edge}\n"


async def test_check_names_each_mistake_by_line_and_keeps_nothing(tmp_path: Path) -> None:
    """And shows a valid one against what is in force."""
    async with administration(tmp_path) as edge:
        wrong = await edge.post("/admin/policy/check", source=WRONG)
        right = await edge.post("/admin/policy/check", source=CLOUD)
        large = await edge.post("/admin/policy/check", source=CLOUD + "# and more\n" * 100_000)
        overview = await edge.get("/admin/policy")

    assert not wrong["valid"]
    assert [(one["line"], one["field"]) for one in wrong["problems"]] == [(3, "rules[0].when.cod")]
    assert (right["valid"], right["problems"]) == (True, [])
    assert ([one["message"] for one in large["problems"]], large["diff"]) == (["larger than 256 KiB"], "")
    assert right["summary"].startswith("mode prefer_cloud, 0 rules")
    assert "+mode: prefer_cloud" in right["diff"].splitlines()
    assert (overview["versions"], overview["current"]["name"]) == ([], "default")


@pytest.mark.parametrize("damage", ["cut short", "of another version"])
async def test_check_refuses_what_propose_would_and_so_does_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    """Where the difficulty's weights cannot be read, a goal is refused by all three, with the same line, field and
    words, and so is its replay."""
    weights, policy = tmp_path / "difficulty.npz", "mode: prefer_edge\n\ngoal: {cloud_share: 0.3}\n"
    if damage == "cut short":
        weights.write_bytes(shipped("difficulty.npz").read_bytes()[:5000])
    else:
        np.savez(weights, about=np.array('{"version": 99}'))
    (tmp_path / "policy.yaml").write_text(policy)
    monkeypatch.setattr(difficulty, "shipped", lambda _: weights)
    difficulty._shipped.cache_clear()
    try:
        async with administration(tmp_path) as edge:
            checked = await edge.post("/admin/policy/check", source=policy)
            proposed = await edge.admin.post("/admin/policy/propose", json={"source": policy, "why": "x"})
            replayed = await edge.admin.post("/admin/policy/replay", json={"source": policy})
        told = CliRunner().invoke(commands, ["check", str(tmp_path / "policy.yaml")])
    finally:
        difficulty._shipped.cache_clear()

    (problem,) = checked["problems"]
    assert (checked["valid"], problem["line"], problem["field"]) == (False, 3, "goal")
    assert "difficulty.npz is " in problem["message"]
    for refused in (proposed, replayed):
        assert refused.status_code == 400
        error = refused.json()["error"]
        assert (error["code"], error["param"]) == ("invalid_policy", "goal")
        assert error["message"] == f"policy:3: goal: {problem['message']}"
    assert f"policy.yaml:3: goal: {problem['message']}" in told.stderr


async def test_a_policy_from_proposal_to_rollback(tmp_path: Path) -> None:
    """Each step is visible in where requests go, in the overview and in the history."""
    async with administration(tmp_path) as edge:
        before = (await edge.ask()).headers["x-causeway-route"]
        version = (await edge.post("/admin/policy/propose", source=CLOUD, why="faster"))["version"]
        proposed = (await edge.ask()).headers["x-causeway-route"]
        active = await edge.post("/admin/policy/activate", version=version, why="agreed")
        after = (await edge.ask()).headers["x-causeway-route"]
        back = await edge.post("/admin/policy/rollback", why="dear")
        again = (await edge.ask()).headers["x-causeway-route"]
        one = await edge.get(f"/admin/policy/versions/{version}")

    assert (before, proposed, after, again) == ("edge", "edge", "cloud", "edge")
    assert (active["current"]["version"], active["current"]["source"]) == (version, CLOUD)
    assert back["current"]["name"] == "default"
    assert [(act["action"], act["who"], act["why"]) for act in reversed(back["acts"])] == [
        ("propose", "admin", "faster"),
        ("activate", "admin", "agreed"),
        ("rollback", "admin", "dear"),
    ]
    assert back["broken_at"] is None
    assert one["source"] == CLOUD


async def test_a_canary_is_shown_while_it_runs(tmp_path: Path) -> None:
    """With what it has led to so far; rolling back withdraws it."""
    async with administration(tmp_path) as edge:
        version = (await edge.post("/admin/policy/propose", source=CLOUD, why="try"))["version"]
        trial = await edge.post("/admin/policy/canary", version=version, percent=100, why="all", least=5)
        route = (await edge.ask()).headers["x-causeway-route"]
        running = await edge.get("/admin/policy")
        over = await edge.post("/admin/policy/rollback", why="enough")

    assert trial["canary"]["limits"] == {"failed_share": 0.05, "first_token_s": None, "least": 5}
    assert route == "cloud"
    assert (running["canary"]["ended"], running["canary"]["failed"]) == (1, 0)
    assert over["canary"] is None


async def test_replay_says_what_would_change(tmp_path: Path) -> None:
    """Over the decisions that were recorded, without a model and without a text."""
    async with administration(tmp_path) as edge:
        for number in range(6):
            await edge.ask(f"question {number}", model="auto" if number % 2 else "edge")
        edge.daemon.journal.flush()  # type: ignore[union-attr]
        found = await edge.post("/admin/policy/replay", source=CLOUD)
        listed = (await edge.get("/admin/decisions"))["decisions"]
        rest = (await edge.get(f"/admin/decisions?after={listed[3]['number']}"))["decisions"]

    assert found["moved"] == [{"from": "edge", "to": "cloud", "count": 3}]
    assert (found["total"], found["leaks"], found["rules"]) == (6, 0, {"requested_model": 3, "mode": 3})
    assert found["would"].startswith("move 3 to the cloud (of 6)")
    assert [one["target"] for one in listed] == ["edge"] * 6
    assert {one["ending"] for one in listed} == {"done"}
    assert rest == listed[4:]
    assert "question" not in str(listed)


async def test_what_was_spent_is_shown_where_there_are_prices(tmp_path: Path) -> None:
    """The status has the day's sum, each decision its cost, a replay the difference; without prices none of it."""
    priced = CLOUD + "prices: {cloud: {input_per_million: 1000, output_per_million: 1000, currency: EUR}}\n"
    async with administration(tmp_path) as edge:
        await edge.ask()
        before = (await edge.get("/admin/status"))["spent"]
        version = (await edge.post("/admin/policy/propose", source=priced, why="money"))["version"]
        await edge.post("/admin/policy/activate", version=version, why="money")
        await edge.ask()
        edge.daemon.journal.flush()  # type: ignore[union-attr]
        after = (await edge.get("/admin/status"))["spent"]
        listed = (await edge.get("/admin/decisions"))["decisions"]
        found = await edge.post("/admin/policy/replay", source="mode: only_edge")

    assert before is None
    spent = pytest.approx(0.005)
    assert after == {"currency": "EUR", "today": spent, "tenants": {"": spent}, "set_aside": 0}
    assert [(one["cost"], one["currency"]) for one in listed] == [(None, None), (0.005, "EUR")]
    assert found["cost_change"] == pytest.approx(-0.005)
    assert "-0.005 EUR" in found["would"]
    assert [day["candidate"] for day in found["days"].values()] == [0.0]
    assert [day["recorded"] for day in found["days"].values()] == [spent]


async def test_one_replay_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second one is refused and may come again; so is a check of the whole chain. Meanwhile everything else goes on,
    and it is over when the work is, also where who asked has left."""
    begun, go_on = threading.Event(), threading.Event()

    def slow(*_: object) -> object:
        begun.set()
        assert go_on.wait(60)
        return replay([], parse("mode: only_edge"))

    monkeypatch.setattr(module, "replay", slow)
    async with administration(tmp_path) as edge:
        await edge.ask()
        asked = {"source": "mode: only_edge"}
        first = asyncio.create_task(edge.admin.post("/admin/policy/replay", json=asked))
        assert await asyncio.to_thread(begun.wait, 60)
        first.cancel()
        refused = await edge.admin.post("/admin/policy/replay", json=asked)
        chain = await edge.admin.get("/admin/policy/chain")
        assert (await edge.ask()).status_code == 200
        go_on.set()
        async with asyncio.timeout(60):
            while (again := await edge.admin.get("/admin/policy/chain")).status_code == 429:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert (await edge.post("/admin/policy/replay", **asked))["total"] == 0

    assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
    assert chain.status_code == 429
    assert again.json() == {"broken_at": None}


ACTS = {
    "/admin/policy/propose": ("propose", {"source": CLOUD, "why": "x"}),
    "/admin/policy/activate": ("activate", {"version": 0, "why": "x"}),
    "/admin/policy/canary": ("activate", {"version": 1, "percent": 5, "why": "x"}),
    "/admin/policy/rollback": ("activate", {"why": "x"}),
    "/admin/reload": ("activate", {}),
    "/admin/policy/check": ("read", {"source": CLOUD}),
}


async def test_each_role_may_do_what_is_its_own(tmp_path: Path) -> None:
    """Reading, proposing, activating; the history names the person, not the key."""
    async with administration(tmp_path) as edge:
        refused: dict[str, list[str]] = {}
        for role in ("read", "propose", "activate"):
            async with edge.someone(f"{role}.anna") as client:
                for path, (_, body) in ACTS.items():
                    reply = await client.post(path, json=body)
                    if reply.status_code == 403:
                        refused.setdefault(role, []).append(path)
                        assert "needs the role" in reply.json()["error"]["message"]
        acts = (await edge.get("/admin/policy"))["acts"]
        async with edge.someone("anna") as nobody, edge.client("wrong") as stranger:
            assert (await nobody.get("/admin/policy")).status_code == 403
            assert (await stranger.get("/admin/policy")).status_code == 401

    assert refused["read"] == [path for path, (needed, _) in ACTS.items() if needed != "read"]
    assert refused["propose"] == [path for path, (needed, _) in ACTS.items() if needed == "activate"]
    assert "activate" not in refused
    assert {act["who"] for act in acts} == {"anna"}


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("check", b"{", 400, None),
        ("check", b"[]", 400, None),
        ("check", b'{"source": "\xff"}', 400, None),
        ("check", b"{}", 400, None),
        ("check", b'{"source": 5}', 400, "source"),
        ("check", b'{"source": "", "more": 1}', 400, None),
        ("propose", b'{"source": "mode: x", "why": "y"}', 400, "mode"),
        ("propose", b'{"source": "mode: only_edge", "why": " "}', 400, "why"),
        ("activate", b'{"version": 99, "why": "y"}', 404, "version"),
        ("canary", b'{"version": 1, "percent": 0, "why": "y"}', 400, "percent"),
        ("canary", b'{"version": 1, "percent": 1e999, "why": "y"}', 400, "percent"),
        ("canary", b'{"version": 1, "percent": 5, "why": "y", "failed_share": 2}', 400, "failed_share"),
        ("replay", b'{"source": "mode: [", "last": 5}', 400, None),
        ("replay", b'{"source": "mode: only_edge", "last": 0}', 400, "last"),
    ],
)
async def test_bad_input_is_named_and_changes_nothing(
    tmp_path: Path, path: str, body: bytes, status: int, param: str | None
) -> None:
    """The field, where there is one; the policy in force stays."""
    async with administration(tmp_path) as edge:
        headers = {"content-type": "application/json"}
        reply = await edge.admin.post(f"/admin/policy/{path}", content=body, headers=headers)
        overview = await edge.get("/admin/policy")

    assert reply.status_code == status, reply.text
    assert reply.json()["error"]["param"] == param
    assert (overview["current"]["name"], overview["acts"], overview["canary"]) == ("default", [], None)


async def test_without_a_history_or_a_journal_it_says_so(tmp_path: Path) -> None:
    """A state folder that cannot be written costs the versions, not the daemon."""
    async with administration(tmp_path, history=False) as edge:
        overview = await edge.get("/admin/policy")
        proposed = await edge.admin.post("/admin/policy/propose", json={"source": CLOUD, "why": "x"})
        decisions = await edge.admin.get("/admin/decisions")
        answered = await edge.ask()

    assert "cannot be written" in overview["unavailable"]
    assert (proposed.status_code, proposed.json()["error"]["code"]) == (503, "no_history")
    assert decisions.status_code == 404
    assert answered.status_code == 200


async def test_the_console_is_ours_alone(tmp_path: Path) -> None:
    """Static, with a policy that permits it nothing from elsewhere; its own origin may use the API, no other may."""
    async with administration(tmp_path) as edge, httpx.AsyncClient(base_url=edge.url) as anyone:
        page = await anyone.get("/console/")
        bare = await anyone.get("/console")
        outside = [
            await anyone.get(path) for path in ("/console/../policy.py", "/console/%2e%2e/policy.py", "/console/x")
        ]
        own = await edge.admin.post("/admin/policy/check", json={"source": CLOUD}, headers={"origin": edge.url})
        foreign = await edge.admin.post(
            "/admin/policy/check", json={"source": CLOUD}, headers={"origin": "http://127.0.0.1:1"}
        )

    assert (page.status_code, bare.status_code) == (200, 307)
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert {reply.status_code for reply in outside} == {404}
    assert (own.status_code, foreign.status_code) == (200, 403)
