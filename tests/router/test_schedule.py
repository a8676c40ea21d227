"""Schedules: by the device's clock, or by that of a time zone, also on the days when it is put forward or back."""

from datetime import UTC, datetime

import pytest

from router.decide import decide
from router.features import DeviceReading, LinkReading, RequestFeatures
from router.policy import InvalidPolicy, parse

LINK = LinkReading(model="large", context_length=8192)
NIGHTS = (
    "mode: prefer_edge\nrules: [{name: night, when: 'weekday == \"sun\" && hour >= 2 && hour < 3', target: cloud}]\n"
)


def target(policy: str, at: str | None, hour: float | None = None, weekday: str | None = None) -> str:
    seconds = None if at is None else datetime.fromisoformat(at).replace(tzinfo=UTC).timestamp()
    device = DeviceReading(model="small", context_length=4096, at=seconds, hour=hour, weekday=weekday)
    return decide(RequestFeatures(prompt_tokens=9), parse(policy), device=device, link=LINK).target


@pytest.mark.parametrize(
    ("at", "wanted"),
    [
        ("2026-06-07T00:30", "cloud"),  # summer: two hours ahead
        ("2026-06-06T23:59", "edge"),
        ("2026-01-04T01:30", "cloud"),  # winter: one hour
        ("2026-03-29T00:59", "edge"),  # 1:59, and a minute later it is three
        ("2026-03-29T01:00", "edge"),
        ("2026-10-25T00:30", "cloud"),  # half past two
        ("2026-10-25T01:30", "cloud"),  # and again
        ("2026-10-25T02:00", "edge"),
    ],
)
def test_a_time_zone_with_daylight_saving(at: str, wanted: str) -> None:
    """Berlin's clock decides, wherever the device is; an hour may be missing or come twice."""
    assert target(NIGHTS + "timezone: Europe/Berlin", at, hour=12.0, weekday="mon") == wanted


def test_without_a_zone_the_devices_clock_decides() -> None:
    """And where the time was not recorded, a zone's hour is unknown: the rule does not hold."""
    assert target(NIGHTS, "2026-06-07T12:00", hour=2.5, weekday="sun") == "cloud"
    assert target(NIGHTS, "2026-06-07T00:30", hour=12.0, weekday="sun") == "edge"
    assert target(NIGHTS + "timezone: Europe/Berlin", None, hour=2.5, weekday="sun") == "edge"


def test_halves_of_an_hour() -> None:
    """Kathmandu is five and three quarter hours ahead."""
    rule = "mode: prefer_edge\ntimezone: Asia/Kathmandu\nrules: [{name: a, when: {hour: 5.75}, target: cloud}]"
    assert target(rule, "2026-06-07T00:00") == "cloud"


@pytest.mark.parametrize("name", ["Europe/Atlantis", "../../etc/passwd", "Europe", "", "mars", "a/b/c/d"])
def test_a_zone_that_does_not_exist_is_named(name: str) -> None:
    with pytest.raises(InvalidPolicy, match="timezone: ") as caught:
        parse(f"mode: prefer_edge\ntimezone: '{name}'")
    assert (caught.value.line, caught.value.field) == (2, "timezone")
