import pytest
import torch

from cloud_engine.model.projection import Projection


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
    assert torch._C._has_mkldnn, "this machine's torch has oneDNN"
    before = kept.weight.clone()
    given.pack()
    kept.pack(keep=True)
    assert given.weight.untyped_storage().nbytes() == 4
    assert torch.equal(kept.weight, before)


def test_other_types_stay_plain():
    """float16 is not packed, and works."""
    weight = torch.randn(8, 4).half()
    projection = Projection(weight)
    projection.pack()
    assert projection.weight is weight
    assert projection(torch.ones(1, 4).half()).shape == (1, 8)


def test_an_exact_one_is_not_quantized():
    """What must not be rounded says so, and stays as it is."""
    weight, x = torch.randn(48, 64), torch.randn(3, 64)
    exact, rounded = Projection(weight.clone(), exact=True), Projection(weight.clone())
    for projection in (exact, rounded):
        projection.pack("int8")
    torch.testing.assert_close(exact(x), x @ weight.T, atol=1e-5, rtol=1e-5)
    assert (rounded(x) - x @ weight.T).abs().max() > 1e-3
