"""What tests of the cache ask for and keep."""

from dataclasses import replace

import msgspec
from edge_sides import LAST, ask

from edge_agent.cache.base import Entry, Query, Scope
from edge_agent.cache.key import key_of
from router.clauses import CacheRules
from shared.schemas import ChatRequest, Delta, Label, Sampling

SCOPE = Scope(tenant="local", label="free", target="edge", model="small", weights="abc", context_length=2048)
NOW = 1_800_000_000.0


class Clock:
    def __init__(self, now: float = NOW) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def greedy(content: str = "Hello", **fields: str) -> ChatRequest:
    return msgspec.structs.replace(ask(content, **fields), sampling=Sampling(temperature=0))


def query(
    content: str = "Hello", *, tenant: str = "local", label: Label = "free", rules: CacheRules | None = None
) -> Query:
    request, scope = greedy(content, label=label), replace(SCOPE, tenant=tenant, label=label)
    return Query(key_of(request, scope), request, scope, rules or CacheRules())


def entry(text: str = "an answer", *, created: float = NOW, ttl_s: float = 86_400.0) -> Entry:
    deltas = (Delta(text=text, tokens=2), LAST)
    return Entry(deltas=deltas, model="small", target="edge", created=created, ttl_s=ttl_s)
