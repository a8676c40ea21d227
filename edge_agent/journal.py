"""The device's memory of its decisions: what each one saw, said and led to. SQLite, written by a thread of its own.

No prompt, no answer and no secret is in it: `router.records.Recorded` has no field for them. It never holds up a
request: what the writer cannot keep up with, or the disk cannot take, is counted as lost. A damaged file is moved aside
and begun anew.
"""

import contextlib
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import structlog

from router.records import INSERT, MAX_ROWS, SCHEMA, Recorded, encode

MAX_PENDING = 4096
PRUNE_EVERY = 1000
CLOSE_S = 5.0


class Journal:
    """`write` puts a row on its way; `close` writes what is pending."""

    def __init__(self, path: Path, *, max_rows: int = MAX_ROWS) -> None:
        self.path, self._max_rows = path, max_rows
        self._pending: queue.Queue[Recorded | None] = queue.Queue(MAX_PENDING)
        self.lost = 0
        self._writer = threading.Thread(target=self._write, name="journal", daemon=True)
        self._writer.start()

    def write(self, record: Recorded) -> None:
        """Called on the event loop, and returns at once."""
        if not self._writer.is_alive():  # it could not open the file, and has said so
            self.lost += 1
            return
        try:
            self._pending.put_nowait(record)
        except queue.Full:
            self.lost += 1

    def flush(self) -> None:
        """Wait until what is pending has been tried."""
        self._pending.join()

    def close(self) -> None:
        with contextlib.suppress(queue.Full):
            self._pending.put(None, timeout=CLOSE_S)
        self._writer.join(timeout=CLOSE_S)

    def _write(self) -> None:
        try:
            database = _opened(self.path)
        except (sqlite3.Error, OSError) as error:
            structlog.get_logger("causeway.journal").warning("decisions are not recorded", error=str(error))
            return
        with contextlib.closing(database):
            written, ended = 0, False
            while not ended:
                batch = [self._pending.get(), *_waiting(self._pending)]
                ended = batch[-1] is None
                written = self._insert(database, [record for record in batch if record is not None], written)
                for _ in batch:
                    self._pending.task_done()

    def _insert(self, database: sqlite3.Connection, records: list[Recorded], written: int) -> int:
        """All in one transaction; `written` counts up to the next pruning."""
        try:
            with database:
                database.executemany(INSERT, [(one.at, encode(one)) for one in records])
                if (written := written + len(records)) >= PRUNE_EVERY:
                    self._prune(database)
                    written = 0
        except sqlite3.Error as error:
            self.lost += len(records)
            structlog.get_logger("causeway.journal").warning("not written", error=str(error), rows=len(records))
        return written

    def _prune(self, database: sqlite3.Connection) -> None:
        newest = "SELECT id FROM decisions ORDER BY id DESC LIMIT 1 OFFSET ?"
        database.execute(f"DELETE FROM decisions WHERE id <= ({newest})", (self._max_rows,))  # noqa: S608 - a constant


def _waiting(pending: "queue.Queue[Recorded | None]") -> Iterator[Recorded | None]:
    with contextlib.suppress(queue.Empty):
        while True:
            record = pending.get_nowait()
            yield record
            if record is None:
                return


def _opened(path: Path, now: Callable[[], float] = time.time) -> sqlite3.Connection:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        return _connected(path)
    except sqlite3.DatabaseError:
        aside = path.with_suffix(f".damaged-{int(now())}")
        path.rename(aside)
        structlog.get_logger("causeway.journal").warning("damaged, begun anew", moved_to=aside.name)
        return _connected(path)


def _connected(path: Path) -> sqlite3.Connection:
    path.touch(0o600)  # before SQLite does, for its log takes the same mode
    database = sqlite3.connect(path, timeout=5.0)
    try:
        database.execute("PRAGMA journal_mode=WAL")
        database.execute("PRAGMA synchronous=NORMAL")
        database.execute(SCHEMA)
        database.execute("SELECT id, at, recorded FROM decisions LIMIT 1").fetchall()
        path.chmod(0o600)
    except BaseException:
        database.close()
        raise
    return database
