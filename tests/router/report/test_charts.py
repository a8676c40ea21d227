"""router.report.charts and markup: what is drawn is where it belongs, and what is written stays text."""

import re
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.report.charts import HEIGHT, WIDTH, Dot, Line, bar, chart, linear, logarithmic
from router.report.markup import Markup, tag

HOSTILE = "<script>alert('x')</script>\" onload=\"x & y"
FINITE = st.floats(-1e9, 1e9).map(lambda value: 0.0 if abs(value) < 1e-6 else value)


def plain(value: float) -> str:
    return f"{value:g}"


@given(st.tuples(FINITE, FINITE))
@settings(deadline=None)
def test_an_axis_holds_its_range_with_few_round_ticks(ends: tuple[float, float]) -> None:
    """Both ends are on it, ticks rise evenly from 0 to 1, and there are neither too few nor too many."""
    low, high = sorted(ends)
    axis = linear("x", low, high, plain)

    assert -1e-6 <= axis.place(low) <= axis.place(high) <= 1 + 1e-6
    assert 2 <= len(axis.ticks) <= 9
    assert axis.place(axis.ticks[0][0]) == pytest.approx(0, abs=1e-6)
    assert axis.place(axis.ticks[-1][0]) == pytest.approx(1, abs=1e-6)


@given(st.tuples(st.floats(1e-6, 1e6), st.floats(1e-6, 1e6)))
def test_a_logarithmic_axis_spans_whole_powers(ends: tuple[float, float]) -> None:
    """Ticks are powers of ten, and both ends lie among them."""
    low, high = sorted(ends)
    axis = logarithmic("x", low, high, plain)

    assert axis.ticks[0][0] <= low * (1 + 1e-6)
    assert axis.ticks[-1][0] >= high * (1 - 1e-6)
    assert all(after[0] == pytest.approx(10 * one[0]) for one, after in zip(axis.ticks, axis.ticks[1:], strict=False))


@given(st.lists(st.tuples(st.floats(-5, 5), st.floats(-5, 5)), min_size=1, max_size=9))
@settings(max_examples=40, deadline=None)
def test_nothing_is_drawn_outside_the_picture(points: list[tuple[float, float]]) -> None:
    """Well-formed, and every point inside, whatever the values are."""
    unit = linear("share", 0, 1, plain)
    drawn = chart("label", unit, unit, [Line("router", points)], [Dot(point, "aim") for point in points])
    root = ElementTree.fromstring(drawn)

    for circle in root.iter("circle"):
        assert 0 < float(circle.get("cx", "")) < WIDTH
        assert 0 < float(circle.get("cy", "")) < HEIGHT
    numbers = re.findall(r"[ML]([\d.]+) ([\d.]+)", next(root.iter("path")).get("d", ""))
    assert len(numbers) == len(points)
    assert all(0 < float(x) < WIDTH and 0 < float(y) < HEIGHT for x, y in numbers)


def test_more_is_further_right_and_higher() -> None:
    """The picture has the order of the values."""
    unit = linear("share", 0, 1, plain)
    root = ElementTree.fromstring(chart("c", unit, unit, [], [Dot((0.2, 0.3), "a"), Dot((0.8, 0.9), "b")]))
    first, second = ([float(one.get(name, "")) for name in ("cx", "cy")] for one in root.iter("circle"))

    assert first[0] < second[0]
    assert first[1] > second[1]


def test_a_bar_is_as_long_as_its_share() -> None:
    """And never longer than the whole."""
    lengths = [re.findall(r'width="([\d.]+)"', bar(share, "edge"))[1] for share in (0, 0.25, 3)]
    assert lengths == ["0", "25", "100"]


def test_text_stays_text() -> None:
    """In an element and in an attribute; only what is markup already is left as it is."""
    made = tag(
        "td", HOSTILE, [None, Markup("<b>bold</b>"), ["more"]], title=HOSTILE, class_="number", hidden=False, open=True
    )
    found = ElementTree.fromstring(made.replace(" open", ""))

    assert found.text == HOSTILE
    assert found.get("title") == HOSTILE
    assert [child.tag for child in found] == ["b"]
    assert 'class="number"' in made
    assert "hidden" not in made
    assert " open>" in made
