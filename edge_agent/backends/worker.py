"""The one thread that owns the model: opens it, feeds it, closes it. In the model's process."""

import threading
import time
from collections import deque
from collections.abc import Callable

from edge_agent.backends.batch import Batcher, Event, Job
from edge_agent.backends.drafting import Drafter
from edge_agent.backends.native import Native
from edge_agent.backends.prefixes import Prefixes
from edge_agent.backends.saved import Saved
from shared.errors import CausewayError


class Worker:
    """`submit`, `cancel` and `stop` may be called from any thread; the callbacks come on the worker's own.

    `opened` is told of the model, or why there is none; `admitted` of each job before the model sees it; `post` what a
    step led to; `failed` of a fault of ours or llama.cpp's, after which nothing more is computed.
    """

    def __init__(
        self,
        open_model: Callable[[], Native],
        *,
        slots: int,
        opened: Callable[[Native | CausewayError], None],
        admitted: Callable[[Job], None],
        post: Callable[[Batcher, list[Event]], None],
        failed: Callable[[Exception], None],
        prefixes: Prefixes | None = None,
        saved: Callable[[Native], Saved] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._slots = slots
        self._prefixes, self._saved = prefixes, saved
        self._open = open_model
        self._opened, self._admitted, self._post, self._failed = opened, admitted, post, failed
        self._clock = clock
        self._wake = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._stopping = False
        self._step_since: float | None = None
        self._thread = threading.Thread(target=self._main, name="llama", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def submit(self, job: Job) -> None:
        """How many wait is bounded by whoever submits."""
        with self._wake:
            self._waiting.append(job)
            self._wake.notify()

    def cancel(self, job: Job) -> None:
        """It leaves the queue at once, or its slot before the next step. Nothing more is posted for it."""
        job.cancelled = True
        with self._wake:
            if job in self._waiting:
                self._waiting.remove(job)

    @property
    def step_s(self) -> float:
        """For how long the present step has been under way; 0 between two."""
        since = self._step_since
        return 0.0 if since is None else self._clock() - since

    def stop(self) -> None:
        """End the thread after the step under way, and wait for it."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join()

    def _main(self) -> None:
        try:
            native = self._open()
        except CausewayError as error:
            self._opened(error)
            return
        except Exception as error:
            self._failed(error)
            return
        try:
            batcher = Batcher(native, self._slots, prefixes=self._prefixes, drafter=Drafter())
            saved = None if self._saved is None else self._saved(native)
            if saved is not None:
                saved.load(batcher.restore)
            self._opened(native)
            while self._next(batcher):
                self._step_since = self._clock()
                events = batcher.step()
                self._step_since = None
                self._post(batcher, [event for event in events if not event[0].cancelled])
            if saved is not None:
                saved.save(batcher.keepsakes())
        except Exception as error:
            self._failed(error)
        finally:
            native.close()

    def _next(self, batcher: Batcher) -> bool:
        """Wait until there is something to compute; False if the worker is to stop."""
        with self._wake:
            while not self._stopping:
                batcher.sweep()
                while self._waiting and batcher.running < self._slots:
                    job = self._waiting.popleft()
                    self._admitted(job)
                    batcher.admit(job)
                if batcher.running:
                    return True
                self._wake.wait()
            return False
