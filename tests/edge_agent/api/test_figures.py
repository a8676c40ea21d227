"""What the administrator's page asks for its charts."""

import itertools
from pathlib import Path

import pytest
from administration import administration

GOAL = (
    "mode: prefer_edge\ngoal: {cloud_share: 0.4}\n"
    "prices: {cloud: {input_per_million: 1000, output_per_million: 1000, currency: EUR}}\n"
)


async def test_the_difficulty_curve_rises(tmp_path: Path) -> None:
    """More to the cloud never keeps noticeably less of its gain: near the end, the last ones may cost a little."""
    async with administration(tmp_path) as edge:
        found = await edge.get("/admin/difficulty")

    kept = [point["recovered"] for point in found["curve"]]
    assert (kept[0], kept[-1]) == (0, 1)
    assert all(after >= before - 0.01 for before, after in itertools.pairwise(kept))
    assert (found["goal"], found["in_force"]) == (None, None)
    assert found["recorded"] == {
        "requests": 0, "scored": 0, "cloud_shares": None, "call_cost": None, "currency": None}  # fmt: skip


async def test_a_goal_shows_what_it_should_bring_and_cost(tmp_path: Path) -> None:
    """The goal in force, what was measured for it, and what the recorded requests say of it."""
    async with administration(tmp_path) as edge:
        number = (await edge.post("/admin/policy/propose", source=GOAL, why="try"))["version"]
        await edge.post("/admin/policy/activate", version=number, why="try")
        for text in ("Prove that there are infinitely many primes.", "hi"):
            await edge.ask(text)
        assert edge.daemon.journal is not None
        edge.daemon.journal.flush()
        found = await edge.get("/admin/difficulty")

    assert found["goal"] == {"cloud_share": 0.4}
    assert found["in_force"]["cloud_share"] == 0.4
    assert 0.4 < found["in_force"]["recovered"] < 1
    assert all(len(one["quality"]) == 101 and one["bins"] for one in found["measured"])
    recorded = found["recorded"]
    assert (recorded["requests"], recorded["scored"], recorded["currency"]) == (2, 2, "EUR")
    assert recorded["call_cost"] == pytest.approx(0.007)
    assert recorded["cloud_shares"] == sorted(recorded["cloud_shares"])
    assert set(recorded["cloud_shares"]) <= {0, 0.5, 1}


async def test_activity_is_what_was_recorded(tmp_path: Path) -> None:
    """Counts, times and cost of the latest decisions; nothing of their text."""
    async with administration(tmp_path) as edge:
        for model in ("edge", "edge", "cloud"):
            await edge.ask("a very private question", model=model)
        assert edge.daemon.journal is not None
        edge.daemon.journal.flush()
        reply = await edge.admin.get("/admin/activity")

    found = reply.json()
    assert [(one["name"], one["decisions"]) for one in found["targets"]] == [("edge", 2), ("cloud", 1)]
    assert {one["server"] for one in found["waits"]} == {"edge", "cloud"}
    assert "private" not in reply.text


async def test_without_a_journal_there_is_no_activity(tmp_path: Path) -> None:
    """A clear error for what is not recorded; the difficulty needs no record."""
    async with administration(tmp_path, history=False) as edge:
        assert (await edge.admin.get("/admin/activity")).status_code == 404
        assert (await edge.admin.get("/admin/difficulty")).status_code == 200
