"""The one thread that owns the model: opens it, feeds it, and if it dies gives every request a typed error."""

import threading
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path

import structlog

from edge_agent.backends.batch import Batcher, Event, Job
from edge_agent.backends.native import Native
from shared.errors import CausewayError, Overloaded, UpstreamFailed

JOIN_S = 30.0
MAX_RETRY_AFTER_S = 30.0


class Worker:
    """`submit`, `counts` and `stop` may be called from any thread. Events are posted on the worker's own."""

    def __init__(
        self,
        path: Path,
        *,
        slots: int,
        context: int | None,
        threads: int | None,
        queue: int,
        post: Callable[[list[Event]], None],
        opened: Callable[[Native | CausewayError], None],
    ) -> None:
        self.slots = slots
        self.queue = queue
        self._open: Callable[[], Native] = partial(Native, path, slots=slots, context=context, threads=threads)
        self._post = post
        self._opened = opened
        self._wake = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._batcher: Batcher | None = None
        self._stopping = False
        self._failure: CausewayError | None = None
        self._thread = threading.Thread(target=self._main, name="llama", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Raises Overloaded if as many wait as may wait, or whatever the worker died of."""
        with self._wake:
            if self._failure is not None:
                raise _again(self._failure)
            if self._batcher is None or self._stopping:
                raise Overloaded("the local model is not ready", source="edge", retry_after=1.0)
            running, waiting = self._batcher.running, len(self._waiting)
            if running + waiting >= self.slots + self.queue:
                retry_after = min(MAX_RETRY_AFTER_S, 1.0 + waiting / self.slots)
                raise Overloaded(
                    f"{waiting} requests wait for the local model already", source="edge", retry_after=retry_after
                )
            self._waiting.append(job)
            self._wake.notify()

    def cancel(self, job: Job) -> None:
        """It leaves the queue at once, or its slot before the next step. Nothing more is posted for it."""
        job.cancelled = True
        with self._wake:
            if job in self._waiting:
                self._waiting.remove(job)

    @property
    def batcher(self) -> Batcher | None:
        """None while there is no working model."""
        return self._batcher if self._failure is None and not self._stopping else None

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def stop(self) -> None:
        """End the thread, and with it every request; waits for the step under way."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join(JOIN_S)

    def _main(self) -> None:
        try:
            native = self._open()
        except Exception as error:
            self._opened(self._die(error))
            return
        try:
            batcher = Batcher(native, self.slots)
            self._batcher = batcher
            self._opened(native)
            while self._next(batcher):
                events = batcher.step()
                if events:
                    self._post([event for event in events if not event[0].cancelled])
            self._die(UpstreamFailed("the local model was closed", source="edge"))
        except Exception as error:
            self._die(error)
        finally:
            native.close()

    def _next(self, batcher: Batcher) -> bool:
        """Wait until there is something to compute; False if the worker is to stop."""
        with self._wake:
            while not self._stopping:
                batcher.sweep()
                while self._waiting and batcher.running < self.slots:
                    batcher.admit(self._waiting.popleft())
                if batcher.running:
                    return True
                self._wake.wait()
            return False

    def _die(self, error: Exception) -> CausewayError:
        """From now on every request gets this error, those under way included: none is left hanging."""
        if not isinstance(error, CausewayError):
            # The traceback's frames hold prompts; its type and place do not.
            structlog.get_logger("causeway.llama").error("the worker died", exception=type(error).__name__)
            error = UpstreamFailed(f"the local model's worker died: {type(error).__name__}", source="edge")
        with self._wake:
            self._failure = error
            jobs = [*self._waiting, *(self._batcher.jobs if self._batcher else [])]
            self._waiting.clear()
        self._post([(job, _again(error)) for job in jobs])
        return error


def _again(error: CausewayError) -> CausewayError:
    """An exception of its own for each request: one instance raised twice would drag one's traceback into another's."""
    return type(error)(error.message, param=error.param, source=error.source, retry_after=error.retry_after)
