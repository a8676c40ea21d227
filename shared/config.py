"""Settings: flag beats environment (`CAUSEWAY_*`) beats file. Nothing is read at import."""

import stat
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from shared.errors import BadRequest

ENV_PREFIX = "CAUSEWAY_"
MAX_SECRET_BYTES = 4096


class Settings(BaseModel):
    """Base of both sides' settings: frozen, and an unknown name is an error, never ignored."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class InvalidSettings(BadRequest):
    """A setting is wrong; the message names it and where it came from. The process must not start."""

    code = "invalid_settings"


M = TypeVar("M", bound=Settings)


def load(model: type[M], file: Path | None, env: Mapping[str, str], flags: Mapping[str, Any]) -> M:
    """Build settings from a TOML file, `CAUSEWAY_<FIELD>` variables and command-line flags (None means not given).

    Raises InvalidSettings naming the field and its source.
    """
    layers: list[tuple[str, Mapping[str, Any]]] = [
        (str(file), _read(file)) if file else ("file", {}),
        ("environment", _from_env(model, env)),
        ("command line", {name: value for name, value in flags.items() if value is not None}),
    ]
    values = {name: value for _, layer in layers for name, value in layer.items()}
    origin = {name: where for where, layer in layers for name in layer}
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(str(part) for part in first["loc"]) or model.__name__
        where = origin.get(str(first["loc"][0]) if first["loc"] else "", "settings")
        raise InvalidSettings(f"{where}: {field}: {first['msg']}", param=field) from error


def read_secret(path: Path, name: str) -> str:
    """The one line of a secret's file. Raises InvalidSettings, also where other users could read it."""
    try:
        with path.open("rb") as stream:
            content = stream.read(MAX_SECRET_BYTES + 1)
            mode = stat.S_IMODE(path.stat().st_mode)
    except OSError as error:
        raise InvalidSettings(f"{name}: {path}: {error.strerror}", param=name) from error
    if mode & stat.S_IROTH:
        raise InvalidSettings(f"{name}: every user can read {path}: run `chmod 600` on it", param=name)
    try:
        secret = content.decode("ascii").strip()
    except UnicodeDecodeError:
        secret = ""
    if not secret or not secret.isprintable() or " " in secret or len(content) > MAX_SECRET_BYTES:
        raise InvalidSettings(f"{name}: {path} must hold one line of ASCII, the secret", param=name)
    return secret


def _read(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text("utf-8"))
    except OSError as error:
        raise InvalidSettings(f"{file}: {error.strerror}", param="config") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidSettings(f"{file}: {error}", param="config") from error


def _from_env(model: type[Settings], env: Mapping[str, str]) -> dict[str, str]:
    """Only names of the model's own fields count: other programs' CAUSEWAY_* variables are not ours to refuse."""
    names = {f"{ENV_PREFIX}{field.upper()}": field for field in model.model_fields}
    return {field: env[name] for name, field in names.items() if name in env}
