"""A conversation in the terminal with the daemon that runs: a plain client of its HTTP endpoint."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx

from shared.errors import CausewayError, Unreachable, UpstreamFailed, from_code

ANSWER_S = 300.0


def converse(
    url: str, model: str, *, private: bool, key: str = "any", read: Callable[[], str], write: Callable[[str], None]
) -> None:
    """Until `read` raises EOFError. A failed answer is shown, and its question forgotten; the conversation goes on."""
    messages: list[dict[str, str]] = []
    headers = {"authorization": f"Bearer {key}"} | ({"x-causeway-label": "edge_only"} if private else {})
    with httpx.Client(base_url=url, headers=headers, timeout=ANSWER_S) as client:
        while True:
            try:
                question = read().strip()
            except EOFError:
                return
            if not question:
                continue
            messages.append({"role": "user", "content": question})
            try:
                answer, route = _ask(client, model, messages, write)
            except CausewayError as error:
                messages.pop()
                write(f"\n[{error.code}: {error.message}]\n")
            else:
                messages.append({"role": "assistant", "content": answer})
                write(f"\n[{route}]\n")


def _ask(
    client: httpx.Client, model: str, messages: list[dict[str, str]], write: Callable[[str], None]
) -> tuple[str, str]:
    """Shows the answer as it comes; returns it, and who gave it and why."""
    body = {"model": model, "messages": messages, "stream": True}
    text = ""
    try:
        with client.stream("POST", "/v1/chat/completions", json=body) as reply:
            if reply.status_code != 200:
                raise _error(json.loads(reply.read()))
            for event in _events(reply):
                piece = "".join(choice["delta"].get("content") or "" for choice in event["choices"])
                text += piece
                write(piece)
            return text, f"{reply.headers['x-causeway-route']}: {reply.headers['x-causeway-reason']}"
    except httpx.ConnectError as error:
        raise Unreachable(f"nobody listens at {client.base_url}: is `edge-agent serve` running?") from error
    except (httpx.HTTPError, ValueError, KeyError) as error:
        raise UpstreamFailed(f"the answer broke off: {type(error).__name__}") from error


def _events(reply: httpx.Response) -> Iterator[dict[str, Any]]:
    for line in reply.iter_lines():
        if line == "data: [DONE]":
            return
        if line.startswith("data: "):
            event: dict[str, Any] = json.loads(line.removeprefix("data: "))
            if "error" in event:
                raise _error(event)
            yield event
    raise UpstreamFailed("the answer broke off")


def _error(body: dict[str, Any]) -> CausewayError:
    error = body["error"]
    return from_code(error["code"], error["message"], param=error.get("param"))
