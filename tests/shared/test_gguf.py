"""The look over a GGUF file: whatever the bytes, a header or ModelInvalid, and nothing native in between."""

import struct
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shared.gguf import BLOCKS, ModelInvalid, check

HUGE = (1 << 64) - 1
U32, F32, STRING, ARRAY = 4, 6, 8, 9


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def entry(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def u32(key: str, value: int) -> bytes:
    return entry(key, U32, struct.pack("<I", value))


def words(key: str, count: int, *values: str) -> bytes:
    return entry(key, ARRAY, struct.pack("<IQ", STRING, count) + b"".join(map(text, values)))


def tensor(name: str, *shape: int, kind: int = 0, offset: int = 0) -> bytes:
    dims = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text(name) + dims + struct.pack("<IQ", kind, offset)


ARCHITECTURE = entry("general.architecture", STRING, text("llama"))
GOOD = (ARCHITECTURE, u32("llama.block_count", 2), words("tokenizer.ggml.tokens", 2, "a", "bc"))
WEIGHTS = (tensor("w", 32, 2, kind=8), tensor("v", 4, offset=96))


def gguf(
    metadata: tuple[bytes, ...] = GOOD,
    tensors: tuple[bytes, ...] = WEIGHTS,
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    n_tensors: int | None = None,
    n_metadata: int | None = None,
    data: int = 112,
) -> bytes:
    counts = (len(tensors) if n_tensors is None else n_tensors, len(metadata) if n_metadata is None else n_metadata)
    head = magic + struct.pack("<IQQ", version, *counts) + b"".join(metadata) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + bytes(data)


def check_bytes(folder: Path, content: bytes) -> object:
    file = folder / "model.gguf"
    file.write_bytes(content)
    return check(file)


def test_a_sound_file_is_described(tmp_path: Path) -> None:
    """Two rows of 32 at 34 bytes a block and four floats, each inside the file to its last byte."""
    header = check_bytes(tmp_path, gguf())

    assert (header.version, header.tensors, header.metadata, header.architecture) == (3, 2, 3, "llama")  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "empty"),
        (b"GG", "beyond the end"),
        (gguf(magic=b"GGML"), "not a GGUF"),
        (gguf(version=1), "version 1"),
        (gguf(version=0x03000000), "version"),
        (gguf(n_tensors=HUGE), "number of tensors"),
        (gguf(n_tensors=3), "tensor 2 has 0 dimensions"),
        (gguf(n_metadata=1 << 63), "number of metadata"),
        (gguf(data=111), "tensor 1 ends beyond"),
        (gguf(tensors=(tensor("w", 4, offset=1 << 63),)), "ends beyond"),
        (gguf(tensors=(tensor("w", 4, offset=HUGE - 31),)), "ends beyond"),
        (gguf(tensors=(tensor("w", 4, offset=1),)), "aligned"),
        (gguf(tensors=(tensor("w", 1 << 62, 4),)), "impossible shape"),
        (gguf(tensors=(tensor("w", 1 << 32, 1 << 32),)), "impossible shape"),
        (gguf(tensors=(tensor("w", 0),)), "impossible shape"),
        (gguf(tensors=(tensor("w"),)), "0 dimensions"),
        (gguf(tensors=(tensor("w", 1, 1, 1, 1, 1),)), "5 dimensions"),
        (gguf(tensors=(tensor("w", 31, kind=8),)), "impossible shape"),
        (gguf(tensors=(tensor("w", 4, kind=999),)), "unknown type"),
        (gguf(tensors=(tensor("w", 4), tensor("w", 4))), "same name"),
        (gguf((*GOOD, ARCHITECTURE)), "repeats"),
        (gguf(GOOD[1:]), "architecture"),
        (gguf((*GOOD, u32("general.alignment", 0))), "alignment"),
        (gguf((*GOOD, u32("general.alignment", 1 << 31))), "alignment"),
        (gguf((*GOOD, u32("general.alignment", 33))), "alignment"),
        (gguf((ARCHITECTURE, u32("llama.block_count", 0))), "is 0"),
        (gguf((ARCHITECTURE, u32("llama.attention.head_count", 0))), "is 0"),
        (gguf((*GOOD, words("x", HUGE))), "more than"),
        (gguf((*GOOD, words("x", 400))), "beyond the end"),
        (gguf((*GOOD, entry("x", ARRAY, struct.pack("<IQ", F32, 1 << 61)))), "more than"),
        (gguf((*GOOD, entry("x", ARRAY, struct.pack("<IQ", ARRAY, 1)))), "array of the type 9"),
        (gguf((*GOOD, entry("x", 77, b""))), "unknown type"),
        (gguf((*GOOD, struct.pack("<Q", HUGE))), "length of key"),
        (gguf((*GOOD, entry("x", STRING, struct.pack("<Q", HUGE - 8)))), "more than"),
    ],
)
def test_a_fault_is_named(tmp_path: Path, content: bytes, fault: str) -> None:
    """S-16: each number that a loader would trust, made false."""
    with pytest.raises(ModelInvalid, match=fault) as raised:
        check_bytes(tmp_path, content)

    assert raised.value.param == "model"


def test_cut_anywhere_it_is_refused(tmp_path: Path) -> None:
    """No proper beginning of a file passes for the whole."""
    whole = gguf()

    for size in range(len(whole)):
        with pytest.raises(ModelInvalid):
            check_bytes(tmp_path, whole[:size])


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(st.integers(0, len(gguf()) - 1), st.integers(0, 255)), max_size=8), st.binary(max_size=40))
def test_no_bytes_break_the_check(tmp_path: Path, flips: list[tuple[int, int]], tail: bytes) -> None:
    """Bytes changed anywhere: it passes or it is ModelInvalid, and no other exception leaves the check."""
    content = bytearray(gguf())
    for at, value in flips:
        content[at] = value
    with suppress(ModelInvalid):
        assert check_bytes(tmp_path, bytes(content) + tail)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    """A folder, nothing, and a name that no file can have."""
    for path in (tmp_path, tmp_path / "none", tmp_path / "a\0b"):
        with pytest.raises(ModelInvalid):
            check(path)


def test_block_sizes_are_those_of_the_format() -> None:
    """The table against the one of the format's own library."""
    from gguf import constants

    for kind, size in constants.GGML_QUANT_SIZES.items():
        if int(kind) in BLOCKS:
            assert BLOCKS[int(kind)] == size
    assert len(BLOCKS) >= 30


@pytest.mark.model
def test_the_real_model_passes(model_path: Path) -> None:
    """And says what it is."""
    header = check(model_path)

    assert (header.architecture, header.tensors) == ("llama", 272)
