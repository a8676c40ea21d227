"""The Anthropic surface: `POST /v1/messages` and `/v1/messages/count_tokens`.

Credentials come as `x-api-key` or as a bearer; `anthropic-version` and `anthropic-beta` say nothing that we would do
otherwise.
"""

from collections.abc import Awaitable, Callable, Mapping

import msgspec
from fastapi import FastAPI
from starlette.routing import Route

from edge_agent.api.anthropic.read import RENAMED, parse_count, parse_messages
from edge_agent.api.anthropic.write import MessageEvents, WholeMessage, error_body
from shared.schemas import Answer, ChatRequest
from shared.surface import Asked, Endpoint, Generation, Reply, Work, generating

PATH = "/v1/messages"

Count = Callable[[ChatRequest], Awaitable[int]]


def add_anthropic(
    app: FastAPI, answer_for: Callable[[Mapping[str, str]], Answer], count_for: Callable[[Mapping[str, str]], Count]
) -> None:
    """`count_for` says, as `answer_for` does, by a request's headers who counts the tokens of a prompt."""
    messages = Endpoint(answer_for, generating(_read), source="edge", shape=error_body)
    count = Endpoint(count_for, _counting, source="edge", shape=error_body)
    app.router.routes += [
        Route(PATH, messages, methods=["POST"]),
        Route(f"{PATH}/count_tokens", count, methods=["POST"]),
    ]


def _read(asked: Asked) -> Generation:
    request, stream = parse_messages(asked.body, request_id=asked.id, label=asked.label)
    encoder = (MessageEvents if stream else WholeMessage)(f"msg_{asked.id.removeprefix('req_')}", request.model)
    return Generation((request,), stream, encoder, RENAMED)


def _counting(count: Count, asked: Asked) -> Work:
    request = parse_count(asked.body, request_id=asked.id)

    async def work(reply: Reply) -> None:
        await reply.whole(msgspec.json.encode({"input_tokens": await count(request)}))

    return work
