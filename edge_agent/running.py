"""The daemon that runs on this device, asked through its administration: what `ps` and `stop` are made of."""

from datetime import datetime
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import httpx

from edge_agent.api.credentials import TOKEN_FILE
from edge_agent.instance import running
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
        self._url = found.url
        self._token = read_secret(state / TOKEN_FILE, "state_dir")

    def loaded(self) -> list[dict[str, Any]]:
        """The models in its memory, as /admin/models tells."""
        found: list[dict[str, Any]] = self._call("GET", "/admin/models")["loaded"]
        return found

    def stop(self, name: str) -> bool:
        """Whether it is unloaded now; if not, it will be after its last answer."""
        return bool(self._call("POST", f"/admin/models/{quote(name, safe='')}/stop")["stopped"])

    def _call(self, method: str, path: str) -> Any:
        headers = {"authorization": f"Bearer {self._token}", "content-type": "application/json"}
        try:
            reply = httpx.request(method, self._url + path, headers=headers, timeout=TIMEOUT_S, trust_env=False)
            body = reply.json()
        except (httpx.HTTPError, ValueError) as error:
            raise Unreachable(f"{self._url} does not answer ({type(error).__name__})") from error
        if reply.status_code != 200:
            raise _error(body)
        return body


def _error(body: Any) -> CausewayError:
    try:
        return from_code(body["error"]["code"], body["error"]["message"])
    except (KeyError, TypeError):
        return UpstreamFailed("the daemon answered with an error that makes no sense")


def table(loaded: list[dict[str, Any]], *, now: datetime) -> str:
    """One line a model, under a line of titles."""
    rows = [("NAME", "SIZE", "PROCESSOR", "CONTEXT", "RUNNING", "UNTIL")]
    rows += [
        (
            model["name"],
            f"{model['size'] / 1e6:.0f} MB" if model["state"] == "loaded" else "loading",
            model["processor"],
            str(model["context_length"]),
            str(model["running"]),
            _until(model, now),
        )
        for model in loaded
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _until(model: dict[str, Any], now: datetime) -> str:
    if model["expires_at"] is None:
        return "its last answer" if model["running"] else "stopped"
    left = (datetime.fromisoformat(model["expires_at"]) - now).total_seconds()
    return f"{max(0, left) / 60:.0f} min idle" if left >= 90 else f"{max(0, left):.0f} s idle"
