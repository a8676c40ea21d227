"""A log file that cannot fill the disk: at its size it is renamed to NAME.1, NAME.1 to NAME.2 and so on, the last goes.

All of them can be read by their owner only. What cannot be written is dropped: a log must not fail what it reports on.
"""

import contextlib
import os
import stat
import threading
from pathlib import Path

from shared.config import InvalidSettings


class LogFile:
    """Takes whole lines, from any thread; each is one write to a file opened for appending."""

    def __init__(self, path: Path, *, max_bytes: int, files: int) -> None:
        """`files` counts the current one. Raises InvalidSettings if it cannot be opened."""
        self._path, self._max_bytes, self._files = path, max_bytes, files
        self._lock = threading.Lock()
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._descriptor = _opened(path)
        except OSError as error:
            raise InvalidSettings(f"log_file: {path}: {error.strerror or error}", param="log_file") from error
        self._bytes = os.fstat(self._descriptor).st_size

    def write(self, text: str) -> None:
        data = text.encode("utf-8", "backslashreplace")
        with self._lock, contextlib.suppress(OSError):
            if self._bytes and self._bytes + len(data) > self._max_bytes:
                self._rotate()
            self._bytes += os.write(self._descriptor, data)

    def flush(self) -> None:
        """Nothing is buffered."""

    def reopen(self) -> None:
        """Go on in the file of this name, which somebody else may have moved or removed."""
        with self._lock, contextlib.suppress(OSError):
            self._renew()

    def close(self) -> None:
        with self._lock:
            os.close(self._descriptor)

    def _rotate(self) -> None:
        with contextlib.suppress(OSError):
            for number in range(self._files - 1, 0, -1):
                if (older := self._numbered(number - 1)).exists():
                    older.replace(self._numbered(number))
            self._renew()
        if self._bytes:  # nothing to rename it to, or no right to: the bound holds all the same
            os.ftruncate(self._descriptor, 0)
            self._bytes = 0

    def _renew(self) -> None:
        fresh = _opened(self._path)
        os.close(self._descriptor)
        self._descriptor, self._bytes = fresh, os.fstat(fresh).st_size

    def _numbered(self, number: int) -> Path:
        return self._path.with_name(f"{self._path.name}.{number}") if number else self._path


def _opened(path: Path) -> int:
    """Follows no link: a log in a folder that others can write must not be led to another file."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    descriptor = os.open(path, flags, 0o600)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError("is not a file")
        path.chmod(0o600)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor
