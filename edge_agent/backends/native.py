"""llama.cpp through its low-level API: the only code that imports llama_cpp, and only when a model is opened.

One thread at a time may call a `Native`, `tokenize` apart. Nothing here waits, schedules or knows requests. The daemon
runs it in a process of its own, see `process.py`.
"""

import ctypes
import functools
import importlib
import os
import threading
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_agent.backends.base import DEFAULT_CONTEXT
from edge_agent.backends.pages import zeros_given_back
from edge_agent.backends.prefixes import State
from shared.errors import UpstreamFailed
from shared.gguf import ModelInvalid, check
from shared.lookup import LONGEST

BATCH = 512
"""Tokens that one `decode` can take."""

WARNING, ERROR = 3, 4
"""Of `enum ggml_log_level`."""
_SPINS = "1000"
"""How long a thread of OpenMP spins at a barrier before it sleeps. Its own default loses nothing on an idle machine and
nearly everything on a busy one, where a spinning thread holds the processor that the awaited one needs (measured)."""

Ids = NDArray[np.int32]
Log = Callable[[str, str], None]
"""Told a level (`debug` or `warning`) and what llama.cpp had to say."""


def _silent(_level: str, _text: str) -> None:
    pass


class Native:
    """A model and one context of `slots` sequences, each up to `context` tokens long with a KV cache of its own.

    `tokens`, `positions`, `sequences` and `wanted` are views of the batch: fill the first n rows, then `decode(n)`.
    """

    def __init__(self, path: Path, *, slots: int, context: int | None, threads: int | None, log: Log = _silent) -> None:
        """Takes seconds. Raises ModelInvalid."""
        check(path)
        self._api = _load_library(log)
        self._outputs = slots + LONGEST  # guesses are made for one sequence at a time
        self._model: Any = None
        self._context: Any = None
        self._tokenizing = threading.Lock()
        self._model = self._open_model(path)
        try:
            self._vocab = self._api.llama_model_get_vocab(self._model)
            self.vocabulary = int(self._api.llama_vocab_n_tokens(self._vocab))
            trained = int(self._api.llama_model_n_ctx_train(self._model))
            self.context_length = min(context or DEFAULT_CONTEXT, trained)
            self._open_context(path, slots, threads or _cores())
            self._make_batch()
            self.pieces = [self._piece(token) for token in range(self.vocabulary)]
        except BaseException:
            self.close()
            raise
        self.ends = frozenset(
            token for token in range(self.vocabulary) if self._api.llama_vocab_is_eog(self._vocab, token)
        )
        self.control = frozenset(filter(self._is_control, range(self.vocabulary)))
        self.longest_piece = max(map(len, self.pieces))
        self._logits_at = 0
        self._logits = np.empty((0, self.vocabulary), np.float32)

    @property
    def version(self) -> str:
        """Of the library and of the format that it keeps a sequence's state in."""
        return f"{metadata.version('llama-cpp-python')}/{self._api.LLAMA_STATE_SEQ_VERSION}"

    @property
    def chat_template(self) -> str | None:
        text = self._api.llama_model_chat_template(self._model, None)
        return None if text is None else text.decode("utf-8", errors="replace")

    def special(self, name: str) -> str:
        """The text of the vocabulary's `bos` or `eos` token; empty if it has none."""
        token = int(getattr(self._api, f"llama_vocab_{name}")(self._vocab))
        return self.pieces[token].decode("utf-8", errors="replace") if 0 <= token < self.vocabulary else ""

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool = True) -> Ids:
        """With `parse_special`, control tokens spelled out in the text count as such. May be called from any thread, at
        any time."""
        data = text.encode("utf-8", errors="replace")
        room = len(data) + 8
        tokens = np.empty(room, np.int32)
        target = tokens.ctypes.data_as(ctypes.POINTER(self._api.llama_token))
        with self._tokenizing:
            if self._model is None:
                raise UpstreamFailed("the local model is closed", source="edge")
            count = self._api.llama_tokenize(self._vocab, data, len(data), target, room, add_special, parse_special)
        if count < 0:
            raise RuntimeError(f"llama_tokenize wants room for {-count} tokens of {len(data)} bytes")
        return tokens[:count].copy()

    def _is_control(self, token: int) -> bool:
        """Whether no text spells it: a control token, or one of the user's own that looks like one."""
        kind = int(self._api.llama_vocab_get_attr(self._vocab, token))
        if kind & (self._api.LLAMA_TOKEN_ATTR_CONTROL | self._api.LLAMA_TOKEN_ATTR_UNKNOWN):
            return True
        piece = self.pieces[token]
        return bool(kind & self._api.LLAMA_TOKEN_ATTR_USER_DEFINED) and piece[:1] == b"<" and piece[-1:] == b">"

    def decode(self, count: int) -> bool:
        """Run the first `count` rows of the batch through the model; False if it could not."""
        self._batch.n_tokens = count
        return bool(self._api.llama_decode(self._context, self._batch) == 0)

    def logits(self) -> NDArray[np.float32]:
        """[outputs, vocabulary], a view: row i belongs to the i-th wanted row of the last `decode`, until the next."""
        pointer = self._api.llama_get_logits(self._context)
        address = ctypes.addressof(pointer.contents)
        if address != self._logits_at:
            floats: Any = (ctypes.c_float * (self._outputs * self.vocabulary)).from_address(address)
            self._logits = np.frombuffer(floats, np.float32).reshape(self._outputs, self.vocabulary)
            self._logits_at = address
        return self._logits

    @property
    def can_cut(self) -> bool:
        """Whether a sequence can be cut back to a prefix: not where its state is one running sum."""
        return not (self._api.llama_model_is_recurrent(self._model) or self._api.llama_model_is_hybrid(self._model))

    def keep(self, sequence: int, length: int) -> None:
        """Forget all but the first `length` tokens of a sequence. A length other than 0 needs `can_cut`."""
        self._api.llama_memory_seq_rm(self._memory, sequence, length, -1)

    def state_size(self, sequence: int) -> int:
        return int(self._api.llama_state_seq_get_size(self._context, sequence))

    def state(self, sequence: int) -> State:
        """All that is computed of a sequence, in llama.cpp's own format; empty if it cannot be had."""
        buffer = np.empty(self.state_size(sequence), np.uint8)
        written = int(self._api.llama_state_seq_get_data(self._context, self._bytes(buffer), len(buffer), sequence))
        return buffer[:written].data

    def restore(self, sequence: int, state: State) -> bool:
        """Put it in place of what the sequence was; False, and the sequence is empty, if it does not fit."""
        data = np.frombuffer(state, np.uint8) if len(state) else np.empty(0, np.uint8)
        read = int(self._api.llama_state_seq_set_data(self._context, self._bytes(data), len(data), sequence))
        if not read or read != len(data):
            self.keep(sequence, 0)
            return False
        return True

    def _bytes(self, of: NDArray[np.uint8]) -> Any:
        return of.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))

    @property
    def can_shift(self) -> bool:
        return self.can_cut and bool(self._api.llama_memory_can_shift(self._memory))

    def shift(self, sequence: int, start: int, count: int) -> None:
        """Forget `count` tokens of a sequence from `start` on; those behind them move up. Needs `can_shift`."""
        self._api.llama_memory_seq_rm(self._memory, sequence, start, start + count)
        self._api.llama_memory_seq_add(self._memory, sequence, start + count, -1, -count)

    def close(self) -> None:
        with self._tokenizing:
            if self._context is not None:
                self._api.llama_free(self._context)
            if self._model is not None:
                self._api.llama_model_free(self._model)
            self._context = self._model = None

    def _open_model(self, path: Path) -> Any:
        params = self._api.llama_model_default_params()
        model = self._api.llama_model_load_from_file(os.fsencode(path), params)
        if model is None:
            raise ModelInvalid(f"{path.name}: llama.cpp cannot load it", param="model")
        return model

    def _open_context(self, path: Path, slots: int, threads: int) -> None:
        params = self._api.llama_context_default_params()
        params.n_ctx = slots * self.context_length
        params.n_seq_max = slots
        # A cache of its own for each: in a common one, what finished requests leave behind slows every token of the
        # running ones. The price: llama.cpp computes sequences together only if their numbers follow each other.
        params.kv_unified = False
        params.n_batch = params.n_ubatch = BATCH
        params.n_outputs_max = self._outputs
        params.n_threads = params.n_threads_batch = threads
        params.no_perf = True
        with zeros_given_back():
            self._context = self._api.llama_init_from_model(self._model, params)
        if self._context is None:
            raise ModelInvalid(
                f"{path.name}: no memory for {slots} slots of {self.context_length} tokens", param="context"
            )
        self._memory = self._api.llama_get_memory(self._context)

    def _make_batch(self) -> None:
        """A batch whose arrays are numpy's own: written at C speed, no ctypes object for each token."""
        api, batch = self._api, self._api.llama_batch()
        self.tokens = np.zeros(BATCH, np.int32)
        self.positions = np.zeros(BATCH, np.int32)
        self.sequences = np.zeros(BATCH, np.int32)
        self.wanted = np.zeros(BATCH, np.int8)
        one_each = np.ones(BATCH, np.int32)
        each = (self.sequences.ctypes.data + self.sequences.itemsize * np.arange(BATCH)).astype(np.uintp)
        self._keep_alive = (one_each, each)
        batch.token = self.tokens.ctypes.data_as(ctypes.POINTER(api.llama_token))
        batch.pos = self.positions.ctypes.data_as(ctypes.POINTER(api.llama_pos))
        batch.n_seq_id = one_each.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
        batch.seq_id = each.ctypes.data_as(ctypes.POINTER(ctypes.POINTER(api.llama_seq_id)))
        batch.logits = self.wanted.ctypes.data_as(ctypes.POINTER(ctypes.c_int8))
        self._batch = batch

    def _piece(self, token: int) -> bytes:
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            length = self._api.llama_token_to_piece(self._vocab, token, buffer, size, 0, True)
            if length >= 0:
                return buffer.raw[:length]
            size = -length


def preload() -> None:
    """Import llama.cpp ahead of the first model. Raises whatever keeps it from being imported."""
    os.environ.setdefault("GOMP_SPINCOUNT", _SPINS)
    importlib.import_module("llama_cpp.llama_cpp")


def _load_library(log: Log) -> Any:
    preload()
    from llama_cpp import llama_cpp as api

    api.llama_log_set(_log_callback(api, log), None)
    api.llama_backend_init()
    return api


@functools.cache
def _log_callback(api: ModuleType, log: Log) -> Any:
    """Cached because llama.cpp keeps the pointer as long as the process lives."""

    def forward(level: int, text: bytes, _: Any) -> None:
        if level in (WARNING, ERROR):
            log("warning" if level == ERROR else "debug", text.decode("utf-8", errors="replace").strip())

    return api.llama_log_callback(forward)


def _cores() -> int:
    """Physical cores that this process may use: hyperthreads share the units that matrix products keep busy."""
    import psutil

    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(usable, psutil.cpu_count(logical=False) or usable))
