"""What is in the model store: list, show, remove. What a name means and where it lies is in shared.models."""

from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from edge_agent.errors import ModelBusy
from edge_agent.facts import Facts, facts_of
from edge_agent.locks import is_held
from edge_agent.models.download import typed_os_errors
from edge_agent.models.partial import discard, partial_of
from shared.errors import CausewayError, UnknownModel
from shared.gguf import ModelInvalid
from shared.models import Manifest, manifest_of, placed_file, stored_file
from shared.models import installed as manifests


@dataclass(frozen=True, slots=True)
class Installed:
    """A model in the store."""

    manifest: Manifest
    file: Path
    modified: datetime


@dataclass(frozen=True, slots=True)
class ModelDetails:
    """An installed model, and what its file says of itself, its chat template included."""

    installed: Installed
    facts: Facts


def installed(store: Path) -> list[Installed]:
    """What is in the store, by name."""
    found = []
    for manifest in manifests(store):
        with suppress(OSError, CausewayError):  # removed meanwhile
            found.append(described(manifest, stored_file(manifest.name, store, manifest.kind)))
    return found


def show(name: str, *, store: Path) -> ModelDetails:
    """Raises UnknownModel, or ModelInvalid if the file is not what was pulled."""
    file = placed_file(name, store)
    manifest = manifest_of(file)
    if manifest is None or manifest.name != name or not file.is_file():
        raise UnknownModel(f"{name} is not on this device", param="name")
    facts = facts_of(file) if manifest.kind == "chat" else _facts_said(manifest)
    if manifest.template_sha256 not in ("", facts.template_sha256):
        raise ModelInvalid(f"{name}: its chat template is not the one that was pulled", param="name")
    return ModelDetails(described(manifest, file), facts)


def remove(name: str, *, store: Path, force: bool = False) -> None:
    """Also what a broken pull of it left. Raises UnknownModel if there is nothing, ModelBusy if it is loaded."""
    file = placed_file(name, store)
    partial = partial_of(file)
    if not file.exists() and not partial.exists():
        raise UnknownModel(f"{name} is not on this device", param="name")
    if not force and is_held(file):
        raise ModelBusy(f"{name} is loaded: `edge-agent stop {name}` first, or --force", param="name")
    if is_held(partial):
        raise ModelBusy(f"{name} is being pulled", param="name")
    with typed_os_errors():
        file.with_suffix(".json").unlink(missing_ok=True)
        file.unlink(missing_ok=True)
        discard(partial)


def _facts_said(manifest: Manifest) -> Facts:
    """Of a file that only its own library reads."""
    return Facts(
        architecture=manifest.architecture,
        parameters=manifest.parameters,
        quantization=manifest.quantization,
        context_length=manifest.context_length,
    )


def described(manifest: Manifest, file: Path) -> Installed:
    """A manifest of an older version is completed from the file itself."""
    modified = datetime.fromtimestamp(file.stat().st_mtime, UTC)
    if not manifest.architecture:
        with suppress(ModelInvalid):  # what is damaged is listed all the same
            facts = facts_of(file)
            manifest = msgspec.structs.replace(
                manifest,
                architecture=facts.architecture,
                quantization=facts.quantization,
                parameters=facts.parameters,
                context_length=facts.context_length,
                licence=facts.licence,
            )
    return Installed(manifest, file, modified)
