"""Prefixes on disk: one file a model, written when the model's process stops and read when it starts.

    magic | length of the head | head: fingerprint, and each prefix's sizes and SHA-256 | SHA-256 of the head | prefixes

A file that is not exactly what was written is moved aside and never used. While one is being used for the first time it
bears another name, so that a process that dies of it does not meet it again.
"""

import hashlib
import os
import struct
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import msgspec
import numpy as np

from edge_agent.backends.prefixes import Kept, State
from shared.gguf import check

MAGIC = b"CWPFX\x00\x00\x01"
SUFFIX = ".prefixes"
TRIED = ".trying"
ASIDE = ".damaged"
_LENGTH = struct.Struct("<I")
MAX_HEAD = 1 << 20
SAMPLES = 64
SAMPLE = 4096


class Entry(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    tokens: int
    size: int
    sha256: bytes


class Head(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    fingerprint: bytes
    entries: tuple[Entry, ...]


def fingerprint(model: Path, *, runtime: str) -> bytes:
    """Of the model file and of the library, `runtime`, whose own format the states are in.

    The file's header, size and time of change, and pieces from all over it: whole files take many seconds to read.
    """
    status, digest = model.stat(), hashlib.sha256(runtime.encode())
    digest.update(struct.pack("<qq", status.st_size, status.st_mtime_ns))
    with model.open("rb") as file:
        digest.update(file.read(check(model).data_start))
        for piece in range(SAMPLES):
            file.seek(status.st_size * piece // SAMPLES)
            digest.update(file.read(SAMPLE))
    return digest.digest()


class Saved:
    """Of one model, in `folder`, whose files may have `budget` bytes together."""

    def __init__(self, folder: Path, budget: int, mark: bytes, log: Callable[[str, str], None]) -> None:
        self._folder, self._budget, self._mark, self._log = folder, budget, mark, log
        self._path = folder / f"{mark.hex()[:32]}{SUFFIX}"

    def load(self, use: Callable[[list[Kept]], None]) -> None:
        """Hand what was saved to `use`, the most recently used first. Does not raise: nothing saved fails nothing."""
        tried = self._path.with_suffix(TRIED)
        try:
            if tried.exists():
                tried.replace(self._path.with_suffix(ASIDE))
                self._log("warning", "saved prefixes were moved aside: the process died while it used them")
            if not self._path.exists():
                return
            kept = self._read(self._path)
            self._path.replace(tried)
            use(kept)
            tried.replace(self._path)
        except ValueError as error:
            self._log("warning", f"saved prefixes were moved aside: {error}")
            with suppress(OSError):
                self._path.replace(self._path.with_suffix(ASIDE))
        except OSError as error:
            self._log("warning", f"saved prefixes cannot be read: {type(error).__name__}")

    def save(self, kept: Iterable[Kept]) -> None:
        """What fits, the first first. In place of what was there, whole or not at all."""
        chosen, size = list[Kept](), 0
        for one in kept:
            if size + one.size <= self._budget:
                chosen.append(one)
                size += one.size
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._write(chosen)
            self._prune()
        except OSError as error:
            self._log("warning", f"prefixes cannot be saved: {type(error).__name__}")

    def _write(self, kept: list[Kept]) -> None:
        if not kept:
            self._path.unlink(missing_ok=True)
            return
        entries = tuple(Entry(len(one.tokens), len(one.state), _digest(one.tokens, one.state)) for one in kept)
        head = msgspec.msgpack.encode(Head(self._mark, entries))
        part = self._path.with_suffix(".part")
        part.unlink(missing_ok=True)
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(MAGIC + _LENGTH.pack(len(head)) + head + hashlib.sha256(head).digest())
            for one in kept:
                file.write(one.tokens.astype("<i4").tobytes())
                file.write(one.state)
            file.flush()
            os.fsync(file.fileno())
        part.replace(self._path)

    def _prune(self) -> None:
        """Files of other models and what was moved aside go, the oldest first."""
        files = [path for ending in (SUFFIX, TRIED, ASIDE) for path in self._folder.glob(f"*{ending}")]
        size = self._path.stat().st_size if self._path.exists() else 0
        for path in sorted(files, key=lambda path: path.stat().st_mtime, reverse=True):
            if path != self._path:
                size += path.stat().st_size
                if size > self._budget:
                    path.unlink()

    def _read(self, path: Path) -> list[Kept]:
        """Raises ValueError, saying what is wrong."""
        if path.stat().st_size > self._budget + MAX_HEAD:
            raise ValueError("it is longer than such a file may be")
        data = memoryview(path.read_bytes())
        start = len(MAGIC) + _LENGTH.size
        if bytes(data[: len(MAGIC)]) != MAGIC or len(data) < start:
            raise ValueError("not a file of prefixes")
        (length,) = _LENGTH.unpack_from(data, len(MAGIC))
        raw, at = bytes(data[start : start + length]), start + length + 32
        if length > MAX_HEAD or bytes(data[start + length : at]) != hashlib.sha256(raw).digest():
            raise ValueError("its head is damaged")
        head = msgspec.msgpack.decode(raw, type=Head)
        if head.fingerprint != self._mark or len(data) != at + sum(4 * one.tokens + one.size for one in head.entries):
            raise ValueError("it is not of this model, or not whole")
        kept = []
        for entry in head.entries:
            middle = at + 4 * entry.tokens
            tokens = np.frombuffer(data[at:middle], "<i4").astype(np.int32)
            at = middle + entry.size
            state = bytes(data[middle:at])
            if _digest(tokens, state) != entry.sha256:
                raise ValueError("a prefix is damaged")
            kept.append(Kept(tokens, state, private=False))
        return kept


def _digest(tokens: "np.ndarray[tuple[int], np.dtype[np.int32]]", state: State) -> bytes:
    digest = hashlib.sha256(tokens.astype("<i4").tobytes())
    digest.update(state)
    return digest.digest()
