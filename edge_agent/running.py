"""The daemon that runs on this device, asked through its administration: what `ps` and `stop` are made of."""

import json
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote, urlencode

import httpx

from edge_agent.api.credentials import TOKEN_FILE
from edge_agent.instance import find, running
from shared.config import read_secret
from shared.errors import CausewayError, Unreachable, UpstreamFailed, from_code

TIMEOUT_S: Final = 10.0


class Running:
    """The daemon of this state folder, wherever it listens. Raises Unreachable if there is none."""

    def __init__(self, state: Path) -> None:
        try:
            found = running(state)
        except OSError as error:
            raise Unreachable(f"{state}: {error.strerror}") from error
        if found is None or not found.url:
            raise Unreachable("no edge-agent is running: `edge-agent serve` starts one")
        self._state, self._url = state, found.url
        self._token = read_secret(state / TOKEN_FILE, "state_dir")

    def models(self, prompt_tokens: int | None = None, answer_tokens: int | None = None) -> dict[str, Any]:
        """What is in its memory, and what a prompt of this length would take, as /admin/models tells."""
        asked = {"prompt_tokens": prompt_tokens, "answer_tokens": answer_tokens}
        query = urlencode({name: tokens for name, tokens in asked.items() if tokens is not None})
        found: dict[str, Any] = self._call("GET", f"/admin/models?{query}")
        if "asked" not in found:  # the package was replaced while a daemon ran
            raise UpstreamFailed("the running edge-agent is of another version: restart it")
        return found

    def length(self, prompt: str) -> tuple[int, int]:
        """The tokens of a chat that begins with it, and of its answer, as the router counts and expects them."""
        _, key = find(self._state, self._url, None)
        body = {"model": "auto", "messages": [{"role": "user", "content": prompt}]}
        seen = self._call("POST", "/v1/route", key=key, body=body)["seen"]["request"]
        return seen["prompt_tokens"], seen["expected_output_tokens"]

    def stop(self, name: str) -> bool:
        """Whether it is unloaded now; if not, it will be after its last answer."""
        return bool(self._call("POST", f"/admin/models/{quote(name, safe='')}/stop")["stopped"])

    def _call(self, method: str, path: str, key: str = "", body: dict[str, Any] | None = None) -> Any:
        headers = {"authorization": f"Bearer {key or self._token}", "content-type": "application/json"}
        url, content = self._url + path, None if body is None else json.dumps(body)
        try:
            reply = httpx.request(method, url, content=content, headers=headers, timeout=TIMEOUT_S, trust_env=False)
            said = reply.json()
        except (httpx.HTTPError, ValueError) as error:
            raise Unreachable(f"{self._url} does not answer ({type(error).__name__})") from error
        if reply.status_code != 200:
            raise _error(said)
        return said


def _error(body: Any) -> CausewayError:
    try:
        return from_code(body["error"]["code"], body["error"]["message"])
    except (KeyError, TypeError):
        return UpstreamFailed("the daemon answered with an error that makes no sense")
