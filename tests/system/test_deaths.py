"""The model's process dies under load, and the daemon lives on."""

from pathlib import Path

import pytest
from waiting import HANG_S

from tests.benchmarks.deaths import kill_under_load

pytestmark = [pytest.mark.system, pytest.mark.model]

KILLS = 5


def test_deaths_under_load_hurt_only_who_was_running(model_path: Path) -> None:
    """Each time the process is started again; nobody hangs, no answer is another's, some requests were hit, others
    answered in full."""
    seen = kill_under_load(model_path, KILLS, seed=1, clients=4)

    assert seen.restarts == KILLS
    assert not seen.mixed
    assert seen.on_topic
    assert seen.failed + seen.refused >= KILLS
    assert seen.done >= KILLS
    assert seen.silences
    assert max(seen.silences) <= HANG_S  # beyond 2 s: the benchmark says, where nothing else delays a process
