"""Memory that was filled with zeros, and not used since, goes back to the system until it is.

llama.cpp clears a whole cache of keys and values when it makes it, and from then on all of it counts as used, for slots
that nobody may ever need. A page that is given back reads as zeros again, so nobody can tell but by what is free.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import numpy as np

MAPS: Final = Path("/proc/self/maps")
LEAST: Final = 8 << 20
"""Bytes of an allocation that is looked at."""
PIECE: Final = 1 << 18
"""Bytes that are looked at, and given back, together."""
MADV_DONTNEED: Final = 4

Span = tuple[int, int]
"""First address, and the one behind the last."""


@contextmanager
def zeros_given_back() -> Iterator[None]:
    """Of the large allocations that the body makes. No other thread may make any at the same time, or write into these
    before this returns. Does nothing where the system does not tell what is allocated: only Linux does."""
    before = _anonymous()
    yield
    if before:
        for first, end in _without(_anonymous(), before):
            if end - first >= LEAST:
                _give_back(first, end)


def _anonymous() -> list[Span]:
    """Where this process has private memory of its own that it may write, in order; empty if that cannot be had."""
    try:
        lines = MAPS.read_text().splitlines()
    except OSError:
        return []
    spans = []
    for line in lines:
        where, rights, _, _, inode, *name = line.split(maxsplit=5)
        if rights == "rw-p" and inode == "0" and not name:
            first, _, end = where.partition("-")
            spans.append((int(first, 16), int(end, 16)))
    return spans


def _without(spans: list[Span], others: list[Span]) -> Iterator[Span]:
    """What of `spans` is in none of `others`: the system joins neighbours, so an old one may be part of a new one."""
    for first, end in spans:
        for start, stop in others:
            if stop <= first or start >= end:
                continue
            if start > first:
                yield first, start
            first = max(first, stop)
        if first < end:
            yield first, end


def _give_back(first: int, end: int) -> None:
    give = ctypes.CDLL(None, use_errno=True).madvise
    give.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for at in range(first, end, PIECE):
        size = min(PIECE, end - at)
        words = np.ctypeslib.as_array((ctypes.c_uint64 * (size // 8)).from_address(at))
        if not words.any():
            give(at, size, MADV_DONTNEED)  # what cannot be given back, because it is locked, say, stays
