"""Ed25519 keys in files, as PEM: what other tools (and hardware) write and read too. The device signs its own acts, and
a fleet's administrator the policies for all devices.
"""

import os
import stat
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from shared.config import InvalidSettings

MAX_KEY_BYTES = 4096


def holds(key: Ed25519PublicKey, signature: bytes, content: bytes) -> bool:
    try:
        key.verify(signature, content)
    except InvalidSignature:
        return False
    return True


def public_key(path: Path, name: str) -> Ed25519PublicKey:
    """Raises InvalidSettings naming the setting."""
    content, _ = _content(path, name)
    try:
        key = load_pem_public_key(content)
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PublicKey):
        raise InvalidSettings(f"{name}: {path} must hold a public Ed25519 key in PEM", param=name)
    return key


def private_key(path: Path, name: str) -> Ed25519PrivateKey:
    """Raises InvalidSettings, also where other users could read it."""
    content, mode = _content(path, name)
    if mode & 0o077:
        raise InvalidSettings(f"{name}: other users can read {path}: run `chmod 600` on it", param=name)
    try:
        key = load_pem_private_key(content, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise InvalidSettings(f"{name}: {path} must hold a private Ed25519 key in PEM, without a password", param=name)
    return key


def new_keys(path: Path) -> Path:
    """Write a private key to `path`, for its owner alone, and the public one beside it; returns where that is.

    Raises InvalidSettings if either is there already: a key that is replaced is lost for good.
    """
    public = path.with_name(path.name + ".pub")
    key = Ed25519PrivateKey.generate()
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _write(path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), 0o600)
        _write(public, key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo), 0o644)
    except OSError as error:
        raise InvalidSettings(f"{error.filename or path}: {error.strerror}", param="key") from error
    return public


def _content(path: Path, name: str) -> tuple[bytes, int]:
    try:
        with path.open("rb") as stream:
            return stream.read(MAX_KEY_BYTES), stat.S_IMODE(os.fstat(stream.fileno()).st_mode)
    except OSError as error:
        raise InvalidSettings(f"{name}: {path}: {error.strerror}", param=name) from error


def _write(path: Path, content: bytes, mode: int) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as stream:
        stream.write(content)
