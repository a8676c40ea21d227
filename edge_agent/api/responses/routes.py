"""OpenAI's Responses over HTTP: made, asked for again, deleted. Its WebSocket is in `socket.py`."""

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import msgspec
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, WebSocketRoute

from edge_agent.api.gathered import Gathered
from edge_agent.api.responses.items import answered
from edge_agent.api.responses.read import RENAMED, ResponsesCall, Turn, parse_response
from edge_agent.api.responses.socket import Socket
from edge_agent.api.responses.store import OVERHEAD, ResponseStore, Stored
from edge_agent.api.responses.write import Events, EventStream, WholeResponse
from shared.errors import UnsupportedParameter
from shared.openai import json_object
from shared.replies import error_body
from shared.schemas import Answer
from shared.surface import Asked, Endpoint, Generation, Work, answering

PATH = "/v1/responses"
TenantOf = Callable[[Mapping[str, str]], str]
AnswerFor = Callable[[Mapping[str, str]], Answer]


def add_responses(app: FastAPI, tenant_of: TenantOf, answer_for: AnswerFor, store: ResponseStore) -> None:
    """By a request's headers `tenant_of` says whose it is, `answer_for` who answers it; both may raise."""

    def admit(headers: Mapping[str, str]) -> tuple[str, Answer]:
        return tenant_of(headers), answer_for(headers)

    def found(request: Request) -> Stored:
        tenant = tenant_of(request.headers)
        if request.query_params.get("stream", "false") != "false":
            raise UnsupportedParameter("a stored response comes whole", param="stream")
        return store.get(tenant, request.path_params["name"])

    async def get(request: Request) -> Response:
        return JSONResponse(found(request).body)

    async def inputs(request: Request) -> Response:
        items = found(request).inputs
        ends = {"first_id": items[0]["id"], "last_id": items[-1]["id"]}
        return JSONResponse({"object": "list", "data": items, "has_more": False, **ends})

    async def delete(request: Request) -> Response:
        name = request.path_params["name"]
        store.delete(tenant_of(request.headers), name)
        return JSONResponse({"id": name, "object": "response", "deleted": True})

    create = Endpoint(admit, partial(_begin, store), source="edge", shape=error_body)
    app.router.routes += [
        Route(PATH, create, methods=["POST"]),
        WebSocketRoute(PATH, Socket(admit, partial(_read, store))),
        Route(f"{PATH}/{{name}}", get),
        Route(f"{PATH}/{{name}}", delete, methods=["DELETE"]),
        Route(f"{PATH}/{{name}}/input_items", inputs),
    ]


def _begin(store: ResponseStore, admitted: tuple[str, Answer], asked: Asked) -> Work:
    tenant, answer = admitted
    call, events = _read(
        store, json_object(asked.body), request_id=asked.id, label=asked.label, tenant=tenant, latest={}
    )
    encoder = EventStream(events) if call.fields.stream else WholeResponse(events)
    return answering(answer, Generation((call.request,), call.fields.stream, encoder, RENAMED))


def _read(
    store: ResponseStore,
    raw: dict[str, Any],
    *,
    request_id: str,
    label: str | None,
    tenant: str,
    latest: dict[str, Turn],
) -> tuple[ResponsesCall, Events]:
    """`latest` is what a connection knows beside the store; the finished response is put into both."""

    def earlier(response_id: str) -> Turn:
        return latest[response_id] if response_id in latest else store.turn(tenant, response_id)

    def keep(body: dict[str, Any], gathered: Gathered) -> None:
        turn = Turn((*call.turn.messages, answered(gathered)), call.turn.label)
        latest.clear()
        latest[body["id"]] = turn
        if call.fields.store:
            size = len(msgspec.json.encode(body)) + sum(message.size for message in turn.messages) + OVERHEAD
            store.put(tenant, body["id"], Stored(body, _inputs(call), turn, size))

    call = parse_response(raw, request_id=request_id, label=label, earlier=earlier)
    return call, Events(call, keep=keep, clock=time.time)


def _inputs(call: ResponsesCall) -> list[dict[str, Any]]:
    given = call.fields.input
    if isinstance(given, str):
        given = [{"role": "user", "content": [{"type": "input_text", "text": given}], "status": "completed"}]
    name = call.request.id.removeprefix("req_")
    return [{"type": "message", "id": f"item_{name}_{at}"} | item for at, item in enumerate(given)]
