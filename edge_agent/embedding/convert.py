"""A sentence-transformers folder becomes one file that onnxruntime runs: the graph in int8, with its tokenizer inside.

Done once, when the model is pulled. The result is compared with the same graph in float32 before it counts as made, and
the same source gives the same bytes.
"""

import os
from pathlib import Path
from typing import TypeVar

import msgspec
import numpy as np
import numpy.typing as npt
import onnxruntime
from onnx import ModelProto
from tokenizers import Tokenizer

from edge_agent.embedding.bert import BertConfig, bert_graph
from edge_agent.embedding.source import MAX_JSON_BYTES, WEIGHTS
from edge_agent.embedding.tensors import read_tensors
from edge_agent.facts import Facts
from shared.gguf import ModelInvalid

MIN_COSINE = 0.99
MAX_TOKENS = 4096
CHECKS = (
    "Why is the sky blue?",
    "Ok",
    "1234",
    "Wie koche ich ein weiches Ei, ohne dass es platzt?",
    "def area(width, height): return width * height",
    "Explain, in a few sentences, what a lighthouse keeper did all day, and why nobody needs one any more.",
)
"""Texts that both graphs must turn into nearly the same vectors; very short ones suffer first from few steps."""


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """How many tokens of a text the model was made for."""

    max_seq_length: int


Described = TypeVar("Described", BertConfig, Limits)


def convert(source: Path, target: Path) -> Facts:
    """Write `target` from the WEIGHTS and the SOURCE_FILES in `source`: whole, checked and on the disk, or not at all.

    Raises ModelInvalid naming the file that is damaged or of another kind; OSError if `target` cannot be written.
    """
    config = _decoded(source / "config.json", BertConfig)
    limit = _decoded(source / "sentence_bert_config.json", Limits).max_seq_length
    if not 3 <= limit <= min(MAX_TOKENS, config.max_position_embeddings):
        raise _invalid("sentence_bert_config.json", f"a limit of {limit} tokens")
    tokenizer = _tokenizer(source / "tokenizer.json", config)
    weights = read_tensors(source / WEIGHTS)
    made = bert_graph(config, weights, int8=True)
    ids = [tokenizer.encode(text).ids[:limit] for text in CHECKS]
    _check(made, bert_graph(config, weights, int8=False), ids)
    for key, value in (("max_tokens", str(limit)), ("tokenizer", tokenizer.to_str())):
        made.metadata_props.add(key=key, value=value)
    _write(made.SerializeToString(deterministic=True), target)
    return Facts(
        architecture=config.model_type,
        parameters=sum(weight.size for weight in weights.values() if weight.dtype.kind == "f"),
        quantization="INT8",
        context_length=limit,
        embedding_length=config.hidden_size,
    )


def _decoded(file: Path, kind: type[Described]) -> Described:
    try:
        return msgspec.json.decode(_read(file), type=kind)
    except msgspec.MsgspecError as error:
        raise _invalid(file.name, str(error)) from error


def _tokenizer(file: Path, config: BertConfig) -> Tokenizer:
    """Without the truncation and padding that it may have been saved with: nothing is cut silently."""
    try:
        tokenizer = Tokenizer.from_str(_read(file).decode())
        tokenizer.no_truncation()
        tokenizer.no_padding()
        size = tokenizer.get_vocab_size()
    except Exception as error:  # the library raises nothing more precise
        raise _invalid(file.name, "it is not a tokenizer") from error
    if size != config.vocab_size:
        raise _invalid(file.name, f"{size} words for a model of {config.vocab_size}")
    return tokenizer


def _check(made: ModelProto, plain: ModelProto, ids: list[list[int]]) -> None:
    worst = min(float(one @ other) for one, other in zip(_vectors(made, ids), _vectors(plain, ids), strict=True))
    if not worst >= MIN_COSINE:
        raise _invalid("model.safetensors", f"in int8 it is another model (cosine {worst:.3f})")


def _vectors(model: ModelProto, ids: list[list[int]]) -> list[npt.NDArray[np.float32]]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    rows = [np.array([one], np.int64) for one in ids]
    return [session.run(None, {"input_ids": row, "attention_mask": np.ones_like(row)})[0][0] for row in rows]


def _write(data: bytes, target: Path) -> None:
    staged = target.with_name(f".{target.name}.part")
    try:
        with staged.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        staged.replace(target)
    finally:
        staged.unlink(missing_ok=True)


def _read(file: Path) -> bytes:
    try:
        if file.stat().st_size > MAX_JSON_BYTES:
            raise _invalid(file.name, "it is too large")
        return file.read_bytes()
    except OSError as error:
        raise _invalid(file.name, error.strerror or "it cannot be read") from error


def _invalid(name: str, why: str) -> ModelInvalid:
    return ModelInvalid(f"{name} is not what an embedding model has: {why}", param="model")
