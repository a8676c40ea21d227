"""What gets lost on the way to the cloud: as the kernel and our own connections count it, on a link that loses."""

import asyncio
import math
import socket
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
from fakes import EchoAnswer
from faults import Proxy, faulty
from hypothesis import given
from hypothesis import strategies as st
from serving import served
from starlette.applications import Starlette

from cloud_engine.gateway.socket import SocketEndpoint
from edge_agent.backends.cloud import CloudBackend
from edge_agent.backends.losses import HALF_S, LEAST_SEGMENTS, LEAST_UP_S, Losses, Segments, segments
from edge_agent.offload import Offload
from router.features import DeviceReading, RequestFeatures, Trouble
from router.predict import Prediction, predict
from shared.schemas import ChatRequest
from shared.streams import ClientRules

RULES = ClientRules(ping_every=0.3, silent_after=60.0, welcome_within=20.0)
ASKED = RequestFeatures(prompt_tokens=20, expected_output_tokens=3)
DEVICE = DeviceReading(model="small", context_length=100)
linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what its kernel sent again")


def up(losses: Losses, at: float = 0.0, took: float = 0.5) -> None:
    losses.trying(at)
    losses.working(at + took)


def test_nothing_is_known_before_anything_was_seen() -> None:
    """Nor of a link that never came up, however often it was tried."""
    losses = Losses()
    assert losses.reading(0.0) == Trouble()
    losses.trying(1.0)
    losses.ended(2.0, cut=True)
    assert losses.reading(3.0) == Trouble()


def test_segments_that_were_sent_again() -> None:
    """As a share of those sent; over several connections, each of which counts from nothing; a few are not a share."""
    losses = Losses()
    up(losses)
    losses.seen(Segments(2, 1, 0.2), 1.0)
    few = losses.reading(1.0)
    losses.seen(Segments(100, 10, 0.3), 1.0)
    losses.ended(1.0, cut=False)
    losses.seen(Segments(100, 0, 0.2), 1.0)

    assert (few.loss, few.resend_s) == (pytest.approx(1 / LEAST_SEGMENTS), 0.2)
    assert (losses.reading(1.0).loss, losses.reading(1.0).resend_s) == (pytest.approx(10 / 200), 0.2)


def test_what_was_lost_is_forgotten() -> None:
    """By half in HALF_S, as new segments come through."""
    losses = Losses()
    up(losses)
    losses.seen(Segments(1000, 100, 0.2), 1.0)
    losses.seen(Segments(2000, 100, 0.2), 1.0 + HALF_S)

    assert losses.reading(1.0 + HALF_S).loss == pytest.approx(50 / 1500)


def test_cuts_are_held_against_the_time_there_was_a_connection() -> None:
    """Two in a minute; what was meant is none, and neither is what never worked; later they fade."""
    losses = Losses()
    for cut in (True, True, False):
        up(losses, 10.0)
        losses.ended(12.0, cut=cut)
        losses.trying(12.0)
        losses.ended(12.0, cut=True)
        losses.working(12.0)
        losses.ended(12.0, cut=False)
    now = losses.reading(12.0)
    up(losses, 12.0)
    later = losses.reading(12.0 + 20 * HALF_S)

    assert now.cuts_per_s == pytest.approx(2 / LEAST_UP_S, rel=0.02)
    assert now.reconnect_s is not None
    assert later.cuts_per_s is not None
    assert 0 < later.cuts_per_s < 1e-6


def test_the_time_for_a_new_connection_is_from_the_first_try() -> None:
    """Its failed tries and waits included; the latest count most."""
    losses = Losses()
    up(losses, 0.0, took=0.4)
    losses.ended(10.0, cut=True)
    losses.trying(10.0)
    losses.trying(11.0)
    losses.working(14.4)
    losses.working(20.0)

    assert losses.reading(20.0).reconnect_s == pytest.approx(0.4 + (4.4 - 0.4) / 4)


EVENTS = st.sampled_from(["trying", "working", "seen", "cut", "meant", "read"])


@given(st.lists(st.tuples(EVENTS, st.floats(0, 1e5), st.integers(0, 1000), st.integers(0, 1000)), max_size=40))
def test_whatever_happens_it_is_a_share_and_a_rate(events: list[tuple[str, float, int, int]]) -> None:
    """Also of counters that run backwards, and of events in no order."""
    losses, now = Losses(), 0.0
    for event, past, sent, again in events:
        now += past
        match event:
            case "trying":
                losses.trying(now)
            case "working":
                losses.working(now)
            case "seen":
                losses.seen(Segments(sent, again, 0.2), now)
            case "cut" | "meant":
                losses.ended(now, cut=event == "cut")
        said = losses.reading(now)
        assert said.loss is None or 0 <= said.loss <= 1
        assert said.cuts_per_s is None or (said.cuts_per_s >= 0 and math.isfinite(said.cuts_per_s))
        assert said.reconnect_s is None or said.reconnect_s >= 0


@linux
def test_the_kernel_tells_of_a_real_connection() -> None:
    """Ten writes are ten segments, none of them lost on loopback; a closed socket tells nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        near = socket.create_connection(listening.getsockname())
        far, _ = listening.accept()
        for _ in range(10):
            near.sendall(b"x")
            far.recv(1)
        said = segments(near)
        near.close()
        far.close()

    assert said is not None
    assert 10 <= said.sent <= 12
    assert said.again == 0
    assert 0.001 < said.resend_s < 10
    assert segments(near) is None


@pytest.mark.parametrize("info", [b"", bytes(104), OSError("not a TCP socket")])
def test_a_system_that_tells_less(monkeypatch: pytest.MonkeyPatch, info: bytes | OSError) -> None:
    """An older kernel's shorter answer, or none: nothing is known, and nothing raised."""

    class Said:
        def getsockopt(self, *_: int) -> bytes:
            if isinstance(info, OSError):
                raise info
            return info

    monkeypatch.setattr(socket, "TCP_INFO", 11, raising=False)
    assert segments(Said()) is None
    monkeypatch.delattr(socket, "TCP_INFO")
    assert segments(Said()) is None


# --- a real link ------------------------------------------------------------------------------------------------------


class Link:
    """A cloud behind a proxy, and the door to it."""

    def __init__(self, backend: CloudBackend, proxy: Proxy) -> None:
        self.backend, self.proxy, self.offload = backend, proxy, Offload(backend)

    @property
    def trouble(self) -> Trouble:
        return self.offload.reading().trouble

    @property
    def cuts(self) -> int:
        """As counted in the last moments."""
        return round((self.trouble.cuts_per_s or 0.0) * LEAST_UP_S)

    def predicted(self, **others: Any) -> Prediction:
        """For a first token and further ones whose pace without losses is known."""
        return predict(ASKED, DEVICE, replace(self.offload.reading(), first_token_s=0.5, token_s=0.25, **others)).cloud

    async def asked(self, number: int) -> None:
        request = ChatRequest(id=f"r{number}", model="m", prompt="one two three")
        assert "".join([delta.text async for delta in self.backend.answer(request)]) == "one two three "


@asynccontextmanager
async def linked(rules: ClientRules = RULES) -> AsyncIterator[Link]:
    endpoint = SocketEndpoint(answer_for=lambda _: EchoAnswer(), authenticate=lambda _: "tenant")
    async with served(Starlette(routes=[endpoint.route()]), drain=endpoint.aclose) as port, faulty(port) as proxy:
        backend = CloudBackend(f"ws://127.0.0.1:{proxy.port}", "k", rules=rules, jitter=lambda: 0.1)
        try:
            await backend.reach(60.0)
            yield Link(backend, proxy)
        finally:
            await backend.aclose()


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not true():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


@linux
async def test_segments_lost_on_the_way_make_the_prediction_longer() -> None:
    """The kernel drops two of five of what the edge sends: that is seen, about as large, and the times rise by it."""
    async with linked() as link:
        await link.asked(0)
        await until(lambda: link.trouble.loss is not None)
        before = link.predicted()
        link.proxy.lose(0.4)
        number = 0
        while link.proxy.lost < 20:
            number += 1
            await link.asked(number)
        await until(lambda: (link.trouble.loss or 0.0) > 0.1)
        after, trouble, cuts = link.predicted(), link.trouble, link.proxy.happened["cut"]

    assert before == Prediction(first_token_s=0.5, total_s=1.0)
    assert trouble.loss is not None
    assert 0.1 < trouble.loss < 0.7
    assert trouble.resend_s is not None
    assert after.first_token_s is not None
    assert after.total_s is not None
    assert after.first_token_s > 0.5 + 0.1 * trouble.resend_s
    assert after.total_s - 1.0 > after.first_token_s - 0.5
    assert (cuts, trouble.cuts_per_s) == (0, 0.0)


async def test_a_link_that_is_cut_costs_reconnecting() -> None:
    """Three cuts in a few seconds: the risk of another, times what a new connection took."""
    async with linked() as link:
        before = link.predicted()
        for number in range(3):
            link.proxy.cut()
            await until(lambda number=number: link.cuts == number + 1 and link.backend.link().connected)
        after, trouble, cuts = link.predicted(), link.trouble, link.proxy.happened["cut"]

    assert cuts == 3
    assert trouble.cuts_per_s == pytest.approx(3 / LEAST_UP_S, rel=0.3)
    assert trouble.reconnect_s is not None
    assert trouble.reconnect_s > 0
    assert before.total_s == 1.0
    risk = 1 - math.exp(-trouble.cuts_per_s * 1.0)
    assert after.total_s == pytest.approx(1.0 + risk * trouble.reconnect_s, rel=0.05)


async def test_a_link_that_falls_silent_is_cut() -> None:
    """Pings without an answer end the connection: that counts as what it is."""
    async with linked(replace(RULES, ping_every=0.1, silent_after=0.5)) as link:
        link.proxy.black_hole = True
        await until(lambda: link.proxy.happened["connected"] > 1)
        link.proxy.black_hole = False
        await until(lambda: link.backend.link().connected)

        assert link.proxy.happened["swallowed"] > 0
        assert (link.trouble.cuts_per_s or 0.0) > 0


async def test_a_delay_is_in_the_round_trip() -> None:
    """Nothing is lost: no first token is promised sooner than a ping comes back."""
    async with linked() as link:
        quick = link.predicted(first_token_base_s=0.001, prompt_token_s=0.0)
        link.proxy.delay = 0.1
        await until(lambda: (link.offload.reading().round_trip_s or 0.0) > 0.15)
        slow = link.predicted(first_token_base_s=0.001, prompt_token_s=0.0)

    assert link.proxy.happened["delayed"] > 0
    assert quick.first_token_s is not None
    assert slow.first_token_s is not None
    assert slow.first_token_s > max(0.15, quick.first_token_s)


async def test_what_is_meant_is_no_cut() -> None:
    """Closing the link by ourselves."""
    async with linked() as link:
        await link.backend.aclose()

        assert link.trouble.cuts_per_s == 0.0
