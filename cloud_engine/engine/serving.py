"""The engine as an `Answer`: asyncio on one side, one thread that owns the engine on the other.

The loop never runs torch or a tokenizer, the engine's thread never waits for a client. One way go requests that arrive
and leave (two deques under a condition), the other way, once a step, all that it produced (one `call_soon_threadsafe`).
"""

import asyncio
import contextlib
import itertools
import math
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from cloud_engine.engine.build import build
from cloud_engine.engine.config import EngineConfig
from cloud_engine.engine.engine import Engine, EngineStats, Output
from cloud_engine.engine.places import Places
from cloud_engine.engine.sequence import Sequence
from cloud_engine.engine.stream import TextStream
from cloud_engine.engine.vectors import VectorRequests
from cloud_engine.model.tokenizer import Tokenizer
from shared.embeddings import EmbeddingRequest, Embeddings
from shared.errors import (
    BadRequest,
    CausewayError,
    ContextTooLong,
    DeadlineExceeded,
    Internal,
    Overloaded,
    UpstreamFailed,
)
from shared.guides import COMPILE_S, Guide, Guides
from shared.schemas import ChatRequest, Delta, ModelCard
from shared.tool_formats import ToolReader

ENCODE_TIMEOUT_S = 20.0
CLOSE_TIMEOUT_S = 30.0


@dataclass(slots=True, eq=False)
class _Live:
    """One request: what the engine's thread keeps of it, and the queue its client reads. It needs no bound of its own:
    a request makes `max_tokens` deltas at most."""

    id: str
    request: ChatRequest
    tokens: list[int]
    salt: str
    deadline: float
    text: TextStream
    guide: Guide | None
    deltas: asyncio.Queue[Delta | CausewayError] = field(default_factory=asyncio.Queue)


class EngineAnswer:
    """Answers requests with one engine. `start` before the first `answer`, `aclose` at the end; both on one loop.

    If the engine fails, every live request and every later one ends with UpstreamFailed.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer, name: str) -> None:
        self._engine, self._tokenizer, self._name = engine, tokenizer, name
        self._encoder = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenizer")
        self._encoding, self._arrivals = Places(engine.config.max_waiting), Places(engine.config.max_waiting)
        self._guides = Guides(tokenizer.vocabulary, "cloud")
        self._ids = itertools.count()
        self._wake = threading.Condition()
        self._arriving: deque[_Live] = deque()
        self._leaving: deque[_Live] = deque()
        self._live: dict[str, _Live] = {}
        self._stats = engine.stats()
        self._end: Callable[[], CausewayError] | None = None
        """Why nothing is answered any more; a new error each time, since one that is raised collects tracebacks."""
        self._vectors = VectorRequests(
            engine.embedder,
            tokenizer,
            self._encoder,
            self._wake,
            lambda: self._end() if self._end else None,
            max_waiting=engine.config.max_waiting,
            model_len=engine.config.model_len,
        )
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    # The asyncio side

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    async def aclose(self) -> None:
        """End every live request with Overloaded, finish the running step, stop the threads. Idempotent."""
        with self._wake:
            self._end = self._end or partial(Overloaded, "the engine is shutting down", retry_after=5.0)
            self._wake.notify()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join, CLOSE_TIMEOUT_S)
        else:
            self._engine.close()
        self._encoder.shutdown(wait=False, cancel_futures=True)
        self._guides.close()

    def stats(self) -> EngineStats:
        """As of the end of the last step."""
        return self._stats

    def model_card(self) -> ModelCard:
        return ModelCard(id=self._name, context_length=self._engine.config.model_len)

    @property
    def failure(self) -> CausewayError | None:
        """Why the engine answers no more, or None while it does."""
        if self._end is None and self._engine.failed:
            return UpstreamFailed("the engine failed")
        return None if self._end is None else self._end()

    async def answer(self, request: ChatRequest, *, salt: str = "") -> AsyncGenerator[Delta, None]:
        """Deltas of one request. Only requests of the same `salt` (a tenant) share cached prefixes, and tenants take
        turns."""
        deadline = self._engine.clock() + (math.inf if request.deadline_s is None else request.deadline_s)
        tokens = await self._encode(request, salt)
        guide = await self._guide(request)
        text = TextStream(self._tokenizer, request.sampling, len(tokens), self._reader(request))
        live = _Live(str(next(self._ids)), request, tokens, salt, deadline, text, guide)
        self._submit(live)
        try:
            while True:
                delta = await live.deltas.get()
                if isinstance(delta, CausewayError):
                    raise delta
                yield delta
                if delta.finish_reason is not None:
                    return
        finally:
            self._withdraw(live)

    async def embed(self, request: EmbeddingRequest, *, salt: str = "") -> Embeddings:
        """A vector for each input of a request; cancelled, it stops costing compute."""
        return await self._vectors.embed(request, salt)

    def _reader(self, request: ChatRequest) -> ToolReader | None:
        names = [tool.name for tool in request.calling]
        if not names:
            return None
        return ToolReader(self._tokenizer.tool_format, names, request.id, parallel=request.parallel_tool_calls)

    async def _encode(self, request: ChatRequest, salt: str) -> list[int]:
        """Template and tokenise off the loop, one request at a time, with a limit on how many wait and for how long."""
        limit = self._engine.config.model_len
        if (least := self._tokenizer.least_tokens(request.size)) > limit:
            raise ContextTooLong(
                f"the prompt has at least {least} tokens, over the context length of {limit}", param="messages"
            )
        if self._end is not None:
            raise self._end()
        self._encoding.check(salt)
        self._encoding.enter(salt)
        limit_s = min(ENCODE_TIMEOUT_S, request.deadline_s or math.inf)
        try:
            loop = asyncio.get_running_loop()
            async with asyncio.timeout(limit_s):
                return await loop.run_in_executor(self._encoder, self._tokens, request)
        except TimeoutError as error:
            raise DeadlineExceeded(f"the prompt was not tokenised in {limit_s:g} s") from error
        finally:
            self._encoding.leave(salt)

    def _tokens(self, request: ChatRequest) -> list[int]:
        if request.prompt is not None:
            return self._tokenizer.encode(request.prompt)
        return self._tokenizer.encode_chat(request.messages, () if request.tool_choice == "none" else request.tools)

    async def _guide(self, request: ChatRequest) -> Guide | None:
        compiling = self._guides.guide(request, self._tokenizer.tool_format)
        if compiling is None:
            return None
        try:
            async with asyncio.timeout(COMPILE_S):
                return await asyncio.wrap_future(compiling)
        except TimeoutError as error:
            raise DeadlineExceeded(f"the grammar was not compiled in {COMPILE_S:g} s") from error

    def _submit(self, live: _Live) -> None:
        with self._wake:
            if self._end is not None:
                raise self._end()
            self._arrivals.check(live.salt)
            self._arrivals.enter(live.salt)
            self._arriving.append(live)
            self._wake.notify()

    def _withdraw(self, live: _Live) -> None:
        with self._wake:
            self._leaving.append(live)
            self._wake.notify()

    @staticmethod
    def _hand_out(deltas: list[tuple[_Live, Delta | CausewayError]]) -> None:
        for live, delta in deltas:
            live.deltas.put_nowait(delta)

    # The engine's thread

    def _run(self) -> None:
        try:
            while self._obey():
                self._deliver(self._step())
        except Exception as error:  # whatever it was, nobody may be left waiting
            with self._wake:
                self._end = partial(UpstreamFailed, f"the engine failed: {type(error).__name__}")
        # Nothing arrives once `_end` is set, so these are all that could be waiting.
        self._deliver([(live, self._end()) for live in (*self._live.values(), *self._arriving) if self._end])
        self._vectors.end()
        self._engine.close()

    def _obey(self) -> bool:
        """Sleep until there is something to do; take in who came, drop who left. False if the engine is to stop."""
        with self._wake:
            self._wake.wait_for(self._has_work)
            if self._end is not None:
                return False
            arriving, self._arriving = self._arriving, deque()
            leaving, self._leaving = self._leaving, deque()
            for live in arriving:
                self._arrivals.leave(live.salt)
        self._vectors.admit()
        for live in arriving:
            self._admit(live)
        for live in leaving:
            self._engine.abort(live.id)
            self._live.pop(live.id, None)
        return True

    def _has_work(self) -> bool:
        return bool(
            self._arriving or self._leaving or self._vectors.arriving or self._end is not None or self._engine.has_work
        )

    def _step(self) -> list[tuple[_Live, Delta | CausewayError]]:
        expired = [self._give_up(sequence) for sequence in self._engine.expire()]
        deltas = [self._take(output) for output in self._engine.step()]
        self._stats = self._engine.stats()
        return expired + [delta for delta in deltas if delta is not None]

    def _give_up(self, sequence: Sequence) -> tuple[_Live, DeadlineExceeded]:
        begun = "after" if sequence.num_output else "before"
        return self._live.pop(sequence.id), DeadlineExceeded(f"the deadline has passed, {begun} the first token")

    def _take(self, output: Output) -> tuple[_Live, Delta | CausewayError] | None:
        live = self._live.get(output.sequence.id)
        if live is None:
            return None  # a stop string ended it within the tokens of this very step
        if output.ending == "error":
            del self._live[live.id]
            if live.guide is not None and live.guide.failed:
                return live, BadRequest("the grammar has too many states to follow this answer", param="grammar")
            return live, Internal("the model gave no usable probabilities for this request")
        delta = live.text.push(output.sampled, output.ending, output.sequence.num_cached)
        if live.text.stopped:
            self._engine.finish(output.sequence)
        if delta is not None and delta.finish_reason is not None:
            del self._live[live.id]
        return None if delta is None else (live, delta)

    def _admit(self, live: _Live) -> None:
        try:
            self._engine.add(
                live.id,
                live.tokens,
                live.request.sampling,
                salt=live.salt,
                priority=live.request.priority,
                deadline=live.deadline,
                guide=live.guide,
            )
        except CausewayError as error:
            self._deliver([(live, error)])
        else:
            self._live[live.id] = live

    def _deliver(self, deltas: list[tuple[_Live, Delta | CausewayError]]) -> None:
        if deltas and self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop was closed without `aclose`: nobody listens
                self._loop.call_soon_threadsafe(self._hand_out, deltas)


def load_engine(path: Path, config: EngineConfig | None = None, *, name: str = "") -> EngineAnswer:
    """Load a Hugging Face folder or a GGUF file; takes seconds and much memory, so not on an event loop.
    Raises ModelInvalid or UnsupportedModel, ValueError for limits that cannot be kept."""
    tokenizer = Tokenizer(path)
    engine = build(path, config or EngineConfig(), stop_ids=tokenizer.stop_ids)
    return EngineAnswer(engine, tokenizer, name or path.stem)
