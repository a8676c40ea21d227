"""An answer as it is written outside this process: checked, and sealed where there is a key.

    layout: 8 bytes that name the key (zeros: none) | 16 of checksum | the entry, or nonce and ciphertext of it

The checksum covers where the row lies, so that neither a flipped bit nor a row in another's place is ever an answer.
"""

import hashlib
import hmac
import os
from collections.abc import Callable
from typing import Final

from edge_agent.cache.base import MAX_ENTRY_BYTES, Entry, Key, decoded, encoded

KEY_ID_BYTES: Final = 8
CHECK_BYTES: Final = 16
NONCE_BYTES: Final = 12
MAX_ROW_BYTES: Final = MAX_ENTRY_BYTES + 256
_PLAIN: Final = bytes(KEY_ID_BYTES)


class Seal:
    """AES-256-GCM under a key made of a secret. `key_secret` is another one of it, for `key_of`."""

    def __init__(self, secret: str, *, random: Callable[[int], bytes] = os.urandom) -> None:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        key = _derived(secret, b"answers", 32)
        self.key_id = hashlib.blake2b(key, digest_size=KEY_ID_BYTES, person=b"key id").digest()
        self.key_secret = _derived(secret, b"cache keys", 32)
        self._cipher = AESGCM(key)
        self._random = random

    def closed(self, raw: bytes, place: bytes) -> bytes:
        nonce = self._random(NONCE_BYTES)
        return nonce + self._cipher.encrypt(nonce, raw, place)

    def opened(self, raw: bytes, place: bytes) -> bytes | None:
        from cryptography.exceptions import InvalidTag

        try:
            return self._cipher.decrypt(raw[:NONCE_BYTES], raw[NONCE_BYTES:], place)
        except (InvalidTag, ValueError):
            return None


class Rows:
    """Entries to rows and back."""

    def __init__(self, seal: Seal | None = None) -> None:
        self._seal = seal

    @property
    def sealed(self) -> bool:
        return self._seal is not None

    def row(self, key: Key, entry: Entry) -> bytes | None:
        """None for an answer that is too long to keep."""
        raw = encoded(entry)
        if len(raw) > MAX_ENTRY_BYTES:
            return None
        key_id, body = _PLAIN, raw
        if self._seal is not None:
            key_id, body = self._seal.key_id, self._seal.closed(raw, key.raw)
        return key_id + _checksum(key, key_id, body) + body

    def entry(self, key: Key, row: object) -> Entry | None:
        """None for what `row` has not made, for this key, under the seal that is in use now."""
        if not isinstance(row, bytes) or not KEY_ID_BYTES + CHECK_BYTES < len(row) <= MAX_ROW_BYTES:
            return None
        key_id, check = row[:KEY_ID_BYTES], row[KEY_ID_BYTES : KEY_ID_BYTES + CHECK_BYTES]
        body = row[KEY_ID_BYTES + CHECK_BYTES :]
        if not hmac.compare_digest(check, _checksum(key, key_id, body)):
            return None
        if key_id != (self._seal.key_id if self._seal else _PLAIN):
            return None
        raw = self._seal.opened(body, key.raw) if self._seal else body
        return None if raw is None else decoded(raw)


def _checksum(key: Key, key_id: bytes, body: bytes) -> bytes:
    return hashlib.blake2b(key.raw + key_id + body, digest_size=CHECK_BYTES, person=b"row").digest()


def _derived(secret: str, purpose: bytes, size: int) -> bytes:
    return hashlib.blake2b(secret.encode(), digest_size=size, person=purpose).digest()
