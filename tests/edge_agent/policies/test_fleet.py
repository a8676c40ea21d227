"""The fleet's policies at an edge: what is taken, what is refused and how it is said, and who has the last word."""

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from edge_sides import ask
from fleets import EDGE, HERE, OTHER, Device, device, signed

from edge_agent.policies.canary import LEAST, WINDOW
from shared.frames import MAX_OFFER
from shared.telemetry import RequestFinished


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Device]:
    made = device(tmp_path)
    yield made
    made.history.close()


@asynccontextmanager
async def watching(edge: Device) -> AsyncIterator[Callable[[int, bytes], Awaitable[None]]]:
    """`offer(version, signed)` waits until it is judged."""
    task = asyncio.create_task(edge.follower.watch())

    async def offer(version: int, content: bytes) -> None:
        judged = asyncio.Event()
        edge.follower.offered(version, content, judged.set)
        async with asyncio.timeout(30):
            await judged.wait()

    try:
        yield offer
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def given(edge: Device, *offers: tuple[int, bytes]) -> None:
    async with watching(edge) as offer:
        for version, content in offers:
            await offer(version, content)


async def test_a_signed_policy_is_in_force_at_once_and_recorded(here: Device) -> None:
    """With who and why, as a version that can be looked at and rolled back; the cloud is told which."""
    await given(here, (3, signed(3)))

    assert (here.center.policy.mode, here.center.current.version) == ("prefer_cloud", 1)
    assert [(act.action, act.who, act.why) for act in here.history.acts()] == [
        ("activate", "fleet", "fleet version 3: the 3th"),
        ("propose", "fleet", "fleet version 3: the 3th"),
    ]
    assert (here.state.seen, here.state.using, here.state.refused, here.state.code) == (3, 3, 0, "")
    assert here.history.broken_at() is None


@pytest.mark.parametrize(
    ("version", "content", "code"),
    [
        (4, signed(4, key=OTHER), "bad_signature"),
        (4, signed(4)[:-1], "bad_signature"),
        (4, b"", "bad_signature"),
        (4, b"x" * (MAX_OFFER + 1), "too_large"),
        (2, signed(2), "stale_policy"),
        (3, signed(3, EDGE), "stale_policy"),
        (9, signed(2), "stale_policy"),
        (4, signed(4, "mode: nonsense"), "invalid_policy"),
        (4, signed(4, "mode: prefer_edge\nrules: [{name: x, when: 'no_such > 1', target: cloud}]"), "invalid_policy"),
        (4, signed(4, groups=("kiosk",)), "not_for_this_edge"),
        (4, signed(4, percent=0.01), "not_for_this_edge"),
        (4, signed(4, "mode: prefer_cloud\nprivacy: {personal: free}"), "loosens_privacy"),
    ],
)
async def test_what_is_refused_changes_nothing_and_is_told_by_name(
    here: Device, version: int, content: bytes, code: str
) -> None:
    """Replayed, forged, damaged, oversized, invalid, for others, or laxer: the policy in force stays."""
    await given(here, (3, signed(3)))
    before = here.center.current

    await given(here, (version, content))

    assert here.center.current is before
    assert (here.state.seen, here.state.using) == (3, 3)
    assert (here.state.refused, here.state.code) == (version, code)
    assert here.state.message
    await given(here, (5, signed(5, EDGE)))
    assert (here.state.using, here.state.code, here.center.policy.mode) == (5, "", "prefer_edge")


async def test_a_refusal_is_recorded_once_and_only_if_it_was_signed(here: Device) -> None:
    """Who cannot sign cannot fill the history; who can is named in it with the reason."""
    bad = signed(4, "mode: nonsense")
    await given(here, *[(4, bad)] * 3, *[(4, signed(4, key=OTHER))] * 3)
    acts = here.history.acts()
    assert [(act.action, act.who, act.version) for act in acts] == [("refuse", "fleet", 0)]
    assert acts[0].why.startswith("fleet version 4: invalid_policy: fleet version 4:1: mode")


async def test_no_old_policy_comes_back_after_a_restart(here: Device, tmp_path: Path) -> None:
    """The highest version is remembered, and what is in force stays in force, whatever clocks say meanwhile."""
    await given(here, (7, signed(7)))
    here.history.close()

    again = device(tmp_path)
    assert (again.state.seen, again.state.using, again.center.policy.mode) == (7, 7, "prefer_cloud")
    await given(again, (6, signed(6, EDGE)))
    assert (again.state.code, again.center.policy.mode) == ("stale_policy", "prefer_cloud")
    again.history.close()


async def test_the_devices_administrator_has_the_last_word(here: Device) -> None:
    """Rolled back, the same version is not taken again; a newer one is, and an old text only as a newer version."""
    await given(here, (3, signed(3)))
    here.center.roll_back("anna", "too many to the cloud")
    assert (here.center.current.version, here.state.using, here.state.code) == (0, 0, "replaced")

    await given(here, (3, signed(3)))
    assert (here.center.current.version, here.state.using, here.state.code) == (0, 0, "stale_policy")

    await given(here, (4, signed(4)))
    assert (here.center.policy.mode, here.state.using) == ("prefer_cloud", 4)


async def test_a_policy_that_goes_badly_is_withdrawn_by_the_guard(here: Device) -> None:
    """Its first requests are watched; the version before holds again, and the cloud learns that."""
    await given(here, (3, signed(3)))
    for number in range(LEAST):
        request = ask(id=f"r{number}")
        assert here.center.policy_for(request).mode == "prefer_cloud"
        here.center(RequestFinished(request.id, "auto", "error", 0.1, error_code="upstream_failed"))

    assert here.center.policy.mode == "prefer_edge"
    assert [(act.action, act.who) for act in here.history.acts()][:1] == [("rollback", "guard")]
    assert (here.state.seen, here.state.using, here.state.code) == (3, 0, "replaced")


async def test_a_policy_that_goes_well_is_watched_no_longer(here: Device) -> None:
    """After its first requests, failures are no longer laid to it."""
    await given(here, (3, signed(3)))
    for number in range(WINDOW + LEAST):
        request, failed = ask(id=f"r{number}"), number >= WINDOW
        here.center.policy_for(request)
        outcome, code = ("error", "upstream_failed") if failed else ("done", None)
        ended = RequestFinished(request.id, "auto", outcome, 0.1, first_token_s=0.1, error_code=code)  # type: ignore[arg-type]
        here.center(ended)
    assert (here.center.probation, here.center.policy.mode) == (None, "prefer_cloud")


async def test_it_is_held_against_what_the_device_itself_put_in_force_last(here: Device) -> None:
    """By file or by hand: not against another policy of the fleet. Once the device's own changes, it is judged anew."""
    here.center.activate(here.center.propose(HERE, "anna", "quarantine").number, "anna", "quarantine")
    await given(here, (3, signed(3)))
    assert (here.state.refused, here.state.code, here.center.policy.mode) == (3, "loosens_privacy", "only_edge")

    here.center.activate(here.center.propose(EDGE, "anna", "over").number, "anna", "over")
    assert (here.state.refused, here.state.seen) == (0, 0)
    await given(here, (3, signed(3)))
    assert (here.center.policy.mode, here.state.using) == ("prefer_cloud", 3)
    await given(here, (4, signed(4, "mode: prefer_cloud\nprivacy: {personal: edge_only}")), (5, signed(5)))
    assert here.state.using == 5


async def test_after_a_damaged_history_nothing_laxer_is_taken(here: Device, tmp_path: Path) -> None:
    """Nobody knows which versions were there: the device keeps everything here until its administrator has spoken,
    also after the next restart."""
    await given(here, (7, signed(7)))
    here.history.close()
    for name in ("policies0.db", "policies0.db-wal", "policies0.db-shm"):
        (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / "policies0.db").write_bytes(b"\x00damaged" * 1000)

    for _ in range(2):
        again = device(tmp_path)
        await given(again, (3, signed(3)))
        assert (again.state.code, again.center.policy.mode) == ("loosens_privacy", "only_edge")
        again.history.close()


async def test_a_history_that_cannot_be_written_refuses(here: Device) -> None:
    """A policy that would be forgotten at the restart is not taken; the cloud is told."""
    here.history.close()
    with pytest.raises(sqlite3.ProgrammingError):
        here.history.acts()
    await given(here, (3, signed(3)))
    assert (here.center.current.version, here.state.refused, here.state.code) == (0, 3, "internal")


async def test_the_newest_of_many_offers_wins(here: Device) -> None:
    """What waits while another is judged makes way: a storm of offers costs one judgement at a time."""
    async with watching(here) as offer:
        for version in range(1, 50):
            here.follower.offered(version, signed(version), lambda: None)
        await offer(50, signed(50, EDGE))
    assert here.state.using == 50
    assert len(here.history.versions()) < 5


async def test_requests_go_on_while_policies_come(here: Device) -> None:
    """Each is decided by one whole policy, whichever; none waits for the parsing of a large one."""
    large = "mode: prefer_cloud\nrules:\n" + "".join(
        f"  - {{name: r{number}, when: {{prompt_tokens: {{'>': {number + 10_000}}}}}, target: cloud}}\n"
        for number in range(200)
    )
    modes = set()
    async with watching(here) as offer:
        for version in range(1, 21):
            content = signed(version, large if version % 2 else EDGE)
            waiting = asyncio.ensure_future(offer(version, content))
            while not waiting.done():
                modes.add((here.center.policy_for(ask(id=f"v{version}")).mode, len(here.center.policy.rules)))
                await asyncio.sleep(0)
            await waiting
    assert {mode for mode, _ in modes} == {"prefer_edge", "prefer_cloud"}
    assert here.state.using == 20
