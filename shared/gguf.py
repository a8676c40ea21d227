"""Look a GGUF file over before native code does: every count, length and offset must lie within the file.

Loaders in C trust these numbers, and have been made to read past their buffers by them more than once. This check
reads the header only (no tensor data), allocates nothing that the file merely claims, and raises ModelInvalid alone.

Layout, little-endian: magic, version, tensor count, metadata count; metadata (key, type, value); tensor table (name,
shape, type, offset); padding to `general.alignment`; tensor data.
"""

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import NamedTuple

from shared.errors import BadRequest

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_TENSORS = 1 << 16
MAX_METADATA = 1 << 16
MAX_NAME_BYTES = 1 << 16
MAX_DIMS = 4
MAX_TEXT_BYTES = 1 << 20
"""A longer text among the metadata is passed over, not kept: no chat template is so long."""
MAX_ALIGNMENT = 1 << 16

BLOCKS: dict[int, tuple[int, int]] = {
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 9: (32, 40),
    10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 15: (256, 292),
    16: (256, 66), 17: (256, 74), 18: (256, 98), 19: (256, 50), 20: (32, 18), 21: (256, 110), 22: (256, 82),
    23: (256, 136), 24: (1, 1), 25: (1, 2), 26: (1, 4), 27: (1, 8), 28: (1, 8), 29: (256, 56), 30: (1, 2),
    34: (256, 54), 35: (256, 66), 39: (32, 17), 40: (64, 36), 41: (128, 18),
}  # fmt: skip
"""Of each tensor type: elements in a block, bytes of a block."""

_STRING, _ARRAY = 8, 9
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_POSITIVE = (".block_count", ".embedding_length", ".context_length", ".head_count", ".head_count_kv")

Value = int | float | bytes | None
"""A metadata value: an array is not kept and is None."""


class ModelInvalid(BadRequest):
    """A model file that must not be loaded; the message says what is wrong with it."""

    code = "model_invalid"


@dataclass(frozen=True, slots=True)
class Header:
    """What the check learnt on its way. `data_start` counts bytes from the beginning of the file, `parameters` the
    numbers in all tensors; `values` are the metadata by key."""

    version: int
    tensors: int
    metadata: int
    architecture: str
    data_start: int
    parameters: int
    values: Mapping[bytes, Value]


def check(path: Path) -> Header:
    """Raises ModelInvalid naming the fault, and nothing else, whatever the bytes."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _check(_Reader(data))
    except ModelInvalid as error:
        raise ModelInvalid(f"{path.name}: {error.message}", param="model") from None
    except OSError as error:
        raise ModelInvalid(f"{path.name}: {error.strerror}", param="model") from error
    except ValueError as error:  # an empty file cannot be mapped, a path with a NUL cannot be opened
        raise ModelInvalid(f"{path.name!r}: {error}", param="model") from error


class _Reader:
    """A cursor over the bytes; to move past the end is ModelInvalid."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self.at = 0
        self.size = len(data)

    def skip(self, count: int, what: str) -> int:
        """Move over `count` bytes that must exist; returns where they begin."""
        start, self.at = self.at, self.at + count
        if self.at > self.size:
            raise ModelInvalid(f"{what} ends beyond the end of the file")
        return start

    def take(self, count: int, what: str) -> bytes:
        return self.slice(self.skip(count, what), count)

    def slice(self, start: int, count: int) -> bytes:
        return self._data[start : start + count]

    def scalar(self, layout: str, what: str) -> int | float:
        value: int | float = struct.unpack(layout, self.take(struct.calcsize(layout), what))[0]
        return value

    def u32(self, what: str) -> int:
        return int(self.scalar("<I", what))

    def count(self, limit: int, what: str) -> int:
        value = int(self.scalar("<Q", what))
        if value > limit:
            raise ModelInvalid(f"{what} is {value}, more than {limit}")
        return value

    def text(self, limit: int, what: str) -> bytes:
        return self.take(self.count(limit, f"length of {what}"), what)

    def skip_texts(self, count: int, what: str) -> None:
        """The one hot loop: a vocabulary has hundreds of thousands of strings."""
        length, data, at, last = struct.Struct("<Q").unpack_from, self._data, self.at, self.size - 8
        for _ in range(count):
            if at > last:
                break
            at += 8 + length(data, at)[0]
        else:
            self.at = at
            self.skip(0, what)
            return
        raise ModelInvalid(f"{what} ends beyond the end of the file")


def _check(reader: _Reader) -> Header:
    if reader.take(4, "the magic number") != MAGIC:
        raise ModelInvalid("not a GGUF file")
    version = reader.u32("the version")
    if version not in VERSIONS:
        raise ModelInvalid(f"GGUF version {version} is not supported")
    tensors = reader.count(MAX_TENSORS, "the number of tensors")
    entries = reader.count(MAX_METADATA, "the number of metadata entries")
    metadata = _metadata(reader, entries)
    alignment = _alignment(metadata)
    table = [_tensor(reader, index) for index in range(tensors)]
    if len({tensor.name for tensor in table}) != tensors:
        raise ModelInvalid("two tensors have the same name")
    data_start = -(-reader.at // alignment) * alignment
    for index, tensor in enumerate(table):
        if tensor.offset % alignment:
            raise ModelInvalid(f"tensor {index} is not aligned to {alignment} bytes")
        if data_start + tensor.offset + tensor.size > reader.size:
            raise ModelInvalid(f"tensor {index} ends beyond the end of the file")
    architecture = metadata.get(b"general.architecture")
    if not isinstance(architecture, bytes) or not architecture.isascii():
        raise ModelInvalid("general.architecture is missing")
    parameters = sum(tensor.elements for tensor in table)
    return Header(version, tensors, entries, architecture.decode("ascii"), data_start, parameters, metadata)


def _metadata(reader: _Reader, entries: int) -> dict[bytes, Value]:
    metadata: dict[bytes, Value] = {}
    for index in range(entries):
        key = reader.text(MAX_NAME_BYTES, f"key of metadata entry {index}")
        if key in metadata:
            raise ModelInvalid(f"metadata entry {index} repeats a key")
        value = _value(reader, f"metadata entry {index}")
        if isinstance(value, int) and value <= 0 and key.decode("latin-1").endswith(_POSITIVE):
            raise ModelInvalid(f"metadata entry {index}, a dimension of the model, is {value}")
        metadata[key] = value
    return metadata


def _value(reader: _Reader, what: str) -> Value:
    kind = reader.u32(f"type of {what}")
    if kind == _STRING:
        size = reader.count(reader.size, f"length of {what}")
        start = reader.skip(size, what)
        return reader.slice(start, size) if size <= MAX_TEXT_BYTES else None
    if kind in _SCALARS:
        return reader.scalar(_SCALARS[kind], what)
    if kind != _ARRAY:
        raise ModelInvalid(f"{what} has the unknown type {kind}")
    item = reader.u32(f"item type of {what}")
    count = reader.count(reader.size, f"length of {what}")
    if item == _STRING:
        reader.skip_texts(count, what)
    elif item in _SCALARS:
        reader.skip(count * struct.calcsize(_SCALARS[item]), what)
    else:
        raise ModelInvalid(f"{what} is an array of the type {item}")
    return None


def _alignment(metadata: dict[bytes, Value]) -> int:
    alignment = metadata.get(b"general.alignment", 32)
    if not isinstance(alignment, int) or not 8 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
        raise ModelInvalid(f"general.alignment is not a power of two from 8 to {MAX_ALIGNMENT}")
    return alignment


class _Tensor(NamedTuple):
    """One row of the tensor table: `offset` from the start of the data, `size` in bytes."""

    name: bytes
    offset: int
    size: int
    elements: int


def _tensor(reader: _Reader, index: int) -> _Tensor:
    what = f"tensor {index}"
    name = reader.text(MAX_NAME_BYTES, f"name of {what}")
    dims = reader.u32(f"shape of {what}")
    if not 0 < dims <= MAX_DIMS:
        raise ModelInvalid(f"{what} has {dims} dimensions")
    shape = [int(reader.scalar("<Q", f"shape of {what}")) for _ in range(dims)]
    kind = reader.u32(f"type of {what}")
    if kind not in BLOCKS:
        raise ModelInvalid(f"{what} has the unknown type {kind}")
    elements, size = BLOCKS[kind]
    if not all(shape) or shape[0] % elements or prod(shape) >= 1 << 63:
        raise ModelInvalid(f"{what} has an impossible shape")
    offset = int(reader.scalar("<Q", f"offset of {what}"))
    return _Tensor(name, offset, prod(shape) // elements * size, prod(shape))
