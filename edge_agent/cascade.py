"""The cascade: the edge's answer is judged, and the cloud's takes its place where that will not do.

Either the edge's is held back until it is judged, and nothing is shown before it is known whose it will be. Or it is
shown at once, and what the cloud says instead stands below it, under a mark. In both cases it is kept until the cloud's
first token is here, so that it is not lost should that never come.
"""

import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Final

import msgspec

from edge_agent.fences import open_fence
from edge_agent.second_sample import Second
from router.cascade_rules import CascadeRules
from router.confidence import ALTERNATIVES, Judged, Tally, judge
from shared.errors import CausewayError
from shared.schemas import ChatRequest, Delta, ModelCard, Route, Switched, TokenLogprob, Usage

LEAST_DEADLINE_S: Final = 0.001
AT_ONCE: Final = "cascade: shown while it is judged"


def may_switch(request: ChatRequest) -> bool:
    """Whether who reads this can be shown two answers, one below the other: in a chat that is read as it comes, where
    nothing is called, nothing parsed and no token accounted for."""
    plain = request.grammar is None and not request.calling and request.sampling.logprobs is None
    return request.streamed and bool(request.messages) and plain


class Trial:
    """One request's answer by the edge, until it is judged. `card` is of the model that gives it, `second` another
    sample to judge by.

    What is held is bounded by the rules' `max_chars` and the delta that passes them; a model that stops in the middle
    ends with its own error, as it would without a cascade.
    """

    def __init__(
        self,
        request: ChatRequest,
        rules: CascadeRules,
        card: ModelCard,
        clock: Callable[[], float] = time.monotonic,
        second: Second | None = None,
    ) -> None:
        self._asked, self._rules, self._card, self._clock, self._second = request, rules, card, clock, second
        self._asked_at = clock()
        self._began: float | None = None
        self._tally = Tally()
        self.at_once = rules.hold == "none" and may_switch(request)
        self.held: list[Delta] = []
        """What has come and is not to be shown yet."""

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
        left = max(self._asked.deadline_s - (self._clock() - self._asked_at), LEAST_DEADLINE_S)
        return msgspec.structs.replace(self._asked, deadline_s=left)

    async def hear(self, local: AsyncGenerator[Delta, None]) -> AsyncGenerator[Delta, None]:
        """As much as the rules ask for, or all there is: what may be shown at once; the rest is held. Raises what
        `local` raises."""
        async for delta in local:
            enough = self._take(delta)
            if enough or not self.at_once:
                self.held.append(delta)
            else:
                yield delta
            if enough:
                return

    async def judged(self) -> Judged:
        """Waits for the second sample, if there is one, as long as the rules would have held back."""
        agreed = None
        if self._second is not None and self._began is not None:
            within = self._rules.max_s - (self._clock() - self._began)
            agreed = await self._second.agreement(self._tally.said, within)
        grammar = self._asked.grammar
        as_json = grammar is not None and grammar.syntax == "json_schema"
        return judge(self._tally.heard(as_json=as_json, agreed=agreed), self._rules, self._card)

    def shown(self, delta: Delta, note: str, failovers: int = 0) -> Delta:
        """As the client asked for it; where it says its route, with what came of the trial."""
        route = delta.route
        if route is not None:
            route = msgspec.structs.replace(route, reason=f"{route.reason}; {note}", failovers=failovers)
        wanted = self._asked.sampling.logprobs
        logprobs = () if wanted is None else tuple(_at_most(wanted, token) for token in delta.logprobs)
        return msgspec.structs.replace(delta, route=route, logprobs=logprobs)

    async def aclose(self) -> None:
        if self._second is not None:
            await self._second.aclose()

    def _take(self, delta: Delta) -> bool:
        """Whether that is enough to judge by."""
        if self._began is None:
            self._began = self._clock()
            if self._second is not None:
                self._second.start(kept=_was_kept(delta))
        self._tally.push(delta)
        return self._tally.enough(self._rules, self._clock() - self._began)


class Above:
    """What was shown of the edge's answer. If that was anything, the cloud's stands below it, under `mark`.

    Its usage is the `prompt_tokens` that the edge has read and the tokens that were shown.
    """

    def __init__(self, mark: str, prompt_tokens: int) -> None:
        self._mark, self._prompt_tokens = mark, prompt_tokens
        self._text, self._tokens = "", 0
        self._route: Route | None = None
        self._switched: Switched | None = None

    def add(self, delta: Delta) -> Delta:
        self._text += delta.text
        self._tokens += delta.tokens
        self._route = delta.route or self._route
        return delta

    def once_more(self, delta: Delta) -> Delta:
        """The edge goes on after all, and says again that it is the edge."""
        return msgspec.structs.replace(delta, route=delta.route or self._route)

    def mark(self, first: Delta) -> Delta | None:
        """What comes before the first delta of the cloud's answer; None if that stands alone."""
        if self._route is None or first.route is None:
            return None
        closing = f"\n{fence}" if (fence := open_fence(self._text)) else ""
        text = f"{closing}\n\n{self._mark}\n\n"
        self._switched = Switched(
            target=self._route.target,
            model=self._route.model,
            starts_at=len(self._text) + len(text),
            usage=Usage(prompt_tokens=self._prompt_tokens, completion_tokens=self._tokens),
        )
        return Delta(text=text, route=msgspec.structs.replace(first.route, switched=self._switched))

    def below(self, delta: Delta) -> Delta:
        """One of the cloud's: the last has the usage of both."""
        if self._switched is None or delta.route is None:
            return delta
        if delta.finish_reason is None:
            return msgspec.structs.replace(delta, route=None)
        route = msgspec.structs.replace(delta.route, switched=self._switched)
        return msgspec.structs.replace(delta, route=route, usage=_sum(self._switched.usage, delta.usage))


async def cascaded(
    trial: Trial,
    above: Above,
    local: AsyncGenerator[Delta, None],
    cloud: Callable[[str], AsyncGenerator[Delta, None]],
    heard: Callable[[Judged], None],
) -> AsyncGenerator[Delta, None]:
    """All of one side's answer or, if it is shown at once, the beginning of the edge's, a mark and all of the cloud's.

    `local` answers `trial.request`; `cloud` gives its answer, its first delta one that is not empty, for the reason it
    is called with; `heard` is told the judgement.
    """
    async with aclosing(local), aclosing(trial):
        async with aclosing(trial.hear(local)) as beginning:
            async for delta in beginning:
                yield trial.shown(above.add(delta), AT_ONCE)
        judged = await trial.judged()
        heard(judged)
        note, failovers, began = judged.said, 0, False
        if not judged.good:
            try:
                async with aclosing(cloud(judged.said)) as deltas:
                    async for delta in deltas:
                        if not began:
                            began = True
                            await local.aclose()
                            if (between := above.mark(delta)) is not None:
                                yield between
                        yield above.below(delta)
                return
            except CausewayError as error:
                if began:
                    raise
                note, failovers = f"{judged.said}; {error.in_short('cloud')}; answered by the edge", 1
                trial.held[:1] = [above.once_more(delta) for delta in trial.held[:1]]
        for delta in trial.held:
            yield trial.shown(delta, note, failovers)
        async for delta in local:
            yield trial.shown(delta, note, failovers)


def _sum(one: Usage, other: Usage | None) -> Usage:
    if other is None:
        return one
    return Usage(
        prompt_tokens=one.prompt_tokens + other.prompt_tokens,
        completion_tokens=one.completion_tokens + other.completion_tokens,
        cached_tokens=one.cached_tokens + other.cached_tokens,
    )


def _was_kept(delta: Delta) -> bool:
    """Whether the answer that begins with this came from the cache."""
    return delta.route is not None and delta.route.cached is not None and delta.route.cached.use == "hit"


def _at_most(count: int, token: TokenLogprob) -> TokenLogprob:
    return msgspec.structs.replace(token, top=token.top[:count])
