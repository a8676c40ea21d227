"""The model on this device, through llama.cpp: many requests at once, one worker thread, true cancellation.

answer (event loop) -> template and tokens (a thread) -> Worker's queue -> Batcher's slots -> Native
                    <- one posted list of deltas a step <-
"""

import asyncio
import secrets
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from edge_agent.backends.batch import Event, Job
from edge_agent.backends.native import DEFAULT_CONTEXT, Native
from edge_agent.backends.sampling import Ids, Sampler
from edge_agent.backends.template import ChatTemplate
from edge_agent.backends.text import TextStream
from edge_agent.backends.worker import Worker
from shared.errors import (
    BadRequest,
    CausewayError,
    ContextTooLong,
    Overloaded,
    UnsupportedParameter,
    UpstreamFailed,
)
from shared.models import model_name
from shared.schemas import SEED_BITS, ChatRequest, Delta, ModelCard
from shared.tool_formats import ToolReader

PROMPT_S = 30.0
"""Limit on templating and tokenizing: both are linear in a bounded text, so only a broken template takes as long."""


@dataclass(frozen=True, slots=True)
class LlamaReading:
    """The runtime at one moment; see backends.base.LocalReading."""

    available: bool
    queue_depth: int
    queue_capacity: int
    running: int
    slots: int
    context_length: int
    tokens_per_s: float | None
    prefill_tokens_per_s: float | None


class LlamaBackend:
    """A LocalBackend. Belongs to the event loop that `start` runs on.

    `context` is what one request may use, prompt and output together, at most what the model was trained for.
    """

    def __init__(
        self, path: Path, *, slots: int = 8, context: int | None = None, threads: int | None = None, queue: int = 64
    ) -> None:
        self._name = model_name(path)
        self._context_length = context or DEFAULT_CONTEXT
        self._native: Native | None = None
        self._template: ChatTemplate | None = None
        self._bos = ""
        self._prompts = ThreadPoolExecutor(2, thread_name_prefix="prompt")
        self._worker = Worker(
            path, slots=slots, context=context, threads=threads, queue=queue, post=self._post, opened=self._on_opened
        )
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ready: asyncio.Future[Native] | None = None

    async def start(self) -> None:
        """Load the model. Raises ModelInvalid, or BadRequest if its chat template is broken."""
        self._loop = asyncio.get_running_loop()
        self._ready = self._loop.create_future()
        self._worker.start()
        native = await self._ready
        source = native.chat_template
        self._bos = native.special("bos")
        if source is not None:
            self._template = ChatTemplate(source, bos=self._bos, eos=native.special("eos"))
        self._context_length = native.context_length
        self._native = native

    async def aclose(self) -> None:
        """Ends what is running, waits for the step under way, frees the model; idempotent."""
        self._native = None
        self._prompts.shutdown(wait=False, cancel_futures=True)
        await asyncio.to_thread(self._worker.stop)

    async def answer(self, request: ChatRequest) -> AsyncGenerator[Delta, None]:
        """See shared.schemas.Answer. Raises ContextTooLong, Overloaded, UpstreamFailed."""
        prompt = await self._tokens(request)
        room = self._context_length - len(prompt)
        if room < 1:
            raise ContextTooLong(
                f"the prompt has {len(prompt)} tokens; with at least 1 token of output "
                f"{self._name} holds {self._context_length}",
                param="messages" if request.messages else "prompt",
                source="edge",
            )
        mailbox: asyncio.Queue[Delta | CausewayError] = asyncio.Queue()
        job = self._job(request, prompt, room, mailbox)
        self._worker.submit(job)
        try:
            while True:
                event = await mailbox.get()
                if isinstance(event, CausewayError):
                    raise event
                yield event
                if event.finish_reason is not None:
                    return
        finally:
            self._worker.cancel(job)

    async def count_tokens(self, request: ChatRequest) -> int:
        """Tokens of the whole templated prompt. A text that cannot fit whatever its tokens are is ContextTooLong."""
        return len(await self._tokens(request))

    def reading(self) -> LlamaReading:
        batcher = self._worker.batcher
        return LlamaReading(
            available=batcher is not None and self._native is not None,
            queue_depth=self._worker.waiting,
            queue_capacity=self._worker.queue,
            running=batcher.running if batcher else 0,
            slots=self._worker.slots,
            context_length=self._context_length,
            tokens_per_s=batcher.tokens_per_s if batcher else None,
            prefill_tokens_per_s=batcher.prefill_tokens_per_s if batcher else None,
        )

    def model_card(self) -> ModelCard:
        return ModelCard(id=self._name, context_length=self._context_length)

    async def _tokens(self, request: ChatRequest) -> Ids:
        native = self._native
        if native is None:
            raise Overloaded("the local model is not ready", source="edge", retry_after=1.0)
        work = asyncio.get_running_loop().run_in_executor(self._prompts, self._tokenize, native, request)
        try:
            return await asyncio.wait_for(work, PROMPT_S)
        except TimeoutError:
            raise UpstreamFailed(f"templating the prompt took more than {PROMPT_S:g} s", source="edge") from None

    def _tokenize(self, native: Native, request: ChatRequest) -> Ids:
        _refuse_unsupported(request)
        text, special = request.prompt, True
        if text is None:
            if self._template is None:
                raise BadRequest("this model has no chat template: send a prompt", param="messages", source="edge")
            text = self._template.render(request.messages, () if request.tool_choice == "none" else request.tools)
            special = not (self._bos and text.startswith(self._bos))
        least = -(-len(text) // native.longest_piece)
        if least >= native.context_length:
            raise ContextTooLong(
                f"the prompt has at least {least} tokens; {self._name} holds {native.context_length}",
                param="messages" if request.messages else "prompt",
                source="edge",
            )
        tokens = native.tokenize(text, add_special=special)
        if not len(tokens):
            raise BadRequest("the prompt has no tokens", param="messages" if request.messages else "prompt")
        return tokens

    def _job(
        self, request: ChatRequest, prompt: Ids, room: int, mailbox: "asyncio.Queue[Delta | CausewayError]"
    ) -> Job:
        native = self._native
        if native is None:
            raise Overloaded("the local model is not ready", source="edge", retry_after=1.0)
        sampling = request.sampling
        return Job(
            prompt=prompt,
            sampler=Sampler(sampling, prompt, native.vocabulary, seed=secrets.randbits(SEED_BITS)),
            text=TextStream(
                native.pieces,
                native.ends,
                sampling,
                prompt_tokens=len(prompt),
                max_tokens=min(room, sampling.max_tokens or room),
                tools=self._reader(request),
            ),
            deliver=mailbox.put_nowait,
        )

    def _reader(self, request: ChatRequest) -> ToolReader | None:
        names = [tool.name for tool in request.calling]
        if not names or self._template is None:
            return None
        return ToolReader(self._template.tool_format, names, request.id, parallel=request.parallel_tool_calls)

    def _post(self, events: list[Event]) -> None:
        self._on_loop(lambda: _deliver(events))

    def _on_opened(self, result: Native | CausewayError) -> None:
        self._on_loop(lambda: self._settle(result))

    def _on_loop(self, call: Callable[[], None]) -> None:
        """Called by the worker. A loop that is closed has nobody left to tell."""
        if self._loop is not None:
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(call)

    def _settle(self, result: Native | CausewayError) -> None:
        if self._ready is None or self._ready.done():
            return
        if isinstance(result, CausewayError):
            self._ready.set_exception(result)
        else:
            self._ready.set_result(result)


def _refuse_unsupported(request: ChatRequest) -> None:
    """What would change the answer and is not done on this side is refused by name."""
    sampling = request.sampling
    asked = {
        "grammar": request.grammar is not None,
        "tool_choice": bool(request.calling) and request.tool_choice == "required",
        "strict": any(tool.strict for tool in request.calling),
        "logit_bias": bool(sampling.logit_bias),
        "min_tokens": bool(sampling.min_tokens),
        "stop_token_ids": bool(sampling.stop_token_ids),
    }
    for name in (name for name, given in asked.items() if given):
        raise UnsupportedParameter(f"the model on this device knows no {name}", param=name, source="edge")


def _deliver(events: list[Event]) -> None:
    for job, event in events:
        job.deliver(event)
