"""An edge with a cascade, both sides in the test's hands."""

import math
from typing import Any

from edge_sides import LAST, THERE, Local, Remote
from fakes import ScriptedAnswer

from edge_agent.agent import Agent
from edge_agent.cache.answers import AnswerCache
from edge_agent.cache.memory import MemoryLayer
from edge_agent.cache.store import Store
from edge_agent.device import Device
from edge_agent.experience import Experience
from edge_agent.offload import Offload
from router.policy import Policy, parse
from router.records import Recorded
from shared.schemas import Answer, Delta, Route, TokenLogprob, TopLogprob
from shared.telemetry import RequestFinished

POLICY = "mode: prefer_edge\nfirst_token_timeout_s: 5\ncascade: {threshold: 0.6, min_tokens: 2}\n"
AT_ONCE = POLICY.replace("threshold: 0.6", "threshold: 0.6, hold: none")
HERE = "It is here. And more."


def said(text: str, p: float) -> Delta:
    """One token that the model gives the probability p."""
    top = tuple(TopLogprob(f"t{at}", math.log(share)) for at, share in enumerate((p, *((1 - p) / 5,) * 4)))
    return Delta(text=text, tokens=1, logprobs=(TokenLogprob(text, math.log(p), (), top),))


def answer(p: float) -> tuple[Delta, ...]:
    return (*(said(text, p) for text in ("It ", "is ", "here. ", "And ", "more.")), LAST)


SURE, UNSURE = answer(0.9), answer(0.3)


class Edge:
    """An Agent with a cascade. `local` is a script, or an Answer; `kept` is what the journal would get."""

    def __init__(
        self,
        local: tuple[Any, ...] | Answer,
        cloud: tuple[Any, ...] = THERE,
        policy: str = POLICY,
        cache: bool = False,
    ) -> None:
        self.here = ScriptedAnswer(*local) if isinstance(local, tuple) else ScriptedAnswer()
        self.there = ScriptedAnswer(*cloud)
        self.local = Local(self.here if isinstance(local, tuple) else local)
        self.remote = Remote(self.there)
        self.events: list[RequestFinished] = []
        self.kept: list[Recorded] = []
        self.policy: Policy = parse(policy)
        self.cache = AnswerCache(Store([MemoryLayer(1 << 20)])) if cache else None
        experience = Experience(self.kept.append)
        self.agent = Agent(
            self.local,
            Offload(self.remote),
            policy=lambda _: self.policy,
            device=Device(self.local).reading,
            cache=self.cache,
            listeners=(self.events.append, experience),
            record=experience.decided,
        )


def routes(deltas: list[Delta]) -> list[Route]:
    return [delta.route for delta in deltas if delta.route]
