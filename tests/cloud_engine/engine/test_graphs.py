import itertools
import random

import pytest
import structlog
import tiny_llama
import torch

from cloud_engine.attention import reference
from cloud_engine.attention.batch import AttentionBatch, span
from cloud_engine.engine.chunk import Chunk
from cloud_engine.engine.config import EngineConfig
from cloud_engine.engine.engine import Engine
from cloud_engine.engine.graphs import CudaCapture, graph_sizes
from cloud_engine.engine.runner import Runner
from cloud_engine.model.weights import load_model
from shared.schemas import Sampling

LIMIT = 9
CONFIG = EngineConfig(
    model_len=40, num_blocks=LIMIT * 10 + 1, block_size=4, max_num_seqs=LIMIT, max_num_batched_tokens=32
)
GREEDY = Sampling(temperature=0, max_tokens=20, ignore_eos=True)


class Recorder:
    """In CUDA's place: what is recorded is run again, in torch, at each replay."""

    def __init__(self) -> None:
        self.recorded = self.replays = 0

    def __call__(self, step):
        step()
        self.recorded += 1

        def replay() -> None:
            self.replays += 1
            step()

        return replay


def attend(q, k, v, cache, batch):
    """The reference, told of a step by `packed` only."""
    packed = batch.packed
    starts, contexts = packed.starts.tolist(), packed.contexts.tolist()
    assert packed.rows == len(q)
    assert max(contexts) <= packed.longest_context
    spans = [
        span(row, end - row, context, table[: -(-context // cache.shape[2])], cache.shape[2], q.device)
        for row, end, context, table in zip(starts, starts[1:], contexts, packed.tables.tolist(), strict=False)
    ]
    return reference.attend(q, k, v, cache, AttentionBatch(batch.slots, tuple(spans)))


def runner(folder, *, graphs: bool, config: EngineConfig = CONFIG) -> tuple[Runner, Recorder]:
    made, recorder = Runner(load_model(folder), config, attend, packed=True), Recorder()
    if graphs:
        made.record(recorder)
    return made, recorder


def test_sizes_always_contain_the_largest_step():
    """Ascending, none beyond the limit, the limit itself always, and little padding between them."""
    for limit in (1, 2, 3, 7, 8, 9, 96, 100, 255, 256, 257, 500, 1024, 4096):
        sizes = graph_sizes(limit)
        assert sizes == sorted(set(sizes))
        assert sizes[-1] == limit
        assert sizes[0] == 1
        assert all(after - before <= max(4, 8, before // 4) for before, after in itertools.pairwise(sizes))
    assert len(graph_sizes(4096)) < 64


@pytest.mark.parametrize("count", range(1, LIMIT + 2))
def test_a_padded_step_is_the_unpadded_one(tiny_model, count):
    """Every size from 1 to one more than there is a graph for, with NaN in whatever no row may see and rubbish from an
    earlier step in the inputs: the same logits, keys and values."""
    rng = random.Random(count)
    config = EngineConfig(**{name: getattr(CONFIG, name) for name in CONFIG.__slots__} | {"max_num_batched_tokens": 64})
    plain, _ = runner(tiny_model, graphs=False, config=config)
    graphed, recorder = runner(tiny_model, graphs=True, config=config)
    assert recorder.recorded == len(graph_sizes(LIMIT))
    blocks = list(range(1, config.num_blocks))
    rng.shuffle(blocks)
    ends = [rng.randrange(1, 41) for _ in range(count)]
    chunks = [
        Chunk([rng.randrange(259)], end - 1, [blocks.pop() for _ in range(-(-end // 4))], 1)
        for end, _ in zip(ends, itertools.count(), strict=False)
    ]
    written = [(chunk.table[at // 4], at % 4) for chunk in chunks for at in range(chunk.start)]
    for index, (ours, theirs) in enumerate(zip(plain.caches, graphed.caches, strict=True)):
        noise = torch.Generator().manual_seed(index)
        ours[:, 1:] = torch.nan
        for block, slot in written:
            ours[:, block, slot] = torch.randn(2, *ours.shape[3:], generator=noise)
        theirs[:, 1:] = ours[:, 1:]
    graphs = graphed.graphs
    with torch.inference_mode():
        graphs.logits.fill_(torch.nan)
        for values in (graphs.inputs.tokens, graphs.inputs.slots, graphs.inputs.tables):
            values.fill_(2**31 - 1)
    expected, actual = plain.run(chunks), graphed.run(chunks)
    assert recorder.replays == (count <= LIMIT)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(plain.caches, graphed.caches, strict=True):
        torch.testing.assert_close(theirs[:, 1:], ours[:, 1:], atol=1e-5, rtol=1e-5, equal_nan=True)
        assert theirs[:, 0].isfinite().all()


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("blocks", [24, LIMIT * 10])
def test_an_engine_on_graphs_gives_the_naive_output(tiny_model, depth, blocks):
    """Decode steps are replayed, steps with a prompt in them are not, and no token changes, also if tokens are
    pending, sequences preempted, and the number of rows goes up and down."""
    config = EngineConfig(
        model_len=40, num_blocks=blocks, block_size=4, max_num_seqs=5, max_num_batched_tokens=16, async_depth=depth
    )
    made, recorder = runner(tiny_model, graphs=True, config=config)
    engine, rng = Engine(made), random.Random(3)
    prompts = [[rng.randrange(3, 259) for _ in range(rng.randrange(1, 20))] for _ in range(7)]
    sequences = [engine.add(str(index), prompt, GREEDY) for index, prompt in enumerate(prompts)]
    while engine.has_work:
        engine.step()
    engine.close()
    assert [seq.output for seq in sequences] == [tiny_llama.naive_greedy(prompt, 20) for prompt in prompts]
    assert 0 < recorder.replays < engine.stats().steps
    assert (engine.stats().preemptions > 0) is (blocks == 24)


def test_drafts_and_prompts_are_computed_without_graphs(tiny_model):
    """Only steps of one wanted row a sequence fit."""
    graphs = runner(tiny_model, graphs=True)[0].graphs
    assert graphs.fits([Chunk([1], 3, [1], 1)])
    assert not graphs.fits([Chunk([1], 3, [1], 1), Chunk([1, 2], 0, [2], 1)])
    assert not graphs.fits([Chunk([1, 2, 3], 0, [1], 3)])
    assert not graphs.fits([Chunk([1], 0, [1], 0)])


def test_what_cannot_be_recorded_runs_eagerly(tiny_model):
    """A layer that fails while it is recorded costs the graphs, not the engine; the log names the reason."""
    made, _ = runner(tiny_model, graphs=False)

    def refusing(step):
        step()
        raise RuntimeError("operation not permitted when stream is capturing")

    with structlog.testing.capture_logs() as logs:
        made.record(refusing)
    assert made.graphs is None
    assert logs[0]["steps"] == "eager"
    assert "not permitted" in logs[0]["fallback"]
    engine = Engine(made)
    sequence = engine.add("a", [5, 6, 7], GREEDY)
    while engine.has_work:
        engine.step()
    assert sequence.output == tiny_llama.naive_greedy([5, 6, 7], 20)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: real graphs are recorded and replayed")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_graphs_on_cuda_equal_eager_steps(tiny_model, dtype):
    """Every size from 1 to one more than there is a graph for, on the device: replayed and eager logits are equal."""
    from cloud_engine.engine.runner import attention_for

    changes = {"device": "cuda", "dtype": dtype, "async_depth": 1}
    config = EngineConfig(**{name: getattr(CONFIG, name) for name in CONFIG.__slots__} | changes)
    model = load_model(tiny_model, dtype=dtype, device="cuda")
    kernel = attention_for(model.config, config)
    assert kernel.packed
    eager = Runner(model, config, kernel.attend, packed=True)
    graphed = Runner(model, config, kernel.attend, packed=True)
    graphed.record(CudaCapture())
    rng = random.Random(0)
    for count in range(1, LIMIT + 2):
        tables = [list(range(1 + 10 * index, 11 + 10 * index)) for index in range(min(count, LIMIT))]
        chunks = [Chunk([rng.randrange(259)], rng.randrange(40), table, 1) for table in tables]
        torch.testing.assert_close(graphed.run(chunks), eager.run(chunks), atol=2e-2, rtol=2e-2)
