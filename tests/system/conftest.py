"""Real processes on loopback: `cloud-engine serve` and `edge-agent serve` with the real model."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import local
import pytest

pytestmark = [pytest.mark.system, pytest.mark.model]


@dataclass(frozen=True, slots=True)
class Pair:
    """Both sides, running. `edge_key` is the bearer key the edge uses."""

    cloud: local.Daemon
    edge: local.Daemon
    edge_key: str
    folder: Path

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.edge.url, timeout=120)


@pytest.fixture(scope="session")
def stop_all() -> Iterator[Callable[[local.Daemon], local.Daemon]]:
    """Registers daemons; whatever is still running when the tests end is ended."""
    started: list[local.Daemon] = []

    def register(daemon: local.Daemon) -> local.Daemon:
        started.append(daemon)
        return daemon

    yield register
    for daemon in started:
        local.end(daemon.process)


StartPair = Callable[[], Pair]


@pytest.fixture(scope="session")
def start_pair(
    model_path: Path, tmp_path_factory: pytest.TempPathFactory, stop_all: Callable[[local.Daemon], local.Daemon]
) -> StartPair:
    """A new pair of our own, for tests that break one side."""

    def start() -> Pair:
        folder = tmp_path_factory.mktemp("pair")
        cloud, edge = local.start_both(folder, str(model_path), 0, 0)
        return Pair(stop_all(cloud), stop_all(edge), (folder / "edge.key").read_text(), folder)

    return start


@pytest.fixture(scope="session")
def pair(start_pair: StartPair) -> Pair:
    """One pair for all tests that leave it as they found it."""
    return start_pair()
