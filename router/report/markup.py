"""HTML that is built, never pasted together: whatever a name holds, it stays text."""

import html
from collections.abc import Iterable, Iterator
from typing import Final, TypeAlias

VOID: Final = frozenset({"meta"})


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


Child: TypeAlias = "str | Iterable[Child] | None"
Attribute = str | float | bool | None


def tag(name: str, *children: Child, **attributes: Attribute) -> Markup:
    """`tag("td", "a < b", class_="number")`. In an attribute's name an underscore is a hyphen, and one at the end is
    nothing; None and False leave it out."""
    said = "".join(
        f" {key.rstrip('_').replace('_', '-')}" + ("" if value is True else f'="{_quoted(value)}"')
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    if name in VOID:
        return Markup(f"<{name}{said}>")
    return Markup(f"<{name}{said}>{''.join(_flat(children))}</{name}>")


def _quoted(value: Attribute) -> str:
    return html.escape(f"{value:.6g}" if isinstance(value, float) else str(value), quote=True)


def _flat(children: Child) -> Iterator[str]:
    if children is None:
        return
    if isinstance(children, Markup):
        yield children
    elif isinstance(children, str):
        yield html.escape(children, quote=False)
    else:
        for child in children:
            yield from _flat(child)
