"""Which drafts the engine makes by itself, and that they cost nobody anything but rows."""

from pathlib import Path

import pytest
import tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st

from cloud_engine.engine.config import EngineConfig, resolve
from cloud_engine.engine.drafting import Drafter
from cloud_engine.engine.sequence import Sequence, State
from cloud_engine.engine.work import Work
from shared.lookup import FIRST_RATE, LONGEST, MATCHES, Lookup
from shared.schemas import Sampling


def decoding(tokens: list[int], rate: float = FIRST_RATE) -> Sequence:
    """One token behind, with something of its own output."""
    made = Sequence(
        id="s", tokens=tokens[:-1], sampling=Sampling(), max_tokens=99, seed=0, stop_ids=frozenset(), root=b""
    )
    made.append(tokens[-1])
    made.num_computed, made.state = made.num_tokens - 1, State.RUNNING
    made.lookup = Lookup()
    made.lookup.rate = rate
    return made


def by_definition(tokens: list[int]) -> tuple[int, ...]:
    """The longest match, of those the last; what follows it, over and over if it reaches the end."""
    for size in MATCHES:
        for end in range(len(tokens) - 1, size - 1, -1):
            if tokens[end - size : end] == tokens[-size:]:
                grown = list(tokens)
                while len(grown) < len(tokens) + LONGEST:
                    grown.append(grown[end + len(grown) - len(tokens)])
                return tuple(grown[len(tokens) :])
    return ()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 2), max_size=60), st.lists(st.integers(1, 7), max_size=10))
def test_guesses_are_those_of_the_definition(tokens, pieces):
    """However many tokens come between two questions, the index finds what a search from the end finds."""
    lookup, length = Lookup(), 0
    for piece in pieces:
        length += piece
        assert lookup.guess(tokens[:length]) == by_definition(tokens[:length])


def test_what_repeats_is_guessed_to_go_on():
    """A text that turns in circles is continued round the circle, beyond its known end."""
    assert Lookup().guess([9, 1, 2, 3, 1]) == ()
    assert Lookup().guess([9, 1, 2, 3, 1, 2]) == (3, 1, 2) * 3 + (3,)


def test_the_rate_follows_what_was_right():
    """It rises with right guesses, falls with the first wrong one only, and recovers while nothing is drafted."""
    lookup = Lookup()
    lookup.learn(4, 4)
    high = lookup.rate
    lookup.learn(10, 0)
    once = lookup.rate
    assert FIRST_RATE < once < high
    for _ in range(30):
        lookup.learn(1, 0)
    assert lookup.rate < 0.05
    low = lookup.rate
    lookup.rest()
    assert low < lookup.rate < FIRST_RATE


@pytest.mark.parametrize(
    ("beside", "rate", "drafted"), [(0, 0.5, 3), (0, 0.02, 0), (7, 0.5, 1), (7, 0.9, 8), (63, 0.7, 0)]
)
def test_drafts_are_long_alone_and_short_in_a_crowd(beside, rate, drafted):
    """The worth of a guess is its probability against the step's tokens for its cost."""
    repeating = decoding([1, 2, 3, 4] * 3, rate)
    crowd = [decoding([index, index + 1]) for index in range(100, 100 + beside)]
    Drafter(free_rows=16).propose([*crowd, repeating])
    assert len(repeating.draft) == drafted
    assert not any(sequence.draft for sequence in crowd)


def test_a_guess_not_worth_a_row_is_tried_again_later():
    """A sequence whose guesses failed stops drafting in a crowd, not for good."""
    repeating = decoding([1, 2, 3, 4] * 3)
    crowd = [decoding([index, index + 1]) for index in range(100, 116)]
    drafter, history = Drafter(free_rows=16), []
    for _ in range(80):
        drafter.propose([*crowd, repeating])
        history.append(bool(repeating.draft))
        checked, repeating.draft = Work(repeating, 0, 1, True, repeating.draft), ()
        drafter.learn([checked], [1])
    assert history[0]
    assert sum(history[20:]) < 15
    assert any(history[60:])


def test_a_prompt_being_prefilled_does_not_draft():
    """Neither the first chunk nor the last of a prompt has a draft, nor a sequence that is computed again."""
    fresh = Sequence(
        id="s", tokens=[1, 2, 3] * 5, sampling=Sampling(), max_tokens=9, seed=0, stop_ids=frozenset(), root=b""
    )
    fresh.num_computed = 14
    again = decoding([1, 2, 3] * 5)
    again.num_computed = 8
    Drafter(free_rows=16).propose([fresh, again])
    assert fresh.draft == again.draft == ()


@pytest.mark.parametrize(
    ("device", "asked", "drafts"), [("cpu", None, True), ("cuda", None, False), ("cuda", True, True)]
)
def test_a_cpu_drafts_and_a_gpu_does_when_asked(device, asked, drafts):
    """Unset means: where it is known to win."""
    config = resolve(EngineConfig(device=device, drafting=asked, num_blocks=9), model_len=64, token_bytes=64)
    assert (config.drafting, config.free_rows > 0) == (drafts, True)


@pytest.fixture(scope="module")
def repetitive(tmp_path_factory) -> Path:
    """A model so flat that its output turns in circles."""
    return tiny_llama.save(tmp_path_factory.mktemp("repetitive"), initializer_range=0.1)


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("changes", [{"temperature": 0.0}, {"temperature": 0.02, "seed": 3, "logprobs": 1}])
def test_text_that_repeats_takes_fewer_steps(repetitive, changes, depth):
    """On by default: the same tokens as with `drafting` off, in fewer steps, with drafts accepted and rejected."""
    sampling = Sampling(max_tokens=60, ignore_eos=True, **changes)
    prompts = [[5, 6, 7] * 4, list(range(30, 60)), [8, 9, 8, 9]]
    outputs, steps = {}, {}
    for drafting in (True, False):
        engine = tiny_llama.engine(repetitive, drafting=drafting, free_rows=16, async_depth=depth)
        sequences = [engine.add(str(index), prompt, sampling) for index, prompt in enumerate(prompts)]
        while engine.has_work:
            engine.step()
        outputs[drafting], steps[drafting] = [sequence.output for sequence in sequences], engine.stats().steps
        stats = engine.stats()
        assert (0 < stats.accepted_tokens < stats.drafted_tokens) is drafting
    assert outputs[True] == outputs[False]
    assert steps[True] < steps[False]
