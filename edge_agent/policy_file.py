"""The policy in force: read from a file, exchanged whole when the file changes, kept when the new one is wrong."""

import asyncio
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import structlog

from edge_agent.watching import ticks
from router.defaults import default_policy
from router.document import MAX_BYTES, Problem
from router.observe import usable
from router.policy import InvalidPolicy, Policy

POLL_S = 2.0
SETTLE_S = 0.1
"""A file that is still being written must not be taken for a shorter one: it has to stay the same for this long."""
SETTLE_TRIES = 50


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One policy, its text, and where it came from. `version` is its number in the history; 0 if it has none there."""

    policy: Policy
    name: str
    source: bytes = b""
    version: int = 0

    @property
    def sha256(self) -> str:
        """Of the text; empty for the built-in policy."""
        return hashlib.sha256(self.source).hexdigest() if self.source else ""

    def numbered(self, version: int) -> "Snapshot":
        return replace(self, version=version)


class PolicyFile:
    """Holds one reference. Who has read `current` keeps what it got, whatever is loaded later; `changed` is told of
    each content that is another than the one before."""

    def __init__(self, path: Path | None, changed: Callable[[Snapshot], None] = lambda _: None) -> None:
        """Raises InvalidPolicy naming line and field, or saying that the file cannot be read."""
        self._path = path.absolute() if path else None
        self._changed_to = changed
        self._seen = b""
        self.failures = 0
        self.current = self._load(_read(path)) if path else Snapshot(default_policy(), "default")

    @property
    def policy(self) -> Policy:
        return self.current.policy

    async def reload(self) -> Snapshot:
        """Take the file as it is once it has stopped changing. Raises InvalidPolicy, and then the old one stays."""
        if self._path is not None:
            try:
                before, self.current = self.current, self._load(await _settled(self._path))
            except InvalidPolicy as error:
                self.failures += 1
                structlog.get_logger("causeway.policy").warning("policy kept", rejected=error.message)
                raise
            if before.source != self.current.source:
                self._changed_to(self.current)
        return self.current

    async def watch(self) -> None:
        """Reload whenever the file's content changes; ends only by being cancelled."""
        if self._path is None:
            return
        async for _ in ticks(self._path, POLL_S):
            if await asyncio.to_thread(self._changed, self._path):
                try:
                    await self.reload()
                except InvalidPolicy:
                    continue
                structlog.get_logger("causeway.policy").info("policy loaded", mode=self.current.policy.mode)

    def _changed(self, path: Path) -> bool:
        before, self._seen = self._seen, _fingerprint(path)
        return self._seen != before

    def _load(self, content: bytes) -> Snapshot:
        """Remembers the content before judging it: one bad file is reported once."""
        self._seen = hashlib.sha256(content).digest()
        name = self._path.name if self._path else "policy"
        return Snapshot(usable(content, name=name), name, content)


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as stream:
            return stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise InvalidPolicy(path.name, (Problem(1, 1, "", f"cannot be read: {error.strerror}"),)) from error


def _fingerprint(path: Path) -> bytes:
    try:
        return hashlib.sha256(_read(path)).digest()
    except InvalidPolicy:
        return b"unreadable"


async def _settled(path: Path) -> bytes:
    content = await asyncio.to_thread(_read, path)
    for _ in range(SETTLE_TRIES):
        await asyncio.sleep(SETTLE_S)
        before, content = content, await asyncio.to_thread(_read, path)
        if before == content:
            return content
    raise InvalidPolicy(path.name, (Problem(1, 1, "", "does not stop changing"),))
