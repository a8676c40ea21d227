"""The cascade: the edge's answer is held back until it is judged, then shown, or the cloud's in its place.

Two answers are never shown as one: nothing of either is shown before it is known whose it will be. The edge's is kept
until the cloud's first token is here, so that it is not lost should that never come.
"""

import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

import msgspec

from router.cascade_rules import CascadeRules
from router.confidence import ALTERNATIVES, Judged, Tally, judge
from shared.errors import CausewayError
from shared.schemas import ChatRequest, Delta, ModelCard, TokenLogprob

LEAST_DEADLINE_S = 0.001


class Trial:
    """One request's answer by the edge, as long as it is held back. `card` is of the model that gives it.

    What is held is bounded by the rules' `max_chars` and the delta that passes them; a model that stops in the middle
    ends with its own error, as it would without a cascade.
    """

    def __init__(
        self, request: ChatRequest, rules: CascadeRules, card: ModelCard, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._asked, self._rules, self._card, self._clock = request, rules, card, clock
        self._began = clock()
        self.held: list[Delta] = []

    @property
    def request(self) -> ChatRequest:
        """What the edge is asked: the same, and what its confidence is read from."""
        wanted = self._asked.sampling.logprobs
        sampling = msgspec.structs.replace(self._asked.sampling, logprobs=max(wanted or 0, ALTERNATIVES))
        return msgspec.structs.replace(self._asked, sampling=sampling)

    def late(self) -> ChatRequest:
        """What the cloud is asked: the same, and some of its time has passed."""
        if self._asked.deadline_s is None:
            return self._asked
        left = max(self._asked.deadline_s - (self._clock() - self._began), LEAST_DEADLINE_S)
        return msgspec.structs.replace(self._asked, deadline_s=left)

    async def hear(self, local: AsyncGenerator[Delta, None]) -> Judged:
        """Holds as much as the rules ask for, or all there is. Raises what `local` raises."""
        tally, began = Tally(), None
        async for delta in local:
            began = self._clock() if began is None else began
            self.held.append(delta)
            tally.push(delta)
            if tally.enough(self._rules, self._clock() - began):
                break
        grammar = self._asked.grammar
        as_json = grammar is not None and grammar.syntax == "json_schema"
        return judge(tally.heard(as_json=as_json), self._rules, self._card)

    def shown(self, delta: Delta, note: str, failovers: int = 0) -> Delta:
        """As the client asked for it; where it says its route, with what came of the trial."""
        route = delta.route
        if route is not None:
            route = msgspec.structs.replace(route, reason=f"{route.reason}; {note}", failovers=failovers)
        wanted = self._asked.sampling.logprobs
        logprobs = () if wanted is None else tuple(_at_most(wanted, token) for token in delta.logprobs)
        return msgspec.structs.replace(delta, route=route, logprobs=logprobs)


async def cascaded(
    trial: Trial,
    local: AsyncGenerator[Delta, None],
    cloud: Callable[[str], AsyncGenerator[Delta, None]],
    heard: Callable[[Judged], None],
) -> AsyncGenerator[Delta, None]:
    """All of one side's answer. `local` answers `trial.request`; `cloud` gives its answer, its first delta one that is
    not empty, for the reason it is called with; `heard` is told the judgement."""
    async with aclosing(local):
        judged = await trial.hear(local)
        heard(judged)
        note, failovers, began = judged.said, 0, False
        if not judged.good:
            try:
                async with aclosing(cloud(judged.said)) as deltas:
                    async for delta in deltas:
                        if not began:
                            began = True
                            await local.aclose()
                        yield delta
                return
            except CausewayError as error:
                if began:
                    raise
                note, failovers = f"{judged.said}; {error.in_short('cloud')}; answered by the edge", 1
        for delta in trial.held:
            yield trial.shown(delta, note, failovers)
        async for delta in local:
            yield trial.shown(delta, note, failovers)


def _at_most(count: int, token: TokenLogprob) -> TokenLogprob:
    return msgspec.structs.replace(token, top=token.top[:count])
