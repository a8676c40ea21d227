import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save, save_file

from edge_agent.embedding.tensors import read_tensors
from shared.gguf import ModelInvalid

TENSORS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.array([1, 2], np.int64), "c": np.ones(1, "f2")}


def test_reads_what_the_format_s_own_library_wrote(tmp_path: Path) -> None:
    """Names, shapes, types and numbers are those that were saved."""
    save_file(TENSORS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    found = read_tensors(tmp_path / "model.safetensors")
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        np.testing.assert_array_equal(found[name], tensor)
        assert found[name].dtype == tensor.dtype


def entry(kind: str = "F32", shape: Any = (2,), place: Any = (0, 8)) -> dict[str, Any]:
    return {"a": {"dtype": kind, "shape": shape, "data_offsets": place}}


@pytest.mark.parametrize(
    ("header", "data"),
    [
        (entry(), 7), (entry(), 9), (entry(place=(0, 12)), 12), (entry(place=(4, 12)), 12), (entry(place=(8, 0)), 8),
        (entry(place=(0, 1 << 62)), 8), (entry(shape=(-2,)), 8), (entry(shape=(1 << 62, 4)), 8), (entry(kind="X9"), 8),
        (entry(shape=()), 8), (entry(shape=(1,) * 9, place=(0, 4)), 4), ({}, 0), ([], 0), (entry(shape="ab"), 8),
        ({"a": 1}, 0), (entry() | {"b": entry()["a"]}, 8), (entry() | {"b": entry(place=(0, 8))["a"]}, 16),
        (entry(shape=(0,), place=(0, 0)), 0),
    ],
)  # fmt: skip
def test_a_header_that_does_not_fit_its_file_is_refused(tmp_path: Path, header: Any, data: int) -> None:
    """Sizes, places, gaps, overlaps, types and shapes are checked before anything is read."""
    text = json.dumps(header).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(text)) + text + bytes(data))
    with pytest.raises(ModelInvalid, match=r"model\.safetensors"):
        read_tensors(file)


@pytest.mark.parametrize("start", [b"", b"\0" * 8, b"\xff" * 8, struct.pack("<Q", 1 << 40), struct.pack("<Q", 9)])
def test_a_length_that_cannot_be_is_refused(tmp_path: Path, start: bytes) -> None:
    """The header's own length is believed only within the file and the limit."""
    file = tmp_path / "model.safetensors"
    file.write_bytes(start)
    with pytest.raises(ModelInvalid):
        read_tensors(file)
    with pytest.raises(ModelInvalid):
        read_tensors(tmp_path / "absent.safetensors")


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damage_is_refused_or_changes_numbers_only(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Whatever byte is changed or cut: a typed error, or the same shapes."""
    whole = bytearray(save(TENSORS))
    at = data.draw(st.integers(0, len(whole) - 1))
    if data.draw(st.booleans()):
        whole[at] ^= data.draw(st.integers(1, 255))
    else:
        del whole[at:]
    file = tmp_path_factory.mktemp("damage") / "model.safetensors"
    file.write_bytes(whole)
    try:
        found = read_tensors(file)
    except ModelInvalid:
        return
    assert len(found) == len(TENSORS)
    assert sum(tensor.nbytes for tensor in found.values()) == sum(tensor.nbytes for tensor in TENSORS.values())
