"""Prefixes on disk: what is read is what was written, or nothing."""

import random
from pathlib import Path

import numpy as np
import pytest

from edge_agent.backends.prefixes import Kept
from edge_agent.backends.saved import Saved

MARK = b"m" * 32
KEPT = [Kept(np.arange(size, dtype=np.int32), bytes([size]) * size, private=False) for size in (70, 80, 90)]


class Place:
    """A folder, and what was logged about it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.logged: list[str] = []

    def saved(self, budget: int = 10_000, mark: bytes = MARK) -> Saved:
        return Saved(self.folder, budget, mark, lambda _, text: self.logged.append(text))

    def read(self, budget: int = 10_000, mark: bytes = MARK) -> list[tuple[list[int], bytes]]:
        got: list[Kept] = []
        self.saved(budget, mark).load(got.extend)
        return plain(got)

    @property
    def file(self) -> Path:
        (path,) = self.folder.glob("*.prefixes")
        return path


def plain(kept: list[Kept]) -> list[tuple[list[int], bytes]]:
    return [(one.tokens.tolist(), one.state) for one in kept]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path / "prefixes")


def test_what_is_saved_is_read(place: Place) -> None:
    """In order, for this user's eyes only, and as often as wanted."""
    place.saved().save(KEPT)

    assert place.read() == place.read() == plain(KEPT)
    assert place.file.stat().st_mode & 0o777 == 0o600
    assert place.folder.stat().st_mode & 0o777 == 0o700
    assert not place.logged


def test_the_budget_holds(place: Place) -> None:
    """The first go first, and another model's file makes room, the oldest first; nothing to save leaves no file."""
    place.saved(mark=b"x" * 32).save(KEPT)
    place.saved(budget=KEPT[0].size + KEPT[1].size).save(KEPT)

    assert plain(KEPT[:2]) == place.read(KEPT[0].size + KEPT[1].size)
    assert len(list(place.folder.iterdir())) == 1
    place.saved().save([])
    assert not list(place.folder.iterdir())


def test_two_hundred_kinds_of_damage_are_noticed(place: Place) -> None:
    """S-19: bytes changed, cut off or added anywhere: nothing is used, the file is moved aside, the next is good."""
    rng = random.Random(0)
    place.saved().save(KEPT)
    whole = place.file.read_bytes()
    path = place.file
    for seed in range(200):
        data = bytearray(whole)
        at = rng.randrange(len(data))
        if seed % 4 == 0:
            data = data[:at]
        elif seed % 4 == 1:
            data[at:at] = rng.randbytes(1 + seed % 7)
        else:
            data[at] ^= 1 << (seed % 8)
        path.write_bytes(data)

        assert place.read() == []
        assert not path.exists()
    assert len(place.logged) == 200
    assert [file.suffix for file in place.folder.iterdir()] == [".damaged"]
    place.saved().save(KEPT)
    assert place.read() == plain(KEPT)


def test_another_model_finds_nothing(place: Place) -> None:
    """Neither under its own name nor by a file that was renamed."""
    place.saved().save(KEPT)
    other = b"o" * 32

    assert place.read(mark=other) == []
    place.file.rename(place.folder / f"{other.hex()[:32]}.prefixes")
    assert place.read(mark=other) == []
    assert "not of this model" in place.logged[0]


def test_a_file_that_the_process_died_of_is_not_met_again(place: Place) -> None:
    """Death while it is being used for the first time, here an exception that nothing catches."""
    place.saved().save(KEPT)

    def die(_: list[Kept]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        place.saved().load(die)
    assert place.read() == []
    assert "died" in place.logged[0]
    assert [file.suffix for file in place.folder.iterdir()] == [".damaged"]


def test_a_folder_that_cannot_be_used_fails_nothing(tmp_path: Path) -> None:
    """It is logged; the process serves and stops as if there were nothing to save."""
    (tmp_path / "file").write_text("")
    place = Place(tmp_path / "file" / "prefixes")

    assert place.read() == []
    place.saved().save(KEPT)
    assert len(place.logged) == 1
