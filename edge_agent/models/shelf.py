"""Which model a name means: the default, or one of the store's. Looked up anew each time, since models come and go."""

from dataclasses import dataclass
from pathlib import Path

from edge_agent.backends.base import DEFAULT_CONTEXT
from edge_agent.facts import facts_of
from router.names import VIRTUAL_MODELS
from shared.errors import CausewayError, UnknownModel
from shared.models import Manifest, digest_of, installed, manifest_of, model_name, placed_file, stored_file


@dataclass(frozen=True, slots=True)
class Entry:
    """A model that can be loaded. `context_length` is what a request may use; `digest` names the bytes of the file."""

    name: str
    file: Path
    context_length: int
    digest: str = ""


class Shelf:
    """`context` is what the settings allow a request, None: the runtime's own."""

    def __init__(self, default: Path, store: Path, context: int | None) -> None:
        self.store = store
        self._context = context or DEFAULT_CONTEXT
        self._path, self._name = default, model_name(default)
        self._seen = _mark(default)
        self._default = self._of_file(self._name, default)

    @property
    def default(self) -> Entry:
        """Looked at again when its file, or its manifest, is another one than before."""
        mark = _mark(self._path)
        if mark and mark != self._seen:
            self._seen, self._default = mark, self._of_file(self._name, self._path)
        return self._default

    def find(self, name: str) -> Entry:
        """The model of this name; the default where there is none, for then the name means no model of this device."""
        try:
            return self.default if name in VIRTUAL_MODELS else self.entry(name)
        except CausewayError:
            return self.default

    def entry(self, name: str) -> Entry:
        """Raises UnknownModel, also for a model that does not chat."""
        if name == self.default.name:
            return self.default
        file = placed_file(name, self.store)
        manifest = manifest_of(file)
        if manifest is None or manifest.name != name:
            raise UnknownModel(f"{name} is not on this device", param="model", source="edge")
        if manifest.kind != "chat":
            raise UnknownModel(f"{name} makes embeddings, it does not answer", param="model", source="edge")
        return self._of_manifest(manifest, file)

    def entries(self) -> list[Entry]:
        """The default first, then the store's by name."""
        others = [found for found in installed(self.store) if found.kind == "chat" and found.name != self.default.name]
        return [self.default, *(self._of_manifest(found, stored_file(found.name, self.store)) for found in others)]

    def _of_manifest(self, manifest: Manifest, file: Path) -> Entry:
        return Entry(manifest.name, file, min(self._context, manifest.context_length or self._context), manifest.sha256)

    def _of_file(self, name: str, file: Path) -> Entry:
        try:
            trained = facts_of(file).context_length
        except CausewayError:
            trained = 0  # whoever loads it says what is wrong
        return Entry(name, file, min(self._context, trained or self._context), digest_of(file))


def _mark(file: Path) -> tuple[int, ...]:
    """Changes with the file and with its manifest; empty while there is no file."""
    try:
        stats = [file.stat(), *(path.stat() for path in (file.with_suffix(".json"),) if path.exists())]
    except OSError:
        return ()
    return tuple(number for found in stats for number in (found.st_ino, found.st_size, found.st_mtime_ns))
