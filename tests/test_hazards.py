"""Hazards that are ruled out for the whole of our code, by reading it."""

import ast
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import ROOT, command, environment

PACKAGES = ("shared", "router", "edge_agent", "cloud_engine")
CODE_IN_DATA = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "jsonpickle"}


def trees() -> Iterator[tuple[Path, ast.AST]]:
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            yield path.relative_to(ROOT), ast.parse(path.read_text("utf-8"))


def executes_data(node: ast.AST) -> bool:
    """An import of what runs code found in data, or a loader told to."""
    match node:
        case ast.Import(names=names):
            return any(name.name.partition(".")[0] in CODE_IN_DATA for name in names)
        case ast.ImportFrom(module=str(module)):
            return module.partition(".")[0] in CODE_IN_DATA
        case ast.Call(func=ast.Attribute(value=ast.Name(id="torch"), attr="load"), keywords=given):
            return not any(one.arg == "weights_only" and getattr(one.value, "value", 0) is True for one in given)
        case ast.Call(keywords=given):
            return any(one.arg == "allow_pickle" and getattr(one.value, "value", 1) is not False for one in given)
    return False


def test_nothing_that_is_read_is_run() -> None:
    """S-25: no pickle, shelve, marshal or their kin, no torch.load that unpickles, no array file with objects in it."""
    found = [f"{path}:{node.lineno}" for path, tree in trees() for node in ast.walk(tree) if executes_data(node)]  # type: ignore[attr-defined]

    assert found == []


@pytest.mark.parametrize(
    "line", ["import pickle", "from marshal import loads", "torch.load(x)", "torch.load(x, weights_only=False)",
             "np.load(x, allow_pickle=True)", "import joblib.memory"],
)  # fmt: skip
def test_the_search_finds_what_it_is_for(line: str) -> None:
    """S-25: each of them would be seen."""
    assert any(executes_data(node) for node in ast.walk(ast.parse(line)))


def test_no_unauthenticated_compute_server() -> None:
    """S-21: llama.cpp's RPC back end, which asks nobody who they are, is neither built, started nor connected to."""
    files = [*(ROOT / "deploy").iterdir(), ROOT / "Makefile", ROOT / "pyproject.toml", *(ROOT / ".ci").iterdir()]
    sources = [path for package in PACKAGES for path in (ROOT / package).rglob("*") if path.suffix in (".py", ".toml")]
    words = ("rpc-server", "rpc_server", "--rpc", "ggml_rpc", "ggml-rpc", "ggml_backend_rpc")
    found = [
        f"{path}: {word}"
        for path in (*files, *sources)
        if path.is_file()
        for word in words
        if word in path.read_text("utf-8", "replace").lower()
    ]

    assert len(sources) > 100
    assert found == []


@pytest.mark.parametrize("given", [(), ("--keys", "clients.keys"), ("--tls-cert", "c.pem", "--tls-key", "k.pem")])
def test_beyond_loopback_with_less_than_keys_and_tls_nothing_starts(tmp_path: Path, given: tuple[str, ...]) -> None:
    """S-08: the process ends with status 2 and one line that says what is missing, and nobody listened meanwhile."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    done = subprocess.run(
        command("serve", "--host", "0.0.0.0", "--port", str(port), *given),
        capture_output=True,
        text=True,
        timeout=60,
        env=environment(tmp_path),
        check=False,
    )

    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "must be given" in done.stderr
    with pytest.raises(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port), timeout=5):
        pass
