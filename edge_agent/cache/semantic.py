"""The approximate layer: the answer to a question that says the same in other words. Off unless the policy says so.

Only the last message may differ: everything before it, every parameter, tenant, label and model must be the same. The
nearest earlier questions are found by their vectors; the guards (`guards.py`) then decide, and whatever they cannot
read matches nothing. No answer lies here: a row names the key under which an exact layer has it.
"""

import asyncio
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final, Protocol

import msgspec

from edge_agent.cache.base import ApproximateStats, Entry, Key, Layer, Query
from edge_agent.cache.guards import Reading, difference, read
from edge_agent.cache.key import key_of
from edge_agent.cache.neighbours import Neighbours, Vector
from edge_agent.embedding.model import Vectors
from shared.errors import CausewayError
from shared.schemas import ModelCard

ROWS: Final = 10_000
CANDIDATES: Final = 8
"""How many of the nearest the guards look at."""
EMBED_S: Final = 1.0
PENDING: Final = 64
"""Answers whose questions wait for their vectors; more are not remembered here."""
DOUBT_S: Final = 120.0
"""Asked anew so soon after an answer from here, that answer was perhaps not what was asked for."""
SERVED: Final = 1024


class Embedding(Protocol):
    async def embed(self, texts: Sequence[str], /) -> Vectors: ...

    def model_card(self) -> ModelCard | None: ...


@dataclass(frozen=True, slots=True)
class _Question:
    text: str
    reading: Reading
    group: bytes
    """Of all questions that everything else is the same of."""


@dataclass(frozen=True, slots=True)
class _Known:
    key: Key
    reading: Reading


class SemanticLayer(Layer):
    """`behind`: the exact layers, from the fastest to the slowest."""

    name = "semantic"
    exact = False

    def __init__(
        self,
        embedding: Embedding,
        behind: Sequence[Layer],
        *,
        rows: int = ROWS,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._embedding = embedding
        self._behind = tuple(behind)
        self._clock, self._wall_clock = clock, wall_clock
        self._known: Neighbours[_Known] = Neighbours(rows)
        self._served: OrderedDict[bytes, float] = OrderedDict()
        self._pending: set[asyncio.Task[None]] = set()
        self._refused: Counter[str] = Counter()
        self._hits = self._suspected = self._errors = 0

    @property
    def ttl_s(self) -> float:
        return max((layer.ttl_s for layer in self._behind), default=0.0)

    def takes(self, query: Query) -> bool:
        """Plain chats that the policy permits. Not what must follow a form, where each word of the question counts."""
        request, rules = query.request, query.rules
        permitted = rules.semantic is not None and (rules.edge_only or query.scope.label != "edge_only")
        plain = not (request.tools or request.grammar or request.prompt) and request.messages[-1].role == "user"
        return permitted and plain and self._embedding.model_card() is not None

    async def get(self, query: Query) -> Entry | None:
        question, rules = _question(query), query.rules.semantic
        if question is None or rules is None or not self._known.has(question.group):
            return None
        vector = await self._vector(question.text)
        if vector is None:
            return None
        for name, known in self._known.nearest(question.group, vector, rules.threshold, CANDIDATES):
            guard = difference(question.reading, known.reading)
            if guard is not None:
                self._refused[guard] += 1
            elif (entry := await self._answer(replace(query, key=known.key))) is None:
                self._known.drop(name)
            else:
                self._known.used(name)
                self._note(query.key)
                return entry
        return None

    async def put(self, query: Query, entry: Entry) -> None:  # noqa: ARG002
        self._doubt(query.key)
        question = _question(query)
        if question is not None and len(self._pending) < PENDING:
            task = asyncio.create_task(self._remember(query.key, question))
            self._pending.add(task)
            task.add_done_callback(self._pending.discard)

    async def settle(self) -> None:
        """Returns when every question put so far is remembered."""
        await asyncio.gather(*self._pending, return_exceptions=True)

    async def clear(self) -> None:
        await self._cancel()
        self._known.clear()
        self._served.clear()

    async def aclose(self) -> None:
        await self.clear()

    def stats(self) -> ApproximateStats:
        return ApproximateStats(
            entries=len(self._known),
            size=self._known.size,
            evictions=self._known.evictions,
            errors=self._errors,
            suspected=self._suspected,
            false_hit_rate=self._suspected / self._hits if self._hits else 0.0,
            refused=dict(self._refused),
        )

    async def _vector(self, text: str) -> Vector | None:
        try:
            async with asyncio.timeout(EMBED_S):
                vectors = await self._embedding.embed([text])
        except (CausewayError, TimeoutError):
            self._errors += 1
            return None
        vector: Vector = vectors[0]
        return vector

    async def _remember(self, key: Key, question: _Question) -> None:
        vector = await self._vector(question.text)
        if vector is not None:
            known = _Known(key, question.reading)
            self._known.add(key.raw, vector, known, group=question.group, owner=key.tenant)

    async def _answer(self, query: Query) -> Entry | None:
        """From the fastest exact layer that has it and may still serve it."""
        for layer in self._behind:
            if layer.takes(query) and (entry := await layer.get(query)) is not None:
                return entry if self._wall_clock() - entry.created <= layer.ttl_s else None
        return None

    def _note(self, key: Key) -> None:
        self._hits += 1
        self._served[key.raw] = self._clock()
        self._served.move_to_end(key.raw)
        if len(self._served) > SERVED:
            self._served.popitem(last=False)

    def _doubt(self, key: Key) -> None:
        """What is put was not taken from here: whoever was served it just now has asked for another answer."""
        served = self._served.pop(key.raw, None)
        if served is not None and self._clock() - served <= DOUBT_S:
            self._suspected += 1

    async def _cancel(self) -> None:
        tasks = list(self._pending)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _question(query: Query) -> _Question | None:
    """None for a question that cannot be read for sure."""
    *before, last = query.request.messages
    reading = read(last.content)
    if reading is None:
        return None
    blank = msgspec.structs.replace(last, content="")
    rest = msgspec.structs.replace(query.request, messages=(*before, blank))
    return _Question(last.content, reading, key_of(rest, query.scope).raw)
