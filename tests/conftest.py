"""Fixtures every package's tests share."""

import functools
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.internal.conjecture import providers

# Read where Triton is imported, which transformers may do: kernels run on the CPU, unless somebody with a GPU says 0.
os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--deep", type=int, metavar="TIMES", help="properties by new random seeds, TIMES the examples")


def pytest_configure(config: pytest.Config) -> None:
    """Properties are tried with the same examples at every run, wherever and with whatever else they run, so that a
    change is judged by itself; `make fuzz` is the way to look for new ones."""
    times = config.getoption("--deep")
    if times is None:
        settings.load_profile("ci")
        providers._get_local_constants = lambda: providers._local_constants  # none; else: those of any module loaded
        return
    config.option.timeout = times * float(config.getini("timeout"))
    settings.__init__ = _multiplied(settings.__init__, times)
    settings.register_profile(
        "deep", max_examples=100, deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
    )
    settings.load_profile("deep")


def _multiplied(init: Any, times: int) -> Any:
    """`settings.__init__`, for tests that state how many examples they take, too."""

    @functools.wraps(init)
    def stated(self: settings, *parents: settings, **options: Any) -> None:
        if "max_examples" in options:
            options["max_examples"] *= times
        init(self, *parents, **options)

    return stated


def pytest_unconfigure() -> None:
    """Importing llama_cpp opens /dev/null twice for good; left to the interpreter's end, each is a warning."""
    utils = sys.modules.get("llama_cpp._utils")
    for name in ("outnull_file", "errnull_file"):
        if (stream := getattr(utils, name, None)) is not None:
            stream.close()


@pytest.fixture(autouse=True)
def clean_environ(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """No test sees the caller's CAUSEWAY_* settings."""
    for name in [name for name in os.environ if name.startswith("CAUSEWAY_")]:
        monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def model_path() -> Path:
    """SmolLM2-135M-Instruct as GGUF: what `make model` fetched, or $CAUSEWAY_TEST_MODEL."""
    data = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local/share")
    path = Path(os.environ.get("CAUSEWAY_TEST_MODEL") or data / "causeway/models/smollm2-135m.gguf")
    if not path.is_file():
        pytest.fail(f"{path} is missing: run `make model`")
    return path
