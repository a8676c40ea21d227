"""Servers of others that tests need: installed where they are missing, started for a test, gone after it."""

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

INSTALL_S = 300
START_S = 60


@dataclass
class RedisServer:
    """On a socket of its own, without any port."""

    folder: Path
    process: "subprocess.Popen[bytes]"

    @property
    def url(self) -> str:
        return f"unix://{self.folder / 'redis.sock'}"

    def stop(self) -> None:
        self.process.kill()
        self.process.wait(START_S)
        (self.folder / "redis.sock").unlink(missing_ok=True)

    def start(self) -> None:
        self.process = _started(self.folder)


@contextmanager
def redis_server() -> Iterator[RedisServer]:
    with tempfile.TemporaryDirectory(prefix="redis-") as name:
        server = RedisServer(Path(name), _started(Path(name)))
        try:
            yield server
        finally:
            server.stop()


def _started(folder: Path) -> "subprocess.Popen[bytes]":
    """Returns once it listens."""
    socket = folder / "redis.sock"
    command = [
        _installed("redis-server"),
        "--port",
        "0",
        "--unixsocket",
        str(socket),
        "--save",
        "",
        "--dir",
        str(folder),
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
    give_up = time.monotonic() + START_S
    while not socket.exists():
        if process.poll() is not None or time.monotonic() > give_up:
            process.kill()
            raise RuntimeError(f"redis-server did not start: exit status {process.wait(START_S)}")
        time.sleep(0.01)
    return process


def _installed(program: str) -> str:
    """Where it is; installed by the system's own package manager if need be."""
    if (path := shutil.which(program)) is None:
        become = [] if os.geteuid() == 0 else ["sudo", "-n"]
        for step in (["apt-get", "-q", "update"], ["apt-get", "-qy", "install", "--no-install-recommends", program]):
            subprocess.run([*become, *step], check=True, capture_output=True, timeout=INSTALL_S)
        path = shutil.which(program)
    if path is None:
        raise RuntimeError(f"{program} is not installed")
    return path
