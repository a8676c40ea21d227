"""Continuous batching over a runtime whose next token is a hash of the whole sequence: one wrong cache cell shows."""

import itertools
import zlib
from weakref import WeakValueDictionary

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.backends.batch import MIN_CHUNK, Batcher, Job
from edge_agent.backends.sampling import Sampler
from edge_agent.backends.text import TextStream
from shared.errors import CausewayError, UpstreamFailed
from shared.schemas import Delta, Sampling

VOCABULARY = 97
CONTEXT = 256
ROWS = 128
PIECES = [f"<{token}>".encode() for token in range(VOCABULARY)]


def next_token(tokens: list[int]) -> int:
    return zlib.crc32(bytes(tokens)) % VOCABULARY


def alone(prompt: list[int], count: int) -> str:
    """The oracle: the whole sequence again for each token."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return "".join(f"<{token}>" for token in tokens[len(prompt) :])


class FakeRuntime:
    """Keeps what llama.cpp keeps, and refuses what it refuses: a position that does not follow its sequence's last."""

    context_length = CONTEXT

    def __init__(self, *, can_cut: bool = True) -> None:
        self.tokens = np.zeros(ROWS, np.int32)
        self.positions = np.zeros(ROWS, np.int32)
        self.sequences = np.zeros(ROWS, np.int32)
        self.wanted = np.zeros(ROWS, np.int8)
        self.can_cut = can_cut
        self.cache: dict[int, list[int]] = {}
        self.steps: list[dict[int, int]] = []
        self.broken = False
        self._rows: list[np.ndarray] = []

    def decode(self, count: int) -> bool:
        self._rows, step = [], dict[int, int]()
        for row in range(count):
            cached = self.cache.setdefault(int(self.sequences[row]), [])
            assert self.positions[row] == len(cached)
            cached.append(int(self.tokens[row]))
            step[int(self.sequences[row])] = step.get(int(self.sequences[row]), 0) + 1
            if self.wanted[row]:
                logits = np.zeros(VOCABULARY, np.float32)
                logits[next_token(cached)] = 1
                self._rows.append(logits)
        self.steps.append(step)
        return not self.broken

    def logits(self) -> np.ndarray:
        return np.array(self._rows)

    def keep(self, sequence: int, length: int) -> None:
        assert self.can_cut or length == 0
        self.cache[sequence] = self.cache.get(sequence, [])[:length]

    def share(self, source: int, target: int, length: int) -> None:
        assert self.can_cut
        assert source != target
        assert len(self.cache[source]) >= length
        self.cache[target] = self.cache[source][:length]


class Client:
    """One request and what it got."""

    def __init__(self, prompt: list[int], count: int) -> None:
        tokens = np.array(prompt, np.int32)
        sampling = Sampling(temperature=0)
        text = TextStream(PIECES, set(), sampling, prompt_tokens=len(prompt), max_tokens=count)
        self.prompt, self.count = prompt, count
        self.events: list[Delta | CausewayError] = []
        self.job = Job(next(NUMBERS), tokens, Sampler(sampling, tokens, VOCABULARY, 0), text)
        CLIENTS[self.job.number] = self

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events if isinstance(event, Delta))


NUMBERS = itertools.count()
CLIENTS: "WeakValueDictionary[int, Client]" = WeakValueDictionary()


def advance(batcher: Batcher) -> None:
    for job, event in batcher.step():
        CLIENTS[job.number].events.append(event)


def finish(batcher: Batcher) -> None:
    for _ in range(10_000):
        if not batcher.running:
            return
        advance(batcher)
    pytest.fail("it never ends")


prompts = st.lists(st.integers(0, 2), min_size=1, max_size=90)
"""Three tokens only, so that prompts often begin alike."""


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.tuples(prompts, st.integers(1, 20), st.integers(0, 30), st.integers(0, 30)), min_size=1, max_size=12),
    st.integers(1, 4),
    st.booleans(),
)
def test_every_answer_is_what_it_would_be_alone(
    requests: list[tuple[list[int], int, int, int]], slots: int, can_cut: bool
) -> None:
    """Whatever runs beside it, begins like it, came before it in its slot or is cancelled next to it."""
    runtime = FakeRuntime(can_cut=can_cut)
    batcher = Batcher(runtime, slots)
    clients = []
    for prompt, count, steps, cancelled in requests:
        while batcher.running == slots:
            advance(batcher)
        client = Client(prompt, count)
        batcher.admit(client.job)
        clients.append(client)
        for _ in range(steps):
            if batcher.running:
                advance(batcher)
        if cancelled < len(clients):
            clients[cancelled].job.cancelled = True
            batcher.sweep()
    finish(batcher)

    for client in clients:
        expected = alone(client.prompt, client.count)
        if client.job.cancelled:
            assert expected.startswith(client.text)
            continue
        assert client.text == expected
        last = client.events[-1]
        assert isinstance(last, Delta)
        assert last.finish_reason == "length"
        assert last.usage is not None
        assert last.usage.completion_tokens == client.count
        assert can_cut or last.usage.cached_tokens == 0


def test_a_long_prompt_stalls_nobody() -> None:
    """While it is read in bounded pieces, a decoding request gets a token in each step, and a short prompt gets in."""
    runtime = FakeRuntime()
    batcher = Batcher(runtime, 3, clock=iter(range(100_000)).__next__)
    decoding, long, short = Client([1, 2], 100), Client([0] * 200, 1), Client([2] * 10, 1)
    batcher.admit(decoding.job)
    advance(batcher)
    batcher.admit(long.job)
    batcher.admit(short.job)
    steps = 0
    while not long.events:
        got = len(decoding.events)
        advance(batcher)
        steps += 1
        assert len(decoding.events) == got + 1
        assert sum(runtime.steps[-1].values()) <= MIN_CHUNK + 1
        assert short.events or steps == 1

    assert steps > 200 // MIN_CHUNK


def test_the_budget_of_a_step_follows_the_measured_speed() -> None:
    """Prompts are read in pieces of about a quarter of a second, however fast the machine is."""
    runtime = FakeRuntime()
    times = iter(range(1000))
    batcher = Batcher(runtime, 1, clock=lambda: next(times) * 0.32)  # 32 tokens in 0.32 s: 100 tokens/s
    batcher.admit(Client([0] * 200, 1).job)
    advance(batcher)

    assert batcher.prefill_tokens_per_s == pytest.approx(100)
    fast = Batcher(FakeRuntime(), 1, clock=lambda: next(times) * 0.08)  # 32 tokens in 0.08 s: 400 tokens/s
    fast_runtime = fast._runtime
    fast.admit(Client([0] * 200, 1).job)
    advance(fast)
    advance(fast)

    assert isinstance(fast_runtime, FakeRuntime)
    assert [sum(step.values()) for step in fast_runtime.steps] == [32, 100]


def test_a_beginning_is_taken_over_from_a_busy_slot() -> None:
    """Only the rest of the prompt is computed, and the one it was taken from goes on undisturbed."""
    runtime = FakeRuntime()
    batcher = Batcher(runtime, 2)
    first, second = Client([1] * 30 + [2], 50), Client([1] * 30 + [0], 5)
    batcher.admit(first.job)
    advance(batcher)
    advance(batcher)
    batcher.admit(second.job)
    finish(batcher)

    assert (first.text, second.text) == (alone(first.prompt, 50), alone(second.prompt, 5))
    last = second.events[-1]
    assert isinstance(last, Delta)
    assert last.usage is not None
    assert last.usage.cached_tokens == 30


def test_a_step_that_fails_ends_its_requests_and_no_other() -> None:
    """They get a typed error, and the slots serve again, with nothing of the failed step in their cache."""
    runtime = FakeRuntime()
    batcher = Batcher(runtime, 2)
    unlucky, lucky = Client([1] * 8, 5), Client([1] * 8, 5)
    batcher.admit(unlucky.job)
    runtime.broken = True
    advance(batcher)
    runtime.broken = False
    batcher.admit(lucky.job)
    finish(batcher)

    (error,) = unlucky.events
    assert isinstance(error, UpstreamFailed)
    assert error.source == "edge"
    assert lucky.text == alone(lucky.prompt, 5)


def test_a_row_without_a_finite_number_ends_one_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """It gets a typed error; the request beside it does not notice."""
    runtime = FakeRuntime()
    batcher = Batcher(runtime, 2)
    bad, good = Client([1] * 8, 5), Client([2] * 8, 5)
    batcher.admit(bad.job)
    batcher.admit(good.job)
    pick = bad.job.sampler.pick
    monkeypatch.setattr(bad.job.sampler, "pick", lambda row: pick(np.full_like(row, np.nan)))
    finish(batcher)

    (error,) = bad.events
    assert isinstance(error, UpstreamFailed)
    assert good.text == alone(good.prompt, 5)
