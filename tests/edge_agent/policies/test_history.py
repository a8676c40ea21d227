"""The history of policies: what is kept, and that nobody can rewrite it unseen."""

import hashlib
import sqlite3
from pathlib import Path

import msgspec
import pytest

from edge_agent.policies import history as module
from edge_agent.policies.chain import Act, following
from edge_agent.policies.history import DamagedVersion, History, HistoryFull
from edge_agent.policies.signer import Signer, device_signer
from shared.config import InvalidSettings
from shared.errors import NotFound

SEED = bytes(range(32))


def history(folder: Path, seed: bytes = SEED) -> History:
    return History(folder / "policies.db", Signer(seed), clock=lambda: 1000.0)


def filled(folder: Path) -> History:
    kept = history(folder)
    for mode in ("prefer_edge", "prefer_cloud"):
        version = kept.propose(f"mode: {mode}".encode(), mode, "anna", f"try {mode}")
        kept.act("activate", version.number, "anna", "go")
    return kept


def test_it_is_readable_by_its_owner_only(tmp_path: Path) -> None:
    """So is SQLite's own log beside it, while it is open: a policy may hold words that are private."""
    kept = filled(tmp_path)
    modes = {file.name: file.stat().st_mode & 0o077 for file in tmp_path.iterdir()}
    kept.close()

    assert "policies.db-wal" in modes
    assert not any(modes.values()), modes


def test_what_was_proposed_and_done_is_there_after_a_restart(tmp_path: Path) -> None:
    """Versions with their text, acts with who and why, and which one is in force."""
    filled(tmp_path).close()

    kept = history(tmp_path)

    assert [version.source for version in kept.versions()] == [b"mode: prefer_cloud", b"mode: prefer_edge"]
    assert [(act.action, act.version, act.who, act.why) for act in kept.acts()] == [
        ("activate", 2, "anna", "go"),
        ("propose", 2, "anna", "try prefer_cloud"),
        ("activate", 1, "anna", "go"),
        ("propose", 1, "anna", "try prefer_edge"),
    ]
    assert (kept.in_force(), kept.before(2), kept.before(1)) == (2, 1, 2)
    assert kept.broken_at() is None
    assert (tmp_path / "policies.db").stat().st_mode & 0o077 == 0
    kept.close()


def test_an_empty_history_says_so(tmp_path: Path) -> None:
    """Nothing in force, nothing before, and an unknown version is named."""
    kept = history(tmp_path)
    assert (kept.in_force(), kept.before(0), kept.last_of("anna"), kept.broken_at()) == (None, 0, None, None)
    with pytest.raises(NotFound, match="no version 7"):
        kept.version(7)
    kept.close()


@pytest.mark.parametrize(
    ("tampering", "broken"),
    [
        ("UPDATE acts SET who = 'eve' WHERE number = 2", 2),
        ("UPDATE acts SET version = 1 WHERE number = 4", 4),
        ("DELETE FROM acts WHERE number = 3", 3),
        ("UPDATE acts SET signature = zeroblob(64) WHERE number = 1", 1),
        ("UPDATE acts SET at = 999 WHERE number = 1", 1),
    ],
)
def test_a_rewritten_act_breaks_the_chain_from_there(tmp_path: Path, tampering: str, broken: int) -> None:
    """Changed, taken out or signed by somebody else: the first act that is not as written is named."""
    filled(tmp_path).close()
    with sqlite3.connect(tmp_path / "policies.db") as database:
        assert database.execute(tampering).rowcount == 1
    database.close()

    kept = history(tmp_path)

    assert kept.broken_at() == broken
    kept.close()


def test_the_chain_is_checked_once_and_what_is_new_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was found whole is not read again; an act that went meanwhile is missed, and the whole can be asked for."""
    kept, asked = filled(tmp_path), []
    monkeypatch.setattr(
        module, "following", lambda database, number: asked.append(number) or following(database, number)
    )
    assert kept.broken_at() is None
    asked.clear()
    kept.act("rollback", 1, "anna", "no")
    assert kept.broken_at() is None
    assert set(asked) == {4, 5}

    with sqlite3.connect(tmp_path / "policies.db") as database:
        database.execute("UPDATE acts SET who = 'eve' WHERE number = 2")
    assert (kept.broken_at(), kept.broken_at(whole=True), kept.broken_at()) == (None, 2, 2)
    with sqlite3.connect(tmp_path / "policies.db") as database:
        database.execute("UPDATE acts SET who = 'anna' WHERE number = 2")
        database.execute("DELETE FROM acts WHERE number = 5")
    database.close()
    assert kept.broken_at(whole=True) is None
    kept.act("activate", 2, "anna", "again")
    assert kept.broken_at() is None
    kept.close()


def test_an_act_that_goes_while_it_runs_is_missed(tmp_path: Path) -> None:
    """Even the last one, of which a chain alone cannot tell that it was there."""
    kept = filled(tmp_path)
    assert kept.broken_at() is None
    with sqlite3.connect(tmp_path / "policies.db") as database:
        database.execute("DELETE FROM acts WHERE number = 4")
    database.close()
    assert kept.broken_at() == 4
    kept.close()


@pytest.mark.parametrize(
    "tampering",
    [
        "UPDATE versions SET source = 'mode: prefer_cloud' WHERE number = 1",
        "UPDATE acts SET content = NULL WHERE number = 1",
        "UPDATE acts SET version = 7 WHERE number = 1",
        "UPDATE versions SET number = 3 WHERE number = 2",
    ],
)
def test_a_text_that_is_not_the_one_proposed_cannot_be_had(tmp_path: Path, tampering: str) -> None:
    """Its proposal covers it; what cannot be had cannot be put in force."""
    filled(tmp_path).close()
    with sqlite3.connect(tmp_path / "policies.db") as database:
        assert database.execute(tampering).rowcount == 1
    database.close()
    kept = history(tmp_path)
    with pytest.raises(DamagedVersion):
        kept.version(3 if "number = 3" in tampering else 1)
    kept.close()


def test_a_history_of_before_texts_were_covered_still_holds(tmp_path: Path) -> None:
    """Its acts are as they were written, its versions can be had, and what comes now is covered."""
    path = tmp_path / "policies.db"
    filled(tmp_path).close()
    with sqlite3.connect(path) as database:
        database.execute("DELETE FROM acts")
        database.execute("ALTER TABLE acts DROP COLUMN content")
        signer, before = Signer(SEED), b""
        for number, action in enumerate(("propose", "activate"), 1):
            act = Act(number, 1000.0, "anna", action, 1, 0.0, "x")  # type: ignore[arg-type]
            before = hashlib.sha256(before + msgspec.json.encode(act, order="deterministic")).digest()
            row = (number, 1000.0, "anna", action, 1, 0.0, "x", before, signer.sign(before))
            database.execute("INSERT INTO acts VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", row)
    database.close()

    kept = history(tmp_path)

    assert (kept.broken_at(), kept.version(1).source) == (None, b"mode: prefer_edge")
    new = kept.propose(b"mode: only_edge", "f", "anna", "y").number
    assert (kept.broken_at(), kept.version(new).source) == (None, b"mode: only_edge")
    kept.close()


def test_the_oldest_that_was_never_in_force_makes_way(tmp_path: Path) -> None:
    """Its text goes, its acts stay and the chain holds; no number comes twice. If all were in force, it is said."""
    kept = History(tmp_path / "policies.db", Signer(SEED), max_versions=4)
    for number in range(1, 7):
        assert kept.propose(f"mode: v{number}".encode(), "f", "anna", "x").number == number
        if number in (1, 3):
            kept.act("activate", number, "anna", "go")
    assert [version.number for version in kept.versions()] == [6, 5, 3, 1]
    with pytest.raises(NotFound):
        kept.version(2)
    assert kept.broken_at(whole=True) is None
    for number in (5, 6):
        kept.act("canary", number, "anna", "go", 5)
    with pytest.raises(HistoryFull, match="4 versions"):
        kept.propose(b"mode: v7", "f", "anna", "x")
    assert kept.broken_at() is None
    assert kept.acts()[0].action == "canary"
    kept.close()


def test_another_devices_signature_is_no_signature(tmp_path: Path) -> None:
    """A history brought from elsewhere does not pass for this device's own."""
    filled(tmp_path).close()
    kept = history(tmp_path, seed=b"x" * 32)
    assert kept.broken_at() == 1
    kept.close()


def test_a_damaged_history_is_moved_aside(tmp_path: Path) -> None:
    """The start does not fail, and whoever asks can tell that something was lost."""
    (tmp_path / "policies.db").write_bytes(b"no database at all" * 100)
    kept = history(tmp_path)
    assert kept.damaged
    assert kept.in_force() is None
    assert [path.name for path in tmp_path.glob("*.damaged-*")] == ["policies.damaged-1000"]
    kept.close()


def test_the_devices_key_is_made_once_and_kept_private(tmp_path: Path) -> None:
    """Two starts sign alike; a key that others could read is refused."""
    first = device_signer(tmp_path / "state" / "audit.key")
    assert device_signer(tmp_path / "state" / "audit.key").signed(b"act", first.sign(b"act"))
    (tmp_path / "state" / "audit.key").chmod(0o644)
    with pytest.raises(InvalidSettings, match="other users can read"):
        device_signer(tmp_path / "state" / "audit.key")
