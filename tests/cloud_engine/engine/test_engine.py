import itertools
import random

import pytest
import tiny_llama
import torch

from cloud_engine.attention import reference
from cloud_engine.engine.engine import Engine
from cloud_engine.engine.runner import Runner
from cloud_engine.engine.sequence import State
from cloud_engine.model.weights import load_model
from shared.errors import BadRequest, ContextTooLong, Overloaded
from shared.schemas import Sampling

GREEDY = Sampling(temperature=0, max_tokens=24, ignore_eos=True)


def prompts() -> list[list[int]]:
    """Some with a common beginning, one of a single token, one longer than any chunk."""
    rng = random.Random(5)
    trunk = [rng.randrange(3, 259) for _ in range(12)]
    tails = [[rng.randrange(3, 259) for _ in range(length)] for length in (1, 5, 9, 30)]
    return [*(trunk + tail for tail in tails), tails[0], tails[3] * 2, trunk]


@pytest.fixture(scope="module")
def wanted() -> list[list[int]]:
    return [tiny_llama.naive_greedy(prompt, GREEDY.max_tokens) for prompt in prompts()]


def generate(engine: Engine, requests, *, sampling=GREEDY, stagger=0) -> list[list[int]]:
    """Outputs of all requests, added at once or one every `stagger` steps."""
    waiting, made = list(enumerate(requests)), {}
    for step in range(5000):
        while waiting and (not stagger or step >= waiting[0][0] * stagger):
            index, prompt = waiting.pop(0)
            made[index] = engine.add(str(index), prompt, sampling)
        engine.step()
        if not waiting and not engine.has_work:
            return [made[index].output for index in range(len(requests))]
    pytest.fail("the engine never finished")


@pytest.mark.parametrize(
    ("budget", "caching", "blocks", "seqs", "stagger"),
    list(itertools.product([8, 17, 512], [False, True], [28, 200], [1, 8], [0, 3])),
)
def test_greedy_output_equals_the_naive_loop(tiny_model, wanted, budget, caching, blocks, seqs, stagger):
    """Chunk size, prefix cache, forced preemption and batch mix never change a token of float32 greedy decoding."""
    engine = tiny_llama.engine(
        tiny_model,
        model_len=100,
        max_num_batched_tokens=budget,
        prefix_caching=caching,
        num_blocks=blocks,
        max_num_seqs=seqs,
    )
    assert generate(engine, prompts(), stagger=stagger) == wanted
    counters = engine.scheduler.counters
    assert (counters.prefix_hit_tokens > 0) is caching
    assert (counters.chunks > 0) is (budget < 60)
    if blocks == 28 and seqs == 8 and not stagger:
        assert counters.preemptions > 0
    assert engine.stats().kv_blocks_used == 0


def test_the_reference_kernel_gives_the_same_output(tiny_model, wanted):
    """The engine on the plain attention agrees too: the kernels are interchangeable."""
    fast = tiny_llama.engine(tiny_model, max_num_batched_tokens=16)
    slow = Engine(Runner(load_model(tiny_model), fast.config, attend=reference.attend))
    assert generate(slow, prompts()[:3]) == wanted[:3]


def test_seeds_reproduce_under_other_batches_and_preemption(tiny_model):
    """The same seed gives the same tokens alone, in a crowd, and after being preempted; another seed does not."""
    sampling = Sampling(temperature=1.0, top_p=0.95, seed=11, max_tokens=20, ignore_eos=True)
    alone = [generate(tiny_llama.engine(tiny_model), [prompt], sampling=sampling)[0] for prompt in prompts()]
    crowded = tiny_llama.engine(tiny_model, num_blocks=33, max_num_batched_tokens=16)
    assert generate(crowded, prompts(), sampling=sampling) == alone
    assert crowded.stats().preemptions > 0
    other = Sampling(temperature=1.0, top_p=0.95, seed=12, max_tokens=20, ignore_eos=True)
    assert generate(tiny_llama.engine(tiny_model), prompts(), sampling=other) != alone


def test_without_a_seed_each_request_gets_its_own(tiny_model):
    """The engine's entropy seeds what brings no seed of its own."""
    numbers = itertools.count()
    engine = Engine(tiny_llama.engine(tiny_model).runner, entropy=lambda: next(numbers))
    sampling = Sampling(max_tokens=20, ignore_eos=True)
    first, second = generate(engine, [prompts()[0]] * 2, sampling=sampling)
    assert first != second


def test_what_cannot_be_served_is_refused_alone(tiny_model):
    """Empty prompt, foreign ids, over-long prompt or output, full queue: typed errors, and no other is harmed."""
    engine = tiny_llama.engine(tiny_model, max_waiting=1)
    good = engine.add("good", [5, 6, 7], Sampling(temperature=0, max_tokens=12, ignore_eos=True))
    engine.step()
    for tokens in ([], [-1], [259], [2**40]):
        with pytest.raises(BadRequest) as refused:
            engine.add("bad", tokens, GREEDY)
        assert refused.value.param == "prompt"
    for tokens, limit in (([3] * 128, None), ([3] * 120, 9)):
        with pytest.raises(ContextTooLong, match="128"):
            engine.add("bad", tokens, Sampling(max_tokens=limit))
    engine.add("queued", [5], GREEDY)
    with pytest.raises(Overloaded):
        engine.add("one too many", [5], GREEDY)
    while engine.has_work:
        engine.step()
    assert good.output == tiny_llama.naive_greedy([5, 6, 7], 12)


def test_without_max_tokens_output_runs_to_the_context_length(tiny_model):
    """`max_tokens` None fills the model length to the last token and ends with `length`."""
    engine = tiny_llama.engine(tiny_model, model_len=32)
    sequence = engine.add("a", [3] * 20, Sampling(temperature=0, ignore_eos=True))
    while engine.has_work:
        engine.step()
    assert (sequence.num_tokens, sequence.ending) == (32, "length")
    assert sequence.output == tiny_llama.naive_greedy([3] * 20, 12)


def test_decodes_go_on_while_a_long_prompt_is_prefilled(tiny_model):
    """A decoding request gets a token in every step, however long the prompt beside it."""
    engine = tiny_llama.engine(tiny_model, max_num_batched_tokens=9)
    decoding = engine.add("decoding", [5, 6], Sampling(temperature=0, max_tokens=60, ignore_eos=True))
    engine.step()
    long = engine.add("long", [7] * 100, GREEDY)
    steps = 0
    while not long.num_output:
        before = decoding.num_output
        engine.step()
        steps += 1
        assert decoding.num_output == before + 1
    assert steps > 10


@pytest.mark.parametrize("when", ["waiting", "mid-chunk", "running", "finished"])
def test_abort_leaves_the_others_alone(tiny_model, wanted, when):
    """An abort in any state gives the blocks back and changes no token of another request."""
    engine = tiny_llama.engine(tiny_model, max_num_batched_tokens=16)
    other = engine.add("other", prompts()[1], GREEDY)
    target = engine.add("target", prompts()[3], GREEDY)
    reached = {
        "waiting": lambda: True,
        "mid-chunk": lambda: 0 < target.num_computed < target.num_prompt,
        "running": lambda: target.num_output > 2,
        "finished": lambda: target.state is State.FINISHED,
    }[when]
    while not reached():
        engine.step()
    assert engine.abort("target") is (when != "finished")
    assert not engine.abort("target")
    while engine.has_work:
        assert all(output.sequence is other for output in engine.step())
    assert other.output == wanted[1]
    assert engine.stats().kv_blocks_used == 0


def test_another_salt_hits_nothing(tiny_model):
    """A prompt cached for one tenant is not found by another."""
    engine = tiny_llama.engine(tiny_model)
    for salt, cached in (("a", 0), ("b", 0), ("a", 20), ("b", 20)):
        sequence = engine.add("x", list(range(3, 25)), GREEDY, salt=salt)
        while engine.has_work:
            engine.step()
        assert sequence.num_cached == cached


def test_nan_logits_fail_their_request_and_poison_no_other(tiny_model):
    """Keys and values that became NaN stay with the request they belong to, also when its blocks are used again."""
    engine = tiny_llama.engine(tiny_model, num_blocks=17, model_len=64, prefix_caching=False)
    bad = engine.add("bad", [3] * 20, GREEDY)
    engine.step()
    for cache in engine.runner.caches:
        cache[:, bad.block_table] = float("nan")
    engine.step()
    assert bad.ending == "error"
    assert torch.stack([cache.isnan().any() for cache in engine.runner.caches]).all()
    assert generate(engine, [prompts()[0]]) == [tiny_llama.naive_greedy(prompts()[0], 24)]


def test_stats_add_up(tiny_model):
    """Totals count steps, tokens and cache queries; gauges return to zero."""
    engine = tiny_llama.engine(tiny_model)
    generate(engine, prompts())
    stats = engine.stats()
    assert stats.generated_tokens == 24 * len(prompts())
    assert stats.prefix_query_tokens == sum(map(len, prompts()))
    assert (stats.running, stats.waiting, stats.kv_blocks_used, stats.kv_blocks_total) == (0, 0, 0, 64)
