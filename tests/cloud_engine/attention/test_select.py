import dataclasses

import pytest
import structlog
import torch

from cloud_engine.attention import paged, select
from cloud_engine.attention.batch import Kernel

CPU = torch.device("cpu")
SHAPE = select.Shape(heads=6, kv_heads=2, head_dim=16, block_size=4, dtype=torch.float32, device=CPU)


def chosen(load, shape=SHAPE):
    with structlog.testing.capture_logs() as logs:
        kernel = select.select(shape, load)
    return kernel, logs


def test_a_cpu_gets_the_compiled_kernel():
    """It is compiled, tried and named in the log."""
    kernel, (line,) = chosen(None)
    assert (kernel.name, kernel.packed, line["kernel"], line["log_level"]) == ("native", True, "native", "info")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"dtype": torch.float16}, "not for torch.float16"), ({"head_dim": 12}, "not for torch.float32 and heads of 12")],
)
def test_a_shape_that_the_compiled_kernel_lacks_gets_the_paged_one(changes, reason):
    """The log says why."""
    kernel, (line,) = chosen(None, dataclasses.replace(SHAPE, **changes))
    assert kernel is select.PAGED
    assert line["fallback"].startswith(f"NativeUnavailable: {reason}")


def test_a_right_kernel_is_chosen():
    """One that passes the check serves, and the log names it."""
    good = Kernel("good", paged.attend)
    assert chosen(lambda shape: good) == (good, [{"event": "attention", "kernel": "good", "log_level": "info"}])


def test_the_triton_kernel_passes_the_check(monkeypatch):
    """The kernel that CUDA gets is right for a model's shape, in both of its ways."""
    triton_unified = pytest.importorskip("cloud_engine.attention.triton_unified", reason="Triton is for Linux only")
    monkeypatch.setattr(select, "LONG", (256,))  # the interpreter is slow
    good = Kernel("triton", triton_unified.TritonAttention(64), packed=True)
    assert chosen(lambda shape: good)[0] is good


def missing(shape):
    raise ImportError("No module named 'triton'")


def crashing(q, k, v, cache, batch):
    raise RuntimeError("out of shared memory")


def acausal(q, k, v, cache, batch):
    """Right for decodes, wrong for the rows of chunks."""
    out = paged.attend(q, k, v, cache, batch)
    out[2:-1] = out[3:].clone()
    return out


def leaking(q, k, v, cache, batch):
    """Takes an unused slot's NaN into the sum."""
    out = paged.attend(q, k, v, cache, batch)
    return out + 0 * cache[0].sum() if len(q) == 1 else out


@pytest.mark.parametrize(
    ("load", "reason"),
    [
        (missing, "ImportError: No module named 'triton'"),
        (lambda shape: Kernel("crashing", crashing), "RuntimeError: out of shared memory"),
        (lambda shape: Kernel("acausal", acausal), "WrongResult: off by"),
        (lambda shape: Kernel("leaking", leaking), "WrongResult: off by nan"),
    ],
    ids=["missing", "crashing", "acausal", "leaking"],
)
def test_what_is_missing_breaks_or_errs_is_not_chosen(load, reason):
    """The engine starts all the same, on the paged kernel, and the log says why."""
    kernel, (line,) = chosen(load)
    assert kernel is select.PAGED
    assert (line["log_level"], line["kernel"]) == ("warning", "paged")
    assert line["fallback"].startswith(reason)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_tolerance_fits_the_dtype(dtype):
    """A right kernel is not refused for the rounding of its dtype."""
    shape = select.Shape(heads=4, kv_heads=1, head_dim=64, block_size=16, dtype=dtype, device=CPU)
    select.check(Kernel("paged", paged.attend), shape)
