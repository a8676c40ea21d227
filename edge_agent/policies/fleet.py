"""The fleet's policies at this edge: what its cloud offers, if the key that its own administrator pinned signed it.

One is taken if, in this order, it is signed by that key, the device's own record is whole, it is newer than every one
that was taken before, meant for this edge, a policy that can be read, and none that loosens what the device's own
policy demands (`router.floor`). Then it is put in force like one that a person activates, and can be rolled back like
it; the same version does not come again. What is refused changes nothing: the cloud is told which, by which code. It is
judged again after a restart, or once another policy of the device's own is in force.
"""

import asyncio
import contextlib
import sqlite3
import time
from collections.abc import Callable
from typing import Final

import structlog
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from edge_agent.policies.center import FLEET, PolicyCenter
from edge_agent.policies.chain import Taken
from router.floor import loosened
from router.observe import usable
from router.policy import Policy
from shared.errors import BadRequest, CausewayError, Internal, PolicyDenied
from shared.fleet import BadSignature, FleetPolicy, opened
from shared.frames import MAX_MESSAGE_CHARS, FleetState

MAX_RECORDED: Final = 256
"""Refusals that go into the history in one life of the daemon, each only once."""


class StalePolicy(BadRequest):
    """Its version was taken before, or a newer one was."""

    code = "stale_policy"


class NotForThisEdge(BadRequest):
    """Signed for other groups, or for a share of the fleet that this edge is not in."""

    code = "not_for_this_edge"


class LoosensPrivacy(PolicyDenied):
    """It permits what the device's own policy forbids."""

    code = "loosens_privacy"


class BrokenHistory(PolicyDenied):
    """Acts of the device's history were rewritten: nobody can tell which policies it had."""

    code = "broken_history"


class FleetFollower:
    """A `shared.offers.Follower`. `watch` does the judging, beside the event loop where it takes long."""

    def __init__(
        self,
        center: PolicyCenter,
        key: Ed25519PublicKey,
        *,
        edge: str,
        group: str = "",
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`clock` in seconds since 1970, for people to read. Raises NoHistory: without one nobody could tell a new
        policy from an old one."""
        self._center, self._key, self._edge, self._group, self._clock = center, key, edge, group, clock
        self.offered_version, self.answered_at = 0, 0.0
        """What the cloud has sent last in this life of the daemon, and when it last said what it has; 0 if never."""
        self._taken: Taken | None = center.history.taken()
        self._offer: tuple[int, bytes, Callable[[], None]] | None = None
        self._news = asyncio.Event()
        self._refused, self._refusal = 0, CausewayError("")
        self._recorded: set[tuple[str, str]] = set()
        self._look()

    def state(self) -> FleetState:
        """Looks at memory only, unless another policy came into force since."""
        self._catch_up()
        taken, code, message = self._taken, "", ""
        if self._refused:
            code, message = self._refusal.code, self._refusal.message
        elif taken is not None and self._using != taken.version:
            code, message = "replaced", "another policy was put in force on the device since"
        return FleetState(
            edge=self._edge,
            group=self._group,
            seen=taken.version if taken else 0,
            using=self._using,
            refused=self._refused,
            digest=taken.digest if taken else "",
            code=code,
            message=message[:MAX_MESSAGE_CHARS],
        )

    def answered(self) -> None:
        self.answered_at = self._clock()

    def offered(self, version: int, signed: bytes, wake: Callable[[], None]) -> None:
        """The newest offer is judged; one that still waits makes way for it."""
        self.offered_version = version
        self._offer = (version, signed, wake)
        self._news.set()

    async def watch(self) -> None:
        while True:
            await self._news.wait()
            self._news.clear()
            if self._offer is None:
                continue
            (version, signed, wake), self._offer = self._offer, None
            self._catch_up()
            try:
                await self._judge(signed)
                self._refused = 0
            except CausewayError as error:
                self._refuse(version, error)
            except sqlite3.Error as error:
                self._refuse(version, Internal(f"the history of policies cannot be written: {error}"))
            wake()

    async def _judge(self, signed: bytes) -> None:
        """Take it, or raise why not."""
        found = await asyncio.to_thread(opened, signed, self._key)
        before = None
        while before is not self._center.current:  # what it is held against may change meanwhile
            before = self._center.current
            try:
                policy = await asyncio.to_thread(self._checked, found)
            except CausewayError as error:
                self._record(found, error)
                raise
        self._center.take(found, policy)
        self._taken = self._center.history.taken()
        self._look()
        structlog.get_logger("causeway.fleet").info("policy taken", version=found.version, why=found.terms.why)

    def _checked(self, found: FleetPolicy) -> Policy:
        if (broken := self._center.history.broken_at()) is not None:
            raise BrokenHistory(f"the device's record was changed at act {broken}", param="history")
        self._check_newer(found)
        if not found.terms.include(self._edge, self._group):
            raise NotForThisEdge("it is meant for other edges", param="groups")
        policy = usable(found.source, name=f"fleet version {found.version}")
        if (what := loosened(policy, self._center.own())) is not None:
            raise LoosensPrivacy(what, param=what.partition(":")[0])
        return policy

    def _check_newer(self, found: FleetPolicy) -> None:
        if self._taken is not None and found.version <= self._taken.version:
            same = "" if found.digest == self._taken.digest else ", and it was another one"
            raise StalePolicy(f"version {self._taken.version} was taken before{same}", param="version")

    def _refuse(self, version: int, error: CausewayError) -> None:
        self._refused, self._refusal = version, error
        log = structlog.get_logger("causeway.fleet")
        log.warning("policy refused", version=version, code=error.code, why=error.message)

    def _record(self, found: FleetPolicy, error: CausewayError) -> None:
        """Of what the fleet's key has signed: who cannot sign cannot fill the history."""
        if (found.digest, error.code) in self._recorded or len(self._recorded) >= MAX_RECORDED:
            return
        self._recorded.add((found.digest, error.code))
        why = f"fleet version {found.version}: {error.code}: {error.message}"
        self._center.history.act("refuse", 0, FLEET, why[:500])

    def _catch_up(self) -> None:
        if self._seen_here != self._center.current.version:
            self._look()

    def _look(self) -> None:
        """Which of the fleet's versions is in force. What was refused for the policy before may fit this one."""
        self._seen_here, self._using = self._center.current.version, 0
        with contextlib.suppress(sqlite3.Error):  # the connection asks, and has nothing to do with disks
            held = self._center.history.taken(self._seen_here) if self._seen_here else None
            self._using = held.version if held else 0
        if not isinstance(self._refusal, BadSignature):
            self._refused = 0
