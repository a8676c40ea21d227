"""The next token: what each field of Sampling does to a row of logits."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cloud_engine.engine.draw import Draw
from cloud_engine.engine.sampler import FAILED
from cloud_engine.engine.sampler import sample as in_the_cloud
from edge_agent.backends.sampling import Sampled, Sampler, _top, uniform
from shared.errors import BadRequest, UpstreamFailed
from shared.schemas import Sampling

PROMPT = np.array([0, 1], np.int32)


def draws(logits: list[float], count: int = 400, **fields: object) -> list[int]:
    """One pick for each of `count` seeds."""
    found = []
    for seed in range(count):
        sampler = Sampler(Sampling(seed=seed, **fields), PROMPT, len(logits), 0)  # type: ignore[arg-type]
        found.append(pick(sampler, logits).token)
    return found


def pick(sampler: Sampler, logits: list[float]) -> Sampled:
    return sampler.pick(np.array(logits, np.float32))


def test_temperature_zero_is_the_argmax() -> None:
    """Of equal ones the lowest id, whatever the seed."""
    assert set(draws([0, 3, 3, 1], temperature=0)) == {1}


def test_draws_follow_the_distribution() -> None:
    """Half, a quarter, a quarter: within four standard deviations over many seeds."""
    found = draws([math.log(2), 0, 0], 2000)

    assert found.count(0) == pytest.approx(1000, abs=90)
    assert found.count(1) == pytest.approx(500, abs=78)


@pytest.mark.parametrize("temperature", [1e-6, 2.0])
def test_no_temperature_overflows(temperature: float) -> None:
    """Huge logits and a tiny temperature still give the likeliest."""
    assert set(draws([3e38, -3e38, 0], 20, temperature=temperature)) == {0}


@pytest.mark.parametrize(
    ("fields", "allowed"),
    [
        ({"top_k": 1}, {3}),
        ({"top_k": 2}, {2, 3}),
        ({"top_k": 100}, {0, 1, 2, 3}),
        ({"top_p": 0.5}, {3}),
        ({"top_p": 0.6}, {2, 3}),
        ({"top_p": 0.9}, {1, 2, 3}),
        ({"top_p": 1e-9}, {3}),
        ({"min_p": 0.3}, {2, 3}),
        ({"min_p": 1.0}, {3}),
        ({"top_k": 2, "top_p": 0.6}, {3}),  # of the two that are left the first has 0.62
    ],
)
def test_filters_keep_exactly_what_they_say(fields: dict[str, float], allowed: set[int]) -> None:
    """Probabilities are 0.06, 0.12, 0.31, 0.51."""
    logits = [math.log(p) for p in (0.06, 0.12, 0.31, 0.51)]

    assert set(draws(logits, 600, **fields)) == allowed


@given(st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=200), st.floats(1e-6, 0.999), st.integers(0, 999))
def test_the_nucleus_is_the_smallest_that_reaches_p(logits: list[float], top_p: float, seed: int) -> None:
    """The token drawn is one whose likelier ones do not reach p yet: the definition, by sorting everything."""
    sampler = Sampler(Sampling(top_p=top_p, seed=seed), PROMPT[:0], len(logits), 0)

    token = pick(sampler, logits).token

    weights = np.exp(np.array(logits, np.float64) - max(logits))
    likelier = weights[weights > weights[token]].sum() / weights.sum()
    assert likelier < top_p + 1e-9


@given(st.integers(0, 9999), st.sampled_from([1, 255, 256, 257, 1500]), st.sampled_from([0.2, 1.0, 2.0]), st.booleans())
@settings(max_examples=100)
def test_a_draw_is_the_inverse_of_the_running_sum(seed: int, vocabulary: int, temperature: float, masked: bool) -> None:
    """Whatever blocks it is looked for in: by plain sums of 64 bits, and nothing that may not be drawn."""
    rng = np.random.default_rng(seed)
    row = rng.normal(0, 5, vocabulary).astype(np.float32)
    if masked:
        row[rng.permutation(vocabulary)[1:]] = -np.inf
    sampler = Sampler(Sampling(temperature=temperature, seed=seed), PROMPT[:0], vocabulary, 0)

    token = sampler.pick(row.copy()).token

    weights = np.exp((row.astype(np.float64) - float(row.max())) / temperature)
    sums = weights.cumsum() / weights.sum()
    assert weights[token] > 0
    assert sums[token] - weights[token] / weights.sum() - 1e-6 <= uniform(seed, 0) <= sums[token] + 1e-6


@given(
    st.integers(0, 9999), st.sampled_from([1, 5, 256, 257, 1500]), st.integers(1, 1500), st.sampled_from([2, 9, 999])
)
@settings(max_examples=100)
def test_the_highest_are_those_of_a_plain_sort(seed: int, vocabulary: int, count: int, kinds: int) -> None:
    """Of equal ones the lowest ids, however many of them there are."""
    row = np.random.default_rng(seed).integers(0, kinds, vocabulary).astype(np.float32)
    count = min(count, vocabulary)

    assert _top(row, count).tolist() == sorted(np.argsort(-row, kind="stable")[:count].tolist())


def test_a_seed_gives_the_same_text_and_another_does_not() -> None:
    """The number at a position depends on the seed and the position alone."""
    assert draws([0.0] * 50, 30) == draws([0.0] * 50, 30)
    assert len(set(draws([0.0] * 50, 30))) > 5
    assert uniform(-(1 << 63), 0) != uniform(0, 0)
    assert 0 <= uniform(7, 1 << 40) < 1


def test_repetition_counts_the_prompt_and_presence_does_not() -> None:
    """The prompt has tokens 0 and 1: repetition divides a positive logit and multiplies a negative one."""
    scaled = np.array([3.0, -3.0, 2.0], np.float32)
    Sampler(Sampling(temperature=0, repetition_penalty=2.0), PROMPT, 3, 0).pick(scaled)
    assert scaled.tolist() == [1.5, -6.0, 2.0]

    sampler = Sampler(Sampling(temperature=0, presence_penalty=0.5, frequency_penalty=0.25), PROMPT, 3, 0)
    assert [pick(sampler, [3.0, 2.9, 0.0]).token for _ in range(2)] == [0, 1]
    third = np.array([3.0, 2.9, 0.0], np.float32)
    sampler.pick(third)
    assert third.tolist() == pytest.approx([2.25, 2.15, 0.0])


def test_log_probabilities_are_of_the_penalised_logits_before_temperature() -> None:
    """Natural logarithms that sum to one, best first, as many as asked for."""
    sampler = Sampler(Sampling(temperature=0.1, top_k=1, logprobs=3), PROMPT, 3, 0)

    sampled = pick(sampler, [math.log(p) for p in (0.2, 0.7, 0.1)])

    assert sampled.logprob == pytest.approx(math.log(0.7))
    assert [token for token, _ in sampled.top] == [1, 0, 2]
    assert sum(math.exp(value) for _, value in sampled.top) == pytest.approx(1)


@pytest.mark.parametrize("logits", [[math.nan, 0.0], [math.inf, 0.0], [-math.inf, -math.inf]])
def test_a_row_without_a_sensible_best_is_refused(logits: list[float]) -> None:
    """S-42: nothing can be drawn from it, which is a typed error of this request."""
    with pytest.raises(UpstreamFailed, match="finite"):
        pick(Sampler(Sampling(), PROMPT[:0], 2, 0), logits)


def test_a_bias_may_decide_and_forbid() -> None:
    """It is added after the penalties and before the log probabilities are taken."""
    assert set(draws([0, 0, 0], 50, temperature=0, logit_bias={2: 1.0})) == {2}
    assert set(draws([0, 0, 0], 200, logit_bias={0: -100.0})) == {1, 2}
    sampled = pick(Sampler(Sampling(logit_bias={0: math.log(3)}, logprobs=1), PROMPT, 2, 0), [0.0, 0.0])
    assert dict(sampled.top) == {0: pytest.approx(math.log(0.75))}


def test_no_end_comes_before_min_tokens() -> None:
    """Neither the model's own nor the caller's, however likely; then either may."""
    sampling = Sampling(temperature=0, min_tokens=2, stop_token_ids=(1,))
    sampler = Sampler(sampling, PROMPT, 4, 0, ends={0})

    assert [pick(sampler, [9.0, 8.0, 0.0, 1.0]).token for _ in range(3)] == [3, 3, 0]


@pytest.mark.parametrize("fields", [{"logit_bias": {4: 1.0}}, {"stop_token_ids": (4,)}])
def test_a_token_that_the_model_does_not_have_is_refused(fields: dict[str, Any]) -> None:
    """S-42: by the name of the field, before any logit is touched."""
    with pytest.raises(BadRequest) as refused:
        Sampler(Sampling(**fields), PROMPT, 4, 0)
    assert (refused.value.param, refused.value.source) == (next(iter(fields)), "edge")


def in_cloud(logits: list[float], sampling: Sampling, output: list[int], *, ends: tuple[int, ...], mask: bytes | None):
    tokens = [*PROMPT.tolist(), *output]
    early = mask is None and len(output) < sampling.min_tokens
    barred = (*ends, *sampling.stop_token_ids) if early else ()
    one = Draw(sampling, sampling.seed or 0, len(tokens), tokens, len(PROMPT), barred=barred, mask=mask)
    [sampled] = in_the_cloud(torch.tensor([logits]), [one])
    return sampled


class Mask:
    """A guide that always permits the same."""

    failed = False

    def __init__(self, allowed: set[int], size: int) -> None:
        bits = np.zeros(size, np.uint8)
        bits[[*allowed]] = 1
        self.bits = np.packbits(bits, bitorder="little").tobytes()

    def mask(self) -> bytes:
        return self.bits

    def take(self, token: int) -> bool:
        return False


samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 1e-6, 0.7, 2.0]),
    top_k=st.integers(0, 8),
    top_p=st.sampled_from([1.0, 0.93, 0.37]),
    min_p=st.sampled_from([0.0, 0.2]),
    presence_penalty=st.sampled_from([0.0, 1.5, -2.0]),
    frequency_penalty=st.sampled_from([0.0, 0.5]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.5]),
    seed=st.integers(-(1 << 63), (1 << 63) - 1),
    logprobs=st.sampled_from([None, 0, 3]),
    min_tokens=st.integers(0, 3),
    stop_token_ids=st.sampled_from([(), (3,)]),
    logit_bias=st.dictionaries(st.integers(0, 11), st.sampled_from([-100.0, 2.5, 100.0]), max_size=3),
)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(-40, 40).map(lambda value: value / 4), min_size=12, max_size=12),
    samplings,
    st.lists(st.integers(0, 11), max_size=5),
    st.none() | st.sets(st.integers(0, 11), min_size=1),
)
def test_both_ends_draw_the_same_token(
    logits: list[float], sampling: Sampling, output: list[int], allowed: set[int] | None
) -> None:
    """S-42: every mode with every penalty, bias, bar and mask: the cloud's sampler is the oracle, to the token; the log
    probabilities agree to float32."""
    guide = None if allowed is None else Mask(allowed, 12)
    sampler = Sampler(sampling, PROMPT, 12, 0, ends={7}, guide=guide)  # type: ignore[arg-type]
    for token in output:
        sampler.learn(token)

    expected = in_cloud(logits, sampling, output, ends=(7,), mask=None if guide is None else guide.mask())
    if expected.token == FAILED:
        with pytest.raises(UpstreamFailed):
            pick(sampler, logits)
        return
    got = pick(sampler, logits)

    assert got.token == expected.token
    assert got.logprob == (None if expected.logprob is None else pytest.approx(expected.logprob, abs=1e-4))
    finite = [value for _, value in expected.top if math.isfinite(value)]
    assert [value for _, value in got.top if math.isfinite(value)] == pytest.approx(finite, abs=1e-4)
