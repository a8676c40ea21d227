import json
import shutil
from pathlib import Path

import pytest

from edge_agent.embedding.convert import convert
from edge_agent.embedding.model import EmbeddingModel
from edge_agent.embedding.source import SOURCE_FILES, WEIGHTS
from shared.gguf import ModelInvalid


def test_the_same_source_gives_the_same_bytes(tiny_source: Path, tiny_file: Path, tmp_path: Path) -> None:
    """So that a hash can be compared between devices; and nothing else is left in the folder."""
    convert(tiny_source, tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == tiny_file.read_bytes()
    assert [file.name for file in tmp_path.iterdir()] == ["again.onnx"]


def test_truncation_and_padding_of_the_tokenizer_are_not_kept(tiny_file: Path) -> None:
    """The saved tokenizer cuts at 8 tokens and pads to 8: ours says how long a text is."""
    model = EmbeddingModel(tiny_file, threads=1)
    assert [len(ids) for ids in model.tokens(["the sky", "the " * 15], 0)] == [4, 17]


@pytest.mark.parametrize("name", [WEIGHTS, *SOURCE_FILES])
@pytest.mark.parametrize("damage", ["gone", "empty", "garbage", "half"])
def test_damaged_input_is_named_and_nothing_is_written(
    tiny_source: Path, tmp_path: Path, name: str, damage: str
) -> None:
    """A typed error with the file's name; neither a model nor a part of one is there afterwards."""
    source = tmp_path / "source"
    shutil.copytree(tiny_source, source)
    file = source / name
    whole = file.read_bytes()
    file.unlink()
    if damage != "gone":
        file.write_bytes({"empty": b"", "garbage": b"\xffgarbage", "half": whole[: len(whole) // 2]}[damage])
    (tmp_path / "out").mkdir()
    with pytest.raises(ModelInvalid, match=name.replace(".", r"\.")):
        convert(source, tmp_path / "out" / "model.onnx")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("name", "change"),
    [("sentence_bert_config.json", {"max_seq_length": 33}), ("sentence_bert_config.json", {"max_seq_length": 0}),
     ("config.json", {"vocab_size": 50}), ("config.json", {"hidden_act": "relu"})],
)  # fmt: skip
def test_files_that_do_not_belong_together_are_refused(
    tiny_source: Path, tmp_path: Path, name: str, change: dict[str, object]
) -> None:
    """Limits beyond the model's positions, another vocabulary, another architecture."""
    source = tmp_path / "source"
    shutil.copytree(tiny_source, source)
    (source / name).write_text(json.dumps(json.loads((source / name).read_text()) | change))
    with pytest.raises(ModelInvalid):
        convert(source, tmp_path / "model.onnx")


def test_a_model_that_int8_changes_is_refused(
    tiny_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison with float32 is made, and decides."""
    monkeypatch.setattr("edge_agent.embedding.convert.MIN_COSINE", 1.1)
    with pytest.raises(ModelInvalid, match="cosine"):
        convert(tiny_source, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())
