"""Who may do what in administration: three roles, each of which may do what the one before may.

The token in the state folder's `admin.token` may do everything. Further people get keys of their own in `admin.keys`
there, made like clients' keys, for an owner `ROLE.NAME`, such as `propose.anna`.
"""

import hmac
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, get_args

from starlette.requests import Request

from edge_agent.api.credentials import bearer
from shared.errors import Forbidden, Unauthorized
from shared.keys import Keys

Role = Literal["read", "propose", "activate"]
ROLES: Final[tuple[Role, ...]] = get_args(Role)
KEYS_FILE = "admin.keys"


@dataclass(frozen=True, slots=True)
class Administrator:
    name: str
    role: Role

    def may(self, role: Role) -> bool:
        return ROLES.index(self.role) >= ROLES.index(role)


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
        role, _, name = keys.tenant_of(headers).partition(".")
        for known in ROLES:
            if known == role and name:
                return Administrator(name, known)
        raise Forbidden(f"this key's owner has no role: it must be one of {', '.join(ROLES)}, a dot and a name")

    def require(self, headers: Mapping[str, str], role: Role) -> None:
        """Raises Unauthorized, or Forbidden for who may not do that."""
        who = self.who(headers)
        if not who.may(role):
            raise Forbidden(f"this needs the role {role}; {who.name} has {who.role}", source="edge")

    def _listed(self) -> Keys | None:
        """The file may come later than the daemon. Raises InvalidSettings if others can read it."""
        if self._keys is None and self._file is not None and self._file.exists():
            self._keys = Keys(self._file, source="edge")
        return self._keys
