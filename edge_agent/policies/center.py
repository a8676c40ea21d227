"""The policy in force, and how it comes to be: from a file that is followed, or as a version that somebody activates.

Whichever came last holds, also after a restart. A request keeps the policy that it was decided by; another one takes
its place in one assignment. Without a history (the state folder cannot be written) the file alone decides.
"""

import sqlite3
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Final

import structlog

from edge_agent.policies.canary import WINDOW, Canary, Limits
from edge_agent.policies.history import History, HistoryFull, Version
from edge_agent.policy_file import PolicyFile, Snapshot
from router.defaults import default_policy
from router.observe import bucket, usable
from router.policy import Policy, parse
from shared.errors import BadRequest, CausewayError, RequestConflict
from shared.fleet import FleetPolicy
from shared.schemas import ChatRequest
from shared.telemetry import RequestFinished

FILE, GUARD, FLEET = "file", "guard", "fleet"
"""Who acts where no person does."""
MAX_ON_TRIAL: Final = 4096
MAX_WHY: Final = 500


class NoHistory(CausewayError):
    """Versions are kept in the state folder, which cannot be written."""

    code, status = "no_history", 503


class PolicyCenter:
    """Asked for the policy of each request. As a Listener it watches how those on trial end."""

    def __init__(
        self, path: Path | None, history: History | None, *, changed: Callable[[Snapshot], None] | None = None
    ) -> None:
        """Raises InvalidPolicy for a file that holds none. `changed` is told of each policy that comes into force."""
        self._file = PolicyFile(path, self._follow)
        self._history = history
        self._changed = changed
        self._on_trial: OrderedDict[str, int] = OrderedDict()
        """Requests under way that a policy on trial, or on probation, decided: its version."""
        self.canary: Canary | None = None
        self.probation: Canary | None = None
        """What a fleet put in force is watched for its first requests: nobody here has looked at it."""
        self.current = self._file.current
        self._begin(path is not None)

    @property
    def policy(self) -> Policy:
        return self.current.policy

    @property
    def failures(self) -> int:
        return self._file.failures

    @property
    def history(self) -> History:
        """Raises NoHistory."""
        if self._history is None:
            raise NoHistory("the state folder cannot be written, so there are no versions", source="edge")
        return self._history

    def policy_for(self, request: ChatRequest) -> Policy:
        """The policy in force, or the one on trial for its share of the conversations."""
        watched = self.canary
        if watched is None or not watched.takes(bucket(request)):
            watched = self.probation
        if watched is None:
            return self.policy
        self._on_trial[request.id] = watched.version
        if len(self._on_trial) > MAX_ON_TRIAL:
            self._on_trial.popitem(last=False)
        return watched.policy

    def __call__(self, event: RequestFinished, /) -> None:
        version = self._on_trial.pop(event.request_id, None)
        if self.canary is not None and version == self.canary.version:
            self.canary = self.canary.after(event)
            if (breach := self.canary.breach()) is not None:
                self._end_canary(GUARD, breach)
        elif self.probation is not None and version == self.probation.version:
            self.probation = self.probation.after(event)
            if (breach := self.probation.breach()) is not None:
                self._withdraw(breach)
            elif len(self.probation.failed) >= WINDOW:
                self.probation = None

    def propose(self, source: str, who: str, why: str) -> Version:
        """Keep a policy as a new version, which is not yet in force. Raises InvalidPolicy."""
        _check_why(why)
        policy = usable(source, name="policy")
        return self.history.propose(source.encode(), policy.fingerprint, who, why)

    def activate(self, number: int, who: str, why: str) -> Snapshot:
        """Put a version in force, for everybody. Raises NotFound for a version that does not exist, and InvalidPolicy
        for one that cannot be kept here."""
        _check_why(why)
        snapshot = self._usable(number)
        self.history.act("activate", number, who, why)
        self._put_in_force(snapshot)
        return snapshot

    def try_out(self, number: int, percent: float, limits: Limits, who: str, why: str) -> None:
        """Let a version decide a share of the conversations; a canary that is there makes way for it."""
        _check_why(why)
        snapshot = self._usable(number)
        if number == self.current.version:
            raise RequestConflict(f"version {number} is in force already", param="version", source="edge")
        self.history.act("canary", number, who, why, percent)
        self.canary = Canary(number, snapshot.policy, percent, limits)

    def roll_back(self, who: str, why: str) -> Snapshot:
        """Withdraw the canary if there is one, else put the version before the current one in force."""
        _check_why(why)
        if self.canary is not None:
            self._end_canary(who, why)
            return self.current
        return self._go_back(who, why)

    def take(self, found: FleetPolicy, policy: Policy) -> Snapshot:
        """Put the fleet's policy in force: `policy` is what its text says. Raises NoHistory or HistoryFull."""
        why = f"fleet version {found.version}: {found.terms.why}"
        version = self.history.take(found.version, found.digest, found.source, policy.fingerprint, FLEET, why)
        snapshot = Snapshot(policy, f"version {version.number}", found.source, version.number)
        self._put_in_force(snapshot)
        self.probation = Canary(version.number, policy, 100.0)
        return snapshot

    def own(self) -> Policy:
        """What this device's own administrator, or its file, put in force last: what no fleet's policy may loosen."""
        number = self.history.in_force_besides(FLEET)
        return default_policy() if number is None else self._kept(number).policy

    async def reload(self) -> Snapshot:
        """Read the file again, if there is one. Raises InvalidPolicy, and then what is in force stays."""
        await self._file.reload()
        return self.current

    async def watch(self) -> None:
        await self._file.watch()

    def _begin(self, has_file: bool) -> None:
        """What came last holds: the file if it is another than the last time, else the version last put in force."""
        if self._history is None:
            return
        if has_file:
            known = self._history.last_of(FILE)
            if known is None or known.source != self._file.current.source:
                self._follow(self._file.current)
                return
        number = self._history.in_force()
        if number is not None:
            self.current = self._kept(number)
        elif self._history.damaged and not has_file:
            self._follow(_safe("the history of policies was damaged"), GUARD)

    def _kept(self, number: int) -> Snapshot:
        """A version of before the restart. One that can no longer be read must not give way to a laxer one."""
        try:
            return self._snapshot(number)
        except CausewayError as error:
            structlog.get_logger("causeway.policy").error("version unreadable", version=number, error=error.message)
            return _safe(f"version {number} cannot be read")

    def _follow(self, snapshot: Snapshot, who: str = FILE) -> None:
        """The file's content has become another: a version of its own, in force at once."""
        if self._history is not None:
            try:
                version = self._history.propose(snapshot.source, snapshot.policy.fingerprint, who, snapshot.name)
                self._history.act("activate", version.number, who, snapshot.name)
                snapshot = snapshot.numbered(version.number)
            except (sqlite3.Error, HistoryFull) as error:
                structlog.get_logger("causeway.policy").error("not kept in the history", error=str(error))
        self._put_in_force(snapshot)

    def _put_in_force(self, snapshot: Snapshot) -> None:
        self.current, self.canary, self.probation = snapshot, None, None
        if self._changed is not None:
            self._changed(snapshot)

    def _go_back(self, who: str, why: str) -> Snapshot:
        snapshot = self._snapshot(self.history.before(self.current.version))
        self.history.act("rollback", snapshot.version, who, why)
        self._put_in_force(snapshot)
        return snapshot

    def _withdraw(self, breach: str) -> None:
        """What a fleet put in force did not keep what is agreed: the version before it holds again."""
        version, log = self.current.version, structlog.get_logger("causeway.policy")
        self.probation = None
        try:
            self._go_back(GUARD, breach)
        except (CausewayError, sqlite3.Error) as error:
            log.error("fleet's policy not withdrawn", version=version, why=breach, error=str(error))
        else:
            log.warning("fleet's policy withdrawn", version=version, why=breach)

    def _end_canary(self, who: str, why: str) -> None:
        canary, self.canary = self.canary, None
        if canary is not None:
            self.history.act("end_canary", canary.version, who, why)
            structlog.get_logger("causeway.policy").warning("canary withdrawn", version=canary.version, why=why)

    def _usable(self, number: int) -> Snapshot:
        """What was proposed may have become impossible since."""
        snapshot = self._snapshot(number)
        if snapshot.source:
            usable(snapshot.source, name=snapshot.name)
        return snapshot

    def _snapshot(self, number: int) -> Snapshot:
        """Raises NotFound, or InvalidPolicy for a version that this release reads otherwise."""
        if number == 0:
            return Snapshot(default_policy(), "default")
        version = self.history.version(number)
        return Snapshot(parse(version.source, name=f"version {number}"), f"version {number}", version.source, number)


def _safe(why: str) -> Snapshot:
    """Nothing leaves the device until somebody has put a policy in force."""
    source = "mode: only_edge\n"
    return Snapshot(parse(source), f"only_edge: {why}", source.encode())


def _check_why(why: str) -> None:
    if not why.strip() or len(why) > MAX_WHY:
        raise BadRequest(f"say why, in at most {MAX_WHY} characters", param="why", source="edge")
