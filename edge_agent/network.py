"""Whether this device has any network at all, from the kernel's own tables: nothing is asked of anybody."""

import sys
from pathlib import Path

ROUTE_UP = 0x1
WORKING = frozenset({"up", "unknown"})  # tunnels and virtual interfaces do not say


def online(root: Path = Path("/")) -> bool | None:
    """True if some default route leads through an interface that works; None where the system does not tell. A network
    that leads nowhere looks like any other: what the cloud's connection is worth is for the link to say."""
    if sys.platform != "linux":
        return None
    interfaces = [*_routes_v4(root / "proc/net/route"), *_routes_v6(root / "proc/net/ipv6_route")]
    return any(_works(root / "sys/class/net" / name) for name in interfaces)


def _routes_v4(table: Path) -> list[str]:
    """Interfaces of the default routes. Raises OSError where there is no table."""
    rows = [line.split() for line in table.read_text("ascii", "replace").splitlines()[1:]]
    return [row[0] for row in rows if len(row) > 7 and int(row[1], 16) == int(row[7], 16) == 0 and _up(row[3])]


def _routes_v6(table: Path) -> list[str]:
    try:
        rows = [line.split() for line in table.read_text("ascii", "replace").splitlines()]
    except FileNotFoundError:  # a kernel without IPv6
        return []
    return [row[9] for row in rows if len(row) > 9 and row[1] == "00" and row[9] != "lo" and _up(row[8])]


def _up(flags: str) -> bool:
    return bool(int(flags, 16) & ROUTE_UP)


def _works(interface: Path) -> bool:
    try:
        return (interface / "operstate").read_text("ascii", "replace").strip() in WORKING
    except OSError:
        return False
