"""The model's process as the daemon starts it: what it is told, and that it never outlives the daemon."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from edge_agent.backends import spawn
from edge_agent.backends.spawn import environment, spare

START = """
import asyncio, sys
from pathlib import Path
from edge_agent.backends.llama import LlamaBackend

async def main():
    backend = LlamaBackend(Path(sys.argv[1]), slots=1, context=64)
    await backend.start()
    print(backend._keeper.pid, *sorted(name for name in ("llama_cpp", "numpy") if name in sys.modules), flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""
SECRETS = {"CAUSEWAY_KEY_FILE": "k", "AWS_SECRET_ACCESS_KEY": "s", "HOME": "/root", "OPENAI_API_KEY": "o"}


def test_it_is_told_nothing_but_what_it_needs() -> None:
    """No key, no setting, no home: where modules are, and what tunes native code."""
    told = environment(SECRETS | {"OMP_NUM_THREADS": "1", "LANG": "C.UTF-8"})

    assert set(told) == {"PYTHONPATH", "OMP_NUM_THREADS", "LANG"}


def test_a_process_that_nobody_takes_is_ended() -> None:
    """However the start of the daemon fails, none is left behind."""
    with pytest.raises(ValueError, match="settings"), spare() as one:
        assert one is not None
        assert one._spawned is not None
        process = psutil.Process(one._spawned[0].pid)
        assert process.is_running()
        raise ValueError("settings")

    assert not process.is_running()


def test_a_machine_without_room_for_a_process_starts_none_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing fails: who needs one later says what keeps it from starting."""

    def full(*_: object, **__: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(spawn.subprocess, "Popen", full)
    with spare() as one:
        assert one is None


@pytest.mark.model
@pytest.mark.system
def test_it_ends_with_the_daemon_and_shares_nothing_with_it(model_path: Path) -> None:
    """Killed without a chance to say goodbye, the daemon leaves no process behind; the environment that the kernel
    shows of it has no secret, none of the daemon's files or sockets are open in it, and it listens on nothing."""
    with subprocess.Popen(
        [sys.executable, "-c", START, str(model_path)],
        env=os.environ | SECRETS,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[3],
    ) as daemon:
        try:
            assert daemon.stdout is not None
            line = daemon.stdout.readline().split()
            process = psutil.Process(int(line[0]))
            inside, sockets = process.environ(), process.net_connections("inet")
            imported = process.memory_maps()
        finally:
            daemon.kill()
    _, alive = psutil.wait_procs([process], timeout=60)

    assert not alive
    assert not set(inside) & set(SECRETS)
    assert not sockets
    assert line[1:] == []
    assert any("libllama" in region.path for region in imported)
