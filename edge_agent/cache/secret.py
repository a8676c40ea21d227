"""Where the cache's secret comes from: a file, or the keyring of the operating system."""

import asyncio
import secrets
from pathlib import Path
from typing import Final

import structlog

from shared.config import InvalidSettings, read_secret

KEYRING: Final = "keyring"
SERVICE, USER = "causeway", "cache"
KEYRING_S: Final = 10.0
"""A keyring that is locked may ask its user, who may not be there."""
MIN_CHARS: Final = 16


async def cache_secret(source: str) -> str | None:
    """None if the keyring cannot be used, which is logged: then nothing may be kept outside this process. Raises
    InvalidSettings for a file that holds no secret, or that others could have read."""
    if source != KEYRING:
        secret = read_secret(Path(source), "cache_key")
        if len(secret) < MIN_CHARS:
            raise InvalidSettings(f"cache_key: {source} must hold at least {MIN_CHARS} characters", param="cache_key")
        return secret
    try:
        return await asyncio.wait_for(asyncio.to_thread(_of_keyring), KEYRING_S)
    except Exception as error:  # every backend has errors of its own, a missing one too
        structlog.get_logger("causeway.cache").warning(
            "no keyring: answers are kept in memory alone", error=type(error).__name__
        )
        return None


def _of_keyring() -> str:
    """Made at first use."""
    import keyring

    secret = keyring.get_password(SERVICE, USER)
    if secret is None:
        secret = secrets.token_hex(32)
        keyring.set_password(SERVICE, USER, secret)
    return secret
