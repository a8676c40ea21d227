import json
import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from edge_agent.log_file import LogFile
from shared.config import InvalidSettings
from shared.telemetry import set_up_logging


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "logs" / "edge.log"


@pytest.fixture(autouse=True)
def own_logging() -> Iterator[None]:
    yield
    structlog.reset_defaults()


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


def test_at_its_size_it_is_set_aside_and_the_oldest_goes(path: Path) -> None:
    """Never more files than asked for, none larger than asked for, the newest lines kept, none cut in two."""
    log = LogFile(path, max_bytes=100, files=3)
    for number in range(40):
        log.write(f"line number {number:04d}\n")  # 17 bytes: five a file
    log.close()

    assert sorted(file.name for file in path.parent.iterdir()) == ["edge.log", "edge.log.1", "edge.log.2"]
    kept = [lines(path.with_name(name)) for name in ("edge.log.2", "edge.log.1", "edge.log")]
    assert [line for file in kept for line in file] == [f"line number {number:04d}" for number in range(25, 40)]
    assert all(file.stat().st_size <= 100 for file in path.parent.iterdir())


def test_only_its_owner_reads_it(path: Path) -> None:
    """0600, also a file that was there before with another mode, and those set aside."""
    path.parent.mkdir()
    path.touch(0o666)
    log = LogFile(path, max_bytes=10, files=2)
    for _ in range(3):
        log.write("123456789\n")
    log.close()

    assert {stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()} == {0o600}
    assert len(list(path.parent.iterdir())) == 2


def test_one_file_begins_anew(path: Path) -> None:
    """`files` 1: nothing is set aside."""
    log = LogFile(path, max_bytes=20, files=1)
    for number in range(5):
        log.write(f"line {number}\n")
    log.close()

    assert lines(path) == ["line 4"]
    assert len(list(path.parent.iterdir())) == 1


def test_it_goes_on_where_it_left_off(path: Path) -> None:
    """A restart appends, and counts what is there."""
    for number in range(3):
        log = LogFile(path, max_bytes=30, files=2)
        log.write(f"start {number} .....\n")
        log.close()

    assert lines(path.with_name("edge.log.1")) == ["start 0 .....", "start 1 ....."]
    assert lines(path) == ["start 2 ....."]


def test_moved_by_somebody_else_it_is_begun_anew_when_asked(path: Path) -> None:
    """What logrotate does, with SIGHUP after it."""
    log = LogFile(path, max_bytes=1000, files=2)
    log.write("one\n")
    path.rename(path.with_name("moved"))
    log.write("two\n")
    log.reopen()
    log.write("three\n")
    log.close()

    assert lines(path.with_name("moved")) == ["one", "two"]
    assert lines(path) == ["three"]


def test_where_nothing_can_be_renamed_the_bound_still_holds(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It starts over in the same file rather than fill the disk."""
    log = LogFile(path, max_bytes=100, files=3)
    refused = []

    def refuse(self: Path, target: Path) -> None:
        refused.append(target)
        raise PermissionError

    monkeypatch.setattr(Path, "replace", refuse)
    for number in range(100):
        log.write(f"line number {number:04d}\n")
    log.close()

    assert refused
    assert path.stat().st_size <= 100
    assert lines(path)[-1] == "line number 0099"


def test_a_full_disk_fails_nobody(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines that cannot be written are dropped; those after them are not."""
    log = LogFile(path, max_bytes=1000, files=2)
    real, full = os.write, []

    def write(descriptor: int, data: bytes) -> int:
        if b"lost" in data:
            full.append(data)
            raise OSError(28, "No space left on device")
        return real(descriptor, data)

    monkeypatch.setattr(os, "write", write)
    for line in ("one\n", "lost\n", "two\n"):
        log.write(line)
    log.close()

    assert full
    assert lines(path) == ["one", "two"]


def test_many_threads_lose_nothing(path: Path) -> None:
    """Whole lines, each once, through several rotations."""
    log = LogFile(path, max_bytes=2000, files=50)

    def write(name: int) -> None:
        for number in range(100):
            log.write(f"{name} {number}\n")

    threads = [threading.Thread(target=write, args=(name,)) for name in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    log.close()
    files = list(path.parent.iterdir())
    written = [line for file in files for line in lines(file)]

    assert len(files) > 1
    assert sorted(written) == sorted(f"{name} {number}" for name in range(8) for number in range(100))


@pytest.mark.parametrize("kind", ["folder", "link", "pipe", "parent is a file"])
def test_what_is_no_file_is_refused(tmp_path: Path, kind: str) -> None:
    """A folder, a link (which could lead anywhere), a pipe: InvalidSettings naming the setting, nothing touched."""
    path = tmp_path / "edge.log"
    (tmp_path / "other").touch(0o644)
    match kind:
        case "folder":
            path.mkdir()
        case "link":
            path.symlink_to(tmp_path / "other")
        case "pipe":
            os.mkfifo(path)
        case _:
            path = tmp_path / "other" / "edge.log"

    with pytest.raises(InvalidSettings) as error:
        LogFile(path, max_bytes=1000, files=2)

    assert error.value.param == "log_file"
    assert stat.S_IMODE((tmp_path / "other").stat().st_mode) == 0o644


def test_structured_lines_go_there(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """JSON, one event a line, whatever is in it; nothing on stderr, unless no file is given."""
    log = LogFile(path, max_bytes=10_000, files=2)
    set_up_logging("info", log)
    structlog.get_logger("x").info("happened", detail="two\nlines \udcff é")
    structlog.get_logger("x").debug("not at this level")
    set_up_logging("debug", log)
    structlog.get_logger("x").debug("now it is")
    log.close()

    assert [json.loads(line)["event"] for line in lines(path)] == ["happened", "now it is"]
    assert capsys.readouterr().err == ""
