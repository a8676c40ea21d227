"""Several servers as one engine: each request goes to the member with the least to do, or, before its first token, on
to another one.

    choose   members that are well and know the model; the least requests under way, as a share of what a member may
             take: one that has just come back gets a small share first, which grows (slow re-entry)
    try      an error before the first token that another member may not have goes on to that one, each member once;
             after the first token an error is the client's
    learn    failures open a member's breaker (`router.health`), which after a while lets one request through as a
             probe; a member that says when to come back is left alone until then
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field

import structlog

from cloud_engine.gateway.upstream import Upstream, UpstreamStats
from router.clauses import Breaker
from router.health import CloudHealth, Outcome
from shared.config import InvalidSettings
from shared.errors import CausewayError, Overloaded, RateLimited, Unreachable, UpstreamFailed
from shared.schemas import ChatRequest, Delta, ModelCard

ELSEWHERE = (Unreachable, UpstreamFailed, Overloaded, RateLimited)
"""What another member may not have. Silence is not among them: the time of the request is then spent."""
REST_S = 1.0
MAX_REST_S = 30.0
FIRST_SHARE = 0.1
RAMP_S = 20.0


@dataclass(slots=True, eq=False)
class _Member:
    upstream: Upstream
    health: CloudHealth = field(default_factory=CloudHealth)
    under_way: int = 0
    turn: int = 0
    """Grows with each request of the pool: who was asked longest ago goes first among equals."""
    rests_until: float = 0.0
    back_at: float | None = None
    """When it last came back; None if it was never away."""
    away: bool = False

    def share(self, now: float, ramp_s: float) -> float:
        """How much of a full load it may take: all, or less while it has just come back."""
        return 1.0 if self.back_at is None else min(1.0, max(FIRST_SHARE, (now - self.back_at) / ramp_s))

    def note(self, now: float) -> None:
        """Notice that it went away or came back, by its breaker or by its own probe."""
        away = self.upstream.failure is not None or self.health.state(now) != "closed"
        if self.away and not away:
            self.back_at = now
        self.away = away


class Pool:
    """Answers with `members`, all of which serve the same model, and perhaps others beside it.

    A backend as one `Upstream` is: its context length is the least that a member says, its failure that of all.
    """

    def __init__(
        self,
        members: Sequence[Upstream],
        *,
        breaker: Breaker | None = None,
        ramp_s: float = RAMP_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._members = [_Member(upstream) for upstream in members]
        self._breaker = breaker or Breaker()
        self._ramp_s, self._clock = ramp_s, clock
        self._turn = 0

    async def start(self) -> None:
        """Ask all what they serve; those that are away may come later. Raises InvalidSettings if nobody says a context
        length."""
        await asyncio.gather(*(member.upstream.watch() for member in self._members))
        if not self.model_card().context_length:
            failure = self.failure
            reason = failure.message if failure else "no upstream says its context length"
            raise InvalidSettings(f"{reason}: give model_len to start all the same", param="model_len")

    async def aclose(self) -> None:
        await asyncio.gather(*(member.upstream.aclose() for member in self._members))

    @property
    def failure(self) -> CausewayError | None:
        """Of the first member, if none is well."""
        failures = [member.upstream.failure for member in self._members]
        return failures[0] if all(failures) else None

    def stats(self) -> UpstreamStats:
        each = [member.upstream.stats() for member in self._members]
        return UpstreamStats(
            sum(one.running for one in each),
            sum(one.waiting for one in each),
            sum(one.generated_tokens for one in each),
        )

    def model_card(self) -> ModelCard:
        cards = [member.upstream.model_card() for member in self._members]
        lengths = [card.context_length for card in cards if card.context_length]
        return ModelCard(id=cards[0].id, context_length=min(lengths, default=0))

    def other_cards(self) -> tuple[ModelCard, ...]:
        """Every other model that a member has, each with the least context length that one says."""
        merged: dict[str, ModelCard] = {}
        for card in (card for member in self._members for card in member.upstream.other_cards()):
            known = merged.get(card.id, card)
            lengths = [one.context_length for one in (known, card) if one.context_length]
            merged[card.id] = ModelCard(id=card.id, context_length=min(lengths, default=0))
        return tuple(merged.values())

    async def answer(self, request: ChatRequest, *, salt: str = "") -> AsyncGenerator[Delta, None]:
        """Deltas of one request, all from one member; closing the generator closes its connection."""
        tried: list[_Member] = []
        failed: CausewayError | None = None
        while (member := self._choose(request.model, tried)) is not None:
            tried.append(member)
            begun = False
            try:
                with self._under_way(member):
                    async with aclosing(member.upstream.answer(request, salt=salt)) as deltas:
                        async for delta in deltas:
                            if not begun:
                                self._learn(member, Outcome(ok=True))
                            begun = True
                            yield delta
                return
            except CausewayError as error:
                self._failed(member, error)
                if begun or not isinstance(error, ELSEWHERE):
                    raise
                failed = error
        raise failed or self._nobody()

    def _choose(self, model: str, tried: Sequence[_Member]) -> _Member | None:
        """Members whose own probe failed come last, but may be tried: they may be back. None: nobody is left."""
        now = self._clock()
        for member in self._members:
            member.note(now)
        special = any(card.id == model for card in self.other_cards())
        left = [
            member
            for member in self._members
            if member not in tried
            and member.health.admits(now)
            and member.rests_until <= now
            and (not special or any(card.id == model for card in member.upstream.other_cards()))
        ]
        if not left:
            return None
        chosen = min(left, key=lambda member: self._load(member, now))
        chosen.health, _ = chosen.health.admit(now, self._breaker)
        self._turn += 1
        chosen.turn = self._turn
        return chosen

    def _load(self, member: _Member, now: float) -> tuple[bool, float, int]:
        down = member.upstream.failure is not None
        return down, (member.under_way + 1) / member.share(now, self._ramp_s), member.turn

    def _nobody(self) -> CausewayError:
        now = self._clock()
        waits = [max(member.rests_until - now, member.health.retry_after_s(now) or 0.0) for member in self._members]
        return Unreachable(
            "no upstream of the pool is well", source="cloud", retry_after=round(max(0.1, min(waits)), 1)
        )

    def _failed(self, member: _Member, error: CausewayError) -> None:
        """What asks for patience is no failure: the member rests, or others would keep it busy refusing."""
        if isinstance(error, Overloaded | RateLimited):
            member.rests_until = self._clock() + min(error.retry_after or REST_S, MAX_REST_S)
            self._learn(member, Outcome(ok=None))
        else:
            self._learn(member, Outcome.of_error(error))

    def _learn(self, member: _Member, outcome: Outcome) -> None:
        now = self._clock()
        before = member.health.state(now)
        member.health = member.health.after(outcome, now, self._breaker)
        if (after := member.health.state(now)) != before and "open" in (before, after):
            at = self._members.index(member)
            structlog.get_logger("causeway.pool").warning("pool_member", member=at, breaker=after)
        member.note(now)

    @contextmanager
    def _under_way(self, member: _Member) -> Iterator[None]:
        member.under_way += 1
        try:
            yield
        finally:
            member.under_way -= 1
