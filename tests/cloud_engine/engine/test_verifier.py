"""Drafts from outside: each message counts once, a late one not at all, and the text is the model's own."""

import math
import random

import pytest
import tiny_llama
import torch

from cloud_engine.engine.draw import Draw
from cloud_engine.engine.engine import Engine
from cloud_engine.engine.sampler import sample
from cloud_engine.engine.sequence import Sequence, State, Verified
from cloud_engine.engine.verify import MAX_DRAFT, MAX_ENDED
from shared.errors import BadRequest, CausewayError, StaleDraft, UnknownRequest
from shared.schemas import Sampling

TOKENS = 24
GREEDY = Sampling(temperature=0, max_tokens=TOKENS, ignore_eos=True)
PROMPT = [5, 6, 7]


@pytest.fixture(scope="module")
def wanted() -> list[int]:
    return tiny_llama.naive_greedy(PROMPT, TOKENS)


def drain(engine: Engine) -> None:
    while engine.has_work:
        engine.step()


def begun(engine: Engine, name: str = "a", prompt=PROMPT, sampling: Sampling = GREEDY) -> Sequence:
    """A drafted request that has its first token and stands still."""
    sequence = engine.add(name, prompt, sampling, drafted=True)
    drain(engine)
    return sequence


def ask(engine: Engine, sequence: Sequence, draft, odds=None) -> Verified:
    """A draft, and its result once the engine has nothing more to do."""
    length = sequence.num_tokens
    assert engine.verify(sequence.id, length, draft, odds) is None
    drain(engine)
    result = engine.verify(sequence.id, length, draft, odds)
    assert result is not None
    return result


@pytest.mark.parametrize("depth", [0, 1])
def test_a_drafted_request_moves_only_when_drafted_for(tiny_model, wanted, depth):
    """It stands still with its blocks after each answer; right drafts count whole, wrong ones as far as they are right,
    none gives one token. The text is that of plain decoding."""
    engine = tiny_llama.engine(tiny_model, async_depth=depth)
    sequence = begun(engine)
    assert (sequence.state, sequence.output) == (State.HELD, wanted[:1])
    assert (engine.stats().held, engine.stats().running) == (1, 0)
    assert engine.step() == []
    assert ask(engine, sequence, wanted[1:5]) == Verified(4, tuple(wanted[1:6]), 9, None)
    assert ask(engine, sequence, [*wanted[6:8], 0, 0]) == Verified(2, tuple(wanted[6:9]), 12, None)
    assert ask(engine, sequence, []) == Verified(0, (wanted[9],), 13, None)
    assert sequence.block_table
    end = ask(engine, sequence, wanted[10:])
    assert end == Verified(TOKENS - 11, tuple(wanted[10:]), 3 + TOKENS, "length")
    assert sequence.output == wanted
    assert engine.stats().kv_blocks_used == 0
    engine.close()


def test_a_message_that_comes_again_is_computed_once(tiny_model, wanted):
    """While it is computed, after it, and after the end: the same message, the same answer, no step."""
    engine = tiny_llama.engine(tiny_model)
    sequence = begun(engine)
    assert engine.verify("a", 4, wanted[1:4]) is None
    assert engine.verify("a", 4, wanted[1:4]) is None
    drain(engine)
    first, steps = engine.verify("a", 4, wanted[1:4]), engine.stats().steps
    assert first == engine.verify("a", 4, wanted[1:4])
    last = [engine.verify("a", 8, wanted[5:]), drain(engine), engine.verify("a", 8, wanted[5:])][2]
    assert sequence.ending == last.ending == "length"
    assert engine.verify("a", 8, wanted[5:]) is last
    assert engine.stats().steps == steps + 1
    assert not engine.has_work


def test_a_late_draft_is_refused_by_name(tiny_model, wanted):
    """Another length, an ended request, another draft while one is checked: StaleDraft, and nothing changes."""
    engine = tiny_llama.engine(tiny_model)
    sequence = begun(engine)
    for length in (-1, 0, 3, 5, 10**9):
        with pytest.raises(StaleDraft, match="has 4 tokens") as refused:
            engine.verify("a", length, [1])
        assert refused.value.param == "base_length"
    assert engine.verify("a", 4, wanted[1:3]) is None
    with pytest.raises(StaleDraft, match="being checked"):
        engine.verify("a", 4, [9])
    drain(engine)
    assert sequence.output == wanted[:4]
    ask(engine, sequence, wanted[4:])
    with pytest.raises(StaleDraft, match="ended"):
        engine.verify("a", 27, [])


@pytest.mark.parametrize(
    ("draft", "odds", "field"),
    [
        ([259], None, "draft_ids"),
        ([-1], None, "draft_ids"),
        ([True], None, "draft_ids"),
        (["1"], None, "draft_ids"),
        ([1.0], None, "draft_ids"),
        ([1] * (MAX_DRAFT + 1), None, "draft_ids"),
        ([1], [], "draft_probs"),
        ([1], [{2: 1.0}], "draft_probs"),
        ([1], [{1: 0.5}], "draft_probs"),
        ([1], [{1: 0.5, 259: 0.5}], "draft_probs"),
        ([1], [{1: 2.0, 2: -1.0}], "draft_probs"),
        ([1], [{1: math.nan}], "draft_probs"),
        ([1], [{1: math.inf}], "draft_probs"),
        ([1], [{}], "draft_probs"),
    ],
)
def test_what_makes_no_sense_is_refused_by_field(tiny_model, draft, odds, field):
    """Foreign ids, too many, distributions that are none: BadRequest naming the field, and the request stands still."""
    engine = tiny_llama.engine(tiny_model)
    sequence = begun(engine)
    with pytest.raises(BadRequest) as refused:
        engine.verify("a", 4, draft, odds)
    assert refused.value.param == field
    assert sequence.state is State.HELD
    assert not engine.has_work


def test_only_drafted_requests_take_drafts(tiny_model):
    """One that is not known, that runs by itself, or was aborted, has no drafts."""
    engine = tiny_llama.engine(tiny_model)
    engine.add("plain", PROMPT, GREEDY)
    begun(engine)
    assert engine.abort("a")
    for name in ("nobody", "plain", "a"):
        with pytest.raises(UnknownRequest):
            engine.verify(name, 4, [1])
    assert engine.stats().kv_blocks_used == 0


def test_a_draft_for_a_prompt_under_way_is_ignored(tiny_model):
    """It counts as nothing accepted, and nothing of it is computed."""
    engine = tiny_llama.engine(tiny_model, max_num_batched_tokens=8)
    sequence = engine.add("a", [9] * 20, GREEDY, drafted=True)
    engine.step()
    assert engine.verify("a", 20, [1, 2]) == Verified(0, (), 20, None)
    drain(engine)
    assert (sequence.num_output, engine.stats().drafted_tokens) == (1, 0)


def test_a_stop_token_in_the_draft_ends_the_request(tiny_model, wanted):
    """What comes after it is neither accepted nor given out."""
    engine = Engine(tiny_llama.engine(tiny_model).runner, stop_ids=frozenset({wanted[4]}))
    assert wanted[4] not in wanted[:4]
    sequence = begun(engine, sampling=Sampling(temperature=0, max_tokens=TOKENS))
    result = ask(engine, sequence, wanted[1:10])
    assert result == Verified(4, tuple(wanted[1:5]), 8, "stop")


def test_blocks_of_those_who_stand_still_go_first(tiny_model, wanted):
    """When others need them they are taken, without preempting anybody; the next draft computes them again."""
    engine = tiny_llama.engine(tiny_model, model_len=64, num_blocks=17, prefix_caching=False)
    sequence = begun(engine)
    other = engine.add("other", [9] * 40, Sampling(temperature=0, max_tokens=22, ignore_eos=True))
    drain(engine)
    assert other.num_output == 22
    assert sequence.block_table == []
    assert sequence.state is State.HELD
    assert engine.stats().preemptions == 0
    assert ask(engine, sequence, wanted[1:9]) == Verified(8, tuple(wanted[1:10]), 13, None)


def test_a_full_engine_takes_a_draft_when_it_has_room(tiny_model, wanted):
    """Those who stand still take no place; a draft that finds none waits for one."""
    engine = tiny_llama.engine(tiny_model, max_num_seqs=1)
    sequence = begun(engine)
    engine.add("other", [9] * 20, Sampling(temperature=0, max_tokens=5, ignore_eos=True))
    engine.step()
    assert ask(engine, sequence, wanted[1:4]).accepted == 3
    assert "other" not in engine.scheduler.live


def test_who_is_not_drafted_for_ends(tiny_model):
    """After `draft_patience` a request that stands still is cancelled and its blocks are free."""
    now = [0.0]
    runner = tiny_llama.engine(tiny_model, draft_patience=10.0).runner
    engine = Engine(runner, clock=lambda: now[0])
    sequence = begun(engine)
    for now[0], ended in ((5.0, []), (14.0, []), (15.0, [sequence])):
        assert engine.expire() == ended
    assert sequence.ending == "cancelled"
    assert engine.stats().kv_blocks_used == 0


def test_ended_requests_are_remembered_up_to_a_limit(tiny_model):
    """The last results are there for a client that lost the reply, and memory does not grow."""
    engine = tiny_llama.engine(tiny_model)
    for number in range(MAX_ENDED + 5):
        begun(engine, str(number), sampling=Sampling(temperature=0, max_tokens=1, ignore_eos=True))
    with pytest.raises(StaleDraft):
        engine.verify("5", 4, [])
    with pytest.raises(UnknownRequest):
        engine.verify("4", 4, [])


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.6, top_k=4), Sampling(top_p=0.8, min_p=0.05)])
def test_drafted_tokens_follow_the_models_distribution(sampling):
    """20000 guesses drawn from another distribution: what is sampled is what is sampled without them, and a guess is
    kept as often as can be, by the sum of the smaller probabilities."""
    count, rng = 20_000, random.Random(1)
    logits = torch.tensor([[2.0, 1.0, 0.5, 0.0, -0.5, -1.0]])
    q = [0.05, 0.4, 0.2, 0.0, 0.3, 0.05]
    odds = tuple((token, share) for token, share in enumerate(q) if share)
    guesses = rng.choices(range(6), q, k=count)
    draws = [Draw(sampling, seed, 7, [1], 1, guess=(guess, odds)) for seed, guess in enumerate(guesses)]
    plain = [Draw(sampling, seed + count, 7, [1], 1) for seed in range(count)]
    tokens = [item.token for item in sample(logits.repeat(count, 1), draws)]
    got, reference = (
        torch.bincount(torch.tensor([item.token for item in sample(logits.repeat(count, 1), rows)]), minlength=6)
        for rows in (draws, plain)
    )
    both = (got + reference).clamp(min=1)
    assert ((got - reference) ** 2 / both).sum() < 25, (got, reference)
    p = (reference / count).tolist()
    kept = sum(token == guess for token, guess in zip(tokens, guesses, strict=True)) / count
    assert kept == pytest.approx(sum(map(min, p, q)), abs=0.02)
    assert sum(one * other for one, other in zip(p, q, strict=True)) < kept - 0.1


def test_a_guess_from_the_same_distribution_is_always_kept():
    """Where drafter and model agree nothing is rejected."""
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    odds = ((0, 0.4), (1, 0.3), (2, 0.2), (3, 0.1))
    draws = [Draw(Sampling(), seed, 1, [1], 1, guess=(seed % 4, odds)) for seed in range(2000)]
    tokens = [item.token for item in sample(logits.repeat(2000, 1), draws)]
    assert sum(token != seed % 4 for seed, token in enumerate(tokens)) <= 1


@pytest.mark.parametrize("seed", range(3))
def test_a_seed_and_the_same_drafts_give_the_same_text(tiny_model, seed):
    """With distributions too the text is fixed by seed and messages, and greedy ignores them."""
    rng, texts = random.Random(seed), []
    drafts = [[rng.randrange(259) for _ in range(4)] for _ in range(40)]
    for crowd in (0, 3):
        engine = tiny_llama.engine(tiny_model)
        for number in range(crowd):
            engine.add(str(number), [9 + number] * 9, GREEDY)
        sequence = begun(engine, sampling=Sampling(seed=seed, max_tokens=TOKENS, ignore_eos=True))
        for draft in drafts:
            if sequence.ending is None:
                odds = [{token: 0.6, (token + 1) % 259: 0.4} for token in draft]
                ask(engine, sequence, draft, odds)
        texts.append(sequence.output)
    assert texts[0] == texts[1]
    greedy = begun(engine := tiny_llama.engine(tiny_model))
    while greedy.ending is None:
        ask(engine, greedy, drafts[0], [{token: 1.0} for token in drafts[0]])
    assert greedy.output == tiny_llama.naive_greedy(PROMPT, TOKENS)


def test_random_messages_never_break_the_text(tiny_model, wanted):
    """Any order of late, repeated, wrong and right messages: the text is the model's and every block comes back."""
    rng, engine = random.Random(4), tiny_llama.engine(tiny_model, num_blocks=20, model_len=64)
    results: dict[tuple, Verified] = {}
    sequence = begun(engine)
    messages = [
        (length, tuple(wanted[length - 3 : length]) if right else (1, 2)) for length in range(30) for right in (0, 1)
    ]
    for _ in range(3000):
        length, draft = rng.choice(messages)
        try:
            result = engine.verify("a", length, draft)
        except (StaleDraft, CausewayError):
            result = None
        if result is not None:
            assert results.setdefault((length, draft), result) == result
        if rng.random() < 0.5:
            engine.step()
    drain(engine)
    assert sequence.output == wanted
    assert len(results) > 2
    assert engine.stats().kv_blocks_used == 0
