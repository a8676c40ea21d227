"""Who may administer the edge, or use it where a key is required: whoever can read the tokens in its state folder."""

import os
import secrets
from collections.abc import Mapping
from pathlib import Path

from shared.config import InvalidSettings, read_secret

TOKEN_FILE = "admin.token"  # noqa: S105  a name, no secret
CLIENT_TOKEN_FILE = "client.token"  # noqa: S105


def bearer(headers: Mapping[str, str]) -> str:
    """The credential of the Authorization header; empty if there is none."""
    scheme, _, credential = headers.get("authorization", "").partition(" ")
    return credential.strip() if scheme.lower() == "bearer" else ""


def admin_token(state: Path, name: str = TOKEN_FILE) -> str:
    """The administration's token, made at first start in a file that only this user can read.

    Raises InvalidSettings if it cannot be made, or others could have read it.
    """
    path = state / name
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


def client_token(state: Path) -> str:
    """The token that this device's own clients show where a key is required; otherwise like `admin_token`."""
    return admin_token(state, CLIENT_TOKEN_FILE)


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
