"""Requests for embeddings, between asyncio and the engine's thread: tokens off the loop, vectors back to it."""

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor as Threads
from functools import partial

from cloud_engine.engine.embedder import Embedder, Job, Vector
from cloud_engine.engine.places import Places
from cloud_engine.model.tokenizer import Tokenizer
from shared.embeddings import MAX_INPUT_TOKENS, EmbeddingRequest, Embeddings
from shared.errors import BadRequest, CausewayError, ContextTooLong, DeadlineExceeded

TIMEOUT_S = 120.0

Made = tuple[Vector, ...] | CausewayError


class VectorRequests:
    """`encoder` is the thread that may tokenise, `wake` guards `arriving` and wakes the engine's thread. `ended` says
    why nothing is computed any more, or None."""

    def __init__(
        self,
        embedder: Embedder,
        tokenizer: Tokenizer,
        encoder: Threads,
        wake: threading.Condition,
        ended: Callable[[], CausewayError | None],
        *,
        max_waiting: int,
        model_len: int,
    ) -> None:
        self._embedder, self._tokenizer, self._encoder = embedder, tokenizer, encoder
        self._wake, self._ended, self._limit = wake, ended, model_len
        self._places = Places(max_waiting)
        self.arriving: deque[Job] = deque()

    # The asyncio side

    async def embed(self, request: EmbeddingRequest, salt: str) -> Embeddings:
        """Raises Overloaded if too many wait, DeadlineExceeded if the vectors are not there in `TIMEOUT_S`."""
        self._places.check(salt)
        self._places.enter(salt)
        try:
            async with asyncio.timeout(TIMEOUT_S):
                inputs = await self._encoded(request)
                vectors = await self._computed(inputs, request.dimensions)
                return Embeddings(vectors=vectors, prompt_tokens=sum(map(len, inputs)))
        except TimeoutError as error:
            raise DeadlineExceeded(f"the embeddings were not made in {TIMEOUT_S:.0f} s") from error
        finally:
            self._places.leave(salt)

    async def _encoded(self, request: EmbeddingRequest) -> list[list[int]]:
        """Tokens of each input. Texts go to the encoder one by one, so that others can come between."""
        inputs: list[list[int]] = []
        for at, one in enumerate(request.inputs):
            inputs.append(await self._tokens(one, f"input[{at}]") if isinstance(one, str) else list(one))
        if sum(map(len, inputs)) > MAX_INPUT_TOKENS:
            raise BadRequest(f"the inputs must have at most {MAX_INPUT_TOKENS} tokens", param="input")
        return inputs

    async def _tokens(self, text: str, where: str) -> list[int]:
        self._check()
        if (least := self._tokenizer.least_tokens(len(text))) > self._limit:
            raise ContextTooLong(
                f"an input has at least {least} tokens, over the context length of {self._limit}", param=where
            )
        return await asyncio.get_running_loop().run_in_executor(self._encoder, self._tokenizer.encode, text)

    async def _computed(self, inputs: list[list[int]], dimensions: int | None) -> tuple[Vector, ...]:
        loop = asyncio.get_running_loop()
        made: asyncio.Future[tuple[Vector, ...]] = loop.create_future()
        job = Job(inputs, partial(_deliver, loop, made), dimensions)
        with self._wake:
            self._check()
            self.arriving.append(job)
            self._wake.notify()
        try:
            return await made
        finally:
            job.cancelled = True  # the engine's thread looks, before its next chunk of this

    def _check(self) -> None:
        if (error := self._ended()) is not None:
            raise error

    # The engine's thread

    def admit(self) -> None:
        """Take in who came."""
        with self._wake:
            jobs, self.arriving = self.arriving, deque()
        for job in jobs:
            try:
                self._embedder.add(job)
            except CausewayError as error:
                job.done(error)

    def end(self) -> None:
        """Everybody hears why nothing is computed any more."""
        for job in {*self._embedder.jobs(), *self.arriving}:
            if (error := self._ended()) is not None:
                job.done(error)


def _deliver(loop: asyncio.AbstractEventLoop, made: "asyncio.Future[tuple[Vector, ...]]", result: Made) -> None:
    with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens
        loop.call_soon_threadsafe(_resolve, made, result)


def _resolve(made: "asyncio.Future[tuple[Vector, ...]]", result: Made) -> None:
    if made.done():
        return
    if isinstance(result, CausewayError):
        made.set_exception(result)
    else:
        made.set_result(result)
