import concurrent.futures
import ctypes
import os
import stat
from pathlib import Path

import pytest

from cloud_engine.native import library
from cloud_engine.native.library import NativeUnavailable, cache_folder, features, load


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """One small source, so that compiling takes no time."""
    source = tmp_path / "features.cpp"
    source.write_text('extern "C" int features() { return 5; }')
    monkeypatch.setattr(library, "_sources", lambda: [source])
    return source


def test_it_is_compiled_once(quick, tmp_path):
    """A second process finds the file of the first; nothing else is left in the folder, which is the user's alone."""
    folder = tmp_path / "cache"
    assert load(folder, "c++").features() == 5
    (file,) = folder.iterdir()
    made = file.stat().st_mtime_ns
    quick.write_text("this would not compile")
    assert load(folder, "c++").features() == 5
    assert file.stat().st_mtime_ns == made
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_processes_that_start_together_get_whole_files(quick, tmp_path):
    """Each puts the same file in place at once."""
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        loaded = list(pool.map(lambda _: load(tmp_path / "cache", "c++").features(), range(4)))
    assert loaded == [5] * 4
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_no_compiler_is_said(tmp_path):
    """The reason goes into the log line of the fallback."""
    with pytest.raises(NativeUnavailable, match="no compiler c-plus-plus"):
        load(tmp_path, "c-plus-plus")


def test_a_failing_compiler_is_quoted(quick, tmp_path):
    """A broken source, or compiler, is no crash, and leaves nothing behind."""
    quick.write_text("nonsense;")
    with pytest.raises(NativeUnavailable, match="nonsense"):
        load(tmp_path / "cache", "c++")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_damaged_file_is_said(quick, tmp_path):
    """A library that cannot be loaded is a reason to do without, not a crash."""
    load(tmp_path / "cache", "c++")
    (file,) = (tmp_path / "cache").iterdir()
    copy = tmp_path / "other"
    copy.mkdir()
    (copy / file.name).write_bytes(b"not a library")
    with pytest.raises(NativeUnavailable, match="OSError"):
        load(copy, "c++")


def test_the_key_depends_on_flags_and_sources(monkeypatch):
    """Another flag makes another file."""
    before = library._key("/usr/bin/c++")
    monkeypatch.setattr(library, "FLAGS", (*library.FLAGS, "-g"))
    assert library._key("/usr/bin/c++") != before


def test_the_folder_is_the_users(tmp_path):
    """XDG's where it is given, absolute; else the home's."""
    assert cache_folder({"XDG_CACHE_HOME": "/var/x"}, tmp_path).as_posix() == "/var/x/causeway/native"
    assert cache_folder({"XDG_CACHE_HOME": "x"}, tmp_path) == tmp_path / ".cache/causeway/native"


def test_it_can_be_forbidden(monkeypatch):
    """CAUSEWAY_NATIVE=0 is for those who want no compiler run."""
    monkeypatch.setenv("CAUSEWAY_NATIVE", "0")
    library.library.cache_clear()
    features.cache_clear()
    try:
        assert features() == 0
        with pytest.raises(NativeUnavailable, match="CAUSEWAY_NATIVE"):
            library.library()
    finally:
        library.library.cache_clear()
        features.cache_clear()


def test_openmp_is_that_of_torch():
    """Two pools of threads on the same cores would ruin each other."""
    library.library()
    lines = Path("/proc/self/maps").read_text().splitlines()
    loaded = {line.split()[-1] for line in lines if "libgomp.so" in line}
    assert len({os.path.realpath(path) for path in loaded}) == 1
    assert isinstance(library.library(), ctypes.CDLL)
