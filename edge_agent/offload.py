"""The way to the cloud: a backend behind a circuit breaker, and what is known of it.

The one door through which a request can leave the device. The label is looked at here, whatever was decided before:
what is to be redacted goes out with placeholders, and the originals are put back into the answer on its way to the
client.
"""

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

import msgspec

from edge_agent.backends.base import LinkState, RemoteBackend, is_empty
from edge_agent.originals import Originals
from router.features import LinkReading
from router.health import CloudHealth, Outcome, State
from router.policy import Policy
from router.predict import Pace
from router.privacy.inspect import redacted
from shared.errors import DeadlineExceeded, PolicyDenied, Unreachable, UpstreamFailed
from shared.schemas import ChatRequest, Delta


class Withheld(PolicyDenied):
    """Not sent, since it could not be redacted; the device may answer it."""


class Offload:
    """Sends requests, times their first token, and moves the breaker by what came of each."""

    def __init__(
        self, cloud: RemoteBackend, *, pace: Callable[[], Pace] = Pace, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._cloud = cloud
        self._pace = pace
        self._clock = clock
        self._health = CloudHealth()
        self._connected = False
        self._secret = secrets.token_bytes()
        """Makes placeholders that nobody else can compute; another one each time the daemon starts."""

    def reading(self) -> LinkReading:
        link, now = self._link(), self._clock()
        pace = self._pace()
        line = pace.first_token.fit()
        retry_after = self._health.retry_after_s(now) or link.retry_after_s
        return LinkReading(
            connected=link.connected,
            admitting=self._health.admits(now),
            draining=link.draining,
            retry_after_s=retry_after,
            round_trip_s=link.round_trip_s,
            first_token_s=self._health.first_token_s,
            first_token_base_s=line[0] if line else None,
            prompt_token_s=line[1] if line else None,
            token_s=pace.token.at(1),
            failure_ratio=self._health.failure_ratio,
            trouble=link.trouble,
            model=link.model,
            context_length=link.context_length,
        )

    def breaker_state(self) -> State:
        return self._health.state(self._clock())

    async def answer(self, request: ChatRequest, policy: Policy) -> AsyncGenerator[Delta, None]:
        """The cloud's answer, from its first token on.

        Raises PolicyDenied for an edge_only request, Withheld for one to be redacted that cannot be looked through;
        Unreachable while the breaker is open, DeadlineExceeded if the policy's time for the first token passes;
        otherwise what the backend raises.
        """
        if request.label == "edge_only":
            raise PolicyDenied("label edge_only: stays on the device", source="edge")
        request, originals = self._redacted(request, policy)
        if request.scenario is not None or request.streamed:
            request = msgspec.structs.replace(request, scenario=None, streamed=False)
        self._admit(policy)
        async with aclosing(self._cloud.answer(request)) as deltas:
            first = await self._first(deltas, policy)
            yield first if originals is None else originals.restored(first)
            async for delta in deltas:
                yield delta if originals is None else originals.restored(delta)

    def _redacted(self, request: ChatRequest, policy: Policy) -> tuple[ChatRequest, Originals | None]:
        if request.label != "redact":
            return request, None
        try:
            request, redaction = redacted(request, policy.privacy.detector, self._secret)
        except Exception as error:  # whatever broke, what was not looked through does not leave
            raise Withheld("it could not be redacted, and so stays on the device", source="edge") from error
        in_json = request.grammar is not None and request.grammar.syntax == "json_schema"
        return request, Originals(redaction, in_json=in_json)

    def _admit(self, policy: Policy) -> None:
        now = self._clock()
        self._health, admitted = self._health.admit(now, policy.breaker)
        if not admitted:
            raise Unreachable("it failed lately, breaker open", retry_after=self._health.retry_after_s(now))

    async def _first(self, deltas: AsyncGenerator[Delta, None], policy: Policy) -> Delta:
        """The first delta with something in it. Whatever happens, the breaker hears of it once."""
        sent = self._clock()
        try:
            delta = await _within(policy.first_token_timeout_s, deltas)
        except BaseException as error:
            self._report(Outcome.of_error(error), policy)
            raise
        self._report(Outcome(ok=True, first_token_s=self._clock() - sent), policy)
        return delta

    def _report(self, outcome: Outcome, policy: Policy) -> None:
        self._health = self._health.after(outcome, self._clock(), policy.breaker)

    def _link(self) -> LinkState:
        """A connection that has come back is reason to probe at once."""
        link = self._cloud.link()
        if link.connected and not self._connected:
            self._health = self._health.after_connect(self._clock())
        self._connected = link.connected
        return link


async def _within(seconds: float, deltas: AsyncGenerator[Delta, None]) -> Delta:
    try:
        async with asyncio.timeout(seconds):
            async for delta in deltas:
                if not is_empty(delta):
                    return delta
    except TimeoutError as error:
        raise DeadlineExceeded(f"no first token within {seconds:g} s") from error
    raise UpstreamFailed("the answer ended before its first token")
