import random
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloud_engine.engine.blocks import NULL_BLOCK, chain_root
from cloud_engine.engine.config import EngineConfig
from cloud_engine.engine.scheduler import Scheduler, Work
from cloud_engine.engine.sequence import Sequence, State
from shared.errors import ContextTooLong, Overloaded, RequestConflict
from shared.schemas import Sampling

EOS = 7


def config(**changes) -> EngineConfig:
    values = {"model_len": 64, "block_size": 4, "num_blocks": 40, "max_num_seqs": 8, "max_num_batched_tokens": 16}
    return EngineConfig(**(values | changes))


def sequence(name: str, prompt: list[int], max_tokens: int = 4, root: bytes = chain_root("")) -> Sequence:
    return Sequence(
        id=name,
        tokens=list(prompt),
        sampling=Sampling(),
        max_tokens=max_tokens,
        seed=0,
        stop_ids=frozenset({EOS}),
        root=root,
    )


def check_pool(scheduler: Scheduler) -> None:
    """Every rule that holds between two steps."""
    pool, limits = scheduler.pool, scheduler.config
    held = Counter(block for seq in scheduler.live.values() for block in seq.block_table)
    assert len(pool.free) + len(held) == pool.num_blocks - 1
    assert all(pool.references[block] == held[block] for block in range(1, pool.num_blocks))
    assert NULL_BLOCK not in held
    assert NULL_BLOCK not in pool.free
    assert not set(pool.free) & set(held)
    for block, count in held.items():
        assert count == 1 or pool.hashes[block] is not None
    assert {block: key for key, block in pool.published.items()} == {
        block: key for block, key in enumerate(pool.hashes) if key is not None
    }
    assert sorted([*pool.host.free, *pool.host.slots.values()]) == list(range(limits.host_blocks))
    assert len(scheduler.running) <= limits.max_num_seqs
    assert set(scheduler.running) | set(scheduler.waiting) == set(scheduler.live.values())
    for seq in scheduler.live.values():
        assert seq.num_computed <= seq.num_tokens + seq.num_pending <= limits.model_len
        assert seq.num_published * limits.block_size <= min(seq.num_computed, seq.num_tokens)
        assert len(seq.block_table) == len(set(seq.block_table))
        assert len(seq.block_table) * limits.block_size >= seq.num_computed
        assert (seq.state is State.RUNNING) == (seq in scheduler.running)


class FakeModel:
    """Remembers which token each slot was written for, so that a table that maps a wrong block is seen at once, and
    copies blocks to host memory and back when it is told to. Drafts are right up to a random place."""

    def __init__(self, limits: EngineConfig) -> None:
        self.limits = limits
        self.slots: dict[int, tuple[bytes, tuple[int, ...]]] = {}
        self.last: list[int] = []
        self.host: dict[int, list[tuple[bytes, tuple[int, ...]]]] = {}

    def swap(self, work: list[Work]) -> None:
        size = self.limits.block_size
        for swap in (swap for item in work for swap in item.chunk().swaps):
            slots = range(swap.block * size, (swap.block + 1) * size)
            if swap.loads:
                self.slots.update(zip(slots, self.host[swap.slot], strict=True))
            else:
                self.host[swap.slot] = [self.slots[slot] for slot in slots]

    def run(self, work: list[Work], rng: random.Random, vocabulary: int) -> list[list[int]]:
        self.swap(work)
        size = self.limits.block_size
        written: list[int] = []
        for item in work:
            seq, tokens = item.sequence, [*self.tokens(item)[: item.start + item.count], *item.draft]
            for position in range(item.start, len(tokens)):
                slot = seq.block_table[position // size] * size + position % size
                written.append(slot)
                self.slots[slot] = (seq.root, tuple(tokens[: position + 1]))
        assert len(written) == len(set(written)), "a slot was written twice in a step"
        for item in work:
            seq = item.sequence
            for position in range(item.start + item.count):
                slot = seq.block_table[position // size] * size + position % size
                assert self.slots[slot] == (seq.root, self.tokens(item)[: position + 1])
        sampled = [
            [*item.draft[: rng.randint(0, len(item.draft))], rng.randrange(vocabulary)] for item in work if item.samples
        ]
        self.last = [tokens[0] for tokens in sampled]
        return sampled

    def tokens(self, item: Work) -> tuple[int, ...]:
        """All that the device knows, the token that the step before sampled included."""
        pending = [] if item.previous is None else [self.last[item.previous]]
        return (*item.sequence.tokens, *pending)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    num_blocks=st.integers(17, 60),
    budget=st.integers(4, 40),
    seqs=st.integers(1, 4),
    caching=st.booleans(),
    drafts=st.sampled_from([0, 6]),
    host=st.sampled_from([0, 3, 30]),
)
def test_random_traffic_keeps_every_invariant(seed, num_blocks, budget, seqs, caching, drafts, host):
    """Random adds, steps, drafts, swaps and aborts: blocks are conserved, here and in host memory, and shared only when
    equal; every request ends once."""
    rng = random.Random(seed)
    limits = config(
        num_blocks=num_blocks,
        max_num_batched_tokens=budget,
        max_num_seqs=seqs,
        prefix_caching=caching,
        max_waiting=10,
        host_blocks=host if caching else 0,
    )
    scheduler, model = Scheduler(limits), FakeModel(limits)
    everything: list[Sequence] = []
    trunk = [rng.randrange(6) for _ in range(40)]
    for number in range(150):
        if rng.random() < 0.4:
            prompt = trunk[: rng.randrange(1, 40)] + [rng.randrange(6) for _ in range(rng.randrange(1, 16))]
            root = chain_root(rng.choice("ab"))
            new = sequence(str(number), prompt, max_tokens=rng.randrange(1, 30), root=root)
            try:
                scheduler.add(new)
                everything.append(new)
            except (ContextTooLong, Overloaded):
                assert new.id not in scheduler.live
        if everything and rng.random() < 0.1:
            scheduler.abort(rng.choice(everything).id)
        step(scheduler, model, rng, drafts)
    for _ in range(4000):
        if not scheduler.live:
            break
        assert step(scheduler, model, rng, drafts), "no progress with live sequences"
    assert not scheduler.live
    assert scheduler.pool.num_free == num_blocks - 1
    assert all(seq.ending is not None and seq.state is State.FINISHED for seq in everything)
    assert all(seq.num_output <= seq.max_tokens for seq in everything)


def step(scheduler: Scheduler, model: FakeModel, rng: random.Random, drafts: int = 0) -> list[Work]:
    outputs = {seq: seq.output for seq in scheduler.live.values()}
    for seq in scheduler.running:
        if drafts and seq.num_output:
            seq.draft = tuple(rng.randrange(EOS + 1) for _ in range(rng.randrange(drafts)))
    work = scheduler.schedule()
    assert sum(item.rows for item in work) <= scheduler.config.max_num_batched_tokens
    assert all(item.count > 0 for item in work)
    assert all(item.samples or not item.draft for item in work)
    assert len({item.sequence for item in work}) == len(work)
    check_pool(scheduler)
    tokens = model.run(work, rng, vocabulary=EOS + 1)
    scheduler.settle(work, tokens)
    check_pool(scheduler)
    assert all(seq.output[: len(before)] == before for seq, before in outputs.items()), "an output token was lost"
    return work


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), num_blocks=st.integers(17, 50), budget=st.integers(8, 40), caching=st.booleans())
def test_steps_may_be_settled_one_late(seed, num_blocks, budget, caching):
    """Scheduled while the step before is unsettled, under aborts at any time: every slot holds what its reader means,
    blocks are conserved, and every request ends once, with the tokens that its own steps sampled."""
    limits = config(
        num_blocks=num_blocks,
        max_num_batched_tokens=budget,
        prefix_caching=caching,
        host_blocks=9 if caching else 0,
    )
    late = LateTraffic(seed, limits)
    late.run(150)
    assert not late.scheduler.live
    assert late.scheduler.pool.num_free == num_blocks - 1
    assert all(seq.output == late.sampled[seq][: seq.num_output] for seq in late.sampled)
    assert all(seq.num_output <= seq.max_tokens for seq in late.sampled)
    assert all(seq.num_pending == 0 for seq in late.sampled)


def test_late_settling_really_meets_every_case():
    """The property above is not vacuous: tokens of steps in flight belong to sequences that ended, were aborted or
    preempted, blocks with pending tokens fill up, and prefixes are hit."""
    seen: Counter[str] = Counter()
    for seed in range(6):
        late = LateTraffic(seed, config(num_blocks=17 + seed, max_num_batched_tokens=12, host_blocks=9))
        late.run(200)
        seen.update(late.seen)
        seen["hit"] += late.scheduler.counters.prefix_hit_tokens
        seen["loaded"] += late.scheduler.pool.host.loaded
    assert set(+seen) == {"surplus", "aborted", "preempted", "filled", "hit", "loaded"}


class LateTraffic:
    """Random requests on a scheduler whose every step is settled after the next one was launched."""

    def __init__(self, seed: int, limits: EngineConfig) -> None:
        self.rng = random.Random(seed)
        self.scheduler, self.model = Scheduler(limits), FakeModel(limits)
        self.sampled: dict[Sequence, list[int]] = {}
        self.launched: list[tuple[list[Work], list[list[int]]]] = []
        self.seen: Counter[str] = Counter()

    def run(self, steps: int) -> None:
        trunk = [self.rng.randrange(6) for _ in range(40)]
        for number in range(steps):
            if self.rng.random() < 0.4:
                prompt = trunk[: self.rng.randrange(1, 30)] + [number % 6] * self.rng.randrange(1, 9)
                new = sequence(str(number), prompt, max_tokens=self.rng.randrange(1, 24))
                self.scheduler.add(new)
                self.sampled[new] = []
            self.step(aborts=True)
        for _ in range(4000):
            if not (self.scheduler.live or self.launched):
                return
            self.step(aborts=False)
        pytest.fail("no progress with live sequences")

    def step(self, *, aborts: bool) -> None:
        work = self.scheduler.schedule()
        check_pool(self.scheduler)
        if work:
            self.launched.append((work, self.model.run(work, self.rng, EOS + 1)))
        full = self.scheduler.config.block_size
        self.seen["filled"] += sum(item.previous is not None and (item.start + 1) % full == 0 for item in work)
        if aborts and self.launched and self.rng.random() < 0.2:
            target = self.rng.choice(self.launched[-1][0]).sequence
            self.seen["aborted"] += self.scheduler.abort(target.id)
            assert not self.scheduler.abort(target.id)
            check_pool(self.scheduler)
        if self.launched and (len(self.launched) > 1 or not work):
            self.settle(*self.launched.pop(0))

    def settle(self, work: list[Work], tokens: list[list[int]]) -> None:
        sampling = [item.sequence for item in work if item.samples]
        states = [seq.state for seq in sampling]
        taken = self.scheduler.settle(work, tokens)
        check_pool(self.scheduler)
        for seq, state, [token], count in zip(sampling, states, tokens, taken, strict=True):
            assert count == (state is not State.FINISHED)
            self.sampled[seq] += [token] * count
            self.seen["surplus"] += not count and seq.ending == "stop"
            self.seen["preempted"] += state is State.PREEMPTED


def test_random_traffic_really_shares_preempts_chunks_drafts_and_swaps():
    """The property above is not vacuous: hits, preemptions, chunks, swaps, right and wrong drafts happen there."""
    rng = random.Random(3)
    limits = config(num_blocks=17, max_num_seqs=4, max_num_batched_tokens=8, host_blocks=9)
    scheduler, model = Scheduler(limits), FakeModel(limits)
    for number in range(30):
        scheduler.add(sequence(str(number), [1, 2, 3, 4, 5] * 4 + [number % 6], max_tokens=30))
    while scheduler.live:
        step(scheduler, model, rng, drafts=6)
    counters = scheduler.counters
    assert 0 < counters.accepted_tokens < counters.drafted_tokens
    assert counters.prefix_hit_tokens > 0
    assert counters.preemptions > 0
    assert counters.chunks > 0
    assert scheduler.pool.host.loaded > 0
    assert scheduler.pool.host.saved > limits.host_blocks, "no slot was used twice"


def run_step(scheduler: Scheduler, token: int = 1) -> dict[str, int]:
    """One step in which every sampled token is `token`: how many tokens each sequence computed."""
    work = scheduler.schedule()
    scheduler.settle(work, [[token] for item in work if item.samples])
    return {item.sequence.id: item.count for item in work}


def run_until(scheduler: Scheduler, reached: Callable[[], object], token: int = 1) -> None:
    for _ in range(500):
        if reached():
            return
        run_step(scheduler, token)
    pytest.fail("the scheduler never got there")


def test_one_budget_mixes_chunks_and_decodes():
    """A long prompt is cut by the budget and the decodes beside it keep their token per step."""
    scheduler = Scheduler(config(max_num_batched_tokens=10))
    scheduler.add(sequence("short", [1, 2], max_tokens=20))
    assert run_step(scheduler) == {"short": 2}
    scheduler.add(sequence("long", [3] * 30, max_tokens=5))
    assert [run_step(scheduler) for _ in range(5)] == [
        {"short": 1, "long": 9},
        {"short": 1, "long": 9},
        {"short": 1, "long": 9},
        {"short": 1, "long": 3},
        {"short": 1, "long": 1},
    ]


def test_first_come_first_served():
    """Requests start in the order they came, also when a later one would fit sooner."""
    scheduler = Scheduler(config(num_blocks=17, max_num_seqs=8))
    scheduler.add(sequence("a", [1] * 40, max_tokens=8))
    scheduler.add(sequence("b", [2] * 40, max_tokens=1))
    scheduler.add(sequence("c", [3], max_tokens=1))
    order: list[str] = []
    while scheduler.live:
        order += [name for name in run_step(scheduler) if name not in order]
    assert order == ["a", "b", "c"]


def test_identical_prompts_of_one_step_share_blocks():
    """Two equal prompts admitted in one step use the same full blocks, never the last, unfinished one."""
    scheduler = Scheduler(config(max_num_batched_tokens=40))
    for name in "ab":
        scheduler.add(sequence(name, list(range(10)), max_tokens=4))
    assert run_step(scheduler) == {"a": 10, "b": 2}
    first, second = (scheduler.live[name].block_table for name in "ab")
    assert first[:2] == second[:2]
    assert first[2] != second[2]


def test_a_fully_cached_prompt_still_computes_a_token():
    """A hit covers at most all tokens but one: without a computed token there are no logits."""
    scheduler = Scheduler(config())
    scheduler.add(sequence("a", list(range(8)), max_tokens=1))
    run_step(scheduler)
    scheduler.add(sequence("b", list(range(8)), max_tokens=1))
    assert run_step(scheduler) == {"b": 4}


def test_a_salt_separates_tenants():
    """Under another root nothing is shared, and without the cache nothing is either."""
    for limits, root in ((config(), chain_root("other")), (config(prefix_caching=False), chain_root(""))):
        scheduler = Scheduler(limits)
        scheduler.add(sequence("a", list(range(8)), max_tokens=1))
        run_step(scheduler)
        scheduler.add(sequence("b", list(range(8)), max_tokens=1, root=root))
        assert run_step(scheduler) == {"b": 8}
        assert scheduler.counters.prefix_hit_tokens == 0


def test_the_tail_of_a_cached_prefix_is_evicted_first():
    """When blocks are needed the end of a freed sequence goes first, so that its head can still be shared."""
    scheduler = Scheduler(config(num_blocks=17))
    scheduler.add(sequence("a", [0, 1, 2, 3] * 4, max_tokens=1))
    run_step(scheduler)
    scheduler.add(sequence("filler", [9] * 56, max_tokens=1))
    run_until(scheduler, lambda: not scheduler.live)
    scheduler.add(sequence("b", [0, 1, 2, 3] * 4, max_tokens=1))
    run_step(scheduler)
    assert scheduler.counters.prefix_hit_tokens == 8


def test_preemption_keeps_output_and_hits_count_once():
    """The last admitted sequence is recomputed with every token it had, and counts as one query of the cache."""
    scheduler = Scheduler(config(num_blocks=17, max_num_batched_tokens=64, prefix_caching=False))
    for name in "ab":
        scheduler.add(sequence(name, [1] * 20, max_tokens=33))
    victim = scheduler.live["b"]
    run_until(scheduler, lambda: victim.preemptions, token=5)
    assert victim.state is State.PREEMPTED
    assert victim.num_output > 0
    assert scheduler.waiting.first() is victim
    assert set(victim.output) == {5}
    run_until(scheduler, lambda: not scheduler.live, token=5)
    assert victim.output == [5] * 33
    assert victim.ending == "length"


def test_what_can_never_fit_is_refused():
    """Over-long prompt or output, a used id, a full queue: a typed error naming the field, nothing else disturbed."""
    scheduler = Scheduler(config(max_waiting=2))
    scheduler.add(sequence("a", [1], max_tokens=1))
    with pytest.raises(ContextTooLong, match="64 tokens") as long_prompt:
        scheduler.add(sequence("b", [1] * 64, max_tokens=1))
    assert long_prompt.value.param == "messages"
    with pytest.raises(ContextTooLong, match="make 65") as long_output:
        scheduler.add(sequence("b", [1] * 60, max_tokens=5))
    assert long_output.value.param == "max_tokens"
    with pytest.raises(RequestConflict):
        scheduler.add(sequence("a", [1], max_tokens=1))
    scheduler.add(sequence("b", [1], max_tokens=1))
    with pytest.raises(Overloaded):
        scheduler.add(sequence("c", [1], max_tokens=1))
    assert run_step(scheduler) == {"a": 1, "b": 1}
    assert not scheduler.live


@pytest.mark.parametrize("when", ["waiting", "mid-chunk", "running", "preempted", "finished", "unknown"])
def test_abort_in_every_state_twice(when):
    """An abort ends a sequence once, in any state; a second one, or one of nothing, does nothing."""
    scheduler = Scheduler(config(num_blocks=17, max_num_batched_tokens=16, prefix_caching=False))
    scheduler.add(sequence("other", [1] * 20, max_tokens=43))
    target = sequence("target", [2] * 30, max_tokens=30 if when != "finished" else 1)
    if when != "unknown":
        scheduler.add(target)
    reached = {
        "waiting": lambda: True,
        "mid-chunk": lambda: 0 < target.num_computed < target.num_prompt,
        "running": lambda: target.num_output > 0,
        "preempted": lambda: target.state is State.PREEMPTED,
        "finished": lambda: target.state is State.FINISHED,
        "unknown": lambda: True,
    }[when]
    run_until(scheduler, reached)
    assert scheduler.abort("target") is (when not in ("finished", "unknown"))
    assert scheduler.abort("target") is False
    check_pool(scheduler)
    if when != "unknown":
        assert target.ending == ("length" if when == "finished" else "cancelled")
    run_until(scheduler, lambda: not scheduler.live)
    assert scheduler.pool.num_used == 0


def test_a_sequence_aborted_after_launch_takes_no_token():
    """An abort between schedule and settle stands: the late token is dropped and the blocks were freed once."""
    scheduler = Scheduler(config())
    scheduler.add(sequence("a", [1, 2], max_tokens=5))
    work = scheduler.schedule()
    scheduler.abort("a")
    scheduler.settle(work, [[3]])
    assert work[0].sequence.ending == "cancelled"
    assert work[0].sequence.output == []
    check_pool(scheduler)


def test_eos_ends_unless_ignored():
    """A stop token ends a sequence with `stop`; with ignore_eos only max_tokens does."""
    scheduler = Scheduler(config())
    plain = sequence("a", [1], max_tokens=3)
    ignoring = sequence("b", [1], max_tokens=3)
    ignoring.sampling = Sampling(ignore_eos=True)
    scheduler.add(plain)
    scheduler.add(ignoring)
    run_until(scheduler, lambda: not scheduler.live, token=EOS)
    assert (plain.output, plain.ending) == ([EOS], "stop")
    assert (ignoring.output, ignoring.ending) == ([EOS] * 3, "length")


def test_unusable_logits_fail_one_sequence_only():
    """A negative token from the sampler ends that sequence with an error and no other."""
    scheduler = Scheduler(config())
    for name in "ab":
        scheduler.add(sequence(name, [1], max_tokens=3))
    work = scheduler.schedule()
    scheduler.settle(work, [[-1], [2]])
    assert work[0].sequence.ending == "error"
    assert work[1].sequence.output == [2]


@pytest.mark.parametrize(
    "changes",
    [
        {"model_len": 65, "num_blocks": 17},
        {"model_len": 1},
        {"max_num_batched_tokens": 7},
        {"num_blocks": 1},
        {"block_size": 0},
    ],
)
def test_limits_that_cannot_be_kept_are_refused(changes):
    """A pool that one permitted sequence could outgrow, or a budget too small to serve every sequence, never starts."""
    with pytest.raises(ValueError, match="must be"):
        Scheduler(config(**changes))
