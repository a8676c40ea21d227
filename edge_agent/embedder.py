"""Vectors of texts on this device: a small BERT under onnxruntime, computed in a thread beside the event loop.

A request's texts are computed in small batches, one batch of each request in turn: a long list holds up a short
question by one batch, and whoever leaves costs no further one. Nothing is cut: a text that is too long is refused.
"""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Self, TypeVar

import numpy as np

from edge_agent.embedding.model import EmbeddingModel, Item, Vectors, batches, shortened
from shared.embeddings import EmbeddingRequest, Embeddings
from shared.errors import BadRequest, Overloaded, UnknownModel
from shared.gguf import ModelInvalid
from shared.models import SUFFIXES, manifest_of, stored_file, valid_name, verify
from shared.schemas import ModelCard

TEXTS_PER_TURN = 64
"""Tokenized in one go."""
OWN_NAMES = ("auto", "edge")

Result = TypeVar("Result")


class Embedder:
    """The model in `file`, loaded when it is asked for and unloaded `keep_s` after its last answer, so that an idle
    daemon does not carry it.

    Belongs to one event loop. At most `queue` requests may be under way.
    """

    def __init__(self, file: Path, *, name: str = "", threads: int = 1, queue: int = 64, keep_s: float = 300.0) -> None:
        self.name = name or file.stem
        self._file = file
        self._threads = threads
        self._queue = queue
        self._keep_s = keep_s
        self._unloading: asyncio.TimerHandle | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="embedder")
        self._model: EmbeddingModel | None = None
        self._context_length = 0
        self._under_way = 0
        self._closed = False

    @classmethod
    def named(cls, name_or_path: str, store: Path, *, keep_s: float = 300.0) -> Self:
        """Of this name in the store, there or not; or a file that lies elsewhere."""
        if valid_name(name_or_path) and not name_or_path.endswith(SUFFIXES["embedding"]):
            return cls(stored_file(name_or_path, store, "embedding"), name=name_or_path, keep_s=keep_s)
        return cls(Path(name_or_path), keep_s=keep_s)

    @property
    def loaded(self) -> bool:
        return self._model is not None

    def model_card(self) -> ModelCard | None:
        """None while there is no such model on this device."""
        if self._model is None and not self._file.is_file():
            return None
        if self._model is None and self._context_length == 0:
            with suppress(ModelInvalid):
                manifest = manifest_of(self._file)
                self._context_length = manifest.context_length if manifest else 0
        return ModelCard(id=self.name, context_length=self._model.max_tokens if self._model else self._context_length)

    async def __call__(self, request: EmbeddingRequest) -> Embeddings:
        """Raises UnknownModel, ModelInvalid, ContextTooLong, BadRequest or Overloaded, with the field's name."""
        if request.model not in (self.name, *OWN_NAMES):
            where = "; the cloud makes them at its own address" if request.model == "cloud" else ""
            raise UnknownModel(f"embeddings are made here, by {self.name}{where}", param="model", source="edge")
        vectors, tokens = await self._embed(request.inputs, request.dimensions)
        return Embeddings(vectors=await self._do(lambda: tuple(map(tuple, vectors.tolist()))), prompt_tokens=tokens)

    async def embed(self, texts: Sequence[str]) -> Vectors:
        """float32 [n, d], each row of length 1. Raises as a request does."""
        return (await self._embed(tuple(texts), None))[0]

    async def aclose(self) -> None:
        """Whoever waits gets an error; returns once the batch under way is done."""
        self._closed = True
        self._stay()
        await asyncio.to_thread(self._thread.shutdown, wait=True)
        self._model = None

    async def _embed(self, items: Sequence[Item], dimensions: int | None) -> tuple[Vectors, int]:
        if self._under_way >= self._queue:
            raise Overloaded(f"{self._queue} requests for embeddings are under way", source="edge", retry_after=1.0)
        self._under_way += 1
        self._stay()
        try:
            model = await self._do(self._loaded)
            width = model.width if dimensions is None else dimensions
            if width > model.width:
                raise BadRequest(f"dimensions must be 1 to {model.width}", param="dimensions")
            ids = list[list[int]]()
            for start in range(0, len(items), TEXTS_PER_TURN):
                ids += await self._do(partial(model.tokens, items[start : start + TEXTS_PER_TURN], start))
            vectors = np.empty((len(ids), model.width), np.float32)
            for batch in batches([len(one) for one in ids]):
                vectors[batch] = await self._do(partial(model.compute, [ids[at] for at in batch]))
            return vectors if width == model.width else shortened(vectors, width), sum(map(len, ids))
        finally:
            self._under_way -= 1
            if not self._under_way and not self._closed:
                self._unloading = asyncio.get_running_loop().call_later(self._keep_s, self._unload)

    def _stay(self) -> None:
        if self._unloading is not None:
            self._unloading.cancel()
            self._unloading = None

    def _unload(self) -> None:
        self._model = None

    async def _do(self, work: Callable[[], Result]) -> Result:
        """On the thread, after what others have put there before. Cancelled, it is not begun any more."""
        if self._closed:
            raise Overloaded("the embedding model is being closed", source="edge", retry_after=1.0)
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def _loaded(self) -> EmbeddingModel:
        if self._model is None:
            if not self._file.is_file():
                where = f"run `edge-agent pull {self.name}`" if valid_name(self.name) else "see embedding_model"
                raise UnknownModel(f"the embedding model {self.name} is not on this device: {where}", param="model")
            verify(self._file)
            self._model = EmbeddingModel(self._file, threads=self._threads)
        return self._model
