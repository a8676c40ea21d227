"""All executions of one server, found again by request id: what outlives a connection.

This is what makes resume possible, and a second OPEN of the same request harmless. Bounded per tenant and in all;
nothing here does I/O or reads a clock.
"""

import hmac
from collections.abc import Callable

from shared.errors import Overloaded, RateLimited, RequestConflict, UnknownRequest, Unrecoverable
from shared.executions import Attachment, Execution, Reader, Rules


class _Tenant:
    """One tenant's executions by request id, and the hashes of those that are over and forgotten, oldest first."""

    def __init__(self) -> None:
        self.live: dict[str, Execution] = {}
        self.over: dict[str, tuple[bytes, float]] = {}


class Registry:
    """All executions of one server life (`epoch`). One per server; every connection's session shares it."""

    def __init__(self, epoch: str, rules: Rules, new_token: Callable[[], str]) -> None:
        self.epoch = epoch
        self.rules = rules
        self.draining = False
        self.changed = False
        """Whether `next_deadline` may have changed since it was last asked."""
        self._new_token = new_token
        self._tenants: dict[str, _Tenant] = {}

    def __len__(self) -> int:
        return sum(len(tenant.live) for tenant in self._tenants.values())

    def executions(self) -> list[Execution]:
        return [execution for tenant in self._tenants.values() for execution in tenant.live.values()]

    def find(self, tenant: str, request_id: str, sha256: bytes) -> Execution | None:
        """The execution that this request already has. Raises RequestConflict, or Unrecoverable if it is forgotten."""
        kept = self._tenants.get(tenant)
        if kept is None:
            return None
        execution = kept.live.get(request_id)
        known = execution.sha256 if execution else kept.over[request_id][0] if request_id in kept.over else None
        if known is not None and known != sha256:
            raise RequestConflict("this request id was used with another body", param="id")
        if known is not None and execution is None:
            raise Unrecoverable("this request was answered and its output is no longer held", param="id")
        return execution

    def check_room(self, tenant: str) -> None:
        """Raises Overloaded or RateLimited if no new execution may start."""
        if self.draining:
            raise Overloaded("the server is draining", retry_after=1.0)
        kept = self._tenants.get(tenant)
        if kept is not None and len(kept.live) >= self.rules.max_per_tenant and not self._evict(kept):
            raise RateLimited(f"at most {self.rules.max_per_tenant} requests at once", retry_after=1.0)
        if len(self) >= self.rules.max_executions:
            raise Overloaded("the server holds as many requests as it can", retry_after=1.0)

    def create(self, tenant: str, request_id: str, sha256: bytes) -> Execution:
        self.check_room(tenant)
        execution = Execution(tenant, request_id, sha256, self.rules)
        self._tenants.setdefault(tenant, _Tenant()).live[request_id] = execution
        return execution

    def resumable(self, tenant: str, request_id: str, token: str) -> Execution:
        """Raises UnknownRequest: with one text, whether there is no such request or the token is wrong."""
        kept = self._tenants.get(tenant)
        execution = kept.live.get(request_id) if kept else None
        tokens = execution.tokens if execution else ("",)
        known = any(hmac.compare_digest(token, one) for one in tokens)
        if execution is None or not known:
            raise UnknownRequest("no such request")
        execution.tokens = (token,)
        return execution

    def attach(self, execution: Execution, reader: Reader, sid: int, after: int, window: int, now: float) -> Attachment:
        """Give the execution a new reader; the old one, if any, is fenced off. Rotates the token."""
        old, execution.attaches = execution.attached, execution.attaches + 1
        execution.tokens = (self._new_token(), *execution.tokens[:1])
        waiting = now if execution.last_seq > after else None
        new = Attachment(execution, reader, sid, execution.attaches, after, after + window, waiting)
        execution.attached, execution.acked = new, after
        if old is not None:
            old.reader.fenced(old.sid)
        execution.on_room()
        return new

    def detach(self, attachment: Attachment, now: float) -> None:
        execution = attachment.execution
        if execution.attached is attachment:
            execution.attached = None
            execution.idle_since = now
            self.changed = True

    def retire(self, execution: Execution, now: float) -> None:
        """Forget the output; remember, for the resume time, that this request was answered."""
        execution.attached = None
        self.changed = True
        kept = self._tenants.get(execution.tenant)
        if kept is None or kept.live.pop(execution.request_id, None) is None:
            return
        while len(kept.over) >= 8 * self.rules.max_per_tenant:
            del kept.over[next(iter(kept.over))]
        kept.over[execution.request_id] = (execution.sha256, now + self.rules.limits.resume_ttl)

    def next_deadline(self) -> float | None:
        self.changed = False
        times = [self._expiry(execution) for execution in self.executions() if execution.attached is None]
        times += [next(iter(kept.over.values()))[1] for kept in self._tenants.values() if kept.over]
        return min(times, default=None)

    def tick(self, now: float) -> list[Execution]:
        """Let time pass. Returns the executions that nobody came back for: already ended, to be stopped."""
        abandoned = []
        for execution in self.executions():
            if execution.attached is not None or now < self._expiry(execution):
                continue
            if execution.ended:
                self.retire(execution, now)
            else:
                grace = self.rules.orphan_grace
                execution.fail(Unrecoverable(f"abandoned: no client for {grace:g} s"), now, "abandoned")
                abandoned.append(execution)
        self._forget(now)
        return abandoned

    def _expiry(self, execution: Execution) -> float:
        wait = self.rules.limits.resume_ttl if execution.ended else self.rules.orphan_grace
        return execution.idle_since + wait

    def _forget(self, now: float) -> None:
        for name, kept in list(self._tenants.items()):
            for request_id in [key for key, (_, until) in kept.over.items() if until <= now]:
                del kept.over[request_id]
            if not kept.live and not kept.over:
                del self._tenants[name]

    def _evict(self, kept: _Tenant) -> bool:
        """Make room: give up the longest-finished output that nobody is reading."""
        idle = [one for one in kept.live.values() if one.ended and one.attached is None]
        if idle:
            oldest = min(idle, key=lambda one: one.idle_since)
            self.retire(oldest, oldest.idle_since)
        return bool(idle)
