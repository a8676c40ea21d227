"""Who may do what in administration: three roles, each of which may do what the one before may.

People get keys made like clients' keys (`shared.keys`), for an owner `ROLE.NAME`, such as `propose.anna`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal, get_args

from shared.errors import Forbidden, Source
from shared.keys import Keys

Role = Literal["read", "propose", "activate"]
ROLES: Final[tuple[Role, ...]] = get_args(Role)


@dataclass(frozen=True, slots=True)
class Administrator:
    name: str
    role: Role

    def may(self, role: Role) -> bool:
        return ROLES.index(self.role) >= ROLES.index(role)

    def require(self, role: Role, source: Source) -> None:
        """Raises Forbidden."""
        if not self.may(role):
            raise Forbidden(f"this needs the role {role}; {self.name} has {self.role}", source=source)


def keyholder(keys: Keys, headers: Mapping[str, str]) -> Administrator:
    """Whose key the request shows. Raises Unauthorized, or Forbidden for a key that has no role."""
    role, _, name = keys.tenant_of(headers).partition(".")
    for known in ROLES:
        if known == role and name:
            return Administrator(name, known)
    raise Forbidden(f"this key's owner has no role: it must be one of {', '.join(ROLES)}, a dot and a name")
