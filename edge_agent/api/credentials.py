"""Who may use the endpoint and who may administer it. Secrets are compared in constant time and kept as hashes."""

import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Mapping
from pathlib import Path

from edge_agent.settings import read_secret
from shared.config import InvalidSettings
from shared.errors import Unauthorized

TOKEN_FILE = "admin.token"  # noqa: S105  a name, no secret
MAX_KEYS = 4096
_HASH = re.compile(r"[0-9a-f]{64}")


class Keys:
    """The keys that clients may show as `Authorization: Bearer KEY`, known only by their SHA-256.

    Keys are random and long (see `add_key`), so that one round of a fast hash is enough.
    """

    def __init__(self, hashes: frozenset[str]) -> None:
        self._hashes = hashes

    @classmethod
    def read(cls, path: Path) -> "Keys":
        """One hash a line, `#` begins a comment. Raises InvalidSettings naming file and line."""
        try:
            lines = path.read_text("ascii").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "is not ASCII"
            raise InvalidSettings(f"keys: {path}: {why}", param="keys") from None
        hashes = set()
        for number, line in enumerate(lines, 1):
            if text := line.partition("#")[0].strip():
                if not _HASH.fullmatch(text):
                    raise InvalidSettings(f"keys: {path}:{number}: not a SHA-256 in hexadecimal", param="keys")
                hashes.add(text)
        if not 0 < len(hashes) <= MAX_KEYS:
            raise InvalidSettings(f"keys: {path} must hold 1 to {MAX_KEYS} hashes", param="keys")
        return cls(frozenset(hashes))

    def check(self, headers: Mapping[str, str]) -> None:
        """Raises Unauthorized. Takes as long for a wrong key as for a right one, whichever it is."""
        shown = hash_of(bearer(headers))
        if not any([hmac.compare_digest(shown, known) for known in self._hashes]):  # noqa: C419  all of them, always
            raise Unauthorized("a valid key is needed", source="edge")


def add_key(path: Path) -> str:
    """Make a key and add its hash to the file, which is made if need be. The key itself is kept nowhere."""
    key = f"edge-{secrets.token_urlsafe(32)}"
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "a") as stream:
            stream.write(f"{hash_of(key)}\n")
    except OSError as error:
        raise InvalidSettings(f"keys: {path}: {error.strerror}", param="keys") from error
    return key


def hash_of(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()


def bearer(headers: Mapping[str, str]) -> str:
    """The credential of the Authorization header; empty if there is none."""
    scheme, _, credential = headers.get("authorization", "").partition(" ")
    return credential.strip() if scheme.lower() == "bearer" else ""


def admin_token(state: Path) -> str:
    """The administration's token, made at first start in a file that only this user can read.

    Raises InvalidSettings if it cannot be made, or others could have read it.
    """
    path = state / TOKEN_FILE
    try:
        state.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not path.exists():
            _create(path, secrets.token_urlsafe(32))
        shared_with = path.stat().st_mode & 0o077
    except OSError as error:
        raise InvalidSettings(f"state_dir: {path}: {error.strerror}", param="state_dir") from error
    if shared_with:
        raise InvalidSettings(f"state_dir: other users can read {path}: delete it or `chmod 600` it", param="state_dir")
    return read_secret(path, "state_dir")


def _create(path: Path, secret: str) -> None:
    """Whole or not at all, also when two daemons start at once: the first one's stays."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.unlink(missing_ok=True)
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as stream:
        stream.write(f"{secret}\n")
    try:
        os.link(draft, path)
    except FileExistsError:
        pass
    finally:
        draft.unlink()


def state_folder(env: Mapping[str, str], home: Path) -> Path:
    """Where state lies, by the XDG convention (a relative XDG_STATE_HOME is to be ignored, it says)."""
    state = Path(env.get("XDG_STATE_HOME", ""))
    return (state if state.is_absolute() else home / ".local" / "state") / "causeway"
