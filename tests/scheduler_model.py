"""What tests of the scheduler share: small limits, sequences, steps without a model, and checked random traffic.

`Traffic` drives a scheduler as an engine does, with a device that remembers what each slot of the cache holds, and
after every move checks every rule that a scheduler must keep, whatever comes.
"""

import math
import random
from collections import Counter, defaultdict
from collections.abc import Callable

from cloud_engine.engine.blocks import NULL_BLOCK, chain_root
from cloud_engine.engine.config import EngineConfig
from cloud_engine.engine.order import rank
from cloud_engine.engine.scheduler import Scheduler
from cloud_engine.engine.sequence import Sequence, State
from cloud_engine.engine.work import Work
from shared.errors import CausewayError
from shared.schemas import Priority, Sampling

EOS = 7


def limits(**changes) -> EngineConfig:
    values = {"model_len": 64, "block_size": 4, "num_blocks": 40, "max_num_seqs": 8, "max_num_batched_tokens": 16}
    return EngineConfig(**(values | changes))


def request(
    name: str,
    prompt: int | list[int] = 4,
    output: int = 4,
    *,
    tenant: str = "",
    priority: Priority = "interactive",
    deadline: float = math.inf,
    root: bytes | None = None,
) -> Sequence:
    """A sequence of `prompt` tokens, its own if only their number is given, that makes `output` more."""
    tokens = list(prompt) if isinstance(prompt, list) else [sum(name.encode()) + 10] * prompt
    return Sequence(
        id=name,
        tokens=tokens,
        sampling=Sampling(),
        max_tokens=output,
        seed=0,
        stop_ids=frozenset({EOS}),
        root=chain_root(tenant) if root is None else root,
        tenant=tenant,
        priority=priority,
        deadline=deadline,
    )


def advance(scheduler: Scheduler, token: int = 1) -> dict[str, int]:
    """One step in which every sampled token is `token`: how many tokens each sequence computed."""
    work = scheduler.schedule()
    scheduler.settle(work, [[token] for item in work if item.samples])
    return {item.sequence.id: item.count for item in work}


def until(scheduler: Scheduler, reached: Callable[[], object], token: int = 1) -> None:
    for _ in range(500):
        if reached():
            return
        advance(scheduler, token)
    raise AssertionError("the scheduler never got there")


def drain(scheduler: Scheduler, steps: int = 10_000) -> list[str]:
    """Run to the end: the ids in the order in which they finished."""
    finished: list[str] = []
    for _ in range(steps):
        before = dict(scheduler.live)
        if not before:
            return finished
        advance(scheduler)
        finished += [name for name in before if name not in scheduler.live]
    raise AssertionError(f"{len(scheduler.live)} sequences are not finished after {steps} steps")


def check(scheduler: Scheduler) -> None:
    """Every rule that holds between two moves."""
    pool, config = scheduler.pool, scheduler.config
    held = Counter(block for seq in scheduler.live.values() for block in seq.block_table)
    assert len(pool.free) + len(held) == pool.num_blocks - 1, "free and used blocks are not all"
    assert all(pool.references[block] == held[block] for block in range(1, pool.num_blocks)), "wrong reference count"
    assert NULL_BLOCK not in held
    assert NULL_BLOCK not in pool.free
    assert not set(pool.free) & set(held), "a block that is used is free"
    for block, count in held.items():
        assert count == 1 or pool.hashes[block] is not None, "a block is shared that nobody can look up"
    assert {block: key for key, block in pool.published.items()} == {
        block: key for block, key in enumerate(pool.hashes) if key is not None
    }
    assert sorted([*pool.host.free, *pool.host.slots.values()]) == list(range(config.host_blocks))
    waiting = list(scheduler.waiting)
    assert len(scheduler.running) <= config.max_num_seqs
    assert scheduler.running == sorted(scheduler.running, key=rank)
    assert len(scheduler.waiting) == len(waiting) == len(set(waiting))
    assert len(scheduler.running) + len(waiting) + len(scheduler.held) == len(scheduler.live)
    assert {*scheduler.running, *waiting, *scheduler.held} == set(scheduler.live.values())
    assert scheduler.waiting.num_batch == sum(seq.priority == "batch" for seq in waiting)
    for tenant, count in Counter(seq.tenant for seq in waiting).items():
        assert scheduler.waiting.places.of(tenant) == count
    for seq in scheduler.live.values():
        assert seq.num_computed <= seq.num_tokens + seq.num_pending <= config.model_len
        assert seq.num_published * config.block_size <= min(seq.num_computed, seq.num_tokens), "published, not settled"
        assert len(seq.block_table) == len(set(seq.block_table))
        assert len(seq.block_table) * config.block_size >= seq.num_computed
        assert (seq.state is State.RUNNING) == (seq in scheduler.running)
        assert (seq.state is State.HELD) == (seq in scheduler.held)


class Device:
    """Remembers which tokens each slot was written for, so that a table that maps a wrong block is seen at once, and
    copies blocks to host memory and back when it is told to. What it samples is random; drafts are right up to a random
    place."""

    def __init__(self, config: EngineConfig, rng: random.Random) -> None:
        self.block_size = config.block_size
        self.rng = rng
        self.slots: dict[int, tuple[bytes, tuple[int, ...]]] = {}
        self.host: dict[int, list[tuple[bytes, tuple[int, ...]]]] = {}
        self.last: list[int] = []
        """The first token that the latest step sampled of whose row this is: what `previous` of the next points at."""

    def swap(self, work: list[Work]) -> None:
        size = self.block_size
        for swap in (swap for item in work for swap in item.chunk().swaps):
            slots = range(swap.block * size, (swap.block + 1) * size)
            if swap.loads:
                self.slots.update(zip(slots, self.host[swap.slot], strict=True))
            else:
                self.host[swap.slot] = [self.slots[slot] for slot in slots]

    def run(self, work: list[Work]) -> list[list[int]]:
        self.swap(work)
        written: list[int] = []
        known = [self.tokens(item) for item in work]
        for item, tokens in zip(work, known, strict=True):
            chunk = item.chunk()
            if item.previous is None:
                assert tuple(chunk.tokens) == (*tokens[item.start : item.start + item.count], *item.draft)
            drafted = (*tokens[: item.start + item.count], *item.draft)
            for position in range(chunk.start, chunk.end):
                slot = self.slot(chunk.table, position)
                written.append(slot)
                self.slots[slot] = (item.sequence.root, drafted[: position + 1])
        assert len(written) == len(set(written)), "a slot was written twice in a step"
        for item, tokens in zip(work, known, strict=True):
            for position in range(item.start + item.count):
                content = self.slots.get(self.slot(item.chunk().table, position))
                assert content == (item.sequence.root, tokens[: position + 1]), "a slot holds something else"
        sampling = [item for item in work if item.samples]
        sampled = [self.sample(item) for item in sampling]
        self.last = [
            tokens[0] for item, tokens in zip(sampling, sampled, strict=True) for _ in range(1 + len(item.draft))
        ]
        return sampled

    def sample(self, item: Work) -> list[int]:
        return [*item.draft[: self.rng.randint(0, len(item.draft))], self.rng.randrange(EOS + 1)]

    def slot(self, table: list[int], position: int) -> int:
        return table[position // self.block_size] * self.block_size + position % self.block_size

    def tokens(self, item: Work) -> tuple[int, ...]:
        """All that the device knows, the token that the step before sampled included."""
        pending = [] if item.previous is None else [self.last[item.previous]]
        return (*item.sequence.tokens, *pending)


class Traffic:
    """Random requests, aborts and deadlines. `late`: a step is settled after the next one was launched, as with
    `async_depth` 1, if none of it `waits`. `seen` counts what came to pass."""

    def __init__(self, seed: int, config: EngineConfig, *, late: bool = False, drafts: int = 0) -> None:
        self.rng = random.Random(seed)
        self.scheduler, self.device = Scheduler(config), Device(config, self.rng)
        self.late, self.drafts = late, drafts
        self.trunk = [self.rng.randrange(6) for _ in range(40)]
        self.now = 0.0
        self.output: dict[Sequence, list[int]] = {}
        """What each accepted request was given, in order."""
        self.launched: list[tuple[list[Work], list[list[int]]]] = []
        self.admitted: defaultdict[tuple[str, str], int] = defaultdict(int)
        """The arrival of the last one admitted, by tenant and priority."""
        self.seen: Counter[str] = Counter()

    def run(self, steps: int) -> None:
        """So many steps with requests coming, then to the end of all."""
        for number in range(steps):
            if self.rng.random() < 0.4:
                self.add(str(number))
            if self.output and self.rng.random() < 0.1:
                self.abort(self.rng.choice(list(self.output)))
            self.step()
        for _ in range(4000):
            if not (self.scheduler.live or self.launched):
                break
            self.step()
        assert not self.scheduler.live, "no progress"
        assert self.scheduler.pool.num_used == 0
        assert len(self.scheduler.waiting) == 0
        self.seen["loaded from the host"] += self.scheduler.pool.host.loaded
        self.seen["saved more than fits the host"] += (
            self.scheduler.pool.host.saved > self.scheduler.config.host_blocks > 0
        )
        for sequence, output in self.output.items():
            assert sequence.state is State.FINISHED
            assert sequence.ending is not None
            assert sequence.output == output
            assert len(output) <= sequence.max_tokens

    def add(self, name: str) -> None:
        rng = self.rng
        own = rng.randrange(1, 16) if rng.random() < 0.7 else 0
        prompt = self.trunk[: rng.randrange(1, 40)] + [rng.randrange(6) for _ in range(own)]
        new = request(
            name,
            prompt,
            rng.randrange(1, 30),
            tenant=rng.choice("abc"),
            priority="batch" if rng.random() < 0.3 else "interactive",
            deadline=self.now + rng.uniform(-1, 200) if rng.random() < 0.2 else math.inf,
        )
        new.drafted = new.waits = self.drafts > 0 and rng.random() < 0.3
        try:
            self.scheduler.add(new, self.now)
        except CausewayError as error:
            assert new.id not in self.scheduler.live
            self.seen[error.code] += 1
        else:
            self.output[new] = []
        check(self.scheduler)

    def abort(self, target: Sequence) -> None:
        """In whatever state it is, twice."""
        was = target.state
        assert self.scheduler.abort(target.id) is (was is not State.FINISHED)
        assert not self.scheduler.abort(target.id)
        assert not self.scheduler.finish(target, "stop")
        self.seen[f"aborted {was.value}"] += 1
        self.seen["aborted in flight"] += was is not State.FINISHED and target.num_pending > 0
        check(self.scheduler)

    def step(self) -> None:
        self.expire()
        if any(item.waits for work, _ in self.launched for item in work):
            self.settle(*self.launched.pop(0))
        self.resume()
        before = {seq: (seq.num_due, rank(seq)) for seq in self.scheduler.running}
        fresh = {seq for seq in self.scheduler.waiting if seq.state is State.WAITING}
        for seq in before if self.drafts else ():
            seq.draft = tuple(self.rng.randrange(EOS + 1) for _ in range(self.rng.randrange(self.drafts)))
        work = self.scheduler.schedule()
        check(self.scheduler)
        self.check_step(work, before)
        for item in work:
            if item.sequence in fresh:
                self.check_turn(item.sequence)
        if work:
            self.launched.append((work, self.device.run(work)))
        if self.launched and (not self.late or not work or len(self.launched) > 1):
            self.settle(*self.launched.pop(0))

    def resume(self) -> None:
        """Drafts come from outside for some of those that stand still."""
        for seq in list(self.scheduler.held):
            if self.rng.random() < 0.4:
                self.seen["blocks of one held taken"] += not seq.block_table
                draft = tuple(self.rng.randrange(EOS + 1) for _ in range(self.rng.randrange(6)))
                self.scheduler.resume(seq, draft, ())
                self.seen["held and resumed"] += seq.state is State.RUNNING
                check(self.scheduler)

    def expire(self) -> None:
        self.now += 1.0
        for seq in self.scheduler.tick(self.now):
            assert (seq.ending, seq.deadline <= self.now) == ("deadline", True)
            self.seen["expired"] += 1
        assert all(seq.deadline > self.now for seq in self.scheduler.live.values()), "a deadline was not seen"
        check(self.scheduler)

    def check_step(self, work: list[Work], before: dict[Sequence, tuple[int, tuple[bool, int]]]) -> None:
        """`before`: those that ran, how many tokens each could compute, and its rank."""
        parts = {item.sequence for item in work}
        assert sum(item.rows for item in work) <= self.scheduler.config.max_num_batched_tokens
        assert all(item.count > 0 for item in work)
        assert all(item.samples or not item.draft for item in work)
        assert len(parts) == len(work)
        assert all(seq.state is State.RUNNING for seq in parts), "a victim is part of the step"
        stayed = [before[seq][1] for seq in before if seq.state is State.RUNNING]
        gone = [before[seq][1] for seq in before if seq.state is State.PREEMPTED]
        assert not gone or not stayed or max(stayed) < min(gone), "the victim is not the worst"
        decodes = {seq for seq, (due, _) in before.items() if due == 1 and seq.state is State.RUNNING}
        assert decodes <= parts, "a decode was left out"
        busy = self.scheduler.running or self.scheduler.waiting
        assert work or self.launched or not busy, "nothing is done though there is work"
        self.seen["preempted"] += len(gone)
        self.seen["chunk"] += any(not item.samples for item in work)
        self.seen["draft"] += any(item.draft for item in work)
        self.seen["decode beside a chunk"] += bool(decodes) and any(not item.samples for item in work)
        size = self.device.block_size
        self.seen["filled in flight"] += any(
            item.previous is not None and (item.start + 1) % size == 0 for item in work
        )

    def check_turn(self, new: Sequence) -> None:
        """It is admitted for the first time: after those of its tenant and class that came before it."""
        lane = (new.tenant, new.priority)
        assert new.arrival > self.admitted[lane]
        self.admitted[lane] = new.arrival
        self.seen["hit"] += new.num_cached > 0

    def settle(self, work: list[Work], sampled: list[list[int]]) -> None:
        sampling = [item.sequence for item in work if item.samples]
        states = [seq.state for seq in sampling]
        taken = self.scheduler.settle(work, sampled)
        check(self.scheduler)
        for seq, state, tokens, count in zip(sampling, states, sampled, taken, strict=True):
            assert count == 0 if state is State.FINISHED else 0 < count <= len(tokens)
            self.output[seq] += tokens[:count]
            self.seen["surplus"] += not count and seq.ending == "stop"
            self.seen["settled when preempted"] += state is State.PREEMPTED
            self.seen["right draft"] += count > 1
