"""Scripted Answers: what a test puts where the Agent, a backend or the engine would be."""

import asyncio
from collections.abc import AsyncGenerator, Iterable, Sequence
from dataclasses import dataclass

from shared.errors import CausewayError
from shared.schemas import Answer, ChatRequest, Delta, Route, TokenLogprob, TopLogprob, Usage


def text_of(deltas: Iterable[Delta]) -> str:
    return "".join(delta.text for delta in deltas)


class ScriptedAnswer:
    """Plays a script: a Delta is yielded, an exception raised, an asyncio.Event awaited, a float slept.

    `requests` are those begun, `closed` the ids of those that ended in any way; `running` those in between.
    """

    def __init__(self, *script: Delta | Exception | asyncio.Event | float) -> None:
        self.script: Sequence[Delta | Exception | asyncio.Event | float] = script
        self.tenants: list[str] = []
        self.requests: list[ChatRequest] = []
        self.closed: list[str] = []
        self.yielded = 0
        self.begun = asyncio.Event()
        self.ended = asyncio.Event()

    @property
    def running(self) -> int:
        return len(self.requests) - len(self.closed)

    async def idle(self) -> None:
        """Wait until nothing is running."""
        while self.running:
            self.ended.clear()
            await self.ended.wait()

    async def answer(self, request: ChatRequest, tenant: str = "") -> AsyncGenerator[Delta, None]:
        self.requests.append(request)
        self.tenants.append(tenant)
        self.begun.set()
        try:
            for step in self.script:
                if isinstance(step, Delta):
                    self.yielded += 1
                    yield step
                elif isinstance(step, Exception):
                    raise step
                elif isinstance(step, asyncio.Event):
                    await step.wait()
                else:
                    await asyncio.sleep(step)
        finally:
            self.closed.append(request.id)
            self.ended.set()


class EchoAnswer:
    """Answers with the last message (or the prompt), one word a token, up to `max_tokens` words.

    Honours `max_tokens` and `logprobs`; says its route on the first and the last delta.
    """

    def __init__(self, target: str = "edge", reason: str = "requested", failovers: int = 0) -> None:
        self.route = Route(target=target, reason=reason, failovers=failovers, model="echo")  # type: ignore[arg-type]
        self.requests: list[ChatRequest] = []

    async def answer(self, request: ChatRequest) -> AsyncGenerator[Delta, None]:
        self.requests.append(request)
        text = request.prompt if request.prompt is not None else request.messages[-1].content
        words = [word + " " for word in text.split()]
        limit = request.sampling.max_tokens or len(words)
        for at, word in enumerate(words[:limit]):
            await asyncio.sleep(0)
            yield Delta(text=word, tokens=1, logprobs=_logprobs(request, word), route=None if at else self.route)
        yield Delta(
            finish_reason="length" if limit < len(words) else "stop",
            usage=Usage(prompt_tokens=len(words), completion_tokens=min(limit, len(words))),
            route=self.route,
        )


def _logprobs(request: ChatRequest, word: str) -> tuple[TokenLogprob, ...]:
    wanted = request.sampling.logprobs
    if wanted is None:
        return ()
    top = tuple(TopLogprob(f"alt{at}", -1.0 - at, tuple(b"alt")) for at in range(wanted))
    return (TokenLogprob(word, -0.5, tuple(word.encode()), top),)


@dataclass(frozen=True)
class Stats:
    """The engine's numbers, as the gateway reads them."""

    running: int = 1
    waiting: int = 2
    waiting_batch: int = 1
    kv_blocks_used: int = 3
    kv_blocks_total: int = 4
    prefix_hit_tokens: int = 5
    prefix_query_tokens: int = 6
    preemptions: int = 7
    expired: int = 9
    generated_tokens: int = 8


class FakeEngine:
    """Any Answer, dressed as the cloud's engine. `salts` are those it was called with."""

    def __init__(self, inner: Answer) -> None:
        self.inner = inner
        self.salts: list[str] = []
        self.failure: CausewayError | None = None

    def stats(self) -> Stats:
        return Stats()

    def answer(self, request: ChatRequest, *, salt: str = "") -> AsyncGenerator[Delta, None]:
        self.salts.append(salt)
        return self.inner.answer(request)
