"""One file over https, into a folder that outlives a broken connection and this process.

`data` is what came so far and `state.json` what the server called it (a strong ETag); the next attempt, or the next
process, asks for the rest under If-Range, so that two halves of different files are never joined. Every byte is hashed,
also those that lie there already.
"""

import errno
import hashlib
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import urljoin, urlsplit

import httpx
import msgspec

from edge_agent.errors import AccessDenied, ChecksumMismatch, DiskFull, PullFailed, SourceMissing
from edge_agent.models.hub import Credential
from edge_agent.models.sources import LOOPBACK, check_url
from shared.errors import BadRequest, CausewayError, RateLimited, Unreachable

CHUNK: Final = 1 << 20
ATTEMPTS: Final = 5
"""In a row, without as much as a CHUNK between two failures."""
MAX_PAUSE_S: Final = 30.0
MAX_REDIRECTS: Final = 5
REDIRECTS: Final = (301, 302, 303, 307, 308)
TIMEOUT: Final = httpx.Timeout(30.0)
MAX_BYTES: Final = 1 << 40
SPARE_BYTES: Final = 64 << 20
"""Left free on the disk."""
LINKED_ETAG: Final = "x-linked-etag"
"""Where a hub redirects to its storage, it says the SHA-256 of what is there."""

Told = Callable[[int, int | None], None]
"""Told how many bytes are there, and how many there will be if that is known. An exception that it raises ends the
download, which can be taken up again."""


class State(msgspec.Struct, frozen=True):
    """What `data` is the beginning of."""

    url: str
    tag: str
    total: int


@dataclass(frozen=True, slots=True)
class Fetched:
    """`promised` is the SHA-256 that the hub itself gave for this file, "" if it gave none."""

    sha256: str
    size: int
    promised: str


class _BrokeError(Exception):
    """This attempt failed in a way that another may not; `error` is what to say if none is left."""

    def __init__(self, error: CausewayError, *, restart: bool = False) -> None:
        super().__init__(error.message)
        self.error = error
        self.restart = restart


class Download:
    """One file in `folder`, possibly in several parts. `size` is what it must have, 0 if nobody knows, `most` what it
    may."""

    def __init__(
        self,
        url: str,
        folder: Path,
        told: Told,
        *,
        credential: Credential | None = None,
        size: int = 0,
        most: int = MAX_BYTES,
    ) -> None:
        self._most = most
        self._url = check_url(url)
        self._told = told
        self._credential = credential
        self._expected = size
        self._file = folder / "data"
        self._state = folder / "state.json"
        self._digest = hashlib.sha256()
        self._size = 0
        self._total: int | None = None
        self._tag = ""
        self._promised = ""

    def run(self, client: httpx.Client, sleep: Callable[[float], None] = time.sleep) -> Fetched:
        """Raises PullFailed, Unreachable or RateLimited; what came is still in the folder then."""
        with typed_os_errors():
            self._take_up()
            failures, reached = 0, self._size
            while True:
                try:
                    self._attempt(client)
                    return Fetched(self._digest.hexdigest(), self._size, self._promised)
                except _BrokeError as broke:
                    if broke.restart:
                        self._forget()
                    failures = 1 if self._size >= reached + CHUNK else failures + 1
                    reached = self._size
                    if failures >= ATTEMPTS:
                        raise broke.error from broke
                    sleep(min(broke.error.retry_after or 0.25 * 2**failures, MAX_PAUSE_S))

    @property
    def file(self) -> Path:
        return self._file

    def _take_up(self) -> None:
        """Go on from what an earlier process left, if that is of this very URL."""
        with suppress(OSError, msgspec.MsgspecError):
            state = msgspec.json.decode(self._state.read_bytes(), type=State)
            if state.url == self._url and state.tag and self._file.stat().st_size <= (state.total or MAX_BYTES):
                self._tag, self._total = state.tag, state.total or None
                with self._file.open("rb") as file:
                    while chunk := file.read(CHUNK):
                        self._digest.update(chunk)
                        self._size += len(chunk)
        if not self._tag:
            self._forget()

    def _forget(self) -> None:
        self._state.unlink(missing_ok=True)
        self._file.unlink(missing_ok=True)
        self._digest, self._size, self._total, self._tag = hashlib.sha256(), 0, None, ""

    def _attempt(self, client: httpx.Client) -> None:
        if self._total is not None and self._size == self._total and self._size:
            return  # whole already: an earlier process ended before it could say so
        try:
            with self._reply(client) as reply:
                self._check(reply)
                self._receive(reply)
        except httpx.TransportError as error:
            raise _BrokeError(
                Unreachable(f"no connection to {_host(self._url)} ({type(error).__name__}): run the same pull to go on")
            ) from error
        except (httpx.InvalidURL, httpx.DecodingError) as error:
            raise PullFailed(f"{_host(self._url)} sent a reply that makes no sense") from error
        if self._total is not None and self._size != self._total:
            raise _BrokeError(Unreachable("the connection always ends early: run the same pull to go on"))

    @contextmanager
    def _reply(self, client: httpx.Client) -> Iterator[httpx.Response]:
        """Of wherever the URL leads, by at most MAX_REDIRECTS steps, each of them safe."""
        url = self._url
        ask = {"accept-encoding": "identity"}
        if self._size and self._tag:
            ask |= {"range": f"bytes={self._size}-", "if-range": self._tag}
        for _ in range(MAX_REDIRECTS + 1):
            secret = self._credential.headers(url) if self._credential else {}
            with client.stream("GET", url, headers=ask | secret) as reply:
                self._note_promise(url, reply)
                if reply.status_code not in REDIRECTS:
                    yield reply
                    return
                url = _next(url, reply.headers.get("location", ""))
        raise PullFailed(f"{_host(self._url)} redirects more than {MAX_REDIRECTS} times")

    def _note_promise(self, url: str, reply: httpx.Response) -> None:
        said = reply.headers.get(LINKED_ETAG, "").strip('"').lower()
        if url == self._url and len(said) == 64 and set(said) <= set("0123456789abcdef"):
            self._promised = said

    def _check(self, reply: httpx.Response) -> None:
        """Begin, or go on, or say why not."""
        status = reply.status_code
        if status == 206 and self._size and reply.headers.get("content-range", "").startswith(f"bytes {self._size}-"):
            return
        if status == 200:
            self._begin(reply)
        elif status in (206, 416):
            raise _BrokeError(PullFailed("the server sends a part that was not asked for"), restart=True)
        else:
            raise _refusal(self._url, reply, anonymous=self._credential is None)

    def _begin(self, reply: httpx.Response) -> None:
        self._forget()
        length = reply.headers.get("content-length", "")
        self._total = int(length) if length.isdecimal() and len(length) < 20 else None
        if self._expected and self._total not in (None, self._expected):
            raise ChecksumMismatch(f"the server has {self._total} bytes; the model has {self._expected}")
        tag = reply.headers.get("etag", "")
        self._tag = tag if tag.startswith('"') else ""  # a weak tag does not promise the same bytes
        check_space(self._file.parent, self._total or self._expected)
        self._file.write_bytes(b"")
        if self._tag:
            self._state.write_bytes(msgspec.json.encode(State(self._url, self._tag, self._total or 0)))

    def _receive(self, reply: httpx.Response) -> None:
        limit = min(self._total or self._expected or self._most, self._most)
        with self._file.open("ab") as file:
            self._told(self._size, self._total)
            for chunk in reply.iter_raw():  # as it comes: what arrived before a break is kept
                if self._size + len(chunk) > limit:
                    raise ChecksumMismatch("the server sends more than it said")
                file.write(chunk)
                self._digest.update(chunk)
                self._size += len(chunk)
                self._told(self._size, self._total)


def read(url: str, most: int, *, credential: Credential | None, client: httpx.Client) -> bytes:
    """A small reply, whole. Follows no redirect. Raises PullFailed, Unreachable, RateLimited."""
    got = bytearray()
    try:
        with client.stream("GET", check_url(url), headers=credential.headers(url) if credential else {}) as reply:
            if reply.status_code != 200:
                refusal = _refusal(url, reply, anonymous=credential is None)
                raise refusal.error if isinstance(refusal, _BrokeError) else refusal
            for chunk in reply.iter_bytes(CHUNK):
                got += chunk
                if len(got) > most:
                    raise PullFailed(f"{_host(url)} sends more than {most} bytes")
    except httpx.TransportError as error:
        raise Unreachable(f"no connection to {_host(url)} ({type(error).__name__})") from error
    return bytes(got)


def check_space(folder: Path, size: int) -> None:
    """Raises DiskFull before the disk is."""
    free = shutil.disk_usage(folder).free - SPARE_BYTES
    if size > min(free, MAX_BYTES):
        raise DiskFull(f"{size / 1e9:.1f} GB do not fit: {max(free, 0) / 1e9:.1f} GB are free")


@contextmanager
def typed_os_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull("no space left on the device") from error
        raise PullFailed(f"the model could not be written: {error.strerror}") from error


def _refusal(url: str, reply: httpx.Response, *, anonymous: bool) -> PullFailed | _BrokeError:
    host, status = _host(url), reply.status_code
    if status in (401, 403):
        hint = (
            "for a hub, set HF_TOKEN" if anonymous else "accept the model's licence on its page, or use another token"
        )
        return AccessDenied(f"{host} denies access ({status}): {hint}")
    if status in (404, 410):
        return SourceMissing(f"{host} has no such file ({status})")
    if status == 429:
        said = reply.headers.get("retry-after", "")
        pause = float(said) if said.isdecimal() and len(said) < 6 else None
        return _BrokeError(RateLimited(f"{host} asks for patience: too many requests", retry_after=pause))
    if status >= 500 or status == 408:
        return _BrokeError(Unreachable(f"{host} cannot answer just now ({status})"))
    return PullFailed(f"{host} answered {status}")


def _next(url: str, location: str) -> str:
    """Raises PullFailed for a redirect that leaves TLS, or leads from another machine to this one."""
    try:
        there = check_url(urljoin(url, location))
    except (BadRequest, ValueError):
        raise PullFailed(f"{_host(url)} redirects to where no model may come from") from None
    if not location or (_here(there) and not _here(url)):
        raise PullFailed(f"{_host(url)} redirects to where no model may come from")
    return there


def _here(url: str) -> bool:
    return urlsplit(url).hostname in LOOPBACK


def _host(url: str) -> str:
    return urlsplit(url).hostname or "the server"
