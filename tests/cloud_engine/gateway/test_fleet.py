"""A gateway with a fleet: what it offers to whom, who may publish, and real edges on real sockets that take it."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from faults import faulty
from fleets import CLOUD, EDGE, HERE, KEY, OTHER, Device, Site, device, signed, site
from stand_ins import collect, request
from waiting import until

from cloud_engine.gateway import fleet as module
from cloud_engine.gateway.fleet import Fleet
from edge_agent.backends.cloud import CloudBackend
from shared.config import InvalidSettings
from shared.frames import FleetState
from shared.keys import Keys, new_key
from shared.session import Reported
from shared.streams import ClientRules

QUICK = ClientRules(ping_every=0.1, silent_after=5.0, welcome_within=5.0)


@asynccontextmanager
async def connected(edge: Device, port: int) -> AsyncIterator[CloudBackend]:
    """The edge's own connection, kept up, and its follower at work."""
    cloud = CloudBackend(
        f"ws://127.0.0.1:{port}", "", keep_connected=True, rules=QUICK, follower=edge.follower, jitter=lambda: 0.01
    )
    task = asyncio.create_task(edge.follower.watch())
    cloud.start()
    try:
        yield cloud
    finally:
        await cloud.aclose()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        edge.history.close()


def said(there: Site) -> list[dict[str, Any]]:
    edges: list[dict[str, Any]] = there.fleet.overview(1000)["edges"]
    return edges


async def test_an_edge_takes_what_is_published_and_the_cloud_sees_it(tmp_path: Path) -> None:
    """At the connection and while it lasts; a local rollback is seen, too, and not undone by the next connection."""
    edge = device(tmp_path)
    async with site(tmp_path / "fleet") as there:
        there.publish(1)
        await there.fleet.reload()
        async with connected(edge, there.port):
            await until(lambda: edge.center.policy.mode == "prefer_cloud")
            await until(lambda: [one["using"] for one in said(there)] == [1])
            there.publish(2, EDGE)
            await there.fleet.reload()
            await until(lambda: [one["using"] for one in said(there)] == [2])
            assert edge.center.policy.mode == "prefer_edge"
            edge.center.roll_back("anna", "no")
            await until(lambda: [one["using"] for one in said(there)] == [1])
            (shown,) = said(there)
    assert (shown["seen"], shown["offered"], shown["code"], shown["tenant"]) == (2, 2, "replaced", "local")
    assert said(there)[0]["connected"] is False
    assert [(one["version"], one["using"]) for one in there.fleet.overview(9)["policies"]] == [(2, 0), (1, 1)]


async def test_a_refusal_is_shown_with_its_reason(tmp_path: Path) -> None:
    """The edge's own floor outranks the fleet; the cloud can read why, and does not offer it for ever."""
    edge = device(tmp_path)
    edge.center.activate(edge.center.propose(HERE, "anna", "quarantine").number, "anna", "quarantine")
    async with site(tmp_path / "fleet") as there, connected(edge, there.port):
        there.publish(1)
        await there.fleet.reload()
        await until(lambda: [one["refused"] for one in said(there)] == [1])
        (shown,) = said(there)
        assert (shown["code"], shown["using"], edge.center.policy.mode) == ("loosens_privacy", 0, "only_edge")
        assert "only_edge" in shown["message"]
        edge.center.activate(edge.center.propose(EDGE, "anna", "over").number, "anna", "over")
        await until(lambda: [one["using"] for one in said(there)] == [1])
    assert len([act for act in device(tmp_path, 0).history.acts() if act.action == "refuse"]) == 1


async def test_groups_and_shares_get_their_own_newest(tmp_path: Path) -> None:
    """Each edge is offered the highest version that is meant for it."""
    (tmp_path / "fleet").mkdir()
    fleet = Fleet(tmp_path / "fleet", KEY.public_key())
    for version, terms in ((1, {}), (2, {"groups": ("kiosk",)}), (3, {"percent": 30})):
        (tmp_path / "fleet" / f"{version}.policy").write_bytes(signed(version, **terms))
    await fleet.reload()
    got = {
        (group, found.version)
        for group in ("kiosk", "desk")
        for number in range(200)
        if (found := fleet.policy_for(FleetState(edge=f"{number:x}", group=group))) is not None
    }
    assert got == {("kiosk", 2), ("kiosk", 3), ("desk", 1), ("desk", 3)}


async def test_what_lies_in_the_folder_is_checked_and_what_is_wrong_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forged, damaged, invalid, twice the same version: not offered; the others are. A folder that goes keeps them."""
    monkeypatch.setattr(module, "POLL_S", 0.02)
    folder = tmp_path / "fleet"
    folder.mkdir()
    fleet = Fleet(folder, KEY.public_key())
    async with fleet.followed():
        (folder / "1.policy").write_bytes(signed(1))
        (folder / "2.policy").write_bytes(signed(2, key=OTHER))
        (folder / "3.policy").write_bytes(signed(3)[:-2])
        (folder / "4.policy").write_bytes(signed(4, "mode: x"))
        (folder / "5.policy").write_bytes(signed(1, EDGE))
        (folder / "notes.txt").write_bytes(b"not looked at")
        await until(lambda: len(fleet.overview(9)["problems"]) == 4)
        shown = fleet.overview(9)
        assert [one["version"] for one in shown["policies"]] == [1]
        assert [one["file"] for one in shown["problems"]] == ["2.policy", "3.policy", "4.policy", "5.policy"]
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
        await asyncio.sleep(0.1)
        assert [one["version"] for one in fleet.overview(9)["policies"]] == [1]
    with pytest.raises(InvalidSettings, match="fleet_policies"):
        Fleet(folder, KEY.public_key())


async def test_who_may_publish(tmp_path: Path) -> None:
    """Roles as on the edge; what is published survives, is offered at once, and versions only rise."""
    keys = tmp_path / "admins"
    reader, proposer, boss, nobody = (
        new_key(keys, owner, now=datetime.now(UTC)) for owner in ("read.a", "propose.b", "activate.c", "tenant")
    )
    edge = device(tmp_path)
    async with (
        site(tmp_path / "fleet", Keys(keys, source="cloud")) as there,
        connected(edge, there.port),
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{there.port}", timeout=60) as http,
    ):

        async def call(key: str, method: str, path: str, body: bytes = b"") -> tuple[int, Any]:
            sent = {"signed": body.decode()} if body else {"nothing": 1}
            reply = await http.request(method, path, json=sent, headers={"authorization": f"Bearer {key}"})
            return reply.status_code, reply.json()

        assert (await call("none", "GET", "/admin/fleet"))[0] == 401
        assert (await call(nobody, "GET", "/admin/fleet"))[0] == 403
        assert (await call(reader, "POST", "/admin/fleet/check", signed(1)))[0] == 403
        assert (await call(proposer, "POST", "/admin/fleet/check", signed(1)))[1]["version"] == 1
        assert (await call(proposer, "POST", "/admin/fleet/policies", signed(1)))[0] == 403
        assert (await call(boss, "POST", "/admin/fleet/policies"))[1]["error"]["param"] == "signed"
        for body, code in (
            (signed(1, key=OTHER), "bad_signature"),
            (b"x" * 300_000, "too_large"),
            (signed(1, "mode: x"), "invalid_policy"),
        ):
            status, found = await call(boss, "POST", "/admin/fleet/policies", body)
            assert (status, found["error"]["code"]) == (413 if code == "too_large" else 400, code)
        assert (await call(boss, "POST", "/admin/fleet/policies", signed(2)))[0] == 200
        assert (await call(boss, "POST", "/admin/fleet/policies", signed(2)))[1]["error"]["code"] == "request_conflict"
        await until(lambda: edge.center.policy.mode == "prefer_cloud")
        await until(lambda: said(there)[0]["using"] == 2)
        _, shown = await call(reader, "GET", "/admin/fleet")
    assert (shown["known"], shown["connected"], shown["edges"][0]["using"]) == (1, 1, 2)
    assert [one["version"] for one in Fleet(tmp_path / "fleet", KEY.public_key()).overview(9)["policies"]] == [2]


async def test_without_administrators_nothing_is_published_over_http(tmp_path: Path) -> None:
    """There is no such path; the folder is the only way."""
    async with site(tmp_path / "fleet") as there, httpx.AsyncClient() as http:
        reply = await http.get(f"http://127.0.0.1:{there.port}/admin/fleet")
    assert reply.status_code == 404


async def test_two_clouds_of_one_name_cannot_move_an_edge_back(tmp_path: Path) -> None:
    """Behind a balancer one may be late, or have another policy of the same version: the edge keeps what it took."""
    edge = device(tmp_path)
    async with site(tmp_path / "a") as new, site(tmp_path / "b") as late, faulty(new.port) as balancer:
        new.publish(5)
        late.publish(4, EDGE)
        for there in (new, late):
            await there.fleet.reload()
        async with connected(edge, balancer.port):
            await until(lambda: [one["using"] for one in said(new)] == [5])
            balancer.target = late.port
            balancer.cut()
            await until(lambda: [one["using"] for one in said(late)] == [5])
            late.publish(5, EDGE)
            await late.fleet.reload()
            assert said(late)[0]["foreign"] is True
            late.publish(6, EDGE)
            await late.fleet.reload()
            await until(lambda: [one["using"] for one in said(late)] == [6])
    assert balancer.happened["cut"] > 0


async def test_a_policy_that_is_cut_again_and_again_arrives_whole(tmp_path: Path) -> None:
    """S-07: the line breaks at another byte each time; no part of it comes into force, in the end all of it does."""
    edge, text = device(tmp_path), CLOUD + "# " + "x" * 150_000
    async with site(tmp_path / "fleet") as there, faulty(there.port) as proxy:
        there.publish(1, text)
        await there.fleet.reload()
        cuts = [*range(2_000, 150_000, 25_013)]
        proxy.slice_to, proxy.cut_after, proxy.cut_again = 7001, cuts[0], cuts[1:]
        async with connected(edge, proxy.port):
            await until(lambda: [one["using"] for one in said(there)] == [1])
    assert edge.center.current.source.decode() == text
    assert proxy.cut_after is None
    assert proxy.happened["cut"] >= len(cuts)


async def test_a_hundred_edges_take_each_policy_and_answer_on(tmp_path: Path) -> None:
    """Published while all are connected and ask; then a storm in which all reconnect at once, to which nothing is sent
    that they have. No request fails for it."""
    edges = [device(tmp_path, number) for number in range(100)]
    async with AsyncExitStack() as all_of_them, site(tmp_path / "fleet") as there, faulty(there.port) as proxy:
        clouds = [await all_of_them.enter_async_context(connected(edge, proxy.port)) for edge in edges]
        await until(lambda: len(said(there)) == 100)
        asked = [msgspec.structs.replace(request(f"a {number}"), id=f"r{number}") for number in range(100)]
        answers = asyncio.gather(*(collect(cloud, one) for cloud, one in zip(clouds, asked, strict=True)))
        there.publish(1, CLOUD + "# " + "x" * 30_000)
        await there.fleet.reload()
        await until(lambda: all(one["using"] == 1 for one in said(there)))
        assert all(deltas[-1].finish_reason == "stop" for deltas in await answers)
        before = proxy.down_bytes
        proxy.cut()
        await until(lambda: there.fleet.overview(0)["connected"] == 0)
        await until(lambda: there.fleet.overview(0)["connected"] == 100)
        assert proxy.down_bytes - before < 100 * 2_000
    assert all(edge.center.policy.mode == "prefer_cloud" for edge in edges)


async def test_what_is_known_of_edges_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who is gone for the longest is forgotten first, who is connected last."""
    monkeypatch.setattr(module, "MAX_EDGES", 3)

    class Session:
        def offer(self, version: int, signed: bytes) -> None:
            pass

    (tmp_path / "fleet").mkdir()
    fleet = Fleet(tmp_path / "fleet", KEY.public_key())
    sessions = [Session() for _ in range(5)]
    for number, session in enumerate(sessions):
        fleet.reported(Reported(session, "t", FleetState(edge=str(number))))  # type: ignore[arg-type]
        if number == 1:
            fleet.gone(session)
    assert [one["edge"] for one in fleet.overview(9)["edges"]] == ["4", "3", "2"]
    with contextlib.suppress(KeyError):
        fleet.gone(sessions[0])
    assert fleet.overview(0)["connected"] == 3
