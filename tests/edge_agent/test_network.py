import sys
from pathlib import Path

import pytest

from edge_agent.network import online

HEADER = "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n"
DEFAULT = "eth0\t00000000\t0101A8C0\t0003\t0\t0\t100\t00000000\t0\t0\t0\n"
LOCAL = "eth0\t0001A8C0\t00000000\t0001\t0\t0\t100\t00FFFFFF\t0\t0\t0\n"
DOWN = DEFAULT.replace("0003", "0002")
HALF = "wg0\t00000000\t00000000\t0001\t0\t0\t0\t00000080\t0\t0\t0\n"
ZERO = "0" * 32
DEFAULT_6 = f"{ZERO} 00 {ZERO} 00 fe800000000000000000000000000001 00000400 00000001 00000000 00000003 eth0\n"
UNREACHABLE_6 = f"{ZERO} 00 {ZERO} 00 {ZERO} ffffffff 00000001 00000000 00200200 lo\n"


def machine(root: Path, v4: str | None, v6: str | None = None, state: str | None = "up") -> Path:
    net, interface = root / "proc/net", root / "sys/class/net/eth0"
    net.mkdir(parents=True)
    interface.mkdir(parents=True)
    if v4 is not None:
        (net / "route").write_text(v4)
    if v6 is not None:
        (net / "ipv6_route").write_text(v6)
    if state is not None:
        (interface / "operstate").write_text(f"{state}\n")
    return root


@pytest.mark.skipif(sys.platform != "linux", reason="Linux's tables")
@pytest.mark.parametrize(
    ("v4", "v6", "state", "expected"),
    [
        (HEADER + LOCAL + DEFAULT, None, "up", True),
        (HEADER + DEFAULT, None, "unknown", True),
        (HEADER + DEFAULT, None, "down", False),
        (HEADER + DEFAULT, None, "dormant", False),
        (HEADER + DEFAULT, None, None, False),
        (HEADER + LOCAL, None, "up", False),
        (HEADER + DOWN, None, "up", False),
        (HEADER + HALF, None, "up", False),
        (HEADER, UNREACHABLE_6, "up", False),
        (HEADER, DEFAULT_6, "up", True),
        (HEADER, DEFAULT_6, "down", False),
        ("", "", "up", False),
    ],
)
def test_a_default_route_over_a_working_interface(
    tmp_path: Path, v4: str, v6: str | None, state: str | None, expected: bool
) -> None:
    """A route out, up, through an interface that works: by IPv4 or IPv6; anything less is offline."""
    assert online(machine(tmp_path, v4, v6, state)) is expected


@pytest.mark.skipif(sys.platform != "linux", reason="Linux's tables")
@pytest.mark.parametrize("table", [None, HEADER + "eth0\tnot hexadecimal\tx\t0003\t0\t0\t0\t00000000\n"])
def test_a_table_that_cannot_be_read_is_an_error(tmp_path: Path, table: str | None) -> None:
    """Which the sensors' caller takes for unknown: never for offline."""
    with pytest.raises((OSError, ValueError)):
        online(machine(tmp_path, table))


def test_other_systems_do_not_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unknown, not a guess."""
    monkeypatch.setattr(sys, "platform", "darwin")
    assert online(machine(tmp_path, HEADER + DEFAULT)) is None
