"""Who may ask for inference, and in whose name."""

import hashlib
import hmac
from collections.abc import Mapping

from edge_agent.api.credentials import bearer
from shared.errors import Unauthorized
from shared.keys import Keys

LOCAL_TENANT = ""


class Access:
    """With `keys` (a file) or a `token` (of this device's user), every request must show one; with neither, whoever
    reaches this address may ask, with any key or none."""

    def __init__(self, keys: Keys | None = None, token: str | None = None) -> None:
        self._keys = keys
        self._token = None if token is None else _digest(token)

    def tenant_of(self, headers: Mapping[str, str]) -> str:
        """Raises Unauthorized, in the same time whatever is wrong. `x-api-key` is how Anthropic's clients say it."""
        if "authorization" not in headers and "x-api-key" in headers:
            headers = {"authorization": f"Bearer {headers['x-api-key']}"}
        if self._token is not None and hmac.compare_digest(_digest(bearer(headers)), self._token):
            return LOCAL_TENANT
        if self._keys is not None:
            return self._keys.tenant_of(headers)
        if self._token is not None:
            raise Unauthorized("a key is required: the token in the state folder's client.token", source="edge")
        return LOCAL_TENANT


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).digest()
