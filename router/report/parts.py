"""What the sections are made of: tables, figures with their legends, and how numbers are written."""

from collections.abc import Mapping, Sequence
from typing import Final

from router.money import spelled
from router.report.markup import Child, Markup, tag

LISTED: Final = 25
NONE: Final = "\u2013"
THIN: Final = "\u202f"

Cells = Sequence[Child]


def section(name: str, title: str, *children: Child) -> Markup:
    """`name` is where links to it lead."""
    return tag("section", tag("h2", title), children, id=name)


def table(caption: str, columns: Sequence[str], rows: Sequence[Cells], *, words: int = 1) -> Markup:
    """The first column is the row's head, those up to `words` hold bars, the others numbers; of many rows the first are
    listed, the rest counted. Classes and labels are those of the console's tables."""
    head = tag("tr", (tag("th", name, scope="col", class_=_kind(at, words)) for at, name in enumerate(columns)))
    body = [_row(columns, cells, words) for cells in rows[:LISTED]]
    if len(rows) > LISTED:
        body.append(tag("tr", tag("td", f"and {len(rows) - LISTED} more", colspan=len(columns), class_="faint")))
    if not rows:
        body.append(tag("tr", tag("td", "none", colspan=len(columns), class_="faint")))
    whole = tag("table", tag("caption", caption), tag("thead", head), tag("tbody", body))
    return tag("div", whole, class_="scroll", role="region", aria_label=caption, tabindex="0")


def _row(columns: Sequence[str], cells: Cells, words: int) -> Markup:
    first = tag("th", cells[0], scope="row", class_=_kind(0, words))
    rest = (
        tag("td", cell, class_=_kind(at, words), data_label=columns[at] or None, data_empty=cell == NONE)
        for at, cell in enumerate(cells)
        if at
    )
    return tag("tr", first, rest)


def _kind(at: int, words: int) -> str:
    return "head" if at == 0 else "meters" if at < words else "number"


def figure(drawing: Markup, caption: str, legend: Sequence[tuple[str, str]] = ()) -> Markup:
    """`legend`: a class of the chart, and what it stands for."""
    keys = [tag("li", tag("span", class_=f"key {kind}", aria_hidden="true"), said) for kind, said in legend]
    return tag("figure", drawing, tag("figcaption", caption, tag("ul", keys, class_="legend") if keys else None))


def facts(rows: Mapping[str, Child]) -> Markup:
    return tag("dl", ((tag("dt", name), tag("dd", value)) for name, value in rows.items()))


def percent(share: float | None, digits: int = 1) -> str:
    return NONE if share is None else f"{100 * share:.{digits}f}{THIN}%"


def points(share: float) -> str:
    """A difference of shares."""
    return f"{100 * share:+.1f}"


def count(number: int) -> str:
    return f"{number:,}"


def ratio(number: float | None) -> str:
    return NONE if number is None else f"{number:.3f}"


def seconds(time: float | None) -> str:
    if time is None:
        return NONE
    return f"{time * 1000:.3g}{THIN}ms" if time < 1 else f"{time:.3g}{THIN}s" if time < 1000 else f"{time:.0f}{THIN}s"


def money(cost: Mapping[str, float]) -> str:
    return ", ".join(f"{spelled(amount)} {currency}" for currency, amount in sorted(cost.items())) or NONE
