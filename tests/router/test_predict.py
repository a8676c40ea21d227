"""Predicted times: from what was measured, never negative, never from nothing."""

import math
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.features import NO_CLOUD, DeviceReading, LinkReading, RequestFeatures, Trouble
from router.predict import ALL_PIECES, FIRST_PIECES, UNMEASURED, Line, Pace, Prediction, lateness_s, predict

REQUEST = RequestFeatures(prompt_tokens=1000, expected_output_tokens=101)
DEVICE = DeviceReading(
    model="small",
    context_length=4096,
    slots=4,
    running=1,
    tokens_per_s=80.0,
    prefill_tokens_per_s=500.0,
    token_s=0.02,
)
LINK = LinkReading(round_trip_s=0.05, first_token_s=0.4, token_s=0.01)


def test_both_sides() -> None:
    """1,000 tokens prefilled at 500 a second; 100 more tokens at each side's pace."""
    said = predict(REQUEST, DEVICE, LINK)

    assert said.edge == Prediction(first_token_s=2.0, total_s=pytest.approx(4.0))
    assert said.cloud == Prediction(first_token_s=0.4, total_s=pytest.approx(1.4))


@pytest.mark.parametrize(
    ("changes", "first"),
    [
        ({"running": 3}, 2.0),
        ({"running": 4}, 2.0 + 101 / 80),
        ({"running": 4, "queue_depth": 2}, 2.0 + 3 * 101 / 80),
        ({"running": 4, "queue_depth": 2, "slots": None}, 2.0 + 2 * 101 / 80),
        ({"running": 4, "tokens_per_s": None}, None),
        ({"prefill_tokens_per_s": None}, None),
        ({"prefill_tokens_per_s": 0.0}, None),
    ],
)
def test_who_is_ahead_goes_first(changes: dict[str, object], first: float | None) -> None:
    """With every slot taken, whoever runs or waits ahead gets a whole answer at the device's total rate."""
    said = predict(REQUEST, replace(DEVICE, **changes), LINK).edge

    assert said.first_token_s == (None if first is None else pytest.approx(first))
    assert said.total_s == (None if first is None else pytest.approx(first + 2.0))


UNPLUGGED = replace(DEVICE, on_battery=True, battery_j=40_000.0, work_w=10.0, radio_w=1.0)


@pytest.mark.parametrize(
    ("changes", "edge", "cloud"),
    [
        ({}, 100 * 10 * 4.0 / 2 / 40_000, 100 * 1.4 / 40_000),
        ({"running": 0}, 100 * 10 * 4.0 / 40_000, 100 * 1.4 / 40_000),
        ({"running": 4, "queue_depth": 2}, 100 * 10 * 4.0 / 4 / 40_000, 100 * 1.4 / 40_000),
        ({"work_w": None}, None, 100 * 1.4 / 40_000),
        ({"radio_w": None}, 100 * 10 * 4.0 / 2 / 40_000, None),
        ({"token_s": None}, None, 100 * 1.4 / 40_000),
        ({"battery_j": None}, None, None),
        ({"battery_j": 0.0}, None, None),
        ({"on_battery": None}, None, None),
        ({"on_battery": False}, 0.0, 0.0),
        ({"on_battery": False, "work_w": None, "battery_j": None}, 0.0, 0.0),
    ],
)
def test_what_it_takes_of_the_charge(changes: dict[str, object], edge: float | None, cloud: float | None) -> None:
    """The work's watts for the seconds of this answer's own work, shared with those beside it; the radio's until the
    cloud is done. Plugged in it costs nothing, and what is not known is not said."""
    said = predict(REQUEST, replace(UNPLUGGED, **changes), LINK)

    assert said.edge.battery_percent == (edge if edge is None else pytest.approx(edge))
    assert said.cloud.battery_percent == (cloud if cloud is None else pytest.approx(cloud))


def test_nothing_measured_nothing_said() -> None:
    """A device and a link that have answered nothing yet; and no cloud at all."""
    bare = DeviceReading(model="small", context_length=4096)

    assert predict(REQUEST, bare, LinkReading()) == UNMEASURED
    assert predict(REQUEST, bare, NO_CLOUD) == UNMEASURED


def test_the_clouds_first_token_grows_with_the_prompt() -> None:
    """Where the line is known it counts, but nothing comes before a round trip is over."""
    link = replace(LINK, first_token_base_s=0.1, prompt_token_s=0.001)

    assert predict(REQUEST, DEVICE, link).cloud.first_token_s == pytest.approx(1.1)
    assert (
        predict(replace(REQUEST, prompt_tokens=1), DEVICE, replace(link, round_trip_s=0.5)).cloud.first_token_s == 0.5
    )


TROUBLED = Trouble(loss=0.1, resend_s=0.2, cuts_per_s=0.01, reconnect_s=2.0)


@pytest.mark.parametrize(
    ("trouble", "seconds"),
    [
        (Trouble(), 0.0),
        (Trouble(loss=0.0, resend_s=0.2, cuts_per_s=0.0, reconnect_s=2.0), 0.0),
        (Trouble(loss=0.1), 0.0),
        (Trouble(cuts_per_s=1.0), 0.0),
        (Trouble(loss=0.1, resend_s=0.2), 3 * 0.2 * 0.1 / 0.8),
        (Trouble(loss=0.9, resend_s=0.2), 3 * 0.2 * 0.4 / 0.2),
        (Trouble(cuts_per_s=0.01, reconnect_s=2.0), 2 * (1 - math.exp(-0.05))),
        (TROUBLED, 0.075 + 2 * (1 - math.exp(-0.05))),
    ],
)
def test_what_losses_add(trouble: Trouble, seconds: float) -> None:
    """Nothing where nothing is lost, or nobody knows how long one is waited for; else the waits for three pieces, and
    the risk of a cut in five seconds."""
    assert lateness_s(trouble, 5.0, 3) == pytest.approx(seconds)


@given(st.floats(0, 1), st.floats(0, 10), st.floats(0, 10), st.floats(0, 100), st.floats(0, 1e4))
def test_what_losses_add_is_bounded(loss: float, resend: float, cuts: float, reconnect: float, seconds: float) -> None:
    """Never less than nothing; at most twice each wait, and one new connection."""
    late = lateness_s(Trouble(loss=loss, resend_s=resend, cuts_per_s=cuts, reconnect_s=reconnect), seconds, 2)

    assert -1e-9 <= late <= 4 * resend + reconnect + 1e-6


def test_a_link_that_loses_takes_longer() -> None:
    """Both times of the cloud, and neither of the edge's."""
    clean, lossy = (predict(REQUEST, DEVICE, replace(LINK, trouble=one)) for one in (Trouble(), TROUBLED))

    assert lossy.edge == clean.edge
    assert lossy.cloud.first_token_s == pytest.approx(0.4 + lateness_s(TROUBLED, 0.4, FIRST_PIECES))
    assert lossy.cloud.total_s == pytest.approx(1.4 + lateness_s(TROUBLED, 1.4, ALL_PIECES))


def test_one_token_has_no_further_ones() -> None:
    """The total of an answer of one token is its first."""
    said = predict(replace(REQUEST, expected_output_tokens=1), DEVICE, LINK)

    assert said.edge.total_s == said.edge.first_token_s


def test_a_line_is_found_and_followed() -> None:
    """y = 0.2 + 0.003 x with noise is found; after the world has changed, the new line is."""
    rng, line = random.Random(7), Line()
    for base, slope in ((0.2, 0.003), (1.0, 0.001)):
        for _ in range(200):
            x = rng.uniform(10, 2000)
            line = line.after(x, base + slope * x + rng.gauss(0, 0.01))
        assert line.at(500) == pytest.approx(base + slope * 500, rel=0.05)
        assert line.at(1500) == pytest.approx(base + slope * 1500, rel=0.05)


def test_a_line_through_one_place_is_level() -> None:
    """Prompts of one length say nothing of others; before the first sample nothing is said."""
    line = Line()
    assert line.fit() is None
    for _ in range(10):
        line = line.after(100, 0.5)

    assert line.at(5000) == pytest.approx(0.5)


SAMPLES = st.lists(st.tuples(st.floats(0, 1e5), st.floats(0, 1e4)), min_size=1, max_size=40)


@settings(max_examples=200, deadline=None)
@given(SAMPLES, st.floats(0, 1e5))
def test_no_line_is_absurd(samples: list[tuple[float, float]], x: float) -> None:
    """Whatever was seen: neither base nor slope is negative, and a prediction within the seen is within reason."""
    line = Line()
    for at, seconds in samples:
        line = line.after(at, seconds)
    fit = line.fit()
    assert fit is not None
    base, slope = fit

    assert base >= -1e-6
    assert slope >= 0
    assert (line.at(x) or 0.0) >= -1e-6
    most = max(seconds for _, seconds in samples)
    middle = sum(at for at, _ in samples) / len(samples)
    assert slope == 0 or base + slope * middle < 1e3 * most + 1e-6


def test_a_pace_is_learned() -> None:
    """Tokens slow down as more run together; an answer of a few tokens says nothing of that."""
    pace = Pace()
    for together in (1, 4, 8) * 5:
        pace = pace.after(
            prompt_tokens=100, first_token_s=0.2, tokens=51, total_s=0.2 + 50 * 0.01 * together, together=together
        )
    short = pace.after(prompt_tokens=100, first_token_s=0.2, tokens=2, total_s=9.0, together=1)

    assert pace.token.at(1) == pytest.approx(0.01, rel=0.05)
    assert pace.token.at(8) == pytest.approx(0.08, rel=0.05)
    assert short.token == pace.token
    assert Pace().token.at(1) is None
