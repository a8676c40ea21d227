"""The processes of the ranks other than 0, and the watch over them."""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

import structlog

from cloud_engine.engine.parallel.messages import Channel, Failed, FromRank
from shared.errors import UpstreamFailed

KEPT = frozenset({"PATH", "HOME", "LANG", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "LD_PRELOAD", "XDG_CACHE_HOME", "CXX"})
KEPT |= {"CAUSEWAY_NATIVE"}
KEPT_PREFIXES = ("LC_", "OMP_", "GOMP_", "KMP_", "MKL_", "CUDA_", "NVIDIA_", "NCCL_", "GLOO_", "TORCH_", "TRITON_")
POLL_S = 0.1
NOTICE_S = 3.0
"""By then the watch has seen the death of a rank that made a collective fail."""
END_S = 5.0


class RankLost(UpstreamFailed):
    """A rank has died or is stuck: the engine is of no use any more."""


class RankProcess:
    """One rank as rank 0 knows it. It ends when rank 0 does, see `cloud_engine.engine.parallel.rank`."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        ours, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "cloud_engine.engine.parallel.rank", str(theirs.fileno())],
                stdin=subprocess.PIPE,
                stdout=sys.__stderr__,
                pass_fds=(theirs.fileno(),),
                env=environment(os.environ, sys.path),
                start_new_session=True,
            )
        self.channel = Channel[FromRank](ours, FromRank)

    def last_words(self) -> str:
        """Why it ended, if it could say so."""
        with suppress(OSError, EOFError, ValueError):
            while True:
                if isinstance(message := self.channel.receive(), Failed):
                    return message.message
        return f"exit status {self.process.poll()}"

    def end(self) -> None:
        """Let it end by itself, or make it. Idempotent."""
        self.channel.close()
        if self.process.stdin is not None:
            self.process.stdin.close()
        try:
            self.process.wait(END_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def environment(environ: Mapping[str, str], path: Sequence[str]) -> dict[str, str]:
    """Of our own what a rank's libraries read: no setting, key or token. Modules are found where we find them."""
    kept = {name: value for name, value in environ.items() if name in KEPT or name.startswith(KEPT_PREFIXES)}
    return kept | {"PYTHONPATH": os.pathsep.join(place or os.curdir for place in path)}


class Watch:
    """Sees within POLL_S that a rank has died, or that something takes longer than its limit. Then it ends all ranks,
    so that whoever waits for one of them gets an error instead (`abort` does the same for the device)."""

    def __init__(self, ranks: Sequence[RankProcess], abort: Callable[[], None]) -> None:
        self._ranks, self._abort = ranks, abort
        self._deadline: float | None = None
        self._closing = threading.Event()
        self._lost = threading.Event()
        self._culprit: RankProcess | None = None
        self._thread = threading.Thread(target=self._run, name="ranks", daemon=True)
        self._thread.start()

    @property
    def lost(self) -> bool:
        return self._lost.is_set()

    @contextmanager
    def limit(self, seconds: float) -> Iterator[None]:
        """What happens inside must end within `seconds`. Raises RankLost if that or a death made it fail or if a rank
        has been lost before; any other error is passed on, and ends the ranks: they would be out of step."""
        self._deadline = time.monotonic() + seconds
        try:
            if self.lost:
                raise self._loss()
            yield
            if self.lost:
                raise self._loss()
        except RankLost:
            raise
        except Exception as error:
            if self._lost.wait(NOTICE_S):
                raise self._loss() from error
            self.close()
            raise
        finally:
            self._deadline = None

    def close(self) -> None:
        """End the ranks. Idempotent."""
        self._closing.set()
        self._thread.join()
        for rank in self._ranks:
            rank.end()

    def _run(self) -> None:
        while not self._closing.wait(POLL_S):
            self._culprit = next((rank for rank in self._ranks if rank.process.poll() is not None), None)
            if self._culprit or self._late():
                for rank in self._ranks:
                    rank.process.kill()
                self._lost.set()
                self._abort()
                return

    def _late(self) -> bool:
        deadline = self._deadline
        return deadline is not None and time.monotonic() > deadline

    def _loss(self) -> RankLost:
        log = structlog.get_logger("causeway.engine")
        if self._culprit is None:
            log.error("ranks are stuck")
            return RankLost("the ranks of the engine are stuck")
        rank, reason = self._culprit.rank, self._culprit.last_words()
        log.error("a rank has ended", rank=rank, reason=reason)
        return RankLost(f"rank {rank} of the engine has ended: {reason}")
