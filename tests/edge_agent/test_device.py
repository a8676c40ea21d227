import subprocess
import sys
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import psutil
import pytest
from edge_sides import Local
from fakes import EchoAnswer

from edge_agent import device as module
from edge_agent.device import Device, Machine, sample
from edge_agent.power import MIN_SAMPLES
from edge_agent.settings import EdgeSettings


def test_a_real_sample_is_plausible() -> None:
    """On this very machine: a load in percent, some memory, a battery or none."""
    machine = sample()

    assert machine.cpu_percent is not None
    assert 0 <= machine.cpu_percent <= 100
    assert machine.memory_available is not None
    assert machine.memory_available > 0
    assert machine.battery_percent is None or 0 <= machine.battery_percent <= 100


@pytest.mark.parametrize("plugged", [True, False, None])
def test_battery_states(monkeypatch: pytest.MonkeyPatch, plugged: bool | None) -> None:
    """Plugged in, on battery, or a battery that does not say."""
    battery = SimpleNamespace(percent=41, power_plugged=plugged)
    monkeypatch.setattr(psutil, "sensors_battery", lambda: battery, raising=False)

    machine = sample()

    assert machine.battery_percent == 41.0
    assert machine.on_battery is (None if plugged is None else not plugged)


def test_the_load_of_others_leaves_out_our_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """One processor at work for us for the whole window: it shows in the load, and not in that of others."""
    clock, ours, one = [100.0], [7.0], 100.0 / (psutil.cpu_count() or 1)

    def cpu_percent(window: float) -> float:
        clock[0] += window
        ours[0] += window
        return one + 3.0

    monkeypatch.setattr(psutil, "cpu_percent", cpu_percent)
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(module, "_own_seconds", lambda: ours[0])
    machine = sample()

    assert machine.cpu_percent == pytest.approx(one + 3.0)
    assert machine.cpu_percent_others == pytest.approx(3.0)


def test_our_own_seconds_are_those_of_our_children_too() -> None:
    """What this process and one that it started have computed since."""
    child = "import sys, time\nwhile time.process_time() < 0.3: pass\nprint('done', flush=True)\nsys.stdin.read()"
    before = module._own_seconds()
    with subprocess.Popen([sys.executable, "-c", child], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as started:
        assert started.stdout is not None
        assert started.stdout.readline() == b"done\n"
        end = time.process_time() + 0.1
        while time.process_time() < end:
            pass
        used = module._own_seconds() - before
        started.communicate()

    assert used >= 0.35


@pytest.mark.parametrize(
    ("sensors", "degrees"),
    [
        ({"coretemp": [51.0, 63.5], "nvme": [80.0]}, 63.5),
        ({"nvme": [41.0], "iwlwifi": [44.0]}, 44.0),
        ({"k10temp": [0.0, -12.0, 255.0, 70.0]}, 70.0),
        ({"k10temp": [0.0]}, None),
        ({}, None),
    ],
)
def test_the_hottest_of_the_processor(
    monkeypatch: pytest.MonkeyPatch, sensors: dict[str, list[float]], degrees: float | None
) -> None:
    """Its own sensors where they are known, any others where not; broken ones are left out."""
    told = {name: [SimpleNamespace(current=value) for value in values] for name, values in sensors.items()}
    monkeypatch.setattr(psutil, "sensors_temperatures", lambda: told, raising=False)

    assert sample().temperature_c == degrees


@pytest.mark.parametrize("error", [OSError("no /sys"), KeyError("POWER_SUPPLY"), psutil.AccessDenied()])
def test_a_failing_sensor_is_left_out(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """Nothing a sensor raises gets further than its own value."""

    def fail(*_: object) -> None:
        raise error

    for name in ("sensors_battery", "sensors_temperatures", "virtual_memory", "cpu_percent"):
        monkeypatch.setattr(psutil, name, fail, raising=False)
    monkeypatch.setattr(module, "online", fail)

    for name in ("battery", "counters"):
        monkeypatch.setattr(module, name, fail)
    assert sample() == Machine()


async def test_reading_joins_runtime_and_machine_and_never_senses() -> None:
    """Sensors run on another thread, when refreshed; a reading is the last sample and the runtime's present numbers."""
    threads: list[str] = []

    def sensors() -> Machine:
        threads.append(threading.current_thread().name)
        return Machine(cpu_percent=12.0, battery_percent=80.0, on_battery=True)

    local = Local(EchoAnswer(), context=1024)
    device = Device(local, sensors=sensors)
    before = device.reading()
    await device.refresh()
    local.runtime.queue_depth, local.runtime.tokens_per_s = 3, 77.0
    after = device.reading()

    assert (before.cpu_percent, before.battery_percent) == (None, None)
    assert (after.model, after.context_length, after.queue_depth, after.tokens_per_s) == ("small", 1024, 3, 77.0)
    assert (after.cpu_percent, after.battery_percent, after.on_battery) == (12.0, 80.0, True)
    assert len(threads) == 1
    assert threads[0] != threading.main_thread().name


async def test_what_work_draws_is_measured_else_stated() -> None:
    """The setting counts until both states were seen; work that begins within a sample is in neither."""
    local = Local(EchoAnswer())
    machine = Machine(on_battery=True, battery_percent=50.0, battery_j=90_000.0, processors_w=5.0)
    device = Device(local, sensors=lambda: machine, stated=lambda: EdgeSettings(edge_watts=12.0, radio_watts=0.8))
    before = device.reading()
    for watts, running in ((5.0, 0), (13.0, 2)) * MIN_SAMPLES:
        machine, local.runtime.running = replace(machine, processors_w=watts), running
        await device.refresh()
    after = device.reading()

    assert (before.battery_j, before.work_w, before.radio_w) == (None, 12.0, 0.8)
    assert (after.battery_j, after.work_w, after.radio_w) == (90_000.0, pytest.approx(8.0), 0.8)


async def test_a_sample_in_which_work_began_teaches_nothing() -> None:
    """Neither idle nor at work; what nobody measured or stated is not known."""
    local = Local(EchoAnswer())

    def sensors() -> Machine:
        local.runtime.running += 1
        return Machine(processors_w=50.0)

    device = Device(local, sensors=sensors)
    await device.refresh()

    assert (device.draw.idle.count, device.draw.working.count) == (0, 0)
    assert device.reading().work_w is None


@pytest.mark.parametrize(
    ("left_j", "stated_wh", "joules"), [(7.0, 50.0, 7.0), (None, 50.0, 45_000.0), (None, None, None)]
)
async def test_what_is_left_in_the_battery(left_j: float | None, stated_wh: float | None, joules: float | None) -> None:
    """By its gauge; else its percentage of what it was said to hold: 25 % of 50 Wh."""
    machine = Machine(battery_percent=25.0, battery_j=left_j)
    device = Device(Local(EchoAnswer()), sensors=lambda: machine, stated=lambda: EdgeSettings(battery_wh=stated_wh))
    await device.refresh()

    assert device.reading().battery_j == joules


def test_the_reading_tells_the_day_and_the_hour() -> None:
    """Of the device's own clock, for rules that hold at times."""
    tuesday = time.struct_time((2026, 3, 3, 13, 30, 0, 1, 62, 0))
    reading = Device(Local(EchoAnswer()), local_time=lambda: tuesday).reading()

    assert (reading.weekday, reading.hour) == ("tue", 13.5)
