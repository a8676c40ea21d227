"""Every policy that was proposed, and who put which in force, when and why. SQLite; the acts are a signed chain
(`edge_agent.policies.chain`), and `edge_agent.policies.anchor` knows how far it has come: the first act after a gap
tells of it. Versions count from 1; version 0 is the built-in policy.

At most MAX_VERSIONS texts are kept: the oldest that was never in force nor on trial goes first, and its acts stay.
"""

import contextlib
import hashlib
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import structlog

from edge_agent.policies.anchor import Anchor, Head
from edge_agent.policies.chain import (
    OF_ACT,
    TABLE,
    Act,
    Action,
    Checked,
    Taken,
    append,
    checked,
    covers,
    following,
    last,
    migrate,
    taken,
)
from edge_agent.policies.signer import Signer
from shared.errors import CausewayError, NotFound

_IN_FORCE: Final = "SELECT version FROM acts WHERE action IN ('activate', 'take', 'rollback') "
"""The acts after which a version is the one in force."""
_USED: Final = "SELECT version FROM acts WHERE action IN ('activate', 'take', 'rollback', 'canary')"
MAX_LISTED: Final = 500
MAX_VERSIONS: Final = 10_000
_TABLES: Final = """
CREATE TABLE IF NOT EXISTS versions (
    number INTEGER PRIMARY KEY, at REAL NOT NULL, who TEXT NOT NULL, why TEXT NOT NULL, fingerprint TEXT NOT NULL,
    source BLOB NOT NULL);
"""


class HistoryFull(CausewayError):
    """So many versions were in force once that none can go."""

    code, status = "history_full", 507


class DamagedVersion(CausewayError):
    """A version's text is not the one that was proposed."""

    code, status = "damaged_version", 500


@dataclass(frozen=True, slots=True)
class Version:
    """A policy as it was proposed. `at` in seconds since 1970."""

    number: int
    at: float
    who: str
    why: str
    fingerprint: str
    source: bytes


class History:
    """Safe to call from several threads; each call is short."""

    def __init__(
        self,
        path: Path,
        signer: Signer,
        *,
        clock: Callable[[], float] = time.time,
        max_versions: int = MAX_VERSIONS,
    ) -> None:
        """Raises OSError or sqlite3.Error if the file can be neither opened nor begun anew."""
        self._signer, self._clock, self._max_versions = signer, clock, max_versions
        self._lock = threading.Lock()
        self._checking = threading.Lock()
        self._checked = Checked()
        self._anchor = Anchor(path.with_suffix(".head"), signer)
        self._database, damaged = _opened(path, clock)
        self.damaged = self._lost(self._anchor.read()) or damaged
        """What was there could not be read, and was moved aside; or some of it, or all, is gone."""

    def close(self) -> None:
        with self._lock:
            self._database.close()

    def propose(self, source: bytes, fingerprint: str, who: str, why: str) -> Version:
        """Raises HistoryFull."""
        with self._writing() as database:
            return self._propose(database, source, fingerprint, who, why)

    def act(self, action: Action, version: int, who: str, why: str, percent: float = 0.0) -> None:
        with self._writing() as database:
            append(database, self._signer, self._clock(), who, action, version, why, percent)

    def take(self, version: int, digest: str, source: bytes, fingerprint: str, who: str, why: str) -> Version:
        """A fleet's policy is proposed and put in force, and none of its version or below will be again: all of it or
        nothing. Raises HistoryFull."""
        content = Taken(version, digest).content
        with self._writing() as database:
            kept = self._propose(database, source, fingerprint, who, why)
            append(database, self._signer, self._clock(), who, "take", kept.number, why, content=content)
        return kept

    def taken(self, number: int | None = None) -> Taken | None:
        """The newest of the fleet's policies that were taken, or the one that has this number here."""
        with self._lock:
            return taken(self._database, number)

    def version(self, number: int) -> Version:
        """Raises NotFound, also for one whose text was let go, and DamagedVersion."""
        with self._lock:
            row = self._database.execute("SELECT * FROM versions WHERE number = ?", (number,)).fetchone()
            genuine = row is None or covers(self._database, self._signer, number, row[5])
        if row is None:
            raise NotFound(f"no version {number} of the policy", param="version", source="edge")
        if not genuine:
            raise DamagedVersion(f"version {number} is not as it was proposed", param="version", source="edge")
        return Version(*row)

    def versions(self) -> list[Version]:
        """The newest first."""
        return [Version(*row) for row in self._listed("SELECT * FROM versions ORDER BY number DESC LIMIT ?")]

    def acts(self) -> list[Act]:
        """The newest first."""
        newest = f"SELECT {OF_ACT} FROM acts ORDER BY number DESC LIMIT ?"  # noqa: S608 - constants
        return [Act(*row) for row in self._listed(newest)]

    def in_force(self) -> int | None:
        """The version that was put in force last; None if none ever was."""
        found = self._one(_IN_FORCE + "ORDER BY number DESC LIMIT 1")
        return None if found is None else int(found[0])

    def in_force_besides(self, who: str) -> int | None:
        """The version that was put in force last of those that this one did not propose."""
        others = "AND version NOT IN (SELECT number FROM versions WHERE who = ?) "
        found = self._one(_IN_FORCE + others + "ORDER BY number DESC LIMIT 1", who)
        return None if found is None else int(found[0])

    def before(self, current: int) -> int:
        """The version that was in force before the current one; 0 if there was none."""
        found = self._one(_IN_FORCE + "AND version != ? ORDER BY number DESC LIMIT 1", current)
        return 0 if found is None else int(found[0])

    def last_of(self, who: str) -> Version | None:
        """What this one proposed last."""
        row = self._one("SELECT * FROM versions WHERE who = ? ORDER BY number DESC LIMIT 1", who)
        return Version(*row) if row else None

    def broken_at(self, *, whole: bool = False) -> int | None:
        """The number of the first act that is not as it was written; None if the chain holds. Looks at what has come
        since it was last asked, or at the whole chain, as at the first time."""
        with self._checking:
            known = Checked() if whole else self._checked
            while known.broken_at is None:
                with self._lock:
                    rows = following(self._database, known.number)
                before, known = known, checked(rows, known, self._signer)
                if known == before:
                    break
            self._checked = known
        return known.broken_at

    def _lost(self, head: Head | None) -> bool:
        """Whether acts that were there are gone. Then an act says so, and what the fleet's newest policy was."""
        if head is None:
            return False
        known = taken(self._database)
        forgotten = head.fleet > (known.version if known else 0)
        if last(self._database, head.number) == (head.number, head.digest) and not forgotten:
            return False
        why = f"{head.number} acts were recorded up to here, and they are not all there"
        content = Taken(head.fleet, head.fleet_digest).content if forgotten else None
        structlog.get_logger("causeway.policy").error("history is not whole", why=why)
        with self._writing() as database:
            append(database, self._signer, self._clock(), "guard", "lost", 0, why, content=content)
        return True

    def _propose(self, database: sqlite3.Connection, source: bytes, fingerprint: str, who: str, why: str) -> Version:
        self._make_room(database)
        highest = "SELECT number FROM versions UNION ALL SELECT version FROM acts ORDER BY 1 DESC LIMIT 1"
        (before,) = database.execute(highest).fetchone() or (0,)
        at, number = self._clock(), before + 1
        version = Version(number, at, who, why, fingerprint, source)
        database.execute("INSERT INTO versions VALUES (?, ?, ?, ?, ?, ?)", (number, at, who, why, fingerprint, source))
        digest = hashlib.sha256(source).digest()
        append(database, self._signer, at, who, "propose", number, why, content=digest)
        return version

    def _make_room(self, database: sqlite3.Connection) -> None:
        if database.execute("SELECT count(*) FROM versions").fetchone()[0] < self._max_versions:
            return
        oldest = f"SELECT number FROM versions WHERE number NOT IN ({_USED}) ORDER BY number LIMIT 1"  # noqa: S608
        if not database.execute(f"DELETE FROM versions WHERE number = ({oldest})").rowcount:  # noqa: S608
            raise HistoryFull(f"{self._max_versions} versions are kept, and each was in force once", source="edge")

    def _one(self, query: str, *values: object) -> tuple[Any, ...] | None:
        with self._lock:
            row: tuple[Any, ...] | None = self._database.execute(query, values).fetchone()
        return row

    def _listed(self, query: str) -> list[tuple[Any, ...]]:
        with self._lock:
            return self._database.execute(query, (MAX_LISTED,)).fetchall()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            with self._database:
                self._database.execute("BEGIN IMMEDIATE")
                yield self._database
            newest = taken(self._database)
            fleet = (newest.version, newest.digest) if newest else (0, "")
            self._anchor.write(Head(*last(self._database), *fleet))


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
    path.touch(0o600)  # before SQLite does, for its log takes the same mode
    database = sqlite3.connect(path, timeout=5.0, check_same_thread=False, isolation_level=None)
    try:
        database.execute("PRAGMA journal_mode=WAL")
        migrate(database)
        database.executescript(_TABLES + TABLE)
        database.execute("SELECT * FROM acts ORDER BY number DESC LIMIT 1").fetchall()
        database.execute("SELECT * FROM versions ORDER BY number DESC LIMIT 1").fetchall()
        path.chmod(0o600)
    except BaseException:
        database.close()
        raise
    return database
