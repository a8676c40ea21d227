"""Where models lie on disk, and what a name or a path on a command line means.

The store is one flat folder: `smollm2:135m` is the file `smollm2-135m.gguf` (`.onnx` if it makes embeddings), and
`smollm2-135m.json` beside it is its manifest. Nothing here downloads or writes: the edge pulls, both ends resolve.
"""

import hashlib
import re
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import msgspec

from shared.errors import UnknownModel
from shared.gguf import ModelInvalid

MAX_NAME_CHARS = 128
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*(:[a-z0-9][a-z0-9._-]*)?")
_HASH_CHUNK = 1 << 20

Kind = Literal["chat", "embedding"]
"""What a model is for: to answer, or to turn texts into vectors."""
SUFFIXES: Mapping[Kind, str] = MappingProxyType({"chat": ".gguf", "embedding": ".onnx"})


class Manifest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What was pulled, from where. `size` in bytes; a file that no longer agrees with it must not be loaded.

    What the file says of itself stands here too, so that nobody need open it: empty or 0 where it does not say, and in
    manifests of older versions. `template_sha256` pins the chat template. Fields of newer versions are passed over.
    """

    name: str
    size: int
    sha256: str
    kind: Kind = "chat"
    source: str = ""
    pulled_at: datetime | None = None
    architecture: str = ""
    quantization: str = ""
    parameters: int = 0
    context_length: int = 0
    template_sha256: str = ""
    licence: str = ""


def default_store(env: Mapping[str, str], home: Path) -> Path:
    """Where models lie, by the XDG convention (a relative XDG_DATA_HOME is to be ignored, it says)."""
    data = Path(env.get("XDG_DATA_HOME", ""))
    return (data if data.is_absolute() else home / ".local" / "share") / "causeway" / "models"


def valid_name(name: str) -> bool:
    """Whether this can be a model's name: no separator, no traversal, no NUL, nothing a shell or a URL would read."""
    return len(name) <= MAX_NAME_CHARS and _NAME.fullmatch(name) is not None


def stored_file(name: str, store: Path, kind: Kind = "chat") -> Path:
    """Where the model of this name and kind belongs, there or not. Raises UnknownModel if it cannot be a name."""
    if not valid_name(name):
        raise UnknownModel(f"{name[:MAX_NAME_CHARS]!r} cannot be the name of a model", param="model")
    return store / (name.replace(":", "-") + SUFFIXES[kind])


def placed_file(name: str, store: Path) -> Path:
    """Where the model of this name lies, whatever its kind; if there is none, where a chat model would."""
    files = [stored_file(name, store, kind) for kind in SUFFIXES]
    return next((file for file in files if file.is_file()), files[0])


def manifest_of(file: Path) -> Manifest | None:
    """The manifest beside a model file; None if there is none. Raises ModelInvalid if it cannot be read."""
    try:
        return msgspec.json.decode(file.with_suffix(".json").read_bytes(), type=Manifest)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.MsgspecError) as error:
        raise ModelInvalid(f"{file.stem}.json: the manifest cannot be read", param="model") from error


def installed(store: Path) -> tuple[Manifest, ...]:
    """The models in the store, by name. A file without a readable manifest was not put there by a pull: not listed."""
    found = []
    files = [file for suffix in SUFFIXES.values() for file in store.glob(f"*{suffix}")] if store.is_dir() else []
    for file in files:
        try:
            manifest = manifest_of(file)
        except ModelInvalid:
            continue
        if manifest is None or not valid_name(manifest.name):
            continue
        if stored_file(manifest.name, store, manifest.kind) == file:
            found.append(manifest)
    return tuple(sorted(found, key=lambda manifest: manifest.name))


def resolve(name_or_path: str, *, store: Path) -> Path:
    """The file or folder that `--model NAME|FOLDER|FILE.gguf` means. A name in the store wins over a folder's.

    Raises UnknownModel saying what is there and how to get it.
    """
    if valid_name(name_or_path) and not name_or_path.endswith(".gguf"):
        file = stored_file(name_or_path, store)
        if file.is_file() and file.resolve().is_relative_to(store.resolve()):
            return file
    path = Path(name_or_path)
    try:
        if (path.suffix == ".gguf" and path.is_file()) or (path / "config.json").is_file():
            return path
    except (OSError, ValueError):  # too long, or a NUL
        pass
    raise UnknownModel(_not_found(name_or_path, store), param="model")


def _not_found(name: str, store: Path) -> str:
    there = ", ".join(manifest.name for manifest in installed(store) if manifest.kind == "chat") or "none"
    shown = name if len(name) <= MAX_NAME_CHARS else name[:MAX_NAME_CHARS] + "…"
    if valid_name(name) and not name.endswith(".gguf"):
        return f"model {name} is not on this device: `edge-agent pull {name}` may know it (there now: {there})"
    return f"{shown!r} is neither a model of this device ({there}), nor a .gguf file, nor a folder with a config.json"


def model_name(path: Path) -> str:
    """What a model is called to clients: its manifest's name, or the file's or folder's own."""
    if path.suffix != ".gguf":
        return path.resolve().name
    manifest = manifest_of(path)
    return manifest.name if manifest else path.stem


def digest_of(file: Path) -> str:
    """Names the bytes of a model file: by its manifest, else by its size and when it was written; empty if neither can
    be read."""
    try:
        manifest, found = manifest_of(file), file.stat()
    except (OSError, ModelInvalid):
        return ""
    return manifest.sha256 if manifest else f"{found.st_size}-{found.st_mtime_ns}"


def verify(file: Path) -> None:
    """Hash a model file against its manifest, if it has one. Raises ModelInvalid if one byte differs."""
    manifest = manifest_of(file)
    if manifest is None:
        return
    digest, size = hashlib.sha256(), 0
    with file.open("rb") as stream:
        while chunk := stream.read(_HASH_CHUNK):
            digest.update(chunk)
            size += len(chunk)
    if (size, digest.hexdigest()) != (manifest.size, manifest.sha256):
        raise ModelInvalid(f"{file.name} is not what was pulled: run `edge-agent pull {manifest.name}`", param="model")
