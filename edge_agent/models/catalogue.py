"""The models that have a name of their own here: `catalogue.toml`, data that ships with the package."""

import functools
import tomllib
from collections.abc import Mapping
from importlib.resources import files
from types import MappingProxyType

import msgspec

from shared.models import Kind


class Entry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where a named model comes from. `size` in bytes; without a `sha256` what comes first is what is kept."""

    source: str
    size: int
    licence: str
    sha256: str = ""
    kind: Kind = "chat"


@functools.cache
def catalogue() -> Mapping[str, Entry]:
    """By name, smallest first."""
    text = files("edge_agent.models").joinpath("catalogue.toml").read_text("utf-8")
    return MappingProxyType(msgspec.convert(tomllib.loads(text), dict[str, Entry]))
