"""Drafted tokens are checked in one step and change nothing but how many steps an answer takes."""

import itertools
import random
from collections.abc import Callable

import pytest
import tiny_llama

from cloud_engine.engine.engine import Engine, Output
from cloud_engine.engine.sequence import Sequence
from shared.schemas import Sampling

TOKENS = 24
GREEDY = Sampling(temperature=0, max_tokens=TOKENS, ignore_eos=True)
PROMPTS = [[5, 6, 7], [9] * 21, list(range(3, 40)), [9] * 20 + [4]]


@pytest.fixture(scope="module")
def wanted() -> list[list[int]]:
    return [tiny_llama.naive_greedy(prompt, TOKENS) for prompt in PROMPTS]


Guess = Callable[[Sequence, list[int]], list[int]]


def right(_: Sequence, rest: list[int]) -> list[int]:
    return rest[:5]


def wrong(_: Sequence, rest: list[int]) -> list[int]:
    return [(token + 1) % 259 for token in rest[:3]]


def partly(seq: Sequence, rest: list[int]) -> list[int]:
    return [*rest[: seq.num_output % 4], 1, 2]


def drafted(engine: Engine, prompts: list[list[int]], wanted: list[list[int]], guess: Guess, sampling=GREEDY):
    """Outputs where each running sequence drafts, before each step, what `guess` makes of the tokens to come."""
    sequences = [engine.add(str(index), prompt, sampling) for index, prompt in enumerate(prompts)]
    outputs: list[Output] = []
    while engine.has_work:
        for index, seq in enumerate(sequences):
            if seq.num_output and seq.ending is None:
                seq.draft = tuple(guess(seq, wanted[index][seq.num_output :]))
        outputs += engine.step()
    assert [[o.sampled.token for o in outputs if o.sequence is seq] for seq in sequences] == [
        seq.output for seq in sequences
    ]
    assert [o.ending for o in outputs if o.ending] == ["length"] * len(prompts)
    return [seq.output for seq in sequences]


@pytest.mark.parametrize("guess", [right, wrong, partly])
@pytest.mark.parametrize(("budget", "caching", "blocks"), list(itertools.product([8, 64], [False, True], [24, 200])))
def test_greedy_output_is_that_of_plain_decoding(tiny_model, wanted, guess, budget, caching, blocks):
    """Right, wrong and partly right drafts: the same tokens as the naive loop, under chunks, hits and preemption."""
    engine = tiny_llama.engine(
        tiny_model, model_len=64, max_num_batched_tokens=budget, prefix_caching=caching, num_blocks=blocks
    )
    assert drafted(engine, PROMPTS, wanted, guess) == wanted
    stats = engine.stats()
    assert stats.drafted_tokens > 0
    assert (stats.accepted_tokens > 0) is (guess is not wrong)
    assert (stats.accepted_tokens < stats.drafted_tokens) is (guess is not right)
    if blocks == 24 and (budget == 64 or guess is wrong):
        assert stats.preemptions > 0
    assert (stats.prefix_hit_tokens > 0) is caching
    assert stats.kv_blocks_used == 0
    if blocks == 200 and budget == 64:
        assert stats.steps < (TOKENS if guess is not wrong else 40)


def test_a_right_draft_saves_steps(tiny_model):
    """24 tokens by drafts of 5: a step of the prompt and four more."""
    wanted = tiny_llama.naive_greedy(PROMPTS[0], TOKENS)
    engine = tiny_llama.engine(tiny_model)
    assert drafted(engine, PROMPTS[:1], [wanted], right) == [wanted]
    assert engine.stats().steps == 5


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(seed=4, max_tokens=TOKENS, ignore_eos=True),
        Sampling(seed=4, top_p=0.9, top_k=30, max_tokens=TOKENS, ignore_eos=True),
        Sampling(seed=4, repetition_penalty=1.3, frequency_penalty=0.4, max_tokens=TOKENS, ignore_eos=True),
        Sampling(temperature=0, presence_penalty=1.5, logprobs=2, max_tokens=TOKENS, ignore_eos=True),
    ],
)
@pytest.mark.parametrize("guess", [right, partly])
def test_a_seed_gives_the_same_text_and_logprobs_with_drafts(tiny_model, sampling, guess):
    """Noise, penalties and log probabilities of drafted positions are those of plain decoding."""

    def run(guess: Guess, wanted: list[list[int]]) -> tuple[list[list[int]], list[Output]]:
        engine, outputs = tiny_llama.engine(tiny_model), []
        step = engine.step
        engine.step = lambda: outputs.extend(made := step()) or made
        tokens = drafted(engine, PROMPTS, wanted, guess, sampling)
        assert (engine.stats().accepted_tokens > 0) is (guess is not none)
        return tokens, sorted(outputs, key=lambda output: output.sequence.id)

    def none(_: Sequence, __: list[int]) -> list[int]:
        return []

    plain, plain_outputs = run(none, [[]] * len(PROMPTS))
    assert len({tuple(tokens) for tokens in plain}) == len(PROMPTS)
    with_drafts, outputs = run(guess, plain)
    assert with_drafts == plain
    if sampling.logprobs is not None:
        for one, other in zip(outputs, plain_outputs, strict=True):
            assert one.sampled.logprob == pytest.approx(other.sampled.logprob, abs=1e-4)
            assert [token for token, _ in one.sampled.top] == [token for token, _ in other.sampled.top]


@pytest.mark.parametrize("at", range(6))
def test_a_stop_token_inside_the_draft_trims_the_rest(tiny_model, at):
    """Wherever the stop token is in what was accepted, nothing after it counts."""
    wanted = tiny_llama.naive_greedy(PROMPTS[0], TOKENS)
    stop = wanted[at]
    engine = Engine(tiny_llama.engine(tiny_model).runner, stop_ids=frozenset({stop}))
    sequence = engine.add("a", PROMPTS[0], Sampling(temperature=0, max_tokens=TOKENS))
    outputs = engine.step()
    while engine.has_work:
        sequence.draft = tuple(wanted[1:])
        outputs += engine.step()
    assert sequence.output == wanted[: wanted.index(stop) + 1] == [output.sampled.token for output in outputs]
    assert sequence.ending == "stop"
    assert engine.stats().kv_blocks_used == 0


@pytest.mark.parametrize("limit", [1, 2, 3, 5])
def test_max_tokens_inside_the_draft_trims_the_rest(tiny_model, limit):
    """A draft beyond max_tokens is neither computed nor given out."""
    wanted = tiny_llama.naive_greedy(PROMPTS[0], limit)
    engine = tiny_llama.engine(tiny_model)
    sequence = engine.add("a", PROMPTS[0], Sampling(temperature=0, max_tokens=limit, ignore_eos=True))
    engine.step()
    if engine.has_work:
        sequence.draft = (*wanted[1:], 3, 3, 3, 3)
        engine.step()
    assert (sequence.output, sequence.ending) == (wanted, "length")
    assert engine.stats().drafted_tokens == max(0, limit - 2)


def test_nothing_computed_from_a_wrong_draft_is_published(tiny_model):
    """Blocks filled by rejected rows are found by nobody; blocks of accepted ones are."""
    engine = tiny_llama.engine(tiny_model)
    prompt, wanted = PROMPTS[0], tiny_llama.naive_greedy(PROMPTS[0], TOKENS)
    sequence = engine.add("a", prompt, GREEDY)
    engine.step()
    sequence.draft = (*wanted[1:6], 1, 1, 1, 1, 1, 1, 1, 1)
    engine.step()
    assert sequence.num_tokens == len(prompt) + 7
    assert len(sequence.block_table) == 5
    assert sequence.num_computed == len(prompt) + 6
    pool = engine.scheduler.pool
    assert [pool.hashes[block] is not None for block in sequence.block_table] == [True, True, False, False, False]


def test_a_draft_takes_no_rows_from_others(tiny_model):
    """While a long prompt fills the budget no draft is checked, and every decode keeps its token of each step."""
    engine = tiny_llama.engine(tiny_model, max_num_batched_tokens=10)
    drafting = engine.add("drafting", [5, 6], Sampling(temperature=0, max_tokens=60, ignore_eos=True))
    plain = engine.add("plain", [5, 7], Sampling(temperature=0, max_tokens=60, ignore_eos=True))
    engine.step()
    long = engine.add("long", [7] * 100, GREEDY)
    engine.step()
    while long.num_computed < long.num_prompt:
        before, computed = plain.num_output, long.num_computed
        drafting.draft = tuple(random.Random(0).choices(range(259), k=30))
        engine.step()
        assert plain.num_output == before + 1
        assert long.num_computed - computed == min(8, long.num_prompt - computed)
        assert engine.stats().drafted_tokens == 0 or long.num_output
