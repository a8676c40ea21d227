"""One daemon per state folder: a lock that the operating system drops with the process, however that ends.

The file also says who holds it, for messages and for `doctor`; what it says counts only while the lock is held.
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from edge_agent.api.credentials import CLIENT_TOKEN_FILE
from edge_agent.locks import held, is_held
from shared.config import InvalidSettings, read_secret

LOCK_FILE: Final = "daemon.lock"
MAX_NOTE: Final = 4096
USUAL_URL: Final = "http://127.0.0.1:8484"


@dataclass(frozen=True, slots=True)
class Instance:
    """A daemon that runs. `url` is empty until it listens."""

    pid: int
    url: str = ""

    def __str__(self) -> str:
        return f"process {self.pid}" + (f", {self.url}" if self.url else ", not listening yet")


class Held:
    """The lock, held by this process."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.say("")

    def say(self, url: str) -> None:
        """Where this daemon listens, for whoever finds the lock taken."""
        with contextlib.suppress(OSError):  # a full disk must not end the daemon: the lock is what counts
            self._file.write_bytes(msgspec.json.encode(Instance(os.getpid(), url)))


@contextlib.contextmanager
def hold(state: Path) -> Iterator[Held]:
    """Raises InvalidSettings naming the other daemon's process and address if there is one."""
    path = state / LOCK_FILE
    with contextlib.ExitStack() as stack:
        try:
            state.mkdir(mode=0o700, parents=True, exist_ok=True)
            path.touch(0o600)
            ours = stack.enter_context(held(path))
        except OSError as error:
            raise InvalidSettings(f"state_dir: {path}: {error.strerror}", param="state_dir") from error
        if not ours:
            raise InvalidSettings(
                f"state_dir: another edge-agent ({_noted(path) or 'of unknown number'}) uses {state}: stop it, or give "
                "this one another state_dir and port",
                param="state_dir",
            )
        yield Held(path)


def running(state: Path) -> Instance | None:
    """The daemon that holds this state folder; None if there is none. Changes nothing. Raises OSError."""
    path = state / LOCK_FILE
    return (_noted(path) or Instance(0)) if is_held(path) else None


def find(state: Path, url: str | None, key_file: Path | None) -> tuple[str, str]:
    """Where a daemon listens and the key to show it: what was given, else what its state folder says, else what is
    usual. Raises InvalidSettings."""
    with contextlib.suppress(OSError):
        there = running(state)
        url = url or (there.url if there else None)
    token = state / CLIENT_TOKEN_FILE
    if key_file is None and token.is_file() and os.access(token, os.R_OK):
        key_file = token
    return url or USUAL_URL, read_secret(key_file, "key_file") if key_file else "any"


def _noted(file: Path) -> Instance | None:
    with contextlib.suppress(OSError, msgspec.MsgspecError, UnicodeDecodeError), file.open("rb") as stream:
        return msgspec.json.decode(stream.read(MAX_NOTE), type=Instance)
    return None
