"""Rows in one SQLite file, bounded in bytes. Everything here runs on one thread, and nothing raises.

A file that is damaged, or of another version, is moved aside and begun anew. One that cannot be used now (locked, read
only, no room, no folder) is left alone for a while: nothing is read or written, and that is logged once for each cause.
"""

import contextlib
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar

import structlog

from edge_agent.cache.base import Key

VERSION: Final = 1
PAGE_BYTES: Final = 4096
ROW_BYTES: Final = 200
"""What a row takes in the file besides its answer, about; one that is longer than SHORT_BYTES fills whole pages."""
SHORT_BYTES: Final = 512
BUSY_S: Final = 0.2
RETRY_S: Final = 30.0
TOUCH_S: Final = 60.0
"""When a row was last asked for is kept as exactly as this."""
PRUNE_EVERY: Final = 256
EVICT_ROWS: Final = 16

SCHEMA: Final = (
    """CREATE TABLE IF NOT EXISTS answers (key BLOB PRIMARY KEY, tenant BLOB NOT NULL, size INTEGER NOT NULL,
    used REAL NOT NULL, expires REAL NOT NULL, answer BLOB NOT NULL)""",
    "CREATE INDEX IF NOT EXISTS by_use ON answers (tenant, used)",
    f"PRAGMA user_version={VERSION}",
)
PASSING: Final = frozenset(
    {
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_LOCKED,
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_READONLY,
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_PERM,
        sqlite3.SQLITE_NOMEM,
        sqlite3.SQLITE_PROTOCOL,
    }
)
"""Troubles of the place, not of what the file holds."""

T = TypeVar("T")
Work = Callable[[sqlite3.Connection], T]


class AnswerFile:
    """`max_bytes` bounds the answers; the file itself may be a quarter larger. `clock` counts in seconds since 1970."""

    def __init__(self, path: Path, max_bytes: int, *, clock: Callable[[], float] = time.time) -> None:
        self._path, self._max_bytes, self._clock = path, max_bytes, clock
        self._database: sqlite3.Connection | None = None
        self._reads_from = self._writes_from = self._rebuilt_at = float("-inf")
        self._said: set[str] = set()
        self._sizes: dict[bytes, int] = {}
        """Bytes by tenant."""
        self._puts = 0
        self.entries = self.evictions = self.failures = 0

    @property
    def size(self) -> int:
        return sum(self._sizes.values())

    def get(self, key: Key) -> object:
        """What lies there; None also where nobody can look."""
        if self._clock() < self._reads_from:
            return None
        found = self._do(lambda database: _row(database, key))
        if found is None:
            return None
        answer, used = found
        if self._clock() - used > TOUCH_S:
            self._write(lambda database: _touch(database, key, self._clock()))
        return answer

    def put(self, key: Key, row: bytes, expires: float) -> None:
        if _size(row) <= self._max_bytes:
            self._write(lambda database: self._insert(database, key, row, expires))

    def clear(self) -> None:
        """The rows, and what was moved aside."""
        with contextlib.suppress(OSError):
            self._aside.unlink(missing_ok=True)
        self._write(lambda database: database.execute("DELETE FROM answers"))
        self._do(self._count)
        self._write(lambda database: database.execute("VACUUM"))

    def close(self) -> None:
        if self._database is not None:
            with contextlib.suppress(sqlite3.Error):
                self._database.close()
        self._database = None

    @property
    def _aside(self) -> Path:
        return self._path.with_suffix(".damaged")

    def _write(self, work: Work[object]) -> None:
        if self._clock() >= max(self._writes_from, self._reads_from):
            self._do(work, writing=True)

    def _do(self, work: Work[T], *, writing: bool = False) -> T | None:
        try:
            if self._database is None:
                self._database = self._opened()
            return work(self._database)
        except (sqlite3.Error, OSError, ValueError, TypeError, OverflowError) as error:
            self._trouble(error, writing=writing)
            return None

    def _trouble(self, error: Exception, *, writing: bool) -> None:
        self.failures += 1
        now, code = self._clock(), getattr(error, "sqlite_errorcode", None)
        passing = isinstance(error, OSError) or (code is not None and code & 0xFF in PASSING)
        if passing and code == sqlite3.SQLITE_IOERR_SHORT_READ:
            passing = False
        if not passing and now - self._rebuilt_at > RETRY_S:
            self._begin_anew(error, now)
            return
        self._writes_from = now + RETRY_S
        if not writing or self._database is None:
            self._reads_from = now + RETRY_S
            self.close()
        self._say("answers are not kept on disk", error)

    def _begin_anew(self, error: Exception, now: float) -> None:
        self._rebuilt_at = now
        self.close()
        try:
            if self._path.exists():
                self._path.replace(self._aside)
            for suffix in ("-wal", "-shm"):
                self._path.with_name(self._path.name + suffix).unlink(missing_ok=True)
        except OSError as denied:
            self._trouble(denied, writing=False)
            return
        self._say("damaged, begun anew", error, moved_to=self._aside.name)

    def _say(self, event: str, error: Exception, **more: str) -> None:
        cause = f"{event} {getattr(error, 'sqlite_errorname', type(error).__name__)}"
        if cause not in self._said:
            self._said.add(cause)
            structlog.get_logger("causeway.cache").warning(event, file=self._path.name, error=str(error), **more)

    # --- work on an open file ---

    def _opened(self) -> sqlite3.Connection:
        self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._path.touch(0o600)  # before SQLite does, for its log takes the same mode
        database = sqlite3.connect(self._path, timeout=BUSY_S, isolation_level=None)
        try:
            if database.execute("PRAGMA user_version").fetchone()[0] not in (0, VERSION):
                raise sqlite3.DatabaseError("written by another version")
            database.execute("PRAGMA journal_mode=WAL")
            database.execute("PRAGMA synchronous=NORMAL")
            database.execute("PRAGMA secure_delete=ON")
            database.execute(f"PRAGMA max_page_count={self._max_bytes * 5 // 4 // PAGE_BYTES + 64}")
            for statement in SCHEMA:
                database.execute(statement)
            self._path.chmod(0o600)
            self._count(database)
        except BaseException:
            database.close()
            raise
        return database

    def _count(self, database: sqlite3.Connection) -> None:
        rows = database.execute("SELECT tenant, SUM(size), COUNT(*) FROM answers GROUP BY tenant").fetchall()
        if not all(isinstance(tenant, bytes) and isinstance(size, int) for tenant, size, _ in rows):
            raise sqlite3.DatabaseError("its rows are not what was written")
        self._sizes = {tenant: size for tenant, size, _ in rows}
        self.entries = sum(count for *_, count in rows)

    def _insert(self, database: sqlite3.Connection, key: Key, row: bytes, expires: float) -> None:
        size, now = _size(row), self._clock()
        database.execute("BEGIN IMMEDIATE")
        try:
            self._delete(database, database.execute("SELECT key, tenant, size FROM answers WHERE key=?", (key.raw,)))
            self._puts += 1
            if self._puts % PRUNE_EVERY == 0:
                database.execute("DELETE FROM answers WHERE expires < ?", (now,))
                self._count(database)
            while self.size + size > self._max_bytes:
                self._evict(database, self.size + size - self._max_bytes)
            values = (key.raw, key.tenant, size, now, expires, row)
            database.execute("INSERT INTO answers VALUES (?, ?, ?, ?, ?, ?)", values)
            self._sizes[key.tenant] = self._sizes.get(key.tenant, 0) + size
            self.entries += 1
            database.execute("COMMIT")
        except BaseException:
            if database.in_transaction:
                database.execute("ROLLBACK")
            with contextlib.suppress(sqlite3.Error):
                self._count(database)
            raise

    def _evict(self, database: sqlite3.Connection, needed: int) -> None:
        """The least recently used rows of the tenant that has most."""
        tenant = max(self._sizes, key=self._sizes.__getitem__)
        oldest = database.execute(
            "SELECT key, tenant, size FROM answers WHERE tenant=? ORDER BY used LIMIT ?", (tenant, EVICT_ROWS)
        )
        gone = self._delete(database, oldest, needed)
        self.evictions += gone
        if not gone:  # another process was faster, or the index lies
            self._count(database)
            if tenant in self._sizes:
                raise sqlite3.DatabaseError("rows that are counted are not found")

    def _delete(self, database: sqlite3.Connection, rows: sqlite3.Cursor, needed: int | None = None) -> int:
        """These rows, or the first of them until so many bytes are free."""
        gone = freed = 0
        for key, tenant, size in rows.fetchall():
            if needed is not None and freed >= needed:
                break
            database.execute("DELETE FROM answers WHERE key=?", (key,))
            left = self._sizes.get(tenant, 0) - size
            self._sizes[tenant] = left
            if left <= 0:
                self._sizes.pop(tenant)
            gone, freed, self.entries = gone + 1, freed + size, self.entries - 1
        return gone


def _size(row: bytes) -> int:
    """What it takes in the file."""
    return ROW_BYTES + (len(row) if len(row) <= SHORT_BYTES else -(-len(row) // PAGE_BYTES) * PAGE_BYTES)


def _row(database: sqlite3.Connection, key: Key) -> tuple[object, float] | None:
    found = database.execute("SELECT answer, used FROM answers WHERE key=?", (key.raw,)).fetchone()
    return None if found is None else (found[0], float(found[1]))


def _touch(database: sqlite3.Connection, key: Key, now: float) -> None:
    database.execute("UPDATE answers SET used=? WHERE key=?", (now, key.raw))
