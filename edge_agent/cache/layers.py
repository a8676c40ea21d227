"""The layers that the settings ask for, the fastest first."""

from edge_agent.cache.answers import AnswerCache
from edge_agent.cache.base import Layer
from edge_agent.cache.memory import MemoryLayer
from edge_agent.cache.semantic import Embedding, SemanticLayer
from edge_agent.cache.store import Store
from edge_agent.settings import EdgeSettings

MB = 1_000_000


def open_cache(settings: EdgeSettings, embedding: Embedding) -> AnswerCache | None:
    """None if no layer is asked for. `embedding` is for questions in other words, where the policy permits that."""
    layers: list[Layer] = []
    if settings.cache_memory_mb:
        layers.append(MemoryLayer(settings.cache_memory_mb * MB, ttl_s=settings.cache_memory_ttl_s))
    if layers:
        layers.append(SemanticLayer(embedding, layers))
    return AnswerCache(Store(layers)) if settings.cache and layers else None
