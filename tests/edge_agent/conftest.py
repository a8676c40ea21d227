"""A small embedding model, converted once for all tests of this package."""

from pathlib import Path

import pytest
from tiny_bert import write_tiny_bert

from edge_agent.embedding.convert import convert


@pytest.fixture(scope="session")
def tiny_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-bert")
    write_tiny_bert(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_file(tiny_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("store") / "tiny.onnx"
    convert(tiny_source, file)
    return file
