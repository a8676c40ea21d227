"""Which attention an engine uses: the fastest that works here, found by trying it."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import structlog
import torch
from torch import Tensor

from cloud_engine.attention import paged, reference
from cloud_engine.attention.batch import AttentionBatch, Kernel, pack, span
from cloud_engine.attention.native import NativeAttention
from cloud_engine.native.library import NativeUnavailable

PAGED = Kernel("paged", paged.attend)

TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}
"""How far a right result may be from the reference's, absolute and relative, on values of unit variance."""


CHUNK, HISTORY, RUNS = 512, 1536, 5
"""Tokens of a prompt by which kernels are compared, those before them, and how often."""


LONG = (256, 512, 1024, 2048)
"""Contexts of a decode that is divided among more and more programs."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What a kernel is compiled for."""

    heads: int
    kv_heads: int
    head_dim: int
    block_size: int
    dtype: torch.dtype
    device: torch.device
    cache: torch.dtype | None = None
    """What the cache holds; None: the same `dtype`."""


class WrongResult(Exception):
    """A kernel does not compute what the reference does."""


Load = Callable[[Shape], Kernel]


def select(shape: Shape, load: Load | None = None) -> Kernel:
    """The kernel of `load` (on CUDA the Triton one, on a CPU the C++ one) if it can be had and passes `check`, else
    `paged`; the log names the kernel, and the reason of a fallback. On CUDA, FlashInfer takes the prompts if it can be
    had too and wins there. A kernel that breaks the CUDA context itself cannot be fallen back from: torch then raises
    at its next call."""
    log = structlog.get_logger("causeway.engine")
    cuda = shape.device.type == "cuda"
    try:
        kernel = (load or (triton if cuda else native))(shape)
        check(kernel, shape)
    except Exception as error:  # compilers and drivers raise what they like, and none of it must stop the engine
        log.warning("attention", kernel=PAGED.name, fallback=f"{type(error).__name__}: {error}")
        return PAGED
    if cuda and load is None:
        kernel = challenged(kernel, shape, flashinfer)
    log.info("attention", kernel=kernel.name)
    return kernel


def challenged(
    kernel: Kernel,
    shape: Shape,
    load: Callable[[Kernel, Shape], Kernel],
    clock: Callable[[], float] = time.perf_counter,
) -> Kernel:
    """The kernel that `load` makes of this one, if it can be had, passes `check` and computes a chunk of a prompt in
    less time; else the kernel itself, and the log says why."""
    log = structlog.get_logger("causeway.engine")
    try:
        rival = load(kernel, shape)
        check(rival, shape)
        seconds, ours = (prompt_seconds(one, shape, clock) for one in (rival, kernel))
    except Exception as error:  # as above
        log.info("attention", without=f"{type(error).__name__}: {error}")
        return kernel
    log.info("attention", prompt_ms={rival.name: round(seconds * 1e3, 3), kernel.name: round(ours * 1e3, 3)})
    return rival if seconds < ours else kernel


def prompt_seconds(kernel: Kernel, shape: Shape, clock: Callable[[], float]) -> float:
    """How long a chunk of a prompt takes after some history, the best of a few, as layers see it that share a plan."""
    size = shape.block_size
    blocks = -(-(HISTORY + CHUNK) // size)
    sequence = (CHUNK, HISTORY + CHUNK, list(range(1, blocks + 1)))

    def zeros(*sizes: int, dtype: torch.dtype = shape.dtype) -> Tensor:
        return torch.zeros(*sizes, shape.head_dim, dtype=dtype, device=shape.device)

    q, k, v = (zeros(CHUNK, heads) for heads in (shape.heads, shape.kv_heads, shape.kv_heads))
    cache = zeros(2, blocks + 1, size, shape.kv_heads, dtype=shape.cache or shape.dtype)
    batch = _batch([sequence], size, shape.device)
    times = []
    for _ in range(RUNS):
        _wait(shape.device)
        start = clock()
        kernel.attend(q, k, v, cache, batch)
        _wait(shape.device)
        times.append(clock() - start)
    return min(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def native(shape: Shape) -> Kernel:
    """The C++ kernel. Raises NativeUnavailable where it cannot be compiled, or not for this shape."""
    if shape.cache not in (None, shape.dtype):
        raise NativeUnavailable(f"not for a cache in {shape.cache}")
    return Kernel("native", NativeAttention(shape.dtype, shape.head_dim), packed=True)


def triton(shape: Shape) -> Kernel:
    """The Triton kernel for this GPU. Raises ImportError where Triton is not installed."""
    from cloud_engine.attention.triton_unified import TritonAttention

    programs = 2 * torch.cuda.get_device_properties(shape.device).multi_processor_count
    return Kernel("triton", TritonAttention(programs), packed=True)


def flashinfer(kernel: Kernel, shape: Shape) -> Kernel:
    """This kernel with FlashInfer for prompts. Raises ImportError where FlashInfer is not installed."""
    from cloud_engine.attention.flashinfer import load

    return Kernel(f"flashinfer, {kernel.name} for decodes", load(kernel.attend, shape.device), packed=True)


def check(kernel: Kernel, shape: Shape) -> None:
    """Compare with the reference on steps of each kind, for the very shape that will be used; that also compiles what
    the first requests would otherwise wait for. Raises WrongResult, or what the kernel raises."""
    size = shape.block_size
    _compare(kernel, shape, [(1, size), (1, size + 1), (5, 2 * size + 3), (2 * size + 1, 2 * size + 1)])
    _compare(kernel, shape, [(1, size + 1), (1, 2)])
    for long in LONG:
        _compare(kernel, shape, [(1, -(-long // size) * size + 1)])  # it ends in a block's first slot


def _compare(kernel: Kernel, shape: Shape, lengths: Sequence[tuple[int, int]]) -> None:
    """One step of sequences given as (new tokens, context), their blocks in reverse order, NaN in unused slots."""
    noise, size = torch.Generator().manual_seed(0), shape.block_size
    sequences, blocks = [], 1
    for count, context in lengths:
        used = -(-context // size)
        sequences.append((count, context, list(range(blocks + used - 1, blocks - 1, -1))))
        blocks += used

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, shape.head_dim, generator=noise).to(shape.dtype)

    rows = sum(count for count, _ in lengths)
    inputs = [normal(rows, heads) for heads in (shape.heads, shape.kv_heads, shape.kv_heads)]
    cache = normal(2, blocks, size, shape.kv_heads)
    for _, context, table in sequences:
        cache[:, table[-1], (context - 1) % size + 1 :] = torch.nan
    inputs.append(cache.to(shape.cache or shape.dtype))
    q, k, v, cache = (tensor.to(shape.device) for tensor in inputs)
    actual = kernel.attend(q, k, v, cache, _batch(sequences, size, shape.device)).to("cpu", torch.float32)
    q, k, v, cache = inputs
    expected = reference.attend(q, k, v, cache, _batch(sequences, size, torch.device("cpu"))).float()
    tolerance = TOLERANCE[shape.dtype]
    if not torch.allclose(actual, expected, atol=tolerance, rtol=tolerance):
        raise WrongResult(f"off by {(actual - expected).abs().max().item():.3g} for {shape}")


def _batch(sequences: Sequence[tuple[int, int, list[int]]], size: int, device: torch.device) -> AttentionBatch:
    """Told in both ways: every kernel finds what it reads."""
    slots: list[int] = []
    spans = []
    for count, context, table in sequences:
        spans.append(span(len(slots), count, context, table, size, device))
        slots += [table[at // size] * size + at % size for at in range(context - count, context)]
    return AttentionBatch(torch.tensor(slots, device=device), tuple(spans), packed=pack(sequences, size, device))
