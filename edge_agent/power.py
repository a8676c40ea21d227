"""What the machine draws and what its battery still holds, from Linux's own files; what the local model's work adds.

    /sys/class/power_supply   batteries: the energy left and, while they discharge, the watts of the whole machine
    /sys/class/powercap       the processors' counters of energy (RAPL), where they may be read

No system tells what one program draws. So `Draw` holds what is drawn while the model works against what is drawn while
it does not: where both were seen often enough, the difference is its work's, give or take what other programs did.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

MICRO: Final = 1e-6
HOUR_S: Final = 3600.0
MAX_W: Final = 2000.0
"""What is more is a broken gauge."""
MIN_SAMPLES: Final = 5
"""At work, and as many idle, before the difference is believed."""
GAIN: Final = 0.1

Counters = Mapping[str, tuple[int, int]]
"""Of each processor: microjoules so far, and where its counter begins anew."""


@dataclass(frozen=True, slots=True)
class Battery:
    """All batteries of the machine together; None where they do not say."""

    left_j: float | None = None
    draw_w: float | None = None
    """Of the whole machine, while it runs on them."""


def battery(root: Path = Path("/")) -> Battery:
    """Raises OSError where there is no such folder. A mouse's or a headset's battery does not count."""
    supplies = [one for one in sorted((root / "sys/class/power_supply").iterdir()) if _powers_the_machine(one)]
    left = [joules for one in supplies if (joules := _left_j(one)) is not None]
    draw = [watts for one in supplies if (watts := _draw_w(one)) is not None]
    return Battery(sum(left) if left else None, sum(draw) if draw else None)


def counters(root: Path = Path("/")) -> Counters:
    """Most systems let only root read them. Raises OSError."""
    found = {}
    for zone in sorted((root / "sys/class/powercap").glob("intel-rapl:*")):
        if zone.name.count(":") == 1 and _text(zone, "name").startswith("package"):
            found[zone.name] = int(_text(zone, "energy_uj")), int(_text(zone, "max_energy_range_uj"))
    return found


def processors_w(before: Counters, after: Counters, seconds: float) -> float | None:
    """All processors' draw between two readings; None where there are no counters."""
    if not after or before.keys() != after.keys() or seconds <= 0:
        return None
    spent = sum((after[name][0] - was) % (limit + 1) for name, (was, limit) in before.items())
    return _plausible(spent * MICRO / seconds)


def _powers_the_machine(supply: Path) -> bool:
    return _text(supply, "type") == "Battery" and _text(supply, "scope") != "Device"


def _left_j(supply: Path) -> float | None:
    energy, charge, volts = (_number(supply, name) for name in ("energy_now", "charge_now", "voltage_now"))
    if energy is not None:
        return energy * MICRO * HOUR_S
    return None if charge is None or volts is None else charge * MICRO * volts * MICRO * HOUR_S


def _draw_w(supply: Path) -> float | None:
    if _text(supply, "status") != "Discharging":
        return None
    power, current, volts = (_number(supply, name) for name in ("power_now", "current_now", "voltage_now"))
    if power is not None:
        return _plausible(abs(power) * MICRO)  # some drivers count what leaves as negative
    return None if current is None or volts is None else _plausible(abs(current) * MICRO * volts * MICRO)


def _plausible(watts: float) -> float | None:
    return watts if 0 < watts < MAX_W else None


def _number(folder: Path, name: str) -> int | None:
    try:
        return int(_text(folder, name))
    except ValueError:
        return None


def _text(folder: Path, name: str) -> str:
    """Empty where the driver has no such file, or does not answer now."""
    try:
        return (folder / name).read_text("ascii", "replace").strip()
    except OSError:
        return ""


@dataclass(frozen=True, slots=True)
class Mean:
    """Of so many samples, the latest counting most."""

    count: int = 0
    value: float = 0.0

    def after(self, sample: float) -> "Mean":
        count = self.count + 1
        return Mean(count, self.value + max(GAIN, 1 / count) * (sample - self.value))


@dataclass(frozen=True, slots=True)
class Draw:
    """In watts, while the model works and while it does not."""

    working: Mean = Mean()
    idle: Mean = Mean()
    was: bool | None = None
    """Whether it worked at the last sample; None if it began or ended then."""

    def after(self, *, at_work: bool | None, processors_w: float | None, machine_w: float | None) -> "Draw":
        """`at_work` None: for a part of the time. The machine's gauge lags some seconds behind: it counts only where
        nothing has changed since the last sample. It is not mixed with the processors' counters."""
        now = replace(self, was=at_work)
        watts = processors_w if processors_w is not None else machine_w if at_work == self.was else None
        if watts is None or at_work is None:
            return now
        if at_work:
            return replace(now, working=self.working.after(watts))
        return replace(now, idle=self.idle.after(watts))

    @property
    def added_w(self) -> float | None:
        """What its work adds; None until both were seen often enough, or where no difference shows."""
        seen = min(self.working.count, self.idle.count) >= MIN_SAMPLES
        return self.working.value - self.idle.value if seen and self.working.value > self.idle.value else None
