"""Who did what with the policies, as a chain: each act's hash covers its content and the hash before it, and is signed
by the device. One that is changed or taken out later breaks the chain from there on.

A proposal's hash also covers the policy's text. The text may go later, the act stays.
"""

import hashlib
import sqlite3
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final, Literal

import msgspec

from edge_agent.policies.signer import Signer

Action = Literal["propose", "activate", "canary", "end_canary", "rollback", "refuse"]

TABLE: Final = """
CREATE TABLE IF NOT EXISTS acts (
    number INTEGER PRIMARY KEY, at REAL NOT NULL, who TEXT NOT NULL, action TEXT NOT NULL, version INTEGER NOT NULL,
    percent REAL NOT NULL, why TEXT NOT NULL, hash BLOB NOT NULL, signature BLOB NOT NULL, content BLOB);
CREATE INDEX IF NOT EXISTS acts_of_version ON acts (version);
"""
OF_ACT: Final = "number, at, who, action, version, percent, why"
_ROWS: Final = f"SELECT {OF_ACT}, hash, signature, content FROM acts "  # noqa: S608 - a constant
_BATCH: Final = 1000


@dataclass(frozen=True, slots=True)
class Act:
    number: int
    at: float
    who: str
    action: Action
    version: int
    percent: float
    why: str


@dataclass(frozen=True, slots=True)
class Checked:
    """How far the chain is known to hold: up to this act, whose hash that is."""

    number: int = 0
    digest: bytes = b""
    broken_at: int | None = None


def migrate(database: sqlite3.Connection) -> None:
    """A history of before proposals covered their text."""
    columns = {row[1] for row in database.execute("PRAGMA table_info(acts)")}
    if columns and "content" not in columns:
        database.execute("ALTER TABLE acts ADD COLUMN content BLOB")


def append(
    database: sqlite3.Connection,
    signer: Signer,
    at: float,
    who: str,
    action: Action,
    version: int,
    why: str,
    percent: float = 0.0,
    content: bytes | None = None,
) -> None:
    """`content` is the SHA-256 of a proposal's text."""
    last = database.execute("SELECT number, hash FROM acts ORDER BY number DESC LIMIT 1").fetchone() or (0, b"")
    act = Act(last[0] + 1, at, who, action, version, float(percent), why)
    digest = _hash(act, last[1], content)
    row = (act.number, at, who, action, version, percent, why, digest, signer.sign(digest), content)
    columns = f"({OF_ACT}, hash, signature, content)"
    database.execute(f"INSERT INTO acts {columns} VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", row)  # noqa: S608 - constants


def covers(database: sqlite3.Connection, signer: Signer, version: int, source: object) -> bool:
    """Whether this is the text that was proposed as this version. Of an older history only that the act is genuine."""
    query = _ROWS + "WHERE version = ? AND action = 'propose' ORDER BY number LIMIT 1"
    row = database.execute(query, (version,)).fetchone()
    if row is None:
        return False
    before = database.execute("SELECT hash FROM acts WHERE number = ?", (row[0] - 1,)).fetchone() or (b"",)
    if not isinstance(source, bytes) or not _holds(row, before[0], signer):  # SQLite gives what lies there
        return False
    return row[9] in (None, hashlib.sha256(source).digest())


def following(database: sqlite3.Connection, number: int) -> list[tuple[Any, ...]]:
    """Some of the acts from this one on."""
    return database.execute(_ROWS + "WHERE number >= ? ORDER BY number LIMIT ?", (number, _BATCH)).fetchall()


def checked(rows: Iterable[tuple[Any, ...]], known: Checked, signer: Signer) -> Checked:
    """Goes on from what is known by these rows, of which the first is the last that is known."""
    if known.number:
        rows = iter(rows)
        last = next(rows, None)
        if last is None or (last[0], last[7]) != (known.number, known.digest):
            return Checked(known.number, known.digest, known.number)
    for row in rows:
        expected = known.number + 1
        if row[0] != expected or not _holds(row, known.digest, signer):
            return Checked(known.number, known.digest, expected)
        known = Checked(expected, row[7])
    return known


def _holds(row: tuple[Any, ...], before: bytes, signer: Signer) -> bool:
    act, (digest, signature, content) = Act(*row[:7]), row[7:]
    return bool(digest == _hash(act, before, content)) and signer.signed(digest, signature)


def _hash(act: Act, before: bytes, content: bytes | None) -> bytes:
    return hashlib.sha256(before + msgspec.json.encode(act, order="deterministic") + (content or b"")).digest()
