import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from structlog.testing import capture_logs
from waiting import HANG_S, until

from edge_agent import reload as module
from edge_agent.reload import LIVE, Changes, LiveSettings, on_hangup
from edge_agent.settings import EdgeSettings
from shared.config import InvalidSettings, load


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SETTLE_S", 0.02)
    monkeypatch.setattr(module, "POLL_S", 0.05)


class File:
    """A settings file, and what was put to work of it."""

    def __init__(self, folder: Path, text: str) -> None:
        self.path = folder / "edge.toml"
        self.applied: list[str] = []
        self.write(text)
        self.live = LiveSettings(
            self.read(), load=self.read, file=self.path, apply=lambda now: self.applied.append(now.log_level)
        )

    def write(self, text: str) -> None:
        self.path.write_text(text)

    def read(self) -> EdgeSettings:
        return load(EdgeSettings, self.path, {}, {"slots": 4})


@asynccontextmanager
async def watched(live: LiveSettings) -> AsyncIterator[None]:
    task = asyncio.create_task(live.watch())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def test_live_settings_exist() -> None:
    """What is said to change while running is a setting."""
    assert set(EdgeSettings.model_fields) >= LIVE


def test_what_can_change_does_and_the_rest_is_named(tmp_path: Path) -> None:
    """The log level at once; port and queue are said to wait for a restart, and stay; a flag still beats the file."""
    file = File(tmp_path, "port = 1\n")
    file.write('port = 2\nqueue = 7\nslots = 9\nlog_level = "debug"\n')

    with capture_logs() as logs:
        changes = file.live.reload()

    assert changes == Changes(changed=("log_level",), needs_restart=("port", "queue"))
    assert file.applied == ["debug"]
    assert (file.live.current.log_level, file.live.current.port, file.live.current.slots) == ("debug", 1, 4)
    assert logs[0]["needs_restart"] == ("port", "queue")


def test_the_same_file_changes_nothing(tmp_path: Path) -> None:
    """Nothing is applied, nothing logged."""
    file = File(tmp_path, "port = 1\n")
    with capture_logs() as logs:
        assert file.live.reload() == Changes()

    assert (file.applied, logs) == ([], [])


@pytest.mark.parametrize("bad", ["prot = 1\n", 'log_level = "loud"\n', "log_level = \n", None])
def test_a_mistake_changes_nothing(tmp_path: Path, bad: str | None) -> None:
    """An unknown name, a wrong value, no TOML, no file: refused by name, counted, the settings in force stay."""
    file = File(tmp_path, 'log_level = "warning"\n')
    if bad is None:
        file.path.unlink()
    else:
        file.write(bad)
    with capture_logs() as logs, pytest.raises(InvalidSettings):
        file.live.reload()

    assert (file.live.current.log_level, file.live.failures, file.applied) == ("warning", 1, [])
    assert "edge.toml" in logs[0]["rejected"]


async def test_a_change_of_the_file_is_seen(tmp_path: Path) -> None:
    """Also one that replaces the file, as editors do, and one after a mistake."""
    file = File(tmp_path, "")
    async with watched(file.live):
        file.write('log_level = "debug"\n')
        await until(lambda: file.applied == ["debug"])
        file.write("nonsense")
        await until(lambda: file.live.failures == 1)
        (tmp_path / "new").write_text('log_level = "error"\n')
        (tmp_path / "new").replace(file.path)
        await until(lambda: file.applied == ["debug", "error"])


async def test_without_a_file_there_is_nothing_to_watch() -> None:
    """It ends at once; asked to reload, it has nothing to change."""
    live = LiveSettings(EdgeSettings())
    await asyncio.wait_for(live.watch(), HANG_S)

    assert live.reload() == Changes()


async def test_a_hangup_reloads_and_its_errors_end_nothing() -> None:
    """SIGHUP calls; an error in what is called is not the daemon's end; afterwards the signal is as it was."""
    heard: list[int] = []
    before = signal.getsignal(signal.SIGHUP)

    async def call() -> None:
        heard.append(1)
        raise InvalidSettings("wrong")

    with on_hangup(call):
        for count in (1, 2):
            os.kill(os.getpid(), signal.SIGHUP)
            await until(lambda count=count: len(heard) == count)  # type: ignore[misc]

    assert signal.getsignal(signal.SIGHUP) == before


async def test_a_closed_terminal_stops_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A daemon that was started in a terminal does not live on unseen: SIGTERM, which drains."""
    terminals = iter([True, False])
    monkeypatch.setattr(os, "isatty", lambda _: next(terminals))
    stopped, called = asyncio.Event(), []
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)

    async def call() -> None:
        called.append(1)

    with on_hangup(call):
        os.kill(os.getpid(), signal.SIGHUP)
        await asyncio.wait_for(stopped.wait(), HANG_S)
    asyncio.get_running_loop().remove_signal_handler(signal.SIGTERM)

    assert not called
