"""Who computes what in the next step: one token budget for prefill chunks and decodes together.

The running sequences go first, by rank, then the waiting ones in the order of `order.WaitingQueue`. A prefill leaves
budget for every decode behind it, so whoever decodes is part of every step and a long prompt delays it by one step at
most. When blocks run out, the sequence of the worst rank gives its blocks back and waits in front of the new ones, to
be recomputed (its output is kept). It is never one that is part of the step already: those are of better rank.
"""

import math
from bisect import insort
from collections.abc import Iterable
from dataclasses import replace

from cloud_engine.engine.blocks import BlockPool
from cloud_engine.engine.config import EngineConfig
from cloud_engine.engine.counters import Counters
from cloud_engine.engine.deadlines import Deadlines, Pace
from cloud_engine.engine.draw import Odds
from cloud_engine.engine.order import OUTPUT_WEIGHT, WaitingQueue, rank
from cloud_engine.engine.sequence import Ending, Sequence, State
from cloud_engine.engine.work import Work, number_samples
from shared.errors import ContextTooLong, DeadlineExceeded, Overloaded, RequestConflict


class Scheduler:
    """State machine of all sequences. Not thread-safe: the engine's one thread owns it."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config.checked()
        self.pool = BlockPool(config.num_blocks, config.host_blocks)
        self.waiting = WaitingQueue(config.max_waiting, config.batch_patience)
        self.running: list[Sequence] = []
        """Sorted by rank."""
        self.held: dict[Sequence, float] = {}
        """Those that stand still until their next draft, and since when, as far as `tick` knows."""
        self.live: dict[str, Sequence] = {}
        self.counters = Counters()
        self.pace = Pace(full=config.max_num_batched_tokens // 2)
        self._deadlines = Deadlines()
        self._arrivals = 0

    def add(self, sequence: Sequence, now: float = 0.0) -> None:
        """Queue a new sequence. Raises ContextTooLong for one that can never fit, Overloaded when the queue is full,
        DeadlineExceeded for one that cannot even start in time."""
        limit, wanted = self.config.model_len, sequence.num_prompt + sequence.max_tokens
        if sequence.id in self.live:
            raise RequestConflict("a request with this id is running", param="id")
        if sequence.num_prompt >= limit:
            raise ContextTooLong(
                f"the prompt has {sequence.num_prompt} tokens; with at least one token of output that is over the "
                f"context length of {limit}",
                param="messages",
            )
        if wanted > limit:
            raise ContextTooLong(
                f"the prompt's {sequence.num_prompt} tokens and max_tokens {sequence.max_tokens} make {wanted}, "
                f"over the context length of {limit}",
                param="max_tokens",
            )
        self.waiting.places.check(sequence.tenant)
        if sequence.drafted and len(self.held) >= self.config.max_waiting:
            raise Overloaded(f"{len(self.held)} requests wait for drafts already", retry_after=1.0)
        if sequence.deadline < math.inf and self._latest_start(sequence, self._sure_to_be_ahead(sequence)) <= now:
            self.counters.expired += 1
            raise DeadlineExceeded("the answer cannot begin before its deadline")
        self._arrivals += 1
        sequence.arrival = self._arrivals
        if sequence.deadline < math.inf:
            self._deadlines.watch(sequence, self._latest_start(sequence))
        self.live[sequence.id] = sequence
        self.waiting.push(sequence)

    def schedule(self) -> list[Work]:
        """Pick the next step and count it as computed: whoever calls this launches it before calling again.

        One launched step may be unsettled meanwhile, if no work of it `waits`. The device computes steps in the order
        of their launch: that is why blocks may be published or handed to others while a step that writes them is still
        under way."""
        self._make_way()
        budget, work = self.config.max_num_batched_tokens, list[Work]()
        due = [sequence.num_due for sequence in self.running]
        decodes, spare = due.count(1), budget - sum(due)
        preempted, turn = self.counters.preemptions, 0
        while budget and turn < len(self.running):
            sequence = self.running[turn]
            decodes -= due[turn] == 1
            count = min(due[turn], budget - decodes)
            turn += 1
            if count < 1:
                continue
            if not self._extend(sequence, count):
                break
            draft = self._affordable(sequence, count, spare)
            spare -= len(draft)
            work.append(self._advance(sequence, count, draft))
            budget -= work[-1].rows
        while budget and self.counters.preemptions == preempted:
            first = self.waiting.first()
            if first is None or first.num_pending or not self._admit(first):
                break
            count = min(first.num_due, budget)
            work.append(self._advance(first, count, self._affordable(first, count, budget - count)))
            budget -= work[-1].rows
        number_samples(work)
        if work:
            work[0] = replace(work[0], swaps=self.pool.host.drain())
        return work

    def tick(self, now: float) -> list[Sequence]:
        """End what has passed its deadline, or waits and cannot be computed any more by then, or was not drafted for
        in `draft_patience`. To be called before each step, with a clock that does not go back; gives those that it
        ended."""
        ended = [held for held, since in self.held.items() if now - since >= self.config.draft_patience]
        for sequence in ended:
            self.finish(sequence, "cancelled")
        self.held = {held: min(since, now) for held, since in self.held.items()}
        for sequence in self._deadlines.due(now):
            waits = sequence.state is State.WAITING
            at = self._latest_start(sequence) if waits else sequence.deadline
            if at > now:
                self._deadlines.watch(sequence, at)
            else:
                self.finish(sequence, "deadline")
                self.counters.expired += 1
                ended.append(sequence)
        return ended

    def settle(self, work: Iterable[Work], tokens: Iterable[list[int]]) -> list[int]:
        """Append the step's sampled tokens, a list for each work that samples (the part of its draft that was right,
        and one more), and retire what they finish. A negative token says that the model gave no usable logits. Returns
        how many of each list count: none after an ending, nor of a sequence that ended before."""
        sampling = (item for item in work if item.samples)
        return [self._settle(item, sampled) for item, sampled in zip(sampling, tokens, strict=True)]

    def _settle(self, item: Work, sampled: list[int]) -> int:
        sequence = item.sequence
        sequence.num_pending -= 1
        if sequence.state is State.FINISHED:
            return 0
        known, ending, taken = sequence.num_tokens, None, 0
        while ending is None and taken < len(sampled):
            token = sampled[taken]
            ending = sequence.append(token) if token >= 0 else "error"
            taken += 1
        self._keep_computed(sequence, known, len(sampled) - 1)
        self.waiting.charge(sequence, OUTPUT_WEIGHT * taken)
        if self.config.prefix_caching:
            self._publish(sequence)
        self.counters.drafted_tokens += len(item.draft)
        self.counters.accepted_tokens += len(sampled) - 1
        if ending is not None:
            self.finish(sequence, ending)
        elif sequence.drafted:
            self._hold(sequence)
        return taken

    def _keep_computed(self, sequence: Sequence, known: int, accepted: int) -> None:
        """Drafted tokens that are now the sequence's own were computed with the `known` ones; the slots of the others
        are written again by what comes instead. A sequence preempted since has nothing to keep."""
        if accepted and sequence.num_computed == known:
            sequence.num_computed += min(accepted, sequence.num_tokens - known)

    def abort(self, sequence_id: str) -> bool:
        """End a sequence in whatever state it is; False if there is none of this id any more."""
        sequence = self.live.get(sequence_id)
        return sequence is not None and self.finish(sequence, "cancelled")

    def finish(self, sequence: Sequence, ending: Ending) -> bool:
        """The one way out: retire a sequence and give its blocks back, once."""
        was = sequence.state
        if not sequence.finish(ending):
            return False
        del self.live[sequence.id]
        if was is State.RUNNING:
            self.running.remove(sequence)
        elif was is State.HELD:
            del self.held[sequence]
        else:
            self.waiting.remove(sequence)
        self.pool.release(sequence.block_table)
        sequence.block_table = []
        return True

    def lend(self, count: int) -> list[int] | None:
        """Blocks for what is no sequence, to be given back by `pool.release`: none while those running may need them.
        A copy of evicted blocks may be due before they are written, see `HostCache.drain`."""
        while not self.pool.fits([], count, spare=len(self.running)):
            if not self._take_from_held():
                return None
        return self.pool.take([], count)

    def resume(self, sequence: Sequence, draft: tuple[int, ...], odds: tuple[Odds, ...]) -> None:
        """A held sequence goes on with this draft; if its place or its blocks are taken, once it is admitted again."""
        del self.held[sequence]
        sequence.draft, sequence.odds = draft, odds
        if sequence.block_table and len(self.running) < self.config.max_num_seqs:
            sequence.state = State.RUNNING
            insort(self.running, sequence, key=rank)
        else:
            self._forget(sequence)
            self.waiting.put_back(sequence)

    def _hold(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        sequence.state = State.HELD
        self.held[sequence] = math.inf

    def _forget(self, sequence: Sequence) -> None:
        self.pool.release(sequence.block_table)
        sequence.reset()

    def _take_from_held(self) -> bool:
        """Free the blocks of a sequence that stands still, first of the one that does so the longest."""
        victim = next((sequence for sequence in self.held if sequence.block_table), None)
        if victim is None:
            return False
        self._forget(victim)
        victim.state = State.HELD
        return True

    def _latest_start(self, sequence: Sequence, ahead: int = 0) -> float:
        """When a sequence must be admitted at the latest for its first token to come before the deadline, if `ahead`
        more tokens are to be computed first."""
        here, stored = self._hit(sequence)
        cached = (len(here) + len(stored)) * self.config.block_size
        return sequence.deadline - self.pace.least_seconds(sequence.num_tokens - cached + ahead)

    def _sure_to_be_ahead(self, sequence: Sequence) -> int:
        """Tokens to compute before this new sequence: of what its own tenant has waiting, the part that the prefix
        cache is not likely to have."""
        query, hit = self.counters.prefix_query_tokens, self.counters.prefix_hit_tokens
        return int(self.waiting.backlog(sequence) * (1 - hit / query if query else 1))

    def _make_way(self) -> None:
        """A running batch sequence gives up its place to an interactive one that has none: at most one in a step, and
        none twice."""
        first = self.waiting.first()
        if first is None or first.priority == "batch" or not self.running:
            return
        is_late, _ = rank(self.running[-1])
        if is_late and not self._has_place(first):
            self._preempt(self.running[-1])

    def _affordable(self, sequence: Sequence, count: int, spare: int) -> tuple[int, ...]:
        """The part of a draft that is checked if `count` tokens are computed: what can be output still, within rows
        and blocks that nobody else needs."""
        length = sequence.num_tokens
        if not sequence.draft or sequence.guide is not None or sequence.num_computed + count != length:
            return ()
        draft = sequence.draft[: max(0, min(spare, sequence.max_tokens - sequence.num_output - 1))]
        table = sequence.block_table
        lacking = self._blocks_for(length + len(draft)) - len(table)
        if lacking > 0 and (new := self.pool.take([], lacking, spare=len(self.running))):
            table += new
        return draft[: len(table) * self.config.block_size - length]

    def _advance(self, sequence: Sequence, count: int, draft: tuple[int, ...] = ()) -> Work:
        start = sequence.num_computed
        sequence.num_computed += count
        previous = sequence.sample if sequence.num_computed > sequence.num_tokens else None
        samples = sequence.num_computed >= sequence.num_tokens
        sequence.num_pending += samples
        self.counters.chunks += not samples
        if self.config.prefix_caching:
            self._publish(sequence)
        odds = sequence.odds
        if samples:
            sequence.draft = sequence.odds = ()
        return Work(sequence, start, count, samples, draft, odds, previous)

    def _publish(self, sequence: Sequence) -> None:
        """Make the blocks that this step fills findable at once, for sequences of the same step too. That is sound
        because attention writes every key and value of a layer before it reads any. A block with a pending token has
        no hash yet."""
        full = min(sequence.num_computed, sequence.num_tokens) // self.config.block_size
        if full <= sequence.num_published:
            return
        hashes = sequence.hashes(full, self.config.block_size)
        for index in range(sequence.num_published, full):
            self.pool.publish(sequence.block_table[index], hashes[index])
        sequence.num_published = full

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.config.block_size)

    def _extend(self, sequence: Sequence, count: int) -> bool:
        """Blocks for `count` more tokens of a running sequence; preempts from the back, in the end itself (False).
        Those at the back come later in this step, so a preempted one is never part of it yet."""
        lacking = self._blocks_for(sequence.num_computed + count) - len(sequence.block_table)
        while lacking > self.pool.num_free:
            if self._take_from_held():
                continue
            victim = self.running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
        if lacking > 0:
            sequence.block_table += self.pool.take([], lacking) or []
        return True

    def _preempt(self, victim: Sequence) -> None:
        self.running.remove(victim)
        self._forget(victim)
        self.waiting.put_back(victim)
        self.counters.preemptions += 1

    def _hit(self, sequence: Sequence) -> tuple[list[int], list[bytes]]:
        """The sequence's longest cached prefix: its blocks, and the hashes of those that follow in host memory."""
        if not self.config.prefix_caching:
            return [], []
        # One token at least is computed, or there would be no logits to sample from.
        usable = (sequence.num_tokens - 1) // self.config.block_size
        return self.pool.lookup(sequence.hashes(usable, self.config.block_size))

    def _has_place(self, sequence: Sequence) -> bool:
        """Whether `_admit` would succeed."""
        if len(self.running) >= self.config.max_num_seqs:
            return False
        hit, _ = self._hit(sequence)
        new = self._blocks_for(sequence.num_tokens) - len(hit)
        while not self.pool.fits(hit, new, spare=len(self.running)):
            if not self._take_from_held():
                return False
        return True

    def _admit(self, sequence: Sequence) -> bool:
        """Give a waiting sequence a place and the blocks of all its tokens, or nothing. Holding back while the whole
        does not fit, or would leave the running ones no block each to grow into, is what keeps a full pool from
        thrashing."""
        if not self._has_place(sequence):
            return False
        hit, stored = self._hit(sequence)
        new = self._blocks_for(sequence.num_tokens) - len(hit)
        table = self.pool.take(hit, new, spare=len(self.running), stored=stored)
        if table is None:
            return False
        self.waiting.take(sequence)
        insort(self.running, sequence, key=rank)
        size, cached = self.config.block_size, len(hit) + len(stored)
        if sequence.state is State.WAITING:
            self._count_first_time(sequence, cached * size, len(stored) * size)
        sequence.block_table = table
        sequence.num_computed = cached * size
        sequence.num_published = cached
        sequence.state = State.RUNNING
        return True

    def _count_first_time(self, sequence: Sequence, cached: int, stored: int) -> None:
        """Of the tokens `cached`, the host had `stored`. Once a request: a preempted one finding its own blocks again
        is no gain, and to compute them again is not its tenant's fault."""
        self.waiting.charge(sequence, sequence.num_prompt - cached)
        if self.config.prefix_caching:
            sequence.num_cached = cached
            self.counters.prefix_hit_tokens += cached
            self.counters.prefix_host_hit_tokens += stored
            self.counters.prefix_query_tokens += sequence.num_prompt
