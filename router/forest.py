"""Trees of depth 3, all asked at once: every node's answer is one bit, and a tree's seven bits say which leaf it is.

Asking all the nodes costs less than walking down: one comparison of all limits instead of three rounds of look-ups
(after Lucchese et al. 2015, who found the same for ranking).
"""

import functools

import numpy as np
from numpy.typing import NDArray

from router.weights import Array
from router.wording import Floats

NODES, LEAVES = 7, 8  # of a tree, in heap order: node n has the children 2n + 1 and 2n + 2


@functools.cache
def _leaf_of() -> NDArray[np.intp]:
    """The leaf that answers lead to, by these as bits of a number: bit n is set where node n's is over its limit."""
    found = np.zeros(1 << NODES, np.intp)
    for answers in range(1 << NODES):
        node = 0
        while node < NODES:
            node = 2 * node + 1 + (answers >> node & 1)
        found[answers] = node - NODES
    return found


class Forest:
    """feature, limit (..., T, 7) and leaf (..., T, 8): groups of T trees, or one. Immutable."""

    def __init__(self, feature: Array, limit: Array, leaf: Array) -> None:
        self._groups = leaf.shape[:-1]
        trees = leaf.size // LEAVES
        self._feature = np.zeros((trees, NODES + 1), np.intp)
        self._feature[:, :NODES] = feature.reshape(trees, NODES)
        self._limit = np.full((trees, NODES + 1), np.inf)  # the eighth asks nothing: it makes a tree's answers a byte
        self._limit[:, :NODES] = limit.reshape(trees, NODES)
        self._leaf = np.ascontiguousarray(leaf, np.float64).reshape(-1)
        self._first = LEAVES * np.arange(trees)
        self._leaf_of = _leaf_of()

    def sums(self, inputs: Floats) -> Floats:
        """Of the leaves that `inputs` reaches, by group."""
        answers = np.packbits(inputs.take(self._feature) > self._limit, bitorder="little")
        at = self._leaf_of.take(answers)
        at += self._first
        return np.asarray(np.add.reduce(self._leaf.take(at).reshape(self._groups), axis=-1))
