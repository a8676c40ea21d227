import pytest
import torch

from cloud_engine.model.projection import Projection, can_pack


@pytest.mark.parametrize("rows", [0, 1, 5, 64])
def test_packing_changes_no_result(rows):
    """Packed or not, a projection is x times the transposed weight, for any number of rows, none too."""
    weight, x = torch.randn(48, 32), torch.randn(rows, 32)
    projection = Projection(weight.clone())
    projection.pack()
    projection.pack()
    torch.testing.assert_close(projection(x), x @ weight.T, atol=1e-5, rtol=1e-5)


def test_packing_gives_the_plain_weight_up_unless_kept():
    """The memory of a packed weight is not held twice; a kept one stays as it was."""
    given, kept = Projection(torch.randn(48, 32)), Projection(torch.randn(48, 32))
    assert can_pack(given.weight), "this machine's torch has oneDNN"
    before = kept.weight.clone()
    given.pack()
    kept.pack(keep=True)
    assert given.weight.untyped_storage().nbytes() == 4
    assert torch.equal(kept.weight, before)


def test_other_types_stay_plain():
    """Half precision is not packed, and works."""
    projection = Projection(torch.randn(8, 4).bfloat16())
    projection.pack()
    assert projection(torch.ones(1, 4).bfloat16()).shape == (1, 8)
