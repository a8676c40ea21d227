"""The engine: tokens in, tokens out. One call of `step` computes one batch. Synchronous, and owned by one thread."""

import math
import secrets
import time
from collections import deque
from collections.abc import Callable, Mapping
from collections.abc import Sequence as List
from dataclasses import dataclass
from itertools import islice

from cloud_engine.engine.blocks import chain_root
from cloud_engine.engine.config import EngineConfig
from cloud_engine.engine.device import Result, device_for
from cloud_engine.engine.drafting import Drafter
from cloud_engine.engine.draw import has_penalty
from cloud_engine.engine.embedder import Embedder
from cloud_engine.engine.executor import Executor
from cloud_engine.engine.sampler import Sampled
from cloud_engine.engine.scheduler import Scheduler
from cloud_engine.engine.sequence import Ending, Guide, Sequence, Verified
from cloud_engine.engine.verify import Verifier, kept
from cloud_engine.engine.work import Work
from shared.errors import BadRequest
from shared.schemas import Priority, Sampling


@dataclass(frozen=True, slots=True)
class Output:
    """A sequence's next token, and how it ended if it did. `ending` "error" has no token. A step gives a sequence
    several if it checked a draft."""

    sequence: Sequence
    sampled: Sampled
    ending: Ending | None


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Gauges (running, held until their next draft, waiting*, *_used, *_total) and totals since the start.
    `waiting_batch` is a part of `waiting`, and what was hit in host memory a part of all hits; blocks are swapped out
    to it, and in again."""

    running: int = 0
    held: int = 0
    waiting: int = 0
    waiting_batch: int = 0
    kv_blocks_used: int = 0
    kv_blocks_total: int = 0
    host_blocks_used: int = 0
    host_blocks_total: int = 0
    prefix_hit_tokens: int = 0
    prefix_host_hit_tokens: int = 0
    prefix_query_tokens: int = 0
    swapped_out_blocks: int = 0
    swapped_in_blocks: int = 0
    preemptions: int = 0
    expired: int = 0
    steps: int = 0
    generated_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    embedded_tokens: int = 0

    @property
    def prefix_hit_rate(self) -> float:
        """Of all prompt tokens so far, the part that had been computed before."""
        return self.prefix_hit_tokens / max(1, self.prefix_query_tokens)


class Engine:
    """`identity` names weights and revision: prefixes are shared only under the same one. `entropy` gives the seed of
    a request that brings none."""

    def __init__(
        self,
        runner: Executor,
        *,
        stop_ids: frozenset[int] = frozenset(),
        identity: str = "",
        entropy: Callable[[], int] = lambda: secrets.randbits(63),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.config: EngineConfig = runner.config
        self.runner = runner
        self.scheduler = Scheduler(self.config)
        self.embedder = Embedder(runner, self.scheduler)
        self.clock = clock
        self._device = device_for(runner)
        self._launched: deque[tuple[list[Work], Result, float]] = deque()
        self._free_at = 0.0
        """When the device was last known to have done what it was given."""
        drafts = self.config.drafting and self.config.free_rows > 0
        self._drafter = Drafter(self.config.free_rows) if drafts else None
        self.vocab_size = runner.model.config.vocab_size
        self._stop_ids = stop_ids
        self._identity = identity
        self._entropy = entropy
        self._steps = self._generated = 0
        self._verifier = Verifier(self.scheduler, self.vocab_size)

    def add(
        self,
        sequence_id: str,
        tokens: List[int],
        sampling: Sampling,
        *,
        salt: str = "",
        priority: Priority = "interactive",
        deadline: float = math.inf,
        drafted: bool = False,
        guide: Guide | None = None,
    ) -> Sequence:
        """Queue a request. Raises BadRequest, ContextTooLong, DeadlineExceeded, Overloaded or RequestConflict; then
        nothing has changed. `salt` is its tenant: only requests of the same one share cached prefixes, and tenants take
        turns. `deadline` is a time of `clock`. A `drafted` request stands still after its first token until `verify`
        brings a draft. `guide` is this answer's own, at its beginning; it cannot follow a draft."""
        if drafted and guide is not None:
            raise BadRequest("a request with a grammar cannot be drafted elsewhere", param="grammar")
        if not tokens:
            raise BadRequest("the prompt has no tokens", param="prompt")
        if not all(0 <= token < self.vocab_size for token in tokens):
            raise BadRequest(f"a token id is outside 0 to {self.vocab_size - 1}", param="prompt")
        for param, ids in (("logit_bias", sampling.logit_bias), ("stop_token_ids", sampling.stop_token_ids)):
            if any(token >= self.vocab_size for token in ids):
                raise BadRequest(f"a token id is outside 0 to {self.vocab_size - 1}", param=param)
        sequence = Sequence(
            id=sequence_id,
            tokens=list(tokens),
            sampling=sampling,
            max_tokens=sampling.max_tokens or max(1, self.config.model_len - len(tokens)),
            seed=self._entropy() if sampling.seed is None else sampling.seed,
            stop_ids=self._stop_ids,
            root=chain_root(self._identity, self.config.kv_format, salt),
            tenant=salt,
            priority=priority,
            deadline=deadline,
            waits=has_penalty(sampling) or drafted or guide is not None,
            drafted=drafted,
            guide=guide,
        )
        self.scheduler.add(sequence, self.clock())
        return sequence

    def verify(
        self, request: str, base_length: int, draft_ids: List[int], draft_probs: List[Mapping[int, float]] | None = None
    ) -> Verified | None:
        """Check a draft in the next step, see `Verifier.verify`."""
        return self._verifier.verify(request, base_length, draft_ids, draft_probs)

    def abort(self, sequence_id: str) -> bool:
        """Stop a request in whatever state it is; False if it has ended or never was."""
        return self.scheduler.abort(sequence_id)

    def finish(self, sequence: Sequence) -> bool:
        """End a sequence because its text is complete (a stop string)."""
        return self.scheduler.finish(sequence, "stop")

    @property
    def has_work(self) -> bool:
        scheduler = self.scheduler
        return bool(scheduler.running or scheduler.waiting or self._launched or self.embedder.has_work)

    def expire(self) -> list[Sequence]:
        """End the requests that cannot be answered by their deadline any more. To be called before each step."""
        return self.scheduler.tick(self.clock())

    def step(self) -> list[Output]:
        """Schedule and launch a step, then settle: that step, or with `async_depth` 1 the one before, whose results
        have come in the meantime. Empty when nothing was due, or when only parts of prompts were computed. If there
        are texts to embed, a step of these comes first."""
        outputs: list[Output] = []
        if self.embedder.has_work:
            while self._launched:
                outputs += self._settle()
            self.embedder.step()
        running, drafter = self.scheduler.running, self._drafter
        if any(item.waits for work, _, _ in self._launched for item in work) or (drafter and drafter.hopes(running)):
            outputs += self._settle()
        if drafter is not None:
            drafter.propose(running)
        if work := self.scheduler.schedule():
            draws = [draw for item in work for draw in item.draws()]
            launched = self.clock()  # before: a device that computes at once is done when `launch` returns
            result = self._device.launch([item.chunk() for item in work], draws)
            self._launched.append((work, result, launched))
            self._steps += 1
        if self._launched and (not work or len(self._launched) > (self.config.async_depth or 0)):
            outputs += self._settle()
        return outputs

    @property
    def failed(self) -> bool:
        """True if the next step will fail, which may be known before there is any."""
        return self.runner.failed

    def close(self) -> None:
        """Wait for what is launched; end the device's thread and the other processes, if there are any. Idempotent."""
        self._device.close()
        self.runner.close()

    def _settle(self) -> list[Output]:
        """Results of the oldest launched step, without those of sequences that ended since it was launched."""
        work, result, launched = self._launched.popleft()
        sampling, rows = [item for item in work if item.samples], iter(result())
        sampled = [kept(item.draft, list(islice(rows, 1 + len(item.draft)))) for item in sampling]
        now = self.clock()
        self.scheduler.pace.observe(sum(item.rows for item in work), now - max(launched, self._free_at))
        self._free_at = now
        taken = self.scheduler.settle(work, [[item.token for item in tokens] for tokens in sampled])
        self._verifier.settled(sampling, taken)
        if self._drafter is not None:
            self._drafter.learn(sampling, taken)
        self._generated += sum(taken)
        return [
            Output(item.sequence, tokens[index], item.sequence.ending if index == count - 1 else None)
            for item, tokens, count in zip(sampling, sampled, taken, strict=True)
            for index in range(count)
        ]

    def stats(self) -> EngineStats:
        scheduler = self.scheduler
        return EngineStats(
            running=len(scheduler.running),
            held=len(scheduler.held),
            waiting=len(scheduler.waiting),
            waiting_batch=scheduler.waiting.num_batch,
            kv_blocks_used=scheduler.pool.num_used,
            kv_blocks_total=scheduler.pool.num_blocks - 1,
            host_blocks_used=len(scheduler.pool.host.slots),
            host_blocks_total=scheduler.pool.host.num_slots,
            prefix_hit_tokens=scheduler.counters.prefix_hit_tokens,
            prefix_host_hit_tokens=scheduler.counters.prefix_host_hit_tokens,
            prefix_query_tokens=scheduler.counters.prefix_query_tokens,
            swapped_out_blocks=scheduler.pool.host.saved,
            swapped_in_blocks=scheduler.pool.host.loaded,
            preemptions=scheduler.counters.preemptions,
            expired=scheduler.counters.expired,
            steps=self._steps,
            generated_tokens=self._generated,
            drafted_tokens=scheduler.counters.drafted_tokens,
            accepted_tokens=scheduler.counters.accepted_tokens,
            embedded_tokens=self.embedder.tokens,
        )
