"""An embedding model in memory: texts to tokens, tokens to vectors. Synchronous, and used by one thread at a time."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from shared.errors import BadRequest, ContextTooLong
from shared.gguf import ModelInvalid

BATCH_TOKENS = 512
"""Padding included; some 70 ms of one core."""
MAX_CHARS_PER_TOKEN = 128
"""Longer texts are refused unread: a word of more than 100 characters is one token, and a blank is none."""

Vectors = npt.NDArray[np.float32]
Item = str | tuple[int, ...]
"""A text, or its tokens."""


class EmbeddingModel:
    """Raises ModelInvalid for a file that `edge_agent.embedding.convert` has not made."""

    def __init__(self, file: Path, *, threads: int) -> None:
        import onnxruntime  # both take their time, and a daemon that nobody asks for vectors does without
        from tokenizers import Tokenizer

        onnxruntime.disable_telemetry_events()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.enable_cpu_mem_arena = False  # what a long batch took is given back
        options.log_severity_level = 4
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            # As bytes: then nothing in the file can name another file to be read.
            self._session: Any = onnxruntime.InferenceSession(
                file.read_bytes(), options, providers=["CPUExecutionProvider"]
            )
            said = self._session.get_modelmeta().custom_metadata_map
            self._tokenizer: Any = Tokenizer.from_str(said["tokenizer"])
            self.max_tokens, self.words = int(said["max_tokens"]), self._tokenizer.get_vocab_size()
            self.width = int(self._session.get_outputs()[0].shape[1])
        except Exception as error:  # neither library raises anything more precise
            raise ModelInvalid(f"{file.name} is no embedding model: {type(error).__name__}", param="model") from error

    def tokens(self, items: Sequence[Item], first: int) -> list[list[int]]:
        """Of inputs `first` and following. Raises BadRequest or ContextTooLong with the place of the one at fault."""
        for at, item in enumerate(items, first):
            if isinstance(item, str) and len(item) > self.max_tokens * MAX_CHARS_PER_TOKEN:
                raise ContextTooLong(f"an input has {len(item)} characters: {self._limit}", param=f"input[{at}]")
        texts = iter(self._tokenizer.encode_batch([item for item in items if isinstance(item, str)]))
        made = [list(next(texts).ids) if isinstance(item, str) else list(item) for item in items]
        for at, ids in enumerate(made, first):
            if len(ids) > self.max_tokens:
                raise ContextTooLong(f"an input has {len(ids)} tokens: {self._limit}", param=f"input[{at}]")
            if min(ids) < 0 or max(ids) >= self.words:
                raise BadRequest(f"a token id is outside 0 to {self.words - 1}", param=f"input[{at}]")
        return made

    @property
    def _limit(self) -> str:
        return f"this model takes at most {self.max_tokens} tokens"

    def compute(self, ids: Sequence[Sequence[int]]) -> Vectors:
        """[n, width], each row of length 1 and the same whatever is computed beside it."""
        padded = np.zeros((len(ids), max(map(len, ids))), np.int64)
        mask = np.zeros_like(padded)
        for row, one in enumerate(ids):
            padded[row, : len(one)], mask[row, : len(one)] = one, 1
        vectors: Vectors = self._session.run(["vectors"], {"input_ids": padded, "attention_mask": mask})[0]
        return vectors


def batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Every index once, texts of about the same length together, at most BATCH_TOKENS with padding (or one text)."""
    batch = list[int]()
    for index in sorted(range(len(lengths)), key=lambda index: lengths[index], reverse=True):
        if batch and (len(batch) + 1) * lengths[batch[0]] > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def shortened(vectors: Vectors, width: int) -> Vectors:
    """The first `width` numbers of each, made as long as 1 again."""
    short = vectors[:, :width]
    length: Vectors = np.linalg.norm(short, axis=1, keepdims=True)
    made: Vectors = (short / np.maximum(length, np.float32(1e-12))).astype(np.float32)
    return made
