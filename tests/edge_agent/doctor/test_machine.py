import os
import shutil
from pathlib import Path

import pytest

from edge_agent.doctor.findings import examine, fail, ok
from edge_agent.doctor.machine import disk, memory, model, network, runtime
from edge_agent.settings import EdgeSettings
from shared.errors import UnknownModel
from shared.gguf import ModelInvalid

MB = 1_000_000


def test_the_runtime_loads() -> None:
    """The real one, in a process of its own."""
    (found,) = runtime()
    assert (found.status, found.check) == ("OK", "runtime")


@pytest.mark.parametrize(
    ("module", "why"),
    [
        ("raise ImportError('no such instruction set')", "no such instruction set"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGILL)", "killed by signal 4"),
    ],
)
@pytest.mark.parametrize("compiler", [True, False])
def test_a_runtime_that_does_not_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, why: str, compiler: bool
) -> None:
    """Missing, or built for another processor: said why, and how to build it here, with or without a compiler."""
    (tmp_path / "llama_cpp.py").write_text(module)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/g++" if compiler and name == "g++" else None)

    (found,) = runtime()

    assert found.status == "FAIL"
    assert why in found.said
    assert ("/usr/bin/g++" in found.said) is compiler
    assert ("C++ compiler" in found.todo) is not compiler


@pytest.mark.model
def test_a_whole_model(model_path: Path) -> None:
    """The pulled one: its hash is as pulled, and it fits."""
    settings = EdgeSettings(model="smollm2:135m", slots=1, context=256)
    first, second = model(settings, model_path.parent)

    assert (first.status, second.check) == ("OK", "memory")
    assert "SHA-256 as pulled" in first.said


@pytest.mark.model
@pytest.mark.parametrize("damage", ["byte", "cut", "head", "manifest"])
def test_a_damaged_model_is_found(tmp_path: Path, model_path: Path, damage: str) -> None:
    """One byte changed, the end cut off, no GGUF at all, a manifest nobody can read."""
    copy = tmp_path / model_path.name
    shutil.copy(model_path, copy)
    shutil.copy(model_path.with_suffix(".json"), copy.with_suffix(".json"))
    with copy.open("r+b") as stream:
        match damage:
            case "byte":
                stream.seek(-5, os.SEEK_END)
                stream.write(b"\xff")
            case "cut":
                stream.truncate(copy.stat().st_size - 1000)
            case "head":
                stream.write(b"nope")
            case _:
                copy.with_suffix(".json").write_text("{")
    with pytest.raises(ModelInvalid):
        list(model(EdgeSettings(model=str(copy)), tmp_path))


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    """The error says how to get one."""
    with pytest.raises(UnknownModel):
        list(model(EdgeSettings(model="nobody:7b"), tmp_path))


@pytest.mark.parametrize(
    ("free", "status"), [(1000 * MB, "OK"), (799 * MB, "WARN"), (400 * MB, "WARN"), (399 * MB, "FAIL")]
)
def test_memory(free: int, status: str) -> None:
    """Enough for model, slots and daemon; for the model alone; not even for that."""
    (found,) = memory(400 * MB, 100 * MB, lambda: free)

    assert found.status == status
    assert bool(found.todo) is (status != "OK")


@pytest.mark.parametrize(("free", "status"), [(3000 * MB, "OK"), (1000 * MB, "WARN"), (100 * MB, "FAIL")])
def test_disk(tmp_path: Path, free: int, status: str) -> None:
    """Each file system once, by the nearest folder that exists."""
    (found,) = disk((tmp_path / "a" / "b", tmp_path / "c"), lambda _: free)

    assert (found.status, str(tmp_path) in found.said) == (status, True)


def test_a_disk_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However much is free."""
    monkeypatch.setattr(os, "access", lambda *_: False)
    (found,) = disk((tmp_path,))

    assert found.status == "FAIL"


@pytest.mark.parametrize(("sensed", "status"), [(True, "OK"), (False, "WARN"), (None, "OK")])
def test_network(sensed: bool | None, status: str) -> None:
    """Of interest only where there is a cloud."""
    (found,) = network(EdgeSettings(cloud="wss://cloud.example"), lambda: sensed)

    assert found.status == status
    assert list(network(EdgeSettings(), lambda: sensed)) == []
    assert list(network(EdgeSettings(cloud="wss://cloud.example", no_cloud=True), lambda: sensed)) == []


def test_a_check_that_breaks_is_a_finding() -> None:
    """A bug, or a typed refusal: named as a failure, and those after it are made all the same."""

    def broken():
        yield ok("a", "one")
        raise ZeroDivisionError("oh")

    def refused():
        raise UnknownModel("no such model")
        yield

    found = list(examine([("a", broken), ("b", refused), ("c", lambda: iter([fail("c", "x", "y")]))]))

    assert [(one.check, one.status) for one in found] == [("a", "OK"), ("a", "FAIL"), ("b", "FAIL"), ("c", "FAIL")]
    assert "ZeroDivisionError" in found[1].said
    assert found[2].said == "no such model"
