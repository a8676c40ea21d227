"""What an administrator is shown of the fleet that the device follows."""

from pathlib import Path

from administration import administration
from fleets import EDGE, KEY, signed, watching


async def test_a_device_without_a_fleet_says_so(tmp_path: Path) -> None:
    async with administration(tmp_path) as edge:
        assert await edge.get("/admin/fleet") == {"fleet": None}


async def test_what_was_sent_taken_and_refused_is_shown(tmp_path: Path) -> None:
    """The version that the cloud sent last, when it last answered, what is in force, what was refused and why, and
    whether the device's own policy is the stricter one."""
    async with administration(tmp_path, fleet=KEY.public_key()) as edge:
        follower = edge.daemon.follower
        assert follower is not None
        before = (await edge.get("/admin/fleet"))["fleet"]
        own = (await edge.post("/admin/policy/propose", source="mode: only_edge", why="quarantine"))["version"]
        async with watching(follower) as offer:
            follower.answered()
            await offer(3, signed(3))
            taken = (await edge.get("/admin/fleet"))["fleet"]
            await edge.post("/admin/policy/activate", version=own, why="quarantine")
            await offer(4, signed(4, EDGE))
            refused = (await edge.get("/admin/fleet"))["fleet"]
        async with edge.someone("read.rita") as rita:
            reader = await rita.get("/admin/fleet")

    assert (before["edge"], before["group"], before["connected"]) == ("a-device", "kiosk", True)
    assert (before["offered"], before["answered_at"], before["seen"], before["refusals"]) == (None, None, 0, [])
    assert (taken["offered"], taken["seen"], taken["using"], taken["stricter"]) == (3, 3, 3, False)
    assert taken["answered_at"] > 0
    assert (refused["offered"], refused["seen"], refused["using"]) == (4, 3, 0)
    assert (refused["refused"], refused["code"], refused["stricter"]) == (4, "loosens_privacy", True)
    assert "only_edge" in refused["message"]
    assert [one["why"] for one in refused["refusals"]] == [f"fleet version 4: loosens_privacy: {refused['message']}"]
    assert reader.status_code == 200
