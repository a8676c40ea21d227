"""Settings read again while the daemon runs: on SIGHUP, on `POST /admin/reload` and when the file changes.

What can change is taken over at once; what was fixed at the start is named, and waits for a restart. Settings with a
mistake change nothing.
"""

import asyncio
import contextlib
import os
import signal
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import structlog

from edge_agent.settings import EdgeSettings
from edge_agent.watching import ticks
from shared.config import InvalidSettings
from shared.errors import CausewayError

POLL_S = 2.0
SETTLE_S = 0.1

LIVE: Final = frozenset({"log_level", "metered", "edge_watts", "radio_watts", "battery_wh"})
"""What takes effect without a restart; the policy's file is followed by `policy_file`."""


@dataclass(frozen=True, slots=True)
class Changes:
    """Names of settings: taken over now, and changed in the file but in force only after a restart."""

    changed: tuple[str, ...] = ()
    needs_restart: tuple[str, ...] = ()


class LiveSettings:
    """Holds the settings in force. `load` reads them anew from where they came; `apply` puts the live ones to work."""

    def __init__(
        self,
        settings: EdgeSettings,
        *,
        load: Callable[[], EdgeSettings] | None = None,
        file: Path | None = None,
        apply: Callable[[EdgeSettings], None] = lambda _: None,
    ) -> None:
        self.current = settings
        self.file = file
        self.failures = 0
        self._load = load
        self._apply = apply
        self._seen = Changes()
        self._content = _content(file) if file else None

    def reload(self) -> Changes:
        """Raises InvalidSettings, and then everything stays as it is."""
        if self._load is None:
            return Changes()
        try:
            fresh = self._load()
        except InvalidSettings as error:
            self.failures += 1
            _log().warning("settings kept", rejected=error.message)
            raise
        names = sorted(EdgeSettings.model_fields)
        differ = [name for name in names if getattr(fresh, name) != getattr(self.current, name)]
        changes = Changes(
            changed=tuple(name for name in differ if name in LIVE),
            needs_restart=tuple(name for name in differ if name not in LIVE),
        )
        if changes.changed:
            self.current = self.current.model_copy(update={name: getattr(fresh, name) for name in changes.changed})
            self._apply(self.current)
        if changes != self._seen:
            _log().info("settings read again", changed=changes.changed, needs_restart=changes.needs_restart)
        self._seen = changes
        return changes

    async def watch(self) -> None:
        """Reload when the file has changed and then rested; ends only by being cancelled."""
        if self.file is None:
            return
        async for _ in ticks(self.file, POLL_S):
            before, self._content = self._content, await asyncio.to_thread(_content, self.file)
            if self._content == before:
                continue
            await asyncio.sleep(SETTLE_S)
            if self._content == await asyncio.to_thread(_content, self.file):  # else the next tick looks again
                with contextlib.suppress(InvalidSettings):
                    self.reload()


def _content(file: Path) -> bytes | None:
    try:
        return file.read_bytes()
    except OSError:
        return None


def _log() -> Any:
    return structlog.get_logger("causeway.settings")


@contextlib.contextmanager
def on_hangup(call: Callable[[], Awaitable[object]]) -> Iterator[None]:
    """SIGHUP calls it, on the event loop; but a daemon whose terminal was closed is stopped as by SIGTERM."""
    if not hasattr(signal, "SIGHUP"):  # Windows
        yield
        return
    loop, in_terminal, before = asyncio.get_running_loop(), os.isatty(0), signal.getsignal(signal.SIGHUP)
    calls: set[asyncio.Task[None]] = set()

    def heard() -> None:
        if in_terminal and not os.isatty(0):
            os.kill(os.getpid(), signal.SIGTERM)
            return
        task = asyncio.ensure_future(_tried(call))
        calls.add(task)
        task.add_done_callback(calls.discard)

    loop.add_signal_handler(signal.SIGHUP, heard)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGHUP)
        signal.signal(signal.SIGHUP, before)


async def _tried(call: Callable[[], Awaitable[object]]) -> None:
    """What was wrong has been logged by whoever found it: there is nobody to answer to."""
    with contextlib.suppress(CausewayError):
        await call()
