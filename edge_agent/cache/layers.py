"""The layers that the settings ask for, the fastest first."""

from pathlib import Path
from typing import Final

from edge_agent.cache.answers import AnswerCache
from edge_agent.cache.base import Layer
from edge_agent.cache.disk import DiskLayer
from edge_agent.cache.memory import MemoryLayer
from edge_agent.cache.rows import Rows, Seal
from edge_agent.cache.secret import cache_secret
from edge_agent.cache.semantic import Embedding, SemanticLayer
from edge_agent.cache.store import Store
from edge_agent.settings import EdgeSettings
from shared.config import read_secret

MB: Final = 1_000_000
FILE: Final = "answers.db"


async def open_cache(settings: EdgeSettings, state: Path, embedding: Embedding) -> AnswerCache | None:
    """None if no layer is asked for. `embedding` is for questions in other words, where the policy permits that.

    Raises InvalidSettings for a secret that cannot be used: what was to be encrypted is never kept in the clear.
    """
    if not settings.cache:
        return None
    layers: list[Layer] = []
    if settings.cache_memory_mb:
        layers.append(MemoryLayer(settings.cache_memory_mb * MB, ttl_s=settings.cache_memory_ttl_s))
    secret = await cache_secret(settings.cache_key) if settings.cache_key else None
    seal = Seal(secret) if secret else None
    if seal or not settings.cache_key:
        layers += _outside(settings, state, Rows(seal))
    if layers:
        layers.append(SemanticLayer(embedding, tuple(layers)))
    if not layers:
        return None
    runtime = "context_shift" if settings.context_shift else ""
    return AnswerCache(Store(layers), secret=seal.key_secret if seal else b"", runtime=runtime)


def _outside(settings: EdgeSettings, state: Path, rows: Rows) -> list[Layer]:
    """Of this process."""
    layers: list[Layer] = []
    if settings.cache_disk_mb:
        file = (settings.cache_dir or state) / FILE
        layers.append(DiskLayer(file, settings.cache_disk_mb * MB, rows=rows, ttl_s=settings.cache_disk_ttl_s))
    if settings.redis_in_use:
        from edge_agent.cache.redis import RedisLayer

        secret = settings.redis_password_file
        password = read_secret(secret, "redis_password_file") if secret else None
        layers.append(RedisLayer(settings.redis_in_use, password=password, rows=rows, ttl_s=settings.cache_redis_ttl_s))
    return layers
