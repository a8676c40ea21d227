"""The arrows and the house rules a linter cannot see."""

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("shared", "router", "edge_agent", "cloud_engine")
SOURCES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
DUMPING_GROUNDS = {"utils", "util", "helpers", "helper", "common", "misc", "manager", "core"}


@functools.cache
def imports_of(path: Path) -> set[str]:
    """Dotted names a file imports anywhere, functions included."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


@functools.cache
def reached_from(package: str) -> set[str]:
    """Modules of `shared` that a package's files import, directly or through `shared`."""
    seen: set[str] = set()
    todo = [imports_of(path) for path in SOURCES if path.is_relative_to(ROOT / package)]
    while todo:
        for name in todo.pop():
            file = ROOT / (name.replace(".", "/") + ".py")
            if name.startswith("shared.") and name not in seen and file.exists():
                seen.add(name)
                todo.append(imports_of(file))
    return seen


def test_import_contracts_hold() -> None:
    """Every contract of pyproject.toml holds for the code as it is."""
    done = subprocess.run(
        [str(Path(sys.executable).parent / "lint-imports")], cwd=ROOT, capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("modules", "blocked"),
    [
        ("shared.schemas shared.session shared.openai shared.http", "torch transformers llama_cpp"),
        ("router.decide router.policy router.__main__", "torch transformers llama_cpp fastapi uvicorn websockets"),
        ("edge_agent edge_agent.agent edge_agent.__main__ edge_agent.backends.native", "torch transformers"),
        ("edge_agent.run edge_agent.service edge_agent.backends.llama", "torch transformers llama_cpp"),
        (
            "edge_agent.backends.process",
            "torch llama_cpp fastapi uvicorn websockets httpx pydantic prometheus_client structlog",
        ),
        ("cloud_engine.engine.scheduler", "torch transformers llama_cpp fastapi"),
        ("cloud_engine.__main__ cloud_engine.gateway.server", "llama_cpp"),
    ],
)
def test_packages_import_without_what_they_must_not_need(modules: str, blocked: str) -> None:
    """Each side starts on a machine where the other side's libraries are not installed."""
    code = "import sys\n"
    code += "".join(f"sys.modules[{name!r}] = None\n" for name in blocked.split())
    code += "".join(f"import {name}\n" for name in modules.split())

    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "module", [path.stem for path in sorted((ROOT / "shared").glob("*.py")) if path.stem != "__init__"]
)
def test_shared_holds_only_what_both_ends_need(module: str) -> None:
    """Admission rule: a module of `shared` is imported, directly or through `shared`, by the edge and by the cloud."""
    assert f"shared.{module}" in reached_from("edge_agent") & reached_from("cloud_engine")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_is_a_dumping_ground_or_asserts(path: Path) -> None:
    """No file is named after nothing in particular, and no check of ours vanishes under `python -O`."""
    asserts = [node.lineno for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Assert)]

    assert path.stem not in DUMPING_GROUNDS
    assert not asserts


def test_no_pickle_and_no_dependency_we_distrust() -> None:
    """Nothing of ours unpickles, evaluates or depends on the libraries the house rules exclude."""
    banned = {"pickle", "shelve", "marshal", "litellm", "diskcache", "jose", "passlib"}

    used = {name.split(".")[0] for path in SOURCES for name in imports_of(path)}

    assert not used & banned


def test_tests_mirror_packages_without_becoming_them() -> None:
    """No `__init__.py` under tests/: one there would shadow the package of the same name."""
    assert not list((ROOT / "tests").rglob("__init__.py"))
