"""Continuous batching: every step decodes one token of each running request and a bounded piece of the waiting prompts.
A request that runs alone may get several tokens of a step, where guesses of them turn out right (see `drafting`).

Runs on one thread and owns the native context. Prompts are read within a budget, the shortest first, so that a long one
neither stalls the requests that are decoding nor a short prompt behind it; the budget follows the measured speed, so
that a step, and with it the reaction to a cancelled request, takes about STEP_S on any machine.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edge_agent.backends.drafting import Drafter, Drafts, smooth
from edge_agent.backends.prefixes import MIN_TOKENS, Kept, Prefixes, State, common
from edge_agent.backends.sampling import Ids, Sampler
from edge_agent.backends.text import TextStream
from shared.errors import BadRequest, CausewayError, UpstreamFailed
from shared.schemas import Delta

STEP_S = 0.25
BESIDE = 1.5
"""A long prompt makes those who decode at most about three times as slow, however fast the machine is."""
UNNOTICED_S = 0.06
"""Tokens that come as fast as that are faster than anybody reads."""
MIN_CHUNK = 32
MIN_BESIDE = 8
"""The same, beside requests that decode."""
COPIES = 64
"""How many tokens can be copied from slot to slot, at least, while one is computed."""


class Runtime(Protocol):
    """What batching needs of the native side; see native.Native."""

    tokens: Ids
    positions: Ids
    sequences: Ids
    wanted: NDArray[np.int8]
    context_length: int

    @property
    def can_cut(self) -> bool: ...
    def decode(self, count: int) -> bool: ...
    def logits(self) -> NDArray[np.float32]: ...
    def keep(self, sequence: int, length: int) -> None: ...
    def shift(self, sequence: int, start: int, count: int) -> None: ...
    def state_size(self, sequence: int) -> int: ...
    def state(self, sequence: int) -> State: ...
    def restore(self, sequence: int, state: State) -> bool: ...


@dataclass(eq=False, slots=True)
class Job:
    """One request on its way; `number` is the pipe's. `cancelled` is set by another thread, seen before each step."""

    number: int
    prompt: Ids
    sampler: Sampler
    text: TextStream
    private: bool = False
    """What is computed of it must not be written to disk."""
    cancelled: bool = False


Event = tuple[Job, Delta | CausewayError]


class Slot:
    """One sequence of the cache: the first `length` of `tokens` are computed; `end` more than that are the prompt's."""

    def __init__(self, index: int, context_length: int) -> None:
        self.index = index
        self.tokens: Ids = np.zeros(context_length + 1, np.int32)
        self.length = 0
        self.end = 0
        self.job: Job | None = None
        self.public = 0
        """How many of its tokens may be written to disk, where no running request needs them."""
        self.shifted = False
        """Its tokens do not say any more what was computed of them: of use to nobody else."""
        self.drafts: Drafts | None = None
        self.draft: list[int] = []
        """Guesses of the tokens after `end`, computed in this step as if they were known."""
        self.released = 0
        self.waited = 0
        """Tokens of others' prompts that were read while this request's own waited."""

    @property
    def missing(self) -> int:
        """Tokens known and not yet computed: 1 while decoding, more while the prompt is being read."""
        return self.end - self.length

    def shared_prefix(self, prompt: Ids) -> int:
        # The last token of a prompt is always computed: its logits are needed.
        return 0 if self.shifted else common(self.tokens[: self.length], prompt[:-1])


class Batcher:
    """`admit` while there is a free slot, then `step`, for ever. What leaves a slot may come back from `prefixes`.

    A request that may have more tokens than the context holds goes on at its end: of what follows the beginning, at
    most half a context, the older half is forgotten, and what was computed of the rest stays as it is.
    """

    def __init__(
        self,
        runtime: Runtime,
        slots: int,
        clock: Callable[[], float] = time.perf_counter,
        prefixes: Prefixes | None = None,
        *,
        drafter: Drafter | None = None,
    ) -> None:
        """Without a `drafter`, no guesses are made."""
        self.drafter = drafter if runtime.can_cut else None
        self.tokens_per_s: float | None = None
        self.prefill_tokens_per_s: float | None = None
        self._runtime = runtime
        self._prefixes = prefixes or Prefixes(0)
        self._slots = [Slot(index, runtime.context_length) for index in range(slots)]
        self._clock = clock
        self._releases = 0
        self._decode_s: dict[int, float] = {}
        """What a step takes in which so many requests decode and nothing else happens."""
        self._beside_tokens_per_s: float | None = None
        """Of prompts, in pieces beside requests that decode: slower than whole, and the slower the further in."""

    @property
    def running(self) -> int:
        return sum(slot.job is not None for slot in self._slots)

    @property
    def jobs(self) -> list[Job]:
        return [slot.job for slot in self._slots if slot.job is not None]

    def admit(self, job: Job) -> None:
        """Put a request into the free slot that saves most: where its prompt's beginning is, else next to running ones
        (llama.cpp computes neighbours together), else the longest unused."""
        free = [slot for slot in self._slots if slot.job is None]
        best, shared = self._slots[0], 0
        if self._runtime.can_cut:
            best, shared = max(
                ((slot, slot.shared_prefix(job.prompt)) for slot in self._slots), key=lambda pair: pair[1]
            )
        slot = min(free, key=lambda slot: (-self._neighbours(slot), slot.released))
        if best.job is None and shared * 2 >= best.length:
            slot = best
        kept, length = self._prefixes.longest(job.prompt)
        public = best.public
        self._set_aside(slot, shared if slot is best else 0)
        if kept is not None and length >= shared + MIN_TOKENS:
            shared, public = (length if self._bring_back(slot, kept) else 0), 0 if kept.private else length
        elif best is not slot:
            shared = shared if self._copied(best, slot, shared) else 0
        self._runtime.keep(slot.index, shared)
        slot.length, slot.end = shared, len(job.prompt)
        slot.tokens[: slot.end] = job.prompt
        slot.job, slot.drafts, slot.waited = job, None, 0
        slot.public = min(public, shared) if job.private else len(slot.tokens)
        job.text.cached_tokens = shared

    def restore(self, kept: list[Kept]) -> None:
        """Put what was computed earlier, the most recently used first, into the slots, and the rest where it can be
        brought back from. Only while nothing runs."""
        if not self._runtime.can_cut:
            return
        for slot, one in zip(self._slots, kept, strict=False):
            if self._bring_back(slot, one):
                slot.length = slot.end = slot.public = len(one.tokens)
                slot.tokens[: slot.length] = one.tokens
                slot.released = -slot.index
        for one in reversed(kept[len(self._slots) :]):
            self._prefixes.put(one)

    def keepsakes(self) -> Iterator[Kept]:
        """What is computed, may be of use again and may be written to disk, the most recently used first. Trims slots
        to it, so nothing may run any more."""
        for slot in sorted(self._slots, key=lambda slot: slot.released, reverse=True) if self._runtime.can_cut else []:
            if slot.job is None and min(slot.length, slot.public) >= MIN_TOKENS:
                if slot.public < slot.length:
                    slot.length = slot.public
                    self._runtime.keep(slot.index, slot.length)
                yield Kept(slot.tokens[: slot.length], self._runtime.state(slot.index), private=False)
        yield from (kept for kept in self._prefixes.kept if not kept.private)

    def _set_aside(self, slot: Slot, shared: int) -> None:
        """Copy out what a request will overwrite, beyond the beginning that it shares."""
        if slot.length >= shared + MIN_TOKENS:
            size = self._runtime.state_size(slot.index)
            tokens = slot.tokens[: slot.length]
            self._prefixes.add(tokens, size, lambda: self._runtime.state(slot.index), private=slot.public < slot.length)

    def _bring_back(self, slot: Slot, kept: Kept) -> bool:
        if len(kept.tokens) > self._runtime.context_length:
            return False
        return self._runtime.restore(slot.index, kept.state)

    def _copied(self, source: Slot, target: Slot, shared: int) -> bool:
        """Whether a slot now has all that another has computed: copied where what both share is worth it."""
        if shared * COPIES < source.length or not shared:
            return False
        return self._runtime.restore(target.index, self._runtime.state(source.index))

    def _neighbours(self, slot: Slot) -> int:
        return sum(other.job is not None and abs(other.index - slot.index) == 1 for other in self._slots)

    def sweep(self) -> int:
        """Free the slots of cancelled requests; returns how many."""
        gone = [slot for slot in self._slots if slot.job is not None and slot.job.cancelled]
        for slot in gone:
            self._release(slot)
        return len(gone)

    def step(self) -> list[Event]:
        """One pass through the model; the events are what requests got by it. Needs at least one running request."""
        took, count, decodes = self._compose()
        started = self._clock()
        if not self._runtime.decode(count):
            return self._fail(took)
        seconds = self._clock() - started
        rows = iter(self._runtime.logits())
        events: list[Event] = []
        sampled = 0
        for slot, taken in took:
            guesses = slot.draft
            slot.length += taken - len(guesses)
            if slot.missing == 0:
                sampled += self._sample(slot, [next(rows) for _ in range(1 + len(guesses))], events)
        self._measure(count, decodes, sampled, seconds)
        if self.drafter is not None and len(took) == 1 and decodes == count:
            self.drafter.observe(count - 1, seconds)
        return events

    def _compose(self) -> tuple[list[tuple[Slot, int]], int, int]:
        """Fill the batch, in the order of the slots: one row of each decoding request, pieces of the prompts.

        Returns who has how many rows, all rows, and the decoding ones.
        """
        busy = [slot for slot in self._slots if slot.job is not None]
        took: list[tuple[Slot, int]] = []
        decodes = 0
        for slot in busy:
            if slot.missing == 1:
                slot.draft = self._guesses(slot) if len(busy) == 1 else []
                decodes += 1 + len(slot.draft)
                took.append((slot, 1 + len(slot.draft)))
        took += self._read([slot for slot in busy if slot.missing > 1], self._chunk(len(took)))
        took.sort(key=lambda pair: pair[0].index)
        count = 0
        for slot, taken in took:
            self._fill(slot, count, taken)
            count += taken
        return took, count, decodes

    def _read(self, prompts: list[Slot], budget: int) -> list[tuple[Slot, int]]:
        """Who reads how many tokens of its prompt: the shortest first, one that had to wait counting as shorter by what
        was read of others, so that none waits for more than its own length."""
        took: list[tuple[Slot, int]] = []
        left = budget
        for slot in sorted(prompts, key=lambda slot: slot.missing - slot.waited):
            if taken := min(slot.missing, left):
                took.append((slot, taken))
                left -= taken
            slot.waited += budget - left - taken
        return took

    def _guesses(self, slot: Slot) -> list[int]:
        """Of the only request that runs, what is worth being computed along with its next token."""
        if self.drafter is None or slot.job is None:
            return []
        slot.drafts = slot.drafts or Drafts(self.drafter)
        room = min(self._runtime.context_length - slot.end, slot.job.text.left - 1)
        return slot.drafts.propose(slot.tokens[: slot.end], room)

    def _fill(self, slot: Slot, at: int, taken: int) -> None:
        runtime, start = self._runtime, slot.length
        end = at + taken
        guesses = len(slot.draft)
        runtime.tokens[at : end - guesses] = slot.tokens[start : start + taken - guesses]
        runtime.tokens[end - guesses : end] = slot.draft
        runtime.positions[at:end] = range(start, start + taken) if taken > 1 else start
        runtime.sequences[at:end] = slot.index
        runtime.wanted[at:end] = 0
        runtime.wanted[end - 1 - guesses : end] = taken - guesses == slot.missing

    def _chunk(self, decodes: int) -> int:
        """Tokens of prompts in the next step: as many as take STEP_S, or, beside requests that decode, as many as take
        BESIDE times what their tokens do, or UNNOTICED_S: small pieces cost more, since each is a pass of its own."""
        room = len(self._runtime.tokens) - len(self._slots)
        if not decodes:
            return min(room, max(MIN_CHUNK, int((self.prefill_tokens_per_s or 0) * STEP_S)))
        rate = self._beside_tokens_per_s or self.prefill_tokens_per_s or 0
        known = max((count for count in self._decode_s if count <= decodes), default=None)
        seconds = STEP_S if known is None else min(STEP_S, max(UNNOTICED_S, BESIDE * self._decode_s[known]))
        return min(room, max(MIN_BESIDE, int(rate * seconds)))

    def _sample(self, slot: Slot, rows: list[NDArray[np.float32]], events: list[Event]) -> int:
        """A token of the first row, and one of each further row as long as the guess before it was right. What is
        computed of wrong guesses is forgotten. Returns how many tokens that were."""
        guesses, slot.draft = slot.draft, []
        end, right = slot.length + len(guesses), 0
        for at, row in enumerate(rows):
            token = self._pick(slot, row, events)
            if slot.job is None or at == len(guesses) or token != guesses[at]:
                break
            right += 1
            slot.length += 1
        if guesses and slot.drafts is not None:
            slot.drafts.learn(len(guesses), right)
            if slot.length < end:
                self._runtime.keep(slot.index, slot.length)
        return right + 1

    def _pick(self, slot: Slot, row: NDArray[np.float32], events: list[Event]) -> int | None:
        job = slot.job
        if job is None:
            return None
        try:
            sampled = job.sampler.pick(row)
        except CausewayError as error:
            events.append((job, error))
            self._release(slot, computed=isinstance(error, BadRequest))
            return None
        slot.tokens[slot.end] = sampled.token
        slot.end += 1
        delta = job.text.push(sampled)
        if delta is not None:
            events.append((job, delta))
            if delta.finish_reason is not None:
                self._release(slot)
        if slot.job is not None and slot.end > self._runtime.context_length:
            self._shift(slot, len(job.prompt))
        return sampled.token

    def _shift(self, slot: Slot, prompt: int) -> None:
        start = min(prompt, self._runtime.context_length // 2)
        count = (slot.length - start) // 2
        self._runtime.shift(slot.index, start, count)
        slot.tokens[start : slot.end - count] = slot.tokens[start + count : slot.end].copy()
        slot.length, slot.end = slot.length - count, slot.end - count
        slot.shifted, slot.drafts = True, None

    def _release(self, slot: Slot, *, computed: bool = True) -> None:
        """The slot is free; what it has computed stays, for whoever comes with the same beginning."""
        self._releases += 1
        slot.job, slot.released = None, self._releases
        if not computed or slot.shifted or not self._runtime.can_cut:
            self._runtime.keep(slot.index, 0)
            slot.length, slot.shifted = 0, False
        slot.end, slot.draft = slot.length, []

    def _fail(self, took: list[tuple[Slot, int]]) -> list[Event]:
        """llama.cpp refused the batch: its requests end, their cache is not to be trusted, others may go on."""
        error = UpstreamFailed("llama.cpp could not compute this step", source="edge")
        events: list[Event] = [(slot.job, error) for slot, _ in took if slot.job is not None]
        for slot, _ in took:
            self._release(slot, computed=False)
        return events

    def _measure(self, count: int, decodes: int, sampled: int, took: float) -> None:
        """Only steps that are clearly one kind or the other tell something."""
        if took <= 0:
            return
        if decodes == count:
            self.tokens_per_s = smooth(self.tokens_per_s, sampled / took)
            if sampled == count:
                self._decode_s[count] = smooth(self._decode_s.get(count), took)
            return
        prompts = count - decodes
        if decodes in self._decode_s:
            seconds = max(took - self._decode_s[decodes], took / 4)
            self._beside_tokens_per_s = smooth(self._beside_tokens_per_s, prompts / seconds)
        many = prompts >= MIN_CHUNK or self.prefill_tokens_per_s is None  # fewer take as long as a few more
        if many and decodes * 2 <= count:
            seconds = max(took - self._decode_s.get(decodes, 0.0), took / 4)
            self.prefill_tokens_per_s = smooth(self.prefill_tokens_per_s, prompts / seconds)
