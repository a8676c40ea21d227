"""router.forest: asking all nodes at once reaches the leaves that walking reaches."""

import numpy as np
import pytest

from router.forest import Forest
from tests.router import plain


def test_all_at_once_is_one_by_one() -> None:
    """Every group's sum is that of its trees walked node by node, ties and empty trees included."""
    rng = np.random.default_rng(1)
    feature, limit = rng.integers(0, 6, (3, 40, 7)), rng.integers(-2, 3, (3, 40, 7)).astype(float)
    leaf = rng.normal(size=(3, 40, 8))
    limit[0, :5] = 1e30  # always to the left
    forest, reached = Forest(feature.astype(np.int16), limit, leaf), set()

    for _ in range(200):
        inputs = rng.integers(-3, 4, 6).astype(float)
        walked = [
            [plain.walked(*tree, inputs) for tree in zip(*group, strict=True)]
            for group in zip(feature, limit, leaf, strict=True)
        ]
        reached |= {one for group in walked for one in group}
        assert forest.sums(inputs) == pytest.approx(np.sum(walked, axis=1))
    assert len(reached) > 500  # of 960 leaves: they are told apart
