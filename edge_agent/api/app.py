"""All surfaces of the edge in one application: one Agent, one guard, one way in; only the words differ."""

from collections.abc import Awaitable, Callable, Mapping
from functools import partial

from fastapi import FastAPI

from edge_agent.api.administrators import Administrators
from edge_agent.api.anthropic import routes as anthropic
from edge_agent.api.anthropic.write import error_body as anthropic_error
from edge_agent.api.ollama import routes as ollama
from edge_agent.api.ollama.models import add_models
from edge_agent.api.ollama.write import error_body as ollama_error
from edge_agent.api.openai import Keyring, answers, caller_of, embeds, openai_app, tenant_of
from edge_agent.api.plan import add_route_plan
from edge_agent.api.responses import routes as responses
from edge_agent.api.responses.store import ResponseStore
from edge_agent.daemon import Daemon, model_cards
from shared.guard import Guard, Shape
from shared.replies import error_body
from shared.schemas import ChatRequest


def edge_app(daemon: Daemon, *, keys: Keyring | None, guard: Guard, administrators: Administrators) -> FastAPI:
    """All of it but administration. `keys` None: whoever reaches this address may ask, with any key or none; the guard
    holds all the same."""
    app = openai_app(daemon, keys=keys, guard=guard, shape_of=shape_of)
    answer_for = answers(daemon, keys)

    def count_for(headers: Mapping[str, str]) -> Callable[[ChatRequest], Awaitable[int]]:
        answer_for(headers)
        return daemon.agent.prompt_tokens

    def known(name: str) -> bool:
        return any(card.id == name for card in model_cards(daemon))

    anthropic.add_anthropic(app, answer_for, count_for)
    ollama.add_ollama(app, answer_for, embed_for=embeds(daemon, keys), local=daemon.local, known=known)
    may_pull = partial(administrators.require, role="activate")
    add_models(app, daemon.local, lambda: model_cards(daemon), may_ask=answer_for, may_pull=may_pull)
    responses.add_responses(app, partial(tenant_of, keys), answer_for, ResponseStore())
    add_route_plan(app, partial(caller_of, keys), daemon.agent)
    return app


def shape_of(path: str) -> Shape:
    """How an error looks there, also of what the guard refuses."""
    if path.startswith(anthropic.PATH):
        return anthropic_error
    if path.startswith(ollama.PREFIX):
        return ollama_error
    return error_body
