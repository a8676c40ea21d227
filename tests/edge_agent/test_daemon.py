import contextlib
from pathlib import Path

import pytest
from edge_sides import HERE, THERE, Link, Remote, Turns, ask, collect, daemon_over, policy_file
from fakes import ScriptedAnswer
from prometheus_client import generate_latest

from edge_agent.daemon import Daemon, health, model_cards
from edge_agent.policies.center import PolicyCenter
from router.policy import InvalidPolicy
from shared.errors import Unreachable


def sample(daemon: Daemon, name: str, **labels: str) -> float | None:
    return daemon.registry.get_sample_value(name, labels)


async def test_gauges_show_the_device_the_link_and_the_policy(tmp_path: Path) -> None:
    """Every state an operator would alarm on, read at the moment of asking; nothing measured, no sample."""
    daemon = daemon_over(None, Turns(THERE), policy_file(tmp_path, "mode: prefer_edge"))
    runtime = daemon.local.reading()
    assert sample(daemon, "causeway_edge_tokens_per_second") is None
    runtime.queue_depth, runtime.running, runtime.tokens_per_s = 3, 2, 70.5  # type: ignore[misc]
    (tmp_path / "policy.yaml").write_text("mode: nonsense")
    with contextlib.suppress(InvalidPolicy):
        await daemon.policy.reload()

    assert sample(daemon, "causeway_edge_queue_depth") == 3
    assert sample(daemon, "causeway_edge_running") == 2
    assert sample(daemon, "causeway_edge_slots") == 4
    assert sample(daemon, "causeway_edge_available") == 1
    assert sample(daemon, "causeway_edge_tokens_per_second") == 70.5
    assert sample(daemon, "causeway_link_connected") == 1
    assert sample(daemon, "causeway_link_round_trip_seconds") == 0.01
    assert sample(daemon, "causeway_breaker_state", state="closed") == 1
    assert sample(daemon, "causeway_breaker_state", state="open") == 0
    assert sample(daemon, "causeway_policy_reload_failures_total") == 1


async def test_breaker_opening_is_seen(tmp_path: Path) -> None:
    """A cloud that fails shows in the gauges and in the request counters."""
    policy = policy_file(tmp_path, "mode: prefer_cloud\nbreaker: {consecutive_failures: 1}")
    daemon = daemon_over(Turns(HERE), ScriptedAnswer(Unreachable("gone")), policy)

    await collect(daemon.intake, ask())

    assert sample(daemon, "causeway_breaker_state", state="open") == 1
    assert sample(daemon, "causeway_requests_total", target="edge", outcome="done", code="") == 1
    assert sample(daemon, "causeway_failovers_total") == 1


def test_without_a_cloud_there_is_no_breaker() -> None:
    """Only what exists is shown."""
    daemon = daemon_over(None, None, PolicyCenter(None, None))

    assert sample(daemon, "causeway_link_connected") == 0
    assert b"causeway_breaker_state" not in generate_latest(daemon.registry)


@pytest.mark.parametrize(
    ("cloud", "link", "names"),
    [
        (False, None, ["auto", "edge", "small"]),
        (True, Link(), ["auto", "edge", "cloud", "small", "large"]),
        (True, Link(model=None, context_length=None), ["auto", "edge", "cloud", "small"]),
        (True, Link(model="small"), ["auto", "edge", "cloud", "small"]),
    ],
    ids=["no cloud", "cloud", "never connected", "same model"],
)
def test_models_are_the_virtual_and_the_known_real_ones(cloud: bool, link: Link | None, names: list[str]) -> None:
    """Each name once, with the context it really has."""
    remote = Remote(ScriptedAnswer()) if cloud else None
    if remote and link:
        remote.state = link
    cards = model_cards(daemon_over(None, remote, PolicyCenter(None, None)))

    assert [card.id for card in cards] == names
    assert all(card.context_length > 0 for card in cards)
    assert cards[1].context_length == 2048


@pytest.mark.parametrize(
    ("available", "connected", "status"),
    [(True, True, "ok"), (True, False, "ok"), (False, True, "ok"), (False, False, "unavailable")],
)
async def test_healthy_while_somebody_could_answer(available: bool, connected: bool, status: str) -> None:
    """The device or the cloud is enough; draining is not healthy, so that nobody is sent here."""
    remote = Remote(ScriptedAnswer())
    remote.state = Link(connected=connected)
    daemon = daemon_over(None, remote, PolicyCenter(None, None))
    daemon.local.reading().available = available  # type: ignore[misc]

    assert health(daemon)["status"] == status
    await daemon.intake.drain()
    assert health(daemon)["status"] == "draining"
