"""A policy for a whole fleet, as its administrator signed it: the same bytes in a file and on the wire.

    causeway fleet policy 1
    <Ed25519 signature of the line above and of all below this one, in base64>
    {"version":7,"why":"no code to the cloud","groups":["kiosk"],"percent":10}
    mode: prefer_edge
    rules: ...

An edge takes it if the signature is by the key that its own administrator pinned, if it is meant for this edge, and if
its version is above every one before. So a cloud can withhold policies, but neither make, change nor bring back one:
going back means that the old text is signed again, as a newer version. No clock is asked.
"""

import base64
import binascii
import hashlib
from dataclasses import dataclass, field
from typing import Annotated, Final

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from shared.errors import BadRequest, TooLarge
from shared.frames import MAX_OFFER, Name
from shared.signing import holds

MAGIC: Final = b"causeway fleet policy 1"
MAX_SOURCE: Final = 256 << 10
MAX_TERMS: Final = 8 << 10
BUCKETS: Final = 10_000


class BadSignature(BadRequest):
    """Not signed, or by another key than the one that is trusted here."""

    code = "bad_signature"


class InvalidFleetPolicy(BadRequest):
    """Signed by the right key, but its terms are not such as are understood here."""

    code = "invalid_fleet_policy"


class Terms(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """For whom a policy is, and which it is. A term that is unknown may be a restriction, hence it is refused."""

    version: Annotated[int, msgspec.Meta(ge=1, le=(1 << 53) - 1)]
    why: Annotated[str, msgspec.Meta(min_length=1, max_length=400)]
    groups: Annotated[tuple[Annotated[Name, msgspec.Meta(min_length=1)], ...], msgspec.Meta(max_length=32)] = ()
    """None: whatever group an edge is in."""
    percent: Annotated[float, msgspec.Meta(gt=0, le=100)] = 100.0
    """Of the edges. Which ones depends on their names alone: who is in at 10 is in at 20."""

    def include(self, edge: str, group: str) -> bool:
        digest = hashlib.blake2b(edge.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        share = int.from_bytes(digest) % BUCKETS * 100 / BUCKETS
        return share < self.percent and (not self.groups or group in self.groups)


@dataclass(frozen=True, slots=True)
class FleetPolicy:
    """A policy whose signature was checked. `source` is its text, of which nothing is known yet."""

    terms: Terms
    source: bytes = field(repr=False)
    signed: bytes = field(repr=False)
    """All of it, as it is sent."""

    @property
    def version(self) -> int:
        return self.terms.version

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.signed).hexdigest()


def sign(terms: Terms, source: bytes, key: Ed25519PrivateKey) -> bytes:
    """Raises TooLarge, or InvalidFleetPolicy for terms that nobody would take."""
    said = msgspec.json.encode(terms)
    _terms(said)
    if len(source) > MAX_SOURCE:
        raise TooLarge(f"a policy has at most {MAX_SOURCE} bytes", param="policy")
    content = said + b"\n" + source
    return b"\n".join((MAGIC, base64.b64encode(key.sign(_covered(content))), content))


def opened(signed: bytes, key: Ed25519PublicKey) -> FleetPolicy:
    """Total: whatever the bytes are, raises TooLarge, BadSignature or InvalidFleetPolicy, in this order."""
    if len(signed) > MAX_OFFER:
        raise TooLarge(f"a signed policy has at most {MAX_OFFER} bytes", param="policy")
    magic, signature, content = (*signed.split(b"\n", 2), b"", b"")[:3]
    try:
        proof = base64.b64decode(signature, validate=True)
    except (binascii.Error, ValueError):
        proof = b""
    canonical = base64.b64encode(proof) == signature  # else: bits that decode to nothing could be others
    if magic != MAGIC or not canonical or not holds(key, proof, _covered(content)):
        raise BadSignature("it is not signed by the fleet's key", param="policy")
    said, _, source = content.partition(b"\n")
    return FleetPolicy(_terms(said), source, signed)


def _covered(content: bytes) -> bytes:
    """The first line is part of it: no other thing that the key ever signs can pass for a policy."""
    return MAGIC + b"\n" + content


def _terms(said: bytes) -> Terms:
    try:
        if len(said) > MAX_TERMS:
            raise InvalidFleetPolicy(f"its terms have more than {MAX_TERMS} bytes", param="terms")
        return msgspec.json.decode(said, type=Terms)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        what, _, where = str(error).partition(" - at `$.")
        param = where.rstrip("`") or "terms"
        raise InvalidFleetPolicy(f"its terms are not understood: {param}: {what[:200]}", param=param) from None
