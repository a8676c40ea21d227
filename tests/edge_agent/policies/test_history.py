"""The history of policies: what is kept, and that nobody can rewrite it unseen."""

import sqlite3
from pathlib import Path

import pytest

from edge_agent.policies.history import History
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
