"""What is in the store: told as it is, removed as a whole, and never from under whoever uses it."""

import hashlib
from pathlib import Path

import pytest
from gguf import LlamaFileType
from model_origin import TEMPLATE, model_bytes

from edge_agent.errors import ModelBusy
from edge_agent.facts import QUANTIZATIONS, facts_of
from edge_agent.locks import held, is_held
from edge_agent.models.catalogue import catalogue
from edge_agent.models.installed import installed, remove, show
from edge_agent.models.pull import pull
from edge_agent.models.sources import check_url, name_of, source_of
from shared.errors import BadRequest, UnknownModel
from shared.gguf import ModelInvalid
from shared.models import valid_name

MODEL = model_bytes(1000)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """With one model in it, `tiny`."""
    path = tmp_path / "tiny.gguf"
    path.write_bytes(MODEL)
    pull(str(path), store=tmp_path / "store", told=lambda step: None)
    return tmp_path / "store"


def test_a_model_is_shown_with_all_that_is_known(store: Path) -> None:
    """What its file says, its chat template included: 2 layers of 2 key and value heads of 8 halves are 128 bytes."""
    details = show("tiny", store=store)

    assert details.installed == installed(store)[0]
    assert (details.facts.template, details.facts.licence, details.facts.quantization) == (TEMPLATE, "mit", "Q4_K_M")
    assert details.facts.kv_bytes == 2 * 2 * (8 + 8) * 2
    assert details.facts.template_sha256 == hashlib.sha256(TEMPLATE.encode()).hexdigest()


def test_a_manifest_of_an_older_version_is_completed(store: Path) -> None:
    """It had a name, a size and a hash; the rest is in the file."""
    (store / "tiny.json").write_text(
        f'{{"name":"tiny","size":{len(MODEL)},"sha256":"{hashlib.sha256(MODEL).hexdigest()}"}}'
    )

    (found,) = installed(store)

    assert (found.manifest.architecture, found.manifest.context_length) == ("llama", 64)


def test_another_chat_template_than_the_pinned_one_is_refused(store: Path) -> None:
    """S-23: the file was changed under the manifest's feet."""
    (store / "tiny.gguf").write_bytes(model_bytes(1000, TEMPLATE.replace("content", "CONTENT")))

    with pytest.raises(ModelInvalid, match="template"):
        show("tiny", store=store)


def test_removing_leaves_nothing(store: Path) -> None:
    """Neither file nor manifest nor what a broken pull left; the second time there is no such model."""
    (store / ".partial/tiny").mkdir(parents=True)
    (store / ".partial/tiny/data").write_bytes(b"half")

    remove("tiny", store=store)

    assert list(store.iterdir()) == []
    with pytest.raises(UnknownModel):
        remove("tiny", store=store)


def test_what_is_loaded_is_removed_only_by_force(store: Path) -> None:
    """Whoever loads a model holds its file; the lock is gone with its holder."""
    file = store / "tiny.gguf"
    with held(file, shared=True) as one, held(file, shared=True) as other:
        assert (one, other, is_held(file)) == (True, True, True)
        with pytest.raises(ModelBusy, match="edge-agent stop tiny"):
            remove("tiny", store=store)
        assert file.exists()
        remove("tiny", store=store, force=True)

    assert not file.exists()


@pytest.mark.parametrize("name", ["../x", "nothing", "a\0b", "/etc/passwd"])
def test_what_is_not_there_is_said(store: Path, name: str) -> None:
    """S-12: nor does a name lead out of the store."""
    for act in (show, remove):
        with pytest.raises(UnknownModel):
            act(name, store=store)


@pytest.mark.parametrize(
    "url",
    [
        "http://models.invalid/m.gguf",
        "ftp://models.invalid/m.gguf",
        "file:///etc/passwd",
        "https:///m.gguf",
        "https://user:secret@models.invalid/m.gguf",
        "https://[::1/m.gguf",
        "https://models.invalid:99999/m.gguf",
        "hf://org",
        "hf://org/../m.gguf",
        "hf://org/repo/../../m.gguf",
        "hf://org/repo@a/b/../m.gguf",
        "pypi://package/member",
        "pypi://package==1.0/../member",
        "pypi://package==1.0 --index-url=x/member",
    ],
)
def test_a_source_that_is_not_safe_is_refused(url: str) -> None:
    """Plaintext beyond this machine, other schemes, credentials, parents, options for pip."""
    with pytest.raises(BadRequest) as raised:
        source_of(url)

    assert "secret" not in raised.value.message


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("https://models.invalid/a/Some-Model.Q4.gguf?x=1", "some-model.q4"),
        ("hf://org/Repo/sub/M-Q8_0.gguf", "m-q8_0"),
        ("pypi://package==1.0/folder/My Model.GGUF", "my-model"),
    ],
)
def test_a_model_is_called_after_its_file(source: str, name: str) -> None:
    """Lower case, without the ending."""
    assert name_of(source_of(source)) == name


@pytest.mark.parametrize("path", ["/m.bin", "/", "/..%2f..%2fm.gguf", "/.gguf", "/a%00b.gguf", "/..gguf", "/é.gguf"])
def test_a_url_that_gives_no_name_is_refused(path: str) -> None:
    """The name comes from the last part of the path, and must be one."""
    source = source_of(check_url(f"https://models.invalid{path}"))
    try:
        name = name_of(source)
    except BadRequest:
        return

    assert name == "m"  # what is before the encoded separators does not count


def test_the_catalogue_has_only_what_can_be_pulled() -> None:
    """Names, sources that are understood, whole hashes, sizes."""
    assert len(catalogue()) >= 5
    for name, entry in catalogue().items():
        assert valid_name(name)
        assert source_of(entry.source)
        assert len(bytes.fromhex(entry.sha256)) == 32
        assert entry.size > 0
        assert entry.licence


def test_quantizations_are_those_of_the_format() -> None:
    """The table against the one of the format's own library."""
    for number, name in QUANTIZATIONS.items():
        assert LlamaFileType(number).name.removeprefix("MOSTLY_").removeprefix("ALL_") == name


@pytest.mark.model
def test_the_real_model_says_what_it_is(model_path: Path) -> None:
    """SmolLM2 135M: 30 layers, 3 heads of 64 for keys and values."""
    facts = facts_of(model_path)

    assert (facts.architecture, facts.quantization, facts.context_length) == ("llama", "Q4_1", 8192)
    assert facts.parameters == 134_515_008
    assert facts.kv_bytes == 30 * 3 * 128 * 2
