"""Fixtures of the cloud engine's tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny_llama
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Tests share the machine: with more threads than idle cores, torch spends its time waiting for the last one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny Llama with its tokenizer (see `tests/tiny_llama.py`)."""
    return tiny_llama.save(tmp_path_factory.mktemp("tiny"))
