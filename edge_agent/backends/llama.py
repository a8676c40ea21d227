"""The model on this device: llama.cpp in a process of its own, many requests at once, true cancellation.

answer (event loop) -> Ask -> process.py: template and tokens -> Worker's queue -> Batcher's slots -> Native
                    <- one frame of deltas a step <-

What is asked and what came of it is kept here, so that a process that dies takes nothing along but the answers it was
computing: those end with a typed error, the ones that still wait go to the next process.
"""

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from edge_agent.backends.base import DEFAULT_CONTEXT
from edge_agent.backends.keeper import Keeper, KeeperRules
from edge_agent.backends.pipe import Ask, Cancel, Count, Counted, FromModel, Held, Load, Ready, Step
from edge_agent.backends.spawn import Spare
from edge_agent.backends.suspects import Suspects, fingerprint
from shared.errors import BadRequest, CausewayError, DeadlineExceeded, Overloaded, SlowConsumer, UpstreamFailed
from shared.gguf import check
from shared.models import model_name
from shared.schemas import ChatRequest, Delta, ModelCard

MAX_RETRY_AFTER_S = 30.0
PATIENCE_S = 1.5
"""Without a process for longer than this, who waits is told to come back: nobody is left without a word for 2 s."""
MAX_MAILBOX = 8192
"""Pieces of one answer that nobody has taken yet."""
MAX_COUNTS = 256
MAX_COUNTED = 1024
"""Lengths of prompts that are remembered."""


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
    restarts: int
    quarantined: int


class _Asked:
    """One request on its way, and what has come of it. The last thing put is an error, an ending delta or a count."""

    def __init__(self, frame: Ask | Count, mark: bytes) -> None:
        self.frame, self.mark = frame, mark
        self.held = False
        self._came: deque[Delta | CausewayError | int] = deque()
        self._news: asyncio.Future[None] | None = None

    def put(self, item: Delta | CausewayError | int) -> None:
        self._came.append(item)
        if self._news is not None and not self._news.done():
            self._news.set_result(None)

    @property
    def full(self) -> bool:
        return len(self._came) >= MAX_MAILBOX

    async def take(self) -> Delta | int:
        """Raises the error it ended with."""
        while not self._came:
            self._news = asyncio.get_running_loop().create_future()
            await self._news
        item = self._came.popleft()
        if isinstance(item, CausewayError):
            raise item
        return item


class LlamaBackend:
    """A LocalBackend. Belongs to the event loop that `start` runs on.

    `context` is what one request may use, prompt and output together, at most what the model was trained for; `queue`
    how many may wait for one of the `slots`. `prefix_bytes` of memory hold what was computed and has no slot any more;
    `saved_bytes` on disk, in the folder `saved`, keep it from one start to the next. For `context_shift` see `Batcher`,
    and for `spare` see `Keeper`.
    """

    def __init__(
        self,
        path: Path,
        *,
        slots: int = 8,
        context: int | None = None,
        threads: int | None = None,
        queue: int = 64,
        prefix_bytes: int = 0,
        saved: Path | None = None,
        saved_bytes: int = 0,
        context_shift: bool = False,
        spare: Spare | None = None,
        rules: KeeperRules | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._path, self._name = path, model_name(path)
        self._slots, self._queue = slots, queue
        self._context_length = context or DEFAULT_CONTEXT
        self._rates: tuple[float | None, float | None] = (None, None)
        self._asked: dict[int, _Asked] = {}
        self._counted: dict[bytes, int] = {}
        self._numbers = 0
        self._up = self._closed = False
        self._back_at = 0.0
        self._losing_patience: asyncio.TimerHandle | None = None
        self._clock = clock
        self._suspects = Suspects(clock)
        self._keeper = Keeper(
            Load(
                str(path.absolute()),
                self._name,
                slots,
                context,
                threads,
                prefix_bytes,
                str(saved.absolute()) if saved and saved_bytes else None,
                saved_bytes,
                context_shift,
            ),
            received=self._on_frame,
            up=self._on_up,
            down=self._on_down,
            busy=lambda: bool(self._asked),
            rules=rules or KeeperRules(),
            spare=spare,
        )

    async def start(self) -> None:
        """Load the model. Raises ModelInvalid, BadRequest if its chat template is broken, UpstreamFailed."""
        await asyncio.to_thread(check, self._path)
        await self._keeper.start()

    async def aclose(self) -> None:
        """Ends what is running, waits for the step under way, frees the model; idempotent."""
        self._up, self._closed = False, True
        self._fail_all(lambda _: UpstreamFailed("the local model was closed", source="edge"))
        await self._keeper.aclose()

    async def answer(self, request: ChatRequest) -> AsyncGenerator[Delta, None]:
        """See shared.schemas.Answer. Raises BadRequest, ContextTooLong, DeadlineExceeded, Quarantined, Overloaded,
        UpstreamFailed."""
        asked = self._ask(Ask, request)
        deadline = None
        if request.deadline_s is not None:
            deadline = asyncio.get_running_loop().call_later(request.deadline_s, self._expire, asked)
        try:
            while True:
                delta = await asked.take()
                if isinstance(delta, Delta):
                    yield delta
                    if delta.finish_reason is not None:
                        return
        finally:
            if deadline is not None:
                deadline.cancel()
            self._leave(asked)

    async def count_tokens(self, request: ChatRequest) -> int:
        """Tokens of the whole templated prompt. A text that cannot fit whatever its tokens are is ContextTooLong."""
        mark = _marked(request)
        if mark in self._counted:  # asked again: an answer from the cache shall not wait for a process
            self._suspects.check(mark)
            return self._counted[mark]
        asked = self._ask(Count, request)
        try:
            tokens = await asked.take()
        finally:
            self._leave(asked)
        count = tokens if isinstance(tokens, int) else 0
        self._counted[mark] = count
        if len(self._counted) > MAX_COUNTED:
            del self._counted[next(iter(self._counted))]
        return count

    def reading(self) -> LlamaReading:
        answers = [asked.held for asked in self._asked.values() if isinstance(asked.frame, Ask)]
        return LlamaReading(
            available=self._up,
            queue_depth=len(answers) - sum(answers),
            queue_capacity=self._queue,
            running=sum(answers),
            slots=self._slots,
            context_length=self._context_length,
            tokens_per_s=self._rates[0],
            prefill_tokens_per_s=self._rates[1],
            restarts=self._keeper.restarts,
            quarantined=len(self._suspects),
        )

    def model_card(self) -> ModelCard:
        return ModelCard(id=self._name, context_length=self._context_length)

    def taken(self) -> int | None:
        """See LoadableBackend: only Linux says."""
        pid = self._keeper.pid
        with suppress(psutil.Error):
            if pid is not None and psutil.LINUX:
                memory = psutil.Process(pid).memory_info()
                return int(memory.rss - memory.shared)
        return None

    # --- in ---

    def _ask(self, kind: type[Ask] | type[Count], request: ChatRequest) -> _Asked:
        """Send it, if it may be sent. Raises Quarantined, Overloaded, BadRequest."""
        if not self._up:
            raise self._not_ready()
        self._check_room(kind)
        mark = _marked(request)
        self._suspects.check(mark)
        self._numbers += 1
        asked = _Asked(kind(self._numbers, request), mark)
        self._keeper.send(asked.frame)
        self._asked[self._numbers] = asked
        return asked

    def _not_ready(self) -> CausewayError:
        if self._closed:
            return UpstreamFailed("the local model was closed", source="edge")
        wait = max(1.0, self._back_at - self._clock())
        return Overloaded("the local model is not ready", source="edge", retry_after=wait)

    def _check_room(self, kind: type[Ask] | type[Count]) -> None:
        alike = sum(isinstance(asked.frame, kind) for asked in self._asked.values())
        if alike >= (self._slots + self._queue if kind is Ask else MAX_COUNTS):
            waiting = max(0, alike - self._slots)
            retry_after = min(MAX_RETRY_AFTER_S, 1.0 + waiting / self._slots)
            raise Overloaded(
                f"{waiting} requests wait for the local model already", source="edge", retry_after=retry_after
            )

    def _leave(self, asked: _Asked) -> None:
        """Nobody wants more of it."""
        if self._asked.pop(asked.frame.number, None) is not None:
            self._keeper.send(Cancel(asked.frame.number))

    def _expire(self, asked: _Asked) -> None:
        self._leave(asked)
        asked.put(DeadlineExceeded("the deadline has passed", source="edge"))

    # --- out ---

    def _on_frame(self, frame: FromModel) -> None:
        if isinstance(frame, Step):
            if frame.deltas:
                self._rates = frame.tokens_per_s, frame.prefill_tokens_per_s
            for number, delta in frame.deltas:
                self._on_delta(number, delta)
            for number, fault in frame.faults:
                self._end(number, fault.error())
        elif isinstance(frame, Held) and frame.number in self._asked:
            self._asked[frame.number].held = frame.held
        elif isinstance(frame, Counted):
            self._end(frame.number, frame.tokens)

    def _on_delta(self, number: int, delta: Delta) -> None:
        asked = self._asked.get(number)
        if asked is None:
            return
        if delta.finish_reason is not None:
            self._keeper.progressed()
            self._suspects.cleared(asked.mark)
            self._end(number, delta)
        elif asked.full:
            self._keeper.send(Cancel(number))
            self._end(number, SlowConsumer(f"{MAX_MAILBOX} pieces of the answer were not taken", source="edge"))
        else:
            asked.put(delta)

    def _end(self, number: int, item: Delta | CausewayError | int) -> None:
        asked = self._asked.pop(number, None)
        if asked is not None:
            asked.put(item)

    def _on_up(self, ready: Ready) -> None:
        self._context_length = ready.context_length
        self._up = not self._closed
        for number, asked in list(self._asked.items()):
            try:
                self._keeper.send(asked.frame)
            except CausewayError as error:
                self._end(number, error)

    def _on_down(self, why: str, back_in: float) -> None:
        """Who was held gets an error at once; who waited goes on waiting, but not for long."""
        self._up = False
        self._back_at = self._clock() + back_in
        if self._losing_patience is not None:
            self._losing_patience.cancel()
        self._losing_patience = asyncio.get_running_loop().call_later(PATIENCE_S, self._lose_patience)
        for asked in self._asked.values():
            if asked.held:
                self._suspects.crashed(asked.mark)
        held = UpstreamFailed(f"the local model's process {why} while it answered this", source="edge", retry_after=1.0)
        self._fail_all(lambda asked: held if asked.held else None)

    def _lose_patience(self) -> None:
        if not self._up:
            self._fail_all(lambda _: self._not_ready())

    def _fail_all(self, error_of: Callable[[_Asked], CausewayError | None]) -> None:
        for number, asked in list(self._asked.items()):
            error = error_of(asked)
            if error is not None:
                # One instance raised twice would drag one request's traceback into another's.
                self._end(number, type(error)(error.message, source="edge", retry_after=error.retry_after))


def _marked(request: ChatRequest) -> bytes:
    try:
        return fingerprint(request)
    except UnicodeEncodeError:
        raise BadRequest("a text of the request holds half a character", source="edge") from None
