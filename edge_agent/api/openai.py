"""The OpenAI surface of the edge: the shared routes over this device's Agent."""

from collections.abc import Mapping

from fastapi import FastAPI

from edge_agent.daemon import Daemon, health, model_cards
from edge_agent.intake import ForTenant
from shared.guard import Guard
from shared.http import create_app
from shared.keys import Keys
from shared.schemas import Answer


def openai_app(daemon: Daemon, *, keys: Keys | None, guard: Guard) -> FastAPI:
    """`keys` None: whoever reaches this address may ask, with any key or none. The guard holds all the same."""

    def answer_for(headers: Mapping[str, str]) -> Answer:
        return ForTenant(daemon.intake, keys.tenant_of(headers) if keys is not None else "")

    return create_app(
        answer_for=answer_for,
        models=lambda: model_cards(daemon),
        health=lambda: health(daemon),
        registry=daemon.registry,
        source="edge",
        guard=guard,
    )
