"""The OpenAI surface of the edge: the shared routes over this device's Agent."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Protocol

from fastapi import FastAPI

from edge_agent.cache.control import parse_control
from edge_agent.caller import CLASS_HEADER, Caller
from edge_agent.daemon import Daemon, health, model_cards
from shared.embeddings import Embed
from shared.errors import UnknownModel
from shared.guard import Guard, Shape
from shared.http import create_app
from shared.keys import key_id
from shared.replies import error_body
from shared.schemas import Answer


class Keyring(Protocol):
    def tenant_of(self, headers: Mapping[str, str]) -> str:
        """Who asks. Raises Unauthorized."""


def openai_app(
    daemon: Daemon,
    *,
    keys: Keyring | None,
    guard: Guard,
    shape_of: Callable[[str], Shape] = lambda _: error_body,
) -> FastAPI:
    """`keys` None: whoever reaches this address may ask, with any key or none. The guard holds all the same."""
    return create_app(
        answer_for=answers(daemon, keys),
        embed_for=embeds(daemon, keys),
        models=lambda: model_cards(daemon),
        health=lambda: health(daemon),
        registry=daemon.registry,
        source="edge",
        guard=guard,
        shape_of=shape_of,
    )


def tenant_of(keys: Keyring | None, headers: Mapping[str, str]) -> str:
    """Whose request it is; empty where clients show no key. Raises Unauthorized."""
    return keys.tenant_of(headers) if keys is not None else ""


def caller_of(keys: Keyring | None, headers: Mapping[str, str]) -> Caller:
    """Who asks, and how urgently. Raises Unauthorized."""
    tenant = tenant_of(keys, headers)
    return Caller(tenant, key_id(headers) if tenant else "", scenario=headers.get(CLASS_HEADER))


def answers(daemon: Daemon, keys: Keyring | None) -> Callable[[Mapping[str, str]], Answer]:
    """By a request's headers, who answers it: on every surface."""

    def answer_for(headers: Mapping[str, str]) -> Answer:
        wishes = parse_control(headers.get("cache-control"))
        return daemon.intake.of(replace(caller_of(keys, headers), cache=wishes))

    return answer_for


def embeds(daemon: Daemon, keys: Keyring | None) -> Callable[[Mapping[str, str]], Embed]:
    """By a request's headers, who makes its embeddings: on every surface."""

    def embed_for(headers: Mapping[str, str]) -> Embed:
        tenant_of(keys, headers)
        if daemon.embedder is None:
            raise UnknownModel("this device makes no embeddings", param="model")
        return daemon.embedder

    return embed_for
