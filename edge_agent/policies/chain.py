"""Who did what with the policies, as a chain: each act's hash covers its content and the hash before it, and is signed
by the device. One that is changed or taken out later breaks the chain from there on.

A proposal's hash also covers the policy's text. The text may go later, the act stays. Where a fleet's policy is taken,
the hash covers its version there and its digest: so an older one is known for what it is.
"""

import hashlib
import sqlite3
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final, Literal

import msgspec

from edge_agent.policies.signer import Signer

Action = Literal["propose", "activate", "take", "canary", "end_canary", "rollback", "refuse", "lost"]
"""`take`: a fleet's policy is in force; `lost`: acts before this one are gone."""

TABLE: Final = """
CREATE TABLE IF NOT EXISTS acts (
    number INTEGER PRIMARY KEY, at REAL NOT NULL, who TEXT NOT NULL, action TEXT NOT NULL, version INTEGER NOT NULL,
    percent REAL NOT NULL, why TEXT NOT NULL, hash BLOB NOT NULL, signature BLOB NOT NULL, content BLOB);
CREATE INDEX IF NOT EXISTS acts_of_version ON acts (version);
"""
OF_ACT: Final = "number, at, who, action, version, percent, why"
_ROWS: Final = f"SELECT {OF_ACT}, hash, signature, content FROM acts "  # noqa: S608 - a constant
_BATCH: Final = 1000
_VERSION_BYTES: Final = 8
_TAKEN: Final = (
    "SELECT version, content FROM acts WHERE action IN ('take', 'lost') "
    "AND typeof(content) = 'blob' AND length(content) = 40 "
)


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
class Taken:
    """A fleet's policy that was taken: its version there, the SHA-256 of what was signed, and its number here; 0 if
    that is not known any more."""

    version: int
    digest: str
    number: int = 0

    @property
    def content(self) -> bytes:
        """As an act covers it."""
        return self.version.to_bytes(_VERSION_BYTES) + bytes.fromhex(self.digest)


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
    """`content` is the SHA-256 of a proposal's text, or what was taken of a fleet."""
    before, hashed = last(database)
    act = Act(before + 1, at, who, action, version, float(percent), why)
    digest = _hash(act, hashed, content)
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
    if not isinstance(source, bytes) or not _holds(row, before[0], signer):
        return False
    return row[9] in (None, hashlib.sha256(source).digest())


def taken(database: sqlite3.Connection, number: int | None = None) -> Taken | None:
    """The newest of the fleet's policies that were taken, or the one that has this number here."""
    where, values = ("", ()) if number is None else ("AND version = ? ", (number,))
    row = database.execute(f"{_TAKEN}{where}ORDER BY number DESC LIMIT 1", values).fetchone()
    if row is None:
        return None
    version, digest = row[1][:_VERSION_BYTES], row[1][_VERSION_BYTES:]
    return Taken(int.from_bytes(version), digest.hex(), row[0])


def last(database: sqlite3.Connection, number: int | None = None) -> tuple[int, bytes]:
    """Number and hash of the last act, or of this one; 0 if there is none."""
    where, values = ("", ()) if number is None else ("WHERE number = ? ", (number,))
    query = f"SELECT number, hash FROM acts {where}ORDER BY number DESC LIMIT 1"  # noqa: S608 - constants
    found: tuple[int, bytes] = database.execute(query, values).fetchone() or (0, b"")
    return found


def following(database: sqlite3.Connection, number: int) -> list[tuple[Any, ...]]:
    """Some of the acts from this one on."""
    return database.execute(_ROWS + "WHERE number >= ? ORDER BY number LIMIT ?", (number, _BATCH)).fetchall()


def checked(rows: Iterable[tuple[Any, ...]], known: Checked, signer: Signer) -> Checked:
    """Goes on from what is known by these rows, of which the first is the last that is known."""
    if known.number:
        rows = iter(rows)
        first = next(rows, None)
        if first is None or (first[0], first[7]) != (known.number, known.digest):
            return Checked(known.number, known.digest, known.number)
    for row in rows:
        expected = known.number + 1
        if row[0] != expected or not _holds(row, known.digest, signer):
            return Checked(known.number, known.digest, expected)
        known = Checked(expected, row[7])
    return known


def _holds(row: tuple[Any, ...], before: bytes, signer: Signer) -> bool:
    act, (digest, signature, content) = Act(*row[:7]), row[7:]
    if not all(isinstance(one, bytes) for one in (digest, signature, content or b"")):  # SQLite gives what lies there
        return False
    return bool(digest == _hash(act, before, content)) and signer.signed(digest, signature)


def _hash(act: Act, before: bytes, content: bytes | None) -> bytes:
    return hashlib.sha256(before + msgspec.json.encode(act, order="deterministic") + (content or b"")).digest()
