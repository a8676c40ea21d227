"""The process that runs the model: `python -m edge_agent.backends.process`, started by `child.py` alone.

Its standard input is one end of a socket pair; frames of `pipe.py` come and go there until the daemon says Stop or is
gone. It knows no secret, opens nothing but the model, and native code may crash in it: the daemon starts another.

main thread: frames in -> a thread: grammars -> two threads: template and tokens -> Worker: steps -> a frame a step out
"""

import ctypes
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from traceback import extract_tb
from typing import Any

from edge_agent.backends.batch import Batcher, Event, Job
from edge_agent.backends.jobs import Jobs
from edge_agent.backends.native import Native, preload
from edge_agent.backends.pipe import (
    Ask,
    Broken,
    Cancel,
    Count,
    Counted,
    Fault,
    Frame,
    Held,
    Load,
    Log,
    Ping,
    Pong,
    Ready,
    Step,
    Stop,
    ToModel,
    encode,
    to_model,
)  # fmt: skip
from edge_agent.backends.prefixes import Prefixes
from edge_agent.backends.saved import Saved, fingerprint
from edge_agent.backends.worker import Worker
from shared.errors import BadFrame, CausewayError, Internal
from shared.guides import Guide
from shared.schemas import ChatRequest, Delta

READ = 1 << 18
EXIT_FAULT = 70
PROMPT_THREADS = 2
PR_SET_PDEATHSIG = 1
MAX_LOG_CHARS = 2000


class ModelProcess:
    """Frames in and out of `connection`, and the model between them."""

    def __init__(self, connection: socket.socket, clock: Callable[[], float] = time.monotonic) -> None:
        self._connection = connection
        self._clock = clock
        self._writing = threading.Lock()
        self._prompts = ThreadPoolExecutor(PROMPT_THREADS, thread_name_prefix="prompt")
        self._prompts_since: dict[int, float] = {}
        self._asked: dict[int, Job | None] = {}
        self._entering = threading.Lock()
        self._worker: Worker | None = None
        self._jobs: Jobs | None = None

    def run(self) -> None:
        """Until Stop, the end of the pipe, or a frame that is none (BadFrame)."""
        frames = to_model()
        while data := self._connection.recv(READ):
            for frame in frames.feed(data):
                if isinstance(frame, Stop):
                    if self._worker is not None:
                        self._worker.stop()
                    return
                self._take(frame)

    def _take(self, frame: ToModel) -> None:
        if isinstance(frame, Load) and self._worker is None:
            self._load(frame)
        elif isinstance(frame, Ping):
            self._send(Pong(self._busy_s()))
        elif isinstance(frame, Cancel):
            self._cancel(frame.number)
        elif isinstance(frame, Ask | Count) and self._jobs is not None:
            with self._entering:
                self._asked[frame.number] = None
            if isinstance(frame, Ask):
                self._guide(self._jobs, frame.number, frame.request)
            else:
                self._start(self._count, self._jobs, frame.number, frame.request)
        else:
            raise BadFrame(f"{type(frame).__name__} came out of turn")

    def _load(self, load: Load) -> None:
        native = partial(
            Native, Path(load.path), slots=load.slots, context=load.context, threads=load.threads, log=self._log
        )
        self._worker = Worker(
            native,
            slots=load.slots,
            opened=partial(self._opened, load),
            admitted=self._admitted,
            post=self._post,
            failed=self._die,
            prefixes=Prefixes(load.prefix_bytes),
            saved=None if load.saved is None else partial(self._saved, load, Path(load.saved)),
        )
        self._worker.start()

    def _saved(self, load: Load, folder: Path, native: Native) -> Saved:
        mark = fingerprint(Path(load.path), runtime=native.version)
        return Saved(folder, load.saved_bytes, mark, self._log)

    def _opened(self, load: Load, result: Native | CausewayError) -> None:
        try:
            if isinstance(result, CausewayError):
                raise result
            self._jobs = Jobs(result, load.name, context_shift=load.context_shift)
        except CausewayError as error:
            self._send(Broken(Fault.of(error)))
            return
        self._send(Ready(result.context_length))

    def _guide(self, jobs: Jobs, number: int, request: ChatRequest) -> None:
        """Compile its grammar, if it has one, before anything else, where no other request's prompt waits for it."""
        try:
            compiling = jobs.guide(request)
        except CausewayError as error:
            self._refuse(number, error)
            return
        work = partial(self._ask, compiling=compiling)
        if compiling is None:
            self._start(work, jobs, number, request)
        else:
            compiling.add_done_callback(lambda _: self._start(work, jobs, number, request))

    def _start(self, work: Callable[..., None], jobs: Jobs, number: int, request: ChatRequest) -> None:
        self._prompts.submit(self._guarded, work, jobs, number, request)

    def _guarded(self, work: Callable[..., None], jobs: Jobs, number: int, request: ChatRequest) -> None:
        """A request's way to its tokens, in a thread of its own; whatever goes wrong there is this request's error."""
        with self._entering:
            if number not in self._asked:
                return
            self._prompts_since[number] = self._clock()
        self._send(Held(number, True))
        try:
            work(jobs, number, request)
        except CausewayError as error:
            self._refuse(number, error)
        except Exception as error:
            self._log("error", f"a prompt failed: {_place(error)}")
            self._refuse(number, Internal("the prompt could not be prepared", source="edge"))
        finally:
            del self._prompts_since[number]

    def _ask(self, jobs: Jobs, number: int, request: ChatRequest, *, compiling: "Future[Guide] | None") -> None:
        job = jobs.job(number, request, None if compiling is None else compiling.result())
        self._send(Held(number, False))
        with self._entering:
            if number not in self._asked or self._worker is None:
                return
            self._asked[number] = job
            self._worker.submit(job)

    def _count(self, jobs: Jobs, number: int, request: ChatRequest) -> None:
        tokens = len(jobs.tokens(request))
        with self._entering:
            self._asked.pop(number, None)
        self._send(Counted(number, tokens))

    def _refuse(self, number: int, error: CausewayError) -> None:
        with self._entering:
            self._asked.pop(number, None)
        self._send(Step(faults=((number, Fault.of(error)),)))

    def _cancel(self, number: int) -> None:
        with self._entering:
            job = self._asked.pop(number, None)
            if job is not None and self._worker is not None:
                self._worker.cancel(job)

    def _admitted(self, job: Job) -> None:
        self._send(Held(job.number, True))

    def _post(self, batcher: Batcher, events: list[Event]) -> None:
        deltas: list[tuple[int, Delta]] = []
        faults: list[tuple[int, Fault]] = []
        with self._entering:
            for job, event in events:
                if isinstance(event, CausewayError):
                    faults.append((job.number, Fault.of(event)))
                else:
                    deltas.append((job.number, event))
                if isinstance(event, CausewayError) or event.finish_reason is not None:
                    self._asked.pop(job.number, None)
        if deltas or faults:
            self._send(Step(tuple(deltas), tuple(faults), batcher.tokens_per_s, batcher.prefill_tokens_per_s))

    def _busy_s(self) -> float:
        now = self._clock()
        prompts = [now - since for since in list(self._prompts_since.values())]
        return max([0.0 if self._worker is None else self._worker.step_s, *prompts])

    def _die(self, error: Exception) -> None:
        """What a fault of ours leaves of the model's state is not to be trusted: the next process starts clean."""
        self._log("error", f"the worker died: {_place(error)}")
        os._exit(EXIT_FAULT)

    def _log(self, level: Any, text: str) -> None:
        self._send(Log(level, text[:MAX_LOG_CHARS]))

    def _send(self, frame: Frame) -> None:
        data = encode(frame)
        try:
            with self._writing:
                self._connection.sendall(data)
        except OSError:
            os._exit(0)  # the daemon is gone


def _place(error: BaseException) -> str:
    """Its type and where it came from: what it says may quote a prompt."""
    last = extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} in {Path(last.filename).name}:{last.lineno}"


def _end_with_the_daemon() -> None:
    """The end of the pipe says so too, but to a thread that may be kept from running."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def main() -> None:
    # Signals for the whole group (Ctrl-C, a stopping service) are the daemon's to obey: it still has answers to finish.
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)
    _end_with_the_daemon()
    connection = socket.socket(fileno=os.dup(0))
    with suppress(Exception):  # said when a model is to be opened, where there is somebody to tell
        preload()
    try:
        ModelProcess(connection).run()
    except (BadFrame, OSError) as error:
        sys.stderr.write(f"the model's process ends: {error}\n")
        os._exit(EXIT_FAULT)
    # Threads that still run, a template without end among them, must not hold up the end.
    os._exit(0)


if __name__ == "__main__":
    main()
