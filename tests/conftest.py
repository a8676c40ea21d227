"""Fixtures every package's tests share."""

import os
import sys
from pathlib import Path

import pytest

# Read where Triton is imported, which transformers may do: kernels run on the CPU, unless somebody with a GPU says 0.
os.environ.setdefault("TRITON_INTERPRET", "1")


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
