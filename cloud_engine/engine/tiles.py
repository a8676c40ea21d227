"""A step as parts of one size, for results that do not depend on what is computed together.

A matrix product of 32 rows need not give a row the same last bits as one of 8: kernels add in other orders. In products
of one size a row is computed alike, wherever it is and whatever is beside it. So a deterministic engine computes a step
in parts of exactly `ROWS` rows, one after the other, the last one padded; a prompt's later rows find the keys of its
earlier ones in the cache. The rows of one expert, and those that are sampled, are padded in the products themselves.
"""

from collections.abc import Iterable, Iterator

from cloud_engine.engine.chunk import Chunk

ROWS = 32


def tiles(chunks: Iterable[Chunk]) -> Iterator[list[Chunk]]:
    """The chunks in parts of `ROWS` tokens, in the same order; the last part may have fewer."""
    tile: list[Chunk] = []
    room = ROWS
    for chunk in chunks:
        at = 0
        while at < chunk.count:
            tile.append(_part(chunk, at, min(chunk.count, at + room)))
            at += tile[-1].count
            room -= tile[-1].count
            if not room:
                yield tile
                tile, room = [], ROWS
    if tile:
        yield tile


def _part(chunk: Chunk, first: int, last: int) -> Chunk:
    unsampled = chunk.count - chunk.sampled
    return Chunk(chunk.tokens[first:last], chunk.start + first, chunk.table, max(0, last - max(first, unsampled)))
