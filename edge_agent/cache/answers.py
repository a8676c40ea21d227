"""The cache as the Agent sees it: an answer from what was remembered, from an identical request in flight, or made anew
and remembered.

It never changes who answers: it is asked with the side and the model that were decided on, and knows only what these
have said before, to the same tenant, under the same label.
"""

import dataclasses
import hashlib
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any, Final

import msgspec

from edge_agent.backends.base import is_empty
from edge_agent.cache.base import Entry, Query, Scope
from edge_agent.cache.control import Control
from edge_agent.cache.flight import Flights, Generate
from edge_agent.cache.key import key_of
from edge_agent.cache.store import Found, Store
from router.clauses import CacheRules
from shared.errors import NotCached
from shared.schemas import Cached, ChatRequest, Delta, Route, ToolPiece

PIECE_CHARS: Final = 256
"""Pieces of text are joined up to this length before they are kept: so a hit streams, in fewer pieces."""
BYPASS: Final = Cached(use="bypass")


class AnswerCache:
    """`secret`: see `key_of`; `runtime`: see `Scope`. `clock` counts in seconds since 1970."""

    def __init__(
        self,
        store: Store,
        *,
        flights: Flights | None = None,
        secret: bytes = b"",
        runtime: str = "",
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._flights = flights or Flights()
        self._secret = secret
        self._runtime = runtime
        self._clock = clock
        self._uses: dict[str, int] = {"hit": 0, "shared": 0, "miss": 0, "bypass": 0}

    async def answer(
        self, request: ChatRequest, scope: Scope, rules: CacheRules, control: Control, generate: Generate
    ) -> AsyncGenerator[Delta, None]:
        """What `generate` would answer. The first delta that is not empty and the last one say in their route what the
        cache had to do with it. Raises NotCached, and what `generate` raises."""
        deltas, cached, model = await self._source(request, scope, rules, control, generate)
        self._uses[cached.use] += 1
        began = False
        async with aclosing(deltas):
            async for delta in deltas:
                if cached.saved and delta.tool_calls:
                    delta = _with_own_calls(delta, request.id)
                if not is_empty(delta) and (not began or delta.finish_reason):
                    began = True
                    delta = _said(delta, Route(target=scope.target, reason="", model=model, cached=cached))
                yield delta

    async def clear(self) -> None:
        await self._store.clear()

    async def aclose(self) -> None:
        await self._store.aclose()

    def stats(self) -> dict[str, Any]:
        return {"requests": dict(self._uses), "in_flight": len(self._flights), "layers": self._store.stats()}

    async def _source(
        self, request: ChatRequest, scope: Scope, rules: CacheRules, control: Control, generate: Generate
    ) -> tuple[AsyncGenerator[Delta, None], Cached, str]:
        """Where the answer comes from, and the model that made it where that is no news to come."""
        if not _keeps(request, scope, rules, control):
            if control.only_if_cached:
                raise NotCached("such an answer is not kept", param="cache-control")
            return generate(), BYPASS, ""
        if scope.target == "edge":
            scope = dataclasses.replace(scope, runtime=self._runtime)
        query = Query(key_of(request, scope, secret=self._secret), request, scope, rules, control.max_age_s)
        shared = None if control.no_cache or request.deadline_s else (query.key, request.priority)
        found = None if control.no_cache else await self._found(query, shared)
        if found is not None:
            hit = Cached(use="hit", layer=found.layer, age_s=found.age_s)
            return _replayed(found.entry), hit, found.entry.model
        joins = self._flights.joinable(shared)
        if control.only_if_cached and not joins:
            raise NotCached("no answer to this is kept", param="cache-control")

        async def remember(deltas: tuple[Delta, ...]) -> None:
            await self._remember(query, deltas)

        return self._flights.follow(shared, generate, remember), Cached(use="shared" if joins else "miss"), ""

    async def _found(self, query: Query, shared: object) -> Found | None:
        """None also where an identical request is in flight, or came to be while the slower layers were asked. One that
        was answered meanwhile is in the fastest."""
        if self._flights.joinable(shared):
            return None
        found = await self._store.get(query)
        if found is not None or self._flights.joinable(shared):
            return found
        return await self._store.quick(query)

    async def _remember(self, query: Query, deltas: tuple[Delta, ...]) -> None:
        """Answers that are whole: those cut off by the caller's leaving, or by an error, have no such end."""
        if deltas[-1].finish_reason not in ("stop", "length", "tool_calls"):
            return
        model = next((delta.route.model for delta in deltas if delta.route and delta.route.model), query.scope.model)
        entry = Entry(
            deltas=_joined(deltas),
            model=model,
            target=query.scope.target,
            created=self._clock(),
            ttl_s=query.rules.ttl_s,
        )
        await self._store.put(query, entry)


def _keeps(request: ChatRequest, scope: Scope, rules: CacheRules, control: Control) -> bool:
    """Whether this answer may be looked for, shared and kept."""
    if not rules.enabled or control.no_store or (scope.label == "edge_only" and not rules.edge_only):
        return False
    return not by_chance(request) or rules.sampled or control.max_age_s is not None


def by_chance(request: ChatRequest) -> bool:
    """Asked again, it would be answered otherwise, and that is wanted."""
    return request.sampling.temperature > 0 and request.sampling.seed is None


async def _replayed(entry: Entry) -> AsyncGenerator[Delta, None]:
    for delta in entry.deltas:
        if delta.usage is None:
            yield delta
        else:
            usage = msgspec.structs.replace(delta.usage, cached_tokens=delta.usage.prompt_tokens)
            yield msgspec.structs.replace(delta, usage=usage)


def _said(delta: Delta, route: Route) -> Delta:
    """Who answered knows best which model it ran."""
    model = (delta.route.model if delta.route else "") or route.model
    return msgspec.structs.replace(delta, route=msgspec.structs.replace(route, model=model))


def _with_own_calls(delta: Delta, request_id: str) -> Delta:
    """A call's id belongs to one conversation: another request gets ids of its own, the same ones each time."""
    calls = tuple(_own_call(piece, request_id) for piece in delta.tool_calls)
    return msgspec.structs.replace(delta, tool_calls=calls)


def _own_call(piece: ToolPiece, request_id: str) -> ToolPiece:
    if piece.id is None:
        return piece
    digest = hashlib.sha256(f"{request_id}\0{piece.id}".encode()).hexdigest()
    return msgspec.structs.replace(piece, id=f"call_{digest[:24]}")


def _joined(deltas: tuple[Delta, ...]) -> tuple[Delta, ...]:
    """As they are kept: without routes, short pieces of text joined."""
    kept: list[Delta] = []
    for delta in (msgspec.structs.replace(delta, route=None) for delta in deltas if not is_empty(delta)):
        if kept and len(kept[-1].text) < PIECE_CHARS and _is_text(kept[-1]) and _is_text(delta):
            kept[-1] = Delta(
                text=kept[-1].text + delta.text,
                tokens=kept[-1].tokens + delta.tokens,
                logprobs=kept[-1].logprobs + delta.logprobs,
            )
        else:
            kept.append(delta)
    return tuple(kept)


def _is_text(delta: Delta) -> bool:
    return msgspec.structs.replace(delta, text="", tokens=0, logprobs=()) == Delta()
