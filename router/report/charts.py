"""Charts as SVG, by hand: axes, lines, dots and marked points. A style sheet gives the colours by class.

A chart's text alternative is its `label` and the table that stands beside it.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from router.report.markup import Markup, tag

WIDTH, HEIGHT = 520, 320
LEFT, RIGHT, TOP, BOTTOM = 84, 30, 14, 50
TICKS: Final = 5

Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Axis:
    """`place` maps a value to 0 (low end) to 1; `ticks` are values with what is written at them."""

    label: str
    place: Callable[[float], float]
    ticks: tuple[tuple[float, str], ...]


@dataclass(frozen=True, slots=True)
class Line:
    """`kind` is its class in the style sheet."""

    kind: str
    points: Sequence[Point]


@dataclass(frozen=True, slots=True)
class Dot:
    at: Point
    kind: str
    radius: float = 4.0
    name: str = ""


def linear(label: str, low: float, high: float, said: Callable[[float], str]) -> Axis:
    """From `low` to `high`, widened to the ticks around them, which are 1, 2 or 5 times a power of ten apart."""
    step = _step((high - low) / TICKS or 1.0)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    last = max(last, first + 1)
    ticks = tuple((number * step, said(number * step)) for number in range(first, last + 1))
    start, span = first * step, (last - first) * step
    return Axis(label, lambda value: (value - start) / span, ticks)


def logarithmic(label: str, low: float, high: float, said: Callable[[float], str]) -> Axis:
    """Over whole powers of ten; both ends are above zero."""
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    last = max(last, first + 1)
    ticks = tuple((10.0**number, said(10.0**number)) for number in range(first, last + 1))
    return Axis(label, lambda value: (math.log10(value) - first) / (last - first), ticks)


def chart(label: str, x: Axis, y: Axis, lines: Sequence[Line] = (), dots: Sequence[Dot] = ()) -> Markup:
    """`label` says what it shows to whoever does not see it."""

    def across(value: float) -> float:
        return LEFT + _inside(x.place(value)) * (WIDTH - LEFT - RIGHT)

    def up(value: float) -> float:
        return HEIGHT - BOTTOM - _inside(y.place(value)) * (HEIGHT - BOTTOM - TOP)

    def path(points: Sequence[Point]) -> str:
        return "".join(f"{'L' if at else 'M'}{across(a):.1f} {up(b):.1f}" for at, (a, b) in enumerate(points))

    def drawn() -> Iterator[Markup]:
        for value, said in y.ticks:
            yield tag("line", class_="axis", x1=LEFT, x2=WIDTH - RIGHT, y1=up(value), y2=up(value))
            yield tag("text", said, x=LEFT - 6, y=up(value) + 4, text_anchor="end")
        for value, said in x.ticks:
            yield tag("text", said, x=across(value), y=HEIGHT - BOTTOM + 18, text_anchor="middle")
        yield tag("text", x.label, x=(LEFT + WIDTH - RIGHT) / 2, y=HEIGHT - 8, text_anchor="middle")
        middle = (TOP + HEIGHT - BOTTOM) / 2
        turned = f"rotate(-90 14 {middle:g})"
        yield tag("text", y.label, x=14, y=middle, text_anchor="middle", transform=turned)
        for line in lines:
            yield tag("path", class_=f"line {line.kind}", d=path(line.points))
        for dot in dots:
            name = tag("title", dot.name) if dot.name else None
            yield tag("circle", name, class_=f"dot {dot.kind}", cx=across(dot.at[0]), cy=up(dot.at[1]), r=dot.radius)

    return tag("svg", drawn(), viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=label)


def bar(share: float, kind: str) -> Markup:
    """A bar for a cell of a table, whose other cells say the number."""
    length = 100 * _inside(share)
    return tag(
        "svg",
        tag("rect", class_="ground", x=0, y=0, width=100, height=8),
        tag("rect", class_=f"bar {kind}", x=0, y=0, width=length, height=8),
        class_="meter",
        viewBox="0 0 100 8",
        preserveAspectRatio="none",
        aria_hidden="true",
    )


def _step(width: float) -> float:
    """The least 1, 2 or 5 times a power of ten that is no smaller."""
    power = 10.0 ** math.floor(math.log10(width))
    return next(times * power for times in (1, 2, 5, 10) if times * power >= width * (1 - 1e-9))


def _inside(place: float) -> float:
    return min(max(place, 0.0), 1.0)
