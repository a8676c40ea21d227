import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cloud_engine.engine.draw import Draw
from cloud_engine.engine.sampler import FAILED, sample, uniform
from shared.schemas import Sampling

LOGITS = [2.0, 1.0, 0.5, 0.0, -0.5, -1.0, -2.0, -3.0]
DRAWS = 20_000


def sequence(sampling: Sampling, *, prompt=(1,), output=(), seed=0) -> Draw:
    tokens = [*prompt, *output]
    return Draw(sampling, seed, len(tokens), tokens, len(prompt))


def pick(logits, sampling: Sampling, **changes) -> int:
    return sample(torch.tensor([logits]), [sequence(sampling, **changes)])[0].token


def expected(sampling: Sampling) -> list[float]:
    """The definition, in plain Python: temperature, top-k, top-p, min-p."""
    weights = {token: math.exp(value / sampling.temperature) for token, value in enumerate(LOGITS)}
    order = sorted(weights, key=lambda token: -weights[token])
    kept = order[: sampling.top_k or None]
    total, reached, nucleus = sum(weights[token] for token in kept), 0.0, []
    for token in kept:
        if reached >= sampling.top_p:
            break
        nucleus.append(token)
        reached += weights[token] / total
    kept = [token for token in nucleus if weights[token] >= sampling.min_p * weights[order[0]]]
    total = sum(weights[token] for token in kept)
    return [weights[token] / total if token in kept else 0.0 for token in range(len(LOGITS))]


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(temperature=0.5),
        Sampling(temperature=1.7),
        Sampling(top_k=3),
        Sampling(top_p=0.8),
        Sampling(min_p=0.2),
        Sampling(temperature=1.3, top_k=6, top_p=0.9, min_p=0.1),
    ],
)
def test_draws_follow_the_distribution(sampling):
    """Chi-square of 20000 draws against the definition, and no draw of what is cut off."""
    sequences = [sequence(sampling, seed=seed) for seed in range(DRAWS)]
    tokens = torch.tensor([item.token for item in sample(torch.tensor([LOGITS]).repeat(DRAWS, 1), sequences)])
    counts = torch.bincount(tokens, minlength=len(LOGITS)).tolist()
    probabilities = expected(sampling)
    assert all(count == 0 for count, share in zip(counts, probabilities, strict=True) if share == 0)
    chi = sum((n - DRAWS * p) ** 2 / (DRAWS * p) for n, p in zip(counts, probabilities, strict=True) if p)
    assert chi < 30, f"7 degrees of freedom exceed 30 once in 10000: {counts}"


def test_uniform_numbers_differ_by_seed_and_position():
    """The noise is spread evenly, also over neighbouring seeds and positions."""
    values = torch.tensor([uniform(seed, position) for seed in range(-50, 50) for position in range(100)])
    assert len(values.unique()) > 9_990
    assert torch.histc(values, bins=10, min=0, max=1).sub(1000).abs().max() < 130


def test_a_draw_does_not_depend_on_its_batch():
    """The same seed and position draw the same token alone, in any row, and beside rows with other settings."""
    torch.manual_seed(0)
    logits = torch.randn(5, 300)
    kinds = [Sampling(), Sampling(top_p=0.9), Sampling(temperature=0), Sampling(top_k=5, min_p=0.1), Sampling(seed=3)]
    rows = [sequence(kind, seed=index, output=range(index)) for index, kind in enumerate(kinds)]
    together = [item.token for item in sample(logits, rows)]
    alone = [sample(logits[index : index + 1], [row])[0].token for index, row in enumerate(rows)]
    flipped = [item.token for item in sample(logits.flip(0), rows[::-1])][::-1]
    assert together == alone == flipped


def test_greedy_takes_the_first_of_equals():
    """Temperature 0 is the argmax, and of equal logits the lowest id."""
    assert pick([0.0, 3.0, 3.0, 1.0], Sampling(temperature=0)) == 1


@pytest.mark.parametrize("temperature", [1e-300, 1e-38, 1e-6])
def test_a_tiny_temperature_is_greedy_not_nan(temperature):
    """However small the temperature, the likeliest token is drawn and nothing overflows."""
    assert pick([-50.0, 80.0, 79.0], Sampling(temperature=temperature)) == 1


def test_penalties():
    """Presence and frequency subtract by output, repetition scales prompt and output; all before greedy."""
    greedy = {"temperature": 0.0}
    logits = [5.0, 4.0, -1.0, -1.5]
    assert pick(logits, Sampling(**greedy, presence_penalty=1.5), output=[0]) == 1
    assert pick(logits, Sampling(**greedy, presence_penalty=1.5), prompt=[0]) == 0
    assert pick(logits, Sampling(**greedy, frequency_penalty=0.6), output=[0]) == 0
    assert pick(logits, Sampling(**greedy, frequency_penalty=0.6), output=[0, 0]) == 1
    assert pick(logits, Sampling(**greedy, repetition_penalty=1.5), prompt=[0]) == 1
    assert pick([-1.0, -1.4], Sampling(**greedy, repetition_penalty=1.5), prompt=[0]) == 1


def test_penalties_of_a_batch_are_those_of_each_row():
    """Rows with other penalties, histories of other lengths, none at all, or a draft: each by the definition."""
    rng = random.Random(0)
    logits = torch.randn(7, 12, generator=torch.Generator().manual_seed(0))
    rows, wanted = [], logits.clone()
    for index in range(7):
        sampling = Sampling(
            temperature=0,
            logprobs=12,
            repetition_penalty=rng.choice([1.0, 0.7, 1.8]),
            presence_penalty=rng.choice([0.0, 1.1]),
            frequency_penalty=rng.choice([0.0, -0.4]),
        )
        prompt, output = ([rng.randrange(12) for _ in range(rng.randrange(1, length))] for length in (9, 2 + 3 * index))
        rows.append(Draw(sampling, 0, 0, prompt + output[: index // 2], len(prompt), tuple(output[index // 2 :])))
        for token in set(prompt + output):
            value = wanted[index, token]
            wanted[index, token] = value * (
                1 / sampling.repetition_penalty if value > 0 else sampling.repetition_penalty
            )
        for token in set(output):
            wanted[index, token] -= sampling.presence_penalty + sampling.frequency_penalty * output.count(token)
    for row, expected_row, result in zip(rows, wanted.log_softmax(-1).tolist(), sample(logits, rows), strict=True):
        assert dict(result.top) == pytest.approx(dict(enumerate(expected_row)), abs=1e-5)
        assert result.token == max(range(12), key=expected_row.__getitem__)
        assert row.seen == [*row.tokens, *row.draft]


def test_each_row_gets_as_many_logprobs_as_it_asked_for():
    """None, none at the top, some, and more than there are: in one batch."""
    rows = [sequence(Sampling(temperature=0, logprobs=count)) for count in (None, 0, 3, 20)]
    results = sample(torch.tensor([LOGITS]).repeat(4, 1), rows)
    assert [result.logprob is None for result in results] == [True, False, False, False]
    assert [len(result.top) for result in results] == [0, 0, 3, len(LOGITS)]


def test_logits_are_left_alone():
    """Penalties work on a copy."""
    logits = torch.tensor([LOGITS])
    sample(logits, [sequence(Sampling(presence_penalty=2, repetition_penalty=3), output=[0, 1])])
    assert logits.tolist() == [LOGITS]


def test_logprobs_are_those_of_the_penalised_logits():
    """Log probabilities are taken after penalties and before temperature, best first."""
    sampling = Sampling(temperature=0, presence_penalty=1.8, logprobs=3)
    result = sample(torch.tensor([LOGITS]), [sequence(sampling, output=[0])])[0]
    values = torch.tensor(LOGITS)
    values[0] -= 1.8
    logprobs = values.log_softmax(0).tolist()
    assert result.token == 1
    assert result.logprob == pytest.approx(logprobs[1])
    assert [token for token, _ in result.top] == [1, 2, 0]
    assert [value for _, value in result.top] == pytest.approx([logprobs[1], logprobs[2], logprobs[0]])
    assert sample(torch.tensor([LOGITS]), [sequence(Sampling(logprobs=0))])[0].top == ()


@pytest.mark.parametrize("bad", [[math.nan, 1.0], [math.inf, 1.0], [-math.inf, -math.inf], [math.nan] * 2])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_unusable_logits_fail_their_row_only(bad, temperature):
    """A row without a finite best logit is reported as failed; the row beside it is sampled."""
    rows = [sequence(Sampling(temperature=temperature, top_p=0.9, logprobs=1)) for _ in range(2)]
    tokens = [item.token for item in sample(torch.tensor([bad, [9.0, -9.0]]), rows)]
    assert tokens == [FAILED, 0]


def test_forbidden_tokens_are_never_drawn():
    """A logit of minus infinity has no probability, at either end of the vocabulary."""
    logits = torch.tensor([[-math.inf, 0.0, 0.0, -math.inf]]).repeat(500, 1)
    rows = [sequence(Sampling(temperature=2), seed=seed) for seed in range(500)]
    assert {item.token for item in sample(logits, rows)} == {1, 2}


@settings(max_examples=60, deadline=None)
@given(
    logits=st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=20),
    temperature=st.floats(0, 2),
    top_k=st.integers(0, 30),
    top_p=st.floats(1e-6, 1),
    min_p=st.floats(0, 1),
    seed=st.integers(-(2**63), 2**63 - 1),
)
def test_any_valid_settings_give_a_token(logits, temperature, top_k, top_p, min_p, seed):
    """No combination of permitted values fails or leaves the vocabulary."""
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    assert 0 <= pick(logits, sampling, seed=seed) < len(logits)
