"""Who administers this device. The token in the state folder's `admin.token` may do everything; further people get
keys of their own in `admin.keys` there, with the roles of `shared.administrators`.
"""

import hmac
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from starlette.requests import Request

from edge_agent.api.credentials import bearer
from shared.administrators import Administrator, Role, keyholder
from shared.errors import Unauthorized
from shared.keys import Keys

KEYS_FILE = "admin.keys"

Handler = Callable[[Request, Administrator], Awaitable[dict[str, Any]]]


@dataclass(frozen=True, slots=True)
class AdminRoute:
    """One thing that administrators can do. `path` may hold `{names}` as starlette's routes do."""

    method: Literal["GET", "POST"]
    path: str
    role: Role
    handler: Handler


class Administrators:
    def __init__(self, token: str, keys_file: Path | None = None) -> None:
        self._token, self._file = token.encode(), keys_file
        self._keys: Keys | None = None

    def who(self, headers: Mapping[str, str]) -> Administrator:
        """Raises Unauthorized, or Forbidden for a key that has no role."""
        if hmac.compare_digest(bearer(headers).encode("utf-8", "surrogateescape"), self._token):
            return Administrator("admin", "activate")
        keys = self._listed()
        if keys is None:
            raise Unauthorized("administration needs the token in the state folder's admin.token", source="edge")
        return keyholder(keys, headers)

    def require(self, headers: Mapping[str, str], role: Role) -> None:
        """Raises Unauthorized, or Forbidden for who may not do that."""
        self.who(headers).require(role, "edge")

    def _listed(self) -> Keys | None:
        """The file may come later than the daemon. Raises InvalidSettings if others can read it."""
        if self._keys is None and self._file is not None and self._file.exists():
            self._keys = Keys(self._file, source="edge")
        return self._keys
