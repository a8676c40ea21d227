import random
from dataclasses import replace

import pytest
import tiny_llama
import tiny_models
import torch

from cloud_engine.attention.batch import FP8, FP8_MAX
from cloud_engine.engine.calibration import TEXT, calibrate
from cloud_engine.engine.chunk import Chunk
from cloud_engine.engine.config import EngineConfig
from cloud_engine.engine.engine import Engine
from cloud_engine.engine.runner import Runner
from cloud_engine.engine.serving import load_engine
from cloud_engine.model.tokenizer import Tokenizer
from cloud_engine.model.weights import load_model
from shared.schemas import Sampling

LIMITS = EngineConfig(
    model_len=128, num_blocks=65, block_size=4, max_num_seqs=8, max_num_batched_tokens=64, kv_dtype="fp8"
)
GREEDY = Sampling(temperature=0, max_tokens=12, ignore_eos=True)
PROMPT = [random.Random(3).randrange(3, 259) for _ in range(40)]


@pytest.fixture(scope="module")
def model(tiny_model):
    return load_model(tiny_model)


@pytest.fixture(scope="module")
def text(tiny_model):
    return Tokenizer(tiny_model).encode(TEXT)


@pytest.fixture(scope="module")
def limits(model, text):
    return calibrate(model, LIMITS, text)


def logits(model, config, tokens=PROMPT):
    table = list(range(1, 1 + -(-len(tokens) // config.block_size)))
    return Runner(model, config).run([Chunk(tokens, 0, table, len(tokens))])


def test_scales_fit_the_text_layer_by_layer(model, limits, text):
    """Nothing of the calibration text is clipped, and no scale is more than four times what would do."""
    runner = Runner(model, replace(LIMITS, kv_dtype="auto", num_blocks=40))
    runner.run([Chunk(text[:128], 0, list(range(1, 33)), 1)])
    assert len(limits.kv_scales) == model.config.num_layers
    for cache, scales in zip(runner.caches, limits.kv_scales, strict=True):
        for largest, scale in zip(cache[:, 1:33].abs().flatten(1).amax(1).tolist(), scales, strict=True):
            assert FP8_MAX / 4 <= largest / scale <= FP8_MAX / 2


def test_logits_stay_close(model, limits):
    """An FP8 cache changes the logits of a prompt a little, and truly (it is in use)."""
    exact, rounded = logits(model, replace(limits, kv_dtype="auto")), logits(model, limits)
    spread = exact.std()
    error = (rounded - exact).pow(2).mean().sqrt() / spread
    assert 1e-4 < error < 0.15


def test_wrong_scales_are_noticed(model, limits):
    """The comparison above would see scales that clip: a thousandth of the right ones."""
    clipping = replace(limits, kv_scales=tuple((k / 1024, v / 1024) for k, v in limits.kv_scales))
    exact, rounded = logits(model, replace(limits, kv_dtype="auto")), logits(model, clipping)
    assert (rounded - exact).pow(2).mean().sqrt() / exact.std() > 0.3


def run(engine: Engine, *prompts: list[int], salt: str = "") -> list[list[int]]:
    made = [engine.add(str(at), prompt, GREEDY, salt=salt) for at, prompt in enumerate(prompts)]
    while engine.has_work:
        engine.step()
    return [sequence.output for sequence in made]


def test_output_does_not_depend_on_chunks_hits_or_preemption(model, limits):
    """Every token is attended as it was stored, also within its own chunk: an FP8 engine is as reproducible as any."""
    others = [PROMPT[:20] + [at] * 15 for at in range(5, 9)]
    alone = [run(Engine(Runner(model, limits)), prompt)[0] for prompt in (PROMPT, *others)]
    crowded = Engine(Runner(model, replace(limits, model_len=64, num_blocks=24, max_num_batched_tokens=9)))
    assert run(crowded, PROMPT, *others) == alone
    assert crowded.stats().preemptions > 0
    assert crowded.stats().prefix_hit_tokens > 0
    assert crowded.scheduler.counters.chunks > 0


def test_sliding_window_layers_are_fp8_too(tmp_path):
    """A model with windows runs on an FP8 cache in all its layers, near its full-precision logits."""
    model = load_model(tiny_models.save(tmp_path, "gemma3, window"))
    limits = calibrate(model, LIMITS, PROMPT)
    assert {cache.dtype for cache in Runner(model, limits).caches} == {FP8}
    exact, rounded = logits(model, replace(limits, kv_dtype="auto")), logits(model, limits)
    assert 1e-4 < (rounded - exact).pow(2).mean().sqrt() / exact.std() < 0.15


def test_scales_are_frozen(model, limits):
    """Traffic far beyond the calibrated range changes no scale: it is clipped, and published blocks stay the same."""
    engine = Engine(Runner(model, limits))
    run(engine, PROMPT)
    blocks = [cache.clone() for cache in engine.runner.caches]
    held = [block for block, key in enumerate(engine.scheduler.pool.hashes) if key is not None]
    run(engine, [258, 1, 2] * 13)
    assert engine.config is limits
    for before, after in zip(blocks, engine.runner.caches, strict=True):
        assert torch.equal(before[:, held].view(torch.uint8), after[:, held].view(torch.uint8))


def test_other_scales_share_no_prefix(model, limits):
    """After a restart with other scales, or another cache format, the same prompt has another hash: nothing hits."""
    other = replace(limits, kv_scales=tuple((2 * k, v) for k, v in limits.kv_scales))
    engines = [Engine(Runner(model, config)) for config in (limits, other, replace(limits, kv_dtype="auto"))]
    roots = [engine.add("a", PROMPT, GREEDY).root for engine in engines]
    assert len(set(roots)) == 3
    assert Engine(Runner(model, limits)).add("a", PROMPT, GREEDY).root == roots[0]


def test_fp8_without_scales_is_refused(model):
    """There is no silent default of 1."""
    with pytest.raises(ValueError, match="kv_scales"):
        Runner(model, LIMITS)


def test_nonsense_cannot_be_calibrated(tiny_model, text):
    """A model whose keys are not finite gets a clear error instead of a useless scale."""
    broken = load_model(tiny_model)
    broken.layers[0].attention.qkv.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="largest"):
        calibrate(broken, LIMITS, text)


def test_loading_calibrates(tiny_model):
    """`kv_dtype` is all one has to say; a number then takes a quarter of its bytes in float32: more blocks fit."""
    engines = {
        kind: load_engine(tiny_model, EngineConfig(kv_dtype=kind, kv_bytes=1 << 20))._engine for kind in ("auto", "fp8")
    }
    assert engines["fp8"].runner.caches[0].dtype is FP8
    assert len(engines["fp8"].config.kv_scales) == 2
    assert engines["fp8"].config.num_blocks > 3.9 * engines["auto"].config.num_blocks
    assert run(engines["fp8"], tiny_llama.tokenizer().encode("hello"))[0]
