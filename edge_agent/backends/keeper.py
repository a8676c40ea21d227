"""Keeps one model process alive: starts it, watches it, and after its death starts another, later each time."""

import asyncio
import random
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import structlog

from edge_agent.backends.child import Child
from edge_agent.backends.pipe import Broken, Frame, FromModel, Load, Log, Ping, Pong, Ready, Stop
from edge_agent.backends.spawn import Spare
from shared.errors import CausewayError, Internal, UpstreamFailed

log = structlog.get_logger("causeway.llama")


@dataclass(frozen=True, slots=True, kw_only=True)
class KeeperRules:
    """Times in seconds."""

    beat_s: float = 1.0
    """While something is asked of it, how often the process must show that it lives."""
    silent_s: float = 10.0
    """Without a sign of life for so long, it is ended: well beyond what a crowded machine makes a process wait."""
    stuck_s: float = 60.0
    """So long may one step of the model, or one prompt's templating, take."""
    first_delay_s: float = 0.1
    max_delay_s: float = 30.0
    stop_s: float = 30.0
    """What an orderly end may take."""


class Keeper:
    """Belongs to the event loop that `start` runs on.

    `received` gets the frames that concern requests; `up` is called with each Ready; `down` after each death with the
    reason and the seconds until the next start; `busy` says if anything is asked of the process. The first life is the
    `spare`'s, if it can still be had.
    """

    def __init__(
        self,
        load: Load,
        *,
        received: Callable[[FromModel], None],
        up: Callable[[Ready], None],
        down: Callable[[str, float], None],
        busy: Callable[[], bool],
        rules: KeeperRules,
        spare: Spare | None = None,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self.restarts = 0
        self._load, self._rules, self._spare, self._jitter = load, rules, spare, jitter
        self._received, self._up, self._down, self._busy = received, up, down, busy
        self._child: Child | None = None
        self._ready: asyncio.Future[Ready] | None = None
        self._dead: asyncio.Future[str] | None = None
        self._task: asyncio.Task[None] | None = None
        self._failures = 0
        self._heard_at = 0.0
        self._busy_s = 0.0

    @property
    def pid(self) -> int | None:
        """Of the process that serves now."""
        return None if self._child is None else self._child.pid

    async def start(self) -> Ready:
        """Raises what the first process says is wrong with the model, or UpstreamFailed if it dies of it."""
        first: asyncio.Future[Ready] = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._keep(first))
        return await first

    async def aclose(self) -> None:
        """In good order if it goes quickly; idempotent."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    def send(self, frame: Frame) -> None:
        if self._child is not None:
            self._child.send(frame)

    def progressed(self) -> None:
        """A request was answered in full: the next death is the first one again."""
        self._failures = 0

    async def _keep(self, first: "asyncio.Future[Ready]") -> None:
        while (delay := await self._one_life_or_fault(first)) is not None:
            await asyncio.sleep(delay)
            self.restarts += 1

    async def _one_life_or_fault(self, first: "asyncio.Future[Ready]") -> float | None:
        """A fault of ours is a death like any other: no request may be left hanging by it."""
        try:
            return await self._one_life(first)
        except Exception as error:
            log.error("the model's process was given up", exception=type(error).__name__)
            if first.done():
                return self._fallen(f"was given up after {type(error).__name__}")
            first.set_exception(Internal("the model's process could not be kept", source="edge"))
            return None

    async def _one_life(self, first: "asyncio.Future[Ready]") -> float | None:
        """From start to death. Returns in how many seconds the next may begin; None if the first never served."""
        loop = asyncio.get_running_loop()
        self._ready, self._dead = loop.create_future(), loop.create_future()
        try:
            child = await Child.start(self._take, self._on_death, self._spare)
        except OSError as full:
            self._dead.set_result(f"cannot be started: {full.strerror}")
            if first.done():
                return self._fallen(self._dead.result())
            first.set_exception(UpstreamFailed(f"the model's process {self._dead.result()}", source="edge"))
            return None
        try:
            child.send(self._load)
            await asyncio.wait((self._ready, self._dead), return_when=asyncio.FIRST_COMPLETED)
            error = self._stillborn()
            if error is None:
                self._child = child
                self._up(self._ready.result())
                if not first.done():
                    first.set_result(self._ready.result())
                await self._watch(child, self._dead)
                self._child = None
            elif not first.done():
                first.set_exception(error)
                return None
            return self._fallen(self._dead.result() if error is None else error.message)
        finally:
            self._child = None
            await self._end(child)

    def _stillborn(self) -> CausewayError | None:
        """Why it will not serve."""
        if self._ready is None or self._dead is None:
            return None
        if self._ready.done():
            error = self._ready.exception()
            return error if isinstance(error, CausewayError) else None
        return UpstreamFailed(f"the model's process {self._dead.result()} while it loaded the model", source="edge")

    def _fallen(self, why: str) -> float:
        """Tell of it at once: the new one waits until the old one's memory is free."""
        delay = self._delay()
        log.error("the model's process died", why=why, restart_in_s=round(delay, 2))
        self._down(why, delay)
        return delay

    async def _watch(self, child: Child, dead: "asyncio.Future[str]") -> None:
        """Until it is dead. An idle process is left alone."""
        rules, loop = self._rules, asyncio.get_running_loop()
        watching = False
        while not dead.done():
            slept = loop.time()
            await asyncio.wait((dead,), timeout=rules.beat_s)
            if not self._busy():
                watching = False
                continue
            if not watching or loop.time() - slept > 2 * rules.beat_s:  # the whole machine may have slept
                watching, self._heard_at, self._busy_s = True, loop.time(), 0.0
            if loop.time() - self._heard_at > rules.silent_s:
                child.kill(f"gave no sign of life for {rules.silent_s:g} s")
            elif self._busy_s > rules.stuck_s:
                child.kill(f"was at one step for more than {rules.stuck_s:g} s")
            else:
                with suppress(CausewayError):  # it takes nothing in: then it gives no sign of life either
                    child.send(Ping())

    async def _end(self, child: Child) -> None:
        if self._dead is not None and not self._dead.done():
            with suppress(CausewayError):
                child.send(Stop())
        await child.gone(self._rules.stop_s)

    def _take(self, frame: FromModel) -> None:
        self._heard_at = asyncio.get_running_loop().time()
        if isinstance(frame, Pong):
            self._busy_s = frame.busy_s
        elif isinstance(frame, Log):
            log.log({"debug": 10, "warning": 30, "error": 40}[frame.level], "llama.cpp", text=frame.text)
        elif isinstance(frame, Ready | Broken):
            self._settle(frame)
        else:
            self._received(frame)

    def _settle(self, frame: Ready | Broken) -> None:
        if self._ready is None or self._ready.done():
            return
        if isinstance(frame, Broken):
            self._ready.set_exception(frame.fault.error())
        else:
            self._ready.set_result(frame)

    def _on_death(self, why: str) -> None:
        if self._dead is not None and not self._dead.done():
            self._dead.set_result(why)

    def _delay(self) -> float:
        """Doubles with each death that no complete answer lies between; half of it is left to chance."""
        delay = min(self._rules.max_delay_s, self._rules.first_delay_s * 2.0**self._failures)
        self._failures = min(self._failures + 1, 30)
        return delay * (0.5 + self._jitter() / 2)
