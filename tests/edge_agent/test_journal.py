"""The journal: every decision with its outcome, never in anybody's way, no text in it."""

import sqlite3
from dataclasses import replace
from pathlib import Path

from edge_sides import HERE, THERE, ask, collect, daemon_over, policy_file
from fakes import ScriptedAnswer

from edge_agent.daemon import put_together
from edge_agent.journal import Journal, _connected
from router.features import NO_CLOUD, DeviceReading, RequestFeatures
from router.records import Outcome, Recorded, read
from shared.errors import PolicyDenied, UpstreamFailed

RECORD = Recorded(
    at=1.0,
    request=RequestFeatures(prompt_tokens=5),
    device=DeviceReading(model="small", context_length=100),
    link=NO_CLOUD,
    target="edge",
    outcome=Outcome(ending="done"),
)
SECRET = "the moon is made of cheese"


async def test_every_decision_with_what_it_saw_and_what_came_of_it(tmp_path: Path) -> None:
    """One row a request, refused ones too, by the policy that decided; no text of it is in the file."""
    daemon = daemon_over(ScriptedAnswer(*HERE), ScriptedAnswer(*THERE), policy_file(tmp_path, "mode: prefer_cloud"))
    journal = Journal(tmp_path / "state" / "journal.db")
    recorded = put_together(daemon.local, daemon.offload and daemon.offload._cloud, daemon.policy, journal)
    await collect(recorded.agent, ask(SECRET, id="a"))
    await collect(recorded.agent, ask(SECRET, id="b", label="edge_only"))
    _, refused = await collect(recorded.agent, ask(SECRET, id="c", label="edge_only", model="cloud"))
    journal.close()

    assert isinstance(refused, PolicyDenied)
    offloaded, denied, local = sorted(read(tmp_path / "state" / "journal.db"), key=lambda one: one.refused or one.rule)[
        ::-1
    ]
    by = {one.refused or one.rule: one for one in (offloaded, denied, local)}
    assert by["mode"].outcome.served == "cloud"
    assert by["mode"].outcome.ending == "done"
    assert by["label"].outcome.served == "edge"
    assert by["policy_denied"].target is None
    assert {one.policy for one in by.values()} == {daemon.policy.policy.fingerprint}
    raw = b"".join(path.read_bytes() for path in (tmp_path / "state").iterdir())
    assert b"cheese" not in raw
    assert b"prompt_tokens" in raw


async def test_a_failed_answer_is_recorded_with_its_error(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.db")
    daemon = daemon_over(ScriptedAnswer(UpstreamFailed("broken")), None, policy_file(tmp_path, "mode: only_edge"))
    recorded = put_together(daemon.local, None, daemon.policy, journal)
    await collect(recorded.agent, ask())
    journal.close()
    (row,) = read(tmp_path / "journal.db")
    assert row.outcome.ending == "upstream_failed"


def test_a_damaged_file_is_moved_aside(tmp_path: Path) -> None:
    """The daemon starts, and the old file is still there to be looked at."""
    path = tmp_path / "journal.db"
    path.write_bytes(b"this is no database" * 100)
    journal = Journal(path)
    journal.write(RECORD)
    journal.close()
    assert [row.outcome.ending for row in read(path)] == ["done"]
    assert [other.name for other in tmp_path.glob("*.damaged-*")] != []


def test_it_keeps_the_newest(tmp_path: Path) -> None:
    """Old rows go when there are too many."""
    journal = Journal(tmp_path / "journal.db", max_rows=50)
    for number in range(3000):
        journal.write(replace(RECORD, at=float(number)))
        if number % 500 == 0:
            journal.flush()
    journal.close()
    rows = list(read(tmp_path / "journal.db"))
    assert rows[-1].at == 2999.0
    assert len(rows) < 1500
    assert journal.lost == 0


def test_a_full_disk_costs_rows_and_nothing_else(tmp_path: Path) -> None:
    """What cannot be written is counted as lost; whoever decides does not notice."""
    path = tmp_path / "journal.db"
    journal = Journal(path)
    journal.write(RECORD)
    journal.flush()
    with sqlite3.connect(path) as database:
        database.execute("DROP TABLE decisions")
    database.close()
    for _ in range(3):
        journal.write(RECORD)
    journal.close()
    assert journal.lost == 3


def test_no_place_for_a_file_costs_rows_and_nothing_else(tmp_path: Path) -> None:
    """A state folder that cannot be made: nothing is recorded, nothing waits."""
    (tmp_path / "taken").write_text("a file where the folder should be")
    journal = Journal(tmp_path / "taken" / "journal.db")
    journal._writer.join(timeout=10)
    journal.write(RECORD)
    journal.close()
    assert journal.lost == 1


def test_it_is_readable_by_its_owner_only(tmp_path: Path) -> None:
    """So is SQLite's own log beside it, while it is open and after a crash."""
    opened = _connected(tmp_path / "journal.db")
    modes = {file.name: file.stat().st_mode & 0o077 for file in tmp_path.iterdir()}
    opened.close()

    assert "journal.db-wal" in modes
    assert not any(modes.values()), modes
