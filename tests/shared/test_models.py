"""What a name or a path means, and that no name leads out of the store."""

import hashlib
import json
from pathlib import Path

import msgspec
import pytest

from shared.errors import UnknownModel
from shared.gguf import ModelInvalid
from shared.models import (
    Manifest,
    default_store,
    digest_of,
    installed,
    model_name,
    resolve,
    stored_file,
    valid_name,
    verify,
)

BAD_NAMES = [
    "../../etc/passwd",
    "..%2f..%2fetc",
    "a/../b",
    "/etc/passwd",
    "a\0b",
    "sha256:../../x",
    "..",
    ".hidden",
    "",
    "a" * 200,
    "A B",
    "x:y:z",
    "a\\b",
    "é",
    "a\n",
]


def put(store: Path, name: str, content: bytes = b"weights", *, says: str | None = None) -> Path:
    store.mkdir(parents=True, exist_ok=True)
    file = stored_file(name, store)
    file.write_bytes(content)
    manifest = {"name": says or name, "size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    file.with_suffix(".json").write_text(json.dumps(manifest))
    return file


def test_a_name_is_the_file_in_the_store(tmp_path: Path) -> None:
    """And the file's name to clients is the name again."""
    file = put(tmp_path, "smollm2:135m")

    assert resolve("smollm2:135m", store=tmp_path) == file == tmp_path / "smollm2-135m.gguf"
    assert model_name(file) == "smollm2:135m"
    assert [manifest.name for manifest in installed(tmp_path)] == ["smollm2:135m"]


def test_a_path_is_itself(tmp_path: Path) -> None:
    """A GGUF file or a folder of weights anywhere, called by its own name."""
    file, folder = tmp_path / "mine.gguf", tmp_path / "llama"
    file.write_bytes(b"x")
    folder.mkdir()
    (folder / "config.json").write_text("{}")

    assert resolve(str(file), store=tmp_path / "store") == file
    assert resolve(str(folder), store=tmp_path / "store") == folder
    assert (model_name(file), model_name(folder)) == ("mine", "llama")


def test_what_is_missing_says_how_to_get_it(tmp_path: Path) -> None:
    """The command to get a name, what is there, what else could be meant."""
    put(tmp_path, "other:1b")

    with pytest.raises(UnknownModel, match=r"edge-agent pull smollm2:135m.*other:1b"):
        resolve("smollm2:135m", store=tmp_path)
    with pytest.raises(UnknownModel, match=r"other:1b.*\.gguf"):
        resolve("no/thing", store=tmp_path)


@pytest.mark.parametrize("name", BAD_NAMES)
def test_no_name_leads_out_of_the_store(tmp_path: Path, name: str) -> None:
    """Traversal, NUL, absolute, over-long: not a name, and as a path no model."""
    assert not valid_name(name)
    with pytest.raises(UnknownModel):
        stored_file(name, tmp_path)
    with pytest.raises(UnknownModel):
        resolve(name, store=tmp_path)


def test_a_link_out_of_the_store_is_not_followed(tmp_path: Path) -> None:
    """A name means a file in the store, not one that the store points at."""
    store, outside = tmp_path / "store", tmp_path / "outside.gguf"
    outside.write_bytes(b"x")
    store.mkdir()
    (store / "link.gguf").symlink_to(outside)

    with pytest.raises(UnknownModel):
        resolve("link", store=store)


def test_one_changed_byte_is_seen(tmp_path: Path) -> None:
    """S-17: a file with a manifest is what was pulled, or it is not loaded; one without was never pulled."""
    file = put(tmp_path, "m")
    verify(file)
    file.write_bytes(b"weightz")

    with pytest.raises(ModelInvalid, match="edge-agent pull m"):
        verify(file)
    file.with_suffix(".json").unlink()
    verify(file)


@pytest.mark.parametrize("manifest", [b"", b"[]", b"\xff", b'{"name": "m"}', b'{"name":"m","size":"x","sha256":""}'])
def test_a_broken_manifest_is_a_typed_error(tmp_path: Path, manifest: bytes) -> None:
    """It neither vouches for the file nor hides what else is there."""
    put(tmp_path, "fine")
    file = put(tmp_path, "m")
    file.with_suffix(".json").write_bytes(manifest)

    with pytest.raises(ModelInvalid):
        verify(file)
    assert [found.name for found in installed(tmp_path)] == ["fine"]


def test_a_manifest_that_names_another_model_is_not_listed(tmp_path: Path) -> None:
    """Copied beside the wrong file, it says nothing about it."""
    put(tmp_path, "m", says="n")

    assert installed(tmp_path) == ()


def test_the_store_follows_the_xdg_convention(tmp_path: Path) -> None:
    """A relative XDG_DATA_HOME does not count."""
    assert default_store({"XDG_DATA_HOME": "/data"}, tmp_path) == Path("/data/causeway/models")
    for env in ({}, {"XDG_DATA_HOME": ""}, {"XDG_DATA_HOME": "data"}):
        assert default_store(env, tmp_path) == tmp_path / ".local/share/causeway/models"


def test_a_model_is_named_by_its_bytes(tmp_path: Path) -> None:
    """By its manifest's hash where it was pulled, else by size and time of writing: other bytes, another name."""
    file = tmp_path / "a.gguf"
    assert digest_of(file) == ""
    file.write_bytes(b"GGUF")
    unnamed = digest_of(file)
    file.write_bytes(b"GGUF2")
    assert len({"", unnamed, digest_of(file)}) == 3

    file.with_suffix(".json").write_bytes(msgspec.json.encode(Manifest(name="a", size=5, sha256="f" * 64)))
    assert digest_of(file) == "f" * 64
