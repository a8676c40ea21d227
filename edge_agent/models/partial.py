"""The folder in which one pull of a model works, and which outlives it where going on from there makes sense."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from edge_agent.errors import ModelBusy
from edge_agent.locks import held
from edge_agent.models.download import typed_os_errors
from shared.errors import CausewayError

PARTIAL: Final = ".partial"


def partial_of(file: Path) -> Path:
    return file.parent / PARTIAL / file.stem


@contextmanager
def claimed(file: Path) -> Iterator[Path]:
    """The folder that one pull of this model has to itself: kept if going on makes sense, else gone afterwards."""
    folder = partial_of(file)
    with typed_os_errors():
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        claim = held(folder)
    with claim as free:
        if not free:
            raise ModelBusy(f"{file.stem} is being pulled by another process: wait for it", param="name")
        try:
            yield folder
        except CausewayError as error:
            if not error.retryable:
                discard(folder)
            raise
        else:
            discard(folder)
        finally:
            _sweep(folder)


def _sweep(folder: Path) -> None:
    """Wheels are of no use to the next pull, and a folder without a beginning of the model is of none either."""
    shutil.rmtree(folder / "package", ignore_errors=True)
    if folder.is_dir() and not (folder / "state.json").exists():
        discard(folder)


def discard(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):
        folder.parent.rmdir()  # if it is empty
