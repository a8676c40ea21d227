"""One request inside the engine: its tokens, how many of them are computed, and which blocks hold them."""

import math
from dataclasses import dataclass, field
from enum import Enum
from typing import Literal, Protocol

from cloud_engine.engine.blocks import chain_hash
from cloud_engine.engine.draw import Odds
from shared.lookup import Lookup
from shared.schemas import Priority, Sampling

Ending = Literal["stop", "length", "cancelled", "deadline", "error"]


class Guide(Protocol):
    """What an answer must look like, as far as it has come: see `shared.guides`."""

    def mask(self) -> bytes:
        """The tokens that may come next, bit i % 8 of byte i // 8."""

    def take(self, token: int) -> bool:
        """This one came; says whether nothing may follow it."""


@dataclass(frozen=True, slots=True)
class Verified:
    """What came of a draft: how many of its tokens stand, and `tokens`, by which the sequence has grown: these and one
    more, unless it ended among them. `length` is now that of the sequence, and where the next draft begins."""

    accepted: int
    tokens: tuple[int, ...]
    length: int
    ending: Ending | None


@dataclass(slots=True)
class Round:
    """A draft from outside as it came, and its result once it was checked."""

    length: int
    draft: tuple[int, ...]
    odds: tuple[Odds, ...]
    result: Verified | None = None


class State(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    HELD = "held"
    PREEMPTED = "preempted"
    FINISHED = "finished"


@dataclass(slots=True, kw_only=True, eq=False)
class Sequence:
    """Mutable state of one request; the scheduler owns it and nobody else changes it.

    `tokens` is the prompt followed by the output. Tokens before `num_computed` have their keys and values in the blocks
    of `block_table` (token i in slot `block_table[i // block_size] * block_size + i % block_size`). A sequence is one
    token behind while it decodes and further behind while it prefills; there is no other notion of a phase.
    """

    id: str
    tokens: list[int]
    sampling: Sampling
    max_tokens: int
    seed: int
    stop_ids: frozenset[int]
    root: bytes
    """Root of the prefix chain: sequences share blocks only under the same root."""
    tenant: str = ""
    """Whom its service is counted for: see `fairness`."""
    priority: Priority = "interactive"
    deadline: float = math.inf
    """When, by the engine's clock, an answer is of no use any more."""
    guide: Guide | None = None
    """Told of each token once, when it is appended. A sequence that has one is never given a draft."""

    num_prompt: int = field(init=False)
    num_computed: int = 0
    num_cached: int = 0
    """Prompt tokens found in the prefix cache when it was first admitted."""
    arrival: int = 0
    """Its number in the order of arrival."""
    aged: bool = False
    """Batch work that waited its turn, or gave up its place once: it is not passed over again. See `order`."""
    preemptions: int = 0
    draft: tuple[int, ...] = ()
    """Guesses of the tokens that come next, to be checked in the step that reaches the end of `tokens`."""
    odds: tuple[Odds, ...] = ()
    """The distributions that the tokens of `draft` were drawn from, if they were."""
    drafted: bool = False
    """Advanced by drafts from outside only: between two of them it stands still."""
    round: Round | None = None
    """Of such a sequence, the last draft that came."""
    lookup: Lookup | None = None
    """Where its guesses come from, once it has made any."""
    block_table: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)
    num_published: int = 0
    waits: bool = False
    """Its next token depends on its last one in ways that only the host knows: no step runs ahead of it."""
    num_pending: int = 0
    """Tokens sampled by steps that are launched and not settled."""
    sample: int = 0
    """Its place among those that its latest step samples."""
    state: State = State.WAITING
    ending: Ending | None = None

    def __post_init__(self) -> None:
        self.num_prompt = len(self.tokens)

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def output(self) -> list[int]:
        return self.tokens[self.num_prompt :]

    @property
    def num_due(self) -> int:
        """How many tokens its next step can compute, pending ones among them. None once the last is pending."""
        pending = self.num_pending if self.num_output + self.num_pending < self.max_tokens else 0
        return self.num_tokens + pending - self.num_computed

    def hashes(self, count: int, block_size: int) -> list[bytes]:
        """Chained hashes of the first `count` blocks, each full. Tokens never change, so each is computed once."""
        while len(self.block_hashes) < count:
            start = len(self.block_hashes) * block_size
            parent = self.block_hashes[-1] if self.block_hashes else self.root
            self.block_hashes.append(chain_hash(parent, self.tokens[start : start + block_size]))
        return self.block_hashes[:count]

    def barred(self, index: int) -> tuple[int, ...]:
        """Tokens that may not be the output's token of this index: ends, before `min_tokens`. A grammar knows itself
        where it may end."""
        if index >= self.sampling.min_tokens or self.guide is not None:
            return ()
        return (*self.stop_ids, *self.sampling.stop_token_ids)

    def append(self, token: int) -> Ending | None:
        """Take a sampled token; say whether it ended the sequence."""
        self.tokens.append(token)
        if self.guide is not None and self.guide.take(token):
            return "stop"
        if token in self.sampling.stop_token_ids or (token in self.stop_ids and not self.sampling.ignore_eos):
            return "stop"
        return "length" if self.num_output >= self.max_tokens else None

    def reset(self) -> None:
        """Forget what was computed (the blocks are gone), keep every token: recomputing gives the same state."""
        self.block_table = []
        self.num_computed = self.num_published = 0
        self.state = State.PREEMPTED
        self.preemptions += 1

    def finish(self, ending: Ending) -> bool:
        """End once; False if it had ended already. The first ending stands."""
        if self.state is State.FINISHED:
            return False
        self.state, self.ending = State.FINISHED, ending
        return True
