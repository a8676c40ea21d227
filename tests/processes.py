"""The edge agent as a real process, from this very tree, with an environment and a state folder of its own."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
READY_S = 300.0
STOP_S = 30.0


@dataclass(frozen=True)
class Running:
    process: "subprocess.Popen[bytes]"
    url: str
    out: Path
    """What it wrote on stdout and stderr."""

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])


def environment(folder: Path, **values: str) -> dict[str, str]:
    """The caller's, with a home in `folder` and our code on the path."""
    path = os.pathsep.join(filter(None, (values.pop("PYTHONPATH", ""), str(ROOT))))
    state = {"XDG_STATE_HOME": str(folder / "state"), "XDG_CONFIG_HOME": str(folder / "config")}
    return os.environ | state | {"PYTHONPATH": path, "COLUMNS": "100", "NO_COLOR": "1"} | values


def command(*args: str) -> list[str]:
    return [sys.executable, "-m", "edge_agent", *args]


@contextmanager
def edge_agent(folder: Path, *args: str, **env: str) -> Iterator[Running]:
    """`edge-agent serve ARGS`, once it listens; ended with the block however that ends."""
    out = folder / "out"
    with out.open("wb") as stream:
        process = subprocess.Popen(
            command("serve", "--port", "0", *args),
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=environment(folder, **env),
            umask=0,  # what is private must not owe it to the user's umask
        )
    try:
        yield Running(process, _url(process, out), out)
    finally:
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(STOP_S)


def _url(process: "subprocess.Popen[bytes]", out: Path) -> str:
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline and process.poll() is None:
        for line in out.read_text("utf-8", "replace").splitlines():
            if line.startswith("listening on "):
                return line.removeprefix("listening on ").strip()
        time.sleep(0.02)
    raise AssertionError(f"edge-agent did not start:\n{out.read_text('utf-8', 'replace')}")
