"""The path of one request at the edge: measure, decide, look up, else generate here or send to the cloud, relay,
remember, report.

The one fallback rule of Causeway is in `Agent._answer`: a retryable failure before the first token may be made good by
the target that the decision permits, visibly; after the first token a stream goes on or ends with its error. Two
models are never spliced into one answer. Where the policy has a cascade, `edge_agent.cascade` judges the edge's answer,
and the cloud's may take its place or, where the edge's was shown at once, stand below it under a mark.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import partial

import msgspec

from edge_agent.backends.base import LocalModels, is_empty
from edge_agent.cache.answers import AnswerCache, by_chance
from edge_agent.cache.base import Scope
from edge_agent.caller import ANYONE, Caller
from edge_agent.cascade import Above, Trial, cascaded
from edge_agent.offload import Offload, Withheld
from edge_agent.second_sample import Compared, Second
from router.cascade_rules import CascadeRules
from router.confidence import Judged
from router.decide import Decision, decide
from router.features import NO_CLOUD, DeviceReading, LinkReading, RequestFeatures, estimate_tokens
from router.money import NOTHING_SPENT, Spent
from router.observe import observe
from router.policy import Policy
from router.records import Recorded, Shadowed
from shared.errors import CausewayError, PolicyDenied, UpstreamFailed
from shared.schemas import Cached, ChatRequest, Delta, Label, Route, Target
from shared.telemetry import Listener, observed

COUNT_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class Plan:
    """One request, decided: `decision` is the error if it is refused; `record` holds all that was seen and said."""

    policy: Policy
    decision: Decision | CausewayError
    record: Recorded


@dataclass(frozen=True, slots=True)
class Terms:
    """What goes with a request that was decided: `label` is how carefully its answer is kept."""

    caller: Caller
    policy: Policy
    label: Label


class Agent:
    """One answer made of two: the model on this device and, unless `offload` is None, the cloud.

    `policy`, `device` and `spent` (by a tenant, with a key) are asked anew for each request, and `record` is told
    before anything else can run; a request keeps the policy that it was decided by.
    """

    def __init__(
        self,
        local: LocalModels,
        offload: Offload | None,
        *,
        policy: Callable[[ChatRequest], Policy],
        device: Callable[[str], DeviceReading],
        cache: AnswerCache | None = None,
        listeners: tuple[Listener, ...] = (),
        record: Callable[[str, Recorded], None] | None = None,
        spent: Callable[[str, str], Spent] = lambda *_: NOTHING_SPENT,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._local = local
        self._offload = offload
        self._policy = policy
        self._device = device
        self._cache = cache
        self._compared = Compared()
        self._listeners = listeners
        self._record = record
        self._spent = spent
        self._wall_clock = wall_clock
        self._clock = clock

    def answer(self, request: ChatRequest, caller: Caller = ANYONE) -> AsyncGenerator[Delta, None]:
        """Every stream ends in exactly one way, and exactly one event says how."""
        answered = self._answer(request, caller)
        return observed(answered, request, self._listeners, tenant=caller.tenant or "local", clock=self._clock)

    def link(self) -> LinkReading:
        return self._offload.reading() if self._offload else NO_CLOUD

    async def plan(self, request: ChatRequest, caller: Caller = ANYONE) -> Plan:
        """What would happen to this request now, and by which policy. Runs nothing, raises nothing for a refusal.

        Raises BadRequest for a class that the policy does not know.
        """
        tenant = caller.tenant
        prompt_tokens = await self.prompt_tokens(request)
        whole = self._policy(request)
        policy = whole.of(tenant)
        features = observe(
            request,
            policy,
            prompt_tokens=prompt_tokens,
            tenant=tenant,
            key=caller.key,
            spent=self._spent(tenant, caller.key),
            scenario=caller.scenario,
        )
        device, link = self._device(request.model), self.link()
        record = partial(
            Recorded,
            at=self._wall_clock(),
            device=device,
            link=link,
            policy=whole.fingerprint,
            price=policy.price,
            shadow=_shadowed(request, policy, features, device, link),
        )
        try:
            decision = decide(features, policy, device=device, link=link)
        except CausewayError as error:
            return Plan(policy, error, record(request=features, refused=error.code, reason=error.message))
        if decision.scenario != features.scenario:
            features = replace(features, scenario=decision.scenario)
        said = record(
            request=features,
            target=decision.target,
            rule=decision.rule,
            reason=decision.reason,
            redact=decision.redact,
            escalates=decision.escalates,
            predictions=decision.predictions,
        )
        return Plan(policy, decision, said)

    async def _answer(self, request: ChatRequest, caller: Caller) -> AsyncGenerator[Delta, None]:
        plan = await self.plan(request, caller)
        if self._record is not None:
            self._record(request.id, plan.record)
        if isinstance(plan.decision, CausewayError):
            raise plan.decision
        decision, edge = plan.decision, plan.record.device.model
        terms = Terms(caller, plan.policy, decision.label)
        route, began = self._route(decision.target, decision.reason, edge), False
        if decision.label != request.label:  # what was decided travels with it, to the door and to what keeps prompts
            request = msgspec.structs.replace(request, label=decision.label)
        rules = plan.policy.cascade if decision.escalates else None
        if rules is None:
            answer = self._relay(request, route, terms)
        else:
            answer = self._cascade(request, rules, route, plan.record, terms)
        try:
            async with aclosing(answer) as deltas:
                async for delta in deltas:
                    began = True
                    yield delta
            return
        except CausewayError as error:
            made_good = error.retryable or isinstance(error, Withheld)
            if began or not made_good or decision.fallback is None:
                raise
            route = self._stand_in(decision, decision.fallback, error, edge)
        async with aclosing(self._relay(request, route, terms)) as deltas:
            async for delta in deltas:
                yield delta

    def _cascade(
        self, request: ChatRequest, rules: CascadeRules, route: Route, record: Recorded, terms: Terms
    ) -> AsyncGenerator[Delta, None]:
        """The edge's answer if it is good enough, else the cloud's."""
        card, drawn = self._local.named(request.model).model_card(), rules.second_sample
        second = Second(request, drawn, rules, self._local, self._compared, self._clock) if drawn else None
        trial, above = Trial(request, rules, card, self._clock, second), Above(rules.mark, record.request.prompt_tokens)

        def escalated(reason: str) -> AsyncGenerator[Delta, None]:
            return self._relay(trial.late(), self._route("cloud", reason, route.model), terms)

        def heard(judged: Judged) -> None:
            if self._record is not None:
                self._record(request.id, replace(record, judged=judged))

        return cascaded(trial, above, self._relay(trial.request, route, terms), escalated, heard)

    async def _relay(self, request: ChatRequest, route: Route, terms: Terms) -> AsyncGenerator[Delta, None]:
        """One target's answer from its first token on, the route on its first and last delta, its name on errors."""
        began = False
        try:
            async with aclosing(self._remembered(route, request, terms)) as deltas:
                async for delta in deltas:
                    if not began and is_empty(delta):
                        continue
                    last = delta.finish_reason is not None
                    yield delta if began and not last else _routed(delta, route)
                    if last:
                        return
                    began = True
            raise UpstreamFailed("the answer ended before its last token")
        except CausewayError as error:
            error.at(route.target)
            raise

    def _remembered(self, route: Route, request: ChatRequest, terms: Terms) -> AsyncGenerator[Delta, None]:
        """From the cache, if this side has answered this before; else anew, and kept there."""
        generate = partial(self._from, route.target, request, terms.policy)
        if self._cache is None:
            return generate()
        scope = self._scope(route, request, terms)
        return self._cache.answer(request, scope, terms.policy.cache, terms.caller.cache, generate)

    def _scope(self, route: Route, request: ChatRequest, terms: Terms) -> Scope:
        here, card = route.target == "edge", self._local.named(request.model).model_card()
        return Scope(
            tenant=terms.caller.tenant,
            label=terms.label,
            target=route.target,
            model=route.model,
            weights=card.digest if here else "",
            context_length=card.context_length if here else self.link().context_length,
            redaction=terms.policy.fingerprint if request.label == "redact" and not here else "",
            choice=terms.caller.choice if by_chance(request) else 0,
        )

    def _from(self, target: Target, request: ChatRequest, policy: Policy) -> AsyncGenerator[Delta, None]:
        if target == "edge":
            return self._local.answer(request)
        if self._offload is None:
            raise PolicyDenied("no cloud is in use")
        return self._offload.answer(request, policy)

    async def prompt_tokens(self, request: ChatRequest) -> int:
        """By the local tokenizer if it can, else estimated: a broken model must not keep requests from the cloud."""
        local = self._local.named(request.model)
        if not local.reading().available:
            return estimate_tokens(request)
        try:
            async with asyncio.timeout(COUNT_TIMEOUT_S):
                return await local.count_tokens(request)
        except (CausewayError, TimeoutError):
            return estimate_tokens(request)

    def _stand_in(self, decision: Decision, target: Target, error: CausewayError, edge: str) -> Route:
        reason = f"{error.in_short(decision.target)}; answered by the {target}"
        return self._route(target, reason, edge, failovers=1)

    def _route(self, target: Target, reason: str, edge: str, failovers: int = 0) -> Route:
        """`edge` is the model that answers where the edge does."""
        model = edge if target == "edge" else self.link().model or "cloud"
        return Route(target=target, reason=reason, failovers=failovers, model=model)


def _routed(delta: Delta, route: Route) -> Delta:
    """Whoever answered knows best which model it ran, and the cache what it had to do with it; all else about the route
    is the Agent's to say."""
    said = delta.route or route
    reason = route.reason + (_of_cache(said.cached) if said.cached else "")
    ours = msgspec.structs.replace(route, reason=reason, model=said.model or route.model, cached=said.cached)
    return msgspec.structs.replace(delta, route=ours)


def _of_cache(cached: Cached) -> str:
    if cached.use == "hit":
        return f"; cache hit: {cached.layer}, {cached.age_s:.0f} s old"
    return "; shared with an identical request" if cached.use == "shared" else ""


def _shadowed(
    request: ChatRequest, policy: Policy, features: RequestFeatures, device: DeviceReading, link: LinkReading
) -> Shadowed | None:
    """What the policy's shadow would have decided, if it has one."""
    shadow = policy.shadowing
    if shadow is None:
        return None
    seen = observe(request, shadow, prompt_tokens=features.prompt_tokens, tenant=features.tenant, spent=features.spent)
    seen = replace(seen, scenario=features.scenario)
    try:
        decision = decide(seen, shadow, device=device, link=link)
    except CausewayError as error:
        return Shadowed(refused=error.code)
    return Shadowed(target=decision.target, rule=decision.rule)
