"""Zeros go back to the system, and nothing else does."""

import mmap
import sys

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.backends import pages
from edge_agent.backends.pages import PIECE, zeros_given_back

SIZE = 64 << 20


def filled() -> mmap.mmap:
    """Memory of which all has been written: zeros."""
    block = mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    block.write(bytes(SIZE))
    return block


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what is allocated")
def test_zeros_are_given_back_and_what_is_not_zero_stays() -> None:
    """One byte in each eighth piece keeps that piece; all reads as it was written, and can be written again."""
    process = psutil.Process()
    old = filled()
    before = process.memory_info().rss
    with zeros_given_back():
        new = filled()
        for at in range(0, SIZE, 8 * PIECE):
            new[at + PIECE // 2] = 7
        assert process.memory_info().rss - before > SIZE * 0.9
    left = process.memory_info().rss - before

    assert SIZE / 16 < left < SIZE / 4
    words = np.frombuffer(new, np.uint8)
    assert np.flatnonzero(words).tolist() == list(range(PIECE // 2, SIZE, 8 * PIECE))
    new[SIZE - 1] = 1
    assert (new[SIZE - 1], new[SIZE - 2]) == (1, 0)
    assert old.find(b"\x01") == -1
    del words


def test_without_a_map_of_the_memory_nothing_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on other systems."""
    monkeypatch.setattr(pages, "MAPS", pages.MAPS.with_name("none"))
    monkeypatch.setattr(pages, "_give_back", lambda *_: pytest.fail("given back"))

    with zeros_given_back():
        block = filled()

    assert not block[0]


spans = st.lists(st.integers(0, 60), max_size=12, unique=True).map(
    lambda ends: list(zip(sorted(ends)[0::2], sorted(ends)[1::2], strict=False))
)


@settings(max_examples=200, deadline=None)
@given(spans, spans)
def test_what_is_new_is_what_was_not_there_before(now: list[pages.Span], before: list[pages.Span]) -> None:
    """Address by address."""
    found = list(pages._without(now, before))

    assert all(first < end for first, end in found)
    inside = [address for first, end in found for address in range(first, end)]
    assert len(inside) == len(set(inside))
    expected = {address for first, end in now for address in range(first, end)}
    assert set(inside) == expected - {address for first, end in before for address in range(first, end)}
