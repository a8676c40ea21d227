"""What is known of this device: the local runtime's own numbers, and the sensors of the machine it runs on.

Reading never blocks: the sensors are sampled by a thread every few seconds, and a reader gets the last sample.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import psutil
import structlog

from edge_agent.backends.base import LocalBackend
from router.conditions import WEEKDAYS
from router.features import DeviceReading

SAMPLE_S = 5.0
CPU_WINDOW_S = 0.25

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """One sample; None for what this machine does not have or would not say. Percent, bytes."""

    cpu_percent: float | None = None
    memory_available: int | None = None
    battery_percent: float | None = None
    on_battery: bool | None = None


def sample() -> Machine:
    """Ask the operating system, which takes CPU_WINDOW_S and may take longer; a sensor that fails is left out."""
    battery = _tried(psutil.sensors_battery) if hasattr(psutil, "sensors_battery") else None
    memory = _tried(psutil.virtual_memory)
    return Machine(
        cpu_percent=_tried(lambda: psutil.cpu_percent(CPU_WINDOW_S)),
        memory_available=memory.available if memory else None,
        battery_percent=float(battery.percent) if battery else None,
        on_battery=not battery.power_plugged if battery and battery.power_plugged is not None else None,
    )


class Device:
    """Puts the runtime's reading and the latest sample together."""

    def __init__(
        self,
        local: LocalBackend,
        *,
        sensors: Callable[[], Machine] = sample,
        local_time: Callable[[], time.struct_time] = time.localtime,
    ) -> None:
        self._local = local
        self._sensors = sensors
        self._local_time = local_time
        self.machine = Machine()

    async def refresh(self) -> None:
        self.machine = await asyncio.to_thread(self._sensors)

    async def watch(self, every: float = SAMPLE_S) -> None:
        """Sample for ever; ends only by being cancelled."""
        while True:
            await self.refresh()
            await asyncio.sleep(every)

    def reading(self) -> DeviceReading:
        card, runtime, now = self._local.model_card(), self._local.reading(), self._local_time()
        return DeviceReading(
            model=card.id,
            context_length=card.context_length,
            available=runtime.available,
            queue_depth=runtime.queue_depth,
            queue_capacity=runtime.queue_capacity,
            running=runtime.running,
            tokens_per_s=runtime.tokens_per_s,
            prefill_tokens_per_s=runtime.prefill_tokens_per_s,
            battery_percent=self.machine.battery_percent,
            on_battery=self.machine.on_battery,
            cpu_percent=self.machine.cpu_percent,
            weekday=WEEKDAYS[now.tm_wday],
            hour=now.tm_hour + now.tm_min / 60,
        )


def _tried(sensor: Callable[[], T]) -> T | None:
    """Sensors read what drivers and containers put into /sys and /proc, and fail in many ways."""
    try:
        return sensor()
    except (OSError, RuntimeError, ValueError, KeyError, AttributeError, NotImplementedError, psutil.Error) as error:
        structlog.get_logger("causeway.device").debug("sensor", exception=type(error).__name__)
        return None
