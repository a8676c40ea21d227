"""Every policy that was proposed, and who put which in force, when and why. SQLite; the acts are a signed chain.

Each act's hash covers its content and the hash before it, and is signed by the device: one that is changed or taken out
later breaks the chain from there on. Versions count from 1; version 0 is the built-in policy.
"""

import contextlib
import hashlib
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import msgspec
import structlog

from edge_agent.policies.signer import Signer
from shared.errors import NotFound

Action = Literal["propose", "activate", "canary", "end_canary", "rollback"]

_IN_FORCE: Final = "SELECT version FROM acts WHERE action IN ('activate', 'rollback') "
"""The acts after which a version is the one in force."""
MAX_LISTED: Final = 500
_TABLES: Final = """
CREATE TABLE IF NOT EXISTS versions (
    number INTEGER PRIMARY KEY, at REAL NOT NULL, who TEXT NOT NULL, why TEXT NOT NULL, fingerprint TEXT NOT NULL,
    source BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS acts (
    number INTEGER PRIMARY KEY, at REAL NOT NULL, who TEXT NOT NULL, action TEXT NOT NULL, version INTEGER NOT NULL,
    percent REAL NOT NULL, why TEXT NOT NULL, hash BLOB NOT NULL, signature BLOB NOT NULL);
"""


@dataclass(frozen=True, slots=True)
class Version:
    """A policy as it was proposed. `at` in seconds since 1970."""

    number: int
    at: float
    who: str
    why: str
    fingerprint: str
    source: bytes


@dataclass(frozen=True, slots=True)
class Act:
    number: int
    at: float
    who: str
    action: Action
    version: int
    percent: float
    why: str


class History:
    """Safe to call from several threads; each call is short."""

    def __init__(self, path: Path, signer: Signer, *, clock: Callable[[], float] = time.time) -> None:
        """Raises OSError or sqlite3.Error if the file can be neither opened nor begun anew."""
        self._signer, self._clock = signer, clock
        self._lock = threading.Lock()
        self._database, self.damaged = _opened(path, clock)
        """`damaged`: what was there could not be read, and was moved aside."""

    def close(self) -> None:
        with self._lock:
            self._database.close()

    def propose(self, source: bytes, fingerprint: str, who: str, why: str) -> Version:
        with self._writing() as database:
            at = self._clock()
            row = (at, who, why, fingerprint, source)
            number = database.execute(
                "INSERT INTO versions (at, who, why, fingerprint, source) VALUES (?, ?, ?, ?, ?)", row
            ).lastrowid
            version = Version(number or 0, *row)
            self._append(database, "propose", version.number, who, why)
        return version

    def act(self, action: Action, version: int, who: str, why: str, percent: float = 0.0) -> None:
        with self._writing() as database:
            self._append(database, action, version, who, why, percent)

    def version(self, number: int) -> Version:
        """Raises NotFound."""
        row = self._one("SELECT * FROM versions WHERE number = ?", number)
        if row is None:
            raise NotFound(f"no version {number} of the policy", param="version", source="edge")
        return Version(*row)

    def versions(self) -> list[Version]:
        """The newest first."""
        return [Version(*row) for row in self._listed("SELECT * FROM versions ORDER BY number DESC LIMIT ?")]

    def acts(self) -> list[Act]:
        """The newest first."""
        columns = "number, at, who, action, version, percent, why"
        return [Act(*row) for row in self._listed(f"SELECT {columns} FROM acts ORDER BY number DESC LIMIT ?")]  # noqa: S608

    def in_force(self) -> int | None:
        """The version that was put in force last; None if none ever was."""
        found = self._one(_IN_FORCE + "ORDER BY number DESC LIMIT 1")
        return None if found is None else int(found[0])

    def before(self, current: int) -> int:
        """The version that was in force before the current one; 0 if there was none."""
        found = self._one(_IN_FORCE + "AND version != ? ORDER BY number DESC LIMIT 1", current)
        return 0 if found is None else int(found[0])

    def last_of(self, who: str) -> Version | None:
        """What this one proposed last."""
        row = self._one("SELECT * FROM versions WHERE who = ? ORDER BY number DESC LIMIT 1", who)
        return Version(*row) if row else None

    def broken_at(self) -> int | None:
        """The number of the first act that is not as it was written; None if the chain holds."""
        before, expected = b"", 1
        with self._lock:
            rows = self._database.execute("SELECT * FROM acts ORDER BY number").fetchall()
        for row in rows:
            act, digest, signature = Act(*row[:7]), row[7], row[8]
            if act.number != expected or digest != _hash(act, before) or not self._signer.signed(digest, signature):
                return expected
            before, expected = digest, expected + 1
        return None

    def _append(
        self, database: sqlite3.Connection, action: Action, version: int, who: str, why: str, percent: float = 0.0
    ) -> None:
        last = database.execute("SELECT number, hash FROM acts ORDER BY number DESC LIMIT 1").fetchone() or (0, b"")
        act = Act(last[0] + 1, self._clock(), who, action, version, percent, why)
        digest = _hash(act, last[1])
        row = (act.number, act.at, who, action, version, percent, why, digest, self._signer.sign(digest))
        database.execute("INSERT INTO acts VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", row)

    def _one(self, query: str, *values: object) -> tuple[Any, ...] | None:
        with self._lock:
            row: tuple[Any, ...] | None = self._database.execute(query, values).fetchone()
        return row

    def _listed(self, query: str) -> list[tuple[Any, ...]]:
        with self._lock:
            return self._database.execute(query, (MAX_LISTED,)).fetchall()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        with self._lock, self._database:
            self._database.execute("BEGIN IMMEDIATE")
            yield self._database


def _hash(act: Act, before: bytes) -> bytes:
    return hashlib.sha256(before + msgspec.json.encode(act, order="deterministic")).digest()


def _opened(path: Path, clock: Callable[[], float]) -> tuple[sqlite3.Connection, bool]:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        return _connected(path), False
    except sqlite3.DatabaseError:
        aside = path.with_suffix(f".damaged-{int(clock())}")
        path.rename(aside)
        structlog.get_logger("causeway.policy").error("history damaged, begun anew", moved_to=aside.name)
        return _connected(path), True


def _connected(path: Path) -> sqlite3.Connection:
    database = sqlite3.connect(path, timeout=5.0, check_same_thread=False, isolation_level=None)
    try:
        database.execute("PRAGMA journal_mode=WAL")
        database.executescript(_TABLES)
        database.execute("SELECT * FROM acts ORDER BY number DESC LIMIT 1").fetchall()
        database.execute("SELECT * FROM versions ORDER BY number DESC LIMIT 1").fetchall()
        path.chmod(0o600)
    except BaseException:
        database.close()
        raise
    return database
