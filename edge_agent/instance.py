"""One daemon per state folder: a lock that the operating system drops with the process, however that ends.

The file also says who holds it, for messages and for `doctor`; what it says counts only while the lock is held.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from shared.config import InvalidSettings

LOCK_FILE: Final = "daemon.lock"
LOCKED_BYTE: Final = 1 << 30  # where Windows locks a byte: past what is written, so that others can read that
MAX_NOTE: Final = 4096


@dataclass(frozen=True, slots=True)
class Instance:
    """A daemon that runs. `url` is empty until it listens."""

    pid: int
    url: str = ""

    def __str__(self) -> str:
        return f"process {self.pid}" + (f", {self.url}" if self.url else ", not listening yet")


class Held:
    """The lock, held by this process."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.say("")

    def say(self, url: str) -> None:
        """Where this daemon listens, for whoever finds the lock taken."""
        note = msgspec.json.encode(Instance(os.getpid(), url))
        with contextlib.suppress(OSError):  # a full disk must not end the daemon: the lock is what counts
            os.lseek(self._descriptor, 0, os.SEEK_SET)
            os.write(self._descriptor, note)
            os.ftruncate(self._descriptor, len(note))


@contextlib.contextmanager
def hold(state: Path) -> Iterator[Held]:
    """Raises InvalidSettings naming the other daemon's process and address if there is one."""
    path = state / LOCK_FILE
    try:
        state.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise InvalidSettings(f"state_dir: {path}: {error.strerror}", param="state_dir") from error
    try:
        if not _locked(descriptor):
            other = _noted(descriptor)
            raise InvalidSettings(
                f"state_dir: another edge-agent ({other or 'of unknown number'}) uses {state}: stop it, or give this "
                "one another state_dir and port",
                param="state_dir",
            )
        yield Held(descriptor)
    finally:
        os.close(descriptor)


def running(state: Path) -> Instance | None:
    """The daemon that holds this state folder; None if there is none. Changes nothing. Raises OSError."""
    try:
        descriptor = os.open(state / LOCK_FILE, os.O_RDWR)
    except FileNotFoundError:
        return None
    try:
        return None if _locked(descriptor) else _noted(descriptor) or Instance(0)
    finally:
        os.close(descriptor)


def _noted(descriptor: int) -> Instance | None:
    os.lseek(descriptor, 0, os.SEEK_SET)
    try:
        return msgspec.json.decode(os.read(descriptor, MAX_NOTE), type=Instance)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None


if sys.platform == "win32":
    import msvcrt

    def _locked(descriptor: int) -> bool:
        os.lseek(descriptor, LOCKED_BYTE, os.SEEK_SET)
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
else:
    import fcntl

    def _locked(descriptor: int) -> bool:
        """Whether it is now ours: never waits."""
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True
