"""The layers as one: asked from the fastest to the slowest; what a slower one had is copied into the faster ones."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import structlog

from edge_agent.cache.base import Entry, Layer, Query

CLOCK_SLACK_S: Final = 60.0
"""An answer may be this much from the future: clocks of devices that share a layer differ, and are set right."""


@dataclass(frozen=True, slots=True)
class Found:
    entry: Entry
    layer: str
    age_s: float


@dataclass(slots=True)
class _Counts:
    hits: int = 0
    misses: int = 0
    failures: int = 0


class Store:
    """What was remembered, wherever it lies. Never raises: a layer that fails is as good as one that has nothing."""

    def __init__(self, layers: Sequence[Layer], *, clock: Callable[[], float] = time.time) -> None:
        self._layers = tuple(layers)
        self._counts = {layer.name: _Counts() for layer in layers}
        self._clock = clock

    async def get(self, query: Query) -> Found | None:
        """The fastest layer's answer that is neither too old for its layer, nor for itself, nor for the caller."""
        passed: list[Layer] = []
        for layer in self._layers:
            if not layer.takes(query):
                continue
            found = await self._asked(layer, query)
            if found is None:
                passed.append(layer)
                continue
            if layer.exact:
                for faster in passed:
                    await self._put(faster, query, found.entry)
            return found
        return None

    async def quick(self, query: Query) -> Found | None:
        """Of the first layer alone, and not counted: for a second look."""
        for layer in self._layers[:1]:
            return await self._fresh(layer, query) if layer.takes(query) else None
        return None

    async def put(self, query: Query, entry: Entry) -> None:
        for layer in self._layers:
            if layer.takes(query):
                await self._put(layer, query, entry)

    async def clear(self) -> None:
        for layer in self._layers:
            await layer.clear()

    async def aclose(self) -> None:
        for layer in self._layers:
            await layer.aclose()

    def stats(self) -> dict[str, dict[str, Any]]:
        """Of each layer, in the order that they are asked."""
        return {
            layer.name: {
                **asdict(layer.stats()),
                "hits": (counts := self._counts[layer.name]).hits,
                "misses": counts.misses,
                "errors": layer.stats().errors + counts.failures,
            }
            for layer in self._layers
        }

    async def _asked(self, layer: Layer, query: Query) -> Found | None:
        found, counts = await self._fresh(layer, query), self._counts[layer.name]
        counts.hits, counts.misses = counts.hits + (found is not None), counts.misses + (found is None)
        return found

    async def _fresh(self, layer: Layer, query: Query) -> Found | None:
        try:
            entry = await layer.get(query)
        except Exception as error:
            self._failed(layer, error)
            return None
        if entry is None or entry.target != query.scope.target:
            return None
        age = self._clock() - entry.created
        limits = [entry.ttl_s, layer.ttl_s, query.rules.ttl_s, query.max_age_s]
        if age < -CLOCK_SLACK_S or any(limit is not None and age > limit for limit in limits):
            return None
        return Found(entry, layer.name, max(0.0, age))

    async def _put(self, layer: Layer, query: Query, entry: Entry) -> None:
        try:
            await layer.put(query, entry)
        except Exception as error:
            self._failed(layer, error)

    def _failed(self, layer: Layer, error: Exception) -> None:
        """A layer has broken its promise. The first time is logged."""
        counts = self._counts[layer.name]
        counts.failures += 1
        if counts.failures == 1:
            structlog.get_logger("causeway.cache").error("layer failed", layer=layer.name, error=type(error).__name__)
