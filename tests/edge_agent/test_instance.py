import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from processes import ROOT

from edge_agent.instance import Instance, hold, running
from shared.config import InvalidSettings

HOLDER = """
import sys, time
from pathlib import Path
from edge_agent.instance import hold
with hold(Path(sys.argv[1])) as held:
    held.say("http://127.0.0.1:4321")
    print("held", flush=True)
    time.sleep(600)
"""


def test_one_daemon_holds_a_state_folder(tmp_path: Path) -> None:
    """A second one is refused by name, with the first one's process and address; other folders are free."""
    with hold(tmp_path / "state") as held:
        held.say("http://127.0.0.1:8484")
        with pytest.raises(InvalidSettings) as error, hold(tmp_path / "state"):
            pass
        with hold(tmp_path / "other"):
            pass

    assert error.value.param == "state_dir"
    assert f"process {os.getpid()}, http://127.0.0.1:8484" in error.value.message
    with hold(tmp_path / "state"):
        pass


def test_a_killed_daemon_leaves_no_lock(tmp_path: Path) -> None:
    """Held by another process it is in the way and says whose it is; killed, its file still lies there and is not."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        found = running(tmp_path)
        with pytest.raises(InvalidSettings, match=f"process {process.pid}, http://127.0.0.1:4321"), hold(tmp_path):
            pass
        process.kill()

    assert found == Instance(process.pid, "http://127.0.0.1:4321")
    assert (tmp_path / "daemon.lock").exists()
    assert running(tmp_path) is None
    with hold(tmp_path):
        assert running(tmp_path) == Instance(os.getpid())


@pytest.mark.parametrize("note", [b"", b"\xff\xfe", b"[]", b'{"pid": "x"}', b"x" * 100_000])
def test_a_note_that_cannot_be_read_does_not_matter(tmp_path: Path, note: bytes) -> None:
    """What the file says is only for messages."""
    (tmp_path / "daemon.lock").write_bytes(note)
    assert running(tmp_path) is None
    with hold(tmp_path):
        (tmp_path / "daemon.lock").write_bytes(note)
        with pytest.raises(InvalidSettings, match="another edge-agent"), hold(tmp_path):
            pass


def test_what_it_makes_is_the_users_own(tmp_path: Path) -> None:
    """S-09: the state folder is 0700 and the lock 0600, whatever the umask."""
    before = os.umask(0)
    try:
        with hold(tmp_path / "state"):
            folder, file = (
                stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "state", tmp_path / "state/daemon.lock")
            )
    finally:
        os.umask(before)

    assert (folder, file) == (0o700, 0o600)


def test_a_folder_that_cannot_be_is_named(tmp_path: Path) -> None:
    """InvalidSettings, naming the setting."""
    (tmp_path / "file").touch()
    with pytest.raises(InvalidSettings) as error, hold(tmp_path / "file" / "state"):
        pass

    assert error.value.param == "state_dir"
