"""Starts the process that runs the model. Imports next to nothing, so that this can be the first thing a daemon does:
what both have to import then takes its time side by side.
"""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

PACKAGES = Path(__file__).parents[2]
PASSED_ON = ("LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES")
PASSED_ON_PREFIXES = ("OMP_", "GOMP_", "KMP_", "GGML_", "VK_", "ROCR_", "HIP_")

Spawned = tuple["subprocess.Popen[bytes]", socket.socket]
"""A process and our end of its pipe."""


class Spare:
    """A process that has not been told anything yet, for whoever takes it first."""

    def __init__(self) -> None:
        self._spawned: Spawned | None = spawn()

    def take(self) -> Spawned | None:
        """None if it has been taken. It is the taker's to end."""
        taken, self._spawned = self._spawned, None
        return taken

    def drop(self) -> None:
        """End it, if nobody has taken it."""
        if taken := self.take():
            end(*taken)


@contextmanager
def spare() -> Iterator[Spare | None]:
    """For as long as the body runs; None if the system starts none now: it may when one is needed, or say why not."""
    try:
        one = Spare()
    except OSError:
        yield None
        return
    try:
        yield one
    finally:
        one.drop()


def spawn() -> Spawned:
    """Must run in the thread that lives longest: on Linux the process ends with it. Raises OSError."""
    ours, theirs = socket.socketpair()
    with theirs:
        try:
            process = subprocess.Popen(
                [sys.executable, "-S", "-P", "-m", "edge_agent.backends.process"],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                env=environment(os.environ),
                cwd="/",
            )
        except BaseException:
            ours.close()
            raise
    return process, ours


def end(process: "subprocess.Popen[bytes]", ours: socket.socket) -> None:
    ours.close()
    process.kill()
    process.wait()


def environment(ours: Mapping[str, str]) -> dict[str, str]:
    """All that the process is told: where Python's modules are, and what tunes native code. No key, no setting."""
    kept = {name: value for name, value in ours.items() if name in PASSED_ON or name.startswith(PASSED_ON_PREFIXES)}
    # As it is here, whatever made it so: the process starts without `site` and its hooks, which is quicker, too.
    return kept | {"PYTHONPATH": os.pathsep.join([str(PACKAGES), *filter(None, sys.path)])}
