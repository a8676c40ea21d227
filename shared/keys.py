"""Bearer keys. A key is `cw_<id>_<secret>`, shown once; the file keeps its id, a hash of the secret and its tenant.

The file has one JSON object a line, is readable by its owner only, and is read again when it changes: adding a line
lets a key in, removing one shuts it out. A secret has 256 random bits, so a plain SHA-256 of it cannot be reversed.
"""

import hashlib
import hmac
import os
import re
import stat
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path

import msgspec
import structlog

from shared.config import InvalidSettings
from shared.errors import Source, Unauthorized

ID_BYTES, SECRET_BYTES = 8, 32
MAX_CREDENTIAL = 256
MAX_FILE_BYTES = 16 << 20

_TOKEN = re.compile(r"cw_([0-9a-f]{16})_([0-9a-f]{64})")
_TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_NO_HASH = "0" * 64


class Key(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is stored of a key. `hash` is the SHA-256 of the secret, in hex."""

    id: str
    hash: str
    tenant: str
    created: datetime


def new_key(file: Path, tenant: str, *, now: datetime, random: Callable[[int], bytes] = os.urandom) -> str:
    """Add a key to the file, which is made if need be. Returns the key: it cannot be shown again.

    Raises InvalidSettings if the file may be read by others or the tenant is no plain name.
    """
    if not _TENANT.fullmatch(tenant):
        raise InvalidSettings("tenant must be 1 to 64 letters, digits, dots, dashes or underscores", param="tenant")
    key_id, secret = random(ID_BYTES).hex(), random(SECRET_BYTES).hex()
    line = msgspec.json.encode(Key(id=key_id, hash=_hash(secret), tenant=tenant, created=now)) + b"\n"
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise InvalidSettings(f"{file}: {error.strerror}", param="keys") from error
    with os.fdopen(descriptor, "ab") as keys:
        _check_private(file, os.fstat(descriptor))
        keys.write(line)
    return f"cw_{key_id}_{secret}"


def key_id(headers: Mapping[str, str]) -> str:
    """The id of the key that is shown, which is no secret; empty if it is none of ours. It may be valid or not."""
    shown = headers.get("authorization", headers.get("x-api-key", ""))[:MAX_CREDENTIAL]
    token = _TOKEN.fullmatch(shown.rpartition(" ")[2])
    return token[1] if token else ""


class Keys:
    """The keys of one file, followed as it changes. A change that cannot be read is logged and the old keys stay."""

    def __init__(self, file: Path, *, source: Source) -> None:
        """Raises InvalidSettings if the file cannot be read, may be read by others, or holds no key."""
        self._file, self._source = file, source
        self._seen = self._signature()
        self._keys = _load(file)
        if not self._keys:
            raise InvalidSettings(f"{file} holds no key: make one with `keys new`", param="keys")

    def __len__(self) -> int:
        return len(self._keys)

    def tenant_of(self, headers: Mapping[str, str]) -> str:
        """Whose key the Authorization header carries. Raises Unauthorized, in the same time whatever is wrong."""
        self._follow()
        scheme, _, credential = headers.get("authorization", "")[:MAX_CREDENTIAL].partition(" ")
        token = _TOKEN.fullmatch(credential.strip())
        key_id, secret = token.groups() if token else ("", "")
        key = self._keys.get(key_id)
        same = hmac.compare_digest(_hash(secret), key.hash if key else _NO_HASH)
        if key is None or not same or scheme.lower() != "bearer":
            raise Unauthorized("a valid key is required: Authorization: Bearer cw_...", source=self._source)
        return key.tenant

    def _follow(self) -> None:
        signature = self._signature()
        if signature == self._seen:
            return
        self._seen = signature
        log = structlog.get_logger("causeway.keys")
        try:
            self._keys = _load(self._file)
            log.info("keys_reloaded", keys=len(self._keys))
        except InvalidSettings as error:
            log.error("keys_not_reloaded", reason=error.message)

    def _signature(self) -> tuple[int, ...]:
        try:
            found = self._file.stat()
        except OSError:
            return ()
        return (found.st_mtime_ns, found.st_size, found.st_ino, found.st_mode)


def _load(file: Path) -> dict[str, Key]:
    try:
        with file.open("rb") as opened:
            _check_private(file, os.fstat(opened.fileno()))
            data = opened.read(MAX_FILE_BYTES)
    except OSError as error:
        raise InvalidSettings(f"{file}: {error.strerror}", param="keys") from error
    keys: dict[str, Key] = {}
    for number, line in enumerate(data.splitlines(), 1):
        if not line.strip():
            continue
        try:
            key = msgspec.json.decode(line, type=Key)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise InvalidSettings(f"{file}: line {number} is not a key", param="keys") from error
        keys[key.id] = key
    return keys


def _check_private(file: Path, found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise InvalidSettings(f"{file} is not a regular file", param="keys")
    if found.st_mode & 0o077:
        mode = stat.S_IMODE(found.st_mode)
        raise InvalidSettings(f"{file} may be read by others (mode {mode:04o}): chmod 600 it", param="keys")


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
