"""What is known of this device: the local runtime's own numbers, and the sensors of the machine it runs on.

Reading never blocks: the sensors are sampled by a thread every few seconds, and a reader gets the last sample.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import psutil
import structlog

from edge_agent.backends.base import LocalModels
from edge_agent.network import online
from edge_agent.power import HOUR_S, Draw, battery, counters, processors_w
from edge_agent.settings import EdgeSettings
from router.conditions import WEEKDAYS
from router.features import DeviceReading
from router.predict import Pace

SAMPLE_S = 5.0
CPU_WINDOW_S = 0.25
PROCESSOR_SENSORS = frozenset(
    {"coretemp", "k10temp", "zenpower", "cpu_thermal", "cpu-thermal", "soc_thermal", "acpitz"}
)
MAX_DEGREES = 150.0
"""What is more is a broken sensor."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """One sample; None for what this machine does not have or would not say. Percent, bytes, degrees Celsius."""

    cpu_percent: float | None = None
    """Of all processors together, whoever uses them."""
    cpu_percent_others: float | None = None
    """The same less what this process and its children used: a model at work is no reason to send work away."""
    memory_available: int | None = None
    battery_percent: float | None = None
    on_battery: bool | None = None
    battery_j: float | None = None
    processors_w: float | None = None
    machine_w: float | None = None
    """What the whole machine draws from its battery."""
    temperature_c: float | None = None
    online: bool | None = None


def sample() -> Machine:
    """Ask the operating system, which takes CPU_WINDOW_S and may take longer; a sensor that fails is left out."""
    charge = _tried(psutil.sensors_battery) if hasattr(psutil, "sensors_battery") else None
    power, memory, before, began = _tried(battery), _tried(psutil.virtual_memory), _tried(counters), time.perf_counter()
    load, after, seconds = _tried(_load), _tried(counters), time.perf_counter() - began
    return Machine(
        cpu_percent=load[0] if load else None,
        cpu_percent_others=load[1] if load else None,
        memory_available=memory.available if memory else None,
        battery_percent=float(charge.percent) if charge else None,
        on_battery=not charge.power_plugged if charge and charge.power_plugged is not None else None,
        battery_j=power.left_j if power else None,
        processors_w=processors_w(before, after, seconds) if before and after else None,
        machine_w=power.draw_w if power else None,
        temperature_c=_tried(_temperature) if hasattr(psutil, "sensors_temperatures") else None,
        online=_tried(online),
    )


def _load() -> tuple[float, float]:
    """Of all, and of all but us, over CPU_WINDOW_S."""
    began, ours = time.perf_counter(), _own_seconds()
    everybody = psutil.cpu_percent(CPU_WINDOW_S)
    used = (_own_seconds() - ours) / (time.perf_counter() - began) / (psutil.cpu_count() or 1)
    return everybody, max(0.0, everybody - max(0.0, 100 * used))


def _own_seconds() -> float:
    """Of processor time that this process and its children have used."""
    this = psutil.Process()
    seconds = 0.0
    for process in (this, *this.children(recursive=True)):
        with contextlib.suppress(psutil.Error):  # a child that has just ended
            times = process.cpu_times()
            seconds += times.user + times.system
    return seconds


def _temperature() -> float | None:
    """The hottest of the processor's sensors, or of all where none is known to be the processor's."""
    groups = psutil.sensors_temperatures()
    chosen = [name for name in groups if name in PROCESSOR_SENSORS] or list(groups)
    degrees = [sensor.current for name in chosen for sensor in groups[name] if 0 < sensor.current < MAX_DEGREES]
    return max(degrees, default=None)


class Device:
    """Puts the runtime's reading and the latest sample together; what no sensor tells, the user may have stated."""

    def __init__(
        self,
        local: LocalModels,
        *,
        sensors: Callable[[], Machine] = sample,
        pace: Callable[[str], Pace] = lambda _: Pace(),
        stated: Callable[[], EdgeSettings] = EdgeSettings,
        local_time: Callable[[], time.struct_time] = time.localtime,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._pace = pace
        self._stated = stated
        self._local = local
        self._sensors = sensors
        self._local_time = local_time
        self._clock = clock
        self.machine = Machine()
        self.draw = Draw()

    async def refresh(self) -> None:
        before = self._at_work()
        self.machine = await asyncio.to_thread(self._sensors)
        self.draw = self.draw.after(
            at_work=before if before == self._at_work() else None,
            processors_w=self.machine.processors_w,
            machine_w=self.machine.machine_w,
        )

    def _at_work(self) -> bool:
        return any(model.running for model in self._local.loaded())

    async def watch(self, every: float = SAMPLE_S) -> None:
        """Sample for ever; ends only by being cancelled."""
        while True:
            await self.refresh()
            await asyncio.sleep(every)

    def reading(self, model: str = "auto") -> DeviceReading:
        """As a request for this model would find it."""
        local = self._local.named(model)
        card, runtime, now, stated = local.model_card(), local.reading(), self._local_time(), self._stated()
        return DeviceReading(
            model=card.id,
            context_length=card.context_length,
            available=runtime.available,
            queue_depth=runtime.queue_depth,
            queue_capacity=runtime.queue_capacity,
            running=runtime.running,
            tokens_per_s=runtime.tokens_per_s,
            prefill_tokens_per_s=runtime.prefill_tokens_per_s,
            slots=runtime.slots,
            token_s=self._pace(card.id).token.at(min(runtime.running + 1, max(1, runtime.slots))),
            memory_available=self.machine.memory_available,
            battery_percent=self.machine.battery_percent,
            on_battery=self.machine.on_battery,
            battery_j=self._battery_j(stated.battery_wh),
            work_w=self.draw.added_w or stated.edge_watts,
            radio_w=stated.radio_watts,
            cpu_percent=self.machine.cpu_percent,
            cpu_percent_others=self.machine.cpu_percent_others,
            temperature_c=self.machine.temperature_c,
            online=self.machine.online,
            metered=stated.metered,
            at=self._clock(),
            weekday=WEEKDAYS[now.tm_wday],
            hour=now.tm_hour + now.tm_min / 60,
        )

    def _battery_j(self, full_wh: float | None) -> float | None:
        """What is left, by its own gauge, else by its percentage of what it was said to hold."""
        machine = self.machine
        if machine.battery_j is not None or full_wh is None or machine.battery_percent is None:
            return machine.battery_j
        return full_wh * HOUR_S * machine.battery_percent / 100


def _tried(sensor: Callable[[], T]) -> T | None:
    """Sensors read what drivers and containers put into /sys and /proc, and fail in many ways."""
    try:
        return sensor()
    except (OSError, RuntimeError, ValueError, KeyError, AttributeError, NotImplementedError, psutil.Error) as error:
        structlog.get_logger("causeway.device").debug("sensor", exception=type(error).__name__)
        return None
