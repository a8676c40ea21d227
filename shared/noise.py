"""The randomness of sampling: the device and the cloud draw a seed's tokens by the same numbers."""

import hashlib
import struct


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) with 48 random bits, fixed by its arguments: no draw depends on what is drawn beside it."""
    digest = hashlib.blake2b(struct.pack("<qQ", seed, position), digest_size=6).digest()
    return int.from_bytes(digest, "little") / (1 << 48)
