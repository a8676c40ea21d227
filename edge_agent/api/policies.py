"""Administration of the policy over HTTP: check, replay, propose, try out, activate, roll back; and what it decided.

GET  /admin/policy                    what is in force and on trial, versions and acts, whether their chain holds
GET  /admin/policy/chain              the same of the whole chain, read anew
GET  /admin/policy/versions/{number}  one version's text, and how it differs from the one in force
POST /admin/policy/check              {source}: each mistake with its line; nothing is kept
POST /admin/policy/replay             {source, last}: what it would have done with the recorded decisions; one at a time
POST /admin/policy/propose            {source, why}: a new version, not in force
POST /admin/policy/canary             {version, percent, why, ...}: decides that share of the conversations
POST /admin/policy/activate           {version, why}
POST /admin/policy/rollback           {why}: ends the canary, else the version before
GET  /admin/decisions?after=N         recorded decisions after the N-th, the newest ones
"""

import asyncio
import dataclasses
import difflib
import sqlite3
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
from starlette.requests import Request

from edge_agent.api.administrators import AdminRoute
from edge_agent.daemon import Daemon
from edge_agent.policies.canary import FAILED_SHARE, LEAST, Canary, Limits
from edge_agent.policies.center import NoHistory, PolicyCenter
from edge_agent.policies.history import Version
from router.defaults import default_source
from router.document import MAX_BYTES
from router.observe import usable
from router.policy import InvalidPolicy, Policy
from router.records import Recorded, newest, read
from router.replay import plain, replay, said
from shared.administrators import Administrator
from shared.errors import BadRequest, NotFound, RateLimited

REPLAYED = 5000
LISTED = 200

Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
T = TypeVar("T")


class _Source(msgspec.Struct, forbid_unknown_fields=True):
    source: str


class _Candidate(msgspec.Struct, forbid_unknown_fields=True):
    source: str
    last: Annotated[int, msgspec.Meta(ge=1, le=100_000)] = REPLAYED


class _Proposal(msgspec.Struct, forbid_unknown_fields=True):
    source: str
    why: str


class _Activation(msgspec.Struct, forbid_unknown_fields=True):
    version: int
    why: str


class _Trial(msgspec.Struct, forbid_unknown_fields=True):
    version: int
    why: str
    percent: Annotated[float, msgspec.Meta(gt=0, le=100)]
    failed_share: Share = FAILED_SHARE
    first_token_s: Annotated[float, msgspec.Meta(gt=0)] | None = None
    least: Annotated[int, msgspec.Meta(ge=1, le=200)] = LEAST


class _Rollback(msgspec.Struct, forbid_unknown_fields=True):
    why: str


class PolicyAdministration:
    """The handlers. What reads files or decides thousands of times does it beside the event loop."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self._center: PolicyCenter = daemon.policy
        self._long = threading.Lock()

    def routes(self) -> Iterator[AdminRoute]:
        yield AdminRoute("GET", "/admin/policy", "read", self.overview)
        yield AdminRoute("GET", "/admin/policy/chain", "read", self.chain)
        yield AdminRoute("GET", "/admin/policy/versions/{number:int}", "read", self.version)
        yield AdminRoute("POST", "/admin/policy/check", "read", self.check)
        yield AdminRoute("POST", "/admin/policy/replay", "read", self.replay)
        yield AdminRoute("POST", "/admin/policy/propose", "propose", self.propose)
        yield AdminRoute("POST", "/admin/policy/canary", "activate", self.canary)
        yield AdminRoute("POST", "/admin/policy/activate", "activate", self.activate)
        yield AdminRoute("POST", "/admin/policy/rollback", "activate", self.roll_back)
        yield AdminRoute("GET", "/admin/decisions", "read", self.decisions)

    async def overview(self, _: Request, who: Administrator) -> dict[str, Any]:
        current, canary = self._center.current, self._center.canary
        return {
            "current": {
                "version": current.version,
                "name": current.name,
                "mode": current.policy.mode,
                "fingerprint": current.policy.fingerprint,
                "source": self._source(),
            },
            "canary": None if canary is None else _canary(canary),
            "fleet": self._fleet(),
            "you": dataclasses.asdict(who),
            **await asyncio.to_thread(self._history),
        }

    async def chain(self, _: Request, __: Administrator) -> dict[str, Any]:
        def broken_at() -> int | None:
            return self._center.history.broken_at(whole=True)

        return {"broken_at": await asyncio.to_thread(self._alone, broken_at)}

    async def version(self, request: Request, _: Administrator) -> dict[str, Any]:
        found = await asyncio.to_thread(self._center.history.version, request.path_params["number"])
        source = found.source.decode(errors="replace")
        return {**_listed(found), "source": source, "diff": await asyncio.to_thread(self._diff, source)}

    async def check(self, request: Request, _: Administrator) -> dict[str, Any]:
        asked = await _body(request, _Source)
        policy, problems = await asyncio.to_thread(_checked, asked.source)
        diff = await asyncio.to_thread(self._diff, asked.source)
        summary = None
        if policy is not None:
            rules = len(policy.rules)
            summary = f"mode {policy.mode}, {rules} rule{'' if rules == 1 else 's'}, fingerprint {policy.fingerprint}"
        return {"valid": policy is not None, "problems": problems, "summary": summary, "diff": diff}

    async def replay(self, request: Request, _: Administrator) -> dict[str, Any]:
        asked = await _body(request, _Candidate)
        journal = self._journal()

        def compare() -> dict[str, Any]:
            comparison = replay(read(journal, limit=asked.last), usable(asked.source, name="policy"))
            return {**plain(comparison), "would": said(comparison)}

        try:
            return await asyncio.to_thread(self._alone, compare)
        except (OSError, sqlite3.Error) as error:
            raise NotFound(f"no recorded decisions: {error}", source="edge") from error

    async def propose(self, request: Request, who: Administrator) -> dict[str, Any]:
        asked = await _body(request, _Proposal)
        proposed = await asyncio.to_thread(self._center.propose, asked.source, who.name, asked.why)
        return {"version": proposed.number}

    async def canary(self, request: Request, who: Administrator) -> dict[str, Any]:
        asked = await _body(request, _Trial)
        limits = Limits(asked.failed_share, asked.first_token_s, asked.least)
        self._center.try_out(asked.version, asked.percent, limits, who.name, asked.why)
        return await self.overview(request, who)

    async def activate(self, request: Request, who: Administrator) -> dict[str, Any]:
        asked = await _body(request, _Activation)
        self._center.activate(asked.version, who.name, asked.why)
        return await self.overview(request, who)

    async def roll_back(self, request: Request, who: Administrator) -> dict[str, Any]:
        asked = await _body(request, _Rollback)
        self._center.roll_back(who.name, asked.why)
        return await self.overview(request, who)

    async def decisions(self, request: Request, _: Administrator) -> dict[str, Any]:
        after = request.query_params.get("after", "0")
        if not after.isdecimal() or len(after) > 18:
            raise BadRequest("after must be a number", param="after", source="edge")
        journal = self._journal()
        try:
            found = await asyncio.to_thread(lambda: list(newest(journal, after=int(after), limit=LISTED)))
        except (OSError, sqlite3.Error) as error:
            raise NotFound(f"no recorded decisions: {error}", source="edge") from error
        return {"decisions": [_decision(number, record) for number, record in found]}

    def _alone(self, work: Callable[[], T]) -> T:
        """What may take seconds, in a thread, one at a time: also when who asked has left. Raises RateLimited."""
        if not self._long.acquire(blocking=False):
            raise RateLimited("one replay or check of the chain at a time", source="edge", retry_after=1.0)
        try:
            return work()
        finally:
            self._long.release()

    def _fleet(self) -> dict[str, Any] | None:
        follower = self._daemon.follower
        return None if follower is None else msgspec.structs.asdict(follower.state())

    def _history(self) -> dict[str, Any]:
        try:
            history = self._center.history
        except NoHistory as error:
            return {"versions": [], "acts": [], "broken_at": None, "unavailable": error.message}
        return {
            "versions": [_listed(version) for version in history.versions()],
            "acts": [dataclasses.asdict(act) for act in history.acts()],
            "broken_at": history.broken_at(),
            "unavailable": None,
        }

    def _diff(self, source: str) -> str:
        """Of what is no policy for its size, none."""
        if len(source) > MAX_BYTES:
            return ""
        before = self._source()
        return "\n".join(
            difflib.unified_diff(before.splitlines(), source.splitlines(), "in force", "candidate", lineterm="")
        )

    def _source(self) -> str:
        """The text in force; the built-in one's for a policy that nobody wrote."""
        return (self._center.current.source or default_source()).decode(errors="replace")

    def _journal(self) -> Path:
        if self._daemon.journal is None:
            raise NotFound("decisions are not recorded here", source="edge")
        return self._daemon.journal.path


async def _body(request: Request, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(await request.body(), type=kind)
    except msgspec.ValidationError as error:
        what, _, where = str(error).partition(" - at `$.")
        field = where.rstrip("`")
        raise BadRequest(f"{field}: {what}" if field else what, param=field or None, source="edge") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise BadRequest("the body is not JSON", source="edge") from None


def _checked(source: str) -> tuple[Policy | None, list[dict[str, Any]]]:
    try:
        return usable(source, name="policy"), []
    except InvalidPolicy as invalid:
        return None, [dataclasses.asdict(problem) for problem in invalid.problems]


def _listed(version: Version) -> dict[str, Any]:
    return {name: getattr(version, name) for name in ("number", "at", "who", "why", "fingerprint")}


def _canary(canary: Canary) -> dict[str, Any]:
    return {
        "version": canary.version,
        "percent": canary.percent,
        "limits": dataclasses.asdict(canary.limits),
        "ended": len(canary.failed),
        "failed": sum(canary.failed),
    }


def _decision(number: int, record: Recorded) -> dict[str, Any]:
    request, outcome = record.request, record.outcome
    return {
        "number": number,
        "at": record.at,
        "model": request.model,
        "label": request.label,
        "tenant": request.tenant,
        "prompt_tokens": request.prompt_tokens,
        "difficulty": request.difficulty,
        "target": record.target,
        "rule": record.rule,
        "reason": record.reason,
        "redact": record.redact,
        "refused": record.refused,
        "judged": None if record.judged is None else record.judged.said,
        "policy": record.policy,
        "currency": record.price and record.price.currency,
        "shadow": None if record.shadow is None else record.shadow.target or record.shadow.refused,
        **dataclasses.asdict(outcome),
    }
