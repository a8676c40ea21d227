"""Continuous batching over a runtime whose next token is a hash of the whole sequence: one wrong cache cell shows."""

import itertools
import zlib
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.backends.batch import MIN_CHUNK, UNNOTICED_S, Batcher, Job
from edge_agent.backends.drafting import Drafter, Drafts
from edge_agent.backends.prefixes import Kept, Prefixes
from edge_agent.backends.sampling import Sampler
from edge_agent.backends.text import TextStream
from shared.errors import CausewayError, UpstreamFailed
from shared.schemas import Delta, Sampling

VOCABULARY = 97
CONTEXT = 256
ROWS = 128
PIECES = [f"<{token}>".encode() for token in range(VOCABULARY)]


def next_token(tokens: list[int]) -> int:
    """Follows from the whole sequence, and is often what stood three tokens before."""
    found = zlib.crc32(bytes(tokens))
    return tokens[-3] if found % 8 and len(tokens) > 2 else found % VOCABULARY


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
        self.broken = self.refuses = False
        self.copied = self.brought_back = 0
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

    def shift(self, sequence: int, start: int, count: int) -> None:
        assert self.can_cut
        del self.cache[sequence][start : start + count]

    def state_size(self, sequence: int) -> int:
        return len(self.cache.get(sequence, []))

    def state(self, sequence: int) -> bytes:
        self.copied += 1
        return bytes(self.cache.get(sequence, []))

    def restore(self, sequence: int, state: bytes) -> bool:
        self.brought_back += 1
        self.cache[sequence] = [] if self.refuses else list(state)
        return not self.refuses


class Client:
    """One request and what it got."""

    def __init__(self, prompt: list[int], count: int, **fields: Any) -> None:
        tokens = np.array(prompt, np.int32)
        sampling = Sampling(**({"temperature": 0.0} | fields))
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


prompts = st.one_of(
    st.lists(st.integers(0, 2), min_size=1, max_size=90),
    st.builds(lambda kind, rest: [kind] * 100 + rest, st.integers(0, 2), st.lists(st.integers(0, 2), max_size=30)),
)
"""Three tokens only, so that prompts often begin alike, and some of them long enough to be set aside."""


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.tuples(prompts, st.integers(1, 20), st.integers(0, 30), st.integers(0, 30)), min_size=1, max_size=12),
    st.integers(1, 4),
    st.booleans(),
    st.sampled_from([0, 300, 100_000]),
    st.booleans(),
)
def test_every_answer_is_what_it_would_be_alone(
    requests: list[tuple[list[int], int, int, int]], slots: int, can_cut: bool, budget: int, drafting: bool
) -> None:
    """Whatever runs beside it, begins like it, came before it in its slot, was set aside, guessed or is cancelled."""
    runtime = FakeRuntime(can_cut=can_cut)
    drafter = Drafter() if drafting else None
    batcher = Batcher(runtime, slots, itertools.count().__next__, Prefixes(budget), drafter=drafter)
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
        assert short.events or steps < 3

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


@pytest.mark.parametrize(("base", "per_row"), [(0.02, 0.002), (0.04, 0.004), (0.001, 0.0001)])
def test_a_long_prompt_makes_others_at_most_three_times_as_slow(base: float, per_row: float) -> None:
    """On machines of several speeds, where a step takes a time of its own and some more for each row; on fast ones they
    may become as slow as nobody notices."""
    runtime = FakeRuntime()
    now = [0.0]

    def clock() -> float:
        return now[0]

    decode = runtime.decode

    def timed(count: int) -> bool:
        now[0] += base + per_row * count
        return decode(count)

    runtime.decode = timed  # type: ignore[method-assign]
    batcher = Batcher(runtime, 3, clock=clock)
    writing = [Client([1] * 60, 90), Client([2] * 60, 90)]
    for client in writing:
        batcher.admit(client.job)
    for _ in range(20):
        advance(batcher)
    assert sum(runtime.steps[-1].values()) == 2
    long = Client([0] * 240, 1)
    batcher.admit(long.job)
    longest = 0.0
    while not long.events:
        before = now[0]
        advance(batcher)
        longest = max(longest, now[0] - before)

    normal = base + 2 * per_row
    assert normal + per_row < longest <= max(3 * normal, normal + UNNOTICED_S) + 1e-9


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


def test_a_beginning_that_is_not_worth_copying_is_computed() -> None:
    """Of a running sequence of 200 tokens, two are shared: they are computed again, three quarters are not."""
    for shared, found in ((2, 0), (150, 150)):
        runtime = FakeRuntime()
        batcher = Batcher(runtime, 2)
        first = Client([1] * shared + [2] * (200 - shared), 20)
        batcher.admit(first.job)
        while not first.events:
            advance(batcher)
        second = Client([1] * shared + [0], 5)
        batcher.admit(second.job)
        assert (runtime.copied, second.job.text.cached_tokens) == (bool(found), found)
        finish(batcher)
        assert (first.text, second.text) == (alone(first.prompt, 20), alone(second.prompt, 5))


def answer_of(batcher: Batcher, prompt: list[int], count: int = 3, *, private: bool = False) -> int:
    """Checks the answer; returns how many tokens of the prompt were found."""
    client = Client(prompt, count)
    client.job.private = private
    batcher.admit(client.job)
    finish(batcher)
    assert client.text == alone(prompt, count)
    last = client.events[-1]
    assert isinstance(last, Delta)
    assert last.usage is not None
    return last.usage.cached_tokens


def test_what_left_its_slot_is_brought_back() -> None:
    """One slot, two system prompts in turn: each is computed once; without memory for it, each time."""
    prompts = [[1] * 100, [2] * 100]
    for budget, found in ((100_000, 100), (0, 0)):
        runtime = FakeRuntime()
        batcher = Batcher(runtime, 1, prefixes=Prefixes(budget))
        for prompt in prompts:
            assert answer_of(batcher, [*prompt, 0, 1]) == 0
        assert [answer_of(batcher, [*prompt, 0, 2]) for prompt in prompts] == [found and found + 1] * 2
        assert runtime.brought_back == (2 if budget else 0)


def test_a_state_that_does_not_go_back_is_computed_again() -> None:
    """The answer is the same; nothing is taken for found."""
    runtime = FakeRuntime()
    batcher = Batcher(runtime, 1, prefixes=Prefixes(100_000))
    answer_of(batcher, [1] * 100)
    answer_of(batcher, [2] * 100)
    runtime.refuses = True

    assert answer_of(batcher, [1] * 101) == 0
    assert runtime.brought_back == 1


def test_what_was_kept_serves_the_next_life() -> None:
    """From slots and memory, most recently used first; what is private is not among it; what has no slot now waits in
    memory; no state that is longer than a context is tried."""
    before = Batcher(FakeRuntime(), 2, prefixes=Prefixes(100_000))
    for token in (3, 4, 5, 6):
        answer_of(before, [token] * 100)
    answer_of(before, [7] * 100, private=True)
    answer_of(before, [*[6] * 90, *[7] * 100], private=True)
    kept = list(before.keepsakes())
    runtime = FakeRuntime()
    after = Batcher(runtime, 2, prefixes=Prefixes(100_000))
    after.restore([*kept, Kept(np.zeros(CONTEXT + 1, np.int32), b"", private=False)])

    assert sorted(int(one.tokens[0]) for one in kept) == [3, 4, 5, 6]
    assert all(7 not in one.tokens.tolist() for one in kept)
    assert [answer_of(after, [*[token] * 100, 0]) for token in (3, 6, 4, 5)] == [100, 90, 100, 100]
    assert answer_of(after, [7] * 100) == 0


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


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"temperature": 0.3, "seed": 5, "logprobs": 2},
        {"repetition_penalty": 1.3, "frequency_penalty": 0.1, "presence_penalty": 0.1},
    ],
    ids=["greedy", "sampled", "penalties"],
)
def test_guesses_change_nothing_but_the_number_of_steps(fields: dict[str, Any]) -> None:
    """Some are right and some wrong: the text, the log probabilities and the cache are those of plain decoding."""
    found: dict[bool, tuple[Any, ...]] = {}
    for drafting in (True, False):
        runtime, drafter = FakeRuntime(), Drafter()
        batcher = Batcher(runtime, 2, itertools.count().__next__, drafter=drafter if drafting else None)
        client = Client([4, 5, 6] * 3, 120, **fields)
        batcher.admit(client.job)
        finish(batcher)
        logprobs = [entry for event in client.events if isinstance(event, Delta) for entry in event.logprobs]
        found[drafting] = client.text, logprobs, runtime.cache[0], len(runtime.steps)
        assert (0 < drafter.accepted < drafter.drafted) is drafting
    assert found[True][:3] == found[False][:3]
    assert found[True][3] < found[False][3]


def test_nobody_guesses_in_company() -> None:
    """llama.cpp would compute the guesses apart, at the others' cost; who is left alone begins again."""
    runtime, drafter = FakeRuntime(), Drafter()
    batcher = Batcher(runtime, 2, itertools.count().__next__, drafter=drafter)
    first, second = Client([4, 5, 6] * 4, 100), Client([7, 8, 9] * 4, 20)
    batcher.admit(first.job)
    batcher.admit(second.job)
    while batcher.running == 2:
        advance(batcher)
        assert drafter.drafted == 0
    finish(batcher)

    assert drafter.drafted
    assert (first.text, second.text) == (alone(first.prompt, 100), alone(second.prompt, 20))


def test_guesses_end_with_the_answer_and_the_context() -> None:
    """No row is computed beyond the last token that may come, however sure the guesses are."""
    for prompt, count in (([4, 5, 6] * 4, 30), ([4, 5, 6] * 80, CONTEXT - 240)):
        runtime, drafter = FakeRuntime(), Drafter()
        batcher = Batcher(runtime, 1, itertools.count().__next__, drafter=drafter)
        client = Client(prompt, count)
        batcher.admit(client.job)
        finish(batcher)
        assert client.text == alone(prompt, count)
        assert drafter.drafted
        assert max(map(len, runtime.cache.values())) <= len(prompt) + count


@pytest.mark.parametrize(("row_s", "drafts"), [(0.01, True), (1.0, False)])
def test_whether_guesses_are_made_follows_from_what_rows_cost(row_s: float, drafts: bool) -> None:
    """Where each row takes as long as a step, no guess is worth it; where rows are nearly free, all are."""
    drafter = Drafter()
    drafter.observe(0, 1.0)
    for _ in range(50):
        drafter.observe(4, 1.0 + 4 * row_s)
    guesses = Drafts(drafter).propose(np.array([4, 5, 6] * 4, np.int32), 100)

    assert bool(guesses) is drafts
    assert drafter.free_rows == pytest.approx(64.0 if drafts else 0.0)
    for _ in range(400):
        drafter.observe(0, 1.0)
    assert drafter.free_rows == pytest.approx(1.0, abs=0.01)  # and it is tried again


@pytest.mark.parametrize("drafting", [False, True])
@pytest.mark.parametrize("prompt", [[4, 5, 6, 9, 2, 5, 8], [3] * 200], ids=["short", "long"])
def test_an_answer_beyond_the_context_forgets_its_middle(prompt: list[int], drafting: bool) -> None:
    """Each token follows from the beginning and the newer half of the rest; nobody takes the slot for what it was."""
    runtime = FakeRuntime()
    batcher = Batcher(runtime, 2, itertools.count().__next__, drafter=Drafter() if drafting else None)
    client = Client(prompt, 600)
    batcher.admit(client.job)
    seen, text = list(client.prompt), ""
    for _ in range(600):
        seen.append(next_token(seen))
        text += f"<{seen[-1]}>"
        if len(seen) > CONTEXT:
            start = min(len(client.prompt), CONTEXT // 2)
            del seen[start : start + (CONTEXT - start) // 2]
    finish(batcher)
    again = Client(client.prompt, 5)
    batcher.admit(again.job)
    finish(batcher)

    assert client.text == text
    assert again.text == alone(again.prompt, 5)
    last = again.events[-1]
    assert isinstance(last, Delta)
    assert last.usage is not None
    assert last.usage.cached_tokens == 0


def test_short_prompts_are_read_before_long_ones_which_wait_no_longer_than_their_own_length() -> None:
    """However many short ones keep coming: what was read of others counts as if it were read of the long one."""
    runtime = FakeRuntime()
    batcher = Batcher(runtime, 3)
    clients = [Client([0] * 240, 1)]
    batcher.admit(clients[0].job)
    read = 0
    while not clients[0].events:
        while batcher.running < 3:
            clients.append(Client([len(clients)] * 60, 1))
            batcher.admit(clients[-1].job)
        advance(batcher)
        read += sum(runtime.steps[-1].values())

    assert len(clients) > 4
    assert read < 240 + 240 + 3 * MIN_CHUNK
