"""The edge daemon's parts, put together. Nothing here listens or starts: `__main__` does."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from edge_agent.agent import Agent
from edge_agent.backends.base import LocalModels, RemoteBackend
from edge_agent.cache.answers import AnswerCache
from edge_agent.counts import RouteCounts
from edge_agent.device import Device
from edge_agent.embedder import Embedder
from edge_agent.experience import Experience
from edge_agent.intake import Intake
from edge_agent.journal import Journal
from edge_agent.offload import Offload
from edge_agent.policies.center import PolicyCenter
from edge_agent.policies.fleet import FleetFollower
from edge_agent.reload import Changes, LiveSettings
from edge_agent.settings import EdgeSettings
from edge_agent.spending import Spending
from router.names import VIRTUAL_MODELS
from shared.schemas import ModelCard
from shared.telemetry import Listener, RequestLog, RequestMetrics

BREAKER_STATES = ("closed", "half_open", "open")


@dataclass(frozen=True, slots=True)
class Daemon:
    """Requests enter at `intake`; everything else is there to be looked at."""

    intake: Intake
    agent: Agent
    local: LocalModels
    offload: Offload | None
    device: Device
    policy: PolicyCenter
    counts: RouteCounts
    registry: CollectorRegistry
    journal: Journal | None
    experience: Experience
    live: LiveSettings
    embedder: Embedder | None = None
    cache: AnswerCache | None = None
    follower: FleetFollower | None = None

    async def reload(self) -> Changes:
        """Read policy and settings again; says what became of the settings. Raises InvalidPolicy or InvalidSettings:
        what is wrong stays as it was, and does not keep the other from being read."""
        try:
            return self.live.reload()
        finally:
            await self.policy.reload()


def put_together(
    local: LocalModels,
    cloud: RemoteBackend | None,
    policy: PolicyCenter,
    journal: Journal | None = None,
    live: LiveSettings | None = None,
    embedder: Embedder | None = None,
    cache: AnswerCache | None = None,
    spending: Spending | None = None,
    follower: FleetFollower | None = None,
) -> Daemon:
    live = live or LiveSettings(EdgeSettings())
    registry, counts = CollectorRegistry(), RouteCounts()
    experience = Experience(journal.write if journal else None, spending)
    device = Device(local, pace=lambda model: experience.pace("edge", model), stated=lambda: live.current)
    listeners: tuple[Listener, ...] = (RequestMetrics(registry), RequestLog(), counts, policy, experience)
    offload = Offload(cloud, pace=lambda: experience.pace("cloud")) if cloud is not None else None
    agent = Agent(
        local,
        offload,
        policy=policy.policy_for,
        device=device.reading,
        cache=cache,
        listeners=listeners,
        record=experience.decided,
        spent=experience.spending.spent,
    )
    daemon = Daemon(
        intake=Intake(agent),
        agent=agent,
        local=local,
        offload=offload,
        device=device,
        policy=policy,
        counts=counts,
        registry=registry,
        journal=journal,
        experience=experience,
        live=live,
        embedder=embedder,
        cache=cache,
        follower=follower,
    )
    registry.register(Gauges(daemon))
    return daemon


def model_cards(daemon: Daemon) -> tuple[ModelCard, ...]:
    """The virtual models, then the real ones behind them. Wakes nothing."""
    edge, link = daemon.local.model_card(), daemon.agent.link()
    local = daemon.local.model_cards()
    contexts = {"edge": edge.context_length, "cloud": link.context_length or edge.context_length}
    contexts["auto"] = max(contexts.values())
    virtual = [name for name in VIRTUAL_MODELS if name != "cloud" or link.configured]
    cards = [ModelCard(id=name, context_length=contexts[name]) for name in virtual]
    if link.model and link.model not in {card.id for card in local}:
        local = (*local, ModelCard(id=link.model, context_length=contexts["cloud"]))
    embeds = daemon.embedder.model_card() if daemon.embedder else None
    return (*cards, *local, embeds) if embeds else (*cards, *local)


def health(daemon: Daemon) -> dict[str, Any]:
    """`ok` while somebody could answer. Looks, and wakes nothing."""
    link, edge = daemon.agent.link(), daemon.local.reading().available
    answering = edge or (link.configured and link.connected)
    status = "draining" if daemon.intake.draining else "ok" if answering else "unavailable"
    cloud = ("connected" if link.connected else "disconnected") if link.configured else "none"
    return {"status": status, "edge": "ready" if edge else "unavailable", "cloud": cloud}


class Gauges(Collector):
    """The state of the device and the link, read when Prometheus asks."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon

    def collect(self) -> Iterator[Metric]:
        runtime, link = self._daemon.local.reading(), self._daemon.agent.link()
        yield _gauge("edge_queue_depth", "Requests waiting for a slot of the local model", runtime.queue_depth)
        yield _gauge("edge_running", "Requests that the local model answers", runtime.running)
        yield _gauge("edge_slots", "Requests that the local model can answer at once", runtime.slots)
        yield _gauge("edge_available", "1 if the local model can answer", runtime.available)
        yield _gauge("edge_tokens_per_second", "Decoded by all running requests", runtime.tokens_per_s)
        restarts = CounterMetricFamily("causeway_edge_restarts", "Times the model's process was started again")
        restarts.add_metric((), runtime.restarts)
        yield restarts
        yield _gauge("edge_quarantined", "Requests refused for having run when it died, twice", runtime.quarantined)
        yield _gauge("link_connected", "1 if connected to the cloud", link.connected)
        yield _gauge("link_round_trip_seconds", "To the cloud and back", link.round_trip_s)
        if self._daemon.offload is not None:
            now = self._daemon.offload.breaker_state()
            breaker = GaugeMetricFamily("causeway_breaker_state", "1 for the state it is in", labels=("state",))
            for state in BREAKER_STATES:
                breaker.add_metric((state,), float(state == now))
            yield breaker
        if self._daemon.journal is not None:
            lost = CounterMetricFamily("causeway_journal_lost", "Decisions that could not be written to the journal")
            lost.add_metric((), self._daemon.journal.lost + self._daemon.experience.lost)
            yield lost
        if self._daemon.cache is not None:
            yield from _of_cache(self._daemon.cache.stats())
        failures = CounterMetricFamily("causeway_policy_reload_failures", "Policy files rejected")
        failures.add_metric((), self._daemon.policy.failures)
        yield failures


def _of_cache(stats: Mapping[str, Any]) -> Iterator[Metric]:
    uses = CounterMetricFamily("causeway_cache_requests", "What the cache had to do with a request", labels=("use",))
    for use, count in stats["requests"].items():
        uses.add_metric((use,), count)
    yield uses
    for name in ("hits", "misses", "evictions", "errors", "suspected"):
        counted = CounterMetricFamily(f"causeway_cache_{name}", f"{name} of a layer", labels=("layer",))
        for layer, said in stats["layers"].items():
            if name in said:
                counted.add_metric((layer,), said[name])
        yield counted
    size = GaugeMetricFamily("causeway_cache_bytes", "Kept in a layer", labels=("layer",))
    for layer, said in stats["layers"].items():
        if said["size"] is not None:
            size.add_metric((layer,), said["size"])
    yield size


def _gauge(name: str, text: str, value: float | None) -> GaugeMetricFamily:
    """Without a sample while nothing has been measured."""
    return GaugeMetricFamily(f"causeway_{name}", text, value=None if value is None else float(value))
