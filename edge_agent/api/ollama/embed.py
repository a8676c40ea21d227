"""Ollama's `/api/embed` and, for older clients, `/api/embeddings`."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from shared.embeddings import Embed, EmbeddingRequest, Embeddings
from shared.openai import json_object, read_fields
from shared.surface import Asked, Reply, Work

NEUTRAL: Mapping[str, tuple[Any, ...]] = {"truncate": (False,)}


class EmbedBody(msgspec.Struct, kw_only=True):
    model: str
    input: str | list[str]
    dimensions: int | None = None
    options: dict[str, Any] = {}  # nothing of them is part of a vector
    keep_alive: float | str = ""


class OldBody(msgspec.Struct, kw_only=True):
    model: str
    prompt: str
    options: dict[str, Any] = {}
    keep_alive: float | str = ""


def several_embeddings(embed: Embed, asked: Asked) -> Work:
    fields = read_fields(json_object(asked.body), EmbedBody, NEUTRAL)
    inputs = (fields.input,) if isinstance(fields.input, str) else tuple(fields.input)
    request = EmbeddingRequest(id=asked.id, model=fields.model, inputs=inputs, dimensions=fields.dimensions)
    began = time.monotonic()

    def written(made: Embeddings) -> dict[str, Any]:
        took = {"total_duration": round((time.monotonic() - began) * 1e9), "load_duration": 0}
        return {"embeddings": made.vectors, **took, "prompt_eval_count": made.prompt_tokens}

    return _work(embed, request, written)


def old_embedding(embed: Embed, asked: Asked) -> Work:
    fields = read_fields(json_object(asked.body), OldBody, {})
    request = EmbeddingRequest(id=asked.id, model=fields.model, inputs=(fields.prompt,))
    return _work(embed, request, lambda made: {"embedding": made.vectors[0]})


def _work(embed: Embed, request: EmbeddingRequest, written: Callable[[Embeddings], dict[str, Any]]) -> Work:
    async def work(reply: Reply) -> None:
        made = await embed(request)
        await reply.whole(msgspec.json.encode({"model": request.model} | written(made)))

    return work
