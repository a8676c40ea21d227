"""The device's own signature, for what it writes about its administration. Ed25519; the key never leaves its file."""

import hashlib
import os
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from shared.config import InvalidSettings
from shared.signing import holds

KEY_BYTES = 32


class Signer:
    def __init__(self, seed: bytes) -> None:
        """Raises InvalidSettings for a seed of another length than KEY_BYTES."""
        if len(seed) != KEY_BYTES:
            raise InvalidSettings(f"the audit's key must have {KEY_BYTES} bytes", param="state_dir")
        self._key = Ed25519PrivateKey.from_private_bytes(seed)

    def sign(self, content: bytes) -> bytes:
        return self._key.sign(content)

    def signed(self, content: bytes, signature: bytes) -> bool:
        return holds(self._key.public_key(), signature, content)

    @property
    def name(self) -> str:
        """Says which device this is, to whom it signs for, and nothing else about it."""
        return hashlib.sha256(self._key.public_key().public_bytes_raw()).hexdigest()[:16]


def device_signer(path: Path) -> Signer:
    """The signer whose key lies at `path`, made at the first use with mode 0600. Raises InvalidSettings."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as stream:
                stream.write(os.urandom(KEY_BYTES))
        except FileExistsError:
            pass
        if path.stat().st_mode & 0o077:
            raise InvalidSettings(f"state_dir: other users can read {path.name}: chmod 600 it", param="state_dir")
        return Signer(path.read_bytes())
    except OSError as error:
        raise InvalidSettings(f"state_dir: {path.name}: {error.strerror}", param="state_dir") from error
