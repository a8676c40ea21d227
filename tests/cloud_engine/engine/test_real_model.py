"""The bar: on a real model, float32 greedy tokens equal those of `transformers`, however the engine batches."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from cloud_engine.engine.calibration import TEXT, calibrate
from cloud_engine.engine.config import EngineConfig
from cloud_engine.engine.engine import Engine
from cloud_engine.engine.runner import Runner, attention_for
from cloud_engine.model.decoder import Decoder
from cloud_engine.model.tokenizer import Tokenizer
from cloud_engine.model.weights import load_model
from shared.schemas import Message, Sampling

pytestmark = [pytest.mark.model, pytest.mark.timeout(1200)]

TOKENS = 16
GREEDY = Sampling(temperature=0, max_tokens=TOKENS, ignore_eos=True)
SUBJECTS = (
    "the tides", "a bicycle", "prime numbers", "the city of Lagos", "Python generators", "photosynthesis", "tea",
    "the French Revolution", "cloud computing", "honey bees", "volcanoes", "jazz",
)  # fmt: skip
ASKED = ("Explain {} in one sentence.", "Write a short poem about {}.", "List three facts about {}:")
RAW = (
    "Once upon a time", "def fibonacci(n):\n", "1, 2, 3, 4,", "La capitale de la France est", "Dear Sir or Madam,",
    "The chemical symbol for gold", '{"name": "Ada", "age":', "SELECT name FROM", "日本の首都は", "A", " ",
    "In 1969, 12345 people", "import numpy as np\n\nx =", "To be, or not to be,",
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model(model_path: Path) -> Decoder:
    return load_model(model_path).pack()


@pytest.fixture(scope="module")
def prompts(model_path: Path) -> list[list[int]]:
    """36 conversations, which begin alike through the template's system message, and 14 raw texts."""
    tokenizer = Tokenizer(model_path)
    chats = [form.format(subject) for subject in SUBJECTS for form in ASKED]
    return [tokenizer.encode_chat([Message(role="user", content=text)]) for text in chats] + [
        tokenizer.encode(text) for text in RAW
    ]


@pytest.fixture(scope="module")
def wanted(model_path: Path, prompts: list[list[int]]) -> list[list[int]]:
    """What transformers generates for each prompt alone, from the same file."""
    oracle = AutoModelForCausalLM.from_pretrained(
        str(model_path.parent), gguf_file=model_path.name, dtype=torch.float32, local_files_only=True
    )
    oracle.generation_config.eos_token_id = None
    made = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        full = oracle.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=TOKENS, pad_token_id=0
        )
        made.append(full[0, len(prompt) :].tolist())
    return made


def engine(model: Decoder, **changes: object) -> Engine:
    values = {"model_len": 256, "num_blocks": 1000, "max_num_seqs": 64, "max_num_batched_tokens": 256}
    config = EngineConfig(**(values | changes))
    kernel = attention_for(model.config, config)  # the one that serves
    return Engine(Runner(model, config, kernel.attend, packed=kernel.packed))


def generate(engine: Engine, prompts: list[list[int]]) -> list[list[int]]:
    sequences = [engine.add(str(index), prompt, GREEDY) for index, prompt in enumerate(prompts)]
    while engine.has_work:
        engine.step()
    return [sequence.output for sequence in sequences]


def test_alone(model, prompts, wanted):
    """Each of 50 prompts by itself, without a cache."""
    assert len(prompts) == 50
    single = engine(model, prefix_caching=False)
    assert [generate(single, [prompt])[0] for prompt in prompts] == wanted
    assert single.scheduler.counters.chunks == 0


def test_batched_chunked_and_shared(model, prompts, wanted):
    """All 50 at once, in steps of at most 64 tokens, sharing prefixes."""
    batched = engine(model, max_num_batched_tokens=64)
    assert generate(batched, prompts) == wanted
    assert batched.scheduler.counters.chunks > 0
    assert batched.stats().prefix_hit_tokens > 0
    assert batched.stats().preemptions == 0


def test_drafted(model, prompts, wanted):
    """With drafts of the engine's own, right and wrong ones."""
    drafting = engine(model, drafting=True, free_rows=64)
    assert generate(drafting, prompts) == wanted
    stats = drafting.stats()
    assert 0 < stats.accepted_tokens < stats.drafted_tokens


@pytest.mark.parametrize("caching", [False, True])
def test_preempted(model, prompts, wanted, caching):
    """All 50 at once in too few blocks: many are preempted and recomputed, with and without the prefix cache."""
    crowded = engine(model, block_size=4, num_blocks=240, prefix_caching=caching, max_num_batched_tokens=96)
    assert generate(crowded, prompts) == wanted
    assert crowded.stats().preemptions > 0
    assert crowded.scheduler.counters.chunks > 0
    assert (crowded.stats().prefix_hit_tokens > 0) is caching


def test_an_fp8_cache_keeps_most_tokens(model, model_path, prompts, wanted):
    """With keys and values in 8 bits, most greedy tokens before the first other one stay those of float32."""
    limits = EngineConfig(model_len=256, num_blocks=1000, max_num_batched_tokens=256, kv_dtype="fp8")
    config = calibrate(model, limits, Tokenizer(model_path).encode(TEXT))
    made = generate(Engine(Runner(model, config)), prompts)
    pairs = [[a == b for a, b in zip(ours, full, strict=True)] for ours, full in zip(made, wanted, strict=True)]
    kept = [[*pair, False].index(False) for pair in pairs]
    assert sum(at > 0 for at in kept) >= 0.9 * len(kept)
    assert TOKENS * len(kept) > sum(kept) >= 0.6 * TOKENS * len(kept)
