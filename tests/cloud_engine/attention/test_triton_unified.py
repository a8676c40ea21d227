"""The Triton kernel, run by Triton's interpreter on the CPU (by a GPU with TRITON_INTERPRET=0)."""

import dataclasses
import math
import os
import subprocess
import sys

import pytest
import tiny_llama
import tiny_models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cloud_engine.attention import reference
from cloud_engine.attention.batch import UNLIMITED, Attention, AttentionBatch, decodes, pack, span
from cloud_engine.engine.config import EngineConfig
from cloud_engine.engine.engine import Engine
from cloud_engine.engine.runner import Runner
from cloud_engine.model.weights import load_model
from shared.schemas import Sampling

triton = pytest.importorskip("triton", reason="Triton is for Linux only")
triton_unified = pytest.importorskip("cloud_engine.attention.triton_unified")

pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")  # what its compiler says on a GPU

CPU = torch.device("cpu")
DEVICE = torch.device("cpu" if os.environ["TRITON_INTERPRET"] == "1" else "cuda")
SPLIT, WHOLE = 4096, 0
"""How many programs the kernel believes the device to run: more than enough to divide a decode, or none to spare."""


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Few keys make many tiles and segments."""
    monkeypatch.setattr(triton_unified, "KEY_TILE", 16)
    monkeypatch.setattr(triton_unified, "SEGMENT_KEYS", 8)


class Case:
    """Sequences given as (count of new tokens, context); their blocks are scattered, unused slots poisoned."""

    def __init__(
        self, sequences, *, heads=6, kv_heads=2, dim=16, block=4, dtype=torch.float32, poison=math.nan, window=UNLIMITED
    ):
        noise = torch.Generator().manual_seed(1)
        self.block, self.dtype = block, dtype
        total = sum(count for count, _ in sequences)
        self.q, self.k, self.v = (
            torch.randn(total, n, dim, generator=noise).to(dtype) for n in (heads, kv_heads, kv_heads)
        )
        used = [-(-context // block) for _, context in sequences]
        free = (torch.randperm(sum(used) + 3, generator=noise) + 1).tolist()
        self.cache = torch.full((2, len(free) + 1, block, kv_heads, dim), poison, dtype=dtype)
        self.cache[:, 0] = 0
        slots, spans, self.sequences = [], [], []
        for (count, context), blocks in zip(sequences, used, strict=True):
            table = [free.pop() for _ in range(blocks)]
            for at in range(context - count):
                past = torch.randn(2, kv_heads, dim, generator=noise).to(dtype)
                self.cache[:, table[at // block], at % block] = past
            spans.append(span(len(slots), count, context, table, block, CPU))
            slots += [table[at // block] * block + at % block for at in range(context - count, context)]
            self.sequences.append((count, context, table))
        packed = pack(self.sequences, block, DEVICE, window)
        self.told = AttentionBatch(torch.tensor(slots, device=DEVICE), packed=packed)
        self.batch = AttentionBatch(torch.tensor(slots), tuple(spans))

    def expected(self):
        cache = self.cache.clone()
        return reference.attend(self.q, self.k, self.v, cache, self.batch), cache

    def actual(self, programs=WHOLE):
        cache = self.cache.to(DEVICE, copy=True)
        attend = triton_unified.TritonAttention(programs)
        out = attend(self.q.to(DEVICE), self.k.to(DEVICE), self.v.to(DEVICE), cache, self.told)
        return out.to(CPU), cache.to(CPU)


def check(case, programs=WHOLE, tolerance=1e-5):
    (expected, written), (actual, cache) = case.expected(), case.actual(programs)
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(cache, written, equal_nan=True, atol=0, rtol=0)
    assert actual.isfinite().all()


CASES = {
    "one decode": [(1, 7)],
    "decode at a block's first slot": [(1, 33)],
    "first token": [(1, 1)],
    "decodes of many lengths": [(1, 1), (1, 70), (1, 4), (1, 17), (1, 16), (1, 5), (1, 32)],
    "whole prompt": [(41, 41)],
    "chunk with history": [(5, 14)],
    "chunk over several tiles": [(50, 61)],
    "mixed": [(1, 3), (1, 17), (4, 4), (27, 40), (1, 8), (2, 66)],
}


@pytest.mark.parametrize("programs", [WHOLE, SPLIT])
@pytest.mark.parametrize("name", CASES)
def test_the_kernel_equals_the_reference(name, programs):
    """Every mix of chunks and decodes gives what the definition gives, whatever unused slots hold (here NaN)."""
    check(Case(CASES[name]), programs)


@pytest.mark.parametrize("name", ["one decode", "first token", "decodes of many lengths"])
def test_decodes_may_be_divided_as_if_they_were_long(name, monkeypatch):
    """A recorded launch is made for the longest context there can be: segments that find no keys change nothing."""
    case, segments = Case(CASES[name]), []
    launch = triton_unified._launch_split
    monkeypatch.setattr(triton_unified, "_launch_split", lambda *told: segments.append(told[-1]) or launch(*told))
    packed = dataclasses.replace(case.told.packed, longest_context=4096)
    case.told = dataclasses.replace(case.told, packed=packed)
    check(case, SPLIT)
    assert segments == [triton_unified.MAX_SEGMENTS]


SHAPES = {
    "no grouping": {"heads": 2, "kv_heads": 2, "dim": 64, "block": 16},
    "groups of three": {"heads": 9, "kv_heads": 3, "dim": 64, "block": 16},
    "groups of four": {"heads": 8, "kv_heads": 2, "dim": 128, "block": 16},
    "one key head for all": {"heads": 7, "kv_heads": 1, "dim": 32, "block": 8},
    "a group larger than a tile": {"heads": 40, "kv_heads": 1, "dim": 16, "block": 8},
    "head of 80": {"heads": 4, "kv_heads": 2, "dim": 80, "block": 16},
    "head of 8": {"heads": 4, "kv_heads": 2, "dim": 8, "block": 4},
    "head of 256": {"heads": 2, "kv_heads": 1, "dim": 256, "block": 32},
    "block of one": {"heads": 2, "kv_heads": 1, "dim": 16, "block": 1},
    "block of three": {"heads": 2, "kv_heads": 1, "dim": 16, "block": 3},
    "block of 128": {"heads": 2, "kv_heads": 1, "dim": 16, "block": 128},
}


@pytest.mark.parametrize("name", SHAPES)
def test_any_heads_and_blocks(name):
    """Group sizes, head dimensions and block sizes, powers of two or not; a chunk beside decodes, and decodes alone."""
    check(Case([(1, 21), (7, 12), (1, 2)], **SHAPES[name]))
    check(Case([(1, 21), (1, 40)], **SHAPES[name]), SPLIT)


@pytest.mark.parametrize("programs", [WHOLE, SPLIT])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        (torch.float16, 4e-3),
        pytest.param(
            torch.bfloat16,
            3e-2,
            marks=pytest.mark.skipif(DEVICE == CPU, reason="Triton's interpreter multiplies bfloat16 as integers"),
        ),
    ],
)
def test_half_precision(dtype, tolerance, programs):
    """Half precision is only in what is read and written: sums are in float32."""
    check(Case([(1, 30), (1, 50)], dtype=dtype, dim=64), programs, tolerance)


@pytest.mark.parametrize("programs", [WHOLE, SPLIT])
@pytest.mark.parametrize("poison", [1e30, -1e30, math.inf])
def test_large_values_in_unused_slots_do_not_leak(poison, programs):
    """Masked keys do not count, however large."""
    check(Case([(1, 17), (1, 30)], poison=poison), programs)
    check(Case([(3, 17), (1, 30)], poison=poison), programs)


@settings(max_examples=8, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 20), st.integers(0, 30)), min_size=1, max_size=9), st.sampled_from([WHOLE, SPLIT])
)
def test_any_step(pairs, programs):
    """Every row finds its own sequence, however many there are and however they are cut."""
    check(Case([(count, count + past) for count, past in pairs], dim=8, heads=3, kv_heads=1), programs)


@pytest.mark.parametrize("programs", [WHOLE, SPLIT])
def test_rows_of_padding(programs):
    """Rows of no sequence, and a padding sequence on the null block, come back as zeros; others are not touched."""
    case = Case([(1, 9), (1, 30)])
    expected = case.expected()[0]
    case.q, case.k, case.v = (torch.cat((x, torch.zeros(3, *x.shape[1:]))) for x in (case.q, case.k, case.v))
    case.told = AttentionBatch(
        torch.cat((case.told.slots, case.told.slots.new_zeros(3))),
        packed=pack([*case.sequences, (1, 1, [0])], case.block, DEVICE),
    )
    actual, cache = case.actual(programs)
    torch.testing.assert_close(actual[:2], expected, atol=1e-5, rtol=1e-5)
    assert not actual[2:].any()
    assert not cache[:, 0].any()


@pytest.mark.parametrize("programs", [WHOLE, SPLIT])
def test_a_row_that_sees_nothing_is_zero(programs):
    """An empty context divides by no sum: zeros, not NaN (a graph's padding may have it)."""
    case = Case([(1, 9), (1, 30)])
    expected = case.expected()[0]
    contexts = torch.tensor([0, 30], dtype=torch.int32, device=DEVICE)
    case.told = dataclasses.replace(case.told, packed=dataclasses.replace(case.told.packed, contexts=contexts))
    actual = case.actual(programs)[0]
    assert not actual[0].any()
    torch.testing.assert_close(actual[1], expected[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("window", [1, 6, 20, 1000])
@pytest.mark.parametrize("sequences", [[(1, 33), (1, 5)], [(1, 33), (30, 50)]])
def test_a_sliding_window(sequences, window):
    """A token sees itself and the `window - 1` before it; what lies before the window is not even read."""
    case = Case(sequences, window=window)
    expected, row = [], 0
    cache = case.expected()[1]
    for count, context, table in case.sequences:
        slots = torch.tensor([table[at // case.block] * case.block + at % case.block for at in range(context)])
        keys, values = cache.flatten(1, 2)[:, slots].repeat_interleave(3, dim=2)
        for end in range(context - count + 1, context + 1):
            seen = slice(max(0, end - window), end)
            scores = torch.einsum("hd,khd->hk", case.q[row], keys[seen]) / math.sqrt(case.q.shape[2])
            expected.append(torch.einsum("hk,khd->hd", scores.softmax(1), values[seen]))
            row += 1
        case.cache.view(2, -1, *cache.shape[3:])[:, slots[: max(0, context - count + 1 - window)]] = math.nan
    for programs in (WHOLE, SPLIT):
        torch.testing.assert_close(case.actual(programs)[0], torch.stack(expected), atol=1e-5, rtol=1e-5)


def test_a_sequence_reads_what_another_writes_in_the_same_step():
    """The second sequence shares the block that the first fills in this very step, and comes first in the batch."""
    prompt = Case([(8, 8)])
    expected, (first, second) = prompt.expected()[0], prompt.sequences[0][2]
    order = torch.tensor([4, 5, 6, 7, 0, 1, 2, 3])
    prompt.q, prompt.k, prompt.v = prompt.q[order], prompt.k[order], prompt.v[order]
    slots = [second * 4 + at for at in range(4)] + [first * 4 + at for at in range(4)]
    packed = pack([(4, 8, [first, second]), (4, 4, [first])], 4, DEVICE)
    prompt.told = AttentionBatch(torch.tensor(slots, device=DEVICE), packed=packed)
    torch.testing.assert_close(prompt.actual()[0], expected[order], atol=1e-5, rtol=1e-5)


def test_offsets_beyond_32_bits(monkeypatch):
    """A block that begins 2^31 values into the cache is found. The memory between is reserved, never touched."""
    near = Case([(1, 7)], heads=1, kv_heads=1, dtype=torch.float16)
    expected, cache = near.expected()
    gap, size = 1 << 30, cache[0, 0].numel()
    far = torch.empty(2 * gap + 2 * size, dtype=torch.float16)
    far = far.as_strided((2, 3, *cache.shape[2:]), (size, gap, *cache.stride()[2:]))
    _, context, table = near.sequences[0]
    for to, block in enumerate(table, 1):
        far[:, to] = cache[:, block]
    monkeypatch.setattr(triton_unified, "write", lambda *_: None)  # it wants one piece of memory; all is written above
    told = AttentionBatch(near.told.slots, packed=pack([(1, context, [1, 2])], near.block, DEVICE))
    q, k, v = (tensor.to(DEVICE) for tensor in (near.q, near.k, near.v))
    actual = triton_unified.TritonAttention(WHOLE)(q, k, v, far.to(DEVICE), told).to(CPU)
    torch.testing.assert_close(actual, expected, atol=4e-3, rtol=4e-3)


@pytest.mark.parametrize(("contexts", "kv_heads", "programs", "segments"), [
    ([4000], 8, 264, 16),  # a lone long sequence is divided as far as it goes
    ([4000] * 16, 8, 264, 2),
    ([4000] * 64, 8, 264, 1),  # a large batch fills the device by itself
    ([100], 8, 264, 1),  # too short to be worth it
    ([600], 8, 264, 4),
])  # fmt: skip
def test_how_many_programs_share_a_sequence(monkeypatch, contexts, kv_heads, programs, segments):
    """Small batches are divided, large ones and short sequences are not."""
    monkeypatch.setattr(triton_unified, "SEGMENT_KEYS", 128)
    packed = pack([(1, context, [1] * 250) for context in contexts], 16, CPU)
    attention = triton_unified.TritonAttention(programs)
    assert attention._segments(packed, kv_heads) == segments
    chunked = dataclasses.replace(packed, longest_chunk=2)
    assert attention._segments(chunked, kv_heads) == 1


def test_what_it_cannot_compute_is_an_error():
    """A step that was not packed, and query heads that key heads do not divide, are refused."""
    case = Case([(1, 7)])
    attend = triton_unified.TritonAttention(WHOLE)
    with pytest.raises(ValueError, match="packed"):
        attend(case.q, case.k, case.v, case.cache, AttentionBatch(case.batch.slots))
    with pytest.raises(ValueError, match="multiple"):
        attend(case.q[:, :5], case.k, case.v, case.cache, case.told)


def test_packing_agrees_with_spans_and_decodes():
    """The same step told in both ways is the same step."""
    sequences = [(0, 9, [4, 2, 7]), (1, 3, [5, 6]), (2, 4, [1])]
    packed = pack([(1, context, table) for _, context, table in sequences], 4, CPU)
    grouped = decodes(sequences, 4, torch.zeros(1))
    assert packed.starts.tolist() == [0, 1, 2, 3]
    assert tuple(packed.contexts.tolist()) == grouped.contexts
    assert packed.tables.tolist() == grouped.tables.tolist() == [[4, 2, 7], [5, 0, 0], [1, 0, 0]]


def test_the_engine_runs_on_it(tiny_model):
    """Greedy tokens of chunked prompts and batched decodes equal those of the naive loop."""
    prompts = {"a": [5, 9, 200, 31, 7, 7, 12, 90, 41, 3, 8], "b": [17, 4, 100]}
    config = EngineConfig(
        model_len=64, num_blocks=33, block_size=4, max_num_seqs=4, max_num_batched_tokens=8, device=DEVICE.type
    )
    model = load_model(tiny_model, device=DEVICE.type)
    engine = Engine(Runner(model, config, triton_unified.TritonAttention(SPLIT), packed=True))
    made = {
        name: engine.add(name, prompt, Sampling(max_tokens=5, temperature=0, ignore_eos=True))
        for name, prompt in prompts.items()
    }
    for _ in range(30):
        engine.step()
    assert not engine.has_work
    assert {name: sequence.output for name, sequence in made.items()} == {
        name: tiny_llama.naive_greedy(prompt, 5) for name, prompt in prompts.items()
    }


def test_sliding_windows_of_a_model_reach_the_kernel(tmp_path, monkeypatch):
    """Layers with and without a window in one model: the same logits as on the fast CPU path, chunk by chunk."""
    model = load_model(tiny_models.save(tmp_path, "gemma3, window"), device=DEVICE.type)
    config = EngineConfig(
        model_len=64, num_blocks=33, block_size=4, max_num_seqs=4, max_num_batched_tokens=16, device=DEVICE.type
    )
    kernel = triton_unified.TritonAttention(SPLIT)

    def logits(runner):
        rows, run = [], runner.run
        monkeypatch.setattr(runner, "run", lambda work: rows.append(run(work)) or rows[-1])
        engine = Engine(runner)
        for start in (3, 4):
            engine.add(
                str(start), list(range(start, start + 20)), Sampling(max_tokens=3, temperature=0, ignore_eos=True)
            )
        while engine.has_work:
            engine.step()
        return torch.cat(rows)

    wanted = logits(Runner(model, config))
    torch.testing.assert_close(logits(Runner(model, config, kernel, packed=True)), wanted, rtol=1e-4, atol=1e-4)
    forgetful = logits(Runner(model, config, _without_window(kernel), packed=True))
    assert not torch.allclose(forgetful, wanted, rtol=1e-3, atol=1e-3)


def _without_window(attend: Attention) -> Attention:
    """A kernel that forgets the window: the comparison must notice."""

    def forgetful(q, k, v, cache, batch):
        packed = dataclasses.replace(batch.packed, window=UNLIMITED)
        return attend(q, k, v, cache, dataclasses.replace(batch, packed=packed))

    return forgetful


COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from cloud_engine.attention import triton_unified as kernels

def check(kernel, constants, **pointers):
    kinds = {"scale": "fp32"} | dict.fromkeys(constants, "constexpr") | pointers
    signature = {name: kinds.get(name, "i32") for name in kernel.arg_names}
    made = compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", 90, 32))
    print(kernel.__name__, made.metadata.shared, len(made.asm["cubin"]))

integers = dict.fromkeys(["starts", "contexts", "tables"], "*i32")
shape = dict(group=4, head_dim=80, dim=128, block_size=16, key_tile=kernels.KEY_TILE)
whole, split = dict(tile=64, tokens=16, segments=1), dict(tile=16, tokens=4, segments=8)
check(kernels._attend, shape | whole, q="*bf16", cache="*bf16", out="*bf16", sums="*bf16", **integers)
check(kernels._attend, shape | split, q="*bf16", cache="*bf16", out="*fp32", sums="*fp32", **integers)
check(kernels._attend, shape | whole, q="*bf16", cache="*fp8e4nv", out="*bf16", sums="*bf16", **integers)
check(kernels._merge, dict(head_dim=80, dim=128, segments=8), parts="*fp32", sums="*fp32", out="*bf16")
"""


def test_the_kernels_compile_for_a_gpu(tmp_path):
    """What the interpreter accepts, the compiler may not: each kernel becomes machine code for an H100."""
    environ = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [name for name, *_ in lines] == ["_attend", "_attend", "_attend", "_merge"]
    assert all(int(shared) <= 99 * 1024 for _, shared, _ in lines)
