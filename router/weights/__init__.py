"""Weights as data: named arrays in a .npz with a version, checked before they are believed."""

import json
import math
import zipfile
import zlib
from dataclasses import fields
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
from numpy.typing import NDArray

from shared.errors import Internal

VERSION = 1

Array = NDArray[Any]
Part = TypeVar("Part")


class InvalidWeights(Internal):
    """A weights file is damaged, of another version, or holds numbers that are not finite; `param` names the array."""

    code: ClassVar[str] = "invalid_weights"


def shipped(name: str) -> Path:
    return Path(str(resources.files("router") / "weights" / name))


def pack(path: Path, about: dict[str, object], *parts: Any) -> None:
    """Write the arrays of `parts` (dataclasses) with `about` beside them."""
    arrays = {field.name: getattr(each, field.name) for each in parts for field in fields(each)}
    arrays["about"] = np.array(json.dumps({**about, "version": VERSION}, sort_keys=True))
    np.savez_compressed(path, allow_pickle=False, **arrays)


def unpack(path: Path) -> tuple[dict[str, Any], dict[str, Array]]:
    """What `pack` wrote, half floats widened. Raises InvalidWeights; never unpickles."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {name: np.asarray(archive[name]) for name in archive.files}
        about = json.loads(str(arrays.pop("about")))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise InvalidWeights(f"{path.name} is no weights file ({type(error).__name__})", param="path") from error
    if not isinstance(about, dict) or about.get("version") != VERSION:
        raise InvalidWeights(f"{path.name} is of another version than {VERSION}", param="about")
    return about, {
        name: array.astype(np.float32) if array.dtype == np.float16 else array for name, array in arrays.items()
    }


def part(kind: type[Part], arrays: dict[str, Array]) -> Part:
    """A `kind` (dataclass of arrays) out of `arrays`."""
    names = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    missing = [name for name in names if name not in arrays]
    if missing:
        raise InvalidWeights(f"the weights lack {missing[0]}", param=missing[0])
    return kind(**{name: arrays[name] for name in names})


def check_arrays(shapes: dict[str, tuple[int, ...]], *parts: Any) -> None:
    """Raise InvalidWeights unless every array is finite, not empty, and shaped as `shapes` says."""
    for each in parts:
        for field in fields(each):
            array = getattr(each, field.name)
            if array.shape != shapes.get(field.name, array.shape) or math.prod(array.shape) == 0:
                raise InvalidWeights(f"{field.name} has shape {array.shape}", param=field.name)
            if array.dtype.kind not in "fiu" or not np.isfinite(array).all():
                raise InvalidWeights(f"{field.name} holds what is no finite number", param=field.name)
