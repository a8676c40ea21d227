"""A conversation in the terminal with the daemon that runs: a plain client of its HTTP endpoint.

What is shown, and how, is the screen's: `edge_agent.screens`.
"""

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx

from edge_agent.screens import Screen, Show
from shared.errors import BadRequest, CausewayError, Unreachable, UpstreamFailed, from_code

ANSWER_S = 300.0
HELP = """\
/model NAME    ask this model from now on: auto, edge, cloud or a real model's name
/system TEXT   a system prompt for this conversation; without a text, none
/clear         forget what was said
/save FILE     write the conversation into a new file
/help          this list
/quit          end; so does Ctrl-D. Ctrl-C ends an answer"""


class Chat:
    """What was said so far, and who is asked next."""

    def __init__(self, client: httpx.Client, model: str, screen: Screen) -> None:
        self._client = client
        self._screen = screen
        self.model = model
        self.system = ""
        self.messages: list[dict[str, str]] = []
        self.failures = 0

    def take(self, line: str) -> bool:
        """One line of the user's: a command or a question. False if it ends the conversation."""
        if not line:
            return True
        if line.startswith("/"):
            return self._command(line)
        self._question(line)
        return True

    def _question(self, question: str) -> None:
        """A failed answer is shown and its question forgotten; of one that was cancelled, what was said stays."""
        self.messages.append({"role": "user", "content": question})
        pieces: list[str] = []
        try:
            with self._screen.answer() as show:
                about = self._ask(pieces, show)
        except CausewayError as error:
            self.failures += 1
            self.messages.pop()
            self._screen.note(f"[{error.code}: {error.message}]")
            return
        except KeyboardInterrupt:
            about = "cancelled"
        if pieces:
            self.messages.append({"role": "assistant", "content": "".join(pieces)})
        elif about == "cancelled":
            self.messages.pop()
        self._screen.note(f"[{about}]")

    def _ask(self, pieces: list[str], show: Show) -> str:
        """Shows the answer as it comes, and leaves in `pieces` what of it is to be remembered: nothing that stands
        above a mark. Returns who gave it, why and how fast. Leaving it cancels the request."""
        began, first, tokens = time.perf_counter(), 0.0, 0
        said: dict[str, Any] = {}
        try:
            with self._client.stream("POST", "/v1/chat/completions", json=self._body()) as reply:
                if reply.status_code != 200:
                    raise _error(json.loads(reply.read()))
                for event in _events(reply):
                    tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
                    said = event.get("causeway", said)
                    if piece := "".join(choice["delta"].get("content") or "" for choice in event["choices"]):
                        first = first or time.perf_counter() - began
                        pieces.append(piece)
                        show(piece)
                        if "causeway" in event:
                            pieces.clear()  # that was the mark
                return f"{_route(said)}{_speed(first, tokens, time.perf_counter() - began)}"
        except httpx.ConnectError as error:
            raise Unreachable(f"nobody listens at {self._client.base_url}: is `edge-agent serve` running?") from error
        except (httpx.HTTPError, ValueError, KeyError) as error:
            raise UpstreamFailed(f"the answer broke off: {type(error).__name__}") from error

    def _body(self) -> dict[str, Any]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        return {
            "model": self.model,
            "messages": [*system, *self.messages],
            "stream": True,
            "stream_options": {"include_usage": True},
        }

    def _command(self, line: str) -> bool:
        name, _, rest = line[1:].partition(" ")
        rest = rest.strip()
        match name:
            case "quit" | "exit" | "bye":
                return False
            case "model":
                self.model = rest or self.model
                self._screen.note(f"[model {self.model}]")
            case "system":
                self.system = rest
                self._screen.note("[system prompt set]" if rest else "[no system prompt]")
            case "clear":
                self.messages.clear()
                self._screen.note("[forgotten]")
            case "save":
                self._save(rest)
            case "help" | "?":
                self._screen.note(HELP)
            case _:
                self._screen.note(f"[no command /{name}; /help lists them]")
        return True

    def _save(self, name: str) -> None:
        try:
            if not name:
                raise BadRequest("name a file: /save FILE")
            save(Path(name).expanduser(), self.system, self.messages)
            self._screen.note(f"[saved to {name}]")
        except BadRequest as error:
            self._screen.note(f"[{error.message}]")


def save(path: Path, system: str, messages: list[dict[str, str]]) -> None:
    """As Markdown, for this user's eyes. Raises BadRequest; never overwrites."""
    everything = [{"role": "system", "content": system}, *messages] if system else messages
    text = "\n\n".join(f"**{message['role']}**\n\n{message['content']}" for message in everything)
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as stream:
            stream.write(f"{text}\n")
    except FileExistsError as error:
        raise BadRequest(f"{path} is there already: name another file") from error
    except (OSError, ValueError) as error:
        raise BadRequest(f"{path}: cannot be written") from error


def converse(url: str, model: str, *, private: bool, read: Callable[[], str], screen: Screen, key: str = "any") -> int:
    """Until `read` raises EOFError, or the user ends it. Returns how many answers failed."""
    headers = {"authorization": f"Bearer {key}"} | ({"x-causeway-label": "edge_only"} if private else {})
    with httpx.Client(base_url=url, headers=headers, timeout=ANSWER_S, trust_env=False) as client:
        chat = Chat(client, model, screen)
        with suppress(EOFError):
            while chat.take(_line(read, screen)):
                continue
        return chat.failures


def _line(read: Callable[[], str], screen: Screen) -> str:
    """Ctrl-C takes back what was typed."""
    while True:
        try:
            return read().strip()
        except KeyboardInterrupt:
            screen.note("\n[Ctrl-D ends the conversation]")


def _route(said: dict[str, Any]) -> str:
    above = f"{said['switched']['from']}, then " if "switched" in said else ""
    return f"{above}{said['route']}: {said['reason']}"


def _speed(first: float, tokens: int, total: float) -> str:
    if not first or tokens < 2:
        return ""
    return f"; first token {first * 1e3:.0f} ms, {(tokens - 1) / max(total - first, 1e-9):.0f} tokens/s"


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
