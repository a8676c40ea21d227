"""The policies of a fleet, offered to the edges that ask for them, and what each edge says of them.

They lie in a folder, signed: one file `*.policy` each, followed as it changes. An edge is offered the newest one that
is meant for it, unless it has had that, or refused it. The key that signs is not here: this server checks by the public
one, so that a mistake is found before a thousand edges find it, but no edge takes its word for it.
"""

import asyncio
import contextlib
import os
import time
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Protocol

import msgspec
import structlog
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from router.policy import parse
from shared.config import InvalidSettings
from shared.errors import CausewayError, RequestConflict
from shared.fleet import FleetPolicy, opened
from shared.frames import MAX_OFFER, FleetState
from shared.keys import Keys
from shared.session import Reported

SUFFIX: Final = ".policy"
MAX_POLICIES: Final = 64
"""The newest ones; of older ones nothing is looked at but the name."""
MAX_EDGES: Final = 10_000
"""Of which anything is known; the one that was silent for the longest is forgotten first."""
POLL_S: Final = 2.0

Seen = tuple[tuple[str, int, int], ...]
"""What tells that the folder changed: names, times and sizes."""
Key = tuple[str, str]
"""A tenant and the name of one of its edges."""


class Session(Protocol):
    def offer(self, version: int, signed: bytes) -> None: ...


@dataclass(frozen=True, slots=True)
class Edge:
    """One device's latest word. `at` in seconds since 1970, for people to read: nothing is decided by it."""

    tenant: str
    state: FleetState
    at: float
    session: Session | None = field(repr=False)
    """None while it is not connected."""


@dataclass(frozen=True, slots=True)
class Folder:
    """What lies there: policies, the newest first, and by file what is wrong with the others."""

    policies: tuple[FleetPolicy, ...] = ()
    problems: tuple[tuple[str, str], ...] = ()
    seen: Seen = ()


class Fleet:
    """All on the event loop, but for reading and checking files."""

    def __init__(
        self, folder: Path, key: Ed25519PublicKey, admins: Keys | None = None, *, now: Callable[[], float] = time.time
    ) -> None:
        """`admins` may see and publish. Raises InvalidSettings if the folder cannot be read."""
        self.admins = admins
        self.folder = folder
        self._key, self._now = key, now
        self._edges: OrderedDict[Key, Edge] = OrderedDict()
        self._connected: dict[Session, Key] = {}
        self._holds = self._read(_seen(folder))

    def reported(self, report: Reported) -> None:
        """An edge has connected, or something has changed there."""
        key = (report.tenant, report.state.edge)
        self._connected[report.session] = key
        edge = self._edges[key] = Edge(report.tenant, report.state, self._now(), report.session)
        self._edges.move_to_end(key)
        while len(self._edges) > MAX_EDGES:
            gone = next((key for key, one in self._edges.items() if one.session is None), next(iter(self._edges)))
            del self._edges[gone]
        self._offer(edge)

    def gone(self, session: Session) -> None:
        """A connection has ended; the edge may have another one by now."""
        key = self._connected.pop(session, None)
        if key is not None and key in self._edges and self._edges[key].session is session:
            self._edges[key] = replace(self._edges[key], session=None)

    def policy_for(self, state: FleetState) -> FleetPolicy | None:
        return next((one for one in self._holds.policies if one.terms.include(state.edge, state.group)), None)

    def check(self, signed: bytes) -> FleetPolicy:
        """Raises TooLarge, BadSignature, InvalidFleetPolicy, or InvalidPolicy naming the line."""
        found = opened(signed, self._key)
        parse(found.source, name=f"fleet version {found.version}")
        return found

    async def publish(self, signed: bytes, who: str) -> FleetPolicy:
        """Keep a policy in the folder and offer it. Raises as `check`, RequestConflict unless it is the newest, and
        InvalidSettings if the folder cannot be written."""
        found = await asyncio.to_thread(self.check, signed)
        newest = self._holds.policies[0].version if self._holds.policies else 0
        if found.version <= newest:
            raise RequestConflict(f"version {newest} is there already: sign it as a higher one", param="version")
        await asyncio.to_thread(_kept, self.folder / f"{found.version:016d}{SUFFIX}", signed)
        structlog.get_logger("causeway.fleet").info("published", version=found.version, who=who, digest=found.digest)
        await self.reload()
        return found

    async def reload(self) -> None:
        """Read the folder again if it has changed, and offer what is new."""
        seen = await asyncio.to_thread(_seen, self.folder)
        if seen == self._holds.seen:
            return
        before, self._holds = self._holds, await asyncio.to_thread(self._read, seen)
        for problem in set(self._holds.problems) - set(before.problems):
            structlog.get_logger("causeway.fleet").warning("not offered", file=problem[0], why=problem[1])
        for edge in list(self._edges.values()):
            self._offer(edge)

    @contextlib.asynccontextmanager
    async def followed(self) -> AsyncIterator[None]:
        """The folder is looked at while the block runs."""
        task = asyncio.create_task(self._follow())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(POLL_S)
            try:
                await self.reload()
            except (InvalidSettings, OSError) as error:
                structlog.get_logger("causeway.fleet").error("folder not read, policies kept", error=str(error))

    def overview(self, listed: int) -> dict[str, Any]:
        """The policies, and the edges that were heard of last."""
        edges = list(reversed(self._edges.values()))
        using, refused = (Counter(getattr(edge.state, name) for edge in edges) for name in ("using", "refused"))
        return {
            "policies": [
                {**described(one), "using": using[one.version], "refused": refused[one.version]}
                for one in self._holds.policies
            ],
            "problems": [{"file": name, "problem": problem} for name, problem in self._holds.problems],
            "edges": [self._shown(edge) for edge in edges[:listed]],
            "known": len(edges),
            "connected": sum(edge.session is not None for edge in edges),
        }

    def _offer(self, edge: Edge) -> None:
        if edge.session is None:
            return
        found, state = self.policy_for(edge.state), edge.state
        if found is None or found.version <= state.seen or found.version == state.refused:
            edge.session.offer(0, b"")
        else:
            edge.session.offer(found.version, found.signed)

    def _shown(self, edge: Edge) -> dict[str, Any]:
        found, state = self.policy_for(edge.state), msgspec.structs.asdict(edge.state)
        offered = None if found is None else found.version
        ours = {one.version: one.digest for one in self._holds.policies}.get(edge.state.seen)
        foreign = ours is not None and ours != edge.state.digest
        connected = edge.session is not None
        more = {"offered": offered, "foreign": foreign, "connected": connected, "at": edge.at}
        return {"tenant": edge.tenant, **state, **more}

    def _read(self, seen: Seen) -> Folder:
        policies: dict[int, FleetPolicy] = {}
        problems: list[tuple[str, str]] = []
        for name, *_ in seen:
            try:
                with (self.folder / name).open("rb") as stream:
                    found = self.check(stream.read(MAX_OFFER + 1))
                if found.version in policies:
                    raise RequestConflict(f"version {found.version} is in another file already", param="version")
                policies[found.version] = found
            except (CausewayError, OSError) as error:
                problems.append((name, str(error)))
        newest = sorted(policies.values(), key=lambda one: -one.version)
        return Folder(tuple(newest), tuple(problems), seen)


def described(policy: FleetPolicy) -> dict[str, Any]:
    return {**msgspec.structs.asdict(policy.terms), "digest": policy.digest}


def _seen(folder: Path) -> Seen:
    """The last MAX_POLICIES files by name. Raises InvalidSettings."""
    try:
        with os.scandir(folder) as found:
            files = [(one.name, one.stat()) for one in found if one.name.endswith(SUFFIX) and one.is_file()]
    except OSError as error:
        raise InvalidSettings(f"fleet_policies: {folder}: {error.strerror}", param="fleet_policies") from error
    newest = sorted(files, key=lambda one: one[0])[-MAX_POLICIES:]
    return tuple((name, stat.st_mtime_ns, stat.st_size) for name, stat in newest)


def _kept(path: Path, content: bytes) -> None:
    """Whole or not at all; never over another one."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.write_bytes(content)
        os.link(draft, path)
    except FileExistsError:
        raise RequestConflict(f"{path.name} is there already", param="version") from None
    except OSError as error:
        raise InvalidSettings(f"fleet_policies: {path.name}: {error.strerror}", param="fleet_policies") from error
    finally:
        draft.unlink(missing_ok=True)
