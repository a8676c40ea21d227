"""A safetensors file as numpy arrays: its header is checked against the file before a byte of data is believed.

The format: eight bytes, the header's length; the header, a JSON object of name to dtype, shape and place; the data.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from shared.gguf import ModelInvalid

MAX_HEADER_BYTES = 1 << 20
MAX_TENSORS = 4096
MAX_DIMENSIONS = 4
_LENGTH_BYTES = 8
_KINDS: Mapping[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "F16": np.dtype("<f2"),
    "I64": np.dtype("<i8"), "I32": np.dtype("<i4"), "I16": np.dtype("<i2"), "I8": np.dtype("i1"), "U8": np.dtype("u1"),
}  # fmt: skip


class _Tensor(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


def read_tensors(file: Path) -> dict[str, npt.NDArray[Any]]:
    """Every tensor of the file, mapped and not copied. Raises ModelInvalid, also for a file that ends too early."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(_LENGTH_BYTES), "little")
            if not 2 <= length <= min(MAX_HEADER_BYTES, size - _LENGTH_BYTES):
                raise _invalid(file, f"a header of {length} bytes in a file of {size}")
            header = stream.read(length)
        fields = msgspec.json.decode(header, type=dict[str, msgspec.Raw])
        fields.pop("__metadata__", None)
        tensors = {name: msgspec.json.decode(raw, type=_Tensor) for name, raw in fields.items()}
    except OSError as error:
        raise _invalid(file, error.strerror or "it cannot be read") from error
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise _invalid(file, "its header is not what such a file has") from error
    start = _LENGTH_BYTES + length
    _check(file, tensors, size - start)
    data = np.memmap(file, dtype=np.uint8, mode="r", offset=start) if size > start else np.zeros(0, np.uint8)
    return {name: _view(data, tensor) for name, tensor in tensors.items()}


def _check(file: Path, tensors: Mapping[str, _Tensor], room: int) -> None:
    """Each tensor is as long as its shape says, and together they fill the data without a gap or an overlap."""
    if not 0 < len(tensors) <= MAX_TENSORS:
        raise _invalid(file, f"{len(tensors)} tensors")
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].data_offsets):
        kind, (first, last) = _KINDS.get(tensor.dtype), tensor.data_offsets
        if kind is None:
            raise _invalid(file, f"{name[:80]!r} is of type {tensor.dtype[:16]!r}, which is not read here")
        if len(tensor.shape) > MAX_DIMENSIONS or any(not 0 < length <= room for length in tensor.shape):
            raise _invalid(file, f"{name[:80]!r} has a shape that cannot be")
        if first != end or last - first != math.prod(tensor.shape) * kind.itemsize:
            raise _invalid(file, f"{name[:80]!r} does not lie where it should")
        end = last
    if end != room:
        raise _invalid(file, f"its tensors need {end} bytes, and it has {room}")


def _view(data: npt.NDArray[np.uint8], tensor: _Tensor) -> npt.NDArray[Any]:
    first, last = tensor.data_offsets
    raw = np.frombuffer(data[first:last].tobytes(), dtype=_KINDS[tensor.dtype])
    return raw.reshape(tensor.shape)


def _invalid(file: Path, why: str) -> ModelInvalid:
    return ModelInvalid(f"{file.name} is no whole safetensors file: {why}", param="model")
