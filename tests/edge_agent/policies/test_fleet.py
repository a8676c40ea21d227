"""The fleet's policies at an edge: what is taken, what is refused and how it is said, and who has the last word."""

import asyncio
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from edge_sides import ask
from fleets import EDGE, HERE, OTHER, Device, device, signed, watching

from edge_agent.policies.canary import LEAST, WINDOW
from shared.frames import MAX_OFFER
from shared.telemetry import RequestFinished


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Device]:
    made = device(tmp_path)
    yield made
    made.history.close()


async def given(edge: Device, *offers: tuple[int, bytes]) -> None:
    async with watching(edge.follower) as offer:
        for version, content in offers:
            await offer(version, content)


async def test_a_signed_policy_is_in_force_at_once_and_recorded(here: Device) -> None:
    """With who and why, as a version that can be looked at and rolled back; the cloud is told which."""
    await given(here, (3, signed(3)))

    assert (here.center.policy.mode, here.center.current.version) == ("prefer_cloud", 1)
    assert [(act.action, act.who, act.why) for act in here.history.acts()] == [
        ("take", "fleet", "fleet version 3: the 3th"),
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


DATABASE = ("policies0.db", "policies0.db-wal", "policies0.db-shm")


def emptied(folder: Path) -> None:
    for name in DATABASE:
        (folder / name).unlink(missing_ok=True)


def damaged(folder: Path) -> None:
    emptied(folder)
    (folder / "policies0.db").write_bytes(b"\x00damaged" * 1000)


@pytest.mark.parametrize("harm", [emptied, damaged])
async def test_without_its_history_no_older_policy_is_taken(
    here: Device, tmp_path: Path, harm: Callable[[Path], None]
) -> None:
    """Deleted or unreadable: the device keeps everything here until its administrator has spoken, knows the newest
    version that it ever took, and says that acts are gone; also after the next restart."""
    await given(here, (7, signed(7)))
    here.history.close()
    harm(tmp_path)

    for _ in range(2):
        again = device(tmp_path)
        await given(again, (3, signed(3)))
        assert (again.state.seen, again.state.code, again.center.policy.mode) == (7, "stale_policy", "only_edge")
        await given(again, (8, signed(8)))
        assert (again.state.code, again.center.policy.mode) == ("loosens_privacy", "only_edge")
        assert [act.action for act in again.history.acts()].count("lost") == 1
        assert again.history.broken_at() is None
        again.history.close()

    again = device(tmp_path)
    again.center.activate(again.center.propose(EDGE, "anna", "go on").number, "anna", "go on")
    await given(again, (7, signed(7)))
    assert (again.state.code, again.center.policy.mode) == ("stale_policy", "prefer_edge")
    await given(again, (8, signed(8)))
    assert (again.state.using, again.center.policy.mode) == (8, "prefer_cloud")
    again.history.close()


async def test_an_old_copy_of_the_history_brings_no_old_policy_back(here: Device, tmp_path: Path) -> None:
    """Its acts are all genuine, but there were more: the newest version is known all the same, and the gap is told."""
    await given(here, (3, signed(3)))
    here.history.close()
    old = (tmp_path / "policies0.db").read_bytes()
    again = device(tmp_path)
    await given(again, (7, signed(7)))
    again.history.close()
    emptied(tmp_path)
    (tmp_path / "policies0.db").write_bytes(old)

    again = device(tmp_path)
    assert (again.state.seen, again.history.acts()[0].action) == (7, "lost")
    await given(again, (5, signed(5, EDGE)))
    assert (again.state.code, again.state.using) == ("stale_policy", 3)
    again.history.close()


@pytest.mark.parametrize(
    "tampering",
    [
        "DELETE FROM acts WHERE action = 'take' AND version = 2",
        "UPDATE acts SET content = CAST(x'0000000000000001' || substr(content, 9) AS BLOB) WHERE action = 'take'",
        "UPDATE acts SET action = 'activate' WHERE action = 'take'",
        "UPDATE acts SET content = 'x' WHERE action = 'take'",
    ],
)
@pytest.mark.parametrize("anchored", [True, False])
async def test_a_rewritten_record_of_what_was_taken_brings_no_old_policy_back(
    here: Device, tmp_path: Path, tampering: str, anchored: bool
) -> None:
    """The chain covers it, whether or not the anchor is there: while the record is not whole, nothing is taken."""
    await given(here, (3, signed(3)), (7, signed(7)))
    here.center.activate(here.center.propose(EDGE, "anna", "mine").number, "anna", "mine")
    here.history.close()
    with sqlite3.connect(tmp_path / "policies0.db") as database:
        assert database.execute(tampering).rowcount
    database.close()
    if not anchored:
        (tmp_path / "policies0.head").unlink()

    again = device(tmp_path)
    before = again.center.current
    assert before.policy.mode in ("prefer_edge", "only_edge")
    for version in (5, 8):
        await given(again, (version, signed(version)))
        assert (again.state.refused, again.state.code) == (version, "broken_history")
    assert again.center.current is before
    again.history.close()


@pytest.mark.parametrize(
    "content", [None, b"", b"{}", b'{"head":{"number":0,"digest":"","fleet":0},"signature":"AA=="}']
)
async def test_an_anchor_that_is_gone_or_forged_changes_nothing(
    here: Device, tmp_path: Path, content: bytes | None
) -> None:
    """The chain is enough while it is there; with the next act there is an anchor again."""
    await given(here, (7, signed(7)))
    here.history.close()
    anchor = tmp_path / "policies0.head"
    assert anchor.stat().st_mode & 0o077 == 0
    anchor.unlink()
    if content is not None:
        anchor.write_bytes(content)

    again = device(tmp_path)
    await given(again, (6, signed(6, EDGE)), (8, signed(8)))
    assert (again.state.using, again.history.broken_at()) == (8, None)
    again.history.close()
    emptied(tmp_path)
    once_more = device(tmp_path)
    assert once_more.state.seen == 8
    once_more.history.close()


async def test_a_history_that_cannot_be_written_refuses(here: Device) -> None:
    """A policy that would be forgotten at the restart is not taken; the cloud is told."""
    here.history.close()
    with pytest.raises(sqlite3.ProgrammingError):
        here.history.acts()
    await given(here, (3, signed(3)))
    assert (here.center.current.version, here.state.refused, here.state.code) == (0, 3, "internal")


async def test_the_newest_of_many_offers_wins(here: Device) -> None:
    """What waits while another is judged makes way: a storm of offers costs one judgement at a time."""
    async with watching(here.follower) as offer:
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
    async with watching(here.follower) as offer:
        for version in range(1, 21):
            content = signed(version, large if version % 2 else EDGE)
            waiting = asyncio.ensure_future(offer(version, content))
            while not waiting.done():
                modes.add((here.center.policy_for(ask(id=f"v{version}")).mode, len(here.center.policy.rules)))
                await asyncio.sleep(0)
            await waiting
    assert {mode for mode, _ in modes} == {"prefer_edge", "prefer_cloud"}
    assert here.state.using == 20
