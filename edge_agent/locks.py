"""Locks on files that the operating system lets go of when a process ends, however it ends.

Where there are none (Windows), nothing is ever locked: there a file that is open cannot be removed anyway.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

if sys.platform != "win32":
    import fcntl


def _try(descriptor: int, *, shared: bool) -> bool:
    if sys.platform == "win32":
        return True
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def held(path: Path, *, shared: bool = False) -> Iterator[bool]:
    """Hold a lock on this very file or folder: any number of processes share it, or one has it alone. False if others
    have it in a way that forbids that. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield _try(descriptor, shared=shared) and _is_still(path, descriptor)
    finally:
        os.close(descriptor)


def is_held(path: Path) -> bool:
    """Whether anybody holds a lock on it now."""
    with suppress(FileNotFoundError), held(path) as free:
        return not free
    return False


def _is_still(path: Path, descriptor: int) -> bool:
    """False if it was removed or replaced between opening and locking: then the lock is worth nothing."""
    with suppress(FileNotFoundError):
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    return False
