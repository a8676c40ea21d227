"""What Linux's files say of power, on trees made up for it; and what a model's work adds to the draw."""

import random
from pathlib import Path

import pytest

from edge_agent.power import MIN_SAMPLES, Draw, battery, counters, processors_w

LAPTOP = {"type": "Battery", "status": "Discharging", "energy_now": "36000000", "power_now": "9500000"}
TABLET = {
    "type": "Battery", "scope": "System", "status": "Discharging",
    "charge_now": "4000000", "voltage_now": "7500000", "current_now": "-1200000",
}  # fmt: skip
MOUSE = {"type": "Battery", "scope": "Device", "status": "Discharging", "energy_now": "1000000", "power_now": "100000"}
MAINS = {"type": "Mains", "online": "1"}


def tree(root: Path, **supplies: dict[str, str]) -> Path:
    """A root folder with these power supplies."""
    (root / "sys/class/power_supply").mkdir(parents=True)
    for name, files in supplies.items():
        folder = root / "sys/class/power_supply" / name
        folder.mkdir()
        for file, text in files.items():
            (folder / file).write_text(f"{text}\n")
    return root


@pytest.mark.parametrize(
    ("supplies", "left_j", "draw_w"),
    [
        ({"BAT0": LAPTOP, "AC": MAINS}, 36 * 3600, 9.5),
        ({"battery": TABLET}, 4 * 7.5 * 3600, 9.0),
        ({"BAT0": LAPTOP, "BAT1": TABLET}, 36 * 3600 + 30 * 3600, 18.5),
        ({"BAT0": LAPTOP | {"status": "Charging"}}, 36 * 3600, None),
        ({"BAT0": LAPTOP | {"status": "Full"}, "BAT1": TABLET}, 66 * 3600, 9.0),
        ({"BAT0": LAPTOP | {"power_now": "0"}}, 36 * 3600, None),
        ({"BAT0": LAPTOP | {"power_now": "9000000000000"}}, 36 * 3600, None),
        ({"BAT0": {"type": "Battery", "status": "Discharging", "capacity": "41"}}, None, None),
        ({"BAT0": LAPTOP | {"energy_now": "unknown", "power_now": ""}}, None, None),
        ({"hid-mouse": MOUSE, "AC": MAINS}, None, None),
        ({}, None, None),
    ],
)
def test_what_batteries_say(
    tmp_path: Path, supplies: dict[str, dict[str, str]], left_j: float | None, draw_w: float | None
) -> None:
    """By energy or by charge and voltage, several added up; what charges, lies or is a mouse's draws nothing."""
    said = battery(tree(tmp_path, **supplies))

    assert (said.left_j, said.draw_w) == (left_j and pytest.approx(left_j), draw_w and pytest.approx(draw_w))


def test_without_such_a_folder(tmp_path: Path) -> None:
    """Another system: the caller hears of it as of any sensor that fails; of counters there are none."""
    with pytest.raises(OSError, match="power_supply"):
        battery(tmp_path)
    assert counters(tmp_path) == {}


def zones(root: Path, **microjoules: int) -> Path:
    """Counters of processors that begin anew after 1,000,000, the memory's and the whole board's beside them."""
    for zone, name in (("intel-rapl:0", "package-0"), ("intel-rapl:1", "package-1"), ("intel-rapl:2", "psys")):
        folder = root / "sys/class/powercap" / zone
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "name").write_text(f"{name}\n")
        (folder / "energy_uj").write_text(f"{microjoules.get(name.replace('-', ''), 7)}\n")
        (folder / "max_energy_range_uj").write_text("999999\n")
    part = root / "sys/class/powercap/intel-rapl:0:0"
    part.mkdir(exist_ok=True)
    (part / "name").write_text("core\n")
    return root


def test_counters_of_energy_become_watts(tmp_path: Path) -> None:
    """Both processors' added up, also over a counter's end; parts and the whole board are not counted twice."""
    before = counters(zones(tmp_path, package0=100_000, package1=900_000))
    after = counters(zones(tmp_path, package0=350_000, package1=150_000, psys=999))

    assert processors_w(before, after, 0.25) == pytest.approx((250_000 + 250_000) * 1e-6 / 0.25)
    assert processors_w(before, before, 0.25) is None
    assert processors_w({}, {}, 0.25) is None
    assert processors_w(before, after, 0.0) is None


def test_counters_that_may_not_be_read(tmp_path: Path) -> None:
    """A file that says nothing is a sensor that fails."""
    (zones(tmp_path) / "sys/class/powercap/intel-rapl:0/energy_uj").write_text("")

    with pytest.raises(ValueError, match="int"):
        counters(tmp_path)


def test_what_work_adds_is_the_difference() -> None:
    """Idle at 6 W, at work at 14 W, with noise; not said before both were seen often enough."""
    rng, draw = random.Random(3), Draw()
    said = []
    for number in range(60):
        at_work = number // 6 % 2 == 1
        watts = (14.0 if at_work else 6.0) + rng.gauss(0, 0.3)
        draw = draw.after(at_work=at_work, processors_w=watts, machine_w=None)
        said.append(draw.added_w)

    assert said[: 6 + MIN_SAMPLES - 1] == [None] * (6 + MIN_SAMPLES - 1)
    assert said[-1] == pytest.approx(8.0, abs=0.6)


def test_a_lagging_gauge_counts_only_in_a_steady_state() -> None:
    """The battery's gauge shows a change one sample late: what it says right after one is passed over."""
    draw, shown = Draw(), 6.0
    for number in range(60):
        at_work = number // 6 % 2 == 1
        draw = draw.after(at_work=at_work, processors_w=None, machine_w=shown)
        shown = 20.0 if at_work else 6.0

    assert draw.added_w == pytest.approx(14.0)
    assert draw.working.count == 25


@pytest.mark.parametrize("at_work", [None, True, False])
def test_one_state_alone_says_nothing(at_work: bool | None) -> None:
    """Nor does work that began or ended within the sample, nor a machine that draws no more at work."""
    draw = Draw()
    for _ in range(3 * MIN_SAMPLES):
        draw = draw.after(at_work=at_work, processors_w=9.0, machine_w=9.0)
    assert draw.added_w is None
    for _ in range(3 * MIN_SAMPLES):
        draw = draw.after(at_work=not at_work, processors_w=9.0, machine_w=None)
    assert draw.added_w is None
