import pytest
import torch

from cloud_engine.model.config import Experts
from cloud_engine.model.experts import MixtureOfExperts
from cloud_engine.model.layers import Empty


def make(normalised: bool) -> MixtureOfExperts:
    generator = torch.Generator().manual_seed(4)
    shape = Experts(count=5, chosen=2, intermediate_size=12, normalised=normalised)
    return MixtureOfExperts(shape, 8, Empty(lambda *sizes: torch.randn(sizes, generator=generator)))


def one_by_one(moe: MixtureOfExperts, x: torch.Tensor) -> torch.Tensor:
    """The definition: each row through each of its experts."""
    out = torch.zeros_like(x)
    for row, value in enumerate(x):
        odds = (value @ moe.router.weight.T).softmax(-1)
        best = sorted(range(5), key=lambda index: -odds[index])[:2]
        total = sum(odds[index] for index in best) if moe.shape.normalised else 1.0
        for index in best:
            out[row] += moe.experts[index](value[None])[0] * odds[index] / total
    return out


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("rows", [0, 1, 2, 33])
def test_grouped_equals_one_by_one(rows, normalised):
    """Sorted by expert or each token by itself, the result is the same; experts without tokens compute nothing."""
    moe, x = make(normalised), torch.randn(rows, 8, generator=torch.Generator().manual_seed(rows))
    torch.testing.assert_close(moe(x), one_by_one(moe, x), atol=1e-5, rtol=1e-5)


def test_each_expert_is_called_once_at_most():
    """One call an expert that has tokens, with all of them, however many there are."""
    moe, calls = make(True), []
    for index, expert in enumerate(moe.experts):
        moe.experts[index] = lambda part, index=index, expert=expert: calls.append((index, len(part))) or expert(part)
    x = torch.randn(1, 8).expand(20, 8)
    moe(x)
    assert [count for _, count in calls] == [20, 20]
    assert len({index for index, _ in calls}) == 2
